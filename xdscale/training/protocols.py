"""What the training loop asks of the data it is given; it knows no model and no data format by name."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class MicroBatch(Protocol):
    """A micro-batch: arrays for the module, and how many targets each objective has in them."""

    arrays: dict[str, np.ndarray]
    targets: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class StepData:
    """What one rank needs for one optimiser step."""

    batches: list[Any]
    samples: str
    """Hash of the sample ids of the global batch, the same on every rank."""


class Source(Protocol):
    """Prepares steps ahead of the loop."""

    wait_seconds: float

    def __next__(self) -> tuple[int, StepData]:
        """Returns the next step and its data, waiting for it if need be."""


class SampleSlots(Protocol):
    """Which samples make up a micro-batch; `real` is False where a slot is padding."""

    sample_ids: np.ndarray
    real: np.ndarray


class SampleOrder(Protocol):
    """Which samples a step has; steps count from 0."""

    def slots(self, step: int) -> list[SampleSlots]:
        """Returns this rank's micro-batches."""

    def position(self, step: int) -> Any:
        """Returns where the order stands before a step, with `epoch` and `index` of the next sample."""

    def global_batch_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and sample ids of all ranks together."""
