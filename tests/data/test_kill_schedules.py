"""Killed at random and continued with other ranks, micro-batches and prefetching, a run sees the same order.

Independent reference: the uninterrupted run of one rank in one piece. Compared are the whole contents of every
global batch: ids, masked inputs, labels, pairings and CLIP targets, sample by sample.
"""

import hashlib
import itertools

import numpy as np
import pytest

from xdscale.data.collate import XDBERTCollator
from xdscale.data.draws import draws_hash
from xdscale.data.order import Order
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.table import Table
from xdscale.training.prefetch import Prefetcher

SCHEDULES, STEPS, SEED = 200, 8, 20261122


def rows_of(batch, slots):
    """What each real sample of a micro-batch gives to the model, as bytes, in order."""
    arrays = batch.arrays
    width, clip_width = arrays["language_ids"].shape[1], arrays["clip_ids"][0].size
    places = {name: arrays[f"{name}_positions"] for name in ("masked_lm", "clip")}
    for row in np.flatnonzero(slots.real):
        digest = hashlib.sha256(np.array([slots.epochs[row], slots.sample_ids[row]]).tobytes())
        digest.update(arrays["language_ids"][row].tobytes())
        used = arrays["clip_lengths"][row] > 0  # the number of blocks depends on the longest text beside it
        digest.update(arrays["clip_ids"][row][used].tobytes())
        digest.update(arrays["match_labels"][row].tobytes())
        for name, size in (("masked_lm", width), ("clip", clip_width)):
            mine = places[name] // size == row
            digest.update((places[name][mine] % size).tobytes())
            digest.update(arrays[f"{name}_labels"][mine].tobytes())
        yield digest.digest()


def global_batches(split, steps, *, seed, batch, world, micro, depth):
    """The global batches of some steps as all ranks together see them, each in the order of its samples."""
    collate = XDBERTCollator(split, seed=seed, objectives=XDBERTObjectives())
    found = [{} for _ in steps]
    for rank in range(world):
        order = Order(len(split), seed=seed, global_batch=batch, world_size=world, rank=rank, micro_batch=micro)

        def prepare(step, order=order):
            return [(collate(slots), slots) for slots in order.slots(step)]

        # It prepares steps beyond the last one asked for, which are lost with it, as in a process that is killed.
        with Prefetcher(prepare, range(steps[0], steps[-1] + 3), depth=depth) as source:
            for rows, expected in zip(found, steps):
                step, parts = next(source)
                assert step == expected
                places = {pair: place for place, pair in enumerate(zip(*order.global_batch_ids(step), strict=True))}
                for collated, slots in parts:
                    pairs = zip(slots.epochs[slots.real], slots.sample_ids[slots.real], strict=True)
                    for pair, row in zip(pairs, rows_of(collated, slots), strict=True):
                        assert places[pair] not in rows  # no two ranks have the same sample
                        rows[places[pair]] = row
    assert all(sorted(rows) == list(range(batch)) for rows in found)
    return [b"".join(rows[place] for place in range(batch)) for rows in found]


def stored_hash(split, step, seed, batch, world, micro):
    """What a checkpoint after `step` steps holds, when the last rank of a run writes it."""
    order = Order(len(split), seed=seed, global_batch=batch, world_size=world, rank=world - 1, micro_batch=micro)
    return draws_hash(XDBERTCollator(split, seed=seed, objectives=XDBERTObjectives()), *order.global_batch_ids(step))


@pytest.fixture(scope="module")
def split(wiki_shards):
    return Table(wiki_shards, "train")


def test_any_schedule_of_kills_and_ranks_gives_the_uninterrupted_stream(split):
    chance = np.random.default_rng(SEED)
    alone = {}
    for seed, batch in itertools.product((0, 1), (5, 8, 13)):
        first = len(split) // batch - STEPS // 2  # the border between two epochs lies inside
        steps = range(first, first + STEPS)
        options = {"seed": seed, "batch": batch, "world": 1, "micro": batch}
        hashes = {step: stored_hash(split, step, *options.values()) for step in (*steps, first + STEPS)}
        assert len(set(hashes.values())) == STEPS + 1
        alone[seed, batch] = steps, global_batches(split, steps, **options, depth=1), hashes
    worlds, kills = set(), 0
    for schedule in range(SCHEDULES):
        seed, batch = int(chance.integers(2)), int(chance.choice([5, 8, 13]))
        steps, expected, hashes = alone[seed, batch]
        checkpoint, every = steps[0], int(chance.integers(1, 4))
        while checkpoint < steps[-1] + 1:
            world, micro, depth = (int(chance.integers(low, high)) for low, high in ((1, 9), (1, 6), (1, 4)))
            options = {"seed": seed, "batch": batch, "world": world, "micro": micro}
            assert stored_hash(split, checkpoint, *options.values()) == hashes[checkpoint]
            killed = min(checkpoint + int(chance.integers(1, 2 * every + 1)), steps[-1] + 1)
            found = global_batches(split, range(checkpoint, killed), **options, depth=depth)
            done = slice(checkpoint - steps[0], killed - steps[0])
            assert found == expected[done], (schedule, checkpoint, options)
            worlds.add(world)
            kills += 1
            whole = killed == steps[-1] + 1
            checkpoint = killed if whole else killed - (killed - steps[0]) % every
    assert worlds == set(range(1, 9))
    assert kills > 2 * SCHEDULES


def test_the_hash_stands_for_ids_masks_pairs_and_targets(split):
    """Any change of what is drawn changes it; what is not drawn does not."""
    order = Order(len(split), seed=0, global_batch=600, world_size=1, rank=0, micro_batch=4)
    epochs, ids = order.global_batch_ids(3)

    def of(tasks=None, seed=0, epochs=epochs, ids=ids):
        return draws_hash(XDBERTCollator(split, seed=seed, objectives=XDBERTObjectives(**(tasks or {}))), epochs, ids)

    known = of()
    assert len(known) == 64
    assert of() == known == of({"mlm": {"weight": 2}})
    swapped = ids.copy()
    swapped[[598, 599]] = swapped[[599, 598]]
    changed = [
        of(seed=1),
        of(epochs=epochs + 1),
        of(ids=swapped),
        of({"mlm": {"select": 0.2}}),
        of({"mlm": {"random": 0.2}}),
        of({"match": {"mismatch": 0.4}}),
        of({"clip_tokens": {"select": 0.2}}),
        *(of({name: None}) for name in ("mlm", "match", "clip_tokens")),
    ]
    assert len({known, *changed}) == len(changed) + 1
