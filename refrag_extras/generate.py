"""`refrag.py generate`: answers with citations and times, for people, as JSON or as a file that can be continued. Also
what it shares with the other commands that answer."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import refrag
from refrag import (
    GenerateConfig,
    IndexConfig,
    PackConfig,
    Pipeline,
    QuestionConfig,
    ReaderConfig,
    RuntimeConfig,
    SearchConfig,
    require,
)
from refrag_extras.runs import append_line, finished_lines


def read_questions(ask: QuestionConfig) -> list[dict[str, Any]]:
    """The question, or those of the file, as {id, question, ...}. Raises UserError."""
    require((ask.question is None) != (ask.questions is None), "name one of --question and --questions")
    if ask.questions is not None:
        return refrag.read_question_file(ask.questions, "--questions")
    return [{"id": "1", "question": refrag.check_question(ask.question, "--question")}]


def read_prompt(text: str | None, ask: QuestionConfig) -> list[dict[str, Any]] | None:
    """--prompt as the one question, None without it. Raises UserError."""
    if text is None:
        return None
    require(ask.question is None and ask.questions is None, "name one of --prompt, --question and --questions")
    require(bool(text.strip()), "--prompt is empty")
    labels = [label for _, label in refrag.split_docs(text) if label is not None]
    require(len(set(labels)) == len(labels), "--prompt: two <doc> blocks have the same id")
    for part, label in refrag.split_docs(text):
        if label is None and (tag := refrag.DOC_TAG.search(part)):
            raise refrag.UserError(f"--prompt: {part[tag.start() :][:40]!r} opens or closes no document: write "
                                   "<doc id=\"ID\">..</doc>, not one inside another")
    return [{"id": "1", "question": text}]


def answering(ask: QuestionConfig | None, index: IndexConfig, search: SearchConfig, pack: PackConfig,
              generate: GenerateConfig, models: ReaderConfig, runtime: RuntimeConfig) -> Pipeline:
    """The pipeline of a command that answers. ask: None if the questions come later."""
    require(generate.prompt is None or ask is not None, "--prompt goes with generate: here the questions come later")
    require(generate.prompt is None or pack.mode != "none", "--mode none goes without the documents of --prompt")
    require(generate.batch_size == 1 or not generate.compare, "--compare needs --batch_size 1")
    require(not generate.resume or generate.out is not None, "--resume needs --out FILE, the file to continue")
    if generate.out is not None:
        out, folder = Path(generate.out), Path(generate.out).resolve().parent
        require(ask is not None and ask.questions is not None, "--out goes with --questions")
        require(folder.is_dir() and os.access(folder, os.W_OK), f"--out {out}: the folder cannot be written")
        require(generate.resume or not out.exists(),
                f"--out {out} exists: add --resume to continue it, or name another file")
    return refrag.load_pipeline(index, search, pack, generate, models, runtime)


def unanswered(questions: list[dict[str, Any]], out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions without a line in `out`, whatever their ids (often line numbers); a taken id gets -2, -3, .."""
    lines, waiting = finished_lines(out, settings, "--out"), []
    done, ids = collections.Counter(line.get("question") for line in lines), {line["id"] for line in lines}
    for item in questions:
        done[item["question"]] -= 1
        if done[item["question"]] < 0:
            free = (f"{item['id']}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
            waiting.append(item | {"id": next(name for name in free if name not in ids)})
            ids.add(waiting[-1]["id"])
    return waiting


def explain_line(chunk: dict[str, Any]) -> str:
    shares = ", ".join(f"{group} {value:+.2f}" for group, value in chunk["shares"].items()) or "no shares"
    text = " ".join(chunk["text"].split())
    return f"{chunk['score']:9.3f}  {chunk['why']} ({shares})  {chunk['passage_id']}: {text[:80]}"


HOW_READ = {"text": "read as text", "partly": "partly read as text", "vectors": "compressed", "left out": "left out"}


def unfounded(result: dict[str, Any]) -> str:
    """Why an answer rests on no passage."""
    why = "fits --ctx_max" if result["dropped_passages"] else "was found"
    return f"no passage {why}: the answer is the decoder's own"


def answer_text(result: dict[str, Any], shown: bool) -> str:
    """An answer for people, with citations and times. shown: it was streamed already."""
    m = result["metrics"]
    lines = ["" if shown else result["answer"], ""]
    for c in result["citations"]:
        how = "not among the passages given" if c["forged"] else HOW_READ[c["read"]]
        how += ", chosen after the answer" if c["chosen"] else ""
        name = f"{c['title']} ({c['source']})" if c["title"] else c["source"]
        lines.append(f"[{c['label']}] {name}, {how}")
    if not result["citations"]:
        lines.append("no citation")
    read = {passage["read"] for passage in result["passages"]}
    if not read and result["settings"]["mode"] != "none" and result["settings"]["index_dir"]:
        lines.append(unfounded(result))
    elif read and not read & {"text", "partly"}:
        lines.append("no passage was read as text")
    stages = ", ".join(f"{name.removesuffix('_s')} {1000 * value:.0f}" for name, value in m["stages"].items())
    lines += [f"{m['full_positions']:,} positions of full context -> {m['positions']:,} fed ({m['compression']:.1f}x), "
              f"{100 * m['p_realised']:.0f}% of the context as text",
              f"first token after {1000 * m['ttft_s']:.0f} ms ({stages}); then {m['tokens_per_s'] or 0:.1f} tokens/s"]
    lines += [explain_line(chunk) for chunk in result["chunks"] if "why" in chunk]
    if "full" in result:
        full = result["full"]
        lines.append(f"full context: first token after {1000 * full['metrics']['ttft_s']:.0f} ms, "
                     f"{result['ttft_ratio']:.1f}x as long; it answers: {full['answer']}")
    return "\n".join(lines)


def compare(pipeline: Pipeline, item: dict[str, Any], write: Callable[[str], bool | None] | None) -> dict[str, Any]:
    [result] = pipeline.answer_batch([item], pipeline.settings, [write])
    [full] = pipeline.answer_batch([item], dataclasses.replace(pipeline.settings, mode="full"))
    result["full"] = {"answer": full["answer"], "metrics": full["metrics"]}
    result["ttft_ratio"] = round(full["metrics"]["ttft_s"] / result["metrics"]["ttft_s"], 3)
    return result


def run(ask: QuestionConfig, index: IndexConfig, search: SearchConfig, pack: PackConfig, generate: GenerateConfig,
        models: ReaderConfig, runtime: RuntimeConfig) -> None:
    questions = read_prompt(generate.prompt, ask) or read_questions(ask)
    pipeline = answering(ask, index, search, pack, generate, models, runtime)
    many, out, results = ask.questions is not None, generate.out and Path(generate.out), []
    live = functools.partial(refrag.say, end="") if generate.stream and not runtime.json and not many else None
    # two that continue one file would cut off each other's lines
    with refrag.exclusive(out.with_name(f".{out.name}.lock"), f"--out {out}") if out else contextlib.nullcontext():
        if out and out.exists():  # with --resume
            questions = unanswered(questions, out, pipeline.describe(pipeline.settings))
        for batch in refrag.progress(refrag.batched(questions, generate.batch_size), "answering"):
            for result in ([compare(pipeline, batch[0], live)] if generate.compare else
                           pipeline.answer_batch(batch, writers=[live] * len(batch))):
                if out:
                    append_line(out, result)
                if runtime.json:
                    results.append(result)
                elif not out:
                    text = answer_text(result, shown=live is not None)
                    refrag.say(f"{result['question']}\n{text}\n" if many else text)
    if runtime.json:
        print(refrag.dumps({"results": results} if many else results[0]))
