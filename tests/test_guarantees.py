"""What no kill, signal, full disk, second writer or damage may do: one matrix for each promise, by the command line."""

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
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from writers import ASKED, STEPS, WRITERS, Writer, argv, damage, lasting, sign, tree, unchanged, write_rows

import refrag

KILLS = int(os.environ.get("REFRAG_KILLS", "2"))  # random places per writer, beside those around its last renaming
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
pytestmark = [pytest.mark.usefixtures("home"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")]


# ---- What writes, and what others see of it -------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch) -> None:
    """They take longer than all the rest; one test draws some."""
    if "disk_leaves_the_old[bench]" not in request.node.name:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


def state(folder: Path) -> dict[str, object]:
    """What a folder holds, of checkpoints the newest: weights as they are, of JSON what does not differ by run."""
    found: dict[str, object] = {}
    newest = max((p.name for p in folder.glob("step-*")), default="")
    for name, content in tree(folder).items():
        if name.startswith(".") or name.endswith("manifest.json") or ("step-" in name and not name.startswith(newest)):
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
        if not folder.exists() and list(folder.parent.glob(".*.old")):  # who reads a checkpoint repairs it first
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
    return "index" if writer.command in ("words", "add", "same", "sync", "delete", "vectors") else writer.command


def check_whole(folder: Path) -> None:
    """Nothing in a folder is half there: JSON can be read, and what a manifest lists is as it says."""
    for path in folder.rglob("*.json*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        content = path.read_bytes()
        for row in content.splitlines()[:-1] if path.suffix == ".jsonl" else [content]:  # the last one may be half
            facts = json.loads(row)
        for name, entry in facts["files"].items() if path.name == "manifest.json" else ():
            digest = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
            assert entry == {"bytes": (path.parent / name).stat().st_size, "sha256": digest}
    assert all((step / "manifest.json").exists() for step in folder.glob("step-*"))


def leftovers(folder: Path, beside: bool = True) -> list[str]:
    """What a writer should have removed, in its folder and beside it."""
    found = [p.name for p in [*folder.glob("*"), *(folder.parent.glob("*") if beside else ())]]
    index = folder / "manifest.json"
    current = json.loads(index.read_text()).get("generation") if index.exists() else None
    return [name for name in found if re.fullmatch(r"\..*\.tmp", name) or (name.startswith("gen-") and name != current)]


def visible_renames(changes: list[list[str]]) -> list[int]:
    """The numbers of the changes by which something gets the name that others look for."""
    return [n for n, (what, *paths) in enumerate(changes, 1)
            if what == "os.rename" and "/." not in paths[1] and "/." in paths[0]
            and "/." not in str(Path(paths[0]).parent)]


# ---- On disk before it has its name ---------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the paths of open files")
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_gets_its_name_before_it_is_on_disk(finished, name):
    changes = finished(WRITERS[name]).changes
    assert visible_renames(changes)
    for n in visible_renames(changes):
        source, target = map(Path, changes[n - 1][1:])
        last = {(what, path): number for number, (what, path, *_) in enumerate(changes[: n - 1])}
        inside = [target, *target.rglob("*")] if target.exists() else [target]
        for path in (str(source / p.relative_to(target)) for p in inside):
            assert last.get(("fsync", path), -1) > last.get(("open", path), -1), f"{path} is not written through"
        assert ["fsync", str(target.parent)] in changes[n:]


# ---- Kills and errors -----------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("fault", [signal.SIGKILL, -errno.ENOSPC], ids=["kill", "full disk"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_or_an_error_leaves_the_old_or_the_new_and_it_goes_on(forks, finished, look, line, tmp_path, name,
                                                                     fault):
    """A kill cuts the file that was being written then as well. A full disk is told as one, wherever it is noticed."""
    writer, code = WRITERS[name], -fault if fault > 0 else 1 if name == "save_pretrained" else 6
    old, after = finished.old(writer.old) if writer.old else None, look(writer, finished(writer).folder)
    before = None if old is None or writer.parts else look(writer, old)
    for at in places(finished(writer).changes, name, error=fault < 0):
        folder = tmp_path / str(at) / "out"
        folder.parent.mkdir()
        if old is not None:
            shutil.copytree(old, folder)
        command = argv(line, writer, folder, finished)
        assert forks.run(command, folder.parent, {at: fault}) == code
        if writer.old != "damaged":
            check_whole(folder)
        assert fault == signal.SIGKILL or leftovers(folder) == []
        now = None if writer.parts else look(writer, folder)
        assert writer.parts or now in (before, after)
        if now != after or line_of(writer) == "index":
            again = 2 if now == after and writer.command == "delete" else 0  # what is gone cannot be deleted
            assert forks.run(command) == again, forks.err
            assert look(writer, folder) == after
        tidy = line_of(writer) in ("index", "cpt_recon", "eval")  # they remove what a killed one left half written
        assert leftovers(folder, fault != signal.SIGKILL) == [] or not tidy


# ---- Signals and resuming -------------------------------------------------------------------------------------------

PHASES = {"cpt_recon": signal.SIGTERM, "cpt_align": signal.SIGINT, "cpt_next": signal.SIGTERM, "sft": signal.SIGINT}


def records(changes: list[list[str]], step: int) -> int:
    """The number of the change that writes down a step; evaluations stand before step 1 and after step 3."""
    writes = [n for n, (what, path, *_) in enumerate(changes, 1) if what == "open" and path.endswith("/metrics.jsonl")]
    return writes[step + (step > 3)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_stopped_saves_and_goes_on(forks, finished, line, tmp_path, phase):
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
    assert out.exists() == bool(left)
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
    elif command == "bench":
        out.mkdir()
    before, whole = look(writer, out), finished(writer)
    at = visible_renames(whole.changes)[0] - 1
    assert forks.run(line(command, out), tmp_path, {at: sig}) == SIGNALS[sig]
    assert forks.err == "error: interrupted\n"
    assert command == "eval" or (look(writer, out), leftovers(out)) == (before, [])
    assert out.exists() == (line_of(writer) in ("index", "eval", "bench"))
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


def test_a_phase_hands_on_what_the_one_before_has_trained(done, line, tmp_path):
    """Adapters follow a decoder that was trained whole: in bfloat16, too, that one is kept as it was."""
    options = ["--dtype", "bfloat16", "--steps", 1, "--lr", "1e-5", "--train"]
    done(*line("cpt_recon", tmp_path / "one", *options, "ped"))
    done(*line("cpt_next", tmp_path / "two", *options, "pd", "--load_dir", tmp_path / "one"))
    for part in ("decoder", "encoder"):
        one, two = (safetensors.torch.load_file(tmp_path / name / "step-000001" / f"{part}.safetensors")
                    for name in ("one", "two"))
        assert len(one) > 10 and all(torch.equal(one[name], two[name]) for name in one)


def blocks(changes: list[list[str]]) -> list[int]:
    """The numbers of the changes by which a block of computed passages is kept."""
    return [n for n, (what, path, *_) in enumerate(changes, 1) if what == "fsync" and path.endswith(".arrows")]


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory, forks, line) -> Path:
    """A corpus of two blocks, the index of a build that was killed after the first, and of one that was not."""
    folder = tmp_path_factory.mktemp("blocks")
    rows = [{"id": str(i), "text": f"River {i} floods field {i * 7}."} for i in range(300)]
    corpus = write_rows(folder / "corpus.jsonl", rows)
    argv = [line("vectors", folder / name, "--corpus", corpus) for name in ("whole", "stopped")]
    assert forks.run(argv[0], folder) == 0, forks.err
    second = blocks(forks.changes())[1]
    assert forks.run(argv[1], folder, {second: signal.SIGKILL}) == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(("what", "computed"), [("nothing", 44), ("some texts", 44 + 111), ("k", 300), ("damage", 300)])
def test_an_index_that_was_stopped_computes_nothing_twice(forks, line, two_blocks, tmp_path, what, computed):
    out = shutil.copytree(two_blocks / "stopped", tmp_path / "out")
    corpus = Path(shutil.copy(two_blocks / "corpus.jsonl", tmp_path))
    if what == "some texts":
        corpus.write_text(corpus.read_text().replace("River 1", "Stream"))
    if what == "damage":
        damage(*out.glob(".computed-*/*"), "truncated")
    argv = line("vectors", out, "--corpus", corpus, "--k", 8 if what == "k" else 4)
    assert forks.run([word for word in argv if word != "--quiet"]) == 0, forks.err
    assert json.loads(forks.out)["computed"] == computed
    assert ("an earlier run ended early" in forks.err) == (what != "k") and leftovers(out) == []
    assert what not in ("nothing", "damage") or tree(out / "gen-1") == tree(two_blocks / "whole" / "gen-1")


@pytest.mark.parametrize("how", ["--add", "--sync"])
def test_a_change_that_was_stopped_computes_nothing_twice(forks, line, two_blocks, tmp_path, how):
    """Killed after its first block, or before its generation gets its name."""
    rows = [{"id": str(i), "text": f"{'Stream' if i % 2 else 'River'} {i} floods field {i * 7}."} for i in range(600)]
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    whole, *others = (shutil.copytree(two_blocks / "whole", tmp_path / name) for name in ("whole", "early", "late"))
    argv = {out: line("vectors", out, "--corpus", corpus, how) for out in (whole, *others)}
    assert forks.run(argv[whole], tmp_path) == 0, forks.err
    assert json.loads(forks.out)["computed"] == 450  # 150 of the 600 were there
    places = blocks(forks.changes())[1], visible_renames(forks.changes())[0]
    for out, at, computed in zip(others, places, (194, 0), strict=True):
        assert forks.run(argv[out], tmp_path, {at: signal.SIGKILL}) == -signal.SIGKILL
        assert forks.run(argv[out]) == 0, forks.err
        assert json.loads(forks.out)["computed"] == computed and leftovers(out) == []


def test_answers_that_were_stopped_go_on(forks, line, tmp_path):
    """Killed in the midst of a line after the first: those that were finished stay as they are."""
    many = write_rows(tmp_path / "many.jsonl", [{"question": f"{ASKED[n % 3][0]} {n}"} for n in range(40)])
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


@pytest.mark.parametrize("moment", [0, 1, 5])
def test_a_reader_that_meets_a_writer_finds_the_old_index_or_the_new_one(forks, run, finished, line, tmp_path, moment):
    """It is halted after it has read the manifest, while the index is replaced and the old files go."""
    index = shutil.copytree(finished.old("words"), tmp_path / "index")
    argv = ["search", "--index_dir", index, "--question", "passage 17 of the river", "--json", "--quiet"]
    assert forks.run(argv, index, reads=True) == 0, forks.err
    [at] = [n for n, (_, path) in enumerate(forks.changes(), 1) if path == str(index / "manifest.json")]
    old, pid = forks.out, forks.start(argv, index, {at + 1 + moment: signal.SIGSTOP}, reads=True)
    assert forks.wait(pid) == "stopped" and run(*line("index", index))[0] == 0
    os.kill(pid, signal.SIGCONT)
    assert forks.wait(pid) == 0, forks.err
    assert forks.out in (old, run(*argv)[1])


def test_a_folder_that_another_run_has_just_taken_stays(forks, line, tmp_path):
    """Two are started at once; both found no folder, and the other one has the lock."""
    for command in ("cpt_recon", "bench"):
        out = tmp_path / command
        pid = forks.start(line(command, out), tmp_path, {3: signal.SIGSTOP})
        assert forks.wait(pid) == "stopped" and list(out.iterdir()) == []
        with filelock.FileLock(out / ".lock"):
            os.kill(pid, signal.SIGCONT)
            assert forks.wait(pid) == 75 and (out / ".lock").exists()


@pytest.mark.parametrize("writer", [
    Writer("vectors", "words"), Writer("add", "words"), Writer("cpt_recon", None, True), Writer("train_gate"),
    Writer("eval", None, True), Writer("bench", "bench", True), Writer("generate", None, True)],
    ids=lambda writer: writer.command)
def test_a_full_disk_leaves_the_old(run, mount, monkeypatch, finished, look, line, writer):
    """The disk gets more room until one succeeds, so that many a step meets its end. Caches of training are on it."""
    disk = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    out, codes = disk / ("out.jsonl" if writer.command == "generate" else "out"), []
    if writer.old:
        shutil.copytree(finished.old(writer.old), out)
    before = None if writer.parts else look(writer, out)
    for pages in itertools.chain(range(4), range(4, 400, 12)):
        (disk / "filler").unlink(missing_ok=True)
        room = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - pages * 4096)))
        place = disk if writer.command == "cpt_recon" else disk.parent
        monkeypatch.setenv("REFRAG_HOME", str(place / f"home{pages}"))
        code, stdout, err = run(*line(writer.command, out))
        if code == 0:
            break
        message = err.removeprefix("error: ").rstrip("\n")
        assert (code, err.count("\n")) == (6, 1), f"with room for {pages} pages: {err}"
        assert json.loads(stdout) == {"error": {"code": 6, "message": message}}
        assert writer.parts or look(writer, out) == before
        if out.is_dir():
            check_whole(out)
            assert leftovers(out) == []
        codes.append(code)
    assert codes, "not one failed"
    if writer.command != "generate":
        assert look(writer, out) == look(writer, finished(writer).folder)


# ---- Damage ---------------------------------------------------------------------------------------------------------

KINDS = ("missing", "folder", "truncated", "flipped", "longer")
UNLIKE = {  # (artefact, file, kind): exit code and message, where it is not 4 and the name of the file
    **{("index", "manifest.json", kind): (2, "no index in this folder") for kind in KINDS[:2]},
    **{(artefact, "manifest.json", kind): (0, "") for artefact in ("checkpoint", "gate") for kind in KINDS[:2]},
    **{(artefact, "config.json", kind): (2, "no checkpoint in this folder")
       for artefact in ("checkpoint", "gate") for kind in KINDS[:2]},
    **{(artefact, "README.md", kind): (0, "") for artefact in ("checkpoint", "gate") for kind in KINDS}}


@pytest.fixture
def read(index_dir, finished, llama, tmp_path):
    """(a copy of an artefact, free to be damaged, the command line that reads all of it)."""
    copy, answer = tmp_path / "x", ["generate", "--max_new", 1, "--k", 4, "--quiet", "--no_stream"]
    prompt = ["--prompt", "<doc id='1'>a river and a lake</doc> b", "--gate", "none"]
    question = ["--index_dir", index_dir, "--question", "q", "--dec", llama, "--enc", "decoder:2"]

    def call(artefact: str) -> tuple[Path, list[object]]:
        if artefact == "index":
            return shutil.copytree(index_dir, copy), ["search", "--question", "q", "--quiet", "--index_dir", copy]
        folder = finished(WRITERS["train_gate"]).folder if artefact == "gate" else finished.old("checkpoint")
        asked = question if artefact == "gate" else prompt
        return shutil.copytree(folder, copy), [*answer, *asked, "--load_dir", copy]

    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("artefact", ["index", "checkpoint", "gate"])
def test_damage_to_any_file_is_named(run, refused, read, monkeypatch, artefact, kind):
    """People may change a card; a checkpoint may have no manifest. Of a large index the sizes are compared."""
    folder, argv = read(artefact)
    if artefact == "index" and kind in ("truncated", "longer"):
        monkeypatch.setattr(refrag, "READ_ALWAYS", 0)
    names = list(tree(folder))
    assert {"manifest.json"} < set(names) and run(*argv)[0] == 0
    for name in names:
        intact = (folder / name).read_bytes()
        damage(folder / name, kind)
        code, told = UNLIKE.get((artefact, name, kind), (4, name))
        if code:
            assert told in refused(code, *argv), name
        else:
            assert run(*argv)[0] == 0, name
        if kind == "folder":
            (folder / name).rmdir()
        (folder / name).write_bytes(intact)


def test_a_flipped_bit_at_any_place_of_an_index_is_noticed(run, refused, read, line):
    """By a search and by doctor; an addition is refused, and building it again repairs it."""
    folder, argv = read("index")
    rng, sizes = random.Random(0), {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in [folder / "manifest.json"] * 9 + rng.choices([p for p in sizes if p.name != ".lock" and sizes[p]], k=9):
        intact = bytearray(path.read_bytes())
        intact[place := rng.randrange(len(intact))] ^= (bit := 1 << rng.randrange(8))
        path.write_bytes(intact)
        assert path.name in refused(4, *argv) and path.name in refused(4, "doctor", "--index_dir", folder)
        with unchanged(folder):
            refused(4, *line("add", folder, "--retriever", "hybrid"))
        intact[place] ^= bit
        path.write_bytes(intact)
    for content in (b"", b"null", b"[]", b'"text"', b"{}", b'{"digest": 1}', b"\xff\xfe", b"[" * 9):
        (folder / "manifest.json").write_bytes(content)
        assert "manifest.json is damaged: build the index again" in refused(4, *argv)
    assert run(*line("index", folder))[0] == 0 == run(*argv)[0]


@pytest.mark.parametrize("name", ["vectors", "chunks.arrow", "manifest.json"])
def test_nothing_of_a_damaged_index_is_used(done, refused, line, finished, tmp_path, monkeypatch, name):
    """By a change or by a new build, however large it is; of an intact one all is, unless it is of other models."""
    monkeypatch.setattr(refrag, "READ_ALWAYS", 1)
    fresh = finished(Writer("vectors")).folder
    out = shutil.copytree(fresh, tmp_path / "out")
    assert done(*line("vectors", out))["computed"] == 0
    damage(out / name if name == "manifest.json" else out / "gen-1" / name, "flipped")
    for how in ("--add", "--sync"):
        assert name in refused(4, *line("vectors", out, how))
    assert done(*line("vectors", out, "--k", 8))["computed"] == done(*line("vectors", out))["computed"] == 20
    for part in ("passages.arrow", "chunks.arrow", "vectors"):
        assert (out / "gen-3" / part).read_bytes() == (fresh / "gen-1" / part).read_bytes()


@pytest.mark.parametrize(("artefact", "changes", "code", "told"), [
    *((artefact, {"version": 99}, 5, "update the program") for artefact in ("index", "checkpoint", "gate")),
    ("checkpoint", {"format": "something-else"}, 5, "update the program"),
    ("index", {"words": "another rule for words"}, 5, "build it again"),
    ("index", {"generation": None, "segments": [{"folder": "gen-1"}]}, 5, "an earlier version"),
    ("index", {"version": 0, "generation": None, "words": None}, 5, "an earlier version")])
def test_what_another_program_has_written(refused, read, finished, artefact, changes, code, told):
    folder, argv = read(artefact)
    sign(folder, **changes)
    assert told in refused(code, *argv)
    if artefact == "checkpoint":  # a manifest that is whole, but another one's
        shutil.copy(finished(WRITERS["cpt_recon"]).folder / "step-000004" / "manifest.json", folder)
        assert "is damaged" in refused(4, *argv)


PARTS = {  # kind: what happens to the tensors of a part, exit code and message
    "cut": (lambda path: damage(path, "truncated"), 4, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), 4, "is damaged"),
    "gone": (lambda path: path.unlink(), 4, "is missing: the checkpoint is incomplete"),
    "shape": (lambda path: rewrite(path, lambda t: t | {next(iter(t)): torch.zeros(3, 5)}), 5, "has shape (3, 5)"),
    "scalar": (lambda path: rewrite(path, lambda t: t | {next(iter(t)): torch.zeros(())}), 5, "has shape ()"),
    "surplus": (lambda path: rewrite(path, lambda t: t | {"surplus": torch.zeros(2)}), 5, "tensor surplus has shape"),
    "lacking": (lambda path: rewrite(path, lambda t: dict(list(t.items())[1:])), 5, "has shape none"),
    "NaN": (lambda path: rewrite(path, lambda t: {n: v * torch.nan for n, v in t.items()}), 4, "not finite")}


def rewrite(path: Path, change) -> None:
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("name", "signed"), [("projector.safetensors", True), ("projector.safetensors", False),
                                              ("encoder.safetensors", True), ("gate.safetensors", False)])
def test_tensors_that_do_not_fit_are_named(refused, read, name, kind, signed):
    folder, argv = read("gate" if name.startswith("gate") else "checkpoint")
    spoil, code, told = PARTS[kind]
    spoil(folder / name)
    if signed and (folder / name).exists():  # the manifest was made after the damage, or by nobody
        sign(folder)
    else:
        (folder / "manifest.json").unlink()
    line = refused(code, *argv)
    assert told in line or (name.startswith("gate") and code == 5 and "train it again" in line)


class Malice(str):
    """A path whose pickle makes that file when it is read."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture
def malice(tmp_path) -> bytes:
    """The bytes of such a pickle; at the end of the test it must not have been executed."""
    victim = tmp_path / "executed"
    content = pickle.dumps(Malice(victim))
    pickle.loads(content).close()
    victim.unlink()  # it works
    yield content
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_is_ever_read(run, refused, read, write, llama, malice):
    folder, argv = read("checkpoint")
    for name in ("projector.bin", "trainer.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(malice)
    assert run(*argv)[0] == 0  # beside the weights it is not looked at
    for name in ("model.pt", "model.pth", "pytorch_model.bin", "model.pkl", "model.ckpt"):
        assert "a pickle can run code" in refused(2, *argv[:-1], write(name, malice))
        assert "a pickle can run code" in refused(2, *argv[:-1], f"no/{name}")
    (folder / "projector.safetensors").write_bytes(malice)
    sign(folder)
    assert "projector.safetensors is damaged" in refused(4, *argv)
    for path in [*folder.glob("*.safetensors"), folder / "manifest.json"]:
        path.unlink()
    assert "can run code" in refused(2, *argv)
    (folder / "config.json").unlink()
    assert "no checkpoint in this folder" in refused(2, *argv)
    model = shutil.copytree(llama, folder.parent / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(malice)
    for flags in (["--dec", model], ["--dec", llama, "--enc", model]):
        assert f"model {model} could not be loaded" in refused(3, *argv[:-2], *flags)


def test_no_pickle_in_an_index_is_read(refused, read, malice, tmp_path):
    folder, argv = read("index")
    for bare in (False, True):
        for path in folder.rglob("*.npy"):
            np.save(path, np.array([Malice(tmp_path / "executed")], dtype=object), allow_pickle=True)
            if bare:
                path.write_bytes(malice)
        sign(folder)
        assert re.search("pickle|Python objects", refused(1, *argv))


@pytest.mark.skipif(sys.platform != "linux", reason="root gives up its rights by a call of Linux")
@pytest.mark.parametrize("artefact", ["index", "checkpoint", "gate"])
def test_what_cannot_be_read_is_named(forks, read, artefact):
    folder, argv = read(artefact)
    (path := max(folder.rglob("*.safetensors" if artefact != "index" else "*.arrow"))).chmod(0)
    assert forks.run(argv) == 2 and path.name in forks.err and "Permission denied" in forks.err, forks.err
    folder.chmod(0)
    assert forks.run(argv) == 2 and str(folder) in forks.err, forks.err
    folder.chmod(0o755)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("phase", ["cpt_recon", "sft"])
def test_a_damaged_cache_is_made_again(done, line, home, tmp_path, phase, kind):
    argv = line(phase, tmp_path / "first", "--steps", 1)
    before = done(*argv)
    for path in [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]:
        with unchanged(home):
            damage(path, kind)
            out = tmp_path / f"again {path.name}"
            assert lasting(done(*line(phase, out, "--steps", 1))) == lasting(before), path


@pytest.mark.parametrize("flag", ["--dec", "--enc"])
def test_a_model_that_changed_under_its_name_or_is_damaged(run, done, refused, line, llama, bert, tmp_path, flag):
    """It does not fit a checkpoint that was trained on it; in bfloat16 it is the same model, and where it has moved to,
    if its flag says so. Cut off, it is damaged."""
    folder = shutil.copytree(llama if flag == "--dec" else bert, tmp_path / "model")
    done(*line("cpt_recon", tmp_path / "out", flag, folder, "--train", "p", "--steps", 1))
    folder, argv = folder.rename(tmp_path / "moved"), ["generate", "--prompt", "<doc id='1'>a river</doc> b", "--quiet",
                                                       "--gate", "none", "--max_new", 1, "--load_dir", tmp_path / "out"]
    assert f"model folder {tmp_path / 'model'} is not there" in refused(3, *argv)
    argv += [flag, folder]
    assert run(*argv)[0] == run(*argv, "--dtype", "bfloat16")[0] == 0
    rewrite(folder / "model.safetensors", lambda t: {**t, (name := max(n for n in t if "orm" in n)): t[name] + 0.5})
    assert f"trained on another {folder}" in refused(5, *argv)
    damage(folder / "model.safetensors", "truncated")
    assert f"model {folder} is damaged" in refused(4, *line("cpt_recon", tmp_path / "new", flag, folder))
    assert not (tmp_path / "new").exists()


# ---- What is continued is what was begun ----------------------------------------------------------------------------

@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    folder = shutil.copytree(finished(WRITERS["cpt_recon"]).folder, tmp_path / "run")
    shutil.rmtree(folder / "step-000005")
    return folder


@pytest.mark.parametrize(("name", "kind"), [
    ("projector.safetensors", "missing"), ("projector.safetensors", "flipped"), ("trainer.safetensors", "truncated"),
    ("trainer.json", "flipped"), ("config.json", "truncated"), ("manifest.json", "missing"),
    ("manifest.json", "version")])
def test_a_damaged_checkpoint_is_passed_over(run, finished, line, tmp_path, name, kind):
    folder = shutil.copytree(finished(WRITERS["cpt_recon"]).folder, tmp_path / "run")
    if kind == "version":
        sign(folder / "step-000005", version=99)
    else:
        damage(folder / "step-000005" / name, kind)
    code, _, err = run(*(word for word in line("cpt_recon", folder) if word != "--quiet"))
    assert code == 0 and "step-000005" in err and "falling back to the checkpoint before it" in err, err
    assert state(folder) == state(finished(WRITERS["cpt_recon"]).folder)


@pytest.mark.parametrize("file", ["projector.safetensors", "manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(refused, line, unfinished, tmp_path, file):
    for folder in unfinished.glob("step-*"):
        damage(folder / file, "truncated")
    with unchanged(unfinished):
        for argv in (line("cpt_recon", unfinished), line("cpt_recon", tmp_path / "new", "--load_dir", unfinished)):
            message = refused(4, *argv)
            assert f"every checkpoint in {unfinished} is damaged" in message and "step-000004" in message


OTHERS = {  # what is not as it was: options, exit code, message
    "lr": (["--lr", "0.5"], 5, "--lr was 0.01, now 0.5"), "k": (["--k", "4", "8"], 5, "--k was [4], now [4, 8]"),
    "two": (["--steps", "9", "--seed", "3"], 5, "--steps was 5, now 9, --seed was 1337, now 3"),
    "train": (["--train", "p"], 5, "--train was None, now p"), "curriculum": (["--curriculum", "none"], 5, "even"),
    "encoder": (["--enc", "decoder:1"], 5, "--enc was decoder:2, now decoder:1"),
    "texts": (["--train_json", __file__], 5, "--train_json was"),
    "phase": (["cpt_next"], 5, "--phase was cpt_recon, now cpt_next"),
    "changed texts": ([], 5, "texts.jsonl was sha256 "), "processes": ({"processes": 2}, 5, "processes was 2, now 1"),
    "gone": (None, 4, "run.json is missing"),
    **{f"run.json {content!r}": (content, 4, "run.json is damaged") for content in (
        b"", b"[]", b"\xff", b'{"settings": null}', b'{"settings": {}}', b'{"settings": {}, "data": 5}',
        b'{"settings": {}, "data": []}')}}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_goes_on_with_what_it_began_with_only(refused, line, files, unfinished, case):
    change, code, told = OTHERS[case]
    path, texts = unfinished / "run.json", files / "texts.jsonl"
    intact = texts.read_bytes()
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif change is None:
        path.unlink()
    elif case == "changed texts":
        texts.write_bytes(intact.splitlines(keepends=True)[0] * 2)
    options = change if isinstance(change, list) else []
    argv = line("cpt_next" if case == "phase" else "cpt_recon", unfinished, *(o for o in options if o != "cpt_next"))
    try:
        with unchanged(unfinished):
            assert told in refused(code, *argv)
            message = refused(4 if code == 4 and change is None else 2, *(w for w in argv if w != "--resume"))
            assert "holds a run: add --resume to continue it" in message or change is None
    finally:
        texts.write_bytes(intact)


def test_a_run_does_not_go_on_with_another_index(done, refused, line, files, tmp_path):
    index, out = tmp_path / "index", tmp_path / "out"
    done(*line("words", index))
    argv = line("sft", out, "--index_dir", index, "--steps", 1)
    done(*argv)
    done(*line("same", index))
    with unchanged(out):
        assert f"{index} was sha256 " in refused(5, *argv)


@pytest.mark.parametrize("left", [
    "nothing", "empty", "run.json", "step 4", "moved", "half", "other intervals", "no log",
    b'{"step": 4, "lo', b"\0" * 99 + b"}\n", b"\xff\xfe\n", b'{"loss": 1}\n', b"5\n"], ids=str)
def test_a_run_goes_on_from_whatever_was_left(done, finished, line, unfinished, left):
    whole, more = finished(WRITERS["cpt_recon"]).folder, []
    if left in ("empty", "run.json"):
        for path in unfinished.glob("*" if left == "empty" else "step-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "nothing":
        shutil.rmtree(unfinished)
    if left == "moved":
        unfinished = unfinished.rename(unfinished.with_name("elsewhere"))
    if left == "half":
        shutil.copytree(unfinished / "step-000004", unfinished / ".step-000005.4194305.tmp")
        (unfinished / ".loss.png.4194305.tmp").write_bytes(b"half a picture")
    if left == "other intervals":
        more = ["--log_every", 4, "--save_every", 100, "--eval_every", 0]
    if left == "no log":
        (unfinished / "metrics.jsonl").unlink()
    if isinstance(left, bytes):
        with (unfinished / "metrics.jsonl").open("ab") as handle:
            handle.write(left)
    assert done(*line("cpt_recon", unfinished, *more))["steps"] == STEPS
    ours, theirs = state(unfinished), state(whole)
    if left == "no log":
        del ours["metrics.jsonl"], theirs["metrics.jsonl"]
    assert ours == theirs and leftovers(unfinished) == []
    with unchanged(unfinished):  # a run that has ended says the same again
        assert done(*line("cpt_recon", unfinished, *more))["checkpoint"] == str(unfinished / "step-000005")


@pytest.mark.parametrize(("command", "options", "told"), [
    ("eval", ["--max_new", 4], "--max_new (3, now 4)"), ("eval", ["--k", 8], "--k ([4], now [8])"),
    ("eval", ["--task", "gate", "--modes", "blend"], "--task (qa, now gate)"),
    ("eval", ["--seed", 1], "--seed (1337, now 1)"), ("eval", ["--qa", "OTHER"], "--qa ("),
    ("generate", ["--no_cite"], "--cite ("), *(("generate", option.split(), f"{option.split()[0]} (") for option in (
        "--p 0.5", "--gate cosine", "--compressed feed", "--retriever bm25", "--seed 3", "--topk 1"))], ids=str)
def test_results_of_other_settings_are_not_mixed(refused, finished, line, files, tmp_path, command, options, told):
    """Nor are they overwritten without --resume, nor is a file continued that holds no results."""
    source = finished(Writer(command, None, True)).folder
    out = (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "results.jsonl")
    other = shutil.copy(files / "asked.jsonl", tmp_path / "other.jsonl")
    Path(other).write_text(Path(other).read_text().splitlines(keepends=True)[0])
    argv = line(command, out, *(other if option == "OTHER" else option for option in options))
    with unchanged(tmp_path):
        assert told in refused(5, *argv)
        message = refused(2, *(word for word in argv if word != "--resume"))
        assert "add --resume to continue it" in message
    lines = out / "questions.jsonl" if out.is_dir() else out
    lines.write_text('{"id": "1"}\n')
    assert f"{lines}:1: not a result of this command" in refused(4, *argv)
