"""`refrag.py train_gate` and `train_policy`: what scores chunks, trained on retrieved questions.

The gate learns which chunks hold the answer; the paper's policy learns from the decoder's log-probability of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import refrag

GATE_LR = 1e-3  # at its peak
CHUNKWISE = 0.2  # weight of the chunkwise cross entropy beside the listwise one
CLIP = 0.2  # how far from 1 the policy's ratio of new to old probability counts
REUSE = 2  # optimizer steps of the policy on what was drawn once


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


class GateData(NamedTuple):
    searcher: refrag.Searcher
    questions: list[refrag.Retrieved]
    examples: list[GateExample]
    held_out: list[GateExample]


def gate_examples(questions: list[refrag.Retrieved], index: refrag.Index, chunking: refrag.Chunking,
                  topk: int) -> list[GateExample]:
    """Examples of the questions for which a right passage with an answer was retrieved."""
    examples = []
    for number, (item, rows, query) in enumerate(refrag.progress(questions, "features", len(questions), "question")):
        rows = rows[:topk]
        contents = [chunking.tokenizer.neutralize(index.content(row)) for row in rows]
        docs = refrag.make_docs(contents, rows, chunking.k, chunking.tokenizer, index)
        right = [bool(index.names(row) & set(item["positive_ids"])) for row in rows]
        spans = refrag.answer_chunks(docs, right, item["answers"])
        if spans:
            inputs = refrag.gate_input(item["question"], docs, query, index)
            sizes = np.concatenate([doc.chunks.sizes for doc in docs]).astype(np.int64)
            slim = inputs._replace(texts=[], vectors=inputs.vectors.astype(np.float16))
            examples.append(GateExample(number, slim, refrag.chunk_features(inputs), sizes, spans))
    return examples


def load_gate_data(data: refrag.GateDataConfig, index: refrag.IndexConfig, search: refrag.SearchConfig,
                   models: refrag.ModelConfig, runtime: refrag.RuntimeConfig) -> GateData:
    """Read, retrieve and prepare. Raises UserError, MismatchError."""
    searcher = refrag.load_searcher(index, search, runtime)
    opened, chunking = searcher.index, refrag.Chunking(data.k, refrag.build_tokenizer(refrag.model_config(models)))
    refrag.require(searcher.embedder is not None and opened.bm25 is not None and "gate" in opened.segments[0],
                   f"--index_dir {index.index_dir}: the gate needs vectors and BM25: build the index with --retriever "
                   "hybrid")
    if opened.manifest["chunking"]["tokenizer"] != chunking.tokenizer.fingerprint:
        raise refrag.MismatchError("the index was built with another --enc or --dec: use the same, or build it again")
    stored = opened.manifest["chunking"]["k"]
    refrag.require(opened.serves(data.k), f"--k {data.k}: the index's chunks of {stored} tokens do not make chunks of "
                   f"{data.k}: give --k {stored}, or build the index with another")
    files = (data.rag_json, "--rag_json", data.limit), (data.eval_json, "--eval_json", data.eval_limit)
    answered = [[item for name in names for item in refrag.read_answered_questions(name, flag, limit)]
                for names, flag, limit in files]
    questions, other = (refrag.retrieve_all(items, searcher, search) for items in answered)
    examples, held_out = (gate_examples(part, opened, chunking, search.topk) for part in (questions, other))
    refrag.require(bool(examples), "--rag_json: not one question has its answer in a retrieved passage of its "
                   "positive_ids")
    return GateData(searcher, questions, examples, held_out)


def example_logits(gate: refrag.QueryGate, examples: Sequence[GateExample]) -> Tensor:
    """(B, L) logits of examples, -inf where padded."""
    return gate.batch_logits([e.inputs for e in examples], [e.features for e in examples])


@torch.inference_mode()
def gate_recall(gate: refrag.QueryGate, examples: Sequence[GateExample], shares: Sequence[float]) -> dict[str, float]:
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


def descend(loss: Tensor, gate: refrag.QueryGate, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fit_gate(gate: refrag.QueryGate, examples: list[GateExample], held_out: list[GateExample],
             settings: refrag.GateConfig, p: Sequence[float], seed: int) -> list[dict[str, Any]]:
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


# -- the policy --------------------------------------------------------------------


class AnswerReader:
    """The log-probability of an answer, given which chunks stay text: the reward of the policy."""

    def __init__(self, model: refrag.RefragModel, data: GateData, topk: int, k: int):
        self.model, self.data, self.topk, self.k = model.requires_grad_(False), data, topk, k
        limit = model.window or refrag.PackConfig.ctx_max
        self.prompts = refrag.AnswerPrompts(model.encoder, data.searcher.index, limit)

    def ask(self, example: GateExample) -> refrag.Asked:
        """An example's question over its retrieved passages, with the best right passage and an answer that it holds.

        Raises UserError if they exceed the decoder's window: chunks are numbered through all of them.
        """
        (item, rows, _), index = self.data.questions[example.number], self.data.searcher.index
        rows = rows[: self.topk]
        right = refrag.right_rows(index, item, rows)[0]
        answer = [*refrag.answers_in(index, item, right), item["answers"][0]][0]
        asked = self.prompts.ask(item["question"], rows, right, answer, self.k)
        refrag.require(len(asked.context.docs) == len(rows), f"--topk {self.topk}: the passages for question "
                       f"{item['id']} take more than the decoder's window of {self.model.window}: lower it")
        return asked

    @torch.inference_mode()
    def log_probabilities(self, asked: refrag.Asked, masks: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) mean log-probability of the answer's tokens for each choice of chunks (L,) bool. In nats."""
        feed = self.model.trained  # an untrained projector's vectors only add noise
        batch = refrag.checked_batch(self.model, [asked.answered(mask, feed) for mask in masks])
        logs = -nn.functional.cross_entropy(self.model(batch).logits.float(), batch.labels, reduction="none")
        return logs.cpu().numpy().reshape(len(masks), -1).mean(1)


def sample_orders(logits: Tensor, picks: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, picks) chunks drawn one after another without replacement, by their logits (L,).

    Gumbel top-k: adding Gumbel noise and taking the largest draws from the distribution of `order_log_probability`.
    """
    uniform = torch.rand(n, len(logits), generator=generator).clamp(1e-9, 1 - 1e-9)
    return (logits.cpu() - (-uniform.log()).log()).topk(picks, dim=-1).indices


def order_log_probability(logits: Tensor, orders: Tensor) -> Tensor:
    """(n,) log-probability of drawing these chunks in this order without replacement (Plackett 1975, Luce 1959).

    logits: (L,); orders: (n, picks). Example: logits [0, 0, 0], order [2, 0] -> log(1/3 * 1/2)
    """
    left = logits.expand(len(orders), -1)
    total = logits.new_zeros(len(orders))
    for picked in orders.T:
        total = total + left.log_softmax(-1).gather(1, picked[:, None]).squeeze(1)
        left = left.scatter(1, picked[:, None], -math.inf)
    return total


def policy_loss(logits: Tensor, before: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
    """The clipped ratio of proximal policy optimisation with the advantage over the group (Shao et al. 2024), without
    their penalty for leaving a reference policy: there is none here.

    logits: (L,), now; before: (n,) log-probability of each order when it was drawn; rewards: (n,).
    """
    advantage = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    ratio = (order_log_probability(logits, orders) - before).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def fit_policy(policy: refrag.QueryGate, reader: AnswerReader, held_out: list[GateExample],
               settings: refrag.PolicyConfig, p: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Train a policy in place: chunks that stay text are drawn, the answer's log-probability is the reward.

    Returns up to eight records with the mean reward, and recall on the held-out examples at each p.
    """
    examples, rng, generator = reader.data.examples, np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_lr, weight_decay=0.01)

    def draw(example: GateExample) -> tuple[GateExample, Tensor, Tensor, Tensor]:
        """An example with a group of orders, their log-probabilities and rewards."""
        picks = max(1, math.floor(float(rng.choice(p)) * len(example.tokens)))
        with torch.no_grad():
            logits = example_logits(policy, [example])[0]
            orders = sample_orders(logits, picks, settings.group, generator).to(logits.device)
            before = order_log_probability(logits, orders)
        masks = [np.isin(np.arange(len(example.tokens)), order) for order in orders.cpu().numpy()]
        rewards = torch.from_numpy(reader.log_probabilities(reader.ask(example), masks)).to(logits.device)
        return example, before, orders, rewards

    def step() -> float:
        """Draw for some questions, then update a few times on what was drawn. Returns the mean reward."""
        drawn = [draw(examples[i]) for i in rng.choice(len(examples), settings.batch_size).tolist()]
        for _ in range(REUSE):
            losses = [policy_loss(example_logits(policy, [example])[0], *group) for example, *group in drawn]
            descend(torch.stack(losses).mean(), policy, optimizer)
        return float(torch.stack([rewards.mean() for *_, rewards in drawn]).mean())

    rewards, records, every = [], [], max(1, settings.steps // 8)
    for number in refrag.progress(range(1, settings.steps + 1), "train_policy", unit="step"):
        rewards.append(step())
        if number % every == 0 or number == settings.steps:
            records.append({"step": number, "reward": round(float(np.mean(rewards[-every:])), 4),
                            "recall": gate_recall(policy, held_out, p)})
    return records


# -- the command -------------------------------------------------------------------


def run(kind: str, data: refrag.GateDataConfig, settings: refrag.GateConfig | refrag.PolicyConfig,
        index: refrag.IndexConfig, search: refrag.SearchConfig, models: refrag.ModelConfig,
        runtime: refrag.RuntimeConfig) -> None:
    """Train a gate or a policy on retrieved questions, write it, print a summary. kind: "gate" or "policy"."""
    times = [time.perf_counter()]
    loaded = load_gate_data(data, index, search, models, runtime)
    embedder, device = loaded.searcher.embedder, refrag.pick_device(runtime.device)
    if kind == "policy":
        source = AnswerReader(refrag.load_model(models, runtime), loaded, search.topk, data.k)
        fit, steps, shape = fit_policy, settings.steps, {"features": False, "blind": settings.blind}
    else:
        source, fit, steps, shape = loaded.examples, fit_gate, settings.epochs, {}
    times.append(time.perf_counter())
    torch.manual_seed(runtime.seed)
    gate = refrag.QueryGate(embedder.dim, **shape).to(device)
    records = fit(gate, source, loaded.held_out, settings, data.p, runtime.seed)
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


def save_gate(kind: str, gate: refrag.QueryGate, embedder: refrag.Embedder, data: refrag.GateDataConfig,
              models: refrag.ModelConfig, entry: dict[str, Any]) -> None:
    """Write --out_dir: the parts of --load_dir's checkpoint, if there is one, with this gate or policy."""
    checkpoint, parts = refrag.find_checkpoint(models), {}
    config = refrag.model_config(models, checkpoint)
    config.compression = data.k
    if checkpoint is not None:
        checkpoint.verify()
        names = {path.stem for path in checkpoint.path.glob("*.safetensors")} - {"trainer"}
        parts = {name: checkpoint.tensors(name) for name in names}
    setattr(config, kind, {**gate.shape, "feature_names": refrag.FEATURE_NAMES if gate.shape["features"] else [],
                           "embedder": embedder.name, "embedder_fingerprint": embedder.fingerprint})
    parts[kind] = {name: tensor.half() for name, tensor in refrag.part_tensors(gate).items()}
    files = refrag.file_facts([*data.rag_json, *data.eval_json])
    config.history = [*config.history, entry | {"data": refrag.without_folders(files)}]
    refrag.write_checkpoint(Path(data.out_dir), config, parts, card=refrag.model_card(config, []))


def gate_text(summary: dict[str, Any]) -> str:
    shown = ", ".join(f"{value:.3f} at p = {p}" for p, value in summary["recall"].items())
    return (f"{summary['examples']:,} of {summary['questions']:,} questions, {summary['parameters']:,} parameters, "
            f"trained in {summary['train_s']:.0f} s -> {summary['checkpoint']}\n"
            f"{summary['held_out']:,} held-out questions, answer recall: {shown or 'none'}")
