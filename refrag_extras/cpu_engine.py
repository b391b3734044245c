"""Decoding in 8 and 4 bits on a CPU, for decoders built like Llama: steps of one token and, where the processor
multiplies integers of 8 bits, the reading of prompts. See `prefill` and `decode` in refrag.py.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import refrag
from refrag import DecoderState, causal_attention, require


class Int8Matrix:
    """A matrix in 8 bits with a scale per row. For few vectors what it costs is reading the weights; many are rounded
    to 8 bits as well.

    weight: (out, in); bias: (out,); columns: (in,), which the input is multiplied with first; largest: (in,), the
    magnitudes to expect of the input after that. They tell what to move from the input's columns to the weight's, so
    that neither has any that stand out (SmoothQuant, arXiv 2211.10438). Maps (n, in) to (n, out).
    """

    kind = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
                 largest: Tensor | None = None):
        moved, self.columns = columns, None
        if largest is not None:
            moved = (largest.clamp_min(1e-5) / weight.abs().amax(0).float().clamp_min(1e-5)).sqrt()
            self.columns = (1 if columns is None else columns.float()) / moved
        values, scales = [], []
        for part in weight.split(4096):  # by parts, so that no large memory is asked for and touched at first
            part = part.float() if moved is None else part.float() * moved
            scales.append(part.abs().amax(1).clamp_min(1e-12) / 127)
            values.append((part / scales[-1][:, None]).round().to(torch.int8))
        self.values, self.scale, self.bias = torch.cat(values), torch.cat(scales).bfloat16(), bias

    @staticmethod
    def takes(rows: int, columns: int) -> bool:
        """Whether torch's kernel can read such a matrix; with columns left over it reads beyond the end, silently."""
        return columns % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.columns is None else x * self.columns
        product = torch._weight_int8pack_mm(x.bfloat16(), self.values, self.scale)  # made for bfloat16
        return product if self.bias is None else product + self.bias

    def many(self, x: Tensor) -> Tensor:
        """The same for many vectors, in float32. About 512 numbers share a scale, since few are far larger."""
        parts, products = max(1, x.shape[1] // 512), []
        for part, values in zip((x * self.columns).chunk(parts, 1), self.values.chunk(parts, 1), strict=True):
            scale = part.abs().amax(1, keepdim=True).clamp_min_(1e-12) / 127
            products.append(torch._int_mm((part / scale).round_().to(torch.int8), values.T).float().mul_(scale))
        product = functools.reduce(Tensor.add_, products).mul_(self.scale.float())
        return product if self.bias is None else product + self.bias


class Int4Matrix:
    """A matrix in 4 bits with a scale and a middle for every 32 columns of a row, as in a GGUF file of type Q4_1."""

    kind = "int4"
    group = 32

    def __init__(self, weight: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
                 largest: Tensor | None = None):
        levels, scale, least = self.levels(weight)
        self.error = float((levels - levels.round()).abs().max())  # of a level, at most 1/2
        self.values = torch._convert_weight_to_int4pack_for_cpu(levels.round().int(), 1)
        self.scale = torch.stack([scale, least + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
        self.bias, self.columns = bias, columns

    @classmethod
    def levels(cls, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(levels from 0 to 15, not rounded (out, in), scale, least) with weight = levels * scale + least by group."""
        groups = weight.float().unflatten(1, (-1, cls.group))
        least = groups.amin(2)
        scale = (groups.amax(2) - least).clamp_min(1e-12) / 15
        return ((groups - least[..., None]) / scale[..., None]).flatten(1), scale, least

    @classmethod
    def takes(cls, rows: int, columns: int) -> bool:
        return rows % 16 == 0 and columns % cls.group == 0

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.columns is None else x * self.columns
        product = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self.values, self.group, self.scale)
        return product if self.bias is None else product + self.bias


HELD = 1 / 16  # of a level; what weights in 16 levels are off at most when they were rounded to bfloat16 meanwhile


def smallest_matrix(weight: Tensor, bias: Tensor | None = None, columns: Tensor | None = None,
                    largest: Tensor | None = None) -> Int4Matrix | Int8Matrix:
    """A matrix in 4 bits where these hold it as it is and the kernel is a fast one, else in 8."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if fast and Int4Matrix.takes(*weight.shape) and Int4Matrix(weight[:16]).error < HELD:  # most are told by few rows
        small = Int4Matrix(weight, bias, columns)
        if small.error < HELD:
            return small
    return Int8Matrix(weight, bias, columns, largest)


def multiplies_integers() -> bool:
    """Whether the CPU reads prompts fastest in 8-bit integers, and torch uses the instructions for them, which
    ONEDNN_MAX_CPU_ISA can forbid. Without these a product takes forty times as long as one of float32, or cuts off sums
    that are too large for 16 bits. With matrix instructions (AMX) bfloat16 is faster: nothing has to be rounded."""
    full = torch.full((32, 64), 127, dtype=torch.int8)
    known = refrag.cpu_has("avx512_vnni", "avx_vnni") and not refrag.cpu_has("amx_bf16")
    return known and int(torch._int_mm(full, full.T)[0, 0]) == 64 * 127**2


def largest_inputs(body: nn.Module) -> dict[nn.Module, Tensor]:
    """For each linear map of a decoder the largest magnitudes of its input (in,), over tokens from all the vocabulary:
    they tell which columns stand out as well as a text does."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, given: tuple[Tensor]) -> None:
        found[module] = given[0][0, 8:].abs().amax(0).float()  # the first positions stand out in every model

    hooks = [part.register_forward_pre_hook(look) for part in body.modules() if isinstance(part, nn.Linear)]
    vocabulary = body.config.vocab_size
    body(torch.arange(0, vocabulary, max(1, vocabulary // 128))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


STEP_ENGINES = {"auto": smallest_matrix, "int8": Int8Matrix, "int4": Int4Matrix}


class LayerMatrices(NamedTuple):
    """One layer's matrices. The weights of the norms and the scale of the scores are in them."""
    attend: Int4Matrix | Int8Matrix  # queries, keys and values, one below the other
    leave: Int4Matrix | Int8Matrix
    widen: Int4Matrix | Int8Matrix  # the feed-forward's gate and its input, one below the other
    narrow: Int4Matrix | Int8Matrix


ROWS = 1024  # positions of a prompt that go through a layer together: more take memory, fewer time
LONG = 2048  # positions of a prompt from which its keys and values are kept in 8 bits; below it gains no time


class Int8Prompt:
    """The keys and values of a long prompt's first positions, (n, T, D) each, in 8 bits with a scale a position: a step
    reads a quarter of what it would in float32, and torch has no fast kernel between the two."""

    def __init__(self, keys: Tensor, values: Tensor):
        def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
            scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
            return (x / scale).round_().to(torch.int8), scale[..., 0]

        (keys, key_scale), (values, self.value_scale) = rounded(keys), rounded(values)
        self.keys = list(zip(keys, key_scale.bfloat16(), strict=True))  # (T, D), (T,) of each head
        self.values = list(values.transpose(1, 2).contiguous())  # (D, T) of each
        self.ones = torch.ones(values.shape[2], dtype=torch.bfloat16)

    def scores(self, query: Tensor) -> Tensor:
        """query: (n, G, D). Returns (n, G, T)."""
        rows = zip(query.bfloat16(), self.keys, strict=True)
        return torch.stack([torch._weight_int8pack_mm(x, *keys) for x, keys in rows]).float()

    def mix(self, weights: Tensor) -> Tensor:
        """The values' sum by weights (n, G, T). Returns (n, G, D)."""
        rows = zip((weights * self.value_scale[:, None]).bfloat16(), self.values, strict=True)
        return torch.stack([torch._weight_int8pack_mm(x, values, self.ones) for x, values in rows]).float()


class LayerCache(NamedTuple):
    """One layer's keys and values, and views of them made once: a view for each step costs as much as a product."""
    prompt: Int8Prompt | None  # what stands before the others
    both: Tensor  # (2, B, key heads, room, width of a head)
    keys: Tensor  # (B * key heads, width of a head, room)
    values: Tensor  # (B * key heads, room, width of a head)

    @classmethod
    def over(cls, prompt: Int8Prompt | None, both: Tensor) -> LayerCache:
        keys, values = both.flatten(1, 2)
        return cls(prompt, both, keys.transpose(1, 2), values)


class FixedCache(NamedTuple):
    """Keys and values with room for the tokens to come: growing them by copies costs more than the step itself."""
    stepper: Stepper
    layers: list[LayerCache]
    length: int  # positions that are filled, without those in 8 bits


class Stepper:
    """Steps of one token a sequence, without the detours of the library's modules: matrices in 8 or 4 bits, and what
    lies between them in float32. decoder: one that it `fits`; engine: a key of STEP_ENGINES."""

    @torch.inference_mode()
    def __init__(self, decoder: nn.Module, engine: str = "auto"):
        config, body = decoder.config, decoder.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.embed, self.rotary = decoder.get_input_embeddings(), body.rotary_emb
        self.head_width, width = body.layers[0].self_attn.head_dim, self.embed.embedding_dim
        self.root, self.least = width**0.5, torch.tensor((width * config.rms_norm_eps) ** 0.5)
        largest = largest_inputs(body) if multiplies_integers() else {}
        self.layers = [self.layer(block, STEP_ENGINES[engine], largest) for block in body.layers]
        self.head = Int8Matrix(decoder.get_output_embeddings().weight, columns=body.norm.weight * self.root)
        self.engine = "+".join(sorted({matrix.kind for layer in self.layers for matrix in layer}))
        self.reads = bool(largest) and self.engine == "int8"  # prompts, too

    @staticmethod
    def fits(decoder: nn.Module, engine: str = "auto") -> bool:
        """Whether it computes what the decoder does: layers like Llama's, none of them changed, on a CPU."""
        if type(decoder).__name__ not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
            return False
        config, biased = decoder.config, ("q_proj", "k_proj", "v_proj")
        takes = (Int4Matrix if engine == "int4" else Int8Matrix).takes
        plain = all(type(module) is nn.Linear and (module.bias is None or name.endswith(biased))
                    and (takes if name.endswith("_proj") else Int8Matrix.takes)(*module.weight.shape)
                    for name, module in decoder.named_modules() if name.endswith(("_proj", "lm_head")))
        return (plain and decoder.device.type == "cpu" and config.hidden_act == "silu"
                and getattr(config, "sliding_window", None) is None)

    def layer(self, block: nn.Module, matrix: Callable[..., Int4Matrix | Int8Matrix],
              largest: dict[nn.Module, Tensor]) -> LayerMatrices:
        attention, mlp = block.self_attn, block.mlp
        before, between = (norm.weight * self.root for norm in (block.input_layernorm, block.post_attention_layernorm))
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj

        def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (.., heads D) each
            turned = torch.cat([query * self.head_width**-0.5, key], dim=-1)
            return torch.cat([paired(turned.unflatten(-1, (-1, self.head_width))).flatten(-2), value], dim=-1)

        biases = None if query.bias is None else joined(query.bias, key.bias, value.bias).float()
        return LayerMatrices(
            matrix(joined(query.weight.T, key.weight.T, value.weight.T).T, biases, before, largest.get(query)),
            matrix(attention.o_proj.weight, largest=largest.get(attention.o_proj)),
            matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None, between, largest.get(mlp.gate_proj)),
            matrix(mlp.down_proj.weight, largest=largest.get(mlp.down_proj)))

    def turn(self, positions: Tensor) -> Tensor:
        """Rotary position embedding as complex numbers. positions: (B, T). Returns (B, T, D / 2)."""
        cos, sin = (part[..., : self.head_width // 2].float() for part in self.rotary(self.least, positions))
        return torch.complex(cos, sin)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Tensor], start: DecoderState) -> tuple[Tensor, DecoderState]:
        """The same as `prefill` for one prompt (T, W) after a start."""
        [inputs], cache, known = prompts, copy.deepcopy(start.cache), int(start.position)
        H, G, D, T = self.heads, self.kv_heads, self.head_width, len(inputs)
        x, turn = inputs.float(), self.turn(torch.arange(known, known + T)[:, None])
        for number, layer in enumerate(self.layers):
            made = torch.cat([layer.attend.many(self.norm(rows)) for rows in x.split(ROWS)])
            made = made.view(T, H + 2 * G, D // 2, 2)
            turned = torch.view_as_real(torch.view_as_complex(made[:, : H + G]).mul_(turn))
            apart = torch.cat([turned.transpose(2, 3).flatten(2), made[:, H + G :].flatten(2)], dim=1)  # no more paired
            query, key, value = apart.to(cache.layers[number].keys.dtype).transpose(0, 1).split([H, G, G])
            keys, values = cache.update(key[None], value[None], number)
            if layer is self.layers[-1]:  # after it only the last position is asked for
                query, x = query[:, -1:], x[-1:]
            mixed = causal_attention(query, keys[0], values[0], 1.0, None).transpose(0, 1).reshape(len(x), H * D)
            for rows, heads in zip(x.split(ROWS), mixed.split(ROWS), strict=True):
                rows += layer.leave.many(heads)
                gate, up = layer.widen.many(self.norm(rows)).chunk(2, dim=-1)
                rows += layer.narrow.many(nn.functional.silu(gate).mul_(up))
        return self.head(self.norm(x)).float(), start._replace(cache=cache, position=start.position + T)

    def adopt(self, state: DecoderState, room: int) -> DecoderState:
        """The state of a prompt that the decoder has read, with room for so many tokens more."""
        layers = state.cache.layers
        B, G, T, D = layers[0].keys.shape
        first = 16 * (T // 16) if T >= LONG and D % 16 == 0 else 0  # positions in 8 bits; the kernel takes 16 numbers

        def roomy(layer: Any) -> LayerCache:
            keys, values = paired(layer.keys), layer.values
            prompt = Int8Prompt(keys[:, :, :first].flatten(0, 1), values[:, :, :first].flatten(0, 1)) if first else None
            both = torch.empty(2, B, G, T - first + room, D)
            both[0, :, :, : T - first], both[1, :, :, : T - first] = keys[:, :, first:], values[:, :, first:]
            return LayerCache.over(prompt, both)

        return state._replace(cache=FixedCache(self, [roomy(layer) for layer in layers], T - first))

    def step(self, token: Tensor, cache: FixedCache, mask: Tensor | None,
             position: Tensor) -> tuple[Tensor, FixedCache]:
        """(logits (B, V), cache). token, position: (B,); mask: (B, T + 1) or None. The cache given is used up."""
        if cache.length == cache.layers[0].values.shape[1]:
            more = (0, 0, 0, max(32, cache.length // 4))
            grown = [LayerCache.over(one.prompt, nn.functional.pad(one.both, more)) for one in cache.layers]
            cache = cache._replace(layers=grown)
        T = cache.length + 1
        x = self.embed.weight[token].float()  # (B, W)
        turn = self.turn(position[:, None])
        hidden = None if mask is None else (mask == 0).repeat_interleave(self.kv_heads, 0)[:, None]  # (B * G, 1, T)
        for layer, held in zip(self.layers, cache.layers, strict=True):
            x = x + self.attend(layer, x, held, T, turn, hidden)
            gate, up = layer.widen(self.norm(x)).chunk(2, dim=-1)
            x = x + layer.narrow(nn.functional.silu(gate) * up)
        return self.head(self.norm(x)).float(), cache._replace(length=T)

    def norm(self, x: Tensor) -> Tensor:
        """(B, W) over its length, eps as in the norm; the root of W that is lacking is in the matrices' columns."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.least)

    def attend(self, layer: LayerMatrices, x: Tensor, held: LayerCache, T: int, turn: Tensor,
               hidden: Tensor | None) -> Tensor:
        """(B, W), what attention adds. The token's own key and value are filled in at T - 1. hidden: all positions."""
        B, H, G, D = len(x), self.heads, self.kv_heads, self.head_width
        made = layer.attend(self.norm(x)).float().view(B, H + 2 * G, D // 2, 2)
        torch.view_as_complex(made.narrow(1, 0, H + G)).mul_(turn)
        held.both.select(3, T - 1).copy_(made.narrow(1, H, 2 * G).view(B, 2, G, D).transpose(0, 1))
        query = made.narrow(1, 0, H).reshape(B * G, H // G, D)
        scores = torch.bmm(query, held.keys.narrow(2, 0, T))  # (B * G, heads of a key, T)
        if held.prompt is not None:
            scores = torch.cat([held.prompt.scores(query), scores], dim=2)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        weights = scores.softmax(-1)
        mixed = torch.bmm(weights[..., -T:], held.values.narrow(1, 0, T))
        if held.prompt is not None:
            mixed += held.prompt.mix(weights[..., :-T])
        return layer.leave(mixed.view(B, H * D))


def make_stepper(decoder: nn.Module, engine: str) -> Stepper | None:
    """What takes the steps by --engine, None for the decoder itself. Raises UserError if it is not for this one."""
    if engine == "model" or (engine == "auto" and not Stepper.fits(decoder)):
        return None
    require(Stepper.fits(decoder, engine), f"--engine {engine} is for Llama and its like on a CPU: leave it out")
    return Stepper(decoder, engine)


def paired(x: Tensor) -> Tensor:
    """A head's width (.., D) with its halves interleaved, so that rotary position embedding is one complex product.

    With queries and keys alike, their products stay what they are. Example: [1, 2, 3, 4] -> [1, 3, 2, 4]
    """
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)
