"""Reads dependency parses of captions in CoNLL-U, and finds their words in the captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xdscale.data.task_files import Example, place
from xdscale.errors import XdscaleError
from xdscale.files import count_of, open_text

COLUMNS = 10


class Word(NamedTuple):
    """A word of a parse.

    Attributes:
        head: number of the word that it depends on, counted from 0; -1 of the root.
        relation: to that word, as the parser calls it.
        start: first character in the caption.
        end: after the last one.
    """

    head: int
    relation: str
    start: int
    end: int


class Arc(NamedTuple):
    """A dependency whose governor stands in a phrase with gold boxes.

    Attributes:
        relation: its name.
        example: of the governor's phrase.
        dependent: characters of the dependent word in the caption: from which heads are asked.
    """

    relation: str
    example: Example
    dependent: tuple[int, int]


def read_parses(path: Path, captions: list[str]) -> list[list[Word]]:
    """Reads the parses of captions, one sentence each, in their order.

    Args:
        path: CoNLL-U: ten columns with tabs, an empty line behind each sentence; lines with # are comments. Lines of
            joined words (2-3) are left out, as are empty nodes (2.1): the words themselves follow.
        captions: what was parsed. Between words there may be white space that the parser does not tell of.

    Raises:
        XdscaleError: the file cannot be read, a line is none of these, a head is no word of its sentence, or a word is
            not found in its caption; with the line.
    """
    parses = []
    for number, (line, rows) in enumerate(_sentences(path)):
        if number == len(captions):
            raise XdscaleError(f"{place(path, line)}: a further sentence than {count_of(len(captions), 'caption')}")
        parses.append(_located(path, rows, captions[number]))
    if len(parses) < len(captions):
        found = count_of(len(parses), "sentence")
        raise XdscaleError(f"{path}: {found}, expected {len(captions)}, one for each caption")
    return parses


def arcs(parse: list[Word], phrases: list[Example]) -> Iterator[Arc]:
    """Yields the dependencies of a caption whose governor stands in a phrase.

    Args:
        parse: of the caption.
        phrases: its examples, as `xdscale.tasks.flickr30k_entities` reads them.
    """
    for word in parse:
        if word.head < 0:
            continue
        governor = parse[word.head]
        for example in phrases:
            ((span,),) = example.spans[0]
            if span.start <= governor.start and governor.end <= span.end:
                yield Arc(word.relation, example, (word.start, word.end))


def _sentences(path: Path) -> Iterator[tuple[int, list[tuple[int, list[str]]]]]:
    """Yields the line on which each sentence begins, and its words' lines and columns."""
    rows: list[tuple[int, list[str]]] = []
    with open_text(path) as file:
        lines = file.read().split("\n")
    for number, line in enumerate([*lines, ""], 1):
        line = line.rstrip("\r")
        if not line.strip():
            if rows:
                yield rows[0][0], rows
            rows = []
        elif not line.startswith("#"):
            columns = line.split("\t")
            if len(columns) != COLUMNS:
                found = count_of(len(columns), "column")
                raise XdscaleError(f"{place(path, number)}: {found}, expected {COLUMNS} with tabs between them")
            if not ("-" in columns[0] or "." in columns[0]):
                rows.append((number, columns))


def _located(path: Path, rows: list[tuple[int, list[str]]], caption: str) -> list[Word]:
    words, end = [], 0
    for count, (line, columns) in enumerate(rows, 1):
        number, form, head, relation = columns[0], columns[1], columns[6], columns[7]
        if number != str(count):
            raise XdscaleError(f"{place(path, line)}: word {number!r}, expected {count}; is an empty line missing?")
        if not (head.isdecimal() and int(head) <= len(rows) and int(head) != count):
            raise XdscaleError(f"{place(path, line)}: head = {head!r}; expected another word, 1 to {len(rows)}, or 0")
        start = len(caption) - len(caption[end:].lstrip())
        if not form or not caption.startswith(form, start):
            raise XdscaleError(
                f"{place(path, line)}: {form!r} does not follow in the caption: {caption[end:][:60]!r}; parse the "
                "captions as they are, one sentence each"
            )
        end = start + len(form)
        words.append(Word(int(head) - 1, relation, start, end))
    return words
