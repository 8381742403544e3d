"""The Triton kernels of `pre_norm` against the plain definition in fp64.

Run by `test_triton_kernels.py` in a process of its own: on a GPU natively, elsewhere in Triton's
interpreter, which must be chosen before any kernel is decorated.
"""

import importlib
import math

import pytest
import torch
import triton

operation = importlib.import_module("xdscale.kernels.pre_norm")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5
CANARIES = 4096


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    assert triton.knobs.runtime.interpret or DEVICE == "cuda"
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)


def draw(tokens, size, dtype, residual_dtype=None):
    """States, residual, weight, bias; and the gradients of sum and norm."""
    generator = torch.Generator().manual_seed(tokens * 7919 + size)
    wide = residual_dtype or dtype
    shapes = ((tokens, size), dtype), ((tokens, size), wide), ((size,), wide), ((size,), wide)
    shapes += ((tokens, size), wide), ((tokens, size), wide)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in shapes)
    return [value.to(DEVICE, kind) for value, (_, kind) in zip(values, shapes)]


def run(function, inputs, adds=True, used=(0, 1)):
    """Sum and norm, and the gradients of the leaves where so many of both are used."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    states, residual, weight, bias = leaves
    found = function(states, residual if adds else None, weight, bias, eps=EPS)
    if not adds:
        del leaves[1]
    given = [[values[place] for place in used] for values in (found, inputs[4:])]
    gradients = torch.autograd.grad(given[0], leaves, given[1], allow_unused=True)
    return [*(tensor.detach() for tensor in found), *gradients]


def assert_as_plain(inputs, adds=True, used=(0, 1)):
    found = run(operation.pre_norm, inputs, adds, used)
    expected = run(operation.plain_pre_norm, [tensor.double() for tensor in inputs], adds, used)
    dtypes = [inputs[1].dtype] * 2 + [tensor.dtype for place, tensor in enumerate(inputs[:4]) if adds or place != 1]
    for value, reference, dtype in zip(found, expected, dtypes, strict=True):
        assert value.dtype == dtype
        assert float((value.double() - reference).norm()) <= LIMITS[inputs[0].dtype] * float(reference.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("tokens", "size"), [(0, 48), (1, 48), (77, 512), (67, 33), (130, 200), (5, 1500)])
def test_equals_the_plain_definition(tokens, size, dtype, adds, monkeypatch):
    if size > 300 and dtype != torch.float32:  # fewer programs to interpret: partial sums are fp32 whatever the dtype
        monkeypatch.setattr("xdscale.kernels.residual_norm_triton.SUM_COLUMNS", 64)
    assert_as_plain(draw(tokens, size, dtype), adds)


@pytest.mark.parametrize("adds", [True, False])
def test_a_norm_whose_sum_is_not_used(adds):
    """The last one."""
    assert_as_plain(draw(33, 96, torch.float32), adds, used=(1,))


def test_a_residual_in_fp32_as_under_autocast():
    assert_as_plain(draw(33, 96, torch.bfloat16, torch.float32))


def test_a_sum_whose_norm_is_not_used():
    found = run(operation.pre_norm, inputs := draw(33, 96, torch.float32), used=(0,))
    assert torch.equal(found[2], inputs[4])
    assert torch.equal(found[3], inputs[4])
    assert not any(gradient.any() for gradient in found[4:])


@pytest.mark.parametrize("adds", [True, False])
def test_nothing_outside_the_buffers_is_read_or_written(adds, monkeypatch):
    """NaN before and after every input would spread; a mark before and after every output would change."""
    inputs = draw(37, 40, torch.float32)
    expected = run(operation.pre_norm, inputs, adds)
    guards = []

    def guarded(shape, dtype, mark):
        count = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        buffer = torch.full((2 * CANARIES + count,), mark, dtype=dtype, device=DEVICE)
        guards.append((buffer, mark))
        return buffer[CANARIES : CANARIES + count].view(shape)

    padded = [guarded(tensor.shape, tensor.dtype, math.nan).copy_(tensor) for tensor in inputs]
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype=None: guarded(like.shape, dtype or like.dtype, 12345.0))
    original = torch.Tensor.new_empty  # the interpreter uses it too, without a dtype

    def new_empty(tensor, shape, **options):
        return guarded(shape, options["dtype"], 12345.0) if "dtype" in options else original(tensor, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = run(operation.pre_norm, padded, adds)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Inputs; norm, mean, deviation and the sum; two partial sums; gradients of states, weight and bias.
    assert len(guards) == 6 + (4 if adds else 3) + 2 + 3
    for buffer, mark in guards:
        edges = torch.cat((buffer[:CANARIES], buffer[-CANARIES:]))
        assert edges.isnan().all() if math.isnan(mark) else (edges == mark).all()


def test_strided_inputs():
    inputs = draw(19, 96, torch.float32)
    views = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs]
    for found, expected in zip(*(run(operation.pre_norm, each) for each in (views, inputs))):
        assert torch.equal(found, expected)


def test_kept_for_the_backward_pass_are_the_sum_and_two_numbers_per_row():
    inputs = [tensor.requires_grad_() for tensor in draw(50, 96, torch.bfloat16)[:4]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        total, _ = operation.pre_norm(*inputs, eps=EPS)
    assert kept[0] is inputs[2]
    assert kept[1] is inputs[3]
    assert kept[2].data_ptr() == total.data_ptr()
    assert sum(tensor.nbytes for tensor in kept[3:]) == 50 * 2 * 4
