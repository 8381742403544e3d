"""Random numbers without state: every draw is a hash of (seed, epoch, sample, purpose, counter).

A generator that is advanced gives different numbers after a restart, at another world size or in another
order. A hash of the coordinates gives the same ones always, and any of them alone. The coordinates are
packed into one 64-bit word and scrambled by a bijection, so that within an epoch no two draws share a hash
value; one value yields the two 32-bit draws of counters 2k and 2k + 1.
"""

from enum import IntEnum

import numpy as np

MAX_SAMPLES = 2**32
"""Most samples in one split: the sample id has 32 bits of the packed word."""

MAX_EPOCH = 2**32 - 1
"""Highest epoch number."""

PURPOSE_SHIFT = np.uint64(24)
SAMPLE_SHIFT = np.uint64(32)
# Odd constants of Stafford's mix 13 (splitmix64) and the golden ratio: known for good avalanche.
SPREAD = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = (
    (np.uint64(32), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(29), np.uint64(0x94D049BB133111EB)),
)
LAST_SHIFT = np.uint64(32)
WORD = np.dtype("<u8")  # little-endian on any machine, so that the two halves come in the same order
HALF = np.dtype("<u4")
BLOCK_BYTES = 128 << 10  # words scrambled at once: they and their scratch copy stay in the second-level cache


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes never share a hash value.

    A purpose is a number below 256. Systems of other packages take theirs from 128 on.
    """

    PERMUTATION = 0
    MASKED_POSITION = 1
    RANDOM_TOKEN = 2
    MATCH = 3
    PARTNER = 4
    CLIP_TARGET = 5
    MASKED_REGION = 6
    FLIP = 7


def random_bits(seed: int, epochs: np.ndarray | int, sample_ids: np.ndarray, purpose: int, count: int) -> np.ndarray:
    """Draws `count` uniform 32-bit numbers for each sample.

    Args:
        seed: below 2**32.
        epochs: int64 [n] or one number, each below 2**32.
        sample_ids: int64 [n], each below 2**32.
        purpose: what the numbers are for, as `Purpose`.
        count: draws per sample (counters 0 .. count - 1); a larger count begins with the same numbers.

    Returns:
        uint32 [n, count].
    """
    starts = _spread_starts(seed, epochs, sample_ids, purpose)
    words = (count + 1) // 2
    steps = np.arange(words, dtype=WORD) * SPREAD
    scrambled = np.empty((len(starts), words), WORD)
    rows = max(1, BLOCK_BYTES // max(1, words * WORD.itemsize))
    scratch = np.empty((min(rows, len(starts)), words), WORD)
    for first in range(0, len(starts), rows):
        block = scrambled[first : first + rows]
        # (start + counter) * SPREAD, with the product distributed: one addition per word
        np.add(starts[first : first + rows, None], steps, out=block)
        _scramble(block, scratch[: len(block)])
    return scrambled.view(HALF)[:, :count]


def random_bits_at(
    seed: int, epochs: np.ndarray | int, sample_ids: np.ndarray, purpose: int, counters: np.ndarray
) -> np.ndarray:
    """Draws single numbers: element i equals `random_bits(...)[i, counters[i]]`.

    Args:
        seed: below 2**32.
        epochs: int64 [n] or one number.
        sample_ids: int64 [n].
        purpose: what the numbers are for, as `Purpose`.
        counters: int64 [n], each below 2**25: 24 bits of the packed word, two draws each.

    Returns:
        uint32 [n].
    """
    counters = counters.astype(WORD)
    words = _spread_starts(seed, epochs, sample_ids, purpose) + (counters >> np.uint64(1)) * SPREAD
    _scramble(words, np.empty_like(words))
    return (words >> ((counters & np.uint64(1)) << np.uint64(5))).astype(HALF)


def below(bits: np.ndarray, probability: float) -> np.ndarray:
    """Turns 32-bit draws into events of the given probability (to within 2**-33); bool, same shape."""
    return bits < round(probability * 2**32)


def scale(bits: np.ndarray, size: int) -> np.ndarray:
    """Maps 32-bit draws to uniform integers in [0, size), size far below 2**32; int64, same shape."""
    return ((bits.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)).astype(np.int64)


def _spread_starts(seed: int, epochs: np.ndarray | int, sample_ids: np.ndarray, purpose: int) -> np.ndarray:
    """Returns (packed sample and purpose + key of seed and epoch) * SPREAD; uint64 [n]."""
    key = np.atleast_1d(np.asarray(epochs)).astype(WORD) | (np.uint64(seed) << np.uint64(32))
    _scramble(key, np.empty_like(key))  # a bijection: different (seed, epoch) always have different keys
    packed = np.asarray(sample_ids).astype(WORD) << SAMPLE_SHIFT
    packed |= np.uint64(purpose) << PURPOSE_SHIFT
    return (packed + key) * SPREAD


def _scramble(words: np.ndarray, scratch: np.ndarray) -> None:
    """Applies the 64-bit bijection in place; `scratch` has the shape of `words`."""
    for shift, factor in ROUNDS:
        np.right_shift(words, shift, out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        np.multiply(words, factor, out=words)
    np.right_shift(words, LAST_SHIFT, out=scratch)
    np.bitwise_xor(words, scratch, out=words)
