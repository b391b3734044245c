"""`refrag.py align`: where the tokens of encoder and decoder end together, as a table."""

from __future__ import annotations

import itertools
from typing import Any

import refrag


def exact_anchors(a: refrag.Pieces, b: refrag.Pieces) -> list[tuple[int, int]]:
    """Anchors: pairs of tokens (i, j) after which both have decoded to the same text, which is not empty.

    Beyond the texts' common prefix no two can be equal, so that lengths are enough. Of several tokens with one decoded
    prefix the first counts.
    """
    texts, lengths = ["".join(side.pieces) for side in (a, b)], []
    common = next((n for n, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), min(map(len, texts)))
    for side in (a, b):
        reached = itertools.accumulate(map(len, side.pieces))
        lengths.append([n if piece and n <= common else -1 for n, piece in zip(reached, side.pieces, strict=True)])
    return refrag.common_boundaries(*lengths)


def anchor_rows(a: refrag.Pieces, b: refrag.Pieces) -> list[dict[str, Any]]:
    """The spans between anchors side by side, as `align` shows them; what follows the last anchor has cost None."""
    exact, rows, i, j = set(exact_anchors(a, b)), [], 0, 0
    for anchor in [*refrag.cost_anchors(a, b), refrag.Anchor(len(a.ids) - 1, len(b.ids) - 1, None)]:
        spans = {"encoder": a.pieces[i : anchor.i + 1], "decoder": b.pieces[j : anchor.j + 1]}
        if any(spans.values()):
            cost = None if anchor.cost is None else round(anchor.cost, 4)
            rows.append(spans | {"exact": cost is not None and (anchor.i, anchor.j) in exact, "cost": cost})
        i, j = anchor.i + 1, anchor.j + 1
    return rows


def anchor_text(rows: list[dict[str, Any]]) -> str:
    """The spans as a table for people; "=" marks exact anchors."""
    cells = [(*(" ".join(map(repr, row[side])) for side in ("encoder", "decoder")),
              "=" if row["exact"] else "-" if row["cost"] is None else f"{row['cost']:.2f}") for row in rows]
    cells.insert(0, ("encoder", "decoder", "cost"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(f"{x:{widths[0]}}  {y:{widths[1]}}  {z}" for x, y, z in cells)


def run(anchor: refrag.AnchorConfig, models: refrag.ModelConfig, runtime: refrag.RuntimeConfig) -> None:
    """Print the spans between the anchors of a text, and how many there are."""
    text = refrag.check_string(anchor.text, "text", "--text")
    tokenizer = refrag.build_tokenizer(refrag.model_config(models))
    text = tokenizer.neutralize(text)
    encoder, decoder = (refrag.tokenize_pieces(text, side) for side in (tokenizer.encoder, tokenizer.decoder))
    spans = anchor_rows(encoder, decoder)
    result = {"encoder_tokens": len(encoder.ids), "decoder_tokens": len(decoder.ids),
              "exact_anchors": sum(span["exact"] for span in spans),
              "anchors": sum(span["cost"] is not None and span["cost"] <= refrag.MAX_COST for span in spans)}
    counts = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in result.items())
    refrag.emit(result | {"spans": spans}, runtime, f"{anchor_text(spans)}\n{counts} (cost {refrag.MAX_COST} or less)")
