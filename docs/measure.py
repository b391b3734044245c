"""Makes the figures of docs/RESULTS.md that `refrag.py eval` does not make. Each command prints one JSON object.

    python docs/measure.py decode [--llama_cpp]
    python docs/measure.py answers --qa qa.dev.jsonl.gz --index_dir runs/dev --limit 300 [--load_dir CHECKPOINT]
    python docs/measure.py first_token --index_dir runs/long500 --contexts 4096 7900 [--llama_cpp]
    python docs/measure.py versions --index_dir INDEX --against OTHER/refrag.py ITS_INDEX --qa qa.jsonl --limit 20
    python docs/measure.py start_up --index_dir runs/wiki [--against OTHER/refrag.py]
    python docs/measure.py anchors --texts data/cpt_train.jsonl
    python docs/measure.py embed --texts data/wiki_passages.jsonl --limit 256
    python docs/measure.py kernels --index_dir runs/wiki --qa data/wiki_questions.jsonl --limit 60 --dtype bfloat16
    python docs/measure.py allocator --texts data/cpt_train.jsonl --contexts 512 --k 4
    python docs/measure.py hops --qa multihop/qa.dev.jsonl.gz --index_dir runs/multihop --p 0.05
    python docs/measure.py paired --run OUT/answers_ceiling --against OUT/answers_squad_more

--llama_cpp: beside llama.cpp on the same GGUF file, which needs `pip install llama-cpp-python==0.3.36` (from source).

What is timed is warmed up, and what is compared takes turns within one run, so that drift of the machine hits all
alike; the figures are medians.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import refrag
from refrag_extras import align, bench, cpu_engine, evaluate
from refrag_extras.corpus import read_corpus
from refrag_extras.runs import describe_device, glibc, keep_memory, library_versions, make_accelerator
from refrag_extras.train import text_kinds, with_defaults

RUNTIME = refrag.RuntimeConfig()


def print_result(what: str, result: dict) -> None:
    """A measurement with what it takes to make it again, as one JSON object."""
    print(json.dumps({"what": what, "device": describe_device(RUNTIME), "versions": library_versions(),
                      "command": sys.argv, "commit": evaluate.source_commit(), **result}))


# -- decoding ------------------------------------------------------------------


class LlamaReader:
    """llama.cpp on the bundled decoder's GGUF file, with as many threads as torch has. Greedy, by the raw logits."""

    def __init__(self, window: int):
        """window: positions at most."""
        import llama_cpp

        start, threads = time.perf_counter(), torch.get_num_threads()
        self.llama = llama_cpp.Llama(refrag.model_path("SmolLM2-135M-Instruct"), n_ctx=window, verbose=False,
                                     n_threads=threads, n_threads_batch=threads, n_batch=512)
        self.load_s = time.perf_counter() - start
        self.logits = llama_cpp.llama_get_logits_ith

    def best(self) -> int:
        """The token after what was read."""
        row = self.logits(self.llama._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(row, (self.llama.n_vocab(),)).argmax())

    def answer(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and per token after it."""
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(prompt)
        token, first = self.best(), time.perf_counter()
        for _ in range(new - 1):
            self.llama.eval([token])
            token = self.best()
        return first - start, (time.perf_counter() - first) / max(new - 1, 1)


def stepper_bytes(stepper: cpu_engine.Stepper) -> int:
    """Bytes of the matrices of a stepper, which are read at every step."""
    matrices = [stepper.head, *(matrix for layer in stepper.layers for matrix in layer)]
    return sum(part.nbytes for matrix in matrices for part in (matrix.values, matrix.scale))


def measure_decode(args: argparse.Namespace) -> dict:
    """Our decode loop by every engine, transformers' generate and llama.cpp, taking turns."""
    decoder, watch = refrag.load_model(refrag.ModelConfig(), RUNTIME).decoder, refrag.Stopwatch(torch.device("cpu"))
    ids = torch.arange(100, 100 + args.prompt)
    inputs = decoder.get_input_embeddings().weight[ids].detach()
    engines: dict[str, dict] = {"generate": {}, "model": {}}
    steppers: dict[str, cpu_engine.Stepper | None] = {"model": None}
    for name in ("int8", "int4"):
        start = time.perf_counter()
        steppers[name] = cpu_engine.Stepper(decoder, name)
        engines[name] = {"load_s": round(time.perf_counter() - start, 3), "mb": stepper_bytes(steppers[name]) / 1e6}
    weights = sum(parameter.nbytes for parameter in decoder.parameters()) / 1e6
    engines["generate"]["mb"] = engines["model"]["mb"] = weights

    def ours(stepper: cpu_engine.Stepper | None) -> tuple[float, float]:
        start = time.perf_counter()
        logits, state = refrag.prefill(decoder, [inputs])
        [out], _ = refrag.decode(decoder, logits, state, max_new=args.new, stops=frozenset(),
                                 pick=lambda x: x.argmax(-1), watch=watch, stepper=stepper)
        return out.times[0] - start, (time.perf_counter() - out.times[0]) / (args.new - 1)

    def generate(new: int) -> float:
        start = time.perf_counter()
        decoder.generate(inputs_embeds=inputs[None], attention_mask=torch.ones(1, args.prompt, dtype=torch.long),
                         max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    def theirs() -> tuple[float, float]:
        one, many = generate(1), generate(args.new)
        return one, (many - one) / (args.new - 1)

    timers = {"generate": theirs, **{name: functools.partial(ours, stepper) for name, stepper in steppers.items()}}
    if args.llama_cpp:
        llama = LlamaReader(args.prompt + args.new)
        engines["llama_cpp"] = {"load_s": round(llama.load_s, 3),
                                "mb": Path(refrag.model_path("SmolLM2-135M-Instruct")).stat().st_size / 1e6}
        timers["llama_cpp"] = lambda: llama.answer(ids.tolist(), args.new)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for turn in range(args.repeats + 1):
        for name, timed in timers.items():
            seconds = timed()
            if turn:  # the first warms up
                rows[name].append(seconds)
    for name, seconds in rows.items():
        first, each = (statistics.median(column) for column in zip(*seconds, strict=True))
        engines[name] |= {"first_s": round(first, 4), "ttit_ms": round(1e3 * each, 3)}
        for other in ("generate", "llama_cpp"):
            if other in rows:
                ratios = [theirs[1] / mine[1] for theirs, mine in zip(rows[other], seconds, strict=True)]
                engines[name][f"times_faster_than_{other}"] = round(statistics.median(ratios), 3)
    return {"prompt": args.prompt, "new": args.new, "auto": cpu_engine.Stepper(decoder).engine,
            "rows": [{"engine": name, **row} for name, row in engines.items()]}


def measure_answers(args: argparse.Namespace) -> dict:
    """F1 and EM of the answers by every engine, each from the same prefill, and how many are those of float32."""
    models = refrag.ModelConfig(load_dir=args.load_dir)
    pipeline = refrag.load_pipeline(refrag.IndexConfig(index_dir=args.index_dir), refrag.SearchConfig(),
                                    refrag.PackConfig(k=args.k, p=args.p), refrag.GenerateConfig(max_new=args.new),
                                    models, refrag.RuntimeConfig(engine="model"))
    decoder, watch = pipeline.model.decoder, refrag.Stopwatch(torch.device("cpu"))
    steppers = {"int8": cpu_engine.Stepper(decoder, "int8"), "int4": cpu_engine.Stepper(decoder, "int4"), "model": None}
    scores: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in steppers}
    questions = refrag.read_answered_questions(args.qa, "--qa", args.limit)
    for item in refrag.progress(questions, "answers", total=len(questions), unit="question"):
        logits, state = refrag.prefill(decoder, [pipeline.prepare(item).inputs])
        replies = {}
        for name, stepper in steppers.items():  # the decoder last: it adds to the cache, the others to a copy
            [out], _ = refrag.decode(decoder, logits, state, max_new=args.new, watch=watch, stepper=stepper,
                                     stops=pipeline.settings.stop_tokens, pick=pipeline.settings.pick)
            replies[name] = pipeline.tokenizer.decoder.decode(out.tokens, skip_special_tokens=True)
        for name, reply in replies.items():
            truths = item["answers"]
            scores[name].append((evaluate.token_f1(reply, truths), evaluate.exact_match(reply, truths),
                                 reply == replies["model"]))
    table = {name: dict(zip(("f1", "em", "same_as_model"), np.mean(rows, axis=0).round(4).tolist(), strict=True))
             for name, rows in scores.items()}
    for name, rows in scores.items():
        differences = [mine[0] - other[0] for mine, other in zip(rows, scores["model"], strict=True)]
        interval = evaluate.bootstrap_interval(differences, RUNTIME.seed)
        table[name]["f1_minus_model"] = [round(statistics.mean(differences), 4), *interval]
    return {"n": len(questions), "auto": cpu_engine.Stepper(decoder).engine,
            "rows": [{"engine": name, **row} for name, row in table.items()]}


def measure_hops(args: argparse.Namespace) -> dict:
    """What a second search brings, by how its query is made. `right titles`: the question and the titles of the
    passages that are needed, the best that a reader could write."""
    shipped = {"load_dir": args.load_dir} if args.load_dir else {}
    pipeline = refrag.open_pipeline(args.index_dir, hops=2, p=args.p, topk=args.topk, **shipped)
    questions = refrag.labelled(refrag.read_question_file(args.qa, "--qa", ("answers", "positive_ids")),
                                "positive_ids", args.limit, args.qa)
    places, index = refrag.positive_rows(questions, pipeline.index), pipeline.index
    found: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for item in refrag.progress(questions, "questions", total=len(questions), unit="question"):
        needed = [places[name] for name in dict.fromkeys(item["positive_ids"])]
        titles = " ".join(dict.fromkeys(index[rows[0]].title for rows in needed))
        ways = {"none": None, "rule": refrag.rule_query, "model": pipeline.written_query,
                "right titles": lambda question, _, titles=titles: f"{question} {titles}"}
        for name, write in ways.items():
            queries = []

            def following(question: str, passages: list, write=write, queries=queries) -> str:
                queries.append(write(question, passages))
                return queries[0] if queries[0] != refrag.rule_query(question, passages) else queries.pop()

            start = time.perf_counter()
            passages = pipeline.searcher.search(item["question"], args.topk, 1 + (name != "none"), None, following)
            seconds, rows = time.perf_counter() - start, {passage.row for passage in passages}
            hit = [not rows.isdisjoint(some) for some in needed]
            [result] = pipeline.generate([pipeline.prepare(item, passages=passages)])
            reply = refrag.parse_citations(result["answer"], [str(p.rank) for p in passages]).bare
            found[name].append({"recall": statistics.fmean(hit), "all_positives": float(all(hit)),
                                "f1": evaluate.token_f1(reply, item["answers"]), "ms": 1000 * seconds,
                                "own": len(queries)})
    table = []
    for name, lines in found.items():
        cells: dict = {column: round(statistics.fmean(line[column] for line in lines), 4)
                       for column in ("recall", "all_positives", "f1")}
        for rival, column in itertools.product(("none", "rule"), ("all_positives", "f1")):
            if list(found).index(name) > list(found).index(rival):
                gains = [mine[column] - other[column] for mine, other in zip(lines, found[rival], strict=True)]
                gained = {"mean": statistics.fmean(gains), "ci": evaluate.bootstrap_interval(gains, RUNTIME.seed)}
                cells[f"{column}_minus_{rival}"] = evaluate.cell_text(gained)
        table.append({"next_query": name, **cells, "own_queries": sum(line["own"] for line in lines),
                      "search_ms": round(statistics.median(line["ms"] for line in lines), 1)})
    return {"n": len(questions), "passages": len(index), "rows": table}


def measure_first_token(args: argparse.Namespace) -> dict:
    """Time to the first token of full and compressed context by torch, and of full context by llama.cpp, in turns."""
    modes, contexts = ("full", "refrag"), tuple(args.contexts)
    bench = refrag.BenchConfig(contexts=contexts, modes=modes, k=(args.k,), p=(0.0, 0.1), new=2)
    index, models = refrag.IndexConfig(index_dir=args.index_dir), refrag.ModelConfig()
    benchmark = bench.load_benchmark(bench, index, models, RUNTIME)
    item, timers, sizes = benchmark.item, {}, {}
    llama = LlamaReader(benchmark.pipeline.model.window) if args.llama_cpp else None
    for trial in benchmark.trials:
        length = trial.setting.context
        timers[length, trial.setting.curve] = lambda trial=trial: trial.run(item)["ttft_s"]
        if trial.setting.mode == "full":
            prompt = trial.pipeline.prepare(item, trial.settings).context.prompt
            sizes[length] = prompt.context_tokens
            if llama is not None:
                timers[length, "llama.cpp full"] = lambda prompt=prompt: llama.answer(prompt.input_ids.tolist(), 1)[0]
    runs = collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        for name, timed in timers.items():
            seconds = timed()
            if turn:  # the first warms up
                runs[name].append(seconds)
    rows = []
    for (length, curve), seconds in runs.items():
        row = {"context_tokens": sizes[length], "curve": curve, "ttft_s": round(statistics.median(seconds), 4)}
        for other in ("full", "llama.cpp full"):
            if (length, other) in runs:
                ratios = [a / b for a, b in zip(runs[length, other], seconds, strict=True)]
                row[f"times_faster_than {other}"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return {"rows": rows, "left_out": benchmark.left_out}


def answered(program: str, index_dir: str, questions: list[dict], folder: Path, options: list[str]) -> list[dict]:
    """The metrics of a process that answers some questions, without those of the first one, which warms up."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    command = [sys.executable, program, "generate", "--questions", str(path), "--index_dir", index_dir, *options,
               "--max_new", "16", "--json", "--quiet"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["results"]
    return [result["metrics"] for result in results[1:]]


def measure_versions(args: argparse.Namespace) -> dict:
    """Different questions by this program and another one, processes by turns; then the full text by llama.cpp. As many
    questions as --limit says, fewer of the full text the longer it is."""
    programs = {"this": [refrag.__file__, args.index_dir], "against": args.against}
    every = refrag.read_answered_questions(args.qa, "--qa", None)
    every = [{"id": str(i), "question": item["question"]} for i, item in enumerate(every[:: len(every) // args.limit])]
    rows, full, long = [], {}, {}
    for context, (mode, k, p) in itertools.product(args.contexts, (
            ("full", 16, 1.0), ("refrag", 16, 0.0), ("refrag", 32, 0.0), ("refrag", 16, 0.1))):
        shape = {"mode": mode, "k": k, "p": p, "floor": 0, "ctx_max": context}
        shape["topk"] = context // args.passage_tokens + 1
        options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        asked = every[: max(3, args.limit * 250 // context) if mode == "full" else args.limit]
        metrics: dict[str, list[dict]] = collections.defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            for some in (asked[::2], asked[1::2]):
                for name, (program, index_dir) in programs.items():
                    metrics[name] += answered(program, index_dir, [every[-1], *some], Path(folder), options)
        middle = {name: {key: statistics.median(one[key] for one in found if one[key] is not None)
                         for key in ("ttft_s", "ttit_s", "positions", "context_tokens", "peak_rss_mb")}
                  for name, found in metrics.items()}
        row = {"context_tokens": middle["this"]["context_tokens"], "mode": mode, "k": k, "p": p, "n": len(asked),
               "positions": middle["this"]["positions"]}
        row |= {f"{key}, {name}": middle[name][key] for key in ("ttft_s", "ttit_s", "peak_rss_mb") for name in programs}
        if mode == "full":
            full[context], long[context] = row["ttft_s, this"], (shape, asked[:2])
        row |= {"times_as_fast": middle["against"]["ttft_s"] / middle["this"]["ttft_s"],
                "full/this": full[context] / row["ttft_s, this"]}
        rows.append((context, row))
        print(json.dumps(row), file=sys.stderr)
    if args.llama_cpp:  # last: a process that it starts would be said to have had its memory
        for context, (shape, asked) in long.items():
            pipeline = refrag.open_pipeline(args.index_dir, **shape)
            llama, readings = LlamaReader(pipeline.model.window), [pipeline.prepare(item) for item in asked]
            prompts = (reading.context.prompt.input_ids.tolist() for reading in readings)
            seconds = statistics.median(llama.answer(prompt, 1)[0] for prompt in prompts)
            for _, row in (one for one in rows if one[0] == context):
                row |= {"llama.cpp reads all, s": seconds, "llama.cpp/this": seconds / row["ttft_s, this"]}
    return {"rows": [{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
                     for _, row in rows]}


# -- start-up ---------------------------------------------------------------------


def peak_of(child: subprocess.Popen) -> float:
    """Wait for a process, which must end well: the most memory that it held, in MB."""
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, child.args
    return usage.ru_maxrss / 1024


def measure_start_up(args: argparse.Namespace) -> dict:
    """Seconds from the command to its end, for one token; peak memory; another version of the program in turns."""
    programs = {"this": refrag.__file__} | ({"against": args.against[0]} if args.against else {})
    runs: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in programs}
    ask = ["generate", "--question", "Who coined the term cells?", "--index_dir", args.index_dir, "--max_new", "1",
           "--json", "--quiet"]
    for turn in range(args.repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            child = subprocess.Popen([sys.executable, program, *ask], stdout=subprocess.PIPE)
            metrics = json.loads(child.stdout.readline())["metrics"]
            printed = time.perf_counter() - start
            peak = peak_of(child)
            if turn:  # the first warms the disk's cache up
                runs[name].append((printed, time.perf_counter() - start, metrics["load_s"], peak))
    columns = ("first_token_s", "whole_s", "loading_s", "peak_rss_mb")
    return {"rows": [{"program": name} | {column: round(statistics.median(values), 2) for column, values in zip(
        columns, zip(*rows, strict=True), strict=True)} for name, rows in runs.items()]}


def measure_kernels(args: argparse.Namespace) -> dict:
    """Peak memory and time to the first token over questions, by how many of its kernels oneDNN keeps, in turns."""
    times, peaks = collections.defaultdict(list), collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "questions.jsonl"
        questions = refrag.sample_evenly(refrag.read_question_file(args.qa, "--qa"), args.limit)
        asked.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
        for turn, kept in itertools.product(range(args.repeats), ("1024", "256", "64")):
            answers = Path(folder) / f"answers-{turn}-{kept}.jsonl"
            child = subprocess.Popen(
                [sys.executable, refrag.__file__, "generate", "--questions", asked, "--index_dir", args.index_dir,
                 "--p", str(args.p), "--max_new", "4", "--dtype", args.dtype, "--out", answers],
                env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": kept})
            peaks[kept].append(peak_of(child))
            times[kept] += [json.loads(line)["metrics"]["ttft_s"] for line in answers.read_text().splitlines()]
    return {"rows": [{"kernels": int(kept), "peak_rss_mb": statistics.median(peaks[kept]),
                      "first_token_ms": 1e3 * statistics.median(times[kept])} for kept in peaks]}


# -- embedding -------------------------------------------------------------------


def measure_embed(args: argparse.Namespace) -> dict:
    """Passages a second of plain `SentenceTransformer.encode` and of `index`, chunk vectors included, in turns."""
    from sentence_transformers import SentenceTransformer

    config = refrag.CorpusConfig(corpus=(args.texts,), limit=args.limit)
    counts = {"skipped": 0, "replaced": 0}
    texts = [refrag.passage_content(record.title, record.text) for record in read_corpus(config, counts)]
    embedder = refrag.load_embedder(None, RUNTIME)
    plain = SentenceTransformer(refrag.model_path(embedder.name), device=str(refrag.pick_device("auto")))
    chunking = refrag.Chunking(16, refrag.build_tokenizer(refrag.RefragConfig()))
    made, rows = {}, collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        for name, embed in (("encode", lambda: plain.encode(texts, show_progress_bar=False)),
                            ("index", lambda: refrag.chunk_tables(texts, chunking, embedder, 32)[0])):
            start = time.perf_counter()
            made[name] = embed()
            if turn:
                rows[name].append(len(texts) / (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(rows["encode"], rows["index"], strict=True)]
    cosine = round(float((made["encode"] * made["index"]).sum(1).min()), 6)
    per_s = {name: round(statistics.median(values), 2) for name, values in rows.items()}
    return {"n": len(texts), "precision": str(next(embedder.model.parameters()).dtype), "rows": [
        {"embedding": "SentenceTransformer.encode", "passages_per_s": per_s["encode"]},
        {"embedding": "index", "passages_per_s": per_s["index"], "times_faster": round(statistics.median(ratios), 3),
         "lowest_cosine": cosine}]}


# -- alignment and training ------------------------------------------------------


def measure_anchors(args: argparse.Namespace) -> dict:
    """Exact and cost-aware anchors between the tokens of MiniLM (uncased) and of SmolLM2, per decoder token."""
    tokenizers = [refrag.load_tokenizer(name) for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct")]
    counts: collections.Counter = collections.Counter()
    costs, seconds = [], 0.0
    for text in itertools.islice(refrag.read_training_texts([args.texts]), args.limit):
        start = time.perf_counter()
        encoder, decoder = (refrag.tokenize_pieces(text.text, tokenizer) for tokenizer in tokenizers)
        exact, anchors = align.exact_anchors(encoder, decoder), refrag.cost_anchors(encoder, decoder)
        seconds += time.perf_counter() - start
        counts.update(texts=1, decoder=len(decoder.ids), encoder=len(encoder.ids), exact=len(exact),
                      anchors=len(anchors), good=sum(a.cost <= refrag.MAX_COST for a in anchors))
        costs += [a.cost for a in anchors]
    tokens = counts["decoder"]
    return {**counts, "exact_share": counts["exact"] / tokens, "anchor_share": counts["anchors"] / tokens,
            "good_share": counts["good"] / tokens, "mean_cost": statistics.mean(costs),
            "seconds_per_10k_tokens": 1e4 * seconds / tokens}


def trainer_of(args: argparse.Namespace, lessons: str, letters: str, folder: Path) -> refrag.Trainer:
    """A trainer at the start of a run, on the bundled models."""
    size = args.contexts[0]
    train = refrag.TrainConfig(out_dir=str(folder), k=(args.k,), seq_tokens=size, batch_size=args.batch_size,
                               steps=10**6, train=letters)
    train, phase = with_defaults(f"cpt_{lessons}", train), refrag.PHASES[f"cpt_{lessons}"]
    model, shares = refrag.load_model(refrag.ModelConfig(), RUNTIME, letters), ({lessons: 1.0}, {lessons: 1.0})
    options = refrag.ReconConfig(), refrag.NextConfig(), refrag.AnswersConfig(), refrag.SearchConfig()
    given = {type(c): c for c in (*options, train, refrag.TextConfig(train_json=(args.texts,)))}
    steps = refrag.Steps(text_kinds([lessons], given, model.encoder), shares, train, teaches=False,
                         window=model.window, seed=RUNTIME.seed)
    refrag.mark_trained(model, letters, 0)
    facts = {"phase": f"cpt_{lessons}", "data": []}
    return refrag.Trainer(model, steps, phase.weights, make_accelerator(RUNTIME), None, facts)


def measure_allocator(args: argparse.Namespace) -> dict:
    """Seconds of training steps with the allocator as it is and with `keep_memory`, taking turns; peak memory."""
    cpu, times, peaks = torch.device("cpu"), {"default": [], "kept": []}, {"default": 0.0, "kept": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, "next", "ped", Path(folder))
        steps = list(itertools.islice(trainer.steps.run(0, cpu), args.repeats + 1))
        for name in ("default", "kept", "default", "kept"):
            bench.reset_peak_memory(cpu)
            if name == "kept":
                keep_memory()
            else:  # glibc's M_MMAP_MAX by default, and the most that its own M_TRIM_THRESHOLD comes to
                glibc("mallopt", -4, 1 << 16)
                glibc("mallopt", -1, 1 << 26)
            clock = [time.perf_counter()]
            for step in steps:
                trainer.run_step(step)
                clock.append(time.perf_counter())
            times[name] += [end - start for start, end in itertools.pairwise(clock)][1:]  # the first warms up
            peaks[name] = max(peaks[name], refrag.peak_rss_mb())
    rows = [{"allocator": name, "step_s": statistics.median(times[name]), "peak_rss_mb": peaks[name]} for name in times]
    return {"rows": rows, "default/kept": statistics.median(map(operator.truediv, *times.values()))}


# -- answers of two runs -----------------------------------------------------------


def f1_by_cell(folder: str | None) -> dict[tuple[str, float], dict[str, float]]:
    """F1 of every question by (mode, p), of an `eval --task qa`. Without any the script ends."""
    cells: dict[tuple[str, float], dict[str, float]] = collections.defaultdict(dict)
    for path in Path(folder).glob("questions*.jsonl") if folder else ():
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            cells[line["mode"], line["p"]][line["id"]] = line["f1"]
    if not cells:
        raise SystemExit(f"paired: --run and --against name folders of `eval --task qa`; {folder} holds no answers")
    return dict(cells)


def measure_paired(args: argparse.Namespace) -> dict:
    """F1 in each cell of --against, beside the same cell of --run, or its only one, over the questions of both."""
    run, rows, shared = f1_by_cell(args.run), [], set()
    order = refrag.EVAL_MODES["qa"]
    others = f1_by_cell(args.against and args.against[0])
    for cell, found in sorted(others.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        other = run[cell] if cell in run else next(iter(run.values())) if len(run) == 1 else {}
        if ids := sorted(found.keys() & other.keys()):
            shared.update(ids)
            mine, theirs = ([values[i] for i in ids] for values in (found, other))
            difference = [a - b for a, b in zip(mine, theirs, strict=True)]
            gained = {"mean": statistics.fmean(difference), "ci": evaluate.bootstrap_interval(difference, RUNTIME.seed)}
            rows.append({"mode": cell[0], "p": f"{cell[1]:g}", "f1": round(statistics.fmean(mine), 3),
                         "of_the_run": f"{statistics.fmean(mine) / statistics.fmean(theirs):.0%}",
                         "f1_minus_the_run": evaluate.cell_text(gained)})
    return {"n": len(shared), "rows": rows}


def main() -> None:
    """Parse, measure, print."""
    global RUNTIME
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    measures = [name.removeprefix("measure_") for name in globals() if name.startswith("measure_")]
    parser.add_argument("what", choices=measures)
    parser.add_argument("--index_dir")
    parser.add_argument("--load_dir")
    parser.add_argument("--run", help="with paired: the folder of an `eval --task qa`")
    parser.add_argument("--against", nargs="+", help="with start_up: another refrag.py; with versions: that and its "
                        "index; with paired: another folder")
    parser.add_argument("--passage_tokens", type=int, default=480, help="with versions: of a passage, or fewer")
    parser.add_argument("--qa")
    parser.add_argument("--texts")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512])
    parser.add_argument("--llama_cpp", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.25)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--dtype", default=RUNTIME.dtype)
    args = parser.parse_args()
    RUNTIME = dataclasses.replace(RUNTIME, dtype=args.dtype)
    refrag.prepare_runtime(RUNTIME)
    result = globals()[f"measure_{args.what}"](args)
    print_result(args.what, result)


if __name__ == "__main__":
    main()
