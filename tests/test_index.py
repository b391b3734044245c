"""The writing of an index: what a corpus becomes, how an index follows its documents, and its files."""

import itertools
import json
import os
import shutil
import types

import numpy as np
import pyarrow as pa
import pytest
from conftest import LONG, RUNTIME, passages_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from writers import tree, unchanged

import refrag
from refrag_extras import index as writing

OPERATIONS = int(os.environ.get("REFRAG_OPERATIONS", "6"))  # at most, in a row; with more of them more examples, too
MANY = [{"id": f"p{i}", "title": f"River {i}" if i % 3 else "", "text": text} for i, text in enumerate([
    "The Rhone floods in May.", "长江 rises in Qinghai. " * 3, LONG, "Bronze bells ring.", "A note. " * 20,
    "Athens had games.", "Rice grows in the delta of the Ebro 🙂."])]
SHORT = [MANY[i] for i in (3, 5, 6, 0)]  # a passage each
WORDS = ["--retriever", "bm25"]


def same_index(a, b):
    """Two opened indexes hold the same in the same order, vectors but for their last bits: other batches made them."""
    names = [name for name in a.passages.column_names if name != "terms"]  # numbered as their vocabularies grew
    assert a.passages.select(names).equals(b.passages.select(names))
    assert [a.manifest[key] for key in ("counts", "faiss", "settings", "chunking")] == [
        b.manifest[key] for key in ("counts", "faiss", "settings", "chunking")]
    k, encoder = (a.manifest["chunking"][key] for key in ("k", "encoder"))
    for row in range(len(a)):
        tables = [index.chunk_table(row, k, encoder) for index in (a, b)]
        for name, x, y in zip(refrag.ChunkTable._fields, *tables, strict=True):
            if x is not None or y is not None:
                step = np.abs(x).max(axis=-1, keepdims=True) / 127 if name == "embeddings" else 1e-3
                assert x.shape == y.shape and (np.abs(x - y) <= 2e-3 * np.abs(x) + 1.1 * step).all()
    if a.vectors is not None:
        np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-5)
        for query in a.vectors[:3]:
            assert a.nearest(query[None], 100) == pytest.approx(b.nearest(query[None], 100), abs=1e-5)
    for question in ("river floods", "bronze bells", "note", "zebra", "river7 and word7"):
        if a.bm25 is not None:
            assert a.matching(question, 100) == pytest.approx(b.matching(question, 100), rel=1e-5)
    assert [a.idf(term) == b.idf(term) for term in ("river", "bronz", "zebra") if a.bm25 is not None]


VERSIONS = [{"title": row["title"], "text": row["text"]} for row in MANY]
VERSIONS += [VERSIONS[0] | {"year": 1990}, {"text": LONG + " The end."}, {"title": "Note", "text": LONG[:200]}]
documents = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(VERSIONS)), min_size=1, max_size=6,
                     unique_by=lambda pair: pair[0]).map(lambda pairs: [{"id": name} | more for name, more in pairs])


@given(retriever=st.sampled_from(["bm25", "bm25", "hybrid"]), first=documents,
       operations=st.lists(st.tuples(st.sampled_from(["add", "sync", "delete"]), documents), max_size=OPERATIONS))
@settings(max_examples=2 * OPERATIONS, phases=[Phase.explicit, Phase.generate])
def test_a_changed_index_is_one_built_from_what_is_left(change, tmp_path_factory, retriever, first, operations):
    """In that order; and no content that the index held is computed again."""
    folder, build = tmp_path_factory.mktemp("index") / "index", {"retriever": retriever, "size": 32}
    build |= {"k": 4} if retriever == "hybrid" else {}
    held, known = {}, set()
    for kind, rows in [("build", first), *operations]:
        names = tuple(row["id"] for row in rows if row["id"] in held)
        if kind == "delete" and not names:
            continue
        held = {} if kind in ("build", "sync") else {name: row for name, row in held.items() if name not in names}
        held |= {} if kind == "delete" else {row["id"]: row for row in rows}
        options = {"build": build, "delete": {"delete": names, "delete_all": not held}}.get(kind, {kind: True})
        counts, index = change(folder, None if kind == "delete" else rows, **options)
        passages = [index[row] for row in range(len(index))]
        assert list(dict.fromkeys(passage.document_id for passage in passages)) == list(held)
        assert counts["computed"] == len({passage.content for passage in passages} - known)
        known = {passage.content for passage in passages}
    if held:
        same_index(index, change(folder.parent / "fresh" / "index", list(held.values()), **build)[1])
    else:
        assert len(index) == 0 and (retriever != "bm25" or index.matching("river", 5) == {})


def test_a_document_that_got_shorter_leaves_nothing_behind(tmp_path, build):
    build("i", [{"id": "a", "text": LONG}, {"id": "b", "text": "A bell."}], "--max_passage_tokens", 32, "--overlap", 8)
    assert {"a#1", "a#9", "b"} < {p.id for p in passages_of(tmp_path / "i")}
    result = build("i", [{"id": "a", "text": "A river."}, {"id": "a#9", "text": "A river."}], "--add")
    assert {name: result.pop(name) for name in (*result,) if isinstance(result[name], int)} == {
        "passages": 3, "added": 2, "computed": 1, "chunks": 3, "replaced_documents": 1, "deleted_documents": 0,
        "skipped": 0, "replaced": 0, "ignored": 0, "dim": 24}
    assert result.keys() == {"seconds", "passages_per_s", "index_dir", "peak_rss_mb"}
    assert [(p.id, p.text) for p in passages_of(tmp_path / "i")] == [
        ("b", "A bell."), ("a", "A river."), ("a#9", "A river.")]


@pytest.mark.parametrize("rows", [[{"id": "a#2", "text": "A bell."}],  # a piece of the document a in the index
    [{"id": "c", "text": LONG}],  # one of its pieces is a document c#1 there
    [{"id": "b", "text": "A bell."}, {"id": "b", "text": LONG}], [{"id": "b", "text": LONG}, {"id": "b", "text": "A."}],
    [{"id": "b", "text": LONG}, {"id": "b#3", "text": "A."}], [{"id": "b#1", "text": "A."}, {"id": "b", "text": LONG}]])
def test_an_id_that_two_documents_would_have_is_refused_and_changes_nothing(tmp_path, write, build, refused, llama,
                                                                            rows):
    build("i", [{"id": "a", "text": LONG}, {"id": "c#1", "text": "A bell."}], *WORDS, "--max_passage_tokens", 64)
    with unchanged(tmp_path / "i"):
        message = refused(2, "index", "--corpus", write("more.jsonl", rows), "--index_dir", tmp_path / "i", "--add",
                          "--dec", llama, "--quiet")
    assert "more.jsonl:1" in message
    assert ("in the index and at" if len(rows) == 1 else "more.jsonl:2") in message


def test_an_index_is_never_emptied_by_mistake(tmp_path, write, build, done, refused, llama):
    """By a corpus that is missing or holds nothing, or by an id that is not there; unless --delete_all says so."""
    build("i", SHORT, *WORDS)
    (tmp_path / "none").mkdir()
    line = ["index", "--index_dir", tmp_path / "i", "--dec", llama, "--quiet"]
    empty = write("empty.txt", "\n")
    everything = ["--delete", *(row["id"] for row in SHORT)]
    with unchanged(tmp_path / "i"):
        for flags, message in (
                (["--sync"], "--corpus is missing"), (["--sync", "--corpus", tmp_path / "gone"], "no such file"),
                (["--sync", "--corpus", tmp_path / "none"], "the folder holds no"),
                (["--sync", "--corpus", empty], "delete all 4 passages of"), (everything, "add --delete_all to do so"),
                (["--delete", "p5", "p9", "p5#1"], "--delete p9 p5#1: the index has no such document"),
                (["--delete", "p5", "--corpus", empty], "--delete takes no --corpus")):
            assert message in refused(2, *line, *flags)
    for flags, message in ((["--delete", "p5"], "no index in this folder"), (["--corpus", empty], "no passages in it"),
                           (["--add", "--corpus", tmp_path / "rows.jsonl"], "no index in this folder"),
                           (["--corpus", tmp_path / "rows.jsonl", "--faiss", "ivfpq"], "needs 10,000 passages to")):
        assert message in refused(2, "index", "--index_dir", tmp_path / "new", "--dec", llama, *WORDS, *flags)
        assert not (tmp_path / "new").exists()
    assert done(*line, "--delete", "p5", "p0")["deleted_documents"] == 2
    assert done(*line, "--sync", "--corpus", empty, "--delete_all")["passages"] == 0
    assert done("search", "--index_dir", tmp_path / "i", "--question", "bells")["passages"] == []
    assert done(*line, "--add", "--corpus", tmp_path / "rows.jsonl")["computed"] == 4
    assert done(*line, *everything, "--delete_all")["passages"] == 0


@pytest.mark.parametrize("how", ["--sync", "--add"])
def test_what_has_not_changed_is_not_written_again(tmp_path, build, run, llama, how):
    """A document that is moved within the corpus is a change, though nothing is computed."""
    build("i", SHORT)

    def stamps():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "i").rglob("*") if path.name != ".lock"}

    before, line = stamps(), ["index", "--index_dir", tmp_path / "i", "--dec", llama, "--corpus"]
    code, out, err = run(*line, tmp_path / "rows.jsonl", how)
    assert (code, stamps()) == (0, before) and "4 passages (0 computed now" in out
    assert "nothing has changed" in err and "cut at 64 tokens, the most this embedder reads" in err
    assert build("i", SHORT[::-1], how)["computed"] == 0
    assert [p.document_id for p in passages_of(tmp_path / "i")] == ["p0", "p6", "p5", "p3"]


def test_progress_shows_each_batch(tmp_path, change, monkeypatch):
    """Not only each block of 256 passages, which a slow core is half a minute at."""
    steps = []
    monkeypatch.setattr(refrag.tqdm, "update", lambda bar, number: steps.append(number))
    change(tmp_path / "i", SHORT, batch_size=3)
    assert steps == [3, 1]


@pytest.mark.parametrize("how", ["--sync", "--add"])
def test_a_change_keeps_what_the_index_was_built_with(tmp_path, build, monkeypatch, other_embedder, how):
    """And reads no more of the decoder than the layers of the encoder."""
    build("i", MANY, "--faiss", "hnsw", "--retriever", "dense", "--k", 8, "--enc", "decoder:2", "--overlap", 4,
          "--max_passage_tokens", 24, "--embed_model", other_embedder)
    before = refrag.open_index(str(tmp_path / "i")).manifest
    monkeypatch.setattr(refrag, "load_decoder", None)
    assert build("i", [*MANY, {"id": "new", "text": "A river."}], "--enc", "decoder:2", how)["computed"] == 1
    after = refrag.open_index(str(tmp_path / "i")).manifest
    assert before["settings"] == {"faiss": "hnsw", "max_passage_tokens": 24, "overlap": 4}
    for key in ("settings", "retriever", "embedder", "chunking", "faiss"):
        assert after[key] == before[key]


def test_an_index_that_is_built_again_with_other_models_keeps_none_of_its_vectors(tmp_path, build, corpus,
                                                                                  other_embedder):
    build("i", corpus)
    counts = [build(name, corpus, "--embed_model", other_embedder)["computed"] for name in ("i", "fresh")]
    again, fresh = ((tmp_path / name / "vectors").read_bytes() for name in ("i/gen-2", "fresh/gen-1"))
    assert counts == [6, 6] and again == fresh


def test_changing_with_other_models_is_refused(write, refused, index_dir, embedder, llama):
    with unchanged(index_dir):
        for how, flags in itertools.product(("--add", "--sync"), (["--k", 8], ["--enc", "decoder:1"], WORDS)):
            refused(5, "index", "--corpus", write("more.jsonl", MANY[:1]), "--index_dir", index_dir, how,
                    "--embed_model", embedder, "--dec", llama, "--enc", "decoder:2", "--quiet", *flags)


def test_files_without_ids_are_followed(tmp_path, write, build):
    """Each again, from wherever, also as part of its folder, replaces its own; what is only touched is not computed."""
    for name in "ab":
        write(f"{name}/notes.txt", f"first of {name}\nsecond of {name}\n")
    build("i", tmp_path / "a/notes.txt")
    for replaced in (0, 2, 0):
        assert build("i", tmp_path / "a/../b/notes.txt", "--add")["replaced_documents"] == replaced
        write("b/notes.txt", "first of b, changed\nsecond of b, changed\n")
    write("b/d.md", "# A river")
    more = build("i", tmp_path / "b", "--corpus", tmp_path / "b", tmp_path / "a/notes.txt", "--add")
    assert [more[name] for name in ("replaced_documents", "computed")] == [0, 1]
    assert [p.id for p in passages_of(tmp_path / "i")][1:] == [
        "b/notes.txt:1", "b/notes.txt:2", "notes.txt:1", "notes.txt:2"]
    write("b/notes.txt", "changed")
    write("b/e.md", "new")
    os.utime(tmp_path / "b/d.md", (0, 0))
    less = build("i", tmp_path / "b", "--sync")
    counts = "passages", "computed", "replaced_documents", "deleted_documents"
    assert [less[name] for name in counts] == [3, 2, 0, 5]
    found = passages_of(tmp_path / "i")
    assert [(p.id, p.text) for p in found] == [("b/d.md", "# A river"), ("b/e.md", "new"), ("b/notes.txt", "changed")]
    assert json.loads(found[0].metadata) == {"path": "b/d.md", "modified": "1970-01-01T00:00:00", "heading": "A river"}
    write("b/e.md", "newer")
    os.utime(tmp_path / "b/d.md", (1, 1))
    again = build("i", tmp_path / "b", "--sync")
    assert [again[name] for name in counts] == [3, 1, 2, 0]


FIELDS = [{"id": str(i), "text": f"River {i} floods field {i * 7} of {i * i}."} for i in range(700)]


def check_nearest(index, recall):
    assert index.faiss.ntotal == len(index)
    shared = [len(index.nearest(query, 5).keys() & refrag.search_exactly(index.vectors, query, 5, None).keys())
              for query in index.vectors[::10, None]]
    assert sum(shared) >= recall * 5 * len(shared)


@pytest.mark.parametrize(("setting", "total", "kind"), [
    ("auto", 0, "flat"), ("auto", 999_999, "flat"), ("auto", 1_000_000, "ivfpq"), ("flat", 10**7, "flat"),
    ("hnsw", 3, "hnsw"), ("ivfpq", 10_000, "ivfpq"), ("ivfpq", 9_999, "flat")])
def test_faiss_kind(setting, total, kind):
    """To name ivfpq for fewer than train it is an error; an index that had more gets by without."""
    build = types.SimpleNamespace(settings={"faiss": setting}, options=refrag.BuildConfig(), embedder=True)
    assert writing.FolderBuild.kind(build, total) == kind
    build.options, build.settings = refrag.BuildConfig(faiss="ivfpq"), {"faiss": "ivfpq"}
    with pytest.raises(refrag.UserError, match="10,000"):
        writing.FolderBuild.kind(build, 9_999)


def test_a_graph_grows_in_a_copy(tmp_path, change):
    folder = tmp_path / "index"
    _, index = change(folder, FIELDS[:60], "dense", faiss="hnsw")
    for options, rows, total, trained in (({"add": True}, FIELDS[60:100], 100, 60), ({"add": True}, FIELDS[100:120],
                                          120, 120), ({"delete": ("5",)}, None, 119, 119)):
        kept = tmp_path / f"{total}.index"
        os.link(folder / index.manifest["generation"] / "faiss.index", kept)
        before = kept.read_bytes()
        _, index = change(folder, rows, **options)
        assert kept.read_bytes() == before and (len(index), index.manifest["trained"]) == (total, trained)
        check_nearest(index, 0.95)


def test_an_inverted_file_is_trained_again_if_twice_as_large(tmp_path, change, monkeypatch):
    monkeypatch.setattr(writing, "IVF_LEAST", 300)
    folder = tmp_path / "index"
    _, index = change(folder, FIELDS[:300], "dense", faiss="ivfpq")
    for rows, trained in ((FIELDS[300:500], 300), (FIELDS[500:], 700)):
        _, index = change(folder, rows, add=True)
        assert index.manifest["trained"] == trained
        check_nearest(index, 0.7)
    _, index = change(folder, FIELDS[:299], sync=True)
    assert (index.manifest["faiss"], index.manifest["settings"]["faiss"], index.faiss) == ("flat", "ivfpq", None)
    assert change(folder, FIELDS[299:], add=True)[1].manifest["trained"] == 700


@pytest.mark.parametrize(("overlap", "prompt"), [(0, ""), (8, ""), (0, "passage: ")])
def test_long_passages_are_split_and_nothing_is_lost(tmp_path, build, embedder, overlap, prompt):
    """The embedder reads 64 tokens: no more than those has a piece with its title, the special tokens and what some
    embedders want before every text."""
    folder = shutil.copytree(embedder, tmp_path / "model")
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": {"document": prompt}}))
    rows = [{"id": "long", "title": "A title", "text": LONG}, {"id": "short", "text": "Short."}]
    build("i", rows, "--overlap", overlap, "--max_passage_tokens", 64, "--embed_model", folder)
    *pieces, short = passages_of(tmp_path / "i")
    assert [p.id for p in pieces] == [f"long#{n}" for n in range(1, len(pieces) + 1)] and len(pieces) > 3
    assert {(p.document_id, p.title) for p in pieces} == {("long", "A title")}
    assert (short.id, short.document_id, short.names) == ("short", "short", {"short"})
    at = 0
    for piece in pieces:  # nothing but white space between or around them
        place = LONG.find(piece.text, max(0, at - len(piece.text)))
        assert place >= 0 and not LONG[at:place].strip(), (at, piece)
        at = place + len(piece.text)
    assert not LONG[at:].strip()
    model = refrag.load_embedder(str(folder), RUNTIME)
    assert model.prompt == prompt and max(len(model.tokenizer(prompt + p.content)["input_ids"]) for p in pieces) <= 64
    shared = [len(set(a.text.split()) & set(b.text.split())) for a, b in itertools.pairwise(pieces)]
    assert all(n == 0 for n in shared) if overlap == 0 else all(0 < n <= overlap for n in shared)


def test_columns_are_mapped_and_read_only(index_dir):
    before = pa.total_allocated_bytes()
    index = refrag.open_index(str(index_dir))
    assert pa.total_allocated_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        index.vectors[0] = 1
    assert all(np.load(p, allow_pickle=False).dtype != object for p in index_dir.rglob("*.npy"))


def test_a_reader_becomes_what_a_writer_made(tmp_path, change, capsys):
    """Unless that was made by other models, or is no longer there: then it stays what it was and says so."""
    folder = tmp_path / "index"
    _, index = change(folder, SHORT[1:], "bm25")
    assert index.matching("bells", 5, "id = p0") == {}
    change(folder, SHORT[:1], add=True)
    assert len(index) == 3 and index.matching("bells", 5) == {}
    index.refresh()
    assert len(index) == 4 and list(index.matching("bells", 5, "id = p3")) == [3] and index[3].id == "p3"
    capsys.readouterr()
    change(folder, SHORT[1:], "bm25", k=8)
    index.refresh()
    assert len(index) == 4 and index[3].text == SHORT[0]["text"] and "restart to use it" in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    index.refresh()
    assert len(index) == 4 and "the index stays as it was" in capsys.readouterr().err


def test_two_processes_build_the_index_of_one(tmp_path, write, forks, embedder, llama):
    """Each embeds every other block: one has a full block, the other one that is not."""
    build = ["index", "--corpus", write("c.jsonl", FIELDS[:300]), "--embed_model", embedder, "--dec", llama,
             "--enc", "decoder:2", "--k", 4, "--json", "--quiet", "--threads", 1]
    first, second = forks.run_two([*build, "--index_dir", tmp_path / "two"])
    assert (json.loads(first)["passages"], second) == (300, "")
    assert forks.run([*build, "--index_dir", tmp_path / "one"]) == 0, forks.err
    assert tree(tmp_path / "two" / "gen-1") == tree(tmp_path / "one" / "gen-1")
    assert not list((tmp_path / "two").glob(".computed-*"))
