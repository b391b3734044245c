"""Section 3: timers, whole files and folders, locks, manifests, and columns on disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import refrag

CPU = torch.device("cpu")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path in a folder, with the content of the files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def full(*_args, **_kwargs):
    """What a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- Columns on disk ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text(), max_size=5), max_size=4))
def test_strings_come_back_as_they_were_written(blocks):
    """st.text() leaves out surrogates, which UTF-8 can not hold, and draws from all other characters."""
    texts = [text for block in blocks for text in block]
    with tempfile.TemporaryDirectory() as name:
        with refrag.ColumnWriter(Path(name)) as columns:
            for block in [[], *blocks]:
                columns.append_texts("texts", block)
        column = refrag.StringColumn([Path(name)] * 2, "texts")
        assert list(column) == texts * 2 and len(column) == 2 * len(texts)
        assert np.load(Path(name) / "texts.npy").tobytes() == "".join(texts).encode()


def test_a_column_has_no_rows_outside_of_its_range(tmp_path):
    """FAISS pads its answers with -1; that must not mean the last row."""
    with refrag.ColumnWriter(tmp_path) as columns:
        columns.append_texts("ids", ["a", "", "c"])
    column = refrag.StringColumn([tmp_path], "ids")
    for row in (-1, 3, -3):
        with pytest.raises(IndexError, match=f"row {row} of 3"):
            column[row]


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from([np.float16, np.float32, np.int64, np.uint16, np.uint8]),
       width=st.none() | st.integers(1, 5), lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data())
def test_arrays_come_back_as_they_were_appended(dtype, width, lengths, data):
    """numpy's own reader is the oracle."""
    shape = () if width is None else (width,)
    blocks = [data.draw(arrays.arrays(dtype, (n, *shape))) for n in lengths]
    expected = np.concatenate(blocks)
    with tempfile.TemporaryDirectory() as name:
        with refrag.ColumnWriter(Path(name)) as columns:
            for block in blocks:
                columns.append("a", block)
                columns.append_lengths("ends", [len(block)])
        path = Path(name) / "a.npy"
        for loaded in (np.load(path, allow_pickle=False), refrag.map_array(path)):
            assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (dtype, expected.shape, expected.tobytes())
        assert refrag.map_array(Path(name) / "ends.npy").tolist() == [0, *itertools.accumulate(lengths)]


def test_a_header_has_room_for_very_many_rows(tmp_path):
    with refrag.ColumnWriter(tmp_path) as columns:
        columns.append("a", np.zeros((1, 4096), np.float32))
        columns.rows["a"] = 10**15
    header = (tmp_path / "a.npy").read_bytes()[: -4096 * 4]
    assert len(header) == 128 and b"(1000000000000000, 4096)" in header


def test_rows_of_another_kind_are_refused(tmp_path):
    for rows in (np.zeros((2, 4), np.float32), np.zeros((2, 3))):
        with pytest.raises(AssertionError), refrag.ColumnWriter(tmp_path) as columns:
            columns.append("a", np.zeros((1, 3), np.float32))
            columns.append("a", rows)


@posix
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 10**5])
def test_a_file_that_can_not_grow_ends_the_writing_with_one_error(tmp_path, rows):
    """While rows are appended, or only when what is buffered is written at the end; nothing fails again afterwards."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="too large"), contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        with refrag.ColumnWriter(tmp_path) as columns:
            columns.append("a", np.zeros((rows, 3)))


def test_a_mapped_array_can_not_be_written_and_holds_no_pickle(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    mapped = refrag.map_array(tmp_path / "a.npy")
    assert isinstance(mapped.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    np.save(tmp_path / "b.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        refrag.map_array(tmp_path / "b.npy")


# ---- Whole files and folders ----------------------------------------------------------------------------------------


def test_write_atomic_creates_and_replaces(tmp_path):
    path = tmp_path / "report.json"
    for text in ("first ä\n", "second, shorter"):
        refrag.write_atomic(path, text)
        assert tree(tmp_path) == {"report.json": text.encode()}


@pytest.mark.parametrize("step", ["write_bytes", "fsync_path", "replace"])
def test_write_atomic_leaves_the_old_file_when_a_step_fails(tmp_path, monkeypatch, step):
    refrag.write_atomic(tmp_path / "report.json", "old")
    monkeypatch.setattr({"write_bytes": Path, "fsync_path": refrag, "replace": os}[step], step, full)
    with pytest.raises(OSError, match="No space left"):
        refrag.write_atomic(tmp_path / "report.json", "new")
    assert tree(tmp_path) == {"report.json": b"old"}


def test_write_atomic_syncs_the_new_content_before_it_replaces_the_old(tmp_path, monkeypatch):
    """Otherwise a power cut may leave an empty file under the final name."""
    path, steps, replace = tmp_path / "report.json", [], os.replace
    monkeypatch.setattr(refrag, "fsync_path", lambda p: steps.append(("sync", p.read_text() if p.is_file() else p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(("replace", Path(b))), replace(a, b)))
    refrag.write_atomic(path, "new")
    assert steps == [("sync", "new"), ("replace", path), ("sync", tmp_path)]


def test_a_picture_is_replaced_whole(tmp_path):
    refrag.draw(tmp_path / "a.png", 2, (2, 1), lambda left, right: (left.plot([1, 2]), right.plot([2, 1])))
    before = tree(tmp_path)
    assert before["a.png"].startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError):
        refrag.draw(tmp_path / "a.png", 1, (2, 1), lambda axes: 1 / 0)
    assert tree(tmp_path) == before


def fill(folder: Path, text: str) -> None:
    """Two files, one of them in a folder."""
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "inner" / "b.txt").write_text(text)


def filled(text: str) -> dict[str, bytes | None]:
    """What `tree` finds when nothing but the finished folder is there."""
    return {"final": None, "final/inner": None, "final/a.txt": text.encode(), "final/inner/b.txt": text.encode()}


def make_folder(final: Path, text: str) -> None:
    """A finished folder."""
    with refrag.new_folder(final) as folder:
        fill(folder, text)


def test_new_folder_appears_as_a_whole_and_replaces_all_of_an_old_one(tmp_path):
    final = tmp_path / "deep" / "final"
    with refrag.new_folder(final) as folder:
        fill(folder, "old")
        (folder / "stale.txt").touch()
        assert not final.exists()
    with refrag.new_folder(final) as folder:
        fill(folder, "new")
        assert (final / "a.txt").read_text() == "old"
    assert tree(tmp_path / "deep") == filled("new")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
@pytest.mark.parametrize("existing", [True, False])
def test_new_folder_vanishes_on_an_error(tmp_path, error, existing):
    if existing:
        make_folder(tmp_path / "final", "old")
    with pytest.raises(type(error)), refrag.new_folder(tmp_path / "final") as folder:
        fill(folder, "half")
        raise error
    assert tree(tmp_path) == (filled("old") if existing else {})


def test_new_folder_puts_the_old_one_back_when_the_last_step_fails(tmp_path, monkeypatch):
    make_folder(tmp_path / "final", "old")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: full() if self.suffix == ".tmp" else rename(self, to))
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "final", "new")
    assert tree(tmp_path) == filled("old")


@posix
@pytest.mark.parametrize("renamings", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path, renamings):
    """The old folder is moved aside (1), then the new one gets its name (2). What reads the folder mends it first."""
    final = tmp_path / "final"
    make_folder(final, "old")
    child = os.fork()
    if child == 0:
        left, rename = itertools.count(renamings, -1), Path.rename
        Path.rename = lambda *paths: rename(*paths) if next(left) else os.kill(os.getpid(), signal.SIGKILL)
        refrag.shutil.rmtree = lambda path, **_: path.suffix == ".old" and os.kill(os.getpid(), signal.SIGKILL)
        make_folder(final, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    refrag.restore_folder(final)
    expected = filled("new" if renamings == 2 else "old")
    assert {path: content for path, content in tree(tmp_path).items() if path.startswith("final")} == expected


@pytest.mark.parametrize("name", ["final", "k[16]"])
def test_a_folder_that_was_moved_aside_comes_back_or_goes_with_the_next_writing(tmp_path, name):
    (tmp_path / f".{name}.1.old").mkdir()
    refrag.restore_folder(tmp_path / name)
    assert list(tree(tmp_path)) == [name]
    (tmp_path / f".{name}.1.old").mkdir()
    make_folder(tmp_path / name, "new")
    assert {path.split("/")[0] for path in tree(tmp_path)} == {name}


def test_new_folder_syncs_all_of_it_before_it_gets_its_name(tmp_path, monkeypatch):
    """Files and folders inside, and itself; then, after the renaming, the folder around it."""
    synced, final = [], tmp_path / "final"
    monkeypatch.setattr(refrag, "fsync_path", lambda p: synced.append((p.name, final.exists())))
    with refrag.new_folder(final) as folder:
        fill(folder, "new")
    before = {("a.txt", False), ("b.txt", False), ("inner", False), (folder.name, False)}
    assert set(synced[:-1]) == before and synced[-1] == (tmp_path.name, True)


# ---- Locks ----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@posix
def test_a_lock_of_another_process_is_respected_until_that_process_is_killed(tmp_path):
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with (pytest.raises(refrag.LockedError, match="the thing is being written by another process"),
                  refrag.exclusive(path, "the thing")):
                pytest.fail("two holders")
        finally:
            process.kill()
        process.wait()
        with refrag.exclusive(path, "the thing", timeout=5):
            pass


def test_a_lock_is_held_in_its_block_and_free_after_an_error_in_it(tmp_path):
    code = "import sys, filelock\nfilelock.FileLock(sys.argv[1], timeout=0).acquire()"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), refrag.exclusive(tmp_path / ".lock", "the thing"):
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True, text=True)
            raise ZeroDivisionError
    assert "Timeout" in done.stderr


# ---- Manifests ------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path) -> Path:
    """The manifest, beside its folder, of a folder of two files."""
    (tmp_path / "gen-1" / "bm25").mkdir(parents=True)
    (tmp_path / "gen-1" / "a.npy").write_bytes(b"abc")
    (tmp_path / "gen-1" / "bm25" / "b.json").write_bytes(b"{}")
    refrag.write_manifest(tmp_path / "manifest.json", tmp_path / "gen-1", {"segments": ["gen-1"]})
    return tmp_path / "manifest.json"


def sign(path: Path, **changes: object) -> None:
    """Write a changed manifest with the digest that belongs to it."""
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(body | {"digest": refrag.manifest_digest(body)}))


def test_a_manifest_lists_every_file_with_size_and_digest(manifest):
    """The digests are those of the SHA-256 standard's example "abc" and of "{}"."""
    read = refrag.read_manifest(manifest)
    assert read["segments"] == ["gen-1"]
    assert (read["format"], read["version"]) == (refrag.MANIFEST_FORMAT, refrag.MANIFEST_VERSION)
    assert read["files"] == {
        "gen-1/a.npy": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        "gen-1/bm25/b.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
    }


def test_every_flipped_bit_and_every_cut_of_a_manifest_is_noticed(manifest):
    intact = manifest.read_bytes()
    damaged = [intact[:length] for length in range(0, 400, 37)]
    for bit in random.Random(0).sample(range(8 * len(intact)), 60):
        damaged.append(bytes(byte ^ (1 << bit % 8) * (at == bit // 8) for at, byte in enumerate(intact)))
    for content in damaged:
        manifest.write_bytes(content)
        with pytest.raises(refrag.CorruptError, match=r"manifest\.json is damaged: build the index again"):
            refrag.read_manifest(manifest)
    manifest.write_bytes(intact)
    sign(manifest, extra=1)
    assert refrag.read_manifest(manifest)["extra"] == 1


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"text"', b"{}", b'{"digest": 1}', b"\xff\xfe", b"[" * 9])
def test_other_content_is_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(refrag.CorruptError):
        refrag.read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("change", [{"version": refrag.MANIFEST_VERSION + 1}, {"format": "something-else"}], ids=str)
def test_an_intact_manifest_of_another_format_does_not_fit(manifest, change):
    sign(manifest, **change)
    with pytest.raises(refrag.MismatchError, match="update the program"):
        refrag.read_manifest(manifest)


@pytest.mark.parametrize(("damage", "told"), [
    (lambda p: p.unlink(), "missing or has the wrong size"),
    (lambda p: p.write_bytes(b"ab"), "missing or has the wrong size"),
    (lambda p: p.write_bytes(b"abcd"), "missing or has the wrong size"),
    (lambda p: p.write_bytes(b"abd"), r"damaged \(checksum\)"),
    (lambda p: (p.unlink(), p.mkdir()), "missing or has the wrong size"),
], ids=["missing", "shorter", "longer", "changed", "folder"])
def test_verify_files_names_the_bad_file(manifest, damage, told):
    folder, entries = manifest.parent, refrag.read_manifest(manifest)["files"]
    refrag.verify_files(folder, entries)
    damage(folder / "gen-1" / "a.npy")
    with pytest.raises(refrag.CorruptError, match=rf"a\.npy.*{told}: build the index again"):
        refrag.verify_files(folder, entries)


def test_many_bytes_are_read_only_where_all_are_to_be(manifest, monkeypatch):
    monkeypatch.setattr(refrag, "READ_ALWAYS", 1)
    entries = refrag.read_manifest(manifest)["files"]
    (manifest.parent / "gen-1" / "a.npy").write_bytes(b"abd")
    refrag.verify_files(manifest.parent, entries)
    with pytest.raises(refrag.CorruptError, match="checksum"):
        refrag.verify_files(manifest.parent, entries, read_all=True)


# ---- Clocks, devices, progress --------------------------------------------------------------------------------------


def test_a_stopwatch_adds_up_seconds_by_stage():
    """The clock reads 1, 2, 4, 8, 16, 32: stages of 1, 4 and 16 seconds; what lies between belongs to none."""
    watch = refrag.Stopwatch(CPU, clock=(2**i for i in itertools.count()).__next__)
    for name in ("gate_s", "pack_s", "gate_s"):
        with watch.stage(name):
            pass
    assert watch.seconds == {"gate_s": 1 + 16, "pack_s": 4}


def test_a_stopwatch_waits_for_the_device_before_it_reads_the_clock(monkeypatch):
    steps = []
    monkeypatch.setattr(refrag, "synchronize", lambda device: steps.append(device))
    watch = refrag.Stopwatch(CPU, clock=lambda: steps.append("clock") or 0.0)
    with watch.stage("prefill_s"):
        steps.append("work")
    assert steps == [CPU, "clock", "work", CPU, "clock"]


def test_peak_rss_is_what_the_system_says_in_mebibytes():
    """VmHWM is the kernel's own high-water mark, in KiB. The two are sampled at different moments: within a tenth."""
    status = Path("/proc/self/status")
    marks = [line.split() for line in status.read_text().splitlines()] if status.exists() else []
    peak_kib = next((int(mark[1]) for mark in marks if mark[0] == "VmHWM:"), None)
    if peak_kib is None:
        pytest.skip("no VmHWM in /proc/self/status")
    assert refrag.peak_rss_mb() == pytest.approx(peak_kib / 1024, rel=0.1)


FAULTS = """
import contextlib, resource, sys, torch
sys.path.insert(0, {folder!r})
import refrag
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with contextlib.suppress(ValueError):
    with refrag.kept_memory(torch.device("cpu")):
        kept = min(faults() for _ in range(4))
        raise ValueError
print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc's malloc")
def test_freed_memory_is_kept_within_the_block_and_given_back_after_it():
    """In a process of its own. 128 MiB are 32,768 pages of 4 KiB, or 64 of 2 MiB; a heap takes rounds to settle."""
    code = FAULTS.format(folder=str(Path(refrag.__file__).parent))
    kept, after = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                          env=os.environ | {"GLIBC_TUNABLES": ""}).stdout.split())
    assert kept < 32 < after


@pytest.mark.parametrize("device, system", [("cuda", "linux"), ("cpu", "darwin"), ("cpu", "win32")])
def test_the_allocator_is_left_alone_elsewhere(monkeypatch, device, system):
    monkeypatch.setattr(refrag.sys, "platform", system)
    monkeypatch.setattr(refrag.ctypes, "CDLL", None)
    with refrag.kept_memory(torch.device(device)):
        pass


def test_devices_and_precision(monkeypatch):
    assert refrag.pick_device("auto").type in ("cuda", "mps", "cpu")
    assert refrag.pick_device("cpu") == CPU
    refrag.synchronize(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(refrag.MissingError, match="--device cuda is not available here: use --device auto"):
        refrag.pick_device("cuda")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able}, raising=False)
        assert refrag.pick_dtype("auto", CPU) is refrag.pick_dtype("float32", CPU, encoding=True) is torch.float32
        assert refrag.pick_dtype("bfloat16", CPU) is torch.bfloat16
        assert (refrag.pick_dtype("auto", CPU, encoding=True) is torch.bfloat16) == able


def test_prepare_runtime_seeds_torch_and_sets_the_threads():
    threads = torch.get_num_threads()
    try:
        refrag.prepare_runtime(refrag.RuntimeConfig(seed=7, threads=1, quiet=True))
        first = torch.rand(3)
        assert torch.get_num_threads() == 1
        assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("quiet", [True, False])
def test_notices_go_to_stderr_and_quiet_silences_them(monkeypatch, capsys, quiet):
    monkeypatch.setattr(refrag, "QUIET", quiet)
    refrag.notice("passages are cut")
    assert list(refrag.progress([1, 2], "reading")) == [1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "" if quiet else "passages are cut\n")


@given(st.lists(st.integers()), st.integers(1, 5))
def test_batches_hold_everything_in_order(items, size):
    batches = refrag.batched(items, size)
    assert list(itertools.chain(*batches)) == items
    assert all(len(b) == size for b in batches[:-1]) and all(1 <= len(b) <= size for b in batches)


def test_the_all_reduce_check_of_one_process():
    assert refrag.all_reduce_check() == {"processes": 1, "sum_of_ranks": 0.0, "ok": True}
