"""Two systems' answers side by side: how often each example was answered correctly over several runs."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import read_bytes

REQUIRED = ("id", "sentence1", "correct_baseline", "correct_ours")
OPTIONAL = "sentence2"

CATEGORIES = ("improved", "worsened", "equal")
"""Of an example: our runs were correct more often, less often, as often."""


@dataclass(frozen=True)
class ComparedExample:
    """One line of a comparison.

    Attributes:
        id: the example's, unique in the file.
        texts: sentence1, and sentence2 if there is one.
        correct_baseline: runs of the original encoder that answered correctly.
        correct_ours: runs of the adapted one.
    """

    id: str
    texts: tuple[str, ...]
    correct_baseline: int
    correct_ours: int

    @property
    def category(self) -> str:
        """One of `CATEGORIES`."""
        difference = self.correct_ours - self.correct_baseline
        return CATEGORIES[0 if difference > 0 else 1 if difference < 0 else 2]


def read_comparison(path: Path, *, runs: int | None = None) -> list[ComparedExample]:
    """Reads a comparison.

    Args:
        path: `.csv` with a header or `.jsonl`, with `id`, `sentence1`, `sentence2` (may be missing or empty),
            `correct_baseline` and `correct_ours`; other columns are left aside.
        runs: of each system; a larger number of correct answers is an error. None if not known.

    Raises:
        XdscaleError: unreadable or of another form; file, line and what was expected are named.
    """
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix)
    if rows is None:
        raise XdscaleError(f"{path}: a comparison is a .csv or a .jsonl file")
    examples: list[ComparedExample] = []
    lines: dict[str, int] = {}
    for line, values in rows(path):
        example = _example(f"{path}, line {line}", values, runs)
        if example.id in lines:
            raise XdscaleError(f"{path}, line {line}: id {example.id!r} stands in line {lines[example.id]} already")
        lines[example.id] = line
        examples.append(example)
    if not examples:
        raise XdscaleError(f"{path}: holds no examples")
    return examples


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # `newline=""` semantics are csv's own: quoted fields may hold line breaks.
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise XdscaleError(f"{path}, line 1: the header lacks {', '.join(missing)}; it has {found}")
        for values in reader:
            if None in values or None in values.values():
                columns = len(reader.fieldnames)
                raise XdscaleError(f"{path}, line {reader.line_num}: does not have the {columns} columns of the header")
            yield reader.line_num, values
    except csv.Error as error:  # of a line that `reader` itself has not counted yet
        raise XdscaleError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits among them
            raise XdscaleError(f"{path}, line {line}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise XdscaleError(f"{path}, line {line}: expected a JSON object, found {type(values).__name__}")
        yield line, values


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise XdscaleError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def _example(place: str, values: dict[str, Any], runs: int | None) -> ComparedExample:
    missing = [name for name in REQUIRED if values.get(name) in (None, "")]
    if missing:
        raise XdscaleError(f"{place}: {', '.join(missing)} missing or empty")
    texts = (values["sentence1"], values.get(OPTIONAL) or "")
    if not all(isinstance(text, str) for text in texts):
        raise XdscaleError(f"{place}: sentence1 and sentence2 must be text")
    counts = [_count(place, name, values[name], runs) for name in ("correct_baseline", "correct_ours")]
    return ComparedExample(str(values["id"]), tuple(text for text in texts if text), *counts)


def _count(place: str, name: str, value: Any, runs: int | None) -> int:
    # Only plain digits: True, 1.0 and "1e1" are mistakes of whoever wrote the file.
    text = str(value).strip() if isinstance(value, (int, str)) else ""
    if not (text.isascii() and text.isdigit()):
        raise XdscaleError(f"{place}: {name} = {value!r}; expected a number of runs, 0 or more")
    if runs is not None and int(text) > runs:
        raise XdscaleError(f"{place}: {name} = {text}, but there were {runs} runs")
    return int(text)
