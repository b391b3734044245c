"""Section 1: options, their defaults and checks, and the exit codes of errors."""

import dataclasses
import errno
import math
import re
import typing
from pathlib import Path

import pytest
import torch

import refrag

ROOT = str(Path(refrag.__file__).parent)
CONFIGS = sorted({c for cmd in refrag.COMMANDS.values() for c in cmd.configs}, key=lambda c: c.__name__)
# What has no default that stands by itself; files must be there, and this is one.
NEEDED = {"corpus": ("a.txt",), "text": "a", "train_json": (__file__,), "rag_json": (__file__,), "out_dir": "run",
          "qa": __file__}


def make(cls: type, **values: object) -> object:
    needed = {f.name: NEEDED[f.name] for f in dataclasses.fields(cls) if f.metadata["needed"] or f.name == "qa"}
    if cls in (refrag.SftConfig, refrag.MixConfig):
        needed |= {"rag_json": __file__} | ({"train_json": (__file__,)} if cls is refrag.MixConfig else {})
    return cls(**needed | values)


def options(keep=lambda f: True) -> list:
    return [pytest.param(c, f, id=f"{c.__name__}.{f.name}") for c in CONFIGS for f in dataclasses.fields(c) if keep(f)]


def several(f: dataclasses.Field) -> bool:
    return isinstance(f.default, tuple)


@pytest.mark.parametrize(("cls", "f"), options())
def test_an_option_has_one_line_of_help_and_a_default_of_its_type_that_passes(cls, f):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make(cls), f.name, 1)
    assert f.metadata["help"].strip() == f.metadata["help"] != "" and "\n" not in f.metadata["help"]
    annotation = typing.get_type_hints(cls)[f.name]
    kinds = typing.get_args(annotation) or (annotation,)
    assert all(type(v) in kinds for v in (f.default if several(f) else (f.default,)))


def refused(cls: type, **values: object) -> str:
    """The message with which values are refused, one line that names the flag of the first."""
    with pytest.raises(refrag.UserError) as caught:
        make(cls, **values)
    message = str(caught.value)
    assert re.match(rf"(name one of )?--{next(iter(values))}\b", message) and "\n" not in message
    return message


@pytest.mark.parametrize(("cls", "f"), options(lambda f: f.metadata["limits"]))
def test_a_number_keeps_its_limits_and_the_outermost_are_allowed(cls, f):
    """1 or more: 1 is allowed; 0, nan and infinity are refused, alone and beside a value that is allowed."""
    related = {"max_passage_tokens": {"overlap": 0}, "k": {"seq_tokens": 64, "context_tokens": 64}}.get(f.name, {})
    related = {name: value for name, value in related.items() if name in cls.__dataclass_fields__}
    for key, limit in f.metadata["limits"].items():
        up, down = (limit + s if "int" in f.type else math.nextafter(limit, s * math.inf) for s in (1, -1))
        inside, outside = {"low": (limit, down), "above": (up, limit), "high": (limit, up), "below": (down, limit)}[key]
        assert make(cls, **{f.name: (inside,) if several(f) else inside}, **related)
        for bad in (outside, math.nan, math.inf):
            message = refused(cls, **{f.name: (inside, bad) if several(f) else bad})
            assert message.endswith(f", got {bad}") and all(str(v) in message for v in f.metadata["limits"].values())


@pytest.mark.parametrize(("cls", "f"), options(lambda f: f.metadata["choices"]))
def test_a_value_is_one_of_the_choices(cls, f):
    choices = f.metadata["choices"]
    assert len(set(choices)) == len(choices)
    message = refused(cls, **{f.name: (choices[0], "magic") if several(f) else "magic"})
    assert message.startswith(f"--{f.name} must be one of {', '.join(choices)}, got 'magic'")


@pytest.mark.parametrize(("cls", "f"), options(lambda f: f.metadata["exists"]))
def test_a_file_is_there(cls, f):
    for name in ("nowhere.jsonl", ROOT):
        message = refused(cls, **{f.name: (__file__, name) if several(f) else name})
        assert message == f"--{f.name} {name}: no such file"


@pytest.mark.parametrize(("cls", "f"), options(lambda f: f.metadata["needed"] or (several(f) and f.default)))
def test_what_is_needed_is_given(cls, f):
    hint = f" is missing: {f.metadata['help']}" if f.metadata["needed"] else " is empty: give it one value or more"
    assert refused(cls, **{f.name: () if several(f) else None}) == f"--{f.name}{hint}"


PPL = {"task": "ppl", "texts": (__file__,)}
BAD = [  # class, values that break a check, what the message tells
    # ranges that matter, written out: the test above reads them from the options that it tests
    *((refrag.PackConfig, {"k": k}, f"--k must lie between 1 and 64, got {k}") for k in (0, 65)),
    *((refrag.PackConfig, {"p": p}, f"--p must lie between 0 and 1, got {p}") for p in (-0.1, 1.01)),
    (refrag.SearchConfig, {"topk": 0}, "must be 1 or more, got 0"),
    (refrag.SearchConfig, {"hops": 9}, "must lie between 1 and 8, got 9"),
    (refrag.GenerateConfig, {"top_p": 0.0}, "must be more than 0 and at most 1, got 0.0"),
    (refrag.GenerateConfig, {"temperature": -1.0}, "must be 0 or more, got -1.0"),
    (refrag.TrainConfig, {"lr": 0.0}, "must be more than 0 and at most 1e+30, got 0.0"),
    (refrag.TrainConfig, {"warmup": 1}, "must be 0 or more and less than 1, got 1"),
    (refrag.ServeConfig, {"port": 65536}, "must lie between 0 and 65535, got 65536"),
    (refrag.CorpusConfig, {"corpus": ("-", "a.txt", "-")}, "standard input twice"),
    (refrag.BuildConfig, {"add": True, "sync": True}, "--add, --sync and --delete"),
    (refrag.BuildConfig, {"delete_all": True}, "goes with --sync or --delete"),
    (refrag.GenerateConfig, {"stop": ("x", "")}, "empty"),
    *((refrag.TrainConfig, {"train": letters}, "letters of ped") for letters in ("x", "pd e", "P")),
    (refrag.TrainConfig, {"k": (4, 32), "seq_tokens": 31}, "32 is larger than --seq_tokens 31"),
    *((refrag.MixConfig, {"mix": mix}, f"--mix {mix}: write shares of recon, next, cloze, qa, like recon=.4,qa=.6")
      for mix in ("qa", "qa=", "qa=x", "gate=1", "qa=-1,recon=2", "qa=0", "qa=inf", "qa=nan", "qa=1,")),
    (refrag.MixConfig, {"mix_end": "align=1"}, "--mix_end align=1: write shares of"),
    (refrag.MixConfig, {"rag_json": None}, "--rag_json is missing: the mixture has qa"),
    (refrag.MixConfig, {"train_json": ()}, "--train_json is missing: the mixture has lessons over texts"),
    (refrag.EvalConfig, {"qa": None}, "--qa is missing"),
    *((refrag.EvalConfig, {"texts": (), "task": task}, "--texts is missing") for task in ("ppl", "recon")),
    (refrag.EvalConfig, {"modes": ("full", "fulll")}, "--modes fulll: --task qa knows full, refrag, none"),
    (refrag.EvalConfig, {"modes": ("full,bm25",)}, "--modes bm25: --task qa knows"),
    (refrag.EvalConfig, {"modes": ("full",), "task": "retrieval"}, "bm25, dense, hybrid"),
    (refrag.EvalConfig, {"modes": ("full",), **PPL, "task": "recon"}, "none"),
    (refrag.EvalConfig, {"k": (4, 8)}, "one value"), (refrag.EvalConfig, {"gate": "none"}, "use --p 0"),
    (refrag.EvalConfig, {"context_tokens": 15}, "--k 16 or more, got 15"),
    (refrag.EvalConfig, {"resume": True}, "--out_dir"),
    *((refrag.GateDataConfig, {"out_dir": there}, "name a new folder") for there in (ROOT, __file__)),
    (refrag.AnchorConfig, {"text": ""}, "the text to align"),
    (refrag.ServeConfig, {"api_key": ""}, "empty"), (refrag.ServeConfig, {"api_key": "secret\r"}, "ASCII alone"),
    *((refrag.RuntimeConfig, {"engine": bad}, "--engine must be one of auto, model, int8, int4, vllm+http://HOST:PORT")
      for bad in ("int2", "vllm", "vllm+http://", "vllm+http://host:1/v1")),
    *((refrag.ServeConfig, {"cors": ("https://a.b", bad)}, f"--cors {bad}: an origin is")
      for bad in ("*", "a.b", "https://a.b/", "https://a.b/notes", "null", "https://*.b")),
    (refrag.ExportConfig, {"out_dir": ROOT}, "is there already")]
GOOD = [(refrag.CorpusConfig, {"max_passage_tokens": 8, "overlap": 4}),
    (refrag.GenerateConfig, {"resume": True, "out": "answers.jsonl"}), (refrag.BenchConfig, {"out_dir": ROOT}),
    (refrag.TrainConfig, {"k": (1, 64), "seq_tokens": 64, "train": "dep"}),
    (refrag.MixConfig, {"mix": "qa=1", "train_json": ()}),
    (refrag.MixConfig, {"mix": "cloze=2, next=1", "rag_json": None}),
    (refrag.EvalConfig, {"resume": True, "out_dir": "out", "modes": ("full,none", "refrag")}),
    (refrag.EvalConfig, {**PPL, "qa": None, "k": (4, 64), "context_tokens": 64}),
    (refrag.ServeConfig, {"cors": ("https://a.b:8080", "chrome-extension://abc")}),
    *((refrag.RuntimeConfig, {"engine": good}) for good in ("int8", "vllm+http://h:8000", "vllm+https://[::1]:8000/"))]


@pytest.mark.parametrize(("cls", "values", "told"), BAD, ids=str)
def test_options_that_do_not_go_together_are_refused(cls, values, told):
    assert told in refused(cls, **values)


@pytest.mark.parametrize(("cls", "values"), GOOD, ids=str)
def test_options_that_go_together_are_accepted(cls, values):
    config = make(cls, **values)
    assert {name: getattr(config, name) for name in values} == values


CODES = {refrag.RefragError: 1, refrag.UserError: 2, refrag.MissingError: 3, refrag.CorruptError: 4,
         refrag.MismatchError: 5, refrag.ExhaustedError: 6, refrag.LockedError: 75}


def test_an_error_class_has_its_documented_exit_code():
    """Memory that torch does not get is memory that ran out."""
    for cls, code in CODES.items():
        assert refrag.classify(cls("what: how to fix it")) == (code, "what: how to fix it")
    assert {c.code for c in refrag.RefragError.__subclasses__()} < set(CODES.values())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert refrag.classify(caught.value)[0] == 6


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})  # accelerators have several of this name


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130),
    *((OSError(number, "full"), 6) for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)),
    (MemoryError(), 6), (OutOfMemoryError("20 GiB"), 6), (torch.OutOfMemoryError("20 GiB"), 6),
    *((OSError(getattr(errno, name), "no", "/there"), 2) for name in (
        "EACCES", "EPERM", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "ENAMETOOLONG")),
    (OSError(errno.EIO, "Input/output error", "/there"), 1), (ZeroDivisionError("no"), 1), (RuntimeError("a\nb"), 1),
    (KeyError("weights"), 1)], ids=repr)
def test_other_exceptions_have_an_exit_code_and_one_line(error, code):
    """One that is not known is called a fault of ours and points to --debug."""
    got, message = refrag.classify(error)
    assert got == code and message.strip() == message != "" and "\n" not in message
    assert code != 2 or message.startswith("/there: ")
    assert not isinstance(error, KeyError) or (
        message == "internal fault: KeyError: 'weights': run again with --debug for the traceback")
