"""Bad texts, damaged checkpoints, full disks, second runs and interrupts in align and the training commands.

Each failure has its exit code and one line on stderr, with --json also one object on stdout, and loses nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import refrag

PHASES = ["cpt_align", "cpt_recon", "cpt_next", "sft"]
QUIET = ("--quiet", "--threads", "1", "--device", "cpu")
SMALL = ("--k", "4", "--seq_tokens", "64", "--batch_size", "2", *QUIET)
SENTENCES = [
    "The Rhone leaves Lake Geneva and crosses the old city under seven bridges. It floods in May.",
    "Copper and tin make bronze, which melts at 950 degrees. Smiths in the valley cast bells from it.",
    "Ada Lovelace wrote notes on the Analytical Engine; the notes hold an algorithm for Bernoulli numbers.",
    "In 1896 the first modern games opened in Athens before 60,000 people; 14 nations sent athletes.",
]
TEXTS = [{"text": f"{sentence} {sentence.lower()}"} for sentence in SENTENCES]
QUESTIONS = [
    {"question": "Which lake does the Rhone leave?", "answers": ["Lake Geneva"], "positive_ids": ["a"]},
    {"question": "What do copper and tin make?", "answers": ["bronze"], "positive_ids": ["b"]},
    {"question": "Who wrote the notes?", "answers": ["Ada Lovelace", "Ada"], "positive_ids": ["c"]},
]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


# ---- Runs, their state, and what is written -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Caches of this test alone."""
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes, text or rows; returns its path."""

    def call(name: str, content: bytes | str | list[dict]) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return call


@pytest.fixture
def models(llama) -> list[object]:
    """The options that name the tiny models."""
    return ["--dec", llama, "--enc", "decoder:2"]


@pytest.fixture
def argv(write, models, index_dir, tmp_path):
    """The command line of a short run of a phase: argv("cpt_recon", "--lr", 1); the last of equal flags counts."""

    def call(phase: str, *options: object, steps: int = 1) -> list[object]:
        if phase == "sft":
            data = ["--rag_json", write("questions.jsonl", QUESTIONS), "--index_dir", index_dir, "--retriever", "bm25"]
        else:
            data = ["--train_json", write("texts.jsonl", TEXTS)]
        return [phase, *data, *models, *SMALL, "--out_dir", tmp_path / "run", "--steps", steps, *options]

    return call


@pytest.fixture
def refused(run):
    """Run a command that must fail with this exit code, one line on stderr and one object on stdout; the line."""

    def call(code: int, *argv: object) -> str:
        got, out, err = run(*argv, "--json")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        message = err.removeprefix("error: ").rstrip("\n")
        assert (got, message) == (code, message), f"exit code {got}: {message}"
        assert out.count("\n") == 1
        assert json.loads(out) == {"error": {"code": code, "message": message}}
        return message

    return call


@pytest.fixture
def done(run):
    """Run a command that must succeed; returns its JSON."""

    def call(*argv: object) -> dict:
        code, out, err = run(*argv, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return call


def state(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@contextlib.contextmanager
def unchanged(folder: Path):
    """A context that leaves a folder as it is."""
    before = state(folder)
    yield
    assert state(folder) == before


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint."""
    return {f"{p.name}/{name}": tensor for p in sorted(folder.glob("*.safetensors")) if p.name != "trainer.safetensors"
            for name, tensor in safetensors.torch.load_file(p).items()}


STEPS = 4
LESSON = ("--train", "p", "--save_every", "1", "--log_every", "1")  # the options of the run below


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama) -> Path:
    """A run of four steps with checkpoints after the third and the fourth, an evaluation before and after; its files.

    Do not write here: `unfinished` is a copy.
    """
    folder = tmp_path_factory.mktemp("finished")
    for name in ("texts.jsonl", "eval.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("REFRAG_HOME", str(folder / "home"))
        argv = ["cpt_recon", "--train_json", folder / "texts.jsonl", "--eval_json", folder / "eval.jsonl", "--dec",
                llama, "--enc", "decoder:2", *SMALL, "--out_dir", folder / "run", "--steps", STEPS, *LESSON]
        assert refrag.main([str(a) for a in argv]) == 0
    return folder


@pytest.fixture
def whole(finished, tmp_path) -> Path:
    """A copy of the finished run's folder."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def unfinished(whole) -> Path:
    """The same as it was before the last step."""
    shutil.rmtree(whole / "step-000004")
    return whole


@pytest.fixture
def resume(finished, models):
    """The command line that continues a copy of that run."""

    def call(folder: Path, *options: object) -> list[object]:
        return ["cpt_recon", "--train_json", finished / "texts.jsonl", "--eval_json", finished / "eval.jsonl", *models,
                *SMALL, "--steps", STEPS, *LESSON, "--out_dir", folder, "--resume", *options]

    return call


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """A copy of a checkpoint, free to be damaged."""
    return shutil.copytree(finished / "run" / "step-000004", tmp_path / "checkpoint")


@pytest.fixture
def load(write, tmp_path):
    """The command line of a run that starts from a checkpoint."""

    def call(folder: Path, *options: object) -> list[object]:
        return ["cpt_recon", "--train_json", write("texts.jsonl", TEXTS), *SMALL, "--steps", "1", "--out_dir",
                tmp_path / "next", "--load_dir", folder, *options]

    return call


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_tests_below_spoil_is_good(done, argv, phase):
    """What they rely on: each command line succeeds as it is."""
    assert done(*argv(phase))["steps"] == 1


# ---- Bad texts ------------------------------------------------------------------------------------------------------

LONG = TEXTS[0]["text"]
TEXT_FILES = {
    "empty": (b"", "texts.jsonl: no text to train on"),
    "blank lines": (b"\n \r\n\t\n\n", "texts.jsonl: no text to train on"),
    "empty text": ([{"text": ""}], "texts.jsonl: no text to train on"),
    "no tokens": ([{"tokens": []}], "texts.jsonl: no text to train on"),
    "malformed": (b'{"text": "good"}\n\n{"text": \n', r"texts\.jsonl:3: malformed JSON"),
    "too deep": (b'{"text": "good"}\n' + b"[" * 100_000, r"texts\.jsonl:2: malformed JSON"),
    "a list": (b'{"text": "good"}\n["text"]\n', r"texts\.jsonl:2: expected a JSON object, got list"),
    "no text": ([{"title": "x"}], r"texts\.jsonl:1: text must be a string, got NoneType"),
    "a number": ([{"text": "good"}, {"text": 7}], r"texts\.jsonl:2: text must be a string, got int"),
    "half a pair": (b'{"text": "\\ud800"}\n', r"texts\.jsonl:1: text holds half of a surrogate pair"),
    "invalid UTF-8": (b'{"text": "good"}\n{"text": "b\xff"}\n', r"texts\.jsonl: invalid UTF-8 at byte 28"),
    "token 2.5": ([{"tokens": [1, 2.5]}], r"texts\.jsonl:1: tokens must be whole numbers"),
    "token true": ([{"tokens": [True] * 9}], r"texts\.jsonl:1: tokens must be whole numbers"),
    "token '7'": ([{"tokens": ["7"] * 9}], r"texts\.jsonl:1: tokens must be whole numbers"),
    "token -1": ([{"tokens": [5, -1]}], r"texts\.jsonl:1: tokens must be whole numbers, 0 or more"),
    "no such token": ([{"text": LONG}, {"tokens": [600] * 9}], r"texts\.jsonl:2: token 600 is not one of the decoder"),
    "huge token": ([{"tokens": [2**70] * 9}], r"texts\.jsonl:1: token"),
    "split a number": ([{"text": LONG, "split": 5}], r"texts\.jsonl:1: split must be \{s, o\}"),
    "split -1": ([{"text": LONG, "split": {"s": -1, "o": 9}}], r"texts\.jsonl:1: split must be \{s, o\}"),
    "split 'a'": ([{"text": LONG, "split": {"s": 9, "o": "a"}}], r"texts\.jsonl:1: split must be \{s, o\}"),
    "split true": ([{"text": LONG, "split": {"s": True, "o": 9}}], r"texts\.jsonl:1: split must be \{s, o\}"),
    "split []": ([{"text": LONG, "split": []}], r"texts\.jsonl:1: split must be \{s, o\}"),
    "huge split": ([{"text": LONG, "split": {"s": 2**40, "o": 9}}], r"texts\.jsonl:1: split"),
    "short": ([{"text": "ab"}] * 3, "texts.jsonl: every text is shorter than . tokens, which --k 4 needs"),
}


@pytest.mark.parametrize("flag", ["--train_json", "--eval_json"])
@pytest.mark.parametrize("case", TEXT_FILES)
def test_a_bad_text_file_is_refused(refused, argv, write, tmp_path, flag, case):
    """And nothing is begun: no folder stays."""
    content, told = TEXT_FILES[case]
    (tmp_path / "bad").mkdir()
    path = write("bad/texts.jsonl", content)
    line = refused(2, *argv("cpt_next", flag, path))
    assert re.search(told, line)
    assert str(path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", ["cpt_align", "cpt_recon"])
def test_a_bad_line_is_named_in_the_other_phases(refused, argv, write, phase):
    path = write("bad.jsonl", '{"text": "good"}\n{"text": \n')
    assert "bad.jsonl:2: malformed JSON" in refused(2, *argv(phase, "--train_json", path))


@pytest.mark.parametrize("flag", ["--train_json", "--eval_json"])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_text_file_that_is_not_there(refused, argv, tmp_path, flag, kind):
    path = tmp_path if kind == "folder" else tmp_path / "nowhere.jsonl"
    assert f"{flag} {path}: no such file" in refused(2, *argv("cpt_recon", flag, path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", ["cpt_align", "cpt_recon", "cpt_next"])
def test_no_text_file_at_all(refused, models, tmp_path, phase):
    line = refused(2, phase, *models, *SMALL, "--out_dir", tmp_path / "run")
    assert "--train_json is missing" in line


@pytest.mark.parametrize("flag", ["--train_json", "--eval_json"])
@pytest.mark.parametrize("content", [gzip.compress(json.dumps(TEXTS[0]).encode() * 99)[:-9], b"no gzip"],
                         ids=["truncated", "no gzip"])
def test_a_damaged_gzip_file(refused, done, argv, write, home, flag, content):
    """No half of it stays in the cache."""
    path = write("texts.jsonl.gz", content)
    assert f"{path}: not a complete gzip file" in refused(4, *argv("cpt_recon", flag, path))
    path.write_bytes(gzip.compress(json.dumps(TEXTS[0]).encode()))
    assert done(*argv("cpt_recon", flag, path))["steps"] == 1
    assert list((home / "tokens").glob(".*")) == []


def test_invalid_utf8_is_not_answered_with_a_flag_that_is_not_there(run, refused, argv, write):
    line = refused(2, *argv("cpt_recon", "--train_json", write("bad.jsonl", b'{"text": "b\xff"}\n')))
    code, _, err = run(*argv("cpt_recon", *re.findall(r"--\w+(?: [a-z]+)?", line)))
    assert code == 0, err


def test_the_texts_of_two_files_are_named_by_their_own_file(refused, argv, write):
    files = [write("good.jsonl", TEXTS), write("bad.jsonl", [TEXTS[0], {"text": None}])]
    assert f"{files[1]}:2: text must be a string" in refused(2, *argv("cpt_next", "--train_json", *files))


def test_a_copy_of_a_file_is_named_by_its_own_name(refused, argv, write):
    for name in ("first.jsonl", "second.jsonl"):
        assert f"{name}: every text is shorter" in refused(2, *argv("cpt_recon", "--train_json", write(
            name, [{"text": "ab"}])))


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["tokens.npy", "cuts.npy", "texts.npy", "manifest.json"])
def test_a_damaged_cache_of_tokens_is_made_anew(done, argv, home, tmp_path, file, kind):
    before = done(*argv("cpt_recon"))
    (path,) = (home / "tokens").glob(f"*/{file}")
    with unchanged(home):
        damage(path, kind)
        again = done(*argv("cpt_recon", "--out_dir", tmp_path / "again"))
    assert again["loss"] == before["loss"]


def test_a_cache_that_can_not_be_made(refused, argv, write, monkeypatch):
    monkeypatch.setenv("REFRAG_HOME", str(write("file", "precious")))
    assert "Not a directory" in refused(2, *argv("cpt_recon"))


@pytest.mark.parametrize("phase", ["cpt_align", "cpt_recon", "cpt_next"])
def test_one_token_over_several_chunks_of_a_separate_encoder(done, argv, write, bert, phase):
    """The encoder reads each letter of an unknown word as a token, the decoder has learned the word whole."""
    text = "长江是亚洲最长的河流。 The Yangtze rises in Qinghai and reaches the sea near Shanghai."
    done(*argv(phase, "--train_json", write("long.jsonl", [{"text": text * 3}]), "--enc", bert, "--train", "p"))


# ---- Bad options ----------------------------------------------------------------------------------------------------

OPTIONS = [  # limits of single options: test_configuration.py
    ("cpt_align", ["--k", "65"], "--k must lie between 1 and 64, got 65"),
    ("cpt_recon", ["--k", "64", "--seq_tokens", "32"], "--k 64 is larger than --seq_tokens 32"),
    ("cpt_recon", ["--lora_r", "4"], "--lora_r needs the decoder in --train, got pe"),
    ("cpt_next", ["--lora_r", "4", "--train", "p"], "--lora_r needs the decoder in --train, got p"),
    ("sft", ["--p", "0", "nan"], "--p must lie between 0 and 1, got nan"),
]


@pytest.mark.parametrize(("phase", "options", "told"), OPTIONS, ids=[f"{p} {' '.join(o)}" for p, o, _ in OPTIONS])
def test_a_bad_option_is_refused_before_anything_is_made(refused, argv, tmp_path, phase, options, told):
    assert told in refused(2, *argv(phase, *options))
    assert not (tmp_path / "run").exists()


def test_a_chunk_longer_than_every_text(refused, argv):
    line = refused(2, *argv("cpt_recon", "--k", "64"))
    assert re.search(r"texts\.jsonl: every text is shorter than 64 tokens, which --k 64 needs", line)


@pytest.mark.parametrize("phase", ["cpt_align", "cpt_next"])
def test_no_room_beyond_one_chunk(refused, argv, phase):
    assert "--seq_tokens 4 leaves nothing beyond one chunk" in refused(2, *argv(phase, "--seq_tokens", "4"))


@pytest.mark.parametrize(("options", "code", "told"), [
    (["--dec", "/nowhere/model"], 3, "model folder /nowhere/model is not there"),
    (["--enc", "/nowhere/model"], 3, "model folder /nowhere/model is not there"),
    (["--enc", "decoder:99"], 2, "--enc decoder:99: the decoder has 3 layers"),
    (["--enc", "decoder:x"], 2, "--enc decoder:x: write decoder:N"),
    (["--pooling", "cls"], 2, "--pooling cls needs a separate encoder"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_models_that_are_not_there_or_do_not_fit(refused, argv, options, code, told):
    assert told in refused(code, *argv("cpt_recon", *options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(refused, argv, tmp_path):
    assert "--device cuda is not available here" in refused(3, *argv("cpt_recon", "--device", "cuda"))
    assert not (tmp_path / "run").exists()


def test_a_decoder_with_too_few_positions(refused, argv, write, tokenizers, tmp_path):
    config = transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"]).save_pretrained(tmp_path / "gpt2")
    line = refused(2, *argv("cpt_recon", "--dec", tmp_path / "gpt2", "--curriculum", "none"))
    assert "the decoder's window is 32: lower --seq_tokens" in line


@pytest.mark.parametrize("library", ["accelerate", "peft"])
def test_a_library_that_is_missing(refused, argv, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    line = refused(3, *argv("cpt_recon", "--train", "d", "--lora_r", "2"))
    assert re.search(rf"library missing: .*{library}.*pip install", line)
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_there_is_no_picture(done, argv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert done(*argv("cpt_recon"))["steps"] == 1
    assert not (tmp_path / "run" / "loss.png").exists()


def test_runs_of_two_precisions_in_one_program(done, argv, tmp_path):
    losses = [done(*argv("cpt_recon", "--dtype", dtype, "--out_dir", tmp_path / str(number)))["loss"]
              for number, dtype in enumerate(["float32", "bfloat16", "float32"])]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---- The run's folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_no_folder_is_named(refused, argv, phase):
    command = argv(phase)
    at = command.index("--out_dir")
    assert "--out_dir is missing" in refused(2, *command[:at], *command[at + 2 :])


def test_an_out_dir_that_is_a_file(refused, argv, write):
    path = write("file", "precious")
    assert f"--out_dir {path} is a file" in refused(2, *argv("cpt_recon", "--out_dir", path))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["thesis.tex", "step-last", "my-run.json", "model.safetensors"])
def test_a_foreign_folder_is_refused(refused, argv, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    with unchanged(tmp_path / "mine"):
        for options in ([], ["--resume"]):
            line = refused(2, *argv("cpt_recon", "--out_dir", tmp_path / "mine", *options))
            assert f"--out_dir {tmp_path / 'mine'} holds other files ({name})" in line
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [name]  # and no lock


def test_an_empty_folder_is_accepted(done, argv, tmp_path):
    (tmp_path / "run").mkdir()
    assert done(*argv("cpt_recon"))["steps"] == 1


def test_a_run_is_not_overwritten(refused, argv, unfinished):
    with unchanged(unfinished):
        line = refused(2, *argv("cpt_recon", "--out_dir", unfinished))
    assert "holds a run: add --resume to continue it" in line


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["new", "resume"])
def test_checkpoints_without_their_run_json_are_not_overwritten(refused, resume, whole, options):
    (whole / "run.json").unlink()
    with unchanged(whole):
        line = refused(4, *(a for a in resume(whole) if a != "--resume"), *options)
    assert f"{whole / 'run.json'} is missing" in line


def test_a_second_run_in_one_folder_is_told_so(refused, argv, resume, unfinished):
    with refrag.exclusive(unfinished / ".lock", "the run"), unchanged(unfinished):
        for command in (resume(unfinished), argv("cpt_recon", "--out_dir", unfinished)):
            line = refused(75, *command)
            assert f"run {unfinished} is being written by another process" in line


def test_a_folder_that_another_run_made_a_moment_ago_stays(refused, argv, tmp_path, monkeypatch):
    """Two runs are started at once; both found no folder, and the other one has the lock."""
    exclusive = refrag.exclusive
    with contextlib.ExitStack() as other:

        def later(path: Path, *options: object) -> contextlib.AbstractContextManager:
            monkeypatch.setattr(refrag, "exclusive", exclusive)
            other.enter_context(exclusive(path, "the other run"))
            return exclusive(path, *options)

        monkeypatch.setattr(refrag, "exclusive", later)
        assert "another process" in refused(75, *argv("cpt_recon"))
        assert (tmp_path / "run" / ".lock").exists()


# ---- Going on -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_as_if_it_had_not_been_stopped(done, resume, finished, unfinished):
    """What the tests below rely on."""
    assert done(*resume(unfinished))["steps"] == STEPS
    torch.testing.assert_close(weights(unfinished / "step-000004"), weights(finished / "run" / "step-000004"))


def test_a_finished_run_stays_as_it_is(done, resume, whole):
    with unchanged(whole):
        result = done(*resume(whole))
    assert (result["steps"], result["checkpoint"]) == (STEPS, str(whole / "step-000004"))


@pytest.mark.parametrize("left", ["nothing", "empty", "run.json alone"])
def test_a_run_without_a_checkpoint_begins_at_the_first_step(done, resume, whole, left):
    for path in whole.glob("*" if left == "empty" else "step-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "nothing":
        shutil.rmtree(whole)
    assert done(*resume(whole))["steps"] == STEPS
    steps = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 4]


CHANGED = [
    (["--lr", "0.5"], ["--lr was None, now 0.5"]),
    (["--steps", "9", "--seed", "3"], ["--steps was 4, now 9", "--seed was 1337, now 3"]),
    (["--k", "4", "8"], ["--k was [4], now [4, 8]"]),
    (["--train", "pe"], ["--train was p, now pe"]),
    (["--enc", "decoder:1"], ["--enc was decoder:2, now decoder:1"]),
]


@pytest.mark.parametrize(("options", "told"), CHANGED, ids=[" ".join(options) for options, _ in CHANGED])
def test_a_run_does_not_go_on_with_other_options(refused, resume, unfinished, options, told):
    with unchanged(unfinished):
        line = refused(5, *resume(unfinished, *options))
    for part in told:
        assert part in line


def test_a_run_does_not_go_on_with_more_processes_or_fewer(refused, resume, unfinished):
    """A step has a batch of each."""
    facts = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(facts | {"processes": 2}))
    with unchanged(unfinished):
        assert "processes was 2, now 1" in refused(5, *resume(unfinished))


@pytest.mark.parametrize("options", [
    ["--dtype", "bfloat16", "--train", "ped"], ["--dtype", "bfloat16", "--train", "pd", "--lora_r", "2"],
    ["--enc", "BERT", "--train", "pe"]], ids=["bfloat16", "bfloat16 adapters", "separate encoder"])
def test_what_was_trained_is_there_again_bit_by_bit(done, argv, bert, tmp_path, options):
    """In bfloat16 a step is less than what two neighbouring weights differ by: they must not be read as such."""
    options = [str(bert) if option == "BERT" else option for option in options]
    options += ["--lr", "1e-5", "--save_every", "2"]
    done(*argv("cpt_recon", *options, "--out_dir", tmp_path / "whole", steps=4))
    done(*argv("cpt_recon", *options, "--out_dir", tmp_path / "cut", steps=4))
    shutil.rmtree(tmp_path / "cut" / "step-000004")
    done(*argv("cpt_recon", *options, "--out_dir", tmp_path / "cut", "--resume", steps=4))
    one, two = (weights(tmp_path / name / "step-000004") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_phase_hands_on_what_the_one_before_has_trained(done, argv, tmp_path):
    """Adapters follow a decoder that was trained whole: in bfloat16, too, that one is kept as it was."""
    done(*argv("cpt_recon", "--dtype", "bfloat16", "--train", "ped", "--lr", "1e-5", "--out_dir", tmp_path / "one"))
    done(*argv("cpt_next", "--dtype", "bfloat16", "--train", "pd", "--lora_r", "2", "--load_dir", tmp_path / "one",
               "--out_dir", tmp_path / "two"))
    one, two = (weights(refrag.checkpoint_folder(tmp_path / name)) for name in ("one", "two"))
    kept = [name for name in one if name.startswith(("decoder", "encoder"))]
    assert len(kept) > 10 and all(torch.equal(one[name], two[name]) for name in kept)


def test_a_run_does_not_go_on_in_another_phase(refused, argv, unfinished):
    with unchanged(unfinished):
        line = refused(5, *argv("cpt_next", "--out_dir", unfinished, "--resume"))
    assert "was cpt_recon, now cpt_next" in line


@pytest.mark.parametrize("name", ["texts.jsonl", "eval.jsonl"])
def test_a_run_does_not_go_on_with_other_texts_under_the_same_name(refused, finished, resume, unfinished, name):
    path = finished / name
    intact = path.read_bytes()
    path.write_bytes(intact.splitlines(keepends=True)[0] * 2)
    try:
        with unchanged(unfinished):
            assert str(path) in refused(5, *resume(unfinished))
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("content", [b"", b"damaged", b"[]", b"{}", b"\xff", b'{"settings"', b'{"settings": [1]}',
                                     b'{"settings": null}', b'{"settings": {}}', b'{"settings": {}, "data": 5}',
                                     b'{"settings": {}, "data": []}'])
def test_a_damaged_run_json(refused, resume, unfinished, content):
    (unfinished / "run.json").write_bytes(content)
    with unchanged(unfinished):
        assert f"{unfinished / 'run.json'} is damaged" in refused(4, *resume(unfinished))


METRICS = {
    "cut": b'{"step": 4, "lo',
    "cut after a brace": b'{"step": 4, "eval": {"k4/1": {"vectors": {"loss": 6.9}',
    "zeros": b"\0" * 99,
    "zeros and a brace": b"\0" * 99 + b"}\n",
    "invalid UTF-8": b"\xff\xfe\n",
    "no step": b'{"loss": 1}\n',
    "a number": b"5\n",
}


@pytest.mark.parametrize("tail", METRICS.values(), ids=METRICS)
def test_a_damaged_end_of_the_metrics_does_not_stop_a_run(done, resume, unfinished, tail):
    """A process that is killed, or a full disk, can leave any part of the last line."""
    path = unfinished / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    done(*resume(unfinished))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("which", ["unfinished", "whole"])
def test_missing_metrics_do_not_stop_a_run(run, resume, request, which):
    folder = request.getfixturevalue(which)
    (folder / "metrics.jsonl").unlink()
    code, _, err = run(*resume(folder))
    assert code == 0, err


def damage(path: Path, kind: str) -> None:
    """Flip a bit near the end of a file, cut it, or remove it."""
    intact = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(intact[: len(intact) // 2])
    else:
        path.write_bytes(intact[:-5] + bytes([intact[-5] ^ 4]) + intact[-4:])


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["projector.safetensors", "trainer.safetensors", "trainer.json", "config.json",
                                  "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(done, resume, finished, whole, file, kind):
    """The one before it is as good: the run ends where it would have ended."""
    damage(whole / "step-000004" / file, kind)
    assert done(*resume(whole))["steps"] == STEPS
    torch.testing.assert_close(weights(whole / "step-000004"), weights(finished / "run" / "step-000004"))


def test_passing_over_is_told(run, resume, whole):
    damage(whole / "step-000004" / "projector.safetensors", "flipped")
    _, _, err = run(*(a for a in resume(whole) if a != "--quiet"))
    assert "step-000004/projector.safetensors is damaged (checksum)" in err
    assert "falling back to the checkpoint before it" in err


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(refused, resume, whole):
    for folder in whole.glob("step-*"):
        damage(folder / "projector.safetensors", "flipped")
    with unchanged(whole):
        line = refused(4, *resume(whole))
    assert f"every checkpoint in {whole} is damaged" in line
    assert "step-000004" in line


def test_what_a_killed_save_left_is_removed(done, resume, unfinished):
    left = unfinished / ".step-000004.99999999.tmp"
    shutil.copytree(unfinished / "step-000003", left)
    done(*resume(unfinished))
    assert not left.exists()


def test_a_checkpoint_moved_aside_by_a_killed_save_comes_back(done, load, checkpoint):
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.99999999.old"))
    assert done(*load(checkpoint))["steps"] == 1


# ---- Checkpoints to start from --------------------------------------------------------------------------------------


def test_a_run_starts_from_a_checkpoint_or_from_a_run(done, load, checkpoint, whole, tmp_path):
    """What the tests below rely on."""
    with unchanged(checkpoint), unchanged(whole):
        results = [done(*load(folder, "--out_dir", tmp_path / name)) for name, folder in
                   (("one", checkpoint), ("two", whole))]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_no_checkpoint_to_start_from(refused, load, tmp_path, kind):
    path = tmp_path / "nothing"
    if kind != "missing":
        path.mkdir() if kind == "empty" else path.write_text("precious")
    assert f"--load_dir {path}" in refused(2, *load(path))


class Malice:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def malice(tmp_path):
    """The bytes of such a pickle; at the end of the test it must not have been executed."""
    victim = tmp_path / "executed"
    content = pickle.dumps(Malice(victim))
    pickle.loads(content).close()
    assert victim.exists()  # it works
    victim.unlink()
    yield content
    assert not victim.exists()


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.pkl", "model.ckpt"])
def test_a_pickle_is_refused(refused, load, write, malice, name):
    assert "is a pickle, which can run code" in refused(2, *load(write(name, malice)))


@pytest.mark.parametrize("config", [False, True], ids=["alone", "with config.json"])
def test_a_folder_of_pickles_is_refused(refused, load, checkpoint, malice, config):
    for path in checkpoint.iterdir():
        if path.name != "config.json" or not config:
            path.unlink()
    for name in ("projector.bin", "projector.pt", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(malice)
    line = refused(2, *load(checkpoint))
    assert ("can run code" if config else "no checkpoint in this folder") in line


def test_a_pickle_beside_a_checkpoint_is_not_read(done, load, checkpoint, malice):
    for name in ("projector.bin", "trainer.pt", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(malice)
    assert done(*load(checkpoint))["steps"] == 1


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no manifest"])
def test_a_pickle_that_is_called_safetensors_is_not_read(refused, load, checkpoint, malice, manifest):
    (checkpoint / "projector.safetensors").write_bytes(malice)
    (checkpoint / "manifest.json").unlink()
    if manifest:
        refrag.write_manifest(checkpoint / "manifest.json", checkpoint, {}, refrag.CHECKPOINT_FORMAT)
    assert "projector.safetensors is damaged" in refused(4, *load(checkpoint))


@pytest.mark.parametrize("flag", ["--dec", "--enc"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_model_folder_of_pickles_is_not_executed(refused, argv, llama, tmp_path, malice, flag):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(malice)
    assert f"model {folder} could not be loaded" in refused(3, *argv("cpt_recon", flag, folder))


@pytest.mark.parametrize("flag", ["--dec", "--enc"])
def test_a_damaged_model_folder(refused, argv, llama, tmp_path, flag):
    folder = shutil.copytree(llama, tmp_path / "model")
    damage(folder / "model.safetensors", "truncated")
    assert f"model {folder} is damaged" in refused(4, *argv("cpt_recon", flag, folder))


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["projector.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_damaged_file_of_a_checkpoint_is_named(refused, load, checkpoint, tmp_path, file, kind):
    damage(checkpoint / file, kind)
    line = refused(4, *load(checkpoint))
    assert f"{checkpoint / file} is " in line
    assert not (tmp_path / "next" / "run.json").exists()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_card_is_free_to_change(run, load, checkpoint, listed, kind):
    """Also that of a checkpoint whose manifest lists it, as the first ones did."""
    if listed:
        (checkpoint / "manifest.json").unlink()
        refrag.write_manifest(checkpoint / "manifest.json", checkpoint, {}, refrag.CHECKPOINT_FORMAT)
    assert ("README.md" in json.loads((checkpoint / "manifest.json").read_text())["files"]) == listed
    damage(checkpoint / "README.md", kind)
    code, _, err = run(*load(checkpoint))
    assert code == 0, err


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_a_damaged_part_is_named_also_without_a_manifest(refused, load, checkpoint, kind):
    (checkpoint / "manifest.json").unlink()
    damage(checkpoint / "projector.safetensors", kind)
    assert f"{checkpoint / 'projector.safetensors'} is " in refused(4, *load(checkpoint))


def test_a_damaged_manifest_is_named(refused, load, checkpoint):
    damage(checkpoint / "manifest.json", "flipped")
    assert f"{checkpoint / 'manifest.json'} is damaged" in refused(4, *load(checkpoint))


def test_a_checkpoint_of_a_later_program_does_not_fit(refused, load, checkpoint):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text()) | {"version": refrag.MANIFEST_VERSION + 1}
    path.write_text(json.dumps(manifest | {"digest": refrag.manifest_digest(manifest)}))
    assert "update the program" in refused(5, *load(checkpoint))


@pytest.mark.parametrize("content", ['{"model_type": "refrag"', "[]", "null", "\0"])
def test_a_damaged_configuration_is_named(refused, load, checkpoint, content):
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "config.json").write_text(content)
    assert f"{checkpoint / 'config.json'} is damaged" in refused(4, *load(checkpoint))


@pytest.mark.parametrize("wrong", [{"decoder_name_or_path": 5}, {"encoder_name_or_path": ["decoder:2"]}, {"lora": 5},
                                   {"training_model": None}], ids=str)
def test_a_configuration_of_wrong_types_is_named(refused, load, checkpoint, wrong):
    (checkpoint / "manifest.json").unlink()
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    assert f"{checkpoint / 'config.json'} is damaged" in refused(4, *load(checkpoint))


def test_a_flipped_byte_of_the_configuration_is_damage(refused, load, checkpoint, llama):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace(str(llama), f"{str(llama)[:-1]}?"))
    assert "is damaged" in refused(4, *load(checkpoint, "--dec", llama))


def test_the_folder_of_a_decoder_is_no_checkpoint(refused, load, llama):
    for options in ([], ["--dec", llama]):
        assert f"--load_dir {llama}: no checkpoint in this folder" in refused(2, *load(llama, *options))


def test_a_tensor_of_another_shape_is_named(refused, load, checkpoint):
    path = checkpoint / "projector.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    safetensors.torch.save_file(tensors | {name: torch.zeros(3, 5)}, path)
    (checkpoint / "manifest.json").unlink()
    refrag.write_manifest(checkpoint / "manifest.json", checkpoint, {}, refrag.CHECKPOINT_FORMAT)
    assert f"tensor {name} has shape (3, 5), the model has " in refused(5, *load(checkpoint))


@pytest.mark.parametrize("kind", ["missing", "unknown"])
def test_a_tensor_too_few_or_too_many_is_named(refused, load, checkpoint, kind):
    path = checkpoint / "projector.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(iter(tensors)) if kind == "missing" else "surplus.weight"
    if kind == "missing":
        del tensors[name]
    safetensors.torch.save_file(tensors if kind == "missing" else tensors | {name: torch.zeros(3)}, path)
    (checkpoint / "manifest.json").unlink()
    refrag.write_manifest(checkpoint / "manifest.json", checkpoint, {}, refrag.CHECKPOINT_FORMAT)
    assert f"tensor {name} has shape " in refused(5, *load(checkpoint))


@pytest.mark.parametrize(("flag", "value"), [("--dec", "/another/decoder"), ("--enc", "decoder:1"),
                                             ("--enc", "all-MiniLM-L6-v2"), ("--pooling", "cls"),
                                             ("--projector", "mlp")])
def test_a_checkpoint_of_other_models_does_not_fit(refused, load, checkpoint, flag, value):
    with unchanged(checkpoint):
        line = refused(5, *load(checkpoint, flag, value))
    assert re.search(rf"--load_dir \S+ was made with {flag} \S+, not {value}:", line)


def scaled(folder: Path) -> None:
    """Change the weights of a model folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("flag", ["--dec", "--enc"])
def test_a_model_that_changed_under_its_name_does_not_fit(done, refused, argv, load, llama, bert, tmp_path, flag):
    folder = shutil.copytree(llama if flag == "--dec" else bert, tmp_path / "model")
    trained = done(*argv("cpt_recon", flag, folder, "--train", "p", "--k", "16"))["checkpoint"]
    assert done(*load(trained, "--out_dir", tmp_path / "before"))["steps"] == 1
    scaled(folder)
    assert str(folder) in refused(5, *load(trained))


def test_a_run_of_damaged_checkpoints_to_start_from(refused, load, whole):
    for folder in whole.glob("step-*"):
        damage(folder / "projector.safetensors", "flipped")
    with unchanged(whole):
        assert f"every checkpoint in {whole} is damaged" in refused(4, *load(whole))


# ---- Losses that are no numbers -------------------------------------------------------------------------------------


@pytest.fixture
def ill(llama, tmp_path) -> Path:
    """A decoder with one weight that is no number."""
    folder = shutil.copytree(llama, tmp_path / "ill")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("text", ["\U0001f642" * 12, " \n\t" * 20], ids=["one token", "blanks"])
def test_texts_without_an_anchor_inside(refused, argv, write, bert, text):
    """To the encoder each is one token, or none: there is nothing to align within."""
    line = refused(2, *argv("cpt_align", "--train_json", write("odd.jsonl", [{"text": text}] * 3), "--enc", bert))
    assert re.search(r"odd\.jsonl:[1-3] and the other texts leave nothing to predict", line)


def test_texts_without_an_anchor_among_others_are_passed_over(done, argv, write, bert):
    texts = write("odd.jsonl", [{"text": "\U0001f642" * 12}] * 9 + TEXTS)
    assert done(*argv("cpt_align", "--train_json", texts, "--enc", bert, "--batch_size", "1", steps=8))["steps"] == 8


def test_each_text_with_a_loss_that_is_no_number_is_named_in_full(refused, argv, write, ill):
    texts = write(f"{'long' * 20}.jsonl", TEXTS)
    line = refused(2, *argv("cpt_recon", "--dec", ill, "--train_json", texts))
    place = rf"{re.escape(str(texts))}:[1-4]"
    assert re.search(rf"the loss is nan on {place}(, {place})*( and \d+ more)?: lower", line)


@pytest.mark.parametrize("phase", PHASES)
def test_a_loss_that_is_no_number_names_the_step_and_the_texts(refused, argv, ill, tmp_path, phase):
    line = refused(2, *argv(phase, "--dec", ill))
    place = r"question \d" if phase == "sft" else rf"{re.escape(str(tmp_path / 'texts.jsonl'))}:[1-4]"
    assert re.search(rf"step 1: the loss is nan on {place}(, |: )", line)
    assert list((tmp_path / "run").glob("step-*")) == []


def test_an_evaluation_that_is_no_number(refused, argv, write, ill, tmp_path):
    line = refused(2, *argv("cpt_recon", "--dec", ill, "--eval_json", write("eval.jsonl", TEXTS)))
    assert "step 0: the held-out loss is nan" in line
    assert list((tmp_path / "run").glob("step-*")) == []


def test_the_checkpoint_before_a_loss_that_is_no_number_stays(
    done, refused, resume, load, finished, unfinished, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched, unchanged(unfinished / "step-000003"):
        patched.setattr(refrag, "loss_terms", lambda *_: {"text": torch.tensor(torch.nan, requires_grad=True)})
        line = refused(2, *resume(unfinished))
    assert re.search(rf"step 4: the loss is nan on {re.escape(str(finished / 'texts.jsonl'))}:[1-4](, |: )", line)
    assert [p.name for p in unfinished.glob("*step-*")] == ["step-000003"]
    assert done(*load(unfinished))["steps"] == 1
    assert done(*resume(unfinished))["steps"] == STEPS


def test_a_learning_rate_beyond_all_measure(refused, argv, tmp_path):
    line = refused(2, *argv("cpt_recon", "--lr", "1e30", "--train", "ped", "--save_every", "1", steps=9))
    assert re.search(r"step 2: the (loss|gradient) is (nan|inf) on \S+texts\.jsonl:[1-4](, |: )", line)
    assert refrag.RefragModel.from_pretrained(tmp_path / "run").config.history[-1]["steps"] == 1


def test_weights_that_are_no_numbers_are_not_saved(refused, argv, tmp_path):
    line = refused(2, *argv("cpt_recon", "--weight_decay", "1e38", "--lr", "1e30", steps=1))
    assert re.search(r"step 1: .* holds values that are no numbers, so this checkpoint is not written", line)
    assert list((tmp_path / "run").glob("*step-*")) == []


# ---- Full disks and folders that can not be written -----------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """Mount something on a new folder and return it; unmounted at the end. Skips where mounting is not permitted."""
    mounted = []

    def call(*argv: object) -> Path:
        point = tmp_path / "mounted"
        point.mkdir()
        command = ["mount", *map(str, argv), str(point)]
        done = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True)
        if not done or done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip() if done else 'no mount program'}")
        mounted.append(point)
        return point

    yield call
    for point in mounted:
        if subprocess.run(["umount", str(point)]).returncode:
            subprocess.run(["umount", "--lazy", str(point)], check=True)


PAGE = 4096  # what tmpfs counts in


def leave_room(disk: Path, pages: int) -> Path:
    """Fill a disk but for some pages; returns the file to remove."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - pages * PAGE))
    return filler


@posix
def test_a_full_disk_leaves_the_checkpoint_and_the_run_goes_on_afterwards(
    run, done, load, mount, resume, finished, unfinished, tmp_path
):
    """The disk gets more room page by page, so that every step of a save meets its end, until one run succeeds."""
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    folder = shutil.copytree(unfinished, disk / "run")
    before = state(folder / "step-000003")
    for pages in range(0, 99, 2):
        filler = leave_room(disk, pages)
        code, out, err = run(*resume(folder), "--json")
        if code == 0:
            break
        assert (code, err.count("\n")) == (6, 1), f"with room for {pages} pages: {err}"
        assert json.loads(out)["error"]["code"] == 6
        assert state(folder / "step-000003") == before
        assert [p.name for p in folder.iterdir() if p.name.endswith((".tmp", ".old"))] == []
        if (folder / "step-000004").exists():  # the save was done, the picture not
            refrag.verify_checkpoint(folder / "step-000004", required=True)
            shutil.rmtree(folder / "step-000004")
    assert 4 < pages < 98, "not one run failed, or not one succeeded"
    filler.unlink()
    torch.testing.assert_close(weights(folder / "step-000004"), weights(finished / "run" / "step-000004"))
    assert done(*load(folder))["steps"] == 1


@posix
def test_a_full_disk_right_at_the_start(run, done, mount, argv, monkeypatch):
    """The cache of tokens and the run's folder are on it."""
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    monkeypatch.setenv("REFRAG_HOME", str(disk / "home"))
    for pages in (0, 1, 2, 4, 8, 16):
        filler = leave_room(disk, pages)
        code, _, err = run(*argv("cpt_recon", "--out_dir", disk / "run", "--resume"))
        assert (code, err.count("\n")) == (6, 1), f"with room for {pages} pages: {err}"
    filler.unlink()
    assert done(*argv("cpt_recon", "--out_dir", disk / "run", "--resume"))["steps"] == 1


@posix
def test_a_read_only_folder_is_refused_before_any_work(refused, argv, resume, mount, unfinished, monkeypatch):
    locked = mount("-o", "bind,ro", unfinished)
    monkeypatch.setattr(refrag, "load_model", lambda *_: pytest.fail("worked before it looked"))
    with unchanged(locked):
        for command in (resume(locked), argv("cpt_recon", "--out_dir", locked / "new")):
            assert "Read-only file system" in refused(2, *command)


@posix
def test_a_checkpoint_in_a_read_only_folder_can_be_started_from(done, load, mount, whole):
    assert done(*load(mount("-o", "bind,ro", whole)))["steps"] == 1


# ---- Questions ------------------------------------------------------------------------------------------------------

GOOD, SPOILED = QUESTIONS[:2], QUESTIONS[2]
QUESTION_FILES = {
    "empty": (b"", "--rag_json PATH: the file holds no question"),
    "blank lines": (b"\n \n", "--rag_json PATH: the file holds no question"),
    "malformed": (b'{"question": "a"}\n{"question": \n', "PATH:2: malformed JSON"),
    "a list": (b"[1]\n", "PATH:1: expected a JSON object, got int"),
    "invalid UTF-8": (b'{"question": "\xff"}\n', "PATH: invalid UTF-8 at byte 14"),
    "no question": ([*GOOD, {"answers": ["x"]}], "PATH:3: no question (nor query, text) among its keys: answers"),
    "empty question": ([*GOOD, SPOILED | {"question": " "}], "PATH:3: the question is empty"),
    "ids twice": ([q | {"id": 7} for q in QUESTIONS], "PATH: ids are not unique"),
    "no answers": ([*GOOD, {"question": "Who?"}], "PATH: question 3 has no list of answers"),
    "answers null": ([*GOOD, SPOILED | {"answers": None}], "PATH: question 3 has no list of answers"),
    "answers empty": ([q | {"answers": []} for q in QUESTIONS], "PATH: no question has an answer"),
    "answers a string": ([*GOOD, SPOILED | {"answers": "Ada"}], "PATH: question 3 has no list of answers"),
    "answers numbers": ([*GOOD, SPOILED | {"answers": [1843]}], "PATH: question 3 has no list of answers"),
    "answers blank": ([*GOOD, SPOILED | {"answers": ["Ada", " "]}], "PATH: question 3 has no list of answers"),
    "half a pair": ([q | {"answers": ["\ud800"]} for q in QUESTIONS],
                    "PATH: question 1: an answer holds half of a surrogate pair"),
    "positive_ids 5": ([*GOOD, SPOILED | {"positive_ids": 5}],
                       "PATH: question 3: positive_ids must be a list of ids"),
    "positive_ids [[]]": ([*GOOD, SPOILED | {"positive_ids": [["c"]]}],
                          "PATH: question 3: id must be a string, got list"),
    "positive_ids abc": ([*GOOD, SPOILED | {"positive_ids": "abc"}],
                         "PATH: question 3: positive_ids must be a list of ids"),
    "positive_ids {}": ([*GOOD, SPOILED | {"positive_ids": {"c": 1}}],
                        "PATH: question 3: positive_ids must be a list of ids"),
}


@pytest.mark.parametrize("case", QUESTION_FILES)
def test_a_bad_question_file_is_refused(refused, argv, write, tmp_path, case):
    content, told = QUESTION_FILES[case]
    path = write("bad.jsonl", content)
    assert told.replace("PATH", str(path)) in refused(2, *argv("sft", "--rag_json", path))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_bad_question_file_for_the_evaluation_is_refused(refused, argv, write, tmp_path):
    path = write("bad.jsonl", [*GOOD, SPOILED | {"answers": None}])
    line = refused(2, *argv("sft", "--eval_json", path))
    assert f"--eval_json {path}: question 3 has no list of answers" in line
    assert f"--eval_json {tmp_path / 'no'}: no such file" in refused(2, *argv("sft", "--eval_json", tmp_path / "no"))


def test_a_question_file_that_is_not_there(refused, argv, tmp_path):
    assert f"--rag_json {tmp_path / 'no'}: no such file" in refused(2, *argv("sft", "--rag_json", tmp_path / "no"))
    command = argv("sft")
    assert "--rag_json is missing" in refused(2, "sft", *command[3:])


def test_a_truncated_gzip_question_file(refused, argv, write):
    path = write("questions.jsonl.gz", gzip.compress(json.dumps(QUESTIONS[0]).encode() * 99)[:-9])
    assert f"{path}: not a complete gzip file" in refused(4, *argv("sft", "--rag_json", path))


@pytest.mark.parametrize("kind", ["no flag", "missing", "empty", "file"])
def test_no_index_to_learn_from(refused, argv, tmp_path, kind):
    command = argv("sft", "--index_dir", tmp_path / "index")
    if kind == "no flag":
        at = command.index("--index_dir")
        command = [*command[:at], *command[at + 2 : -2]]
    elif kind != "missing":
        (tmp_path / "index").mkdir() if kind == "empty" else (tmp_path / "index").write_text("precious")
    assert "--index_dir" in refused(2, *command)
    assert not (tmp_path / "run").exists()


def test_a_damaged_index_to_learn_from(refused, argv, index_dir, tmp_path):
    index = shutil.copytree(index_dir, tmp_path / "index")
    damage(index / "gen-1" / "texts.npy", "flipped")
    assert "texts.npy is damaged" in refused(4, *argv("sft", "--index_dir", index))


def test_an_index_of_another_embedder(refused, argv, other_embedder):
    command = argv("sft", "--retriever", "dense", "--embed_model", other_embedder)
    assert "use the same --embed_model or build the index again" in refused(5, *command)


@pytest.mark.parametrize("value", ["none", None, []])
def test_questions_without_positive_ids_are_learned_from_what_is_found(done, argv, write, value):
    questions = [q | {"positive_ids": value} for q in QUESTIONS]
    if value == "none":
        questions = [{key: q[key] for key in ("question", "answers")} for q in QUESTIONS]
    assert done(*argv("sft", "--rag_json", write("q.jsonl", questions)))["steps"] == 1


def test_questions_on_another_index_do_not_fit(refused, argv, write):
    questions = [q | {"positive_ids": ["unknown"]} for q in QUESTIONS]
    assert "positive_ids" in refused(5, *argv("sft", "--rag_json", write("q.jsonl", questions)))


def test_questions_may_name_a_piece_of_a_document(done, argv, corpus, llama, write, tmp_path):
    done("index", "--corpus", corpus, "--index_dir", tmp_path / "i", "--retriever", "bm25", "--dec", llama,
         "--max_passage_tokens", "16", "--overlap", "0", *QUIET)
    index = refrag.open_index(str(tmp_path / "i"))
    assert [index.ids[row] for row in range(3)] == ["a#1", "a#2", "b#1"]
    questions = write("q.jsonl", [QUESTIONS[0] | {"positive_ids": ["a#1"]}])
    assert done(*argv("sft", "--rag_json", questions, "--index_dir", tmp_path / "i"))["steps"] == 1


def test_a_run_does_not_go_on_with_another_index(done, refused, argv, corpus, llama, write, tmp_path):
    build = ["index", "--index_dir", tmp_path / "i", "--retriever", "bm25", "--dec", llama, *QUIET, "--corpus"]
    command = argv("sft", "--index_dir", tmp_path / "i")
    done(*build, corpus)
    done(*command)
    done(*build, write("other.jsonl", [{"id": "a", "text": "A text about Lake Geneva."}]))
    with unchanged(tmp_path / "run"):
        assert f"--resume with what has changed: {tmp_path / 'i'} was " in refused(5, *command, "--resume")


def test_a_tokenizer_without_an_end_token_can_not_learn_to_stop(refused, argv, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "endless")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id is None
    assert "the decoder's tokenizer has no end token" in refused(2, *argv("sft", "--dec", folder))


# ---- Interrupts -----------------------------------------------------------------------------------------------------

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def stop_in(monkeypatch):
    """Send this process a signal just before a function of the program is called for the n-th time."""

    def call(owner: object, name: str, sig: int, calls: int = 1) -> None:
        original, left = getattr(owner, name), [calls]

        def stopped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(sig)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stopped)

    return call


@pytest.mark.parametrize(("sig", "code"), SIGNALS)
@pytest.mark.parametrize(("method", "calls", "every", "last"), [
    ("run_step", 2, 99, 2),
    ("run_pass", 3, 99, 2),
    ("save", 1, 2, 3),  # the save of step 2 is finished, then the next step
])
def test_an_interrupted_run_saves_and_goes_on(
    refused, done, resume, stop_in, finished, tmp_path, method, calls, every, last, sig, code
):
    """The step is finished and a checkpoint written, and what follows is what would have followed."""
    stop_in(refrag.Trainer, method, sig, calls)
    assert refused(code, *resume(tmp_path / "run", "--save_every", every)) == "interrupted"
    assert refrag.newest_checkpoint(tmp_path / "run").name == f"step-{last:06d}"
    assert done(*resume(tmp_path / "run"))["steps"] == STEPS
    torch.testing.assert_close(weights(tmp_path / "run" / "step-000004"), weights(finished / "run" / "step-000004"))


@pytest.mark.parametrize(("sig", "code"), SIGNALS)
@pytest.mark.parametrize("function", ["load_model", "tokenize_text", "load_teacher"])
def test_an_interrupt_before_the_first_step_leaves_at_once(
    refused, done, argv, stop_in, tmp_path, home, function, sig, code
):
    stop_in(refrag, function, sig)
    assert refused(code, *argv("cpt_recon")) == "interrupted"
    assert list((home / "tokens").glob(".*")) == []
    assert list((tmp_path / "run").glob("*step-*")) == []
    assert done(*argv("cpt_recon", "--resume"))["steps"] == 1


@pytest.mark.parametrize(("sig", "code"), SIGNALS)
def test_a_second_interrupt_leaves_at_once(refused, resume, stop_in, unfinished, sig, code):
    with unchanged(unfinished / "step-000003"):
        stop_in(refrag.Trainer, "run_pass", sig)
        stop_in(refrag, "loss_terms", sig)
        assert refused(code, *resume(unfinished)) == "interrupted"
    assert [p.name for p in unfinished.glob("*step-*")] == ["step-000003"]


@pytest.mark.slow
@posix
def test_ctrl_c_and_sigterm_during_a_run(refused, done, argv, load, tmp_path):
    """Real processes, in the midst of their steps. A second run in the same folder is refused meanwhile."""
    runs = []
    with contextlib.ExitStack() as stack:
        for sig, code in SIGNALS:
            folder = tmp_path / sig.name
            command = argv("cpt_recon", "--out_dir", folder, "--log_every", "1", steps=1_000_000)
            command = [sys.executable, refrag.__file__, *map(str, command), *(["--json"] if code == 143 else [])]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            stack.callback(process.kill)
            runs.append((sig, code, folder, process))
        for sig, code, folder, process in runs:
            while not (folder / "metrics.jsonl").exists() or b"loss" not in (folder / "metrics.jsonl").read_bytes():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            for options in ([], ["--resume"]):
                assert "another process" in refused(75, *argv("cpt_recon", "--out_dir", folder, *options))
            process.send_signal(sig)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (code, b"error: interrupted\n")
            assert out == (b"" if code == 130 else b'{"error": {"code": 143, "message": "interrupted"}}\n')
            assert done(*load(folder, "--out_dir", tmp_path / f"after {sig.name}"))["steps"] == 1


# ---- align ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def aligned(llama, bert):
    """The command line of `align` with the tiny models."""
    return lambda *options: ["align", "--dec", llama, "--enc", bert, *QUIET, *options]


def test_align_without_a_text(refused, aligned):
    assert "--text is missing" in refused(2, *aligned())
    assert "--text is missing" in refused(2, *aligned("--text", ""))


@pytest.mark.parametrize("text", [" ", "\n \t\n"])
def test_align_of_blanks_has_no_anchor(run, done, aligned, text):
    result = done(*aligned("--text", text))
    assert (result["encoder_tokens"], result["exact_anchors"], result["anchors"]) == (0, 0, 0)
    assert "".join(piece for span in result["spans"] for piece in span["decoder"]) == text
    assert run(*aligned("--text", text))[0] == 0


@pytest.mark.parametrize("text", ["a\0b", "\u0301", "\U0001f642" * 3, "\u200b", "\ufeffx", "x" * 3000])
def test_align_of_odd_characters(run, done, aligned, text):
    result = done(*aligned("--text", text))
    assert "".join(piece for span in result["spans"] for piece in span["decoder"]) == text
    assert run(*aligned("--text", text))[0] == 0


def test_align_of_a_text_that_is_no_unicode(refused, aligned):
    """What a shell passes for a byte that is no UTF-8."""
    assert "--text" in refused(2, *aligned("--text", "a\udcffb"))


SPECIAL = "end<|im_end|>of [SEP] a [MASK] line <|endoftext|>"


def test_align_of_special_tokens_shows_all_of_the_text(done, aligned):
    result = done(*aligned("--text", SPECIAL))
    shown = "".join(piece for span in result["spans"] for piece in span["decoder"])
    assert [a for a, b in zip(shown, SPECIAL, strict=True) if a != b and b not in "<["] == []


def test_align_reads_special_tokens_as_training_does(done, aligned):
    pieces = [piece for span in done(*aligned("--text", SPECIAL))["spans"] for piece in span["decoder"]]
    assert not {"<|im_end|>", "<|endoftext|>"} & set(pieces)


def test_training_reads_special_tokens_as_text(done, argv, write, home, llama):
    """In a text they are letters: no token of the decoder may come from them."""
    done(*argv("cpt_align", "--train_json", write("special.jsonl", [{"text": SPECIAL * 3}])))
    (folder,) = (home / "tokens").glob("*/")
    special = set(transformers.AutoTokenizer.from_pretrained(llama).all_special_ids)
    assert not special & set(refrag.map_array(folder / "tokens.npy").tolist())


def test_align_with_models_that_are_not_there(refused, aligned, tmp_path):
    assert "model folder /nowhere/model is not there" in refused(3, *aligned("--text", "a", "--dec", "/nowhere/model"))
    assert f"--load_dir {tmp_path / 'none'}: " in refused(2, *aligned("--text", "a", "--load_dir", tmp_path / "none"))
