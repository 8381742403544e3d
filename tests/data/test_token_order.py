"""Batches counted in tokens: within budget, every sample once per epoch, the same at any world size and from any step.

Independent reference: a walk from the first sample of the run, one by one.
"""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.data.order import WINDOW
from xdscale.data.permutation import permute
from xdscale.data.token_order import TokenOrder, split_tokens
from xdscale.errors import XdscaleError

quick = settings(deadline=None, max_examples=60)
worlds = st.integers(1, 6)
all_lengths = st.lists(st.integers(1, 20), min_size=1, max_size=60).map(np.array)


def order(lengths, tokens, world=1, rank=0, micro=10**6, seed=0):
    return TokenOrder(lengths, seed=seed, batch_tokens=tokens, world_size=world, rank=rank, micro_tokens=micro)


def walk(lengths, stretch, seed):
    """Yields (step, epoch, sample id) of the run's samples one after the other."""
    token = 0
    for epoch in itertools.count():
        for sample in permute(np.arange(len(lengths)), len(lengths), seed=seed, epoch=epoch).tolist():
            yield token // stretch, epoch, sample
            token += int(lengths[sample])


@quick
@given(all_lengths, worlds, st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_batches_are_the_walks(lengths, world, more, seed):
    tokens = (world + 1) * lengths.max() - 1 + more
    stretch = int(tokens - lengths.max() + 1)
    pairs = itertools.groupby(walk(lengths, stretch, seed), lambda item: item[0])
    expected = {step: [(epoch, sample) for _, epoch, sample in group] for step, group in itertools.islice(pairs, 12)}
    for step in reversed(range(12)):  # each from nothing, in any order
        one = order(lengths, tokens, world, seed=seed)
        found = list(zip(*(array.tolist() for array in one.global_batch_ids(step))))
        assert found == expected[step]
        assert world <= len(found)
        assert sum(int(lengths[sample]) for _, sample in found) <= tokens
        place = one.position(step)
        ids = permute(np.arange(len(lengths)), len(lengths), seed=seed, epoch=place.epoch)
        assert (place.epoch, int(ids[place.index])) == found[0]


@quick
@given(all_lengths, worlds, st.integers(0, 100), st.integers(0, 30), st.integers(0, 10**6))
def test_ranks_share_a_batch_within_their_budgets_and_none_is_idle(lengths, world, more, micro, step):
    longest = int(lengths.max())
    tokens, micro = (world + 1) * longest - 1 + more, longest + micro
    epochs, ids = order(lengths, tokens).global_batch_ids(step)
    ranks = [order(lengths, tokens, world, rank, micro).slots(step) for rank in range(world)]
    assert {len(part) for part in ranks} == {split_tokens(tokens, longest, world, micro).accumulation}
    found = [slots for round_ in zip(*ranks) for slots in round_]
    np.testing.assert_array_equal(np.concatenate([slots.sample_ids[slots.real] for slots in found]), ids)
    np.testing.assert_array_equal(np.concatenate([slots.epochs[slots.real] for slots in found]), epochs)
    assert max(int(lengths[slots.sample_ids].sum()) for slots in found) <= micro
    busy = [int(slots.real.sum()) for slots in found]
    assert all(busy) or sum(busy) < len(busy)
    assert all(any(slots.real.any() for slots in part) for part in ranks)
    assert all(len(slots.real) == max(1, slots.real.sum()) for slots in found)


def test_large_batches_use_their_budget_and_ranks_are_even():
    """UNITER's 80,000 tokens on VCR (spec MAD §3.3), lengths up to 160, as 4 ranks × 5 passes of 4,400."""
    lengths = np.random.default_rng(0).integers(20, 161, 20_000).astype(np.uint16)
    parts = [order(lengths, 80_000, 4, rank, 4400).slots(17) for rank in range(4)]
    tokens = np.array([[lengths[slots.sample_ids].sum(dtype=int) for slots in part] for part in parts])
    assert tokens.shape == (4, 5)
    assert 79_500 < tokens.sum() <= 80_000
    assert tokens.max() - tokens.min() < 320


def test_a_late_step_of_many_samples_is_found_at_once():
    lengths = np.full(1_000_000, 7, np.uint8)
    began = time.process_time()
    order(lengths, 10_000).slots(10**7)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_are_those_of_the_whole_order_where_samples_are_many_windows(epoch):
    """Of 20,000 samples of 1 to 9 tokens: from the middle of the epoch over the borders of windows into the next."""
    lengths = np.random.default_rng(1).integers(1, 10, 20_000).astype(np.uint8)
    one = order(lengths, 9008)
    ids = [permute(np.arange(20_000), 20_000, seed=0, epoch=number) for number in (epoch, epoch + 1)]
    tokens = np.concatenate([lengths[part].astype(int) for part in ids])
    begins = epoch * lengths.sum(dtype=int) + np.cumsum(tokens) - tokens
    first = begins[0] // 9000 + 1
    for step in range(first, first + 12):
        inside = (begins >= 9000 * step) & (begins < 9000 * (step + 1))
        epochs, found = one.global_batch_ids(step)
        np.testing.assert_array_equal(found, np.concatenate(ids)[inside])
        np.testing.assert_array_equal(epochs, np.repeat([epoch, epoch + 1], 20_000)[inside])


def test_a_step_that_spans_several_epochs():
    lengths = np.array([3, 1, 2])
    epochs, ids = order(lengths, 22).global_batch_ids(1)  # tokens 20 to 39, of 6 per epoch
    assert set(epochs.tolist()) == {3, 4, 5, 6}
    for epoch in (4, 5):
        np.testing.assert_array_equal(np.sort(ids[epochs == epoch]), [0, 1, 2])


def test_an_epoch_may_end_where_a_window_does():
    one = order(np.ones(WINDOW, np.uint8), WINDOW)
    epochs, ids = one.global_batch_ids(1)
    assert set(epochs.tolist()) == {1}
    np.testing.assert_array_equal(np.sort(ids), np.arange(WINDOW))
    assert (one.position(2).epoch, one.position(2).index) == (2, 0)


@pytest.mark.parametrize(
    ("world", "micro", "said"),
    [
        (1, 29, "29 tokens, 20 on average: 1 rank × 1 micro-batch of at most 29"),
        (2, 10, "29 tokens, 20 on average: 2 ranks × 10 micro-batches of at most 10"),
    ],
)
def test_how_a_step_is_split_is_said(world, micro, said):
    assert str(split_tokens(29, 10, world, micro)) == f"a step of at most {said}"


@pytest.mark.parametrize(
    ("tokens", "micro", "message"),
    [
        (28, 10, "training.batch_tokens = 28: the longest sample has 10 tokens, so 2 ranks need at least 29"),
        (29, 9, "train_micro_batch_size_per_gpu = 9 tokens: the longest sample has 10"),
    ],
)
def test_budgets_that_are_too_small_are_refused(tokens, micro, message):
    with pytest.raises(XdscaleError, match=message):
        order(np.array([3, 10]), tokens, world=2, micro=micro)
    assert len(order(np.array([3, 10]), 29, world=2, micro=10).slots(0)) == 10  # the least of both
    with pytest.raises(XdscaleError, match="holds 0 samples"):
        order(np.array([], int), tokens)
