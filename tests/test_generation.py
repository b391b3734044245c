"""Section 11: prefill, decode, citations, metrics, and `generate` through the command line."""

import dataclasses
import functools
import itertools
import json
import math
import shutil

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import ATTENTION, SMALL, TEXTS

import refrag
from refrag_extras import cpu_engine

PROMPT = ("Where? <doc id='a'>Seven bridges cross the old city, and it floods in May.</doc> "
          "<doc id='b'>Bells.</doc> Say:")
ITEM = {"id": "1", "question": PROMPT}
LITERAL = ["generate", "--prompt", PROMPT, "--gate", "none", "--k", 4, "--max_new", 6, "--dec"]
FED = ["--enc", "decoder:2", "--compressed", "feed", "--json", "--quiet"]
WATCH = refrag.Stopwatch(torch.device("cpu"))


def load(decoder, **options):
    usual = {"prompt": PROMPT, "k": 4, "floor": 0, "gate": "random", "compressed": "feed", "max_new": 6, "cite": False}
    return refrag.open_pipeline(dec=str(decoder), enc="decoder:2", load_dir="none", **(usual | options))


@pytest.fixture(scope="module")
def tiny(llama):
    return load(llama)


@pytest.fixture(scope="module")
def reader(any_decoder):
    return load(any_decoder)


def read(pipeline, **changes):
    return pipeline.prepare(ITEM, pipeline.settings_for(**changes))


def run_decoder(pipeline, inputs, max_new, stops=frozenset()):
    logits, state = refrag.prefill(pipeline.model.decoder, [inputs])
    [out], state = refrag.decode(pipeline.model.decoder, logits, state, max_new=max_new, stops=stops,
                                 pick=lambda logits: logits.argmax(-1), watch=WATCH)
    return out, state


@torch.inference_mode()
def plain_logits(decoder, ids):
    """Logits after the last of these tokens, by one forward over all of them: the oracle."""
    return decoder(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


class TestExactness:
    def test_p1_feeds_the_plain_prompt_and_gives_its_logits(self, reader):
        reading = read(reader, p=1.0)
        tokenizer = reader.tokenizer.decoder
        message = PROMPT.replace("<doc id='a'>", '<doc id="a">\n').replace("<doc id='b'>", '<doc id="b">\n')
        message = message.replace("</doc>", "\n</doc>")
        if tokenizer.chat_template:
            plain = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)
            plain = plain["input_ids"] if not isinstance(plain, list) else plain
        else:
            plain = tokenizer(message + refrag.NO_TEMPLATE_SUFFIX)["input_ids"]
        assert reading.plan.tolist() == reading.context.prompt.input_ids.tolist() == plain
        logits, _ = refrag.prefill(reader.model.decoder, [reading.inputs])
        torch.testing.assert_close(logits[0], plain_logits(reader.model.decoder, plain), rtol=1e-4, atol=1e-4)

    def test_p0_feeds_no_token_of_the_content_and_vectors_where_it_stood(self, reader):
        """The inputs at vector positions are the means of the chunks' token embeddings, in order."""
        reading = read(reader, p=0.0)
        embed, prompt = reader.model.decoder.get_input_embeddings().weight, reading.context.prompt
        inside = [t for c in prompt.chunks for t in range(c.first, c.last)]
        assert inside and not reading.kept[inside].any()
        assert len(reading.inputs) == len(prompt.input_ids) - len(inside) + len(prompt.chunks)
        for position, chunk in zip(np.flatnonzero(reading.plan < 0), prompt.chunks, strict=True):
            mean = embed[prompt.input_ids[chunk.first : chunk.last]].mean(0)
            torch.testing.assert_close(reading.inputs[position], mean)

    def test_cached_decode_equals_full_forwards(self, reader):
        reading, stops = read(reader, p=1.0), reader.settings.stop_tokens
        ids, expected = reading.context.prompt.input_ids.tolist(), []
        while len(expected) < 12 and (
                token := int(plain_logits(reader.model.decoder, ids + expected).argmax())) not in stops:
            expected.append(token)
        assert run_decoder(reader, reading.inputs, 12, stops)[0].tokens == expected

    def test_batch_equals_single(self, reader):
        settings = reader.settings_for(p=0.3, max_new=8, cite=True)
        items = [{"id": str(i), "question": PROMPT + " word" * (5 * i)} for i in range(3)]
        alone = [reader.answer_batch([item], settings)[0] for item in items]
        for one, other in zip(reader.answer_batch(items, settings), alone, strict=True):
            assert one["answer"] == other["answer"] and one["citations"] == other["citations"]
            assert one["metrics"]["positions"] == other["metrics"]["positions"]

    def test_layers_that_attend_and_recur_at_once_read_prompts_one_by_one(self, tmp_path, tokenizers, monkeypatch):
        monkeypatch.setitem(conftest.DECODERS, "falcon_h1", lambda: transformers.FalconH1Config(
            **SMALL, **ATTENTION, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8))
        reader = load(conftest.save_decoder("falcon_h1", tmp_path / "decoder", tokenizers["bpe"]))
        items = [ITEM, ITEM | {"question": PROMPT + " word"}]
        alone = [reader.answer_batch([item])[0]["answer"] for item in items]
        assert [one["answer"] for one in reader.answer_batch(items)] == alone
        ids = read(reader, p=1.0).plan.tolist()
        [out], *_ = reader.write([read(reader, p=1.0)], None)
        assert plain_logits(reader.model.decoder, ids + out.tokens[:-1]).argmax() == out.tokens[-1]

    @pytest.mark.parametrize(("engine", "reads"), [("model", False), ("int8", False), ("int8", True)])
    def test_in_bfloat16_a_batch_is_what_each_is_alone(self, llama, index_dir, engine, reads, integers, monkeypatch):
        """Exactly, though a CPU's products in bfloat16 round by their shape."""
        monkeypatch.setattr(cpu_engine, "multiplies_integers", lambda: reads)
        pipeline = refrag.open_pipeline(index_dir, dec=str(llama), enc="decoder:2", load_dir="none", dtype="bfloat16",
                                        engine=engine, compressed="feed", p=0.2, floor=0, max_new=24)
        items = [{"id": str(i), "question": f"What {text}"} for i, text in enumerate(TEXTS)]
        alone = [pipeline.answer_batch([item])[0]["answer"] for item in items]
        assert [one["answer"] for one in pipeline.answer_batch(items)] == alone and len(set(alone)) > 3

    @pytest.mark.parametrize("known", [0, 7])
    @pytest.mark.parametrize("read", [refrag.prefill, refrag.prefill_each])
    def test_batched_logits_equal_single_ones(self, tiny, read, known):
        """Left padding changes nothing but rounding, also for tokens decoded after it; nor does it matter if what all
        begin with was read before."""
        decoder = tiny.model.decoder
        torch.manual_seed(0)
        begin, inputs = torch.randn(known, 32), [torch.randn(length, 32) for length in (5, 9, 2)]
        start = refrag.prefill(decoder, [begin])[1] if known else None
        for _ in range(2):  # the state of the beginning is as it was
            together, state = read(decoder, inputs, start)
        token = together.argmax(-1)
        next_together, _ = refrag.decode_one_token(decoder, token, state)
        for row, x in enumerate(inputs):
            alone, state_alone = refrag.prefill(decoder, [torch.cat([begin, x])])
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
            after, _ = refrag.decode_one_token(decoder, token[row : row + 1], state_alone)
            torch.testing.assert_close(next_together[row], after[0], rtol=1e-4, atol=1e-4)

    def test_the_start_that_prompts_share_is_read_once(self, reader, monkeypatch):
        """Not again for the next question, but where it is another. Recurrent decoders read all of every prompt."""
        lengths, step = [], refrag.forward_step
        monkeypatch.setattr(refrag, "forward_step", lambda *given, **inputs: (lengths.extend(
            [inputs["inputs_embeds"].shape[1]] if "inputs_embeds" in inputs else []), step(*given, **inputs))[1])
        monkeypatch.setattr(reader, "started", (None, None))
        settings, read, answers = reader.settings_for(p=0.3, max_new=8), [], []
        for text in (PROMPT, PROMPT + " word", "Be brief. " + PROMPT, PROMPT):
            lengths.clear()
            answers.append(reader.answer_batch([{"id": "1", "question": text}], settings)[0])
            reading = reader.prepare({"id": "1", "question": text}, settings)
            first, whole = reading.context.prompt.blocks[0][0], len(reading.plan)
            read.append(lengths == ([whole] if not reader.attends else [whole - first]))
        assert read == ([True] * 4 if not reader.attends else [False, True, False, False])
        monkeypatch.setattr(reader, "start", lambda _: (0, None))
        assert reader.answer_batch([{"id": "1", "question": PROMPT}], settings)[0]["answer"] == answers[0]["answer"]
        assert answers[0]["answer"] == answers[3]["answer"]

    def test_stored_vectors_give_the_inputs_made_on_the_fly(self, index_dir, llama):
        """k = 4 is stored; k = 8 comes from it by averaging. float16 storage is part of both paths."""
        pipeline = refrag.open_pipeline(str(index_dir), dec=str(llama), enc="decoder:2", load_dir="none", topk=3,
                                        p=0.3, floor=0, compressed="feed", gate="random")
        torch.manual_seed(3)
        for weight in pipeline.model.projector.parameters():  # untrained, the states would not matter
            torch.nn.init.normal_(weight, std=0.3)
        item, settings = {"id": "1", "question": "Where do smiths cast bells?"}, pipeline.settings_for
        stored = [pipeline.prepare(item, settings(k=k)) for k in (4, 8)]
        pipeline.stored = None
        for k, reading in zip((4, 8), stored, strict=True):
            assert (reading.plan < 0).any() and (reading.plan >= 0).any()
            made = pipeline.prepare(item, settings(k=k)).inputs
            torch.testing.assert_close(reading.inputs, made, rtol=5e-3, atol=5e-3)

    def test_the_bytes_of_a_cache(self, reader):
        """Keys and values by position, of each layer that attends; recurrent states are as large for any prompt."""
        decoder = reader.model.decoder
        short, long = (refrag.cache_bytes(refrag.prefill(decoder, [torch.randn(n, 32)])[1].cache) for n in (10, 20))
        kind = decoder.config.model_type
        assert (long - short) / 10 == {"llama": 384, "qwen2": 384, "gpt2": 768, "mamba2": 0, "bamba": 128}[kind]
        assert (2 * short > long) == (kind in ("mamba2", "bamba"))


class TestDecoding:
    def test_temperature_and_top_p_by_hand(self):
        """Probabilities .5, .3, .2: top_p = .6 needs the first two, so the third never comes. Temperature sharpens;
        zero is greedy."""
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(2000, 3)
        picked = refrag.sample(logits, 1.0, 0.6, torch.Generator().manual_seed(0))
        shares = torch.bincount(picked, minlength=3) / 2000
        assert shares[2] == 0 and shares[0] == pytest.approx(0.5 / 0.8, abs=0.05)
        cold = refrag.sample(logits, 0.5, 1.0, torch.Generator().manual_seed(0))  # squares them: 25, 9 and 4 of 38
        assert torch.bincount(cold)[0] / 2000 == pytest.approx(25 / 38, abs=0.05)
        for temperature in (0.0, 1e-40):
            assert refrag.sample(torch.tensor([[0.1, 3.0, 2.0]]), temperature, 1.0, None).tolist() == [1]

    def test_every_end_token_stops(self, llama):
        pipeline = load(llama, p=1.0)
        first = run_decoder(pipeline, read(pipeline).inputs, 1)[0].tokens[0]
        pipeline.model.decoder.generation_config.eos_token_id = [2, first]
        stops = refrag.stop_tokens(pipeline.model.decoder, pipeline.tokenizer.decoder)
        assert {2, first} <= stops
        assert pipeline.answer(PROMPT)["metrics"]["new_tokens"] > 0
        assert pipeline.answer(PROMPT, stop_tokens=stops)["metrics"]["new_tokens"] == 0

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
    def test_logits_that_are_no_numbers_are_an_error(self, llama, spoiled, temperature):
        pipeline = load(llama, temperature=temperature)
        decoder = pipeline.model.decoder
        logits, state = refrag.prefill(decoder, [torch.randn(5, decoder.config.hidden_size)])
        with torch.no_grad():
            decoder.lm_head.weight.fill_(spoiled)
        with pytest.raises(refrag.CorruptError, match="decoder gives values that are not finite"):
            pipeline.answer(PROMPT)
        with pytest.raises(refrag.CorruptError, match="decoder gives"):
            refrag.decode(decoder, logits, state, max_new=3, stops=frozenset(), pick=lambda logits: logits.argmax(-1),
                          watch=WATCH)

    def test_a_damaged_decoder_is_refused_when_it_is_loaded(self, llama, tmp_path):
        folder = shutil.copytree(llama, tmp_path / "damaged")
        decoder = transformers.AutoModelForCausalLM.from_pretrained(llama)
        decoder.model.layers[2].mlp.up_proj.weight.data[3, 3] = math.nan  # beyond the encoder's layers
        decoder.save_pretrained(folder)
        with pytest.raises(refrag.CorruptError, match="decoder gives"):
            load(folder)


def stream(tokenizers, text, stops=(), last=None):
    """(pieces of a text that is streamed token by token and shown as `last`, whether each token ended it)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
    pieces: list[str] = []
    streamed = refrag.TextStream(tokenizer, stops, pieces.append)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ended = [bool(streamed(ids[:n])) for n in range(1, len(ids) + 1)]
    streamed.show(streamed.update(ids).rstrip() if last is None else last)
    return pieces, ended


class TestStream:
    """Also of stops, texts that end an answer. The tiny decoder always says the same: any part of it can be one."""

    def test_it_writes_the_text_once_and_whole_characters_and_no_part_of_a_stop(self, tokenizers):
        """A stop of several tokens: its beginning is held back until it is sure to be something else."""
        pieces, ended = stream(tokenizers, "a 🙂 é 日本 b")
        assert "".join(pieces) == "a 🙂 é 日本 b" and not any(ended)
        assert not any("\ufffd" in piece for piece in pieces)
        pieces, ended = stream(tokenizers, "The city ENTERS the city END of it", ("city END",))
        assert ended[-1] and "".join(pieces) == "The city ENTERS the"

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_the_answer_ends_before_the_first_stop(self, tiny, length):
        full = tiny.answer(PROMPT, max_new=12)["answer"]
        at, pieces = len(full) // 2, []
        stops = ("never said", full[at : at + length])
        result = tiny.answer(PROMPT, pieces.append, max_new=12, stop=stops)
        assert result["answer"] == full[: full.index(stops[1])].rstrip() == "".join(pieces)
        assert result["ended"] and result["metrics"]["new_tokens"] < 12
        assert tiny.answer(PROMPT, max_new=12, stop=stops)["answer"] == result["answer"], "the same without a stream"

    def test_a_citation_at_the_end_is_streamed_once_it_is_settled(self, tokenizers):
        assert "".join(stream(tokenizers, "Ulm [1] and Bonn [2]", last="")[0]) == "Ulm [1] and Bonn"
        pieces, _ = stream(tokenizers, "Ulm [1] and Bonn [2]", last="Ulm [1] and Bonn [3]")
        assert "".join(pieces) == "Ulm [1] and Bonn [3]"


SEEN = {"a": "Seven bridges cross the old city, and it floods in May. No bells here.", "b": "Bells."}


def cite(said, labels="ab", seen=SEEN, **more):
    """(answer, label that was chosen), where the decoder would choose b."""
    return refrag.cite(said, labels, seen, lambda: "b", **more)


class TestCitations:
    @pytest.mark.parametrize(("answer", "labels", "bare", "expected"), [
        ("Ulm [1].", "12", "Ulm.", [("1", False)]), ("Ulm [2][9]", "12", "Ulm", [("2", False), ("9", True)]),
        ("Both [1, 2] and [1]", "12", "Both and", [("1", False), ("2", False)]), ("[77]", "1", "", [("77", True)]),
        ("See (doc 2) or [document 1]", "12", "See or", [("2", False), ("1", False)]),
        ('It says so <doc id="3">', "1", "It says so", [("3", True)]), ('<doc id="1">Ulm', "1", " Ulm", [("1", False)]),
        *((answer, "12", answer, []) for answer in ("He [sic] left in [1896]", "Nothing (1900) here, f(1) there", "")),
        ("Ulm [1] [a]", "a", "Ulm", [("1", True), ("a", False)]), ("[in]", ["in", "out"], "", [("in", False)])])
    def test_cited_labels(self, answer, labels, bare, expected):
        made = refrag.parse_citations(answer, list(labels))
        assert (made.bare, made.labels) == (bare, expected)

    @pytest.mark.parametrize(("answer", "plain", "begun"), [
        ("Ulm [1]", "Ulm", None), ("Ulm [1] [2]", "Ulm [1]", None), ("Ulm [1, 2]", "Ulm", None),
        ("Ulm", "Ulm", None), ("Ulm [1", "Ulm", "1"), ("Ulm [", "Ulm", ""), ("Ulm [12]", "Ulm", None),
        ("Ulm [sic]", "Ulm [sic]", None), ("f(x) [unfinished", "f(x) [unfinished", None), ("[1]", "", None),
        ("", "", None)])
    def test_split_citation(self, answer, plain, begun):
        assert refrag.parse_citations(answer, ["1", "2"])[1:3] == (plain, begun)

    @pytest.mark.parametrize(("said", "cited", "chosen"), [
        ("old city", "old city [a]", "a"),  # it stands in one document alone: there, whatever the decoder wrote
        ("five [a]", "five [a]", None),  # else what it wrote counts
        ("bells [b]", "bells [b]", None), ("floods in May [b]", "floods in May [a]", "a"),
        ("five [1]", "five [1] [b]", "b"),  # a forged mark stays, to be flagged
        ("five", "five [b]", "b"), ("No [b]", "No [b]", None),  # yes and no stand anywhere
        ("five [a", "five [a]", "a"), ("old city [", "old city [a]", "a"),
        ("five [a], six [b", "five [a], six [b]", "b")])
    def test_the_citation_is_where_the_answer_stands(self, said, cited, chosen):
        assert cite(said) == (cited, chosen)

    def test_what_was_left_out_is_never_cited(self):
        """Nothing of b was read: it is not where the answer stands. Nothing was read at all: nothing is cited."""
        assert cite("old city", seen={"b": SEEN["b"]}) == ("old city [b]", "b")
        assert cite("old city", seen={}) == cite("old city [a]", seen={}) == ("old city", None)
        assert cite("five", stops=("[",)) == ("five", None)  # nor does a stop come again

    @pytest.mark.parametrize(("said", "left"), [
        ("Not in the documents.", "Not in the documents."), ("Not in the documents. [a]", "Not in the documents."),
        ("It is not in the documents [a", "It is not in the documents"),
        ("Not in the documents [a].", "Not in the documents."),
        ("Not in the documents. [a] [b]", "Not in the documents."),
        ("Not in the documents (doc 1)", "Not in the documents (doc 1)"), ("", "")])
    def test_a_refusal_cites_nothing(self, tokenizers, said, left):
        """Nor does its stream show a citation that is taken away again."""
        assert cite(said) == (left, None)
        assert "".join(stream(tokenizers, said, last=left)[0]) == left

    def test_the_end_of_an_answer_is_found_in_no_time(self):
        """Blanks and brackets in any number: the work grows with their number, not with its cube."""
        for text in ("a" + " " * 50_000 + "x", "[" * 50_000, "a [" + " " * 50_000, "]" * 50_000):
            assert refrag.settled_length(text) <= len(text)
            refrag.parse_citations(text, ["1"])

    def test_a_chosen_citation_is_always_one_of_the_given(self, reader):
        """Without documents, or under --no_cite, there is none."""
        result = reader.answer("Which element?", cite=True)
        assert result["citations"] == [] and result["answer"] == reader.answer("Which element?")["answer"]
        assert reader.answer(PROMPT)["citations"] == []
        result = reader.answer(PROMPT, cite=True)
        if result["answer"]:
            [citation] = result["citations"]
            assert citation["chosen"] and not citation["forged"] and citation["id"] in {"a", "b"}
            assert result["answer"].endswith(f"[{citation['id']}]")

    def test_without_documents_every_citation_is_forged(self, reader, monkeypatch):
        monkeypatch.setattr(refrag.TextStream, "update", lambda *_: "Ulm [1]")
        assert [(c["label"], c["forged"]) for c in reader.answer("Where?", cite=True)["citations"]] == [("1", True)]

    def test_choice_follows_the_decoder(self, tiny):
        """Against scoring " [id]" for each id by a full forward: the choice is greedy, token by token."""
        reading, decoder, tokenizer = read(tiny, p=1.0), tiny.model.decoder, tiny.tokenizer.decoder
        [out], _, _, best = tiny.write([reading], None)
        chosen = refrag.choose_citation(functools.partial(best, 0), tokenizer, ["a", "b", "c"])
        opening = tokenizer(" [", add_special_tokens=False)["input_ids"]
        last = plain_logits(decoder, [*reading.context.prompt.input_ids.tolist(), *out.tokens, *opening])
        options = {label: tokenizer(f"{label}]", add_special_tokens=False)["input_ids"][0] for label in "abc"}
        assert len(set(options.values())) == 3
        assert chosen == max(options, key=lambda label: float(last[options[label]]))

    def test_the_window_has_room_for_a_citation_that_is_chosen(self, llama):
        """Prompt and answer end at the window's last position."""
        pipeline = load(llama)
        pipeline.model.decoder.config.max_position_embeddings = len(read(pipeline).plan) + 6
        assert len(pipeline.answer(PROMPT)["answer"]) > 0
        with pytest.raises(refrag.UserError, match=f"--max_new 6 and a citation {refrag.CITATION_TOKENS}; the"):
            pipeline.answer(PROMPT, cite=True)


class TestModes:
    def test_realised_p_is_never_above_p(self, tiny):
        for p in (0.0, 0.1, 0.3, 0.7, 1.0):
            metrics = tiny.answer(PROMPT, p=p)["metrics"]
            assert metrics["p_realised"] <= p
            assert metrics["compression"] == pytest.approx(metrics["full_positions"] / metrics["positions"], abs=1e-4)
        cut = read(tiny, p=0.9, mode="truncate")  # in the middle of a chunk
        content = ~refrag.text_mask(cut.context.prompt, np.zeros_like(cut.expanded))
        assert tiny.generate([cut])[0]["metrics"]["p_realised"] == pytest.approx(cut.kept[content].mean(), abs=1e-6)
        settings = tiny.answer(PROMPT, compressed="auto")["settings"]
        assert settings["projector_trained"] is False and settings["compressed"] == "drop"

    def test_how_documents_were_read(self, tiny):
        """A document of several chunks, of which the first alone stays text, is partly read as text."""
        reading = read(tiny, p=0.0)
        prompt = reading.context.prompt
        assert list(reading.how_read.values()) == ["vectors", "vectors"]
        assert read(tiny, p=1.0).how_read == {"a": "text", "b": "text"}
        some = np.arange(len(prompt.chunks)) == 0

        def read_as(kept, plan):
            return dataclasses.replace(reading, expanded=some, kept=kept, plan=plan)

        assert read_as(refrag.text_mask(prompt, some), reading.plan).how_read == {"a": "partly", "b": "vectors"}
        kept = refrag.truncated_mask(prompt, len(prompt.input_ids) - 3)
        cut = read_as(kept, prompt.input_ids[kept])
        assert cut.how_read["a"] == "text", "the last document is cut first"
        assert cut.how_read["b"] in ("partly", "left out")
        first = refrag.text_mask(prompt, np.asarray([chunk.doc == 0 for chunk in prompt.chunks]))
        alone = read_as(first, prompt.input_ids[first])
        assert alone.how_read == {"a": "text", "b": "left out"}

    def test_what_was_not_read_is_said(self, tmp_path, write, run, done, llama):
        """Nothing found: no citation, and a line that says so. Found but left out: a line that says that."""
        models = ["--index_dir", tmp_path / "i", "--dec", llama, "--enc", "decoder:2"]
        done("index", "--corpus", write("c.txt", "Seven bridges cross the old city.\n"), "--retriever", "bm25", *models)
        ask = ["generate", *models, "--max_new", "4", "--gate", "blend"]
        _, out, _ = run(*ask, "--question", "zebra?")
        assert "\nno citation\nno passage was found: the answer is the decoder's own\n" in out
        _, out, _ = run(*ask, "--question", "bridges?", "--ctx_max", "1")
        assert "\nno citation\nno passage fits --ctx_max: the answer is the decoder's own\n" in out
        assert run("search", *models[:2], "--question", "zebra?")[1] == "zebra?\nno passage was found\n"
        _, out, _ = run(*ask, "--question", "bridges?", "--p", "0", "--compressed", "drop")
        assert "\nno citation\nno passage was read as text\n" in out
        _, out, _ = run(*ask, "--question", "bridges?")
        assert "no passage" not in out


@pytest.fixture
def asking(index_dir, llama):
    return ["generate", "--index_dir", index_dir, "--dec", llama, "--enc", "decoder:2", "--k", 4, "--max_new", 4]


class TestCommand:
    def test_result_has_the_promised_fields(self, done, asking):
        result = done(*asking, *FED, "--question", "What melts?", "--topk", 3, "--compare")
        assert {"question", "answer", "passages", "citations", "chunks", "metrics", "settings", "full",
                "ttft_ratio"} <= result.keys()
        assert {"ttft_s", "ttit_s", "tokens_per_s", "new_tokens", "positions", "full_positions", "compression",
                "p_realised", "stages", "load_s", "peak_rss_mb"} <= result["metrics"].keys()
        stages = result["metrics"]["stages"]
        assert set(stages) == {"retrieve_s", "gate_s", "vectors_s", "pack_s", "prefill_s"}
        assert min(stages.values()) > 0, "each of them counts"
        assert sum(stages.values()) == pytest.approx(result["metrics"]["ttft_s"], abs=1e-5)
        for passage in result["passages"]:  # the chunks of each cover its content
            content = refrag.passage_content(passage["title"], passage["text"])
            chunks = [c for c in result["chunks"] if c["passage_id"] == passage["id"]]
            assert "".join(content[c["start"] : c["end"]] for c in chunks) == content
            assert all({"score", "expanded"} <= chunk.keys() for chunk in chunks)
        assert result["full"]["metrics"]["positions"] == result["metrics"]["full_positions"]
        assert result["ttft_ratio"] == pytest.approx(
            result["full"]["metrics"]["ttft_s"] / result["metrics"]["ttft_s"], abs=1e-3)

    def test_ctx_max_drops_whole_passages_from_the_lowest_rank(self, done, asking):
        ask = [*asking, *FED, "--question", "What melts?", "--topk", 6]
        everything = done(*ask)
        limit = everything["metrics"]["context_tokens"] // 2
        some = done(*ask, "--ctx_max", limit)
        assert 0 < some["metrics"]["context_tokens"] <= limit
        assert some["dropped_passages"] == 6 - len(some["passages"]) > 0
        names = [[p["id"] for p in result["passages"]] for result in (some, everything)]
        assert names[0] == names[1][: len(names[0])]
        none = done(*ask, "--mode", "none")
        assert none["passages"] == [] and none["metrics"]["context_tokens"] == 0

    def test_the_documents_of_a_prompt_and_its_chunks_are_shown(self, run, llama):
        code, out, err = run(*LITERAL, llama, *FED[:-1], "--show_prompt", "--explain")
        chunks = json.loads(out)["chunks"]
        assert code == 0 and '<doc id="a">\n[[' in err and "]][[" in err
        assert [text for text, _ in itertools.groupby(c["passage_id"] for c in chunks)] == ["a", "b"]
        assert "".join(chunk["text"] for chunk in chunks) == (
            "Seven bridges cross the old city, and it floods in May.Bells.")
        for option in ("--stream", "--no_stream"):  # what people see begins with the answer that --json gives
            shown = run(*LITERAL, llama, *FED[:-2], "--quiet", "--explain", option)[1]
            assert shown.strip().startswith(refrag.visible(json.loads(out)["answer"]))
            assert all(f"(no shares)  {c['passage_id']}: {' '.join(c['text'].split())}\n" in shown for c in chunks)
        # --ctx_max counts the tokens of literal documents, and not those of a question that warms up
        for text, expected in (("B", 0), ("Bells ring", 2)):
            code, _, err = run(*LITERAL, llama, *FED, "--ctx_max", 1, "--prompt", f"Say <doc id='a'>{text}</doc>")
            assert code == expected and (code == 0 or "more than --ctx_max 1" in err), err

    @pytest.mark.parametrize(("before", "after", "new"), [
        ("ab", "xab", "x"), ("ab", "ba", ""), ("aab", "aaba", "a"), ("ab", "bcad", "cd")])
    def test_resume_answers_what_was_not_asked_yet(self, done, asking, write, tmp_path, before, after, new):
        """Whatever ids they have: each letter is a question, and its id the number of its line."""
        out = tmp_path / "out.jsonl"
        for asked, more in ((before, []), (after, ["--resume"])):
            questions = write("questions.jsonl", [{"question": f"What is {name}?"} for name in asked])
            done(*asking, *FED, "--questions", questions, "--out", out, *more)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["question"][8] for line in lines] == [*before, *new]
        assert len({line["id"] for line in lines}) == len(lines), "one that was taken is followed by -2"

    def test_json_of_a_file_of_questions_is_one_object(self, run, asking, write, tmp_path):
        """The lines go to --out; without --json a person reads the answers. Batches give the same ones."""
        questions = write("q.jsonl", [{"question": "Is it a?", "id": "a"}, {"question": "Is it b? " * 2, "id": "b"}])
        path, answers = tmp_path / "out.jsonl", []
        for more in ([], ["--out", path], ["--batch_size", 2]):
            _, out, _ = run(*asking, *FED, "--questions", questions, *more)
            assert out.count("\n") == 1
            answers.append([(result["id"], result["answer"]) for result in json.loads(out)["results"]])
        assert [name for name, _ in answers[0]] == ["a", "b"] and answers == [answers[0]] * 3
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
        assert run(*asking, "--questions", questions, "--out", tmp_path / "other.jsonl")[1] == ""
        code, out, err = run(*asking, "--questions", questions)
        assert code == 0 and out.startswith("Is it a?\n") and "\n\nIs it b?" in out and "{" not in out
        assert (out + err).count("the projector is untrained") == 1

    def test_a_run_that_fails_is_one_object_too(self, refused, asking, write):
        questions = write("questions.jsonl", [{"question": "a"}, {"question": "word " * 2100}])
        for more in (["--questions", questions], ["--question", "What melts?", "--max_new", 5000]):
            assert "window is 2048" in refused(2, *asking, *FED, *more)

    def test_by_default_a_shallow_decoder_lends_all_its_layers(self, run, any_decoder):
        argv = [*LITERAL, any_decoder, "--json"]
        code, out, _ = run(*argv)
        assert code == 0 and json.loads(out)["settings"]["enc"] == "decoder:3"
        assert run(*argv, "--enc", "decoder:4")[2] == "error: --enc decoder:4: the decoder has 3 layers\n"


def test_a_pipeline_answers_as_the_command_does_and_names_what_is_no_option(done, asking, index_dir, llama):
    pipeline = refrag.open_pipeline(index_dir, dec=str(llama), enc="decoder:2", compressed="feed", k=4, quiet=True)
    result = pipeline.answer("What melts?", p=0.5, max_new=4)
    expected = done(*asking, *FED, "--question", "What melts?", "--p", 0.5)
    for timed in (result, expected):
        timed.pop("metrics")
    assert json.loads(json.dumps(result)) == expected
    with pytest.raises(refrag.UserError, match="no such option of generate: ks"):
        refrag.open_pipeline(index_dir, ks=4)
    with pytest.raises(TypeError, match="ks"):
        pipeline.answer("What melts?", ks=4)
    with pytest.raises(refrag.UserError, match="--p must"):
        pipeline.answer("What melts?", p=4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The shipped reader over ten real passages."""
    folder = tmp_path_factory.mktemp("wiki") / "index"
    code = refrag.main(["index", "--corpus", str(refrag.Path(refrag.__file__).parent / "data/wiki_passages.jsonl"),
                        "--index_dir", str(folder), "--limit", "10", "--k", "8", "--quiet"])
    assert code == 0
    return refrag.open_pipeline(folder, topk=4, p=1.0, max_new=12)


@pytest.mark.parametrize("p", [0.05, 1.0])
def test_the_shipped_reader_reads_in_8_bits_what_it_reads_itself(pipeline, integers, p):
    """By the distributions of the next token and the one after it."""
    stepper, decoder, divergences = cpu_engine.Stepper(pipeline.model.decoder), pipeline.model.decoder, []
    for _, question, _ in SHORT[:3]:
        reading = pipeline.prepare({"id": "1", "question": question}, pipeline.settings_for(p=p, topk=2))
        known, start = pipeline.start([reading])
        both = [refrag.prefill_each(decoder, [reading.inputs[known:]], start, one) for one in (None, stepper)]
        token = both[0][0].argmax(-1)
        for exact, rounded in (both, [refrag.decode_one_token(decoder, token, state) for _, state in both]):
            exact, rounded = exact[0].log_softmax(-1), rounded[0].log_softmax(-1)
            divergences.append(float((exact.exp() * (exact - rounded)).sum()))
    assert known and stepper.reads and 1e-5 < np.mean(divergences) < 0.05


SHORT = [  # passages as a newcomer writes them, with a question each
    ("The password of the staff wifi in the Ghent office is turnip-42. Guests use the other network, which has no "
     "password at all.", "What is the password of the staff wifi?", "turnip-42"),
    ("The bakery in Bruges opens at six.", "When does the bakery in Bruges open?", "six"),
    ("The library in Leuven lends maps.", "What does the library in Leuven lend?", "maps"),
    ("The harbour office in Ghent closes at four.", "When does the harbour office in Ghent close?", "four"),
    ("The pool in Mons is closed on Monday.", "On which day is the pool in Mons closed?", "Monday"),
    ("Room 12 is booked by Ines for the budget meeting.", "Who booked room 12?", "Ines"),
    ("The spare key hangs behind the boiler in the cellar.", "Where does the spare key hang?", "boiler"),
    ("The museum in Namur was founded in 1874 by a baker.", "When was the museum in Namur founded?", "1874")]


HOP = "Where do smiths cast bells?"


@pytest.mark.parametrize("said", [None, "", "The bells?", refrag.NO_ANSWER, "the mill [1]"])
def test_the_decoder_writes_the_query_of_the_next_hop(run, index_dir, llama, monkeypatch, capsys, said):
    """What plain transformers says to the question over the best three passages; the rule's if that is nothing new."""
    pipeline = refrag.open_pipeline(index_dir, dec=str(llama), enc="decoder:2", load_dir="none", engine="model",
                                    max_new=2, topk=2, hops=3, hop_query="model")
    assert "query" not in capsys.readouterr().err, "to warm up there is nothing to look up"
    searcher, asked, generate, tokenizer = pipeline.searcher, [], pipeline.generate, pipeline.tokenizer.decoder
    monkeypatch.setattr(searcher, "find", lambda query, *more: asked.append(query) or refrag.Searcher.find(
        searcher, query, *more))
    if said is not None:
        monkeypatch.setattr(pipeline, "generate", lambda readings, writers=(): (
            [{"answer": said}] if readings[0].settings.max_new > 2 else generate(readings, writers)))
    pipeline.answer(HOP)
    assert len(asked) == 3 and asked[0] == HOP and asked[1] != asked[2]
    best = searcher.search(HOP, 3)
    docs = "".join(f'<doc id="{p.rank}">\n{p.content}\n</doc>\n' for p in best)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{refrag.ASK_WITH_CONTEXT}{docs}\nQuestion: {refrag.HOP_QUESTION}{HOP}"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=refrag.HOP_TOKENS, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().partition("\n")[0].strip()
    new = {None: text, "the mill [1]": "the mill"}.get(said)
    assert asked[1] == (f"{HOP} {new}" if new else refrag.rule_query(HOP, best))
    assert ("wrote nothing new" if new is None else f"next query: {HOP} ") in capsys.readouterr().err
    asked.clear()
    pipeline.answer(HOP, hops=2, hop_query=refrag.GenerateConfig().hop_query)
    assert asked[1] == refrag.rule_query(HOP, best), "the rule is the default"


@pytest.mark.models
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 5), (0, 8)])
def test_short_corpora_are_read_by_default(tmp_path, shared, pipeline, first, last):
    """One to eight passages of a line, the default settings: every answer is right and cites its passage."""
    facts = SHORT[first:last]
    (tmp_path / "notes.txt").write_text("".join(f"{text}\n" for text, _, _ in facts), encoding="utf-8")
    assert refrag.main(["index", "--corpus", str(tmp_path / "notes.txt"), "--index_dir", str(tmp_path / "i"),
                        "--quiet"]) == 0
    searcher = refrag.Searcher(refrag.open_index(str(tmp_path / "i")), "hybrid", pipeline.embedder)
    short = refrag.Pipeline(pipeline.model, searcher, pipeline.embedder, refrag.SearchConfig(), refrag.PackConfig(),
                            refrag.GenerateConfig(max_new=12))
    for text, question, answer in facts:
        result = short.answer(question)
        assert answer in result["answer"], (question, result["answer"])
        cited = [passage for passage in result["passages"] if passage["id"] == result["citations"][0]["id"]]
        assert cited[0]["text"] == text and cited[0]["read"] in ("text", "partly")


@pytest.mark.models
class TestBundledModels:
    def test_p1_is_the_chat_template_over_the_full_text(self, pipeline):
        """Logits after it, and after the next token, are those of plain forwards."""
        item = {"id": "1", "question": "Who wrote De Materia Medica?"}
        reading = pipeline.prepare(item, pipeline.settings_for(topk=2))
        docs = reading.context.docs
        pieces = refrag.question_pieces(item["question"], docs)
        message = "".join(p if isinstance(p, str) else f'<doc id="{p.label}">\n{p.content}\n</doc>' for p in pieces)
        assert "".join(f'<doc id="{d.label}">\n{d.content}\n</doc>\n' for d in docs) in message
        plain = pipeline.tokenizer.decoder.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert reading.plan.tolist() == plain
        logits, state = refrag.prefill(pipeline.model.decoder, [reading.inputs])
        torch.testing.assert_close(logits[0], plain_logits(pipeline.model.decoder, plain), rtol=1e-3, atol=1e-3)
        after, _ = refrag.decode_one_token(pipeline.model.decoder, token := logits.argmax(-1), state)
        expected = plain_logits(pipeline.model.decoder, [*plain, int(token)])
        torch.testing.assert_close(after[0], expected, rtol=1e-3, atol=1e-3)

    def test_the_shipped_gate_is_the_default_and_says_why(self, pipeline):
        result = pipeline.answer("What is botany?", p=0.1, max_new=2, explain=True)
        assert result["settings"]["gate"] == "learned" and any(chunk["expanded"] for chunk in result["chunks"])
        assert all(set(chunk["shares"]) == set(refrag.FEATURES) for chunk in result["chunks"])
