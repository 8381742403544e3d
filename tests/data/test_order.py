"""The order is the same at any world size and sees every sample of an epoch exactly once."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.data.order import Order, Position, sample_hash, validation_slots
from xdscale.ds_config import split_batch
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe

sizes, batches, worlds, micros = st.integers(1, 60), st.integers(1, 50), st.integers(1, 8), st.integers(1, 7)
quick = settings(deadline=None, max_examples=60)


def order(size, batch, world=1, rank=0, micro=1, seed=0):
    return Order(size, seed=seed, global_batch=batch, world_size=world, rank=rank, micro_batch=micro)


def real_pairs(slots):
    return list(zip(slots.epochs[slots.real].tolist(), slots.sample_ids[slots.real].tolist()))


@quick
@given(sizes, batches, worlds, micros, st.integers(0, 10**6), st.integers(0, 2**32 - 1))
def test_ranks_together_hold_exactly_the_global_batch(size, batch, world, micro, step, seed):
    epochs, ids = order(size, batch, seed=seed).global_batch_ids(step)
    assert len(epochs) == len(ids) == batch
    whole = list(zip(epochs.tolist(), ids.tolist()))
    ranks = [order(size, batch, world, rank, micro, seed) for rank in range(world)]
    parts = [rank.slots(step) for rank in ranks]
    rounds = -(-batch // (world * micro))
    assert [len(part) for part in parts] == [rounds] * world
    # Round after round, rank after rank: the order of the global batch.
    assert [pair for m in range(rounds) for part in parts for pair in real_pairs(part[m])] == whole
    for slots in (slots for part in parts for slots in part):
        assert len(slots.real) == micro
        assert set(zip(slots.epochs.tolist(), slots.sample_ids.tolist())) <= set(whole)


@quick
@given(st.integers(1, 2000), st.integers(1, 300), st.integers(1, 64))
def test_every_rank_has_its_share_at_the_balanced_width(batch, world, largest):
    """As training splits it: no rank without a sample, ranks differ by one sample, the fewest passes, least padding."""
    if world > batch:
        with pytest.raises(XdscaleError, match=f"feeds at most {batch} ranks, not {world}"):
            split_batch(batch, world, largest)
        return
    split = split_batch(batch, world, largest)
    assert split_batch(batch, world, split.micro_batch) == split  # so it may be applied to what it gave
    assert 1 <= split.micro_batch <= largest
    assert split.accumulation == -(-batch // (world * largest))
    assert (
        world * split.accumulation * (split.micro_batch - 1) < batch <= world * split.accumulation * split.micro_batch
    )
    parts = [order(batch, batch, world, rank, split.micro_batch).slots(0) for rank in range(world)]
    assert {len(part) for part in parts} == {split.accumulation}
    shares = [sum(int(slots.real.sum()) for slots in part) for part in parts]
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    places = sum(len(slots.real) for part in parts for slots in part)
    assert split.padding == pytest.approx(1 - batch / places)


@pytest.mark.parametrize(("world", "micro", "padding"), [(8, 36, 0), (16, 18, 0), (64, 5, 0.1), (200, 2, 0.28)])
def test_shipped_micro_batch_and_batch_beyond_eight_ranks(world, micro, padding):
    """288 samples, at most 36 in one pass: half of 16 ranks and 7 of 8 of 64 once had padding alone."""
    split = split_batch(288, world, 36)
    assert (split.micro_batch, split.accumulation) == (micro, 1)
    assert split.padding == pytest.approx(padding)
    shares = [int(order(1000, 288, world, rank, micro).slots(7)[0].real.sum()) for rank in range(world)]
    assert sum(shares) == 288
    assert set(shares) == {288 // world, -(-288 // world)}


def test_a_batch_that_divides_is_split_as_ever():
    """Sample m * world * micro + rank * micro + j of the global batch is slot j of rank's micro-batch m."""
    _, ids = order(100, 24).global_batch_ids(5)
    for rank in range(3):
        found = [slots.sample_ids for slots in order(100, 24, 3, rank, 4).slots(5)]
        np.testing.assert_array_equal(found, ids.reshape(2, 3, 4)[:, rank])


@quick
@given(sizes, batches, st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_an_epoch_has_every_sample_once_across_batch_borders(size, batch, first_epoch, seed):
    one = order(size, batch, seed=seed)
    first = first_epoch * size // batch
    last = -(-(first_epoch + 3) * size // batch)
    parts = [one.global_batch_ids(step) for step in range(first, last)]
    epochs, ids = (np.concatenate(arrays) for arrays in zip(*parts))
    assert (np.diff(epochs) >= 0).all()
    for epoch in range(first_epoch, first_epoch + 3):
        np.testing.assert_array_equal(np.sort(ids[epochs == epoch]), np.arange(size))


@quick
@given(sizes, batches, st.integers(0, 10**6))
def test_position_counts_consumed_samples(size, batch, step):
    position = order(size, batch).position(step)
    assert 0 <= position.index < size
    assert position.epoch * size + position.index == step * batch
    epochs, _ = order(size, batch).global_batch_ids(step)
    assert epochs[0] == position.epoch


def test_position_at_an_epoch_border():
    assert order(10, 4).position(0) == Position(0, 0)
    assert order(10, 4).position(3) == Position(1, 2)
    assert order(10, 5).position(2) == Position(1, 0)


def test_epochs_are_ordered_differently_and_seeds_too():
    epochs = [order(1000, 1000).global_batch_ids(step)[1] for step in (0, 1)]
    other = order(1000, 1000, seed=1).global_batch_ids(0)[1]
    assert (epochs[0] == epochs[1]).sum() < 10
    assert (epochs[0] == other).sum() < 10


@quick
@given(sizes, st.integers(1, 80), worlds, micros)
def test_validation_sees_the_first_samples_once_with_equal_work(size, limit, world, micro):
    parts = [validation_slots(size, limit, world, rank, micro) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    ids = [slots.sample_ids[slots.real] for part in parts for slots in part]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(min(limit, size)))
    for slots in (slots for part in parts for slots in part):
        assert len(slots.epochs) == len(slots.sample_ids) == len(slots.real) == micro
        assert len(set(slots.epochs.tolist())) == 1
        assert ((slots.sample_ids >= 0) & (slots.sample_ids < min(limit, size))).all()


def test_validation_masks_never_change_and_are_not_those_of_training():
    epochs = {int(validation_slots(9, 9, world, 0, 2)[0].epochs[0]) for world in (1, 2, 5)}
    assert len(epochs) == 1
    assert epochs.pop() >= 2**32 - 1


@pytest.mark.parametrize("size", [0, 2**32 + 1])
def test_a_split_of_impossible_size_is_refused(size):
    with pytest.raises(XdscaleError, match=f"train holds {size} samples; expected 1 to 4294967296: build shards from"):
        order(size, 4)
    what = "--validation-fraction" if size == 0 else "build shards from more text"
    with pytest.raises(XdscaleError, match=f"the split validation holds {size} samples; .*{what}"):
        validation_slots(size, 4, 1, 0, 1)


@pytest.mark.parametrize("size", [1, 2**32])
def test_a_split_of_one_sample_and_of_the_most_has_an_order(size):
    assert order(size, 4).slots(0)[0].sample_ids.max() < size
    assert validation_slots(size, 1, 1, 0, 1)[0].sample_ids.tolist() == [0]


def test_sample_hash_stands_for_epochs_ids_and_order():
    epochs, ids = np.array([0, 0, 1]), np.array([5, 6, 7])
    known = sample_hash(epochs, ids)
    assert len(known) == 16
    assert int(known, 16) >= 0
    assert known == sample_hash(epochs.astype(np.int32), ids.astype(np.int32))
    changed = [(epochs, ids[::-1]), (epochs, ids + 1), (epochs + 1, ids), (epochs[:2], ids[:2])]
    assert known not in {sample_hash(*pair) for pair in changed}


def test_a_recipes_order_is_that_of_its_batch_and_of_the_place():
    """Of an odd number of samples too."""
    ranks = SimpleNamespace(world_size=2, rank=1)
    recipe = load_recipe("quickstart", ["training.global_batch=7", "training.seed=3"])
    found = Order.of(recipe, SimpleNamespace(ranks=ranks, micro_batch=2), 50)
    expected = Order(50, seed=3, global_batch=7, world_size=2, rank=1, micro_batch=2)
    for step in (0, 9):
        assert all(map(np.array_equal, found.global_batch_ids(step), expected.global_batch_ids(step)))
        for one, other in zip(found.slots(step), expected.slots(step), strict=True):
            assert np.array_equal(one.sample_ids, other.sample_ids)
            assert np.array_equal(one.real, other.real)
