"""Random bits of attention dropout: the definition, its statistics, and equality of its forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.kernels.dropout_mask import drop_threshold, keep_mask, keep_rate, mix, stream_keys, weyl
from xdscale.kernels.dropout_mask_cpu import Masks

MODULUS = 1 << 32


def documented_mix(word: int, key: int) -> int:
    """The documented mixing in Python's unbounded integers."""
    word = ((word ^ word >> 16) * 0x21F0AAAD + key) % MODULUS
    word = (word ^ word >> 15) * 0x735A2D97 % MODULUS
    return word ^ word >> 15


def byte(seed: int, sample: int, head: int, query: int, key: int) -> int:
    """The documented byte of one score."""
    halves = []
    for start in (0x1B873593, 0x4CF5AD43):
        state = start
        for part in (seed, seed >> 32, sample, head):
            state = (documented_mix(state ^ part % MODULUS, 0) + start) % MODULUS
        halves.append(state)
    word = documented_mix(((query * 65536 + key // 4) * 0x9E3779B1 + halves[0]) % MODULUS, halves[1])
    return word >> 8 * (key % 4) & 0xFF


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    sample=st.integers(0, 5),
    queries=st.integers(1, 9),
    keys=st.integers(1, 21),
    threshold=st.integers(1, 255),
)
def test_mask_follows_the_documented_integers(seed: int, sample: int, queries: int, keys: int, threshold: int) -> None:
    mask = keep_mask(torch.tensor([seed]), sample, 2, queries, keys, threshold)
    expected = [
        [[byte(seed, sample, head, query, key) >= threshold for key in range(keys)] for query in range(queries)]
        for head in range(2)
    ]
    assert mask.tolist() == expected


def sample_bytes(seed: int) -> torch.Tensor:
    """Bytes of 3 samples x 8 heads, 256 queries and 512 keys: [24, 256, 512]."""
    key_0, key_1 = (half.flatten()[:, None, None] for half in stream_keys(torch.tensor([seed]), 3, 8))
    words = key_0 + weyl(0, 256, 128, torch.device("cpu"))
    return mix(words, key_1).view(torch.uint8)


def chi_squared_sigmas(values: torch.Tensor, cells: int) -> float:
    """How many standard deviations the chi-squared statistic of uniform `values` lies above its mean."""
    counts = torch.bincount(values.flatten().long(), minlength=cells).double()
    expected = counts.sum() / cells
    chi = ((counts - expected) ** 2 / expected).sum()
    return float(chi - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_bytes_are_uniform() -> None:
    for seed in (0, 1, 1 << 40):
        drawn = sample_bytes(seed)
        for place in range(4):
            assert abs(chi_squared_sigmas(drawn[..., place::4], 256)) < 5


@pytest.mark.parametrize(
    ("axis", "distance"), [(0, 1), (0, 8), (1, 1), (1, 2), (1, 16), (2, 1), (2, 2), (2, 4), (2, 64)]
)
def test_neighbours_are_independent(axis: int, distance: int) -> None:
    """Pairs of bytes in the next heads, samples, queries and keys fill all 65,536 cells evenly."""
    drawn = sample_bytes(12345).long()
    count = drawn.shape[axis] - distance
    pairs = drawn.narrow(axis, 0, count) * 256 + drawn.narrow(axis, distance, count)
    assert abs(chi_squared_sigmas(pairs, 65536)) < 5


def test_next_seeds_are_independent() -> None:
    for seed in (1, 1 << 32):
        pairs = sample_bytes(0).long() * 256 + sample_bytes(seed).long()
        assert abs(chi_squared_sigmas(pairs, 65536)) < 5


def test_words_of_a_head_are_distinct() -> None:
    words = sample_bytes(3)[5].view(torch.int32)
    assert len(words.unique()) == words.numel()


@pytest.mark.parametrize("dropout", [0.1, 0.25, 0.5, 0.9])
def test_share_of_kept_scores_is_the_stated_rate(dropout: float) -> None:
    threshold = drop_threshold(dropout)
    assert abs(1 - keep_rate(threshold) - dropout) <= 1 / 512
    mask = keep_mask(torch.tensor([77]), 1, 4, 256, 500, threshold)
    rate = keep_rate(threshold)
    sigma = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs(mask.double().mean() - rate) < 5 * sigma
    # Rows and columns too: their means scatter as those of independent draws.
    for axis in (1, 2):
        means = mask.double().mean(axis)
        spread = float(means.var()) * mask.shape[axis] / (rate * (1 - rate))
        assert abs(spread - 1) < 5 * math.sqrt(2 / means.numel())


def test_thresholds_at_the_ends() -> None:
    assert drop_threshold(0.0) == 0
    assert keep_rate(0) == 1.0
    assert drop_threshold(0.9999) == 255  # something is always kept, so that the rescaling is finite


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    heads=st.tuples(st.integers(0, 2), st.integers(1, 3)),
    first=st.sampled_from([0, 1, 30, 65_500]),
    queries=st.integers(1, 40),
    keys=st.integers(1, 50),
    threshold=st.integers(1, 255),
)
def test_pieces_drawn_on_a_cpu_are_the_definitions(
    seed: int, heads: tuple[int, int], first: int, queries: int, keys: int, threshold: int
) -> None:
    some = slice(heads[0], sum(heads))
    masks = Masks(torch.tensor([seed]), 3, 5, threshold)
    masks.keep(0, slice(None), 0, 60, 60)  # leaves other bits in the memory that is used again
    drawn = masks.keep(2, some, first, queries, keys)[:, :, :keys]
    key_0, key_1 = (half[2, some, None, None] for half in stream_keys(torch.tensor([seed]), 3, 5))
    words = mix(key_0 + weyl(first, queries, -(-keys // 4), torch.device("cpu")), key_1)
    assert np.array_equal(drawn, words.view(torch.uint8)[:, :, :keys] >= threshold)


def test_mask_does_not_depend_on_how_much_is_drawn() -> None:
    seed = torch.tensor([9])
    whole = keep_mask(seed, 2, 3, 40, 50, 26)
    assert torch.equal(whole[:2, :17, :33], keep_mask(seed, 2, 2, 17, 33, 26))


def test_a_mask_lies_where_its_seed_does():
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    found = keep_mask(seed, 1, 2, 3, 5, 7)
    assert (found.shape, found.dtype, found.device.type) == ((2, 3, 5), torch.bool, "meta")
