"""The shuffle is an exact bijection and looks like a uniformly drawn one. Bounds in standard deviations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.data.permutation import permute


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed=seed, epoch=epoch)


def test_every_small_size_is_a_bijection():
    for size in [*range(1, 400), 1023, 1024, 1025, 4095, 4096, 4097, 65535, 65536, 65537, 300_001]:
        np.testing.assert_array_equal(np.sort(whole(size, seed=size)), np.arange(size))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2**32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.data())
def test_any_positions_of_any_size_are_mapped_injectively_and_each_alone(size, seed, epoch, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    values = permute(index, size, seed=seed, epoch=epoch)
    assert values.dtype == np.int64
    assert ((values >= 0) & (values < size)).all()
    assert len(set(values.tolist())) == len(index)
    alone = [permute(index[i : i + 1], size, seed=seed, epoch=epoch)[0] for i in range(len(index))]
    np.testing.assert_array_equal(values, alone)


@pytest.mark.parametrize("size", [65536, 100_003])
def test_displacement_and_neighbours_are_those_of_a_random_permutation(size):
    values = whole(size, seed=1)
    # |i - p(i)| of a random permutation: mean (n^2 - 1) / 3n, variance about n^2 / 18
    displacement = np.abs(values - np.arange(size)).mean()
    assert abs(displacement - size / 3) < 5 * size / np.sqrt(18 * size)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) * np.sqrt(size) < 5
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) * np.sqrt(size) < 5
    cells = np.bincount((values[:-1] * 16 // size) * 16 + values[1:] * 16 // size, minlength=256)
    expected = (size - 1) / 256
    assert abs(((cells - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_epochs_and_seeds_give_unrelated_orders():
    size = 20_000
    base = whole(size)
    for other in (whole(size, epoch=1), whole(size, seed=1)):
        assert (base == other).sum() < 10  # equal places of two random permutations: Poisson of mean 1
        assert abs(np.corrcoef(base, other)[0, 1]) * np.sqrt(size) < 5


def test_each_sample_comes_first_equally_often_over_seeds():
    size, seeds = 11, 4400
    first = np.array([permute(np.arange(2), size, seed=seed, epoch=0) for seed in range(seeds)])
    counts = np.bincount(first[:, 0], minlength=size)
    assert ((counts - seeds / size) ** 2 / (seeds / size)).sum() < 10 + 5 * np.sqrt(20)
    pairs = np.bincount(first[:, 0] * size + first[:, 1], minlength=size**2)
    ordered = np.delete(pairs, np.arange(size) * (size + 1))
    expected = seeds / len(ordered)
    assert abs(((ordered - expected) ** 2 / expected).sum() - 109) < 5 * np.sqrt(2 * 109)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_smallest_sizes_are_shuffled_too(size):
    """Over seeds each position gets each id, and about as often."""
    orders = np.array([whole(size, seed=seed) for seed in range(600)])
    for position in range(size):
        counts = np.bincount(orders[:, position], minlength=size)
        assert np.abs(counts - 600 / size).max() < 5 * np.sqrt(600 / size)
