"""The most common kind of embedder, all-MiniLM-L6-v2 among them, by transformers alone. See `load_embedder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from refrag import SAFE, batched


class MeanEmbedder(nn.ModuleList):
    """The most common sentence-transformers model, the mean of token states at unit length, without the two seconds
    that importing the library takes. Names and numbers are the library's."""

    similarity_fn_name = prompts = None

    def __init__(self, path: str):
        model = AutoModel.from_pretrained(path, dtype=torch.float32, **SAFE)
        super().__init__([nn.ModuleDict({"model": model})])  # as the library names its weights
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.max_seq_length = json.loads(Path(path, "sentence_bert_config.json").read_text())["max_seq_length"]

    @staticmethod
    def fits(path: str) -> bool:
        """Whether a folder holds such a model, and no more than that."""
        names = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
                 "config_sentence_transformers.json")
        try:
            modules, pooling, words, more = (json.loads(Path(path, name).read_text(encoding="utf-8")) for name in names)
        except OSError:
            return False
        return ([(one["type"].rpartition(".")[2], one["path"]) for one in modules] == [
                    ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
                and {key for key, value in pooling.items() if value is True} == {"pooling_mode_mean_tokens"}
                and not words.get("do_lower_case") and more.keys() == {"__version__"})

    @property
    def transformers_model(self) -> PreTrainedModel:
        return self[0]["model"]

    def get_embedding_dimension(self) -> int:
        return self.transformers_model.config.hidden_size

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int = 32, output_value: str | None = "sentence_embedding",
               **_: Any) -> list[Any]:
        """The vector (dim,) of each text; without an output_value also its token states, as the library gives them."""
        found: dict[int, dict[str, Tensor]] = {}
        for batch in batched(np.argsort([-len(text) for text in texts]).tolist(), batch_size):
            tokens = self.tokenizer([texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt",
                                    max_length=self.max_seq_length).to(self.transformers_model.device)
            states = self.transformers_model(**tokens).last_hidden_state  # (B, T, dim)
            mask = tokens["attention_mask"][..., None].to(states.dtype)
            means = (states * mask).sum(1, dtype=torch.float32) / mask.sum(1, dtype=torch.float32)
            vectors = nn.functional.normalize(means.to(states.dtype), dim=1)  # (B, dim)
            columns = ("sentence_embedding", vectors), ("token_embeddings", states), ("attention_mask", mask[..., 0])
            found |= {i: {name: column[row] for name, column in columns} for row, i in enumerate(batch)}
        return [found[i][output_value].float().cpu() if output_value else found[i] for i in range(len(texts))]

    encode_query = encode_document = encode
