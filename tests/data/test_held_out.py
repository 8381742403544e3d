"""Held-out batches in bounded memory."""

import tracemalloc

import numpy as np

from xdscale.data import held_out
from xdscale.data.held_out import held_out_batches
from xdscale.data.order import validation_slots
from xdscale.systems.contract import MicroBatch

PIXELS = 100_000
SLOTS = validation_slots(29, 60, 1, 0, 2)  # 15 micro-batches


class Pictures:
    """Makes batches of new pictures, and counts which."""

    def __init__(self):
        self.made = []

    def __call__(self, slots):
        self.made.append(slots.sample_ids.tolist())
        arrays = {f"picture_{n}": np.full(PIXELS, sample, np.float32) for n, sample in enumerate(slots.sample_ids)}
        return MicroBatch(arrays | {"real": slots.real}, {"task": int(slots.real.sum())}, 7, regions=np.zeros(PIXELS))


def test_few_batches_are_made_once():
    collate = Pictures()
    batches = held_out_batches(collate, SLOTS)
    for _ in range(2):
        assert [batch.arrays["picture_1"][0] for batch in batches] == [*range(1, 29, 2), 0]
    assert len(collate.made) == 15


def test_what_is_beyond_the_bound_is_made_again_each_time_and_is_the_same(monkeypatch):
    kept_bytes = 4 * (2 * PIXELS * 4 + 2)
    monkeypatch.setattr(held_out, "KEPT_BYTES", kept_bytes)
    collate = Pictures()
    tracemalloc.start()
    batches = held_out_batches(collate, SLOTS)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batch_bytes = 4 * PIXELS * 4  # with the regions, which are dropped
    assert kept_bytes <= kept < kept_bytes + batch_bytes / 2
    assert peak < kept_bytes + 3 * batch_bytes
    everything = [part.sample_ids.tolist() for part in SLOTS]
    assert collate.made == everything
    assert [batch.targets for batch in batches] == [{"task": 2}] * 14 + [{"task": 1}]
    assert {batch.tokens for batch in batches} == {7}
    assert collate.made == everything  # targets are known
    for validation in range(2):
        for batch, ids in zip(batches, everything):
            arrays = batch.arrays
            assert [arrays["picture_0"][0], arrays["picture_1"][0]] == ids
        assert collate.made == everything + (1 + validation) * everything[4:]
