"""`refrag.py train_gate`: the gate learns from retrieved questions which chunks hold the answer. Also what it shares
with `train_policy`: reading those questions, writing the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import refrag
from refrag import (
    Embedder,
    GateConfig,
    GateDataConfig,
    GateExample,
    Index,
    IndexConfig,
    ModelConfig,
    QueryGate,
    Retrieved,
    RuntimeConfig,
    SearchConfig,
    Searcher,
    require,
)
from refrag_extras import reports


class GateData(NamedTuple):
    searcher: Searcher
    questions: list[Retrieved]
    examples: list[GateExample]
    held_out: list[GateExample]


def gate_examples(questions: list[Retrieved], index: Index, chunking: refrag.Chunking,
                  topk: int) -> list[GateExample]:
    """Examples of the questions for which a right passage with an answer was retrieved."""
    examples = []
    for number, (item, rows, query) in enumerate(refrag.progress(questions, "features", len(questions), "question")):
        rows = rows[:topk]
        contents = [chunking.tokenizer.neutralize(index[row].content) for row in rows]
        docs = refrag.make_docs(contents, rows, chunking.k, chunking.tokenizer, index)
        right = [bool(index[row].names & set(item["positive_ids"])) for row in rows]
        spans = refrag.answer_chunks(docs, right, item["answers"])
        if spans:
            inputs = refrag.gate_input(item["question"], docs, query, index)
            sizes = np.concatenate([doc.chunks.sizes for doc in docs]).astype(np.int64)
            slim = inputs._replace(texts=[], vectors=inputs.vectors.astype(np.float16))
            examples.append(GateExample(number, slim, refrag.chunk_features(inputs), sizes, spans))
    return examples


def load_gate_data(data: GateDataConfig, index: IndexConfig, search: SearchConfig, models: ModelConfig,
                   runtime: RuntimeConfig) -> GateData:
    searcher = refrag.load_searcher(index, search, runtime)
    opened = searcher.index
    require(searcher.embedder is not None and opened.manifest["retriever"] == "hybrid",
            f"--index_dir {index.index_dir}: the gate learns from vectors and BM25: build the index with --retriever "
            "hybrid")
    chunking = refrag.Chunking(data.k, refrag.build_tokenizer(refrag.model_config(models)))
    if opened.manifest["chunking"]["tokenizer"] != chunking.tokenizer.fingerprint:
        raise refrag.MismatchError("the index was built with another --enc or --dec: use the same, or build it again")
    stored = opened.manifest["chunking"]["k"]
    require(opened.serves(data.k), f"--k {data.k}: the index's chunks of {stored} tokens do not make chunks of "
            f"{data.k}: give --k {stored}, or build the index with another")
    files = (data.rag_json, "--rag_json", data.limit), (data.eval_json, "--eval_json", data.eval_limit)
    answered = [[item for name in names for item in refrag.read_answered_questions(name, flag, limit)]
                for names, flag, limit in files]
    questions, other = (refrag.retrieve_all(items, searcher, search) for items in answered)
    examples, held_out = (gate_examples(part, opened, chunking, search.topk) for part in (questions, other))
    require(bool(examples), "--rag_json: not one question has its answer in a retrieved passage of its positive_ids")
    return GateData(searcher, questions, examples, held_out)


def train_scorer(kind: str, data: GateDataConfig, index: IndexConfig, search: SearchConfig, models: ModelConfig,
                 runtime: RuntimeConfig, steps: int, fit: Callable[[QueryGate, GateData], list], **shape: bool) -> None:
    """Train a "gate" or a "policy" on retrieved questions, write it, print a summary. fit: trains it, returns records;
    shape: of the `QueryGate`."""
    times = [time.perf_counter()]
    loaded = load_gate_data(data, index, search, models, runtime)
    embedder, device = loaded.searcher.embedder, refrag.pick_device(runtime.device)
    times.append(time.perf_counter())
    torch.manual_seed(runtime.seed)
    gate = QueryGate(embedder.dim, **shape).to(device)
    records = fit(gate, loaded)
    gate.half().float()  # examine the weights as they are stored
    recall = refrag.gate_recall(gate, loaded.held_out, data.p)
    times.append(time.perf_counter())
    entry = {"phase": f"train_{kind}", "steps": steps, "tokens": len(loaded.examples), "train": kind,
             "device": str(gate.mean.device), "recall": recall}
    save_gate(kind, gate, embedder, data, models, entry)
    summary = {"questions": len(loaded.questions), "examples": len(loaded.examples), "held_out": len(loaded.held_out),
               "recall": recall, "parameters": sum(p.numel() for p in gate.parameters()), "records": records,
               "prepare_s": round(times[1] - times[0], 1), "train_s": round(times[2] - times[1], 1),
               "checkpoint": data.out_dir}
    refrag.emit(summary, runtime, gate_text(summary))


def save_gate(kind: str, gate: QueryGate, embedder: Embedder, data: GateDataConfig, models: ModelConfig,
              entry: dict[str, Any]) -> None:
    """Write --out_dir: the parts of --load_dir's checkpoint, if there is one, with this gate or policy."""
    checkpoint, parts = refrag.find_checkpoint(models), {}
    config = refrag.model_config(models, checkpoint)
    if checkpoint is not None:
        checkpoint.verify()
        names = {path.stem for path in checkpoint.path.glob("*.safetensors")} - {"trainer"}
        parts = {name: checkpoint.tensors(name) for name in names}
    setattr(config, kind, {**gate.shape, "feature_names": refrag.FEATURE_NAMES if gate.shape["features"] else [],
                           "embedder": embedder.name, "embedder_fingerprint": embedder.fingerprint})
    parts[kind] = {name: tensor.half() for name, tensor in refrag.part_tensors(gate).items()}
    files = refrag.file_facts([*data.rag_json, *data.eval_json])
    config.history = [*config.history, entry | {"data": refrag.without_folders(files)}]
    refrag.write_checkpoint(Path(data.out_dir), config, parts, card=reports.model_card(config, []))


def gate_text(summary: dict[str, Any]) -> str:
    shown = ", ".join(f"{value:.3f} at p = {p}" for p, value in summary["recall"].items())
    return (f"{summary['examples']:,} of {summary['questions']:,} questions, {summary['parameters']:,} parameters, "
            f"trained in {summary['train_s']:.0f} s -> {summary['checkpoint']}\n"
            f"{summary['held_out']:,} held-out questions, answer recall: {shown or 'none'}")


def run(data: GateDataConfig, settings: GateConfig, index: IndexConfig, search: SearchConfig, models: ModelConfig,
        runtime: RuntimeConfig) -> None:
    def fit(gate: QueryGate, loaded: GateData) -> list[dict[str, Any]]:
        return refrag.fit_gate(gate, loaded.examples, loaded.held_out, settings, data.p, runtime.seed)

    train_scorer("gate", data, index, search, models, runtime, settings.epochs, fit)
