"""`refrag.py search`: the passages that answer a question, as text, JSON or a TREC run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import refrag
from refrag import require
from refrag_extras.generate import read_questions


def trec_text(results: Sequence[dict[str, Any]]) -> str:
    """TREC run lines `qid Q0 docid rank score refrag`; a document counts once, at its best rank. Raises UserError."""
    ids = {"question": {result["id"] for result in results},
           "document": {p.document_id for result in results for p in result["passages"]}}
    for kind, names in ids.items():
        columns = {re.sub(r"\s", "_", name) for name in names}
        require("" not in columns and len(columns) == len(names), f"--format trec: {kind} ids that are empty, or alike "
                "with underscores for white space: use --format json")
    lines = []
    for result in results:
        best: dict[str, float] = {}
        for p in result["passages"]:  # best first
            best.setdefault(p.document_id, p.score)
        for rank, (name, score) in enumerate(best.items(), start=1):
            question, document = (re.sub(r"\s", "_", column) for column in (result["id"], name))
            lines.append(f"{question} Q0 {document} {rank} {score:.6f} refrag\n")
    return "".join(lines)


def search_text(result: dict[str, Any]) -> str:
    lines = [result["question"]]
    for p in result["passages"]:
        text = " ".join(p.text.split())
        scores = ", ".join(f"{name} {score:.3f}" for name, score in p.scores.items())
        lines.append(f"{p.rank:3}. {p.score:.4f} ({scores})  {p.title or p.id}  [{p.source}]\n     {text[:200]}")
    return "\n".join(lines if result["passages"] else [*lines, "no passage was found"])


def run(index: refrag.IndexConfig, ask: refrag.QuestionConfig, search: refrag.SearchConfig, form: refrag.FormatConfig,
        runtime: refrag.RuntimeConfig) -> None:
    questions = read_questions(ask)
    searcher = refrag.load_searcher(index, search, runtime)
    results = [{"id": q["id"], "question": q["question"],
                "passages": searcher.search(q["question"], search.topk, search.hops, search.where)}
               for q in refrag.progress(questions, "searching")]
    if form.format == "json" or runtime.json:
        found = [result | {"passages": [p.to_json() for p in result["passages"]]} for result in results]
        print(refrag.dumps(found[0] if ask.questions is None else {"results": found}))
    elif form.format == "trec":
        print(trec_text(results), end="")
    else:
        refrag.say("\n\n".join(search_text(result) for result in results))
