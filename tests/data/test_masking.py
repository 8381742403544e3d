"""Masked language modelling and CLIP targets keep the published rates."""

from types import SimpleNamespace

import numpy as np
import pytest

from xdscale.data.masking import mask_language_ids, select_clip_targets
from xdscale.recipes.mlm.schema import MaskedLM
from xdscale.recipes.xdbert.schema import ClipTokens
from xdscale.systems.contract import Slots

MASK_ID, VOCAB = 103, 30522
SAMPLES, LENGTH = 4096, 512


def slots(samples=SAMPLES, epoch=0):
    return Slots(np.full(samples, epoch), np.arange(samples), np.ones(samples, bool))


def masked(recipe, vocab_size=VOCAB, epoch=0, seed=0):
    original = np.random.default_rng(0).integers(1000, VOCAB, (SAMPLES, LENGTH))
    changed = original.copy()
    positions, labels = mask_language_ids(
        changed, slots(epoch=epoch), recipe, SimpleNamespace(mask_id=MASK_ID, vocab_size=vocab_size), seed=seed
    )
    return original.reshape(-1), changed.reshape(-1), positions, labels


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.81, 0.09)], ids=["paper", "released code"])
def test_rates_over_two_million_positions(mask, random):
    """Spec xdbert §10 fact 7."""
    original, changed, positions, labels = masked(MaskedLM(mask=mask, random=random))
    inner = SAMPLES * (LENGTH - 2)
    assert inner > 1e6
    assert len(positions) / inner == pytest.approx(0.15, abs=0.002)
    assert set(positions % LENGTH) == set(range(1, LENGTH - 1))
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(labels, original[positions])
    now = changed[positions]
    assert (now == MASK_ID).mean() == pytest.approx(mask, abs=0.005)
    assert (now == labels).mean() == pytest.approx(1 - mask - random, abs=0.005)
    untouched = np.ones(len(original), bool)
    untouched[positions] = False
    np.testing.assert_array_equal(changed[untouched], original[untouched])


def test_each_position_is_selected_equally_often():
    _, _, positions, _ = masked(MaskedLM())
    counts = np.bincount(positions % LENGTH, minlength=LENGTH)[1:-1]
    expected = 0.15 * SAMPLES
    statistic = ((counts - expected) ** 2 / (expected * 0.85)).sum()
    assert abs(statistic - len(counts)) < 5 * np.sqrt(2 * len(counts))


def test_random_ids_are_uniform_over_the_whole_vocabulary():
    vocab = 50
    _, changed, positions, _ = masked(MaskedLM(mask=0, random=1), vocab_size=vocab)
    counts = np.bincount(changed[positions], minlength=vocab)
    assert len(counts) == vocab
    expected = len(positions) / vocab
    assert abs(((counts - expected) ** 2 / expected).sum() - (vocab - 1)) < 5 * np.sqrt(2 * vocab)
    _, changed, positions, _ = masked(MaskedLM(mask=0, random=1))
    assert changed[positions].min() < 10  # no low ids left out, as the released code does
    assert changed[positions].max() > VOCAB - 10


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_masks_other_positions(change):
    _, _, here, _ = masked(MaskedLM())
    _, _, there, _ = masked(MaskedLM(), **change)
    shared = len(np.intersect1d(here, there)) / len(here)
    assert shared == pytest.approx(0.15, abs=0.005)


def test_clip_targets_are_drawn_from_content_only():
    """Spec xdbert §8 point 3: the paper's rate on content tokens, not the code's on all positions."""
    counts = np.random.default_rng(1).integers(1, 676, SAMPLES)
    row, token = select_clip_targets(counts, slots(), ClipTokens(), seed=0)
    assert (token < counts[row]).all()
    assert (token >= 0).all()
    assert (np.diff(row * 676 + token) > 0).all()  # in order: the model looks its rows up by binary search
    assert len(row) / counts.sum() == pytest.approx(0.15, abs=0.002)
    assert len(set(zip(row.tolist(), token.tolist()))) == len(row)
    per_sample = np.bincount(row, minlength=SAMPLES) / counts
    assert np.corrcoef(per_sample, counts)[0, 1] == pytest.approx(0, abs=0.08)
