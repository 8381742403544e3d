"""Predicts whole splits, and writes predictions down: for people and reports, and as submissions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdscale.data.task_batches import TaskCollator
from xdscale.data.task_files import Example
from xdscale.errors import writing
from xdscale.files import write_atomically
from xdscale.systems.contract import Slots
from xdscale.tasks.contract import Task
from xdscale.training.engine import to_device
from xdscale.training.session import Setup


@dataclass(frozen=True)
class Predicted:
    """What a model says of a split.

    Attributes:
        values: float64 [n], class numbers or targets.
        scores: float32 [n, classes], the logits; [n, 1] for a regression.
    """

    values: np.ndarray
    scores: np.ndarray


def predict(setup: Setup, task: Task, engine: Any, slots: list[Slots], collate: TaskCollator) -> Predicted | None:
    """Predicts each example of a split exactly once, without dropout; every rank calls it.

    Args:
        setup: of this process; a request to stop ends it.
        task: decides what the logits mean.
        engine: the DeepSpeed engine.
        slots: this rank's share; every rank has equally many.
        collate: makes batches of them.

    Returns:
        The predictions in file order, on every rank; None after a request to stop.
    """
    mine: dict[int, np.ndarray] = {}
    engine.eval()
    with torch.no_grad():
        for number, part in enumerate(slots):
            setup.watchdog.enter("prediction", setup.recipe.training.steps, number)
            if setup.ranks.sum(torch.tensor(int(setup.stop.requested), device=engine.device)).item():
                return None
            logits = engine(to_device(collate(part).arrays, engine.device))["logits"].cpu().numpy()
            mine |= dict(zip(part.sample_ids[part.real].tolist(), logits[part.real]))
    everyone = {sample: row for share in setup.ranks.gather(mine) for sample, row in share.items()}
    scores = np.stack([everyone[sample] for sample in range(len(everyone))])
    return Predicted(task.predict(scores), scores)


def write_predictions(path: Path, task: Task, examples: list[Example], predicted: Predicted) -> None:
    """Writes one JSON line per labelled example, in file order."""
    lines = []
    for index, (example, value, scores) in enumerate(zip(examples, predicted.values.tolist(), predicted.scores)):
        first, *rest = example.texts[0]
        second: str | list[str] | None = rest[0] if rest else None
        if len(example.texts) > 1:
            first, second = first if rest else "", [choice[-1] for choice in example.texts]
        entry = {"index": index, "id": example.id, "sentence1": first, "sentence2": second}
        entry |= task.answer(example, value) | {"scores": [float(score) for score in scores]}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def write_submission(path: Path, task: Task, examples: list[Example], predicted: Predicted) -> None:
    """Writes the predictions of an unlabelled split as the task's server takes them."""
    with writing(path.parent.name, path.parent.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, task.submission(path.name, examples, predicted.values))
