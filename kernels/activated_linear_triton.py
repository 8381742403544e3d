"""The Triton kernel of `activated_linear`'s backward pass, its launch, and the configurations that are shipped.

One pass over memory reads the states and the gradient of the activated states, and writes the activated states and the
gradient of the states. All arithmetic is fp32: operands are widened as they are loaded (Triton's interpreter computes
wrongly in bf16), and results are rounded once. Every value has one writer.
"""

# ruff: noqa: ANN001, ANN201, ANN202 -- the arguments of kernels are pointers and integers, typed by each launch

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.gpu import PROCESSORS, architecture, cdiv, launch, launches_on
from xdscale.kernels.quick_gelu_triton import TRUE_ELEMENTS, quick_gelu_gradient, quick_gelu_of


class GELUTile(NamedTuple):
    """Elements and threads of a program."""

    elements: int
    threads: int


TILE = GELUTile(1024, 256)
"""8 elements of a thread: 16 bytes of each tensor in bf16."""

_HALF_LOG2_E = tl.constexpr(0.5 * math.log2(math.e))
_PEAK = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def normal_tile(states):
    """Φ(x), and exp(-x²/2), which is its derivative but for a factor.

    Beyond |x| the normal distribution has exp(-x²/2) t P(t), where t = 1 / (1 + 0.3 |x|) and P is the polynomial of the
    least relative error: 1.2e-7 everywhere. With erf, which takes an exponential of its own, the kernel would have 54
    instructions an element on a Hopper instead of 33, too many for memory's speed; and 1 + erf cancels left of 0.
    """
    density = tl.exp2(states * states * -_HALF_LOG2_E)
    t = 1.0 / (1.0 + 0.3 * tl.abs(states))
    p = 0.036194800792648 * t - 0.15937808986036886
    p = p * t + 0.2101180291301207
    p = p * t - 0.057167047198182455
    p = p * t + 0.13041629529036394
    p = p * t + 0.0993471689905993
    p = p * t + 0.1208455235573685
    p = p * t + 0.11962326305470489
    beyond = density * t * p
    return tl.where(states > 0.0, 1.0 - beyond, beyond), density


@triton.jit
def _activate(GRAD, STATES, HIDDEN, GRAD_STATES, place, mask, QUICK: tl.constexpr):
    """Both results at some places."""
    grad = tl.load(GRAD + place, mask=mask).to(tl.float32)
    states = tl.load(STATES + place, mask=mask).to(tl.float32)
    if QUICK:
        hidden, grad = quick_gelu_of(states), quick_gelu_gradient(grad, states)
    else:  # x Φ(x), of which the derivative is Φ(x) + x φ(x)
        share, density = normal_tile(states)
        hidden, grad = states * share, grad * (share + states * density * _PEAK)
    tl.store(HIDDEN + place, hidden.to(HIDDEN.dtype.element_ty), mask=mask)
    tl.store(GRAD_STATES + place, grad.to(GRAD_STATES.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["elements"])
def backward_kernel(GRAD, STATES, HIDDEN, GRAD_STATES, elements, QUICK: tl.constexpr, TILE: tl.constexpr):
    """Activated states and gradient of one tile; GRAD_STATES may be GRAD."""
    first = tl.program_id(0).to(tl.int64) * TILE
    place = first + tl.arange(0, TILE)
    # Only the last tile has a mask: it would cut the loads and stores of 16 bytes into single elements.
    if first + TILE <= elements:
        _activate(GRAD, STATES, HIDDEN, GRAD_STATES, place, None, QUICK)
    else:
        _activate(GRAD, STATES, HIDDEN, GRAD_STATES, place, place < elements, QUICK)


def backward(
    grad: torch.Tensor, states: torch.Tensor, *, quick: bool, tile: GELUTile = TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes GELU again, and its gradient.

    Args:
        grad: of the activated states. Is overwritten where it has the dtype of `states`.
        states: of the same shape.
        quick: whether the activation is `quick_gelu`; else it is the one with erf.
        tile: how the work is cut.

    Returns:
        The activated states in the dtype of `grad`, and the gradient of the states; both contiguous.
    """
    grad, states = grad.contiguous(), states.contiguous()
    hidden = torch.empty_like(grad)
    grad_states = grad if grad.dtype == states.dtype else torch.empty_like(states)
    warps = tile.threads // (64 if architecture(grad.device) == "gfx942" else 32)
    launch(
        backward_kernel, (cdiv(grad.numel(), tile.elements),), grad, states, hidden, grad_states, grad.numel(),
        QUICK=quick, TILE=tile.elements, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return hidden, grad_states


def compile_cases() -> list[CompileCase]:
    """Returns every configuration that ships: both activations in bf16 and fp32."""
    choices = itertools.product((False, True), (torch.bfloat16, torch.float32), PROCESSORS)
    return [_compile_case(*choice) for choice in choices]


def _compile_case(quick: bool, dtype: torch.dtype, target: str) -> CompileCase:
    grad, states = (torch.empty(TRUE_ELEMENTS, dtype=dtype, device="meta") for _ in range(2))
    with launches_on(target) as launches:
        backward(grad, states, quick=quick)
    (found,) = launches
    name = f"{'quick GELU' if quick else 'GELU'} backward {TYPES[dtype]}"
    moved = 2 * grad.nbytes + 2 * states.nbytes  # the gradient is read and written
    return compile_case(found, target, "activated_linear", name, moved=moved, least=moved)
