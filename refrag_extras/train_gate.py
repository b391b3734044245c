"""`refrag.py train_gate`: the gate learns from retrieved questions which chunks hold the answer. Also what it shares
with `train_policy`: reading those questions, writing the checkpoint."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import refrag
from refrag import GateConfig, GateDataConfig, IndexConfig, ModelConfig, QueryGate, RuntimeConfig, SearchConfig, require
from refrag_extras import reports
from refrag_extras.runs import file_facts, without_folders

GATE_LR = 1e-3  # at its peak
CHUNKWISE = 0.2  # weight of the chunkwise cross entropy beside the listwise one


class GateExample(NamedTuple):
    number: int  # of the question
    inputs: refrag.GateInput  # without its texts
    features: np.ndarray  # (L, F)
    tokens: np.ndarray  # (L,), encoder tokens of each chunk
    spans: list[list[int]]  # see `answer_chunks`

    @property
    def positive(self) -> np.ndarray:
        """(L,) bool: chunks that hold an answer, or a part of one."""
        return np.isin(np.arange(len(self.tokens)), [chunk for span in self.spans for chunk in span])


def example_logits(gate: QueryGate, examples: Sequence[GateExample]) -> Tensor:
    """(B, L) logits of examples, -inf where padded."""
    return gate.batch_logits([e.inputs for e in examples], [e.features for e in examples])


@torch.inference_mode()
def gate_recall(gate: QueryGate, examples: Sequence[GateExample], shares: Sequence[float]) -> dict[str, float]:
    """Share of the examples with at least one answer span kept as text, by p; empty without examples."""
    found: dict[str, list[bool]] = {f"{p:g}": [] for p in shares if examples}
    for part in refrag.batched(examples, 64):
        for example, logits in zip(part, example_logits(gate, part).float().cpu().numpy(), strict=True):
            for p in shares:
                chosen = refrag.select_chunks(logits[: len(example.tokens)], example.tokens, p)
                found[f"{p:g}"].append(any(chosen[span].all() for span in example.spans))
    return {p: round(sum(hits) / len(hits), 4) for p, hits in found.items()}


def gate_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """-log of the softmax's mass on the positive chunks, plus CHUNKWISE times the summed binary cross entropy of all
    chunks (which grows with L); mean over questions. logits: (B, L), -inf where padded; positive: (B, L) bool.
    """
    real = logits > -math.inf
    chosen = logits.masked_fill(~positive, -math.inf).logsumexp(-1)
    each = nn.functional.binary_cross_entropy_with_logits(logits[real], positive[real].float(), reduction="sum")
    return (logits.logsumexp(-1) - chosen).mean() + CHUNKWISE * each / len(logits)


def descend(loss: Tensor, gate: QueryGate, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fit_gate(gate: QueryGate, examples: list[GateExample], held_out: list[GateExample], settings: GateConfig,
             p: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Train a gate in place. Returns a record per epoch with its loss and held-out recall at each p."""
    rng = np.random.default_rng(seed)
    stacked = np.concatenate([example.features for example in examples])
    gate.mean.copy_(torch.from_numpy(stacked.mean(0)))
    gate.deviation.copy_(torch.from_numpy(stacked.std(0) + 1e-3))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=GATE_LR, weight_decay=0.01)
    epochs = [refrag.batched(rng.permutation(len(examples)), settings.batch_size) for _ in range(settings.epochs)]
    batches = [[examples[i] for i in numbers] for epoch in epochs for numbers in epoch]
    each, losses, records = len(batches) // settings.epochs, [], []
    for number, batch in enumerate(refrag.progress(batches, "train_gate", unit="step")):
        optimizer.param_groups[0]["lr"] = GATE_LR * refrag.learning_rate_factor(number, len(batches), 0.05)
        logits = example_logits(gate, batch)
        loss = gate_loss(logits, refrag.padded_rows([example.positive for example in batch], False).to(logits.device))
        descend(loss, gate, optimizer)
        losses.append(loss.item())
        if len(losses) % each == 0:
            records.append({"epoch": len(losses) // each, "loss": round(float(np.mean(losses[-each:])), 4),
                            "recall": gate_recall(gate, held_out, p)})
    return records


class GateData(NamedTuple):
    searcher: refrag.Searcher
    questions: list[refrag.Retrieved]
    examples: list[GateExample]
    held_out: list[GateExample]


def answer_chunks(docs: Sequence[refrag.Doc], right: Sequence[bool], answers: Sequence[str]) -> list[list[int]]:
    """The chunks that each occurrence of an answer in a right document covers, numbered through all documents.

    Case is ignored; occurrences inside a word count only in a document without others.
    Example: "an old mill" in chunks that end at 4 and 11, answer "old mill" -> [[0, 1]]
    """
    spans, base = [], 0
    for doc, is_right in zip(docs, right, strict=True):
        for answer in answers if is_right else ():
            plain = re.escape(answer.strip())
            found = list(re.finditer(rf"(?<!\w){plain}(?!\w)", doc.content, re.IGNORECASE))
            for match in found or re.finditer(plain, doc.content, re.IGNORECASE):
                first, last = np.searchsorted(doc.chunks.ends, [match.start(), match.end() - 1], side="right")
                spans.append(list(range(base + int(first), base + int(last) + 1)))
        base += len(doc.chunks.ends)
    return spans


def gate_examples(questions: list[refrag.Retrieved], index: refrag.Index, chunking: refrag.Chunking,
                  topk: int) -> list[GateExample]:
    """Examples of the questions for which a right passage with an answer was retrieved."""
    examples = []
    for number, (item, rows, query) in enumerate(refrag.progress(questions, "features", len(questions), "question")):
        rows = rows[:topk]
        contents = [chunking.tokenizer.neutralize(index[row].content) for row in rows]
        docs = refrag.make_docs(contents, rows, chunking.k, chunking.tokenizer, index)
        right = [bool(index[row].names & set(item["positive_ids"])) for row in rows]
        spans = answer_chunks(docs, right, item["answers"])
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
    recall = gate_recall(gate, loaded.held_out, data.p)
    times.append(time.perf_counter())
    entry = {"phase": f"train_{kind}", "steps": steps, "tokens": len(loaded.examples), "train": kind,
             "device": str(gate.mean.device), "recall": recall}
    save_gate(kind, gate, embedder, data, models, entry)
    summary = {"questions": len(loaded.questions), "examples": len(loaded.examples), "held_out": len(loaded.held_out),
               "recall": recall, "parameters": sum(p.numel() for p in gate.parameters()), "records": records,
               "prepare_s": round(times[1] - times[0], 1), "train_s": round(times[2] - times[1], 1),
               "checkpoint": data.out_dir}
    refrag.emit(summary, runtime, gate_text(summary))


def save_gate(kind: str, gate: QueryGate, embedder: refrag.Embedder, data: GateDataConfig, models: ModelConfig,
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
    files = file_facts([*data.rag_json, *data.eval_json])
    config.history = [*config.history, entry | {"data": without_folders(files)}]
    refrag.write_checkpoint(Path(data.out_dir), config, parts, card=reports.model_card(config, []))


def gate_text(summary: dict[str, Any]) -> str:
    shown = ", ".join(f"{value:.3f} at p = {p}" for p, value in summary["recall"].items())
    return (f"{summary['examples']:,} of {summary['questions']:,} questions, {summary['parameters']:,} parameters, "
            f"trained in {summary['train_s']:.0f} s -> {summary['checkpoint']}\n"
            f"{summary['held_out']:,} held-out questions, answer recall: {shown or 'none'}")


def run(data: GateDataConfig, settings: GateConfig, index: IndexConfig, search: SearchConfig, models: ModelConfig,
        runtime: RuntimeConfig) -> None:
    def fit(gate: QueryGate, loaded: GateData) -> list[dict[str, Any]]:
        return fit_gate(gate, loaded.examples, loaded.held_out, settings, data.p, runtime.seed)

    train_scorer("gate", data, index, search, models, runtime, settings.epochs, fit)
