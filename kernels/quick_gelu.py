"""CLIP's activation x σ(1.702 x) in one pass over memory, forward and backward, keeping nothing but its input.

In separate operations 1.702 x and σ are tensors of their own, and the backward pass needs x and σ. Here σ is computed
again where it is needed. The plain definition comes first and is the reference. On a GPU the work is that of the
Triton kernels in `quick_gelu_triton`, on a CPU of PyTorch operations.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.gpu import runs_triton

CPU_DTYPES = (torch.bfloat16, torch.float32)
"""Not fp16, in which 1.702 x can be infinite and its gradient then is not a number."""

SCALE = 1.702


def plain_quick_gelu(states: torch.Tensor) -> torch.Tensor:
    """The definition of `quick_gelu`, differentiable by PyTorch itself; in fp32, or fp64 for fp64 states."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide * torch.sigmoid(SCALE * wide)).to(states.dtype)


@torch.compiler.disable(reason="quick_gelu runs as it is, between compiled graphs")
def quick_gelu(states: torch.Tensor) -> torch.Tensor:
    """Returns states · σ(1.702 · states), the GELU of OpenAI's CLIP.

    The same under `torch.autocast`. With `torch.compile` the call is a graph break. On a GPU nothing waits for the
    device, so it can be captured in a CUDA graph. Deterministic.

    Args:
        states: any shape, fp16, bf16, fp32 or fp64; no elements are allowed.

    Returns:
        Shape and dtype of `states`.

    Raises:
        TypeError: `states` is not floating-point.
    """
    if not states.is_floating_point():
        raise TypeError(f"states must be fp16, bf16, fp32 or fp64, not {states.dtype}")
    if runs_triton(states.device, states.dtype) or (states.device.type == "cpu" and states.dtype in CPU_DTYPES):
        return _QuickGELU.apply(states)
    return plain_quick_gelu(states)


class _QuickGELU(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: torch.Tensor) -> torch.Tensor:
        if runs_triton(states.device, states.dtype):
            from xdscale.kernels.quick_gelu_triton import forward  # CPU runs never load the kernels
        else:
            forward = _forward
        ctx.save_for_backward(states)
        return forward(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        (states,) = ctx.saved_tensors
        if runs_triton(states.device, states.dtype):
            from xdscale.kernels.quick_gelu_triton import backward
        else:
            backward = _backward
        return backward(grad, states)


def _forward(states: torch.Tensor) -> torch.Tensor:
    return (states * SCALE).sigmoid_().mul_(states)


def _backward(grad: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """With u = 1.702 x the function is SiLU(u) / 1.702, so its derivative by x is that of SiLU at u."""
    scaled = states * SCALE
    return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=scaled)
