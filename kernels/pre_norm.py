"""states + residual, and the LayerNorm of that sum: what stands between the sublayers of a pre-norm block like CLIP's.

In separate operations the sum is written, read again and, in the backward pass, its two gradients are added in one more
pass. Here it is one pass each way, by the kernels of `residual_norm_triton`. The plain definition comes first and is
the reference. On a CPU the work is that of PyTorch's own operations.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.residual_norm import check_norm, norm_runs_triton


def plain_pre_norm(
    states: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `pre_norm`, differentiable by PyTorch itself; in fp32, or fp64 for fp64 states."""
    total = states if residual is None else residual + states
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, normed.to(total.dtype)


@torch.compiler.disable(reason="pre_norm runs as it is, between compiled graphs")
def pre_norm(
    states: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns states + residual, and the LayerNorm of that over the last dimension; both have gradients.

    The same under `torch.autocast`, where the residual is fp32, and so are sum and norm. On a GPU all is computed in
    fp32, nothing waits for the device and every shape follows from the inputs' shapes, so it can be captured in a CUDA
    graph. With `torch.compile` the call is a graph break. Deterministic.

    Args:
        states: [tokens, size], fp16, bf16, fp32 or fp64; no tokens are allowed.
        residual: [tokens, size], in the dtype of `states` or fp32, which also holds for weight and bias; or None, where
            there is nothing to add and the states are the sum.
        weight: [size].
        bias: [size], in the dtype of `weight`.
        eps: is added to the variance.

    Returns:
        The sum and its norm, [tokens, size] each, in the dtype that PyTorch gives the sum.

    Raises:
        TypeError: a dtype does not fit; the message names the argument.
        ValueError: a shape, device or range does not fit; the message names the argument.
    """
    check_norm(states, states if residual is None else residual, weight, bias, eps)
    if norm_runs_triton(states):
        return _PreNorm.apply(states, residual, weight, bias, eps)
    if states.device.type != "cpu":
        return plain_pre_norm(states, residual, weight, bias, eps=eps)
    total = states if residual is None else residual + states
    wide = torch.promote_types(weight.dtype, total.dtype)  # of a sum in fp32 PyTorch takes no weight in bf16
    return total, F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), eps).to(total.dtype)


class _PreNorm(torch.autograd.Function):
    """Keeps the sum, which it also returns, and mean and reciprocal deviation of each row."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        states: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from xdscale.kernels.residual_norm_triton import forward  # CPU runs never load the kernels

        dtype = states.dtype if residual is None else torch.promote_types(states.dtype, residual.dtype)
        out, total, mean, scale = forward(states, residual, weight, bias, None, eps, 0, dtype=dtype)
        ctx.set_materialize_grads(False)  # the last norm's sum has none
        # The parameters themselves are saved, never a cast, as ZeRO-3 needs it (see `residual_norm`).
        ctx.save_for_backward(weight, bias, total, mean, scale)
        ctx.dtypes = states.dtype, None if residual is None else residual.dtype
        return total, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_total: torch.Tensor | None, grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from xdscale.kernels.residual_norm_triton import backward

        weight, bias, total, mean, scale = ctx.saved_tensors
        dtype, residual_dtype = ctx.dtypes
        grad = torch.zeros_like(total) if grad is None else grad
        gradients = backward(
            grad, weight, bias, None, 0, residual_dtype or dtype, total, mean, scale, grad_total=grad_total, dtype=dtype
        )
        needed = zip(gradients, ctx.needs_input_grad)
        return *(gradient if needs else None for gradient, needs in needed), None
