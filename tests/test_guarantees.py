"""What no kill, signal, full disk, second writer or damage may do: one matrix for each promise, by the command line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
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


@pytest.fixture
def mount(tmp_path):
    """Mount something on a new folder and return it; unmounted at the end. Skips where mounting is not permitted."""
    mounted = []

    def call(*argv: object) -> Path:
        point = tmp_path / "mounted"
        point.mkdir()
        done = shutil.which("mount") and subprocess.run(["mount", *map(str, argv), str(point)], capture_output=True)
        if not done or done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.decode() if done else 'no mount program'}")
        mounted.append(point)
        return point

    yield call
    for point in mounted:
        if subprocess.run(["umount", str(point)]).returncode:
            subprocess.run(["umount", "--lazy", str(point)], check=True)


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
        if not folder.exists() and list(folder.parent.glob(".*.old")):  # who reads a checkpoint mends it first
            assert run("generate", "--prompt", "<doc id='1'>a</doc>b", "--load_dir", folder, "--max_new", 1)[0] == 0
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
    looks: dict[Path, object] = {}

    def known(writer: Writer, folder: Path | None) -> object:
        if folder is not None and folder not in looks:
            looks[folder] = look(writer, folder)
        return looks.get(folder)

    def call(name: str, at: int, fault: int) -> int:
        writer, folder = WRITERS[name], tmp_path / str(at) / "out"
        folder.parent.mkdir()
        old = finished.old(writer.old) if writer.old else None
        if old is not None:
            shutil.copytree(old, folder)
        command, after = argv(line, writer, folder, finished), known(writer, finished(writer).folder)
        code = forks.run(command, folder.parent, {at: fault})
        if writer.old != "damaged":
            check_whole(folder)
        assert code != 0 and (fault == signal.SIGKILL or leftovers(folder) == []), leftovers(folder)
        now = None if writer.parts else look(writer, folder)
        assert writer.parts or now in (known(writer, old), after)
        if now != after or line_of(writer) == "index":
            assert forks.run(command) == 0, forks.err
            assert look(writer, folder) == after
        assert leftovers(folder, fault != signal.SIGKILL) == [] or line_of(writer) not in TIDY
        return code

    return call


def places(changes: list[list[str]], name: str, error: bool = False) -> list[int]:
    """Where to disturb a writer: at its last renamings, just after the last one, and anywhere.

    Errors come where it writes something new: they must not pass for an error of what is done already.
    """
    last = visible_renames(changes)[-2:]
    begun = max([0, *(n for n, (_, path, *_) in enumerate(changes, 1) if path.endswith("lock"))])
    within = [n for n, (what, path, *_) in enumerate(changes, 1) if not error
              or (n > begun and what in ("open", "os.rename", "fsync") and ("/." in path or what == "open"))]
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
    for at in places(finished(WRITERS[name]).changes, name, error=True):
        assert disturb(name, at, -errno.ENOSPC) == (1 if name == "save_pretrained" else 6)


# ---- Signals and resuming -------------------------------------------------------------------------------------------

PHASES = {"cpt_recon": signal.SIGTERM, "cpt_align": signal.SIGINT, "cpt_next": signal.SIGTERM, "sft": signal.SIGINT}


def records(changes: list[list[str]], step: int) -> int:
    """The number of the change that writes down a step; evaluations stand before step 1 and after step 3."""
    writes = [n for n, (what, path, *_) in enumerate(changes, 1) if what == "open" and path.endswith("/metrics.jsonl")]
    return writes[step + (step > 3)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_stopped_saves_and_goes_on(forks, finished, line, tmp_path, phase):
    """Between two checkpoints: the step is finished and saved; the rest is as if nothing had been."""
    whole, out = finished(Writer(phase, None, True)), tmp_path / "out"
    code = forks.run(line(phase, out), tmp_path, {records(whole.changes, 3): PHASES[phase]})
    assert (code, forks.err) == (SIGNALS[PHASES[phase]], "error: interrupted\n")
    assert json.loads(forks.out) == {"error": {"code": code, "message": "interrupted"}}
    assert sorted(p.name for p in out.glob("*step-*")) == ["step-000002", "step-000003"]
    assert forks.run(line(phase, out)) == 0, forks.err
    assert state(out) == state(whole.folder) and len(state(out)["metrics.jsonl"]) == STEPS + 3
    [entry] = json.loads((out / "step-000005" / "config.json").read_text())["history"]
    assert entry["steps"] == STEPS


@pytest.mark.parametrize(("moment", "code", "left"), [
    ("first", 143, []), ("cache", 143, []), ("begun", 143, []), ("twice", 130, ["step-000002"]),
    ("last", 0, ["step-000004", "step-000005"])])
def test_a_signal_at_other_moments_of_a_run(forks, finished, line, tmp_path, moment, code, left):
    """Before the first step it ends at once, and so it does at a second signal; in the last step nothing changes."""
    whole, out, home = finished(WRITERS["cpt_recon"]), tmp_path / "out", tmp_path / "home"
    third = records(whole.changes, 3)
    faults = {"first": {1: 15}, "cache": {8: 15}, "begun": {visible_renames(whole.changes)[0]: 15},
              "twice": {third: 2, third + 4: 2}, "last": {records(whole.changes, STEPS): 15}}[moment]
    watch, cache = (home, {"REFRAG_HOME": home}) if moment == "cache" else (tmp_path, {})
    assert forks.run(line("cpt_recon", out), watch, faults, **cache) == code, forks.err
    assert sorted(p.name for p in out.glob("*step-*")) == left and not list(home.glob("tokens/.*.tmp"))
    assert forks.run(line("cpt_recon", out), **cache) == 0, forks.err
    assert state(out) == state(whole.folder)


@pytest.mark.parametrize(("command", "sig"), [
    ("index", signal.SIGINT), ("add", signal.SIGTERM), ("vectors", signal.SIGINT), ("train_gate", signal.SIGTERM),
    ("eval", signal.SIGTERM), ("bench", signal.SIGINT), ("export", signal.SIGTERM)])
def test_a_command_that_is_stopped_leaves_nothing_half_done(forks, finished, look, line, tmp_path, command, sig):
    """It says so in one line; of a folder that it made for nothing, nothing stays; the next one does what is left."""
    writer, out = Writer(command, "words" if command == "add" else None), tmp_path / "out"
    if writer.old:
        shutil.copytree(finished.old(writer.old), out)
    before, whole = look(writer, out), finished(writer)
    at = visible_renames(whole.changes)[0] - 1
    assert forks.run(line(command, out), tmp_path, {at: sig}) == SIGNALS[sig]
    assert forks.err == "error: interrupted\n"
    assert command == "eval" or (look(writer, out), leftovers(out)) == (before, [".blocks.tmp"] * (command == "vectors"))
    assert out.exists() == (line_of(writer) in ("index", "eval"))
    assert forks.run(line(command, out)) == 0, forks.err
    assert look(writer, out) == look(writer, whole.folder) and leftovers(out) == []


def test_a_bench_keeps_the_rounds_that_were_finished(forks, finished, line, tmp_path):
    renames = visible_renames(finished(Writer("bench")).changes)
    assert forks.run(line("bench", tmp_path / "out"), tmp_path, {renames[-2]: 2}) == 130
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["rounds"] == 1 and {len(row["runs"]["ttft_s"]) for row in kept["rows"]} == {1}
    assert "Medians of 1 rounds" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("options", [
    ["--dtype", "bfloat16", "--train", "ped"], ["--dtype", "bfloat16", "--train", "pd", "--lora_r", 2],
    ["--enc", "BERT", "--train", "pe"]], ids=["bfloat16", "bfloat16 adapters", "separate encoder"])
def test_a_run_without_its_last_checkpoint_ends_in_the_same_weights(done, line, bert, tmp_path, options):
    """In bfloat16 a step is less than what two neighbouring weights differ by: they must not be read as such."""
    options = [bert if option == "BERT" else option for option in options] + ["--lr", "1e-5"]
    done(*line("cpt_recon", tmp_path / "whole", *options))
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "step-000005")
    done(*line("cpt_recon", cut, *options))
    assert state(cut) == state(tmp_path / "whole")


def blocks(changes: list[list[str]]) -> list[int]:
    """The numbers of the changes by which a block of embedded passages is kept."""
    return [n for n, (what, *paths) in enumerate(changes, 1) if what == "os.rename" and ".blocks.tmp/" in paths[-1]]


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory, forks, line) -> Path:
    """A corpus of two blocks, the index of a build that was killed after the first, and of one that was not."""
    folder = tmp_path_factory.mktemp("blocks")
    rows = [{"id": str(i), "text": f"River {i} floods field {i * 7}."} for i in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [line("vectors", folder / name, "--corpus", folder / "corpus.jsonl") for name in ("whole", "stopped")]
    assert forks.run(argv[0], folder) == 0, forks.err
    second = blocks(forks.changes())[1]
    assert forks.run(argv[1], folder, {second: signal.SIGKILL}) == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("change", ["nothing", "text", "k", "dtype", "damage"])
def test_an_index_that_was_stopped_embeds_no_block_twice(forks, line, two_blocks, tmp_path, change):
    """If it is made of the same, to the letter, and whole."""
    out = shutil.copytree(two_blocks / "stopped", tmp_path / "out")
    corpus = shutil.copy(two_blocks / "corpus.jsonl", tmp_path)
    if change == "text":
        Path(corpus).write_text(Path(corpus).read_text().replace("River", "Stream"))
    if change == "damage":
        [block] = (out / ".blocks.tmp").glob("[!.]*")
        damage(block, "truncated")
    argv = line("vectors", out, "--corpus", corpus, "--k", 8 if change == "k" else 4, "--dtype",
                "bfloat16" if change == "dtype" else "auto")
    assert forks.run([word for word in argv if word != "--quiet"], tmp_path) == 0
    assert len(blocks(forks.changes())) == (1 if change == "nothing" else 2)
    assert "an earlier run ended early" in forks.err and leftovers(out) == []
    assert change not in ("nothing", "damage") or tree(out / "gen-1") == tree(two_blocks / "whole" / "gen-1")


def test_answers_that_were_stopped_go_on(forks, finished, line, files, tmp_path):
    """Killed once the first line is written, and in the midst of the next: those that were finished stay as they are."""
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"question": f"{ASKED[n % 3][0]} {n}"}) + "\n" for n in range(40)))
    argv = line("generate", tmp_path / "out.jsonl", "--questions", many)
    pid = forks.start(argv)
    while not (tmp_path / "out.jsonl").exists() or b"\n" not in (kept := (tmp_path / "out.jsonl").read_bytes()):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL
    (tmp_path / "out.jsonl").write_bytes(kept := (tmp_path / "out.jsonl").read_bytes()[:-7])
    assert forks.run(argv) == 0, forks.err
    assert forks.run(line("generate", tmp_path / "whole.jsonl", "--questions", many)) == 0
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("out.jsonl", "whole.jsonl"))
    assert ours.startswith(kept[: kept.rfind(b"\n") + 1])
    assert [lasting(json.loads(row)) for row in ours.splitlines()] == [
        lasting(json.loads(row)) for row in theirs.splitlines()]


@pytest.mark.slow
def test_real_processes_are_interrupted(line, tmp_path):
    """An index halfway through a corpus on standard input, and a run in the midst of its steps."""
    started = []
    with contextlib.ExitStack() as stack:
        for command, sig, more in (("index", signal.SIGINT, ["--corpus", "-"]),
                                   ("cpt_recon", signal.SIGTERM, ["--steps", 1_000_000])):
            argv = [sys.executable, refrag.__file__, *map(str, line(command, tmp_path / command, *more))]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            started.append((command, sig, subprocess.Popen(argv, **pipes)))
            stack.callback(started[-1][-1].kill)
        for command, sig, process in started:
            process.stdin.write(b"a first line\n")
            process.stdin.flush()
            metrics = tmp_path / command / "metrics.jsonl"
            while not (list((tmp_path / command).glob(".gen-1.*.tmp")) or (metrics.exists() and (
                    b"loss\"" in metrics.read_bytes().partition(b"\n")[2]))):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal(sig)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (SIGNALS[sig], b"error: interrupted\n")
            assert json.loads(out) == {"error": {"code": SIGNALS[sig], "message": "interrupted"}}
            assert leftovers(tmp_path / command) == []


# ---- Second writers and full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["index", "add", "cpt_recon", "eval", "bench", "generate"])
def test_a_second_writer_is_told_so(forks, refused, finished, look, line, tmp_path, command):
    """The first one is halted while it writes; readers find the old index meanwhile. It ends as if nothing had been."""
    writer = Writer(command, "words" if line_of(Writer(command)) == "index" else None)
    out = tmp_path / ("out.jsonl" if command == "generate" else "out")
    if writer.old:
        shutil.copytree(finished.old(writer.old), out)
    before = look(writer, out) if writer.old else None
    pid = forks.start(line(command, out), tmp_path, {4 if command == "generate" else 12: signal.SIGSTOP})
    try:
        assert forks.wait(pid) == "stopped"
        for argv in (line(command, out), [word for word in line(command, out) if word not in ("--resume", "--add")]):
            assert "is being written by another process: wait for it to end" in refused(75, *argv)
        assert writer.old is None or look(writer, out) == before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert forks.wait(pid) == 0, forks.err
    if command != "generate":
        assert look(writer, out) == look(writer, finished(writer).folder) and leftovers(out) == []


def test_a_folder_that_another_run_has_just_taken_stays(forks, line, tmp_path):
    """Two are started at once; both found no folder, and the other one has the lock."""
    for command in ("cpt_recon", "bench"):
        out = tmp_path / command
        pid = forks.start(line(command, out), tmp_path, {3: signal.SIGSTOP})
        assert forks.wait(pid) == "stopped" and list(out.iterdir()) == []
        with filelock.FileLock(out / ".lock"):
            os.kill(pid, signal.SIGCONT)
            assert forks.wait(pid) == 75 and (out / ".lock").exists()


def leave_room(disk: Path, pages: int) -> Path:
    """Fill a disk but for some pages of 4 KiB; returns the file to remove."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - pages * 4096)))
    return filler


@pytest.mark.parametrize("writer", [
    Writer("vectors", "words"), Writer("add", "words"), Writer("cpt_recon", None, True), Writer("train_gate"),
    Writer("eval", None, True), Writer("bench", "bench", True), Writer("generate", None, True)],
    ids=lambda writer: writer.command)
def test_a_full_disk_leaves_the_old(run, mount, monkeypatch, finished, look, line, writer):
    """The disk gets more room until one succeeds, so that many a step meets its end; caches are on it as well."""
    disk = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    monkeypatch.setenv("REFRAG_HOME", str(disk / "home"))
    out, codes = disk / ("out.jsonl" if writer.command == "generate" else "out"), []
    if writer.old:
        shutil.copytree(finished.old(writer.old), out)
    before = None if writer.parts else look(writer, out)
    for pages in itertools.chain(range(6), range(6, 400, 12)):
        filler = leave_room(disk, pages)
        code, stdout, err = run(*line(writer.command, out))
        if code == 0:
            break
        message = err.removeprefix("error: ").rstrip("\n")
        assert (code, err.count("\n")) == (6, 1), f"with room for {pages} pages: {err}"
        assert json.loads(stdout) == {"error": {"code": 6, "message": message}}
        assert writer.parts or look(writer, out) == before
        assert not out.is_dir() or leftovers(out) == [] or check_whole(out)
        codes.append(code)
    filler.unlink()
    assert len(codes) > 2, "hardly one failed"
    if writer.command != "generate":
        assert look(writer, out) == look(writer, finished(writer).folder)
