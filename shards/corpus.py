"""Corpus files to documents, one after another in constant memory, and documents to paragraphs.

| format | a document is | a paragraph is |
|---|---|---|
| text | what stands between blank lines | a line |
| wikitext | an article: from ` = Title = ` to the next one | a line |
| jsonl | the text field of one line | a line of the text |
| mediawiki | a page of namespace 0 that is not a redirect | a line of its wikitext, without the markup |
| mediawiki-prefix | the same, of a dump that may end anywhere | the same |
| parquet | the text column of one row | a line of the text |

All but parquet may be compressed with gzip, bzip2 or zstandard. Splitting a file into documents is cheap and done by
the one process that reads; taking a document apart (`paragraphs`) is the costly half and runs in the workers.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xdscale.errors import XdscaleError
from xdscale.shards.mediawiki import PREFIX_FORMAT, read_pages
from xdscale.shards.parquet import MAGIC, read_parquet
from xdscale.shards.streams import open_stream
from xdscale.shards.wiki_markup import prose_lines

FORMATS = ("text", "wikitext", "jsonl", "mediawiki", PREFIX_FORMAT, "parquet")
LARGEST_LINE_BYTES = 64 << 20
LARGEST_DOCUMENT_BYTES = 1 << 20
"""A longer text or wikitext document is cut at the end of a line, so that memory stays constant."""

_FORMAT_OF_SUFFIX = {
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".xml": "mediawiki",
    ".parquet": "parquet",
}
_UTF16_XML = (b"\xff\xfe<\0", b"\xfe\xff\0<")
_HEADING = re.compile(r"=.*=")
_ARTICLE = re.compile(r"= (?!= ).* =")


@dataclass(frozen=True)
class Document:
    """One document as it stands in its file; `bytes_read` is how far the (compressed) file was read then."""

    text: str
    format: str
    bytes_read: int


def read_documents(
    path: Path, *, format: str = "auto", text_field: str = "text", min_words: int = 5
) -> Iterator[list[str]]:
    """Yields the kept paragraphs of each document of a corpus file: `stream_documents`, then `paragraphs`."""
    for document in stream_documents(path, format=format, text_field=text_field):
        yield paragraphs(document.text, document.format, min_words)


def stream_documents(
    path: Path, *, format: str = "auto", text_field: str = "text", threads: int = 1
) -> Iterator[Document]:
    """Yields the documents of a corpus file in order, as they stand in it.

    Args:
        path: the file, plain or compressed.
        format: one of `FORMATS`, or "auto" to tell it from the first characters.
        text_field: the JSON Lines field or parquet column that holds the text.
        threads: how many may decompress; the documents are the same.

    Raises:
        XdscaleError: missing or unreadable file, bytes that are not UTF-8 (with their offset), bad JSON or no
            text field (with the line), malformed or truncated XML, parquet or compressed data.
    """
    if format == "auto":
        with open_stream(path) as (stream, _):
            format = _detect(path, stream.read(1 << 16))
    if format == "parquet":
        for text, bytes_read in read_parquet(path, text_field):
            yield Document(text, format, bytes_read)
        return
    with open_stream(path, threads) as (stream, bytes_read_of_file):
        for text in _texts(path, stream, format, text_field):
            yield Document(text, format.removesuffix("-prefix"), bytes_read_of_file())


def paragraphs(text: str, format: str, min_words: int) -> list[str]:
    """Returns a document's paragraphs: no empty lines, headings, or lines of fewer words (spec xdbert §4)."""
    lines = prose_lines(text) if format == "mediawiki" else text.split("\n")
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if len(line.split()) >= max(1, min_words) and not _HEADING.fullmatch(line)]


def _detect(path: Path, head: bytes) -> str:
    """Tells the format by the content; a name that says otherwise means another file than the user thinks."""
    found = _format_of(head)
    for suffix in path.suffixes:
        named = _FORMAT_OF_SUFFIX.get(suffix.split("-")[0].lower(), found)
        if head.strip() and named != found:
            raise XdscaleError(
                f"{path}: is named like {named}, but begins {head[:40]!r}; "
                f"download it again (Git LFS leaves pointers), or say --format {found} if that is meant"
            )
    return found


def _format_of(head: bytes) -> str:
    if head.startswith(MAGIC):
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"<mediawiki", b"<?xml")) or head.startswith(_UTF16_XML):
        return "mediawiki"
    if start.startswith(b"{"):
        return "jsonl"
    first_line = start.split(b"\n", 1)[0].decode("utf-8", errors="replace").strip()
    return "wikitext" if _ARTICLE.fullmatch(first_line) else "text"


def _texts(path: Path, stream: BinaryIO, format: str, text_field: str) -> Iterator[str]:
    if format in ("mediawiki", PREFIX_FORMAT):
        return read_pages(path, stream, prefix=format == PREFIX_FORMAT)
    lines = _lines(path, stream)
    if format == "jsonl":
        return _json_texts(path, lines, text_field)
    return _line_documents(lines, articles=format == "wikitext")


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Yields the decoded lines, without line ends; a byte order mark at the start is dropped."""
    offset = 0
    while line := stream.readline(LARGEST_LINE_BYTES):
        if len(line) == LARGEST_LINE_BYTES and not line.endswith(b"\n"):
            raise XdscaleError(
                f"{path}: the line at byte {offset} is longer than {LARGEST_LINE_BYTES} bytes; "
                "put paragraphs on lines of their own"
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = offset + error.start
            raise XdscaleError(
                f"{path}: byte {bad} (0x{line[error.start]:02x}) is not UTF-8; "
                f"convert the file first, for example: iconv -f latin1 -t utf-8 {path.name}"
            ) from None
        yield (text.removeprefix("\ufeff") if offset == 0 else text).rstrip("\r\n")
        offset += len(line)


def _line_documents(lines: Iterator[str], *, articles: bool) -> Iterator[str]:
    document: list[str] = []
    size = 0
    for line in lines:
        stripped = line.strip()
        border = bool(_ARTICLE.fullmatch(stripped)) if articles else not stripped
        if document and (border or size >= LARGEST_DOCUMENT_BYTES):
            yield "\n".join(document)
            document, size = [], 0
        if stripped:
            document.append(line)
            size += len(line)
    if document:
        yield "\n".join(document)


def _json_texts(path: Path, lines: Iterator[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise XdscaleError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(values, dict) or text_field not in values:
            found = ", ".join(values) if isinstance(values, dict) else type(values).__name__
            raise XdscaleError(
                f"{path}:{number}: no field {text_field!r} (found: {found}); name the right one with --text-field"
            )
        text = values[text_field]
        if not isinstance(text, str):
            raise XdscaleError(f"{path}:{number}: {text_field!r} is {type(text).__name__}, expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise XdscaleError(f"{path}:{number}: {text_field!r} holds half of a surrogate pair") from None
        yield text
