"""`refrag.py bench`: time to the first token and between tokens against context length, side by side in one run; or
(`--task train`) how much of a training step its own matrix products take."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import refrag
from refrag_extras import reports
from refrag_extras.doctor import index_summary
from refrag_extras.evaluate import aligned_table, markdown_table, source_commit
from refrag_extras.generate import read_questions
from refrag_extras.runs import (
    describe_device,
    glibc,
    keep_memory,
    library_versions,
    make_accelerator,
    run_folder,
    run_settings,
)

TIMED = ("ttft_s", "ttit_s", "tokens_per_s")
SIZED = ("context_tokens", "positions", "full_positions", "compression", "p_realised", "new_tokens", "kv_bytes")


class Setting(NamedTuple):
    """One combination that is timed; None is what its mode does without, and the question alone has context 0."""

    mode: str
    context: int
    k: int | None
    p: float | None
    batch: int = 1

    @property
    def curve(self) -> str:
        """Its name without the context. Example: "refrag k=16 p=0.25" """
        shown = (("k", self.k), ("p", self.p), ("batch", self.batch if self.batch > 1 else None))
        return " ".join([self.mode, *(f"{name}={value:g}" for name, value in shown if value is not None)])


def bench_settings(bench: refrag.BenchConfig) -> list[Setting]:
    """Every combination once, though some are named twice: full context knows no k and p, the question no context."""
    made = []
    for context, mode, batch in itertools.product(bench.contexts, bench.modes, bench.batch_size):
        compression = itertools.product(bench.k, bench.p) if mode == "refrag" else [(None, None)]
        made += [Setting(mode, 0 if mode == "none" else context, k, p, batch) for k, p in compression]
    return list(dict.fromkeys(made))


def theoretical_ratio(k: int, p: float) -> float:
    """Tokens of the context over positions fed for it, a share p of them as text: 1 / (p + (1 - p) / k).

    Example: k = 16, p = 0.25 -> 1 / (0.25 + 0.75 / 16) = 3.368
    """
    return 1 / (p + (1 - p) / k)


def round_orders(count: int, rounds: int, seed: int) -> Iterator[list[int]]:
    """A random order of `count` runs for each round, so that no run always follows the same one."""
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        yield generator.permutation(count).tolist()


def peak_device_mb(device: torch.device) -> float | None:
    """Largest memory that tensors took on a CUDA device since the last reset, in MiB; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Reset both peaks; that of resident memory only on Linux."""
    glibc("malloc_trim", 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@dataclass
class Trial:
    """A setting that fits, how the pipeline runs it, and what its runs measured."""

    setting: Setting
    pipeline: refrag.Pipeline
    settings: refrag.Settings
    stored_vectors: bool | None  # whether the index holds what it reads; None where no vectors are read
    kinds: dict[str, int]  # see `position_kinds`
    runs: list[dict[str, Any]] = field(default_factory=list)  # the metrics of each counted round
    memory: dict[str, float | None] = field(default_factory=dict)
    products_s: float = 0.0  # what the matrix products of the prefill take by themselves

    def run(self, item: dict[str, Any]) -> dict[str, Any]:
        results = self.pipeline.answer_batch([item] * self.setting.batch, self.settings)
        return metrics_together([result["metrics"] for result in results])

    def warm_up(self, item: dict[str, Any]) -> None:
        """A run that is not timed and measures peak memory, since returning freed memory would slow a timed one; and
        the prefill's matrix products by themselves."""
        reset_peak_memory(self.pipeline.device)
        peak, device_peak = self.run(item)["peak_rss_mb"], peak_device_mb(self.pipeline.device)
        self.memory = {"peak_rss_mb": peak, "peak_device_mb": device_peak and round(device_peak, 1)}
        reading = self.pipeline.prepare(item, self.settings)
        self.pipeline.start([reading])  # is read before, as where it is timed
        with Products() as products:
            self.pipeline.prefill([reading] * self.setting.batch)
        self.products_s = products.seconds(self.pipeline.device, 2)


def position_kinds(prompt: refrag.Prompt, plan: np.ndarray) -> dict[str, int]:
    """How many of a plan's positions stand before the documents, are their tags, vectors, text, and after them."""
    first, last = (prompt.blocks[0][0], prompt.blocks[-1][1]) if prompt.blocks else (0, 0)
    tokens, content = len(prompt.input_ids), sum(chunk.last - chunk.first for chunk in prompt.chunks)
    vectors, tags = int((plan < 0).sum()), last - first - content
    text = len(plan) - first - tags - vectors - (tokens - last)
    return {"prefix": first, "tags": tags, "vectors": vectors, "text": text, "question": tokens - last}


def metrics_together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of answers made together: they share the prefill and the steps, each has its own context."""
    first, count = answers[0], len(answers)
    if count == 1:
        return first
    own = {name: round(sum(one["stages"][name] for one in answers), 6) for name in first["stages"]}
    stages = own | {"prefill_s": first["stages"]["prefill_s"]}
    pace = first["tokens_per_s"]
    return first | {"stages": stages, "ttft_s": round(sum(stages.values()), 6), "kv_bytes": first["kv_bytes"] * count,
                    "tokens_per_s": pace and round(pace * count, 3)}


def reads_stored(pipeline: refrag.Pipeline, k: int) -> bool:
    """Whether the index holds the encoder's states at k."""
    return pipeline.states_at(k) is not None and pipeline.stored.serves(k)


class Benchmark:
    """Settings that take turns over one loaded pipeline, and their result."""

    def __init__(self, pipeline: refrag.Pipeline, bench: refrag.BenchConfig, item: dict[str, Any],
                 facts: dict[str, Any]):
        self.pipeline, self.bench, self.item, self.facts = pipeline, bench, item, facts
        self.left_out: list[str] = []
        self.trials = self.plan()

    def leave_out(self, text: str) -> None:
        self.left_out.append(text)
        refrag.notice(text)

    def fill(self, context: int) -> int | None:
        """The number of passages that `context` tokens hold; None, and reported, if they cannot be filled."""
        for topk in (refrag.SearchConfig.topk * 2**doubled for doubled in itertools.count()):
            settings = self.pipeline.settings_for(mode="full", ctx_max=context, topk=topk)
            found = self.pipeline.retrieve(self.item, settings)
            packed = self.pipeline.context(self.item, found, settings)
            if packed.left_out or len(found) < topk:
                break
        tokens = packed.prompt.context_tokens
        if packed.left_out and not packed.docs:
            self.leave_out(f"--contexts {context} left out: the best passage alone is longer")
        elif tokens < context and not packed.left_out:
            self.leave_out(f"--contexts {context} left out: all {len(found)} passages that the question finds hold "
                           f"{tokens} tokens")
        else:
            return len(packed.docs)
        return None

    def make_trial(self, setting: Setting, topk: int | None) -> Trial | None:
        """A setting, ready to be timed; None, and reported, if it does not fit. Its answers have all of --new tokens:
        nothing stops them."""
        pipeline, stored, usual = self.pipeline, self.pipeline.stored, self.pipeline.settings
        k = setting.k or (stored.manifest["chunking"]["k"] if stored else usual.k)  # full text: no recount
        settings = pipeline.settings_for(
            topk=topk or usual.topk, mode=setting.mode, k=k, p=usual.p if setting.p is None else setting.p,
            ctx_max=setting.context or usual.ctx_max, stop_tokens=frozenset())
        if setting.batch > 1 and not pipeline.batches:
            self.leave_out(f"--batch_size {setting.batch} left out: here one answer is decoded after another, so "
                           "that each is what it is alone")
            return None
        context = pipeline.context(self.item, pipeline.retrieve(self.item, settings), settings)
        scores, _ = pipeline.score(context, settings)
        plan = refrag.feed_plan(context.prompt, scores, settings)[2]
        try:
            pipeline.check_window(len(plan), settings)
        except refrag.TooLongError:
            self.leave_out(f"{setting.curve} at --contexts {setting.context} left out: {len(plan)} positions and --new "
                           f"{self.bench.new} exceed the decoder's window {pipeline.model.window}")
            return None
        reads_vectors = setting.mode == "refrag" and setting.p < 1
        return Trial(setting, pipeline, settings, reads_stored(pipeline, k) if reads_vectors else None,
                     position_kinds(context.prompt, plan))

    def plan(self) -> list[Trial]:
        """The trials that fit the index and the decoder's window. Raises UserError if none does."""
        settings = bench_settings(self.bench)
        depths = {context: self.fill(context) for context in dict.fromkeys(s.context for s in settings) if context}
        made = (self.make_trial(s, depths.get(s.context)) for s in settings if not s.context or depths[s.context])
        kept = [trial for trial in made if trial is not None]
        refrag.require(bool(kept), f"nothing to time: {self.left_out[-1] if self.left_out else 'no combination'}")
        for k in dict.fromkeys(trial.setting.k for trial in kept if trial.stored_vectors is False):
            refrag.notice(f"--k {k}: the index holds no vectors that serve it: they are computed while the clock runs")
        return kept

    def rounds(self, seed: int) -> Iterator[int]:
        """Run every trial once a round, after a round that warms up. Yields the number of counted rounds after each."""
        orders = round_orders(len(self.trials), self.bench.repeats + 1, seed)
        with refrag.progress(None, "timing", len(self.trials) * (self.bench.repeats + 1), "run") as bar:
            for done, order in enumerate(orders):
                for trial in (self.trials[number] for number in order):
                    if done:
                        trial.runs.append(trial.run(self.item))
                    else:
                        trial.warm_up(self.item)
                    bar.update()
                if done:
                    yield done

    def result(self) -> dict[str, Any]:
        full = {(one.setting.context, one.setting.batch): one for one in self.trials if one.setting.mode == "full"}
        rows = [bench_row(one, full.get((one.setting.context, one.setting.batch))) for one in self.trials]
        return {**self.facts, "rounds": len(self.trials[0].runs), "rows": rows, "left_out": self.left_out}


def median_of(values: Sequence[float | None]) -> float | None:
    """The rounded median; None where nothing was measured."""
    return None if not values or None in values else round(float(np.median(values)), 6)


def bench_row(trial: Trial, full: Trial | None) -> dict[str, Any]:
    """A trial's medians, their spread and every round's values. full: the full context of the same length, if timed.

    Ratios are full context over this, round by round: more than 1 is faster, or smaller.
    """
    runs, (mode, _, k, p, _) = trial.runs, trial.setting
    series = {name: [run[name] for run in runs] for name in TIMED}
    for name in ("ttft", "ttit"):
        pairs = [(one[f"{name}_s"], run[f"{name}_s"]) for one, run in zip(full.runs, runs, strict=True)] if full else []
        series[f"{name}_ratio"] = [round(a / b, 6) for a, b in pairs if a and b]
    spread = {name: [min(values), max(values)] for name, values in series.items() if values and None not in values}
    return {
        **trial.setting._asdict(), **{name: runs[-1][name] for name in SIZED},
        **{name: median_of(values) for name, values in series.items()},
        "theoretical_ratio": round(theoretical_ratio(k, p), 6) if mode == "refrag" else None,
        "stages": {name: median_of([run["stages"][name] for run in runs]) for name in runs[0]["stages"]},
        "kinds": trial.kinds,
        "products_share": round(trial.products_s / min(run["stages"]["prefill_s"] for run in runs), 4),
        **trial.memory, "stored_vectors": trial.stored_vectors, "spread": spread, "runs": series}


def bench_curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["context_tokens"]):
        if row["context"]:
            curves.setdefault(Setting(*(row[name] for name in Setting._fields)).curve, []).append(row)
    return curves


def load_benchmark(bench: refrag.BenchConfig, index: refrag.IndexConfig, models: refrag.ModelConfig,
                   runtime: refrag.RuntimeConfig) -> Benchmark:
    """Load what `bench` times, with what its result must say to be made again."""
    [item] = read_questions(refrag.QuestionConfig(question=bench.question))
    pack = refrag.PackConfig(mode="refrag" if "refrag" in bench.modes else "full", floor=0, compressed="feed")
    generate = refrag.GenerateConfig(max_new=bench.new, cite=False)
    pipeline = refrag.load_pipeline(index, refrag.SearchConfig(), pack, generate, models, runtime)
    known = ("enc", "dec", "projector_trained", "gate", "compressed", "dtype")
    settings = {name: value for name, value in pipeline.describe(pipeline.settings).items() if name in known}
    settings = run_settings((bench, index, models, runtime)) | settings
    facts = {"device": describe_device(runtime), "settings": settings,
             "versions": library_versions(), "command": sys.argv, "commit": source_commit(),
             "index": index_summary(pipeline.searcher.index.manifest), "load_s": round(pipeline.load_s, 3)}
    return Benchmark(pipeline, bench, item, facts)


BENCH_PICTURES = ("ttft.png", "ratio.png")
BENCH_FILES = re.compile(r"bench\.json|report\.md|(ttft|ratio)\.png|\.lock|\..*\.tmp")


def write_bench(folder: Path, result: dict[str, Any], last: bool) -> None:
    """bench.json and report.md after a round; the pictures after the last one. Those of another result go first."""
    for name in BENCH_PICTURES:
        (folder / name).unlink(missing_ok=True)
    refrag.write_atomic(folder / "bench.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    if last:
        rows = result["rows"]
        reports.save_figure(folder / "ttft.png", 1, (9, 6), lambda axes: paint_ttft(axes, rows))
        if any(row["ttft_ratio"] is not None for row in rows if row["mode"] == "refrag"):
            reports.save_figure(folder / "ratio.png", 1, (9, 6), lambda axes: paint_ratio(axes, rows))
    pictures = [f"![]({name})" for name in BENCH_PICTURES if (folder / name).is_file()]
    command = shlex.join(result["command"]).encode("utf-8", "replace").decode()  # arguments may be any bytes
    made = [f"Command: `{command}`", f"Device: {refrag.dumps(result['device'])}",
            f"Versions: {refrag.dumps(result['versions'])}", f"Commit: {result['commit']}",
            f"Medians of {result['rounds']} rounds in which all rows take turns (least and greatest in brackets)."]
    refrag.write_atomic(folder / "report.md", "\n\n".join(["# Speed against context length", *made, bench_text(result),
                                                           *pictures]) + "\n")


def paint_curve(axes: Any, name: str, curve: Sequence[dict[str, Any]], column: str) -> Any:
    """One column of a curve against its context tokens, medians with their spread. Returns the colour."""
    lengths, values = ([row[key] for row in curve] for key in ("context_tokens", column))
    around = [[abs(row["spread"][column][side] - row[column]) for row in curve] for side in (0, 1)]
    return axes.errorbar(lengths, values, yerr=around, marker=".", capsize=2, label=name).lines[0].get_color()


def log_axes(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Logarithmic axes with the context lengths that were timed, plain numbers, and the legend beside them."""
    ticks = sorted({row["context_tokens"] for row in rows} - {0})
    axes.set(xscale="log", yscale="log", xlabel="context tokens")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def paint_ttft(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Time to first token against context length, and full context's over k and over k squared."""
    curves = bench_curves(rows)
    for name, curve in curves.items():
        paint_curve(axes, name, curve, "ttft_s")
    full = curves.get("full", [])
    lengths, seconds = ([row[key] for row in full] for key in ("context_tokens", "ttft_s"))
    for k in sorted({row["k"] for row in rows} - {None}) if full else ():
        for power, style in ((1, "--"), (2, ":")):
            label = f"full / {k}" + "²" * (power == 2)
            axes.plot(lengths, [s / k**power for s in seconds], style, color="grey", linewidth=0.8)
            axes.annotate(label, (lengths[0], seconds[0] / k**power), (0, 3), textcoords="offset points",
                          fontsize=7, color="grey")
    for row in rows:
        if row["mode"] == "none":
            axes.axhline(row["ttft_s"], color="black", linestyle="-.", linewidth=0.8, label="question alone")
    log_axes(axes, rows)
    axes.set(ylabel="time to first token, s")
    axes.set_title("dashed and dotted: full context's over k and k²", fontsize=9)


def paint_ratio(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """How many times sooner the first token comes than from full context; dashed: tokens over positions in theory."""
    for name, curve in bench_curves(rows).items():
        known = [row for row in curve if row["mode"] == "refrag" and row["ttft_ratio"] is not None]
        if known:
            colour = paint_curve(axes, name, known, "ttft_ratio")
            axes.axhline(known[0]["theoretical_ratio"], color=colour, linestyle="--", linewidth=0.8)
    log_axes(axes, rows)
    axes.yaxis.set_minor_formatter("{x:g}")  # there may be no power of ten among the ratios
    axes.set(ylabel="full context's time to first token over this")
    axes.set_title("dashed: 1 / (p + (1 - p) / k)", fontsize=9)


def bench_cells(row: dict[str, Any]) -> dict[str, str]:
    """A row for people: column -> text. Times in ms."""
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:,.1f}"

    low, high = row["spread"]["ttft_s"]
    times = {"TTFT ms": f"{ms(row['ttft_s'])} ({ms(low)}-{ms(high)})"}
    ratios = {column: "-" if row[name] is None else f"{row[name]:.2f}x" for column, name in (
        ("shorter", "compression"), ("faster", "ttft_ratio"), ("theory", "theoretical_ratio"))}
    stages = {name.removesuffix("_s"): ms(value) for name, value in row["stages"].items()}
    shown = {name: "-" if row[name] is None else f"{row[name]:g}" for name in ("k", "p")}
    products = {"products": f"{row['products_share']:.0%}"} if "products_share" in row else {}  # not in older results
    return {"mode": row["mode"], **shown, "batch": str(row["batch"]), "context": f"{row['context_tokens']:,}",
            "positions": f"{row['positions']:,}", **times, **ratios, **stages,
            **products, "TTIT ms": ms(row["ttit_s"]),
            "tokens/s": "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}",
            "KV MB": f"{row['kv_bytes'] / 2**20:.1f}", "peak MB": f"{row['peak_rss_mb']:,.0f}",
            **({"/".join(row["kinds"]): "/".join(map(str, row["kinds"].values()))} if "kinds" in row else {})}


def bench_text(result: dict[str, Any]) -> str:
    """A benchmark for people: the table, what was computed, what was left out."""
    cells = [bench_cells(row) for row in result["rows"]]
    if all(row["batch"] == 1 for row in result["rows"]):
        cells = [{name: text for name, text in one.items() if name != "batch"} for one in cells]
    lines = [aligned_table(cells), ""]
    if "products" in cells[0]:
        lines.append("- products: the share of the prefill that matrix products take by themselves, without those in "
                     "torch's attention kernels")
    fresh = sorted({row["k"] for row in result["rows"] if row["stored_vectors"] is False})
    if fresh:
        lines.append(f"- vectors that the index does not hold, computed while the clock runs: k = "
                     f"{', '.join(map(str, fresh))}")
    lines += [f"- {text}" for text in result["left_out"]]
    return "\n".join(lines).rstrip()


# -- training -------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs within it, backward too, by their factors' shape, strides, precision;
    not those in torch's kernels of attention."""

    KINDS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "_int_mm"))

    def __init__(self):
        super().__init__()
        self.seen: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, kind: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kind in self.KINDS:
            self.seen[tuple((tuple(x.shape), x.stride(), x.dtype) for x in args[-2:])] += 1
            return kind(*args, **kwargs)
        with self:  # in inference mode a linear map comes as a whole
            result = kind.decompose(*args, **kwargs)
        return kind(*args, **kwargs) if result is NotImplemented else result

    def seconds(self, device: torch.device, repeats: int) -> float:
        """How long all of them take by themselves: the least of some times of each."""
        total = 0.0
        for factors, count in self.seen.items():
            made = [memory(shape, stride, dtype, device) for shape, stride, dtype in factors]
            multiply = torch._int_mm if made[0].dtype == torch.int8 else torch.matmul
            times = [timed(device, lambda multiply=multiply, made=made: multiply(*made)) for _ in range(repeats + 1)]
            total += count * min(times)
        return total


def memory(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.ones(extent, dtype=dtype, device=device).as_strided(shape, stride)


def timed(device: torch.device, work: Any) -> float:
    watch = refrag.Stopwatch(device)
    with watch.stage("s"):
        work()
    return watch.seconds["s"]


def bench_training(bench: refrag.BenchConfig, models: refrag.ModelConfig, runtime: refrag.RuntimeConfig) -> dict:
    """Steps of reconstruction on random tokens, all parts trained: positions per second, and the share of a step that
    its matrix products would take by themselves, which is what a faster program could gain at most."""
    model = refrag.load_model(models, runtime, "ped", bench.lora_r)
    refrag.mark_trained(model, "ped", bench.lora_r)
    accelerator, device = make_accelerator(runtime), next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    rng, rows = np.random.default_rng(runtime.seed), []
    if device.type == "cpu":
        keep_memory()

    def step(sequences: list[refrag.TrainingSequence]) -> None:
        batch = refrag.checked_batch(sequences, model.window).to(model.device)
        with accelerator.autocast():
            output = model(batch)
        torch.nn.functional.cross_entropy(output.logits.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    settings = list(itertools.product(bench.contexts, bench.k, bench.batch_size))
    for context, k, batch_size in refrag.progress(settings, "timing", total=len(settings), unit="setting"):
        texts = rng.integers(len(model.encoder.tokenizer.decoder), size=(batch_size, context))
        sequences = [refrag.reconstruction(model.encoder, ids, np.ones(context + 1, dtype=bool), k) for ids in texts]
        step(sequences)  # to warm up
        with Products() as products:
            step(sequences)
        times = [timed(device, lambda made=sequences: step(made)) for _ in range(bench.repeats)]
        step_s, products_s = float(np.median(times)), products.seconds(device, bench.repeats)
        positions = sum(len(sequence.plan) for sequence in sequences)
        rows.append({"context": context, "k": k, "batch": batch_size, "positions": positions,
                     "step_s": round(step_s, 6), "positions_per_s": round(positions / step_s, 1),
                     "products_s": round(products_s, 6), "products_share": round(products_s / step_s, 4),
                     "peak_rss_mb": round(refrag.peak_rss_mb(), 1), "peak_device_mb": peak_device_mb(device)})
    return {"what": "training", "device": describe_device(runtime), "versions": library_versions(),
            "settings": run_settings((bench, models, runtime)), "command": sys.argv, "commit": source_commit(),
            "rows": rows}


def run(bench: refrag.BenchConfig, index: refrag.IndexConfig, models: refrag.ReaderConfig,
        runtime: refrag.RuntimeConfig) -> None:
    runtime.require_decoder("bench")
    with contextlib.ExitStack() as held:
        if bench.out_dir is not None:
            held.enter_context(run_folder(Path(bench.out_dir), True, BENCH_FILES, "bench.json"))
        if bench.task == "train":
            result = bench_training(bench, models, runtime)
            if bench.out_dir is not None:
                refrag.write_atomic(Path(bench.out_dir) / "bench.json", json.dumps(result, indent=1) + "\n")
            columns, rows = list(result["rows"][0]), [[*row.values()] for row in result["rows"]]
            refrag.emit(result, runtime, markdown_table(columns, rows))
            return
        benchmark = load_benchmark(bench, index, models, runtime)
        for done in benchmark.rounds(runtime.seed):
            if bench.out_dir is not None:  # an interrupted run keeps its finished rounds
                write_bench(Path(bench.out_dir), benchmark.result(), last=done == bench.repeats)
    result = benchmark.result()
    refrag.emit(result, runtime, bench_text(result))
