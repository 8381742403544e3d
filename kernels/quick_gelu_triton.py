"""Triton kernels of `quick_gelu`, their launches, and the configurations that are shipped.

One program takes one tile of the elements, in whatever shape they are. All arithmetic is fp32: operands are widened as
they are loaded (Triton's interpreter computes wrongly in bf16). Every value has one writer.
"""

# ruff: noqa: ANN001, ANN201 -- the arguments of kernels are pointers and integers, typed by each launch

import itertools

import torch
import triton
import triton.language as tl

from xdscale.kernels.compile_case import TYPES, CompileCase, compile_case
from xdscale.kernels.gpu import PROCESSORS, architecture, cdiv, launch, launches_on
from xdscale.kernels.quick_gelu import SCALE

TILE = 2048
"""Elements of a program."""

_SCALE = tl.constexpr(SCALE)


@triton.jit
def quick_gelu_of(states):
    """The activation of a tile."""
    return states * tl.sigmoid(states * _SCALE)


@triton.jit
def quick_gelu_gradient(grad, states):
    """Its gradient. The derivative is σ + u σ (1 - σ), where u = 1.702 x and σ = σ(u)."""
    scaled = states * _SCALE
    share = tl.sigmoid(scaled)
    return grad * share * (1.0 + scaled * (1.0 - share))


@triton.jit(do_not_specialize=["elements"])
def forward_kernel(STATES, OUT, elements, TILE: tl.constexpr):
    """Output of one tile."""
    first = tl.program_id(0).to(tl.int64) * TILE
    place = first + tl.arange(0, TILE)
    # Only the last tile has a mask: it would cut the loads and stores of 16 bytes into single elements.
    if first + TILE <= elements:
        states = tl.load(STATES + place).to(tl.float32)
        tl.store(OUT + place, quick_gelu_of(states).to(OUT.dtype.element_ty))
    else:
        mask = place < elements
        states = tl.load(STATES + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(OUT + place, quick_gelu_of(states).to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["elements"])
def backward_kernel(GRAD, STATES, GRAD_STATES, elements, TILE: tl.constexpr):
    """Gradient of one tile."""
    first = tl.program_id(0).to(tl.int64) * TILE
    place = first + tl.arange(0, TILE)
    if first + TILE <= elements:
        grad = tl.load(GRAD + place).to(tl.float32)
        states = tl.load(STATES + place).to(tl.float32)
        tl.store(GRAD_STATES + place, quick_gelu_gradient(grad, states).to(GRAD_STATES.dtype.element_ty))
    else:
        mask = place < elements
        grad = tl.load(GRAD + place, mask=mask, other=0.0).to(tl.float32)
        states = tl.load(STATES + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(GRAD_STATES + place, quick_gelu_gradient(grad, states).to(GRAD_STATES.dtype.element_ty), mask=mask)


def forward(states: torch.Tensor) -> torch.Tensor:
    """Returns the output, contiguous; argument as in `quick_gelu`."""
    states = states.contiguous()
    out = torch.empty_like(states)
    _launch(forward_kernel, states, out)
    return out


def backward(grad: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the states, contiguous."""
    grad, states = grad.contiguous(), states.contiguous()
    grad_states = torch.empty_like(states)
    _launch(backward_kernel, grad, states, grad_states)
    return grad_states


def _launch(kernel: triton.JITFunction, *tensors: torch.Tensor) -> None:
    elements, warps = tensors[0].numel(), _warps(tensors[0].device)
    launch(kernel, (cdiv(elements, TILE),), *tensors, elements, TILE=TILE, num_warps=warps, num_stages=1)


def _warps(device: torch.device) -> int:
    """Returns the warps of a program: 256 threads either way, each with 8 elements of a tensor, 16 bytes in bf16."""
    return 4 if architecture(device) == "gfx942" else 8


TRUE_ELEMENTS = 32 * 8 * 77 * 2048
"""Elements of `compile_cases`: 32 texts of 8 blocks of 77 tokens, inside the feed-forwards of ViT-B-32's text tower."""


def compile_cases() -> list[CompileCase]:
    """Returns every configuration that ships: both kernels in bf16 and fp32."""
    choices = itertools.product((torch.bfloat16, torch.float32), PROCESSORS)
    return [case for cases in zip(*(_compile_cases(*choice) for choice in choices)) for case in cases]


def _compile_cases(dtype: torch.dtype, target: str) -> list[CompileCase]:
    states, grad = (torch.empty(TRUE_ELEMENTS, dtype=dtype, device="meta") for _ in range(2))
    with launches_on(target) as launches:
        forward(states)
        backward(grad, states)
    return [
        compile_case(found, target, "quick_gelu", f"{name} {TYPES[dtype]}", moved=found.nbytes(), least=found.nbytes())
        for name, found in zip(("forward", "backward"), launches)
    ]
