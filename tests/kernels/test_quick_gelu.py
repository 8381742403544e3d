"""`quick_gelu` as every machine computes it, against open_clip's module in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import QuickGELU
from torch.utils.checkpoint import checkpoint

from xdscale.kernels.quick_gelu import plain_quick_gelu, quick_gelu

LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(shape, dtype):
    """States from either end of the sigmoid to the other, and the output's gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    states, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (3 * states).to(dtype), grad.to(dtype)


def run(function, states, grad):
    leaf = states.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), torch.autograd.grad(out, leaf, grad)[0]]


def assert_as_open_clip(function, states, grad):
    found = run(function, states, grad)
    expected = run(QuickGELU(), states.double(), grad.double())
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == states.dtype
        assert value.shape == states.shape
        assert float((value.double() - reference).norm()) <= LIMITS[states.dtype] * float(reference.norm())


@pytest.mark.parametrize("function", [quick_gelu, plain_quick_gelu])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1,), (), (3, 77, 64), (5, 999)])
def test_equals_open_clip(function, shape, dtype):
    assert_as_open_clip(function, *draw(shape, dtype))


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 20), max_size=3), dtype=st.sampled_from(list(LIMITS)))
def test_any_shape(shape, dtype):
    assert_as_open_clip(quick_gelu, *draw(tuple(shape), dtype))


@pytest.mark.parametrize("function", [quick_gelu, plain_quick_gelu])
def test_gradients_by_finite_differences(function):
    states = draw((4, 9), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(function, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype):
    states, grad = draw((19, 96), dtype)
    for view in (lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2], lambda tensor: tensor.t().contiguous().t()):
        assert_as_open_clip(quick_gelu, view(states), view(grad))


@pytest.mark.parametrize("function", [quick_gelu, plain_quick_gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_result_has_the_dtype_of_the_states(function, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_open_clip(function, *draw((40, 96), dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_far_from_zero_it_is_the_identity_or_nothing(dtype):
    """Also where 1.702 x is beyond the largest fp16."""
    states = torch.tensor([-60000.0, -100.0, 100.0, 60000.0]).to(dtype)
    out, gradient = run(quick_gelu, states, torch.ones_like(states))
    torch.testing.assert_close(out, states.clamp(min=0.0), rtol=0, atol=1e-30)
    torch.testing.assert_close(gradient, (states > 0).to(dtype), rtol=0, atol=1e-30)


def test_used_twice_gradients_add_up():
    states, grad = draw((20, 48), torch.float32)

    def twice(function):
        return lambda leaf: function(leaf) + function(2 * function(leaf))

    for value, reference in zip(
        run(twice(quick_gelu), states, grad), run(twice(QuickGELU()), states.double(), grad.double()), strict=True
    ):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_are_the_same():
    states, grad = draw((20, 48), torch.float32)
    expected = run(quick_gelu, states, grad)
    found = run(lambda leaf: checkpoint(quick_gelu, leaf, use_reentrant=False), states, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_only_the_input_is_kept(dtype, strided):
    states = draw((50, 96), dtype)[0]
    states = (states[:, ::2] if strided else states).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quick_gelu(states)
    assert len(kept) == 1
    assert kept[0] is states


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match="states must be fp16, bf16, fp32 or fp64, not torch.int64"):
        quick_gelu(torch.ones(3, dtype=torch.int64))


def test_compiled_models_break_the_graph_here():
    """The operation runs as it is, between two graphs."""
    explained = torch._dynamo.explain(lambda x: quick_gelu(x * 2) + 1)(draw((8, 16), torch.float32)[0])
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2
