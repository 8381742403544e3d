"""Predicts whole splits, and writes predictions down: for people and reports, and as submissions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdscale.data.task_files import Example
from xdscale.errors import writing
from xdscale.files import write_atomically
from xdscale.shards.progress import counted
from xdscale.systems.contract import ExampleCollator, Slots
from xdscale.tasks.contract import Task
from xdscale.training.engine import to_device
from xdscale.training.session import Setup

MOST_SCORES = 100
"""Numbers of an example that are kept and written down beside its prediction."""


@dataclass(frozen=True)
class Predicted:
    """What a model says of a split.

    Attributes:
        values: float64 [n, …], what the task makes of the logits: class numbers or targets, say.
        scores: float32 [n, classes], the logits; [n, 1] for a regression; None where there are more than `MOST_SCORES`.
    """

    values: np.ndarray
    scores: np.ndarray | None


def predict(
    setup: Setup, task: Task, engine: Any, split: str, slots: list[Slots], collate: ExampleCollator
) -> Predicted | None:
    """Predicts each example of a split exactly once, without dropout; every rank calls it.

    Args:
        setup: of this process; a request to stop ends it.
        task: decides what the logits mean.
        engine: the DeepSpeed engine.
        split: its name, or its file's, for what is said on the way.
        slots: this rank's share; every rank has equally many.
        collate: makes batches of them.

    Returns:
        The predictions in file order, on every rank; None after a request to stop.
    """
    mine: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    engine.eval()
    numbered = counted(f"predicting {split}, batches", slots) if setup.ranks.is_first else enumerate(slots)
    with torch.no_grad():
        for number, part in numbered:
            setup.watchdog.enter("prediction", setup.recipe.training.steps, number)
            if setup.ranks.sum(torch.tensor(int(setup.stop.requested), device=engine.device)).item():
                return None
            batch = collate(part)
            logits = engine(to_device(batch.arrays, engine.device))["logits"].cpu().numpy()
            values = task.predict(logits, *([] if batch.regions is None else [batch.regions]))
            kept = logits[:, : 0 if logits.shape[1] > MOST_SCORES else None]
            mine |= {part.sample_ids[i].item(): (values[i], kept[i]) for i in np.flatnonzero(part.real)}
    everyone = {sample: row for share in setup.ranks.gather(mine) for sample, row in share.items()}
    values, scores = zip(*(everyone[sample] for sample in range(len(everyone))))
    return Predicted(_stacked(values, np.nan), _stacked(scores, -np.inf) if len(scores[0]) else None)


def _stacked(rows: Sequence[np.ndarray], filling: float) -> np.ndarray:
    """Stacks rows; those that are shorter in their first dimension, with fewer regions, are filled up."""
    stacked = np.full((len(rows), *max(row.shape for row in rows)), filling, rows[0].dtype)
    for place, row in enumerate(rows):
        stacked[place, *map(slice, row.shape)] = row
    return stacked


def write_predictions(path: Path, task: Task, examples: list[Example], predicted: Predicted) -> None:
    """Writes one JSON line per labelled example, in file order."""
    lines = []
    for index, (example, value) in enumerate(zip(examples, predicted.values.tolist())):
        first, *rest = example.texts[0]
        second: str | list[str] | None = rest[0] if rest else None
        if len(example.texts) > 1:
            first, second = first if rest else "", [choice[-1] for choice in example.texts]
        entry = {"index": index, "id": example.id, "sentence1": first, "sentence2": second}
        entry |= {"images": example.images} if example.images else {}
        entry |= task.answer(example, value)
        if predicted.scores is not None:
            entry["scores"] = [float(score) for score in predicted.scores[index] if score > -np.inf]
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def write_submission(path: Path, task: Task, examples: list[Example], predicted: Predicted) -> None:
    """Writes the predictions of an unlabelled split as the task's server takes them."""
    with writing(path.parent.name, path.parent.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, task.submission(path.name, examples, predicted.values))
