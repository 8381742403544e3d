"""Several tables in one order: fixed shares in every batch, each table once per epoch of its own, at any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.data.order import Order, Position
from xdscale.errors import XdscaleError

quick = settings(deadline=None, max_examples=60)
mixtures = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=4)


def order(mixture, factor, world=1, rank=0, micro=1, seed=0):
    sizes, shares = zip(*mixture)
    batch = factor * sum(shares)
    return Order(*sizes, shares=shares, seed=seed, global_batch=batch, world_size=world, rank=rank, micro_batch=micro)


def tables_of(ids, sizes):
    return np.searchsorted(np.cumsum(sizes), ids, side="right")


@quick
@given(mixtures, st.integers(1, 8), st.integers(0, 10**6), st.integers(0, 2**32 - 1))
def test_every_batch_has_its_shares_and_every_run_of_it_too(mixture, factor, step, seed):
    sizes, shares = np.array(mixture).T
    _, ids = order(mixture, factor, seed=seed).global_batch_ids(step)
    tables = tables_of(ids, sizes)
    np.testing.assert_array_equal(np.bincount(tables, minlength=len(sizes)), factor * shares)
    for end in range(len(ids) + 1):  # so micro-batches, which are runs of the batch, are mixed alike
        so_far = np.bincount(tables[:end], minlength=len(sizes))
        assert (abs(so_far - end * shares / shares.sum()) < len(sizes)).all()


@quick
@given(mixtures, st.integers(1, 4), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_each_table_is_seen_once_per_epoch_of_its_own(mixture, factor, first_epoch, seed):
    sizes, shares = np.array(mixture).T
    one = order(mixture, factor, seed=seed)
    for table, (size, count) in enumerate(zip(sizes, factor * shares)):
        steps = range(first_epoch * size // count, -(-(first_epoch + 2) * size // count))
        epochs, ids = (np.concatenate(arrays) for arrays in zip(*(one.global_batch_ids(int(step)) for step in steps)))
        mine = tables_of(ids, sizes) == table
        assert (np.diff(epochs[mine]) >= 0).all()
        for epoch in (first_epoch, first_epoch + 1):
            found = np.sort(ids[mine & (epochs == epoch)]) - sizes[:table].sum()
            np.testing.assert_array_equal(found, np.arange(size))


@quick
@given(mixtures, st.integers(1, 6), st.integers(1, 8), st.integers(1, 7), st.integers(0, 10**6))
def test_ranks_together_hold_exactly_the_batch(mixture, factor, world, micro, step):
    epochs, ids = order(mixture, factor).global_batch_ids(step)
    ranks = [order(mixture, factor, world, rank, micro).slots(step) for rank in range(world)]
    found = [slots for round_ in zip(*ranks) for slots in round_]
    np.testing.assert_array_equal(np.concatenate([slots.sample_ids[slots.real] for slots in found]), ids)
    np.testing.assert_array_equal(np.concatenate([slots.epochs[slots.real] for slots in found]), epochs)
    shares = [sum(int(slots.real.sum()) for slots in part) for part in ranks]
    assert max(shares) - min(shares) <= 1


@quick
@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 6), st.data())
def test_each_row_of_both_tables_is_trained_on_once_per_epoch_however_often_ranks_change(captions, texts, half, data):
    """Two epochs of the larger table; before each step the run may have been continued on other ranks."""
    mixture, sizes = [(captions, 1), (texts, 1)], np.array([captions, texts])
    steps = -(-2 * max(sizes) // half)
    seen = {}
    for step in range(steps):
        world, micro = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 5)))
        found = [slots for rank in range(world) for slots in order(mixture, half, world, rank, micro).slots(step)]
        epochs, ids = (
            np.concatenate([getattr(slots, name)[slots.real] for slots in found]) for name in ("epochs", "sample_ids")
        )
        assert np.bincount(tables_of(ids, sizes), minlength=2).tolist() == [
            half,
            half,
        ]  # the ratio, whoever computes it
        for pair in zip(epochs.tolist(), ids.tolist()):
            seen[pair] = seen.get(pair, 0) + 1
    assert set(seen.values()) == {1}
    for table, size in enumerate(sizes.tolist()):
        first = sizes[:table].sum()
        for epoch in range(steps * half // size):
            assert all((epoch, first + row) in seen for row in range(size))


def test_one_captioned_picture_to_one_text():
    """VL-BERT's mixture (spec §3): 1 : 1, and both batches of a GPU in equal parts."""
    mixture = [(1000, 1), (700, 1)]
    for rank in range(4):
        for slots in order(mixture, 32, world=4, rank=rank, micro=16).slots(9):
            assert (slots.sample_ids < 1000).sum() == 8
    assert order(mixture, 32).position(40) == Position(1, 280)


def test_equal_tables_are_not_shuffled_alike():
    _, ids = order([(500, 1), (500, 1)], 500).global_batch_ids(0)
    assert (ids[ids < 500] == ids[ids >= 500] - 500).sum() < 10


@pytest.mark.parametrize(
    ("sizes", "shares", "message"),
    [
        ((4, 4), (1, 2), r"training.global_batch = 8 cannot be shared 1 : 2 among tables; choose a multiple of 3"),
        ((4, 0), (1, 1), "holds 0 samples"),
        ((2**32, 1), (1, 1), "holds 4294967297 samples"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(sizes, shares, message):
    with pytest.raises(XdscaleError, match=message):
        Order(*sizes, shares=shares, seed=0, global_batch=8, world_size=1, rank=0, micro_batch=1)
