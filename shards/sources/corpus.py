"""Corpus files to documents, one after another in constant memory, and documents to paragraphs.

| format | a document is | a paragraph is |
|---|---|---|
| text | what stands between blank lines | a line; in hard-wrapped text, the document |
| wikitext | an article: from ` = Title = ` to the next one | a line |
| wikiextractor | what stands between `<doc …>` and `</doc>` | a line |
| jsonl | the text field of one object, or a string | a line; in hard-wrapped text, what blank lines separate |
| mediawiki | a page of namespace 0 that is not a redirect | a line of its wikitext, without the markup |
| mediawiki-prefix | the same, of a dump that may end anywhere | the same |
| parquet | the text column of one row | as in jsonl |

Rows that are lines of WikiText, as the Hugging Face hub has it, are put together to articles: format wikitext.

All but parquet may be compressed with gzip, bzip2 or zstandard. Splitting a file into documents is cheap and done by
the one process that reads; taking a document apart (`paragraphs`) is the costly half and runs in the workers.
"""

import codecs
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from xdscale.errors import XdscaleError
from xdscale.shards.sources.decoding import BadBytes, decoded
from xdscale.shards.sources.json_texts import json_texts
from xdscale.shards.sources.mediawiki import PREFIX_FORMAT, read_pages
from xdscale.shards.sources.parquet import read_parquet
from xdscale.shards.sources.recognise import ARTICLE, are_wikitext_lines, is_html, recognise
from xdscale.shards.sources.streams import as_stream, open_stream
from xdscale.shards.sources.wiki_markup import prose_lines
from xdscale.shards.sources.wrapping import SAMPLE_CHARACTERS, count_words, joined, looks_wrapped

FORMATS = ("text", "wikitext", "wikiextractor", "jsonl", "mediawiki", PREFIX_FORMAT, "parquet")
LINE_BREAKS = ("auto", "keep", "join")
LARGEST_LINE_CHARACTERS = 64 << 20
LARGEST_DOCUMENT_BYTES = 1 << 20
"""A longer text or wikitext document is cut at the end of a line, so that memory stays constant."""
SAMPLE_ROWS = 256
"""Rows that tell whether rows are lines of WikiText or HTML; fewer where they are long."""

_HEADING = re.compile(r"=.*=")
_DOC = re.compile(r"<doc [^>]*>")
_DOC_TITLE = re.compile(r'\btitle="([^"]*)"')
_DECLARED = re.compile(rb'\s*<\?xml[^>]*?\bencoding=["\']([\w.-]+)')


@dataclass(frozen=True)
class Document:
    """One document as it stands in its file.

    `bytes_read` is how far the (compressed) file was read then, `joined` whether lines of hard-wrapped text were
    joined, `bad_bytes` how many replacements were made between the document before and its end.
    """

    text: str
    format: str
    bytes_read: int
    joined: bool = False
    bad_bytes: int = 0


@dataclass(frozen=True)
class LeftOut:
    """Paragraphs of a document that are not kept, and their words."""

    headings: int
    heading_words: int
    short_paragraphs: int
    short_words: int


def read_documents(path: Path, *, format: str = "auto", min_words: int = 5) -> Iterator[list[str]]:
    """Yields the kept paragraphs of each document of a corpus file: `stream_documents`, then `paragraphs`."""
    for document in stream_documents(path, format=format):
        yield paragraphs(document.text, document.format, min_words)


def stream_documents(
    path: Path,
    *,
    format: str = "auto",
    text_field: str = "text",
    encoding: str = "utf-8",
    replace_bad_bytes: bool = False,
    line_breaks: str = "auto",
    threads: int = 1,
) -> Iterator[Document]:
    """Yields the documents of a corpus file in order, as they stand in it.

    Args:
        path: the file, plain or compressed.
        format: one of `FORMATS`, or "auto" to tell it from the first characters.
        text_field: the JSON field or parquet column that holds the text.
        encoding: of text and JSON without a byte order mark.
        replace_bad_bytes: whether bytes that are no text become U+FFFD, and are counted, instead of an error.
        line_breaks: "join" the lines of paragraphs in text, JSON and parquet, "keep" them apart, or "auto": join where
            the start of the file, or of the row, is hard-wrapped.
        threads: how many may decompress; the documents are the same.

    Raises:
        XdscaleError: missing or unreadable file, no corpus (see `recognise`), bytes that are no text (with their
            offset), bad JSON or no text field (with the line), malformed or truncated XML, parquet or compressed data.
    """
    found = recognise(path, encoding) if format == "auto" else format
    bad = BadBytes(replace_bad_bytes)
    read = 0

    def rows() -> Iterator[str]:
        nonlocal read
        for text, read in read_parquet(path, text_field, bad):  # noqa: B007  (`read` is the enclosing one)
            yield text

    if found == "parquet":
        for text, kind, was_joined in _of_rows(path, rows(), found, line_breaks, checked=format == "auto"):
            yield Document(text, kind, read, was_joined, bad.take())
        return
    with open_stream(path, threads) as (stream, bytes_read):
        if found in ("mediawiki", PREFIX_FORMAT):
            pages = read_pages(path, _checked_xml(path, stream, bad), prefix=found == PREFIX_FORMAT)
            texts = ((text, "mediawiki", False) for text in pages)
        elif found == "jsonl":
            values = json_texts(path, decoded(path, stream, encoding, bad), text_field, bad)
            texts = _of_rows(path, values, found, line_breaks, checked=format == "auto")
        else:
            texts = _of_lines(path, _lines(path, decoded(path, stream, encoding, bad)), found, line_breaks)
        for text, kind, was_joined in texts:
            yield Document(text, kind, bytes_read(), was_joined, bad.take())


def paragraphs(text: str, format: str, min_words: int) -> list[str]:
    """Returns a document's paragraphs: no empty lines, headings, or lines of fewer words."""
    return sort_out(text, format, min_words)[0]


def sort_out(text: str, format: str, min_words: int) -> tuple[list[str], LeftOut]:
    """Returns a document's paragraphs, and what was left out of them.

    Spec xdbert §4. In scripts that put no blanks between words every character counts as one.
    """
    lines = prose_lines(text) if format == "mediawiki" else text.split("\n")
    kept: list[str] = []
    headings, short = [], []
    for line in map(str.strip, lines):
        if not line:
            continue
        words = count_words(line)
        if _HEADING.fullmatch(line):
            headings.append(words)
        elif words < min_words:
            short.append(words)
        else:
            kept.append(line)
    return kept, LeftOut(len(headings), sum(headings), len(short), sum(short))


def _checked_xml(path: Path, stream: BinaryIO, bad: BadBytes) -> BinaryIO:
    """Returns UTF-8 without bad bytes, which the parser would not name; another declared encoding is left to it."""
    head = stream.peek(200)
    declared = _DECLARED.match(head.removeprefix(codecs.BOM_UTF8))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (declared and declared[1].lower() != b"utf-8"):
        return stream
    pieces = decoded(path, stream, "utf-8", bad, may_end_within_character=True)
    return as_stream(piece.encode("utf-8") for piece in pieces)


def _lines(path: Path, pieces: Iterator[str]) -> Iterator[str]:
    """Yields the lines; they end as in the first piece: with a line feed, or as on the first Macs with CR alone."""
    number, size = 0, 0
    begun: list[str] = []  # of the line that goes on; joined once, as a long one comes in many pieces
    end = ""
    for piece in pieces:
        end = end or ("\r" if "\r" in piece[:-1] and "\n" not in piece else "\n")
        first, *others = piece.split(end)
        begun.append(first)
        size += len(first)
        if others:
            yield "".join(begun).rstrip("\r")
            yield from (line.rstrip("\r") for line in others[:-1])
            number += len(others)
            begun, size = others[-1:], len(others[-1])
        if size > LARGEST_LINE_CHARACTERS:
            raise XdscaleError(
                f"{path}: line {number + 1} is longer than {LARGEST_LINE_CHARACTERS} characters; "
                "put paragraphs on lines of their own"
            )
    if last := "".join(begun):
        yield last.rstrip("\r")


def _of_lines(path: Path, lines: Iterator[str], format: str, line_breaks: str) -> Iterator[tuple[str, str, bool]]:
    """Yields (text, format, whether lines were joined) of the documents of a text file."""
    if format == "wikiextractor":
        documents = _extracted(path, lines)
    else:
        head: list[str] = []
        size = 0
        while size < SAMPLE_CHARACTERS and (line := next(lines, None)) is not None:
            head.append(line)
            size += 1 + len(line)
        documents = _line_documents(chain(head, lines), articles=format == "wikitext")
        if format == "text" and _to_join("\n".join(head), line_breaks):
            for text in documents:
                yield joined(text), format, "\n" in text
            return
    for text in documents:
        yield text, format, False


def _of_rows(
    path: Path, rows: Iterator[str], format: str, line_breaks: str, *, checked: bool
) -> Iterator[tuple[str, str, bool]]:
    """Yields the same of the rows of a JSON or parquet file.

    Raises:
        XdscaleError: `checked`, and the rows are HTML.
    """
    head: list[str] = []
    while len(head) < SAMPLE_ROWS and sum(map(len, head)) < LARGEST_DOCUMENT_BYTES:
        if (row := next(rows, None)) is None:
            break
        head.append(row)
    filled = [text for text in head if text.strip()]
    if checked and is_html(filled):
        raise XdscaleError(
            f"{path}: its texts are HTML; take them out of their tags first, for example with trafilatura, or say "
            f"--format {format} to train on them as they stand"
        )
    rows = chain(head, rows)
    if are_wikitext_lines(filled):
        for text in _line_documents((row.rstrip("\r\n") for row in rows), articles=True):
            yield text, "wikitext", False
        return
    for text in rows:
        if "\n" in text and _to_join(text, line_breaks):
            yield joined(text), format, True
        else:
            yield text, format, False


def _to_join(text: str, line_breaks: str) -> bool:
    return line_breaks == "join" or (line_breaks == "auto" and looks_wrapped(text))


def _line_documents(lines: Iterator[str], *, articles: bool) -> Iterator[str]:
    document: list[str] = []
    size = 0
    for line in lines:
        stripped = line.strip()
        border = bool(ARTICLE.fullmatch(stripped)) if articles else not stripped
        if document and (border or size >= LARGEST_DOCUMENT_BYTES):
            yield "\n".join(document)
            document, size = [], 0
        if stripped:
            document.append(line)
            size += len(line)
    if document:
        yield "\n".join(document)


def _extracted(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """Yields the documents of WikiExtractor's output, the line of the title made a heading, `&lt;` and the like read.

    Raises:
        XdscaleError: text outside of a document.
    """
    title: str | None = None  # None outside of a document
    document: list[str] = []
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        begin = _DOC.fullmatch(stripped)
        if begin or stripped == "</doc>":
            if document:
                yield "\n".join(document)
            found = _DOC_TITLE.search(stripped)
            title, document = (html.unescape(found[1]) if found else "") if begin else None, []
        elif stripped and title is None:
            raise XdscaleError(
                f"{path}:{number}: text outside of <doc …> and </doc>; say --format text if it is not the output of "
                "WikiExtractor"
            )
        elif stripped:
            text = html.unescape(line)
            document.append(f"= {title} =" if not document and text.strip() == title else text)
    if document:
        yield "\n".join(document)
