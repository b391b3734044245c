"""Retrieval: FAISS, BM25, fusion, the index on disk with its chunk tables, and the commands index and search."""

import itertools
import json
import math
import re
import shutil
import types
import unicodedata
from collections import Counter

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import tree, unchanged

import refrag
from refrag_extras import bench

few = settings(max_examples=40)
RUNTIME = refrag.RuntimeConfig(device="cpu", dtype="float32")
STATES = ["--enc", "decoder:2", "--dtype", "float32"]


@pytest.fixture
def build(tmp_path, write, done, embedder, llama):
    """Index rows or the file of a corpus: build("name", rows, *flags) -> what the command says."""

    def call(name, corpus, *flags):
        corpus = write("rows.jsonl", corpus) if isinstance(corpus, list) else corpus
        return done("index", "--corpus", corpus, "--index_dir", tmp_path / name, "--embed_model", embedder,
                    "--dec", llama, *flags)

    return call


@pytest.fixture
def bm25_index(tmp_path, build):
    """Build an index for BM25 only: bm25_index([{"id", "text"}, ..], *flags) -> its folder."""
    return lambda rows, *flags: build("index", rows, "--retriever", "bm25", *flags) and tmp_path / "index"


@pytest.fixture
def ask(done):
    """Search by the command line: ask(index, question, *flags) -> the JSON object."""
    return lambda index, question, *flags: done("search", "--index_dir", index, "--question", question, *flags)


def ids_of(result):
    """The passages' ids, best first."""
    return [p["id"] for p in result["passages"]]


# -- FAISS ------------------------------------------------------------------------


def unit_vectors(n, dim, seed=0):
    """(n, dim) random directions."""
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind, vectors):
    """A FAISS index of one kind that holds the vectors."""
    index = refrag.new_faiss(kind, vectors)
    index.add(vectors)
    return index


def test_flat_is_a_matrix_product():
    vectors = np.random.default_rng(1).standard_normal((300, 24)).astype(np.float32)  # inner product, not cosine
    index = filled("flat", vectors)
    for query in unit_vectors(5, 24, seed=2):
        found, products = refrag.search_faiss([index], query[None], 10), vectors @ query
        assert list(found) == np.argsort(-products)[:10].tolist()
        np.testing.assert_allclose(list(found.values()), products[list(found)], rtol=1e-5)


def test_hnsw_finds_nearly_what_flat_finds():
    vectors, queries = unit_vectors(2000, 32), unit_vectors(50, 32, seed=1)
    index = filled("hnsw", vectors)
    refrag.tune_faiss(index)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = [refrag.search_faiss([index], q[None], 10) for q in queries]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact.tolist(), strict=True)])
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert recall > 0.95


@pytest.mark.parametrize("dim", [16, 7])
def test_ivfpq_gives_rows_that_exist(tmp_path, dim):
    """Product quantisation needs a divisor of the dimension. With one list probed, FAISS pads with -1."""
    vectors = unit_vectors(10_000, dim)
    faiss.write_index(filled("ivfpq", vectors), str(tmp_path / "index"))
    index = faiss.read_index(str(tmp_path / "index"))
    refrag.tune_faiss(index)
    assert (index.k_factor, faiss.downcast_index(index.base_index).nprobe) == (16, 64)
    np.testing.assert_allclose(index.reconstruct_n(3, 9_000), vectors[3:9_003], atol=1e-2)  # for documents replaced
    for probes in (1, 32):
        faiss.downcast_index(index.base_index).nprobe = probes
        for row in range(0, 1000, 100):
            rows = list(refrag.search_faiss([index], vectors[row][None], 200))
            assert len(set(rows)) == len(rows) and all(0 <= r < 10_000 for r in rows)
            assert rows[0] == row, "the rough results are compared again in finer steps"


@pytest.mark.parametrize(("requested", "total", "kind"), [
    ("auto", 1, "flat"), ("auto", 49_999, "flat"), ("auto", 50_000, "hnsw"), ("auto", 999_999, "hnsw"),
    ("auto", 1_000_000, "ivfpq"), ("flat", 10**7, "flat"), ("hnsw", 3, "hnsw"), ("ivfpq", 10_000, "ivfpq")])
def test_faiss_kind(requested, total, kind):
    assert refrag.faiss_kind(requested, total) == kind
    with pytest.raises(refrag.UserError, match="10,000"):
        refrag.faiss_kind("ivfpq", 9_999)


def test_faiss_returns_no_more_rows_than_there_are():
    for kind in ("flat", "hnsw"):
        index = filled(kind, unit_vectors(3, 8))
        assert sorted(refrag.search_faiss([index], unit_vectors(1, 8, seed=9), 50)) == [0, 1, 2]


def test_an_opened_index_searches_widely(tmp_path, build, corpus):
    build("i", corpus, "--faiss", "hnsw", "--retriever", "dense")
    assert refrag.open_index(str(tmp_path / "i")).faiss[0].hnsw.efSearch == 128


# -- fusion -------------------------------------------------------------------------


def test_rrf_golden():
    """Row 3 is second and first: 1/62 + 1/61. Row 7 is first once: 1/61. Row 5 is third: 1/63."""
    fused = refrag.rrf([{7: 0.9, 3: 0.8, 5: 0.1}, {3: 2.5}])
    assert [row for row, _ in fused] == [3, 7, 5]
    assert [score for _, score in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 63], rel=1e-12)


def test_equal_scores_share_a_rank():
    """Rows 1 to 3 tie in the second ranking, rank 1; row 4 is fourth there. Without sharing, row 1 would lead."""
    fused = refrag.rrf([{3: 0.9, 2: 0.8, 1: 0.7, 4: 0.6}, {1: 5.0, 2: 5.0, 3: 5.0, 4: 1.0}])
    assert [row for row, _ in fused] == [3, 2, 1, 4]
    assert [score for _, score in fused] == pytest.approx([1 / 61 + 1 / 61, 1 / 62 + 1 / 61, 1 / 63 + 1 / 61, 2 / 64])


def test_equal_sums_follow_the_first_ranking_then_the_rows():
    """Rows 9 and 2 are each first and second once: the first ranking's score decides. Rows 6 and 4 are nowhere else."""
    assert [row for row, _ in refrag.rrf([{9: 0.9, 2: 0.8}, {2: 7.0, 9: 3.0}])] == [9, 2]
    assert [row for row, _ in refrag.rrf([{}, {6: 1.0, 4: 1.0}])] == [4, 6]
    assert refrag.rrf([{}, {}]) == []


CARS = [{"id": colour, "text": f"The {colour} car is parked outside the house."} for colour in ("blue", "green", "red")]


@pytest.mark.models
def test_a_tie_is_not_settled_by_the_order_of_the_corpus(tmp_path, write, done, ask):
    """BM25 knows no "crimson": to it the three are equal. Whatever the order, the embedder's order decides."""
    for rows in (CARS, CARS[::-1]):
        done("index", "--corpus", write("cars.jsonl", rows), "--index_dir", tmp_path / "i")
        for retriever in ("dense", "hybrid"):
            result = ask(tmp_path / "i", "Which car is crimson?", "--retriever", retriever)
            assert ids_of(result) == ["red", "green", "blue"]
            dense = [p["scores"]["dense"] for p in result["passages"]]
            assert dense == sorted(dense, reverse=True)
            assert len({p["scores"].get("bm25") for p in result["passages"]}) == 1


def test_a_tie_beyond_the_candidates_is_no_worse_a_rank(tmp_path):
    """150 equal passages, 100 candidates: the last row, which the other retriever likes best, is still first here."""
    found = saved_bm25(tmp_path, ["a bell"] * 150).search("bell", 100, {149})
    assert list(found) == [*range(100), 149] and len(set(found.values())) == 1
    assert refrag.rrf([{149: 0.9, 0: 0.8}, found])[0][0] == 149


def test_equal_passages_count_once(tmp_path, write, build, ask):
    """200 copies take all 100 candidates of a search; the four others are found nevertheless."""
    texts = [*(["Copper and tin make bronze."] * 200), "Bronze bells.", "Tin roofs.", "Copper coins.", "A river."]
    build("i", write("corpus.txt", "\n".join(texts)))
    for retriever in ("dense", "bm25", "hybrid"):
        found = ask(tmp_path / "i", "copper and tin, bronze, river", "--retriever", retriever, "--topk", 8)["passages"]
        assert sorted(p["text"] for p in found) == sorted(set(texts))


# -- words and BM25 -----------------------------------------------------------------


@pytest.mark.parametrize(("text", "terms"), [
    ("The rivers of Spain", ["river", "spain"]), ("Connected CONNECTIONS, connecting!", ["connect"] * 3),
    ("GPT-4o in 1896", ["gpt", "4o", "1896"]), ("C a b x", ["c", "b", "x"]), ("5.", ["5"]),
    ("Windows 7, Windows 8", ["window", "7", "window", "8"]),
    ("U.S. US U.S.A. A-1 A1 e.g. J.R.R.", ["us", "us", "usa", "a1", "a1", "eg", "jrr"]),
    ("x=1, C++ C# F# C++11 g++.", ["x", "1", "c++", "c#", "f#", "c++", "11", "g++"]),
    ("1,000 1000 2.5 1,234.5 3.11.4 1,2 10,00", ["1000", "1000", "2.5", "1234.5", "3.11.4", "1", "2", "10", "00"]),
    ("e-mail, x-ray, B-52", ["e", "mail", "x", "ray", "b", "52"]), ("O'Brien l'eau", ["o", "brien", "l", "eau"]),
    ("don't Ada's Ada\u2019s he'll", ["don't", "ada", "ada", "he'll"]), ("Élan naïve", ["élan", "naïv"]),
    ("Mu\u0308lde M\u00fclde", ["mülde", "mülde"]), ("Straße STRASSE", ["strass", "strass"]),
    ("Photo\u00adsyn\u00adthe\u00adsis photosynthesis zero\u200bwidth", ["photosynthesi"] * 2 + ["zerowidth"]),
    ("\uff21\uff22\uff23 \uff11\uff12 \ufb01nance x\u00b2", ["abc", "12", "financ", "x2"]),
    ("\u0130stanbul ISTANBUL istanbul", ["istanbul"] * 3), ("snake_case", ["snake_cas"]),
    ("बिल्ली क्षत्रिय", ["बिल्ली", "क्षत्रिय"]), ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    ("كِتَاب كتاب كتـــاب", ["كتاب", "كتاب", "كتاب"]), ("שָׁלוֹם שלום", ["שלום", "שלום"]),
    ("ไม่ใช่", ["ไ", "ม่", "ใ", "ช่"]), ("长江是 river", ["长", "江", "是", "river"]), ("ラーメン", [*"ラーメン"]),
    ("한국어를 좋아", ["한국어를", "좋아"]), ("\x00 \n …!?", []), ("", [])])
def test_word_analyzer_golden(text, terms):
    """Folded spellings, one letter and digit included, no stop words, stems; letters of unspaced scripts are words."""
    assert refrag.index_terms(text) == terms


@given(st.text(max_size=60))
@few
def test_words_do_not_depend_on_the_unicode_form(text):
    """NFC and NFD, and upper case where it folds back, are other spellings of the same words."""
    plain = unicodedata.normalize("NFC", text)
    assert refrag.words(unicodedata.normalize("NFD", plain)) == refrag.words(plain)


@given(st.text("aAtsI179.,-'+#_ \n=", max_size=40))
@settings(max_examples=300)
def test_the_faster_pattern_finds_the_same_in_ascii(text):
    assert refrag.ASCII_WORD.findall(text) == refrag.WORD.findall(text)


def textbook_bm25(texts, question):
    """Lucene's BM25 of each text, straight from the formula (k1 = 1.5, b = .75), every repeat of a term counted."""
    docs = [Counter(refrag.index_terms(text)) for text in texts]
    lengths = [sum(doc.values()) for doc in docs]
    average = sum(lengths) / len(docs)
    scores = [0.0] * len(docs)
    for term in refrag.index_terms(question):
        df = sum(term in doc for doc in docs)
        idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
        for i, doc in enumerate(docs):
            if doc[term]:
                scores[i] += idf * doc[term] / (doc[term] + 1.5 * (1 - 0.75 + 0.75 * lengths[i] / average))
    return scores


def saved_bm25(folder, *parts):
    """A Bm25 as an index has it: built, saved and opened, with a segment for each list of texts."""
    for number, texts in enumerate(parts):
        refrag.build_bm25(iter(texts), len(texts), folder / str(number))
    return refrag.Bm25([folder / str(number) for number in range(len(parts))])


SMALL_CORPUS = [
    "Rivers flood in May. The river Rhone floods the old city.", "Copper and tin make bronze.", "the of and",
    "长江是亚洲最长的河流。", "A bronze bell; bronze, bronze and more bronze on the river",
    "Copper and tin make bronze.", ""]
QUESTIONS = ["Which river floods?", "bronze", "bronze bronze copper", "河流 river", "长江", "old copper city in May"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("ends", [[], [1], [3], [2, 4], [1, 2, 3, 4, 5, 6]])
def test_bm25_is_the_textbooks(tmp_path, question, ends):
    """Also if a segment has no term at all, or one term in all its passages."""
    bm25 = saved_bm25(tmp_path, *(SMALL_CORPUS[a:b] for a, b in itertools.pairwise([0, *ends, len(SMALL_CORPUS)])))
    expected = textbook_bm25(SMALL_CORPUS, question)
    order = sorted(range(len(expected)), key=lambda i: (-round(expected[i], 5), i))
    assert list(bm25.search(question, 100)) == [i for i in order if expected[i] > 0]
    np.testing.assert_allclose(bm25.scores(question), expected, rtol=1e-5, atol=1e-7)
    assert [bm25.document_frequency(t) for t in ("bronz", "river", "\u957f", "zebra")] == [3, 2, 1, 0]


VOCABULARY = ["river", "bronze", "bell", "old", "city", "the", "长", "江"]


@given(st.lists(st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=8).map(" ".join), min_size=1, max_size=6),
                min_size=1, max_size=4),
       st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=4).map(" ".join), st.integers(1, 13))
@few
def test_bm25_orders_as_the_textbook(tmp_path_factory, parts, question, topk):
    """Every row found scores above zero, none better is left out, and equal passages come in corpus order."""
    if not any(refrag.index_terms(text) for part in parts for text in part):
        parts = [*parts, ["bell"]]
    texts = [text for part in parts for text in part]
    bm25, expected = saved_bm25(tmp_path_factory.mktemp("bm25"), *parts), textbook_bm25(texts, question)
    np.testing.assert_allclose(bm25.scores(question), expected, rtol=1e-4, atol=1e-6)
    rows = list(bm25.search(question, topk))
    positive = sorted((s for s in expected if s > 0), reverse=True)
    assert [expected[r] for r in rows] == pytest.approx(positive[:topk], rel=1e-4)
    assert len(set(rows)) == len(rows)
    for a, b in itertools.pairwise(rows):
        assert a < b or texts[a] != texts[b]


def test_bm25_ties_at_the_edge_of_topk_come_in_corpus_order(tmp_path):
    bm25 = saved_bm25(tmp_path / "bm25", ["bell", "city", "bell", "bell", "bell bell"])
    assert list(bm25.search("bell", 3)) == [4, 0, 2]
    many = saved_bm25(tmp_path / "many", ["bell", "bell city"] * 50)
    assert list(many.search("bell", 60)) == [*range(0, 100, 2), *range(1, 20, 2)]  # the shorter passages score higher


@pytest.mark.filterwarnings("error")
def test_bm25_of_questions_and_passages_without_terms(tmp_path):
    bm25, empty = saved_bm25(tmp_path / "bm25", SMALL_CORPUS), saved_bm25(tmp_path / "empty", ["the of", "", "?"])
    for question in ("zebra", "the of", "?!", "", "a"):
        assert bm25.search(question, 5) == empty.search(question, 5) == {}


# -- index and search by the command line -----------------------------------------------


def test_index_reports_what_it_did(tmp_path, build, corpus):
    result = build("i", corpus)
    assert {"passages", "skipped", "dim", "chunks", "seconds", "passages_per_s", "index_dir"} <= result.keys()
    assert (result["passages"], result["skipped"], result["dim"]) == (6, 0, 24)
    [segment] = refrag.open_index(str(tmp_path / "i")).segments
    assert result["chunks"] == len(segment["chunk_ends"]) == segment["chunk_offsets"][-1]
    assert "chunks" not in segment  # no --k, no encoder states


@pytest.mark.parametrize("retriever", ["hybrid", "dense", "bm25"])
def test_search_json(index_dir, ask, retriever):
    result = ask(index_dir, "Which river crosses the old city?", "--topk", 3, "--retriever", retriever)
    passages = result["passages"]
    assert result["question"] == "Which river crosses the old city?"
    assert all(p.keys() == {"id", "title", "text", "score", "scores", "rank"} for p in passages)
    assert all(p["scores"].keys() <= {"dense", "bm25"} and p["scores"] for p in passages)
    assert [p["rank"] for p in passages] == list(range(1, len(passages) + 1))
    scores = [p["score"] for p in passages]
    assert scores == sorted(scores, reverse=True) and all(isinstance(s, float) for s in scores)
    assert len(set(ids_of(result))) == len(passages) <= 3
    if retriever == "bm25":
        assert ids_of(result)[0] == "a" and passages[0]["title"] == "Title 0"
        assert passages[0]["text"].startswith("The Rhone leaves")
    else:
        assert len(passages) == 3


def test_each_retriever_ranks_as_its_oracle(index_dir, ask, embedder):
    """dense: a matrix product; bm25: the textbook; hybrid: the sums of 1 / (60 + rank) of both."""
    question, exact = "notes on the river of bronze bells", ["--dtype", "float32"]
    index = refrag.open_index(str(index_dir))
    contents = [index.content(row) for row in range(len(index))]
    model = refrag.load_embedder(str(embedder), RUNTIME)
    similarity = (model.embed_passages(contents) @ model.embed_query(question)[0]).tolist()
    sparse = textbook_bm25(contents, question)
    dense = sorted(range(6), key=lambda i: -similarity[i])
    words = sorted((i for i in range(6) if sparse[i] > 0), key=lambda i: -sparse[i])
    fused = {i: 1 / (61 + dense.index(i)) + (1 / (61 + words.index(i)) if i in words else 0) for i in range(6)}
    assert len(words) > 1
    names = [index.ids[row] for row in range(6)]
    assert ids_of(ask(index_dir, question, *exact, "--retriever", "dense")) == [names[i] for i in dense]
    assert ids_of(ask(index_dir, question, *exact, "--retriever", "bm25")) == [names[i] for i in words]
    hybrid = ask(index_dir, question, *exact)
    assert ids_of(hybrid) == [names[i] for i in sorted(fused, key=lambda i: -fused[i])]
    assert [p["score"] for p in hybrid["passages"]] == pytest.approx(sorted(fused.values(), reverse=True), abs=1e-6)


def test_a_title_is_part_of_the_content(bm25_index, ask):
    index = bm25_index([{"id": "a", "title": "Zebra", "text": "An animal."}, {"id": "b", "text": "Another animal."}])
    assert ids_of(ask(index, "zebra", "--retriever", "bm25")) == ["a"]
    opened = refrag.open_index(str(index))
    assert [opened.content(row) for row in (0, 1)] == ["Zebra\nAn animal.", "Another animal."]


def test_search_of_a_file_of_questions(write, index_dir, run):
    """Also for people to read. Either a question or a file of them."""
    rows = [{"id": "q7", "question": "Which river floods?"}, {"question": "What is bronze?"}]
    common = ["search", "--index_dir", index_dir, "--questions", write("q.jsonl", rows), "--quiet"]
    _, out, _ = run(*common, "--format", "json")
    results = json.loads(out)["results"]
    assert [(r["id"], r["question"]) for r in results] == [("q7", "Which river floods?"), ("2", "What is bronze?")]
    _, out, _ = run(*common, "--format", "trec", "--topk", 2)
    assert [line.split()[0] for line in out.splitlines()] == ["q7", "q7", "2", "2"]
    _, out, _ = run(*common)
    assert re.match(r"Which river floods\?\n *1\. .*Title", out) and "\n\nWhat is bronze?\n" in out
    assert run(*common, "--question", "x")[0] == run("search", "--index_dir", index_dir)[0] == 2


LONG = " ".join(f"river{i} word{i}." for i in range(60))


def test_trec_counts_a_split_document_once_at_its_best_rank(bm25_index, run):
    """Lines have six columns; a question without results has none."""
    rows = [{"id": "long", "text": LONG}, {"id": "a#2", "text": "river3 elsewhere"},
            {"id": "my notes.txt", "text": "other words"}]
    index = bm25_index(rows, "--max_passage_tokens", 32, "--overlap", 8)
    common = ["search", "--index_dir", index, "--retriever", "bm25", "--quiet", "--question"]
    question = "river3 word3 river40 elsewhere other"
    passages = json.loads(run(*common, question, "--json")[1])["passages"]
    found = [p["id"] for p in passages]
    assert sum(i.startswith("long#") for i in found) >= 2 and {"a#2", "my notes.txt"} <= set(found)
    documents = ["long" if i.startswith("long#") else i for i in found]  # "a#2" is an id of its own, no piece
    best = {d: passages[documents.index(d)]["score"] for d in documents}
    lines = [line.split(" ") for line in run(*common, question, "--format", "trec")[1].splitlines()]
    assert [line[2] for line in lines] == [d.replace(" ", "_") for d in dict.fromkeys(documents)]
    for rank, (qid, q0, document, shown, score, tag) in enumerate(lines, start=1):
        assert (qid, q0, tag, int(shown)) == ("1", "Q0", "refrag", rank)
        assert float(score) == pytest.approx(best[document.replace("_", " ")], abs=1e-6)
    assert run(*common, "zebra", "--format", "trec")[:2] == (0, "")


HOPS = [{"id": "bell", "title": "Aix bell", "text": "The bell of Aix was cast by Ludovic Ferrand. It is large."},
        {"id": "ferrand", "text": "Ludovic Ferrand grew up in Norway."},
        {"id": "copper", "text": "Copper melts at a high temperature."},
        {"id": "barents", "text": "Norway borders the Barents Sea."}]


def test_a_second_hop_follows_the_first(bm25_index, ask):
    """The question shares no word with the passage that answers it; the passage between them does."""
    index, question = bm25_index(HOPS), "Which country was home to the maker of the Aix bell?"
    assert ids_of(ask(index, question)) == ["bell"]
    assert ids_of(ask(index, question, "--hops", 2)) == ["bell", "ferrand"]
    # the third starts from the best passage that the second did not start from
    assert set(ids_of(ask(index, question, "--hops", 3))) == {"bell", "ferrand", "barents"}
    assert ids_of(ask(index, "zebra", "--hops", 3)) == []


def test_reranker_reorders_the_candidates(index_dir, ask, monkeypatch):
    seen = []

    def load(name, runtime):
        def rerank(question, texts):
            seen.append((name, question, texts))
            return np.array([float(len(text)) for text in texts])

        return rerank

    monkeypatch.setattr(refrag, "load_reranker", load)
    passages = ask(index_dir, "old city", "--rerank", "some/model", "--topk", 2)["passages"]
    index = refrag.open_index(str(index_dir))
    lengths = {index.ids[row]: len(index.content(row)) for row in range(6)}
    best = sorted(lengths, key=lambda i: -lengths[i])[:2]
    assert [p["id"] for p in passages] == best
    assert [p["score"] for p in passages] == [lengths[i] for i in best]
    (name, question, texts), *rest = seen
    assert (name, question, rest) == ("some/model", "old city", [])
    assert sorted(texts) == sorted(index.content(row) for row in range(6))  # with their titles


@pytest.mark.parametrize("more", [("--topk", 500), ("--hops", 2), ("--hops", 3), ("--hops", 8)])
def test_more_than_there_is_gives_each_passage_once(index_dir, ask, more):
    result = ask(index_dir, "Which river crosses the old city?", *more)
    assert sorted(ids_of(result)) == list("abcdef")
    assert all(p["scores"] and set(p["scores"]) <= {"dense", "bm25"} for p in result["passages"])


# -- bm25 only ----------------------------------------------------------------------------


def test_a_bm25_index_needs_no_embedder(bm25_index, ask, refused):
    index = bm25_index([{"id": "a", "text": "A river."}, {"id": "b", "text": "A bell."}], "--embed_model", "missing")
    assert ids_of(ask(index, "bells")) == ["b"]
    names = {path.name for path in index.rglob("*")}
    assert not names & {"faiss.index", "gate.npy", "chunks.npy", "vectors.npy"}
    assert "bm25" in refused(2, "search", "--index_dir", index, "--retriever", "dense", "--question", "bells")


# -- adding ---------------------------------------------------------------------------------


def folder_of(index):
    """The segment that was built last."""
    return index / json.loads((index / "manifest.json").read_text())["segments"][-1]["folder"]


MANY = [{"id": f"p{i}", "title": f"River {i}" if i % 3 else "", "text": text} for i, text in enumerate([
    "The Rhone floods in May.", "长江 rises in Qinghai. " * 3, LONG, "Bronze bells ring.", "A note. " * 20,
    "Athens had games.", "Rice grows in the delta of the Ebro 🙂."])]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_adding_gives_what_building_at_once_gives(tmp_path, build, ask, kind):
    """Only new files are written. Naming the type again gives a few more passages no graph of their own."""
    settings = [*STATES, "--k", 4, "--faiss", kind]
    build("once", MANY, *settings)
    build("grown", MANY[:3], *settings)
    first = tmp_path / "grown" / "gen-1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    added = [build("grown", rows, *settings, "--add")["added"] for rows in (MANY[3:5], MANY[5:])]
    assert added == [5, 2]  # "A note." * 20 is four passages
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert folder_of(tmp_path / "grown").name == "gen-3"
    same_index(tmp_path / "once", tmp_path / "grown")
    manifest = refrag.open_index(str(tmp_path / "grown")).manifest
    assert [(part["faiss"], part["passages"]) for part in manifest["segments"]] == [
        (kind, 21), ("flat", 5), ("flat", 2)]
    assert manifest["faiss"] == kind
    for question in ("river floods", "bronze river40 word3"):
        for retriever in ("dense", "bm25", "hybrid"):
            once, grown = (ask(tmp_path / n, question, "--retriever", retriever) for n in ("once", "grown"))
            assert ids_of(once) == ids_of(grown)
            scores = [[p["score"] for p in result["passages"]] for result in (once, grown)]
            np.testing.assert_allclose(*scores, atol=2e-6)  # other batches: the vectors' last bits differ


def same_index(*folders):
    """All that two indexes hold is the same in any order, vectors but for their last bit: other batches made them."""
    a, b = (refrag.open_index(str(folder)) for folder in folders)
    assert len(a) == len(b) and a.manifest["counts"] == b.manifest["counts"]
    orders = [sorted(range(len(index)), key=index.ids.__getitem__) for index in (a, b)]
    for name in refrag.STRING_COLUMNS:
        column, other = (getattr(index, name) for index in (a, b))
        assert [column[row] for row in orders[0]] == [other[row] for row in orders[1]]
    for rows in zip(*orders, strict=True):
        tables = [index.chunk_table(row, 4, index.manifest["chunking"]["encoder"])
                  for index, row in zip((a, b), rows, strict=True)]
        for name, x, y in zip(refrag.ChunkTable._fields, *tables, strict=True):
            step = np.abs(x).max(axis=1, keepdims=True) / 127 if name == "embeddings" else 1e-3
            assert (np.abs(x - y) <= 2e-3 * np.abs(x) + 1.1 * step).all()
    vectors = [np.concatenate([part.reconstruct_n(0, part.ntotal) for part in index.faiss])[order]
               for index, order in zip((a, b), orders, strict=True)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    for term in ("river", "bronz", "zebra"):
        assert a.idf(term) == b.idf(term)
    for question in ("river floods", "bronze bells", "note"):
        scores = [index.bm25.scores(question)[order] for index, order in zip((a, b), orders, strict=True)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize(("most", "sizes"), [(2, [4, 1, 1, 1]), (4, [2, 3, 1, 1, 1])])
def test_segments_are_taken_into_new_ones(tmp_path, build, monkeypatch, most, sizes):
    """One by one, with ever more of them: at no time more than there may be, and always the same as built at once."""
    monkeypatch.setattr(refrag, "MOST_SEGMENTS", most)
    rows = [{"id": f"n{i}", "title": "", "text": f"River {i} floods field {i * 7}."} for i in range(sum(sizes))]
    for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        build("grown", rows[a:b], *STATES, *(["--add"] if a else ["--k", 4]))
        parts = refrag.open_index(str(tmp_path / "grown")).manifest["segments"]
        assert len(parts) <= most and sum(part["passages"] for part in parts) == b
        assert {path.name for path in (tmp_path / "grown").glob("gen-*")} == {part["folder"] for part in parts}
    build("once", rows, *STATES, "--k", 4)
    same_index(tmp_path / "once", tmp_path / "grown")


@pytest.mark.parametrize(("sizes", "kept"), [
    ([], 0), ([5], 1), ([9, 1, 1, 1, 1, 1, 1], 7), ([1000, 1, 1, 1, 1, 1, 1, 1], 1), ([1000, 9, 1, 1, 1, 1, 1, 1], 2),
    ([64, 32, 16, 8, 4, 3, 2, 1], 7), ([1] * 8, 0), ([5, 1, 1, 1, 1, 1, 1, 7], 0),
])
def test_which_segments_are_taken(sizes, kept):
    """As few as are together smaller than the one before, and none while there are fewer than eight."""
    index = types.SimpleNamespace(manifest={"segments": [{"passages": size} for size in sizes]})
    stay, taken = refrag.plan_compaction(index, [()] * len(sizes))
    assert stay == list(range(kept))
    assert taken == [(at, 0, sizes[at]) for at in range(kept, len(sizes))]


@pytest.mark.parametrize(("replaced", "kept", "runs"), [
    ([(), {2}, ()], [0, 2], [(1, 0, 2), (1, 3, 5)]), ([{0, 1, 2}, (), {0}], [1], [(2, 1, 3)]),
    ([{2}, set(range(5)), ()], [2], [(0, 0, 2)]), ([(), {0, 1, 3, 4}, ()], [0, 2], [(1, 2, 3)])])
def test_segments_with_replaced_rows_are_taken_without_them(replaced, kept, runs):
    index = types.SimpleNamespace(manifest={"segments": [{"passages": size} for size in (3, 5, 3)]})
    assert refrag.plan_compaction(index, replaced) == (kept, runs)


@pytest.mark.parametrize("rows", [
    [{"id": "a#2", "text": "A bell."}],  # a piece of the document a in the index
    [{"id": "b", "text": "A bell."}, {"id": "b", "text": LONG}], [{"id": "b", "text": LONG}, {"id": "b", "text": "A."}],
    [{"id": "b", "text": LONG}, {"id": "b#3", "text": "A."}], [{"id": "b#1", "text": "A."}, {"id": "b", "text": LONG}]])
def test_an_id_that_two_documents_would_have_is_refused_and_changes_nothing(write, bm25_index, refused, llama, rows):
    index, size = bm25_index([{"id": "a", "text": LONG}], "--max_passage_tokens", 64), ["--max_passage_tokens", 64]
    with unchanged(index):
        message = refused(2, "index", "--corpus", write("more.jsonl", rows), "--index_dir", index, "--add",
                          "--dec", llama, "--quiet", *size)
    assert "more.jsonl:1 and " in message and ("the index" if len(rows) == 1 else "more.jsonl:2") in message


CHANGED = [{"id": "p2", "title": "", "text": "A bell. " * 3}, {"id": "new", "text": "A river."},
           {"id": "p4", "title": "Note", "text": LONG, "year": 1990}]


@pytest.mark.parametrize(("kind", "ends"), [("flat", [7]), ("hnsw", [3, 4, 7])])
def test_a_document_that_is_added_again_replaces_all_its_pieces(tmp_path, build, kind, ends):
    """The same index as one built at once from what is left of the old documents and the new ones."""
    settings = [*STATES, "--k", 4, "--faiss", kind]
    for a, b in itertools.pairwise([0, *ends]):
        build("i", MANY[a:b], *STATES, *(["--add"] if a else settings))
    build("once", [*(r for r in MANY if r["id"] not in ("p2", "p4")), *CHANGED], *settings)
    for replaced in (2, 3):  # the second time, all are there
        assert build("i", CHANGED, *STATES, "--add")["replaced_documents"] == replaced
        same_index(tmp_path / "once", tmp_path / "i")
        opened = refrag.open_index(str(tmp_path / "i"))
        assert opened.manifest["faiss"] == kind
        assert {path.name for path in (tmp_path / "i").glob("gen-*")} == {
            segment["folder"] for segment in opened.manifest["segments"]}
    pieces = [opened.ids[row] for row in range(len(opened)) if opened.document_id(row) in ("p2", "p4")]
    assert "p2" in pieces and "p4#1" in pieces and not {"p4", "p2#1"} & set(pieces)


def test_what_is_replaced_is_said(tmp_path, run, bm25_index, llama):
    index = bm25_index([{"id": "a", "text": "A river."}, {"id": "b", "text": "A bell."}])
    corpus = ["index", "--corpus", tmp_path / "rows.jsonl", "--index_dir", index, "--dec", llama]
    code, out, err = run(*corpus, "--add")
    assert code == 0 and ", 2 documents replaced in" in out and "this replaces" not in err
    code, out, err = run(*corpus, "--retriever", "bm25")
    assert code == 0 and ", 0 documents replaced in" in out
    assert f"this replaces the index in {index}: --add would add to it" in err
    (index / "manifest.json").write_text("{")
    assert "this replaces" in run(*corpus, "--retriever", "bm25")[2]
    corpus[4] = tmp_path / "new"
    assert "this replaces" not in run(*corpus, "--retriever", "bm25")[2]


def test_files_without_ids_are_added_and_replaced(tmp_path, write, build):
    """Two files of one name side by side; each again, from wherever, also as part of its folder, replaces its own."""
    for name in "ab":
        write(f"{name}/notes.txt", f"first of {name}\nsecond of {name}\n")
    build("i", tmp_path / "a/notes.txt")
    for replaced in (0, 2):
        assert build("i", tmp_path / "a/../b/notes.txt", "--add")["replaced_documents"] == replaced
    more = build("i", tmp_path / "b", "--corpus", tmp_path / "b", tmp_path / "a/notes.txt", "--add")
    assert more["replaced_documents"] == 4
    opened = refrag.open_index(str(tmp_path / "i"))
    assert sorted(opened.ids[row] for row in range(len(opened))) == [
        "b/notes.txt:1", "b/notes.txt:2", "notes.txt:1", "notes.txt:2"]


@pytest.mark.parametrize("form", [(), ("--format", "json"), ("--json",)])
def test_metadata_is_found_with_its_passage(bm25_index, run, form):
    more = {"year": 1990, "tags": ["\u00e4", None]}
    index = bm25_index([{"id": "a", "text": "A river.", **more}, {"id": "b", "text": "River"}])
    code, out, _ = run("search", "--index_dir", index, "--question", "river", *form)
    found = {p["id"]: p.get("metadata") for p in json.loads(out)["passages"]} if form else {}
    assert code == 0 and found == ({"a": more, "b": None} if form else {})


@pytest.mark.parametrize("flags", [["--k", 8], ["--faiss", "hnsw"], ["--enc", "decoder:1"], ["--retriever", "bm25"]])
def test_adding_with_other_settings_is_refused(write, refused, index_dir, embedder, llama, flags):
    with unchanged(index_dir):
        refused(5, "index", "--corpus", write("more.jsonl", MANY[:1]), "--index_dir", index_dir, "--add",
                "--embed_model", embedder, "--dec", llama, *STATES, "--quiet", *flags)


# -- splitting ------------------------------------------------------------------------------


def check_cover(text, pieces):
    """Pieces in order, each a part of the text, with nothing but white space between or around them."""
    at = 0
    for piece in pieces:
        place = text.find(piece, max(0, at - len(piece)))
        assert place >= 0 and not text[at:place].strip(), (at, piece)
        at = place + len(piece)
    assert not text[at:].strip()


@pytest.mark.parametrize("overlap", [0, 8])
def test_long_passages_are_split_and_nothing_is_lost(tmp_path, build, embedder, overlap):
    """The embedder reads 64 tokens, so a piece with its title and the special tokens has no more than those."""
    rows = [{"id": "long", "title": "A title", "text": LONG}, {"id": "short", "text": "Short."}]
    build("i", rows, "--overlap", overlap, "--max_passage_tokens", 64)
    index = refrag.open_index(str(tmp_path / "i"))
    ids = [index.ids[row] for row in range(len(index))]
    pieces = [index.texts[row] for row in range(len(index) - 1)]
    assert ids == [*(f"long#{n}" for n in range(1, len(pieces) + 1)), "short"] and len(pieces) > 3
    assert [index.document_id(row) for row in range(len(index))] == ["long"] * len(pieces) + ["short"]
    assert {index.titles[row] for row in range(len(pieces))} == {"A title"}
    check_cover(LONG, pieces)
    tokenizer = refrag.load_embedder(str(embedder), RUNTIME).tokenizer
    assert all(len(tokenizer(index.content(row))["input_ids"]) <= 64 for row in range(len(index)))
    shared = [len(set(a.split()) & set(b.split())) for a, b in itertools.pairwise(pieces)]
    assert all(n == 0 for n in shared) if overlap == 0 else all(0 < n <= overlap for n in shared)


def test_a_piece_fits_beside_the_embedders_prompt(tmp_path, build, embedder):
    """Some embedders want "passage: " before every text; it takes tokens of the 64 that this one reads."""
    folder = shutil.copytree(embedder, tmp_path / "model")
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": {"document": "passage: "}}))
    build("i", [{"id": "long", "text": LONG}], "--embed_model", folder, "--max_passage_tokens", 64)
    index, model = refrag.open_index(str(tmp_path / "i")), refrag.load_embedder(str(folder), RUNTIME)
    assert model.prompt == "passage: "
    longest = max(len(model.tokenizer(model.prompt + index.content(row))["input_ids"]) for row in range(len(index)))
    assert longest <= 64


def test_a_document_may_have_many_pieces(tmp_path):
    with refrag.ColumnWriter(tmp_path) as columns:
        spans = list(itertools.pairwise(range(70_001)))
        chunking = refrag.Chunking(4, types.SimpleNamespace(fingerprint="t"))
        build = refrag.IndexBuild(tmp_path, refrag.BuildConfig(), "bm25", None, chunking, None, RUNTIME)
        build.add(columns, refrag.Record("a", "", "x" * 70_000, "a:1"), spans)


def test_the_embedders_limit_is_announced(tmp_path, run, corpus, embedder, llama):
    models = ["--embed_model", embedder, "--dec", llama]
    assert "64 tokens" in run("index", "--corpus", corpus, "--index_dir", tmp_path / "i", *models)[2]


# -- chunk tables -----------------------------------------------------------------------------


def test_merge_chunks_golden():
    """Weights are the sizes: (4 * 1 + 2 * 4) / 6 = 2. The last, alone, stays: 6. An empty chunk counts as one token.
    Sizes are stored in 16 bits, which their sums may leave."""
    table = refrag.ChunkTable(np.array([9, 15, 20]), np.array([4, 2, 3]), np.array([[0.0], [3.0], [5.0]]),
                              np.array([[1.0, 0.0], [4.0, 3.0], [6.0, 7.0]]))
    merged = refrag.merge_chunks(table, 2)
    assert merged.ends.tolist() == [15, 20] and merged.sizes.tolist() == [6, 3]
    np.testing.assert_allclose(merged.embeddings, [[1.0], [5.0]])
    np.testing.assert_allclose(merged.states, [[2.0, 1.0], [6.0, 7.0]])
    assert refrag.merge_chunks(table, 1) is table
    empty = refrag.ChunkTable(np.array([3]), np.array([0]), None, np.array([[7.0]]))
    assert refrag.merge_chunks(empty, 4).states.tolist() == [[7.0]]
    large = refrag.ChunkTable(np.array([1, 2]), np.array([40_000, 40_000], np.uint16), None, None)
    assert refrag.merge_chunks(large, 2).sizes.tolist() == [80_000]


def test_late_chunk_vectors_golden():
    """Tokens end at 2, 5, 6 and 9 between two special ones (0). Chunks end at 5, 6 and 20: the first has the tokens at
    2 and 5, the second the one at 6, the third that at 9. A chunk without tokens gets the whole passage's vector."""
    states = np.array([[100.0], [1.0], [3.0], [7.0], [11.0], [100.0]], np.float32)
    ends = [0, 2, 5, 6, 9, 0]
    whole = np.array([50.0], np.float32)
    assert refrag.late_chunk_vectors(states, ends, np.array([5, 6, 20]), whole).tolist() == [[2.0], [7.0], [11.0]]
    assert refrag.late_chunk_vectors(states, ends, np.array([9, 15, 20]), whole).tolist() == [[5.5], [50.0], [50.0]]
    assert refrag.late_chunk_vectors(states[:3], ends, np.array([5, 9]), whole).tolist() == [[2.0], [50.0]]


@pytest.fixture(scope="module")
def encoder(llama):
    """The tiny decoder's first two layers as an encoder."""
    config = refrag.RefragConfig(encoder_name_or_path="decoder:2", decoder_name_or_path=str(llama))
    return refrag.build_model(config, torch.device("cpu"), torch.float32).encoder


def table_at(encoder, content, k=4):
    """The chunk table of a content, computed."""
    return refrag.chunk_tables([content], refrag.Chunking(k, encoder.tokenizer, encoder), None, 1)[1][0]


@pytest.mark.parametrize("content", [*(row["text"][:600] for row in MANY), LONG])
def test_chunks_of_4_give_those_of_8_and_16(encoder, content):
    """The last is beyond the encoder's window."""
    small = table_at(encoder, content)
    for factor in (2, 4):
        merged, direct = refrag.merge_chunks(small, factor), table_at(encoder, content, 4 * factor)
        assert merged.ends.tolist() == direct.ends.tolist() and merged.sizes.tolist() == direct.sizes.tolist()
        np.testing.assert_allclose(merged.states, direct.states, rtol=2e-3, atol=2e-3 * np.abs(direct.states).max())


def test_states_of_an_encoder_that_reads_chunk_by_chunk_serve_only_their_own_k(build, corpus, llama, bert, tmp_path):
    """A chunk of 8 read by itself is not the mean of its halves read by themselves, so it is computed."""
    build("i", corpus, "--enc", bert, "--k", 4)
    models = refrag.ModelConfig(dec=str(llama), enc=str(bert))
    for k in (4, 8):
        pipeline = refrag.load_pipeline(refrag.IndexConfig(str(tmp_path / "i")), refrag.SearchConfig(),
                                        refrag.PackConfig(k=k, compressed="feed"), refrag.GenerateConfig(max_new=1),
                                        models, RUNTIME)
        content = pipeline.index.content(0)
        docs = refrag.make_docs([content], [0], k, pipeline.tokenizer, pipeline.stored, pipeline.states_at(k))
        assert (docs[0].chunks.states is not None) == (k == 4) == bench.reads_stored(pipeline, k)
        [doc] = pipeline.filled(docs, k, gate=False)
        fresh = table_at(pipeline.model.encoder, content, k).states
        np.testing.assert_allclose(doc.chunks.states, fresh, rtol=1e-3, atol=1e-3 * np.abs(fresh).max())


@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
@few
def test_vectors_in_8_bits_are_within_half_a_step(seed, N):
    vectors = np.random.default_rng(seed).normal(size=(N, 7)) * np.logspace(-4, 3, 7)
    vectors[:1] = 0
    levels, scales = refrag.in_8_bits(vectors)
    assert levels.dtype == np.int8 and scales.shape == (N, 1)
    assert (np.abs(levels * scales - vectors) <= 0.5001 * np.abs(vectors).max(axis=1, keepdims=True) / 127 + 1e-9).all()


def test_stored_tables_are_those_made_now(index_dir, embedder, encoder):
    index, model = refrag.open_index(str(index_dir)), refrag.load_embedder(str(embedder), RUNTIME)
    for k in (4, 8, 16):
        chunking = refrag.Chunking(k, encoder.tokenizer, encoder)
        for row in range(len(index)):
            stored = index.chunk_table(row, k, encoder.fingerprint)
            made = refrag.chunk_tables([index.content(row)], chunking, model, 1)[1][0]
            assert stored.ends.tolist() == made.ends.tolist() and stored.sizes.tolist() == made.sizes.tolist()
            assert stored.ends[-1] == len(index.content(row))
            scale = np.abs(made.states).max()
            np.testing.assert_allclose(stored.states, made.states, rtol=1e-3, atol=1e-3 * scale)
            if k == 4:  # the gate's are weighted by the encoder's tokens, so merging them is no more than close
                step = np.abs(made.embeddings).max(axis=1, keepdims=True) / 127
                assert (np.abs(stored.embeddings - made.embeddings) <= 0.51 * step + 1e-3).all()


def test_chunk_tables_of_other_k_or_another_encoder_are_not_used(index_dir, encoder):
    index = refrag.open_index(str(index_dir))
    assert index.chunk_table(0, 6, encoder.fingerprint) is None
    assert index.chunk_table(0, 12, encoder.fingerprint) is not None
    assert index.chunk_table(0, 2, encoder.fingerprint) is None
    assert index.chunk_table(0, 4, "0" * 16).states is None
    assert index.chunk_table(0, 4).states is None and index.chunk_table(0, 4).embeddings is not None


def test_the_embedder_computes_in_bfloat16_where_the_device_does(embedder, monkeypatch):
    texts = ["A river floods the old town in spring.", "Bells are cast from bronze.", "Sheep graze on the hills."]
    exact = refrag.load_embedder(str(embedder), RUNTIME)
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False)
        one = refrag.load_embedder(str(embedder), refrag.RuntimeConfig(device="cpu"))
        assert next(one.model.parameters()).dtype == dtype and one.fingerprint == exact.fingerprint
        vectors, states, _ = one.embed_with_states(texts)
        for made, expected in ((one.embed_passages(texts), exact.embed_passages(texts)),
                               (vectors, exact.embed_with_states(texts)[0]),
                               (one.embed_query(texts[0]), exact.embed_query(texts[0]))):
            assert made.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
            assert (made * expected).sum(1).min() > 0.999
        assert all(state.dtype == np.float32 for state in states)


def test_queries_embedded_together_are_those_embedded_alone(embedder, monkeypatch):
    questions = ["Who casts bells?", "Where does the river flood the old town in spring?", "What grazes?"]
    model = refrag.load_embedder(str(embedder), RUNTIME)
    alone = [model.embed_query(question).copy() for question in questions]
    model.queries.clear()
    model.embed_queries(questions)
    monkeypatch.setattr(model.model, "encode_query", None)  # nothing is embedded a second time
    for question, vector in zip(questions, alone, strict=True):
        together = model.embed_query(question)
        assert together.shape == vector.shape == (1, model.dim)
        np.testing.assert_allclose(together, vector, atol=1e-5)


def test_a_few_queries_are_remembered(embedder):
    model = refrag.load_embedder(str(embedder), RUNTIME)
    for number in range(4 * refrag.QUERY_BATCH + 1):
        model.queries[f"question {number}"] = np.zeros((1, model.dim), np.float32)
    model.embed_query("one more")
    assert list(model.queries) == ["one more"]


@pytest.mark.parametrize("lacking", [("pad_token",), ("pad_token", "eos_token", "unk_token")])
def test_an_embedder_without_a_pad_token(tmp_path, build, ask, llama, lacking):
    """Vectors are those of each text by itself, whatever token fills a batch up."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(llama), max_seq_length=64)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    for path in [*(tmp_path / "model").rglob("tokenizer_config.json"), *tmp_path.rglob("special_tokens_map.json")]:
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in facts.items() if key not in lacking}))
    model = refrag.load_embedder(str(tmp_path / "model"), RUNTIME)
    texts = ["A river.", "Bronze bells ring in the old city of Geneva in May.", "x"]
    alone = np.concatenate([model.embed_passages([text]) for text in texts])
    np.testing.assert_allclose(model.embed_passages(texts), alone, atol=1e-5)
    build("i", [{"text": text} for text in texts], "--embed_model", tmp_path / "model")
    assert ids_of(ask(tmp_path / "i", texts[1], "--retriever", "dense"))[0] == "rows.jsonl:2"


def test_gate_vectors_beyond_what_the_embedder_reads_are_the_passages(embedder, encoder):
    """The embedder reads 64 tokens; chunks after those have the whole passage's vector."""
    model, chunking = refrag.load_embedder(str(embedder), RUNTIME), refrag.Chunking(4, encoder.tokenizer)
    vectors, (table,) = refrag.chunk_tables([LONG], chunking, model, 1)
    np.testing.assert_allclose(table.embeddings[-1], vectors[0], atol=1e-6)
    assert np.abs(table.embeddings[0] - vectors[0]).max() > 1e-3


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_state_ends_are_places_in_the_text(embedder, prompt):
    """Special tokens and the embedder's own prompt end nowhere in it. No letter is dropped by a WordPiece tokenizer, so
    the ends are those of words or of pieces of words, and the last is the end of the text."""
    model, text = refrag.load_embedder(str(embedder), RUNTIME), "The Rhone, in May"
    model.prompt = prompt
    _, _, (ends,) = model.embed_with_states([text])
    places = [end for end in ends if end]
    assert places == sorted(set(places)) and places[-1] == len(text)
    assert {3, 9, 10, 13, 17} <= set(places)
    assert len(ends) == len(model.tokenizer(prompt + text)["input_ids"])
    assert ends[0] == ends[-1] == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_embedder_states_are_those_of_the_tokens(embedder, side):
    """The tiny embedder pools by the mean and normalises, so its tokens' states must give its vector back."""
    model = refrag.load_embedder(str(embedder), RUNTIME)
    model.tokenizer.padding_side = side
    texts = ["The Rhone floods.", "Bronze", "A longer text about the old city and the river."]
    vectors, states, ends_of = model.embed_with_states(texts)
    np.testing.assert_allclose(vectors, model.embed_passages(texts), atol=1e-6)
    for vector, rows, ends in zip(vectors, states, ends_of, strict=True):
        mean = rows[: len(ends)].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


# -- files ------------------------------------------------------------------------------------


def test_arrays_are_mapped_and_read_only(index_dir):
    """And no file needs pickle."""
    index = refrag.open_index(str(index_dir))
    [segment] = index.segments
    for array in [*segment.values(), *index.ids.bytes, *index.texts.bytes, *index.texts.offsets, *index.bm25.lengths]:
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    assert [segment[name].dtype for name in ("chunks", "gate", "gate_scales")] == [np.float16, np.int8, np.float32]
    with pytest.raises(ValueError, match="read-only"):
        segment["chunks"][0] = 0
    files = [p for p in folder_of(index_dir).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".npy", ".json", ".index"}
    assert all(np.load(p, allow_pickle=False).dtype != object for p in files if p.suffix == ".npy")
    faiss.read_index(str(folder_of(index_dir) / "faiss.index"))


# -- a build that ends early ----------------------------------------------------------------------


def test_two_processes_build_the_index_of_one(tmp_path, write, forks, embedder, llama):
    """Each embeds every other block: one has a full block, the other one that is not."""
    rows = [{"id": str(i), "text": f"River {i} floods field {i * 7}."} for i in range(300)]
    build = ["index", "--corpus", write("c.jsonl", rows), "--embed_model", embedder, "--dec", llama,
             "--enc", "decoder:2", "--k", 4, "--json", "--quiet", "--threads", 1]
    first, second = forks.run_two([*build, "--index_dir", tmp_path / "two"])
    assert (json.loads(first)["passages"], second) == (300, "")
    assert forks.run([*build, "--index_dir", tmp_path / "one"]) == 0, forks.err
    assert tree(folder_of(tmp_path / "two")) == tree(folder_of(tmp_path / "one"))
    assert not (tmp_path / "two" / refrag.FINISHED_BLOCKS).exists()
