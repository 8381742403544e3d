"""A hash of all that is drawn for a global batch, to prove that a continued run goes on with the same draws."""

import hashlib

import numpy as np

from xdscale.systems.contract import Collator, Slots

ROWS = 512  # samples hashed at once: their masks stay in the cache


def draws_hash(collate: Collator, epochs: np.ndarray, sample_ids: np.ndarray) -> str:
    """Returns 64 hex digits for the samples of a global batch and everything that is drawn for them.

    Hashed are epochs and ids in their order, and what the collator draws with the functions that training uses.

    Args:
        collate: of the split that the samples are from.
        epochs: int64 [global_batch].
        sample_ids: int64 [global_batch].
    """
    digest = hashlib.sha256()
    for first in range(0, len(sample_ids), ROWS):
        part = slice(first, first + ROWS)
        slots = Slots(epochs[part], sample_ids[part], np.ones(len(sample_ids[part]), bool))
        for array in (slots.epochs, slots.sample_ids, *collate.draws(slots)):
            digest.update(np.ascontiguousarray(array, "<i8"))
    return digest.hexdigest()
