"""What --explain shows of each chunk: why it stays text or not, and what each group of features adds to its score."""

from __future__ import annotations

from typing import Any

import numpy as np

import refrag
from refrag import GateInput, Pipeline, QueryGate, Reading


def explain(pipeline: Pipeline, reading: Reading) -> list[dict[str, Any]]:
    """{text, why, shares} of each chunk of a question's context."""
    settings, shares, prompt = reading.settings, {}, reading.context.prompt
    reasons = [f"{'text' if stays else 'compressed'}: no choice to make" for stays in reading.expanded]
    texts = [reading.context.docs[chunk.doc].content[chunk.start : chunk.end] for chunk in prompt.chunks]
    if settings.mode == "truncate":
        reasons = ["text: before the cut" if stays else "left out: the context is cut before its end"
                   for stays in reading.expanded]
    elif settings.mode == "refrag" and reading.gate_input is not None:
        reasons = selection_reasons(reading.scores, prompt.sizes, settings.p, settings.floor)
        if settings.gate == "learned":
            shares = feature_shares(pipeline.trained_gates["learned"], reading.gate_input)
    return [{"text": text, "why": why,
             "shares": {group: round(float(values[i]), 4) for group, values in shares.items()}}
            for i, (text, why) in enumerate(zip(texts, reasons, strict=True))]


def selection_reasons(scores: np.ndarray, tokens: np.ndarray, p: float, floor: int = 0) -> list[str]:
    """What `refrag.select_chunks` decides about each chunk, in words."""
    order, reasons = np.argsort(-scores, kind="stable"), [""] * len(scores)
    chosen, budget = refrag.select_chunks(scores, tokens, p, floor), refrag.text_budget(tokens, p, floor)
    for rank, (number, used) in enumerate(zip(order, np.cumsum(tokens[order]), strict=True), start=1):
        how = "text" if chosen[number] else "compressed"
        reasons[number] = f"{how}: rank {rank} of {len(scores)}, {used} of {budget} tokens up to here"
    return reasons


def feature_shares(gate: QueryGate, inputs: GateInput) -> dict[str, np.ndarray]:
    """What each group of features adds to the logits (L,): the change from the group's mean values."""
    features, shares, first = refrag.chunk_features(inputs), {}, 0
    logits = gate.logits(inputs, features)
    for group, names in refrag.FEATURES.items():
        without, last = features.copy(), first + len(names)
        without[:, first:last] = gate.mean[first:last].cpu().numpy()
        shares[group], first = logits - gate.logits(inputs, without), last
    return shares
