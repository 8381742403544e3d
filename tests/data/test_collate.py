"""Batches hold what the slots say, in the layout the model expects, whatever the split over ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.data.collate import XDBERTCollator, pack_clip_blocks
from xdscale.data.order import Order, validation_slots
from xdscale.data.pairing import draw_partners
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.systems.contract import Slots

START, END = 49406, 49407
TASKS = XDBERTObjectives()
SAMPLES, LENGTH, BLOCKS = 37, 30, 4


@pytest.fixture(scope="module")
def split(memory_split):
    return memory_split(SAMPLES, LENGTH, BLOCKS)


def everything(split, epoch=0, real=None):
    size = len(split)
    return Slots(np.full(size, epoch), np.arange(size), np.ones(size, bool) if real is None else real)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 49405), max_size=310), min_size=1, max_size=6), st.integers(0, 2))
def test_clip_blocks_equal_the_plain_definition(texts, more):
    """Spec xdbert §4: groups of 75 ids, each start ... end, zeros after the end, missing groups all zero."""
    blocks = max(1, *(-(-len(text) // 75) for text in texts)) + more
    expected = np.zeros((len(texts), blocks, 77), np.int64)
    lengths = np.zeros((len(texts), blocks), np.int64)
    for i, text in enumerate(texts):
        for k in range(max(1, -(-len(text) // 75))):
            block = [START, *text[75 * k : 75 * k + 75], END]
            expected[i, k, : len(block)] = block
            lengths[i, k] = len(block)
    flat = np.concatenate(texts).astype(np.uint16)
    offsets, asked = np.cumsum([0, *map(len, texts)]), blocks if more else None
    clip_ids, clip_lengths = pack_clip_blocks(flat, offsets, start_id=START, end_id=END, blocks=asked)
    np.testing.assert_array_equal(clip_ids, expected)
    np.testing.assert_array_equal(clip_lengths, lengths)
    assert clip_ids.dtype == clip_lengths.dtype == np.int64


def test_id_zero_inside_a_text_is_a_word_not_padding(memory_split):
    """Spec xdbert §9: token 0 is "!"; lengths and targets must count it."""
    split = memory_split(400, 10, 1)
    split.texts = [np.zeros(20, np.uint16) for _ in range(len(split))]
    batch = XDBERTCollator(split, seed=0, objectives=TASKS)(everything(split))
    assert (batch.arrays["clip_lengths"] == 22).all()
    assert batch.targets["clip_tokens"] / (400 * 20) == pytest.approx(0.15, abs=0.02)
    assert (batch.arrays["clip_labels"] == 0).all()
    assert (batch.arrays["clip_ids"][:, 0, 21] == END).all()


def test_layout_dtypes_and_original_ids(split):
    batch = XDBERTCollator(split, seed=0, objectives=TASKS)(everything(split))
    arrays = batch.arrays
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}
    assert arrays["language_ids"].shape == (SAMPLES, LENGTH + 2)
    assert arrays["clip_ids"].shape == (SAMPLES, BLOCKS, 77)
    assert batch.tokens == SAMPLES * (LENGTH + 2)
    restored = arrays["language_ids"].copy().reshape(-1)
    restored[arrays["masked_lm_positions"]] = arrays["masked_lm_labels"]
    restored = restored.reshape(SAMPLES, LENGTH + 2)
    assert (restored[:, 0] == 101).all()
    assert (restored[:, -1] == 102).all()
    np.testing.assert_array_equal(restored[:, 1:-1], split.language)
    partners = arrays["match_labels"] == 0
    assert 0 < partners.sum() < SAMPLES
    for sample in range(SAMPLES):
        content = clip_content(arrays, sample)
        assert np.array_equal(content, split.texts[sample]) != partners[sample]
        assert any(np.array_equal(content, text) for text in split.texts)


def clip_content(arrays, row):
    pairs = zip(arrays["clip_ids"][row], arrays["clip_lengths"][row])
    return np.concatenate([block[1 : length - 1] for block, length in pairs if length])


def test_targets_are_the_counts_of_the_arrays_and_lie_on_content(split):
    batch = XDBERTCollator(split, seed=0, objectives=TASKS)(everything(split))
    arrays = batch.arrays
    assert batch.targets == {
        "mlm": len(arrays["masked_lm_positions"]),
        "match": SAMPLES,
        "clip_tokens": len(arrays["clip_positions"]),
    }
    assert len(arrays["masked_lm_labels"]) == batch.targets["mlm"]
    assert (np.diff(arrays["clip_positions"]) > 0).all()  # the model looks its rows up by binary search
    row, block, place = np.unravel_index(arrays["clip_positions"], arrays["clip_ids"].shape)
    assert (place > 0).all()
    assert (place < arrays["clip_lengths"][row, block] - 1).all()
    np.testing.assert_array_equal(arrays["clip_labels"], arrays["clip_ids"][row, block, place])
    content = sum(len(clip_content(arrays, sample)) for sample in range(SAMPLES))
    assert batch.targets["clip_tokens"] / content == pytest.approx(0.15, abs=0.02)


def test_padding_samples_contribute_nothing(split):
    collate = XDBERTCollator(split, seed=0, objectives=TASKS)
    real = np.arange(SAMPLES) % 3 != 0
    batch = collate(everything(split, real=real))
    arrays = batch.arrays
    np.testing.assert_array_equal(arrays["match_labels"] == -1, ~real)
    assert real[arrays["masked_lm_positions"] // (LENGTH + 2)].all()
    assert real[arrays["clip_positions"] // (BLOCKS * 77)].all()
    assert batch.targets["match"] == real.sum()
    assert batch.tokens == real.sum() * (LENGTH + 2)
    nobody = collate(everything(split, real=np.zeros(SAMPLES, bool)))
    assert nobody.targets == {"mlm": 0, "match": 0, "clip_tokens": 0}
    assert nobody.tokens == 0
    assert nobody.arrays["language_ids"].shape == arrays["language_ids"].shape


def samples_of(batch, slots):
    """Returns, per real sample, everything the batch says of it, free of its place in the batch."""
    arrays, found = batch.arrays, {}
    width, clip_width = arrays["language_ids"].shape[1], arrays["clip_ids"][0].size
    for row in np.flatnonzero(slots.real):
        masked = arrays["masked_lm_positions"] // width == row
        targets = arrays["clip_positions"] // clip_width == row
        used = arrays["clip_lengths"][row] > 0
        found[int(slots.epochs[row]), int(slots.sample_ids[row])] = [
            part.tolist()
            for part in (
                arrays["language_ids"][row],
                arrays["masked_lm_positions"][masked] - row * width,
                arrays["masked_lm_labels"][masked],
                arrays["clip_ids"][row][used],
                arrays["clip_lengths"][row][used],
                arrays["clip_positions"][targets] - row * clip_width,
                arrays["clip_labels"][targets],
                arrays["match_labels"][row],
            )
        ]
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_a_sample_is_the_same_at_any_rank_micro_batch_and_place(split, world, micro, step, seed):
    collate = XDBERTCollator(split, seed=seed, objectives=TASKS)
    shape = {"seed": seed, "global_batch": 23}
    whole = Order(SAMPLES, **shape, world_size=1, rank=0, micro_batch=23).slots(step)
    expected = samples_of(collate(whole[0]), whole[0])
    found = {}
    for rank in range(world):
        for slots in Order(SAMPLES, **shape, world_size=world, rank=rank, micro_batch=micro).slots(step):
            batch = XDBERTCollator(split, seed=seed, objectives=TASKS)(slots)
            assert batch.arrays["clip_ids"].shape[1] == batch.arrays["clip_lengths"].any(axis=0).sum()
            found |= samples_of(batch, slots)
    assert found == expected


def test_another_epoch_or_seed_draws_anew_and_validation_does_not(split):
    first = XDBERTCollator(split, seed=0, objectives=TASKS)(everything(split)).arrays
    epoch = XDBERTCollator(split, seed=0, objectives=TASKS)(everything(split, epoch=1)).arrays
    seed = XDBERTCollator(split, seed=1, objectives=TASKS)(everything(split)).arrays
    for name in ("masked_lm_positions", "clip_positions", "match_labels"):
        assert not np.array_equal(first[name], epoch[name])
        assert not np.array_equal(first[name], seed[name])
    held_out = validation_slots(SAMPLES, 8, 1, 0, 8)[0]
    collate = XDBERTCollator(split, seed=0, objectives=TASKS)
    assert samples_of(collate(held_out), held_out) == samples_of(collate(held_out), held_out)


def test_objectives_that_are_off_leave_the_texts_alone(split):
    batch = XDBERTCollator(split, seed=0, objectives=XDBERTObjectives(mlm=None, match=None, clip_tokens=None))(
        everything(split)
    )
    layout = {"clip_blocks", "clip_valid", "clip_longest"}
    assert set(batch.arrays) == {"language_ids", "clip_ids", "clip_lengths"} | layout
    assert batch.targets == {}
    np.testing.assert_array_equal(batch.arrays["language_ids"][:, 1:-1], split.language)
    for sample in range(SAMPLES):
        np.testing.assert_array_equal(clip_content(batch.arrays, sample), split.texts[sample])


def test_pairs_that_touch_a_quarantined_shard_weigh_nothing_and_change_nothing_else(memory_split):
    """Damaged texts are never read (the split asserts it); all other samples draw as if nothing had happened."""
    whole, torn = memory_split(SAMPLES, LENGTH, BLOCKS), memory_split(SAMPLES, LENGTH, BLOCKS)
    torn.damaged[5:12] = True
    slots = everything(whole)
    text_ids, _ = draw_partners(slots, SAMPLES, TASKS.match, seed=3)
    lost = torn.damaged | torn.damaged[text_ids]
    assert 7 < lost.sum() < SAMPLES / 2
    before, after = (XDBERTCollator(split, seed=3, objectives=TASKS)(slots) for split in (whole, torn))
    width = LENGTH + 2
    for name in ("language_ids", "clip_ids", "clip_lengths", "match_labels"):
        np.testing.assert_array_equal(before.arrays[name][~lost], after.arrays[name][~lost])
    for name, size in (("masked_lm", width), ("clip", BLOCKS * 77)):
        kept = ~lost[before.arrays[f"{name}_positions"] // size]
        for part in ("positions", "labels"):
            np.testing.assert_array_equal(before.arrays[f"{name}_{part}"][kept], after.arrays[f"{name}_{part}"])
    assert (after.arrays["match_labels"][lost] == -1).all()
    assert after.targets["match"] == (~lost).sum()
    assert after.tokens == (~lost).sum() * width
