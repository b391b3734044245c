"""Measures an index at scale: how it is built, changed, killed and searched. Each command prints one JSON object.

    python docs/measure_index.py changes --corpus passages.jsonl.gz --index_dir runs/leads [--drawn]
    python docs/measure_index.py kills --corpus data/wiki_passages.jsonl --passages 150 --kills 100
    python docs/measure_index.py build --corpus passages.jsonl.gz --passages 1000000 --index_dir runs/million
    python docs/measure_index.py add --corpus passages.jsonl.gz --passages 1000 --index_dir runs/million
    python docs/measure_index.py search --corpus passages.jsonl.gz --index_dir runs/million --where "hundredth < 50"
    python docs/measure_index.py faiss --passages 1000000

changes: whole processes: a build, --sync after one document in a hundred has changed, the same --sync again, --delete
of one in a hundred, --add of one. kills: each of these ends by SIGKILL at random moments and begins again. build, add:
also milvus+http://HOST:19530/NAME (--retriever dense for a server before 2.5); the first texts of the corpus again and
again, numbers in their titles, each cut and stemmed once. search: by what the index holds. Drawn vectors, points around
centres, stand in these and with --drawn for what models compute; all else is the program's own. faiss: index types over
such points.
Memory: peak_mb counts pages of mapped files, which the system takes back when it needs them; anon_mb does not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "kills" in sys.argv:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a fork does not inherit threads

import numpy as np
import pyarrow as pa
from measure import RUNTIME, print_result

import refrag
from refrag_extras import index as writing
from refrag_extras.corpus import Record

DIM, CENTRES, TEXTS = 384, 10_000, 20_000


class Memory(threading.Thread):
    """The most memory that a process holds on its own, without the pages of mapped files (Linux)."""

    def __init__(self, pid: int | str = "self"):
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/status"), 0
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while True:
                held = [line for line in self.status.read_text().splitlines() if line.startswith("RssAnon")]
                self.peak = max(self.peak, *(int(line.split()[1]) // 1024 for line in held), 0)
                time.sleep(0.1)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 2) for q in (50, 99)}


def timed(ask: Callable, questions: list[str]) -> dict[str, float]:
    """What a question takes by the clock and of this process's CPU; the first is asked twice and warms up."""
    times, cpu = [], []
    for question in [questions[0], *questions]:
        start, used = time.perf_counter(), time.process_time()
        ask(question)
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"first_ms": round(1e3 * times[0], 1), **percentiles(times[1:]),
            "cpu_p50_ms": percentiles(cpu[1:])["p50_ms"]}


def show(row: dict) -> dict:
    """The row, which is also shown at once."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def records(args: argparse.Namespace, most: int | None) -> list[dict]:
    """The first objects of a file of JSON lines, .gz or not."""
    with (gzip.open if args.corpus.endswith(".gz") else open)(args.corpus, "rt", encoding="utf-8") as file:
        return list(map(json.loads, itertools.islice(file, most)))


def write_records(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def revised(item: dict) -> dict:
    return item | {"text": f"Revised. {item['text']}"}


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def centres() -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(CENTRES, DIM)))


class Points:
    """Vectors as an embedder might give them: of length 1, around centres."""

    def __init__(self, seed: int):
        self.rng, self.centres = np.random.default_rng(seed), centres()

    def draw(self, count: int) -> np.ndarray:
        """(count, DIM) float32; the cosine of two of one centre is about .6."""
        chosen = self.centres[self.rng.integers(0, CENTRES, count)]
        return unit(chosen + 0.8 * unit(self.rng.normal(size=chosen.shape)))

    def near(self, vectors: np.ndarray) -> np.ndarray:
        """Questions for passages, with a cosine of about .8 to them."""
        return unit(vectors + 0.75 * unit(self.rng.normal(size=vectors.shape)))

    def compute(self, contents: list[str]) -> pa.Table:
        """The columns of `Build.compute`, of chunks of 64 characters, about 16 tokens."""
        lengths = [-(-len(content) // 64) for content in contents]
        ends = np.concatenate([np.arange(64, 64 * n + 64, 64, np.uint32) for n in lengths])
        gate = np.frombuffer(self.rng.bytes(len(ends) * DIM), np.int8).reshape(-1, DIM)
        return pa.table({
            "key": pa.array(map(writing.content_key, contents), pa.binary(16)), "ends": writing.lists(lengths, ends),
            "sizes": writing.lists(lengths, np.full(len(ends), 16, np.uint16)), "gate": writing.lists(lengths, gate),
            "gate_scales": writing.lists(lengths, np.ones(len(ends), np.float32)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(self.draw(len(contents)).ravel()), DIM)})


# -- changes -------------------------------------------------------------------


def run_index(what: str, *argv: object) -> dict:
    """`refrag.py index` as a process: a row of the table."""
    command, start = [sys.executable, refrag.__file__, "index", "--json", *map(str, argv)], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        memory, printed = Memory(child.pid), child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    summary = json.loads(printed)
    assert child.returncode == 0, summary
    return show({"what": what, "passages": summary["passages"], "computed": summary["computed"],
                 "seconds": round(time.perf_counter() - start, 1), "peak_mb": usage.ru_maxrss // 1024,
                 "anon_mb": memory.peak})


def measure_changes(args: argparse.Namespace) -> dict:
    """A build and its changes. The corpus file that changes lies beside the index."""
    place, path, items = ["--index_dir", args.index_dir], Path(f"{args.index_dir}.jsonl"), records(args, args.passages)
    build, rows = ["--corpus", write_records(path, items), *place], []
    if args.drawn:
        points = Points(1)
        writing.Build.compute = lambda build, contents: points.compute(contents)
        with contextlib.redirect_stdout(sys.stderr):
            assert refrag.main(["index", *map(str, build)]) == 0
    else:
        rows.append(run_index("build", *build))
    write_records(path, [item if number % 100 else revised(item) for number, item in enumerate(items)])
    rows += [run_index(f"--sync, {changed} changed", "--sync", *build) for changed in ("1%", "nothing")]
    rows.append(run_index("--delete of 1%", "--delete", *(item["id"] for item in items[50::100]), *place))
    write_records(path, [revised(items[0]) | {"id": "new"}])
    return {"n": len(items), "rows": [*rows, run_index("--add of one", "--add", *build)]}


# -- kills ---------------------------------------------------------------------

STEPS = {"bm25": "BM25", "faiss.index": "FAISS", "chunks.arrow": "columns", "read.arrow": "reading",
         "passages.arrow": "computing"}  # the first of these that is there tells what is being done


class Run:
    """`index` in a process of its own, forked, so that nothing is loaded again."""

    def __init__(self, path: Path, argv: list[object]):
        self.path, self.before = path, generation(path)
        self.pid = os.fork()
        if self.pid == 0:
            with path.with_suffix(".json").open("w") as file:
                os.dup2(file.fileno(), 1)
            code = refrag.main(["index", "--index_dir", str(path), "--json", "--quiet", *map(str, argv)])
            sys.stdout.flush()
            os._exit(code)

    def step(self) -> str | None:
        """What it is doing, by what exists in the folder."""
        folder = next(self.path.glob(f".gen-*.{self.pid}.tmp"), None)
        if folder is not None:
            return next((step for name, step in STEPS.items() if (folder / name).exists()), None)
        if generation(self.path) != self.before:
            return "cleaning"
        return "manifest" if {p.name for p in self.path.glob("gen-*")} - {self.before} else None

    def steps(self) -> Iterator[str]:
        """That again and again, until it ends."""
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if step := self.step():
                yield step
            time.sleep(0.0005)

    def end(self) -> tuple[int, dict[str, float]]:
        """How many contents it computed, and the seconds of each step."""
        seconds, last = collections.Counter(), time.perf_counter()
        for step in self.steps():
            seconds[step] += time.perf_counter() - last
            last = time.perf_counter()
        return json.loads(self.path.with_suffix(".json").read_text())["computed"], dict(seconds)

    def kill(self, step: str, delay: float) -> str:
        """SIGKILL so long after a step has begun. Returns what that hit."""
        for _ in itertools.takewhile(lambda now: now != step, self.steps()):
            pass
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return self.step() or "nothing yet"


def generation(path: Path) -> str | None:
    """The folder that an index's manifest names, None without one."""
    return refrag.index_manifest(path)["generation"] if (path / "manifest.json").exists() else None


def content(path: Path) -> dict[str, str] | None:
    """Digests of an index's files, verified; but not of HNSW's graph, which depends on how it grew."""
    if generation(path) is None:
        return None
    index = refrag.open_index(path, read_all=True)
    assert index.faiss.ntotal == len(index) == len(index.vectors)
    return {name.split("/", 1)[1]: entry["sha256"] for name, entry in index.manifest["files"].items()
            if "faiss" not in name}


def kill_once(old: Path | None, argv: list[object], whole: tuple[int, dict], step: str, delay: float) -> dict:
    """Kill a run, look, begin again, look. whole: what an undisturbed run computes and leaves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        shutil.copytree(old, path) if old else path.mkdir()
        before, hit = content(path), Run(path, argv).kill(step, delay)
        found, finished = content(path), sum(
            len(writing.read_unfinished(file)) for file in path.glob(".computed-*/*.arrows"))
        result = {"hit": hit, "old": found == before, "new": found == whole[1], "twice": 0}
        if not (result["new"] and "--delete" in argv):  # what is gone cannot be deleted again
            computed, _ = Run(path, argv).end()
            result["twice"] = computed if result["new"] else computed + finished - whole[0]
            assert {p.name for p in path.iterdir()} == {"manifest.json", ".lock", generation(path)}
        return result | {"right": content(path) == whole[1]}


def compute_one(text: str) -> pa.Table:
    """What is drawn for a content, whatever stands beside it."""
    return Points(int.from_bytes(writing.content_key(text))).compute([text])


def killed_runs(folder: Path, items: list[dict]) -> dict[str, tuple[Path | None, list[object]]]:
    """{what: (the index before it, its options)}"""
    most, options = len(items) * 3 // 4, ["--max_passage_tokens", 64, "--overlap", 0, "--faiss", "hnsw"]
    changed, few = [*map(revised, items)], most // 4
    files = {name: write_records(folder / f"{name}.jsonl", part) for name, part in {
        "all": items, "old": items[:most], "added": changed[:few] + items[most:],
        "now": items[few:most:2] + changed[few + 1 : most : 2] + items[most:]}.items()}
    before = {name: folder / f"index_{name}" for name in ("old", "all")}
    for name, path in before.items():
        path.mkdir()
        Run(path, ["--corpus", files[name], *options]).end()
    return {"build": (None, ["--corpus", files["all"], *options]),
            "--add": (before["old"], ["--add", "--corpus", files["added"]]),
            "--sync": (before["old"], ["--sync", "--corpus", files["now"]]),
            "--delete": (before["all"], ["--delete", *(item["id"] for item in items[::10])])}


def measure_kills(args: argparse.Namespace) -> dict:
    """Kills at random moments of each step of each kind of run, and what was found."""
    refrag.prepare_runtime(refrag.RuntimeConfig(threads=1, quiet=True))  # a fork inherits no threads
    embedder, tokenizer = refrag.load_embedder(None, RUNTIME), refrag.build_tokenizer(refrag.RefragConfig())
    refrag.load_embedder, refrag.build_tokenizer = lambda *_: embedder, lambda _: tokenizer  # a run is short then
    writing.Build.compute = lambda build, contents: pa.concat_tables(map(compute_one, contents)).combine_chunks()
    writing.BLOCK, rng, rows = 32, np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        for what, (old, argv) in killed_runs(Path(name), records(args, args.passages)).items():
            path = Path(name) / what
            shutil.copytree(old, path) if old else path.mkdir()
            computed, seconds = Run(path, argv).end()
            found = [kill_once(old, argv, (computed, content(path)), step, rng.uniform(0, seconds[step]))
                     for step in itertools.islice(itertools.cycle(seconds), args.kills)]
            sums = {name: sum(one[name] for one in found) for name in ("old", "new", "right", "twice")}
            rows.append(show({"what": what, "kills": args.kills, **collections.Counter(one["hit"] for one in found),
                              **sums}))
    return {"n": args.kills, "rows": rows}


# -- a large index -------------------------------------------------------------


def draw_passages(args: argparse.Namespace, add: bool) -> None:
    """Let builds read numbered texts, stem a text once, and draw vectors."""
    texts, points, stem = records(args, TEXTS), Points(args.seed + add), refrag.index_terms
    terms_of = functools.cache(stem)

    def read(build: writing.Build, corpus: refrag.CorpusConfig) -> Iterator[list[tuple]]:
        first = len(build.previous) if build.options.add else 0
        for block in refrag.batched(range(first, first + args.passages), writing.BLOCK):
            items = [(n, texts[n % len(texts)]) for n in block]
            yield [passage for n, item in items for passage in build.pieces(Record(
                str(n), f"{item['title']} {n}", item["text"][:1200], "", {"hundredth": n % 100}), [(0, 1200)])]

    def index_terms(text: str) -> list[str]:
        title, _, rest = text.partition("\n")
        return [*stem(title), *terms_of(rest)]

    writing.Build.read, refrag.index_terms = read, index_terms
    writing.Build.compute = lambda build, contents: points.compute(contents)


def measure_build(args: argparse.Namespace, add: bool = False) -> dict:
    """A build, or an addition to one: time, memory, bytes of each column; a folder's files tell the time of a step."""
    draw_passages(args, add)
    memory, start, used = Memory(), time.time(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        writing.run(refrag.CorpusConfig(corpus=(args.corpus,)), refrag.IndexConfig(args.index_dir, args.retriever),
                    refrag.BuildConfig(faiss=args.faiss, add=add), refrag.ReaderConfig(), RUNTIME)
    seconds, cpu, index = time.time() - start, time.process_time() - used, refrag.open_index(args.index_dir)
    facts = {"n": args.passages, "seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "passages": len(index),
             "peak_mb": round(refrag.peak_rss_mb()), "anon_mb": memory.peak}
    if not str(args.index_dir).startswith("milvus+"):
        folder = Path(args.index_dir) / index.manifest["generation"]
        files = [*(folder / name for name in ("passages.arrow", "chunks.arrow", "faiss.index",
                                              "bm25/params.index.json")), folder.parent / "manifest.json"]
        times = {path.name: path.stat().st_mtime for path in files if path.exists()}
        facts |= {"faiss": index.manifest["faiss"], "bytes_per_passage": bytes_of(index), "steps_s": {
            name: round(end - begin, 1) for name, (begin, end) in zip(
                times, itertools.pairwise([start, *times.values()]), strict=True)}}
    return facts


def bytes_of(index: refrag.Index) -> dict[str, float]:
    """Bytes per passage of each column and file."""
    sizes = collections.Counter({
        f"{table}.{name}": getattr(index, table)[name].nbytes for table in ("passages", "chunks")
        for name in getattr(index, table).column_names})
    for name, entry in index.manifest["files"].items():
        if not name.endswith(".arrow"):
            sizes[name.split("/")[1]] += entry["bytes"]
    return {name: round(size / len(index), 1) for name, size in sizes.items()}


def measure_search(args: argparse.Namespace) -> dict:
    """Seconds to open an index, and milliseconds that a question takes, its embedding apart."""
    start = time.perf_counter()
    index = refrag.open_index(args.index_dir)
    open_s, embedder, memory = time.perf_counter() - start, refrag.load_embedder(None, RUNTIME), Memory()
    questions = [" ".join(item["text"].split()[:10]) for item in records(args, args.questions)]
    rows = [show({"where": "", "retriever": "embedding", **timed(lambda q: embedder.embed_queries([q]), questions)})]
    for where, (retriever, uses) in itertools.product([None, *args.where], sorted(refrag.RETRIEVERS.items())):
        if set(uses) <= set(index.manifest["uses"]):
            search = functools.partial(refrag.Searcher(index, retriever, embedder).search, topk=8, where=where)
            rows.append(show({"where": where or "", "retriever": retriever, **timed(search, questions)}))
    return {"n": len(questions), "passages": len(index), "open_s": round(open_s, 2), "rows": rows,
            "peak_mb": round(refrag.peak_rss_mb()), "anon_mb": memory.peak}


def measure_faiss(args: argparse.Namespace) -> dict:
    """Index types over the same points: building, size, latency of a question, recall@10 against the exact search."""
    points, rows, exact = Points(1), [], None
    vectors = np.concatenate([points.draw(len(part)) for part in refrag.batched(range(args.passages), 65_536)])
    questions = points.near(vectors[points.rng.integers(0, len(vectors), args.questions)])
    for kind in ("flat", *args.types):
        start, size, search = time.perf_counter(), vectors.nbytes, functools.partial(refrag.search_exactly, vectors)
        if kind != "flat":
            index = writing.new_faiss(kind, vectors)
            for part in refrag.progress(refrag.batched(vectors, 4096), kind):
                index.add(part)
            with tempfile.NamedTemporaryFile() as file:
                refrag.faiss.write_index(index, file.name)
                size, search = os.path.getsize(file.name), functools.partial(
                    refrag.search_faiss, refrag.read_faiss(Path(file.name)))
        built, times, found = time.perf_counter() - start, [], []
        for question in questions:
            start = time.perf_counter()
            found.append(set(search(question[None], 10, None)))
            times.append(time.perf_counter() - start)
        exact = exact or found
        recall = np.mean([len(a & b) / len(b) for a, b in zip(found, exact, strict=True)])
        rows.append(show({"faiss": kind, "build_s": round(built, 1), "bytes_per_passage": round(size / len(vectors), 1),
                          **percentiles(times), "recall@10": round(float(recall), 4)}))
    return {"n": len(questions), "passages": len(vectors), "rows": rows}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("changes", "kills", "build", "add", "search", "faiss"))
    parser.add_argument("--index_dir")
    parser.add_argument("--corpus", help="JSON lines {id,title,text}, .gz or not")
    parser.add_argument("--passages", type=int, help="records at most, or points")
    parser.add_argument("--drawn", action="store_true", help="changes: the first vectors are drawn, not computed")
    parser.add_argument("--faiss")
    parser.add_argument("--retriever", help="build: dense or bm25 alone")
    parser.add_argument("--where", nargs="+", default=[])
    parser.add_argument("--types", nargs="+", default=["ivfpq", "hnsw"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    result = measure_build(args, add=True) if args.what == "add" else globals()[f"measure_{args.what}"](args)
    print_result(args.what, result)


if __name__ == "__main__":
    main()
