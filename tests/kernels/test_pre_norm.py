"""`pre_norm` as every machine computes it, against PyTorch's own addition and LayerNorm in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xdscale.kernels.pre_norm import plain_pre_norm, pre_norm

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


def draw(tokens, size, dtype, residual_dtype=None):
    """States, residual, weight, bias; and the gradients of sum and norm."""
    generator = torch.Generator().manual_seed(tokens * 7919 + size)
    wide = residual_dtype or dtype
    shapes = ((tokens, size), dtype), ((tokens, size), wide), ((size,), wide), ((size,), wide)
    shapes += ((tokens, size), wide), ((tokens, size), wide)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(kind) for shape, kind in shapes]


def run(function, inputs, adds=True):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    states, residual, weight, bias = leaves
    found = function(states, residual if adds else None, weight, bias, eps=EPS)
    if not adds:
        del leaves[1]
    return [*(tensor.detach() for tensor in found), *torch.autograd.grad(found, leaves, inputs[4:])]


def torch_norm(states, residual, weight, bias, eps):
    total = states if residual is None else states + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


@pytest.mark.parametrize("function", [pre_norm, plain_pre_norm])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(0, 48), (1, 48), (20, 512), (67, 33), (3, 5000)])
def test_equals_pytorch(function, tokens, size, dtype, adds):
    inputs = draw(tokens, size, dtype)
    found = run(function, inputs, adds)
    expected = run(torch_norm, [tensor.double() for tensor in inputs], adds)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == dtype
        # Few rows: PyTorch adds up the weight's gradient in bf16 on CPUs, 1.2 % off after 77.
        assert float((value.double() - reference).norm()) <= LIMITS[dtype] * float(reference.norm())


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_bits_are_those_of_separate_operations(dtype, adds):
    inputs = draw(70, 96, dtype)
    for found, expected in zip(run(pre_norm, inputs, adds), run(torch_norm, inputs, adds), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("function", [pre_norm, plain_pre_norm])
def test_under_autocast_sum_and_norm_are_as_wide_as_the_residual(function):
    inputs = draw(40, 96, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(function, inputs)
    dtypes = [tensor.dtype for tensor in (inputs[1], inputs[1], *inputs[:4])]
    assert [tensor.dtype for tensor in found] == dtypes
    expected = run(torch_norm, [tensor.double() for tensor in inputs])
    for value, reference in zip(found, expected):
        assert float((value.double() - reference).norm()) <= 1e-2 * float(reference.norm())


@pytest.mark.parametrize("function", [pre_norm, plain_pre_norm])
def test_a_wide_residual_beside_narrow_weights(function):
    states, residual, weight, bias, *gradients = draw(40, 96, torch.bfloat16, torch.float32)
    inputs = [states, residual, weight.bfloat16(), bias.bfloat16(), *gradients]
    found = run(function, inputs)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2 + [tensor.dtype for tensor in inputs[:4]]
    expected = run(torch_norm, [tensor.double() for tensor in inputs])
    for value, reference in zip(found, expected):
        assert float((value.double() - reference).norm()) <= 1e-2 * float(reference.norm())


def test_recomputed_activations_are_the_same():
    inputs = draw(20, 48, torch.float32)
    found = run(lambda *leaves, eps: checkpoint(pre_norm, *leaves, eps=eps, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, run(pre_norm, inputs)))


@pytest.mark.parametrize(
    ("name", "wrong", "error", "expected"),
    [
        ("states", torch.zeros(4, 16, dtype=torch.int64), TypeError, "fp16, bf16, fp32 or fp64"),
        ("states", torch.zeros(2, 4, 16), ValueError, r"\[tokens, size\]"),
        ("residual", torch.zeros(5, 16), ValueError, r"\[4, 16\]"),
        ("weight", torch.zeros(15), ValueError, r"\[16\]"),
        ("bias", torch.zeros(16, dtype=torch.int32), TypeError, "float32"),
        ("eps", -1.0, ValueError, "at least 0"),
    ],
)
def test_wrong_arguments_are_named(name, wrong, error, expected):
    fitting = dict(zip(("states", "residual", "weight", "bias"), draw(4, 16, torch.float32)))
    with pytest.raises(error, match=expected) as raised:
        pre_norm(**({**fitting, "eps": EPS} | {name: wrong}))
    assert name in str(raised.value)


def test_a_device_without_kernels_takes_the_plain_definition():
    states, weight = torch.empty(3, 8, dtype=torch.float64, device="meta"), torch.ones(8, dtype=torch.float64)
    total, out = pre_norm(states, states, weight.to("meta"), weight.to("meta"), eps=EPS)
    for found in (total, out):
        assert (found.shape, found.dtype, found.device.type) == ((3, 8), torch.float64, "meta")
