"""NLVR2, in the layout of its repository (`train.json`, JSON lines): is a sentence true of two photographs?"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import (
    NotRequired,  # pydantic needs this one on Python 3.11
)

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from xdscale.data.json_shapes import Text, read_lines
from xdscale.data.task_files import Example, place
from xdscale.errors import XdscaleError
from xdscale.tasks.contract import TaskData
from xdscale.tasks.text import TextTask

_IDENTIFIER = re.compile(r"([A-Za-z0-9]+-[0-9]+)-([0-9]+)-([0-9]+)")
"""Split and set, pair, sentence."""


class _Statement(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    identifier: str
    sentence: Text
    label: NotRequired[str]


class TrueOfTwoImages(TextTask):
    """Whether a sentence is true of a left and a right image; their ids are `train-10171-0-img0` and `…-img1`."""

    images = 2

    def read(self, data: Path) -> TaskData:
        """Reads all splits; of the development splits, those after the first one are left out where they are missing.

        Raises:
            XdscaleError: as `TextTask.read`; an identifier is no such one, or stands twice.
        """
        folder, (first, *_) = self.locate(data), self.dev
        there = {split: name for split, name in self.dev.items() if split == first or (folder / name).is_file()}
        return super(TrueOfTwoImages, replace(self, dev=there)).read(data)

    def read_examples(self, path: Path, *, labelled: bool) -> list[Example]:
        """Reads one file of statements."""
        examples: list[Example] = []
        seen: dict[str, int] = {}
        for line, statement in read_lines(path, _Statement):
            identifier, where = statement["identifier"], place(path, line)
            parts = _IDENTIFIER.fullmatch(identifier)
            if parts is None:
                raise XdscaleError(
                    f"{where}: identifier = {identifier!r}; expected split-set-pair-sentence, as train-10171-0-0"
                )
            if identifier in seen:
                raise XdscaleError(f"{where}: identifier {identifier} stands in line {seen[identifier]} already")
            seen[identifier] = line
            pair = f"{parts[1]}-{parts[2]}"
            images = (f"{pair}-img0", f"{pair}-img1")
            label = self._truth(where, statement) if labelled else None
            examples.append(Example(identifier, ((statement["sentence"],),), label, line, images=images))
        if not examples:
            raise XdscaleError(f"{path}: holds no examples")
        return examples

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the accuracy, and the share of sentences that are judged rightly of all their pairs of images."""
        consistent: dict[tuple[str, str], bool] = {}
        right = [int(value) == example.label for value, example in zip(predictions.tolist(), examples)]
        for example, correct in zip(examples, right):
            group, _, sentence = _IDENTIFIER.fullmatch(example.id).groups()
            consistent[group, sentence] = consistent.get((group, sentence), True) and correct
        return {"accuracy": float(np.mean(right)), "consistency": float(np.mean(list(consistent.values())))}

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns lines of identifier and label, as the repository's `eval/metrics.py` reads them: no header."""
        words = (self.labels[int(value)] for value in predictions.tolist())
        return "".join(f"{example.id},{word}\n" for example, word in zip(examples, words))

    def _truth(self, where: str, statement: _Statement) -> int:
        label = statement.get("label")
        if label not in self.labels:
            raise XdscaleError(f"{where}: label = {label!r}; expected {' or '.join(map(repr, self.labels))}")
        return self.labels.index(label)


NLVR2 = TrueOfTwoImages(
    name="nlvr2",
    title="NLVR2",
    folder="NLVR2",
    train="train.json",
    dev={"dev": "dev.json", "test-P": "test1.json", "test-U": "test2.json"},
    test={"NLVR2-test1.csv": "test1.json", "NLVR2-test2.csv": "test2.json"},
    first="sentence",
    label="label",
    labels=("False", "True"),
    metrics=("accuracy", "consistency"),
)
