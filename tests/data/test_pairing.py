"""MATCH: half of the pairs are the same text, partners are uniform among the others."""

import numpy as np
import pytest

from xdscale.data.pairing import draw_partners
from xdscale.recipes.xdbert.schema import Match
from xdscale.systems.contract import Slots


def slots(sample_ids, epochs=0):
    sample_ids = np.asarray(sample_ids)
    return Slots(np.broadcast_to(epochs, sample_ids.shape), sample_ids, np.ones(len(sample_ids), bool))


@pytest.mark.parametrize("mismatch", [0.5, 0.2])
def test_share_of_positives(mismatch):
    """Spec xdbert §10 fact 8, first half: positives 50 % ± 1."""
    size = 100_000
    text_ids, labels = draw_partners(slots(np.arange(size)), size, Match(mismatch=mismatch), seed=0)
    assert (labels == 1).mean() == pytest.approx(1 - mismatch, abs=0.01)
    np.testing.assert_array_equal(labels == 1, text_ids == np.arange(size))
    assert set(labels.tolist()) == {0, 1}


def test_partners_are_uniform_among_all_others():
    size, sample, epochs = 8, 3, np.arange(70_000)
    text_ids, labels = draw_partners(slots(np.full(70_000, sample), epochs), size, Match(), seed=0)
    counts = np.bincount(text_ids[labels == 0], minlength=size)
    assert counts[sample] == 0
    others = np.delete(counts, sample)
    expected = others.sum() / (size - 1)
    assert ((others - expected) ** 2 / expected).sum() < 6 + 5 * np.sqrt(12)


def test_partners_in_a_large_split_spread_over_all_of_it():
    size = 2**32
    ids = np.arange(size - 50_000, size)
    text_ids, labels = draw_partners(slots(ids), size, Match(), seed=0)
    partners = text_ids[labels == 0]
    assert partners.min() >= 0
    assert partners.max() < size
    counts = np.bincount(partners * 64 // size, minlength=64)
    expected = len(partners) / 64
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) < 5 * np.sqrt(2 * 63)
    assert len(np.unique(partners & 1)) == 2  # the lowest bit is drawn too


def test_of_two_samples_the_partner_is_the_other_one():
    text_ids, labels = draw_partners(slots([0, 1] * 50, np.arange(100)), 2, Match(), seed=0)
    np.testing.assert_array_equal(text_ids, np.where(labels == 1, [0, 1] * 50, [1, 0] * 50))
    assert set(labels.tolist()) == {0, 1}


def test_a_single_sample_is_always_its_own_pair():
    text_ids, labels = draw_partners(slots(np.zeros(100, np.int64), np.arange(100)), 1, Match(), seed=0)
    assert (labels == 1).all()
    assert (text_ids == 0).all()


def test_padding_has_no_label():
    real = np.arange(10) % 2 == 0
    _, labels = draw_partners(Slots(np.zeros(10, int), np.arange(10), real), 10, Match(), seed=0)
    np.testing.assert_array_equal(labels == -1, ~real)
