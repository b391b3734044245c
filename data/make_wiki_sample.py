#!/usr/bin/env python3
"""Pick the small sample of real passages and questions in this folder.

Reads two gzipped JSON-lines files of SQuAD v1.1 (see README_DATA.md for where they come from):

    passages.jsonl.gz    {"id", "title", "text", "split"}, the paragraphs of an article numbered from 0 in their ids
    qa.dev.jsonl.gz      {"question", "answers", "positive_ids", "id"}

and writes, without changing a word of them,

    wiki_passages.jsonl     {"id", "title", "text"}: the paragraphs of RUNS
    wiki_questions.jsonl    {"id", "question", "answers", "positive_ids"}: the questions of QUESTIONS

Nothing is drawn at random: the runs and the questions were chosen by reading them. Standard library only.

Example: python data/make_wiki_sample.py --source path/to/squad --out_dir data
"""

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# Article, first paragraph, last paragraph. A run ends where a paragraph is outside 40 to 200 words, where it holds
# broken markup, or where the article turns to matters that have no place in an example.
RUNS = (
    ("Botany", 0, 15),
    ("Botany", 22, 35),
    ("Carnival", 12, 20),
    ("Carnival", 32, 47),
    ("Czech_language", 0, 27),
    ("Incandescent_light_bulb", 5, 41),
    ("Old_English", 0, 9),
    ("Old_English", 11, 21),
    ("Planck_constant", 3, 17),
    ("Samoa", 7, 24),
    ("Switzerland", 22, 56),
    ("Switzerland", 58, 65),
    ("Switzerland", 67, 76),
    ("Time", 0, 28),
    ("Wood", 0, 28),
    ("Wood", 30, 37),
    ("Wood", 39, 45),
)

# Article -> "paragraph:question". Each makes sense without its paragraph and has a short answer that is right.
QUESTIONS = {
    "Botany": "3:4 5:2 5:3 8:3 9:1 9:2 11:2 13:4 14:1 25:1",
    "Carnival": "12:0 14:4 18:3 34:2 35:1 37:0 42:0 43:1 44:0 47:1",
    "Czech_language": "0:1 4:4 7:2 8:1 11:2 13:4 17:2 20:0 26:1",
    "Incandescent_light_bulb": "5:4 6:1 7:1 18:0 21:1 23:0 24:1 37:1 38:0 39:1",
    "Old_English": "2:1 4:2 5:1 6:1 7:0 8:4 9:1 12:1 15:3 17:3",
    "Planck_constant": "4:9 6:1 6:3 6:9 7:0 7:2 8:3 10:0 11:8",
    "Samoa": "7:0 9:0 11:1 11:4 15:0 16:2 19:3 20:4 22:3 23:0",
    "Switzerland": "22:0 44:2 46:2 46:4 53:2 54:2 58:4 70:1 71:0 73:4 74:0 76:0",
    "Time": "6:4 7:1 7:3 8:0 9:1 11:0 12:0 14:0 21:0 22:2",
    "Wood": "1:0 2:1 4:2 12:0 22:1 24:3 24:4 30:0 44:3 45:0",
}


class UserError(Exception):
    """Something that whoever typed the command can mend."""


def passage_ids() -> list[str]:
    """The ids of the sampled passages, in the order of the file."""
    return [f"squad:{article}:{i}" for article, first, last in RUNS for i in range(first, last + 1)]


def question_ids() -> list[str]:
    """The ids of the sampled questions, in the order of the file."""
    return [f"squad:{article}:{numbers}" for article, line in QUESTIONS.items() for numbers in line.split()]


def read_records(path: Path) -> Iterator[Record]:
    """The records of a gzipped JSON-lines file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except OSError as error:
        raise UserError(f"--source must hold {path.name}: {error}") from error


def select(records: Iterable[Record], ids: Sequence[str], fields: Sequence[str], name: str) -> list[Record]:
    """The records with the given ids, in their order, cut down to the given fields."""
    found = {record["id"]: record for record in records}
    missing = [id_ for id_ in ids if id_ not in found]
    if missing:
        raise UserError(f"--source holds other data: {name} has no {missing[0]} ({len(missing)} ids missing)")
    return [{field: found[id_][field] for field in fields} for id_ in ids]


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write JSON lines. The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # only there if something went wrong
    print(f"{path.name}: {len(records)} lines, {path.stat().st_size} bytes")


def make_sample(source: Path, out_dir: Path) -> None:
    """Write both files of the sample."""
    dev = (record for record in read_records(source / "passages.jsonl.gz") if record["split"] == "dev")
    passages = select(dev, passage_ids(), ("id", "title", "text"), "passages.jsonl.gz")
    pairs = read_records(source / "qa.dev.jsonl.gz")
    questions = select(pairs, question_ids(), ("id", "question", "answers", "positive_ids"), "qa.dev.jsonl.gz")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_records(out_dir / "wiki_passages.jsonl", passages)
    write_records(out_dir / "wiki_questions.jsonl", questions)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the sample."""
    parser = argparse.ArgumentParser(description="Pick the small sample of real passages and questions.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--source", type=Path, required=True, help="folder with passages.jsonl.gz and qa.dev.jsonl.gz")
    parser.add_argument("--out_dir", type=Path, default=here, help="where the files go (default: beside this script)")
    args = parser.parse_args(argv)
    try:
        make_sample(args.source, args.out_dir)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
