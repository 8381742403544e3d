"""Causal self-attention of many short blocks of equal length: CLIP's text tower, 77 tokens each, without dropout.

Queries, keys and values come as one projection gives them, and their gradients go back into one tensor: in three, they
would be copied together, which took as long as attending. On a GPU the kernels of `packed_attention` do the work.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.attention import LARGEST_TRITON_HEAD
from xdscale.kernels.gpu import autocast_dtype, runs_triton, without_autocast
from xdscale.kernels.packing import Packing


@torch.compiler.disable(reason="causal_attention runs as it is, between compiled graphs")
def causal_attention(projected: torch.Tensor) -> torch.Tensor:
    """Returns softmax(Q Kᵀ / √d) V, where no token reads a later one of its block.

    Under autocast the states are cast as for PyTorch's own attention. With `torch.compile` the call is a graph break.

    On the CPU it is PyTorch's own attention where that is fast. Below fp32 it takes a slow path: 30 ms against 8 ms by
    the definition for 16 blocks of 77 tokens with 8 heads of 64, forward and backward; such scores stay in cache.

    Args:
        projected: [blocks, length, 3, heads, d], each token's query, key and value side by side.

    Returns:
        [blocks, length, heads, d].

    Raises:
        ValueError: the shape does not fit.
    """
    if projected.ndim != 5 or projected.shape[2] != 3:
        raise ValueError(f"projected must have the shape [blocks, length, 3, heads, d], not {list(projected.shape)}")
    narrow = autocast_dtype(projected.device)
    if narrow and projected.dtype != torch.float64:
        projected = projected.to(narrow)
    if not projected.numel():  # nor can it be cut into blocks without a token
        return projected[:, :, 2].clone()
    with without_autocast(projected.device):
        if runs_triton(projected.device, projected.dtype) and projected.shape[-1] <= LARGEST_TRITON_HEAD:
            return _CausalAttention.apply(projected)
        if projected.device.type == "cpu" and projected.dtype in (torch.bfloat16, torch.float16):
            return plain_causal_attention(projected)
        return F.scaled_dot_product_attention(*_by_head(projected), is_causal=True).transpose(1, 2)


def plain_causal_attention(projected: torch.Tensor) -> torch.Tensor:
    """The definition of `causal_attention`."""
    length, _, heads, head_size = projected.shape[1:]
    hidden = torch.full((length, length), -torch.inf, dtype=projected.dtype, device=projected.device).triu(1)
    rows, columns, values = (states.flatten(0, 1) for states in _by_head(projected))  # [blocks * heads, length, d]
    scores = torch.baddbmm(hidden, rows, columns.transpose(1, 2), alpha=head_size**-0.5)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (len(projected), heads)).transpose(1, 2)


def _by_head(projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns queries, keys and values, each [blocks, heads, length, d]."""
    return projected.permute(2, 0, 3, 1, 4).unbind()


class _CausalAttention(torch.autograd.Function):
    """Keeps the projection, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: FunctionCtx, projected: torch.Tensor) -> torch.Tensor:
        from xdscale.kernels import attention_launch  # kernels are decorated only where they can run

        blocks, length, *_ = projected.shape
        bounds = torch.arange(0, (blocks + 1) * length, length, dtype=torch.int32, device=projected.device)
        ctx.packing = Packing(bounds, bounds, length, length, threshold=0, seed=None, causal=True)
        projected = projected.contiguous()
        out, *saved = attention_launch.forward(*projected.flatten(0, 1).unbind(1), ctx.packing)
        ctx.save_for_backward(projected, *saved)
        return out.unflatten(0, (blocks, length))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        from xdscale.kernels import attention_launch

        projected, *saved = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        inputs, into = (tensor.flatten(0, 1).unbind(1) for tensor in (projected, gradient))
        with without_autocast(grad.device):
            attention_launch.backward(grad.flatten(0, 1), *inputs, ctx.packing, *saved, into=into)
        return gradient
