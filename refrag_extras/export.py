"""`refrag.py export`: a mixed prompt as embeddings, and the request that sends it to vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import refrag
from refrag_extras import vllm_engine
from refrag_extras.generate import answering, read_prompt, read_questions


def run(export: refrag.ExportConfig, ask: refrag.QuestionConfig, index: refrag.IndexConfig, search: refrag.SearchConfig,
        pack: refrag.PackConfig, generate: refrag.GenerateConfig, models: refrag.ReaderConfig,
        runtime: refrag.RuntimeConfig) -> None:
    """Write the prompt of one question."""
    questions = read_prompt(generate.prompt, ask) or read_questions(ask)
    refrag.require(len(questions) == 1, "--questions: export writes one prompt, so name one question")
    runtime.require_decoder("export")
    pipeline = answering(ask, index, search, pack, generate, models, runtime)
    facts = export_prompt(pipeline, questions[0], Path(export.out_dir), export.decoder)
    files = ", ".join(sorted(path.name for path in Path(export.out_dir).iterdir()))
    refrag.emit(facts | {"out_dir": export.out_dir}, runtime,
                f"{facts['positions']:,} positions in {export.out_dir}: {files}")


def export_prompt(pipeline: refrag.Pipeline, item: dict[str, Any], folder: Path, with_decoder: bool) -> dict[str, Any]:
    """Write prompt.safetensors, prompt.json, request.json and, if asked for, decoder/. Returns what prompt.json holds.

    request.json is for `vllm serve DECODER --enable-prompt-embeds` and its address /v1/completions, which takes a saved
    tensor (T, D) in base64 and adds no chat template of its own.
    """
    reading, settings, decoder = pipeline.prepare(item), pipeline.settings, pipeline.model.decoder
    context, plan, inputs = reading.context, reading.plan, reading.inputs.detach().contiguous().cpu()
    ids = dict(zip(reading.labels, (p.id for p in reading.passages), strict=False))
    facts = {
        "question": item["question"], "positions": len(plan), "full_positions": len(context.prompt.input_ids),
        "documents": [{"label": label, "id": ids.get(label, label)} for label in reading.labels],
        "prompt": refrag.show_plan(context, plan, pipeline.tokenizer),
        "stop_token_ids": sorted(settings.stop_tokens), "max_tokens": settings.max_new,
        "dtype": str(inputs.dtype).removeprefix("torch."), "settings": pipeline.describe(settings)}
    request = {"model": "DECODER", "prompt_embeds": vllm_engine.in_base64(inputs), "stream": False,
               **{name: facts[name] for name in ("max_tokens", "stop_token_ids")},
               "temperature": settings.temperature, "top_p": settings.top_p}
    with refrag.new_folder(folder) as temporary:
        save_file({"inputs_embeds": inputs}, temporary / "prompt.safetensors",
                  {"positions": str(len(inputs)), "question": item["question"]})
        (temporary / "prompt.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "request.json").write_text(json.dumps(request) + "\n", encoding="utf-8")
        if with_decoder:
            decoder.save_pretrained(temporary / "decoder")
            pipeline.tokenizer.decoder.save_pretrained(temporary / "decoder")
            vllm_engine.write_reference(pipeline.model)
    return facts
