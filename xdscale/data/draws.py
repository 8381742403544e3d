"""A hash of all that is drawn for a global batch, to prove that a continued run goes on with the same draws."""

import hashlib

import numpy as np

from xdscale.data.collate import CLIP_CONTENT, XDBERTCollator
from xdscale.data.masking import mask_language_ids, select_clip_targets
from xdscale.data.order import Slots
from xdscale.data.pairing import draw_partners

ROWS = 512  # samples hashed at once: their masks stay in the cache


def draws_hash(collate: XDBERTCollator, epochs: np.ndarray, sample_ids: np.ndarray) -> str:
    """Returns 64 hex digits for the samples of a global batch and everything that is drawn for them.

    Hashed are epochs and ids in their order, masked positions and what is put there, whose text each sample is paired
    with, and which CLIP tokens are to be named, drawn by the functions that training uses. No shard is read: language
    ids count as 0 and texts as the longest that shards hold. So the hash depends neither on world size, rank,
    micro-batch and padding, nor on shards in quarantine, whose samples keep their places.

    Args:
        collate: of the split that the samples are from.
        epochs: int64 [global_batch].
        sample_ids: int64 [global_batch].
    """
    digest = hashlib.sha256()
    for first in range(0, len(sample_ids), ROWS):
        part = slice(first, first + ROWS)
        for array in _draws(collate, Slots(epochs[part], sample_ids[part], np.ones(len(sample_ids[part]), bool))):
            digest.update(np.ascontiguousarray(array, "<i8"))
    return digest.hexdigest()


def _draws(collate: XDBERTCollator, slots: Slots) -> list[np.ndarray]:
    build, tasks, seed = collate.text, collate.tasks, collate.seed
    drawn = [slots.epochs, slots.sample_ids]
    if tasks.mlm is not None:
        language_ids = np.zeros((len(slots.sample_ids), build.sequence_length + 2), np.int64)
        tokenizer = build.language_tokenizer
        positions, _ = mask_language_ids(
            language_ids, slots, tasks.mlm, seed=seed, mask_id=tokenizer.mask_id, vocab_size=tokenizer.vocab_size
        )
        drawn += [positions, language_ids.reshape(-1)[positions]]
    if tasks.match is not None:
        drawn += draw_partners(slots, len(collate.split), tasks.match, seed=seed)
    if tasks.clip_tokens is not None:
        longest = np.full(len(slots.sample_ids), build.clip_blocks * CLIP_CONTENT)
        drawn += select_clip_targets(longest, slots, tasks.clip_tokens, seed=seed)
    return drawn
