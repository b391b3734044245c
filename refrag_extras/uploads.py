"""`serve --writable`: files sent to the server become part of its index.

`index --add` does the work in a process of its own, so that a file from elsewhere can neither block nor end the server.
It builds the next generation beside the current one; the server switches to it at its next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

import refrag
from refrag_extras import documents
from refrag_extras.serve import Refused, event

MOST_BYTES, MOST_FILES, MOST_WAITING = 64 << 20, 100, 8
BAR = re.compile(r"(\w+): +\d+%\|.*?\| *(\d+)/(\d+) ")  # as tqdm draws it


def kinds() -> list[str]:
    """The suffixes of files that are taken here; none is compressed, which could hold any amount."""
    return sorted([*documents.TEXTS, *refrag.OBJECTS, *refrag.TABLES,
                   *(documents.READERS if documents.installed() else ())])


def check_names(names: list[str]) -> None:
    """Raises Refused unless they are different names of files without a path, of kinds that are read."""
    for name in names:
        if not name or name[0] == "." or Path(name).name != name or "\\" in name or refrag.CONTROL.search(name):
            raise Refused(400, f"{name!r} is no name for a file here", "invalid_name", "file")
        if len(os.fsencode(name)) > 200:
            raise Refused(400, f"{name[:40]}..: the name is too long", "invalid_name", "file")
        if Path(name).suffix.lower() not in kinds():
            raise Refused(415, f"{name}: files of this kind are not read, but {' '.join(kinds())}", "kind", "file")
        if names.count(name) > 1:
            raise Refused(400, f"two files are called {name}", "invalid_name", "file")


def flags(*configs: refrag.Options, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Options that are not the defaults, as a command line. names: those that count, if not all."""
    for config in configs:
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if value != f.default and (not names or f.name in names):
                yield from [f"--{f.name}"] if value is True else [f"--{f.name}", str(value)]


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of an output, and the states of its progress bars."""
    rest = b""
    while data := await stream.read(4096):
        *whole, rest = re.split(rb"[\r\n]", rest + data)
        for line in filter(None, (line.decode("utf-8", "replace").strip() for line in whole)):
            yield line


class Uploads:
    """Takes files and indexes them, one request after another."""

    def __init__(self, timeout: float, index: refrag.IndexConfig, models: refrag.ReaderConfig,
                 runtime: refrag.RuntimeConfig):
        """timeout: seconds for a request's body. Raises RefragError."""
        refrag.require(index.index_dir is not None, "--writable needs an index: name its --index_dir")
        refrag.require(not index.index_dir.startswith("milvus+file:"),
                       "--writable: Milvus Lite lets no second process write: use a folder or a server")
        if not importlib.util.find_spec("python_multipart"):
            raise refrag.MissingError(f"--writable needs a library that reads forms: {documents.INSTALL}")
        self.timeout, self.turn, self.waiting = timeout, asyncio.Lock(), 0
        place = index.index_dir if refrag.milvus_for(index.index_dir) else os.path.abspath(index.index_dir)
        self.home = refrag.cache_home() / "uploads" / hashlib.sha256(place.encode()).hexdigest()[:16]
        self.folder = self.home / "uploads"  # the same each time: ids begin with its name
        self.command = [sys.executable, str(Path(refrag.__file__).resolve()), "index", "--add", "--json", "--corpus",
                        str(self.folder), *flags(index, names=("index_dir", "embed_model")), *flags(models),
                        *flags(runtime, names=("device", "threads", "offline"))]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("REFRAG_")}
        self.environment |= {"REFRAG_HOME": str(refrag.cache_home().absolute()), "REFRAG_BAR_SECONDS": "0.5"}

    def limits(self) -> dict[str, Any]:
        """What a client should know before it sends anything."""
        return {"bytes": MOST_BYTES, "files": MOST_FILES, "kinds": kinds()}

    async def post(self, request: Request) -> StreamingResponse:
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in request.headers:  # which would count instead of it
            raise Refused(411, "the request must tell its length", "length_required")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"the files have more than {MOST_BYTES >> 20} MB together", "too_large")
        if self.waiting >= MOST_WAITING:
            raise Refused(429, "others are adding files: come again later", "queue_full")
        try:
            async with asyncio.timeout(self.timeout):
                form = await request.form(max_files=MOST_FILES, max_fields=8)
        except TimeoutError:
            raise Refused(408, "the request did not come to its end in time", "timeout") from None
        except HTTPException as error:
            raise Refused(400, error.detail, "invalid_form") from None
        files = [value for value in form.getlist("file") if isinstance(value, UploadFile)]
        if not files:
            raise Refused(400, "send a form with files in its field file", "missing", "file")
        check_names([file.filename for file in files])
        return StreamingResponse(self.added(files), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})

    async def added(self, files: list[UploadFile]) -> AsyncIterator[str]:
        """What happens to files, as events. When the client goes, Starlette ends this, and that ends the work."""
        self.waiting += 1
        try:
            if self.turn.locked():
                yield event({"stage": "waiting"})
            async with self.turn:
                with self.staged(files):
                    async with contextlib.aclosing(self.index()) as states:  # ends the process before the files go
                        async for state in states:
                            yield event(state)
        except Exception as error:
            yield event({"error": {"message": refrag.classify(error)[1]}})
        finally:
            self.waiting -= 1

    @contextlib.contextmanager
    def staged(self, files: list[UploadFile]) -> Iterator[None]:
        """The files in a folder of their own, which no other server for this index uses meanwhile."""
        self.home.mkdir(0o700, parents=True, exist_ok=True)
        with refrag.exclusive(self.home / ".lock", "the folder for added files"):
            shutil.rmtree(self.folder, ignore_errors=True)  # of a server that was killed
            self.folder.mkdir()
            try:
                for file in files:
                    with file.file as sent, (self.folder / file.filename).open("xb") as copy:
                        shutil.copyfileobj(sent, copy)
                yield
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    async def index(self) -> AsyncIterator[dict[str, Any]]:
        """Run `index --add`: its progress, what it skipped, and last its counts or its error."""
        pipes, skipped = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE), []
        yield {"stage": "indexing"}
        process = await asyncio.create_subprocess_exec(*self.command, **pipes, env=self.environment)
        try:
            async for line in lines_of(process.stderr):
                if bar := BAR.match(line):
                    yield {"stage": bar[1], "done": int(bar[2]), "total": int(bar[3])}
                elif line.startswith("skipped: "):
                    skipped.append(line.removeprefix("skipped: ").replace(f"{self.folder.as_posix()}/", ""))
            out = (await process.stdout.read()).decode().replace(f"{self.folder.as_posix()}/", "")
            code = await process.wait()
        finally:
            if process.returncode is None:  # the index stays the old one
                process.kill()
        result = json.loads(out) if out else {"error": {"message": f"indexing ended with code {code}"}}
        if not result.get("added") and skipped:
            result["error"] = {"message": "; ".join(skipped)}
        if "error" in result:
            yield {"error": {"message": result["error"]["message"]}}
        else:
            yield {name: result[name] for name in ("added", "replaced_documents", "passages")} | {"skipped": skipped}
