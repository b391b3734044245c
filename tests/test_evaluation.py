"""Section 13: metrics by hand, each control's plan, resuming, reports, and `eval` through the command line."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXTS
from scipy import stats
from writers import lasting, write_rows

import refrag
from refrag_extras import evaluate

QUESTIONS = [
    {"id": "bells", "question": "Where do smiths cast bells?", "answers": ["the valley"], "positive_ids": ["b"]},
    {"id": "lake", "question": "Which river leaves Lake Geneva?", "answers": ["The Rhone"], "positive_ids": ["a"]},
    {"id": "games", "question": "Where did the first modern games open?", "answers": ["Athens"], "positive_ids": ["f"]},
    {"id": "notes", "question": "Who wrote notes on the Analytical Engine?", "answers": ["Ada Lovelace", "Ada"],
     "positive_ids": ["c", "d"]}]
MODELS = ["--enc", "decoder:2", "--quiet"]


@pytest.fixture
def argv(index_dir, llama, write, home):
    """The command line of `eval` on the small index; later options win over these."""
    small = ["--k", 4, "--topk", 2, "--max_new", 3]
    return ["eval", "--qa", write("qa.jsonl", QUESTIONS), "--index_dir", index_dir, "--dec", llama, *small, *MODELS]


@pytest.fixture
def run_eval(done, argv):
    return lambda *more: done(*argv, *more)


def lines_of(folder):
    return [lasting(json.loads(line)) for line in (folder / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory, index_dir, llama):
    qa, modes = write_rows(tmp_path_factory.mktemp("qa") / "qa.jsonl", QUESTIONS), tuple(refrag.EVAL_MODES["qa"])
    config = refrag.EvalConfig(qa=str(qa), k=(4,), max_new=3, gate="random", p=(0.0, 0.3), modes=modes)
    task = evaluate.QaTask(config, refrag.IndexConfig(index_dir=str(index_dir)), refrag.SearchConfig(topk=2),
                           refrag.ModelConfig(dec=str(llama), enc="decoder:2"), refrag.RuntimeConfig(quiet=True))
    task.load()
    return task


class TestMetrics:
    def test_normalisation_is_squads(self):
        for text, expected in (
                ("The  U.S. Army", "us army"), ("a cat, an owl & the dog!", "cat owl dog"), ("A-team", "ateam"),
                ("the", ""), ("theatre\tanother", "theatre another"), ("Ebro\u2013a river", "ebro\u2013 river")):
            assert refrag.normalize_answer(text) == expected
        for text, truths, held in (
                ("It was the Rhone, he said", ["The Rhone"], True), ("Rhoneland", ["Rhone"], False),
                ("14 nations", ["4 nations"], False), ("", ["x"], False), ("anything", ["the"], False)):
            assert refrag.holds_answer(text, truths) is held, text

    @pytest.mark.parametrize(("reply", "truths", "em", "f1"), [
        ("The old town.", ["old town"], 1, 1), ("in the old town", ["old town hall"], 0, 2 / 3),  # 2 common of 3 and 3
        ("old old town", ["old town old bridge"], 0, 6 / 7),  # a word counts as often as both have it: 3 of 3 and 4
        ("river", ["town", "the river Rhone"], 0, 2 / 3),  # the best truth: 1 common of 1 and 2
        ("none of it", ["town"], 0, 0), ("", ["town"], 0, 0), ("A", ["A"], 1, 1),  # an answer that is an article
        # different ones, though they normalise to nothing
        (" ", ["the"], 0, 0), ("the", ["A"], 0, 0), ("an", ["the", "A"], 0, 0), ("+", ["-"], 0, 0),
        ("?", ["the"], 0, 0),
        # there is no answer
        (refrag.NO_ANSWER, [], 1, 1), ("", [], 1, 1), ("Ulm", [], 0, 0), ("A", [], 0, 0)])
    def test_exact_match_and_f1_by_hand(self, reply, truths, em, f1):
        assert evaluate.exact_match(reply, truths) == em
        assert evaluate.token_f1(reply, truths) == pytest.approx(f1)

    def test_grounding_citations_and_order_by_hand(self):
        assert evaluate.grounding("The old bridge of Ulm", ["An old", "bridge in Ulm!"]) == 3 / 4  # "of" is not there
        assert evaluate.grounding("the", ["the"]) is evaluate.grounding("Ulm", []) is None
        for cited, positives, expected in (
                ([{"a#1", "a"}, {"b"}], {"a"}, (0.5, 1.0)), ([set()], {"a"}, (0.0, 0.0)),  # forged
                ([{"a"}], {"a", "c"}, (1.0, 0.5)), ([], {"a"}, (None, 0.0)), ([{"a"}], set(), (None, None))):
            assert evaluate.citation_scores(cited, positives) == expected, cited
        for made, share in (([1, 2, 3, 4], 1), ([1, 9, 3, 4], 0.75), ([4, 3, 2, 1], 0.25), ([7, 1, 2, 3, 4, 7], 1),
                            ([], 0), ([9], 0)):
            assert evaluate.kept_in_order([1, 2, 3, 4], made) == share, made

    def test_rankings_by_hand(self):
        """Hits at ranks 2 and 4 of three: DCG 1/log2(3) + 1/log2(5) = 1.0616, ideal 1 + 1/log2(3) + 1/2 = 2.1309."""
        scores = evaluate.ranking_scores(["x", "a", "y", "b"], {"a", "b", "c"})
        assert scores == {"recall@8": pytest.approx(2 / 3), "mrr@10": 0.5, "ndcg@10": pytest.approx(0.49819, abs=1e-5)}
        assert evaluate.ranking_scores([*"12345678", "a"], {"a"}) == {
            "recall@8": 0.0, "mrr@10": pytest.approx(1 / 9), "ndcg@10": pytest.approx(1 / math.log2(10))}
        assert set(evaluate.ranking_scores([*"0123456789", "a"], {"a"}).values()) == {0.0}
        # pieces of a document count once, at their best rank
        found = [refrag.Passage(row, name, part, "", "") for row, (name, part) in enumerate(
            [("b", 2), ("a", 1), ("b", 1), ("c", 0), ("a", 2)])]
        assert evaluate.ranked_ids(found, {"a"}, {}) == ["b", "a", "c"]
        assert evaluate.ranked_ids(found, {"a#2"}, {}) == ["b", "a", "c", "a#2"]

    def test_the_bootstrap_agrees_with_another(self):
        values = np.random.default_rng(5).random(60) ** 2
        theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999).confidence_interval
        assert evaluate.bootstrap_interval(values, 0) == pytest.approx([theirs.low, theirs.high], abs=0.015)
        assert evaluate.bootstrap_interval(values, 3) == evaluate.bootstrap_interval(values, 3)
        assert evaluate.bootstrap_interval(values, 3) != evaluate.bootstrap_interval(values, 4)
        assert evaluate.bootstrap_interval([0.5], 0) == [0.5, 0.5]

    def test_gate_scores_by_hand(self):
        chunks = [refrag.Chunk(doc, 0, 1, 0, 1) for doc in (0, 0, 1, 2)]
        score = lambda opened, spans, right: tuple(evaluate.gate_scores(  # noqa: E731
            np.asarray(opened, dtype=bool), spans, right, chunks).values())
        assert score([1, 0, 1, 0], [[0, 1], [2]], [{0}, {1}]) == (True, True, True)
        assert score([1, 0, 0, 0], [[0, 1]], [{0}, {1}]) == (False, True, False)
        assert score([0, 0, 0, 1], [[0, 1]], [{0}]) == (False, False, None)
        assert score([1, 0, 0, 0], [], [{0, 1}, set()]) == (None, None, True)  # pieces of one; the other was missed


class TestControls:
    def prepare(self, task, mode, p, item=QUESTIONS[0]):
        setup = evaluate.setup_of(mode, p, "random")
        return task.controls.prepare(item, setup, task.settings_of(setup))

    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_expanded_only_feeds_refrags_text_and_truncate_text_on_as_many_positions(self, task, p):
        fed, dropped, cut = (self.prepare(task, mode, p) for mode in ("refrag", "expanded_only", "truncate"))
        assert (fed.plan < 0).any() and (dropped.plan >= 0).all() and (cut.plan >= 0).all()
        assert dropped.plan.tolist() == fed.plan[fed.plan >= 0].tolist()
        prompt = cut.context.prompt
        first, last = prompt.blocks[-1]
        tags = last - first - sum(c.tokens for c in prompt.chunks if c.doc == len(cut.context.docs) - 1)
        assert len(fed.plan) - tags <= len(cut.plan) <= len(fed.plan)  # an emptied document goes with its tags

    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_wrong_vectors_are_anothers_and_all_else_is_the_same(self, task, p):
        """Against the other question's own prompt at p = 0, which holds its vectors in order."""
        right, wrong = (self.prepare(task, mode, p) for mode in ("refrag", "wrong_vectors"))
        plan, inputs, swapped = right.plan, right.inputs, wrong.inputs
        assert plan.tolist() == wrong.plan.tolist()
        at = torch.as_tensor(plan < 0)
        torch.testing.assert_close(inputs[~at], swapped[~at], rtol=0, atol=0)
        other = self.prepare(task, "refrag", 0.0, task.controls.other_question(QUESTIONS[0]))
        vectors = other.inputs[torch.as_tensor(other.plan < 0)]
        for number, vector in zip((-plan[at] - 1).tolist(), swapped[at], strict=True):
            torch.testing.assert_close(vector, vectors[number % len(vectors)], rtol=0, atol=0)
        assert not any(torch.equal(a, b) for a, b in zip(inputs[at], swapped[at], strict=True))

    def test_the_other_question_shares_no_passage_if_one_does_not(self, task):
        controls = evaluate.Controls(task.pipeline, QUESTIONS)
        controls.rows.update({0: frozenset({1, 2}), 1: frozenset({2, 3}), 2: frozenset(), 3: frozenset({4})})
        assert controls.other_question(QUESTIONS[0])["id"] == "notes"  # 1 shares a passage, 2 has none
        controls.rows[3] = frozenset({1})
        assert controls.other_question(QUESTIONS[0])["id"] == "lake"  # all share one: the next
        controls.rows.update({1: frozenset(), 3: frozenset()})
        with pytest.raises(refrag.UserError, match="no other question"):
            controls.other_question(QUESTIONS[0])

    def test_the_oracle_opens_an_answer_where_the_gate_may_not(self, task):
        retrieved = 0
        for item in QUESTIONS:
            reading = self.prepare(task, "oracle_gate", 0.4, item)
            spans = evaluate.answer_spans(reading.context, item, task.pipeline.index, task.pipeline.tokenizer)
            if not spans:
                continue
            retrieved += 1
            assert any(all(reading.expanded[i] for i in span) for span in spans)
            right = {i for span in spans for i in span}
            rest = [i for i in range(len(reading.scores)) if i not in right]
            assert min(reading.scores[list(right)]) > max(reading.scores[rest])
            usual = self.prepare(task, "random_gate", 0.4, item)
            assert np.argsort(reading.scores[rest]).tolist() == np.argsort(usual.scores[rest]).tolist()
        assert retrieved >= 2

    def test_the_text_that_is_fed_is_that_of_the_opened_chunks(self, task):
        full, nothing, some = (self.prepare(task, *how) for how in (("full", 1.0), ("refrag", 0.0), ("refrag", 0.3)))
        tokenizer = task.pipeline.tokenizer
        assert evaluate.texts_fed(full, tokenizer) == [d.content for d in full.context.docs]
        assert evaluate.texts_fed(nothing, tokenizer) == []
        runs = evaluate.texts_fed(some, tokenizer)
        tokens = some.context.prompt.sizes[some.expanded].sum()
        encoded = tokenizer.decoder(runs, add_special_tokens=False)["input_ids"]
        assert runs and abs(sum(map(len, encoded)) - tokens) <= 2 * len(runs)  # cut words may be cut anew
        assert all(any(run in d.content for d in some.context.docs) or "\ufffd" in run for run in runs)


class TestScores:
    def score(self, task, answer, item=QUESTIONS[0], mode="full"):
        pipeline, settings = task.pipeline, task.settings_of(evaluate.setup_of(mode, 0.0, "random"))
        reading, out = pipeline.prepare(item, settings), refrag.Decoded([5, 6], [1.0, 2.0, 4.0], True)
        result = pipeline.result(reading, out, answer, None, 0)
        return evaluate.score_answer(result, reading, item, pipeline.tokenizer), reading

    def test_a_right_answer_with_a_right_citation(self, task):
        scores, reading = self.score(task, "")
        assert scores["em"] == scores["f1"] == 0.0 and scores["abstention"] and scores["grounding"] is None
        label = next(label for label, p in zip(reading.labels, reading.passages, strict=True) if p.id == "b")
        scores, _ = self.score(task, f"The valley [{label}].")
        assert scores["em"] == scores["f1"] == scores["citation_precision"] == scores["citation_recall"] == 1.0
        assert scores["answer_in_passages"] and scores["answer_in_text"] and scores["answer_in_reply"]
        assert scores["grounding"] == 1.0 and scores["citations_forged"] == 0 and not scores["abstention"]
        assert scores["ttit_s"] == 1.5
        assert evaluate.average([scores, {"ttit_s": None}, {"ttit_s": 4}], "ttit_s") == 2.75  # of those it applies to
        scores, _ = self.score(task, "Valley", mode="none")
        assert scores["em"] == 1.0
        assert scores["citation_precision"] is scores["citation_recall"] is scores["grounding"] is None

    def test_a_wrong_answer_with_a_forged_citation(self, task):
        scores, _ = self.score(task, "Zanzibar [9]", mode="refrag")
        assert scores["em"] == scores["f1"] == scores["citation_precision"] == scores["citation_recall"] == 0.0
        assert scores["answer_in_passages"] and not scores["answer_in_text"]  # nothing is fed as text
        assert scores["grounding"] == 0.0 and scores["citations_forged"] == 1

    def test_differences_are_paired(self, task):
        """F1 (1, 0) against (0, 1): each interval reaches from -1 to 1; against itself it is nothing."""
        zeros = dict.fromkeys(task.means, 0.0) | {"ttft_s": 1.0, "ttit_s": None}
        one, two = ([zeros | {"f1": value} for value in values] for values in ((1.0, 0.0), (0.0, 1.0)))
        made = task.summarise(one, {"full": two, "expanded_only": one})
        assert made["f1"] == 0.5 and made["f1_ci"] == [0.0, 1.0]
        assert made["f1_minus_full"] == {"mean": 0.0, "ci": [-1.0, 1.0]}
        assert made["f1_minus_expanded_only"] == {"mean": 0.0, "ci": [0.0, 0.0]}
        assert made["ttft_s"] == 1.0 and made["ttit_s"] is None


def test_qa_has_the_promised_form_and_is_the_same_in_batches_or_not(run_eval):
    options = ["--modes", ",".join(refrag.EVAL_MODES["qa"]), "--p", 0, 0.3, "--limit", 2, "--batch_size"]
    first, second = (run_eval(*options, size) for size in (1, 2))
    assert lasting(first) == lasting(second)
    assert (first["task"], first["n"], first["seed"]) == ("qa", 2, 1337)
    results = first["results"]
    assert [(mode, list(cells)) for mode, cells in results.items()] == [
        (mode, {"full": ["1"], "none": ["0"]}.get(mode, ["0", "0.3"])) for mode in refrag.EVAL_MODES["qa"]]
    for cells in results.values():
        for cell in cells.values():
            assert {"em", "f1", "f1_ci", "positions", "compression", "ttft_s", "citation_precision", "citation_recall",
                    "grounding"} <= cell.keys()
            assert cell["f1_ci"][0] <= cell["f1"] <= cell["f1_ci"][1]
    drawn, read = (lasting(results[name]["0"]) for name in ("random_gate", "refrag"))
    assert results["random_gate"]["0"]["ttft_s"] == results["refrag"]["0"]["ttft_s"], "they share one answer"
    more = {f"f1_minus_{name}" for name in set(results) - {"refrag", "full", "expanded_only"}}  # refrag's alone
    assert drawn == {name: value for name, value in read.items() if name not in more} and more < read.keys()
    assert results["expanded_only"]["0.3"]["positions"] < results["refrag"]["0.3"]["positions"]
    assert "f1_minus_expanded_only" in results["refrag"]["0"] and "f1_minus_full" not in results["full"]["1"]


def test_refrag_is_compared_with_every_control(task):
    """Each cell has an F1 of its own here, so that a difference tells which two were compared."""
    scores = {cell: number / 100 for number, cell in enumerate(task.cells)}
    nothing = dict.fromkeys(task.means, 0.0) | {"ttft_s": 1.0, "ttit_s": None}
    made = task.results({(q["id"], *cell): nothing | {"f1": f1} for q in task.questions for cell, f1 in scores.items()})
    for p, key in ((0.0, "0"), (0.3, "0.3")):
        for name in set(refrag.EVAL_MODES["qa"]) - {"refrag"}:
            theirs = scores[name, {"full": 1.0, "none": 0.0}.get(name, p)]
            difference = made["results"]["refrag"][key][f"f1_minus_{name}"]
            assert difference["mean"] == pytest.approx(scores["refrag", p] - theirs)
    table = task.table(made).partition("F1 of refrag minus that of")[2]
    assert all(name.replace("_", " ") in table for name in set(refrag.EVAL_MODES["qa"]) - {"refrag"})


def test_retrieval(run_eval):
    made = run_eval("--task", "retrieval")
    assert made["n"] == 4 and set(made["results"]) == {"bm25", "dense", "hybrid"}
    assert all({"recall@8", "mrr@10", "ndcg@10"} <= scores.keys() for scores in made["results"].values())
    assert made["results"]["bm25"]["mrr@10"] == 1.0  # every question shares rare words with its passage
    assert made["results"]["bm25"]["recall@8"] == 0.875  # one of two positives has none of the question's words
    assert made["results"]["dense"]["recall@8"] == 1.0  # six passages in all
    only = run_eval("--task", "retrieval", "--modes", "dense")["results"]
    assert lasting(only) == {"dense": lasting(made["results"])["dense"]}
    some = run_eval("--task", "retrieval", "--where", "id != a")["results"]
    assert all(some[name]["recall@8"] < scores["recall@8"] for name, scores in made["results"].items())


def test_a_passage_that_repeats_a_positive_is_one(build, done, write, tmp_path):
    """A search gives equal passages once, here the one that is not named."""
    build("twins", [{"id": name, "text": TEXTS[row]} for row, name in ((0, "x"), (0, "y"), (1, "z"))])
    qa = write("twins.jsonl", [{"question": "Which river leaves Lake Geneva?", "positive_ids": ["y"]}])
    made = done("eval", "--task", "retrieval", "--index_dir", tmp_path / "twins", "--qa", qa, "--modes", "bm25")
    assert made["results"]["bm25"]["mrr@10"] == made["results"]["bm25"]["recall@8"] == 1


def test_gate(run_eval, write):
    more = [*QUESTIONS, {"question": "Where do smiths cast bells?", "answers": ["Zanzibar"], "positive_ids": ["b"]},
            {"question": "Where do smiths cast bells?", "answers": ["rice"], "positive_ids": ["d"]}]
    qa = write("more.jsonl", more)
    options = ["--task", "gate", "--qa", qa, "--retriever", "bm25", "--p", 0, 0.5, 1, "--modes", "blend", "ppl",
               "random", "--topk", 1]
    first, second = (run_eval(*options) for _ in range(2))
    assert lasting(first) == lasting(second)
    assert (first["n"], first["asked"]) == (6, 4)
    assert first["left_out"] == {"not_retrieved": 1, "no_answer_in_passage": 1}
    assert first["several_positives"] == 1 and first["all_positives"]["ppl"]["1"] == 1.0
    for gate in ("blend", "ppl", "random"):
        recall, partial = first["results"][gate], first["partial"][gate]
        assert (recall["0"], recall["1"]) == (0.0, 1.0)
        assert recall["0"] <= recall["0.5"] <= partial["0.5"] <= partial["1"]
        assert first["gate_ms"][gate] > 0
    named = set(run_eval("--task", "gate", "--p", 0.5, "--limit", 1)["results"])
    assert set(refrag.GATES) - {"auto", "ppl"} <= named and "ppl" not in named


@pytest.fixture
def probe(llama, write, home):
    texts = write("texts.jsonl", [{"text": " ".join(TEXTS[i:] + TEXTS[:i])} for i in range(3)])
    return lambda task, *more, texts=texts: ["eval", "--task", task, "--texts", texts, "--dec", llama, *MODELS,
                                "--context_tokens", 16, "--next_tokens", 8, *more]


def test_ppl_against_plain_forwards(done, probe, llama):
    """Without context and with all of it, log-perplexity is what transformers' own loss gives."""
    made = done(*probe("ppl", "--k", 4, 8, "--limit", 5))
    assert set(made["results"]) == set(refrag.EVAL_MODES["ppl"]) and made["n"] == 5
    assert all(list(cells) == ["4", "8"] for cells in made["results"].values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(llama)
    windows = []
    for i in range(3):
        ids = tokenizer(" ".join(TEXTS[i:] + TEXTS[:i]), add_special_tokens=False)["input_ids"]
        windows += [ids[at : at + 24] for at in range(0, len(ids) - 23, 24)]
    chosen = [windows[i] for i in np.linspace(0, len(windows) - 1, 5).astype(int)]
    for mode, skip in (("full", 0), ("none", 16), ("truncate", 12)):  # at k = 4, 16 tokens are 4 vectors
        losses = []
        for ids in chosen:
            fed = torch.tensor([[tokenizer.bos_token_id, *ids[skip:]]])
            labels = fed.clone()
            labels[:, :-8] = -100
            losses.append(decoder(input_ids=fed, labels=labels).loss.item())
        assert made["results"][mode]["4"] == pytest.approx(np.mean(losses), abs=2e-3), mode
    assert made["results"]["full"]["4"] == made["results"]["full"]["8"]
    assert made["results"]["refrag"]["4"] != made["results"]["wrong_vectors"]["4"]
    for k, vectors in ((4, 4), (8, 2)):
        assert made["positions"]["refrag"][str(k)] == made["positions"]["truncate"][str(k)] == 1 + vectors + 8 - 1


def test_a_window_that_ends_inside_a_character_leaves_something_to_predict(done, probe, write):
    texts = write("odd.jsonl", [{"text": "\U0001f642" * n} for n in (40, 50)])  # of four tokens each
    made = done(*probe("ppl", "--next_tokens", 1, "--modes", "refrag", "none", texts=texts))
    assert made["positions"]["none"] == {"16": 4.0}


def test_one_text_has_no_other_text_s_vectors_and_short_ones_no_two_pieces(refused, probe, write):
    texts = write("one.jsonl", [{"text": " ".join(TEXTS * 3)}])
    for task in ("ppl", "recon"):
        message = refused(2, *probe(task, texts=texts))
        assert "wrong_vectors needs another's: give a second text" in message
        assert ("or leave wrong_vectors out" in message) == (task == "ppl")
    assert "two pieces of 5008 tokens" in refused(2, *probe("ppl", "--context_tokens", 5000))


def test_what_the_decoder_writes_freely(done, probe, llama, tmp_path):
    """An independent loop over the start, the token mean of each chunk and the mark gives the same."""
    made = done(*probe("recon", "--k", 4, 8, "--limit", 2, "--out_dir", tmp_path / "out"))
    assert made["n"] == 2 and list(made["results"]) == ["4", "8"]
    for cell in made["results"].values():
        assert {"accuracy", "no_vectors", "wrong_vectors"} <= cell.keys()
        assert all(0 <= value <= 1 for value in cell.values())
    sample = (tmp_path / "out/sample.md").read_text()
    assert [sample.count(f"- {name}: ") for name in ("text", "k = 4", "k = 8")] == [2, 2, 2]
    decoder = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    embed = decoder.get_input_embeddings()
    for line in (line for line in lines_of(tmp_path / "out") if line["mode"] == "refrag"):
        shares = []
        for text, written in line["written"]:
            ids, mark = (tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
                         for part in (text, refrag.RECONSTRUCT))
            with torch.inference_mode():
                fed = [embed(torch.tensor([tokenizer.bos_token_id])), embed(ids).unflatten(0, (-1, line["k"])).mean(1)]
                out = decoder.generate(inputs_embeds=torch.cat([*fed, embed(mark)])[None], do_sample=False,
                                       max_new_tokens=len(ids))[0].tolist()
            assert written == tokenizer.decode(out, skip_special_tokens=True)
            shares.append(evaluate.kept_in_order(ids.tolist(), out))
        assert made["results"][str(line["k"])]["free_running"] == pytest.approx(np.mean(shares), abs=1e-5)


def test_texts_resume_by_k_and_mode(done, run, probe, tmp_path):
    out = tmp_path / "out"
    first = done(*probe("ppl", "--k", 4, "--limit", 3, "--modes", "refrag", "none", "--out_dir", out))
    more = ["--k", 8, 4, "--limit", 3, "--modes", "refrag", "none", "truncate"]
    grown = done(*probe("ppl", *more, "--out_dir", out, "--resume"))
    assert grown == done(*probe("ppl", *more))
    assert grown["results"]["refrag"]["4"] == first["results"]["refrag"]["4"]
    assert run(*probe("ppl", *more, "--out_dir", out, "--resume", "--context_tokens", 20))[0] == 5


OPTIONS = ["--modes", "full", "refrag", "expanded_only", "wrong_vectors", "--p", 0, 0.3, "--batch_size", 2]


def test_the_report_says_what_the_command_says(run_eval, tmp_path):
    made = run_eval(*OPTIONS, "--out_dir", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {".lock", "questions.jsonl", "results.json", "report.md", "quality.png", "sample.md"}
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert {key: stored[key] for key in made} == made
    assert {"settings", "command", "versions", "device", "commit"} <= stored.keys()
    assert stored["settings"]["max_new"] == 3
    report, sample = ((tmp_path / "out" / name).read_text() for name in ("report.md", "sample.md"))
    assert f"| expanded_only | 0.3 | {made['results']['expanded_only']['0.3']['em']:.3f} |" in report
    assert (tmp_path / "out/quality.png").read_bytes().startswith(b"\x89PNG")
    lines = lines_of(tmp_path / "out")
    cells = [("full", 1.0), *((mode, p) for mode in ("refrag", "expanded_only", "wrong_vectors") for p in (0.0, 0.3))]
    assert [(line["id"], line["mode"], line["p"]) for line in lines] == [
        (q["id"], *cell) for q in QUESTIONS for cell in cells]
    f1 = [line["f1"] for line in lines if (line["mode"], line["p"]) == ("refrag", 0.3)]
    assert made["results"]["refrag"]["0.3"]["f1"] == pytest.approx(np.mean(f1), abs=1e-4)
    for item in QUESTIONS:
        assert f"## {item['id']}: {item['question']}" in sample
        assert f"True answers: {'; '.join(item['answers'])}" in sample
    assert "mode refrag, p = 0.3" in sample and sample.count("<|im_start|>assistant") == 4 and "[[" in sample


class TestResuming:
    def test_modes_and_shares_may_be_added(self, run_eval, tmp_path, monkeypatch):
        base = ["--limit", 2, "--out_dir", tmp_path / "out"]
        first = run_eval(*base, "--modes", "refrag", "--p", 0.3)
        wider = [*base, "--modes", "full", "refrag", "--p", 0, 0.3, "--resume"]
        more = run_eval(*wider)
        assert list(more["results"]["refrag"]) == ["0", "0.3"] and "full" in more["results"]
        assert more["results"]["refrag"]["0.3"]["f1"] == first["results"]["refrag"]["0.3"]["f1"]
        monkeypatch.setattr(refrag, "load_pipeline", None)
        assert run_eval(*wider) == more

    def test_questions_may_be_added(self, run_eval, write, tmp_path, monkeypatch):
        """Three of five hold the two that were measured first; all is as if the three had been measured at once."""
        five = [*QUESTIONS, {"question": "Where do smiths cast bells?", "answers": ["Ulm"], "positive_ids": ["b"]}]
        qa = write("five.jsonl", five)
        base = ["--qa", qa, "--modes", "refrag", "wrong_vectors", "--p", 0.3]
        run_eval(*base, "--out_dir", tmp_path / "part", "--limit", 2)
        measured, generate = [], refrag.Pipeline.generate
        monkeypatch.setattr(refrag.Pipeline, "generate", lambda self, readings, *more: (
            measured.extend(reading.item["question"] for reading in readings), generate(self, readings, *more))[1])
        grown = run_eval(*base, "--out_dir", tmp_path / "part", "--limit", 3, "--resume")
        assert set(measured) == {"warm up", five[2]["question"]} and grown["n"] == 3
        assert lasting(grown) == lasting(run_eval(*base, "--out_dir", tmp_path / "whole", "--limit", 3))
        assert lines_of(tmp_path / "part") == lines_of(tmp_path / "whole")
        part, whole = (tmp_path / folder / "sample.md" for folder in ("part", "whole"))
        assert part.read_text() == whole.read_text()


def test_two_processes_give_the_results_of_one(forks, argv, tmp_path):
    """They share what an earlier run has left to do: half of the questions."""
    argv = [*argv, *OPTIONS, "--threads", 1, "--json"]
    assert forks.run([*argv, "--out_dir", tmp_path / "one"]) == 0, forks.err
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    lines = (tmp_path / "one/questions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two/questions.jsonl").write_text("".join(lines[: len(lines) // 2]))
    expected = lasting(json.loads(forks.out))
    made, nothing = forks.run_two([*argv, "--out_dir", tmp_path / "two", "--resume"])
    assert lasting(json.loads(made)) == expected and nothing == ""
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")
    assert not list((tmp_path / "two").glob("questions-*"))


UNANSWERABLE = [{"id": "none", "question": "Who won the games?", "answers": []},
                {"id": "near", "question": "When does the Ebro flood?", "answers": [], "positive_ids": ["d"]}]


@pytest.mark.parametrize(("reply", "right"), [(refrag.NO_ANSWER, 1), ("", 1), ("Ulm in May", 0)])
def test_where_there_is_no_answer_abstaining_is_right(task, reply, right):
    """What compares with a true answer, or with where it stands, does not apply; nor do the words of an abstention."""
    item = UNANSWERABLE[1]
    settings = task.settings_of(evaluate.setup_of("full", 1.0, "random"))
    reading = task.pipeline.prepare(QUESTIONS[0] | item, settings)
    [result] = task.pipeline.generate([reading])
    scored = evaluate.score_answer(result | {"answer": reply, "citations": []}, reading, item, task.pipeline.tokenizer)
    assert scored["em"] == scored["f1"] == scored["abstention"] == right
    lacking = {name for name, value in scored.items() if value is None} - {"ttit_s"}
    grounding = {"grounding"} if right else set()
    assert lacking == grounding | {"answer_in_passages", "answer_in_text", "answer_in_reply", "citation_precision",
                                   "citation_recall"}


def test_unanswerable_questions_count_in_qa(run_eval, run, argv, write, tmp_path):
    """In all modes and in the report. What positive_ids measure leaves out questions that have none."""
    partly = write("partly.jsonl", [*QUESTIONS, *UNANSWERABLE])
    made = run_eval("--qa", partly, "--modes", "refrag,oracle_gate,none", "--p", ".3", "--out_dir", tmp_path / "out")
    assert made["n"] == 6
    lines = {line["id"]: line for line in lines_of(tmp_path / "out") if line["mode"] == "refrag"}
    assert lines["near"]["em"] == float(lines["near"]["abstention"]) and lines["near"]["answer_in_text"] is None
    assert "- True answers: none\n" in (tmp_path / "out/sample.md").read_text()
    argv.remove("--quiet")
    for task in ("retrieval", "gate"):
        code, out, err = run(*argv, "--qa", partly, "--task", task, "--json")
        assert code == 0 and json.loads(out)["n"] == 5 and f"--qa {partly}: left out 1 without positive_ids\n" in err
    # the other one has no place in a passage to be found
    assert lasting(json.loads(out)["results"]) == lasting(run_eval("--task", "gate")["results"])


@pytest.mark.parametrize(("item", "options", "told"), [
    ({}, ["--task", "retrieval"], "question 2 has no positive_ids"), ({}, [], "question 2 has no list of answers"),
    *(({"answers": ["x"]}, options, "question 2 has no positive_ids") for options in (
        ["--task", "gate"], ["--modes", "oracle_gate"]))])
def test_a_question_that_lacks_something_is_named_before_a_model_is_loaded(refused, argv, write, monkeypatch, item,
                                                                           options, told):
    for name in ("load_pipeline", "load_searcher", "load_model"):
        monkeypatch.setattr(refrag, name, None)
    path = write("bad.jsonl", [QUESTIONS[0], {"question": "Why?"} | item])
    message = refused(2, *argv, "--qa", path, *options)
    assert f"--qa {path}: " in message and told in message
    assert "wrong_vectors needs two questions" in refused(2, *argv, "--qa", write("one.jsonl", QUESTIONS[:1]))


def test_questions_of_another_index_are_refused(refused, argv, write):
    path = write("other.jsonl", [q | {"positive_ids": ["elsewhere"]} for q in QUESTIONS])
    for task in ("qa", "retrieval", "gate"):
        assert "none of the questions' positive_ids" in refused(5, *argv, "--qa", path, "--task", task)
