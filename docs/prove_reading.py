"""Proof that the vectors are read: a byte-level decoder and a 2-layer encoder, both from scratch, on two CPU cores.

    python docs/prove_reading.py --passages PASSAGES.jsonl.gz --out_dir runs/bytes

Makes a 2.9M-parameter Llama over bytes with random weights, trains it and its first two layers as the encoder with
`refrag.py cpt_recon --k 4` on the passages whose `split` is train, and reports the token accuracy on the others at
every length of the curriculum: with the vectors, with none, and with another text's. About nine minutes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent


def make_decoder(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights whose tokens are bytes."""
    specials = ["<|start|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate([*specials, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0],
                                                eos_token=specials[1], pad_token=specials[1])
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_texts(passages: Path, folder: Path) -> None:
    """train.jsonl and dev.jsonl from the passages' `split`; passages without one go to train, every tenth to dev."""
    files = {split: (folder / f"{split}.jsonl").open("w", encoding="utf-8") for split in ("train", "dev")}
    opener = gzip.open if passages.suffix == ".gz" else open
    with opener(passages, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            split = record.get("split") or ("dev" if number % 10 == 0 else "train")
            files[split].write(json.dumps({"text": record["text"]}) + "\n")
    for handle in files.values():
        handle.close()


def main() -> None:
    """Prepare, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=Path, default=ROOT / "data/wiki_passages.jsonl")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seq_tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--curriculum", default="even")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    make_decoder(args.out_dir / "decoder", args.hidden, args.layers)
    write_texts(args.passages, args.out_dir)
    command = [sys.executable, str(ROOT / "refrag.py"), "cpt_recon", "--json", "--train", "ped", "--k", "4",
               "--dec", str(args.out_dir / "decoder"), "--enc", "decoder:2", "--curriculum", args.curriculum,
               "--train_json", str(args.out_dir / "train.jsonl"), "--eval_json", str(args.out_dir / "dev.jsonl"),
               "--lr", "1e-3", "--steps", str(args.steps), "--batch_size", str(args.batch_size), "--device", "cpu",
               "--seq_tokens", str(args.seq_tokens), "--eval_limit", "128", "--out_dir", str(args.out_dir / "run")]
    summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s\nbytes   vectors  none     wrong")
    for name, kinds in summary["eval"].items():
        accuracies = "    ".join(f"{kinds[kind]['accuracy']:.3f}" for kind in ("vectors", "none", "wrong"))
        print(f"{4 * int(name.split('/')[1]):5}   {accuracies}")


if __name__ == "__main__":
    main()
