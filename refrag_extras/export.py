"""`refrag.py export`: a mixed prompt as embeddings, and the request that vLLM takes it in."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from refrag import Pipeline, new_folder, show_plan


def export_prompt(pipeline: Pipeline, item: dict[str, Any], folder: Path, with_decoder: bool) -> dict[str, Any]:
    """Write prompt.safetensors, prompt.json, request.json and, if asked for, decoder/. Returns what prompt.json holds.

    request.json is for `vllm serve DECODER --enable-prompt-embeds` and its address /v1/completions, which takes a saved
    tensor (T, D) in base64 and adds no chat template of its own.
    """
    context, inputs = pipeline.prepare(item)
    packed, decoder = context.packed, pipeline.model.decoder
    inputs = inputs.detach().contiguous().cpu()
    contents = [doc.content for doc in packed.docs]
    ids = dict(zip(context.labels, (p.id for p in context.passages), strict=False))
    facts = {
        "question": item["question"], "positions": len(context.plan), "full_positions": len(packed.prompt.input_ids),
        "documents": [{"label": doc.label, "id": ids.get(doc.label, doc.label)} for doc in packed.docs],
        "prompt": show_plan(packed.prompt, context.plan, pipeline.tokenizer, contents),
        "stop_token_ids": sorted(pipeline.stops), "max_tokens": pipeline.generate.max_new,
        "dtype": str(inputs.dtype).removeprefix("torch."), "settings": pipeline.settings()}
    data = io.BytesIO()
    torch.save(inputs, data)
    request = {"model": "DECODER", "prompt_embeds": base64.b64encode(data.getvalue()).decode(), "stream": False,
               **{name: facts[name] for name in ("max_tokens", "stop_token_ids")},
               "temperature": pipeline.generate.temperature, "top_p": pipeline.generate.top_p}
    with new_folder(folder) as temporary:
        save_file({"inputs_embeds": inputs}, temporary / "prompt.safetensors",
                  {"positions": str(len(inputs)), "question": item["question"]})
        (temporary / "prompt.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "request.json").write_text(json.dumps(request) + "\n", encoding="utf-8")
        if with_decoder:
            decoder.save_pretrained(temporary / "decoder")
            pipeline.tokenizer.decoder.save_pretrained(temporary / "decoder")
    return facts
