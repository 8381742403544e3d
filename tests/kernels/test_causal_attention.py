"""Causal attention against PyTorch's own in fp64."""

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
@pytest.mark.parametrize("shape", [(3, 2, 77, 16), (2, 1, 1, 8), (1, 4, 13, 24)])
def test_causal_attention(function, dtype, error, shape):
    """Against PyTorch's with the mask spelt out, in fp64, values and gradients."""
    torch.manual_seed(5)
    inputs = [torch.randn(shape).to(dtype).double().requires_grad_() for _ in range(3)]
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(*inputs, attn_mask=mask)
    weighting = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, weighting)
    narrow = [states.detach().to(dtype).requires_grad_() for states in inputs]
    found = function(*narrow)
    gradients = torch.autograd.grad(found, narrow, weighting.to(dtype))
    for ours, theirs in zip((found, *gradients), (expected, *wanted)):
        assert ours.dtype == dtype
        # One token reads itself alone, whatever its query and key: where zero is true, terms as large as this cancel.
        scale = theirs.norm() if theirs.norm() > 1e-12 else weighting.norm()
        assert (ours.double() - theirs).norm() <= error * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_reads_a_later_one(dtype):
    torch.manual_seed(6)
    states = torch.randn(1, 2, 9, 8, dtype=dtype)
    later = states.clone()
    later[:, :, 5:] *= -7
    assert torch.equal(causal_attention(*[states] * 3)[:, :, :5], causal_attention(*[later] * 3)[:, :, :5])
