"""Tiles of all kernels on all architectures, also those of which no case is compiled here: what Triton takes at all."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from xdscale.kernels import (
    activated_linear_triton,
    attention_launch,
    linear_triton,
    masked_token_loss_triton,
    residual_norm_triton,
)

NO_POWERS = {"num_stages", "stages", "resident", "programs"}
TILES = {
    "attention": (
        *(tile for kind in attention_launch.TILES.values() for tile in kind.values()),
        *attention_launch.CAUSAL_TILES.values(),
        *attention_launch.WIDE_HEAD_TILES.values(),
        *attention_launch.FP32_TILES.values(),
        *attention_launch.WIDE_HEAD_FP32_TILES.values(),
    ),
    "loss": tuple(chain(*masked_token_loss_triton.TILES.values())),
    "norm": tuple(tile for kind in residual_norm_triton.TILES.values() for tile in kind.values()),
    "linear": (linear_triton.TILE, linear_triton.JOIN_TILE),
    "gelu": (activated_linear_triton.TILE,),
}


def counts(tile: Any) -> Iterator[tuple[str, int]]:
    values = tile._asdict() if hasattr(tile, "_asdict") else vars(tile)
    yield from ((name, value) for name, value in values.items() if name not in NO_POWERS)


@pytest.mark.parametrize("kernel", TILES)
def test_sides_and_warps_are_powers_of_two(kernel: str) -> None:
    assert [
        (tile, name) for tile in TILES[kernel] for name, value in counts(tile) if value < 1 or value & (value - 1)
    ] == []


def test_every_architecture_has_tiles_for_every_kind_of_weights() -> None:
    families = set(masked_token_loss_triton.FAMILIES.values())
    kinds = ((2, 2), (2, 4), (4, 4))
    assert set(masked_token_loss_triton.TILES) == {(family, *kind) for family in families for kind in kinds}
    for tiles in (attention_launch.TILES, attention_launch.FP32_TILES, residual_norm_triton.TILES):
        assert set(tiles) == set(masked_token_loss_triton.FAMILIES)
