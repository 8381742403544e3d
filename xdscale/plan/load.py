"""What one sequence brings to the model: how many tokens, blocks and targets."""

import math
from dataclasses import dataclass

from xdscale.errors import XdscaleError
from xdscale.plan.shapes import CLIP_CONTEXT, ModelShape
from xdscale.recipe import Recipe

CLIP_IDS_PER_WORD_PIECE = 1.07
"""545 CLIP ids for 510 word pieces of Wikipedia, on average (docs/measurements.md: 560 of 693 positions filled)."""

MOST_CLIP_IDS_PER_WORD_PIECE = 1.25
"""Of the texts of 510 word pieces of the same dump, 1 % need nine blocks and none more."""

_CONTENT = CLIP_CONTEXT - 2
_MOST_BLOCKS = 9


@dataclass(frozen=True)
class Load:
    """Averages per sequence.

    Attributes:
        length: language tokens, with [CLS] and [SEP].
        blocks: CLIP blocks that are computed, padding included.
        clip_tokens: CLIP tokens without padding, with start and end of each block.
        masked: positions whose word is predicted.
        matched: positions that the MATCH head reads, 0 or 1.
        clip_targets: positions whose CLIP token is predicted.
    """

    length: int
    blocks: int
    clip_tokens: float
    masked: float
    matched: int
    clip_targets: float


def expected_load(spec: Recipe, shape: ModelShape, length: int) -> Load:
    """Returns what an average sequence of a micro-batch brings: for FLOPs and time.

    A micro-batch has as many blocks as its longest text; half a block above the average covers that.

    Raises:
        XdscaleError: the encoder has fewer positions than `length`.
    """
    return _load(spec, shape, length, CLIP_IDS_PER_WORD_PIECE, 0.5)


def largest_load(spec: Recipe, shape: ModelShape, length: int) -> Load:
    """Returns what the longest sequences bring: for memory.

    Raises:
        XdscaleError: the encoder has fewer positions than `length`.
    """
    return _load(spec, shape, length, MOST_CLIP_IDS_PER_WORD_PIECE, 0.0)


def _load(spec: Recipe, shape: ModelShape, length: int, ids_per_piece: float, spare_blocks: float) -> Load:
    if not 3 <= length <= shape.language.max_position_embeddings:
        raise XdscaleError(
            f"sequence length {length}: {spec.model.language.name} takes 3 to {shape.language.max_position_embeddings}"
        )
    ids = min(ids_per_piece * (length - 2), _MOST_BLOCKS * _CONTENT)
    blocks = min(math.ceil(ids / _CONTENT + spare_blocks), _MOST_BLOCKS)
    tasks = spec.tasks
    return Load(
        length=length,
        blocks=blocks,
        clip_tokens=ids + 2 * math.ceil(ids / _CONTENT),
        masked=tasks.mlm.select * (length - 2) if tasks.mlm else 0.0,
        matched=int(tasks.match is not None),
        clip_targets=tasks.clip_tokens.select * ids if tasks.clip_tokens else 0.0,
    )
