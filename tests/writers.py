"""What the matrices of guarantees and of bad input share: damage, the commands that write, and ways to disturb them."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE, MAIN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["refrag"].split(":")
# How the program starts, after the name of the interpreter: as a file, and as the script that pip installs
STARTS = {"python refrag.py": [str(ROOT / "refrag.py")], "refrag": [
    "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; from {MODULE} import {MAIN}; sys.exit({MAIN}())"]}
STEPS = 5  # of each training run
VARYING = {"seconds", "tokens_per_s", "ttft_s", "ttit_s", "gate_ms", "ms_per_question", "stages", "spread", "runs",
           "peak_rss_mb", "peak_device_mb", "load_s", "products_share", "ttft_ratio", "ttit_ratio", "file", "run",
           "out_dir", "command", "commit", "versions", "checkpoint"}
ASKED = [("Where do smiths cast bells?", "the valley", "b"), ("Who wrote the notes?", "Ada Lovelace", "c"),
         ("Which lake does the Rhone leave?", "Lake Geneva", "a")]


# ---- Files ----------------------------------------------------------------------------------------------------------

def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Write each row as a line of JSON; returns the path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lasting(value: object) -> object:
    """Of a result, what is the same in each run."""
    if isinstance(value, dict):
        return {key: lasting(v) for key, v in value.items() if key not in VARYING}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, but for locks."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith("lock"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@contextlib.contextmanager
def unchanged(*folders: Path):
    before = [tree(folder) for folder in folders]
    yield
    assert [tree(folder) for folder in folders] == before


def damage(path: Path, kind: str) -> None:
    """Flip a bit near the end of a file, cut it, make it longer, remove it, or put a folder in its place."""
    intact = path.read_bytes()
    if kind in ("missing", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "flipped":
        path.write_bytes(intact[:-5] + bytes([intact[-5] ^ 4]) + intact[-4:])
    else:
        path.write_bytes({"truncated": intact[: len(intact) // 2], "longer": intact + b"\0"}[kind])


def sign(folder: Path, **changes: object) -> None:
    """Write a manifest again, as if its files had always been what they are now; None removes a fact."""
    path = folder / "manifest.json"
    facts = json.loads(path.read_text()) | changes
    facts = {name: value for name, value in facts.items() if value is not None or name not in changes}
    for name in facts["files"]:
        content = (folder / name).read_bytes()
        facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    facts.pop("digest")
    path.write_text(json.dumps(facts | {"digest": hashlib.sha256(
        json.dumps(facts, sort_keys=True).encode()).hexdigest()}))


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


# ---- Commands in processes of their own -----------------------------------------------------------------------------

SERVER = """
import contextlib, ctypes, json, os, sys
import accelerate, peft, sentence_transformers, torch, refrag

torch.set_num_threads(1)  # as in this file: other sums round in another order
refrag.cpu_has = lambda *_: False
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def child(job):
    seen, written = [], [None]

    def note(*what):
        seen.append(what)
        number = job["faults"].get(str(len(seen)), 0)
        if number == 9 and written[0] and os.path.isfile(written[0]):
            os.truncate(written[0], max(0, os.path.getsize(written[0]) - 7))
        if number > 0:
            os.kill(os.getpid(), number)
        elif number < 0:
            raise OSError(-number, os.strerror(-number), what[1])

    def hook(event, args):
        opens = event == "open" and isinstance(args[0], str) and (job["reads"] or args[2] & WRITING)
        if (opens or event in CHANGES) and (args[0].startswith(job["watch"]) or not args[0].startswith("/")):
            note(event, *map(str, args[: 1 + (event == "os.rename")]))
            written[0] = args[0] if event == "open" else written[0]

    def fsync(handle, sync=os.fsync):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(job["watch"]):
            note("fsync", path)
        sync(handle)

    os.environ.update({"REFRAG_HOME": f"{job['log']}-{os.getpid()}"} | job["env"])
    for number, path in enumerate([os.devnull, job["log"] + ".out", job["log"] + ".err"]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    with contextlib.suppress(OSError, AttributeError):  # permissions hold for root as well
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
    if os.path.exists("/proc/self/fd"):
        os.fsync = fsync
    sys.modules["matplotlib"] = None  # pictures take longer than all the rest
    sys.addaudithook(hook)
    if job["argv"][0] == "-c":
        code = exec(job["argv"][1], globals()) or 0
    else:
        code = refrag.main(job["argv"])
    job["watch"] = "-"
    with open(job["log"], "w") as log:
        json.dump(seen, log)
    os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    if "argv" in job:
        answer = os.fork() or child(job)
    else:
        _, status = os.waitpid(job["pid"], os.WUNTRACED)
        answer = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    print(json.dumps(answer), flush=True)
"""


class Forks:
    """Runs commands in processes of their own that need not import anything: forks of one that has done so. Each has
    caches of its own. It can be told to send itself signals just before its n-th change of a file, or to fail there;
    SIGKILL also takes the last bytes of the file that was being written."""

    def __init__(self, folder: Path):
        self.log, self.server = folder / "log", None

    def ask(self, **job: object) -> object:
        """Send a job to the server, which starts with the first, and read its answer."""
        self.server = self.server or subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""})
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv: list[object], watch: Path | str = "-", faults: dict[int, int] | None = None,
              log: Path | None = None, reads: bool = False, **env: object) -> int:
        """Start a command; returns the process id. faults: a signal or -errno by number of a change in `watch`; with
        `reads`, to open a file for reading is one."""
        return self.ask(argv=[str(a) for a in argv], watch=str(watch), faults=faults or {}, log=str(log or self.log),
                        reads=reads, env={name: str(value) for name, value in env.items()})

    def wait(self, pid: int) -> object:
        """Wait for the end: the exit code, minus the signal that killed it, or "stopped"."""
        return self.ask(pid=pid)

    def run(self, argv: list[object], *how: object, **more: object) -> object:
        return self.wait(self.start(argv, *how, **more))

    def run_two(self, argv: list[object]) -> list[str]:
        """Run a command in two processes that know of each other, as torchrun starts them: what each has printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": free.getsockname()[1], "REFRAG_HOME": self.log.with_name("shared")}
        logs = [self.log.with_name(f"log{rank}") for rank in range(2)]
        pids = [self.start(argv, log=logs[rank], RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(2)]
        assert [self.wait(pid) for pid in pids] == [0, 0], [Path(f"{log}.err").read_text() for log in logs]
        return [Path(f"{log}.out").read_text() for log in logs]

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()

    def changes(self) -> list[list[str]]:
        """What the last process, which has ended by itself, did to files: [what, path, ..], in order."""
        return json.loads(self.log.read_text())


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    if forks.server:
        forks.server.communicate(timeout=30)


# ---- Commands that write --------------------------------------------------------------------------------------------

class Writer(NamedTuple):
    """A command that writes a folder, and what stands there before."""

    command: str
    old: str | None = None  # see `olds`
    parts: bool = False  # what it has finished so far may be seen


WRITERS = {
    "index": Writer("index"), "index again": Writer("index", "words"), "index --add": Writer("add", "words"),
    "index --add of the same": Writer("same", "words"), "index --sync": Writer("sync", "words"),
    "index --delete": Writer("delete", "words"), "cpt_recon": Writer("cpt_recon", None, True),
    "cpt_recon after damage": Writer("cpt_recon", "damaged", True), "train_gate": Writer("train_gate"),
    "save_pretrained": Writer("save", "checkpoint"), "export": Writer("export"), "eval": Writer("eval", None, True),
    "bench": Writer("bench", "bench", True)}


@pytest.fixture(scope="session")
def files(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("files")
    many = [{"id": f"p{i}", "title": f"Passage {i}", "text": f"Passage {i} tells of {i * 13} bridges."}
            for i in range(20)]
    same = [{"id": i, "text": "The river, bronze bells and passage 17."} for i in "ab"]
    asked = [{"id": f"q{n}", "question": q, "answers": [a], "positive_ids": [i]} for n, (q, a, i) in enumerate(ASKED)]
    texts = [json.loads(row)["text"] for row in corpus.read_text().splitlines()]
    texts = [{"text": f"{text} {text.lower()}"} for text in texts]
    for name, content in {"many": many, "same": [*same, *many], "asked": asked, "texts": texts, "eval": texts}.items():
        write_rows(folder / f"{name}.jsonl", content)
    (folder / "search.txt").write_text("".join(f"{question}\n" for question, *_ in [*ASKED, ["passage 17"]]))
    return folder


@pytest.fixture(scope="session")
def line(files, corpus, llama, embedder, index_dir):
    """The command line of a writer into a folder, with further options, which replace its own."""
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
        "sync": ["index", "--sync", *words, files / "same.jsonl"],
        "delete": ["index", "--delete", "b", "e", *words[:-1]],
        "vectors": ["index", *models, "--embed_model", embedder, "--corpus", files / "many.jsonl"],
        "cpt_recon": ["cpt_recon", *texts], "cpt_align": ["cpt_align", *texts],
        "cpt_next": ["cpt_next", *texts, "--lora_r", 2, "--grad_accum", 2],
        "sft": ["sft", *index, "--rag_json", asked, "--eval_json", asked, "--topk", 2, "--distill", 1, *run],
        "train": ["train", *index, "--rag_json", asked, "--topk", 2, "--mix", "recon=.5,next=.2,cloze=.3", "--mix_end",
                  "cloze=.5,qa=.5", "--workers", 1, *texts],
        "train_gate": ["train_gate", *index, "--rag_json", asked, "--topk", 2, "--epochs", 1, *models],
        "train_policy": ["train_policy", *index, "--rag_json", asked, "--topk", 2, "--steps", 1, *models],
        "eval": ["eval", *index, "--qa", asked, "--topk", 2, "--max_new", 3, "--modes", "full", "refrag", *models,
                 "--resume"],
        "bench": ["bench", *index, "--question", ASKED[0][0], "--contexts", 60, "--p", 0, "--new", 3, "--repeats", 2,
                  *models], "export": ["export", *index, "--question", ASKED[0][0], "--max_new", 3, *models],
        "generate": ["generate", *index, "--questions", asked, "--topk", 2, "--max_new", 4, *models, "--resume"]}

    def call(command: str, out: Path, *more: object) -> list[object]:
        flag = {"index": "--index_dir", "generate": "--out"}.get(lines[command][0], "--out_dir")
        flags = itertools.accumulate(lines[command], lambda flag, word: word if str(word).startswith("--") else flag)
        own = [word for word, flag in zip(lines[command], flags, strict=True) if flag not in more]
        return [*own, flag, out, "--threads", 1, "--quiet", "--json", *more]

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
    if writer.command != "save":
        return line(writer.command, folder)
    source = finished(WRITERS["cpt_recon"]).folder / "step-000004"
    return ["-c", f"refrag.RefragModel.from_pretrained({str(source)!r}).save_pretrained({str(folder)!r})"]
