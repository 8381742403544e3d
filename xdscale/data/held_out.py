"""Held-out batches: small ones stay in memory, what is beyond is made again at each validation."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from xdscale.systems.contract import MicroBatch, Slots

KEPT_BYTES = 1 << 30
"""Most that the arrays of a rank's held-out batches take: texts and features fit, pictures of many samples do not."""


class RemadeBatch(MicroBatch):
    """A micro-batch that keeps its targets alone; its arrays are made again whenever they are asked for."""

    def __init__(self, batch: MicroBatch, make: Callable[[], MicroBatch]) -> None:
        vars(self).update(targets=batch.targets, tokens=batch.tokens, regions=None, _make=make)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The module's inputs and labels by name."""
        return self._make().arrays


def held_out_batches(collate: Callable[[Slots], MicroBatch], slots: Iterable[Slots]) -> list[MicroBatch]:
    """Makes a rank's held-out batches, each once: so what cannot be read is found before the first step.

    Args:
        collate: reads and prepares samples, the same at any time; of batches that are not kept also while another
            thread prepares those of steps.
        slots: of each batch.

    Returns:
        The batches, whose arrays take `KEPT_BYTES` at most.
    """
    batches, room = [], KEPT_BYTES
    for part in slots:
        batch = replace(collate(part), regions=None)
        room -= sum(array.nbytes for array in batch.arrays.values())
        batches.append(batch if room >= 0 else RemadeBatch(batch, lambda part=part: collate(part)))
    return batches
