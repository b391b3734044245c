"""Section 5: readers of corpora and questions, their errors, and the splitting of long passages."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import refrag

BOM = b"\xef\xbb\xbf"
CJK = "\u957f\u6c5f"


class Read(SimpleNamespace):
    """records, and the counts skipped and replaced."""

    @property
    def texts(self) -> list[str]:
        return [r.text for r in self.records]

    @property
    def ids(self) -> list[str]:
        return [r.id for r in self.records]


def read(*paths: object, **options: object) -> Read:
    """Read a whole corpus."""
    counts = {"skipped": 0, "replaced": 0}
    records = list(refrag.read_corpus(refrag.CorpusConfig(tuple(map(str, paths)), **options), counts))
    return Read(records=records, **counts)


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes or text, zipped if its name ends in .gz; returns its path."""

    def call(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return call


@pytest.fixture
def stdin(monkeypatch):
    """Set the bytes on standard input."""
    return lambda raw: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


# ---- Text, one passage per line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_text_lines_are_passages_with_line_numbers_as_ids(write, name):
    got = read(write(name, f"one\n\n  \t \nfour {CJK}\n"))
    assert got.records == [
        refrag.Record("1", "", "one", 1, got.records[0].source),
        refrag.Record("4", "", f"four {CJK}", 4, got.records[0].source),
    ]
    assert (got.skipped, got.replaced) == (0, 0)
    assert got.records[1].where.endswith(f"{name}:4")


def test_a_mark_at_the_start_and_both_line_ends_are_no_text(write):
    assert read(write("c.txt", BOM + b"one\r\ntwo\r\n\r\nfour")).texts == ["one", "two", "four"]


def test_a_line_ends_before_its_carriage_return():
    """The space before it belongs to the line."""
    counts = {"skipped": 0, "replaced": 0}
    assert list(refrag.read_lines(io.BytesIO(b"a \r\nb\r"), "c.txt", counts, "strict")) == [(1, "a "), (2, "b")]


def test_a_mark_is_removed_from_the_start_only(write):
    assert read(write("c.txt", BOM + b"a\n" + BOM + b"b\n")).texts == ["a", "\ufeffb"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_only_a_newline_ends_a_line(write, separator):
    assert read(write("c.txt", f"a{separator}b\nc")).texts == [f"a{separator}b", "c"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff")), max_size=8))
@example(["a", " ", "", "\u3000", "b"])
def test_every_line_that_is_not_blank_is_read_and_nothing_else(lines):
    """The oracle splits the text itself; `read_lines` sees a stream of bytes."""
    counts = {"skipped": 0, "replaced": 0}
    raw = "\n".join(lines).encode()
    got = list(refrag.read_lines(io.BytesIO(raw), "c.txt", counts, "strict"))
    assert got == [(n, line) for n, line in enumerate("\n".join(lines).split("\n"), 1) if line.strip()]


def test_ids_carry_the_file_when_there_are_several(write):
    assert read(write("a.txt", "x\ny\n"), write("b.txt", "z\n")).ids == ["a:1", "a:2", "b:1"]


@pytest.mark.parametrize("names", [("x/part.txt", "y/part.txt"), ("part.1.txt", "part.2.txt")])
def test_ids_differ_between_files_of_the_same_first_name(write, names):
    ids = read(*(write(name, "text\n") for name in names)).ids
    assert len(set(ids)) == 2


def test_the_limit_counts_records_over_all_files(write):
    files = write("a.txt", "1\n\n2\n"), write("b.txt", "3\n4\n")
    assert read(*files, limit=3).texts == ["1", "2", "3"]


def test_the_limit_leaves_the_rest_unread(write):
    assert read(write("a.txt", b"good\n\xff\n"), limit=1).texts == ["good"]


def test_a_corpus_is_streamed(write):
    """The first record is there before the broken second line has been read."""
    counts = {"skipped": 0, "replaced": 0}
    records = refrag.read_corpus(refrag.CorpusConfig((str(write("a.txt", b"good\n\xff\n")),)), counts)
    assert next(records).text == "good"
    with pytest.raises(refrag.UserError):
        next(records)


# ---- JSON lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_json_lines(write, name):
    rows = [
        {"id": "a", "title": "A", "text": f"one {CJK}\nsecond line"},
        {"text": "no id"},
        {"id": 7, "title": None, "text": " spaces stay ", "extra": [1]},
    ]
    got = read(write(name, BOM + "\r\n".join(map(json.dumps, rows)).encode()))
    assert [r[:4] for r in got.records] == [
        ("a", "A", f"one {CJK}\nsecond line", 1),
        ("2", "", "no id", 2),
        ("7", "", " spaces stay ", 3),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json}", "malformed JSON (Expecting property name"),
        ('{"text": "a"} trailing', "malformed JSON (Extra data"),
        ('{"text": "a', "malformed JSON (Unterminated string"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('"text"', "expected a JSON object, got str"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"id": "a"}', "text must be a string, got NoneType"),
        ('{"text": 3}', "text must be a string, got int"),
        ('{"text": ["a"]}', "text must be a string, got list"),
        ('{"text": "a", "title": 3}', "title must be a string, got int"),
        ('{"text": "a", "id": 1.5}', "id must be a string, got float"),
        ('{"text": "a", "id": null}', "id must be a string, got NoneType"),
        ('{"text": ""}', "text is empty"),
        ('{"text": " \\n\\t "}', "text is empty"),
        ('{"text": "\\ud83d"}', "text holds half of a surrogate pair"),
        ('{"text": "a", "title": "\\udc00"}', "title holds half of a surrogate pair"),
        ('{"text": "a", "id": "\\udc00"}', "id holds half of a surrogate pair"),
        pytest.param("[" * 100_000, "malformed JSON", id="nesting"),
        ('{"text": "a", "id": true}', "id must be"),
        ('{"text": "a", "title": 0}', "title must be"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line_or_skipped_and_counted(write, line, told):
    path = write("c.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "last"}}\n')
    for errors in ("strict", "replace"):
        with pytest.raises(refrag.UserError) as caught:
            read(path, errors=errors)
        assert str(caught.value).startswith(f"{path}:3: {told}")
    got = read(path, errors="skip")
    assert (got.texts, got.skipped, got.replaced) == (["good", "last"], 1, 0)


def test_a_whole_surrogate_pair_is_one_character(write):
    assert read(write("c.jsonl", '{"text": "\\ud83d\\ude00"}')).texts == ["\U0001f600"]


# ---- Invalid UTF-8 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "bad"),
    [
        (b"", b"\xff"),
        (b"ab", b"\xffcd"),
        ("first é\nab".encode(), b"\xff"),
        (b"first\r\n\r\nthird ", b"\xe9t\xe9"),
        (b"ab", b"\xe2\x82"),  # cut inside a character
        (b"ab", b"\xed\xa0\x80"),  # a surrogate, spelled in bytes
        (BOM + b"ab", b"\xff"),
        (BOM + b"ab\ncd", b"\xff"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_invalid_utf8_is_refused_with_its_byte_offset(write, name, before, bad):
    path = write(name, before + bad + b"\nlast\n")
    with pytest.raises(refrag.UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: invalid UTF-8 at byte {len(before)}: mend it or use --errors replace"


def test_invalid_utf8_is_replaced_and_counted_by_line(write):
    got = read(write("c.txt", b"good\nb\xffd \xfe\nx\xff\nlast"), errors="replace")
    assert got.texts == ["good", "b\ufffdd \ufffd", "x\ufffd", "last"]
    assert (got.skipped, got.replaced) == (0, 2)
    assert got.ids == ["1", "2", "3", "4"]


def test_invalid_utf8_is_skipped_and_counted_by_line(write):
    got = read(write("c.txt", b"good\nb\xffd \xfe\nx\xff\nlast"), errors="skip")
    assert (got.texts, got.ids, got.skipped, got.replaced) == (["good", "last"], ["1", "4"], 2, 0)


# ---- Gzip -----------------------------------------------------------------------------------------------------------


def damaged_gzip(how: str) -> bytes:
    """A gzip file of many lines with some damage."""
    raw = bytearray(gzip.compress("".join(f"passage {i * i}\n" for i in range(2000)).encode(), mtime=0))
    if how == "truncated":
        return bytes(raw[: len(raw) // 2])
    if how == "plain":
        return b"these bytes were never zipped\n"
    if how == "stream":
        raw[10] |= 0b110  # the first block after the header of 10 bytes: its type becomes 3, which does not exist
    else:
        raw[{"checksum": -8, "length": -1}[how]] ^= 0x10
    return bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "plain", "checksum", "length", "stream"])
def test_a_damaged_gzip_file_is_corrupt(tmp_path, how):
    (tmp_path / "c.txt.gz").write_bytes(damaged_gzip(how))
    with pytest.raises(refrag.CorruptError, match=r"c\.txt\.gz: not a complete gzip file"):
        read(tmp_path / "c.txt.gz")


@pytest.mark.parametrize("how", ["truncated", "plain", "stream"])
def test_a_damaged_gzip_file_in_a_folder_is_corrupt(tmp_path, how):
    (tmp_path / "c.txt.gz").write_bytes(damaged_gzip(how))
    with pytest.raises(refrag.CorruptError, match=r"c\.txt\.gz: not a complete gzip file"):
        read(tmp_path)


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_document_per_text_file(write, tmp_path):
    write("docs/b.md", "# B\n\nbody\n")
    write("docs/a.txt", "line one\nline two\n")
    write("docs/deep/c.txt.gz", "zipped")
    write("docs/ignored.py", "code")
    write("docs/blank.txt", " \n\n")
    got = read(tmp_path / "docs")
    assert [r[:4] for r in got.records] == [
        ("a.txt", "a", "line one\nline two\n", 0),
        ("b.md", "b", "# B\n\nbody\n", 0),
        ("deep/c.txt.gz", "c", "zipped", 0),
    ]
    assert got.records[0].where == str(tmp_path / "docs" / "a.txt")


def test_a_folder_and_a_file_together(write, tmp_path):
    write("docs/a.txt", "whole\ndocument\n")
    got = read(tmp_path / "docs", write("lines.txt", "one\ntwo\n"))
    assert got.ids == ["a.txt", "lines:1", "lines:2"]


def test_a_folder_without_text_files_is_refused(write, tmp_path):
    write("docs/code.py", "pass")
    with pytest.raises(refrag.UserError, match=r"docs: the folder holds no \.txt or \.md files"):
        read(tmp_path / "docs")


def test_a_folder_counts_the_end_of_a_file_name(write, tmp_path):
    write("docs/a.txt", "text")
    write("docs/a.txt.bak", "an old one")
    write("docs/b.md.zip", "not unzipped")
    assert read(tmp_path / "docs").ids == ["a.txt"]


def test_a_mark_at_the_start_of_a_document_is_no_text(write, tmp_path):
    write("docs/a.txt", BOM + b"text")
    assert read(tmp_path / "docs").texts == ["text"]


def test_invalid_utf8_in_a_document(write, tmp_path):
    path = write("docs/a.txt", b"ab\ncd\xff")
    write("docs/b.txt", b"good")
    with pytest.raises(refrag.UserError, match=f"{path}: invalid UTF-8 at byte 5"):
        read(tmp_path / "docs")
    got = read(tmp_path / "docs", errors="replace")
    assert (got.texts, got.replaced) == (["ab\ncd\ufffd", "good"], 1)


def test_a_bad_document_is_skipped_and_counted(write, tmp_path):
    write("docs/a.txt", b"ab\xff")
    write("docs/b.txt", b"good")
    got = read(tmp_path / "docs", errors="skip")
    assert (got.texts, got.skipped) == (["good"], 1)


def test_a_path_that_is_not_there_is_refused_before_anything_is_read(write):
    with pytest.raises(refrag.UserError, match=r"--corpus nowhere\.txt: no such file or folder"):
        read(write("a.txt", "x"), "nowhere.txt")


# ---- Standard input -------------------------------------------------------------------------------------------------


def test_text_on_standard_input(stdin):
    stdin(b"one\r\n\n" + CJK.encode() + b"\n")
    got = read("-")
    assert (got.ids, got.texts) == (["1", "3"], ["one", CJK])
    assert got.records[1].where == "stdin:3"


@pytest.mark.parametrize("start", [b"", BOM, b"\n \n"])
def test_json_lines_on_standard_input_are_recognised_by_the_first_line(stdin, start):
    stdin(start + b'{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    assert read("-").ids == ["a", "b"]


def test_text_on_standard_input_may_hold_a_brace_later(stdin):
    stdin(b'one\n{"id": "a"}\n')
    assert read("-").texts == ["one", '{"id": "a"}']


def test_errors_on_standard_input_name_it(stdin):
    stdin(b'{"id": "a", "text": "one"}\nbroken\n')
    with pytest.raises(refrag.UserError, match="stdin:2: malformed JSON"):
        read("-")


# ---- Splitting ------------------------------------------------------------------------------------------------------


@st.composite
def tokenised(draw):
    """(text, token_ends): a text cut into tokens at random places. The white space at its end belongs to no token."""
    text = draw(st.text(st.sampled_from("ab. \n" + CJK + "\u3002"), min_size=1, max_size=80))
    bounds = draw(st.sets(st.integers(1, len(text)), min_size=1, max_size=60))
    return text, sorted(bounds)


def tokens_inside(ends: list[int], span: tuple[int, int]) -> list[int]:
    """The tokens that end inside a span."""
    return [i for i, end in enumerate(ends) if span[0] < end <= span[1]]


@given(tokenised(), st.integers(1, 12), st.integers(0, 6))
def test_pieces_cover_the_text_in_order_and_hold_at_most_size_tokens(case, size, overlap):
    text, ends = case
    spans = refrag.split_spans(text, ends, size, min(overlap, size // 2))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    for start, end in spans:
        assert start < end
        assert len(tokens_inside(ends, (start, end))) <= size
    for before, after in itertools.pairwise(spans):
        assert before[0] < after[0] <= before[1] < after[1] <= len(text)
    assert (len(spans) == 1) == (len(ends) <= size)


@given(tokenised(), st.integers(1, 12), st.integers(0, 6))
def test_neighbouring_pieces_share_at_most_overlap_tokens(case, size, overlap):
    text, ends = case
    overlap = min(overlap, size // 2)
    spans = [set(tokens_inside(ends, s)) for s in refrag.split_spans(text, ends, size, overlap)]
    for before, after in itertools.pairwise(spans):
        assert len(before & after) <= overlap
        assert len(before & after) in (overlap, len(before) - 1), "less is shared only where a piece must move on"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 6))
def test_tokens_without_characters_do_no_harm(widths, size, overlap):
    """A byte-level tokenizer spells one character in several tokens, which all end at the same place."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    text = "x" * ends[-1]
    spans = refrag.split_spans(text, ends, size, min(overlap, size // 2))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(before[1] >= after[0] for before, after in itertools.pairwise(spans))
    assert len(spans) <= len(widths)


def words(text: str) -> list[int]:
    """Token ends when every word is a token."""
    return [i for i in range(1, len(text) + 1) if not text[i - 1].isspace() and (text + " ")[i].isspace()]


def test_the_example_of_the_docstring():
    assert refrag.split_spans("a b c d", words("a b c d"), 2, 0) == [(0, 3), (3, 7)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # 8 words fit. The last quarter holds words 7 and 8: the sentence that ends after 7 wins.
        ("a b c d e f g. h i j k", ["a b c d e f g.", " h i j k"]),
        ("a b c d e f g\u3002 h i j k", ["a b c d e f g\u3002", " h i j k"]),
        # A sentence that ends before the last quarter does not make the piece shorter.
        ("a b c d. e f g h i j k", ["a b c d. e f g h", " i j k"]),
        # The later of two ends in the last quarter.
        ("a b c d e f g. h. i j k", ["a b c d e f g. h.", " i j k"]),
    ],
)
def test_a_piece_ends_after_a_sentence_in_its_last_quarter(text, pieces):
    assert [text[a:b] for a, b in refrag.split_spans(text, words(text), 8, 0)] == pieces


def test_a_piece_does_not_end_inside_a_word():
    """8 tokens of one character would end inside `hij`; the space after `fg` stands in the last quarter."""
    text = "abcde g hij klm"
    ends = [i for i in range(1, len(text) + 1) if text[i - 1] != " "]  # 13 tokens
    assert [text[a:b] for a, b in refrag.split_spans(text, ends, 8, 0)] == ["abcde g", " hij klm"]


def test_overlap_repeats_the_last_tokens():
    text = "a b c d e f"
    assert [text[x:y] for x, y in refrag.split_spans(text, words(text), 4, 2)] == ["a b c d", " c d e f"]


def test_a_text_that_fits_is_one_piece_with_all_its_white_space():
    assert refrag.split_spans("  a b  ", words("  a b  "), 2, 1) == [(0, 7)]
    assert refrag.split_spans("  ", [], 8, 1) == [(0, 2)]


# ---- Questions ------------------------------------------------------------------------------------------------------


def ask(question: str | None = None, questions: object = None) -> list[dict]:
    """Read questions."""
    return refrag.read_questions(refrag.QuestionConfig(question, None if questions is None else str(questions)))


def test_one_question():
    assert ask("Who?") == [{"id": "1", "question": "Who?"}]


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_a_file_of_questions(write, name):
    """A missing id is the number of the question; ids become strings; other fields are kept."""
    path = write(name, BOM + b'{"question": "Who?"}\r\n\n{"id": 7, "question": "When?", "answers": ["1896"]}\n')
    assert ask(questions=path) == [
        {"id": "1", "question": "Who?"},
        {"id": "7", "question": "When?", "answers": ["1896"]},
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Who?", ":2: malformed JSON"),
        ("[]", ":2: expected a JSON object, got list"),
        ("{}", ":2: question must be a string, got NoneType"),
        ('{"question": 3}', ":2: question must be a string, got int"),
        ('{"question": " "}', ":2: the question is empty"),
        ('{"question": "\\ud800"}', ":2: question holds half of a surrogate pair"),
        ('{"id": "1", "question": "again"}', ": ids are not unique"),
        ('{"id": 1, "question": "again"}', ": ids are not unique"),
        ('{"id": "\\ud800", "question": "q"}', ":2: id holds half"),
        ('{"id": null, "question": "q"}', ":2: id must be"),
        ('{"id": [1], "question": "q"}', ":2: id must be"),
    ],
)
def test_a_bad_question_is_refused_with_its_place(write, line, told):
    path = write("q.jsonl", f'{{"question": "good"}}\n{line}\n')
    with pytest.raises(refrag.UserError) as caught:
        ask(questions=path)
    assert f"{path}{told}" in str(caught.value)


@pytest.mark.parametrize(("question", "told"), [("", "empty"), (" \n", "empty"), ("\udcff", "half of a surrogate")])
def test_a_bad_question_of_the_command_line_is_refused(question, told):
    with pytest.raises(refrag.UserError, match=f"(?=.*--question)(?=.*{told})"):
        ask(question)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_questions_is_refused(write, content):
    with pytest.raises(refrag.UserError, match="the file holds no question"):
        ask(questions=write("q.jsonl", content))


def test_a_missing_file_of_questions_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(refrag.UserError, match=f"--questions {path}: no such file"):
            ask(questions=path)


@pytest.mark.parametrize("given", [{}, {"question": "Who?", "questions": "q.jsonl"}])
def test_exactly_one_source_of_questions_is_named(given):
    with pytest.raises(refrag.UserError, match="name one of --question and --questions"):
        ask(**given)


def test_invalid_utf8_in_a_file_of_questions_is_refused(write):
    path = write("q.jsonl", b'{"question": "a"}\n{"question": "\xff"}\n')
    with pytest.raises(refrag.UserError, match=f"{path}: invalid UTF-8 at byte 32"):
        ask(questions=path)


# ---- Names of files -------------------------------------------------------------------------------------------------


def test_a_file_named_beside_its_folder_is_read_as_a_file(write, tmp_path, monkeypatch):
    """The folder's .txt is one document, the .jsonl that was named itself has a passage per line."""
    write("docs/a.txt", "one\ntwo")
    write("docs/b.jsonl", '{"id": "x", "text": "three"}\n{"id": "y", "text": "four"}\n')
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", ".", tmp_path / "docs"):
        file = tmp_path / "docs/b.jsonl" if folder == tmp_path / "docs" else "docs/b.jsonl"
        assert read(folder, file).texts == ["one\ntwo", "three", "four"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_utf8(tmp_path):
    """They can be read, and what is said of them can be written."""
    (tmp_path / "docs").mkdir()
    for folder in (tmp_path, tmp_path / "docs"):
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as handle:
            handle.write("one")
    [document] = read(tmp_path / "docs").records
    assert (document.id, document.title, document.text) == ("caf\ufffd.txt", "caf\ufffd", "one")
    [line] = read(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).records
    assert line.where.encode() and line.where.endswith("caf\ufffd.txt:1")
