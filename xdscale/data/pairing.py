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
    halves = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.PARTNER, 2)
    partners = (slots.sample_ids + 1 + one_of(size - 1, halves[:, 1], halves[:, 0])) % size
    text_ids = np.where(other, partners, slots.sample_ids)
    labels = np.where(other, OTHER_TEXT, SAME_TEXT)
    return text_ids, np.where(slots.real, labels, PADDING)


def one_of(sizes: np.ndarray | int, high: np.ndarray, low: np.ndarray | int = 0) -> np.ndarray:
    """Maps draws to uniform integers in [0, size), int64 [n]; 0 where a size is 0.

    Args:
        sizes: below 2**32.
        high: uint32 [n].
        low: uint32 [n], further bits of the draws: of 32 bits alone some of millions of choices would get more.
    """
    sizes, shift = np.asarray(sizes).astype(np.uint64), np.uint64(32)
    # (64-bit draw * size) >> 64 in two steps
    low_part = (np.asarray(low).astype(np.uint64) * sizes) >> shift
    return ((high.astype(np.uint64) * sizes + low_part) >> shift).astype(np.int64)
