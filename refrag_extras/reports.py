"""What a training run shows people: summary, picture, and the card of a checkpoint. Also pictures of other commands."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import refrag


def save_figure(path: Path, panels: int, size: tuple[float, float], paint: Callable[..., None]) -> None:
    """Replace a picture by what `paint` draws on the axes of its panels."""
    try:
        from matplotlib import figure
    except ImportError as error:
        return refrag.notice(f"library missing: {refrag.one_line(error)}: pip install matplotlib, for {path.name}")
    page, data = figure.Figure(figsize=size), io.BytesIO()
    paint(*page.subplots(1, panels, squeeze=False)[0])
    page.tight_layout()
    page.savefig(data, dpi=100, format="png")
    refrag.write_atomic(path, data.getvalue())


def draw_losses(path: Path, records: list[dict[str, Any]]) -> None:
    """The training loss, and the held-out accuracy with its controls, over the steps of metrics.jsonl."""

    def paint(left: Any, right: Any) -> None:
        losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
        left.plot(*np.asarray(losses).reshape(-1, 2).T)
        left.set(xlabel="step", ylabel="training loss")
        evals = [(r["step"], r["eval"]) for r in records if r.get("eval")]
        for n, name in enumerate(evals[-1][1] if evals else ()):
            for kind, style in zip(refrag.CONTROLS, ("-", ":", "--", "-."), strict=True):
                points = [(step, sets[name][kind]["accuracy"]) for step, sets in evals if kind in sets[name]]
                right.plot(*np.asarray(points).reshape(-1, 2).T, style, color=f"C{n}",
                           label=name if kind == "vectors" else None)
        right.set(xlabel="step", ylabel="held-out token accuracy")
        right.set_title("solid: vectors, dotted: none, dashed: wrong, dash-dot: full text", fontsize=8)
        if evals:
            right.legend(fontsize=7)

    save_figure(path, 2, (11, 4), paint)


def training_text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['phase']}: {summary['steps']:,} steps, {summary['tokens']:,} tokens in "
             f"{summary['seconds']:.0f} s ({summary['tokens_per_s']:,.0f} tokens/s), loss "
             f"{summary['loss'] or math.nan:.4f} -> {summary['checkpoint']}"]
    for name, kinds in summary["eval"].items():
        shown = ", ".join(f"{kind} {values['accuracy']:.3f}" for kind, values in kinds.items())
        lines.append(f"held out {name}: token accuracy {shown}")
    return "\n".join(lines)


def model_card(config: refrag.RefragConfig, records: list[dict[str, Any]]) -> str:
    """A checkpoint's README.md. records: of metrics.jsonl."""
    carried, final = config.scorers, [record for record in records if record.get("eval")][-1:]
    made = [f"A trained {name} over the vectors of {getattr(config, name)['embedder']}." for name in carried]
    if config.training_model or config.lora or not carried:
        made = [f"Decoder: {config.decoder_name_or_path}. Encoder: {config.encoder_name_or_path}, {config.pooling} "
                f"pooling. Projector: {config.projector}.", *made]
    lines = ["# REFRAG checkpoint", "", " ".join([*made, f"Made by refrag.py {refrag.__version__}."]), "",
             "Load it with `python refrag.py generate --load_dir FOLDER`. The licences of the base models and of the "
             "training data apply.", "",
             "| Phase | Steps or epochs | Tokens or questions | Trained | Device | Data |", "|---|---|---|---|---|---|"]
    for h in config.history:
        files = ", ".join(Path(fact["file"]).name for fact in h["data"])
        lines.append(f"| {h['phase']} | {h['steps']:,} | {h['tokens']:,} | {h['train']} | {h['device']} | {files} |")
    for h in (h for h in config.history if h.get("recall")):
        shown = ", ".join(f"{value:.3f} at p = {p}" for p, value in h["recall"].items())
        lines += ["", f"{h['phase']}: share of held-out questions whose answer stays text whole: {shown}."]
    for record in final:
        lines += ["", f"Held-out token accuracy after step {record['step']}:", "",
                  "| Set | Vectors | None | Wrong | Full |", "|---|---|---|---|---|"]
        for name, kinds in record["eval"].items():
            cells = [f"{kinds[kind]['accuracy']:.3f}" if kind in kinds else "-" for kind in refrag.CONTROLS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
