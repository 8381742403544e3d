"""The masks of `dropout_mask` on a CPU, in numpy.

Pieces that stay in a core's cache are so small that PyTorch's calls take longer than its operations; numpy's take a
quarter of that, and its unsigned shifts need no second operation.
"""

import numpy as np
import torch

from xdscale.kernels.dropout_mask import KEYS_PER_WORD, MULTIPLIERS, STARTS, WEYL


class Masks:
    """Draws the masks of one call piece by piece, into memory that is used again.

    Args:
        seed: int64 [1]; all 64 bits count.
        samples: number of samples.
        heads: number of heads.
        threshold: bytes below it mean "dropped".
    """

    def __init__(self, seed: torch.Tensor, samples: int, heads: int, threshold: int) -> None:
        self._keys = _stream_keys(seed.item(), samples, heads)
        self._threshold = threshold
        self._words = self._scratch = np.empty(0, np.uint32)

    def keep(self, sample: int, heads: slice, first_query: int, queries: int, keys: int) -> np.ndarray:
        """Returns which scores stay: bool [heads, queries, keys or up to 3 more], valid until the next call."""
        key_0, key_1 = self._keys[:, sample, heads, None, None]
        # counter * WEYL is the sum of what row and column make of it, modulo 2**32: one pass over the words.
        row = (np.arange(first_query, first_query + queries, dtype=np.uint32)[:, None] << 16) * WEYL + key_0
        column = np.arange(-(-keys // KEYS_PER_WORD), dtype=np.uint32) * WEYL
        shape = len(key_0), queries, len(column)
        if (size := shape[0] * shape[1] * shape[2]) > len(self._words):
            self._words, self._scratch = np.empty((2, size), np.uint32)
        words, scratch = (memory[:size].reshape(shape) for memory in (self._words, self._scratch))
        _mix(np.add(row, column, out=words), key_1, scratch)
        # Viewed as bytes, position k of a row belongs to key k: every host that PyTorch supports is little-endian.
        return np.greater_equal(words.view(np.uint8), self._threshold, out=scratch.view(np.bool_))


def _stream_keys(seed: int, samples: int, heads: int) -> np.ndarray:
    """Returns both halves of the key of every stream, uint32 [2, samples, heads]."""
    start = np.array(STARTS, np.uint32)[:, None, None]
    state = start
    halves = (np.array([part & 0xFFFFFFFF], np.uint32) for part in (seed, seed >> 32))
    for part in (*halves, np.arange(samples, dtype=np.uint32)[:, None], np.arange(heads, dtype=np.uint32)):
        words = state ^ part
        state = _mix(words, np.uint32(0), np.empty_like(words)) + start
    return state


def _mix(words: np.ndarray, key: np.ndarray | np.uint32, scratch: np.ndarray) -> np.ndarray:
    """Mixes uint32 `words` with `key` in place, modulo 2**32; `scratch` is a buffer like `words`."""
    words ^= np.right_shift(words, 16, out=scratch)
    words *= MULTIPLIERS[0]
    words += key
    words ^= np.right_shift(words, 15, out=scratch)
    words *= MULTIPLIERS[1]
    words ^= np.right_shift(words, 15, out=scratch)
    return words
