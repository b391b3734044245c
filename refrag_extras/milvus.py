"""An index in Milvus: milvus+http://HOST:19530/NAME in a server or cluster, milvus+file:PATH in Milvus Lite.

A collection has a row for each passage: its fields, vector, chunk columns, words for the server's BM25 function, and
what --where compares. A row's number is a digest of its id, so that to write it again changes nothing. The environment
variable MILVUS_TOKEN is sent along.

Unlike an index folder: a build changes the collection batch by batch, so a search during it finds old passages and new
ones, and a killed build leaves a part of its work (run it again); two writers at once are not detected; equal scores
come in any order. Deleted passages count in BM25's statistics until the server compacts them. Milvus Lite keeps
statistics for each of its files, so after many changes build into a new folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import os
import re
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.numpy

import refrag
from refrag import PASSAGE_FIELDS, MismatchError, MissingError, Passage, batched, require
from refrag_extras import index

os.environ |= {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"} | os.environ  # before its import
try:
    import grpc
    from milvus_lite.server_manager import server_manager_instance as lite
    from pymilvus import DataType, Function, FunctionType, MilvusClient, MilvusException
except ImportError as missing:
    raise MissingError(f"an index in Milvus needs its client ({missing}): pip install 'refrag[milvus]'") from None
for name in ("pymilvus", "milvus_lite", "grpc"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log what they raise

ADDRESS = re.compile(r"milvus\+(?:(https?://[^/\s]+)/([A-Za-z_]\w*)|file:(.+))", re.ASCII)
PROPERTY, VERSION = "refrag", 2  # the manifest's name among the properties of a collection, and its format
LONGEST, MOST_FOUND = 65_535, 16_384  # bytes of a text field, rows of a search
NOW = {"consistency_level": "Strong"}  # what was written just now, too: a server takes some .2 s to be sure
PIECES = 8  # texts at most that hold chunk columns in base64: pymilvus looks at a field of text letter by letter
SCHEMA = pa.schema([*list(index.SCHEMA)[:-1], ("row", pa.int64()), ("version", pa.string()), ("words", pa.string()),
                    ("facts", pa.string())])
OLD = pa.schema([("row", pa.int64()), ("document", pa.string()), ("part", pa.int64()), ("version", pa.string()),
                 ("chunks", pa.int64())])


def spelled(terms: Iterable[str]) -> str:
    """Index terms as any analyzer finds them again. Example: ["c++", "river"] -> "0632b2b river" """
    return " ".join(term if term.isascii() and term.isalnum() and term[0] != "0" else f"0{term.encode().hex()}"
                    for term in terms)


def quoted(text: str) -> str:
    return '"' + text.translate(str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"})) + '"'


def one_of(field: str, texts: Iterable[str]) -> str:
    return f"{field} in [{', '.join(map(quoted, texts))}]"


def number_of(value: Any) -> float:
    """As `refrag.as_number`, for JSON: without infinities and -0.0."""
    number = refrag.as_number(value)
    return number if math.isnan(number) else max(-1e300, min(1e300, number)) + 0.0


def comparable(fields: dict[str, Any]) -> dict[str, Any]:
    """Of each field the texts of its elements and their ends, the same of its numbers, whether one is no number."""
    found = {}
    for name in fields:
        values = refrag.field_values(fields, name)
        numbers = [number for number in map(number_of, values) if not math.isnan(number)]
        for kind, own in (("text", list(map(refrag.as_text, values))), ("number", numbers)):
            if own:
                found |= {f"{name} {kind}": list(map(str, own)), f"{name} {kind} low": min(own),
                          f"{name} {kind} high": max(own)}
        found |= {f"{name} other": True} if len(numbers) < len(values) else {}
    return found


def comparison(sign: str, name: str, value: str) -> str:
    """What the server evaluates for a comparison of `refrag.Filter`: one element of the field passes. (It takes a
    missing field for unequal to everything, but for neither less nor more.)"""
    number = number_of(value)
    kind, literal = ("text", quoted(value)) if math.isnan(number) else ("number", repr(number))
    elements, low, high, other = (f"facts[{quoted(f'{name} {key}')}]"
                                  for key in (kind, f"{kind} low", f"{kind} high", "other"))
    if sign in ("=", "=="):
        return f"json_contains({elements}, {literal if kind == 'text' else quoted(literal)})"
    if sign == "!=":
        return f"({low} < {literal} or {high} > {literal}{f' or {other} == true' * (kind == 'number')})"
    return f"{low if sign[0] == '<' else high} {sign} {literal}"


class Store:
    """A collection; what goes wrong there is told in one line."""

    def __init__(self, path: str | Path, create: bool = False):
        """create: a folder for Milvus Lite. Raises UserError, MissingError, LockedError."""
        self.path, match = str(path), ADDRESS.fullmatch(str(path))
        require(match is not None, f"--index_dir {path}: in Milvus it is milvus+http://HOST:19530/NAME or "
                "milvus+file:PATH, NAME of letters, digits and _")
        address, self.name, self.folder = match[1], match[2] or "refrag", match[3]
        if self.folder:
            require(not Path(self.folder).is_file(), f"--index_dir {path} is a file: name a folder")
            require(create or Path(self.folder).is_dir(), f"--index_dir {path}: no such folder")
            address = lite.start_and_get_uri(self.folder)
            if address is None:
                raise refrag.LockedError(f"{path} cannot be opened: another process uses it, or it is damaged")
        with self.errors():
            self.client = MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""), timeout=10)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except (MilvusException, grpc.RpcError) as error:
            fault = " ".join(str(getattr(error, "message", error)).split())[:300]
            raise MissingError(f"{self.path}: {fault}: check the address and the server") from error

    def ask(self, method: str, timeout: float = 60, **arguments: Any) -> Any:
        """What a method of the client gives for the collection. Raises MissingError."""
        with self.errors():
            return getattr(self.client, method)(collection_name=self.name, timeout=timeout, **arguments)

    def rows(self, fields: Iterable[str], **which: Any) -> list[dict[str, Any]]:
        return self.ask("query", output_fields=list(fields), **which)

    def count(self, where: str = "", **options: Any) -> int:
        return self.rows(["count(*)"], filter=where, **options)[0]["count(*)"]

    def scan(self, *filters: str) -> pa.Table:
        """The columns OLD of all rows that pass one of the filters."""
        batches = []
        for where in filters:
            pages = self.ask("query_iterator", output_fields=OLD.names, filter=where, batch_size=4096, **NOW)
            with self.errors():
                while page := pages.next():
                    batches.append(pa.RecordBatch.from_pylist(page, OLD))
        return pa.Table.from_batches(batches, OLD)

    def manifest(self) -> dict[str, Any] | None:
        """None if there is no collection. Raises MismatchError if it is no index."""
        if not self.ask("has_collection"):
            return None
        text = self.ask("describe_collection")["properties"].get(PROPERTY)
        if text is None:
            raise MismatchError(f"{self.path} is a collection that `index` did not make: use another name")
        return json.loads(text)

    def keep(self, manifest: dict[str, Any]) -> None:
        self.ask("alter_collection_properties", properties={PROPERTY: json.dumps(manifest)})


def exists(path: str) -> bool:
    """Whether a build finds an index there. Raises RefragError."""
    return Store(path, create=True).manifest() is not None


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Raises RefragError."""
    manifest = Store(path).manifest()
    require(manifest is not None, f"--index_dir {path}: no such index: build it with `{refrag.PROGRAM} index`")
    if (manifest["version"], manifest["words"]) != (VERSION, refrag.WORDS_FINGERPRINT):
        raise MismatchError(f"{path} was built by another version of this program: build it again")
    return manifest


class MilvusIndex(refrag.Index):
    """What `refrag.Index` offers, by requests."""

    def __init__(self, path: str | Path, manifest: dict[str, Any]):
        self.path, self.manifest, self.store, self.refused = path, manifest, Store(path), None
        self.store.ask("load_collection", timeout=600)  # into the server's memory; at once if it is there
        self.size = self.store.count()
        self.known: dict[int, Passage] = {}  # that the last searches found
        self.frequencies: dict[str, int] = {}  # of terms
        self.fields: set[str] = set()  # that some passage has
        if manifest["unfinished"]:
            refrag.notice(f"a build of {path} ended early: run it again")

    def __len__(self) -> int:
        return self.size

    def remember(self, hits: list[dict[str, Any]]) -> list[Passage]:
        found = [Passage(hit["row"], *(hit[name] for name in PASSAGE_FIELDS)) for hit in hits]
        self.known = (self.known if len(self.known) < MOST_FOUND else {}) | {passage.row: passage for passage in found}
        return found

    def __getitem__(self, row: int) -> Passage:
        if row not in self.known and not self.remember(self.store.rows(PASSAGE_FIELDS, ids=[row])):
            raise MismatchError(f"{self.path} has changed meanwhile: ask again")
        return self.known[row]

    def rows_with(self, documents: Collection[str]) -> list[int]:
        return [passage.row for some in batched(sorted(documents), 256)
                for passage in self.remember(self.store.rows(PASSAGE_FIELDS, filter=one_of("document", some)))]

    def expression(self, where: str | None) -> str:
        """What the server evaluates for a filter. Raises UserError."""
        alternatives = refrag.parse_where(where) if where else []
        for name in {name for conditions in alternatives for _, name, _ in conditions} - self.fields:
            has = f"facts[{quoted(f'{name} text low')}] >= \"\""
            require(bool(self.store.rows(["row"], filter=has, limit=1)), f"--where: no passage has a field {name!r}")
            self.fields.add(name)
        return " or ".join(f"({' and '.join(comparison(*each) for each in conditions)})" for conditions in alternatives)

    def find(self, field: str, query: Any, topk: int, where: str | None) -> list[tuple[int, float]]:
        allowed, topk = self.expression(where), min(topk, MOST_FOUND)
        hits = self.store.ask("search", data=query, anns_field=field, limit=topk, filter=allowed,
                              output_fields=list(PASSAGE_FIELDS))[0] if len(query[0]) else []  # no words
        self.remember([{"row": hit.id, **hit["entity"]} for hit in hits])
        return [(hit.id, hit["distance"]) for hit in hits]

    def nearest(self, query: np.ndarray, topk: int, where: str | None = None) -> dict[int, float]:
        return refrag.ranked(self.find("vector", query, topk, where), topk)

    def matching(self, question: str, topk: int, where: str | None = None,
                 others: Collection[int] = ()) -> dict[int, float]:
        """As of a folder, but for `others` that tie with the last."""
        found = self.find("bm25", [spelled(refrag.index_terms(question))], topk, where)
        factor = index.BM25["k1"] + 1  # which Lucene leaves out; Milvus Lite gives negative scores
        return refrag.ranked(((row, abs(score) / factor) for row, score in found), topk)

    def idf(self, term: str) -> float:
        if term not in self.frequencies:
            word = spelled([term])
            has = f"text_match(words, '{word}')"
            if self.store.folder:
                has = f"words like '% {word} %'"  # 20 times as fast in Milvus Lite
            self.frequencies[term] = self.store.count(has)
        return math.log(1 + len(self) / (0.5 + self.frequencies[term]))

    def stored(self, row: int) -> dict[str, np.ndarray] | None:
        """None if a writer has replaced the passage since it was found."""
        found = self.store.rows(["key", "columns"], ids=[row])
        if not found or found[0]["key"] != index.content_key(self[row].content).hex():
            return None
        return safetensors.numpy.load(base64.b64decode("".join(found[0]["columns"])))


class MilvusBuild(index.Build):
    """Makes a collection hold what the corpus says: writes what is new in it, then deletes what is not."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.store, kind = Store(self.path, create=True), self.settings["faiss"]
        require(os.environ.get("WORLD_SIZE", "1") == "1", "one process builds an index in Milvus: use no launcher")
        require(kind in ("auto", "flat"), f"--faiss {kind}: in Milvus it is auto or flat")

    def facts(self) -> dict[str, Any]:
        kind = "FLAT" if self.settings["faiss"] == "flat" or self.store.folder else "AUTOINDEX"
        return super().facts() | {"version": VERSION, "faiss": kind}

    def derive(self, passage: tuple, content: str) -> tuple[int, str, str, str]:
        """row, version, words and facts of a passage (document, part, title, text, metadata). Raises UserError."""
        document, part, title, _, metadata = passage
        row = int.from_bytes(index.content_key(json.dumps([document, part]))[:8]) >> 1
        fields = comparable(json.loads(metadata or "{}") | {"id": document, "title": title})
        words = f" {spelled(refrag.index_terms(content))} " if "bm25" in refrag.RETRIEVERS[self.retriever] else ""
        derived = index.content_key(json.dumps(passage)).hex(), words, json.dumps(fields)
        size = max(len(str(value).encode()) for value in (*passage, *derived))
        require(size <= LONGEST, f"{self.places[document]}: {size:,} bytes in a field, Milvus keeps {LONGEST:,}: use a "
                "smaller --max_passage_tokens or less metadata")
        return row, *derived

    def run(self, corpus: refrag.CorpusConfig) -> dict[str, Any]:
        """Returns counts. Raises RefragError."""
        before, facts = self.previous.manifest if self.previous else {"digest": "", "unfinished": False}, self.facts()
        known = all(before.get(name) == facts[name] for name in ("version", "uses", "embedder", "chunking", "faiss"))
        if self.previous and self.options.changes and not known:
            raise MismatchError(f"--faiss {self.settings['faiss']} is not what {self.path} has: build it again")
        with tempfile.TemporaryDirectory() as folder:
            new = self.read_columns(Path(folder) / "read.arrow", corpus, SCHEMA, self.derive)
            adds = self.options.add or bool(self.options.delete)
            some = adds and not before["unfinished"]  # of the index's rows are concerned
            old = self.store.scan(*self.concerned() if some else [""]) if known else OLD.empty_table()
            kept = self.rows_kept(old, new) if adds else np.zeros(0, np.int64)
            current = pa.chunked_array([*old["document"].take(kept).chunks, *new["document"].chunks], pa.string())
            if not (len(current) or self.options.delete_all or (some and len(self.previous) > len(old))):
                self.refuse_empty(corpus)
            self.counts |= self.compare_documents(old, new, current, ["version"]) | {"computed": 0}
            stays = pc.is_in(old["version"], value_set=new["version"]).to_numpy(False)
            stays[kept] = True
            fresh = np.flatnonzero(~pc.is_in(new["version"], value_set=old["version"]).to_numpy(False))
            gone = old.filter(~stays)
            if known and not (len(fresh) or len(gone) or before["unfinished"]) and before | facts == before:
                refrag.notice("nothing has changed")
                return {**before["counts"], **self.counts, "dim": facts["dim"]}
            chunks = before["counts"]["chunks"] if some else sum(old["chunks"].to_pylist())
            self.begin(before | facts | {"unfinished": True}, known)
            chunks += self.write(new, fresh, known) - sum(gone["chunks"].to_pylist())
            leftover = gone["row"].filter(pc.invert(pc.is_in(gone["row"], value_set=new["row"]))).to_pylist()
            for rows in batched(leftover, 1024):
                self.store.ask("delete", ids=rows)
        self.store.ask("flush", timeout=600)
        counts = {"passages": self.store.count(**NOW), "chunks": chunks}
        self.store.keep(facts | {"unfinished": False, "counts": counts, "digest": uuid.uuid4().hex})
        return {**counts, **self.counts, "dim": facts["dim"]}

    def concerned(self) -> list[str]:
        """Filters for the rows of the index whose documents are read again or deleted, or have such a name."""
        names = {part for name in self.places for part in (name, name.rpartition("#")[0])} | set(self.options.delete)
        return [one_of("document", some) for some in batched(sorted(names), 256)]

    def begin(self, manifest: dict[str, Any], known: bool) -> None:
        """Mark the collection as unfinished, or create it. Raises MissingError."""
        if known:
            return self.store.keep(manifest)
        schema, indexes, uses = MilvusClient.create_schema(), MilvusClient.prepare_index_params(), manifest["uses"]
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("part", DataType.INT64)
        schema.add_field("chunks", DataType.INT64)
        schema.add_field("facts", DataType.JSON, mmap_enabled=True)
        for name in ("document", "title", "text", "metadata", "key", "version"):
            schema.add_field(name, DataType.VARCHAR, max_length=LONGEST, mmap_enabled=True)
        schema.add_field("columns", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=PIECES,
                         max_length=LONGEST, mmap_enabled=True)
        schema.add_field("words", DataType.VARCHAR, max_length=LONGEST, mmap_enabled=True, enable_analyzer=True,
                         enable_match=True, analyzer_params={"tokenizer": "standard"})
        is_old = "v2.3." in self.store.client.get_server_version()  # it has no inverted index of texts
        for name in ("document", "key"):
            indexes.add_index(name, index_type="" if is_old else "INVERTED")
        if "dense" in uses:
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=manifest["dim"])
            indexes.add_index("vector", index_type=manifest["faiss"], metric_type="IP")
        if "bm25" in uses:
            schema.add_field("bm25", DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(Function("bm25", FunctionType.BM25, ["words"], ["bm25"]))
            indexes.add_index("bm25", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params={
                "bm25_k1": index.BM25["k1"], "bm25_b": index.BM25["b"]})
        self.store.ask("drop_collection")
        try:
            self.store.ask("create_collection", timeout=600, schema=schema, index_params=indexes,
                           properties={PROPERTY: json.dumps(manifest)})
        except MissingError as error:
            self.store.ask("drop_collection")
            lacks = " (BM25 is a function of Milvus from 2.5 on: else --retriever dense)" if "bm25" in uses else ""
            raise MissingError(f"{error}{lacks}") from error

    def write(self, new: pa.Table, fresh: np.ndarray, known: bool) -> int:
        """Write new passages, those of equal content together, and compute what the collection does not hold. Returns
        how many chunks."""
        chunks, order = 0, fresh[pc.sort_indices(new["key"].take(fresh)).to_numpy()]
        with refrag.progress(None, "computing", len(fresh), "passage") as bar:
            for table in index.gather([new], order):
                rows = [row | {"key": row["key"].hex(), "facts": json.loads(row["facts"])} for row in table.to_pylist()]
                contents = {row["key"]: refrag.passage_content(row["title"], row["text"]) for row in rows}
                columns = self.computed_before(contents) if known else {}
                columns |= self.computed_now({key: text for key, text in contents.items() if key not in columns})
                for some in batched([columns[row["key"]] | row for row in rows], 64):
                    self.store.ask("upsert", data=some)
                chunks += sum(columns[row["key"]]["chunks"] for row in rows)
                bar.update(len(rows))
        return chunks

    def computed_before(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        fields = ["key", "chunks", "columns", *["vector"] * bool(self.embedder)]
        return {hit["key"]: hit for hit in self.store.rows(fields, filter=one_of("key", keys), **NOW)}

    def computed_now(self, contents: dict[str, str]) -> dict[str, dict[str, Any]]:
        table, found = self.compute(list(contents.values())) if contents else None, {}
        for number, key in enumerate(contents):
            arrays = {name: table[name][number].values.to_numpy() for name in table.column_names if name != "key"}
            vector = {"vector": arrays.pop("vector")} if self.embedder else {}
            data = base64.b64encode(safetensors.numpy.save(arrays)).decode()
            require(len(data) <= LONGEST * PIECES, f"{len(data):,} bytes of chunks in a passage: larger --k")
            pieces = [data[start : start + LONGEST] for start in range(0, len(data), LONGEST)]
            found[key] = {"chunks": len(arrays["ends"]), "columns": pieces} | vector
        self.counts["computed"] += len(contents)
        return found
