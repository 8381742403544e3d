"""Triton kernels of `residual_norm`, their launches, and the configurations that are shipped.

A program holds whole rows in registers, so that every tensor passes through memory once. The forward kernel takes one
tile of rows per program. The backward kernel has two programs per processor, which walk over the rows and keep their
sums of the weight's and the bias's gradient; PyTorch then adds the few partial sums. No atomics: every value has one
writer, and the same machine gives the same bits every time.

All arithmetic is fp32: operands are widened as they are loaded (Triton's interpreter computes wrongly in bf16).
"""

# ruff: noqa: ANN001, ANN201, ANN202 -- the arguments of kernels are pointers and integers, typed by each launch

import itertools

import torch
import triton
import triton.language as tl

from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.dropout_mask import START_0, START_1, drop_threshold, keep_rate, keep_tile, stream_key_tile
from xdscale.kernels.gpu import PROCESSORS, architecture, launch, launches_on, processors

TILE_ELEMENTS = 4096
"""Elements of a program's tile of whole rows."""

PROGRAMS_PER_PROCESSOR = 2
"""Programs of the backward kernel: all of them run at a time. Each writes partial sums of its own."""


@triton.jit
def _kept(SEED, row, column, THRESHOLD: tl.constexpr):
    """Which elements of a tile stay; its rows are of one stream, as 65,536 is a multiple of their number."""
    stream = tl.min(row, 0) >> 16
    key_0 = stream_key_tile(SEED, stream, stream * 0, START_0)
    key_1 = stream_key_tile(SEED, stream, stream * 0, START_1)
    return keep_tile(key_0, key_1, row[:, None], (column >> 2)[None, :], (column & 3)[None, :], THRESHOLD)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    STATES, RESIDUAL, WEIGHT, BIAS, SEED, OUT, TOTAL, MEAN, SCALE, tokens, eps,
    SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """Output, sum, mean and reciprocal deviation of one tile of rows."""
    row, column = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    mask = (row < tokens)[:, None] & (column < SIZE)[None, :]
    place = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    total = tl.load(STATES + place, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(RESIDUAL + place, mask=mask, other=0.0).to(tl.float32)
    if THRESHOLD:
        total = tl.where(_kept(SEED, row, column, THRESHOLD), total * RESCALE, 0.0)
    total += residual
    tl.store(TOTAL + place, total.to(TOTAL.dtype.element_ty), mask=mask)
    mean = tl.sum(total, 1) / SIZE
    centred = tl.where((column < SIZE)[None, :], total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / SIZE + eps)
    tl.store(MEAN + row, mean, mask=row < tokens)
    tl.store(SCALE + row, scale, mask=row < tokens)
    weight = tl.load(WEIGHT + column, mask=column < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + column, mask=column < SIZE, other=0.0).to(tl.float32)
    out = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    GRAD, TOTAL, MEAN, SCALE, WEIGHT, SEED, GRAD_STATES, GRAD_RESIDUAL, PARTIAL_WEIGHT, PARTIAL_BIAS, tokens,
    SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of every n-th tile of rows, and their sums for weight and bias: [programs, SIZE] each.

    Without dropout only GRAD_RESIDUAL is written: it is the gradient of the states too.
    """
    column = tl.arange(0, TILE_COLUMNS)
    weight = tl.load(WEIGHT + column, mask=column < SIZE, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([TILE_COLUMNS], tl.float32)
    sum_bias = tl.zeros([TILE_COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * TILE_ROWS, tokens, tl.num_programs(0) * TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        mask = (row < tokens)[:, None] & (column < SIZE)[None, :]
        place = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        grad = tl.load(GRAD + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(TOTAL + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + row, mask=row < tokens, other=0.0)
        scale = tl.load(SCALE + row, mask=row < tokens, other=0.0)
        normed = tl.where(mask, (total - mean[:, None]) * scale[:, None], 0.0)
        sum_weight += tl.sum(grad * normed, 0)
        sum_bias += tl.sum(grad, 0)
        grad *= weight[None, :]
        along = tl.sum(grad * normed, 1) / SIZE
        grad = (grad - (tl.sum(grad, 1) / SIZE)[:, None] - normed * along[:, None]) * scale[:, None]
        tl.store(GRAD_RESIDUAL + place, grad.to(GRAD_RESIDUAL.dtype.element_ty), mask=mask)
        if THRESHOLD:
            grad = tl.where(_kept(SEED, row, column, THRESHOLD), grad * RESCALE, 0.0)
            tl.store(GRAD_STATES + place, grad.to(GRAD_STATES.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * SIZE + column
    tl.store(PARTIAL_WEIGHT + at, sum_weight, mask=column < SIZE)
    tl.store(PARTIAL_BIAS + at, sum_bias, mask=column < SIZE)


def forward(
    states: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    threshold: int,
) -> tuple[torch.Tensor, ...]:
    """Returns the output; then, to save, the sum in the dtype of the states, mean and reciprocal deviation.

    Arguments as in `residual_norm`; `threshold` is `drop_threshold(dropout)`.
    """
    states, residual, weight, bias = (x.contiguous() for x in (states, residual, weight, bias))
    tokens, size = states.shape
    out, total = torch.empty_like(states), torch.empty_like(states)
    mean, scale = (states.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    constants = _constants(size, threshold)
    launch(
        forward_kernel, (triton.cdiv(tokens, constants["TILE_ROWS"]),),
        states, residual, weight, bias, mean if seed is None else seed, out, total, mean, scale, tokens, eps,
        **constants, num_warps=_warps(states.device), num_stages=1,
    )  # fmt: skip
    return out, total, mean, scale


def backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    threshold: int,
    residual_dtype: torch.dtype,
    total: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of states, residual, weight and bias; the last three arguments are from `forward`."""
    grad, weight = grad.contiguous(), weight.contiguous()
    tokens, size = grad.shape
    grad_residual = torch.empty_like(grad, dtype=residual_dtype)
    grad_states = torch.empty_like(grad) if threshold else grad_residual
    constants = _constants(size, threshold)
    programs = min(triton.cdiv(tokens, constants["TILE_ROWS"]), processors(grad.device) * PROGRAMS_PER_PROCESSOR)
    partial_weight, partial_bias = (grad.new_empty((programs, size), dtype=torch.float32) for _ in range(2))
    launch(
        backward_kernel, (programs,), grad, total, mean, scale, weight, mean if seed is None else seed,
        grad_states, grad_residual, partial_weight, partial_bias, tokens,
        **constants, num_warps=_warps(grad.device), num_stages=1,
    )  # fmt: skip
    grad_weight, grad_bias = (part.sum(0) for part in (partial_weight, partial_bias))
    return grad_states.to(grad.dtype), grad_residual, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _constants(size: int, threshold: int) -> dict[str, object]:
    """Compile-time arguments of both kernels."""
    columns = max(16, triton.next_power_of_2(size))
    return {
        "SIZE": size,
        "TILE_ROWS": TILE_ELEMENTS // columns,
        "TILE_COLUMNS": columns,
        "THRESHOLD": threshold,
        "RESCALE": 1.0 / keep_rate(threshold),
    }


def _warps(device: torch.device) -> int:
    """Returns the warps of a program: 256 threads either way, which hold 16 elements of each tensor."""
    return 4 if architecture(device) == "gfx942" else 8


TRUE_TOKENS = 32 * 512
"""Rows of `compile_cases`: 32 texts of 512 tokens."""

TRUE_SIZES = (512, 768, 1024)
"""CLIP's text tower, BERT-base, BERT-large."""

OPERANDS = ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2)
"""dtype of states and residual, and of weight and bias: bf16, autocast to bf16, fp32."""


def compile_cases() -> list[CompileCase]:
    """Returns every configuration that ships, for the models' sizes, with and without dropout."""
    choices = itertools.product(TRUE_SIZES, OPERANDS, (0.0, 0.1), PROCESSORS)
    return [case for choice in choices for case in _compile_cases(*choice)]


def _compile_cases(size: int, operands: tuple[torch.dtype, ...], dropout: float, target: str) -> list[CompileCase]:
    """Both kernels. Above the least bytes are only the partial sums, which are written and read again."""
    threshold = drop_threshold(dropout)
    with torch.device("meta"):
        states, residual, grad = torch.empty((3, TRUE_TOKENS, size), dtype=operands[0])
        weight, bias = torch.empty((2, size), dtype=operands[1])
        seed = torch.empty(1, dtype=torch.int64) if dropout else None
    with launches_on(target) as launches:
        _, *saved = forward(states, residual, weight, bias, seed, 1e-12, threshold)
        backward(grad, weight, bias, seed, threshold, residual.dtype, *saved)
    once = launches[1].nbytes(without=("PARTIAL_WEIGHT", "PARTIAL_BIAS"))
    partial, sums = launches[1].nbytes() - once, weight.nbytes + bias.nbytes
    least = {"forward": launches[0].nbytes(), "backward": once + sums}
    moved = {"forward": least["forward"], "backward": least["backward"] + 2 * partial}
    form = f"{' x '.join(TYPES[dtype] for dtype in operands)} size={size} {'dropout' if dropout else 'no dropout'}"
    return [
        compile_case(found, target, "residual_norm", f"{name} {form}", moved=moved[name], least=least[name])
        for name, found in zip(least, launches)
    ]
