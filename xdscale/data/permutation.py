"""A shuffle that needs no memory: a keyed bijection of range(size), computed position by position.

Shuffling six million ids costs memory on every rank and time after every restart. A Feistel network is a
bijection of all 2b-bit numbers for any round function; walking its cycle until the number falls below `size`
makes it a bijection of range(size) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The
domain is at most four times `size`, so a walk takes four steps or fewer on average.
"""

import numpy as np

from xdscale.data.hashing import ROUNDS, Purpose, random_bits

FEISTEL_ROUNDS = 8


def permute(index: np.ndarray, size: int, *, seed: int, epoch: int, table: int = 0) -> np.ndarray:
    """Maps positions of an epoch to sample ids.

    Args:
        index: int64 [n], positions in [0, size).
        size: number of samples, 1 to 2**32.
        seed: below 2**32.
        epoch: below 2**32.
        table: number of the table, below 2**32; every (seed, epoch, table) has its own permutation.

    Returns:
        int64 [n], in [0, size); over all positions every id comes exactly once.
    """
    half_bits = _half_bits(size)
    keys = random_bits(seed, epoch, np.array([table]), Purpose.PERMUTATION, 2 * FEISTEL_ROUNDS)
    round_keys = keys.astype(np.uint64).reshape(FEISTEL_ROUNDS, 2) @ np.array([1, 2**32], np.uint64)
    values = index.astype(np.uint64)
    if half_bits == 0:
        return values.astype(np.int64)
    values = _feistel(values, half_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values[outside], half_bits, round_keys)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


def _half_bits(size: int) -> int:
    """Returns b such that 2b is the smallest even number of bits that can count `size` values."""
    return ((size - 1).bit_length() + 1) // 2


def _feistel(values: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    bits = np.uint64(half_bits)
    drop = np.uint64(64 - half_bits)
    left, right = values >> bits, values & np.uint64((1 << half_bits) - 1)
    for key in round_keys:
        mixed = right + key
        for shift, factor in ROUNDS:
            mixed ^= mixed >> shift
            mixed *= factor
        mixed >>= drop  # the highest bits of a product depend on all bits of its factors
        mixed ^= left
        left, right = right, mixed
    return (left << bits) | right
