"""The Triton kernels of `quick_gelu` against the plain definition in fp64.

Run by `test_triton_kernels.py` in a process of its own: on a GPU natively, elsewhere in Triton's
interpreter, which must be chosen before any kernel is decorated.
"""

import importlib
import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.kernels import quick_gelu_triton as kernels

operation = importlib.import_module("xdscale.kernels.quick_gelu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CANARIES = 4096


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    assert triton.knobs.runtime.interpret or DEVICE == "cuda"
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)
    monkeypatch.setattr(operation, "CPU_DTYPES", ())  # nothing but the kernels can give the result


def draw(shape, dtype):
    """States from either end of the sigmoid to the other, and the output's gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    states, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [tensor.to(DEVICE, dtype) for tensor in (3 * states, grad)]


def run(function, states, grad):
    leaf = states.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), torch.autograd.grad(out, leaf, grad)[0]]


def assert_as_plain(states, grad):
    found = run(operation.quick_gelu, states, grad)
    expected = run(operation.plain_quick_gelu, states.double(), grad.double())
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == states.dtype
        assert value.shape == states.shape
        assert float((value.double() - reference).norm()) <= LIMITS[states.dtype] * float(reference.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1,), (), (kernels.TILE,), (3, 77, 64), (2, kernels.TILE + 1), (5, 999)])
def test_equals_the_plain_definition(shape, dtype):
    assert_as_plain(*draw(shape, dtype))


@settings(max_examples=20, deadline=None)
@given(elements=st.integers(1, 3 * kernels.TILE))
def test_any_number_of_elements(elements):
    assert_as_plain(*draw((elements,), torch.float32))


@pytest.mark.parametrize("elements", [kernels.TILE - 3, kernels.TILE, 2 * kernels.TILE + 7])
def test_nothing_outside_the_buffers_is_read_or_written(elements, monkeypatch):
    """NaN before and after every input would spread; a mark before and after every output would change."""
    inputs = draw((elements,), torch.float32)
    expected = run(operation.quick_gelu, *inputs)
    guards = []

    def guarded(like, mark):
        buffer = torch.full((2 * CANARIES + like.numel(),), mark, dtype=like.dtype, device=DEVICE)
        guards.append((buffer, mark))
        return buffer[CANARIES : CANARIES + like.numel()].view(like.shape)

    padded = [guarded(tensor, math.nan).copy_(tensor) for tensor in inputs]
    monkeypatch.setattr(torch, "empty_like", lambda like: guarded(like, 12345.0))
    found = run(operation.quick_gelu, *padded)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(guards) == 4  # both inputs, the output and the gradient
    for buffer, mark in guards:
        edges = torch.cat((buffer[:CANARIES], buffer[-CANARIES:]))
        assert edges.isnan().all() if math.isnan(mark) else (edges == mark).all()


def test_strided_inputs():
    states, grad = draw((19, 96), torch.float32)
    expected = run(operation.quick_gelu, states, grad)
    for view in (lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2], lambda tensor: tensor.t().contiguous().t()):
        for found, reference in zip(run(operation.quick_gelu, view(states), view(grad)), expected, strict=True):
            assert torch.equal(found, reference)


def test_far_from_zero_it_is_the_identity_or_nothing():
    """Also where 1.702 x is beyond the largest fp16."""
    states = torch.tensor([-60000.0, -100.0, 100.0, 60000.0], device=DEVICE, dtype=torch.float16)
    out, gradient = run(operation.quick_gelu, states, torch.ones_like(states))
    assert out.tolist() == [0.0, 0.0, 100.0, 60000.0]
    assert gradient.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_shape(dtype):
    """16 blocks of ViT-B-32's text tower."""
    assert_as_plain(*draw((16, 77, 2048), dtype))
