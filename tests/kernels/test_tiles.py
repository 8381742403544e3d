"""Tiles of all kernels on all architectures, also those of which no case is compiled here: what Triton takes at all."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xdscale.kernels import (
    activated_linear_triton,
    attention,
    attention_cpu,
    attention_launch,
    gpu,
    linear_triton,
    masked_token_loss_triton,
    residual_norm_triton,
)
from xdscale.kernels.packing import Packing

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


@pytest.mark.parametrize(
    ("capability", "hip", "taken_for"),
    [
        ((7, 5), None, "sm_80"),
        ((8, 0), None, "sm_80"),
        ((8, 9), None, "sm_80"),
        ((9, 0), None, "sm_90"),
        ((10, 0), None, "sm_100"),
        ((12, 0), None, "sm_80"),  # consumer cards of that generation have as little shared memory as an Ampere's
        ((9, 4), "7.1", "gfx942"),
    ],
)
def test_a_card_takes_the_newest_tiles_that_are_not_newer_than_it(monkeypatch, capability, hip, taken_for) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gpu._architecture.__wrapped__(torch.device("cuda", 1)) == taken_for


def test_processors_are_those_of_the_cards_and_one_where_kernels_are_interpreted(monkeypatch) -> None:
    """The makers' numbers: 54, 66 and 74 pairs of multiprocessors, and 8 dies of 38 compute units."""
    assert gpu.PROCESSORS == {"sm_80": 2 * 54, "sm_90": 2 * 66, "sm_100": 2 * 74, "gfx942": 8 * 38}
    assert (gpu.processors(torch.device("cpu")), gpu.architecture(torch.device("cpu"))) == (1, "sm_80")
    with gpu.launches_on("sm_90"):
        assert (gpu.processors(torch.device("meta")), gpu.architecture(torch.device("meta"))) == (132, "sm_90")
    assert gpu.processors(torch.device("meta")) == 108


@pytest.mark.parametrize(
    ("size", "dtype", "causal", "table"),
    [
        (64, torch.bfloat16, False, attention_launch.TILES["sm_90"]["forward"]),
        (64, torch.float16, True, attention_launch.CAUSAL_TILES["forward"]),
        (65, torch.bfloat16, False, attention_launch.WIDE_HEAD_TILES["sm_90"]),
        (65, torch.bfloat16, True, attention_launch.WIDE_HEAD_TILES["sm_90"]),
        (64, torch.float32, True, attention_launch.FP32_TILES["sm_90"]),
        (65, torch.float32, False, attention_launch.WIDE_HEAD_FP32_TILES["sm_90"]),
    ],
)
def test_tiles_follow_the_size_of_heads_and_the_dtype(size, dtype, causal, table) -> None:
    bounds = torch.zeros(2, dtype=torch.int32)
    with gpu.launches_on("sm_90"):
        query = torch.empty(1, 1, size, dtype=dtype, device="meta")
        assert attention_launch.tile_of("forward", query, Packing(bounds, bounds, 1, 1, 0, None, causal)) is table


def test_heads_of_up_to_128_states_are_attended_by_the_kernels(monkeypatch) -> None:
    def chosen(size, dtype=torch.bfloat16):
        return attention._backend(torch.zeros(1, 1, size, dtype=dtype))

    assert [chosen(128), chosen(128, torch.float64)] == [attention_cpu, None]
    monkeypatch.setattr(gpu, "FORCE_TRITON", True)
    assert [chosen(128), chosen(129), chosen(128, torch.float64)] == [attention_launch, attention_cpu, None]


@pytest.mark.parametrize(("target", "precision"), [("sm_80", "tf32x3"), ("sm_90", "tf32x3"), ("gfx942", "ieee")])
def test_fp32_is_multiplied_in_three_passes_of_tf32_but_on_amds_cards(target, precision) -> None:
    bounds = torch.zeros(2, dtype=torch.int32)
    packing = Packing(bounds, bounds, 1, 1, 0, None, False)
    with gpu.launches_on(target) as launches:
        query = torch.empty(1, 1, 64, device="meta")
        _, *saved = attention_launch.forward(query, query, query, packing)
        attention_launch.backward(query, query, query, query, packing, *saved)
    assert [launch.options["PRECISION"] for launch in launches] == [precision] * 3


def test_a_loss_multiplies_fp32_as_pytorch_is_told_to(monkeypatch) -> None:
    def chosen(family, dtype=torch.float32):
        return masked_token_loss_triton._precision(dtype, family)

    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    assert [chosen("ampere"), chosen("hip"), chosen("ampere", torch.bfloat16)] == ["tf32x3", "ieee", "ieee"]
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert [chosen("hopper"), chosen("hip"), chosen("hopper", torch.float16)] == ["tf32", "ieee", "ieee"]


def test_masked_loads_say_what_stands_where_nothing_is_read() -> None:
    """On a GPU it is anything otherwise; Triton's interpreter has zeros there, so that no value shows it.

    A kernel without sums may leave it open: it stores nothing there.
    """
    for path in set(Path(gpu.__file__).parent.glob("*.py")) - {Path(activated_linear_triton.__file__)}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                given = {keyword.arg for keyword in node.keywords}
                assert given in (set(), {"mask", "other"}), f"{path.name}: {ast.unparse(node)}"
