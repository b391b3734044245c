"""Shared by the commands that run long and write a folder: facts about device, libraries and data; processes; memory;
the folder's lock; the settings that a resumed run must share; the lines that are finished already."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
import torch
import transformers

import refrag
from refrag import RuntimeConfig, require, sha256_file


def describe_device(runtime: RuntimeConfig) -> dict[str, Any]:
    device = refrag.pick_device(runtime.device)
    facts = {"device": str(device), "dtype": str(refrag.pick_dtype(runtime.dtype, device)).removeprefix("torch."),
             "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_mb": properties.total_memory // 2**20}
    return facts


def library_versions() -> dict[str, str]:
    modules = (torch, transformers, faiss, np, bm25s)
    own = {"refrag": refrag.__version__, "python": sys.version.split()[0]}
    return own | {m.__name__: m.__version__ for m in modules}


def file_facts(paths: Sequence[str]) -> list[dict[str, Any]]:
    return [{"file": name, "bytes": Path(name).stat().st_size, "sha256": sha256_file(Path(name))} for name in paths]


def without_folders(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`file_facts` without local paths, for checkpoints, which are shared."""
    return [fact | {"file": Path(fact["file"]).name} for fact in facts]


def process_group() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())  # or it would not join them over gloo


def glibc(function: str, *args: int) -> None:
    """Call one of glibc's memory functions; malloc_trim gives back what is free. Does nothing elsewhere."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), function, lambda *_: None)(*args)


def keep_memory() -> None:
    """Let glibc keep what a training step or an answer frees, since the next one wants the same sizes."""
    glibc("mallopt", -4, 0)  # M_MMAP_MAX: else every large tensor is mapped again, and each page of it is a fault
    glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: never


FREE_TO_CHANGE = {"out_dir", "resume", "log_every", "save_every", "eval_every", "threads", "quiet", "json", "debug",
                  "config", "offline", "torch_compile", "activation_checkpointing", "workers", "seconds"}


def make_accelerator(runtime: RuntimeConfig) -> Any:
    """accelerate's process group and precision: bfloat16 by autocast; trained weights stay float32."""
    import accelerate

    device = refrag.pick_device(runtime.device)
    mixed = "bf16" if refrag.pick_dtype(runtime.dtype, device) == torch.bfloat16 else "no"
    accelerate.state.AcceleratorState._reset_state()  # it would keep the precision of an earlier run in this process
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)  # a batch may have no vector at all
    return accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, kwargs_handlers=[unused])


def run_settings(configs: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Every option of a run by name, as JSON gives it back."""
    options = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    return json.loads(json.dumps(more | options))


def check_folder(flag: str, folder: Path, files: re.Pattern) -> None:
    """Raise UserError for a file, or a folder that holds others than `files`."""
    require(not folder.exists() or folder.is_dir(), f"{flag} {folder} is a file: name a folder")
    foreign = [p.name for p in folder.iterdir() if not files.fullmatch(p.name)] if folder.exists() else []
    require(not foreign, f"{flag} {folder} holds other files ({', '.join(sorted(foreign)[:3])}): name a new folder")


@contextlib.contextmanager
def locked_folder(folder: Path, what: str, begun: Callable[[], bool]) -> Iterator[None]:
    """Lock a folder; a new one is removed again if nothing was begun in it. Raises LockedError."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with refrag.exclusive(folder / ".lock", f"{what} {folder}"):
        try:
            yield
        finally:
            if is_new and not begun():
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def run_folder(folder: Path, writes: bool, files: re.Pattern, first: str) -> Iterator[None]:
    """Lock a run's folder; remove it again if the run never started (has no file `first`). files: the names it may
    hold. Raises UserError, LockedError."""
    check_folder("--out_dir", folder, files)
    if not writes:
        yield
        return
    with locked_folder(folder, "run", (folder / first).is_file):
        for left in folder.glob(".*.tmp"):  # a checkpoint or a picture that a kill left unfinished
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        yield


def finished_lines(path: Path, settings: dict[str, Any], flag: str) -> list[dict[str, Any]]:
    """Results of a JSON lines file to resume; a last line that a kill left unfinished goes. Raises RefragError."""
    data, found = path.read_bytes(), []
    intact = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(intact.splitlines(), start=1):
        try:
            found.append(json.loads(line))
            before, _ = found[-1]["settings"], found[-1]["id"]
            changed = [f"--{key} ({before.get(key)}, now {settings[key]})" for key in settings
                       if before.get(key) != settings[key]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise refrag.CorruptError(f"{path}:{number}: not a result of this command: name another {flag}") from None
        if changed:
            raise refrag.MismatchError(f"{path} was made with another {', '.join(changed)}: name another {flag}")
    os.truncate(path, len(intact))
    return found


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(refrag.dumps(line) + "\n")


class RunLog:
    """The records of a run's metrics.jsonl: at a start none, else those up to the checkpoint that it goes on from."""

    def __init__(self, folder: Path, writes: bool, step: int):
        self.path, self.writes, self.records = folder / "metrics.jsonl", writes, []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() and step else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run
                record = json.loads(line)
                self.records += [record] if record["step"] <= step else []
        if writes:
            refrag.write_atomic(self.path, "".join(refrag.dumps(record) + "\n" for record in self.records))

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.writes:
            append_line(self.path, record)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that the loop saves before it ends; a second one ends it at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if received:
            sys.exit(128 + signum)
        received.append(signum)
        refrag.notice("saving a checkpoint after this step; press Ctrl-C again to stop at once")

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
