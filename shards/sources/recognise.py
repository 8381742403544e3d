"""Which format a corpus file has, by its content; what is no corpus is refused with what to do instead."""

import csv
import io
import re
from collections.abc import Sequence
from json.decoder import scanstring
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.shards.sources.decoding import encoding_of
from xdscale.shards.sources.inputs import COMPRESSIONS
from xdscale.shards.sources.parquet import MAGIC
from xdscale.shards.sources.streams import open_stream

HEAD_BYTES = 1 << 16
ARTICLE = re.compile(r"= (?!= ).* =")
SECTION = re.compile(r" = = .+ = = ")
"""WikiText's headings: titles and sections."""

_NAMED = {
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".xml": "mediawiki",
    ".parquet": "parquet",
    ".csv": "table",
    ".tsv": "table",
    ".htm": "html",
    ".html": "html",
    ".xhtml": "html",
    ".eml": "mail",
    ".mbox": "mail",
}
_ADVICE = {
    "html": "is HTML; take the text out of its tags first, for example with trafilatura",
    "markup": "is marked up with tags that are not read; take the text out of them first",
    "table": "is a table (CSV or TSV); write it as parquet first, for example with pandas, and name its text column "
    "with --text-field",
    "mail": "is a mailbox; take the messages' text out first, for example with Python's mailbox module",
    "latex": "is LaTeX; take the text out first, for example with pandoc -t plain",
    "lfs": "is a pointer that Git LFS left instead of the file; fetch it with: git lfs pull",
    "warc": "is a web archive; take the text out of its pages first, for example with trafilatura",
}
_BINARY = {
    b"%PDF-": "a PDF file; take its text out first, for example with pdftotext",
    b"{\\rtf": "a rich text file; save it as plain text first",
    b"\xd0\xcf\x11\xe0": "an office document; save it as plain text first",
    b"ARROW1": "an Arrow file; write it as parquet first",
    b"SQLite format 3": "a database; write its text as JSON Lines first",
    b"\x1f\x8b": "compressed twice; decompress it once",
    b"BZh91AY&SY": "compressed twice; decompress it once",
    b"\x28\xb5\x2f\xfd": "compressed twice; decompress it once",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
# Neither in text of any encoding nor used to lay it out; a fifteenth of bytes drawn at random.
_CONTROLS = bytes((*range(1, 7), *range(14, 26), 127))
_CLOSING_TAG = re.compile(r"</[a-zA-Z][\w:.-]*\s*>")
_HTML = re.compile(
    r"<(!doctype html|html|head|body|div|p|span|h[1-6]|article|section|table|ul|ol|br|a)\b", re.IGNORECASE
)
_PROLOGUE = re.compile(r"(<\?.*?\?>|<!--.*?-->|<!DOCTYPE[^>]*>|\s)*", re.DOTALL)
_MAILBOX = re.compile(r"From \S+.*\d\d:\d\d.*\n[A-Z][\w-]*: ")
_MESSAGE = re.compile(r"(Received|Return-Path|Delivered-To|Message-ID|MIME-Version): ", re.IGNORECASE | re.MULTILINE)
_COLUMN = re.compile(r"[\w.-]{1,30}( [\w.-]{1,30}){0,2}")


def recognise(path: Path, encoding: str) -> str:
    """Returns the format of a corpus file.

    Args:
        path: the file, plain or compressed.
        encoding: of its text, where it has no byte order mark.

    Raises:
        XdscaleError: it cannot be read, its name says another format than its content, or it is none that is read:
            HTML, tables, mail, documents, archives and others, each with what to do.
    """
    with open_stream(path) as (stream, _):
        head = stream.read(HEAD_BYTES)
    if head.startswith(MAGIC):
        found = "parquet"
    else:
        _refuse_binary(path, head, encoding)
        text = head.decode(encoding_of(head, encoding), errors="ignore").removeprefix("\ufeff")
        found = _format_of(text)
    for suffix in [suffix for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS][-1:]:
        named = _NAMED.get(suffix.split("-")[0].lower(), found)
        if named == "jsonl" and head.lstrip().startswith((b"[", b'"')):
            found = named  # there a string or an array is nothing else
        if not head.strip() or named == found:
            continue
        if named in _ADVICE:
            found = named
        elif found not in _ADVICE:
            raise XdscaleError(
                f"{path}: is named like {named}, but begins {head[:40]!r}; "
                f"download it again, or say --format {found} if that is meant"
            )
    if found in _ADVICE:
        meant = "" if found == "lfs" else "; or say --format text to train on it as it stands"
        raise XdscaleError(f"{path}: {_ADVICE[found]}{meant}")
    return found


def is_html(texts: Sequence[str]) -> bool:
    """Tells whether most of these texts are HTML."""
    return sum(_HTML.match(text.lstrip()[:20]) is not None for text in texts) > len(texts) / 2


def are_wikitext_lines(texts: Sequence[str]) -> bool:
    """Tells whether these rows are the lines of WikiText, as the Hugging Face hub has it, and not documents."""
    lines = [text.rstrip("\r\n") for text in texts]
    if any("\n" in line for line in lines):
        return False
    return any(_is_heading(line) for line in lines)


def _is_heading(line: str) -> bool:
    title = line.startswith(" = ") and line.endswith(" = ") and ARTICLE.fullmatch(line.strip())
    return bool(title or SECTION.fullmatch(line))


def _refuse_binary(path: Path, head: bytes, encoding: str) -> None:
    for magic, what in _BINARY.items():
        if head.startswith(magic):
            raise XdscaleError(f"{path}: is {what}")
    if head[257:262] == b"ustar":
        raise XdscaleError(f"{path}: is a tar archive; unpack it and name the folder")
    wide = encoding_of(head, encoding).startswith(("utf-16", "utf-32"))
    if not wide and head.count(0) > len(head) // 5:
        halves = head[::2].count(0), head[1::2].count(0)
        if min(halves) * 4 < max(halves):
            name = "utf-16-be" if halves[0] > halves[1] else "utf-16-le"
            raise XdscaleError(f"{path}: looks like UTF-16 without a byte order mark; say --encoding {name}")
        raise XdscaleError(f"{path}: is no text: {head.count(0)} of its first {len(head)} bytes are zero")
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if not wide and controls > len(head) // 20:
        raise XdscaleError(
            f"{path}: is no text: {controls} of its first {len(head)} bytes are control characters; take its text out "
            "first"
        )


def _format_of(text: str) -> str:
    start = text.lstrip()
    if start.startswith("<"):
        return _format_of_markup(start)
    if start.startswith("{") or _is_json_array(start):
        return "jsonl"
    if start.startswith("version https://git-lfs.github.com/"):
        return "lfs"
    if start.startswith("WARC/"):
        return "warc"
    if start.startswith("\\documentclass"):
        return "latex"
    if _MAILBOX.match(start) or _MESSAGE.match(start):
        return "mail"
    if ARTICLE.fullmatch(start.split("\n", 1)[0].strip()) or _has_wikitext_sections(text):
        return "wikitext"
    return "table" if _is_table(text) else "text"


def _format_of_markup(start: str) -> str:
    inside = _PROLOGUE.sub("", start, count=1)
    if inside.startswith("<mediawiki"):
        return "mediawiki"
    if re.match(r"<doc [^>\n]*\bid=", inside):
        return "wikiextractor"
    if _HTML.match(inside) or _HTML.match(start):
        return "html"
    # <unk> and the like may begin a text; what opens tags and closes them is no text.
    known = start.startswith(("<?xml", "<!")) or len(_CLOSING_TAG.findall(inside)) >= 2
    return "markup" if known else "text"


def _is_json_array(start: str) -> bool:
    """Tells an array of objects or strings from text that begins with a bracket, such as "[1] See"."""
    inside = start[1:].lstrip()
    if not start.startswith("[") or not inside.startswith(("{", '"')):
        return False
    if inside.startswith("{"):
        return inside[1:].lstrip()[:1] in ('"', "}", "")
    try:
        _, end = scanstring(inside, 1)
    except ValueError:
        return "\n" not in inside
    return inside[end:].lstrip()[:1] in (",", "]", "")


def _has_wikitext_sections(text: str) -> bool:
    """Tells the later pieces of a WikiText file, which need not begin with a title."""
    lines = text.split("\n")
    return any(_is_heading(line) and SECTION.fullmatch(line) is None for line in lines) and any(
        SECTION.fullmatch(line) for line in lines
    )


def _is_table(text: str) -> bool:
    lines = text.split("\n")[:200]
    lines = [f"{line}\n" for line in (lines[:-1] if len(lines) > 1 else lines)]
    for delimiter in "\t,;|":
        try:
            rows = list(csv.reader(io.StringIO("".join(lines)), delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        if len(rows) < 2 or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows[1:-1] or rows[1:]):
            continue
        header = all(map(_COLUMN.fullmatch, rows[0])) and len(set(rows[0])) == len(rows[0])
        quoted = all(line.startswith('"') and f'"{delimiter}' in line for line in lines)
        if delimiter == "\t" or header or quoted:
            return True
    return False
