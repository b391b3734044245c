"""Section 3: timers, whole files and folders, memory, devices, and notices."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU_HAS
from writers import tree

import refrag
from refrag_extras import doctor, reports, runs

CPU = torch.device("cpu")


def test_a_picture_is_replaced_whole(tmp_path):
    reports.save_figure(tmp_path / "a.png", 2, (2, 1), lambda left, right: (left.plot([1, 2]), right.plot([2, 1])))
    before = tree(tmp_path)
    assert before["a.png"].startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError):
        reports.save_figure(tmp_path / "a.png", 1, (2, 1), lambda axes: 1 / 0)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["final", "k[16]"])
def test_a_folder_that_was_moved_aside_comes_back_or_goes_with_the_next_writing(tmp_path, name):
    (tmp_path / f".{name}.1.old").mkdir()
    refrag.restore_folder(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    (tmp_path / f".{name}.1.old").mkdir()
    with refrag.new_folder(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_stopwatch_waits_for_the_device_and_adds_up_seconds_by_stage(monkeypatch):
    """The clock reads 1, 2, 4, 8, 16, 32: stages of 1, 4 and 16 seconds; what lies between belongs to none."""
    watch = refrag.Stopwatch(CPU, clock=(2**i for i in itertools.count()).__next__)
    for name in ("gate_s", "pack_s", "gate_s"):
        with watch.stage(name):
            pass
    assert watch.seconds == {"gate_s": 1 + 16, "pack_s": 4}
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


def test_devices_and_precision(monkeypatch):
    assert doctor.all_reduce_check() == {"processes": 1, "sum_of_ranks": 0.0, "ok": True}
    assert refrag.pick_device("auto").type in ("cuda", "mps", "cpu")
    assert refrag.pick_device("cpu") == CPU
    refrag.synchronize(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(refrag.MissingError, match="--device cuda is not available here: use --device auto"):
        refrag.pick_device("cuda")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able}, raising=False)
        monkeypatch.setattr(refrag, "cpu_has", CPU_HAS)
        assert (refrag.pick_dtype("auto", CPU) is torch.bfloat16) is able
        assert refrag.pick_dtype("float32", CPU) is refrag.pick_dtype("auto", torch.device("mps")) is torch.float32
        assert refrag.pick_dtype("bfloat16", CPU) is torch.bfloat16
    monkeypatch.setattr(runs.ctypes, "CDLL", None)
    for system in ("darwin", "win32"):  # the allocator is left alone
        monkeypatch.setattr(refrag.sys, "platform", system)
        runs.keep_memory()


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
