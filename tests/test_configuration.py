"""Section 1: options, their defaults and checks, and the exit codes of errors."""

from __future__ import annotations

import ast
import dataclasses
import errno
import inspect
import textwrap
import typing
from collections import Counter
from pathlib import Path

import pytest
import torch

import refrag

CONFIGS = sorted({c for cmd in refrag.COMMANDS.values() for c in cmd.configs}, key=lambda c: c.__name__)
NEEDED = {  # what has no default that stands by itself; training files must be there, and this is one
    refrag.CorpusConfig: {"corpus": ("a.txt",)},
    refrag.AnchorConfig: {"text": "a"},
    refrag.TextConfig: {"train_json": (__file__,)},
    refrag.TrainConfig: {"out_dir": "run"},
    refrag.SftConfig: {"rag_json": __file__},
    refrag.GateDataConfig: {"rag_json": (__file__,), "out_dir": "gate"},
    refrag.ExportConfig: {"out_dir": "export"},
    refrag.EvalConfig: {"qa": __file__},
}


def make(cls: type, **values: object) -> object:
    """A config with valid values for what has no valid default."""
    return cls(**NEEDED.get(cls, {}) | values)


def fields() -> list:
    """(class, field) of every option, with a readable test id."""
    return [pytest.param(c, f, id=f"{c.__name__}.{f.name}") for c in CONFIGS for f in dataclasses.fields(c)]


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_a_command_defines_every_option_once(name):
    counts = Counter(f.name for c in refrag.COMMANDS[name].configs for f in dataclasses.fields(c))
    assert [option for option, count in counts.items() if count > 1] == []


def test_an_option_defined_twice_is_noticed():
    with pytest.raises(AssertionError, match="topk is defined twice"):
        refrag.config_fields((refrag.SearchConfig, refrag.SearchConfig))


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_every_command_has_the_common_options(name):
    options = refrag.config_fields(refrag.COMMANDS[name].configs)
    assert {"device", "dtype", "threads", "seed", "json", "quiet", "offline", "debug", "config"} <= set(options)


@pytest.mark.parametrize(("cls", "field"), fields())
def test_an_option_has_one_line_of_help(cls, field):
    text = field.metadata["help"]
    assert text.strip() == text != ""
    assert "\n" not in text


@pytest.mark.parametrize(("cls", "field"), fields())
def test_a_default_has_the_type_of_its_option(cls, field):
    annotation = typing.get_type_hints(cls)[field.name]
    kind = refrag.option_type(annotation)
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    assert all(type(v) is kind or (v is None and type(None) in typing.get_args(annotation)) for v in values)


@pytest.mark.parametrize(("cls", "field"), [p for p in fields() if p.values[1].metadata["choices"]])
def test_a_default_is_one_of_the_choices(cls, field):
    choices = field.metadata["choices"]
    optional = type(None) in typing.get_args(typing.get_type_hints(cls)[field.name])
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    assert set(values) <= set(choices) or (optional and field.default is None)
    assert len(set(choices)) == len(choices)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_the_defaults_pass_the_checks(cls):
    assert make(cls)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_a_config_can_not_be_changed(cls):
    config = make(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, 1)


# ---- Checks ---------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
ROOT = Path(refrag.__file__).parent
# Per check one row or more: class, values that break it, the flag the message names, the valid values it tells.
BAD = [
    (refrag.RuntimeConfig, {"threads": -1}, "--threads", "0 or more"),
    (refrag.RuntimeConfig, {"seed": 2**64}, "--seed", ""),
    (refrag.RuntimeConfig, {"seed": -(2**63) - 1}, "--seed", ""),
    (refrag.CorpusConfig, {"corpus": ()}, "--corpus", "name a file, a folder or -"),
    (refrag.CorpusConfig, {"corpus": ("-", "a.txt", "-")}, "--corpus", "standard input twice"),
    (refrag.CorpusConfig, {"limit": 0}, "--limit", "1 or more"),
    (refrag.CorpusConfig, {"limit": 2**63}, "--limit", "1 or more"),
    (refrag.CorpusConfig, {"max_passage_tokens": 7, "overlap": 0}, "--max_passage_tokens", "8 or more"),
    (refrag.CorpusConfig, {"overlap": -1}, "--overlap", "between 0 and half of --max_passage_tokens"),
    (refrag.CorpusConfig, {"max_passage_tokens": 20, "overlap": 11}, "--overlap", "half of --max_passage_tokens"),
    (refrag.BuildConfig, {"k": 0}, "--k", "between 1 and 64"),
    (refrag.BuildConfig, {"k": 65}, "--k", "between 1 and 64"),
    (refrag.BuildConfig, {"batch_size": 0}, "--batch_size", "1 or more"),
    (refrag.SearchConfig, {"topk": 0}, "--topk", "1 or more"),
    (refrag.SearchConfig, {"hops": 0}, "--hops", "between 1 and 8"),
    (refrag.SearchConfig, {"hops": 9}, "--hops", "between 1 and 8"),
    (refrag.PackConfig, {"k": 0}, "--k", "between 1 and 64"),
    (refrag.PackConfig, {"k": 65}, "--k", "between 1 and 64"),
    (refrag.PackConfig, {"p": -0.01}, "--p", "between 0 and 1"),
    (refrag.PackConfig, {"p": 1.01}, "--p", "between 0 and 1"),
    (refrag.PackConfig, {"p": float("nan")}, "--p", "between 0 and 1"),
    (refrag.PackConfig, {"floor": -1}, "--floor", "0 or more"),
    (refrag.PackConfig, {"ctx_max": 0}, "--ctx_max", "1 or more"),
    (refrag.GenerateConfig, {"max_new": 0}, "--max_new", "1 or more"),
    (refrag.GenerateConfig, {"temperature": -0.1}, "--temperature", "0 or more"),
    (refrag.GenerateConfig, {"temperature": float("nan")}, "--temperature", "0 or more"),
    (refrag.GenerateConfig, {"top_p": 0.0}, "--top_p", "(0, 1]"),
    (refrag.GenerateConfig, {"top_p": 1.1}, "--top_p", "(0, 1]"),
    (refrag.GenerateConfig, {"stop": ("x", "")}, "--stop", "empty"),
    (refrag.GenerateConfig, {"batch_size": 0}, "--batch_size", "1 or more"),
    (refrag.GenerateConfig, {"resume": True}, "--resume", "--out FILE"),
    *((refrag.BenchConfig, {"contexts": contexts}, "--contexts", "1 or more") for contexts in ((), (512, 0), (-1,))),
    (refrag.BenchConfig, {"batch_size": (1, 0)}, "--batch_size", "1 or more, got (1, 0)"),
    (refrag.BenchConfig, {"batch_size": ()}, "--batch_size", "1 or more, got ()"),
    (refrag.BenchConfig, {"modes": ()}, "--modes", "full, refrag and none"),
    *((refrag.BenchConfig, {"k": k}, "--k", "between 1 and 64") for k in ((), (0,), (16, 65))),
    *((refrag.BenchConfig, {"p": p}, "--p", "between 0 and 1") for p in ((), (-0.1,), (0.5, 1.1), (NAN,))),
    *((refrag.BenchConfig, {name: 0}, f"--{name}", "1 or more") for name in ("new", "repeats")),
    (refrag.BenchConfig, {"out_dir": __file__}, f"--out_dir {__file__}", "name a folder"),
    (refrag.TextConfig, {"train_json": ()}, "--train_json", "name a file of JSON lines"),
    (refrag.TextConfig, {"train_json": (__file__, "nowhere.jsonl")}, "--train_json nowhere.jsonl:", "no such file"),
    (refrag.TextConfig, {"eval_json": (str(ROOT),)}, f"--eval_json {ROOT}:", "no such file"),
    (refrag.TrainConfig, {"out_dir": None}, "--out_dir", "name the folder for the run"),
    *((refrag.TrainConfig, {"k": k}, "--k", "between 1 and 64") for k in ((), (0,), (65,), (16, 65))),
    *((refrag.TrainConfig, {"train": letters}, "--train", "letters of ped") for letters in ("", "x", "pd e", "P")),
    *((refrag.TrainConfig, {name: 0}, f"--{name}", "1 or more")
      for name in ("steps", "batch_size", "grad_accum", "log_every", "save_every", "eval_limit")),
    *((refrag.TrainConfig, {name: value}, f"--{name}", "0 or more")
      for name in ("lora_r", "eval_every", "weight_decay", "grad_clip") for value in (-1, NAN, INF)),
    *((refrag.TrainConfig, {name: value}, f"--{name}", "more than 0")
      for name in ("lr", "projector_lr") for value in (0.0, -1e-4, NAN, INF)),
    (refrag.TrainConfig, {"lr": 1e31}, "--lr", "beyond what weights can hold"),
    (refrag.TrainConfig, {"warmup": 1.0}, "--warmup", "[0, 1)"),
    (refrag.TrainConfig, {"warmup": -0.1}, "--warmup", "[0, 1)"),
    (refrag.TrainConfig, {"k": (4, 32), "seq_tokens": 31}, "--k 32", "--seq_tokens 31"),
    *((refrag.NextConfig, {name: value}, f"--{name}", "between 0 and 1")
      for name in ("expand_frac", "recon_frac") for value in (-0.1, 1.1, NAN)),
    *((cls, {"distill": value}, "--distill", "0 or more")
      for cls in (refrag.NextConfig, refrag.SftConfig) for value in (-0.1, NAN, INF)),
    (refrag.SftConfig, {"rag_json": None}, "--rag_json", "name a file of questions"),
    (refrag.SftConfig, {"rag_json": "nowhere.jsonl"}, "--rag_json nowhere.jsonl:", "no such file"),
    (refrag.SftConfig, {"eval_json": "nowhere.jsonl"}, "--eval_json nowhere.jsonl:", "no such file"),
    *((refrag.SftConfig, {"p": p}, "--p", "between 0 and 1") for p in ((), (-0.1,), (0.5, 1.1), (NAN,))),
    *((refrag.SftConfig, {name: value}, f"--{name}", "between 0 and 1") for value in (-0.1, 1.1)
      for name in ("no_answer_frac", "gate_frac", "quote_frac")),
    *((refrag.SftConfig, {name: 0}, f"--{name}", "1 or more") for name in ("topk_min", "limit")),
    (refrag.GateDataConfig, {"rag_json": ()}, "--rag_json", "name a file of questions"),
    (refrag.GateDataConfig, {"rag_json": (__file__, "nowhere.jsonl")}, "--rag_json nowhere.jsonl:", "no such file"),
    (refrag.ExportConfig, {"out_dir": None}, "--out_dir", "missing"),
    (refrag.ExportConfig, {"out_dir": str(ROOT)}, "--out_dir", "is there already"),
    (refrag.ServeConfig, {"port": -1}, "--port", "between 0 and 65535, got -1"),
    (refrag.ServeConfig, {"port": 65536}, "--port", "between 0 and 65535"),
    *((refrag.ServeConfig, {name: 0}, f"--{name}", "1 or more, got 0")
      for name in ("waiting", "body_bytes", "max_tokens")),
    (refrag.ServeConfig, {"together": -1}, "--together", "0 or more, got -1"),
    (refrag.ServeConfig, {"timeout": 0.0}, "--timeout", "above 0"),
    (refrag.ServeConfig, {"timeout": float("inf")}, "--timeout", "above 0"),
    (refrag.ServeConfig, {"api_key": ""}, "--api_key", "empty"),
    (refrag.GateDataConfig, {"eval_json": ("nowhere.jsonl",)}, "--eval_json nowhere.jsonl:", "no such file"),
    (refrag.GateDataConfig, {"out_dir": None}, "--out_dir", "name the folder"),
    (refrag.GateDataConfig, {"out_dir": str(ROOT)}, "--out_dir", "name a new folder"),
    (refrag.GateDataConfig, {"out_dir": __file__}, "--out_dir", "name a new folder"),
    *((refrag.GateDataConfig, {"k": k}, "--k", "between 1 and 64") for k in (0, 65)),
    *((refrag.GateDataConfig, {"p": p}, "--p", "between 0 and 1") for p in ((), (0.0,), (0.5, 1.0), (NAN,))),
    *((refrag.GateDataConfig, {name: 0}, f"--{name}", "1 or more") for name in ("limit", "eval_limit")),
    *((refrag.GateConfig, {name: 0}, f"--{name}", "1 or more") for name in ("epochs", "batch_size")),
    *((refrag.PolicyConfig, {name: 0}, f"--{name}", "1 or more") for name in ("steps", "batch_size")),
    (refrag.PolicyConfig, {"group": 1}, "--group", "2 or more"),
    *((refrag.PolicyConfig, {"policy_lr": value}, "--policy_lr", "more than 0") for value in (0.0, INF)),
    (refrag.EvalConfig, {"qa": None}, "--qa", "name a file of questions"),
    *((refrag.EvalConfig, {"task": task}, "--texts", "name a file of JSON lines") for task in ("ppl", "recon")),
    (refrag.EvalConfig, {"task": "ppl", "texts": ("nowhere.jsonl",)}, "--texts nowhere.jsonl:", "no such file"),
    (refrag.EvalConfig, {"modes": ("full", "fulll")}, "--modes fulll:", "knows full, refrag, none"),
    (refrag.EvalConfig, {"modes": ("full,bm25",)}, "--modes bm25:", "--task qa knows"),
    (refrag.EvalConfig, {"task": "retrieval", "modes": ("full",)}, "--modes full:", "bm25, dense, hybrid"),
    (refrag.EvalConfig, {"task": "recon", "texts": (__file__,), "modes": ("full",)}, "--modes full:", "none"),
    *((refrag.EvalConfig, {"p": p}, "--p", "between 0 and 1") for p in ((), (-0.1,), (0.5, 1.1), (NAN,))),
    *((refrag.EvalConfig, {"k": k}, "--k", "one value") for k in ((), (4, 8))),
    (refrag.EvalConfig, {"k": (65,)}, "--k", "between 1 and 64"),
    (refrag.EvalConfig, {"task": "ppl", "texts": (__file__,), "k": (4, 0)}, "--k", "between 1 and 64"),
    (refrag.EvalConfig, {"gate": "none"}, "--gate", "use --p 0"),
    (refrag.EvalConfig, {"ctx_max": 0}, "--ctx_max", "1 or more"),
    (refrag.EvalConfig, {"max_new": 0}, "--max_new", "1 or more"),
    (refrag.EvalConfig, {"batch_size": 0}, "--batch_size", "1 or more"),
    (refrag.EvalConfig, {"context_tokens": 15}, "--context_tokens", "--k 16 or more"),
    (refrag.EvalConfig, {"next_tokens": 0}, "--next_tokens", "1 or more"),
    (refrag.EvalConfig, {"limit": 0}, "--limit", "1 or more"),
    (refrag.EvalConfig, {"resume": True}, "--resume", "--out_dir"),
    (refrag.AnchorConfig, {"text": None}, "--text", "give the text"),
    (refrag.AnchorConfig, {"text": ""}, "--text", "give the text"),
    (refrag.AnchorConfig, {"text": "a\udcffb"}, "--text", "no UTF-8"),
]
# The outermost values that are still allowed.
GOOD = [
    (refrag.RuntimeConfig, {"threads": 0}),
    (refrag.CorpusConfig, {"limit": 1}),
    (refrag.CorpusConfig, {"max_passage_tokens": 8, "overlap": 4}),
    (refrag.CorpusConfig, {"overlap": 0}),
    (refrag.BuildConfig, {"k": 1}),
    (refrag.BuildConfig, {"k": 64, "batch_size": 1}),
    (refrag.SearchConfig, {"topk": 1, "hops": 1}),
    (refrag.SearchConfig, {"hops": 8}),
    (refrag.PackConfig, {"k": 1, "p": 0.0, "ctx_max": 1}),
    (refrag.PackConfig, {"k": 64, "p": 1.0}),
    (refrag.GenerateConfig, {"max_new": 1, "temperature": 0.0, "top_p": 1e-9, "batch_size": 1}),
    (refrag.GenerateConfig, {"resume": True, "out": "answers.jsonl"}),
    (refrag.BenchConfig, {"contexts": (1,), "modes": ("none",), "k": (1, 64), "p": (0.0, 1.0), "new": 1, "repeats": 1}),
    (refrag.BenchConfig, {"out_dir": str(ROOT)}),
    (refrag.TextConfig, {"train_json": (__file__, __file__), "eval_json": (__file__,)}),
    (refrag.TrainConfig, {"k": (1, 64), "seq_tokens": 64, "train": "p", "steps": 1, "batch_size": 1, "grad_accum": 1}),
    (refrag.TrainConfig, {"train": "dep", "lora_r": 0, "weight_decay": 0.0, "grad_clip": 0.0, "warmup": 0.0}),
    (refrag.TrainConfig, {"lr": 1e-9, "projector_lr": 1e30, "eval_every": 0, "eval_limit": 1, "save_every": 1}),
    (refrag.NextConfig, {"expand_frac": 0.0, "recon_frac": 1.0, "distill": 0.0}),
    (refrag.NextConfig, {"expand_frac": 1.0, "recon_frac": 0.0}),
    (refrag.SftConfig, {"p": (0.0, 1.0), "no_answer_frac": 1.0, "gate_frac": 0.0, "topk_min": 1, "limit": 1}),
    (refrag.SftConfig, {"quote_frac": 1.0, "distill": 0.0}),
    (refrag.GateDataConfig, {"k": 64, "p": (0.01, 0.99), "limit": 1, "eval_limit": 1, "eval_json": (__file__,)}),
    (refrag.GateConfig, {"epochs": 1, "batch_size": 1}),
    (refrag.PolicyConfig, {"steps": 1, "batch_size": 1, "group": 2, "blind": True}),
    (refrag.EvalConfig, {"p": (0.0, 1.0), "limit": 1, "next_tokens": 1, "resume": True, "out_dir": "out"}),
    (refrag.EvalConfig, {"task": "ppl", "texts": (__file__,), "qa": None, "k": (4, 64), "context_tokens": 64}),
    (refrag.AnchorConfig, {"text": " "}),
]


def case_id(value: object) -> str | None:
    """Class and values as the name of a case."""
    return value.__name__ if isinstance(value, type) else None if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("cls", "values", "flag", "valid"), BAD, ids=case_id)
def test_a_bad_value_is_refused_with_its_flag_and_what_is_valid(cls, values, flag, valid):
    with pytest.raises(refrag.UserError) as caught:
        make(cls, **values)
    message = str(caught.value)
    assert message.startswith(f"{flag} ")
    assert valid in message
    assert "\n" not in message


@pytest.mark.parametrize(("cls", "values"), GOOD, ids=case_id)
def test_the_outermost_valid_values_are_accepted(cls, values):
    config = make(cls, **values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_every_check_has_a_row_above(cls):
    """Counts the `require` calls of a class, so that a new check is not left untested."""
    if "__post_init__" not in vars(cls):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__post_init__)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "require"]
    rows = [getattr(row, "values", row) for row in BAD]
    broken = {(flag, valid) for c, _, flag, valid in rows if c is cls}
    assert len(broken) >= len(calls), f"add rows to BAD for the checks of {cls.__name__}"


def test_require_lets_a_true_condition_pass():
    assert refrag.require(True, "never seen") is None


# ---- Exit codes -----------------------------------------------------------------------------------------------------

CODES = {
    refrag.RefragError: 1,
    refrag.UserError: 2,
    refrag.MissingError: 3,
    refrag.CorruptError: 4,
    refrag.MismatchError: 5,
    refrag.ExhaustedError: 6,
    refrag.LockedError: 75,
}


def subclasses(cls: type) -> set[type]:
    """A class and everything derived from it."""
    return {cls}.union(*(subclasses(c) for c in cls.__subclasses__()))


@pytest.mark.parametrize(("cls", "code"), CODES.items(), ids=case_id)
def test_an_error_class_has_its_documented_exit_code(cls, code):
    assert refrag.classify(cls("what: how to mend it")) == (code, "what: how to mend it")


def test_there_are_no_other_exit_codes():
    assert {c.code for c in subclasses(refrag.RefragError)} == set(CODES.values())


class OutOfMemoryError(RuntimeError):
    """Named like the accelerators' error, which is raised under several modules."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 6),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6),
        (MemoryError(), 6),
        (OutOfMemoryError("tried to allocate 20 GiB"), 6),
        (torch.OutOfMemoryError("tried to allocate 20 GiB"), 6),
        (PermissionError(errno.EACCES, "Permission denied", "/there"), 2),
        (PermissionError(errno.EPERM, "Operation not permitted", "/there"), 2),
        (OSError(errno.EROFS, "Read-only file system", "/there"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/there"), 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/there"), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/there"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/there"), 2),
        (OSError(errno.EIO, "Input/output error", "/there"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (RuntimeError("two\nlines"), 1),
    ],
    ids=repr,
)
def test_other_exceptions_have_an_exit_code_and_one_line(error, code):
    got, message = refrag.classify(error)
    assert got == code
    assert message.strip() == message != ""
    assert "\n" not in message
    if getattr(error, "filename", None) and code == 2:
        assert message.startswith("/there: ")


def test_an_unknown_exception_is_called_a_fault_of_ours_and_points_to_debug():
    _, message = refrag.classify(KeyError("weights"))
    assert message == "internal fault: KeyError: 'weights': run again with --debug for the traceback"


@pytest.mark.parametrize(("error", "line"), [(ValueError(" a \n\t b "), "a b"), (ValueError(), "ValueError")])
def test_one_line(error, line):
    assert refrag.one_line(error) == line
