"""Reads the rows of task files: TSV, CSV, JSON Lines and parquet."""

import csv
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xdscale.errors import XdscaleError
from xdscale.files import count_of, one_line, open_text

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")
"""What a task's files may end with."""

NO_LABEL = -1
"""Stands for the label of an unlabelled or a padding example."""

LONGEST_TEXT = 100_000
"""Characters. More is no sentence but a file read the wrong way."""

MOST_TORN_ROWS = 1e-3
"""Share of a file's rows that may lack columns, in a task that is known to have such rows."""


class Span(NamedTuple):
    """Characters `text[start:end]` that name region number `region` of the image; −1 where no region is named."""

    start: int
    end: int
    region: int


@dataclass(frozen=True, slots=True)
class Example:
    """One example.

    Attributes:
        id: its name in the file, or its number.
        texts: what an encoder is given, the same number each: one text, or two that are judged together; of a task with
            choices one such tuple for each choice, else a single one.
        label: class number, number of the right choice, or target of a regression; None in an unlabelled split.
        line: of the file, counted from 1.
        images: ids of its images in the table of regions, in order.
        spans: for each text of `texts`, the parts of it that stand for regions; empty where nothing is aligned.
        truth: what the task's targets and metrics need beside the label.
        named: the regions of its image that are spoken of, in order, for encoders that read these alone; None where the
            task does not say.
    """

    id: str
    texts: tuple[tuple[str, ...], ...]
    label: float | None
    line: int
    images: tuple[str, ...] = ()
    spans: tuple[tuple[tuple[Span, ...], ...], ...] = ()
    truth: Any = None
    named: tuple[int, ...] | None = None


def read_rows(
    path: Path,
    wanted: Sequence[str],
    title: str,
    *,
    optional: Sequence[str] = (),
    header: Sequence[str] = (),
    torn_rows: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields a file's rows: the number of the line (in parquet, of the row), counted from 1, and text by column.

    Args:
        path: .csv (with quoting), .jsonl (one object per line), .parquet, else TSV, where quotes are text.
        wanted: columns that are needed.
        title: of the task, for messages.
        optional: columns that are given where they are there.
        header: of a TSV or CSV file that has no header line.
        torn_rows: told of the TSV or CSV rows without all columns that were left out, if they are few; None refuses.

    Raises:
        XdscaleError: the file cannot be read or is of another format; a column or a value is missing; a row is torn;
            a text is far too long; with file and line.
    """
    read = {".jsonl": _of_json_lines, ".parquet": _of_parquet}.get(path.suffix)
    if read is None:
        yield from _of_cells(path, wanted, title, optional, header, torn_rows)
        return
    for line, row in read(path, wanted, title, optional):
        yield line, {name: _checked(path, line, name, value) for name, value in row.items()}


def place(path: Path, line: int) -> str:
    """Returns where a row stands, as messages name it."""
    return f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {line}"


def _of_cells(
    path: Path,
    wanted: Sequence[str],
    title: str,
    optional: Sequence[str],
    header: Sequence[str],
    torn_rows: Callable[[str], None] | None,
) -> Iterator[tuple[int, dict[str, str]]]:
    rows = _csv(path) if path.suffix == ".csv" else _tsv(path)
    first = None if header else next(rows, None)
    if first is None and not header:
        raise XdscaleError(f"{path}: is empty; expected a header line")
    columns = list(header) if header else first[1]
    _require_columns(f"{path}, line 1", wanted, columns, title)
    _require_single(f"{path}, line 1", wanted, columns)
    places = {name: columns.index(name) for name in (*wanted, *optional) if name in columns}
    torn, whole = [], 0
    for line, row in rows:
        if row in ([], [""]):
            continue
        if len(row) != len(columns):
            if torn_rows is None:
                raise XdscaleError(f"{path}, line {line}: {count_of(len(row), 'column')}, expected {len(columns)}")
            torn.append(line)
            continue
        whole += 1
        if any(len(cell) > LONGEST_TEXT for cell in row):
            for name, cell in zip(columns, row):
                _require_bearable(path, line, name, cell)
        yield line, {name: row[index] for name, index in places.items()}
    if len(torn) > MOST_TORN_ROWS * whole:
        raise XdscaleError(
            f"{path}, line {torn[0]}: a column is missing, as in {len(torn)} of {whole + len(torn)} rows"
        )
    if torn and torn_rows is not None:
        torn_rows(f"{path}: {count_of(len(torn), 'row')} without all columns left out, first line {torn[0]}")


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Splits lines at tabs; quotes are text. Only line feeds end a line: sentences may hold other separators."""
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n").split("\t")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = None
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for row in reader:
                yield line, row
                line = reader.line_num + 1
    except csv.Error as error:
        raise XdscaleError(f"{path}, line {reader.line_num if reader else 1}: not CSV: {error}") from None


def _of_json_lines(
    path: Path, wanted: Sequence[str], title: str, optional: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(path, newline="\n") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                values = json.loads(text, object_pairs_hook=_no_key_twice)
            except (ValueError, RecursionError) as error:
                raise XdscaleError(f"{place(path, number)}: not JSON: {one_line(error)}; expected an object") from None
            if not isinstance(values, dict):
                raise XdscaleError(f"{place(path, number)}: {type(values).__name__}, expected a JSON object")
            _require_columns(place(path, number), wanted, list(values), title)
            yield number, {name: values[name] for name in (*wanted, *optional) if name in values}


def _of_parquet(
    path: Path, wanted: Sequence[str], title: str, optional: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(str(path), wanted, names, title)
            _require_single(str(path), wanted, names)
            columns = [name for name in (*wanted, *optional) if name in names]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise XdscaleError(f"{path}: not readable parquet: {one_line(error)}") from None


def _checked(path: Path, line: int, name: str, value: Any) -> str:
    """Returns a JSON or parquet value as a TSV file would hold it: `true`, `3`, `0.5`, or the text itself."""
    where = f"{place(path, line)}: column {name!r}"
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    if missing or not isinstance(value, str | bool | int | float):
        found = "no value" if value is None else f"the value {value}" if missing else f"a {type(value).__name__}"
        raise XdscaleError(f"{where} has {found}; expected a text, or a number")
    text = value if isinstance(value, str) else json.dumps(value)
    _require_bearable(path, line, name, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise XdscaleError(f"{where} is not valid Unicode: {error.reason}") from None
    return text


def _require_columns(where: str, wanted: Sequence[str], columns: Sequence[str], title: str) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        # In quotes where else nobody could see of what it consists, such as a blank at its end.
        found = ", ".join(name if name == " ".join(name.split()) and name else repr(name) for name in map(str, columns))
        raise XdscaleError(
            f"{where}: no column {', '.join(map(repr, missing))}; {title} has {', '.join(wanted)}, "
            f"found {textwrap.shorten(found, 300, placeholder=' …')}"
        )


def _require_single(where: str, wanted: Sequence[str], columns: Sequence[str]) -> None:
    twice = [name for name in wanted if columns.count(name) > 1]
    if twice:
        raise XdscaleError(f"{where}: two columns are named {twice[0]!r}; rename one")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


def _require_bearable(path: Path, line: int, name: str, text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise XdscaleError(
            f"{place(path, line)}: column {name!r} has {len(text):,} characters, at most "
            f"{LONGEST_TEXT:,} are expected; is a quote or a line break missing?"
        )
