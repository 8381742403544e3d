"""Reads tasks from files in their public formats."""

import csv
import hashlib
import math
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from xdscale.data.task_table import Task
from xdscale.errors import XdscaleError
from xdscale.files import file_sha256

HELD_OUT_SHARE = 0.1
"""Share of the training file held out for development where a task has no public development split (READ)."""

LONGEST_TEXT = 100_000
"""Characters. More is no sentence but a file read the wrong way."""

MOST_TORN_ROWS = 1e-3
"""Share of a file's rows that may lack columns, in a task that is known to have such rows."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example.

    Attributes:
        id: its name in the file, or its number.
        first: the (first) sentence.
        seconds: nothing, the second sentence, or the choices.
        label: class number, or the target of a regression; None in an unlabelled split.
        line: of the file, counted from 1.
    """

    id: str
    first: str
    seconds: tuple[str, ...]
    label: float | None
    line: int


@dataclass(frozen=True)
class TaskData:
    """A task's splits.

    Attributes:
        task: whose.
        train: training examples in file order.
        dev: the same for each development split.
        test: the same, without labels, for each submission file whose split is there.
        files: SHA-256 and rows of each file read, by its name.
    """

    task: Task
    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    files: dict[str, dict[str, str | int]]

    def fingerprint(self) -> str:
        """Returns the SHA-256 (hex) of all files' hashes."""
        text = "\n".join(f"{name} {entry['sha256']}" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()


def read_task(task: Task, data: Path) -> TaskData:
    """Reads all splits of a task.

    Args:
        task: which.
        data: the folder that holds the tasks' folders, or this task's own.

    Raises:
        XdscaleError: a split is missing or empty, a column is missing, a label is none of the task's, or a row is
            torn; with file and line.
    """
    folder = data / task.folder
    if not folder.is_dir():
        folder = data
    if not (folder / task.train).is_file():
        raise XdscaleError(
            f"{data}: has no {task.folder}/{task.train}; --data is the folder that holds {task.folder}/ as it is "
            "published (GLUE's glue_data, say), with the files under their public names"
        )
    files: dict[str, dict[str, str | int]] = {}

    def read(name: str, *, labelled: bool) -> list[Example]:
        path = folder / name
        if not path.is_file():
            raise XdscaleError(f"{path}: no such file; the development split of {task.title} is needed")
        examples = read_examples(task, path, labelled=labelled)
        files[name] = {"sha256": file_sha256(path), "rows": len(examples)}
        return examples

    train = read(task.train, labelled=True)
    dev = {}
    for split, name in task.dev.items():
        if name == task.train:
            dev[split] = [example for example in train if held_out(example.id)]
            train = [example for example in train if not held_out(example.id)]
            _require_some(folder / name, split, dev[split])
            _require_some(folder / name, "train", train)
        else:
            dev[split] = read(name, labelled=True)
    present = {out: name for out, name in task.test.items() if (folder / name).is_file()}
    return TaskData(task, train, dev, {out: read(name, labelled=False) for out, name in present.items()}, files)


def held_out(identifier: str) -> bool:
    """Returns whether a row of a task without a public development split belongs to the one made here.

    The first 8 bytes of the id's SHA-256, as a fraction of 2**64, are below `HELD_OUT_SHARE`. It depends on nothing
    else, so everybody holds out the same rows, whatever the order of the file.
    """
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def read_examples(task: Task, path: Path, *, labelled: bool) -> list[Example]:
    """Reads one file.

    Args:
        task: whose columns and labels are expected.
        path: a .tsv file (no quoting) or a .csv file (with quoting).
        labelled: whether the label column is needed; in an unlabelled split it is not looked at.

    Raises:
        XdscaleError: as `read_task`.
    """
    rows = _read_csv(path) if path.suffix == ".csv" else _read_tsv(path)
    headerless = labelled and bool(task.headerless)
    try:
        columns = list(task.headerless) if headerless else next(rows)[1]
    except StopIteration:
        raise XdscaleError(f"{path}: is empty; expected a header line") from None
    wanted = [task.first, *task.seconds, *([task.prefix] if task.prefix else []), *([task.label] if labelled else [])]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise XdscaleError(
            f"{path}, line 1: no column {', '.join(map(repr, missing))}; {task.title} has {', '.join(wanted)}, "
            f"found {textwrap.shorten(', '.join(columns), 300, placeholder=' …')}"
        )
    place = {name: index for index, name in enumerate(columns)}
    examples: list[Example] = []
    torn = []
    for line, row in rows:
        if row in ([], [""]):
            continue
        if len(row) != len(columns):
            if not task.torn_rows:
                raise XdscaleError(f"{path}, line {line}: {len(row)} columns, expected {len(columns)}")
            torn.append(line)
            continue
        examples.append(_example(task, path, line, row, place, len(examples), labelled=labelled))
    _require_some(path, "it", examples)
    _report_torn(path, torn, len(examples))
    return examples


def _example(
    task: Task, path: Path, line: int, row: list[str], place: dict[str, int], number: int, *, labelled: bool
) -> Example:
    long = [name for name, index in place.items() if index < len(row) and len(row[index]) > LONGEST_TEXT]
    if long:
        raise XdscaleError(
            f"{path}, line {line}: column {long[0]!r} has {len(row[place[long[0]]]):,} characters, at most "
            f"{LONGEST_TEXT:,} are expected; is a quote or a line break missing?"
        )
    prefix = row[place[task.prefix]] + " " if task.prefix else ""
    identifier = row[place[task.id]] if task.id in place else str(number)
    label = _label(task, path, line, row[place[task.label]]) if labelled else None
    return Example(identifier, row[place[task.first]], tuple(prefix + row[place[c]] for c in task.seconds), label, line)


def _label(task: Task, path: Path, line: int, text: str) -> float:
    where = f"{path}, line {line}: {task.label} = {text!r}"
    if not task.regression:
        if text not in task.labels:
            raise XdscaleError(f"{where}: not a label of {task.title}; expected {' or '.join(task.labels)}")
        return task.labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    low, high = task.span
    if not (math.isfinite(value) and low <= value <= high):
        limits = f" from {low:g} to {high:g}" if math.isfinite(low) else ""
        raise XdscaleError(f"{where}: expected a number{limits}")
    return value


def _read_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Splits lines at tabs; quotes are text. Only line feeds end a line: sentences may hold other separators."""
    with _text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n").split("\t")


def _read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = None
    try:
        with _text(path, newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for row in reader:
                yield line, row
                line = reader.line_num + 1
    except csv.Error as error:
        raise XdscaleError(f"{path}, line {reader.line_num if reader else 1}: not CSV: {error}") from None


@contextmanager
def _text(path: Path, *, newline: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise XdscaleError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None


def _report_torn(path: Path, torn: list[int], rows: int) -> None:
    if len(torn) > MOST_TORN_ROWS * rows:
        raise XdscaleError(f"{path}, line {torn[0]}: a column is missing, as in {len(torn)} of {rows + len(torn)} rows")
    if torn:
        print(f"warning: {path}: {len(torn)} rows without all columns left out, first line {torn[0]}", file=sys.stderr)


def _require_some(path: Path, split: str, examples: list[Example]) -> None:
    if not examples:
        raise XdscaleError(f"{path}: no examples in {split}")
