"""Makes the figures of docs/RESULTS.md that `refrag.py eval` does not make. Each command prints one JSON object.

    python docs/measure.py decode
    python docs/measure.py anchors --texts data/cpt_train.jsonl
    python docs/measure.py embed --texts data/wiki_passages.jsonl --limit 256
    python docs/measure.py training --texts data/cpt_train.jsonl --contexts 512 --k 4

What is timed is warmed up, and what is compared takes turns within one run, so that drift of the machine hits all
alike; the figures are medians.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import refrag

RUNTIME = refrag.RuntimeConfig()


def pipeline_of(args: argparse.Namespace, search: dict | None = None, pack: dict | None = None,
                generate: dict | None = None) -> refrag.Pipeline:
    """A warmed-up pipeline over --index_dir."""
    return refrag.load_pipeline(
        refrag.IndexConfig(index_dir=args.index_dir), refrag.SearchConfig(**(search or {})),
        refrag.PackConfig(**(pack or {})), refrag.GenerateConfig(**(generate or {})), refrag.ModelConfig(), RUNTIME)


# -- decoding ------------------------------------------------------------------


def measure_decode(args: argparse.Namespace) -> dict:
    """Our decode loop, with the decoder and with its 8-bit steps, and transformers' generate, taking turns."""
    model = refrag.load_model(refrag.ModelConfig(), 16, RUNTIME)
    decoder, watch = model.decoder, refrag.Stopwatch(torch.device("cpu"))
    inputs = decoder.get_input_embeddings().weight[100 : 100 + args.prompt].detach()
    start = time.perf_counter()
    int8 = refrag.Int8Stepper(decoder)
    made = {"prompt": args.prompt, "new": args.new, "int8_load_s": round(time.perf_counter() - start, 3)}

    def ours(stepper: refrag.Int8Stepper | None) -> tuple[float, float]:
        start = time.perf_counter()
        logits, state = refrag.prefill(decoder, [inputs])
        [out], _ = refrag.decode(decoder, logits, state, max_new=args.new, stops=frozenset(),
                                 pick=lambda x: x.argmax(-1), watch=watch, stepper=stepper)
        return out.times[0] - start, (time.perf_counter() - out.times[0]) / (args.new - 1)

    def theirs(new: int) -> float:
        start = time.perf_counter()
        decoder.generate(inputs_embeds=inputs[None], attention_mask=torch.ones(1, args.prompt, dtype=torch.long),
                         max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    rows = collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        one, many = theirs(1), theirs(args.new)
        times = {"model": ours(None), "int8": ours(int8), "generate": (one, (many - one) / (args.new - 1))}
        for name, (first, each) in times.items() if turn else ():
            rows[f"{name}_first_s"].append(first)
            rows[f"{name}_ttit_s"].append(each)
            rows[f"{name}_times_faster_than_generate"].append(times["generate"][1] / each)
    return made | {name: round(statistics.median(values), 5) for name, values in rows.items()}


# -- embedding -------------------------------------------------------------------


def measure_embed(args: argparse.Namespace) -> dict:
    """Passages a second of plain `SentenceTransformer.encode` and of `index`, chunk vectors included, in turns."""
    from sentence_transformers import SentenceTransformer

    config = refrag.CorpusConfig(corpus=(args.texts,), limit=args.limit)
    counts = {"skipped": 0, "replaced": 0}
    texts = [refrag.passage_content(record.title, record.text) for record in refrag.read_corpus(config, counts)]
    embedder = refrag.load_embedder(None, RUNTIME)
    plain = SentenceTransformer(str(refrag.bundled_path(embedder.name)), device=str(refrag.pick_device("auto")))
    chunking = refrag.make_chunking(refrag.build_tokenizer(refrag.RefragConfig()), None)
    made, rows = {}, collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        for name, embed in (("encode", lambda: plain.encode(texts, show_progress_bar=False)),
                            ("index", lambda: refrag.chunk_tables(texts, chunking, embedder, 32)[0])):
            start = time.perf_counter()
            made[name] = embed()
            if turn:
                rows[name].append(len(texts) / (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(rows["encode"], rows["index"], strict=True)]
    return {"passages": len(texts), "precision": str(next(embedder.model.parameters()).dtype),
            "lowest_cosine": round(float((made["encode"] * made["index"]).sum(1).min()), 6),
            **{f"{name}_per_s": round(statistics.median(values), 2) for name, values in rows.items()},
            "times_faster": round(statistics.median(ratios), 3)}


# -- alignment and training ------------------------------------------------------


def measure_anchors(args: argparse.Namespace) -> dict:
    """Exact and cost-aware anchors between the tokens of MiniLM (uncased) and of SmolLM2, per decoder token."""
    tokenizers = [refrag.load_tokenizer(name) for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct")]
    counts: collections.Counter = collections.Counter()
    costs, seconds = [], 0.0
    for text in itertools.islice(refrag.read_training_texts([args.texts]), args.limit):
        start = time.perf_counter()
        encoder, decoder = (refrag.tokenize_pieces(text.text, tokenizer) for tokenizer in tokenizers)
        exact, anchors = refrag.exact_anchors(encoder, decoder), refrag.cost_anchors(encoder, decoder)
        seconds += time.perf_counter() - start
        counts.update(texts=1, decoder=len(decoder.ids), encoder=len(encoder.ids), exact=len(exact),
                      anchors=len(anchors), good=sum(a.cost <= refrag.AlignConfig.max_cost for a in anchors))
        costs += [a.cost for a in anchors]
    tokens = counts["decoder"]
    return {**counts, "exact_share": counts["exact"] / tokens, "anchor_share": counts["anchors"] / tokens,
            "good_share": counts["good"] / tokens, "mean_cost": statistics.mean(costs),
            "seconds_per_10k_tokens": 1e4 * seconds / tokens}


def trainer_of(args: argparse.Namespace, lessons: str, letters: str, folder: Path) -> refrag.Trainer:
    """A trainer at the start of a run, on the bundled models."""
    size = int(args.contexts.split(",")[0])
    train = refrag.TrainConfig(out_dir=str(folder), k=(args.k,), seq_tokens=size, batch_size=args.batch_size,
                               steps=10**6, train=letters)
    texts = refrag.TextConfig(train_json=(args.texts,))
    phase = refrag.Phase(f"cpt_{lessons}", refrag.Weights(kl=float(lessons == "align")))
    settled = phase.settled(train)
    model = refrag.load_model(refrag.ModelConfig(), args.k, RUNTIME, letters)
    made = {"recon": lambda: refrag.ReconLessons(model.encoder, texts, settled, refrag.ReconConfig()),
            "next": lambda: refrag.NextLessons(model.encoder, texts, settled, refrag.NextConfig()),
            "align": lambda: refrag.AlignLessons(model.encoder, texts, settled, refrag.AlignConfig())}[lessons]()
    refrag.mark_trained(model, letters, 0)
    facts = {"run": "", "data": []}
    return refrag.Trainer(model, made, phase, settled, refrag.make_accelerator(RUNTIME), None, facts, RUNTIME.seed)


def by_hand(trainer: refrag.Trainer, batches: list[refrag.Batch]) -> None:
    """The same forward and backward passes without the loop: encoder, projector, decoder, cross entropy."""
    model = trainer.model
    for batch in batches:
        output = model(batch)
        torch.nn.functional.cross_entropy(output.logits.float(), batch.labels).backward()
    model.zero_grad(set_to_none=True)


def measure_training(args: argparse.Namespace) -> dict:
    """Seconds of whole training steps against their bare forward and backward passes, taking turns; peak memory."""
    rows = []
    for lessons, letters in (("recon", "pe"), ("next", "ped")):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(args, lessons, letters, Path(folder))
            steps = itertools.islice(trainer.sampler.run(0), args.repeats + 1)
            times = [time_step(trainer, passes) for passes, _ in steps]
        whole, bare = zip(*times[1:], strict=True)  # the first warms up
        rows.append({"phase": lessons, "step_s": statistics.median(whole), "bare_s": statistics.median(bare),
                     "ratio": statistics.median(w / b for w, b in times[1:]), "peak_rss_mb": refrag.peak_rss_mb()})
    return {"rows": rows}


def time_step(trainer: refrag.Trainer, passes: list) -> tuple[float, float]:
    """Seconds of a training step and of its bare passes."""
    batches = [trainer.collate([[item.sequence for item in row] for row in rows]) for rows in passes]
    start = time.perf_counter()
    by_hand(trainer, batches)
    middle = time.perf_counter()
    trainer.run_step(passes)
    return time.perf_counter() - middle, middle - start


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("decode", "embed", "anchors", "training"))
    parser.add_argument("--index_dir")
    parser.add_argument("--texts")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--contexts", default="512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    args = parser.parse_args()
    refrag.prepare_runtime(RUNTIME)
    result = globals()[f"measure_{args.what}"](args)
    facts = {"what": args.what, "device": refrag.describe_device(RUNTIME), "versions": refrag.library_versions()}
    print(json.dumps({**facts, **result}))


if __name__ == "__main__":
    main()
