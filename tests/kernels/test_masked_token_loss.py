"""The chunked loss in PyTorch operations, against the plain definition in fp64 and PyTorch's own fused loss."""

import importlib
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xdscale.kernels.masked_token_loss import masked_token_loss, plain_masked_token_loss

operation = importlib.import_module("xdscale.kernels.masked_token_loss")

LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(n, size, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) * size**-0.5
    bias = torch.randn(vocabulary, generator=generator) / 2
    labels = torch.randint(vocabulary, (n,), generator=generator)
    labels[::2] = (hidden @ weight.T + bias).argmax(1)[::2]  # every other row is right
    return *(tensor.to(dtype) for tensor in (hidden, weight, bias)), labels


def run(function, hidden, weight, bias, labels):
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
    losses, correct = function(*inputs, labels)
    losses.backward(gradients(len(labels)).to(losses.dtype))
    return [losses.detach(), *(tensor.grad for tensor in inputs)], correct


def gradients(n):
    """Of the rows' losses: each another one, of both signs, so that a forgotten factor shows."""
    return torch.linspace(-1.75, 1.25, n + 1)[:n]


def in_fp64(hidden, weight, bias, labels):
    return run(plain_masked_token_loss, hidden.double(), weight.double(), bias.double(), labels)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_as_plain(*inputs):
    found, correct = run(masked_token_loss, *inputs)
    expected, expected_correct = in_fp64(*inputs)
    for value, reference, source in zip(found, expected, (None, *inputs)):
        assert relative_error(value, reference) <= LIMITS[inputs[0].dtype]
        assert value.dtype == (torch.float32 if source is None else source.dtype)
    assert correct.dtype == torch.bool
    if inputs[0].dtype == torch.float32:
        assert torch.equal(correct, expected_correct)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks even of a small vocabulary, the last of them shorter."""
    monkeypatch.setattr(operation, "CPU_CHUNK_COLUMNS", (64, 192))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("vocabulary", [17, 515, 2048, 2001])
@pytest.mark.parametrize("size", [32, 80, 128])
@pytest.mark.parametrize("n", [0, 1, 5, 40])
def test_equals_the_plain_definition(n, size, vocabulary, dtype):
    assert_as_plain(*draw(n, size, vocabulary, dtype))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 50),
    size=st.integers(1, 100),
    vocabulary=st.integers(1, 1500),
    chunk=st.integers(1, 600),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_chunk(n, size, vocabulary, chunk, dtype, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operation, "CPU_CHUNK_COLUMNS", (chunk, chunk))
        assert_as_plain(*draw(n, size, vocabulary, dtype, seed))


@pytest.mark.usefixtures("small_chunks")
def test_fp64_stays_fp64():
    inputs = draw(20, 32, 500, torch.float64)
    (found, _), (expected, _) = run(masked_token_loss, *inputs), in_fp64(*inputs)
    assert found[0].dtype == torch.float64
    assert max(relative_error(value, reference) for value, reference in zip(found, expected)) < 1e-13


@pytest.mark.parametrize("function", [plain_masked_token_loss, masked_token_loss])
def test_gradients_by_finite_differences(function, monkeypatch):
    monkeypatch.setattr(operation, "CPU_CHUNK_COLUMNS", (8, 8))
    hidden, weight, bias, labels = draw(4, 6, 19, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, labels)[0], inputs)


@pytest.mark.usefixtures("small_chunks")
def test_equals_the_loss_of_pytorch():
    """Its fused one, where there is one: from 2.14 on."""
    hidden, weight, bias, labels = draw(33, 64, 1000)

    def reference(hidden, weight, bias, labels):
        if hasattr(F, "linear_cross_entropy"):
            return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="none"), None
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none"), None

    found, expected = (run(each, hidden, weight, bias, labels)[0] for each in (masked_token_loss, reference))
    assert max(relative_error(value, other.double()) for value, other in zip(found, expected)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_labelled_position_gives_zero(dtype):
    """Every rank runs every head every step: gradients exist and are exactly 0."""
    found, correct = run(masked_token_loss, *draw(0, 32, 700, dtype))
    assert len(correct) == 0
    assert [value.shape for value in found] == [(0,), (0, 32), (700, 32), (700,)]
    assert not any(gradient.any() for gradient in found[1:])


@pytest.mark.usefixtures("small_chunks")
def test_among_equal_logits_the_lowest_id_is_the_prediction():
    hidden, weight, bias = torch.ones(4, 16), torch.zeros(700, 16), torch.zeros(700)
    bias[[130, 140, 650]] = 3.0  # two in one chunk, one in a later chunk
    assert masked_token_loss(hidden, weight, bias, torch.tensor([130, 130, 140, 650]))[1].sum() == 2


@pytest.mark.usefixtures("small_chunks")
def test_entries_switched_off_by_a_bias_of_minus_infinity():
    hidden, weight, bias, _ = draw(5, 32, 600)
    bias[:200] = bias[500:] = -torch.inf
    assert_as_plain(hidden, weight, bias, torch.arange(200, 205))


@pytest.mark.usefixtures("small_chunks")
def test_confident_rows_in_bf16():
    """Labels' logits near 18, where bf16 rounds to 1/8, against a rival of 18: they must not be rounded."""
    hidden, weight, bias, _ = draw(40, 64, 500)
    labels = torch.arange(40)
    weight[labels] = hidden * (18.19 / hidden.square().sum(1, keepdim=True))
    bias[499] = 18
    inputs = hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), labels
    expected, _ = in_fp64(*inputs)
    found, _ = run(masked_token_loss, *inputs)
    assert max(relative_error(value, reference) for value, reference in zip(found, expected)) <= 1e-2


@pytest.mark.usefixtures("small_chunks")
def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight, bias, labels = draw(9, 32, 300)
    assert_as_plain(hidden * 100, weight, bias, labels)


@pytest.mark.usefixtures("small_chunks")
def test_the_same_bits_twice():
    inputs = draw(40, 64, 515, torch.bfloat16)
    first, second = (run(masked_token_loss, *inputs)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.usefixtures("small_chunks")
def test_views_and_transposed_weights():
    hidden, weight, bias, labels = draw(20, 32, 500)
    around = torch.full((540, 80), torch.nan)
    around[7:507, 5:37] = weight
    assert_as_plain(hidden, around[7:507, 5:37], bias, labels)
    assert_as_plain(hidden.T.contiguous().T, weight.T.contiguous().T, bias, labels)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen):
    *inputs, labels = draw(7, 16, 90)
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number != frozen)
    masked_token_loss(*inputs, labels)[0].sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [number == frozen for number in range(3)]


@pytest.mark.usefixtures("small_chunks")
def test_autocast_keeps_fp32_gradients():
    inputs = draw(20, 64, 515)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = run(masked_token_loss, *inputs)
    expected, _ = in_fp64(*inputs)
    assert all(value.dtype == torch.float32 for value in found)
    errors = [relative_error(value, reference) for value, reference in zip(found, expected)]
    assert max(errors) <= 1e-2
    assert max(errors[1:]) > 1e-4  # it did multiply in bf16


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = draw(12, 32, 300)
    expected, _ = run(masked_token_loss, *inputs)
    found, _ = run(lambda *tensors: checkpoint(masked_token_loss, *tensors, use_reentrant=reentrant), *inputs)
    assert all(torch.equal(value, reference) for value, reference in zip(found, expected))


def test_a_parameter_emptied_between_forward_and_backward():
    """What ZeRO-3 does: the same parameter is freed after the forward and gathered again for the backward."""
    hidden, weight, bias, labels = draw(12, 32, 300)
    expected, _ = run(masked_token_loss, hidden, weight, bias, labels)
    parameter = torch.nn.Parameter(weight.clone())
    losses, _ = masked_token_loss(hidden, parameter, bias, labels)
    parameter.data = torch.empty(0)
    parameter.data = weight.clone()
    losses.backward(gradients(12))
    assert torch.equal(parameter.grad, expected[2])


def test_tied_weights_sum_their_gradients():
    _, weight, bias, labels = draw(12, 32, 300)
    grads = []
    for function in (masked_token_loss, plain_masked_token_loss):
        embedding = weight.double().requires_grad_()
        function(F.embedding(torch.arange(12), embedding), embedding, bias.double(), labels)[0].sum().backward()
        grads.append(embedding.grad)
    assert relative_error(*grads) < 1e-13


def test_a_compiled_caller_breaks_its_graph_here():
    inputs = draw(12, 32, 300)

    def step(hidden, weight, bias, labels):
        loss, correct = masked_token_loss(hidden * 2, weight, bias, labels)
        return loss * 3, correct

    expected, _ = run(step, *inputs)
    found, _ = run(torch.compile(step, backend="aot_eager"), *inputs)
    assert all(torch.equal(value, reference) for value, reference in zip(found, expected))


def bad(**changes):
    hidden, weight, bias, labels = draw(4, 8, 20)
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels} | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden": torch.zeros(4, 2, 8)}, ValueError, r"hidden has shape \[4, 2, 8\], expected \[n, h\]"),
        ({"weight": torch.zeros(20, 9)}, ValueError, r"weight has shape \[20, 9\], expected \[V, 8\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight has shape \[0, 8\]"),
        ({"bias": torch.zeros(21)}, ValueError, r"bias has shape \[21\], expected \[20\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels has shape \[5\], expected \[4\]"),
        (
            {"labels": torch.zeros(4, dtype=torch.int32)},
            TypeError,
            "labels has dtype torch.int32, expected torch.int64",
        ),
        ({"bias": torch.zeros(20).half()}, TypeError, "bias has dtype torch.float16, expected torch.float32"),
        ({"hidden": torch.zeros(4, 8).int()}, TypeError, "hidden has dtype torch.int32"),
        ({"weight": torch.zeros(20, 8, device="meta")}, ValueError, "weight is on meta, expected cpu"),
        ({"labels": torch.tensor([0, 1, 2, 20])}, ValueError, "labels go from 0 to 20, expected 0 to 19"),
        ({"labels": torch.tensor([0, 1, -100, 2])}, ValueError, "labels go from -100 to 2, expected 0 to 19"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, words):
    with pytest.raises(error, match=words):
        masked_token_loss(**bad(**changes))


def test_labels_are_looked_at_where_that_makes_no_gpu_wait():
    for labels in (torch.empty(0, dtype=torch.int64), torch.empty(3, dtype=torch.int64, device="meta")):
        operation._check_labels(labels, 5)
    operation._check_labels(torch.tensor([4, 0]), 5)


def peak_bytes(function, inputs, path):
    """Most bytes allocated at once by forward and backward, the gradient of the weight not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(function, *inputs)
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    allocated = peak = gradients = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        change = event["args"]["Bytes"]
        allocated += change
        gradients += (change == inputs[1].nbytes) - (change == -inputs[1].nbytes)
        peak = max(peak, allocated - min(gradients, 1) * inputs[1].nbytes)  # one gradient; copies of it count
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_a_twentieth_of_dense_cross_entropy(dtype, tmp_path):
    """At V = 49,408, the same 168 labelled rows, counted above inputs and gradient of the weight."""
    inputs = draw(168, 64, 49408, dtype)
    dense = peak_bytes(plain_masked_token_loss, inputs, tmp_path / "dense.json")
    chunked = peak_bytes(masked_token_loss, inputs, tmp_path / "chunked.json")
    assert dense > 2 * 168 * 49408 * 4  # the measure sees the logits and their gradient
    assert chunked <= dense / 20


def test_cpu_runs_do_not_load_the_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "xdscale.kernels.masked_token_loss_triton", None)  # importing it would raise
    run(masked_token_loss, *draw(3, 8, 20))


@pytest.mark.slow
def test_four_times_faster_than_projecting_all_positions():
    """15 % of 1,024 positions labelled, BERT's vocabulary, one thread; processor time, which a busy machine leaves."""
    inputs = draw(1024, 256, 30522)
    labelled = inputs[0][:154], inputs[1], inputs[2], inputs[3][:154]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(function, arguments):
        start = time.process_time()
        run(function, *arguments)
        return time.process_time() - start

    pairs = [(seconds(plain_masked_token_loss, inputs), seconds(masked_token_loss, labelled)) for _ in range(4)]
    torch.set_num_threads(threads)
    full, gathered = (min(times) for times in zip(*pairs))
    assert full >= 4 * gathered


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_are_as_precise_as_many(rows):
    """PyTorch's own fp32 product of one to three rows with 30,522 columns errs by 1e-6 to 5e-6."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 128, generator=generator)
    weight = torch.randn(30522, 128, generator=generator) * 0.1
    labels = torch.randint(30522, (rows,), generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        states = hidden.to(dtype).requires_grad_()
        losses, _ = masked_token_loss(states, weight.to(dtype), torch.zeros(30522, dtype=dtype), labels)
        found.append(torch.autograd.grad(losses.sum(), states)[0].double())
    assert (found[0] - found[1]).norm() <= 1e-6 * found[1].norm()
