"""Tasks on texts in files: a table of columns, classified, chosen from, or scored by a number."""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xdscale.data.task_files import NO_LABEL, Example, place, read_rows
from xdscale.errors import XdscaleError
from xdscale.files import csv_text, file_sha256
from xdscale.tasks.contract import TaskData
from xdscale.tasks.metrics import measure

if TYPE_CHECKING:
    import torch

HELD_OUT_SHARE = 0.1
"""Share of the training file held out for development where a task has no development file of its own (READ)."""

NEAR = 0.5
"""A regression counts as right within this distance, for the one number that all tasks show during training."""


def _warn_on_stderr(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where `datasets` finds a task.

    Attributes:
        path: dataset name.
        config: its configuration.
        splits: file of the public format to split name.
        columns: column of the public format to column of the hub's, where the two names differ.
    """

    path: str
    config: str
    splits: Mapping[str, str]
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A task whose examples are rows of files; see `xdscale.tasks.contract.Task`.

    Attributes:
        name: on the command line and in folders.
        title: head of its column in reports.
        folder: in the data folder; "" where the files lie in the data folder itself.
        train: file of the training split.
        dev: name of each development split to its file; a file that is `train` itself is split by a hash of the id.
        test: name of each unlabelled split's submission file to its file; missing ones are left out.
        first: column of the (first) text; None where the choices are all there is to read.
        seconds: columns of the second text: none, one, or one per choice.
        prefix: column put before each of `seconds`, with a space.
        label: column of the label.
        labels: the words that may stand there, in the order of the classes; empty for regression.
        span: smallest and largest target of a regression.
        id: column that names an example, if it is there; else its number does, counted from 0.
        predicts_by_id: whether predictions of an unlabelled split name examples so, too; else by their number.
        headerless: column names of labelled files that have no header line.
        torn_rows: whether a few rows without all columns are left out instead of refused.
        metrics: what is measured on a development split.
        score: the metric that stands in the column.
        hub: the same data online; None where it is nowhere free to fetch.
        image_columns: columns of the ids of an example's images.
    """

    reads: ClassVar[str] = "input"

    name: str
    title: str
    folder: str
    train: str = "train.tsv"
    dev: Mapping[str, str] = field(default_factory=lambda: {"dev": "dev.tsv"})
    test: Mapping[str, str] = field(default_factory=dict)
    first: str | None
    seconds: tuple[str, ...] = ()
    prefix: str | None = None
    label: str
    labels: tuple[str, ...] = ()
    span: tuple[float, float] = (-math.inf, math.inf)
    id: str | None = "index"
    predicts_by_id: bool = False
    headerless: tuple[str, ...] = ()
    torn_rows: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    score: str = "accuracy"
    hub: Hub | None = None
    image_columns: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images belong to an example."""
        return len(self.image_columns)

    @property
    def sentences(self) -> int:
        """Texts that an encoder is given together."""
        return (self.first is not None) + bool(self.seconds)

    @property
    def choices(self) -> int:
        """How many texts are chosen from; 0 where none are."""
        return len(self.seconds) if len(self.seconds) > 1 else 0

    @property
    def regression(self) -> bool:
        """Whether the target is a number."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Numbers that the head gives per text: one per class; 1 for a regression and for each choice."""
        return 1 if self.regression or self.choices else len(self.labels)

    def fetch(self, data: Path) -> None:
        """Fetches the files from the model hub into the folder `data`.

        Raises:
            XdscaleError: as `xdscale.tasks.hub.fetch_task`.
        """
        from xdscale.tasks.hub import fetch_task

        fetch_task(self, data)

    def locate(self, data: Path) -> Path:
        """Returns the folder that holds the task's files: `data`, or the task's own in it.

        Raises:
            XdscaleError: the training file lies in neither.
        """
        folder = data / self.folder
        if not folder.is_dir():
            folder = data
        if self.folder and not (folder / self.train).is_file():
            raise XdscaleError(
                f"{data}: has no {self.folder}/{self.train}; --data is the folder that holds {self.folder}/ as it is "
                "published (GLUE's glue_data, say), with the files under their public names"
            )
        return folder

    def read(self, data: Path) -> TaskData:
        """Reads all splits.

        Args:
            data: the folder that holds the tasks' folders, or this task's own.

        Raises:
            XdscaleError: a split is missing or empty, a column is missing, a label is none of the task's, or a row is
                torn; with file and line.
        """
        folder = self.locate(data)
        test = {out: name for out, name in self.test.items() if (folder / name).is_file()}
        files: dict[str, dict[str, str | int]] = {}
        notes: list[str] = []
        say = {"say": notes.append} if self.torn_rows else {}  # what overrides `read_examples` has none of these

        def read(name: str, split: str) -> list[Example]:
            path = folder / name
            if not path.is_file():
                raise XdscaleError(f"{path}: no such file; the {split} split of {self.title} is needed")
            examples = self.read_examples(path, labelled=split != "test", **say)
            files[name] = {"sha256": file_sha256(path), "rows": len(examples)}
            return examples

        train = read(self.train, "training")
        dev = {}
        for split, name in self.dev.items():
            if name == self.train:
                dev[split] = [example for example in train if held_out(example.id)]
                train = [example for example in train if not held_out(example.id)]
                _require_some(folder / name, split, dev[split])
                _require_some(folder / name, "train", train)
            else:
                dev[split] = read(name, "development")
        names = {"train": self.train, **self.dev, **test}
        return TaskData(
            self,
            train,
            dev,
            {out: read(name, "test") for out, name in test.items()},
            files,
            {split: str(Path(self.folder, name)) for split, name in names.items()},
            tuple(notes),
        )

    def read_examples(
        self, path: Path, *, labelled: bool, say: Callable[[str], None] = _warn_on_stderr
    ) -> list[Example]:
        """Reads one file, of a format that `xdscale.data.task_files.read_rows` knows by its name.

        Args:
            path: the file.
            labelled: whether the label column is needed; in an unlabelled split it is not looked at.
            say: told of torn rows that were left out.

        Raises:
            XdscaleError: as `read`.
        """
        columns = [*filter(None, (self.first, *self.seconds, self.prefix)), *self.image_columns]
        columns += [self.label] if labelled else []
        rows = read_rows(
            path,
            columns,
            self.title,
            optional=[self.id] if self.id else [],
            header=self.headerless if labelled else (),
            torn_rows=say if self.torn_rows else None,
        )
        examples = []
        for number, (line, row) in enumerate(rows):
            label = self._label(path, line, row[self.label]) if labelled else None
            images = tuple(row[name] for name in self.image_columns)
            examples.append(Example(row.get(self.id, str(number)), self._texts(row), label, line, images))
        _require_some(path, "it", examples)
        return examples

    def targets(self, examples: Sequence[Example], regions: Any = None) -> np.ndarray:
        """Returns class numbers, int64 [n], or numbers, float64 [n]; `NO_LABEL` where there is none."""
        labels = [NO_LABEL if example.label is None else example.label for example in examples]
        return np.array(labels, np.float64 if self.regression else np.int64)

    def loss(
        self, logits: "torch.Tensor", targets: "torch.Tensor", real: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Computes cross-entropy, or squared errors, and how many are right (a regression within `NEAR`)."""
        import torch.nn.functional as F

        if self.regression:
            error = (logits.squeeze(1) - targets).masked_fill(~real, 0.0)
            return error.square().sum(), (real & (error.detach().abs() <= NEAR)).sum()
        loss = F.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="sum")
        return loss, (logits.detach().argmax(-1) == targets).sum()

    def predict(self, logits: np.ndarray, regions: Any = None) -> np.ndarray:
        """Returns the number itself, or the class or choice with the largest logit, float64 [n]."""
        return (logits[:, 0] if self.regression else logits.argmax(1)).astype(np.float64)

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the value of each of `metrics`."""
        return measure(self.metrics, predictions, np.array([example.label for example in examples], np.float64))

    def answer(self, example: Example, prediction: float) -> dict[str, Any]:
        """Returns the label, the prediction and whether it is right, of a regression the squared error."""
        if self.regression:
            error = (prediction - example.label) ** 2
            return {"label": example.label, "prediction": prediction, "squared_error": error}
        label, said = int(example.label), int(prediction)
        return {"label": label, "prediction": said, "correct": label == said}

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns lines as GLUE's server takes them: index, prediction in label words.

        A .csv file is Kaggle's instead: id, target; and a task that `predicts_by_id` has its id in the index's place.
        """
        values = predictions.tolist()
        words = [f"{value:.6f}" if self.regression else self.labels[int(value)] for value in values]
        if self.predicts_by_id:
            named = [(example.id, word) for example, word in zip(examples, words)]
            if any(mark in cell for pair in named for cell in pair for mark in "\t\r\n"):
                return csv_text([self.id, "prediction"], named, "\t")
            rows = [f"{self.id}\tprediction", *map("\t".join, named)]  # as in files that are read, quotes are text
        elif name.endswith(".csv"):
            rows = [f"{self.id},{self.label}", *(f"{example.id},{word}" for example, word in zip(examples, words))]
        else:
            rows = ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
        return "\n".join(rows) + "\n"

    def _texts(self, row: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
        first = () if self.first is None else (row[self.first],)
        prefix = row[self.prefix] + " " if self.prefix else ""
        return tuple((*first, prefix + row[name]) for name in self.seconds) or (first,)

    def _label(self, path: Path, line: int, text: str) -> float:
        where = f"{place(path, line)}: {self.label} = {text!r}"
        if not self.regression:
            if text not in self.labels:
                raise XdscaleError(f"{where}: not a label of {self.title}; expected {' or '.join(self.labels)}")
            return self.labels.index(text)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low, high = self.span
        if not (math.isfinite(value) and low <= value <= high):
            limits = f" from {low:g} to {high:g}" if math.isfinite(low) else ""
            raise XdscaleError(f"{where}: expected a number{limits}")
        return value


def held_out(identifier: str) -> bool:
    """Returns whether a row of a task without a development file belongs to the split made here.

    The first 8 bytes of the id's SHA-256, as a fraction of 2**64, are below `HELD_OUT_SHARE`. It depends on nothing
    else, so everybody holds out the same rows, whatever the order of the file.
    """
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def _require_some(path: Path, split: str, examples: list[Example]) -> None:
    if not examples:
        raise XdscaleError(f"{path}: no examples in {split}")
