"""The counter-based hash behaves like independent uniform numbers. Bounds are in standard deviations."""

import numpy as np
import pytest

from xdscale.data.hashing import ROUNDS, SPREAD, Purpose, below, random_bits, random_bits_at, scale

IDS = np.arange(4096)
BITS = np.arange(32, dtype=np.uint32)


def draws(*, seed=0, epoch=0, ids=IDS, purpose=Purpose.MASKED_POSITION, first=0):
    return random_bits(seed, epoch, ids, purpose, first + 256)[:, first:].reshape(-1)


def chi_square_z(counts: np.ndarray) -> float:
    """Standard score of Pearson's statistic against equal expected counts."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return ((counts - expected) ** 2 / expected).sum().item() / np.sqrt(2 * freedom) - np.sqrt(freedom / 2)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift):
    counts = np.bincount((draws() >> np.uint32(shift)) & np.uint32(255), minlength=256)
    assert abs(chi_square_z(counts)) < 5


NEIGHBOURS = {
    "seed": {"seed": 1},
    "epoch": {"epoch": 1},
    "sample": {"ids": IDS + 1},
    "far sample": {"ids": IDS + 2**20},
    "purpose": {"purpose": Purpose.RANDOM_TOKEN},
    "counter": {"first": 1},
    "counter of the next word": {"first": 2},
}


@pytest.mark.parametrize("change", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_are_independent(change):
    here, there = draws(), draws(**change)
    assert abs(np.corrcoef(here, there)[0, 1]) * np.sqrt(here.size) < 5
    for shift in (0, 28):  # joint distribution of the lowest and of the highest four bits
        low, high = (here >> np.uint32(shift)) & np.uint32(15), (there >> np.uint32(shift)) & np.uint32(15)
        assert abs(chi_square_z(np.bincount(low * 16 + high, minlength=256))) < 5
    differing = (((here ^ there)[:, None] >> BITS) & np.uint32(1)).mean(axis=0)
    assert np.abs(differing - 0.5).max() < 6 * 0.5 / np.sqrt(here.size)


@pytest.mark.parametrize("bit", range(0, 32, 3))
@pytest.mark.parametrize("coordinate", ["seed", "epoch", "sample"])
def test_avalanche_flipping_an_input_bit_flips_each_output_bit_half_the_time(coordinate, bit):
    base = np.random.default_rng(bit).integers(0, 2**32, 8)
    flipped = []
    for value in base.tolist():
        inputs = {"seed": 5, "epoch": 6, "sample": 0}
        pair = []
        for changed in (value, value ^ (1 << bit)):
            inputs[coordinate] = changed
            ids = np.array([inputs["sample"]])
            pair.append(random_bits(inputs["seed"], inputs["epoch"], ids, Purpose.MATCH, 512)[0])
        flipped.append(((pair[0] ^ pair[1])[:, None] >> BITS) & np.uint32(1))
    rates = np.concatenate(flipped).mean(axis=0)
    assert np.abs(rates - 0.5).max() < 6 * 0.5 / np.sqrt(8 * 512)


def test_no_two_draws_of_an_epoch_share_a_hash_value_by_construction():
    """Undoing each round gives the packed coordinates back, up to one constant: the hash is a bijection."""
    ids = np.array([0, 1, 2**32 - 1, 77, 0, 123456789], np.int64)
    words = np.array([0, 0, 2**24 - 1, 1, 2**24 - 1, 99], np.int64)
    recovered = []
    for purpose in Purpose:
        low = random_bits_at(3, 4, ids, purpose, 2 * words).tolist()
        high = random_bits_at(3, 4, ids, purpose, 2 * words + 1).tolist()
        for sample, word, value in zip(ids.tolist(), words.tolist(), zip(low, high)):
            packed = sample << 32 | purpose << 24 | word
            recovered.append((_undo(value[0] | value[1] << 32) - packed) % 2**64)
    assert len(set(recovered)) == 1


def test_epochs_and_seeds_do_not_walk_into_each_others_draws():
    ids = np.arange(64)
    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    words = [random_bits(*key, ids, Purpose.MATCH, 128).view(np.uint64).reshape(-1) for key in keys]
    assert len(np.unique(np.concatenate(words))) == len(keys) * 64 * 64


def _undo(value: int) -> int:
    value ^= value >> 32
    for shift, factor in reversed(ROUNDS):
        value = value * pow(int(factor), -1, 2**64) % 2**64
        shifted = value
        while shifted:  # x ^ (x >> s) undone: x = y ^ (y >> s) ^ (y >> 2s) ...
            shifted >>= int(shift)
            value ^= shifted
    return value * pow(int(SPREAD), -1, 2**64) % 2**64


def test_single_draws_equal_those_of_the_grid_and_a_longer_row_begins_alike():
    epochs = IDS % 7
    grid = random_bits(9, epochs, IDS, Purpose.CLIP_TARGET, 101)
    assert grid.shape == (4096, 101)
    assert grid.dtype == np.uint32
    np.testing.assert_array_equal(random_bits(9, epochs, IDS, Purpose.CLIP_TARGET, 40), grid[:, :40])
    for row in (0, 1, 6, 4095):
        alone = random_bits(9, int(epochs[row]), IDS[row : row + 1], Purpose.CLIP_TARGET, 101)
        np.testing.assert_array_equal(alone[0], grid[row])
    columns = (IDS * 37) % 101
    single = random_bits_at(9, epochs, IDS, Purpose.CLIP_TARGET, columns)
    np.testing.assert_array_equal(single, grid[IDS, columns])


def test_no_samples_and_no_draws_are_allowed():
    assert random_bits(0, 0, IDS[:0], Purpose.MATCH, 5).shape == (0, 5)
    assert random_bits(0, 0, IDS, Purpose.MATCH, 0).shape == (4096, 0)


def test_below_and_scale_cover_their_ranges():
    ends = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    np.testing.assert_array_equal(below(ends, 0.0), [False] * 4)
    np.testing.assert_array_equal(below(ends, 0.5), [True, True, False, False])
    np.testing.assert_array_equal(below(ends, 1.0), [True] * 4)
    np.testing.assert_array_equal(scale(ends, 30522), [0, 15260, 15261, 30521])
