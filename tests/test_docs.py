"""The scripts in docs/: the proof that vectors are read, scaled down, and the measurements' training part."""

from __future__ import annotations

import re
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
