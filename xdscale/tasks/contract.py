"""What a downstream task is, and how tasks are found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xdscale import registry
from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.names import nearest

if TYPE_CHECKING:
    import numpy as np
    import torch

GROUP = "xdscale.tasks"
"""Of the entry points through which installed packages offer tasks."""

SHIPPED = {
    name: f"xdscale.tasks.{name if name in ('swag', 'read') else 'glue'}:{name.upper()}"
    for name in ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli", "swag", "read")
}
"""Tasks that come with xdscale, in the order of the paper's Table 1."""


@dataclass(frozen=True)
class TaskData:
    """A task's splits.

    Attributes:
        task: whose.
        train: training examples in file order.
        dev: the same for each development split; the first one's score is the task's.
        test: the same, without labels, by the name of the file that the predictions go to.
        files: SHA-256 and rows of each file read, by its name.
        sources: the file of each split ("train", and the names in `dev` and `test`), for messages.
    """

    task: Task
    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    files: dict[str, dict[str, str | int]]
    sources: dict[str, str]

    def fingerprint(self) -> str:
        """Returns the SHA-256 (hex) of all files' hashes."""
        text = "\n".join(f"{name} {entry['sha256']}" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()


class Task(Protocol):
    """A downstream task. `xdscale.tasks.text.TextTask` is one for texts in files; most tasks are instances of it.

    Attributes:
        name: on the command line and in folders.
        title: head of its column in reports.
        sentences: texts that an encoder is given together: 1 or 2.
        choices: of which one is right, each judged by itself; 0 for a task that classifies or predicts a number.
        outputs: numbers that a head gives for each such input.
        metrics: names in `xdscale.tasks.metrics.METRICS`, measured on each development split.
        score: the one of them that stands in the column.
    """

    name: str
    title: str
    sentences: int
    choices: int
    outputs: int
    metrics: tuple[str, ...]
    score: str

    def fetch(self, data: Path) -> None:
        """Puts the task's files into the folder `data` unless they are there; called where no folder was given."""

    def read(self, data: Path) -> TaskData:
        """Reads all splits from the folder `data`."""

    def targets(self, examples: Sequence[Example]) -> np.ndarray:
        """Returns what `loss` compares with, [n] or [n, …]: integers, or float64, which `loss` gets as fp32."""

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes a micro-batch's loss and how many examples are right, both summed over the real ones.

        Args:
            logits: fp32 [b, outputs], of choices [b, choices].
            targets: int64 or fp32 [b, …]; integers are `NO_LABEL` where `real` is False.
            real: bool [b], False for the examples that fill up the last micro-batch.
        """

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Turns logits, [n, outputs] or [n, choices], into predictions, float64 [n]."""

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the value of each of `metrics`."""

    def answer(self, example: Example, prediction: float) -> dict[str, Any]:
        """Returns "label", "prediction" and whatever else is written down of a labelled example."""

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns the text of the file `name` with the predictions of an unlabelled split."""


def task_names() -> list[str]:
    """Returns the names of all tasks: those that come with xdscale, then those of installed packages.

    Raises:
        XdscaleError: two packages offer the same name.
    """
    return list(registry.locate(GROUP, SHIPPED))


def find_task(name: str) -> Task:
    """Returns a task by its name, importing its module alone.

    Raises:
        XdscaleError: no task has that name (the nearest right one is named), two packages offer it, or its module
            cannot be imported.
    """
    places = registry.locate(GROUP, SHIPPED)
    if name not in places:
        known = f"known tasks: {', '.join(places)}; a task of your own is a file that ends with .yaml"
        raise XdscaleError(
            f"--task {name}: no such task; {nearest(name.lower().replace('-', ''), list(places), known)}"
        )
    task = registry.load(places[name], f"--task {name}")
    if getattr(task, "name", None) != name:
        raise XdscaleError(
            f"--task {name}: {places[name]} is offered under this name, but its name is "
            f"{getattr(task, 'name', None)!r}; make both the same"
        )
    return task
