"""`refrag.py index`: writes and changes an index folder.

An index is a function of its corpus and of what models computed for each content (embedding, gate vectors, encoder
states). These are found again by the digest of the content, in the current generation or in the files of a killed
build. So a first build, a resumed one, --add, --sync and --delete all do the same: read passages, compute what is new,
lay out the columns, build FAISS and BM25, replace the manifest.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

import refrag
from refrag import Index, open_columns, require
from refrag_extras import documents
from refrag_extras.corpus import Record, corpus_files, read_corpus, split_spans
from refrag_extras.runs import check_folder, glibc, locked_folder, process_group

BLOCK = 256  # passages whose vectors are kept together, and rows of a record batch
BM25 = {"method": "lucene", "k1": 1.5, "b": 0.75}
FILES = re.compile(r"manifest\.json|gen-\d+|\..*|Thumbs\.db|desktop\.ini")  # what an index folder may hold
IVF_LEAST = 10_000  # passages that train an inverted file
DEFAULTS = {"faiss": "auto", "max_passage_tokens": 256, "overlap": 32}  # settings that an index keeps
SCHEMA = pa.schema([("document", pa.string()), ("part", pa.uint32()), ("title", pa.string()), ("text", pa.string()),
                    ("metadata", pa.string()), ("key", pa.binary(16)), ("terms", pa.list_(pa.int32()))])


@contextlib.contextmanager
def new_columns(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Write an Arrow file. (By a handle: a memory map would end the process when the disk is full.)"""
    with path.open("wb") as handle, pa.ipc.new_file(handle, schema) as writer:
        yield writer


def read_unfinished(path: Path) -> pa.Table:
    """The tables of an Arrow stream, memory-mapped, up to where a kill cut it off; empty without any."""
    data, batches = refrag.map_file(path), []
    with contextlib.suppress(pa.ArrowInvalid, OSError):  # for lack of bytes
        for batch in pa.ipc.open_stream(data):
            batches.append(batch)
    return pa.Table.from_batches(batches) if batches else pa.table({})


def lists(lengths: Sequence[int], values: np.ndarray) -> pa.ListArray:
    """One list for each length n: the next n rows of values (L, ..), flattened."""
    ends = np.cumsum([0, *lengths]) * math.prod(values.shape[1:])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.ravel()))


def in_8_bits(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, dim) as int8 levels and float32 scales (N, 1); the products are off by half a scale at most."""
    vectors = vectors.astype(np.float32)
    scales = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12) / 127
    return np.rint(vectors / scales).astype(np.int8), scales


def gather(tables: Sequence[pa.Table], rows: np.ndarray) -> Iterator[pa.Table]:
    """Rows, numbered through all tables, in this order, BLOCK at a time. (pyarrow's take would copy whole columns.)"""
    batches = [batch for table in tables for batch in table.to_batches()]
    starts = np.cumsum([0, *map(len, batches)])
    for block in refrag.batched(rows, BLOCK):
        inside = np.searchsorted(starts, block, side="right") - 1  # which batch
        cuts = np.flatnonzero((np.diff(block) != 1) | (np.diff(inside) != 0)) + 1
        yield pa.Table.from_batches([
            batches[inside[a]].slice(block[a] - starts[inside[a]], b - a)
            for a, b in itertools.pairwise([0, *cuts.tolist(), len(block)])]).combine_chunks()


def content_key(content: str) -> bytes:
    """What equal contents share, so that models read them once."""
    return hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest()


def keys_of(tables: Sequence[pa.Table]) -> pa.ChunkedArray:
    return pa.chunked_array([part for table in tables for part in table["key"].chunks], pa.binary(16))


def in_blocks(records: Iterable[Record], characters: int = 1 << 20) -> Iterator[list[Record]]:
    """At most BLOCK records together, and fewer that are long: tokens take 300 bytes each while they are cut."""
    block, size = [], 0
    for record in records:
        block.append(record)
        size += len(record.text)
        if len(block) == BLOCK or size > characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space at its ends. Example: " a b ", 0, 3 -> (1, 2)"""
    start += len(text[start:end]) - len(text[start:end].lstrip())
    return start, start + len(text[start:end].rstrip())


def piece_facts(record: Record, start: int, end: int) -> str:
    """The metadata of a piece of a record as JSON, with what its marks say of its start, and as `last_page` (or another
    name) of its end if that is something else."""
    first, last = (bisect.bisect_right(record.marks, place, key=operator.itemgetter(0)) for place in (start, end - 1))
    begins, ends = (record.marks[n - 1][1] if n else {} for n in (first, last))
    lasts = {f"last_{name}": value for name, value in ends.items() if value != begins.get(name, value)}
    facts = record.metadata | begins | lasts
    return json.dumps(facts) if facts else ""


def chunking_facts(chunking: refrag.Chunking) -> dict[str, Any]:
    return {"k": chunking.k, "tokenizer": chunking.tokenizer.fingerprint,
            "encoder": chunking.encoder and chunking.encoder.fingerprint}


class Build:
    """What a corpus becomes in an index, wherever that is kept: passages, and what models compute for them."""

    def __init__(self, path: Path | str, previous: Index | None, build: refrag.BuildConfig, retriever: str,
                 embedder: refrag.Embedder | None, chunking: refrag.Chunking, settings: dict[str, Any],
                 sources: dict[str, str]):
        """settings: see DEFAULTS. sources: see `source_label`. Raises UserError."""
        self.path, self.previous = path, previous
        self.options, self.retriever, self.embedder, self.chunking = build, retriever, embedder, chunking
        self.counts, self.sources, self.settings = {"skipped": 0, "replaced": 0}, dict(sources), settings
        self.places: dict[str, str] = {}  # id of a document or passage that was read -> file:line
        self.size, overlap = settings["max_passage_tokens"], settings["overlap"]
        require(overlap <= self.size // 2,
                f"--overlap must lie between 0 and half of --max_passage_tokens {self.size}, got {overlap}")
        self.tokenizer = embedder.tokenizer if embedder else chunking.tokenizer.encoder
        if embedder and embedder.room < self.size:
            self.size = embedder.room
            refrag.notice(f"passages are cut at {self.size} tokens, the most this embedder reads")

    def facts(self) -> dict[str, Any]:
        """What a manifest says about models and settings."""
        embedder = self.embedder
        return {"words": refrag.WORDS_FINGERPRINT, "retriever": self.retriever, "dim": embedder and embedder.dim,
                "uses": refrag.RETRIEVERS[self.retriever], "chunking": chunking_facts(self.chunking),
                "embedder": {"name": embedder.name, "fingerprint": embedder.fingerprint} if embedder else {},
                "settings": self.settings, "sources": self.sources}

    def read(self, corpus: refrag.CorpusConfig) -> Iterator[list[tuple]]:
        """The corpus in blocks of passages (document, part, title, text, metadata). Raises RefragError."""
        for block in in_blocks(read_corpus(corpus, self.counts, self.sources)):
            titles = refrag.tokenize(self.tokenizer, [record.title or "." for record in block])
            texts = refrag.tokenize(self.tokenizer, [record.text for record in block])
            passages = []
            for record, title, text in zip(block, titles, texts, strict=True):
                used = self.tokenizer.num_special_tokens_to_add() + (len(title.ids) + 1 if record.title else 0)
                room = max(self.size - used, self.size // 2)  # for a piece of the text beside the title
                overlap = min(self.settings["overlap"], room // 2)
                with refrag.skipping(corpus.errors, self.counts):
                    passages += self.pieces(record, split_spans(record.text, text.ends.tolist(), room, overlap))
            yield passages

    def pieces(self, record: Record, spans: list[tuple[int, int]]) -> list[tuple]:
        """A record as one passage, or several with #1, #2, .. after its id. Raises BadRecord."""
        kept = [span for span in (trimmed(record.text, *span) for span in spans) if len(range(*span))]
        parts = range(1, len(kept) + 1) if len(kept) > 1 else [0]
        ids = {record.id, *(f"{record.id}#{part}" for part in parts if part)}
        for name in ids:
            if first := self.places.get(name):
                raise refrag.BadRecord(f"duplicate id {name!r} at {first} and {record.where}: make ids unique")
        self.places |= dict.fromkeys(ids, record.where)
        return [(record.id, part, record.title, record.text[slice(*span)], piece_facts(record, *span))
                for part, span in zip(parts, kept, strict=True)]

    def read_columns(self, path: Path, corpus: refrag.CorpusConfig, schema: pa.Schema,
                     derive: Callable[[tuple, str], tuple]) -> pa.Table:
        """Write the corpus's passages to an Arrow file: fields, key, and what `derive` makes of passage and content."""
        with new_columns(path, schema) as writer:
            for block in filter(None, self.read(corpus)):
                contents = [refrag.passage_content(title, text) for _, _, title, text, _ in block]
                rows = [(*passage, content_key(content), *derive(passage, content))
                        for passage, content in zip(block, contents, strict=True)]
                writer.write(pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema))
        return open_columns(path)

    def compute(self, contents: list[str]) -> pa.Table:
        """What models give for contents: a vector (dim,) float32; of the L chunks their ends in characters, sizes in
        tokens, embeddings `gate` (L, dim) int8 with gate_scales (L,), states (L, E) float16 (of models there are)."""
        vectors, tables = refrag.chunk_tables(contents, self.chunking, self.embedder, self.options.batch_size)
        ends, sizes, embeddings, states = (
            None if parts[0] is None else np.concatenate(parts) for parts in zip(*tables, strict=True))
        lengths = [len(table.ends) for table in tables]
        columns = {"key": pa.array(map(content_key, contents), pa.binary(16)),
                   "ends": lists(lengths, ends.astype(np.uint32)), "sizes": lists(lengths, sizes.astype(np.uint16))}
        if embeddings is not None:
            levels, scales = in_8_bits(embeddings.astype(np.float16))
            columns |= {"gate": lists(lengths, levels), "gate_scales": lists(lengths, scales),
                        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])}
        if states is not None:
            columns["states"] = lists(lengths, states.astype(np.float16))
        glibc("malloc_trim", 0)
        return pa.table(columns)

    def refuse_empty(self, corpus: refrag.CorpusConfig) -> None:
        require(not self.options.changes or self.previous is None or not len(self.previous),
                f"this would delete all {len(self.previous or ())} passages of {self.path}: add --delete_all to do so")
        require(False, f"--corpus {' '.join(corpus.corpus)}: no passages in it")

    def rows_kept(self, old: pa.Table, new: pa.Table) -> np.ndarray:
        """The rows of the index without documents that are deleted or read again. Raises BadRecord, UserError."""
        documents, parts = old["document"], old["part"]
        delete = pa.array(self.options.delete, pa.string())
        absent = delete.filter(pc.invert(pc.is_in(delete, value_set=documents))).to_pylist()
        require(not absent, f"--delete {' '.join(absent)}: the index has no such document")
        gone = pa.chunked_array([delete, *new["document"].chunks])
        stays = ~pc.is_in(documents, value_set=gone).to_numpy()
        ids = pc.binary_join_element_wise(documents, parts.cast(pa.string()), "#")
        names = pa.array(self.places, pa.string())  # also of pieces: a#1 may be the name of a document
        for column, counted in ((documents, stays), (ids, stays & (parts.to_numpy() > 0))):
            for row in np.flatnonzero(pc.is_in(column, value_set=names).to_numpy() & counted)[:1].tolist():
                name = column[row].as_py()
                places = f"in the index and at {self.places[name]}"
                raise refrag.BadRecord(f"duplicate id {name!r} {places}: make ids unique")
        return np.flatnonzero(stays)

    def compare_documents(self, old: pa.Table, new: pa.Table, current: pa.ChunkedArray,
                          version: Sequence[str]) -> dict[str, int]:
        """How many passages were read, and how many documents of the index have changed or are gone.

        old, new: passages of the index and of the corpus; current: documents of the index to come; version: columns
        in which a passage that has changed differs.
        """
        before, after = (pc.binary_join_element_wise(*(table[name].cast(pa.binary()) for name in version), b"\0")
                         for table in (old, new))
        changed = [*old["document"].filter(pc.invert(pc.is_in(before, value_set=after))).chunks,
                   *new["document"].filter(pc.invert(pc.is_in(after, value_set=before))).chunks]
        again, differs, stays = (pc.is_in(pc.unique(old["document"]), value_set=documents).to_numpy(False)
                                 for documents in (new["document"], pa.chunked_array(changed, pa.string()), current))
        return {"added": len(new), "replaced_documents": int((again & differs).sum()),
                "deleted_documents": int((~stays).sum())}


class Unchanged(Exception):
    """There is nothing to write."""


class FolderBuild(Build):
    """Makes the next generation of an index folder, and replaces its manifest."""

    def __init__(self, path: str, *args: Any):
        super().__init__(Path(path), *args)
        self.finished = self.path / f".computed-{content_key(refrag.dumps(refrag.made_by(self.facts()))).hex()}"

    def run(self, corpus: refrag.CorpusConfig) -> dict[str, Any]:
        """Make the new generation current, unless nothing has changed. Returns counts. The caller holds the lock."""
        self.remove_leftovers()
        number = 1 + max((int(p.name[4:]) for p in self.path.glob("gen-*")), default=0)
        try:
            with refrag.new_folder(self.path / f"gen-{number}") as folder:
                passages = self.write_passages(folder, corpus)
                manifest = self.facts() | {"generation": f"gen-{number}", "faiss": self.kind(len(passages))}
                self.embed(folder, self.missing(passages))
                self.check_changed(folder, manifest)
                chunks = self.write_chunks(folder, passages)
                manifest |= {"counts": {"passages": len(passages), "chunks": chunks},
                             "trained": self.build_faiss(folder, manifest["faiss"])}
                self.build_bm25(folder, passages)
            refrag.write_manifest(self.path / "manifest.json", self.path / manifest["generation"], manifest)
        except Unchanged:
            manifest = self.previous.manifest
            refrag.notice("nothing has changed")
        finally:
            self.remove_leftovers()
        for leftover in self.path.glob(".computed-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return {**manifest["counts"], **self.counts, "dim": manifest["dim"]}

    def write_passages(self, folder: Path, corpus: refrag.CorpusConfig) -> pa.Table:
        """Write the columns of the index's passages that stay, in their order, then of the corpus. Raises UserError."""
        old = self.previous if self.options.add or self.options.delete else None
        uses_words = "bm25" in refrag.RETRIEVERS[self.retriever]
        self.vocabulary = dict(old.bm25.vocab_dict) if old is not None and uses_words else {}
        new = self.read_columns(folder / "read.arrow", corpus, SCHEMA, lambda passage, content: (
            self.term_numbers(content) if uses_words else [],))
        tables = [new] if old is None else [old.passages, new]
        self.kept = np.zeros(0, np.int64) if old is None else self.rows_kept(old.passages, new)
        rows = np.concatenate([self.kept, np.arange(len(new)) + sum(map(len, tables[:-1]))])
        with new_columns(folder / "passages.arrow", SCHEMA) as writer:
            for table in gather(tables, rows):
                writer.write(table)
        (folder / "read.arrow").unlink()
        if not len(rows) and not self.options.delete_all:
            self.refuse_empty(corpus)
        passages = open_columns(folder / "passages.arrow")
        before = self.previous.passages if self.previous else SCHEMA.empty_table()
        self.counts |= self.compare_documents(before, new, passages["document"], ("document", "key", "metadata"))
        return passages

    def term_numbers(self, content: str) -> list[int]:
        return [self.vocabulary.setdefault(term, len(self.vocabulary)) for term in refrag.index_terms(content)]

    def computed(self) -> list[pa.Table]:
        """What is known by key: from the generation before, if the same models made it, and from a killed build."""
        tables, old = [], self.previous
        if old and refrag.made_by(old.manifest) == refrag.made_by(self.facts()):
            tables.append(old.chunks.append_column("key", old.passages["key"]))
            if self.embedder:
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(old.vectors.ravel()), self.embedder.dim)
                tables[0] = tables[0].append_column("vector", vectors)
        tables += filter(len, map(read_unfinished, sorted(self.finished.glob("*.arrows"))))
        return [table.select(sorted(table.column_names)) for table in tables]

    def missing(self, passages: pa.Table) -> np.ndarray:
        """The first row of each content that nothing is known of."""
        if self.finished.exists():
            refrag.notice("an earlier run ended early: what it computed is used")
        unknown = pc.invert(pc.is_in(passages["key"], value_set=keys_of(self.computed())))
        new = pc.unique(passages["key"].filter(unknown))
        return pc.index_in(new, value_set=passages["key"]).to_numpy()

    def embed(self, folder: Path | None = None, rows: np.ndarray | None = None) -> None:
        """Compute the contents of the rows and keep them; of launched processes, each a share: process 0 tells the
        others folder and rows."""
        first, step = 0, 1
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from accelerate.utils import broadcast_object_list

            group = process_group()
            folder, rows = broadcast_object_list([folder, rows])
            first, step = group.process_index, group.num_processes
        blocks = gather([open_columns(folder / "passages.arrow")], rows)
        with refrag.progress(None, "computing", len(rows), "passage") as bar, contextlib.ExitStack() as files:
            write = None
            for table in itertools.islice(blocks, first, None, step):
                contents = map(refrag.passage_content, table["title"].to_pylist(), table["text"].to_pylist())
                parts = []
                for part in refrag.batched(sorted(contents, key=len), self.options.batch_size):
                    parts.append(self.compute(part))
                    bar.update(len(part) * step)
                computed = pa.concat_tables(parts).combine_chunks()
                write = write or files.enter_context(self.keeping(computed.schema))
                write(computed)
        self.counts["computed"] = len(rows)
        if step > 1:
            group.wait_for_everyone()

    @contextlib.contextmanager
    def keeping(self, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
        """A function that keeps what was computed for a build to go on with: in one stream for each process, since all
        are mapped at once and files that are open are limited."""
        self.finished.mkdir(exist_ok=True)
        path = self.finished / f"{uuid.uuid4().hex}.arrows"
        with path.open("wb") as handle, pa.ipc.new_stream(handle, schema) as writer:

            def write(table: pa.Table) -> None:
                writer.write(table)
                handle.flush()
                os.fsync(handle.fileno())

            yield write

    def check_changed(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise Unchanged if passages, models and settings are those of the generation before."""
        if self.previous:
            old, new = self.previous.manifest, json.loads(refrag.dumps(manifest))
            digest = old["files"][f"{old['generation']}/passages.arrow"]["sha256"]
            if old | new == old | {"generation": new["generation"]} and (
                    digest == refrag.sha256_file(folder / "passages.arrow")):
                raise Unchanged

    def write_chunks(self, folder: Path, passages: pa.Table) -> int:
        """Write what is known of each passage, in their order. Returns the number of chunks."""
        tables, chunks = self.computed() or [pa.table({"key": pa.array([], pa.binary(16))})], 0
        rows = pc.index_in(passages["key"], value_set=keys_of(tables)).to_numpy()
        names = [name for name in tables[0].column_names if name not in ("key", "vector")]
        with (new_columns(folder / "chunks.arrow", tables[0].select(names).schema) as writer,
              (folder / "vectors").open("wb") as vectors):
            for table in refrag.progress(gather(tables, rows), "columns", -(-len(rows) // BLOCK), "block"):
                writer.write(table.select(names))
                chunks += pc.sum(pc.list_value_length(table["ends"])).as_py()
                if self.embedder:
                    vectors.write(table["vector"].combine_chunks().flatten().to_numpy())
        return chunks

    def kind(self, total: int) -> str | None:
        """The FAISS type for so many passages: flat is no more than their vectors. Raises UserError."""
        wanted = self.settings["faiss"]
        if wanted == "auto":
            wanted = "flat" if total < 1_000_000 else "ivfpq"
        if wanted == "ivfpq" and total < IVF_LEAST:
            require(self.options.faiss is None, f"--faiss ivfpq needs {IVF_LEAST:,} passages to train, got {total}")
            wanted = "flat"  # of a larger index so few were left
        return wanted if self.embedder else None

    def build_faiss(self, folder: Path, kind: str | None) -> int:
        """Build FAISS, or add to the index's if new passages only follow its own. Returns how many trained it."""
        if kind in (None, "flat"):
            return 0
        old, vectors = self.previous, refrag.map_vectors(folder / "vectors", self.embedder.dim)
        trained = old.manifest["trained"] if old and old.manifest["faiss"] == kind else 0
        if old and len(self.kept) == len(old) and len(vectors) < 2 * trained:
            index = old.faiss
        else:
            index, trained = new_faiss(kind, vectors), len(vectors)
        for start in refrag.progress(range(index.ntotal, len(vectors), 4096), "FAISS", unit="block"):
            index.add(vectors[start : start + 4096])
        with (folder / "faiss.index").open("wb") as handle:  # FAISS's own writing misses a disk that gets full
            faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))
        return trained

    def build_bm25(self, folder: Path, passages: pa.Table) -> None:
        """Write what bm25s would, to the bit, in a thirtieth of its time: it counts terms passage by passage."""
        if "bm25" not in refrag.RETRIEVERS[self.retriever]:
            return
        self.vocabulary.setdefault("", len(self.vocabulary))  # bm25s looks this one up for texts without any term
        index, N = bm25s.BM25(**BM25), len(passages)
        lengths = pc.list_value_length(passages["terms"]).to_numpy()  # (N,)
        rows, terms = np.repeat(np.arange(N, dtype=np.int32), lengths), pc.list_flatten(passages["terms"]).to_numpy()
        counts = scipy.sparse.csc_array((np.ones(len(terms), np.float32), (rows, terms)), (N, len(self.vocabulary)))
        frequencies = np.diff(counts.indptr)  # passages with a term; csc_array has added up the repeated ones
        idf = np.log(1 + (N - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
        mean = max(lengths.sum(), 1) / max(N, 1)
        saturation = index.k1 * (1 - index.b + index.b * lengths / mean)
        scores = np.repeat(idf, frequencies) * (counts.data / (saturation[counts.indices] + counts.data))
        index.vocab_dict, index.nonoccurrence_array, index.scores = self.vocabulary, None, {
            "data": scores.astype(np.float32), "indices": counts.indices.astype(np.int32, copy=False),
            "indptr": counts.indptr.astype(np.int64), "num_docs": N}
        index.save(folder / "bm25", show_progress=False)

    def remove_leftovers(self) -> None:
        """Remove what killed writers left, and all generations but the one that the manifest names."""
        final, folders = self.path / "manifest.json", {*self.path.glob(".gen-*")}
        with contextlib.suppress(OSError, refrag.RefragError, KeyError):  # damaged or of an old format
            current = self.path / refrag.read_manifest(final)["generation"] if final.exists() else None
            folders |= {*self.path.glob("gen-*")} - {current}
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob(".manifest*.tmp"):
            file.unlink(missing_ok=True)


def new_faiss(kind: str, vectors: np.ndarray) -> faiss.Index:
    """An empty, trained inner-product index for vectors (N, dim)."""
    N, dim = vectors.shape
    lists = int(4 * math.sqrt(N))  # and 64 passages to train each: within FAISS's guidelines
    pieces = next(m for m in (dim // 8, dim // 4, 16, 8, 4, 2, 1) if m and dim % m == 0)
    # np: no polysemous codes, which would be trained for 80 seconds and never used
    kinds = {"hnsw": "HNSW32", "ivfpq": f"IVF{lists},PQ{pieces}np,Refine(SQ8)"}
    index = faiss.index_factory(dim, kinds[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = 200
    if kind == "ivfpq":
        rows = np.sort(np.random.default_rng(0).choice(N, min(N, 64 * lists), replace=False))
        index.train(np.ascontiguousarray(vectors[rows]))
    return index


def check_same_build(manifest: dict[str, Any], index: refrag.IndexConfig, build: refrag.BuildConfig) -> None:
    """Raise MismatchError if options name other models than the index to change has."""
    chunking, has_embedder = manifest["chunking"], "name" in manifest["embedder"]
    for flag, value, built in (
            ("k", build.k, chunking["encoder"] and chunking["k"]),
            ("retriever", index.retriever, manifest["retriever"]),
            ("embed_model", index.embed_model, index.embed_model if has_embedder else None)):
        if value not in (None, built):
            has = built or "none"
            raise refrag.MismatchError(f"--{flag} {value} does not fit the index, which has {has}: build it again")


def load_build(corpus: refrag.CorpusConfig, index: refrag.IndexConfig, build: refrag.BuildConfig,
               models: refrag.ModelConfig, runtime: refrag.RuntimeConfig) -> Build:
    """A build with what the options name, or what the index to change has. Raises RefragError."""
    previous, milvus = None, refrag.milvus_for(index.index_dir)
    is_new = not (milvus.exists(index.index_dir) if milvus else (Path(index.index_dir) / "manifest.json").is_file())
    changes = build.changes and not (build.sync and is_new)
    with contextlib.suppress(() if changes else refrag.RefragError):  # an unreadable one is replaced
        previous = refrag.open_index(index.index_dir, read_all=True)  # what is damaged must get no new checksum
    built = previous.manifest if changes else {}
    if built:
        check_same_build(built, index, build)
    retriever, chunks = built.get("retriever") or index.retriever or "hybrid", built.get("chunking")
    name = index.embed_model or built.get("embedder", {}).get("name")
    embedder = None if retriever == "bm25" else refrag.load_embedder(name, runtime)
    if built and embedder:
        refrag.check_embedder(built, embedder)
    with_states = chunks["encoder"] if chunks else build.k or models.load_dir not in (None, "none", "auto")
    encoder = None
    if with_states:  # a change needs no more layers: the index tells one encoder from another
        encoder = refrag.load_model(models, runtime, encoder_only=bool(chunks)).encoder
    tokenizer = encoder.tokenizer if encoder else refrag.build_tokenizer(refrag.model_config(models))
    chunking = refrag.Chunking(chunks["k"] if chunks else build.k or refrag.PackConfig.k, tokenizer, encoder)
    if chunks and chunks != chunking_facts(chunking):
        fault = "the index was built with another --enc, --dec or --load_dir: use the same, or build it again"
        raise refrag.MismatchError(fault)
    named = {"faiss": build.faiss, "max_passage_tokens": corpus.max_passage_tokens, "overlap": corpus.overlap}
    settings = DEFAULTS | built.get("settings", {}) | {key: v for key, v in named.items() if v is not None}
    sources = {} if build.sync else built.get("sources", {})
    kind = milvus.MilvusBuild if milvus else FolderBuild
    return kind(index.index_dir, previous, build, retriever, embedder, chunking, settings, sources)


@contextlib.contextmanager
def lock(index_dir: str) -> Iterator[None]:
    """The writers' lock of an index folder; a new folder in which nothing was kept is removed. In Milvus there is none.
    Raises RefragError."""
    if milvus := refrag.milvus_for(index_dir):
        milvus.exists(index_dir)  # an address where nobody answers is told now
        yield
        return
    path = Path(index_dir)
    check_folder("--index_dir", path, FILES)
    with locked_folder(path, "index", lambda: any(p.name != ".lock" for p in path.iterdir())):
        yield


def run(corpus: refrag.CorpusConfig, index: refrag.IndexConfig, build: refrag.BuildConfig,
        models: refrag.ReaderConfig, runtime: refrag.RuntimeConfig) -> None:
    """Build or change an index; of launched processes, all compute vectors and the first writes."""
    require(index.index_dir is not None, "--index_dir is missing: name the folder to write")
    require(bool(corpus.corpus) != bool(build.delete) or build.delete_all,
            "--delete takes no --corpus" if build.delete else "--corpus is missing: name files or folders")
    _, unread = corpus_files(corpus.corpus, {})  # report a missing path before doing any work
    if build.sync and any(refrag.kind_of(path) in documents.READERS for path in unread):
        raise refrag.MissingError(f"--sync would delete documents that cannot be read here: {documents.INSTALL}")
    if os.environ.get("WORLD_SIZE", "1") != "1" and not process_group().is_main_process:
        return load_build(corpus, index, build, models, runtime).embed()
    start = time.perf_counter()
    with lock(index.index_dir):
        summary = load_build(corpus, index, build, models, runtime).run(corpus)
    seconds = time.perf_counter() - start
    summary |= {"seconds": round(seconds, 3), "passages_per_s": round(summary["added"] / seconds, 2),
                "index_dir": index.index_dir, "peak_rss_mb": round(refrag.peak_rss_mb(), 1)}
    refrag.emit(summary, runtime, "{passages:,} passages ({computed:,} computed now; {skipped:,} records skipped, "
                "{replaced:,} with bytes replaced), {chunks:,} chunks, {replaced_documents:,} documents replaced, "
                "{deleted_documents:,} deleted in {seconds:.1f} s -> {index_dir}".format(**summary))
