"""refrag_extras/cpu_engine.py: matrices in 8 and 4 bits, and the steps of decoding by them."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import CPU_HAS, INT_MM, SMALL, disturb, save_decoder

import refrag
from refrag_extras import cpu_engine

CPU, MULTIPLIES_INTEGERS = torch.device("cpu"), cpu_engine.multiplies_integers


class ExactMatrix:
    kind = "int8"

    def __init__(self, weight, bias=None, columns=None, largest=None):
        self.weight = weight.float() if columns is None else weight.float() * columns
        self.bias = 0 if bias is None else bias

    def __call__(self, x):
        return x.float() @ self.weight.T + self.bias

    many = __call__


def step_both(decoder, stepper, lengths, steps, room, alive=None):
    """Logits (2, steps, B, V) by the decoder itself and by its stepper, fed the decoder's choices."""
    torch.manual_seed(0)
    logits, state = refrag.prefill(decoder, [torch.randn(length, 32) for length in lengths])
    states = [stepper.adopt(state, room), refrag.DecoderState(copy.deepcopy(state.cache), state.mask, state.position)]
    rows = []
    for _ in range(steps):
        token = logits.argmax(-1)
        pairs = [refrag.decode_one_token(decoder, token, one, alive) for one in states]
        states, logits = [one for _, one in pairs], pairs[1][0]
        rows.append([logits, pairs[0][0]])
    return torch.stack([torch.stack(side) for side in zip(*rows, strict=True)])


@pytest.fixture(params=["llama", "qwen2"])
def decoder(request, tmp_path, tokenizers):
    """A decoder without and one with biases, neither these nor the norms at their start."""
    folder = save_decoder(request.param, tmp_path / "decoder", tokenizers["bpe"])
    decoder = refrag.load_decoder(str(folder), CPU, torch.float32)
    disturb(decoder)
    return decoder


@pytest.fixture
def exact(monkeypatch):
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


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A machine whose kernel for 4 bits is fast."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def test_a_row_in_8_bits_is_kept_to_a_two_hundred_and_fifty_fourth_of_its_largest():
    torch.manual_seed(0)
    weight = torch.randn(8, 64) * torch.logspace(-3, 1, 8)[:, None]
    kept = cpu_engine.Int8Matrix(weight)
    error = (kept.values * kept.scale.float()[:, None] - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) * (1 / 254 + 2**-8)).all()


@pytest.mark.parametrize(("matrix", "lost"), [(cpu_engine.Int8Matrix, 0.02), (cpu_engine.Int4Matrix, 0.005),
                                              (cpu_engine.smallest_matrix, 0.005)])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_product_of_a_matrix_in_sixteen_levels(matrix, lost, rows):
    """4 bits lose less of such a matrix than 8."""
    torch.manual_seed(rows)
    weight, x = in_sixteen_levels((48, 96)), torch.randn(rows, 96)
    bias, columns = torch.randn(48), torch.rand(96) + 0.5
    expected, got = (x * columns) @ weight.T + bias, matrix(weight, bias, columns)(x).float()
    assert got.shape == expected.shape and (got - expected).norm() / expected.norm() < lost


def test_sixteen_levels_are_known(monkeypatch):
    """4 bits are taken only if nothing is lost and the kernel is fast."""
    def kind(weight):
        return cpu_engine.smallest_matrix(weight).kind

    weight = in_sixteen_levels((32, 64)) * 1e-2
    assert kind(weight) == kind(weight.bfloat16().float()) == "int4" and kind(torch.randn(32, 64)) == "int8"
    assert kind(in_sixteen_levels((24, 32))) == kind(torch.zeros(16, 48)) == "int8"  # rows, columns in no groups
    between = weight.clone()
    between[20, 40] += 0.3 * (weight[20].max() - weight[20].min()) / 15  # one weight between two levels
    assert kind(between) == "int8"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert kind(weight) == "int8"
    # a constant group is held
    weight = in_sixteen_levels((16, 64))
    weight[3, 32:] = 0.25
    weight[4] = 0
    assert cpu_engine.Int4Matrix(weight).error < 1e-3
    made = cpu_engine.Int4Matrix(weight)(torch.ones(1, 64)).float()
    torch.testing.assert_close(made, weight.sum(1)[None], rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("lengths", "room", "alive"), [((7,), 12, None), ((5, 9, 2), 12, None), ((6,), 1, None),
                                                        ((4, 4), 8, torch.tensor([True, False]))])
def test_without_rounding_the_steps_are_the_decoders(decoder, exact, lengths, room, alive):
    """Alone, padded in a batch, past the room that was made, and beside a sequence that has ended."""
    expected, got = step_both(decoder, cpu_engine.Stepper(decoder), lengths, 6, room, alive)
    rows = slice(None) if alive is None else alive
    torch.testing.assert_close(got[:, rows], expected[:, rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("lengths", "room"), [((40,), 12), ((37, 50, 33), 12), ((64,), 1)])
def test_a_long_prompt_in_8_bits_gives_nearly_the_decoders_steps(exact, monkeypatch, lengths, room):
    """Its last positions, up to fifteen, and what follows stay as they are."""
    monkeypatch.setattr(cpu_engine, "LONG", 32)
    config = transformers.LlamaConfig(**SMALL, initializer_range=0.2, intermediate_size=64, num_attention_heads=2,
                                      num_key_value_heads=1)
    decoder = transformers.LlamaForCausalLM(config).eval()
    expected, got = step_both(decoder, cpu_engine.Stepper(decoder), lengths, 6, room)
    error = (got - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.03  # rounded, and by little
    monkeypatch.setattr(cpu_engine, "LONG", 65)
    again, got = step_both(decoder, cpu_engine.Stepper(decoder), lengths, 6, room)
    torch.testing.assert_close(got, again, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 170])
@pytest.mark.parametrize("by_floats", [True, False])
def test_vectors_in_8_bits_may_have_columns_that_stand_out(rows, by_floats, integers, monkeypatch):
    """What is told of them moves to the weights, for few vectors and for many, by floats and by torch's product."""
    if not by_floats:
        if not CPU_HAS("avx512_vnni", "avx_vnni", "amx_int8"):
            pytest.skip("no instructions for products of integers")
        monkeypatch.setattr(torch, "_int_mm", INT_MM)
    torch.manual_seed(rows)
    weight, x, columns = torch.randn(48, 1120), torch.randn(rows, 1120), torch.rand(1120) + 0.5
    x[:, 5] *= 300
    bias, largest = torch.randn(48), (x * columns).abs().amax(0)
    weight[:, 5] *= 1e-2
    expected = (x * columns) @ weight.T + bias

    def lost(matrix, multiply):
        return float((multiply(matrix, x).float() - expected).norm() / expected.norm())

    told = cpu_engine.Int8Matrix(weight, bias, columns, largest)
    untold = cpu_engine.Int8Matrix(weight, bias, columns, torch.ones(1120))
    assert lost(told, cpu_engine.Int8Matrix.many) < 0.02 < lost(untold, cpu_engine.Int8Matrix.many)
    assert lost(told, cpu_engine.Int8Matrix.__call__) < 0.02


def read_both(decoder, stepper, known, lengths):
    """(logits, state) of prompts of random vectors after a start, by the decoder itself and by its stepper."""
    torch.manual_seed(1)
    _, start = refrag.prefill(decoder, [torch.randn(known, 32)])
    inputs = [torch.randn(length, 32) for length in lengths]
    return [refrag.prefill_each(decoder, inputs, start, one) for one in (None, stepper)]


@pytest.mark.parametrize("lengths", [(1,), (9,), (150, 4, 1)])
def test_without_rounding_prompts_are_read_as_by_the_decoder(decoder, exact, integers, monkeypatch, lengths):
    """Logits, keys and values, whatever part of the prompt goes through a layer at once."""
    monkeypatch.setattr(cpu_engine, "ROWS", 4)
    (expected, state), (got, states) = read_both(decoder, cpu_engine.Stepper(decoder), 7, lengths)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert states.position.tolist() == state.position.tolist()
    shown = 1 if state.mask is None else state.mask[:, None, :, None]  # what pads a prompt does not matter
    for ours, theirs in zip(states.cache.layers, state.cache.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(ours, name) * shown, getattr(theirs, name) * shown, rtol=1e-3, atol=1e-4)


def test_prompts_are_read_in_8_bits(decoder, integers, monkeypatch):
    """After a start, which the decoder reads; not where the weights are kept in 4, nor without the instructions."""
    stepper = cpu_engine.Stepper(decoder)
    (expected, _), (got, _) = read_both(decoder, stepper, 7, (60,))
    assert stepper.reads and 1e-5 < (got - expected).norm() / expected.norm() < 0.1
    (whole, _), (alone, _) = (refrag.prefill_each(decoder, [torch.ones(5, 32)], None, one) for one in (None, stepper))
    assert torch.equal(whole, alone)
    assert not cpu_engine.Stepper(decoder, "int4").reads
    monkeypatch.setattr(refrag, "cpu_has", CPU_HAS)
    monkeypatch.setattr(cpu_engine, "multiplies_integers", MULTIPLIES_INTEGERS)
    for flags, reads in (("avx512_vnni", True), ("avx_vnni", True), ("avx512_vnni amx_bf16", False), ("avx2", False)):
        found = dict.fromkeys(flags.split(), True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert cpu_engine.Stepper(decoder).reads == reads
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: (x.int() @ y.int()).clamp(max=2**15))  # the flags are not obeyed
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert not cpu_engine.Stepper(decoder).reads


@pytest.mark.parametrize(("levels", "engine", "used", "most"), [
    ("none", "int8", "int8", 0.4), ("none", "int4", "int4", 3), ("_proj.weight", "auto", "int4", 0.2),
    ("down_proj.weight", "auto", "int4+int8", 0.4)])
def test_rounding_moves_logits_by_little(decoder, levels, engine, used, most):
    """Weights in sixteen levels are kept in 4 bits, layers that were changed in 8."""
    for name, parameter in decoder.named_parameters():
        if name.endswith(levels):
            parameter.data = in_sixteen_levels(parameter.shape, len(name)) * 0.1
    stepper = cpu_engine.Stepper(decoder, engine)
    expected, got = step_both(decoder, stepper, (9,), 6, 8)
    assert stepper.engine == used and 0 < (got - expected).abs().max() < most * expected.std()


def test_only_decoders_that_it_computes_exactly(any_decoder):
    """No changed layers. torch's kernel takes sixteen columns at once and does not look whether so many are left."""
    decoder = refrag.load_decoder(str(any_decoder), CPU, torch.float32)
    assert cpu_engine.Stepper.fits(decoder) == (decoder.config.model_type in ("llama", "qwen2"))
    for size, fits in ((48, True), (40, False)):
        config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=size, num_hidden_layers=1,
                                          num_attention_heads=4)
        model = transformers.LlamaForCausalLM(config)
        assert cpu_engine.Stepper.fits(model) == fits
        model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
        assert not cpu_engine.Stepper.fits(model)


def test_the_engine_can_be_chosen(llama, tmp_path, tokenizers, done, refused):
    ask = ["generate", "--prompt", "Where? <doc id='a'>Seven bridges.</doc> Say:", "--gate", "random", "--max_new", 3,
           "--dec"]
    for engine, used in (("model", "model"), ("int8", "int8"), ("int4", "int4"), ("auto", "int8")):
        assert done(*ask, llama, "--engine", engine)["settings"]["engine"] == used
    gpt2 = save_decoder("gpt2", tmp_path / "gpt2", tokenizers["plain_bpe"])
    assert "--engine int8" in refused(2, *ask, gpt2, "--engine", "int8", "--quiet")
