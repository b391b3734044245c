"""`refrag.py eval`: answers, rankings, the gate and the vectors, each measured against its controls."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

import refrag
from refrag_extras import reports
from refrag_extras.runs import (
    FREE_TO_CHANGE,
    append_line,
    describe_device,
    file_facts,
    finished_lines,
    library_versions,
    make_accelerator,
    run_folder,
    run_settings,
)
from refrag_extras.train_gate import answer_chunks

RESAMPLES = 2000  # of the bootstrap
ONE_P = {"full": (1.0,), "none": (0.0,)}  # modes that no p changes
SAMPLES = 20  # questions that sample.md shows
SEARCH_DEPTH = 50  # passages, so that ten documents are left when their pieces count once
CELL_NAMES = {"f1_ci": "F1, 95%", "em": "EM", "f1": "F1", "ttft_s": "TTFT, s", "ttit_s": "TTIT, s"}


# -- metrics ----------------------------------------------------------------------


def exact_match(reply: str, truths: Sequence[str]) -> float:
    """1 if the reply is a true answer after normalisation, or as it is where that leaves nothing; an empty one never.

    Without a true answer (SQuAD 2's unanswerable questions), 1 if the reply abstains.
    """
    made, *known = (refrag.normalize_answer(text) or text.strip().lower() for text in (reply, *truths))
    return float(bool(made) and made in known if truths else refrag.abstains(reply))


def token_f1(reply: str, truths: Sequence[str]) -> float:
    """Best F1 of the normalised words over the true answers, range [0, 1]; without one as `exact_match`.

    Example: "in the old town", truth "old town hall" -> 2 common of 3 and 3: .667
    """
    best, words = exact_match(reply, truths), refrag.normalize_answer(reply).split()
    for truth in (refrag.normalize_answer(t).split() for t in truths):
        common = sum((collections.Counter(words) & collections.Counter(truth)).values())
        best = max(best, 2 * common / (len(words) + len(truth)) if common else 0.0)
    return best


def grounding(reply: str, texts: Sequence[str]) -> float | None:
    """Share of the reply's words that occur in the texts; None without words or texts."""
    words, known = refrag.normalize_answer(reply).split(), set(refrag.normalize_answer(" ".join(texts)).split())
    return sum(word in known for word in words) / len(words) if words and texts else None


def citation_scores(cited: Sequence[set[str]], positives: set[str]) -> tuple[float | None, float | None]:
    """(precision, recall) of citations. cited: the ids each may be known by, empty for a forged one.

    Precision is None without citations, both are without positives. Example: [{"a#1", "a"}, {"b"}], {"a"} -> (.5, 1)
    """
    if not positives:
        return None, None
    right = sum(bool(names & positives) for names in cited)
    return right / len(cited) if cited else None, len(positives & set().union(*cited)) / len(positives)


def kept_in_order(truth: Sequence[int], made: Sequence[int]) -> float:
    """Share of a text's tokens that stand in another, in the same order. Example: [1, 2, 3, 4], [1, 9, 3, 4] -> 0.75"""
    matcher = difflib.SequenceMatcher(None, truth, made, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / len(truth)


def ranking_scores(ranked: Sequence[str], positives: set[str]) -> dict[str, float]:
    """recall@8, MRR@10 and nDCG@10 of document ids, best first, with binary relevance."""
    gains = [1.0 / math.log2(rank + 1) for rank, doc in enumerate(ranked[:10], 1) if doc in positives]
    ideal = sum(1.0 / math.log2(rank + 1) for rank in range(1, min(len(positives), 10) + 1))
    first = next((rank for rank, doc in enumerate(ranked[:10], 1) if doc in positives), None)
    return {"recall@8": len(positives & set(ranked[:8])) / len(positives), "mrr@10": 1 / first if first else 0.0,
            "ndcg@10": sum(gains) / ideal}


def bootstrap_interval(values: Sequence[float], seed: int) -> list[float]:
    """95% percentile interval of the mean: [low, high]. One seed, one interval."""
    rng, drawn = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    n = len(drawn)
    blocks = refrag.batched(range(RESAMPLES), max(1, 10**6 // n))  # of resamples, so that n may be large
    means = np.concatenate([drawn[rng.integers(0, n, (len(block), n))].mean(1) for block in blocks])
    return [round(float(edge), 4) for edge in np.quantile(means, [0.025, 0.975])]


def average(rows: Sequence[dict[str, Any]], name: str, of: Callable = statistics.fmean) -> float | None:
    """Mean of what the rows have under a name, None left out; None if none has it."""
    values = [float(row[name]) for row in rows if row[name] is not None]
    return round(of(values), 4) if values else None


# -- controls ---------------------------------------------------------------------


class Setup(NamedTuple):
    """What a question is answered from. Modes that come to the same setup are the same by definition."""
    mode: str  # of PackConfig
    p: float
    gate: str
    compressed: str
    oracle: bool = False
    wrong: bool = False


def setup_of(name: str, p: float, gate: str) -> Setup:
    """The setup of a mode of `eval`. At p = 1 all but `none` are the full text; at p = 0 there is nothing to choose."""
    if name == "none":
        return Setup("none", 0.0, "none", "feed")
    if name == "full" or p == 1:
        return Setup("full", 1.0, "none", "feed")
    gate = "none" if p == 0 else name.removesuffix("_gate") if name in ("random_gate", "cosine_gate") else gate
    return Setup("truncate" if name == "truncate" else "refrag", p, gate, "drop" if name == "expanded_only" else "feed",
                 name == "oracle_gate" and p > 0, name == "wrong_vectors")


def answer_spans(context: refrag.Context, item: dict[str, Any], index: refrag.Index,
                 tokenizer: refrag.RefragTokenizer) -> list[list[int]]:
    """`answer_chunks` of a context: in positive passages, without chunks that no token starts in."""
    docs, chunks = context.docs, context.prompt.chunks
    right = [bool(index[doc.row].names & set(item["positive_ids"])) for doc in docs]
    spans = answer_chunks(docs, right, [tokenizer.neutralize(answer) for answer in item["answers"]])
    filled = [[number for number in span if chunks[number].tokens] for span in spans]
    return [span for span in filled if span]


def texts_fed(reading: refrag.Reading, tokenizer: refrag.RefragTokenizer) -> list[str]:
    """The runs of the documents' text that the decoder was fed as tokens."""
    prompt, kept, runs = reading.context.prompt, reading.kept, []
    for _, group in itertools.groupby(prompt.chunks, key=lambda c: c.doc):
        chunks = list(group)
        inside = chunks[0].first + np.flatnonzero(kept[chunks[0].first : chunks[-1].last])
        runs += [run for run in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1) if len(run)]
    return [tokenizer.decoder.decode(prompt.input_ids[run].tolist()) for run in runs]


class Controls:
    """What the controls read in place of the usual: the answer's chunks first, or another question's vectors."""

    def __init__(self, pipeline: refrag.Pipeline, questions: list[dict[str, Any]]):
        self.pipeline, self.questions = pipeline, questions
        self.numbers = {q["id"]: number for number, q in enumerate(questions)}
        self.rows: dict[int, frozenset[int]] = {}
        self.foreign: dict[str, Tensor] = {}  # by question

    @torch.inference_mode()
    def prepare(self, item: dict[str, Any], setup: Setup, settings: refrag.Settings) -> refrag.Reading:

        def answer_first(context: refrag.Context, scores: np.ndarray) -> np.ndarray:
            spans = answer_spans(context, item, self.pipeline.index, self.pipeline.tokenizer)
            right = list({number for span in spans for number in span})
            scores = scores.astype(np.float64)
            scores[right] += 1 + np.ptp(scores) if len(scores) else 0  # above all others, in order among themselves
            return scores

        reading = self.pipeline.prepare(item, settings, answer_first if setup.oracle else None)
        at = reading.plan < 0
        if setup.wrong and at.any():
            vectors = self.vectors(item, settings)
            numbers = (-reading.plan[at] - 1) % len(vectors)  # from the first again where there are fewer
            reading.inputs[torch.as_tensor(at)] = vectors[torch.as_tensor(numbers)]
        return reading

    def rows_found(self, number: int) -> frozenset[int]:
        """Rows of the index that are retrieved for a question, looked up once."""
        if number not in self.rows:
            found = self.pipeline.retrieve(self.questions[number], self.pipeline.settings)
            self.rows[number] = frozenset(p.row for p in found)
        return self.rows[number]

    def other_question(self, item: dict[str, Any]) -> dict[str, Any]:
        """The next question of the file that finds none of this one's passages; if all find some, the next one."""
        others = refrag.others_apart_first(self.numbers[item["id"]], len(self.questions), self.rows_found)
        chosen = next((number for number in others if self.rows_found(number)), None)
        refrag.require(chosen is not None, "--modes wrong_vectors: no other question finds any passage: leave it out")
        return self.questions[chosen]

    def vectors(self, item: dict[str, Any], settings: refrag.Settings) -> Tensor:
        if item["id"] not in self.foreign:
            other, pipeline = self.other_question(item), self.pipeline
            context = pipeline.context(other, pipeline.retrieve(other, settings), settings)
            plan = -1 - np.flatnonzero(context.prompt.sizes)
            self.foreign[item["id"]] = pipeline.inputs(context, plan, settings.k)
        return self.foreign[item["id"]]


# -- tasks --------------------------------------------------------------------------

Key = tuple[str, str, Any]  # of a line: question, mode, and p or k
Cell = tuple[str, Any]  # mode, and p or k
Lines = dict[Key, dict[str, Any]]


def key_of(line: dict[str, Any]) -> Key:
    return line["id"], line["mode"], line.get("p", line.get("k"))


def pivot(cells: dict[Cell, Any]) -> dict[str, dict[str, Any]]:
    """A table of a summary: {mode: {p or k: value}}."""
    table: dict[str, dict[str, Any]] = {}
    for (mode, number), value in cells.items():
        table.setdefault(mode, {})[f"{number:g}"] = value
    return table


class Task:
    """What `eval` measures. Each kind of task has these methods:

    units() -> pieces of work that do not depend on each other; keys(unit) -> of the lines that a unit gives;
    load(): what measuring needs, not called when every line is there already; lines(unit, done) -> the lines of a unit
    that are not done yet, as they come; results(lines by key) -> the summary's fields: n, results and more;
    table(summary) -> the results for people; sources() -> digests of the files that are read, by option.
    """

    notes = ""  # how to read the table
    unused: frozenset[str] = frozenset()  # options that change no line
    accelerator: Any = None  # set by `evaluate`

    def __init__(self, options: refrag.EvalConfig, index: refrag.IndexConfig, search: refrag.SearchConfig,
                 models: refrag.ModelConfig, runtime: refrag.RuntimeConfig):
        self.options, self.index, self.search, self.models, self.runtime = options, index, search, models, runtime

    def pictures(self, folder: Path, found: Lines, summary: dict[str, Any]) -> None:
        """Files beside the report."""

    def settings(self) -> dict[str, Any]:
        """What every line depends on, beside its own mode, p and k. Files are named by their contents."""
        merged = run_settings((self.options, self.index, self.search, self.models, self.runtime))
        own = FREE_TO_CHANGE | self.unused | {"modes", "p", "qa", "texts", "index_dir", "load_dir"}
        kept = {key: value for key, value in merged.items() if key not in own}
        device = describe_device(self.runtime)
        return kept | {"device": device["device"], "dtype": device["dtype"]} | self.sources()

    def sources(self) -> dict[str, Any]:
        checkpoint = refrag.find_checkpoint(self.models)
        config = refrag.model_config(self.models, checkpoint)
        return {"dec": config.decoder_name_or_path, "enc": config.encoder_name_or_path, "pooling": config.pooling,
                "projector": config.projector, "load_dir": checkpoint and checkpoint.digest}


class QuestionTask(Task):
    """A task over the questions of --qa and an index."""

    needs: tuple[str, ...] = ("answers", "positive_ids")
    unused = frozenset({"context_tokens", "next_tokens", "limit"})
    batch_size = 1
    cells: list[Cell]

    def __init__(self, *configs: Any):
        super().__init__(*configs)
        name, limit = self.options.qa, self.options.limit
        self.file = refrag.read_question_file(name, "--qa", self.needs)
        self.questions = (list(refrag.sample_evenly(self.file, limit)) if self.options.task == "qa" else
                          refrag.labelled(self.file, "positive_ids", limit, f"--qa {name}"))
        self.manifest = refrag.index_manifest(self.index.index_dir)

    def sources(self) -> dict[str, Any]:
        files = {"qa": refrag.sha256_file(Path(self.options.qa))[:16], "index_dir": self.manifest["digest"][:16]}
        return files if self.options.task == "retrieval" else files | super().sources()

    def units(self) -> list[Any]:
        return refrag.batched(self.questions, self.batch_size)

    def keys(self, unit: Any) -> list[Key]:
        return [(q["id"], *cell) for q in unit for cell in self.cells]

    def rows(self, found: Lines) -> dict[Cell, list[dict[str, Any]]]:
        return {cell: [found[q["id"], *cell] for q in self.questions] for cell in self.cells}

    def load_pipeline(self) -> refrag.Pipeline:
        options = self.options
        pack = refrag.PackConfig(k=options.k[0], floor=options.floor, gate=options.gate, compressed="feed",
                                 ctx_max=options.ctx_max)
        generate = refrag.GenerateConfig(max_new=options.max_new, cite=options.cite, hop_query=options.hop_query)
        pipeline = refrag.load_pipeline(self.index, self.search, pack, generate, self.models, self.runtime)
        refrag.positive_rows(self.questions, pipeline.index)  # the questions belong to this index
        return pipeline


class QaTask(QuestionTask):
    """Answers, each mode at each p, with citations, sizes and times."""

    means = ("em", "f1", "answer_in_passages", "answer_in_text", "answer_in_reply", "citation_precision",
             "citation_recall", "citations_forged", "citation_chosen", "grounding", "abstention", "positions",
             "full_positions", "compression", "p_realised", "new_tokens")
    columns = ("em", "f1", "f1_ci", "f1_minus_full", "f1_minus_expanded_only", "answer_in_text", "answer_in_reply",
               "citation_precision", "citation_recall", "grounding", "abstention", "positions", "compression", "ttft_s")
    notes = ("EM and F1 are SQuAD's, without citation marks; an empty reply scores 0. Where there is no true answer, "
             "they are 1 if the reply abstains, and what compares with one is left out. Differences are of F1, paired "
             "over the questions. Intervals are 95% percentile bootstrap intervals. Answer in text: a true answer "
             "stands in what is fed as tokens; in reply: word for word in the reply. Grounding: share of the "
             "reply's words that occur in the passages. Abstention: the reply is empty or says that the documents do "
             "not hold the answer. Times are medians; those of wrong_vectors and oracle_gate mean nothing.")

    def __init__(self, *configs: Any):
        options = configs[0]
        self.needs = ("answers", "positive_ids") if "oracle_gate" in options.named else ("answers",)
        super().__init__(*configs)
        refrag.require("wrong_vectors" not in options.named or len(self.file) > 1,
                       "--modes wrong_vectors needs two questions at least: leave it out")
        self.batch_size = options.batch_size
        self.cells = [(name, p) for name in options.named for p in ONE_P.get(name, dict.fromkeys(options.p))]
        self.setups: dict[Setup, list[tuple[str, float]]] = {}
        for name, p in self.cells:
            self.setups.setdefault(setup_of(name, p, options.gate), []).append((name, p))
        shares = sorted(set(options.p))
        self.sample = ("refrag", shares[len(shares) // 2])
        self.sampled = {q["id"] for q in refrag.sample_evenly(self.questions, SAMPLES)}

    def load(self) -> None:
        self.pipeline = self.load_pipeline()
        refrag.require(self.pipeline.embedder is not None or "cosine_gate" not in self.options.named,
                       "--modes cosine_gate needs an embedder, and retrieval here is by words alone: leave it out")
        self.controls = Controls(self.pipeline, self.file)

    def lines(self, unit: Any, done: set[Key]) -> Iterator[dict[str, Any]]:
        self.controls.foreign.clear()
        for setup, cells in self.setups.items():
            if all((q["id"], *cell) in done for q in unit for cell in cells):
                continue  # else the whole batch again, since padding can move the last digits
            settings = self.settings_of(setup)
            readings = [self.controls.prepare(item, setup, settings) for item in unit]
            results = self.pipeline.generate(readings)
            for item, reading, result in zip(unit, readings, results, strict=True):
                scored = score_answer(result, reading, item, self.pipeline.tokenizer)
                for name, p in cells:
                    if (item["id"], name, p) not in done:
                        line = {"id": item["id"], "mode": name, "p": p, **scored}
                        if (name, p) == self.sample and item["id"] in self.sampled:
                            line["prompt"] = refrag.show_plan(reading.context, reading.plan, self.pipeline.tokenizer)
                        yield line

    def settings_of(self, setup: Setup) -> refrag.Settings:
        return self.pipeline.settings_for(mode=setup.mode, p=setup.p, gate=setup.gate, compressed=setup.compressed)

    def results(self, found: Lines) -> dict[str, Any]:
        rows, cells = self.rows(found), {}
        for (name, p), mine in rows.items():
            rivals = self.options.named if name == "refrag" else ("full", "expanded_only")
            theirs = {rival: rows.get((rival, *ONE_P.get(rival, (p,)))) for rival in rivals if rival != name}
            cells[name, p] = self.summarise(mine, {rival: other for rival, other in theirs.items() if other})
        return {"n": len(self.questions), "results": pivot(cells)}

    def summarise(self, rows: list[dict[str, Any]], rivals: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        seed = self.runtime.seed
        made: dict[str, Any] = {name: average(rows, name) for name in self.means}
        made |= {name: average(rows, name, statistics.median) for name in ("ttft_s", "ttit_s")}
        made |= {f"{name}_ci": bootstrap_interval([row[name] for row in rows], seed) for name in ("em", "f1")}
        for rival, theirs in rivals.items():
            gains = [row["f1"] - other["f1"] for row, other in zip(rows, theirs, strict=True)]
            made[f"f1_minus_{rival}"] = {"mean": round(statistics.fmean(gains), 4),
                                         "ci": bootstrap_interval(gains, seed)}
        return made

    @classmethod
    def table(cls, summary: dict[str, Any]) -> str:
        rows = [[name, p, *map(cell.get, cls.columns)]
                for name, cells in summary["results"].items() for p, cell in cells.items()]
        ours = summary["results"].get("refrag", {})
        rivals = [name for name in summary["results"] if any(f"f1_minus_{name}" in cell for cell in ours.values())]
        versus = [[p, *(cell.get(f"f1_minus_{name}") for name in rivals)] for p, cell in ours.items()]
        tables = [markdown_table(["mode", "p", *cls.columns], rows)]
        if rivals:
            tables += ["F1 of refrag minus that of each control, question by question:",
                       markdown_table(["p", *rivals], versus)]
        return "\n\n".join(tables)

    def pictures(self, folder: Path, found: Lines, summary: dict[str, Any]) -> None:
        reports.save_figure(folder / "quality.png", 1, (8, 5), lambda axes: paint_quality(axes, summary["results"]))
        rows = [(q, found.get((q["id"], *self.sample), {})) for q in self.questions]
        if rows := [(q, line) for q, line in rows if "prompt" in line]:
            refrag.write_atomic(folder / "sample.md", sample_text(refrag.sample_evenly(rows, SAMPLES), self.sample[1]))


def score_answer(result: dict[str, Any], reading: refrag.Reading, item: dict[str, Any],
                 tokenizer: refrag.RefragTokenizer) -> dict[str, Any]:
    """The metrics of one answer; what does not apply is None."""
    truths, fed = item["answers"], texts_fed(reading, tokenizer)
    reply = refrag.parse_citations(result["answer"], reading.labels).bare
    names = {p.id: {p.id, p.document_id} for p in reading.passages}
    cited = [set() if c["forged"] else names[c["id"]] for c in result["citations"]]
    passages = [refrag.passage_content(p["title"], p["text"]) for p in result["passages"]]
    precision, recall = citation_scores(cited, set(item["positive_ids"]) if passages and truths else set())
    metrics = ("positions", "full_positions", "compression", "p_realised", "new_tokens", "ttft_s", "ttit_s")
    return {
        "reply": result["answer"], "gate": result["settings"]["gate"], "em": exact_match(reply, truths),
        "f1": round(token_f1(reply, truths), 6),
        "answer_in_passages": any(refrag.holds_answer(text, truths) for text in passages) if truths else None,
        "answer_in_text": any(refrag.holds_answer(text, truths) for text in fed) if truths else None,
        "answer_in_reply": refrag.holds_answer(reply, truths) if truths else None,
        "cited": [c["id"] for c in result["citations"]], "citation_precision": precision, "citation_recall": recall,
        "citations_forged": sum(c["forged"] for c in result["citations"]),
        "citation_chosen": any(c["chosen"] for c in result["citations"]),
        "grounding": grounding(reply, passages) if truths or not refrag.abstains(reply) else None,
        "abstention": refrag.abstains(reply), **{name: result["metrics"][name] for name in metrics}}


class RetrievalTask(QuestionTask):
    """Each retriever; the pieces of one document count once, at their best rank."""

    needs = ("positive_ids",)
    unused = QuestionTask.unused | {"k", "gate", "ctx_max", "max_new", "cite", "batch_size"} | {
        f.name for f in dataclasses.fields(refrag.ModelConfig)}
    columns = ("recall@8", "mrr@10", "ndcg@10", "ms_per_question")
    notes = ("Relevance is binary: the documents of positive_ids. Pieces of one document count once, at the best rank; "
             "equal passages are one.")

    def __init__(self, *configs: Any):
        super().__init__(*configs)
        refrag.require(self.index.retriever is None, "--retriever does not go with --task retrieval: use --modes")
        uses = self.manifest["uses"]
        modes = refrag.EVAL_MODES["retrieval"]
        there = [name for name in modes if name in uses or (name == "hybrid" and len(uses) == 2)]
        lacking = [name for name in self.options.named if name not in there]
        refrag.require(not (self.options.modes and lacking), f"--modes {', '.join(lacking)}: the index at --index_dir "
                       f"holds only {', '.join(there)}")
        self.cells = [(name, None) for name in self.options.named if name in there]

    def load(self) -> None:
        whole = refrag.load_searcher(self.index, self.search, self.runtime)
        self.places, self.opened = refrag.positive_rows(self.questions, whole.index), whole.index
        self.searchers = {name: refrag.Searcher(whole.index, name, whole.embedder, whole.reranker)
                          for name, _ in self.cells}

    def lines(self, unit: Any, done: set[Key]) -> Iterator[dict[str, Any]]:
        [item], search = unit, self.search
        for name, searcher in self.searchers.items():
            if (item["id"], name, None) in done:
                continue
            if searcher.embedder is not None:
                searcher.embedder.queries.clear()  # each retriever embeds the question itself
            start = time.perf_counter()
            found = searcher.search(item["question"], max(SEARCH_DEPTH, search.topk), search.hops, search.where)
            seconds = time.perf_counter() - start
            positives = set(item["positive_ids"])
            contents = {self.opened[row].content: i for i in item["positive_ids"] for row in self.places.get(i, ())}
            scores = ranking_scores(ranked_ids(found, positives, contents), positives)
            yield {"id": item["id"], "mode": name, **scores, "ms_per_question": round(1000 * seconds, 3)}

    def results(self, found: Lines) -> dict[str, Any]:
        *scores, seconds = self.columns
        results = {name: {**{column: average(rows, column) for column in scores},
                          seconds: average(rows, seconds, statistics.median)}
                   for (name, _), rows in self.rows(found).items()}
        return {"n": len(self.questions), "results": results, "passages": self.manifest["counts"]["passages"]}

    @classmethod
    def table(cls, summary: dict[str, Any]) -> str:
        rows = [[name, *(scores[c] for c in cls.columns)] for name, scores in summary["results"].items()]
        return markdown_table(["retriever", *cls.columns], rows)


def ranked_ids(passages: Sequence[refrag.Passage], positives: set[str], contents: dict[str, str]) -> list[str]:
    """Ids of documents, best first, each once; a piece that positives name by its own id goes by that, and a passage
    with a positive's content by that one's: a search gives equal passages once. contents: {content: positive id}."""
    names = (p.id if p.id in positives else contents.get(p.content, p.document_id) for p in passages)
    return list(dict.fromkeys(names))


class GateTask(QuestionTask):
    """Whether each gate opens the chunks that hold an answer."""

    unused = QuestionTask.unused | {"gate", "max_new", "cite", "batch_size"}
    columns = ("recall", "partial", "all_positives")
    notes = ("Recall: all chunks of one place where an answer stands in a positive passage are opened, over the "
             "questions for which such a passage was retrieved. Partial: any such chunk. All positives: of questions "
             "with several positive passages, those where a chunk of each that was retrieved is opened.")

    def __init__(self, *configs: Any):
        super().__init__(*configs)
        config, built = refrag.model_config(self.models), self.manifest["embedder"].get("fingerprint")
        known = {name for name, kind in refrag.TRAINED_GATES.items() if refrag.known_gate(config, kind, built)}
        untrained = refrag.TRAINED_GATES.keys() - known
        gates = [name for name in self.options.named if self.options.modes or name not in untrained]
        self.shares = list(dict.fromkeys(self.options.p))
        self.cells = list(itertools.product(gates, self.shares))

    def load(self) -> None:
        self.pipeline = self.load_pipeline()
        # between 0 and 1 the scores do not depend on p
        self.gate_settings = {name: self.pipeline.settings_for(gate=name, p=0.5) for name, _ in self.cells}

    def lines(self, unit: Any, done: set[Key]) -> Iterator[dict[str, Any]]:
        [item] = unit
        pipeline, settings = self.pipeline, self.pipeline.settings
        context = pipeline.context(item, pipeline.retrieve(item, settings), settings)
        watch = refrag.Stopwatch(pipeline.device)
        spans = answer_spans(context, item, pipeline.index, pipeline.tokenizer)
        right = [{number for number, doc in enumerate(context.docs) if name in pipeline.index[doc.row].names}
                 for name in dict.fromkeys(item["positive_ids"])]
        for gate, settings in self.gate_settings.items():
            with watch.stage(gate):
                scores, _ = pipeline.score(context, settings)
            for p in self.shares:
                if (item["id"], gate, p) not in done:
                    opened = refrag.select_chunks(scores, context.prompt.sizes, p, self.options.floor)
                    yield {"id": item["id"], "mode": gate, "p": p, "retrieved": any(right),
                           **gate_scores(opened, spans, right, context.prompt.chunks),
                           "gate_ms": round(1000 * watch.seconds[gate], 4)}

    def results(self, found: Lines) -> dict[str, Any]:
        cells = self.rows(found)
        tables = {name: pivot({cell: average(rows, name) for cell, rows in cells.items()}) for name in self.columns}
        times = {gate: average(rows, "gate_ms", statistics.median) for (gate, _), rows in cells.items()}
        *_, rows = cells.values()  # what is counted below is the same in all cells
        asked = [row for row in rows if row["recall"] is not None]
        left_out = {"not_retrieved": sum(not row["retrieved"] for row in rows),
                    "no_answer_in_passage": sum(row["retrieved"] and row["recall"] is None for row in rows)}
        return {"n": len(self.questions), "results": tables.pop("recall"), "asked": len(asked), "left_out": left_out,
                "several_positives": sum(row["all_positives"] is not None for row in rows), **tables, "gate_ms": times}

    @classmethod
    def table(cls, summary: dict[str, Any]) -> str:
        rows = [[gate, p, recall, summary["partial"][gate][p], summary["all_positives"][gate][p],
                 summary["gate_ms"][gate]]
                for gate, cells in summary["results"].items() for p, recall in cells.items()]
        left = ", ".join(f"{name} {count}" for name, count in summary["left_out"].items())
        return markdown_table(["gate", "p", "recall", "partial", "all positives", "ms"], rows) + (
            f"\n\n{summary['asked']} of {summary['n']} questions count; left out: {left}")


def gate_scores(opened: np.ndarray, spans: list[list[int]], right: list[set[int]],
                chunks: Sequence[refrag.Chunk]) -> dict[str, bool | None]:
    """What a choice of chunks opens. opened: (L,) bool; right: of each positive id, the documents. None: not asked."""
    docs = {chunks[number].doc for number in np.flatnonzero(opened)}
    return {"recall": any(all(opened[i] for i in span) for span in spans) if spans else None,
            "partial": any(opened[i] for span in spans for i in span) if spans else None,
            "all_positives": all(ds & docs for ds in right if ds) if len(right) > 1 and any(right) else None}


class TextTask(Task):
    """A task over texts: what the decoder makes of vectors, teacher forced. Kinds have `size`, the tokens of a window,
    and sequences(mode, k), what the decoder reads and should say."""

    modes: tuple[str, ...] = ()
    without_wrong = ""  # how to do without that control
    unused = frozenset({"k", "gate", "ctx_max", "max_new", "cite"}) | {
        f.name for config in (refrag.IndexConfig, refrag.SearchConfig) for f in dataclasses.fields(config)}

    def __init__(self, *configs: Any):
        super().__init__(*configs)
        self.runtime.require_decoder(f"--task {self.options.task}")

    def sources(self) -> dict[str, Any]:
        files = [fact["sha256"][:16] for fact in file_facts(self.options.texts)]
        return {"texts": files} | super().sources()

    def load(self) -> None:
        options, files = self.options, ", ".join(self.options.texts)
        self.model = refrag.load_model(self.models, self.runtime).to(self.accelerator.device)
        self.texts = refrag.Texts(options.texts, self.model.encoder.tokenizer, self.size, self.size)
        refrag.require(len(self.texts) > 1, f"--texts {files}: needs two pieces of {self.size} tokens at least: lower "
                "--context_tokens or --next_tokens")
        self.numbers = refrag.sample_evenly(range(len(self.texts)), options.limit)
        self.owners = self.texts.windows[self.numbers, 0].tolist()  # the text of each
        refrag.require("wrong_vectors" not in self.modes or len(set(self.owners)) > 1,
                f"--texts {files}: one text alone has pieces of {self.size} tokens, and "
                "wrong_vectors needs another's: give a second text, as long" + self.without_wrong)

    def units(self) -> list[Any]:
        """(mode, values of k): what reads no vector is measured once for all k."""
        ks = tuple(dict.fromkeys(self.options.k))
        parts = [(mode, [ks] if mode in ("full", "none") else [(k,) for k in ks]) for mode in self.modes]
        return [(mode, part) for mode, several in parts for part in several]

    def keys(self, unit: Any) -> list[Key]:
        mode, ks = unit
        return [("texts", mode, k) for k in ks]

    def control(self, sequences: list[refrag.TrainingSequence], mode: str) -> list[refrag.TrainingSequence]:
        names = {"refrag": "vectors", "none": "none", "wrong_vectors": "wrong", "full": "full"}
        made = refrag.control(names[mode], sequences, [frozenset([text]) for text in self.owners])
        refrag.require(bool(made), f"--modes {mode}: needs a decoder with a start token")
        return made

    def lines(self, unit: Any, done: set[Key]) -> Iterator[dict[str, Any]]:
        mode, ks = unit
        sequences = self.sequences(mode, ks[0])
        measured = refrag.measure_sequences(self.model, sequences, self.options.batch_size, self.accelerator)
        refrag.require(math.isfinite(measured["loss"]), f"--task {self.options.task}: the loss of {mode} is "
                       f"{measured['loss']}: fix the models")
        for k in ks:
            if ("texts", mode, k) not in done:
                yield {"id": "texts", "mode": mode, "k": k, **measured, "texts": len(sequences),
                       "tokens": sum(s.n_labels for s in sequences),
                       "positions": round(statistics.fmean(len(s.plan) for s in sequences), 2)}


class PplTask(TextTask):
    """Log-perplexity of the tokens after a compressed context."""

    notes = ("Mean nats per token of the --next_tokens tokens after --context_tokens tokens that are compressed "
             "(refrag, wrong_vectors), read as text (full), left out (none), or cut to their last tokens, as many as "
             "there are vectors (truncate). Positions: the mean length of what is fed, with the tokens to be "
             "predicted.")
    without_wrong = ", or leave wrong_vectors out of --modes"

    def __init__(self, *configs: Any):
        super().__init__(*configs)
        self.modes = self.options.named

    @property
    def size(self) -> int:
        return self.options.context_tokens + self.options.next_tokens

    def sequences(self, mode: str, k: int) -> list[refrag.TrainingSequence]:
        made = [self.compressed(number, k, mode == "truncate") for number in self.numbers]
        return made if mode == "truncate" else self.control(made, mode)

    def compressed(self, number: int, k: int, truncate: bool) -> refrag.TrainingSequence:
        """A window's first tokens as vectors and then the rest; truncate: the same from as many of the last tokens."""
        encoder = self.model.encoder
        context, cuts, following = self.texts.read(number).split(self.options.context_tokens)
        content = encoder.content_of_tokens(context, cuts, k)
        plan, start = refrag.all_vectors(encoder, content), refrag.opening(encoder.tokenizer.decoder)
        if not truncate:
            return refrag.continue_plan(plan, following, content)
        vectors = len(plan) - len(start)
        return refrag.continue_plan(np.append(start, context[-vectors:]), following, refrag.Content([], []))

    def results(self, found: Lines) -> dict[str, Any]:
        tables = {name: pivot({(mode, k): found["texts", mode, k][name] for mode in self.modes for k in self.options.k})
                  for name in ("loss", "accuracy", "positions")}
        return {"n": next(iter(found.values()))["texts"], "results": tables.pop("loss"), **tables}

    @classmethod
    def table(cls, summary: dict[str, Any]) -> str:
        rows = [[mode, k, loss, summary["accuracy"][mode][k], summary["positions"][mode][k]]
                for mode, cells in summary["results"].items() for k, loss in cells.items()]
        return markdown_table(["mode", "k", "log_ppl", "accuracy", "positions"], rows)


class ReconTask(TextTask):
    """How much of a text comes back from its vectors."""

    modes = ("refrag", "none", "wrong_vectors", "full")
    columns = ("accuracy", "no_vectors", "wrong_vectors", "full_text", "free_running", "free_running_wrong")
    free = ("refrag", "wrong_vectors")  # modes in which the decoder also writes by itself
    asked = (*itertools.product(("accuracy",), modes), *itertools.product(("free_running",), free))
    notes = ("Share of the tokens of a text that are the likeliest next ones, teacher forced, after its vectors, after "
             f"none, after another text's, and after the text itself. Free running: share of the tokens of {SAMPLES} "
             "texts that stand, in their order, in what the decoder writes by itself after the vectors, and after "
             "another text's.")

    @property
    def size(self) -> int:
        return self.options.context_tokens

    def sequences(self, mode: str, k: int) -> list[refrag.TrainingSequence]:
        texts = [self.texts.read(number) for number in self.numbers]
        return self.control([refrag.reconstruction(self.model.encoder, t.ids, t.cuts, k) for t in texts], mode)

    def lines(self, unit: Any, done: set[Key]) -> Iterator[dict[str, Any]]:
        mode, _ = unit
        for line in super().lines(unit, done):
            yield {**line, **(self.write_freely(mode, line["k"]) if mode in self.free else {})}

    def write_freely(self, mode: str, k: int) -> dict[str, Any]:
        texts, shares = [], []
        for sequence in refrag.sample_evenly(self.sequences(mode, k), SAMPLES):
            truth, made = sequence.labels[sequence.labels >= 0].tolist(), self.continue_freely(sequence)
            shares.append(kept_in_order(truth, made))
            texts.append([self.model.encoder.tokenizer.decoder.decode(ids) for ids in (truth, made)])
        return {"free_running": round(statistics.fmean(shares), 5), "written": texts}

    @torch.inference_mode()
    def continue_freely(self, sequence: refrag.TrainingSequence) -> list[int]:
        """The tokens that the decoder puts in the place of a sequence's answer, as many at most, greedily."""
        decoder, device, size = self.model.decoder, self.accelerator.device, sequence.n_labels
        context = sequence.plan[: len(sequence.plan) - size + 1]
        before = refrag.continue_plan(context, sequence.labels[-1:], sequence.content)
        with self.accelerator.autocast():
            batch = refrag.checked_batch([before], self.model.window).to(device)
            inputs, _, _ = self.model.embed(batch.plan, batch.chunk_ids, batch.sizes, self.model.chunk_states(batch))
            logits, state = refrag.prefill(decoder, [inputs])
            [out], _ = refrag.decode(decoder, logits, state, max_new=size, watch=refrag.Stopwatch(device),
                              stops=refrag.stop_tokens(decoder, self.model.encoder.tokenizer.decoder),
                              pick=lambda logits: logits.argmax(-1))
        return out.tokens

    def results(self, found: Lines) -> dict[str, Any]:
        results = {str(k): {name: found["texts", mode, k][measure]
                            for name, (measure, mode) in zip(self.columns, self.asked, strict=True)}
                   for k in self.options.k}
        return {"n": next(iter(found.values()))["texts"], "results": results}

    @classmethod
    def table(cls, summary: dict[str, Any]) -> str:
        return markdown_table(["k", *cls.columns], [[k, *map(cell.get, cls.columns)]
                                                    for k, cell in summary["results"].items()])

    def pictures(self, folder: Path, found: Lines, summary: dict[str, Any]) -> None:
        written = {k: found["texts", "refrag", k]["written"] for k in self.options.k}
        refrag.write_atomic(folder / "sample.md", written_text(written))


TASKS: dict[str, type[Task]] = {"qa": QaTask, "retrieval": RetrievalTask, "gate": GateTask, "ppl": PplTask,
                                "recon": ReconTask}


# -- the run and its report -----------------------------------------------------------

EVAL_FILES = re.compile(
    r"questions(-\d+)?\.jsonl|results\.json|(report|sample)\.md|quality\.png|\.lock|\..*\.tmp")


def evaluate(task: Task) -> dict[str, Any]:
    """Measure what is not measured yet, and write the report. Returns the summary that the command prints."""
    accelerator, folder = make_accelerator(task.runtime), task.options.out_dir and Path(task.options.out_dir)
    task.accelerator, rank = accelerator, accelerator.process_index
    with contextlib.ExitStack() as held:
        done, write = {}, lambda line: None
        if folder:
            held.enter_context(run_folder(folder, accelerator.is_main_process, EVAL_FILES, "questions.jsonl"))
            with accelerator.main_process_first():  # which fixes what a kill left
                settings = task.settings()
                files = sorted(path for path in folder.glob("questions*.jsonl") if path.stat().st_size)
                refrag.require(task.options.resume or not files, f"--out_dir {folder} holds an evaluation: add "
                               "--resume to continue it, or name another folder")
                done = {key_of(line): line for path in files
                        for line in finished_lines(path, settings, "--out_dir")}
            accelerator.wait_for_everyone()  # or a slower process would find the lines of a faster one
            path = folder / (f"questions-{rank}.jsonl" if rank else "questions.jsonl")
            write = lambda line: append_line(path, line | {"settings": settings})  # noqa: E731
        found = measure_lines(task, done, write)
        summary = {"task": task.options.task, "seed": task.runtime.seed, **task.results(found)}
        if folder and accelerator.is_main_process:
            write_report(folder, task, {key: line | {"settings": settings} for key, line in found.items()}, summary)
        accelerator.wait_for_everyone()
        return summary


def measure_lines(task: Task, done: dict[Key, dict[str, Any]],
                  write: Callable[[dict[str, Any]], None]) -> dict[Key, dict[str, Any]]:
    """All lines of a task: those done and those measured now, each process its share of the units that lack some."""
    new: list[dict[str, Any]] = []
    finished = set(done)
    if lacking := [unit for unit in task.units() if not finished.issuperset(task.keys(unit))]:
        task.load()
        units = lacking[task.accelerator.process_index :: task.accelerator.num_processes]
        for unit in refrag.progress(units, f"eval {task.options.task}", total=len(units)):
            for line in task.lines(unit, finished):
                new.append(line)
                write(line)
    gathered = gather_object(new)
    return done | {key_of(line): line for line in gathered}


def source_commit() -> str | None:
    """The commit of this checkout, "+" after it where refrag.py was changed since; None outside a checkout."""
    path = Path(refrag.__file__).resolve()

    def git(*argv: str) -> str:
        return subprocess.run(["git", "-C", str(path.parent), *argv], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", path.name)  # fails in another project's checkout
        return git("rev-parse", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", path.name))
    except (OSError, subprocess.CalledProcessError):
        return None


def write_report(folder: Path, task: Task, found: Lines, summary: dict[str, Any]) -> None:
    """All files of --out_dir: the lines in order, and what they come to."""
    wanted = dict.fromkeys(key for unit in task.units() for key in task.keys(unit))
    lines = [*(found[key] for key in wanted), *(line for key, line in found.items() if key not in wanted)]
    refrag.write_atomic(folder / "questions.jsonl", "".join(refrag.dumps(line) + "\n" for line in lines))
    for part in folder.glob("questions-*.jsonl"):
        part.unlink()
    facts = {"settings": lines[0]["settings"], "command": [word for word in sys.argv if word != "--resume"],
             "versions": library_versions(), "device": describe_device(task.runtime),
             "commit": source_commit()}
    refrag.write_atomic(folder / "results.json", json.dumps(summary | facts, indent=1) + "\n")
    refrag.write_atomic(folder / "report.md", report_text(task, summary, facts))
    task.pictures(folder, found, summary)


def cell_text(value: Any) -> str:
    """A value for a table: [low, high] for an interval, the mean before it for a difference."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} {cell_text(value['ci'])}"
    if isinstance(value, list):
        return f"[{', '.join(f'{v:.3f}' for v in value)}]"
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"


def aligned_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table that can be read as it is. rows: column -> text, all with the same columns."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |"
                     for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    names = [CELL_NAMES.get(name, name.replace("_", " ")) for name in header]
    return aligned_table([dict(zip(names, map(cell_text, row), strict=True)) for row in rows])


def report_text(task: Task, summary: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = [[key, refrag.dumps(value)] for key, value in {**facts["settings"], "commit": facts["commit"]}.items()
            if value is not None]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([f"# Evaluation: {task.options.task}", "", f"n = {summary['n']}, seed {summary['seed']}.", "",
                      task.table(summary), "", task.notes, "", "## Settings", "",
                      markdown_table(["setting", "value"], rows), "", f"Versions: {versions}.", ""])


def sample_text(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], p: float) -> str:
    parts = [f"# What the decoder read, mode refrag, p = {p:g}", "",
             "Compressed chunks, each one vector, stand in [[..]]; everything else was read as text.", ""]
    for item, line in rows:
        fence = "`" * (2 + max(map(len, re.findall(r"`+", line["prompt"])), default=1))
        parts += [f"## {item['id']}: {item['question']}", "", f"- True answers: {'; '.join(item['answers']) or 'none'}",
                  f"- Reply: {' '.join(line['reply'].split())}", f"- F1 {line['f1']:.3f}, EM {line['em']:.0f}, "
                  f"{line['positions']} positions of {line['full_positions']}", "", fence, line["prompt"], fence, ""]
    return "\n".join(parts)


def written_text(written: dict[int, list[list[str]]]) -> str:
    """sample.md: texts, and beside each what the decoder wrote from its vectors. written: k -> [text, what of it]."""
    parts = ["# What the decoder writes from a text's vectors alone", ""]
    for number, pairs in enumerate(zip(*written.values(), strict=True), start=1):
        named = {"text": pairs[0][0], **{f"k = {k}": made for k, (_, made) in zip(written, pairs, strict=True)}}
        parts += [f"## {number}", "", *(f"- {name}: {' '.join(text.split())}" for name, text in named.items()), ""]
    return "\n".join(parts)


def paint_quality(axes: Any, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """F1 against the positions the decoder is fed, a curve per mode, with the intervals."""
    for name, cells in results.items():
        points = sorted((cell["positions"], cell["f1"], *cell["f1_ci"]) for cell in cells.values())
        x, y, low, high = (np.asarray(values) for values in zip(*points, strict=True))
        axes.errorbar(x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], marker="o", capsize=2, label=name)
    axes.set(xlabel="decoder positions fed, mean", ylabel="F1, with 95% intervals", ylim=(0, None))
    axes.legend(fontsize=7)


def run(evaluation: refrag.EvalConfig, index: refrag.IndexConfig, search: refrag.SearchConfig,
        models: refrag.ReaderConfig, runtime: refrag.RuntimeConfig) -> None:
    task = TASKS[evaluation.task](evaluation, index, search, models, runtime)
    summary = evaluate(task)
    refrag.emit(summary, runtime, task.table(summary))
