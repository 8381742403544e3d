"""MATCH pairs: which sample's text the CLIP tower reads (spec xdbert §3)."""

import numpy as np

from xdscale.data.hashing import Purpose, below, random_bits
from xdscale.recipes.xdbert.schema import Match
from xdscale.systems.contract import Slots

SAME_TEXT = 1
OTHER_TEXT = 0
PADDING = -1


def draw_partners(slots: Slots, size: int, recipe: Match, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws for each sample whether the CLIP text is its own, and otherwise whose it is.

    A partner is drawn uniformly from all other samples of the split, never the sample itself. A split of one
    sample has no others, so its pairs are always the same text.

    Args:
        slots: the n samples.
        size: number of samples in the split.
        recipe: share of pairs whose texts differ.
        seed: below 2**32.

    Returns:
        (text ids int64 [n], labels int64 [n]); 1 = same text, 0 = other text (spec xdbert §9), -1 = padding.
    """
    bits = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.MATCH, 1)[:, 0]
    other = below(bits, recipe.mismatch) & (size > 1)
    halves = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.PARTNER, 2).astype(np.uint64)
    # (64-bit draw * others) >> 64 in two steps: of 32 bits alone some of millions of partners get more
    others, shift = np.uint64(size - 1), np.uint64(32)
    offset = (halves[:, 1] * others + ((halves[:, 0] * others) >> shift)) >> shift
    partners = (slots.sample_ids + 1 + offset.astype(np.int64)) % size
    text_ids = np.where(other, partners, slots.sample_ids)
    labels = np.where(other, OTHER_TEXT, SAME_TEXT)
    return text_ids, np.where(slots.real, labels, PADDING)
