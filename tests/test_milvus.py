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
    number = itertools.count()

    def call(place, records, *flags):
        corpus = ["--corpus", write(f"rows{next(number)}.jsonl", records)] if records is not None else []
        return done("index", "--index_dir", place, *corpus, "--embed_model", embedder, "--dec", llama, *flags)

    return call


def scores(index, found):
    return {index[row].id: score for row, score in found.items()}


WHERES = ["year = 1990", "year != 1990", "year < 1991", "year >= 1990", "year = old", "year > a", "lang = en and year <= 2000",
          "lang != en or tags = red", "tags = 7", "tags != 7", "tags < green", 'tags = "q\"\\"', "id > a2", "id = a1",
          "title = Delta", "title != 'River notes'", "'odd/name' != x", "year = true", "lang >= z"]


def same_answers(folder, milvus, questions, wheres):
    """Both indexes hold the same passages and give the same scores. Returns how many were compared."""
    compared = 0
    query = np.random.default_rng(0).standard_normal((1, folder.manifest["dim"])).astype(np.float32)
    for question, where in itertools.product(questions, [None, *wheres]):
        try:
            expected = scores(folder, folder.matching(question, 100, where)), scores(folder, folder.nearest(query, 100, where))
        except refrag.UserError as error:
            with pytest.raises(refrag.UserError) as refused:
                milvus.matching(question, 100, where)
            assert str(refused.value) == str(error)
            continue
        assert scores(milvus, milvus.matching(question, 100, where)) == pytest.approx(expected[0], abs=1e-4), (question, where)
        assert scores(milvus, milvus.nearest(query, 100, where)) == pytest.approx(expected[1], abs=1e-4), where
        compared += sum(map(len, expected))
    for term in (*refrag.index_terms(" ".join(TERMS)), "nowhere"):
        assert milvus.idf(term) == pytest.approx(folder.idf(term)), term
    names = [name for row in range(len(folder)) for name in folder[row].names]
    rows, others = folder.rows_of([*names, "absent"]), milvus.rows_of([*names, "absent"])
    assert rows.keys() == others.keys()
    for name, places in rows.items():
        passages = [{p.id: dataclasses.replace(p, row=0) for p in map(index.__getitem__, found)}
                    for index, found in ((folder, places), (milvus, others[name]))]
        assert passages[0] == passages[1]
        chunks = [index.chunk_table(next(row for row in found if index[row].id == folder[places[0]].id), 16)
                  for index, found in ((folder, places), (milvus, others[name]))]
        for a, b in zip(*chunks, strict=True):
            np.testing.assert_array_equal(a, b)
    return compared


def test_the_answers_are_those_of_a_folder(tmp_path, place, build):
    """Words, vectors, filters, ids, chunk columns; a question that repeats a term counts it as often."""
    build(tmp_path / "folder", rows(1))
    build(place("same"), rows(1))
    folder, milvus = refrag.open_index(tmp_path / "folder"), refrag.open_index(place("same"))
    assert len(folder) == len(milvus)
    assert same_answers(folder, milvus, ["rivers river c++ 1896", "長 valley's 0x1f nothing", "x7", ""], WHERES) > 100
