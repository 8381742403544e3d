"""Causal attention against PyTorch's own in fp64."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from xdscale.kernels import causal_attention, plain_causal_attention


@pytest.mark.parametrize(
    ("function", "dtype", "error"),
    [
        (plain_causal_attention, torch.float64, 1e-12),
        (causal_attention, torch.float64, 1e-12),
        (causal_attention, torch.float32, 2e-6),
        (causal_attention, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("shape", [(3, 77, 3, 2, 16), (2, 1, 3, 1, 8), (1, 13, 3, 4, 24)])
def test_causal_attention(function, dtype, error, shape):
    """Against PyTorch's with the mask spelt out, in fp64, values and gradients."""
    torch.manual_seed(5)
    projected = torch.randn(shape).to(dtype).double().requires_grad_()
    mask = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4), attn_mask=mask).transpose(1, 2)
    weighting = torch.randn(expected.shape, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, projected, weighting)
    narrow = projected.detach().to(dtype).requires_grad_()
    found = function(narrow)
    (gradient,) = torch.autograd.grad(found, narrow, weighting.to(dtype))
    for ours, theirs in zip((found, *gradient.unbind(2)), (expected, *wanted.unbind(2))):
        assert ours.dtype == dtype
        # One token reads itself alone, whatever its query and key: where zero is true, terms as large as this cancel.
        scale = theirs.norm() if theirs.norm() > 1e-12 else weighting.norm()
        assert (ours.double() - theirs).norm() <= error * scale


@pytest.mark.parametrize("function", [causal_attention, plain_causal_attention])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 77, 3, 2, 16), (4, 0, 3, 2, 16), (0, 0, 3, 2, 16)])
def test_nothing_to_attend_to_gives_nothing(function, dtype, shape):
    projected = torch.zeros(shape, dtype=dtype, requires_grad=True)
    found = function(projected)
    found.sum().backward()
    assert (found.shape, found.dtype) == ((*shape[:2], *shape[3:]), dtype)
    assert (projected.grad.shape, projected.grad.dtype) == (shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_reads_a_later_one(dtype):
    torch.manual_seed(6)
    projected = torch.randn(1, 9, 3, 2, 8, dtype=dtype)
    later = projected.clone()
    later[:, 5:] *= -7
    assert torch.equal(causal_attention(projected)[:, :5], causal_attention(later)[:, :5])


@pytest.mark.parametrize("shape", [(2, 7, 2, 16), (7, 3, 2, 2, 16)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="projected must have the shape"):
        causal_attention(torch.zeros(shape))


def test_kernels_take_heads_of_up_to_128(monkeypatch):
    taken = []
    chosen = SimpleNamespace(apply=lambda projected: taken.append(projected.shape))
    monkeypatch.setattr(importlib.import_module("xdscale.kernels.causal_attention"), "_CausalAttention", chosen)
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)
    for length, size in ((130, 128), (5, 136)):
        causal_attention(torch.zeros(1, length, 3, 1, size))
    assert taken == [(1, 130, 3, 1, 128)]
