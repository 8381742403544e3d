"""On the meta device every operation takes a GPU's way without launches, and `FlopCounterMode` sees its products."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from xdscale.kernels import (
    activated_linear,
    causal_attention,
    gpu,
    linear,
    masked_token_loss,
    packed_attention,
    plain_activated_linear,
    plain_causal_attention,
    plain_linear,
    plain_masked_token_loss,
    plain_packed_attention,
    plain_pre_norm,
    plain_quick_gelu,
    plain_residual_norm,
    pre_norm,
    quick_gelu,
    residual_norm,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
META = torch.device("meta")
LAUNCHERS = (
    "activated_linear_triton",
    "attention_launch",
    "linear_triton",
    "masked_token_loss_triton",
    "quick_gelu_triton",
    "residual_norm_triton",
)


def offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def leaves(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def attend(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (21, 3, 16), (9, 3, 16), (9, 3, 16))
    bounds = offsets([20, 1], device), offsets([4, 5], device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return [packed_attention(*inputs, *bounds, max_seqlen_q=20, max_seqlen_k=5, dropout=0.1, seed=seed), *inputs]


def attend_causally(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    (projected,) = leaves(device, dtype, (5, 7, 3, 2, 16))
    return [causal_attention(projected), projected]


def lose(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (70, 16), (3000, 16), (3000,))
    return [masked_token_loss(*inputs, torch.zeros(70, dtype=torch.int64, device=device))[0], *inputs]


def activate(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    (states,) = leaves(device, dtype, (5, 7, 16))
    return [quick_gelu(states), states]


def normalise(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (9, 48), (9, 48), (48,), (48,))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return [residual_norm(*inputs, eps=1e-5, dropout=0.1, seed=seed), *inputs]


def pre_normalise(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (9, 48), (9, 48), (48,), (48,))
    return [torch.cat(pre_norm(*inputs, eps=1e-5)), *inputs]


def feed_forward(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (5, 7, 16), (4, 16), (4,))
    return [activated_linear(*inputs, F.gelu), *inputs]


def quick_feed_forward(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (5, 7, 16), (4, 16), (4,))
    return [activated_linear(*inputs, quick_gelu), *inputs]


def project(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(device, dtype, (5, 7, 16), (4, 16), (4,))
    return [linear(*inputs), *inputs]


def kept_and_returned(call: Callable, device: torch.device, dtype: torch.dtype) -> list[tuple]:
    """What the backward pass keeps, the output and the gradients: shapes, strides and dtypes."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        out, *inputs = call(device, dtype)
    found += [out, *torch.autograd.grad(out.sum(), inputs)]
    assert {tensor.device for tensor in found} == {device}
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "call",
    [attend, attend_causally, lose, activate, normalise, pre_normalise, feed_forward, quick_feed_forward, project],
)
def test_it_keeps_and_returns_what_a_gpu_does(call: Callable, dtype: torch.dtype, monkeypatch) -> None:
    """On the CPU the Triton kernels' own way is forced, with launches that do nothing."""
    monkeypatch.setattr(importlib.import_module("xdscale.kernels.linear"), "FEWEST_ELEMENTS", 0)
    found = kept_and_returned(call, META, dtype)
    monkeypatch.setattr(gpu, "FORCE_TRITON", True)
    for name in LAUNCHERS:
        monkeypatch.setattr(f"xdscale.kernels.{name}.launch", lambda *arguments, **options: None)
    assert found == kept_and_returned(call, torch.device("cpu"), dtype)


def flops(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> tuple[int, int]:
    """What PyTorch counts of the forward pass, and of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        out = call(*inputs)
        forward = counter.get_total_flops()
        torch.autograd.grad(out.sum(), inputs)
    return forward, counter.get_total_flops()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), min_size=1, max_size=40),
    heads=st.integers(1, 20),
    size=st.sampled_from([1, 24, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.1]),
)
def test_attention_counts_every_pair_of_a_sample(
    lengths: list[tuple[int, int]], heads: int, size: int, dtype: torch.dtype, dropout: float
) -> None:
    """As many as the definition, which reads the offsets too."""
    sides = [[query for query, _ in lengths], [key for _, key in lengths]]
    bounds = [offsets(side, torch.device("cpu")) for side in sides]
    longest = {"max_seqlen_q": max(sides[0]), "max_seqlen_k": max(sides[1])}
    seed = torch.zeros(1, dtype=torch.int64, device="meta") if dropout else None
    inputs = leaves(META, dtype, *((sum(side), heads, size) for side in (sides[0], sides[1], sides[1])))
    found = flops(lambda *q: packed_attention(*q, *bounds, **longest, dropout=dropout, seed=seed), inputs)
    assert found == flops(lambda *q: plain_packed_attention(*q, *bounds), inputs)


@pytest.mark.parametrize(("samples", "queries", "keys"), [(32, 512, 512), (7, 512, 77), (1, 1, 3)])
def test_offsets_without_values_stand_for_equal_lengths(samples: int, queries: int, keys: int) -> None:
    inputs = leaves(META, torch.bfloat16, *((samples * length, 12, 64) for length in (queries, keys, keys)))
    bounds = [offsets([length] * samples, torch.device("cpu")) for length in (queries, keys)]
    options = {"max_seqlen_q": queries, "max_seqlen_k": keys}
    found = flops(lambda *q: packed_attention(*q, *(b.to(META) for b in bounds), **options), inputs)
    assert found == flops(lambda *q: plain_packed_attention(*q, *bounds), inputs)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 77), st.just(3), st.integers(1, 12), st.sampled_from([8, 64])),
    dtype=st.sampled_from(DTYPES),
)
def test_causal_attention_counts_as_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = leaves(META, dtype, shape)
    assert flops(causal_attention, inputs) == flops(plain_causal_attention, inputs)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5000),
    vocabulary=st.sampled_from([100, 30522, 49408]),
    size=st.sampled_from([24, 768]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_loss_counts_as_its_definition(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> None:
    inputs = leaves(META, dtype, (rows, size), (vocabulary, size), (vocabulary,))
    labels = torch.zeros(rows, dtype=torch.int64, device="meta")
    expected = flops(lambda *q: plain_masked_token_loss(*q, labels)[0], inputs)
    assert flops(lambda *q: masked_token_loss(*q, labels)[0], inputs) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_operations_count_as_their_definitions(dtype: torch.dtype) -> None:
    wide = leaves(META, dtype, (50, 30, 96), (24, 96), (24,))
    expected = flops(lambda *q: plain_activated_linear(*q, F.gelu), wide)
    assert flops(lambda *q: activated_linear(*q, F.gelu), wide) == expected
    assert expected == (2 * 1500 * 96 * 24, 6 * 1500 * 96 * 24)
    assert flops(linear, wide) == flops(plain_linear, wide) == expected
    rows = leaves(META, dtype, (50, 96), (50, 96), (96,), (96,))
    for call, inputs in (
        (quick_gelu, wide[:1]),
        (plain_quick_gelu, wide[:1]),
        (lambda *q: residual_norm(*q, eps=1e-5), rows),
        (lambda *q: plain_residual_norm(*q, eps=1e-5), rows),
        (lambda *q: torch.cat(pre_norm(*q, eps=1e-5)), rows),
        (lambda *q: torch.cat(plain_pre_norm(*q, eps=1e-5)), rows),
    ):
        assert flops(call, inputs) == (0, 0)
