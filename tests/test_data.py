"""Section 4: readers of corpora and questions, their errors, and the splitting of long passages."""

import codecs
import gzip
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import read_all
from hypothesis import example, given
from hypothesis import strategies as st

import refrag
from refrag_extras import generate
from refrag_extras.corpus import Record, split_spans

BOM = b"\xef\xbb\xbf"
CJK = "\u957f\u6c5f"


def fault(*paths: object, by: Callable = read_all, **options: object) -> str:
    with pytest.raises(refrag.UserError) as caught:
        by(*paths, **options)
    return str(caught.value)


@pytest.fixture
def write(write):
    """Write a file of bytes or text, zipped if its name ends in .gz; returns its path."""
    return lambda name, content: write(name, content if not name.lower().endswith(".gz") else gzip.compress(
        content.encode() if isinstance(content, str) else content))


@pytest.fixture
def stdin(monkeypatch):
    return lambda raw: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_text_lines_are_passages_with_file_and_line_as_ids(write, tmp_path, name):
    got = read_all(write(name, f"one\n\n  \t \nfour {CJK}\n"))
    assert got.records == [Record(f"{name}:{line}", "", text, f"{tmp_path / name}:{line}", {"path": name})
                           for line, text in ((1, "one"), (4, f"four {CJK}"))]
    assert (got.skipped, got.replaced) == (0, 0)


@pytest.mark.parametrize(("content", "texts"), [
    (BOM + b"one\r\ntwo\r\n\r\nfour", ["one", "two", "four"]), (b"a \r\nb\r", ["a", "b"]),
    (BOM + b"a\n" + BOM + b"b\n", ["a", "\ufeffb"]),  # a mark is removed from the start only
    *((f"a{separator}b\nc".encode(), [f"a{separator}b", "c"]) for separator in "\u2028\x85\x0b\x0c")])
def test_marks_and_line_ends_are_no_text_and_only_a_newline_ends_a_line(write, content, texts):
    assert read_all(write("c.txt", content)).texts == texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff")), max_size=8))
@example(["a", " ", "", "\u3000", "b"])
@example(["\u0a0d \u010a", "\u0a0a", "\U0001f600\u0d0a"])  # letters that have a newline's byte in UTF-16
def test_every_line_that_is_not_blank_is_read_and_nothing_else(tmp_path_factory, lines):
    """In each encoding, zipped or not, which the first bytes tell. The oracle splits the text itself."""
    text, path = "\n".join(lines), tmp_path_factory.getbasetemp() / "lines.txt"
    expected = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for raw in (text.encode(), text.encode("utf-8-sig"), *utf16(text)):
        for content in (raw, gzip.compress(raw)):
            path.write_bytes(content)
            assert list(refrag.TextFile(path, "strict").filled_lines()) == expected


def utf16(text: str) -> tuple[bytes, bytes]:
    """Little endian and big endian, with a byte order mark."""
    return codecs.BOM_UTF16_LE + text.encode("utf-16-le"), codecs.BOM_UTF16_BE + text.encode("utf-16-be")


def test_the_limit_counts_records_over_all_files_and_leaves_the_rest_unread(write, tmp_path):
    """A hidden folder that is named is read, and a folder goes with files."""
    write(".notes/a.txt", BOM + b"whole\ndocument\n")
    got = read_all(tmp_path / ".notes", write("a.txt", "1\n\n2\n"), write("b.txt", b"3\n\xff\n"), limit=4)
    assert got.ids == [".notes/a.txt", "a.txt:1", "a.txt:3", "b.txt:1"] and got.texts[0] == "whole\ndocument\n"


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.ndjson", "c.JSONL", "c.txt", "c.json", "C.TXT.GZ", "c"])
def test_json_lines_under_any_name(write, name):
    rows = [{"id": "a", "title": "A", "text": f"one {CJK}\U0001f600\nsecond line"}, {"text": "no id"},
            {"id": 7, "title": None, "text": " spaces stay ", "extra": [1]}]
    got = read_all(write(name, BOM + "\r\n".join(map(json.dumps, rows)).encode()))
    assert [r[:3] for r in got.records] == [
        ("a", "A", f"one {CJK}\U0001f600\nsecond line"), (f"{name}:2", "", "no id"), ("7", "", " spaces stay ")]
    assert [r.metadata for r in got.records] == [{"path": name}, {"path": name}, {"path": name, "extra": [1]}]


@pytest.mark.parametrize(("line", "told"), [
    ("{not json}", "malformed JSON (Expecting property name"), ('{"text": "a"} x', "malformed JSON (Extra data"),
    pytest.param("[" * 100_000, "malformed JSON", id="nesting"), ("null", "expected a JSON object, got NoneType"),
    ('{"Text": "a", "n": 1}', "no text (nor contents, body, passage) among its keys: Text, n"),
    ("{}", "no text (nor contents, body, passage) among its keys: none"), ('{"contents": " "}', "contents is empty"),
    ('{"text": "a", "size": NaN}', "a field cannot be kept"), ('{"text": "a", "size": 1e999}', "a field cannot be"),
    ('{"text": null, "body": "b"}', "text must be a string, got NoneType"),
    ('{"text": ["a"]}', "text must be a string, got list"), ('{"text": ""}', "text is empty"),
    ('{"text": "a", "title": 0}', "title must be a string, got int"), ('{"text": " \\n\\t "}', "text is empty"),
    ('{"text": "a", "id": 1.5}', "id must be a string, got float"), ('{"text": "a", "id": true}', "id must be"),
    ('{"text": "a", "id": null}', "id must be a string, got NoneType"),
    ('{"text": "\\ud83d"}', "text holds half of a surrogate pair"), ('{"text": "a", "id": "\\udc00"}', "id holds half"),
    ('{"text": "a", "title": "\\udc00"}', "title holds half of a surrogate pair")])
def test_a_bad_record_is_refused_with_file_and_line_or_skipped_and_counted(write, line, told):
    path = write("c.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "last"}}\n')
    for errors in ("strict", "replace"):
        assert fault(path, errors=errors).startswith(f"{path}:3: {told}")
    got = read_all(path, errors="skip")
    assert (got.texts, got.skipped, got.replaced) == (["good", "last"], 1, 0)


@pytest.mark.parametrize(("before", "bad"), [
    (b"", b"\xff"), (b"ab", b"\xffcd"), ("first é\nab".encode(), b"\xff"), (b"first\r\n\r\nthird ", b"\xe9t\xe9"),
    (b"ab", b"\xe2\x82"),  # cut inside a character
    (b"ab", b"\xed\xa0\x80"),  # a surrogate, spelled in bytes
    (BOM + b"ab", b"\xff"), (BOM + b"ab\ncd", b"\xff")], ids=repr)
@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_invalid_utf8_is_refused_with_its_line(write, name, before, bad):
    path = write(name, before + bad + b"\nlast\n")
    told = f":{len(before.splitlines()) or 1}: invalid UTF-8: fix it or use --errors replace"
    assert fault(path) == f"{path}{told}"
    document = write(f"docs/{name}", before + bad + b"\nlast\n")  # a text file in a folder is read at once
    with pytest.raises(refrag.UserError, match=re.escape(f"{document}{told}")):
        list(refrag.TextFile(document, "strict").lines(as_one=True))


def test_invalid_utf8_is_replaced_or_skipped_and_counted_by_line(write, tmp_path):
    path = write("c.txt", b"good\nb\xffd \xfe\nx\xff\nlast")
    got = read_all(path, errors="replace")
    assert got.texts == ["good", "b\ufffdd \ufffd", "x\ufffd", "last"]
    assert (got.ids, got.skipped, got.replaced) == ([f"c.txt:{n}" for n in (1, 2, 3, 4)], 0, 2)
    got = read_all(path, errors="skip")
    assert (got.texts, got.ids, got.skipped, got.replaced) == (["good", "last"], ["c.txt:1", "c.txt:4"], 2, 0)
    write("docs/a.txt", b"ab\ncd\xff\xff")
    write("docs/b.txt", b"good")
    got, left = (read_all(tmp_path / "docs", errors=errors) for errors in ("replace", "skip"))
    assert (got.texts, got.replaced, left.texts, left.skipped) == (["ab\ncd\ufffd\ufffd", "good"], 1, ["good"], 1)


@pytest.mark.parametrize(("order", "half"), [(0, b"\x00\xd8"), (1, b"\xd8\x00")], ids=["little", "big"])
@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_invalid_utf16_is_refused_skipped_or_replaced(write, name, order, half):
    """Half of a surrogate pair in the second line of three, and a last byte too many."""
    path = write(name, utf16("one\nb")[order] + half + utf16("c\nlast")[order][2:] + b"\x61")
    assert re.search(f"{name}:2: invalid UTF-16-.E: fix it", fault(path))
    got = read_all(path, errors="skip")
    assert (got.texts, got.skipped, got.replaced) == ([], 1, 0)
    got = read_all(path, errors="replace")
    assert (got.ids, got.skipped, got.replaced) == ([f"{name}:{n}" for n in (1, 2, 3)], 0, 1)
    assert got.texts[0] == "one" and got.texts[1].startswith("b\ufffd") and got.texts[2] == "last\ufffd"


def damaged_gzip(how: str) -> bytes:
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


def test_a_damaged_gzip_file_is_corrupt(tmp_path):
    for how in ("truncated", "plain", "checksum", "length", "stream"):
        (tmp_path / f"{how}.txt.gz").write_bytes(damaged_gzip(how))
        with pytest.raises(refrag.CorruptError, match=rf"{how}\.txt\.gz: not a complete gzip file"):
            read_all(tmp_path / f"{how}.txt.gz")


RECORDS = [{"id": "a", "text": "one\n\ntwo", "year": 1990}, {"contents": "three"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["c.json", "c.txt", "c.JSON.gz"])
def test_an_array_of_objects_or_one_object(write, name, indent):
    got = read_all(write(name, BOM + json.dumps(RECORDS, indent=indent).encode()))
    assert [(r.id, r.text, r.metadata) for r in got.records] == [
        ("a", "one\n\ntwo", {"path": name, "year": 1990}), (f"{name}:2", "three", {"path": name})]
    assert read_all(write("one.json", json.dumps(RECORDS[0], indent=indent))).records[0] == got.records[0]._replace(
        where=str(write("one.json", "x")) + ":1", metadata={"path": "one.json", "year": 1990})


def test_prose_that_begins_like_json_stays_prose_unless_a_suffix_calls_it_json(write):
    for text in ("{ is a brace", "[1] Smith, J.: On bells", "[![badge](a.svg)](b)\n# Title", '{"half": "an object"',
                 "[1, 2]", "[]x", '"text": 1', "null", "{}x"):
        assert read_all(write("c.txt", f"{text}\nmore\n")).texts == [*text.split("\n"), "more"]
    for text, told in (("{ broken\n", ":1: malformed JSON"), ("plain\n", ":1: malformed JSON"),
                       ('["a", "b"]', ":1: expected a JSON object, got str"),
                       ('[{"text": "a"}, 3]', ":2: expected a JSON"), ('[{"text": "a"}, {"x": 1}]', ":2: no text")):
        for path in (write("c.json", text), write("c.NDJSON", text)):
            assert fault(path).startswith(f"{path}{told}")


@pytest.mark.parametrize(("record", "identifier", "text", "metadata"), [
    ({"_id": "d1", "title": "T", "text": "b", "metadata": {}}, "d1", "b", {}),  # as BEIR has them
    ({"_id": 7, "contents": "b"}, "7", "b", {}),  # Pyserini
    ({"_id": "x", "id": "i", "body": "b"}, "i", "b", {"_id": "x"}),
    ({"passage": "p", "body": "b", "contents": "c"}, "c.jsonl:1", "c", {"body": "b", "passage": "p"}),
    ({"text": "b", "metadata": {"page": 3, "url": "u"}, "url": "v"}, "c.jsonl:1", "b", {"page": 3, "url": "v"}),
    ({"text": "b", "metadata": "m", "half": "\ud800"}, "c.jsonl:1", "b", {"metadata": "m", "half": "\ud800"})])
def test_the_fields_of_a_record(write, record, identifier, text, metadata):
    [got] = read_all(write("c.jsonl", json.dumps(record))).records
    assert (got.id, got.text) == (identifier, text)
    assert got.metadata == {"path": "c.jsonl"} | metadata


@pytest.mark.parametrize(("name", "separator"), [("c.csv", ","), ("c.TSV", "\t"), ("c.Csv.gz", ";")])
def test_a_table_with_a_header(write, name, separator):
    rows = ["year", "Title", "TEXT", "_id"], ["1990", "A", '"a, b; ""c""\n\n\td"', "x"], [], ["", "", "last"]
    text = "\r\n".join(separator.join(row) for row in rows)
    got = read_all(write(name, BOM + text.encode()))
    assert [(r.id, r.title, r.text.replace("\r", ""), r.where[-2:]) for r in got.records] == [
        ("x", "A", 'a, b; "c"\n\n\td', ":2"), (f"{name}:6", "", "last", ":6")]
    assert [r.metadata for r in got.records] == [{"path": name, "year": "1990"}, {"path": name}]


@pytest.mark.parametrize(("name", "content", "text"), [
    ("c.csv", "text\n" + "word " * 50_000 + "end", "word " * 50_000 + "end"),
    ("c.tsv", "text\nHello, world\n", "Hello, world"),  # only a tab separates
    ("c.csv", utf16("text;n\r\n\u00e4\u0a0d;1\r\n")[0], "\u00e4\u0a0d")])  # as spreadsheets write it
def test_a_cell_is_read(write, name, content, text):
    assert read_all(write(name, content)).texts == [text]


def test_the_rows_of_a_parquet_file(tmp_path):
    cells = {"_id": [7, None], "text": ["a\nb", "c"], "n": [[1.5], None], "day": pyarrow.array([0, None], "date32")}
    pyarrow.parquet.write_table(pyarrow.table(cells), path := tmp_path / "c.parquet")
    assert [(r.id, r.text, r.metadata) for r in read_all(path).records] == [
        ("7", "a\nb", {"path": path.name, "n": [1.5], "day": "1970-01-01"}), ("c.parquet:2", "c", {"path": path.name})]
    assert [text.text for text in refrag.read_training_texts([str(path)])] == ["a\nb", "c"]


def test_a_table_that_can_not_be_read_and_bad_rows_of_one(write):
    for text, told in (("id,Titel\n1,x\n", ":1: no text (nor contents, body, passage) among its keys: id, Titel"),
                       ("some prose\n", ":1: no text (nor contents, body, passage) among its keys: some prose"),
                       ('text,n\nb,1\n"open,2\n', ":3: malformed table"), ('text\n"a" b\n', ":2: malformed table"),
                       ('text,n\na,1\nb, with a comma,2\n,3\n"two" bad,4\nd,5\n', ":3: 3 cells, but the header")):
        path = write("c.csv", text)
        assert fault(path).startswith(f"{path}{told}"), text
    got = read_all(path, errors="skip")
    assert (got.texts, got.ids, got.skipped) == (["a", "d"], ["c.csv:2", "c.csv:6"], 3)


@pytest.mark.parametrize(("named", "inside", "ids"), [
    (["a/notes.txt", "b/notes.txt", "b/a/notes.txt"], [""] * 3, ["notes.txt:1", "b/notes.txt:1", "a/notes.txt:1"]),
    (["c", "d/c", "e"], ["README.md"] * 3, ["c/README.md", "d/c/README.md", "e/README.md"]),
    # the ids of a/b/c.txt and of c.txt in a folder with the label a/b would be the same
    (["a", "x/b", "y/a/b"], ["b/c.txt", "d.txt", "c.txt"], ["a/b/c.txt", "b/d.txt", "y/a/b/c.txt"])])
def test_ids_begin_with_as_much_of_the_path_as_tells_files_apart(write, tmp_path, named, inside, ids):
    for name, file in zip(named, inside, strict=True):
        write(f"{name}/{file}".rstrip("/"), "x\n")
    assert read_all(*(tmp_path / name for name in named)).ids == ids


def test_a_folder_holds_a_document_per_text_file_and_records(write, tmp_path, capsys):
    for name, content in {
        "b.md": "# B\n\nbody\n", "a.txt": "line one\nline two\n", "deep/c.txt.gz": "zipped",
        "d/v1.2 notes.TXT": utf16("wide")[1], "d/e.Markdown": "[link](x)", "d/f.text": "{ prose",
        "d/g.txt": '{"text": "g1"}\n{"id": "g", "text": "g2"}\n', "d/h.JSON": '[{"text": "h1"}]',
        "d/i.csv": "text\ni1", "blank.txt": " \n\n", ".git/config.md": "x", ".hidden.txt": "x", "deep/.svn/x.txt": "x",
        "ignored.py": "code", "a.txt.bak": "an old one", "b.md.zip": "not unzipped", "LICENSE": "no suffix"}.items():
        write(f"docs/{name}", content)
    (tmp_path / "docs/linked").symlink_to(write("elsewhere/j.txt", "j").parent)  # it is not followed
    got = read_all(tmp_path / "docs")
    assert [r[:3] for r in got.records] == [
        ("docs/a.txt", "a", "line one\nline two\n"), ("docs/b.md", "B", "# B\n\nbody\n"),
        ("docs/d/e.Markdown", "e", "[link](x)"), ("docs/d/f.text", "f", "{ prose"), ("docs/d/g.txt:1", "", "g1"),
        ("g", "", "g2"), ("docs/d/h.JSON:1", "", "h1"), ("docs/d/i.csv:2", "", "i1"),
        ("docs/d/v1.2 notes.TXT", "v1.2 notes", "wide"), ("docs/deep/c.txt.gz", "c", "zipped")]
    assert got.records[0].where == str(tmp_path / "docs" / "a.txt") and got.ignored == 5
    told = capsys.readouterr().err
    assert told.startswith("files of other kinds, not read: 5 (") and "LICENSE" in told and told.count("\n") == 1


FAULTY = {"a.txt": b"ab\ncd\xff", "c.jsonl": b'{"text": "one"}\n{"x": 1}\n', "d.json": b'{"name": "x"}',
          "e.csv": b"a,b\n1,2", "f.txt.gz": b"", "g.ndjson": b"prose", "h.tsv": b'text\nrow\n"open',
          "i.txt": b"%PDF-1.7 x", "j.parquet": b"PAR1 x"}
GOOD_IN = {"c.jsonl": ["one"], "h.tsv": ["row"]}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_in_a_folder_takes_neither_its_file_nor_the_others_with_it(write, tmp_path, capsys, name):
    """It is named and counted. In a file that was named itself it stops the run."""
    path = write(f"docs/{name}", FAULTY[name])
    path.write_bytes(FAULTY[name] or damaged_gzip("checksum"))
    write("docs/b.txt", b"good")
    got = read_all(tmp_path / "docs")
    assert (got.texts, got.skipped, got.replaced) == (sorted(["good", *GOOD_IN.get(name, [])]), 1, 0)
    told = capsys.readouterr().err
    assert told.startswith(f"skipped: {path}") and told.count("\n") == 1
    with pytest.raises(refrag.RefragError, match=re.escape(str(path))):
        read_all(path)


def test_skipping_keeps_what_can_be_read(write, tmp_path, capsys):
    """Of a file that was named itself, too: up to where its damage begins. The first ten faults are named."""
    write("docs/c.jsonl", FAULTY["c.jsonl"])
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(damaged_gzip("truncated"))
    got = read_all(tmp_path / "docs", path, write("last.txt", "last"), errors="skip")
    assert got.texts[:2] == ["one", "passage 0"] and got.texts[-1] == "last" and got.skipped == 2
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"skipped: \S*c\.jsonl:2: no text .*", first)
    assert re.fullmatch(r"skipped: \S*cut\.txt\.gz: not a complete gzip .*", second)
    assert read_all(write("many.jsonl", b'{"x": 1}\n' * 50), errors="skip").skipped == 50
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 11 and all(line.startswith("skipped: ") for line in told)
    assert ":10: no text" in told[9] and told[10].endswith("more")


def test_a_file_without_permission_is_left_out(write, tmp_path, capsys, monkeypatch):
    write("docs/b.txt", b"good")
    secret, open_file = write("docs/a.txt", b"secret"), Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args: open_file(path, *args) if path != secret else (
        _ for _ in ()).throw(PermissionError(13, "Permission denied", str(path))))
    assert read_all(tmp_path / "docs").texts == ["good"] and "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "found"), [
    (b"one\r\n\n" + CJK.encode() + b"\n", {"stdin:1": "one", "stdin:3": CJK}),
    (b'one\n{"id": "a"}\n', {"stdin:1": "one", "stdin:2": '{"id": "a"}'}),  # only the first line tells
    *((start + b'{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n', {"a": "one", "b": "two"})
      for start in (b"", BOM, b"\n \n"))])
def test_standard_input(stdin, content, found):
    stdin(content)
    first = read_all("-")
    assert dict(zip(first.ids, first.texts, strict=True)) == found
    stdin(b"two\n")
    assert read_all("-", sources=first.sources).ids == ["stdin-2:1"]
    stdin(b'{"id": "a", "text": "one"}\nbroken\n')
    assert fault("-").startswith("stdin:2: malformed JSON")


@st.composite
def tokenised(draw):
    """(text, token_ends): a text cut into tokens at random places. The white space at its end belongs to no token."""
    text = draw(st.text(st.sampled_from("ab. \n" + CJK + "\u3002"), min_size=1, max_size=80))
    bounds = draw(st.sets(st.integers(1, len(text)), min_size=1, max_size=60))
    return text, sorted(bounds)


@given(tokenised(), st.integers(1, 12), st.integers(0, 6))
def test_pieces_cover_the_text_in_order_and_hold_at_most_size_tokens(case, size, overlap):
    (text, ends), overlap = case, min(overlap, size // 2)
    spans = split_spans(text, ends, size, overlap)
    tokens = [{i for i, end in enumerate(ends) if first < end <= last} for first, last in spans]
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(start < end for start, end in spans) and max(map(len, tokens)) <= size
    for before, after in itertools.pairwise(spans):
        assert before[0] < after[0] <= before[1] < after[1] <= len(text)
    for before, after in itertools.pairwise(tokens):
        shared = len(before & after)
        assert shared <= overlap
        assert shared in (overlap, len(before) - 1), "less is shared only where a piece must move on"
    assert (len(spans) == 1) == (len(ends) <= size)


@pytest.mark.parametrize(("text", "size", "overlap", "pieces"), [("a b c d", 2, 0, ["a b", " c d"]),  # the docstring's
    # 8 words fit. The last quarter holds words 7 and 8: the sentence that ends after 7 wins.
    ("a b c d e f g. h i j k", 8, 0, ["a b c d e f g.", " h i j k"]),
    ("a b c d e f g\u3002 h i j k", 8, 0, ["a b c d e f g\u3002", " h i j k"]),
    # A sentence that ends before the last quarter does not make the piece shorter.
    ("a b c d. e f g h i j k", 8, 0, ["a b c d. e f g h", " i j k"]),
    ("a b c d e f g. h. i j k", 8, 0, ["a b c d e f g. h.", " i j k"]),  # the later of two ends
    ("a b c d e f", 4, 2, ["a b c d", " c d e f"]), ("  a b  ", 2, 1, ["  a b  "]), ("  ", 8, 1, ["  "])])
def test_a_piece_ends_after_a_sentence_in_its_last_quarter(text, size, overlap, pieces):
    ends = [word.end() for word in re.finditer(r"\S+", text)]  # every word is a token
    assert [text[a:b] for a, b in split_spans(text, ends, size, overlap)] == pieces
    # 8 tokens of one character would end inside `hij`; the space after `fg` stands in the last quarter
    letters = "abcde g hij klm"
    ends = [i for i in range(1, len(letters) + 1) if letters[i - 1] != " "]  # 13 tokens
    assert split_spans(letters, ends, 8, 0) == [(0, 7), (7, 15)]


def ask(question: str | None = None, questions: object = None) -> list[dict]:
    return generate.read_questions(refrag.QuestionConfig(question, None if questions is None else str(questions)))


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_one_question_or_a_file_of_them(write, name):
    """A missing id is the number of the question; ids become strings; other fields are kept."""
    path = write(name, BOM + b'{"question": "Who?"}\r\n\n{"id": 7, "question": "When?", "answers": ["1896"]}\n')
    assert ask(questions=path) == [{"id": "1", "question": "Who?"},
                                   {"id": "7", "question": "When?", "answers": ["1896"]}]
    assert ask("Who?") == [{"id": "1", "question": "Who?"}]
    for both_or_none in ({}, {"question": "Who?", "questions": "q.jsonl"}):
        assert fault(by=ask, **both_or_none).startswith("name one of --question and --questions")
    for question, told in (("", "empty"), (" \n", "empty"), ("\udcff", "half of a surrogate")):
        message = fault(by=ask, question=question)
        assert "--question" in message and told in message
    assert fault(by=ask, questions="nowhere.jsonl").startswith("--questions nowhere.jsonl: no such file")


@pytest.mark.parametrize(("name", "text"), [
    ("q.jsonl", '{"_id": "q1", "text": "Who?", "metadata": {}}\n{"_id": 2, "query": "When?", "text": "a context"}'),
    ("q.json", '[{"id": "q1", "question": "Who?"}, {"question": "When?"}]'),
    ("q.csv", "query,id\nWho?,q1\nWhen?,\n"), ("q.txt", "Who?\n\n When? \n")])
def test_questions_of_other_forms(write, stdin, name, text):
    """Those of BEIR as they are; the number of a question is the id of one that has none. Also on stdin."""
    expected = [("1" if name == "q.txt" else "q1", "Who?"), ("2", "When?")]
    assert [(q["id"], q["question"]) for q in ask(questions=write(name, text))] == expected
    if name != "q.csv":
        stdin(utf16(text)[0])
        assert [(q["id"], q["question"]) for q in ask(questions="-")] == expected


@pytest.mark.parametrize(("line", "told"), [("Who?", ":2: malformed JSON"),
    ('{"_id": 1, "query": "again"}', ": ids are not unique"), ('{"id": "1", "question": "x"}', ": ids are not unique"),
    ('{"question": 3}', ":2: question must be a string, got int"),
    ('{"question": "\\ud800"}', ":2: question holds half of a surrogate pair"),
    *((f'{{"id": {bad}, "question": "q"}}', f":2: id {told}") for bad, told in (
        ('"\\ud800"', "holds half"), ("null", "must be"), ("[1]", "must be")))])
def test_a_bad_question_is_refused_with_its_place(write, stdin, line, told):
    content = f'{{"question": "good"}}\n{line}\n'
    path = write("q.jsonl", content)
    assert f"{path}{told}" in fault(by=ask, questions=path)
    stdin(content.encode())
    assert told[:2] == ": " or f"stdin{told}" in fault(by=ask, questions="-")


def test_a_part_of_a_folder_is_read_once_in_any_order_and_keeps_its_ids(write, tmp_path, monkeypatch):
    """Named by itself later, it is that folder's document and replaces it; what was a source of its own stays one."""
    write("docs/a.txt", "one\ntwo")
    write("docs/sub/b.md", "three")
    monkeypatch.chdir(tmp_path)
    whole, inner, here = read_all("docs"), read_all("docs/sub"), read_all(".")
    assert (whole.ids, whole.texts, inner.ids) == (["docs/a.txt", "docs/sub/b.md"], ["one\ntwo", "three"], ["sub/b.md"])
    for names in (("docs", "docs/sub"), ("docs/sub", "docs"), ("docs/sub/b.md", "docs"), ("docs", "docs/a.txt"),
                  ("docs", tmp_path / "docs/a.txt")):
        assert sorted(read_all(*names).ids) == whole.ids, names
    assert read_all(".", "docs/a.txt").ids == here.ids
    for part, known, row in (("docs/a.txt", whole, 0), (tmp_path / "docs/a.txt", whole, 0), ("docs/a.txt", here, 0),
                             ("docs/sub", whole, 1)):
        later = read_all(part, sources=known.sources)
        assert (later.ids, later.texts, later.sources) == ([known.ids[row]], [known.texts[row]], known.sources)
    assert sorted(read_all("docs", sources=inner.sources).ids) == ["docs/a.txt", "sub/b.md"]


def test_a_file_that_is_no_text_is_refused_whatever_its_name(write):
    for head, errors in itertools.product((b"%PDF-1.7\n", b"PK\x03\x04", b"\x89PNG\r\n", b"\xff\xd8\xff\xe0"),
                                          ("strict", "replace")):
        told = fault(write("a.txt", head + b"rest"), errors=errors)
        assert "a.txt is a PDF, picture, archive or office document" in told


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / "docs").mkdir()
    for folder in (tmp_path, tmp_path / "docs"):
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as handle:
            handle.write("one")
    [document] = read_all(tmp_path / "docs").records
    assert (document.id, document.title, document.text) == ("docs/caf\ufffd.txt", "caf\ufffd", "one")
    [line] = read_all(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).records
    assert line.where.encode() and line.where.endswith("caf\ufffd.txt:1")
