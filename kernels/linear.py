"""Linear, with the gradient of its bias summed at the speed of memory on GPUs.

The matrix products are the library's, forward and backward, and so is everything on a CPU and in fp64. PyTorch's own
sum over the rows of a gradient is far from a GPU's memory speed; that of a large one is a Triton kernel here.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.gpu import runs_triton, without_autocast

FEWEST_ELEMENTS = 1 << 25
"""Of a gradient whose sum is a kernel of ours: below, the host takes longer to ask for it than a GPU saves by it."""


def plain_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition of `linear`: PyTorch's own."""
    return F.linear(states, weight, bias)


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns states weightᵀ + bias.

    Under `torch.autocast` the products run in autocast's dtype while gradients keep their tensor's own dtype. With an
    output of `FEWEST_ELEMENTS` or more on a GPU the bias's gradient is the same bits every time, and the call is a
    graph break with `torch.compile`.

    Args:
        states: [..., width].
        weight: [size, width].
        bias: [size], or None for none.

    Returns:
        [..., size] in the dtype of the products.

    Raises:
        RuntimeError: a shape does not fit.
    """
    rows = states.numel() // max(1, states.shape[-1])
    if runs_triton(states.device, states.dtype) and rows * len(weight) >= FEWEST_ELEMENTS:
        return _apply(states, weight, bias)
    return F.linear(states, weight, bias)


def bias_gradient(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the sum over the rows of a Linear's gradient, [n, size] to [size], in the dtype of the bias."""
    if runs_triton(rows.device, rows.dtype) and rows.numel() >= FEWEST_ELEMENTS:
        from xdscale.kernels.linear_triton import column_sums  # CPU runs never load the kernels

        return column_sums(rows, dtype)
    return rows.sum(0, dtype=dtype)


class _Linear(torch.autograd.Function):
    """Keeps states and weight, each where a gradient needs it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # The parameter itself is saved, never a view or a cast: ZeRO-3 empties it after this forward and fills the
        # same parameter again before the backward.
        for_states, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(states if for_weight else None, weight if for_states else None)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return F.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        states_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_states = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])  # [n, size]
        with without_autocast(grad.device):
            if weight is not None:
                grad_states = (rows @ weight.to(grad.dtype)).to(states_dtype).view(*grad.shape[:-1], weight.shape[1])
            if states is not None:
                grad_weight = (rows.t() @ states.reshape(-1, states.shape[-1]).to(grad.dtype)).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = bias_gradient(rows, bias_dtype)
        return grad_states, grad_weight, grad_bias


@torch.compiler.disable(reason="linear runs as it is, between compiled graphs")
def _apply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _Linear.apply(states, weight, bias)
