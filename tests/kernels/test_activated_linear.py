"""`activated_linear` against PyTorch's own operations in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xdscale.kernels.activated_linear import activated_linear, plain_activated_linear
from xdscale.kernels.quick_gelu import quick_gelu

LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
ACTIVATIONS = [F.gelu, quick_gelu, torch.tanh]


def draw(shape, size, dtype, parameter_dtype=None):
    """States, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(sum(shape) * 7919 + size)
    shapes = shape, (size, shape[-1]), (size,), (*shape[:-1], size)
    dtypes = dtype, parameter_dtype or dtype, parameter_dtype or dtype, dtype
    values = (torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)
    return [value.to(kind) for value, kind in zip(values, dtypes)]


def run(function, inputs, activation):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = function(*leaves, activation)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def in_pytorch(states, weight, bias, activation):
    return torch.einsum("...i,oi->...o", activation(states), weight) + bias


def assert_as_pytorch(function, inputs, activation, limit):
    found = run(function, inputs, activation)
    expected = run(in_pytorch, [tensor.double() for tensor in inputs], activation)
    for value, reference, like in zip(found, expected, [inputs[3], *inputs[:3]], strict=True):
        assert value.dtype == like.dtype
        assert value.shape == reference.shape
        assert float((value.double() - reference).norm()) <= limit * float(reference.norm())


@pytest.mark.parametrize("function", [activated_linear, plain_activated_linear])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(0, 48), (5, 48), (2, 7, 48)])
def test_equals_pytorch(function, activation, dtype, shape):
    assert_as_pytorch(function, draw(shape, 16, dtype), activation, LIMITS[dtype])


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 20), min_size=1, max_size=3), size=st.integers(1, 40))
def test_any_shape(shape, size):
    assert_as_pytorch(activated_linear, draw(tuple(shape), size, torch.float64), F.gelu, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_finite_differences(activation):
    inputs = [tensor.requires_grad_() for tensor in draw((2, 3, 5), 4, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *leaves: activated_linear(*leaves, activation), inputs)


@pytest.mark.parametrize("states_dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_gradients_have_the_dtype_of_their_tensors(states_dtype):
    states, weight, bias, grad = draw((30, 48), 16, states_dtype, torch.float32)
    grad = grad.bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (states, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = activated_linear(*leaves, F.gelu)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, leaves, grad)
    expected = run(in_pytorch, [tensor.double() for tensor in (*leaves, grad)], F.gelu)
    for value, reference, leaf in zip((out.detach(), *gradients), expected, (grad, *leaves), strict=True):
        assert value.dtype == leaf.dtype
        assert float((value.double() - reference).norm()) <= 1e-2 * float(reference.norm())


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_returned(wanted):
    inputs = draw((5, 16), 8, torch.float64)
    expected = run(in_pytorch, inputs, F.gelu)[1:]
    leaves = [tensor.requires_grad_(needs) for tensor, needs in zip(inputs[:3], wanted)]
    activated_linear(*leaves, F.gelu).backward(inputs[3])
    for leaf, needs, reference in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == needs
        if needs:
            torch.testing.assert_close(leaf.grad, reference)


def test_used_twice_gradients_add_up():
    inputs = draw((6, 16), 16, torch.float64)

    def twice(function):
        return lambda states, *rest: function(function(states, *rest), *rest) + function(states, *rest)

    for found, expected in zip(*(run(twice(each), inputs, F.gelu) for each in (activated_linear, in_pytorch))):
        torch.testing.assert_close(found, expected)


def kept_by(function, inputs, *, checkpointed=False):
    """Storages that autograd keeps for the caller's sake, by address."""
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    kept = {}

    def pack(tensor):
        if tensor.nbytes:  # checkpointing keeps an empty one in torch 2.11
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # A product before it, as in a feed-forward: its result is what comes in.
        def feed_forward(states):
            return function(states @ torch.eye(states.shape[-1], dtype=states.dtype), *leaves[1:], F.gelu)

        out = checkpoint(feed_forward, leaves[0], use_reentrant=False) if checkpointed else feed_forward(leaves[0])
    return out, leaves, kept


def test_only_states_and_weight_are_kept():
    inputs = draw((50, 96), 16, torch.float32)
    _, leaves, kept = kept_by(activated_linear, inputs)
    bytes_kept = sum(tensor.nbytes for tensor in kept.values()) - 96 * 96 * 4  # the identity's
    assert leaves[1].untyped_storage().data_ptr() in kept
    assert bytes_kept == (50 + 16) * 96 * 4
    _, _, kept = kept_by(plain_activated_linear, inputs)
    assert sum(tensor.nbytes for tensor in kept.values()) - 96 * 96 * 4 == (50 + 50 + 16) * 96 * 4


def test_recomputed_activations_keep_the_input_alone():
    """Activation checkpointing takes over what is kept here as well."""
    inputs = draw((50, 96), 16, torch.float64)
    expected = run(in_pytorch, inputs, F.gelu)
    out, leaves, kept = kept_by(activated_linear, inputs, checkpointed=True)
    assert set(kept) <= {leaf.untyped_storage().data_ptr() for leaf in leaves}
    gradients = torch.autograd.grad(out, leaves, inputs[3])
    for found, reference in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("states", torch.zeros(4, 15), r"\[4, 15\]"),
        ("states", torch.zeros(()), r"\[\]"),
        ("weight", torch.zeros(16), "weight"),
        ("bias", torch.zeros(7), r"\[8\], not \[7\]"),
    ],
)
def test_wrong_arguments_are_named(name, wrong, expected):
    fitting = dict(zip(("states", "weight", "bias"), draw((4, 16), 8, torch.float32)))
    with pytest.raises(ValueError, match=expected) as raised:
        activated_linear(**(fitting | {name: wrong}), activation=F.gelu)
    assert name in str(raised.value)


def test_compiled_models_break_the_graph_here():
    """The operation runs as it is, between two graphs."""
    states, weight, bias, _ = draw((8, 16), 16, torch.float32)
    explained = torch._dynamo.explain(lambda x: activated_linear(x * 2, weight, bias, F.gelu) + 1)(states)
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2


def test_a_backward_pass_under_autocast_computes_in_the_types_of_the_forward_pass():
    """DeepSpeed may call backward inside of autocast, which would round fp32 products to bf16."""
    inputs = draw((5, 16), 8, torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    expected = torch.autograd.grad(activated_linear(*leaves, F.gelu), leaves, inputs[3])
    out = activated_linear(*leaves, F.gelu)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves, inputs[3])
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=0)
