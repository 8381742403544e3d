"""Where padded arrays hold text: the numbers that shapes of the forward pass follow from.

They are computed with numpy where the lengths are known, on the host: asking a GPU for any of them would make the host
wait until everything launched before is done.
"""

import numpy as np


def clip_layout(clip_lengths: np.ndarray, block_length: int) -> dict[str, np.ndarray]:
    """Returns where CLIP blocks hold text.

    Args:
        clip_lengths: int [..., blocks], valid positions of each block; 0 for an empty one. The leading dimensions count
            the texts, t in all.
        block_length: positions of a block: 77.

    Returns:
        clip_blocks int64 [filled blocks]: flat index into t * blocks.
        clip_valid int64 [tokens]: flat index into t * blocks * block_length.
        clip_longest int64 []: tokens of the longest text.
    """
    valid = np.arange(block_length) < clip_lengths[..., None]  # [..., blocks, block_length]
    return {
        "clip_blocks": np.flatnonzero(clip_lengths),
        "clip_valid": np.flatnonzero(valid),
        "clip_longest": np.array(clip_lengths.sum(-1).max(initial=0)),
    }


def language_layout(language_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns where padded language tokens are valid.

    Args:
        language_mask: bool [..., length]; the leading dimensions count the texts, t in all.

    Returns:
        language_valid int64 [tokens]: flat index into t * length.
    """
    return {"language_valid": np.flatnonzero(language_mask)}
