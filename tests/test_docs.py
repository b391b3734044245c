"""The scripts in docs/: the proof that vectors are read, scaled down, and the measurements' training part."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_vectors_are_read_by_models_from_scratch(tmp_path, monkeypatch):
    """A byte-level decoder of 400,000 random weights learns to say 4 to 16 bytes back from 1 to 4 vectors.

    Without vectors, and with those of another text, it can only guess at letters: the difference is what was read.
    """
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, ROOT / "docs/prove_reading.py", "--out_dir", tmp_path / "proof", "--steps", "150",
               "--seq_tokens", "16", "--hidden", "96", "--layers", "3"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = {int(size): tuple(map(float, rest)) for size, *rest in re.findall(
        r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)}
    assert list(rows) == [4, 8, 16]
    for size, (vectors, none, wrong) in rows.items():
        assert vectors > none + 0.1, f"{size} bytes: {done.stdout}"
        assert vectors > wrong + 0.1, f"{size} bytes: {done.stdout}"


def test_the_results_page_is_what_its_files_say():
    """Every table of docs/RESULTS.md comes from a file in docs/results, and names its command, commit and device."""
    done = subprocess.run([sys.executable, ROOT / "docs/make_results.py", "--check"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr or "python docs/make_results.py was not run"


def test_make_results_keeps_no_path_of_this_machine_and_tells_a_stale_table(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "refrag.py", tmp_path)
    shutil.copy(ROOT / "docs/make_results.py", docs)
    (docs / "RESULTS.md").write_text("Before\n<!-- results: recon -->\nold\n<!-- end -->\nAfter\n", encoding="utf-8")
    result = {"task": "recon", "n": 3, "seed": 1, "command": ["/a/refrag.py", "eval", "--texts", "/a/b/c.jsonl"],
              "results": {"4": {"accuracy": 0.5, "no_vectors": 0.1, "wrong_vectors": 0.1, "full_text": 1.0}},
              "device": {"device": "cpu", "dtype": "float32", "cpu_threads": 2}, "versions": {"torch": "2.13.0"},
              "commit": "0123456789"}
    given = tmp_path / "results.json"
    given.write_text(json.dumps(result), encoding="utf-8")

    def make(*argv):
        return subprocess.run([sys.executable, docs / "make_results.py", *argv], timeout=120).returncode

    assert make("--add", "recon", given) == 0
    page = (docs / "RESULTS.md").read_text(encoding="utf-8")
    assert "| 4 |    0.500 |" in page and "old" not in page
    assert "`refrag.py eval --texts b/c.jsonl`; n = 3; commit 0123456; cpu, 2 threads, float32, torch 2.13.0" in page
    assert page.startswith("Before\n") and page.endswith("After\n") and make("--check") == 0
    (docs / "RESULTS.md").write_text(page.replace("0.500", "0.900"), encoding="utf-8")
    assert make("--check") == 1
