"""`residual_norm` as every machine computes it, against PyTorch's own LayerNorm in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xdscale.kernels.dropout_mask import drop_threshold
from xdscale.kernels.residual_norm import (
    BLOCK_STATES,
    STREAM_ROWS,
    _blocks,
    norm_runs_triton,
    plain_residual_norm,
    residual_norm,
    rows_kept,
)

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-12
SEED = torch.tensor([1234567890123])


def draw(tokens, size, dtype, parameter_dtype=None, residual_dtype=None):
    """States, residual, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(tokens * 7919 + size)
    shapes = (tokens, size), (tokens, size), (size,), (size,), (tokens, size)
    dtypes = dtype, residual_dtype or dtype, parameter_dtype or dtype, parameter_dtype or dtype, dtype
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [value.to(kind) for value, kind in zip(values, dtypes)]


def run(function, inputs, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[4])]


def torch_norm(states, residual, weight, bias, dropout):
    """The three operations of PyTorch, on the mask as data: dropout divides by the share that is really kept."""
    kept = 256 - round(dropout * 256)
    mask = rows_kept(SEED, *states.shape, 256 - kept) if dropout else torch.ones_like(states)
    return F.layer_norm(residual + states * mask * (256 / kept), weight.shape, weight, bias, EPS)


def assert_as_torch(function, inputs, dropout):
    found = run(function, inputs, eps=EPS, dropout=dropout, seed=SEED)
    expected = run(torch_norm, [tensor.double() for tensor in inputs], dropout=dropout)
    for value, reference, like in zip(found, expected, [inputs[0], *inputs[:4]], strict=True):
        assert value.dtype == like.dtype
        assert float((value.double() - reference).norm()) <= LIMITS[inputs[0].dtype] * float(reference.norm())


@pytest.mark.parametrize("function", [residual_norm, plain_residual_norm])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("tokens", "size"), [(0, 48), (1, 48), (1, 768), (77, 512), (67, 33), (3, 5000)])
def test_equals_pytorch(function, tokens, size, dtype, dropout):
    assert_as_torch(function, draw(tokens, size, dtype), dropout)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 90), size=st.integers(8, 300), dropout=st.sampled_from([0.0, 0.1, 0.5]))
def test_any_shape(tokens, size, dropout):
    inputs = draw(tokens, size, torch.float32)
    found = run(residual_norm, inputs, eps=EPS, dropout=dropout, seed=SEED)
    expected = run(torch_norm, [tensor.double() for tensor in inputs], dropout=dropout)
    for value, reference in zip(found, expected):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_the_definition_by_finite_differences(dropout):
    inputs = [tensor.requires_grad_() for tensor in draw(4, 9, torch.float64)[:4]]
    options = {"eps": 1e-6, "dropout": dropout, "seed": SEED}
    assert torch.autograd.gradcheck(lambda *leaves: plain_residual_norm(*leaves, **options), inputs)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_the_result_is_what_the_next_product_takes(plain, residual_dtype):
    """PyTorch's own would be fp32; gradients keep their tensor's dtype, sums are fp32."""
    inputs = draw(40, 96, torch.bfloat16, torch.float32, residual_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_torch(plain_residual_norm if plain else residual_norm, inputs, 0.25)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_share_that_is_dropped(dropout):
    """Within five standard deviations over 2 million elements, in all and for each column."""
    threshold, tokens, size = drop_threshold(dropout), 4096, 512
    kept = rows_kept(SEED, tokens, size, threshold).double()
    rate = 1 - threshold / 256
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - rate) < 5 * deviation / (tokens * size) ** 0.5
    assert (kept.mean(0) - rate).abs().max() < 5 * deviation / tokens**0.5
    assert (kept.mean(1) - rate).abs().max() < 5 * deviation / size**0.5


def test_masks_of_other_rows_and_seeds_are_independent():
    """Shares in which both keep: of neighbours, of rows one stream apart, of two seeds."""
    mask = rows_kept(SEED, STREAM_ROWS + 4096, 64, 128)
    other = rows_kept(SEED + 1, 4096, 64, 128)
    first, beyond = mask[:4096], mask[STREAM_ROWS:]
    pairs = [(first, beyond), (first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    for one, two in pairs:
        assert abs((one & two).double().mean() - 0.25) < 5 * (3 / 16 / one.numel()) ** 0.5


def test_the_mean_over_masks_is_the_input():
    """Kept states are divided by the share that is kept, here 205 / 256 for 0.2."""
    states = torch.ones(1, 64, dtype=torch.float64)
    masks = torch.stack([rows_kept(torch.tensor([seed]), 1, 64, drop_threshold(0.2)) for seed in range(800)])
    assert masks.double().mean() * (256 / 205) == pytest.approx(float(states.mean()), abs=5e-3 * 3)


def test_states_that_were_dropped_have_no_gradient():
    inputs = draw(50, 96, torch.float32)
    gradients = run(residual_norm, inputs, eps=EPS, dropout=0.25, seed=SEED)
    assert torch.equal(gradients[1] != 0, rows_kept(SEED, 50, 96, 64))
    assert (gradients[2] != 0).all()


def test_recomputed_activations_use_the_same_mask():
    """Activation checkpointing restores the generator that the caller draws the seed from."""
    inputs = draw(20, 48, torch.float32)

    def with_seed(*leaves):
        return residual_norm(*leaves, eps=EPS, dropout=0.5, seed=torch.randint(2**62, (1,)))

    torch.manual_seed(3)
    expected = run(with_seed, inputs)
    torch.manual_seed(3)
    found = run(lambda *leaves: checkpoint(with_seed, *leaves, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_only_wanted_gradients_are_returned():
    states, residual, weight, bias, grad = draw(5, 16, torch.float32)
    out = residual_norm(states.requires_grad_(), residual, weight, bias.requires_grad_(), eps=EPS)
    out.backward(grad)
    assert states.grad is not None
    assert bias.grad is not None
    assert residual.grad is None
    assert weight.grad is None


def test_kept_for_the_backward_pass_are_the_sum_and_two_numbers_per_row():
    """Parameters are kept as they are, which ZeRO-3 needs; no mask is."""
    inputs = [tensor.requires_grad_() for tensor in draw(50, 96, torch.bfloat16)[:4]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        residual_norm(*inputs, eps=EPS, dropout=0.1, seed=SEED)
    assert kept[0] is inputs[2]
    assert kept[1] is inputs[3]
    assert sum(tensor.nbytes for tensor in kept[2:]) == 8 + 50 * 96 * 2 + 50 * 2 * 4


@pytest.mark.parametrize(
    ("name", "wrong", "error", "expected"),
    [
        ("states", torch.zeros(4, 16, dtype=torch.int64), TypeError, "fp16, bf16, fp32 or fp64"),
        ("states", torch.zeros(2, 4, 16), ValueError, r"\[tokens, size\]"),
        ("states", torch.zeros(4, 0), ValueError, "size > 0"),
        ("residual", torch.zeros(5, 16), ValueError, r"\[4, 16\]"),
        ("residual", torch.zeros(4, 16, dtype=torch.float16), TypeError, "float32"),
        ("residual", torch.zeros(4, 16, device="meta"), ValueError, "cpu"),
        ("weight", torch.zeros(15), ValueError, r"\[16\]"),
        ("weight", torch.zeros(16, dtype=torch.float64), TypeError, "float32"),
        ("bias", torch.zeros(16, 1), ValueError, r"\[16\]"),
        ("bias", torch.zeros(16, dtype=torch.int32), TypeError, "float32"),
        ("eps", -1.0, ValueError, "at least 0"),
        ("dropout", 1.0, ValueError, "below 1"),
        ("dropout", 0.1, ValueError, "seed"),
        ("seed", torch.zeros(1), TypeError, "int64"),
        ("seed", torch.zeros(2, dtype=torch.int64), ValueError, r"\[1\]"),
    ],
)
def test_wrong_arguments_are_named(name, wrong, error, expected):
    fitting = dict(zip(("states", "residual", "weight", "bias"), draw(4, 16, torch.float32)))
    with pytest.raises(error, match=expected) as raised:
        residual_norm(**({**fitting, "eps": EPS} | {name: wrong}))
    assert name in str(raised.value)


def test_kernels_take_rows_of_up_to_4096_states(monkeypatch):
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)
    assert [norm_runs_triton(torch.zeros(1, size)) for size in (1, 4096, 4097)] == [True, True, False]


def test_eps_may_be_0():
    states, residual, weight, bias, _ = draw(3, 8, torch.float64)
    found = residual_norm(states, residual, weight, bias, eps=0.0)
    torch.testing.assert_close(found, F.layer_norm(states + residual, (8,), weight, bias, eps=0.0))


def test_a_bias_in_another_dtype_than_the_weight_is_named():
    states, residual, weight, bias, _ = draw(4, 16, torch.bfloat16)
    with pytest.raises(TypeError, match="bias must be torch.float32 like weight, not torch.bfloat16"):
        residual_norm(states, residual, weight.float(), bias, eps=EPS)


def test_compiled_models_break_the_graph_here():
    """The operation runs as it is, between two graphs."""
    states, residual, weight, bias, _ = draw(8, 16, torch.float32)
    explained = torch._dynamo.explain(lambda x: residual_norm(x * 2, residual, weight, bias, eps=EPS) + 1)(states)
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2


def test_rows_beyond_one_stream_have_the_mask_of_the_next_one():
    """Counters have 16 bits for rows."""
    inputs = draw(STREAM_ROWS + 300, 8, torch.float32)
    kept = rows_kept(SEED, STREAM_ROWS + 300, 8, 128)
    for function in (residual_norm, plain_residual_norm):
        _, of_states, of_residual, *_ = run(function, inputs, eps=EPS, dropout=0.5, seed=SEED)
        assert torch.equal(of_states != 0, kept)
        torch.testing.assert_close(of_states, 2 * of_residual * kept)


@pytest.mark.parametrize("size", [1, 16, 768, 5000, 2 * BLOCK_STATES])
def test_rows_are_computed_in_pieces_that_a_cache_holds(size):
    """Each of a power of two of rows, as many as fit, one at least; together all rows in their order."""
    tokens = 200_000 if size < BLOCK_STATES else 50
    pieces = [rows for rows, kept in _blocks(None, torch.Size((tokens, size)), 0, torch.float32)]
    assert [rows.start for rows in pieces[1:]] == [rows.stop for rows in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, tokens)
    most = pieces[0].stop
    assert STREAM_ROWS % most == 0
    assert most == 1 or most * size <= BLOCK_STATES
    assert most == STREAM_ROWS or 2 * most * size > BLOCK_STATES
