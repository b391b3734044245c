"""Bad input, damaged files, full disks, second writers and kills, through the command line.

Each failure has its exit code and one line on stderr, and leaves the index as it was.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import refrag

KILLS = int(os.environ.get("REFRAG_KILLS", "4"))  # kills per command at random moments
QUIET = ("--quiet", "--threads", "1")  # one thread: tiny matrices gain nothing from more
QUESTIONS = ("Which river crosses the old city?", "bronze bells", "passage 17")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


# ---- An index, its state, and what is written to it -----------------------------------------------------------------


@pytest.fixture
def models(embedder, llama) -> list[object]:
    """The options that name the tiny models."""
    return ["--embed_model", embedder, "--dec", llama, "--enc", "decoder:2", *QUIET]


@pytest.fixture
def index(tmp_path, index_dir) -> Path:
    """A copy of the index of six passages, free to be damaged."""
    return shutil.copytree(index_dir, tmp_path / "index")


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes, text or rows; returns its path."""

    def call(name: str, content: bytes | str | list[dict]) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return call


def passages(count: int) -> list[dict]:
    """Rows with ids p0, p1, ... that no other corpus here has."""
    return [{"id": f"p{i}", "title": f"Passage {i}", "text": f"Passage {i} tells of the town of {i * 13} bridges."}
            for i in range(count)]


def ids(found: str) -> list[str]:
    """The ids of a search result in JSON."""
    return [p["id"] for p in json.loads(found)["passages"]]


@pytest.fixture
def found(run):
    """What all questions find in an index, as the printed JSON; None where there is no index yet."""

    def call(folder: Path, *options: object) -> list[str] | None:
        results = []
        for question in QUESTIONS:
            code, out, err = run("search", "--index_dir", folder, "--question", question, "--json", *QUIET, *options)
            if code == 2 and ("no index in this folder" in err or "no such folder" in err):
                return None
            assert (code, err) == (0, ""), err
            results.append(out)
        return results

    return call


@pytest.fixture
def state(found):
    """An index as others see it: its manifest, the names of its files, and what it finds.

    What a build that ended early keeps for the next one is no part of the index.
    """
    def call(folder: Path):
        files = [p for p in sorted(folder.rglob("*")) if refrag.FINISHED_BLOCKS not in p.parts]
        return (folder / "manifest.json").read_bytes(), files, found(folder)

    return call


@pytest.fixture
def unchanged(state):
    """A context that leaves an index as it is."""

    @contextlib.contextmanager
    def call(folder: Path):
        before = state(folder)
        yield
        assert state(folder) == before

    return call


@pytest.fixture
def refused(run):
    """Run a command that must fail with this exit code and one line on stderr; returns the line."""

    def call(code: int, *argv: object) -> str:
        got, out, err = run(*argv)
        assert (got, out) == (code, ""), (got, out, err)
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err

    return call


def test_the_tiny_index_tells_corpora_apart(run, index, found, write, models):
    """What the tests below rely on: the same command finds other passages after a rebuild."""
    before = found(index)
    assert run("index", "--corpus", write("new.jsonl", passages(9)), "--index_dir", index, *models)[0] == 0
    after = found(index)
    assert {i for out in before for i in ids(out)} == set("abcdef")
    assert {i for out in after for i in ids(out)} <= {f"p{i}" for i in range(9)}


# ---- Bad corpora ----------------------------------------------------------------------------------------------------

GOOD = {"id": "new", "text": "A good passage."}
CORPORA = [
    ("c.txt", b"", "no passages in it"),
    ("c.txt", b"\n \r\n\t\n\n", "no passages in it"),
    ("c.jsonl", b"", "no passages in it"),
    ("c.txt", b"good\nb\xffd\n", r"c\.txt: invalid UTF-8 at byte 6: "),
    ("c.jsonl", b'{"text": "good"}\n{"text": \n', r"c\.jsonl:2: malformed JSON"),
    ("c.jsonl", b'{"text": "good"}\n{"text": 7}\n', r"c\.jsonl:2: text must be a string, got int"),
    ("c.jsonl", b'{"text": "good"}\n{"text": " "}\n', r"c\.jsonl:2: text is empty"),
    ("c.jsonl", [GOOD, {"id": "x", "text": "b"}, {"id": "new", "text": "c"}],
     r"duplicate id 'new' at \S*c\.jsonl:1 and \S*c\.jsonl:3"),
]


@pytest.mark.parametrize("mode", [(), ("--add",)], ids=["index", "add"])
@pytest.mark.parametrize(("name", "content", "told"), CORPORA, ids=[told for *_, told in CORPORA])
def test_a_bad_corpus_leaves_the_index(refused, unchanged, index, write, models, name, content, told, mode):
    with unchanged(index):
        line = refused(2, "index", "--corpus", write(name, content), "--index_dir", index, *models, *mode)
    assert re.search(told, line)


@pytest.mark.parametrize("mode", [(), ("--add",)], ids=["index", "add"])
def test_a_missing_corpus_leaves_the_index(refused, unchanged, index, models, mode):
    with unchanged(index):
        line = refused(2, "index", "--corpus", "nowhere.txt", "--index_dir", index, *models, *mode)
    assert "--corpus nowhere.txt: no such file or folder" in line


def test_a_missing_corpus_makes_no_folder(refused, models, tmp_path):
    refused(2, "index", "--corpus", "nowhere.txt", "--index_dir", tmp_path / "new", *models)
    assert not (tmp_path / "new").exists()


def test_a_truncated_gzip_corpus_is_a_damaged_file(refused, unchanged, index, write, models):
    path = write("c.txt.gz", gzip.compress(b"good\n" * 500)[:-9])
    with unchanged(index):
        refused(4, "index", "--corpus", path, "--index_dir", index, *models)


def test_a_document_that_can_not_be_replaced_leaves_the_index(refused, unchanged, index, write, models, monkeypatch):
    """Vectors can not be had back from an ivfpq index."""
    path = write("more.jsonl", [GOOD, {"id": "c", "text": "again"}])
    manifest = refrag.index_manifest(str(index))
    manifest["segments"][0]["faiss"] = "ivfpq"
    with unchanged(index), monkeypatch.context() as patch:
        patch.setattr(refrag, "index_manifest", lambda _: manifest)
        line = refused(5, "index", "--add", "--corpus", path, "--index_dir", index, *models)
    assert "ivfpq index can't replace documents: build it anew" in line


def test_adding_to_nothing_is_refused(refused, tmp_path, write, models):
    line = refused(2, "index", "--add", "--corpus", write("c.jsonl", [GOOD]), "--index_dir", tmp_path / "i", *models)
    assert "no index in this folder" in line


@pytest.mark.parametrize(("errors", "counted"), [("skip", "skipped"), ("replace", "replaced")])
def test_what_was_wrong_with_the_input_is_counted(run, index, write, models, errors, counted):
    corpus = write("c.txt", b"good\nb\xffd\nfine\n")
    code, out, err = run("index", "--corpus", corpus, "--index_dir", index, *models, "--errors", errors, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result[counted] == 1
    assert result["passages"] == (2 if errors == "skip" else 3)


def test_no_passage_is_empty(run, tmp_path, write, llama):
    """The decoder's tokenizer, which splits for BM25, spells white space in tokens of its own."""
    corpus = write("c.jsonl", [{"id": "a", "text": "start" + "\n \t" * 60 + "end of it"}])
    code, _, err = run("index", "--corpus", corpus, "--index_dir", tmp_path / "i", "--retriever", "bm25",
                       "--dec", llama, "--max_passage_tokens", "8", "--overlap", "0", *QUIET)
    assert (code, err) == (0, "")
    opened = refrag.open_index(str(tmp_path / "i"))
    assert [i for i in range(len(opened)) if not opened.texts[i]] == []


def test_a_document_may_have_very_many_pieces(tmp_path):
    with refrag.ColumnWriter(tmp_path) as columns:
        spans = [(i, i + 1) for i in range(70_000)]
        refrag.CorpusWriter(columns).add(refrag.Record("a", "", "x" * 70_000, "c.jsonl:1"), spans)
    assert refrag.map_array(tmp_path / "parts.npy")[-1] == 70_000


# ---- Bad searches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--question", "q", "--topk", "0"], "--topk must be 1 or more, got 0"),
        (["--question", ""], "the question is empty"),
        (["--question", "  "], "the question is empty"),
        ([], "name one of --question and --questions"),
        (["--question", "q", "--hops", "9"], "--hops must lie between 1 and 8"),
    ],
)
def test_a_bad_search_is_refused(refused, index_dir, argv, told):
    assert told in refused(2, "search", "--index_dir", index_dir, *argv)


@pytest.mark.parametrize("retriever", ["hybrid", "dense", "bm25"])
def test_topk_above_the_corpus_returns_everything_once(run, index_dir, retriever):
    code, out, err = run("search", "--index_dir", index_dir, "--question", "The river and the old city",
                         "--topk", "999", "--retriever", retriever, "--json", *QUIET)
    assert (code, err) == (0, "")
    got = ids(out)
    assert len(set(got)) == len(got)
    assert set(got) <= set("abcdef")
    assert retriever == "bm25" or len(got) == 6


def test_another_embedder_does_not_fit(refused, unchanged, index, write, models, other_embedder):
    corpus = write("c.jsonl", [GOOD])
    with unchanged(index):
        for argv in (["search", "--question", "q"], ["index", "--add", "--corpus", corpus, *models]):
            line = refused(5, *argv, "--index_dir", index, "--embed_model", other_embedder)
            assert "use the same --embed_model or build the index again" in line


@pytest.mark.parametrize("command", ["search", "doctor"])
def test_a_folder_without_an_index(refused, tmp_path, command):
    question = ["--question", "q"] if command == "search" else []
    assert "no such folder" in refused(2, command, "--index_dir", tmp_path / "nowhere", *question)
    assert "no index in this folder" in refused(2, command, "--index_dir", tmp_path, *question)


# ---- Damage ---------------------------------------------------------------------------------------------------------


def data_files(index: Path) -> list[Path]:
    """The manifest and every file that it lists."""
    return sorted(p for p in index.rglob("*") if p.is_file() and p.name != ".lock")


def search(index: Path) -> tuple[object, ...]:
    """The arguments of a search that reads all of an index."""
    return "search", "--index_dir", index, "--question", QUESTIONS[0], *QUIET


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damage_at_any_place_is_noticed(run, refused, index, kind):
    """50 places over all bytes of the index, so that a file counts by its size; and each file once."""
    rng, files = random.Random(0), data_files(index)
    sizes = [p.stat().st_size for p in files]
    for path in [*files, *rng.choices(files, weights=sizes, k=50)]:
        intact = path.read_bytes()
        place = rng.randrange(len(intact))
        damaged = bytearray(intact if kind == "flip" else intact[:place])
        if kind == "flip":
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        line = refused(4, *search(index))
        assert path.name in line
        path.write_bytes(intact)
    assert run(*search(index))[0] == 0


def test_trailing_bytes_and_missing_files_are_noticed(run, refused, index):
    for path in data_files(index):
        intact = path.read_bytes()
        path.write_bytes(intact + b"\0")
        assert path.name in refused(4, *search(index))
        if path.name != "manifest.json":
            path.unlink()
            assert path.name in refused(4, *search(index))
        path.write_bytes(intact)
    assert run(*search(index))[0] == 0


def test_a_missing_segment_is_damage(refused, index):
    shutil.rmtree(index / "gen-1")
    refused(4, *search(index))


def test_adding_to_a_damaged_index_is_refused_and_building_it_again_mends_it(run, refused, index, write, models):
    path = index / "gen-1" / "texts.npy"
    path.write_bytes(path.read_bytes()[:-1])
    corpus = write("c.jsonl", [GOOD])
    refused(4, "index", "--add", "--corpus", corpus, "--index_dir", index, *models)
    assert run("index", "--corpus", corpus, "--index_dir", index, *models)[0] == 0
    assert ids(run(*search(index), "--json")[1]) == ["new"]


def test_a_full_disk_is_named_when_the_manifest_to_replace_is_damaged(refused, index, write, models, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (index / "manifest.json").write_text("damaged")
    monkeypatch.setattr(refrag, "write_manifest", full)
    refused(6, "index", "--corpus", write("c.jsonl", [GOOD]), "--index_dir", index, *models)
    assert not (index / "gen-2").exists()


def test_a_future_format_does_not_fit(refused, index):
    path = index / "manifest.json"
    manifest = json.loads(path.read_text()) | {"version": refrag.MANIFEST_VERSION + 1}
    path.write_text(json.dumps(manifest | {"digest": refrag.manifest_digest(manifest)}))
    assert "update the program" in refused(5, *search(index))


# ---- Folders that are not ours --------------------------------------------------------------------------------------


def test_an_index_dir_that_is_a_file_is_refused(refused, write, models):
    path = write("file", "precious")
    for argv in (["index", "--corpus", write("c.jsonl", [GOOD]), *models], ["search", "--question", "q"]):
        refused(2, *argv, "--index_dir", path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["thesis.tex", "gen-1.txt", "my-gen-1", "manifest.json.bak"])
def test_a_foreign_folder_is_refused(refused, tmp_path, write, models, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    line = refused(2, "index", "--corpus", write("c.jsonl", [GOOD]), "--index_dir", tmp_path / "mine", *models)
    assert f"holds other files ({name})" in line
    assert [(p.name, p.read_text()) for p in (tmp_path / "mine").iterdir()] == [(name, "precious")]


def test_what_systems_leave_in_folders_is_not_foreign(run, tmp_path, write, models):
    """A file manager's .DS_Store in an index is no reason to refuse an addition, and stays."""
    first, more = write("a.jsonl", [GOOD]), write("b.jsonl", [GOOD | {"id": "another"}])
    assert run("index", "--corpus", first, "--index_dir", tmp_path / "i", *models)[0] == 0
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "i" / name).write_text("a system's")
    code, _, err = run("index", "--corpus", more, "--index_dir", tmp_path / "i", "--add", *models)
    assert code == 0, err
    assert (tmp_path / "i" / ".DS_Store").read_text() == "a system's"


def test_an_empty_folder_is_accepted(run, tmp_path, write, models):
    (tmp_path / "i").mkdir()
    assert run("index", "--corpus", write("c.jsonl", [GOOD]), "--index_dir", tmp_path / "i", *models)[0] == 0


@pytest.fixture
def mount(tmp_path):
    """Mount something on a new folder and return it; unmounted at the end. Skips where mounting is not permitted."""
    mounted = []

    def call(*argv: object) -> Path:
        point = tmp_path / "mounted"
        point.mkdir()
        command = ["mount", *map(str, argv), str(point)]
        done = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True)
        if not done or done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip() if done else 'no mount program'}")
        mounted.append(point)
        return point

    yield call
    for point in mounted:
        if subprocess.run(["umount", str(point)]).returncode:
            subprocess.run(["umount", "--lazy", str(point)], check=True)


@posix
def test_a_read_only_folder_is_refused_before_any_work(refused, unchanged, mount, index, write, models, monkeypatch):
    """And it can still be searched: reading takes no lock."""
    locked = mount("-o", "bind,ro", index)
    corpus = write("c.jsonl", [GOOD])
    with unchanged(locked), monkeypatch.context() as patched:
        patched.setattr(refrag, "load_build", lambda *_: pytest.fail("worked before it looked"))
        patched.setattr(refrag, "ingest", lambda *_: pytest.fail("worked before it looked"))
        for folder in (locked, locked / "new"):
            line = refused(2, "index", "--corpus", corpus, "--index_dir", folder, *models)
            assert "Read-only file system" in line


PAGE = 4096  # what tmpfs counts in


@posix
@pytest.mark.parametrize(
    ("flags", "step"),
    [
        pytest.param(["--k", "4"], 2, id="index"),
        pytest.param(["--add"], 3, id="add"),
        pytest.param(["--retriever", "dense"], 1, id="dense"),
    ],
)
def test_a_full_disk_leaves_the_index(run, mount, state, index_dir, write, models, flags, step):
    """The disk gets more room page by page, so that every step of a build meets its end, until one build succeeds.

    What was built by then must be whole: an error of the last bytes of a file is easily lost when the file is closed.
    """
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    index, filler = shutil.copytree(index_dir, disk / "index"), disk / "filler"
    corpus, old = write("c.jsonl", passages(60)), state(index)
    for pages in range(0, 200, step):
        filler.unlink(missing_ok=True)
        room = os.statvfs(disk)
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - pages * PAGE))
        code, _, err = run("index", "--corpus", corpus, "--index_dir", index, *models, *flags)
        if code == 0:
            break
        assert (code, err.count("\n")) == (6, 1), f"with room for {pages} pages: {err}"
        assert state(index) == old
    assert 10 < pages < 199, "not one build failed, or not one succeeded"
    code, out, err = run(*search(index), "--json", "--retriever", "dense")
    assert (code, err) == (0, "")
    assert json.loads(out)["passages"]


# ---- Two writers, interrupts and kills ------------------------------------------------------------------------------

SERVER = """
import json, os, signal, sys
import sentence_transformers, refrag

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

def child(job):
    seen = []

    def hook(event, args):
        if event in WATCHED and (job["folder"] in str(args[0]) or not str(args[0]).startswith("/")):
            seen.append([event, str(args[1] if event == "os.rename" else args[0])])
            if len(seen) == job["at"]:
                os.kill(os.getpid(), job["signal"])

    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.addaudithook(hook)
    code = refrag.main(job["argv"])
    print(json.dumps(seen), flush=True)
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
    """Runs commands in processes of their own that need not import anything: forks of one that has done so.

    A process can be told to send itself a signal just before its n-th file operation in a folder.
    """

    def __init__(self, log: Path):
        self.log = log
        environment = os.environ | {"PYTHONPATH": str(Path(refrag.__file__).parent)}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=environment, text=True)

    def ask(self, **job: object) -> object:
        """Send a job and read its answer."""
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv: list[object], folder: Path, at: int = 0, sig: int = signal.SIGKILL) -> int:
        """Start a command; returns the process id."""
        return self.ask(argv=[str(a) for a in argv], folder=str(folder), at=at, signal=int(sig), log=str(self.log))

    def wait(self, pid: int) -> object:
        """Wait for the end: the exit code, minus the signal that killed it, or "stopped"."""
        return self.ask(pid=pid)

    def operations(self) -> list[list[str]]:
        """The file operations of the last process, which has ended by itself: [what, path], in order."""
        return json.loads(self.log.read_text().splitlines()[-1])

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(timeout=30)
        self.server.stdout.close()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = Forks(tmp_path_factory.mktemp("forks") / "log")
    yield server
    server.close()


def restore(index: Path, old: Path | None) -> None:
    """Make an index folder as it was; without an old one, nothing is there."""
    shutil.rmtree(index, ignore_errors=True)
    if old is not None:
        shutil.copytree(old, index)


def leftovers(index: Path) -> list[str]:
    """What lies in an index folder beside the manifest, the lock and the segments."""
    current = [segment["folder"] for segment in json.loads((index / "manifest.json").read_text())["segments"]]
    return [p.name for p in index.iterdir() if p.name not in ("manifest.json", ".lock", *current)]


def test_a_second_builder_is_told_so(forks, refused, run, state, index, write, models):
    """The first one is halted while it writes; readers find the old index meanwhile. It ends as if nothing had been."""
    corpus = write("c.jsonl", passages(20))
    argv = ["index", "--corpus", corpus, "--index_dir", index, *models]
    before = state(index)
    pid = forks.start(argv, index, at=20, sig=signal.SIGSTOP)
    try:
        assert forks.wait(pid) == "stopped"
        assert list(index.glob(".gen-2.*.tmp")), "halted too early or too late to be writing"
        for mode in ([], ["--add"]):
            assert "another process" in refused(75, *argv, *mode)
        assert (state(index)[0], state(index)[2]) == (before[0], before[2])
    finally:
        os.kill(pid, signal.SIGCONT)
    assert forks.wait(pid) == 0
    assert leftovers(index) == []
    assert set(ids(run(*search(index), "--json")[1])) <= {f"p{i}" for i in range(20)}


def test_a_reader_that_meets_a_writer_finds_the_old_index_or_the_new_one(run, index, write, models, monkeypatch):
    """A new index becomes current, and the old one vanishes, right after the reader has read the manifest."""
    read, corpus = refrag.read_manifest, write("c.jsonl", passages(20))

    def read_and_replace(path: Path) -> dict:
        manifest = read(path)
        if manifest["segments"][0]["folder"] == "gen-1":
            monkeypatch.setattr(refrag, "read_manifest", read)
            assert run("index", "--corpus", corpus, "--index_dir", index, *models)[0] == 0
        return manifest

    monkeypatch.setattr(refrag, "read_manifest", read_and_replace)
    code, out, err = run(*search(index), "--json")
    assert (code, err) == (0, "")
    assert set(ids(out)) <= {f"p{i}" for i in range(20)}


@posix
def test_ctrl_c_and_sigterm_during_a_build(found, index_dir, tmp_path, llama):
    """Real processes, halfway through: they wait for the rest of a corpus on standard input."""
    before, builders = found(index_dir), []
    with contextlib.ExitStack() as stack:
        for sig, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            index = shutil.copytree(index_dir, tmp_path / sig.name)
            argv = [sys.executable, refrag.__file__, "index", "--corpus", "-", "--index_dir", str(index),
                    "--retriever", "bm25", "--dec", str(llama), *QUIET]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            builders.append((sig, code, index, subprocess.Popen(argv, **pipes)))
            stack.callback(builders[-1][-1].kill)
        for sig, code, index, process in builders:
            process.stdin.write(b"a first line\n")
            process.stdin.flush()
            while not list(index.glob(".gen-2.*.tmp")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal(sig)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (code, b"")
            assert err == b"error: interrupted\n" or (sig == signal.SIGTERM and b"Traceback" not in err)
            assert leftovers(index) == []
            assert found(index) == before


def check_after_a_stop(run: object, found: object, index: Path, before: object, after: object, rest: list) -> bool:
    """An index after its writer was stopped: old or new as a whole; whether it is the new one.

    Then the next builds, one that adds and one from nothing, work and leave nothing lying about.
    """
    now = found(index)
    assert now in (before, after)
    count = 0 if now is None else json.loads((index / "manifest.json").read_text())["counts"]["passages"]
    for mode in (["--add"] if count else [], []):
        code, out, err = run("index", *rest, "--index_dir", index, "--json", *mode)
        assert (code, err) == (0, "")
        assert json.loads(out)["passages"] == (count if mode else 0) + 1
        assert leftovers(index) == []
    return now == after


@pytest.fixture(scope="module")
def small_index(tmp_path_factory, corpus, llama) -> Path:
    """An index of the six passages without vectors. Building one takes a moment only."""
    folder = tmp_path_factory.mktemp("small") / "index"
    argv = ["index", "--corpus", corpus, "--index_dir", folder, "--retriever", "bm25", "--dec", llama, *QUIET]
    assert refrag.main([str(a) for a in argv]) == 0
    return folder


STOPS = [
    ("first", signal.SIGKILL, -9), ("rebuild", signal.SIGKILL, -9), ("add", signal.SIGKILL, -9),
    ("first", signal.SIGINT, 130),
    ("rebuild", signal.SIGINT, 130),
    ("add", signal.SIGTERM, 143), ("replace", signal.SIGKILL, -9),
]


@posix
@pytest.mark.parametrize(("mode", "sig", "code"), STOPS)
def test_a_build_stopped_before_one_of_its_file_operations(
    run, forks, found, small_index, tmp_path, write, llama, mode, sig, code
):
    """Those around the moment when the new index becomes current, and some others."""
    index, old = tmp_path / "index", None if mode == "first" else small_index
    options = ["--dec", llama, "--retriever", "bm25", *QUIET]
    next_corpus = write("next.jsonl", [GOOD])
    again = [{"id": i, "text": "The river, bronze bells and passage 17."} for i in "ab"] if mode == "replace" else []
    argv = ["index", "--corpus", write("c.jsonl", [*again, *passages(20)]), "--index_dir", index, *options,
            *(["--add"] if mode in ("add", "replace") else [])]

    def look(folder: Path) -> list[str] | None:
        return found(folder, "--retriever", "bm25")

    restore(index, old)
    before = look(index)
    assert forks.wait(forks.start(argv, index)) == 0
    after, operations = look(index), forks.operations()
    (current,) = [n for n, step in enumerate(operations, 1) if step == ["os.rename", str(index / "manifest.json")]]
    others = random.Random(mode).sample(range(1, len(operations) + 1), min(KILLS, len(operations)))
    became_new = {}
    for at in sorted({*range(current - 1, current + 3), *others} & set(range(1, len(operations) + 1))):
        restore(index, old)
        assert forks.wait(forks.start(argv, index, at=at, sig=sig)) == code
        became_new[at] = check_after_a_stop(run, look, index, before, after, ["--corpus", next_corpus, *options])
    assert became_new == {at: at > current for at in became_new}


@posix
@pytest.mark.parametrize("mode", ["index", "add"])
def test_a_build_killed_at_any_moment(run, forks, found, index, tmp_path, write, models, mode):
    """Random moments, spread over the time that an unhindered build takes. REFRAG_KILLS sets how many."""
    old = index.rename(tmp_path / "old")
    argv = ["index", "--corpus", write("c.jsonl", passages(400)), "--index_dir", index, *models,
            *(["--add"] if mode == "add" else ["--k", "4"])]
    next_corpus = write("next.jsonl", [GOOD])
    durations = []
    for _ in range(2):
        restore(index, old)
        before, start = found(index), time.monotonic()
        assert forks.wait(forks.start(argv, index)) == 0
        durations.append(time.monotonic() - start)
    seconds, after = min(durations), found(index)
    assert before != after
    rng, killed, late, new = random.Random(mode), 0, 0, 0
    while killed < KILLS and late < 3 * KILLS:
        restore(index, old)
        pid = forks.start(argv, index)
        time.sleep((killed + rng.random()) / KILLS * seconds)
        os.kill(pid, signal.SIGKILL)  # one that has ended already is not harmed: its exit code was not read yet
        code = forks.wait(pid)
        assert code in (0, -9)
        became_new = check_after_a_stop(run, found, index, before, after, ["--corpus", next_corpus, *models])
        assert became_new or code == -9
        if code == 0:  # it ran faster than the first one
            late, seconds = late + 1, 0.9 * seconds
        else:
            killed, new = killed + 1, new + became_new
    print(f"{killed} kills over {seconds:.2f} s: {killed - new} left the old index, {new} the new one; {late} late")
