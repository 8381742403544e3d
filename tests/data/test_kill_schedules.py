"""Killed at random and continued with other ranks, micro-batches and prefetching, a run sees the same order.

Independent reference: the uninterrupted run of one rank in one piece. Compared are the whole contents of every
global batch, sample by sample: ids, masked inputs, labels and pairings, and of systems that read images the regions,
what is masked of them, and the pixels.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from xdscale.data.collate import XDBERTCollator
from xdscale.data.draws import draws_hash
from xdscale.data.order import Order
from xdscale.data.visualbert import VisualBERTCollator
from xdscale.data.vlbert_pretraining import VLBERTCollator
from xdscale.recipe import load_recipe
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.table import Table
from xdscale.training.prefetch import Prefetcher

STEPS, SEED = 8, 20261122


class Stream(NamedTuple):
    """What a system reads.

    Attributes:
        collator: from a seed.
        sizes: samples of each table, which have equal shares of a batch.
        contents: from a micro-batch and its slots what each real sample gives to the model, as bytes, in order.
    """

    collator: Callable[[int], Any]
    sizes: tuple[int, ...]
    contents: Callable[[Any, Any], Iterator[bytes]]

    @property
    def batches(self) -> tuple[int, ...]:
        return (5, 8, 13) if len(self.sizes) == 1 else (6, 8, 14)

    def order(self, seed, batch, world, micro, rank):
        split = {"world_size": world, "rank": rank, "micro_batch": micro}
        return Order(*self.sizes, shares=[1] * len(self.sizes), seed=seed, global_batch=batch, **split)


def text_contents(batch, slots):
    """Of XDBERT: two texts, and what is masked in them."""
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


def packed_contents(batch, slots):
    """Of systems whose texts and regions stand in one row: words, regions, pixels, and what is masked in them."""
    arrays = batch.arrays
    texts, regions = len(arrays["text_ids"]), len(arrays.get("region_segments", arrays.get("masked_regions")))
    of_regions = [
        arrays[name] for name in ("features", "places", "masked_regions", "region_segments") if name in arrays
    ]
    for row in np.flatnonzero(slots.real):
        start, end = arrays["cu_seqlens"][row : row + 2]
        tokens = arrays["rows"][start:end]
        words, mine = tokens[tokens < texts], tokens[(tokens >= texts) & (tokens < texts + regions)] - texts
        parts = [np.array([slots.epochs[row], slots.sample_ids[row], len(words), len(mine)])]
        parts += [arrays[name][words] for name in ("text_ids", "text_segments")] + [array[mine] for array in of_regions]
        if "text_visual" in arrays:
            parts.append(arrays["text_visual"][words] - mine[0] if len(mine) else words[:0])
        parts += [arrays[name] for name in (f"picture_{row}", f"boxes_{row}") if name in arrays]
        if "match_labels" in arrays:
            parts.append(arrays["match_labels"][row])
        for name in sorted(name for name in arrays if name.endswith("_rows")):
            here = (arrays[name] >= start) & (arrays[name] < end)
            parts += [arrays[name][here] - start, arrays[name.replace("_rows", "_labels")][here]]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        yield digest.digest()


@pytest.fixture(scope="module")
def split(wiki_shards):
    return Table(wiki_shards, "train")


@pytest.fixture
def stream(request, split, captioned_pictures, grounded_pictures, photographs):
    """The stream of the system that a test asks for."""
    if request.param == "xdbert":
        return Stream(
            lambda seed: XDBERTCollator(split, seed=seed, objectives=XDBERTObjectives()), (len(split),), text_contents
        )
    if request.param == "visualbert":
        captions = Table(captioned_pictures, "train", "captions")

        def of_pairs(seed):
            return VisualBERTCollator(
                captions, load_recipe("quickstart-visualbert", ["model.region_size=12", f"training.seed={seed}"])
            )

        return Stream(of_pairs, (len(captions),), packed_contents)
    pixels = request.param == "vlbert-pixels"
    tables = [Table(photographs if pixels else grounded_pictures, "train", name) for name in ("captions", "text")]
    values = ["model.region_size=12", "model.region_classes=7", "model.max_elements=24"]
    if pixels:
        values = ["model.region_size=2048", "model.region_classes=5", "model.max_elements=24"]
        values.append("model.pixels={weights: random, short_side: 32, long_side: 48}")
    continues = np.arange(30_522) % 3 == 0

    def of_mixture(seed):
        recipe = load_recipe("quickstart-vlbert", [*values, f"training.seed={seed}"])
        return VLBERTCollator(*tables, recipe=recipe, continues=continues)

    return Stream(of_mixture, tuple(map(len, tables)), packed_contents)


def global_batches(stream, steps, *, seed, batch, world, micro, depth):
    """The global batches of some steps as all ranks together see them, each in the order of its samples."""
    collate = stream.collator(seed)
    found = [{} for _ in steps]
    for rank in range(world):
        order = stream.order(seed, batch, world, micro, rank)

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
                    for pair, row in zip(pairs, stream.contents(collated, slots), strict=True):
                        assert places[pair] not in rows  # no two ranks have the same sample
                        rows[places[pair]] = row
    assert all(sorted(rows) == list(range(batch)) for rows in found)
    return [b"".join(rows[place] for place in range(batch)) for rows in found]


def stored_hash(stream, step, seed, batch, world, micro):
    """What a checkpoint after `step` steps holds, when the last rank of a run writes it."""
    order = stream.order(seed, batch, world, micro, world - 1)
    return draws_hash(stream.collator(seed), *order.global_batch_ids(step))


TRIED = {"xdbert": 60, "visualbert": 30, "vlbert": 30, "vlbert-pixels": 12}
PROOF = [pytest.param(name, 200, marks=pytest.mark.proof) for name in TRIED]


@pytest.mark.parametrize(("stream", "schedules"), [*TRIED.items(), *PROOF], indirect=["stream"])
def test_any_schedule_of_kills_and_ranks_gives_the_uninterrupted_stream(stream, schedules):
    chance = np.random.default_rng(SEED)
    alone = {}
    for seed, batch in itertools.product((0, 1), stream.batches):
        # the border between two epochs, of several tables of the first one, lies inside
        first = max(0, stream.sizes[0] * len(stream.sizes) // batch - STEPS // 2)
        steps = range(first, first + STEPS)
        options = {"seed": seed, "batch": batch, "world": 1, "micro": batch}
        hashes = {step: stored_hash(stream, step, *options.values()) for step in (*steps, first + STEPS)}
        assert len(set(hashes.values())) == STEPS + 1
        alone[seed, batch] = steps, global_batches(stream, steps, **options, depth=1), hashes
        assert len(set(alone[seed, batch][1])) == STEPS
    worlds, kills = set(), 0
    for schedule in range(schedules):
        seed, batch = int(chance.integers(2)), int(chance.choice(stream.batches))
        steps, expected, hashes = alone[seed, batch]
        checkpoint, every = steps[0], int(chance.integers(1, 4))
        while checkpoint < steps[-1] + 1:
            world, micro, depth = (int(chance.integers(low, high)) for low, high in ((1, 9), (1, 6), (1, 4)))
            options = {"seed": seed, "batch": batch, "world": world, "micro": micro}
            assert stored_hash(stream, checkpoint, *options.values()) == hashes[checkpoint]
            killed = min(checkpoint + int(chance.integers(1, 2 * every + 1)), steps[-1] + 1)
            found = global_batches(stream, range(checkpoint, killed), **options, depth=depth)
            done = slice(checkpoint - steps[0], killed - steps[0])
            assert found == expected[done], (schedule, checkpoint, options)
            worlds.add(world)
            kills += 1
            whole = killed == steps[-1] + 1
            checkpoint = killed if whole else killed - (killed - steps[0]) % every
    assert worlds == set(range(1, 9))
    assert kills > 2 * schedules


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
