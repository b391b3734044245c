"""Measures an index at scale: how it is built, added to and searched. Each command prints one JSON object.

    python docs/measure_index.py faiss --passages 1000000
    python docs/measure_index.py build --texts passages.jsonl.gz --passages 1000000 --index_dir runs/million
    python docs/measure_index.py add --texts passages.jsonl.gz --passages 1000 --index_dir runs/million
    python docs/measure_index.py search --texts passages.jsonl.gz --index_dir runs/million
    python docs/measure_index.py growth --texts passages.jsonl.gz --sizes 500 1000 2000 4000
    python docs/measure_index.py kills --texts passages.jsonl.gz --index_dir runs/killed --kills 10

faiss, build and add: the texts are real and taken again and again until there are enough, what an embedder would make
of them is drawn: points around centres, a question near the passage that it asks for. All else is the program's own.
search: the first words of passages as questions, by words, by vectors and by both. growth: whole builds, embedder and
all, each in a process of its own, and the exponents with which their cost grows. kills: a whole build that is ended by
SIGKILL at random moments and started again each time; then blocks of it, drawn at random, are embedded once more here,
and must equal the index's to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from measure import RUNTIME, print_result

import refrag

DIM, CENTRES = 384, 10_000


class Points:
    """Vectors as an embedder might make them: of length 1, around centres."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.centres = unit(np.random.default_rng(0).normal(size=(CENTRES, DIM)))

    def draw(self, count: int) -> np.ndarray:
        """(count, DIM) float32; the cosine of two of one centre is about .6."""
        chosen = self.centres[self.rng.integers(0, CENTRES, count)]
        return unit(chosen + 0.8 * unit(self.rng.normal(size=chosen.shape)))

    def near(self, vectors: np.ndarray) -> np.ndarray:
        """Questions for passages, with a cosine of about .8 to them."""
        return unit(vectors + 0.75 * unit(self.rng.normal(size=vectors.shape)))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in ms."""
    return {f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 99)}


def measure_faiss(args: argparse.Namespace) -> dict:
    """Index types over the same points: building, size, latency of a single question, recall@10 against flat."""
    points, rows = Points(1), []
    vectors = np.concatenate([points.draw(n) for n in map(len, refrag.batched(range(args.passages), 65_536))])
    asked = points.near(vectors[points.rng.integers(0, len(vectors), args.questions)])
    exact = None
    for kind in ("flat", *args.types):
        start = time.perf_counter()
        index = refrag.new_faiss(kind, vectors)
        for part in refrag.progress(refrag.batched(vectors, 4096), kind):
            index.add(part)
        built = time.perf_counter() - start
        refrag.tune_faiss(index)
        times, found = [], []
        for question in asked:
            start = time.perf_counter()
            found.append(list(refrag.search_faiss([index], question[None], 10)))
            times.append(time.perf_counter() - start)
        exact = exact or found
        with tempfile.TemporaryDirectory() as folder:
            refrag.faiss.write_index(index, f"{folder}/index")
            size = (Path(folder) / "index").stat().st_size
        recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)])
        rows.append({"faiss": kind, "build_s": round(built, 1), "bytes_per_passage": round(size / len(vectors), 1),
                     **percentiles(times), "recall@10": round(float(recall), 4)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del index
    return {"passages": len(vectors), "questions": len(asked), "rows": rows}


@contextlib.contextmanager
def corpus_of(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """A corpus file of as many passages as asked for, their ids beginning with a name."""
    with gzip.open(args.texts, "rt", encoding="utf-8") as file:
        texts = [json.loads(line) for line in itertools.islice(file, args.passages)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, item in zip(range(args.passages), itertools.cycle(texts)):
                file.write(json.dumps({"id": f"{name}{number}", "title": item["title"], "text": item["text"]}) + "\n")
        yield path


def measure_build(args: argparse.Namespace, add: bool = False) -> dict:
    """A build, or passages added to one, without the embedder's work."""
    points = Points(2 + add)

    def drawn(contents: list[str], chunking: refrag.Chunking, embedder: refrag.Embedder, batch_size: int) -> tuple:
        cuts = chunking.tokenizer.cut([chunking.tokenizer.neutralize(content) for content in contents], chunking.k)
        tables = [refrag.ChunkTable(cut.ends, cut.sizes, np.zeros((len(cut.ends), DIM), dtype=np.float16), None)
                  for cut in cuts]
        return points.draw(len(contents)), tables

    refrag.chunk_tables = drawn  # in the embedder's place
    build = refrag.BuildConfig(faiss=args.faiss, add=add)
    index, models = refrag.IndexConfig(index_dir=args.index_dir), refrag.ModelConfig()
    before = refrag.index_manifest(args.index_dir)["counts"]["passages"] if add else 0
    with corpus_of(args, f"from{before}-") as path, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        refrag.cmd_index(refrag.CorpusConfig(corpus=(str(path),)), index, build, models,
                         RUNTIME)
        seconds = time.perf_counter() - start
    manifest = refrag.index_manifest(args.index_dir)
    passages = manifest["counts"]["passages"]
    sizes: dict[str, float] = {}
    for name, entry in manifest["files"].items():
        kind = name.split("/")[1].removesuffix(".npy").removesuffix("_offsets")
        sizes[kind] = round(sizes.get(kind, 0) + entry["bytes"] / passages, 1)
    return {"counts": manifest["counts"], "faiss": manifest["faiss"], "segments": len(manifest["segments"]),
            "seconds": round(seconds, 1),
            "peak_rss_mb": round(refrag.peak_rss_mb()), "bytes_per_passage": sizes}


def measure_search(args: argparse.Namespace) -> dict:
    """Seconds to open an index, and milliseconds a question takes."""
    made = {}
    for name in ("first_open_s", "open_s"):
        start = time.perf_counter()
        index = refrag.open_index(args.index_dir)
        made[name] = round(time.perf_counter() - start, 3)
    made |= search_times(index, args)
    return {"passages": len(index), "questions": args.questions, **made, "peak_rss_mb": round(refrag.peak_rss_mb())}


def search_times(index: refrag.Index, args: argparse.Namespace) -> dict:
    """Latency of a question by each retriever."""
    made, embedder = {}, refrag.load_embedder(None, RUNTIME)
    with gzip.open(args.texts, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, args.questions)]
    questions = [" ".join(text.split()[:10]) for text in texts]
    for retriever in ("bm25", "dense", "hybrid"):
        searcher, times = refrag.Searcher(index, retriever, embedder), []
        for question in [questions[0], *questions]:
            embedder.queries.clear()
            start = time.perf_counter()
            searcher.search(question, 8)
            times.append(time.perf_counter() - start)
        made[retriever] = percentiles(times[1:])
    return made


def measure_growth(args: argparse.Namespace) -> dict:
    """Corpora of growing size: seconds, memory, bytes, latency."""
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, refrag.__file__, "index", "--corpus", args.texts, "--limit", str(size),
                       "--index_dir", f"{folder}/index", "--json", "--quiet"]
            summary = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            index = refrag.open_index(f"{folder}/index")
            bytes_all = sum(entry["bytes"] for entry in index.manifest["files"].values())
            rows.append({"passages": summary["passages"], "seconds": summary["seconds"],
                         "peak_rss_mb": summary["peak_rss_mb"], "mb": round(bytes_all / 1e6, 1),
                         "hybrid_p50_ms": search_times(index, args)["hybrid"]["p50_ms"]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    lengths = [row["passages"] for row in rows]
    exponents = {name: round(float(np.polyfit(np.log(lengths), np.log([row[name] for row in rows]), 1)[0]), 3)
                 for name in ("seconds", "peak_rss_mb", "mb", "hybrid_p50_ms")}
    return {"rows": rows, "exponents": exponents}


def build_killed(args: argparse.Namespace, rng: np.random.Generator) -> tuple[dict, list[dict]]:
    """Build with SIGKILL at random moments. Returns what the last run printed, and each killed run."""
    blocks = Path(args.index_dir) / refrag.FINISHED_BLOCKS
    command = [sys.executable, refrag.__file__, "index", "--corpus", args.texts, "--index_dir", args.index_dir,
               "--limit", str(args.passages), "--json"]
    killed = []
    for _ in range(args.kills):
        seconds = float(rng.uniform(*args.between))
        before = {path.name: path.stat().st_mtime_ns for path in blocks.glob("*.npz")}
        with contextlib.suppress(subprocess.TimeoutExpired):  # which comes after SIGKILL
            subprocess.run(command, check=True, capture_output=True, timeout=seconds)
            raise SystemExit(f"the build was done before it could be killed: {len(killed)} kills")
        after = {path.name: path.stat().st_mtime_ns for path in blocks.glob("*.npz")}
        kept = before.items() <= after.items()  # nothing that was finished was made again
        killed.append({"seconds": round(seconds, 1), "blocks": len(after), "kept": kept})
        print(json.dumps(killed[-1]), file=sys.stderr, flush=True)
    last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(last), killed


def measure_kills(args: argparse.Namespace) -> dict:
    """A killed build against blocks of it that are embedded again in this process."""
    rng = np.random.default_rng(args.seed)
    summary, killed = build_killed(args, rng)
    index, models = refrag.open_index(args.index_dir), refrag.ModelConfig()
    [segment] = index.segments
    embedder, chunking = refrag.load_embedder(None, RUNTIME), refrag.Chunking(
        16, refrag.build_tokenizer(refrag.model_config(models)))
    starts = range(0, len(index), refrag.EMBED_BLOCK)
    chosen = sorted(rng.choice(len(starts), min(args.check, len(starts)), replace=False))
    equal = 0
    for first in (starts[i] for i in chosen):
        rows = range(first, min(first + refrag.EMBED_BLOCK, len(index)))
        vectors, tables = refrag.chunk_tables([index.content(row) for row in rows], chunking, embedder, 32)
        gate = np.concatenate([table.embeddings for table in tables]).astype(np.float16)
        span = slice(segment["chunk_offsets"][rows.start], segment["chunk_offsets"][rows.stop])
        same = [np.array_equal(index.faiss[0].reconstruct_n(rows.start, len(rows)), vectors),
                np.array_equal(segment["gate"][span], refrag.in_8_bits(gate)[0]),
                np.array_equal(segment["chunk_ends"][span], np.concatenate([t.ends for t in tables]))]
        equal += all(same)
        print(json.dumps({"block": first // refrag.EMBED_BLOCK, "same": same}), file=sys.stderr, flush=True)
    return {"killed": killed, "last_run": summary, "blocks": len(starts), "checked": len(chosen), "equal": equal,
            "search": search_times(index, args)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("faiss", "build", "add", "search", "growth", "kills"))
    parser.add_argument("--index_dir")
    parser.add_argument("--texts", help="JSON lines {title,text}, .gz")
    parser.add_argument("--sizes", nargs="+", type=int, default=[500, 1000, 2000, 4000])
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--faiss", default="auto")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--between", nargs=2, type=float, default=[30, 300], help="seconds that a killed run lives")
    parser.add_argument("--check", type=int, default=40, help="blocks that are embedded again")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--types", nargs="+", default=["hnsw", "ivfpq"])
    args = parser.parse_args()
    refrag.prepare_runtime(RUNTIME)
    result = measure_build(args, add=True) if args.what == "add" else globals()[f"measure_{args.what}"](args)
    print_result(args.what, result)


if __name__ == "__main__":
    main()
