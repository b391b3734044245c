"""Makes the checkpoint in data/reader of a training run: its newest checkpoint, in half precision, with a model card.

    python docs/ship_reader.py runs/sft data/reader

What is kept is what was trained: projector, encoder layers, adapters; in bfloat16, since the decoder's own weights were
four bits wide. The loss curves of the run stand beside the card.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import refrag
from refrag_extras import reports
from refrag_extras.runs import without_folders

LIMITS = """
## What it is for

`python refrag.py generate`, `chat` and `serve` use it by default with the default models. It answers short factual
questions in English from retrieved passages, in few words and with the passage's number; k = 4, 8, 16 and 32, any p.

## Cost

13.4 million tokens in 6.6 hours on two CPU cores (AMD EPYC, Zen 5), no GPU. The phases are the rows of the table above,
the commands those of `docs/reproduce.py --train`, but that the second, planned for 1,600 steps, was ended at 596.
`loss.png` shows the last one.

## Limits

It has seen encyclopedic English and questions whose answer is a few words; it has learned neither to reason over
several passages nor to write at length. What the vectors alone give it (p = 0) is a part of what the text gives: the
table is in docs/RESULTS.md. It can be wrong, and cite a passage that does not say so.

## Licences

Decoder: SmolLM2-135M-Instruct, Apache 2.0. Training data: SQuAD (CC BY-SA 4.0), Natural Questions (CC BY-SA 3.0),
HotpotQA (CC BY-SA 4.0), Wikipedia (CC BY-SA). This checkpoint: MIT, as the program.
"""


def main() -> None:
    """Read the run's newest checkpoint, halve it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a training run's folder, or a checkpoint")
    parser.add_argument("out", help="the folder to write")
    args = parser.parse_args()
    source = refrag.open_checkpoint(args.run)
    source.verify()
    config = source.config
    for entry in config.history:
        entry["data"] = without_folders(entry["data"])
    parts = {path.stem: {name: tensor.bfloat16() for name, tensor in source.tensors(path.stem).items()}
             for path in source.path.glob("*.safetensors") if path.stem != "trainer"}
    card = reports.model_card(config, []) + LIMITS
    refrag.write_checkpoint(Path(args.out), config, parts, card=card)
    curves = Path(args.run) / "loss.png"
    if curves.is_file():
        shutil.copy(curves, Path(args.out) / "loss.png")
    print(f"{args.out}: {sum(path.stat().st_size for path in Path(args.out).iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
