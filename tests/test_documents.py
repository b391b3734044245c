"""Whole documents as corpora: their text, titles and marks, what can be wrong with them, and citations by page."""

import gzip
import io
import itertools
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import read_all

import refrag
from refrag_extras import documents, index
from refrag_extras.corpus import Record

RIVER, BELLS, NOTES = "The Rhone leaves Lake Geneva.", "Smiths in the valley cast bells.", "Ada wrote the notes."
OFFICE = "http://schemas.openxmlformats.org"
PROPERTIES = ('<cp:coreProperties xmlns:cp="{0}/package/2006/metadata/core-properties" xmlns:dc="http://purl.org/dc/'
              'elements/1.1/"><dc:title>{1}</dc:title></cp:coreProperties>')


def pdf(*pages: str, title: str = "", locked: bool = False) -> bytes:
    """A PDF file with a line of text on each page; locked: no password opens it."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Count {len(pages)} /Kids [{kids}] >>",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for n, text in enumerate(pages):
        drawn = f"BT /F 12 Tf 50 700 Td ({text}) Tj ET"
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {5 + 2 * n} 0 R "
                    "/Resources << /Font << /F 3 0 R >> >> >>",
                    f"<< /Length {len(drawn)} >> stream\n{drawn}\nendstream"]
    objects += [f"<< /Title ({title}) >>", f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'41' * 32}> /U <{'42' * 32}> >>"]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"/Size {len(places) + 1} /Root 1 0 R /Info {len(places) - 1} 0 R /ID [<41> <41>]"
    trailer += f" /Encrypt {len(places)} 0 R" * locked
    return data + (f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer << {trailer} >>\n"
                   f"startxref\n{len(data)}\n%%EOF\n").encode()


def zipped(files: dict[str, str], claimed: int | None = None) -> bytes:
    """A zip archive; claimed: the size that it says its last file has."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.filelist[-1].file_size = claimed or archive.filelist[-1].file_size
    return data.getvalue()


def docx(*paragraphs: tuple[str, str], title: str = "", **how: int) -> bytes:
    body = "".join(f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'
                   for style, text in paragraphs)
    main = f"{OFFICE}/officeDocument/2006/relationships/officeDocument"
    return zipped({
        "[Content_Types].xml": f'<Types xmlns="{OFFICE}/package/2006/content-types"><Default Extension="xml" '
                               'ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{OFFICE}/package/2006/relationships"><Relationship Id="r" '
                       f'Type="{main}" Target="word/document.xml"/></Relationships>',
        **({"docProps/core.xml": PROPERTIES.format(OFFICE, title)} if title else {}),
        "word/document.xml": f'<w:document xmlns:w="{OFFICE}/wordprocessingml/2006/main"><w:body>{body}</w:body>'
                             "</w:document>"}, **how)


def pptx(*slides: tuple[str, str], title: str = "", table: str = "") -> bytes:
    """Slides of a text and notes; on the last one a table with one row."""
    from pptx import Presentation

    show, data = Presentation(), io.BytesIO()
    for text, notes in slides:
        slide = show.slides.add_slide(show.slide_layouts[6])
        slide.shapes.add_textbox(0, 0, 99, 99).text_frame.text = text
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    if table:
        cells = slide.shapes.add_table(1, 2, 0, 0, 99, 99).table.iter_cells()
        for cell, text in zip(cells, table.split(), strict=True):
            cell.text = text
    show.core_properties.title = title
    show.save(data)
    return data.getvalue()


def xlsx(sheets: dict[str, list[list]], title: str = "") -> bytes:
    from openpyxl import Workbook

    book, data = Workbook(), io.BytesIO()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.properties.title = title
    book.save(data)
    return data.getvalue()


def epub(*chapters: str, title: str = "", more: dict[str, str] | None = None) -> bytes:
    items = "".join(f'<item id="c{n}" href="chapter%20{n}.xhtml"/>' for n in reversed(range(len(chapters))))
    spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    return zipped({
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
                                  '<rootfile full-path="book/content.opf"/></rootfiles></container>',
        "book/content.opf": '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/'
                            f'elements/1.1/"><dc:title>{title}</dc:title></metadata><manifest>{items}</manifest>'
                            f"<spine>{spine}</spine></package>",
        **{f"book/chapter {n}.xhtml": f'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>'
                                      f"part {n}</title></head><body>{body}</body></html>"
           for n, body in enumerate(chapters)}, **(more or {})})


PAGE = f"""<!DOCTYPE html><html><head><meta charset="utf-8"><title>Of rivers
 and bells</title><style>p {{ color: red }}</style></head><body><nav>Home</nav><script>run()</script>
<h1>Rivers</h1><p>{RIVER} <a href="https://example.org/{'x' * 300}">More</a> a_b * c</p>
<h2>Bells<a class="headerlink" href="#bells">\xb6</a></h2><pre># no heading\nmake</pre><p>{BELLS}</p></body></html>"""
FILES = {"a.pdf": pdf(RIVER, BELLS, title="Of rivers and bells"),
    "a.docx": docx(("Heading1", "Rivers"), ("Normal", RIVER), ("Heading2", "Bells"), ("Normal", BELLS),
                   title="Of rivers and bells"),
    "a.pptx": pptx((RIVER, NOTES), (BELLS, ""), title="Of rivers and bells", table="Bronze 950"),
    "a.xlsx": xlsx({"Rivers": [["River", "km"], [], ["Rhone", 813, None]], "Empty": [], "Bells": [["Bronze", 2.5]]},
                   title="Of rivers and bells"),
    "a.epub": epub(f"<h1>Rivers</h1><p>{RIVER}</p>", f"<h1>Bells</h1><p>{BELLS}</p>", title="Of rivers and bells"),
    "a.html": PAGE.encode(), "a.htm": PAGE.encode("utf-16"),
    "a.md": f"# Of rivers and bells\n\n## Rivers\n{RIVER}\n\n## Bells\n{BELLS}\n".encode()}


@pytest.mark.parametrize("name", FILES)
def test_a_document_says_where_each_part_of_it_begins(write, name):
    [got] = read_all(write(name, FILES[name])).records
    assert (got.id, got.title, got.metadata["path"]) == (name, "Of rivers and bells", name)
    ends = [place for place, _ in got.marks[1:]] + [len(got.text)]
    parts = {next(iter(facts.values())): got.text[start:end]
             for (start, facts), end in zip(got.marks, ends, strict=True)}
    assert {key for _, facts in got.marks for key in facts} == {
        "a.pdf": {"page"}, "a.pptx": {"slide"}, "a.xlsx": {"sheet"}}.get(name, {"heading"})
    first, second = (("Rivers", "Bells") if "Rivers" in parts else (1, 2))
    rivers, bells = ("Rhone | 813\n", "Bronze | 2.5") if name == "a.xlsx" else (RIVER, BELLS)
    assert rivers in parts[first] and bells in parts[second]
    assert bells not in parts[first] and rivers not in parts[second]
    assert set(parts) - {"Of rivers and bells"} == {first, second}
    if name == "a.pptx":
        assert NOTES in parts[1] and "Bronze | 950" in parts[2] and parts[2].count("950") == 1
    if name.startswith("a.htm"):
        assert "More a_b * c" in parts["Rivers"] and "# no heading" in parts["Bells"]
        assert not re.search("http|Home|run|color|Of rivers", got.text)


def test_the_lines_of_a_page_end_as_in_any_text_and_warnings_stay_inside(write, capfd, recwarn):
    assert read_all(write("a.pdf", pdf("one) Tj 0 -20 Td (two"))).texts == ["one\ntwo\n\n"]
    found = read_all(write("feed.html", '<?xml version="1.0"?><feed><p>text</p></feed>'))
    assert found.texts == ["text"] and capfd.readouterr() == ("", "") and not recwarn.list
    [half] = read_all(write("half.html", PAGE[: PAGE.index("More")])).texts  # HTML does not say where it should end
    assert RIVER in half


def test_a_zipped_document_small_and_large_letters_and_a_title_that_says_nothing(write):
    write("docs/a.PDF.gz", gzip.compress(FILES["a.pdf"]))
    write("docs/b.Html", PAGE)
    found = read_all(write("docs/c.txt", "text").parent).records
    assert [(r.id, r.title) for r in found] == [("docs/a.PDF.gz", "Of rivers and bells"),
                                                ("docs/b.Html", "Of rivers\n and bells".replace("\n", "")),
                                                ("docs/c.txt", "c")]
    for title in ("", " ", "Untitled 1", "Microsoft Word - draft.doc", "report.docx"):
        assert read_all(write("rivers.pdf", pdf(RIVER, title=title))).records[0].title == "rivers", title


@pytest.mark.parametrize(("text", "headings"), [
    ("# A\n\ntext\n## B ##\n", ["A", "B"]), ("text\n\n### C#\n", ["C#"]), ("#no\n####### no\n    # code\n", []),
    ("```\n# no\n```\n# A", ["A"]), ("~~~ sh\n# no\n```\n# no\n~~~\n# A", ["A"]), ("```\n# no", []),
    ("````\n```\n# no\n````\n# A", ["A"]), ("Above\n=====\n\nBelow\n-----\n", ["Above", "Below"]),
    ("---\ntitle: x\n---\n# A", ["A"]), ("- item\n---\n| a |\n---\n\n---\n", []),
    ("# [`refrag`](https://x.org) *now* ![](b.svg)\n# ![](c.svg)\n", ["refrag now"])])
def test_headings_of_markdown(text, headings):
    marks = documents.of_markdown(text).marks
    assert [facts["heading"] for _, facts in marks] == headings
    for place, facts in marks:
        assert facts["heading"].split()[0] in text[place:].splitlines()[0], "a mark is where its heading begins"


def test_the_facts_of_a_piece_are_those_of_its_first_and_last_character():
    """What comes before the first heading has none. A piece begins and ends with a character that is seen."""
    marks = [(0, {"page": 1}), (7, {"page": 2}), (12, {"page": 4})]
    record = Record("a", "", "x" * 20, "", {"path": "a"}, marks)
    for span, facts in (((0, 5), {"page": 1}), ((2, 9), {"page": 1, "last_page": 2}), ((7, 9), {"page": 2}),
                        ((5, 7), {"page": 1}), ((8, 20), {"page": 2, "last_page": 4})):
        assert json.loads(index.piece_facts(record, *span)) == {"path": "a"} | facts
    record = Record("a", "", "intro\n# A", "", {}, [(6, {"heading": "A"})])
    assert index.piece_facts(record, 0, 5) == index.piece_facts(record, 0, 9) == ""
    assert json.loads(index.piece_facts(record, 6, 9)) == {"heading": "A"}
    assert [index.trimmed("a\n\n b \n", *span) for span in ((1, 7), (0, 4), (3, 5))] == [(4, 5), (0, 1), (4, 5)]
    assert len(range(*index.trimmed(" \n ", 0, 3))) == 0


@pytest.mark.parametrize(("identifier", "metadata", "source"), [
    ("d/a.pdf", {"path": "d/a.pdf", "page": 12}, "d/a.pdf, page 12"),
    ("d/a.pdf", {"path": "d/a.pdf", "page": 12, "last_page": 13}, "d/a.pdf, pages 12-13"),
    ("a.md", {"path": "a.md", "heading": "Setup"}, "a.md, section Setup"),
    ("a.md", {"path": "a.md", "heading": "Setup", "last_heading": "Use"}, "a.md, sections Setup to Use"),
    ("a.xlsx", {"path": "a.xlsx", "sheet": "Sales"}, "a.xlsx, sheet Sales"), ("a.txt", {"path": "a.txt"}, "a.txt#2"),
    ("s1", {"path": "a.jsonl", "page": 3}, "s1#2"), ("s1", {}, "s1#2")])
def test_the_source_of_a_passage(identifier, metadata, source):
    passage = refrag.Passage(0, identifier, 2, "", "text", json.dumps(metadata) if metadata else "")
    assert passage.source == passage.to_json()["source"] == source


LOCK = {"META-INF/encryption.xml": "<encryption>book/chapter 0.xhtml</encryption>"}
BROKEN = {**{f"cut{name[1:]}": (FILES[name][: len(FILES[name]) // 2], 4, f"damaged, or no {name[1:]} file")
       for name in ("a.pdf", "a.docx", "a.pptx", "a.xlsx", "a.epub")},
    **{f"empty{name[1:]}": (b"", 2, "is empty") for name in FILES if name != "a.md"},
    **{f"wrong{suffix}": (b"only text", 4, f"damaged, or no {suffix} file")
       for suffix in (".pdf", ".docx", ".pptx", ".xlsx", ".epub")},
    "pdf.docx": (FILES["a.pdf"], 4, "no .docx file"), "docx.pdf": (FILES["a.docx"], 4, "no .pdf file"),
    "xlsx.pptx": (FILES["a.xlsx"], 4, "no .pptx file"), "pdf.html": (FILES["a.pdf"], 2, "is a PDF, picture"),
    "zip.docx": (zipped({"a": "b"}), 4, "no .docx file"), "zip.epub": (zipped({"a": "b"}), 4, "no .epub file"),
    "torn.docx": (FILES["a.docx"].replace(b"PK\1\2", b"PK\0\0"), 4, "damaged"),
    "flipped.docx": (FILES["a.docx"].replace(FILES["a.docx"][-999:-990], b"\0" * 9), 4, "damaged"),
    "cut.pdf.gz": (gzip.compress(FILES["a.pdf"])[:-9], 4, "not a complete gzip file"),
    "locked.pdf": (pdf(RIVER, locked=True), 2, "needs a password"), "scan.pdf": (pdf("", ""), 2, "holds no text"),
    "locked.docx": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, 2, "has a password, or an old format"),
    "locked.epub": (epub(f"<p>{RIVER}</p>", more=LOCK), 2, "is copy-protected"),
    "blank.docx": (docx(), 2, "holds no text"), "blank.xlsx": (xlsx({"A": []}), 2, "holds no text"),
    "blank.html": (b"<html><script>1</script></html>", 2, "holds no text"), "blank.pptx": (pptx(), 2, "holds no text"),
    "bomb.docx": (docx(("Normal", RIVER), claimed=3 << 30), 2, "holds 3,072 MiB of XML")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_document_is_named_and_skipped_or_ends_the_run(write, name, capsys):
    content, code, told = BROKEN[name]
    path, good = write(f"docs/{name}", content), write("docs/z.pdf", FILES["a.pdf"])
    with pytest.raises(refrag.RefragError, match=re.escape(told)) as caught:
        read_all(path)
    assert caught.value.code == code and str(path) in str(caught.value) and len(str(caught.value)) < 400
    for paths, options in (((path.parent,), {}), ((path, good), {"errors": "skip"})):
        capsys.readouterr()
        found = read_all(*paths, **options)
        err = capsys.readouterr().err
        assert ([Path(name).name for name in found.ids], found.skipped) == (["z.pdf"], 1)
        assert err.startswith(f"skipped: {path}") and told in err and err.count("\n") == 1


def test_without_the_extra_a_folder_names_what_it_lacks(write, refused, tmp_path, monkeypatch, capsys):
    """One of its libraries is not installed. A document that is named ends the run."""
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    for name in FILES:
        write(f"docs/{name}", FILES[name])
    found = read_all(write("docs/b.pdf", FILES["a.pdf"]).parent)
    assert (found.ids, found.ignored, found.skipped) == (["docs/a.md"], len(FILES), 0)
    assert capsys.readouterr().err == (
        "documents that were not read: 2 .pdf, 1 .docx, 1 .pptx, 1 .xlsx, 1 .epub, 1 .html, 1 .htm: "
        "pip install 'refrag[docs]'\n")
    build = ["index", "--index_dir", tmp_path / "index", "--corpus"]  # it can read a.md, but the others might be there
    assert "would delete documents" in refused(3, *build, tmp_path / "docs", "--sync")
    (tmp_path / "docs/a.md").unlink()
    for name, how in itertools.product(("docs/a.pdf", "docs/a.html", "docs"), ((), ("--errors", "skip"))):
        told = refused(3, *build, tmp_path / name, *how)
        assert told.endswith("documents are missing: pip install 'refrag[docs]'") and name in told
    assert not (tmp_path / "index").exists()


def test_an_index_follows_its_documents_and_cites_them_by_page(write, done, run, tmp_path, llama):
    """Sync twice: the second does nothing. A PDF that got shorter leaves nothing behind."""
    words = [f"Page {n} tells of {n * 13} bridges." for n in range(1, 7)]
    path, folder = write("docs/hand.pdf", pdf(*words, title="Handbook")), tmp_path / "index"
    write("docs/guide.md", f"# Guide\n\n## Rivers\n\n{RIVER}\n")
    build = ["index", "--corpus", path.parent, "--index_dir", folder, "--retriever", "bm25", "--dec", llama,
             "--max_passage_tokens", 24, "--overlap", 0]
    done(*build)
    ask = ["--index_dir", folder, "--topk", 1]
    [found] = done("search", *ask, "--question", "78 bridges")["passages"]
    assert found["title"] == "Handbook" and re.fullmatch(r"docs/hand\.pdf, page(s \d-6| 6)", found["source"])
    [page] = done("search", *ask, "--question", "bridges", "--where", "page = 1")["passages"]
    assert page["text"].startswith(words[0]) and page["metadata"]["path"] == "docs/hand.pdf"
    assert "docs/guide.md, section Rivers" in run("search", *ask, "--question", "Rhone")[1]
    answer = ["generate", *ask, "--question", "Which page tells of 78 bridges?", "--dec", llama, "--max_new", 8]
    assert re.search(r"\[1\] Handbook \(docs/hand\.pdf, page(s \d-6| 6)\), ", run(*answer)[1])
    [citation] = done(*answer)["citations"]
    assert (citation["source"], citation["metadata"]["path"]) == (found["source"], "docs/hand.pdf")
    before = json.loads((folder / "manifest.json").read_text())
    sync = ["index", "--sync", "--corpus", path.parent, "--index_dir", folder, "--dec", llama]
    assert done(*sync)["computed"] == 0 and json.loads((folder / "manifest.json").read_text()) == before
    path.write_bytes(pdf(*words[:2], title="Handbook"))
    done(*sync)
    texts = refrag.open_index(folder).passages["text"].to_pylist()
    assert "Page 2 tells" in "".join(texts) and "Page 3" not in "".join(texts)
