"""Launches packed attention's Triton kernels: tile shapes per architecture, grids, and ahead-of-time cases."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from xdscale.kernels.attention_triton import (
    LOG2_E,
    attention_backward_key_value,
    attention_backward_query,
    attention_forward,
)
from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.dropout_mask import drop_threshold, keep_rate
from xdscale.kernels.gpu import PROCESSORS, architecture, cdiv, count_flops, launch, launches_on, next_power_of_2
from xdscale.kernels.packing import Packing

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors."""


@dataclass(frozen=True)
class Tile:
    """How one program cuts its work: queries and keys at a time, warps, and depth of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


KERNELS = {
    "forward": attention_forward,
    "backward_query": attention_backward_query,
    "backward_key_value": attention_backward_key_value,
}
WRITTEN_GRADIENTS = {"forward": 0, "backward_query": 1, "backward_key_value": 2}
"""How many of each kernel's last pointers are gradients of inputs, which have strides of their own."""
USEFUL_PRODUCTS = {"forward": 2, "backward_query": 1, "backward_key_value": 3}
"""Products of matrices of each kernel, without those that compute scores, and the gradients of weights, once more."""
TILES = {
    "sm_80": {
        "forward": Tile(128, 64, warps=8, stages=3),
        "backward_query": Tile(64, 64, warps=4, stages=3),
        "backward_key_value": Tile(32, 64, warps=4, stages=2),
    },
    "sm_90": {
        "forward": Tile(128, 64, warps=8, stages=3),
        "backward_query": Tile(64, 64, warps=4, stages=3),
        "backward_key_value": Tile(32, 64, warps=4, stages=3),
    },
    "sm_100": {
        "forward": Tile(128, 32, warps=8, stages=3),
        "backward_query": Tile(64, 64, warps=4, stages=3),
        "backward_key_value": Tile(64, 64, warps=8, stages=2),
    },
    "gfx942": {
        "forward": Tile(128, 64, warps=4, stages=1),
        "backward_query": Tile(64, 64, warps=4, stages=1),
        "backward_key_value": Tile(32, 64, warps=4, stages=1),
    },
}
"""For 16-bit inputs and head sizes up to 64."""
CAUSAL_TILES = {
    "forward": Tile(64, 32, warps=4, stages=2),
    "backward_query": Tile(64, 32, warps=4, stages=1),
    "backward_key_value": Tile(32, 64, warps=4, stages=3),
}
"""The same for causal attention within CLIP's blocks of 77 tokens, on every architecture."""
WIDE_HEAD_TILES = {
    "sm_80": Tile(64, 32, warps=4, stages=1),
    "sm_90": Tile(64, 32, warps=8, stages=1),
    "sm_100": Tile(64, 32, warps=8, stages=1),
    "gfx942": Tile(32, 32, warps=4, stages=1),
}
"""For 16-bit inputs and head sizes beyond 64."""
FP32_TILES = {
    "sm_80": Tile(32, 32, warps=8, stages=1),
    "sm_90": Tile(32, 32, warps=8, stages=1),
    "sm_100": Tile(32, 32, warps=4, stages=1),
    "gfx942": Tile(32, 32, warps=4, stages=1),
}
"""For fp32 inputs and head sizes up to 64."""
WIDE_HEAD_FP32_TILES = {
    "sm_80": Tile(16, 16, warps=8, stages=1),
    "sm_90": Tile(16, 16, warps=4, stages=1),
    "sm_100": Tile(16, 16, warps=8, stages=1),
    "gfx942": Tile(16, 16, warps=4, stages=1),
}
"""For fp32 inputs and head sizes beyond 64."""
# All of these have no spills and shared memory within limits. Those of sm_90 for 16-bit inputs were the fastest of a
# search on an H200 (`python -m xdscale.bench.gpu tiles`), the others have most programs per core ahead of time.

COMPILE_SHAPE = 32, 512, 560, 12
"""True shape of `compile_cases`, samples, queries, keys and heads: language to CLIP in the base model, 560 of 693 CLIP
positions filled."""
CAUSAL_SHAPE = 32 * 8, 77, 77, 8
"""The same for causal attention: eight blocks of each of 32 texts in ViT-B-32's text tower."""


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the attended values [Tq, heads, d]; then, to save, those and the log-sum-exp (base 2), fp32 [heads, Tq].

    Arguments as in `packed_attention`; `tile` replaces what `TILES` has for the device.
    """
    query, key, value = (_with_whole_tokens(tokens) for tokens in (query, key, value))
    out = query.new_empty(query.shape, dtype=query.dtype)
    log_sum = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    launch_kernel("forward", tile or tile_of("forward", query, packing), packing, (query, key, value, out, log_sum))
    return out, out, log_sum


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    tile: Tile | None = None,
    into: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value; `out` and `log_sum` are what `forward` gave to save.

    The gradients may be written `into` three tensors whose tokens lie apart, else into new ones.
    """
    grad, query, key, value = grad.contiguous(), *(_with_whole_tokens(tokens) for tokens in (query, key, value))
    grad_query, grad_key, grad_value = into or (x.new_empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    row_sum = torch.empty_like(log_sum)
    pointers = (query, key, value, out, grad, log_sum, row_sum, grad_query)
    # Writes row_sum, which the next one reads.
    launch_kernel("backward_query", tile or tile_of("backward_query", query, packing), packing, pointers)
    pointers = (query, key, value, grad, log_sum, row_sum, grad_key, grad_value)
    launch_kernel("backward_key_value", tile or tile_of("backward_key_value", query, packing), packing, pointers)
    return grad_query, grad_key, grad_value


def _with_whole_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Returns [tokens, heads, d] in which the states of one token lie side by side, as those of a projection do."""
    return tokens if tokens.stride()[1:] == (tokens.shape[2], 1) else tokens.contiguous()


def launch_kernel(name: str, tile: Tile, packing: Packing, pointers: tuple[torch.Tensor, ...]) -> None:
    """Launches one of `KERNELS` on its pointers up to the bounds of the samples, in the kernel's order."""
    query = pointers[0]
    of_keys = name == "backward_key_value"
    parts = cdiv(packing.max_seqlen_k, tile.keys) if of_keys else cdiv(packing.max_seqlen_q, tile.queries)
    tokens, heads, size = query.shape
    seed = packing.cu_seqlens_q if packing.seed is None else packing.seed  # not read without dropout
    strides = [tensor.stride(0) for tensor in (*pointers[:3], *pointers[len(pointers) - WRITTEN_GRADIENTS[name] :])]
    arguments = (*pointers, packing.cu_seqlens_q, packing.cu_seqlens_k, seed, tokens, heads, *strides)
    widen = INTERPRETED and query.dtype == torch.bfloat16
    precision = _precision(architecture(query.device))
    constants = _constants(tile, size, packing.threshold, packing.causal, widen, precision, of_keys)
    scale = size**-0.5 * LOG2_E.value
    grid = parts, heads, packing.samples
    launch(KERNELS[name], grid, *arguments, scale, **constants, num_warps=tile.warps, num_stages=tile.stages)
    if query.is_meta:
        count_flops(2 * USEFUL_PRODUCTS[name] * packing.scores(query, pointers[1]) * heads * size)


@functools.cache
def _constants(
    tile: Tile, head_size: int, threshold: int, causal: bool, widen: bool, precision: str, of_keys: bool
) -> dict[str, object]:
    """Compile-time arguments; made once, as a step launches these kernels a hundred times."""
    products = {"PRODUCT_ROWS": 16 * tile.warps} if of_keys else {}
    return {
        "D": head_size,
        "BLOCK_D": max(16, next_power_of_2(head_size)),
        "BLOCK_Q": tile.queries,
        "BLOCK_K": tile.keys,
        "THRESHOLD": threshold,
        "RESCALE": 1.0 / keep_rate(threshold),
        "WIDEN": widen,
        "PRECISION": precision,
        "CAUSAL": causal,
    } | products


def tile_of(name: str, query: torch.Tensor, packing: Packing) -> Tile:
    """Returns how one of `KERNELS` cuts its work on the device of `query`."""
    device = architecture(query.device)
    if query.dtype == torch.float32:
        return (FP32_TILES if query.shape[-1] <= 64 else WIDE_HEAD_FP32_TILES)[device]
    if query.shape[-1] > 64:
        return WIDE_HEAD_TILES[device]
    return (CAUSAL_TILES if packing.causal else TILES[device])[name]


def _precision(architecture: str) -> str:
    """Returns how products of fp32 values run: in three TF32 passes (relative error 2**-22), or on AMD as they are."""
    return "ieee" if architecture == "gfx942" else "tf32x3"


def compile_cases() -> list[CompileCase]:
    """Returns every configuration that ships, in bf16 and fp32: head sizes 64 and 128, with dropout, without, causal.

    Bytes count each element once: the tiles that a sample's other programs read again are in the second-level
    cache. Above the lower bound are only the log-sum-exp and the row sums.
    """
    kinds = [*itertools.product((64, 128), ((0.1, False), (0.0, False))), (64, (0.0, True))]
    choices = itertools.product((torch.bfloat16, torch.float32), kinds, PROCESSORS)
    found = [_compile_cases(dtype, size, *kind, target) for dtype, (size, kind), target in choices]
    return [case for cases in zip(*found) for case in cases]


def _compile_cases(dtype: torch.dtype, head_size: int, dropout: float, causal: bool, target: str) -> list[CompileCase]:
    samples, queries, keys, heads = CAUSAL_SHAPE if causal else COMPILE_SHAPE
    with torch.device("meta"):
        query, grad = torch.empty((2, samples * queries, heads, head_size), dtype=dtype)
        key, value = torch.empty((2, samples * keys, heads, head_size), dtype=dtype)
        bounds, seed = torch.empty(samples + 1, dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    packing = Packing(bounds, bounds, queries, keys, drop_threshold(dropout), seed if dropout else None, causal)
    with launches_on(target) as launches:
        _, *saved = forward(query, key, value, packing)
        backward(grad, query, key, value, packing, *saved)
    form = f"{TYPES[dtype]} d={head_size} {'causal' if causal else 'dropout' if dropout else 'no dropout'}"
    scores = samples * (queries * (queries + 1) // 2 if causal else queries * keys)
    # The backward kernels compute the scores, and the gradients of the weights, once more.
    return [
        compile_case(
            launch,
            target,
            "packed_attention",
            f"{name} {form}",
            moved=launch.nbytes(),
            least=launch.nbytes(without=("LOG_SUM", "ROW_SUM")),
            flops=2 * products * scores * heads * head_size,
        )
        for name, products, launch in zip(KERNELS, (2, 3, 4), launches)
    ]
