"""`linear` where there is no GPU: PyTorch's, bit for bit; its kernel's tests are in `linear_kernels.py`."""

import pytest
import torch
import torch.nn.functional as F

from xdscale.kernels import gpu, linear, plain_linear
from xdscale.kernels.linear import FEWEST_ELEMENTS, bias_gradient


def run(function, leaves, grad, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("function", [linear, plain_linear])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (3, 7, 24)])
def test_it_is_pytorchs_bit_for_bit(function, dtype, autocast, shape):
    torch.manual_seed(0)
    leaves = [torch.randn(each, dtype=dtype).requires_grad_() for each in (shape, (16, 24), (16,))]
    grad = torch.randn(*shape[:-1], 16, dtype=dtype)
    for found, expected in zip(*(run(each, leaves, grad, autocast) for each in (function, F.linear)), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="shape"):
        linear(torch.zeros(4, 15), torch.zeros(8, 16), torch.zeros(8))


def test_compiled_models_have_no_break_here_on_a_cpu():
    weight, bias = torch.randn(8, 16), torch.randn(8)
    explained = torch._dynamo.explain(lambda x: linear(x * 2, weight, bias) + 1)(torch.randn(4, 16))
    assert explained.graph_break_count == 0


def test_a_large_output_on_a_gpu_needs_no_bias():
    states, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((1 << 15, 8), (1 << 10, 8)))
    out = linear(states, weight, None)
    assert type(out.grad_fn).__name__ == "_LinearBackward"
    found = torch.autograd.grad(out, (states, weight), torch.empty_like(out))
    assert [tuple(one.shape) for one in found] == [(1 << 15, 8), (1 << 10, 8)]


@pytest.mark.parametrize(("rows", "launched"), [(FEWEST_ELEMENTS // 1024 - 1, 0), (FEWEST_ELEMENTS // 1024, 2)])
def test_small_gradients_of_a_bias_are_summed_by_pytorch(rows, launched):
    """A GPU would be done before the host has asked for two kernels."""
    with gpu.launches_on("sm_90") as launches:
        found = bias_gradient(torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta"), torch.float32)
    assert (len(launches), found.shape, found.dtype) == (launched, (1024,), torch.float32)
