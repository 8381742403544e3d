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

_PARTLY_FILLED = 0.16
"""545 ids would fill 7.28 blocks; the texts of the dump take 7.44 on average."""

_CONTENT = CLIP_CONTEXT - 2
_MOST_BLOCKS = 9


@dataclass(frozen=True)
class Load:
    """Averages per sequence.

    Attributes:
        length: language tokens, with [CLS] and [SEP].
        blocks: CLIP blocks, of 77 positions each; empty ones are not computed.
        clip_tokens: CLIP tokens without padding, with start and end of each block.
        masked: positions whose word is predicted.
        matched: positions that the MATCH head reads, 0 or 1.
        clip_targets: positions whose CLIP token is predicted.
    """

    length: int
    blocks: float
    clip_tokens: float
    masked: float
    matched: int
    clip_targets: float


def expected_load(spec: Recipe, shape: ModelShape, length: int) -> Load:
    """Returns what an average sequence of a micro-batch brings: for FLOPs and time.

    Raises:
        XdscaleError: the encoder has fewer positions than `length`.
    """
    return _load(spec, shape, length, CLIP_IDS_PER_WORD_PIECE, whole_blocks=False)


def largest_load(spec: Recipe, shape: ModelShape, length: int) -> Load:
    """Returns what the longest sequences bring: for memory.

    Raises:
        XdscaleError: the encoder has fewer positions than `length`.
    """
    return _load(spec, shape, length, MOST_CLIP_IDS_PER_WORD_PIECE, whole_blocks=True)


def _load(spec: Recipe, shape: ModelShape, length: int, ids_per_piece: float, *, whole_blocks: bool) -> Load:
    if not 3 <= length <= shape.language.max_position_embeddings:
        raise XdscaleError(
            f"sequence length {length}: {spec.model.language.name} takes 3 to {shape.language.max_position_embeddings}"
        )
    ids = min(ids_per_piece * (length - 2), _MOST_BLOCKS * _CONTENT)
    blocks = math.ceil(ids / _CONTENT) if whole_blocks else ids / _CONTENT + _PARTLY_FILLED
    if getattr(spec.model, "clip", None) is None:
        ids = blocks = 0.0
    mlm, match, tokens = (getattr(spec.objectives, name, None) for name in ("mlm", "match", "clip_tokens"))
    return Load(
        length=length,
        blocks=blocks,
        clip_tokens=ids + 2 * blocks,
        masked=mlm.select * (length - 2) if mlm else 0.0,
        matched=int(match is not None),
        clip_targets=tokens.select * ids if tokens else 0.0,
    )
