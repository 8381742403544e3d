"""LayerNorm(residual + dropout(states)) in one pass over memory, forward and backward: the end of every sublayer.

In separate operations each of the three reads and writes whole tensors and dropout keeps a mask; here the mask is a
function of (seed, row, column) that the backward pass computes again (`dropout_mask`), and besides the sum only two
numbers per row are kept. The plain definition comes first and is the reference. On a GPU the work is that of the
Triton kernels in `residual_norm_triton`, on a CPU of PyTorch operations; all of them drop the same states.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.dropout_mask import check_dropout, drop_threshold, keep_mask, keep_rate
from xdscale.kernels.dropout_mask_cpu import Masks
from xdscale.kernels.gpu import TRITON_DTYPES, runs_triton, without_autocast

LARGEST_TRITON_SIZE = 4096
"""A row stays in the registers of one program."""

BLOCK_STATES = 1 << 17
"""Most states at a time on a CPU, unless a row has more: they stay in a core's cache. A block is 128 rows of 768."""

STREAM_ROWS = 1 << 16
"""Rows of one random stream: its counters have 16 bits for them. Row r is row r % 65,536 of the stream of the "sample"
r // 65,536."""


def plain_residual_norm(
    states: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `residual_norm`, differentiable by PyTorch itself; in fp32, or fp64 for fp64 states."""
    wide = torch.promote_types(states.dtype, torch.float32)
    threshold, kept = drop_threshold(dropout), states.to(wide)
    if threshold:
        kept = kept * rows_kept(seed, *states.shape, threshold) / keep_rate(threshold)
    total = residual.to(wide) + kept  # [tokens, size]
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed * weight.to(wide) + bias.to(wide)).to(states.dtype)


def rows_kept(seed: torch.Tensor, tokens: int, size: int, threshold: int) -> torch.Tensor:
    """Returns which states stay, bool [tokens, size]; `seed` as in `residual_norm`."""
    parts = range(-(-tokens // STREAM_ROWS))
    rows = [min(STREAM_ROWS, tokens - part * STREAM_ROWS) for part in parts]
    masks = [keep_mask(seed, part, 1, rows[part], size, threshold)[0] for part in parts]
    return masks[0] if len(masks) == 1 else torch.cat([seed.new_empty((0, size), dtype=torch.bool), *masks])


@torch.compiler.disable(reason="residual_norm runs as it is, between compiled graphs")
def residual_norm(
    states: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns LayerNorm(residual + dropout(states)), over the last dimension.

    Sums, mean and variance are fp32 whatever the dtype of the inputs (fp64 stays fp64), and so it is the same under
    `torch.autocast`, where PyTorch's LayerNorm would return fp32: here the result has the dtype of `states`, which is
    what the next products take, and the residual may still be fp32. With `torch.compile` the call is a graph break. On
    a GPU nothing waits for the device and every shape follows from the inputs' shapes, so it can be captured in a CUDA
    graph. Deterministic.

    Args:
        states: [tokens, size], fp16, bf16, fp32 or fp64; no tokens are allowed.
        residual: [tokens, size], in the dtype of `states` or fp32, which also holds for weight and bias.
        weight: [size].
        bias: [size], in the dtype of `weight`.
        eps: is added to the variance.
        dropout: rate on `states`, rounded to 1 / 256; kept states are divided by the share that is really kept. The
            caller passes 0 outside of training.
        seed: int64 [1] on the device of `states`, drawn anew by the caller for every call, so that checkpointed
            activations are recomputed with the same mask. Needed where `dropout` is not 0.

    Returns:
        [tokens, size] in the dtype of `states`.

    Raises:
        TypeError: a dtype does not fit; the message names the argument.
        ValueError: a shape, device or range does not fit; the message names the argument.
    """
    check_norm(states, residual, weight, bias, eps)
    check_dropout(dropout, seed, states.device)
    with without_autocast(states.device):
        if states.dtype in TRITON_DTYPES and (states.device.type == "cpu" or norm_runs_triton(states)):
            return _ResidualNorm.apply(states, residual, weight, bias, seed, eps, drop_threshold(dropout))
        return plain_residual_norm(states, residual, weight, bias, eps=eps, dropout=dropout, seed=seed)


def norm_runs_triton(states: torch.Tensor) -> bool:
    """The choice between Triton and PyTorch operations, for rows of such states."""
    return runs_triton(states.device, states.dtype) and states.shape[1] <= LARGEST_TRITON_SIZE


class _ResidualNorm(torch.autograd.Function):
    """Keeps the sum, mean and reciprocal deviation of each row; draws the mask again in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        states: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        seed: torch.Tensor | None,
        eps: float,
        threshold: int,
    ) -> torch.Tensor:
        if norm_runs_triton(states):
            from xdscale.kernels.residual_norm_triton import forward  # CPU runs never load the kernels
        else:
            forward = _forward
        out, *saved = forward(states, residual, weight, bias, seed, eps, threshold)
        # The parameters themselves are saved, never a cast: ZeRO-3 empties a parameter after this forward and fills
        # the same parameter again before the backward. A saved seed that is overwritten before then is noticed.
        ctx.save_for_backward(weight, bias, seed, *saved)
        ctx.threshold, ctx.residual_dtype = threshold, residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, bias, seed, *saved = ctx.saved_tensors
        if norm_runs_triton(grad):
            from xdscale.kernels.residual_norm_triton import backward
        else:
            backward = _backward
        with without_autocast(grad.device):
            gradients = backward(grad, weight, bias, seed, ctx.threshold, ctx.residual_dtype, *saved)
        needed = zip(gradients, ctx.needs_input_grad)
        return *(gradient if needs else None for gradient, needs in needed), None, None, None


def _forward(
    states: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    eps: float,
    threshold: int,
) -> tuple[torch.Tensor, ...]:
    """Returns the output, and what is kept: the sum in the dtype of the states, mean and reciprocal deviation."""
    residual = residual.to(states.dtype)
    if threshold:
        total = torch.empty_like(states)
        for rows, kept in _blocks(seed, states.shape, threshold, states.dtype):
            # A product with 0 and 1 is PyTorch's fastest way to drop: 1.2 times as fast as `where`.
            torch.addcmul(residual[rows], states[rows], kept, value=1.0 / keep_rate(threshold), out=total[rows])
    else:
        total = states + residual
    # With an fp32 weight, mean and deviation come in fp32 for 16-bit states too.
    out, mean, scale = torch.native_layer_norm(total, weight.shape, weight.float(), bias.float(), eps)
    return out, total, mean, scale


def _backward(
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
    """Returns the gradients of states, residual, weight and bias."""
    wide_weight, wide_bias = weight.float(), bias.float()
    rescale = 1.0 / keep_rate(threshold)

    def of_rows(rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # In fp32: PyTorch's kernel would add up the weight's gradient in bf16, 2 % off after 512 rows, 5 % after 2,048.
        operands = grad[rows].float(), total[rows].float(), weight.shape, mean[rows], scale[rows]
        return torch.ops.aten.native_layer_norm_backward(*operands, wide_weight, wide_bias, [True] * 3)

    if grad.dtype == residual_dtype == torch.float32:  # nothing is converted, and so nothing copied
        grad_residual, grad_weight, grad_bias = of_rows(slice(None))
        grad_states = torch.empty_like(grad_residual) if threshold else grad_residual
        for rows, kept in _blocks(seed, grad.shape, threshold, torch.float32) if threshold else ():
            torch.mul(grad_residual[rows], kept.mul_(rescale), out=grad_states[rows])
    else:
        grad_weight, grad_bias = torch.zeros_like(wide_weight), torch.zeros_like(wide_bias)
        grad_residual = torch.empty_like(grad, dtype=residual_dtype)
        grad_states = torch.empty_like(grad) if threshold else grad_residual
        for rows, kept in _blocks(seed, grad.shape, threshold, torch.float32):
            grad_total, part_weight, part_bias = of_rows(rows)
            grad_weight += part_weight
            grad_bias += part_bias
            grad_residual[rows] = grad_total
            if threshold:
                grad_states[rows] = grad_total.mul_(kept).mul_(rescale)
    return grad_states.to(grad.dtype), grad_residual, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _blocks(
    seed: torch.Tensor | None, shape: torch.Size, threshold: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yields blocks of rows and which of their elements stay, as 0 and 1; None where all do."""
    tokens, size = shape
    masks = Masks(seed, -(-tokens // STREAM_ROWS), 1, threshold) if threshold else None
    # A power of two, which divides the rows of a stream.
    block_rows = min(STREAM_ROWS, 1 << max(0, (BLOCK_STATES // size).bit_length() - 1))
    for first in range(0, tokens, block_rows):
        count = min(block_rows, tokens - first)
        kept = None
        if masks is not None:
            stream, row = divmod(first, STREAM_ROWS)
            # Not by way of bool, from which PyTorch is slow to convert.
            mask = masks.keep(stream, slice(None), row, count, size)[0].view(np.uint8)
            kept = torch.from_numpy(mask)[:, :size].to(dtype)
        yield slice(first, first + count), kept


def check_norm(
    states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    """Refuses tensors that do not fit together."""
    if not states.is_floating_point():
        raise TypeError(f"states must be fp16, bf16, fp32 or fp64, not {states.dtype}")
    if states.ndim != 2 or states.shape[1] == 0:
        raise ValueError(f"states must have the shape [tokens, size] with size > 0, not {list(states.shape)}")
    wide = torch.promote_types(states.dtype, torch.float32)
    shapes = (("residual", residual, states.shape), ("weight", weight, states.shape[1:]), ("bias", bias, weight.shape))
    for name, tensor, shape in shapes:
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != states.device:
            raise ValueError(f"{name} must be on {states.device} like states, not on {tensor.device}")
        if tensor.dtype not in (states.dtype, wide):
            raise TypeError(f"{name} must be {states.dtype} like states or {wide}, not {tensor.dtype}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must be {weight.dtype} like weight, not {bias.dtype}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, not {eps}")
