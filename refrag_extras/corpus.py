"""Which files a corpus has, their records, and the pieces of a long text."""

from __future__ import annotations

import collections
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import refrag
from refrag import NAMED, BadRecord, TextFile, check_string, kind_of, require, skipping, spelled
from refrag_extras import documents

TEXT_FIELDS = ("text", "contents", "body", "passage")  # of several in a record, the first counts
SENTENCE_ENDS = ".!?\u3002\uff01\uff1f"
CorpusFile = tuple[Path, str, bool]  # path, what its ids begin with, whether it is in a folder that was named


class Record(NamedTuple):
    id: str
    title: str
    text: str
    where: str  # file:line, in an array file:number, of a whole document the file
    metadata: dict[str, Any]  # its other fields, and where it comes from
    marks: Sequence[tuple[int, dict[str, Any]]] = ()  # what holds from a character of the text on, such as its page


def parse_passage(item: dict[str, Any], where: str, default_id: str) -> Record:
    name = refrag.field_in(item, TEXT_FIELDS, where)
    body, title = check_string(item.pop(name), name, where), item.pop("title", None)
    if not body.strip():
        raise BadRecord(f"{where}: {name} is empty")
    title = "" if title is None else check_string(title, "title", where)
    identifier = refrag.pop_id(item, default_id, where)
    if isinstance(item.get("metadata"), dict):  # BEIR has one in every record, mostly empty
        item = item.pop("metadata") | item
    try:
        json.dumps(item, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: a field cannot be kept ({refrag.one_line(error)})") from None
    return Record(identifier, title, body, where, item)


def source_label(name: str, sources: dict[str, str]) -> str:
    """What ids from a file or folder begin with: the shortest end of its path that no other source has.

    sources: label -> path; receives this one. A pipe is another source each time; what lies in a source keeps its place
    there. Example: b/notes.txt, {"notes.txt": "/a/notes.txt"} -> "b/notes.txt"
    """
    path, place = Path(os.path.abspath(name)), ""
    if name == "-" or not (path.is_file() or path.is_dir()):
        labels = ("stdin" if n == 1 else f"stdin-{n}" for n in itertools.count(1))
    else:
        place, known = spelled(path), {place: label for label, place in sources.items()}
        parts = place.split("/")
        for n in range(len(parts), 1, -1):  # the closest source around it
            if label := known.get("/".join(parts[:n])):
                return "/".join([label, *parts[n:]])
        labels = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
    taken = [f"{label}/" for label in sources]
    label = next((label for label in labels if not any(
        f"{label}/".startswith(other) or other.startswith(f"{label}/") for other in taken)), place)
    sources[label] = place
    return label


def corpus_files(paths: Sequence[str], sources: dict[str, str]) -> tuple[list[CorpusFile], list[Path]]:
    """(the files to read, each once; those in folders that are not read), but for hidden ones. Raises RefragError."""
    files: dict[str, CorpusFile] = {}  # by label
    others, known = [], (*documents.TEXTS, *refrag.OBJECTS, *refrag.TABLES, *documents.READERS)
    lacking = () if documents.installed() else tuple(documents.READERS)
    for name in paths:
        require(name == "-" or Path(name).exists(), f"--corpus {name}: no such file or folder")
    for name in sorted(filter(os.path.isdir, paths), key=len):  # the outer folders before the inner
        source_label(name, sources)
    for name in paths:
        path, inside = Path(name), [Path(name)]
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if (p.is_file() or p.is_symlink())  # no linked folder is read
                     and not any(part.startswith(".") for part in p.relative_to(path).parts)]
            inside = [p for p in found if kind_of(p) in known]
            require(bool(inside), f"--corpus {name}: the folder holds no {', '.join(known)} files")
            others += [p for p in found if kind_of(p) not in known or kind_of(p) in lacking]
        inside = [p for p in inside if kind_of(p) not in lacking]
        if not inside:
            raise refrag.MissingError(f"--corpus {name}: libraries that read such documents are missing: "
                                      f"{documents.INSTALL}")
        for file in inside:
            label = source_label(str(file), sources)
            files.setdefault(label, (file, label, label not in sources))
    return list(files.values()), others


def modified(path: Path) -> str:
    """When a file was last changed, in UTC: texts that sort as the times do. Example: "2026-11-28T09:30:00" """
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(path.stat().st_mtime))


def read_file(file: CorpusFile, counts: dict[str, int], errors: str) -> Iterator[Record]:
    """The records of a file: the lines of a text, but Markdown, and any text in a folder, is one document, as a PDF is.

    In a folder, as with --errors skip, a bad record or unreadable file is skipped, counted and named.
    """
    path, label, in_folder = file
    errors += " skip" * in_folder
    source = TextFile(path, errors, counts)
    with skipping(errors, counts, (refrag.RefragError, OSError)):
        of_text = source.suffix in (documents.TEXTS if in_folder else documents.MARKDOWN)
        if source.suffix in documents.READERS or (of_text and not TextFile(path, "replace").items(TEXT_FIELDS)[0]):
            title, text, marks = documents.read(source)
            if text.strip():
                facts = {"path": label, "modified": modified(path)}
                yield Record(label, title or refrag.bare_name(path).stem, text, source.name, facts, marks)
            return
        records, items = source.items(TEXT_FIELDS)
        for number, text in items:
            where = f"{source.name}:{number}"
            with skipping(errors, counts):
                item = refrag.parse_object(text, where) if records else {"text": text.strip()}
                record = parse_passage(item, where, f"{label}:{number}")
                yield record._replace(metadata={"path": label} | record.metadata)


def tell_unread(others: list[Path]) -> None:
    """Say which files in folders are not read."""
    kinds = collections.Counter(map(kind_of, others))
    if lacking := ", ".join(f"{kinds.pop(kind):,} {kind}" for kind in documents.READERS if kind in kinds):
        refrag.notice(f"documents that were not read: {lacking}: {documents.INSTALL}")
    if kinds:
        names = [spelled(path) for path in others if kind_of(path) in kinds]
        shown = [*names[:NAMED], *[".."][: len(names) - NAMED]]
        refrag.notice(f"files of other kinds, not read: {len(names):,} ({'; '.join(shown)})")


def read_corpus(corpus: refrag.CorpusConfig, counts: dict[str, int],
                sources: dict[str, str] | None = None) -> Iterator[Record]:
    """The records of the corpus, streamed. counts: receives skipped, replaced, ignored. sources: see `source_label`."""
    files, others = corpus_files(corpus.corpus, {} if sources is None else sources)
    counts["ignored"] = len(others)
    tell_unread(others)
    several = len(files) > 1  # then the bar counts files, whose number is known
    read = (read_file(file, counts, corpus.errors)
            for file in (refrag.progress(files, "reading", unit="file") if several else files))
    records = itertools.islice(itertools.chain.from_iterable(read), corpus.limit)
    return records if several else refrag.progress(records, "reading", unit="record")


def split_spans(text: str, token_ends: Sequence[int], size: int, overlap: int) -> list[tuple[int, int]]:
    """Character spans of at most `size` tokens that share about `overlap` tokens. token_ends: in characters.

    A piece ends after a sentence, else after a word, if one ends in its last quarter.
    Example: 4 one-letter words "a b c d", size 2, overlap 0 -> [(0, 3), (3, 7)]
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
        ends = [i for i in window if text[token_ends[i - 1] : token_ends[i - 1] + 1].isspace()]
        stops = [i for i in ends if text[token_ends[i - 1] - 1] in SENTENCE_ENDS]
        cut = next(iter(stops or ends), last)
        spans.append((start, token_ends[cut - 1]))
        first = max(cut - overlap, first + 1)
