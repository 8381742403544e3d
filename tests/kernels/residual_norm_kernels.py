"""The Triton kernels of `residual_norm` against the plain definition in fp64.

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

from xdscale.kernels import residual_norm_triton as kernels
from xdscale.kernels.dropout_mask import drop_threshold

operation = importlib.import_module("xdscale.kernels.residual_norm")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-12
SEED = -987654321987
CANARIES = 4096


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    assert triton.knobs.runtime.interpret or DEVICE == "cuda"
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)


def seed_tensor(value=SEED):
    return torch.tensor([value], device=DEVICE)


def draw(tokens, size, dtype, parameter_dtype=None, residual_dtype=None):
    """States, residual, weight, bias and the output's gradient; rows with a mean of their own."""
    generator = torch.Generator().manual_seed(tokens * 7919 + size)
    rows = [torch.randn(tokens, size, generator=generator, dtype=torch.float64) for _ in range(3)]
    rows[1] += torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, size, generator=generator, dtype=torch.float64)
    parameter_dtype, residual_dtype = parameter_dtype or dtype, residual_dtype or dtype
    dtypes = dtype, residual_dtype, parameter_dtype, parameter_dtype, dtype
    tensors = rows[0], rows[1], weight, bias, rows[2]
    return [tensor.to(DEVICE, kind) for tensor, kind in zip(tensors, dtypes)]


def run(function, inputs, dropout, seed):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    out = function(*leaves, eps=EPS, dropout=dropout, seed=seed if dropout else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[4])]


def assert_as_plain(inputs, dropout, seed=None, absolute=0.0):
    seed = seed_tensor() if seed is None else seed
    found = run(operation.residual_norm, inputs, dropout, seed)
    expected = run(operation.plain_residual_norm, [tensor.double() for tensor in inputs], dropout, seed)
    for value, reference, like in zip(found, expected, [inputs[0], *inputs[:4]], strict=True):
        assert value.dtype == like.dtype
        bound = float(reference.norm()) + absolute * math.sqrt(reference.numel())
        assert float((value.double() - reference).norm()) <= LIMITS[inputs[0].dtype] * bound


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("tokens", "size"), [(0, 48), (1, 48), (1, 768), (77, 512), (67, 33), (9, 1024), (130, 200)])
def test_equals_the_plain_definition(tokens, size, dtype, dropout, monkeypatch):
    if size > 300 and dtype != torch.float32:  # fewer programs to interpret: partial sums are fp32 whatever the dtype
        monkeypatch.setattr(kernels, "SUM_COLUMNS", 64)
    assert_as_plain(draw(tokens, size, dtype), dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_fp32_parameters_and_residual_as_under_autocast(dropout, residual_dtype):
    assert_as_plain(draw(33, 96, torch.bfloat16, torch.float32, residual_dtype), dropout)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 90),
    size=st.integers(8, 300),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape(tokens, size, dropout, seed):
    # Absolute beside relative: the gradients of a single row may nearly cancel.
    assert_as_plain(draw(tokens, size, torch.float32), dropout, seed_tensor(seed), absolute=1.0)


@pytest.mark.parametrize(("tile", "threshold"), [((64, 1, 1, 1), 64), ((512, 4, 3, 40), 1), ((4096, 4, 2, 2), 255)])
def test_mask_on_every_path_and_tile_is_the_same_bits(tile, threshold):
    """The kept sum shows the mask in the forward pass, zeros among gradients in the backward pass."""
    tile = kernels.NormTile(*tile)
    states, _, weight, bias, grad = draw(45, 60, torch.float32)
    kept = operation.rows_kept(seed_tensor(), 45, 60, threshold)
    inputs = states, torch.zeros_like(states), weight, bias, seed_tensor(), EPS, threshold
    _, total, *rows = kernels.forward(*inputs, tile=tile)
    assert torch.equal(total != 0, kept)
    inputs = grad, weight, bias, seed_tensor(), threshold, torch.float32, total, *rows
    gradients = kernels.backward(*inputs, tile=tile)
    assert torch.equal(gradients[0] != 0, kept)
    assert (gradients[1] != 0).all()


def test_rows_beyond_one_stream():
    """Counters have 16 bits for rows: the next 65,536 rows belong to another stream."""
    tokens, threshold = operation.STREAM_ROWS + 300, drop_threshold(0.5)
    states = torch.ones(tokens, 16, device=DEVICE)
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    inputs = states, torch.zeros_like(states), weight, bias, seed_tensor(), EPS, threshold
    total = kernels.forward(*inputs, tile=kernels.NormTile(16384, 16))[1]  # of 1,024 rows: few programs to interpret
    assert torch.equal(total != 0, operation.rows_kept(seed_tensor(), tokens, 16, threshold))
    assert not torch.equal(total[:300], total[-300:])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_nothing_outside_the_buffers_is_read_or_written(dropout, monkeypatch):
    """NaN before and after every input would spread; a mark before and after every output would change."""
    inputs = draw(37, 40, torch.float32)
    expected = run(operation.residual_norm, inputs, dropout, seed_tensor())
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
    found = run(operation.residual_norm, padded, dropout, seed_tensor())
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Inputs; output, sum, mean, deviation; two partial sums; gradients, those of the states with dropout.
    assert len(guards) == 5 + 4 + 2 + (4 if dropout else 3)
    for buffer, mark in guards:
        edges = torch.cat((buffer[:CANARIES], buffer[-CANARIES:]))
        assert edges.isnan().all() if math.isnan(mark) else (edges == mark).all()


def test_the_same_bits_twice():
    inputs = draw(300, 64, torch.bfloat16)
    first, second = (run(operation.residual_norm, inputs, 0.1, seed_tensor()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_strided_inputs():
    inputs = draw(19, 96, torch.float32)
    views = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs]
    for found, expected in zip(*(run(operation.residual_norm, each, 0.1, seed_tensor()) for each in (views, inputs))):
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_shape(dtype):
    """A text of 512 tokens, BERT-base."""
    assert_as_plain(draw(512, 768, dtype), 0.1)
