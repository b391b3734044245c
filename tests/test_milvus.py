"""An index in Milvus: the same answers as a folder's, in Milvus Lite and over the network from its server."""

import dataclasses
import itertools
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import refrag

pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
pytest.importorskip("milvus_lite", reason="the extra `milvus` is not installed")

TERMS = ["river", "bronze", "c++", "valley's", "1896", "長", "notes", "delta", "engine", "a1", "0x1f", "ríos"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a Milvus Lite server in another process."""
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
    """Random records: lengths, words, and fields of every kind."""
    rng = random.Random(seed)
    fields = [lambda: rng.choice([1990, 1991.5, "1990", "1991.50", -3, "old", True]), lambda: rng.choice(["en", "de", "Ärger"]),
              lambda: rng.sample(["red", "green", 7, "7.0", 'q"\\'], rng.randint(1, 3)), lambda: None]
    return [{"id": f"{rng.choice('ab/')}{n}", "title": rng.choice(["", "Delta", "River notes"]),
             "text": " ".join(rng.choices(TERMS, k=rng.randint(1, 25))) + f" x{n}",
             **{name: rng.choice(fields)() for name in rng.sample(["year", "lang", "tags", "odd/name"], 2)}}
            for n in range(count)]


@pytest.fixture
def build(write, done, embedder, llama):
    """Index rows: build(index_dir, rows, *flags) -> what the command says."""

    def call(place, records, *flags):
        corpus = ["--corpus", write("rows.jsonl", records)] if records is not None else []
        return done("index", "--index_dir", place, *corpus, "--embed_model", embedder, "--dec", llama, *flags)

    return call


def scores(index, found):
    return {index[row].id: score for row, score in found.items()}


WHERES = ["year = 1990", "year != 1990", "year < 1991", "year >= 1990", "year = old", "year > a", "lang = en and year <= 2000",
          "lang != en or tags = red", "tags = 7", "tags != 7", "tags < green", "tags = 'q\"\\'", "id > a2", "id = a1",
          "title = Delta", "title != 'River notes'", "'odd/name' != x", "year = true", "lang >= z"]


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
    names = {name for row in range(len(folder)) for name in folder[row].names} | {"absent"}
    places = {index: index.rows_of(names) for index in (folder, milvus)}
    assert places[folder].keys() == places[milvus].keys() == names - {"absent"} and len(folder) == len(milvus)
    for name in names - {"absent"}:
        for row, other in zip(*(sorted(places[index][name], key=lambda row: index[row].id) for index in places), strict=True):
            assert dataclasses.replace(folder[row], row=0) == dataclasses.replace(milvus[other], row=0)
            tables = [index.chunk_table(r, 32, folder.manifest["chunking"]["encoder"]) for index, r in ((folder, row), (milvus, other))]
            for a, b in zip(*tables, strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_answers_are_those_of_a_folder(tmp_path, place, build):
    """Words, vectors, filters, ids, chunk columns; a question that repeats a term counts it as often."""
    folder, milvus = (opened(build, index_dir, rows(1), "--k", 16, "--enc", "decoder:2") for index_dir in (tmp_path / "f", place("same")))
    check_same(folder, milvus, ["rivers river c++ 1896", "長 valley's 0x1f nothing", ""], WHERES)
    for where in ("shelf = 3", "year > 0 or shelf = 3"):
        for index in (folder, milvus):
            with pytest.raises(refrag.UserError, match="--where: no passage has a field 'shelf'"):
                index.matching("river", 3, where)


def opened(build, place, *what):
    build(place, *what)
    return refrag.open_index(place)


LONG = [{"id": "long", "text": " ".join(f"{term}{n}" for n in range(30) for term in ("river", "delta"))}]  # two pieces


def test_changes_are_those_of_a_folder(tmp_path, place, build):
    """What each command counts, and what the index holds then; nothing is computed twice."""
    start, other = rows(2) + LONG, rows(3, 12)
    synced = start[:9] + [row | {"id": f"n{row['id']}"} for row in other]
    steps = [(start,), (start,), (other[:8], "--add"), ([start[3] | {"year": 5, "text": "new notes"}, {"id": "again", "text": start[9]["text"]}], "--add"),
             (None, "--delete", "long", start[4]["id"]), (synced, "--sync"), (synced, "--sync"),
             (start[:5],)]
    for number, step in enumerate(steps):
        a, b = build(tmp_path / "f", *step), build(place("changes"), *step)
        for key in a.keys() - {"seconds", "passages_per_s", "index_dir", "peak_rss_mb"}:
            assert a[key] == b[key], (number, key)
        digests = [*locals().get("digests", []), refrag.index_manifest(place("changes"))["digest"]]
        check_same(refrag.open_index(tmp_path / "f"), refrag.open_index(place("changes")), ["river c++ notes"], ["id > a2"], exact=number < 2)
    assert [a == b for a, b in itertools.pairwise(digests)] == [True, False, False, False, False, True, False]
