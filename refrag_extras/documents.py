"""Whole documents as text with marks: the characters at which pages, slides, sheets or sections begin.

Markdown needs no library; PDF, Word, PowerPoint, Excel, EPUB and HTML files need those of the extra [docs].
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import posixpath
import re
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

import refrag

MARKDOWN = (".md", ".markdown")
TEXTS = (".txt", ".text", *MARKDOWN)
INSTALL = "pip install 'refrag[docs]'"
LIBRARIES = ("lxml", "mammoth", "markdownify", "openpyxl", "pptx", "pypdfium2")
DRAWN = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
LARGEST = 1 << 27  # bytes of XML or HTML in one file: as a tree they take 30 times as much; bombs of zip hold more
OLD_OFFICE = b"\xd0\xcf\x11\xe0"  # a .doc, .xls or .ppt, and the wrapping of a new document with a password
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # \x02: a word goes on in the next line
NO_TITLE = re.compile(r"untitled.*|microsoft \w+ - .*|powerpoint presentation|"
                      r"\S+\.(docx?|xlsx?|pptx?|pdf|html?|indd|dvi|tex)", re.IGNORECASE)
# Front matter and fenced code, which hold no heading; "## Heading ##"; a heading that is underlined.
HEADING = re.compile(r"\A---\n.*?^---$|^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1|\Z)|"
                     r"^ {0,3}(#{1,6})[ \t]+([^\n]{1,300}?)(?:[ \t]+#+)?[\xb6 \t]*$|"
                     r"^([^\s>|#*+-][^\n]{0,300})\n(={3,}|-{3,})[ \t]*$", re.MULTILINE | re.DOTALL)
MARKUP = re.compile(r"!?\[(?=[^\]]*\]\()|\]\([^)]*\)|[*`]")  # of links, pictures and emphasis in a heading
Marks = list[tuple[int, dict[str, Any]]]


class Document(NamedTuple):
    title: str
    text: str
    marks: Marks  # what holds from a character on, such as {"page": 2}


def of_markdown(text: str, title: str = "") -> Document:
    """A Markdown text with its headings as marks; without a title, its first heading of level 1 is one.

    Example: "# Bells" -> Document("Bells", "# Bells", [(0, {"heading": "Bells"})])
    """
    marks = []
    for match in HEADING.finditer(text):
        heading = " ".join(MARKUP.sub("", match[3] or match[4] or "").split())[:200]
        if heading:
            marks.append((match.start(), {"heading": heading}))
            is_title = match[2] == "#" or (match[5] or "").startswith("=")
            title = title or (heading if is_title else "")
    return Document(title, text, marks)


def of_parts(title: str, parts: Iterable[tuple[dict[str, Any], str]]) -> Document:
    """Texts with what holds for each as one document, a blank line between them; empty ones are left out."""
    texts = ((facts, NOT_TEXT.sub("", text).strip()) for facts, text in parts)
    kept = [(facts, f"{text}\n\n") for facts, text in texts if text]
    starts = itertools.accumulate((len(text) for _, text in kept), initial=0)
    return Document(title, "".join(text for _, text in kept),
                    [(start, facts) for start, (facts, _) in zip(starts, kept, strict=False)])


def of_html(html: bytes | str, title: str = "") -> Document:
    """A page as Markdown, without links, pictures and what is not shown or leads elsewhere."""
    import bs4
    import markdownify

    soup = bs4.BeautifulSoup(html, "lxml")
    for tag in soup(["script", "style", "noscript", "template", "nav", "svg"]):
        tag.decompose()
    own_title = soup.title.extract().get_text() if soup.title else ""
    text = markdownify.MarkdownConverter(heading_style="atx", strip=["a", "img"], escape_asterisks=False,
                                         escape_underscores=False, escape_misc=False).convert_soup(soup)
    return of_markdown(re.sub(r"\n\s*\n", "\n\n", NOT_TEXT.sub("", text)).strip(), title or own_title)


def of_pdf(data: bytes, name: str) -> Document:
    """The pages of a PDF file."""
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        refrag.require("password" not in str(error).lower(), f"{name} needs a password: save it without one")
        raise
    with contextlib.closing(pdf):
        pages = refrag.progress(range(len(pdf)), name, unit="page")
        return of_parts(pdf.get_metadata_value("Title"), [({"page": n + 1}, page_text(pdf[n])) for n in pages])


def page_text(page: Any) -> str:
    with contextlib.closing(page), contextlib.closing(page.get_textpage()) as words:
        return words.get_text_bounded()


def of_docx(data: bytes, name: str) -> Document:
    import mammoth

    html = mammoth.convert_to_html(io.BytesIO(data), style_map="p[style-name='Title'] => h1:fresh",
                                   convert_image=mammoth.images.img_element(lambda image: {})).value
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        core = "docProps/core.xml"
        title = ElementTree.fromstring(archive.read(core)).findtext("{*}title") if core in archive.namelist() else ""
    return of_html(html, title)


def of_pptx(data: bytes, name: str) -> Document:
    """The slides of a presentation, each with its notes."""
    import pptx

    show, parts = pptx.Presentation(io.BytesIO(data)), []
    for number, slide in enumerate(show.slides, start=1):
        notes = slide.notes_slide.notes_placeholder if slide.has_notes_slide else None
        lines = [*drawn_lines(slide.element), *(drawn_lines(notes.element) if notes is not None else ())]
        parts.append(({"slide": number}, "\n".join(lines)))
    return of_parts(show.core_properties.title, parts)


def drawn_lines(tree: Any) -> Iterator[str]:
    """The paragraphs in a tree of DrawingML, and the rows of its tables."""
    for node in tree.iter(f"{DRAWN}tr", f"{DRAWN}p"):
        if node.getparent().getparent().tag != f"{DRAWN}tc":
            texts = ("".join(part.text or " " for part in paragraph.iter(f"{DRAWN}t", f"{DRAWN}br"))
                     for paragraph in node.iter(f"{DRAWN}p"))
            if line := " | ".join(text for text in texts if text.strip()):
                yield line


def of_xlsx(data: bytes, name: str) -> Document:
    """The sheets of a workbook, a line for each row that is not empty."""
    import openpyxl

    with contextlib.closing(openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)) as book:
        parts = []
        for sheet in refrag.progress(book.worksheets, name, unit="sheet"):
            rows = (" | ".join("" if value is None else str(value).removesuffix(" 00:00:00") for value in row)
                    for row in sheet.iter_rows(values_only=True))
            parts.append(({"sheet": sheet.title}, "\n".join(row.rstrip(" |") for row in rows if row.strip(" |"))))
        return of_parts(book.properties.title or "", parts)


def of_epub(data: bytes, name: str) -> Document:
    """The chapters of a book in the order of reading."""
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        place = container.find(".//{*}rootfile").get("full-path")
        package = ElementTree.fromstring(book.read(place))
        files = {item.get("id"): urllib.parse.unquote(item.get("href")) for item in package.iterfind(".//{*}item")}
        chapters = [posixpath.join(posixpath.dirname(place), files[item.get("idref")])
                    for item in package.iterfind(".//{*}itemref")]
        locked = "META-INF/encryption.xml"
        locked = book.read(locked).decode() if locked in book.namelist() else ""
        refrag.require(not any(chapter in locked for chapter in chapters), f"{name} is copy-protected: leave it out")
        texts = [of_html(book.read(chapter)).text for chapter in chapters]
        return of_markdown("\n\n".join(texts), package.findtext(".//{*}title") or "")


READERS = {".pdf": of_pdf, ".docx": of_docx, ".pptx": of_pptx, ".xlsx": of_xlsx, ".epub": of_epub,
           ".html": lambda data, name: of_html(data), ".htm": lambda data, name: of_html(data)}


def installed() -> bool:
    """Whether all libraries of the extra are there."""
    return all(map(importlib.util.find_spec, LIBRARIES))


def check(data: bytes, name: str, kind: str) -> None:
    """Raise BadRecord for what no reader should see."""
    if not data.strip():
        raise refrag.BadRecord(f"{name} is empty")
    if data.startswith(OLD_OFFICE):
        raise refrag.BadRecord(f"{name} has a password, or an old format (.doc): save it as {kind} without one")
    if kind in (".html", ".htm") and data.startswith(refrag.BINARY):
        raise refrag.BadRecord(f"{name} is a PDF, picture, archive or office document: {refrag.NOT_AS_NAMED}")
    size = 0 if kind == ".pdf" else len(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(("ml", ".htm")))
    if size > LARGEST:
        raise refrag.BadRecord(f"{name} holds {size >> 20:,} MiB of XML or HTML, more than {LARGEST >> 20}: split it")


def read(source: refrag.TextFile) -> Document:
    """A file as one document. Raises BadRecord if it holds no text or has a password, CorruptError if it is damaged."""
    if source.suffix in TEXTS:
        [(_, text)] = source.lines(as_one=True)
        return of_markdown(text) if source.suffix in MARKDOWN else Document("", text, [])
    with source.opened() as handle:
        data = handle.read()
    try:
        check(data, source.name, source.suffix)
        with warnings.catch_warnings(action="ignore"):  # of the libraries
            title, text, marks = READERS[source.suffix](data, source.name)
    except (refrag.RefragError, ImportError, MemoryError):
        raise
    except Exception as error:  # the readers let out whatever a damaged file makes of them
        told = f"{source.name} is damaged, or no {source.suffix} file ({refrag.one_line(error)[:200]}): save it again"
        raise refrag.CorruptError(told) from None
    title = " ".join(NOT_TEXT.sub("", title or "").split())
    if not text.strip():
        raise refrag.BadRecord(f"{source.name} holds no text, as a scan does: recognise its text (OCR) first")
    return Document("" if NO_TITLE.fullmatch(title) else title, text, marks)
