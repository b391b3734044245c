"""An index in Milvus: the same answers as a folder's, in Milvus Lite and over the network from its server."""

import dataclasses
import itertools
import json
import random
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import refrag

pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
pytest.importorskip("milvus_lite", reason="the extra `milvus` is not installed")

TERMS = ["river", "bronze", "c++", "valley's", "1896", "長", "notes", "delta", "engine", "a1", "0x1f", "ríos"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from milvus_lite.cmdline import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "server", "--data-dir", str(tmp_path_factory.mktemp("server")),
               "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"milvus+http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture(scope="module", params=["lite", "server"])
def place(request, tmp_path_factory):
    """Name an index of Milvus Lite, or of the server: place("name") -> its --index_dir."""
    if request.param == "lite":
        return lambda name: f"milvus+file:{tmp_path_factory.getbasetemp() / 'lite' / name}"
    address = request.getfixturevalue("server")
    return lambda name: f"{address}/{name}"


def rows(seed, count=30):
    rng = random.Random(seed)
    kinds = [lambda: rng.choice([1990, 1991.5, "1990", "1991.50", -3, "old", True]),
             lambda: rng.choice(["en", "de", "Ärger"]), lambda: None,
             lambda: rng.sample(["red", "green", 7, "7.0", 'q"\\'], rng.randint(1, 3))]
    return [{"id": f"{rng.choice('ab/')}{n}", "title": rng.choice(["", "Delta", "River notes"]),
             "text": " ".join(rng.choices(TERMS, k=rng.randint(1, 25))) + f" x{n}", "page": n, "last_page": n + 1,
             **{name: rng.choice(kinds)() for name in rng.sample(["year", "lang", "tags", "odd/name"], 2)}}
            for n in range(count)]


def scores(index, found):
    return {index[row].id: score for row, score in found.items()}


WHERES = ["year = 1990", "year != 1990", "year < 1991", "year >= 1990", "year = old", "year > a", "year = true",
          "lang = en and year <= 2000", "lang != en or tags = red", "lang >= z", "tags = 7", "tags != 7",
          "tags < green", "tags = 'q\"\\'", "id > a2", "id = a1", "title = Delta", "title != 'River notes'",
          "'odd/name' != x", "page = 5", "page <= 7 and page > 2"]


def check_same(folder, milvus, questions, wheres=(), exact=True):
    """Both indexes hold the same passages and give the same scores, of words only if `exact`."""
    query = np.random.default_rng(0).standard_normal((1, folder.manifest["dim"])).astype(np.float32)
    for question, where in itertools.product(questions, [None, *wheres]):
        words, others = (scores(index, index.matching(question, 100, where)) for index in (folder, milvus))
        assert others.keys() == words.keys() and (not exact or others == pytest.approx(words, abs=1e-4)), where
        nearest, others = (scores(index, index.nearest(query, 100, where)) for index in (folder, milvus))
        assert others == pytest.approx(nearest, abs=1e-4), where
    for term in (*refrag.index_terms(" ".join(TERMS)), "nowhere"):
        assert milvus.idf(term) == pytest.approx(folder.idf(term)), term
    names = {name for row in range(len(folder)) for name in folder[row].names}
    rows, others = (index.rows_of(names | {"absent"}) for index in (folder, milvus))
    assert rows.keys() == others.keys() == names and len(folder) == len(milvus)
    encoder = folder.manifest["chunking"]["encoder"]
    for name in names:
        same = {milvus[row].id: row for row in others[name]}
        assert same.keys() == {folder[row].id for row in rows[name]}
        for row in rows[name]:
            other = same[folder[row].id]
            assert dataclasses.replace(folder[row], row=other) == milvus[other]
            for a, b in zip(folder.chunk_table(row, 32, encoder), milvus.chunk_table(other, 32, encoder), strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_answers_are_those_of_a_folder(tmp_path, place, build):
    """Words, vectors, filters, ids, chunk columns; a question that repeats a term counts it as often."""
    places = [tmp_path / "folder", place("same")]
    for index_dir in places:
        build(index_dir, rows(1), "--k", 16, "--enc", "decoder:2")
    folder, milvus = map(refrag.open_index, places)
    check_same(folder, milvus, ["rivers river c++ 1896", "長 valley's 0x1f nothing", ""], WHERES)
    for index, where in itertools.product((folder, milvus), ("shelf = 3", "year > 0 or shelf = 3")):
        with pytest.raises(refrag.UserError, match="--where: no passage has a field 'shelf'"):
            index.matching("river", 3, where)


def test_changes_are_those_of_a_folder(tmp_path, place, build):
    """What each command counts, and what the index holds then; nothing is computed twice."""
    long = [{"id": "long", "text": " ".join(f"{term}{n}" for n in range(30) for term in ("river", "delta"))}]
    start, other = rows(2) + long, rows(3, 12)
    changed = [start[3] | {"text": "new notes"}, {"id": "again", "text": start[9]["text"]}]
    synced = start[:9] + [row | {"id": f"n{row['id']}"} for row in other]
    steps = [(start,), (start,), (other[:8], "--add"), (changed, "--add"), (None, "--delete", "long", start[4]["id"]),
             (synced, "--sync"), (synced, "--sync"), (start[:5],)]
    digests = []
    for number, step in enumerate(steps):
        counts, found = build(tmp_path / "folder", *step), build(place("changes"), *step)
        for key in counts.keys() - {"seconds", "passages_per_s", "index_dir", "peak_rss_mb"}:
            assert counts[key] == found[key], (number, key)
        indexes = refrag.open_index(tmp_path / "folder"), refrag.open_index(place("changes"))
        check_same(*indexes, ["river c++ notes"], ["id > a2"], exact=number < 2)
        digests.append(indexes[1].manifest["digest"])
    assert [a == b for a, b in itertools.pairwise(digests)] == [number in (0, 5) for number in range(7)]


def test_a_build_that_ended_early_goes_on_and_a_change_is_read(place, build, run, embedder, llama, write):
    """A reader is told; the same command writes what is missing and computes nothing else."""
    where, corpus = place("killed"), write("rows.jsonl", rows(4))
    build(where, rows(4))
    index = refrag.open_index(where)
    lost = index.rows_of(["a0", "b0", "/0", "a1", "b1", "/1"])
    index.store.ask("delete", ids=[row for found in lost.values() for row in found])
    index.store.keep(index.manifest | {"unfinished": True})
    code, out, err = run("search", "--index_dir", where, "--question", "river", "--embed_model", embedder)
    assert code == 0 and err == f"a build of {where} ended early: run it again\n"
    code, out, err = run("index", "--index_dir", where, "--corpus", corpus, "--embed_model", embedder, "--dec", llama,
                         "--json")
    counts = json.loads(out)
    assert (code, counts["computed"], counts["passages"], counts["chunks"]) == (
        0, len(lost), len(index), index.manifest["counts"]["chunks"])
    index = refrag.open_index(where)
    assert "ended early" in err and index.rows_of(lost) == lost and not index.manifest["unfinished"]
    row = next(iter(index.matching("river", 1)))
    changed = index[row]
    build(where, [{"id": changed.document_id, "text": "nothing but copper and tin"}], "--add")
    assert index.chunk_table(row, 16) is None, "the chunks of another text are not used"
    index.refresh()
    assert index[row].text == "nothing but copper and tin" and len(index.chunk_table(row, 16).ends) > 0


def test_answers_and_reports_use_it(tmp_path, place, build, done, embedder, llama):
    """The whole way: the same answer, chunks and scores as from a folder; `doctor` looks at it."""
    results = []
    for index_dir in (tmp_path / "folder", place("whole")):
        counts = build(index_dir, rows(5))
        result = done("generate", "--index_dir", index_dir, "--question", "Which river has bronze notes?", "--where",
                      "id > a", "--dec", llama, "--embed_model", embedder, "--enc", "decoder:2", "--load_dir", "none",
                      "--gate", "blend", "--max_new", 8, "--floor", 0)
        results.append([result["answer"], [p["id"] for p in result["passages"]], result["metrics"]["positions"]])
        assert done("doctor", "--index_dir", index_dir)["index"]["counts"] == {
            name: counts[name] for name in ("passages", "chunks")}
    assert results[0] == results[1]


def test_refusals(tmp_path, server, build, refused, write, embedder, llama):
    """Each with its exit code, in one line; nothing is changed."""
    corpus = write("rows.jsonl", rows(7))
    index = ["index", "--corpus", corpus, "--quiet", "--embed_model", embedder, "--dec", llama, "--index_dir"]
    assert "127.0.0.1:9/x: Fail connecting" in refused(3, *index, "milvus+http://127.0.0.1:9/x")
    for name in ("milvus+ftp://host/x", f"{server}/no-name", server, "milvus+file:"):
        assert "milvus+http://HOST:19530/NAME" in refused(2, *index, name)
    assert "is a file" in refused(2, *index, f"milvus+file:{corpus}")
    for absent in (f"{server}/absent", f"milvus+file:{tmp_path / 'absent'}"):
        assert "no such" in refused(2, "search", "--question", "x", "--index_dir", absent)
    assert not (tmp_path / "absent").exists()
    where = f"{server}/refusals"
    build(where, rows(7))
    before = refrag.open_index(where)
    assert "in Milvus it is auto or flat" in refused(2, *index, where, "--faiss", "hnsw")
    assert "nope: the index has no such document" in refused(2, "index", "--delete", "nope", *index[3:], where)
    empty = write("empty.jsonl", "")
    assert "add --delete_all" in refused(2, "index", "--sync", "--corpus", empty, *index[3:], where)
    piece = write("piece.jsonl", [{"id": "p", "text": "river " * 200}, {"id": "p#1", "text": "river"}])
    assert "duplicate id 'p#1'" in refused(2, "index", "--add", "--corpus", piece, *index[3:], where)
    large = write("large.jsonl", [{"id": "large", "text": "river", "notes": "x" * 70_000}])
    assert "large.jsonl:1" in refused(2, "index", "--add", "--corpus", large, *index[3:], where)
    after = refrag.open_index(where)
    assert (after.manifest, len(after)) == (before.manifest, len(before))
    after.store.keep(after.manifest | {"words": "others"})
    assert "another version" in refused(5, "search", "--question", "x", "--index_dir", where)
    client = after.store.client
    client.create_collection("foreign", dimension=4)
    for command in (["search", "--question", "x", "--index_dir"], index):
        assert "did not make" in refused(5, *command, f"{server}/foreign")
    assert client.has_collection("foreign")
