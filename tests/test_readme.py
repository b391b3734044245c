"""The README's commands run, on the bundled models, and its flags and files exist."""

import io
import json
import re
import shlex
import sys

import pytest
from writers import ROOT

import refrag

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"python refrag\.py ([^`\n]+)", TEXT) if not line.startswith("COMMAND")]


def test_every_command_is_shown_and_what_is_shown_exists():
    assert {refrag.parse(shlex.split(line))[0] for line in COMMANDS} == set(refrag.COMMANDS)
    known = {f"--{name}" for c in refrag.COMMANDS.values() for name in refrag.config_fields(c.configs)}
    known |= {"--test", "--dry_run", "--help"}  # the quickstart's own
    named = {flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"--[a-z][a-z_-]+", TEXT)}
    assert named <= known
    assert [target for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT) if not (ROOT / target).exists()] == []


@pytest.mark.models
@pytest.mark.timeout(900)
def test_the_commands_run_in_order(tmp_path, run, shared, monkeypatch, write):
    """Their own words, on 10 passages, 2 questions, with short answers from 2 passages and one short training step."""
    notes = write("my notes/hours.md", "The library closes at eight.\n").parent
    lines = (ROOT / "data/wiki_questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    questions, more = write("questions.jsonl", "".join(lines[:2])), write("more.jsonl", [{"text": "It is in Bern."}])
    for line in COMMANDS:
        if line.startswith(("serve", "mcp")):  # would not end; their tests start them
            continue
        argv = [re.sub(r"^runs/", f"{tmp_path}/", word) for word in shlex.split(line)]
        theirs = {"data/wiki_questions.jsonl": str(questions), "~/notes": str(notes),
                  "more.jsonl": str(more), "notes/hours.md": "my notes/hours.md",
                  "milvus+http://localhost:19530/notes": f"milvus+file:{tmp_path}/milvus"}  # no server is needed
        argv = [theirs.get(word) or re.sub(r"^data/", f"{ROOT}/data/", word) for word in argv]
        step = ["--steps", "1", "--batch_size", "1", "--seq_tokens", "64"]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who coined the term cells?\n")))
        short = ["--max_new", "6", "--topk", "2"]
        argv += {"index": ["--limit", "10"], "generate": short, "chat": short, "eval": [*short, "--limit", "1"],
                 "cpt_align": step, "cpt_recon": step, "cpt_next": step, "sft": [*step, *short[2:]],
                 "train": [*step, *short[2:], "--limit", "20"],
                 "train_policy": [*step[:4], *short[2:]], "export": short[2:],
                 "bench": ["--contexts", "64", "--repeats", "1", "--new", "2"]}.get(argv[0], [])
        code, out, err = run(*argv)
        assert code == 0, f"{line}\n{err}"
        assert out or "--out" in argv, line
    answers = [json.loads(answer) for answer in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [a["id"] for a in answers] == [json.loads(line)["id"] for line in lines[:2]]
