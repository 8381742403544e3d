"""Linear(activation(states)), the second half of a feed-forward, keeping its input alone.

PyTorch keeps the states for the activation's gradient and the activated states for the weight's gradient. Both are four
times as wide as the model, and the second follows from the first; here the backward pass computes it again, which costs
two passes over memory beside three products. The matrix products stay the library's. On a GPU one kernel makes both the
activated states and the gradient of the states, for GELU with erf and for `quick_gelu`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from xdscale.kernels.gpu import runs_triton, without_autocast
from xdscale.kernels.linear import bias_gradient
from xdscale.kernels.quick_gelu import quick_gelu

Activation = Callable[[torch.Tensor], torch.Tensor]
"""A function of each element, without parameters and without randomness."""


def plain_activated_linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """The definition of `activated_linear`, differentiable by PyTorch itself."""
    return F.linear(activation(states), weight, bias)


@torch.compiler.disable(reason="activated_linear runs as it is, between compiled graphs")
def activated_linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """Returns activation(states) weightᵀ + bias.

    Under `torch.autocast` the products run in autocast's dtype while gradients keep their tensor's own dtype. With
    `torch.compile` the call is a graph break.

    Args:
        states: [..., width].
        weight: [size, width].
        bias: [size].
        activation: see `Activation`; it is called again in the backward pass, unless a kernel stands for it there.

    Returns:
        [..., size] in the dtype of the products.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    if weight.ndim != 2 or states.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"states must have the shape [..., width] of weight [size, width], not {list(states.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape {list(weight.shape[:1])}, not {list(bias.shape)}")
    return _ActivatedLinear.apply(states, weight, bias, activation)


class _ActivatedLinear(torch.autograd.Function):
    """Keeps states and weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        # The parameter itself is saved, never a view or a cast: ZeRO-3 empties it after this forward and fills the
        # same parameter again before the backward.
        ctx.save_for_backward(states, weight)
        ctx.activation, ctx.bias_dtype = activation, bias.dtype
        return F.linear(activation(states), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])  # [n, size]
        with without_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                grad_hidden = grad @ weight.to(grad.dtype)
            hidden, grad_states = _activate_again(states, grad_hidden, ctx.activation)
            if ctx.needs_input_grad[1]:
                features = hidden.reshape(-1, weight.shape[1]).to(grad.dtype)  # [n, width]
                grad_weight = (rows.t() @ features).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = bias_gradient(rows, ctx.bias_dtype)
        return grad_states, grad_weight, grad_bias, None


def _activate_again(
    states: torch.Tensor, grad_hidden: torch.Tensor | None, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the activated states and the gradient of the states, None without that of the activated ones.

    The latter may be overwritten: it is used nowhere else.
    """
    known = activation in (F.gelu, quick_gelu)
    if known and grad_hidden is not None and runs_triton(states.device, states.dtype):
        from xdscale.kernels.activated_linear_triton import backward  # CPU runs never load the kernels

        return backward(grad_hidden, states, quick=activation is quick_gelu)
    with torch.enable_grad():
        leaf = states.detach().requires_grad_(grad_hidden is not None)
        hidden = activation(leaf)
    if grad_hidden is None:
        return hidden, None
    (grad_states,) = torch.autograd.grad(hidden, leaf, grad_hidden.to(hidden.dtype))
    return hidden.detach(), grad_states
