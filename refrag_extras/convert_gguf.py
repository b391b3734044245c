"""Converts the bundled decoder, a GGUF file of a Llama with a byte-level BPE tokenizer, to a Hugging Face folder in
float32. Transformers would parse the file four times (40 s instead of 10) and not split numbers into digits.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import tokenizers as tk
import torch
import transformers
from safetensors.torch import save_file

import refrag

GGUF_NAMES = {"token_embd": "embed_tokens", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj", "output_norm": "norm"}


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the folder that `AutoModelForCausalLM` and `AutoTokenizer` read."""
    reader = gguf.GGUFReader(str(path))
    facts = {name.rpartition(".")[2]: value.contents() for name, value in reader.fields.items()}
    config = transformers.LlamaConfig(
        vocab_size=facts["vocab_size"], hidden_size=facts["embedding_length"], num_hidden_layers=facts["block_count"],
        intermediate_size=facts["feed_forward_length"], num_attention_heads=facts["head_count"],
        num_key_value_heads=facts["head_count_kv"], head_dim=facts["dimension_count"], tie_word_embeddings=True,
        max_position_embeddings=facts["context_length"], rms_norm_eps=facts["layer_norm_rms_epsilon"],
        rope_theta=facts["freq_base"], bos_token_id=facts["bos_token_id"], eos_token_id=facts["eos_token_id"],
        pad_token_id=facts["padding_token_id"], architectures=["LlamaForCausalLM"], dtype="float32")
    tensors = {}
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        layer, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        if name in ("attn_q", "attn_k"):  # GGUF alternates the two halves of a head, which rotary positions turn
            pairs = weights.reshape(-1, config.head_dim // 2, 2, config.hidden_size)
            weights = pairs.swapaxes(1, 2).reshape(weights.shape)
        where = f"model.{layer.replace('blk', 'layers')}.".replace("..", ".")
        tensors[f"{where}{GGUF_NAMES[name]}.weight"] = torch.tensor(weights)
    words = facts["tokens"]
    bpe = tk.Tokenizer(tk.models.BPE({word: i for i, word in enumerate(words)},
                                     [tuple(merge.split(" ")) for merge in facts["merges"]]))
    bpe.pre_tokenizer = tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True),
                                                    tk.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tk.decoders.ByteLevel()
    bpe.add_special_tokens([word for word, kind in zip(words, facts["token_type"], strict=True)
                            if kind == gguf.TokenType.CONTROL])
    special = {f"{name}_token": words[facts[f"{key}_token_id"]] for name, key in
               (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=facts["chat_template"],
                                         **special).save_pretrained(folder)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def convert_once(path: Path, folder: Path) -> None:
    """Convert a file into the cache, unless another process is doing so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with refrag.exclusive(folder.with_suffix(".lock"), f"{folder}", timeout=600):
        if not folder.is_dir():
            refrag.notice(f"converting {path.name} once, into {folder} (about ten seconds)")
            with refrag.new_folder(folder) as temporary:
                convert_gguf(path, temporary)
