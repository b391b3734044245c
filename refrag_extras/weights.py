"""Loading a model whole: no weight that its folder lacks is made up, as transformers would with a mere warning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

import refrag


@torch.no_grad()
def load(kind: Any, name: str, device: torch.device, **options: Any) -> nn.Module:
    """A model by one of transformers' automatic classes; of T5 and the like the encoder. Raises MismatchError for a
    weight that the folder lacks or has in another shape. A pooler (roberta-base has none) is zeros then: nothing reads
    it, but it is in the fingerprint."""
    with refrag.hub_errors(name):
        model, found = kind.from_pretrained(refrag.model_folder(name), output_loading_info=True,
                                            ignore_mismatched_sizes=True, **refrag.SAFE, **options)
    part = model.get_encoder() if refrag.takes(type(model), "decoder_input_ids") else model
    weights, used = model.state_dict(), {tensor.data_ptr() for tensor in part.state_dict().values()}
    for key in sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]}):
        if "pooler." in key:
            weights[key].zero_()
        elif weights[key].data_ptr() in used:
            raise refrag.MismatchError(f"model {name}: its folder lacks {key} of shape {tuple(weights[key].shape)}, "
                                       "which its config.json asks for: save the whole model there")
    return part.to(device).eval()


def load_first_layers(config: refrag.RefragConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The decoder without its head, and with no more layers than the encoder is cut from. The others are not read."""
    layers, name = refrag.encoder_layers(config.encoder_name_or_path) or 0, config.decoder_name_or_path
    with refrag.hub_errors(name):
        shape = AutoConfig.from_pretrained(refrag.model_folder(name))
    refrag.cut_config(shape, min(layers, shape.num_hidden_layers))  # layers beyond these would be missing
    return load(AutoModel, name, device, config=shape, dtype=dtype)
