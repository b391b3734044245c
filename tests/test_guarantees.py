"""What no kill, signal, full disk, second writer or damage may do: one matrix for each promise, by the command line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TEXTS, damage, sign, tree, unchanged
from forks import Forks

import refrag

KILLS = int(os.environ.get("REFRAG_KILLS", "2"))  # random places per writer, beside those around its last renaming
STEPS = 5
ASKED = [("Where do smiths cast bells?", "the valley", "b"), ("Who wrote the notes?", "Ada Lovelace", "c"),
         ("Which lake does the Rhone leave?", "Lake Geneva", "a")]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
VARYING = {"seconds", "tokens_per_s", "ttft_s", "ttit_s", "stages", "spread", "runs", "peak_rss_mb", "peak_device_mb",
           "load_s", "ttft_ratio", "ttit_ratio", "file", "run", "out_dir", "command", "versions", "checkpoint"}
pytestmark = [pytest.mark.usefixtures("home"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")]


# ---- What writes, and what others see of it -------------------------------------------------------------------------


class Writer(NamedTuple):
    """A command that writes a folder, and what stands there before."""

    command: str
    old: str | None = None  # see `olds`
    parts: bool = False  # what it has finished so far may be seen


WRITERS = {
    "index": Writer("index"), "index again": Writer("index", "words"), "index --add": Writer("add", "words"),
    "index --add of the same": Writer("same", "words"), "cpt_recon": Writer("cpt_recon", None, True),
    "cpt_recon after damage": Writer("cpt_recon", "damaged", True), "train_gate": Writer("train_gate"),
    "save_pretrained": Writer("save", "checkpoint"), "export": Writer("export"), "eval": Writer("eval", None, True),
    "bench": Writer("bench", "bench", True),
}
TIDY = ("index", "cpt_recon", "eval")  # they remove what a killed one left half written


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder of corpora, texts and questions."""
    folder = tmp_path_factory.mktemp("files")
    many = [{"id": f"p{i}", "title": f"Passage {i}", "text": f"Passage {i} tells of {i * 13} bridges."}
            for i in range(20)]
    same = [{"id": i, "text": "The river, bronze bells and passage 17."} for i in "ab"]
    asked = [{"id": f"q{n}", "question": q, "answers": [a], "positive_ids": [i]} for n, (q, a, i) in enumerate(ASKED)]
    texts = [{"text": f"{text} {text.lower()}"} for text in TEXTS]
    for name, content in {"many": many, "same": [*same, *many], "asked": asked, "texts": texts, "eval": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "search.txt").write_text("".join(f"{question}\n" for question, *_ in [*ASKED, ["passage 17"]]))
    return folder


@pytest.fixture(scope="session")
def line(files, corpus, llama, embedder, index_dir):
    """The command line of a writer into a folder, with further options; the last of equal flags counts."""
    models = ["--dec", llama, "--enc", "decoder:2", "--k", 4]
    words = ["--retriever", "bm25", "--dec", llama, "--corpus"]
    run = [*models, "--seq_tokens", 32, "--batch_size", 2, "--steps", STEPS, "--save_every", 2, "--log_every", 1,
           "--lr", "1e-2", "--eval_every", 3, "--eval_limit", 2, "--device", "cpu", "--resume"]
    texts = ["--train_json", files / "texts.jsonl", "--eval_json", files / "eval.jsonl", *run]
    index, asked = ["--index_dir", index_dir], files / "asked.jsonl"
    lines = {
        "words": ["index", *words, corpus], "index": ["index", *words, files / "many.jsonl"],
        "add": ["index", "--add", *words, files / "many.jsonl"],
        "same": ["index", "--add", *words, files / "same.jsonl"],
        "vectors": ["index", *models, "--embed_model", embedder, "--corpus", files / "many.jsonl"],
        "cpt_recon": ["cpt_recon", *texts], "cpt_align": ["cpt_align", *texts],
        "cpt_next": ["cpt_next", *texts, "--lora_r", 2, "--grad_accum", 2],
        "sft": ["sft", *index, "--rag_json", asked, "--eval_json", asked, "--topk", 2, "--distill", 1, *run],
        "train_gate": ["train_gate", *index, "--rag_json", asked, "--topk", 2, "--epochs", 1, *models],
        "eval": ["eval", *index, "--qa", asked, "--topk", 2, "--max_new", 3, "--modes", "full", "refrag", *models,
                 "--resume"],
        "bench": ["bench", *index, "--question", ASKED[0][0], "--contexts", 60, "--p", 0, "--new", 3, "--repeats", 2,
                  *models],
        "export": ["export", *index, "--question", ASKED[0][0], "--max_new", 3, *models],
        "generate": ["generate", *index, "--questions", asked, "--topk", 2, "--max_new", 4, *models, "--resume"],
    }

    def call(command: str, out: Path, *more: object) -> list[object]:
        flag = {"index": "--index_dir", "generate": "--out"}.get(lines[command][0], "--out_dir")
        return [*lines[command], flag, out, "--threads", 1, "--quiet", "--json", *more]

    return call


class Finished(NamedTuple):
    """What a writer that nothing disturbed has written, and the changes of files that it made."""

    folder: Path
    changes: list[list[str]]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, forks, line):
    """The folders of writers that were not disturbed, each made when it is first asked for. Do not write there."""
    made: dict[Writer, Finished] = {}

    def call(writer: Writer) -> Finished:
        if writer not in made:
            folder = tmp_path_factory.mktemp(writer.command) / "out"
            if writer.old:
                shutil.copytree(call.old(writer.old), folder)
            assert forks.run(argv(line, writer, folder, call), folder.parent) == 0, forks.err
            made[writer] = Finished(folder, forks.changes())
        return made[writer]

    def old(name: str) -> Path:
        """What stands there before."""
        if name in ("words", "bench"):
            return call(Writer(name)).folder
        run = call(WRITERS["cpt_recon"]).folder
        if name != "damaged":
            return run / "step-000005"
        copy = tmp_path_factory.mktemp("damaged") / "run"
        damage(shutil.copytree(run, copy) / "step-000005" / "projector.safetensors", "flipped")
        return copy

    call.old = old
    return call


def argv(line, writer: Writer, folder: Path, finished) -> list[object]:
    """The command line of a writer."""
    if writer.command != "save":
        return line(writer.command, folder)
    source = finished(WRITERS["cpt_recon"]).folder / "step-000004"
    return ["-c", f"refrag.RefragModel.from_pretrained({str(source)!r}).save_pretrained({str(folder)!r})"]


def lasting(value: object) -> object:
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        return {key: lasting(v) for key, v in value.items() if key not in VARYING}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def state(folder: Path) -> dict[str, object]:
    """What a folder holds, of checkpoints the newest: weights as they are, of JSON what does not differ by run."""
    found: dict[str, object] = {}
    newest = max((p.name for p in folder.glob("step-*")), default="")
    for name, content in tree(folder).items():
        if name.startswith(".") or name.endswith("manifest.json") or "step-" in name and not name.startswith(newest):
            continue
        if name.endswith((".json", ".jsonl")):
            rows = content.splitlines() if name.endswith("l") else [content]
            found[name] = [lasting(json.loads(row)) for row in rows]
        elif name.endswith(".safetensors"):
            found[name] = content
    return found


@pytest.fixture
def look(run, files, llama):
    """What others find in a folder: of an index its answers, of anything else its `state`; None for nothing."""

    def call(writer: Writer, folder: Path) -> object:
        if writer.command in ("save", "train_gate") and folder.parent.exists():  # who reads it mends it first
            run("generate", "--prompt", "<doc id='1'>a</doc>b", "--load_dir", folder, "--max_new", 1, "--dec", llama)
        if line_of(writer) != "index":
            return state(folder) if folder.exists() else None
        code, out, err = run("search", "--index_dir", folder, "--questions", files / "search.txt", "--json", "--quiet")
        if code == 2 and ("no index in this folder" in err or "no such folder" in err):
            return None
        assert (code, err) == (0, ""), err
        return out

    return call


def line_of(writer: Writer) -> str:
    """The kind of command that a writer is."""
    return "index" if writer.command in ("words", "index", "add", "same", "vectors") else writer.command


def check_whole(folder: Path) -> None:
    """Nothing in a folder is half there: JSON can be read, and what a manifest lists is as it says."""
    for path in folder.rglob("*.json*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        content = path.read_bytes()
        for row in content.splitlines()[:-1] if path.suffix == ".jsonl" else [content]:  # the last one may be half
            facts = json.loads(row)
        for name, entry in facts["files"].items() if path.name == "manifest.json" else ():
            listed = (path.parent / name).read_bytes()
            assert entry == {"bytes": len(listed), "sha256": hashlib.sha256(listed).hexdigest()}
    assert all((step / "manifest.json").exists() for step in folder.glob("step-*"))


def leftovers(folder: Path, beside: bool = True) -> list[str]:
    """What a writer should have removed, in its folder and beside it."""
    found = [p.name for p in [*folder.glob("*"), *(folder.parent.glob("*") if beside else ())]]
    index = folder / "manifest.json"
    current = [segment["folder"] for segment in json.loads(index.read_text()).get("segments", [])] if (
        index.exists()) else []
    return [name for name in found if re.fullmatch(r"\..*\.tmp", name)
            or (name.startswith("gen-") and name not in current)]


def visible_renames(changes: list[list[str]]) -> list[int]:
    """The numbers of the changes by which something gets the name that others look for."""
    return [n for n, (what, *paths) in enumerate(changes, 1)
            if what == "os.rename" and "/." not in paths[1] and "/." in paths[0]
            and "/." not in str(Path(paths[0]).parent)]


# ---- On disk before it has its name ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the paths of open files")
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_gets_its_name_before_it_is_on_disk(finished, name):
    """Files, then the folders around them; the renaming is written after it. Pictures may be lost."""
    folder, changes = finished(WRITERS[name])
    published = [n for n in visible_renames(changes) if not changes[n - 1][2].endswith(".png")]
    assert published
    for n in published:
        source, target = map(Path, changes[n - 1][1:])
        before = {}
        for number, (what, path, *_) in enumerate(changes[: n - 1]):
            before[path] = before.get(path, ()) + ((what, number),)
        inside = [target, *target.rglob("*")] if target.exists() else [target]
        for path in (source / p.relative_to(target) for p in inside):
            last = {what: number for what, number in before.get(str(path), ())}
            assert last.get("fsync", -1) > last.get("open", -1), f"{path} is not written through"
        assert ["fsync", str(target.parent)] in changes[n:]


# ---- Kills and errors -----------------------------------------------------------------------------------------------


@pytest.fixture
def disturb(forks, finished, look, line, tmp_path):
    """Run a writer up to a fault, look at what it left, and run it again to its end; the exit code of the first."""

    def call(name: str, at: int, fault: int) -> int:
        writer, folder = WRITERS[name], tmp_path / str(at) / "out"
        folder.parent.mkdir()
        if writer.old:
            shutil.copytree(finished.old(writer.old), folder)
        before, after = look(writer, folder), look(writer, finished(writer).folder)
        code = forks.run(argv(line, writer, folder, finished), folder.parent, {at: fault})
        if writer.old != "damaged":
            check_whole(folder)
        assert code != 0 and (fault == signal.SIGKILL or leftovers(folder) == []), leftovers(folder)
        now = None if writer.parts else look(writer, folder)
        assert writer.parts or now in (before, after)
        if now != after or line_of(writer) == "index":
            assert forks.run(argv(line, writer, folder, finished)) == 0, forks.err
        assert look(writer, folder) == after
        assert leftovers(folder, fault != signal.SIGKILL) == [] or line_of(writer) not in TIDY
        return code

    return call


def places(changes: list[list[str]], name: str, allowed: tuple[str, ...] = ()) -> list[int]:
    """Where to disturb a writer: at its last renamings, just after the last one, and anywhere."""
    last = visible_renames(changes)[-2:]
    begun = max([0, *(n for n, (_, path, *_) in enumerate(changes, 1) if path.endswith("lock"))])
    within = [n for n, (what, *_) in enumerate(changes, 1) if not allowed or (what in allowed and n > begun)]
    others = random.Random(name).sample(within, min(KILLS, len(within)))
    return sorted({*last, last[-1] + 1, *others} & set(within))


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_leaves_the_old_or_the_new_and_it_goes_on(finished, disturb, name):
    """The file that was being written then is cut as well."""
    for at in places(finished(WRITERS[name]).changes, name):
        assert disturb(name, at, signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.parametrize("name", WRITERS)
def test_an_error_leaves_the_old_or_the_new_and_it_goes_on(finished, disturb, name):
    """A full disk is told as one, wherever it is noticed, and nothing half written stays."""
    for at in places(finished(WRITERS[name]).changes, name, ("open", "os.rename", "fsync")):
        assert disturb(name, at, -errno.ENOSPC) == (1 if name == "save_pretrained" else 6)
