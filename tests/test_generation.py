"""Section 12: prefill, decode, citations, metrics, and `generate` through the command line."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import save_decoder

import refrag
from refrag_extras import cpu_engine

PROMPT = ("Where? <doc id='a'>Seven bridges cross the old city, and it floods in May.</doc> "
          "<doc id='b'>Bells.</doc> Say:")
FED = ["--enc", "decoder:2", "--compressed", "feed", "--json", "--quiet"]


def load(decoder, **options):
    """A pipeline for --prompt over a decoder folder."""
    pack = refrag.PackConfig(**({"k": 4, "floor": 0, "gate": "random", "compressed": "feed"} | options.pop("pack", {})))
    generate = refrag.GenerateConfig(prompt=PROMPT, **({"max_new": 6, "cite": False} | options))
    models = refrag.ModelConfig(dec=str(decoder), enc="decoder:2")
    return refrag.load_pipeline(refrag.IndexConfig(), refrag.SearchConfig(), pack, generate, models,
                                refrag.RuntimeConfig(quiet=True))


def ask(pipeline, text=PROMPT):
    """The one result for a prompt."""
    [result] = pipeline.answer([{"id": "1", "question": text}])
    return result


def cited(pipeline, said, context=None):
    """(answer, label that was chosen) for what a decoder has said after PROMPT."""
    item = {"id": "1", "question": PROMPT}
    seen, inputs = pipeline.prepare(item)
    _, state = refrag.prefill(pipeline.model.decoder, [inputs])
    return pipeline.cite(context or seen, said, state, 0, [])[:2]


def greedy_by_full_forwards(decoder, input_ids, steps, stops):
    """Tokens by a fresh forward over everything at each step: the oracle of cached decoding."""
    ids = list(input_ids)
    for _ in range(steps):
        token = int(decoder(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(input_ids) :]


class TestExactness:
    def test_p1_feeds_the_plain_prompt_and_gives_its_logits(self, any_decoder):
        pipeline = load(any_decoder, pack={"p": 1.0})
        context, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        tokenizer = pipeline.tokenizer.decoder
        message = PROMPT.replace("<doc id='a'>", '<doc id="a">\n').replace("<doc id='b'>", '<doc id="b">\n')
        message = message.replace("</doc>", "\n</doc>")
        if tokenizer.chat_template:
            plain = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)
            plain = plain["input_ids"] if not isinstance(plain, list) else plain
        else:
            plain = tokenizer(message + refrag.NO_TEMPLATE_SUFFIX)["input_ids"]
        assert context.plan.tolist() == context.packed.prompt.input_ids.tolist() == plain
        logits, _ = refrag.prefill(pipeline.model.decoder, [inputs])
        with torch.inference_mode():
            expected = pipeline.model.decoder(input_ids=torch.tensor([plain])).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_p0_feeds_no_token_of_the_content(self, any_decoder):
        pipeline = load(any_decoder, pack={"p": 0.0})
        context, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        inside = [t for c in context.packed.prompt.chunks for t in range(c.first, c.last)]
        assert inside and not context.kept[inside].any()
        assert len(inputs) == len(context.packed.prompt.input_ids) - len(inside) + len(context.packed.prompt.chunks)

    def test_vectors_stand_where_their_chunks_stood(self, llama):
        """The inputs at vector positions are the means of the chunks' token embeddings, in order."""
        pipeline = load(llama, pack={"p": 0.0})
        context, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        embed = pipeline.model.decoder.get_input_embeddings().weight
        at = np.flatnonzero(context.plan < 0)
        for position, chunk in zip(at, context.packed.prompt.chunks, strict=True):
            mean = embed[context.packed.prompt.input_ids[chunk.first : chunk.last]].mean(0)
            torch.testing.assert_close(inputs[position], mean)

    def test_cached_decode_equals_full_forwards(self, any_decoder):
        pipeline = load(any_decoder, pack={"p": 1.0}, max_new=12)
        context, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        logits, state = refrag.prefill(pipeline.model.decoder, [inputs])
        watch = refrag.Stopwatch(torch.device("cpu"))
        [out], _ = refrag.decode(pipeline.model.decoder, logits, state, max_new=12, stops=pipeline.stops,
                                 pick=pipeline.pick, watch=watch)
        with torch.inference_mode():
            ids = context.packed.prompt.input_ids
            expected = greedy_by_full_forwards(pipeline.model.decoder, ids, 12, pipeline.stops)
        assert out.tokens == expected

    def test_batch_equals_single(self, any_decoder):
        pipeline = load(any_decoder, pack={"p": 0.3}, max_new=8, cite=True)
        items = [{"id": str(i), "question": PROMPT + " word" * (5 * i)} for i in range(3)]
        alone = [pipeline.answer([item])[0] for item in items]
        together = pipeline.answer(items)
        assert [r["answer"] for r in together] == [r["answer"] for r in alone]
        assert [r["citations"] for r in together] == [r["citations"] for r in alone]
        assert [r["metrics"]["positions"] for r in together] == [r["metrics"]["positions"] for r in alone]

    def test_batched_logits_equal_single_ones(self, llama):
        """Left padding changes nothing but rounding, also for tokens decoded after it."""
        decoder = load(llama).model.decoder
        torch.manual_seed(0)
        inputs = [torch.randn(length, 32) for length in (5, 9, 2)]
        together, state = refrag.prefill(decoder, inputs)
        token = together.argmax(-1)
        next_together, _ = refrag.decode_one_token(decoder, token, state)
        for row, x in enumerate(inputs):
            alone, state_alone = refrag.prefill(decoder, [x])
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
            after, _ = refrag.decode_one_token(decoder, token[row : row + 1], state_alone)
            torch.testing.assert_close(next_together[row], after[0], rtol=1e-4, atol=1e-4)

    def test_the_first_token_copies_no_lm_head(self, llama):
        """torch's matmul in bfloat16 transposes a frozen head for a last position that is a slice of the others."""
        decoder = load(llama).model.decoder.bfloat16().requires_grad_(False)
        with torch.profiler.profile(record_shapes=True) as profile:
            refrag.prefill(decoder, [torch.randn(9, 32, dtype=torch.bfloat16)])
        copied = [math.prod(event.input_shapes[0]) for event in profile.events() if event.name == "aten::copy_"]
        assert copied and max(copied) < decoder.get_output_embeddings().weight.numel()

    @pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.7, 1.0])
    def test_realised_p_is_never_above_p(self, llama, p):
        metrics = ask(load(llama, pack={"p": p}))["metrics"]
        assert metrics["p_realised"] <= p
        assert metrics["compression"] == pytest.approx(metrics["full_positions"] / metrics["positions"], abs=1e-4)

    def test_stored_vectors_give_the_inputs_made_on_the_fly(self, index_dir, llama):
        """k = 4 is stored; k = 8 comes from it by averaging. float16 storage is part of both paths."""
        inputs = {}
        for stored, k in itertools.product((True, False), (4, 8)):
            pack = refrag.PackConfig(k=k, p=0.3, compressed="feed", gate="random")
            models = refrag.ModelConfig(dec=str(llama), enc="decoder:2")
            pipeline = refrag.load_pipeline(
                refrag.IndexConfig(index_dir=str(index_dir)), refrag.SearchConfig(topk=3), pack,
                refrag.GenerateConfig(), models, refrag.RuntimeConfig(quiet=True))
            torch.manual_seed(3)
            for weight in pipeline.model.projector.parameters():  # untrained, the states would not matter
                torch.nn.init.normal_(weight, std=0.3)
            if not stored:
                pipeline.stored = None
            context, inputs[stored, k] = pipeline.prepare({"id": "1", "question": "Where do smiths cast bells?"})
            assert (context.plan < 0).any() and (context.plan >= 0).any()
        for k in (4, 8):
            torch.testing.assert_close(inputs[True, k], inputs[False, k], rtol=5e-3, atol=5e-3)


class TestDecoding:
    def test_sample_is_greedy_at_temperature_zero(self):
        assert refrag.sample(torch.tensor([[0.1, 3.0, 2.0]]), 0.0, 1.0, None).tolist() == [1]

    def test_top_p_leaves_only_the_smallest_sufficient_set(self):
        """Probabilities .5, .3, .2: top_p = .6 needs the first two, so the third never comes."""
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(2000, 3)
        picked = refrag.sample(logits, 1.0, 0.6, torch.Generator().manual_seed(0))
        shares = torch.bincount(picked, minlength=3) / 2000
        assert shares[2] == 0
        assert shares[0] == pytest.approx(0.5 / 0.8, abs=0.05)

    def test_temperature_sharpens(self):
        logits = torch.tensor([[1.0, 0.0]]).expand(2000, 2)
        share = lambda t: refrag.sample(logits, t, 1.0, torch.Generator().manual_seed(0)).float().mean()  # noqa: E731
        assert share(0.2) < share(1.0) < share(5.0)

    def test_same_seed_same_answer(self, llama):
        first, second = (ask(load(llama, temperature=1.5, max_new=12))["answer"] for _ in range(2))
        assert first == second

    def test_every_end_token_stops(self, llama):
        pipeline = load(llama, pack={"p": 1.0})
        free = ask(pipeline)["metrics"]["new_tokens"]
        _, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        logits, _ = refrag.prefill(pipeline.model.decoder, [inputs])
        first = int(logits.argmax())
        pipeline.model.decoder.generation_config.eos_token_id = [2, first]
        pipeline.stops = refrag.stop_tokens(pipeline.model.decoder, pipeline.tokenizer.decoder)
        assert {2, first} <= pipeline.stops
        assert free > 0
        assert ask(pipeline)["metrics"]["new_tokens"] == 0

    def test_stream_writes_the_text_once_and_whole_characters(self, tokenizers):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
        ids = tokenizer("a 🙂 é 日本 b", add_special_tokens=False)["input_ids"]
        pieces = []
        stream = refrag.TextStream(tokenizer, (), pieces.append)
        for n in range(1, len(ids) + 1):
            assert not stream(ids[:n])
        stream.show(stream.text(ids))
        assert "".join(pieces) == "a 🙂 é 日本 b"
        assert not any("\ufffd" in piece for piece in pieces)

    def test_times_by_a_fake_clock(self, llama):
        """Tokens sampled at 10, 11, 12, ..: the time between tokens is 1 whatever the machine does."""
        pipeline = load(llama, pack={"p": 1.0}, max_new=4)
        ticks = itertools.count(10.0)
        out = refrag.Decoded([5, 6, 7], [next(ticks) for _ in range(4)], True)
        context, _ = pipeline.prepare({"id": "1", "question": PROMPT})
        context.seconds = {"retrieve_s": 1.0, "gate_s": 2.0, "vectors_s": 3.0, "pack_s": 4.0, "prefill_s": 5.0}
        metrics = pipeline.metrics(context, out)
        assert metrics["ttit_s"] == 1.0
        assert metrics["tokens_per_s"] == 1.0
        assert metrics["ttft_s"] == 15.0


class TestStops:
    """Texts that end an answer. The tiny decoder says the same each time, so any part of it can be the stop."""

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_the_answer_ends_before_the_first_stop(self, llama, length):
        full = ask(load(llama, max_new=12))["answer"]
        at = len(full) // 2
        stop = full[at : at + length]
        pieces: list[str] = []
        pipeline = load(llama, max_new=12, stop=("never said", stop))
        [result] = pipeline.answer([{"id": "1", "question": PROMPT}], lambda row, text: pieces.append(text))
        assert result["answer"] == full[: full.index(stop)].rstrip() == "".join(pieces)
        assert result["ended"] and result["metrics"]["new_tokens"] < 12
        assert ask(pipeline)["answer"] == result["answer"], "the same without a stream"

    def test_no_part_of_a_stop_is_streamed(self, tokenizers):
        """A stop of several tokens: its beginning is held back until it is sure to be something else."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
        pieces: list[str] = []
        stream = refrag.TextStream(tokenizer, ("city END",), pieces.append)
        ids = tokenizer("The city ENTERS the city END of it", add_special_tokens=False)["input_ids"]
        stopped = [bool(stream(ids[:n])) for n in range(1, len(ids) + 1)]
        assert stopped[-1] and "".join(pieces) == "The city ENTERS the"
        stream.show(stream.text(ids).rstrip())
        assert "".join(pieces) == "The city ENTERS the"

    def test_a_citation_that_holds_the_stop_is_not_added(self, llama):
        assert cited(load(llama, cite=True, pack={"p": 1.0}, stop=("[",)), "Bells") == ("Bells", None)

    def test_a_citation_at_the_end_is_streamed_once_it_is_settled(self, tokenizers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
        pieces: list[str] = []
        stream = refrag.TextStream(tokenizer, (), pieces.append)
        ids = tokenizer("Ulm [1] and Bonn [2]", add_special_tokens=False)["input_ids"]
        for n in range(1, len(ids) + 1):
            stream(ids[:n])
        assert "".join(pieces) == "Ulm [1] and Bonn"
        stream.show("Ulm [1] and Bonn [3]")
        assert "".join(pieces) == "Ulm [1] and Bonn [3]"


class TestCitations:
    @pytest.mark.parametrize(
        ("answer", "labels", "expected"),
        [
            ("Ulm [1].", ["1", "2"], [("1", False)]),
            ("Ulm [2][9]", ["1", "2"], [("2", False), ("9", True)]),
            ("Both [1, 2] and [1]", ["1", "2"], [("1", False), ("2", False)]),
            ("See (doc 2) or [document 1]", ["1", "2"], [("2", False), ("1", False)]),
            ('It says so <doc id="3">', ["1"], [("3", True)]),
            ("He [sic] left in [1896]", ["1", "2"], []),
            ("Nothing (1900) here, f(1) there", ["1"], []),
            ("Ulm [1] [a]", ["a"], [("1", True), ("a", False)]),
            ("Named [intro]", ["intro", "end"], [("intro", False)]),
            ("", ["1"], []),
        ],
    )
    def test_cited_labels(self, answer, labels, expected):
        assert refrag.cited_labels(answer, labels) == expected

    def test_the_window_has_room_for_a_citation_that_is_chosen(self, llama, monkeypatch):
        """Prompt and answer end at the window's last position; a citation after them would go beyond it."""
        pipeline = load(llama, cite=True)
        positions = len(pipeline.prepare({"id": "1", "question": PROMPT})[0].plan)
        monkeypatch.setattr(refrag.RefragModel, "window", positions + 6)
        assert len(ask(load(llama, cite=False))["answer"]) > 0
        with pytest.raises(refrag.UserError, match=f"--max_new 6 and a citation {refrag.CITATION_TOKENS}; the"):
            ask(pipeline)

    def test_no_citation_is_longer_than_its_room(self, llama):
        """Ids that are alike for a hundred tokens are not told apart to the last one."""
        pipeline, fed = load(llama), []
        tokenizer, decoder = pipeline.tokenizer.decoder, pipeline.model.decoder
        _, state = refrag.prefill(decoder, [torch.randn(5, decoder.config.hidden_size)])
        step = refrag.decode_one_token
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(refrag, "decode_one_token", lambda *given: fed.append(1) or step(*given))
            chosen, _ = refrag.choose_citation(decoder, tokenizer, state, 0, [], ["q" * 100 + "a", "q" * 100 + "bb"])
        assert chosen == "q" * 100 + "a" and len(fed) <= refrag.CITATION_TOKENS

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
    def test_logits_that_are_no_numbers_are_an_error(self, llama, spoiled, temperature):
        """Of the prompt, and of a later token alone."""
        pipeline = load(llama, temperature=temperature)
        head = pipeline.model.decoder.lm_head.weight
        with torch.no_grad():
            head.fill_(spoiled)
        with pytest.raises(refrag.CorruptError, match="decoder gives values that are not finite"):
            ask(pipeline)
        decoder = load(llama).model.decoder
        logits, state = refrag.prefill(decoder, [torch.randn(5, decoder.config.hidden_size)])
        with torch.no_grad():
            decoder.lm_head.weight.fill_(spoiled)
        with pytest.raises(refrag.CorruptError, match="decoder gives"):
            refrag.decode(decoder, logits, state, max_new=3, stops=frozenset(), pick=pipeline.pick,
                          watch=refrag.Stopwatch(torch.device("cpu")))

    def test_a_damaged_decoder_is_refused_when_it_is_loaded(self, llama, monkeypatch):
        load_decoder = refrag.load_decoder

        def damaged(*given):
            decoder = load_decoder(*given)
            decoder.model.layers[2].mlp.up_proj.weight.data[3, 3] = math.nan  # beyond the encoder's layers
            return decoder

        monkeypatch.setattr(refrag, "load_decoder", damaged)
        with pytest.raises(refrag.CorruptError, match="decoder gives"):
            load(llama)

    def test_a_temperature_near_zero_is_greedy(self):
        logits = torch.tensor([[1.0, 3.0, 2.0]])
        assert refrag.sample(logits, 1e-40, 1.0, None).tolist() == [1]

    def test_a_chosen_citation_is_always_one_of_the_given(self, any_decoder):
        result = ask(load(any_decoder, cite=True))
        if result["answer"]:
            [citation] = result["citations"]
            assert citation["chosen"] and not citation["forged"] and citation["id"] in {"a", "b"}
            assert result["answer"].endswith(f"[{citation['id']}]")

    def test_choice_follows_the_decoder(self, llama):
        """Against scoring " [id]" for each id by a full forward: the choice is greedy, token by token."""
        pipeline = load(llama, pack={"p": 1.0}, max_new=5)
        context, inputs = pipeline.prepare({"id": "1", "question": PROMPT})
        decoder, tokenizer = pipeline.model.decoder, pipeline.tokenizer.decoder
        logits, state = refrag.prefill(decoder, [inputs])
        [out], state = refrag.decode(decoder, logits, state, max_new=5, stops=frozenset(), pick=pipeline.pick,
                                     watch=refrag.Stopwatch(torch.device("cpu")))
        chosen, _ = refrag.choose_citation(decoder, tokenizer, state, 0, out.tokens[-1:], ["a", "b", "c"])
        opening = tokenizer(" [", add_special_tokens=False)["input_ids"]
        ids = [*context.packed.prompt.input_ids.tolist(), *out.tokens, *opening]
        with torch.inference_mode():
            last = decoder(input_ids=torch.tensor([ids])).logits[0, -1]
        options = {label: tokenizer(f"{label}]", add_special_tokens=False)["input_ids"][0] for label in "abc"}
        assert len(set(options.values())) == 3
        assert chosen == max(options, key=lambda label: float(last[options[label]]))

    @pytest.mark.parametrize(
        ("answer", "plain", "begun"),
        [
            ("Ulm [1]", "Ulm", None), ("Ulm [1] [2]", "Ulm [1]", None), ("Ulm [1, 2]", "Ulm", None),
            ("Ulm", "Ulm", None), ("Ulm [1", "Ulm", "1"),
            ("Ulm [", "Ulm", ""), ("Ulm [12]", "Ulm", None), ("Ulm [sic]", "Ulm [sic]", None),
            ("f(x) [unfinished", "f(x) [unfinished", None), ("[1]", "", None), ("", "", None),
        ],
    )
    def test_split_citation(self, answer, plain, begun):
        assert refrag.split_citation(answer, ["1", "2"]) == (plain, begun)

    @pytest.mark.parametrize(("said", "left"), [
        ("Not in the documents.", "Not in the documents."), ("Not in the documents. [a]", "Not in the documents."),
        ("It is not in the documents [a", "It is not in the documents"), ("Not in the documents [a].",
                                                                          "Not in the documents."),
        ("Not in the documents. [a] [b]", "Not in the documents."), ("Not in the documents (doc 1)",
                                                                     "Not in the documents (doc 1)"), ("", "")])
    def test_a_refusal_cites_nothing(self, llama, tokenizers, said, left):
        """Nor does its stream show a citation that is taken away again."""
        assert cited(load(llama, cite=True), said) == (left, None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
        pieces: list[str] = []
        stream, ids = refrag.TextStream(tokenizer, (), pieces.append), tokenizer(said)["input_ids"]
        for n in range(1, len(ids) + 1):
            stream(ids[:n])
        stream.show(left)
        assert "".join(pieces) == left

    def test_an_answer_without_documents_is_left_as_it_is(self, llama):
        """A number in brackets at its end is no citation there."""
        pipeline = load(llama, cite=True)
        item = {"id": "1", "question": "Which element?"}
        context, _ = pipeline.prepare(item)
        assert context.labels == [] and cited(pipeline, "return a[0]", context) == ("return a[0]", None)
        [result] = pipeline.answer([item])
        assert result["citations"] == []

    def test_yes_and_no_stand_anywhere(self, llama):
        pipeline = load(llama, cite=True, pack={"p": 1.0})
        context, _ = pipeline.prepare({"id": "1", "question": "Is it? <doc id='a'>No bells.</doc> <doc id='b'>x</doc>"})
        assert cited(pipeline, "No [b]", context) == ("No [b]", None)

    def test_the_end_of_an_answer_is_found_in_no_time(self):
        """Blanks and brackets in any number: the work grows with their number, not with its cube."""
        for text in ("a" + " " * 50_000 + "x", "[" * 50_000, "a [" + " " * 50_000, "]" * 50_000):
            assert refrag.settled_length(text) <= len(text)
            refrag.citation_marks(text, ["1"])

    def test_the_citation_is_where_the_answer_stands(self, llama):
        """In one document alone: there, whatever the decoder wrote at its end. Else what it wrote counts."""
        pipeline = load(llama, cite=True, pack={"p": 1.0})
        assert cited(pipeline, "old city") == ("old city [a]", "a")
        assert cited(pipeline, "Bells [a]") == ("Bells [b]", "b")
        assert cited(pipeline, "bells [b]") == ("bells [b]", None)
        assert cited(pipeline, "Paris [a]") == ("Paris [a]", None)
        assert cited(pipeline, "Paris [1]")[0].startswith("Paris [1] ["), "a forged mark stays, to be flagged"

    def test_an_unfinished_citation_is_completed(self, llama):
        pipeline = load(llama, cite=True, pack={"p": 1.0})
        assert cited(pipeline, "Paris [a") == ("Paris [a]", "a")
        assert cited(pipeline, "Bells [") == ("Bells [b]", "b")
        assert cited(pipeline, "Paris [a], Bonn [b")[0] == "Paris [a], Bonn [b]"

    def test_what_was_left_out_is_never_cited(self, llama):
        """Nothing of b was read: it can not be chosen. Nothing was read at all: nothing is cited."""
        pipeline = load(llama, cite=True, pack={"p": 0.5, "compressed": "drop"})
        context, _ = pipeline.prepare({"id": "1", "question": PROMPT})
        first = np.asarray([chunk.doc == 0 for chunk in context.packed.prompt.chunks])
        for expanded, read, answer in ((first, ["text", "left out"], "Bells [a]"), (first & False, ["left out"] * 2,
                                                                                    "Bells")):
            prompt = context.packed.prompt
            seen = dataclasses.replace(context, expanded=expanded, kept=refrag.text_mask(prompt, expanded),
                                       plan=refrag.mixed_plan(prompt, expanded, feed=False))
            assert seen.read == read
            assert cited(pipeline, "Bells", seen)[0] == answer

    def test_how_documents_were_read(self, llama):
        """A document of several chunks, of which the first alone stays text, is partly read as text."""
        pipeline = load(llama, pack={"p": 0.0})
        context, _ = pipeline.prepare({"id": "1", "question": PROMPT})
        assert context.read == ["vectors", "vectors"]
        some = np.arange(len(context.packed.prompt.chunks)) == 0
        kept = refrag.text_mask(context.packed.prompt, some)
        assert dataclasses.replace(context, kept=kept).read == ["partly", "vectors"]
        kept = refrag.truncated_mask(context.packed.prompt, len(context.packed.prompt.input_ids) - 3)
        cut = dataclasses.replace(context, kept=kept, plan=context.packed.prompt.input_ids[kept])
        assert cut.read[0] == "text", "the last document is cut first"
        assert cut.read[1] in ("partly", "left out")
        assert load(llama, pack={"p": 1.0}).prepare({"id": "1", "question": PROMPT})[0].read == ["text", "text"]

    def test_what_was_not_read_is_said(self, tmp_path, run, llama):
        """Nothing found: no citation, and a line that says so. Found but left out: a line that says that."""
        (tmp_path / "c.txt").write_text("Seven bridges cross the old city.\n", encoding="utf-8")
        models = ["--dec", llama, "--enc", "decoder:2"]
        assert run("index", "--corpus", tmp_path / "c.txt", "--index_dir", tmp_path / "i", "--retriever", "bm25",
                   *models)[0] == 0
        ask = ["generate", "--index_dir", tmp_path / "i", *models, "--max_new", "4", "--gate", "blend"]
        _, out, _ = run(*ask, "--question", "zebra?")
        assert "\nno citation\nno passage was found: the answer is the decoder's own\n" in out
        _, out, _ = run(*ask, "--question", "bridges?", "--p", "0", "--compressed", "drop")
        assert "\nno citation\nno passage was read as text\n" in out
        _, out, _ = run(*ask, "--question", "bridges?")
        assert "no passage" not in out

    def test_no_cite_leaves_the_answer_alone(self, llama):
        assert ask(load(llama, cite=False))["citations"] == []


class TestModes:
    def test_truncate_feeds_no_more_positions_than_refrag(self, llama):
        refrag_positions = ask(load(llama, pack={"p": 0.2}))["metrics"]["positions"]
        pipeline = load(llama, pack={"p": 0.2, "mode": "truncate"})
        context, _ = pipeline.prepare({"id": "1", "question": PROMPT})
        assert (context.plan >= 0).all()
        assert len(context.plan) <= refrag_positions

    def test_drop_leaves_out_what_feed_would_compress(self, llama):
        fed, dropped = (ask(load(llama, pack={"p": 0.3, "compressed": c})) for c in ("feed", "drop"))
        compressed = sum(not chunk["expanded"] for chunk in fed["chunks"])
        assert compressed > 0
        assert fed["metrics"]["positions"] - dropped["metrics"]["positions"] == compressed

    def test_untrained_default_is_said(self, llama):
        result = ask(load(llama, pack={"compressed": "auto"}))
        assert result["settings"]["projector_trained"] is False
        assert result["settings"]["compressed"] == "drop"

    def test_none_reads_no_document(self, index_dir, llama, run):
        code, out, _ = run("generate", "--index_dir", index_dir, "--question", "Where?", "--mode", "none", "--dec",
                           llama, "--max_new", 3, *FED)
        result = json.loads(out)
        assert code == 0
        assert result["passages"] == [] and result["metrics"]["context_tokens"] == 0


def generate(run, index_dir, llama, *more):
    """`generate` on the small index; (exit code, stdout, stderr)."""
    return run("generate", "--index_dir", index_dir, "--dec", llama, "--k", 4, "--max_new", 4, *FED, *more)


class TestCommand:
    def test_result_has_the_promised_fields(self, run, index_dir, llama):
        code, out, _ = generate(run, index_dir, llama, "--question", "What melts?", "--topk", 3, "--compare")
        result = json.loads(out)
        assert code == 0
        assert {"question", "answer", "passages", "citations", "chunks", "metrics", "settings", "full",
                "ttft_ratio"} <= result.keys()
        assert {"ttft_s", "ttit_s", "tokens_per_s", "new_tokens", "positions", "full_positions", "compression",
                "p_realised", "stages", "load_s", "peak_rss_mb"} <= result["metrics"].keys()
        stages = result["metrics"]["stages"]
        assert set(stages) == {"retrieve_s", "gate_s", "vectors_s", "pack_s", "prefill_s"}
        assert sum(stages.values()) == pytest.approx(result["metrics"]["ttft_s"], abs=1e-5)
        for chunk in result["chunks"]:
            assert {"passage_id", "start", "end", "score", "expanded"} <= chunk.keys()
        assert result["full"]["metrics"]["positions"] == result["metrics"]["full_positions"]
        assert result["ttft_ratio"] == pytest.approx(
            result["full"]["metrics"]["ttft_s"] / result["metrics"]["ttft_s"], abs=1e-3)

    def test_chunks_of_each_passage_cover_its_content(self, run, index_dir, llama):
        _, out, _ = generate(run, index_dir, llama, "--question", "What melts?", "--topk", 3)
        result = json.loads(out)
        for passage in result["passages"]:
            content = refrag.passage_content(passage["title"], passage["text"])
            chunks = [c for c in result["chunks"] if c["passage_id"] == passage["id"]]
            assert "".join(content[c["start"] : c["end"]] for c in chunks) == content

    def test_ctx_max_drops_whole_passages_from_the_lowest_rank(self, run, index_dir, llama):
        _, out, _ = generate(run, index_dir, llama, "--question", "What melts?", "--topk", 6)
        everything = json.loads(out)
        limit = everything["metrics"]["context_tokens"] // 2
        _, out, _ = generate(run, index_dir, llama, "--question", "What melts?", "--topk", 6, "--ctx_max", limit)
        some = json.loads(out)
        assert 0 < some["metrics"]["context_tokens"] <= limit
        assert some["dropped_passages"] == 6 - len(some["passages"]) > 0
        assert some["passages"] == everything["passages"][: len(some["passages"])]

    def test_window_is_checked_before_the_prefill(self, run, index_dir, llama):
        code, out, err = generate(run, index_dir, llama, "--question", "What melts?", "--max_new", 5000)
        assert code == 2
        assert "window is 2048" in err
        assert json.loads(out)["error"]["code"] == 2

    def test_prompt_with_literal_documents(self, run, llama):
        code, out, _ = run("generate", "--prompt", PROMPT, "--dec", llama, "--gate", "random", "--k", 4, "--max_new",
                           3, *FED)
        result = json.loads(out)
        assert code == 0
        assert {chunk["passage_id"] for chunk in result["chunks"]} == {"a", "b"}

    def test_show_prompt_marks_what_is_compressed(self, run, llama):
        code, _, err = run("generate", "--prompt", PROMPT, "--dec", llama, "--gate", "none", "--k", 4, "--max_new", 2,
                           "--enc", "decoder:2", "--compressed", "feed", "--show_prompt")
        assert code == 0
        assert '<doc id="a">\n[[' in err and "]][[" in err

    def test_text_output_streams_the_answer_that_json_gives(self, run, llama):
        arguments = ["generate", "--prompt", PROMPT, "--dec", llama, "--gate", "none", "--k", 4, "--max_new", 6,
                     "--enc", "decoder:2", "--compressed", "feed", "--quiet"]
        _, out, _ = run(*arguments, "--json")
        for option in ("--stream", "--no_stream"):
            _, text, _ = run(*arguments, option)
            assert text.strip().startswith(refrag.visible(json.loads(out)["answer"]))

    def test_resume_continues_and_repairs(self, run, index_dir, llama, tmp_path):
        questions = tmp_path / "questions.jsonl"
        questions.write_text("".join(json.dumps({"id": f"q{i}", "question": f"What is {i}?"}) + "\n" for i in range(4)))
        whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
        assert generate(run, index_dir, llama, "--questions", questions, "--out", whole)[0] == 0
        lines = whole.read_text().splitlines(keepends=True)
        assert [json.loads(line)["id"] for line in lines] == ["q0", "q1", "q2", "q3"]
        part.write_text(lines[0] + lines[1] + lines[2][:50])  # killed while writing the third
        assert generate(run, index_dir, llama, "--questions", questions, "--out", part, "--resume")[0] == 0
        answers = [(r["id"], r["answer"]) for r in map(json.loads, part.read_text().splitlines())]
        assert answers == [(r["id"], r["answer"]) for r in map(json.loads, lines)]
        assert part.read_text().startswith(lines[0] + lines[1])  # what was done is not done again

    @pytest.mark.parametrize(("before", "after", "new"), [
        ("ab", "xab", "x"), ("ab", "ba", ""), ("ab", "aab", "a"), ("aab", "aaba", "a"), ("ab", "bcad", "cd")])
    def test_resume_answers_what_was_not_asked_yet(self, run, index_dir, llama, tmp_path, before, after, new):
        """Whatever ids they have: each letter is a question, and its id the number of its line."""
        questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
        for asked, more in ((before, []), (after, ["--resume"])):
            questions.write_text("".join(json.dumps({"question": f"What is {name}?"}) + "\n" for name in asked))
            assert generate(run, index_dir, llama, "--questions", questions, "--out", out, *more)[0] == 0
        answered = [json.loads(line)["question"][8] for line in out.read_text().splitlines()]
        assert answered == [*before, *new]
        ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
        assert len(set(ids)) == len(ids), "one that was taken is followed by -2"

    def test_json_of_a_file_of_questions_is_one_object(self, run, index_dir, llama, tmp_path):
        """The lines go to --out; without --json a person reads the answers."""
        questions, path = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
        questions.write_text("".join(json.dumps({"id": name, "question": f"Is it {name}?"}) + "\n" for name in "ab"))
        for more in ([], ["--out", path], ["--batch_size", 2]):
            _, out, _ = generate(run, index_dir, llama, "--questions", questions, *more)
            assert out.count("\n") == 1 and [r["id"] for r in json.loads(out)["results"]] == ["a", "b"]
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
        argv = ["generate", "--index_dir", index_dir, "--dec", llama, "--enc", "decoder:2", "--k", 4, "--max_new", 4,
                "--questions", questions]
        assert run(*argv, "--out", tmp_path / "other.jsonl")[1] == ""
        code, out, err = run(*argv)
        assert code == 0 and out.startswith("Is it a?\n") and "\n\nIs it b?\n" in out and "{" not in out
        assert (out + err).count("the projector is untrained") == 1

    def test_a_run_that_fails_is_one_object_too(self, run, index_dir, llama, tmp_path, monkeypatch):
        questions = tmp_path / "questions.jsonl"
        questions.write_text('{"question": "a"}\n{"question": "b"}\n')
        answer, calls = refrag.Pipeline.answer, []

        def fail_later(*given):
            calls.append(1)
            refrag.require(len(calls) < 2, "enough")
            return answer(*given)

        monkeypatch.setattr(refrag.Pipeline, "answer", fail_later)
        code, out, _ = generate(run, index_dir, llama, "--questions", questions)
        assert code == 2 and json.loads(out) == {"error": {"code": 2, "message": "enough"}}

    def test_by_default_a_shallow_decoder_lends_all_its_layers(self, run, any_decoder):
        argv = ["generate", "--prompt", PROMPT, "--gate", "none", "--k", 4, "--max_new", 2, "--json", "--dec",
                any_decoder]
        code, out, _ = run(*argv)
        assert code == 0 and json.loads(out)["settings"]["enc"] == "decoder:3"
        assert run(*argv, "--enc", "decoder:4")[2] == "error: --enc decoder:4: the decoder has 3 layers\n"

    def test_out_is_not_overwritten_nor_mixed(self, run, index_dir, llama, tmp_path):
        questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
        questions.write_text(json.dumps({"question": "What?"}) + "\n")
        generate(run, index_dir, llama, "--questions", questions, "--out", out)
        before = out.read_bytes()
        assert generate(run, index_dir, llama, "--questions", questions, "--out", out)[0] == 2
        for flag, *value in (["--p", "0.5"], ["--gate", "cosine"], ["--compressed", "drop"], ["--no_cite"],
                             ["--retriever", "bm25"], ["--seed", "3"], ["--topk", "1"]):
            again = ["--questions", questions, "--out", out, "--resume", flag, *value]
            code, _, err = generate(run, index_dir, llama, *again)
            assert code == 5 and f"--{flag.replace('no_', '').strip('-')} (" in err, flag
        assert out.read_bytes() == before
        with refrag.exclusive(tmp_path / ".out.jsonl.lock", "the test"):
            code, _, err = generate(run, index_dir, llama, "--questions", questions, "--out", out, "--resume")
        assert code == 75 and f"--out {out} is being written by another process" in err

    def test_vectors_of_another_encoder_are_refused(self, run, index_dir, llama):
        code, _, err = generate(run, index_dir, llama, "--question", "What?", "--enc", "decoder:1")
        assert code == 5
        assert "another encoder" in err

    def test_batches_give_the_answers_of_single_questions(self, run, index_dir, llama, tmp_path):
        questions = tmp_path / "questions.jsonl"
        questions.write_text("".join(json.dumps({"question": "What is it? " * (i + 1)}) + "\n" for i in range(3)))
        answers = []
        for size in (1, 3):
            _, out, _ = generate(run, index_dir, llama, "--questions", questions, "--batch_size", size)
            answers.append([result["answer"] for result in json.loads(out)["results"]])
        assert len(answers[0]) == 3
        assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The shipped reader over ten real passages."""
    folder = tmp_path_factory.mktemp("wiki") / "index"
    code = refrag.main(["index", "--corpus", str(refrag.Path(refrag.__file__).parent / "data/wiki_passages.jsonl"),
                        "--index_dir", str(folder), "--limit", "10", "--k", "8", "--quiet"])
    assert code == 0
    return refrag.load_pipeline(
        refrag.IndexConfig(index_dir=str(folder)), refrag.SearchConfig(topk=4), refrag.PackConfig(p=1.0),
        refrag.GenerateConfig(max_new=12), refrag.ReaderConfig(), refrag.RuntimeConfig(quiet=True))


class ExactMatrix:
    """In the place of the others: the same product without rounding."""

    kind = "exact"

    def __init__(self, weight, bias=None, columns=None):
        self.weight = weight.float() if columns is None else weight.float() * columns
        self.bias = 0 if bias is None else bias

    def __call__(self, x):
        return x.float() @ self.weight.T + self.bias


def step_both(decoder, stepper, inputs, steps, room, alive=None):
    """Logits (2, steps, B, V) by the decoder itself and by its stepper, fed the decoder's choices."""
    logits, state = refrag.prefill(decoder, inputs)
    states = [stepper.adopt(state, room), refrag.State(copy.deepcopy(state.cache), state.mask, state.position)]
    rows = []
    for _ in range(steps):
        token = logits.argmax(-1)
        pairs = [refrag.decode_one_token(decoder, token, one, alive) for one in states]
        states, logits = [one for _, one in pairs], pairs[1][0]
        rows.append([logits, pairs[0][0]])
    return torch.stack([torch.stack(side) for side in zip(*rows, strict=True)])


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def stepped(request, tmp_path_factory, tokenizers):
    """A decoder without and one with biases, here larger than zero."""
    folder = save_decoder(request.param, tmp_path_factory.mktemp("stepped"), tokenizers["bpe"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture()
def exact(monkeypatch):
    """Steps without rounding."""
    monkeypatch.setitem(cpu_engine.STEP_ENGINES, "auto", ExactMatrix)
    monkeypatch.setattr(cpu_engine, "Int8Matrix", ExactMatrix)


def in_sixteen_levels(shape, seed=0):
    """A matrix as a GGUF file of type Q4_1 has it: in each group of 32 columns the levels 0 to 15, scale and least."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 16, (shape[0], shape[1] // 32, 32))
    levels[..., 0], levels[..., 1] = 0, 15
    scale = rng.uniform(0.05, 0.1, (*levels.shape[:2], 1)).astype(np.float16)
    least = (-scale * rng.uniform(6, 9, scale.shape)).astype(np.float16)
    return torch.from_numpy((levels * scale.astype(np.float32) + least).reshape(shape).astype(np.float32))


class TestMatrices:
    def test_a_row_in_8_bits_is_kept_to_a_two_hundred_and_fifty_fourth_of_its_largest(self):
        torch.manual_seed(0)
        weight = torch.randn(8, 64) * torch.logspace(-3, 1, 8)[:, None]
        kept = cpu_engine.Int8Matrix(weight)
        error = (kept.values * kept.scale.float()[:, None] - weight).abs().amax(1)
        assert (error <= weight.abs().amax(1) * (1 / 254 + 2**-8)).all()

    @pytest.mark.parametrize("matrix", [cpu_engine.Int8Matrix, cpu_engine.Int4Matrix, cpu_engine.smallest_matrix])
    @pytest.mark.parametrize("rows", [1, 3, 17])
    def test_the_product_of_a_matrix_in_sixteen_levels(self, matrix, rows):
        torch.manual_seed(rows)
        weight, x = in_sixteen_levels((48, 96)), torch.randn(rows, 96)
        bias, columns = torch.randn(48), torch.rand(96) + 0.5
        expected = (x * columns) @ weight.T + bias
        got = matrix(weight, bias, columns)(x).float()
        assert (got - expected).norm() / expected.norm() < 0.02
        assert got.shape == expected.shape

    def test_4_bits_lose_less_of_such_a_matrix_than_8(self):
        torch.manual_seed(0)
        weight, x = in_sixteen_levels((64, 128)), torch.randn(4, 128)
        expected = x @ weight.T
        lost = {matrix: float((matrix(weight)(x).float() - expected).norm() / expected.norm())
                for matrix in (cpu_engine.Int4Matrix, cpu_engine.Int8Matrix)}
        assert lost[cpu_engine.Int4Matrix] < 0.005 < lost[cpu_engine.Int8Matrix]

    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    @pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
    def test_sixteen_levels_are_known(self, rounded):
        weight = in_sixteen_levels((32, 64)) * 1e-2
        assert cpu_engine.smallest_matrix(weight.to(rounded).float()).kind == "int4"
        assert cpu_engine.smallest_matrix(torch.randn(32, 64)).kind == "int8"
        weight[20, 40] += 0.3 * (weight[20].max() - weight[20].min()) / 15  # one weight between two levels
        assert cpu_engine.smallest_matrix(weight).kind == "int8"

    def test_a_constant_group_is_held(self):
        weight = in_sixteen_levels((16, 64))
        weight[3, 32:] = 0.25
        weight[4] = 0
        assert cpu_engine.Int4Matrix(weight).error < 1e-3
        made = cpu_engine.Int4Matrix(weight)(torch.ones(1, 64)).float()
        torch.testing.assert_close(made, weight.sum(1)[None], rtol=0.02, atol=0.05)

    def test_4_bits_are_taken_only_where_nothing_is_lost_and_the_kernel_is_fast(self, monkeypatch):
        assert cpu_engine.smallest_matrix(in_sixteen_levels((16, 32))).kind == "int4"
        assert cpu_engine.smallest_matrix(torch.randn(16, 32)).kind == "int8"
        assert cpu_engine.smallest_matrix(in_sixteen_levels((24, 32))).kind == "int8"  # rows the kernel does not take
        assert cpu_engine.smallest_matrix(torch.zeros(16, 48)).kind == "int8"  # no whole groups
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert cpu_engine.smallest_matrix(in_sixteen_levels((16, 32))).kind == "int8"


class TestStepper:
    @pytest.fixture()
    def decoder(self, stepped):
        return load(stepped).model.decoder

    @pytest.mark.parametrize(("lengths", "room"), [((7,), 12), ((5, 9, 2), 12), ((6,), 1)])
    def test_without_rounding_the_steps_are_the_decoder_s(self, decoder, exact, lengths, room):
        """Alone, padded in a batch, and past the room that was made."""
        torch.manual_seed(0)
        stepper = cpu_engine.Stepper(decoder)
        expected, got = step_both(decoder, stepper, [torch.randn(n, 32) for n in lengths], 6, room)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)

    def test_a_sequence_that_has_ended_is_hidden_from_the_rest(self, decoder, exact):
        torch.manual_seed(0)
        alive, inputs = torch.tensor([True, False]), [torch.randn(4, 32) for _ in range(2)]
        expected, got = step_both(decoder, cpu_engine.Stepper(decoder), inputs, 3, 8, alive)
        torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("engine", ["int8", "int4"])
    def test_rounding_moves_logits_by_little(self, decoder, engine):
        torch.manual_seed(0)
        expected, got = step_both(decoder, cpu_engine.Stepper(decoder, engine), [torch.randn(9, 32)], 6, 8)
        assert 0 < (got - expected).abs().max() < {"int8": 0.4, "int4": 3}[engine] * expected.std()

    def test_weights_in_sixteen_levels_are_kept_in_4_bits(self, decoder):
        for name, parameter in decoder.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data = in_sixteen_levels(parameter.shape, len(name)) * 0.1
        torch.manual_seed(0)
        stepper = cpu_engine.Stepper(decoder)
        expected, got = step_both(decoder, stepper, [torch.randn(9, 32)], 6, 8)
        assert stepper.engine == "int4"
        assert 0 < (got - expected).abs().max() < 0.2 * expected.std()

    def test_layers_that_were_changed_are_kept_in_8_bits(self, decoder):
        for name, parameter in decoder.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.data = in_sixteen_levels(parameter.shape)
        assert cpu_engine.Stepper(decoder).engine == "int4+int8"

    def test_only_decoders_that_it_computes_exactly(self, any_decoder):
        decoder = load(any_decoder).model.decoder
        assert cpu_engine.Stepper.fits(decoder) == (decoder.config.model_type in ("llama", "qwen2"))

    def test_a_changed_layer_does_not_fit(self, decoder):
        assert cpu_engine.Stepper.fits(decoder)
        decoder.model.layers[0].mlp.up_proj = torch.nn.Sequential(decoder.model.layers[0].mlp.up_proj)
        assert not cpu_engine.Stepper.fits(decoder)

    @pytest.mark.parametrize(("size", "fits"), [(48, True), (40, False)])
    def test_widths_that_the_kernel_can_not_read_do_not_fit(self, size, fits):
        """torch's kernel takes sixteen columns at once and does not look whether so many are left."""
        config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=size, num_hidden_layers=1,
                                          num_attention_heads=4)
        assert cpu_engine.Stepper.fits(transformers.LlamaForCausalLM(config)) == fits

    def test_the_engine_can_be_chosen(self, llama, run):
        ask = ["generate", "--prompt", PROMPT, "--dec", llama, *FED, "--k", "4", "--max_new", "3"]
        for engine, used in (("model", "model"), ("int8", "int8"), ("int4", "int4"), ("auto", "int8")):
            code, out, err = run(*ask, "--engine", engine)
            assert code == 0, err
            assert json.loads(out)["settings"]["engine"] == used

    def test_an_engine_for_another_decoder_is_an_error(self, tmp_path_factory, tokenizers, run):
        gpt2 = save_decoder("gpt2", tmp_path_factory.mktemp("gpt2"), tokenizers["plain_bpe"])
        code, _, err = run("generate", "--prompt", PROMPT, "--dec", gpt2, *FED, "--k", "4", "--engine", "int8")
        assert code == 2 and "--engine int8" in err


SHORT = [  # passages as a newcomer writes them, with a question each
    ("The password of the staff wifi in the Ghent office is turnip-42. Guests use the other network, which has no "
     "password at all.", "What is the password of the staff wifi?", "turnip-42"),
    ("The bakery in Bruges opens at six.", "When does the bakery in Bruges open?", "six"),
    ("The library in Leuven lends maps.", "What does the library in Leuven lend?", "maps"),
    ("The harbour office in Ghent closes at four.", "When does the harbour office in Ghent close?", "four"),
    ("The pool in Mons is closed on Monday.", "On which day is the pool in Mons closed?", "Monday"),
    ("Room 12 is booked by Ines for the budget meeting.", "Who booked room 12?", "Ines"),
    ("The spare key hangs behind the boiler in the cellar.", "Where does the spare key hang?", "boiler"),
    ("The museum in Namur was founded in 1874 by a baker.", "When was the museum in Namur founded?", "1874"),
]


@pytest.mark.models
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 4), (1, 5), (0, 8)])
def test_short_corpora_are_read_by_default(tmp_path, pipeline, first, last):
    """One to eight passages of a line, the default settings: every answer is right and cites its passage."""
    facts = SHORT[first:last]
    (tmp_path / "notes.txt").write_text("".join(f"{text}\n" for text, _, _ in facts), encoding="utf-8")
    assert refrag.main(["index", "--corpus", str(tmp_path / "notes.txt"), "--index_dir", str(tmp_path / "i"),
                        "--quiet"]) == 0
    searcher = refrag.Searcher(refrag.open_index(str(tmp_path / "i")), "hybrid", pipeline.embedder)
    short = refrag.Pipeline(pipeline.model, searcher, pipeline.embedder, refrag.SearchConfig(), refrag.PackConfig(),
                            pipeline.generate, pipeline.runtime)
    for text, question, answer in facts:
        [result] = short.answer([{"id": "1", "question": question}])
        assert answer in result["answer"], (question, result["answer"])
        cited = [passage for passage in result["passages"] if passage["id"] == result["citations"][0]["id"]]
        assert cited[0]["text"] == text and cited[0]["read"] in ("text", "partly")


@pytest.mark.models
class TestBundledModels:
    """The same promises on SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""

    def test_p1_is_the_chat_template_over_the_full_text(self, pipeline):
        item = {"id": "1", "question": "Who wrote De Materia Medica?"}
        context, inputs = pipeline.prepare(item)
        docs = "".join(f'<doc id="{d.label}">\n{d.content}\n</doc>\n' for d in context.packed.docs)
        pieces = refrag.question_pieces(item["question"], context.packed.docs)
        message = "".join(p if isinstance(p, str) else f'<doc id="{p.label}">\n{p.content}\n</doc>' for p in pieces)
        assert docs in message
        plain = pipeline.tokenizer.decoder.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert context.plan.tolist() == plain
        logits, _ = refrag.prefill(pipeline.model.decoder, [inputs])
        with torch.inference_mode():
            expected = pipeline.model.decoder(input_ids=torch.tensor([plain]), logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)

    def test_batch_equals_single(self, pipeline):
        items = [{"id": str(i), "question": q} for i, q in enumerate(["What is botany?", "Who coined the term cells?"])]
        alone = [pipeline.answer([item])[0]["answer"] for item in items]
        assert [r["answer"] for r in pipeline.answer(items)] == alone

    def test_decoding_equals_generate_of_transformers(self, pipeline):
        """An independent decoder loop, fed the same embeddings."""
        _, inputs = pipeline.prepare({"id": "1", "question": "What is botany?"})
        logits, state = refrag.prefill(pipeline.model.decoder, [inputs])
        [out], _ = refrag.decode(pipeline.model.decoder, logits, state, max_new=12, stops=pipeline.stops,
                                 pick=pipeline.pick, watch=refrag.Stopwatch(torch.device("cpu")))
        expected = pipeline.model.decoder.generate(inputs_embeds=inputs[None], max_new_tokens=12, do_sample=False,
                                                   attention_mask=torch.ones(1, len(inputs), dtype=torch.long))
        assert out.tokens == [t for t in expected[0].tolist() if t not in pipeline.stops]
