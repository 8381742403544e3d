"""Triton kernels of `masked_token_loss` and their launches; `masked_token_loss_cases` lists what is shipped.

Three kernels. `row_statistics_kernel` multiplies a block of rows by one split of the vocabulary, tile by tile,
and keeps a running maximum and sum; splits fill the GPU when there are few rows. `combine_kernel` joins the
splits. `logit_gradients_kernel` writes one tile of gradients of logits into a scratch that stays in the L2 cache
and that two plain matrix products (cuBLAS, hipBLASLt) then read. Programs that share rows of the weight start
next to each other, so each row comes from memory once. No atomics: every value has one writer.

Products take `product_dtype` operands and sum in fp32. Triton's interpreter computes wrongly in bf16: there,
operands in bf16 become fp32 on loading (INTERPRETED).
"""

# ruff: noqa: ANN001, ANN201 -- the arguments of kernels are pointers and integers, typed by each launch

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from xdscale.kernels.gpu import architecture, cdiv, count_flops, launch, next_power_of_2, processors
from xdscale.kernels.masked_token_loss import ChunkGradients, RowStatistics

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when the kernels were decorated."""

SCRATCH_BYTES = 24 << 20
"""Wanted size of the [n, chunk] scratch: half the L2 cache of an H100."""

CHUNK_COLUMNS = (1024, 8192)
"""Fewest and most columns of a chunk: below, the matrix products do not fill a GPU."""

MAX_SPLITS = 256
"""Most parts of the vocabulary in the forward pass; the combining kernel holds them all."""

COMBINED_ROWS = 16
"""Rows per program of the combining kernel."""


STRIDE_COLUMNS = 16
"""Rows of the [n, chunk] scratch begin at multiples of this, so that the compiler stores 16 bytes at a time."""


class LogitsTile(NamedTuple):
    """Shape of the work of one program, the resources it gets, and how many forward ones a processor then holds."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    resident: int


FAMILIES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "hip"}
"""Which tiles an architecture takes."""

TILES = {
    # (family, bytes per operand of the products, bytes per element of the weight): (up to 64 rows, more rows).
    # Compiled for every target: no register spills, shared memory within 99 KiB (consumer cards) or 64 KiB (gfx942).
    # The last number is what registers allow, docs/kernels.md's occupancy. Hopper's for two 16-bit operands were the
    # fastest on an H200 (`python -m xdscale.bench.gpu tiles`) of those without spills.
    ("ampere", 2, 2): (LogitsTile(64, 128, 64, 4, 3, 2), LogitsTile(128, 128, 64, 8, 3, 1)),
    ("ampere", 2, 4): (LogitsTile(64, 128, 32, 4, 3, 2), LogitsTile(128, 128, 32, 8, 3, 1)),
    ("ampere", 4, 4): (LogitsTile(64, 64, 32, 4, 2, 2), LogitsTile(64, 64, 32, 4, 2, 2)),
    ("hopper", 2, 2): (LogitsTile(64, 128, 64, 4, 3, 2), LogitsTile(64, 128, 64, 4, 3, 2)),
    ("hopper", 2, 4): (LogitsTile(64, 128, 32, 4, 3, 2), LogitsTile(128, 128, 32, 8, 3, 1)),
    ("hopper", 4, 4): (LogitsTile(64, 64, 32, 4, 2, 3), LogitsTile(64, 64, 32, 4, 2, 3)),
    ("blackwell", 2, 2): (LogitsTile(64, 128, 64, 8, 3, 1), LogitsTile(128, 64, 64, 8, 3, 1)),
    ("blackwell", 2, 4): (LogitsTile(64, 64, 32, 8, 3, 2), LogitsTile(128, 64, 32, 8, 3, 1)),
    ("blackwell", 4, 4): (LogitsTile(64, 64, 32, 4, 2, 2), LogitsTile(64, 64, 32, 4, 2, 2)),
    ("hip", 2, 2): (LogitsTile(64, 128, 64, 4, 2, 2), LogitsTile(128, 128, 64, 8, 2, 1)),
    ("hip", 2, 4): (LogitsTile(64, 128, 32, 4, 2, 3), LogitsTile(128, 128, 32, 8, 2, 2)),
    ("hip", 4, 4): (LogitsTile(64, 64, 32, 4, 2, 4), LogitsTile(64, 64, 32, 4, 2, 4)),
}


@triton.jit
def logits_of_tile(
    hidden, weight, bias, row, column, rows, columns, size, hidden_stride, weight_stride,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a tile times log2(e), [TILE_ROWS, TILE_COLUMNS] in fp32; reads nothing past rows, columns, size."""
    step = tl.arange(0, DEPTH)
    hidden_at = hidden + row[:, None].to(tl.int64) * hidden_stride + step[None, :]
    weight_at = weight + column[None, :].to(tl.int64) * weight_stride + step[:, None]
    logits = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for start in range(0, size, DEPTH):
        row_mask, column_mask = row[:, None] < rows, column[None, :] < columns
        if not EVEN:
            row_mask = row_mask & (start + step[None, :] < size)
            column_mask = column_mask & (start + step[:, None] < size)
        left = tl.load(hidden_at + start, mask=row_mask, other=0.0).to(DTYPE)
        right = tl.load(weight_at + start, mask=column_mask, other=0.0).to(DTYPE)
        logits = tl.dot(left, right, logits, input_precision=PRECISION)
    offset = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    return (logits + offset[None, :]) * 1.4426950408889634


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["total", "label_logit"])
def row_statistics_kernel(
    hidden, weight, bias, labels, maximum, total, label_logit, best,
    rows, columns, size, split_columns, hidden_stride, weight_stride,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exponentials, label's logit and first best id of some rows over one split: [splits, rows]."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    begin = tl.program_id(1) * split_columns
    end = tl.minimum(begin + split_columns, columns)
    label = tl.load(labels + row, mask=row < rows, other=-1)
    # The lowest finite number: a tile of bias -inf (a padded vocabulary) makes no NaN of -inf - -inf.
    row_maximum = tl.full((TILE_ROWS,), -3.4028234663852886e38, dtype=tl.float32)
    row_total = tl.zeros((TILE_ROWS,), dtype=tl.float32)
    row_label_logit = tl.zeros((TILE_ROWS,), dtype=tl.float32)
    row_best = tl.full((TILE_ROWS,), 0, dtype=tl.int32)
    for start in range(begin, end, TILE_COLUMNS):
        column = start + tl.arange(0, TILE_COLUMNS)
        logits = logits_of_tile(
            hidden, weight, bias, row, column, rows, end, size, hidden_stride, weight_stride,
            TILE_ROWS, TILE_COLUMNS, DEPTH, EVEN, DTYPE, PRECISION,
        )  # fmt: skip
        logits = tl.where(column[None, :] < end, logits, float("-inf"))
        highest = tl.max(logits, 1)
        first = tl.min(tl.where(logits == highest[:, None], column[None, :], 2147483647), 1)
        row_best = tl.where(highest > row_maximum, first, row_best)
        row_label_logit += tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), 1)
        renewed = tl.maximum(row_maximum, highest)
        row_total = row_total * tl.exp2(row_maximum - renewed) + tl.sum(tl.exp2(logits - renewed[:, None]), 1)
        row_maximum = renewed
    place = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(maximum + place, row_maximum, mask=row < rows)
    tl.store(total + place, row_total, mask=row < rows)
    tl.store(label_logit + place, row_label_logit, mask=row < rows)
    tl.store(best + place, row_best, mask=row < rows)


@triton.jit(
    do_not_specialize=["rows", "splits"],
    do_not_specialize_on_alignment=["split_total", "split_label_logit", "total", "label_logit"],
)
def combine_kernel(
    split_maximum, split_total, split_label_logit, split_best, labels, maximum, total, label_logit, correct,
    rows, splits, TILE_ROWS: tl.constexpr, TILE_SPLITS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of some rows."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    split = tl.arange(0, TILE_SPLITS)
    mask = (split[:, None] < splits) & (row[None, :] < rows)
    place = split[:, None].to(tl.int64) * rows + row[None, :]
    maxima = tl.load(split_maximum + place, mask=mask, other=-3.4028234663852886e38)
    highest = tl.max(maxima, 0)
    sums = tl.load(split_total + place, mask=mask, other=0.0) * tl.exp2(maxima - highest[None, :])
    bests = tl.load(split_best + place, mask=mask, other=2147483647)
    best = tl.min(tl.where(maxima == highest[None, :], bests, 2147483647), 0)
    label = tl.load(labels + row, mask=row < rows, other=-1)
    tl.store(maximum + row, highest, mask=row < rows)
    tl.store(total + row, tl.sum(sums, 0), mask=row < rows)
    label_logits = tl.load(split_label_logit + place, mask=mask, other=0.0)
    tl.store(label_logit + row, tl.sum(label_logits, 0), mask=row < rows)
    tl.store(correct + row, (best == label).to(tl.int8), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "columns", "end"], do_not_specialize_on_alignment=["total"])
def logit_gradients_kernel(
    hidden, weight, bias, labels, maximum, total, grad_losses, gradients, column_sums,
    rows, columns, size, begin, end, hidden_stride, weight_stride, gradients_stride,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of grad_losses * (softmax - one-hot) and its column sums.

    gradients is [rows, gradients_stride], of which begin..end are the first columns and the others get zeros;
    column_sums is [blocks of rows, columns], for the bias.
    """
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = begin + tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    logits = logits_of_tile(
        hidden, weight, bias, row, column, rows, end, size, hidden_stride, weight_stride,
        TILE_ROWS, TILE_COLUMNS, DEPTH, EVEN, DTYPE, PRECISION,
    )  # fmt: skip
    label = tl.load(labels + row, mask=row < rows, other=-1)
    shift = tl.load(maximum + row, mask=row < rows, other=0.0)
    scale = tl.load(grad_losses + row, mask=row < rows, other=0.0)
    row_scale = scale / tl.load(total + row, mask=row < rows, other=1.0)
    values = tl.exp2(logits - shift[:, None]) * row_scale[:, None]
    values -= tl.where(column[None, :] == label[:, None], scale[:, None], 0.0)
    values = tl.where((row[:, None] < rows) & (column[None, :] < end), values, 0.0)
    # Of end nothing is known; of the stride, that 16 divides it: whole 16 bytes lie within it or outside.
    place = row[:, None].to(tl.int64) * gradients_stride + (column[None, :] - begin)
    mask = (row[:, None] < rows) & (column[None, :] - begin < gradients_stride)
    tl.store(gradients + place, values.to(gradients.dtype.element_ty), mask=mask)
    sums_at = column_sums + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(sums_at, tl.sum(values, 0), mask=column < end)


class _Operands:
    """Arguments that both matrix kernels share."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> None:
        self.product_dtype = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
        self.hidden = _rows_contiguous(hidden.to(self.product_dtype))
        self.weight, self.bias = _rows_contiguous(weight), bias.contiguous()
        self.rows, self.columns, self.size = hidden.shape[0], *weight.shape
        family = FAMILIES[architecture(hidden.device)]
        few, many = TILES[family, dtype.itemsize, weight.dtype.itemsize]
        self.tile = few if self.rows <= few.rows else many
        self.row_blocks = cdiv(self.rows, self.tile.rows)
        self.options = {
            "TILE_ROWS": self.tile.rows,
            "TILE_COLUMNS": self.tile.columns,
            "DEPTH": self.tile.depth,
            "EVEN": self.size % self.tile.depth == 0,
            "DTYPE": getattr(tl, str(self.product_dtype).removeprefix("torch.")),
            "PRECISION": _precision(dtype, family),
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
        }


def _rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself wherever its rows are contiguous, as parameters' are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _precision(dtype: torch.dtype, family: str) -> str:
    """How fp32 is multiplied: as PyTorch is told to on tensor cores, else three TF32 products, nearly fp32."""
    if dtype != torch.float32 or family == "hip" or INTERPRETED:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@functools.cache
def split_columns(row_blocks: int, columns: int, tile_columns: int, resident: int) -> int:
    """Columns per split of the vocabulary: whole tiles, so that the last program ends (nearly) soonest.

    Args:
        row_blocks: programs per split.
        columns: of the vocabulary.
        tile_columns: columns of a tile.
        resident: programs that the GPU holds at a time.
    """
    tiles = cdiv(columns, tile_columns)
    # When the last program ends, in times of a tile. Each split costs memory traffic too: the fewest of the good ones.
    ends = [
        cdiv(row_blocks * splits, resident) * cdiv(tiles, splits) for splits in range(1, min(tiles, MAX_SPLITS) + 1)
    ]
    splits = next(number for number, end in enumerate(ends, 1) if end <= 1.05 * min(ends))
    return cdiv(tiles, splits) * tile_columns


def chunk_columns(rows: int, itemsize: int) -> int:
    """Columns of one chunk of the backward pass."""
    fitting = SCRATCH_BYTES // (rows * itemsize) // 128 * 128
    return min(max(fitting, CHUNK_COLUMNS[0]), CHUNK_COLUMNS[1])


def row_statistics(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> RowStatistics:
    """The pass over the vocabulary, as `masked_token_loss._row_statistics`, for n > 0."""
    work = _Operands(hidden, weight, bias, dtype)
    labels = labels.contiguous()
    n, columns = work.rows, work.columns
    resident = processors(hidden.device) * work.tile.resident
    per_split = split_columns(work.row_blocks, columns, work.tile.columns, resident)
    splits = cdiv(columns, per_split)
    parts = hidden.new_empty((3, splits, n), dtype=torch.float32)
    best = labels.new_empty((splits, n), dtype=torch.int32)
    launch(
        row_statistics_kernel, (work.row_blocks, splits),
        work.hidden, work.weight, work.bias, labels, *parts, best,
        n, columns, work.size, per_split, work.hidden.stride(0), work.weight.stride(0), **work.options,
    )  # fmt: skip
    if hidden.is_meta:  # the backward pass computes the logits again, which is no useful work
        count_flops(2 * n * columns * work.size)
    return combine(parts, best, labels)


def combine(parts: torch.Tensor, best: torch.Tensor, labels: torch.Tensor) -> RowStatistics:
    """Joins what `row_statistics_kernel` found of each split: parts [3, splits, n] and best [splits, n]."""
    _, splits, n = parts.shape
    joined = parts.new_empty((3, n))
    correct = labels.new_empty(n, dtype=torch.int8)
    launch(
        combine_kernel, (cdiv(n, COMBINED_ROWS),), *parts, best, labels, *joined, correct, n, splits,
        TILE_ROWS=COMBINED_ROWS, TILE_SPLITS=next_power_of_2(splits), num_warps=4, num_stages=1,
    )  # fmt: skip
    return RowStatistics(*joined, correct.view(torch.bool))


def logit_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    grad_losses: torch.Tensor,
    grad_bias: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[ChunkGradients]:
    """Yields gradients of logits, as `masked_token_loss._logit_gradients`, for n > 0."""
    work = _Operands(hidden, weight, bias, dtype)
    labels, grad_losses, n = labels.contiguous(), grad_losses.contiguous(), work.rows
    width = min(chunk_columns(n, work.product_dtype.itemsize), work.columns)
    stride = cdiv(width, STRIDE_COLUMNS) * STRIDE_COLUMNS
    scratch = hidden.new_empty((n, stride), dtype=work.product_dtype)
    sums = hidden.new_empty((work.row_blocks, work.columns), dtype=torch.float32)
    for begin in range(0, work.columns, width):
        end = min(begin + width, work.columns)
        launch(
            logit_gradients_kernel, (work.row_blocks, cdiv(end - begin, work.tile.columns)),
            work.hidden, work.weight, work.bias, labels, maximum, total, grad_losses, scratch, sums,
            n, work.columns, work.size, begin, end,
            work.hidden.stride(0), work.weight.stride(0), stride, **work.options,
        )  # fmt: skip
        narrow = weight[begin:end].to(work.product_dtype)
        yield ChunkGradients(slice(begin, end), narrow, scratch[:, : end - begin])
    grad_bias.copy_(sums.sum(0))
