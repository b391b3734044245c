"""Makes the figures of docs/RESULTS.md. Each command prints one JSON object on the last line.

    python docs/measure.py retrieval --index_dir runs/scifact --questions qa.test.jsonl.gz
    python docs/measure.py decode
    python docs/measure.py untrained --index_dir runs/wiki --questions data/wiki_questions.jsonl
    python docs/measure.py gate --index_dir runs/wiki --questions data/wiki_questions.jsonl
    python docs/measure.py anchors --texts data/cpt_train.jsonl
    python docs/measure.py training --texts data/cpt_train.jsonl --contexts 512 --k 4

What is timed is warmed up, and what is compared takes turns within one run, so that drift of the machine hits all
alike; the figures are medians.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import re
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import refrag

RUNTIME = refrag.RuntimeConfig()


def questions_of(path: str, limit: int | None) -> list[dict]:
    """The first `limit` questions of a file."""
    return refrag.read_questions(refrag.QuestionConfig(questions=path))[:limit]


def pipeline_of(args: argparse.Namespace, search: dict | None = None, pack: dict | None = None,
                generate: dict | None = None) -> refrag.Pipeline:
    """A warmed-up pipeline over --index_dir."""
    return refrag.load_pipeline(
        refrag.IndexConfig(index_dir=args.index_dir), refrag.SearchConfig(**(search or {})),
        refrag.PackConfig(**(pack or {})), refrag.GenerateConfig(**(generate or {})), refrag.ModelConfig(), RUNTIME)


# -- retrieval ----------------------------------------------------------------


def ranking_scores(ranked: list[str], positives: set[str]) -> dict[str, float]:
    """recall@8, MRR@10 and nDCG@10 with binary relevance, as BEIR's pytrec_eval counts them."""
    gains = [1.0 / math.log2(rank + 1) for rank, doc in enumerate(ranked[:10], 1) if doc in positives]
    ideal = sum(1.0 / math.log2(rank + 1) for rank in range(1, min(len(positives), 10) + 1))
    first = next((rank for rank, doc in enumerate(ranked[:10], 1) if doc in positives), None)
    return {"recall@8": len(positives & set(ranked[:8])) / len(positives), "mrr@10": 1 / first if first else 0.0,
            "ndcg@10": sum(gains) / ideal}


def measure_retrieval(args: argparse.Namespace) -> dict:
    """Each retriever on questions with positive_ids; pieces of one document count once, at their best rank."""
    index = refrag.IndexConfig(index_dir=args.index_dir)
    searcher = refrag.load_searcher(index, refrag.SearchConfig(), RUNTIME)
    questions = questions_of(args.questions, args.limit)
    results = {}
    for retriever in ("bm25", "dense", "hybrid"):
        one = refrag.Searcher(searcher.index, retriever, searcher.embedder)
        scores, start = collections.defaultdict(list), time.perf_counter()
        for question in refrag.progress(questions, retriever):
            found = one.search(question["question"], 50)
            ranked = list(dict.fromkeys(p.document_id for p in found))
            for name, value in ranking_scores(ranked, set(question["positive_ids"])).items():
                scores[name].append(value)
        seconds = time.perf_counter() - start
        results[retriever] = {name: round(statistics.fmean(values), 4) for name, values in scores.items()}
        results[retriever]["ms_per_question"] = round(1000 * seconds / len(questions), 2)
    return {"passages": len(searcher.index), "n": len(questions), "results": results}


# -- decoding ------------------------------------------------------------------


def measure_decode(args: argparse.Namespace) -> dict:
    """Our decode loop and transformers' generate on the same embeddings, taking turns."""
    model = refrag.load_model(refrag.ModelConfig(), 16, RUNTIME)
    decoder, watch = model.decoder, refrag.Stopwatch(torch.device("cpu"))
    inputs = decoder.get_input_embeddings().weight[100 : 100 + args.prompt].detach()

    def ours() -> list[float]:
        start = time.perf_counter()
        logits, state = refrag.prefill(decoder, [inputs])
        [out], _ = refrag.decode(decoder, logits, state, max_new=args.new, stops=frozenset(),
                                 pick=lambda x: x.argmax(-1), watch=watch)
        return [out.times[0] - start, time.perf_counter() - start]

    def theirs(new: int) -> float:
        start = time.perf_counter()
        decoder.generate(inputs_embeds=inputs[None], attention_mask=torch.ones(1, args.prompt, dtype=torch.long),
                         max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    rows = collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        first, whole = ours()
        one, many = theirs(1), theirs(args.new)
        if turn:
            rows["ours_first_s"].append(first)
            rows["ours_ttit_s"].append((whole - first) / (args.new - 1))
            rows["generate_first_s"].append(one)
            rows["generate_ttit_s"].append((many - one) / (args.new - 1))
            rows["ratio_ttit"].append(rows["generate_ttit_s"][-1] / rows["ours_ttit_s"][-1])
    return {"prompt": args.prompt, "new": args.new, **{k: round(statistics.median(v), 5) for k, v in rows.items()}}


# -- answers ------------------------------------------------------------------


def normalize(text: str) -> list[str]:
    """SQuAD's normalisation as words: no citation marks, case, punctuation or articles."""
    text = re.sub(r"\[[^\[\]]*\]", " ", text).lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return [w for w in text.split() if w not in ("a", "an", "the")]


def f1(answer: str, truths: list[str]) -> float:
    """Best token F1 over the true answers."""
    best, words = 0.0, normalize(answer)
    for truth in map(normalize, truths):
        common = sum((collections.Counter(words) & collections.Counter(truth)).values())
        best = max(best, 2 * common / (len(words) + len(truth)) if common else 0.0)
    return best


def contains(answer: str, truths: list[str]) -> bool:
    """Whether a true answer stands in the answer, word for word."""
    words = " ".join(["", *normalize(answer), ""])
    return any(" ".join(["", *normalize(truth), ""]) in words for truth in truths)


def measure_untrained(args: argparse.Namespace) -> dict:
    """Does an untrained decoder gain from mean-of-embeddings vectors, or lose? Same questions, same chunks as text."""
    pipeline = pipeline_of(args, search={"topk": args.topk}, pack={"k": args.k}, generate={"max_new": args.new})
    questions = questions_of(args.questions, args.limit)
    variants = {"full": {"mode": "full"}, "none": {"mode": "none"}}
    for p in map(float, args.p.split(",")):
        for compressed in ("feed", "drop"):
            variants[f"p={p} {compressed}"] = {"mode": "refrag", "p": p, "compressed": compressed}
    results = {}
    for name, changes in variants.items():
        one, rows = pipeline.variant(**changes), []
        for batch in refrag.progress(refrag.batched(questions, args.batch_size), name):
            for question, result in zip(batch, one.answer(batch), strict=True):
                cited = {c["id"] for c in result["citations"]}
                rows.append({"f1": f1(result["answer"], question["answers"]),
                             "contains": contains(result["answer"], question["answers"]),
                             "words": len(normalize(result["answer"])),
                             "citation": bool(cited & set(question["positive_ids"])),
                             "positions": result["metrics"]["positions"]})
        results[name] = {key: round(statistics.fmean(r[key] for r in rows), 4) for key in rows[0]}
        print(name, results[name], file=sys.stderr, flush=True)
    return {"n": len(questions), "k": args.k, "topk": args.topk, "results": results}


# -- gate ---------------------------------------------------------------------


def separate_vectors(pipeline: refrag.Pipeline, docs: list[refrag.Doc], titles: list[str]) -> np.ndarray:
    """Each chunk embedded by itself with its title before it, the alternative to late chunking."""
    texts = []
    for doc, title in zip(docs, titles, strict=True):
        edges = [0, *doc.ends.tolist()]
        texts += [f"{title}: {doc.content[a:b]}" for a, b in itertools.pairwise(edges)]
    return pipeline.embedder.embed_passages(texts)


def measure_gate(args: argparse.Namespace) -> dict:
    """Share of questions whose answer lies within the expanded chunks of a gold passage, by gate and by p."""
    pipeline = pipeline_of(args, search={"topk": args.topk}, pack={"k": args.k, "p": 0.25})
    shares = [float(p) for p in args.p.split(",")]
    hits, n, seconds = collections.defaultdict(lambda: collections.defaultdict(int)), 0, collections.defaultdict(list)
    for item in refrag.progress(questions_of(args.questions, args.limit), "gate"):
        passages = pipeline.retrieve(item)
        packed = pipeline.pack_docs(item, passages)
        gold = gold_chunks(packed, passages, item)
        if not gold:
            continue
        n += 1
        tokens = np.asarray([c.tokens for c in packed.prompt.chunks])
        query = pipeline.embedder.embed_query(item["question"])[0]
        tables = pipeline.chunk_tables([d.content for d in packed.docs], packed.rows, {"gate"})
        vectors = {"late": np.concatenate([t.gate for t in tables]),
                   "separate": separate_vectors(pipeline, packed.docs, [p.title for p in passages])}
        texts = [packed.docs[c.doc].content[c.start : c.end] for c in packed.prompt.chunks]
        owners = np.asarray([c.doc for c in packed.prompt.chunks])
        for kind, matrix in vectors.items():
            given = refrag.GateInput(item["question"], query, matrix, texts, owners, pipeline.idf(texts),
                                     packed.prompt, pipeline.model.decoder, RUNTIME.seed)
            for gate in ("cosine", "blend", "random"):
                start = time.perf_counter()
                scores = refrag.GATES[gate](given)
                seconds[gate].append(time.perf_counter() - start)
                for p in shares:
                    chosen = refrag.select_chunks(scores, tokens, p)
                    hits[f"{gate} ({kind})"][p] += any(all(chosen[i] for i in span) for span in gold)
    return {"n": n, "k": args.k, "topk": args.topk,
            "recall": {gate: {p: round(count / n, 4) for p, count in row.items()} for gate, row in hits.items()},
            "median_ms": {gate: round(1000 * statistics.median(values), 3) for gate, values in seconds.items()}}


def gold_chunks(packed: refrag.Packed, passages: list, item: dict) -> list[list[int]]:
    """For each place where an answer stands in a positive passage: the chunks that it covers."""
    spans = []
    for number, (doc, passage) in enumerate(zip(packed.docs, passages, strict=False)):
        if passage.document_id not in item["positive_ids"]:
            continue
        mine = [(i, c) for i, c in enumerate(packed.prompt.chunks) if c.doc == number]
        for answer in item["answers"]:
            for match in re.finditer(re.escape(answer), doc.content):
                spans.append([i for i, c in mine if c.start < match.end() and match.start() < c.end])
    return spans


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
    parser.add_argument("what", choices=("retrieval", "decode", "untrained", "gate", "anchors", "training"))
    parser.add_argument("--index_dir")
    parser.add_argument("--questions")
    parser.add_argument("--texts")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--contexts", default="512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", default="0,0.25")
    parser.add_argument("--topk", type=int, default=8)
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
