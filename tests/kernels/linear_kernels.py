"""The Triton kernels of `linear` and `activated_linear` against their plain definitions in fp64.

Run by `test_triton_kernels.py` in a process of its own: on a GPU natively, elsewhere in Triton's
interpreter, which must be chosen before any kernel is decorated.
"""

import contextlib
import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.kernels import (
    activated_linear,
    activated_linear_triton,
    linear,
    linear_triton,
    plain_activated_linear,
    plain_linear,
    plain_quick_gelu,
    quick_gelu,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CANARIES = 4096

# Each operation, and its definition in fp64.
CALLS = {
    "linear": (linear, plain_linear),
    "gelu": (
        functools.partial(activated_linear, activation=F.gelu),
        functools.partial(plain_activated_linear, activation=F.gelu),
    ),
    "quick_gelu": (
        functools.partial(activated_linear, activation=quick_gelu),
        functools.partial(plain_activated_linear, activation=plain_quick_gelu),
    ),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels that were launched, by name."""
    assert triton.knobs.runtime.interpret or DEVICE == "cuda"
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)
    monkeypatch.setattr(importlib.import_module("xdscale.kernels.linear"), "FEWEST_ELEMENTS", 0)
    found = []
    for module in (linear_triton, activated_linear_triton):

        def launch(kernel, *arguments, original=module.launch, **options):
            found.append(kernel.fn.__name__)
            original(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", launch)
    return found


def draw(shape, size, dtype, parameter_dtype=None, bias_dtype=None):
    """States, weight, bias and the output's gradient; states from either end of GELU to the other."""
    generator = torch.Generator().manual_seed(sum(shape) * 7919 + size)
    shapes = shape, (size, shape[-1]), (size,), (*shape[:-1], size)
    values = [torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes]
    dtypes = dtype, parameter_dtype or dtype, bias_dtype or parameter_dtype or dtype, dtype
    return [value.to(DEVICE, kind) for value, kind in zip([2 * values[0], *values[1:]], dtypes)]


def run(function, inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(out.dtype))]


def assert_as_plain(call, inputs, out_dtype=None):
    found = run(CALLS[call][0], inputs)
    expected = run(CALLS[call][1], [tensor.double() for tensor in inputs])
    dtypes = out_dtype or inputs[0].dtype, *(tensor.dtype for tensor in inputs[:3])
    for value, reference, dtype in zip(found, expected, dtypes, strict=True):
        assert value.dtype == dtype
        assert value.shape == reference.shape
        assert float((value.double() - reference).norm()) <= LIMITS[dtypes[0]] * float(reference.norm())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"), [((0, 48), 16), ((1, 48), 16), ((67, 33), 21), ((3, 7, 48), 40), ((40, 16), 300), ((5,), 3)]
)
def test_equals_the_plain_definition(call, dtype, shape, size, launches):
    assert_as_plain(call, draw(shape, size, dtype))
    gelu = [] if call == "linear" else ["backward_kernel"]
    assert [name for name in launches if name != "forward_kernel"] == [*gelu, *["column_sums_kernel"] * 2]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("states_dtype", [torch.bfloat16, torch.float32])
def test_fp32_parameters_under_autocast(call, states_dtype):
    inputs = draw((33, 48), 24, states_dtype, torch.float32)
    inputs[3] = inputs[3].bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_as_plain(call, inputs, torch.bfloat16)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_returned(call, wanted):
    inputs = draw((9, 16), 8, torch.float32)
    expected = run(CALLS[call][1], [tensor.double() for tensor in inputs])[1:]
    leaves = [tensor.requires_grad_(needs) for tensor, needs in zip(inputs[:3], wanted)]
    CALLS[call][0](*leaves).backward(inputs[3])
    for leaf, needs, reference in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == needs
        if needs:
            torch.testing.assert_close(leaf.grad.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (True, True, True)])
def test_a_linear_keeps_only_what_gradients_need(wanted):
    leaves = [tensor.requires_grad_(needs) for tensor, needs in zip(draw((9, 16), 8, torch.float32), wanted)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(*leaves)
    assert [any(tensor is leaf for tensor in kept) for leaf in leaves] == [wanted[1], wanted[0], False]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 300), columns=st.integers(1, 600), processors=st.sampled_from([1, 7]))
def test_sums_of_any_shape(rows, columns, processors):
    """Also where columns, rows and programs are no multiples of tiles."""
    values = draw((rows, columns), 1, torch.float32)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_triton, "processors", lambda _device: processors)
        found = linear_triton.column_sums(values, torch.float32)
    torch.testing.assert_close(found.double(), values.double().sum(0), rtol=1e-6, atol=1e-4)


def test_sums_are_fp32_and_rounded_once():
    """In bf16 a sum stops growing at 256 times an addend."""
    ones = torch.ones(3000, 20, device=DEVICE, dtype=torch.bfloat16)
    assert linear_triton.column_sums(ones, torch.float32).tolist() == [3000.0] * 20
    assert linear_triton.column_sums(ones[:256], torch.bfloat16).tolist() == [256.0] * 20


def test_the_same_bits_twice():
    inputs = draw((300, 64), 48, torch.bfloat16)
    for function, _ in CALLS.values():
        assert all(torch.equal(one, other) for one, other in zip(run(function, inputs), run(function, inputs)))


def test_small_outputs_are_pytorchs(launches, monkeypatch):
    monkeypatch.setattr(importlib.import_module("xdscale.kernels.linear"), "FEWEST_ELEMENTS", 3 * 7 * 40)
    for rows, found in ((20, []), (21, ["column_sums_kernel"] * 2)):
        out = linear(*(tensor.requires_grad_() for tensor in draw((rows, 48), 40, torch.float32)[:3]))
        assert isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction) == bool(found)
        out.sum().backward()
        assert launches == found


def test_strided_inputs():
    inputs = draw((19, 96), 24, torch.float32)
    views = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs]
    for function, _ in CALLS.values():
        for found, expected in zip(run(function, views), run(function, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)  # the library's products differ


def test_gelu_is_right_to_the_last_places_of_fp32():
    """Also far to the left, where 1 + erf would have lost all places."""
    states = torch.linspace(-12, 12, 4001, device=DEVICE)
    wide = states.double().requires_grad_()
    expected = 0.5 * wide * torch.erfc(-wide * math.sqrt(0.5))
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    expected = expected.detach()
    hidden, gradient = activated_linear_triton.backward(torch.ones_like(states), states, quick=False)
    error = (hidden.double() - expected).abs()
    assert float(error.max()) <= 12 * 2.0**-24
    assert float((error / expected.abs().clamp_min(1e-30)).max()) <= 1e-5
    assert float((gradient.double() - slope).abs().max()) <= 5e-7


def test_gelu_far_from_zero_is_the_identity_or_nothing():
    states = torch.tensor([-60000.0, -100.0, 0.0, 100.0, 60000.0], device=DEVICE, dtype=torch.float16)
    for quick in (False, True):
        hidden, gradient = activated_linear_triton.backward(torch.ones_like(states), states, quick=quick)
        assert hidden.tolist() == [0.0, 0.0, 0.0, 100.0, 60000.0]
        assert gradient.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@contextlib.contextmanager
def guards():
    """NaN before and after what `guarded` copies; a mark before and after every tensor that is made meanwhile."""
    made = []

    def guarded(shape, dtype, mark):
        count = torch.Size(shape).numel()
        buffer = torch.full((2 * CANARIES + count,), mark, dtype=dtype, device=DEVICE)
        made.append((buffer, mark))
        return buffer[CANARIES : CANARIES + count].view(shape)

    original = torch.Tensor.new_empty  # the interpreter uses it too, without a dtype

    def new_empty(tensor, shape, **options):
        return guarded(shape, options["dtype"], 12345.0) if "dtype" in options else original(tensor, shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda like: guarded(like.shape, like.dtype, 12345.0))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield lambda tensor: guarded(tensor.shape, tensor.dtype, math.nan).copy_(tensor), made
    for buffer, mark in made:
        edges = torch.cat((buffer[:CANARIES], buffer[-CANARIES:]))
        assert edges.isnan().all() if math.isnan(mark) else (edges == mark).all()


@pytest.mark.parametrize("shape", [(37, 40), (3, 257), (16, 256)])
def test_sums_read_and_write_nothing_outside_the_buffers(shape):
    values = draw(shape, 1, torch.float32)[0]
    expected = linear_triton.column_sums(values, torch.float32)
    with guards() as (padded, made):
        assert torch.equal(linear_triton.column_sums(padded(values), torch.float32), expected)
    assert len(made) == 3  # the input, partial sums and sums


@pytest.mark.parametrize("elements", [2045, 2048, 4103])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
def test_gelu_reads_and_writes_nothing_outside_the_buffers(elements, quick, states_dtype):
    states = draw((elements,), 1, states_dtype)[0]
    grad = draw((elements + 1,), 1, torch.float32)[0][1:].clone()
    expected = activated_linear_triton.backward(grad.clone(), states, quick=quick)
    with guards() as (padded, made):
        given = padded(grad)
        found = activated_linear_triton.backward(given, padded(states), quick=quick)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (found[1].dtype, found[1] is given) == (states_dtype, states_dtype == torch.float32)  # in its place
    assert len(made) == (3 if states_dtype == torch.float32 else 4)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_true_shape(call):
    """A text of 512 tokens, the second half of BERT-base's feed-forward."""
    assert_as_plain(call, draw((512, 3072), 768, torch.bfloat16))
