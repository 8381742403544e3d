"""Order, masks, pairs and targets are those that earlier versions drew: a run continues only while they are.

The hashes were written down on 2026-11-26 from commit 7714c2b. One that changes means that no run started before can go
on, and that no result trained before can be repeated.
"""

import hashlib

import numpy as np
import pytest

from xdscale.data.collate import XDBERTCollator
from xdscale.data.draws import draws_hash
from xdscale.data.hashing import Purpose, random_bits
from xdscale.data.order import Order
from xdscale.data.permutation import permute
from xdscale.recipes.xdbert.schema import XDBERTObjectives

SEED = 20_261_126


def digest(*arrays):
    """Returns 16 hex digits of integers, whatever their width."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array, "<i8") for array in arrays)).hexdigest()[:16]


def test_single_draws():
    assert random_bits(7, 3, np.array([0, 12_345]), Purpose.MATCH, 3).tolist() == PINNED["bits"]
    ids = np.arange(1000)
    found = {purpose.name: digest(random_bits(SEED, ids % 5, ids, purpose, 77)) for purpose in Purpose}
    assert found == PINNED["draws"]


@pytest.mark.parametrize("size", [1, 2, 1000, 6_000_000])
def test_the_order_of_an_epoch(size):
    index = np.arange(min(size, 4096))
    assert digest(permute(index, size, seed=SEED, epoch=2)) == PINNED["order"][size]


def test_the_samples_of_steps():
    """A batch that spans the end of an epoch among them."""
    order = Order(1009, seed=SEED, global_batch=36, world_size=2, rank=1, micro_batch=5)
    steps = [part for step in (0, 1, 28, 500) for part in order.global_batch_ids(step)]
    assert digest(*steps) == PINNED["steps"]


def test_masks_pairs_and_targets_of_a_batch(memory_split):
    split = memory_split(97, 30, 4)
    order = Order(97, seed=SEED, global_batch=32, world_size=1, rank=0, micro_batch=32)
    arrays = XDBERTCollator(split, seed=SEED, objectives=XDBERTObjectives())(order.slots(5)[0]).arrays
    assert {name: digest(array) for name, array in sorted(arrays.items())} == PINNED["batch"]


def test_the_hash_that_a_checkpoint_holds(memory_split):
    collate = XDBERTCollator(memory_split(600, 12, 2), seed=SEED, objectives=XDBERTObjectives())
    assert draws_hash(collate, np.zeros(600, np.int64), np.arange(600)) == PINNED["draws_hash"]


@pytest.mark.parametrize("count", [1, 512, 513])
def test_every_sample_counts_in_that_hash(memory_split, count):
    """The first and the last one too, and those around the 512 that are hashed at once."""
    collate = XDBERTCollator(memory_split(600, 12, 2), seed=SEED, objectives=XDBERTObjectives())
    epochs, ids = np.zeros(count, np.int64), np.arange(count)
    places = {0, count // 2, count - 2, count - 1} & set(range(count))
    hashes = [draws_hash(collate, epochs, ids)]
    for place in sorted(places):
        other = ids.copy()
        other[place] = 599
        later = epochs.copy()
        later[place] = 1
        hashes += [draws_hash(collate, epochs, other), draws_hash(collate, later, ids)]
    assert len(set(hashes)) == len(hashes)


PINNED = {
    "bits": [[683502891, 1412762673, 4242507632], [1553556164, 1200700648, 3462935535]],
    "draws": {
        "PERMUTATION": "531c371813c6f3e1",
        "MASKED_POSITION": "0c66c4014f9f1c8a",
        "RANDOM_TOKEN": "be58041d465b69bc",
        "MATCH": "316ff63216c2c284",
        "PARTNER": "57f73df06dbb11b1",
        "CLIP_TARGET": "1ae6c313fea329ee",
        "MASKED_REGION": "ca936b6b998842de",
        "FLIP": "75b80458a1a030a1",
    },
    "order": {1: "af5570f5a1810b7a", 2: "9d34149fbd1fe777", 1000: "bd08f096296691cb", 6000000: "63eadf89afc6d9e3"},
    "steps": "c5dcfd23a1afaf9c",
    "batch": {
        "clip_blocks": "3f414d0201cb14ce",
        "clip_ids": "ea19c983ac01aaa5",
        "clip_labels": "777ad3da5011d2ef",
        "clip_lengths": "bb1e461d79a8f7db",
        "clip_longest": "f62ecd515b90a93b",
        "clip_positions": "d7afa317f27819f4",
        "clip_valid": "4938cea8e8dcbea5",
        "language_ids": "2964d678990dc032",
        "masked_lm_labels": "3dac6ad203e9e210",
        "masked_lm_positions": "af3c78e6a7073fb3",
        "match_labels": "91c1d0592121df4f",
    },
    "draws_hash": "bffacb98f1ed54d2e7fad053d85c1a736c1bfdc72b8823f9b6cd02eaffaee9c2",
}
