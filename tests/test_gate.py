"""The gate: what scores a chunk, and what those scores are worth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refrag

few = settings(max_examples=60, deadline=None)


def given_chunks(texts, docs=None, question="", vectors=None, query=None, idf=lambda term: 1.0, seed=1337):
    """A GateInput without a prompt and a decoder."""
    return refrag.GateInput(question=question, query=query, vectors=vectors, texts=list(texts),
                            docs=np.asarray(docs if docs is not None else [0] * len(texts)), idf=idf,
                            prompt=None, decoder=None, seed=seed)


# -- neighbours ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "docs", "expected"),
    [
        ([3, 1, 2], [0, 0, 1], [1, 3, 0]),
        ([1, 5, 2, 4], [0, 0, 0, 0], [5, 2, 5, 2]),
        ([1, 5, 2, 4], [0, 1, 2, 3], [0, 0, 0, 0]),
        ([7, 8, 9], [0, 1, 1], [0, 9, 8]),
        ([2], [0], [0]),
        ([], [], []),
    ],
)
def test_best_neighbour_golden(scores, docs, expected):
    """The larger score of the chunks beside it in the same document; 0 where there is none."""
    assert refrag.best_neighbour(np.array(scores, float), np.array(docs, int)).tolist() == expected


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 2)), max_size=12))
@few
def test_best_neighbour_is_a_plain_loop(chunks):
    chunks = sorted(chunks, key=lambda chunk: chunk[1])  # the chunks of a document stand together
    scores, docs = np.array([s for s, _ in chunks], float), np.array([d for _, d in chunks], int)
    expected = [max([s for j in (i - 1, i + 1) if 0 <= j < len(chunks) for s, d in [chunks[j]] if d == doc], default=0)
                for i, (_, doc) in enumerate(chunks)]
    assert refrag.best_neighbour(scores, docs).tolist() == expected


# -- cosine and overlap ---------------------------------------------------------------


def test_cosine_scores_golden():
    """(3, 4) against (1, 0): 3/5, whatever the lengths; a vector of zeros scores 0."""
    vectors = np.array([[3.0, 4.0], [10.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], np.float32)
    scores = refrag.cosine_scores(given_chunks("abcd", vectors=vectors, query=np.array([2.0, 0.0], np.float32)))
    np.testing.assert_allclose(scores, [0.6, 1.0, -1.0, 0.0], atol=1e-6)


def test_cosine_scores_without_an_embedder_are_zero():
    query, vectors = np.ones(2, np.float32), np.ones((2, 2), np.float32)
    assert refrag.cosine_scores(given_chunks("ab", query=query)).tolist() == [0, 0]
    assert refrag.cosine_scores(given_chunks("ab", vectors=vectors)).tolist() == [0, 0]


IDF = {"river": 3.0, "cross": 2.0, "citi": 1.0}


def test_overlap_scores_golden():
    """The question's terms weigh 3 + 2 + 1 = 6. A term counts once, however often a chunk or the question has it."""
    chunks = ["The rivers cross", "cities, cities and a city", "crossing the river to the city", "Nothing here", ""]
    question = "A river that crosses the city: the river?"
    scores = refrag.overlap_scores(given_chunks(chunks, question=question, idf=IDF.__getitem__))
    np.testing.assert_allclose(scores, [5 / 6, 1 / 6, 1, 0, 0])


@pytest.mark.parametrize("question", ["", "the of", "?"])
def test_overlap_with_a_question_without_terms_is_zero(question):
    assert refrag.overlap_scores(given_chunks(["river", "the"], question=question)).tolist() == [0, 0]


# -- blend ------------------------------------------------------------------------------


def test_blend_golden():
    """Cosine .6, 0, 1 and overlap 0, 1, 0 with half of the best neighbour's: (.6 + 0) + (0 + .5), (0 + .5) + (1 + 0)
    and, in a document of its own, 1 + 0."""
    vectors, query = np.array([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]], np.float32), np.array([1.0, 0.0], np.float32)
    scores = refrag.blend_scores(given_chunks(["one", "river", "three"], [0, 0, 1], "river", vectors, query))
    np.testing.assert_allclose(scores, [1.1, 1.3, 1.0], atol=1e-6)


def test_blend_prefers_the_chunk_beside_the_questions_words():
    """The question's words stand in the second chunk, the answer beside it. A far chunk and another document's first
    chunk have as little of their own."""
    texts = ["Copper melts.", "The architect of the old bridge", "was Ludovic Ferrand.", "Rice grows.", "Tin is soft."]
    scores = refrag.blend_scores(given_chunks(texts, [0, 0, 0, 0, 1], "Who was the architect of the bridge?"))
    assert scores.argmax() == 1
    assert scores[2] > scores[3] == scores[4] == 0
    assert scores[0] == scores[2]


def test_auto_is_the_blend():
    assert refrag.GATES["auto"] is refrag.GATES["blend"] is refrag.blend_scores


# -- random -----------------------------------------------------------------------------


def test_random_scores_depend_on_question_and_seed_alone():
    def scores(question, seed, texts="abcdefgh"):
        return refrag.random_scores(given_chunks(texts, question=question, seed=seed)).tolist()

    first = scores("Who?", 1)
    assert first == scores("Who?", 1, "ABCDEFGH")
    assert len(set(first)) == 8 and all(0 <= s < 1 for s in first)
    assert first != scores("Why?", 1) and first != scores("Who?", 2)


def test_random_scores_favour_no_place():
    """The mean over 200 questions is near 1/2 at each place: within five standard errors, .02 each."""
    scores = [refrag.random_scores(given_chunks("abcdef", question=f"q{i}")) for i in range(200)]
    np.testing.assert_allclose(np.mean(scores, axis=0), 0.5, atol=5 * math.sqrt(1 / 12 / 200))


# -- perplexity -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(llama):
    """The tiny Llama at k = 4."""
    config = refrag.RefragConfig("decoder:1", str(llama), compression=4)
    return refrag.build_model(config, torch.device("cpu"), torch.float32)


def ppl(model, contents):
    """(prompt, scores) of documents by the ppl gate."""
    tokenizer = model.encoder.tokenizer
    docs = [refrag.Doc(str(i), text, tokenizer.runs([text])[0][0]) for i, text in enumerate(contents, 1)]
    prompt = refrag.build_prompt(tokenizer, refrag.question_pieces("Why?", docs))
    chunks = given_chunks([""] * len(prompt.chunks), [c.doc for c in prompt.chunks])
    return prompt, refrag.ppl_scores(chunks._replace(prompt=prompt, decoder=model.decoder))


def test_ppl_is_the_cross_entropy_of_each_document_alone(model):
    """Document by document, token by token: -log p(token | the document's tokens before it), averaged over the chunk.
    The first token of a document, which nothing precedes, counts as the document's mean."""
    prompt, scores = ppl(model, ["The Rhone leaves Lake Geneva in May.", "长江 rises in Qinghai 🙂"])
    for doc in (0, 1):
        mine = [(n, c) for n, c in enumerate(prompt.chunks) if c.doc == doc]
        ids = [int(i) for _, c in mine for i in prompt.input_ids[c.first : c.last]]
        losses = []
        for place in range(1, len(ids)):
            with torch.inference_mode():
                logits = model.decoder(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, 0)[ids[place]].item())
        losses.insert(0, sum(losses) / len(losses))
        for number, chunk in mine:
            expected = [losses.pop(0) for _ in range(chunk.tokens)]
            assert scores[number] == pytest.approx(np.mean(expected), rel=1e-4)
        assert not losses


def test_ppl_of_a_document_does_not_depend_on_the_others(model):
    first = "The Rhone leaves Lake Geneva in May."
    _, alone = ppl(model, [first])
    _, both = ppl(model, [first, "Copper and tin make bronze."])
    np.testing.assert_allclose(both[: len(alone)], alone, rtol=1e-5)


def test_ppl_of_a_single_token_is_zero(model):
    """There is nothing to predict it from."""
    prompt, scores = ppl(model, ["x", "Copper and tin make bronze."])
    assert prompt.chunks[0].tokens == 1 and scores[0] == 0 and (scores[1:] > 0).all()
