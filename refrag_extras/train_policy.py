"""`refrag.py train_policy`: the paper's policy, which chunks stay text, trained by the decoder's rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import refrag
from refrag_extras import train_gate

CLIP = 0.2  # how far from 1 the ratio of new to old probability counts
REUSE = 2  # optimizer steps on what was drawn once


class AnswerReader:
    """The log-probability of an answer, given which chunks stay text: the reward of the policy."""

    def __init__(self, model: refrag.RefragModel, data: train_gate.GateData, topk: int, k: int):
        self.model, self.data, self.topk, self.k = model.requires_grad_(False), data, topk, k
        self.limit = model.window or refrag.PackConfig.ctx_max

    def ask(self, example: train_gate.GateExample) -> refrag.Asked:
        """An example's question over its retrieved passages, with the best right passage and an answer that it holds.

        Raises UserError if they exceed the decoder's window: chunks are numbered through all of them.
        """
        (item, rows, _), index = self.data.questions[example.number], self.data.searcher.index
        rows = rows[: self.topk]
        right = refrag.right_rows(index, item, rows)[0]
        answer = [*refrag.answers_in(index, item, right), item["answers"][0]][0]
        passages = {row: index[row].content for row in rows}
        asked = refrag.ask(self.model.encoder, item["question"], passages, right, answer, self.k, self.limit)
        refrag.require(len(asked.context.docs) == len(rows), f"--topk {self.topk}: the passages for question "
                       f"{item['id']} take more than the decoder's window of {self.model.window}: lower it")
        return asked

    @torch.inference_mode()
    def log_probabilities(self, asked: refrag.Asked, masks: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) mean log-probability of the answer's tokens for each choice of chunks (L,) bool. In nats."""
        feed = self.model.trained  # an untrained projector's vectors only add noise
        batch = refrag.checked_batch([asked.answered(mask, feed) for mask in masks], self.model.window)
        batch = batch.to(self.model.device)
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


def fit_policy(policy: refrag.QueryGate, reader: AnswerReader, held_out: list[train_gate.GateExample],
               settings: refrag.PolicyConfig, p: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Train a policy in place: chunks that stay text are drawn, the answer's log-probability is the reward.

    Returns up to eight records with the mean reward, and recall on the held-out examples at each p.
    """
    examples, rng, generator = reader.data.examples, np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.policy_lr, weight_decay=0.01)

    def draw(example: train_gate.GateExample) -> tuple[train_gate.GateExample, Tensor, Tensor, Tensor]:
        """An example with a group of orders, their log-probabilities and rewards."""
        picks = max(1, math.floor(float(rng.choice(p)) * len(example.tokens)))
        with torch.no_grad():
            logits = train_gate.example_logits(policy, [example])[0]
            orders = sample_orders(logits, picks, settings.group, generator).to(logits.device)
            before = order_log_probability(logits, orders)
        masks = [np.isin(np.arange(len(example.tokens)), order) for order in orders.cpu().numpy()]
        rewards = torch.from_numpy(reader.log_probabilities(reader.ask(example), masks)).to(logits.device)
        return example, before, orders, rewards

    def step() -> float:
        """Draw for some questions, then update a few times on what was drawn. Returns the mean reward."""
        drawn = [draw(examples[i]) for i in rng.choice(len(examples), settings.batch_size).tolist()]
        for _ in range(REUSE):
            losses = [policy_loss(train_gate.example_logits(policy, [example])[0], *group) for example, *group in drawn]
            train_gate.descend(torch.stack(losses).mean(), policy, optimizer)
        return float(torch.stack([rewards.mean() for *_, rewards in drawn]).mean())

    rewards, records, every = [], [], max(1, settings.steps // 8)
    for number in refrag.progress(range(1, settings.steps + 1), "train_policy", unit="step"):
        rewards.append(step())
        if number % every == 0 or number == settings.steps:
            records.append({"step": number, "reward": round(float(np.mean(rewards[-every:])), 4),
                            "recall": train_gate.gate_recall(policy, held_out, p)})
    return records


def run(data: refrag.GateDataConfig, settings: refrag.PolicyConfig, index: refrag.IndexConfig,
        search: refrag.SearchConfig, models: refrag.ModelConfig, runtime: refrag.RuntimeConfig) -> None:
    def fit(policy: refrag.QueryGate, loaded: train_gate.GateData) -> list[dict[str, Any]]:
        reader = AnswerReader(refrag.load_model(models, runtime), loaded, search.topk, data.k)
        return fit_policy(policy, reader, loaded.held_out, settings, data.p, runtime.seed)

    train_gate.train_scorer("policy", data, index, search, models, runtime, settings.steps, fit, features=False,
                            blind=settings.blind)
