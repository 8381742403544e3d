"""Packed attention: the plain definition against the formula, the CPU path against the plain definition in fp64."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from xdscale.kernels import attention_cpu
from xdscale.kernels.attention import (
    packed_attention,
    plain_packed_attention,
)
from xdscale.kernels.attention_launch import compile_cases
from xdscale.kernels.dropout_mask import drop_threshold, keep_mask

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RAGGED = [[40, 17, 0, 5, 1], [50, 70, 3, 0, 1]]
"""Not multiples of 16; no query; no key; a single token."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(lengths: list[list[int]], heads: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * size + sum(map(sum, lengths)))
    tokens = [sum(side) for side in lengths]
    rows = {"query": tokens[0], "key": tokens[1], "value": tokens[1], "grad": tokens[0]}
    return {
        name: torch.randn(count, heads, size, dtype=torch.float64, generator=generator).to(dtype)
        for name, count in rows.items()
    }


def packing(lengths: list[list[int]]) -> dict[str, object]:
    return {
        "cu_seqlens_q": offsets(lengths[0]),
        "cu_seqlens_k": offsets(lengths[1]),
        "max_seqlen_q": max(lengths[0], default=0),
        "max_seqlen_k": max(lengths[1], default=0),
    }


def with_gradients(call: Callable, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [tensors[name].detach().requires_grad_() for name in ("query", "key", "value")]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors["grad"])]


def relative_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(found, expected, strict=True)]


def reference(
    tensors: dict[str, torch.Tensor], lengths: list[list[int]], dropout: float, seed: torch.Tensor
) -> list[torch.Tensor]:
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    bounds = offsets(lengths[0]), offsets(lengths[1])
    return with_gradients(lambda q, k, v: plain_packed_attention(q, k, v, *bounds, dropout=dropout, seed=seed), wide)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_plain_definition_is_the_formula(dropout: float) -> None:
    """Each row from scalars: exp, sums and the documented mask, nothing batched."""
    lengths, seed = [[3, 2], [4, 5]], torch.tensor([5])
    tensors = draw(lengths, 2, 8, torch.float64)
    threshold = drop_threshold(dropout)
    bounds = offsets(lengths[0]), offsets(lengths[1])
    inputs = (tensors[name] for name in ("query", "key", "value"))
    out = plain_packed_attention(*inputs, *bounds, dropout=dropout, seed=seed)
    for sample, (first_query, first_key) in enumerate([(0, 0), (3, 4)]):
        mask = keep_mask(seed, sample, 2, lengths[0][sample], lengths[1][sample], threshold)
        for head in range(2):
            for query in range(lengths[0][sample]):
                row = tensors["query"][first_query + query, head]
                keys = range(lengths[1][sample])
                powers = [math.exp(row @ tensors["key"][first_key + key, head] / math.sqrt(8)) for key in keys]
                share = 1 - threshold / 256
                weights = [
                    power / sum(powers) * bool(mask[head, query, key]) / share for key, power in enumerate(powers)
                ]
                expected = sum(w * tensors["value"][first_key + key, head] for key, w in enumerate(weights))
                assert torch.allclose(out[first_query + query, head], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_the_plain_definition_by_finite_differences(dropout: float) -> None:
    lengths, seed = [[3, 1, 0, 2], [4, 2, 3, 0]], torch.tensor([5])
    tensors = draw(lengths, 2, 4, torch.float64)
    leaves = [tensors[name].requires_grad_() for name in ("query", "key", "value")]

    def call(*inputs: torch.Tensor) -> torch.Tensor:  # fp64 takes the plain definition
        return packed_attention(*inputs, **packing(lengths), dropout=dropout, seed=seed)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("block_scores", [attention_cpu.BLOCK_SCORES, 20_000, 700, 30])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_path_against_fp64(
    dtype: torch.dtype, dropout: float, block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the scores are cut into blocks, mask and result are those of the plain definition."""
    monkeypatch.setattr(attention_cpu, "BLOCK_SCORES", block_scores)
    tensors, seed = draw(RAGGED, 3, 32, dtype), torch.tensor([-(2**62) + 11])
    found = with_gradients(
        lambda q, k, v: packed_attention(q, k, v, **packing(RAGGED), dropout=dropout, seed=seed), tensors
    )
    assert all(result.dtype == dtype for result in found)
    errors = relative_errors(found, reference(tensors, RAGGED, dropout, seed))
    assert max(errors) <= TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 8, 24, 64]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_against_fp64(
    lengths: list[tuple[int, int]], heads: int, size: int, dropout: float, seed: int
) -> None:
    sides = [[query for query, _ in lengths], [key for _, key in lengths]]
    tensors, drawn = draw(sides, heads, size, torch.float32), torch.tensor([seed])
    found = with_gradients(
        lambda q, k, v: packed_attention(q, k, v, **packing(sides), dropout=dropout, seed=drawn), tensors
    )
    expected = reference(tensors, sides, dropout, drawn)
    for a, b in zip(found, expected, strict=True):
        # Absolute beside relative: the softmax over a single key has the gradient 0, up to rounding.
        assert float((a.double() - b).norm()) <= 2e-6 * (float(b.norm()) + math.sqrt(b.numel()))


def test_samples_without_keys_or_queries_give_zeros() -> None:
    tensors = draw(RAGGED, 2, 16, torch.float32)
    out, grad_query, grad_key, grad_value = with_gradients(
        lambda q, k, v: packed_attention(q, k, v, **packing(RAGGED)), tensors
    )
    for rows in (out[57:62], grad_query[57:62], grad_key[120:123], grad_value[120:123]):
        assert torch.equal(rows, torch.zeros_like(rows))
    assert out[62].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_do_not_see_each_other(dtype: torch.dtype) -> None:
    """PyTorch's own attention, one sample at a time, with keys far outside of the sample's values around it."""
    tensors = draw(RAGGED, 2, 64, dtype)
    out = packed_attention(tensors["query"], tensors["key"], tensors["value"], **packing(RAGGED))
    rows = [tensors[name].double().transpose(0, 1) for name in ("query", "key", "value")]
    alone = F.scaled_dot_product_attention(rows[0][:, 40:57], rows[1][:, 50:120], rows[2][:, 50:120])
    assert relative_errors([out[40:57]], [alone.transpose(0, 1)])[0] <= TOLERANCE[dtype]
    tensors["key"][:50], tensors["value"][:50] = 1e4, 1e4
    again = packed_attention(tensors["query"], tensors["key"], tensors["value"], **packing(RAGGED))
    assert torch.equal(again[40:], out[40:])


def test_strided_views_of_one_projection() -> None:
    """Self-attention from one tensor [tokens, 3, heads, d]."""
    lengths = [[20, 31], [20, 31]]
    joint = torch.randn(51, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    found = packed_attention(*joint.unbind(1), **packing(lengths))
    assert torch.equal(found, packed_attention(*(part.contiguous() for part in joint.unbind(1)), **packing(lengths)))


def test_kept_weights_are_divided_by_the_share_really_kept() -> None:
    """With values of 1 the output is the kept share of a row over the keep rate: 1 on average, not 1.0016."""
    count, heads = 512, 4
    tokens = torch.zeros(count, heads, 16)
    out = packed_attention(
        tokens, tokens, torch.ones_like(tokens), **packing([[count], [count]]), dropout=0.1, seed=torch.tensor([1])
    )
    sigma = math.sqrt(26 / 256 / (230 / 256) / (count * count * heads))
    assert abs(float(out.double().mean()) - 1) < 4 * sigma
    assert 4 * sigma < 1 - (230 / 256) / 0.9  # finer than the error it looks for


def test_seeds_decide_the_mask() -> None:
    tensors = draw(RAGGED, 2, 16, torch.float32)
    inputs = [tensors[name] for name in ("query", "key", "value")]
    outs = [packed_attention(*inputs, **packing(RAGGED), dropout=0.5, seed=torch.tensor([s])) for s in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_autocast_casts_as_for_pytorchs_attention() -> None:
    tensors = draw(RAGGED, 2, 16, torch.float32)
    inputs = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(*inputs, **packing(RAGGED))
    narrow = packed_attention(*(tokens.bfloat16() for tokens in inputs), **packing(RAGGED))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, narrow)
    out.backward(tensors["grad"].bfloat16())
    assert inputs[0].grad.dtype == torch.float32


def test_checkpointed_activations_are_recomputed_with_the_same_mask() -> None:
    tensors = draw(RAGGED, 2, 16, torch.float32)

    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        seed = torch.randint(2**62, (1,))
        return packed_attention(*inputs, **packing(RAGGED), dropout=0.3, seed=seed)

    torch.manual_seed(3)
    plain = with_gradients(layer, tensors)
    torch.manual_seed(3)
    again = with_gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_inside_a_compiled_function() -> None:
    """The call is a graph break; what surrounds it is compiled."""
    tensors = draw(RAGGED, 2, 16, torch.float32)

    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        out = packed_attention(inputs[0] * 2, *inputs[1:], **packing(RAGGED), dropout=0.3, seed=torch.tensor([8]))
        return out + inputs[0]

    plain, compiled = (with_gradients(call, tensors) for call in (layer, torch.compile(layer, backend="aot_eager")))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_compile_cases_name_every_argument_once() -> None:
    cases = compile_cases()
    assert len({(case.name, case.target) for case in cases}) == len(cases)
    assert {case.target for case in cases} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
        assert case.lower_bound_bytes < case.bytes_moved <= 1.1 * case.lower_bound_bytes


def test_kernels_take_heads_of_up_to_128_and_cpus_the_rest(monkeypatch) -> None:
    monkeypatch.setattr("xdscale.kernels.gpu.FORCE_TRITON", True)
    backend = importlib.import_module("xdscale.kernels.attention")._backend
    found = [backend(torch.zeros(1, 1, size)).__name__.rpartition("_")[2] for size in (1, 128, 129)]
    assert found == ["launch", "launch", "cpu"]
    assert backend(torch.zeros(1, 1, 8, dtype=torch.float64)) is None


def test_a_seed_overwritten_before_the_backward_is_noticed() -> None:
    tensors, seed = draw(RAGGED, 2, 16, torch.float32), torch.tensor([1])
    inputs = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    out = packed_attention(*inputs, **packing(RAGGED), dropout=0.3, seed=seed)
    seed.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory_does_not_grow_with_queries_times_keys() -> None:
    """What the graph keeps is the inputs: 2,048 x 2,048 scores of 2 heads would be 32 MiB."""
    kept = []
    tensors = draw([[2048], [2048]], 2, 16, torch.float32)
    inputs = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        packed_attention(*inputs, **packing([[2048], [2048]]), dropout=0.1, seed=torch.tensor([1]))
    assert sum(kept) < 1.01 * sum(tokens.nbytes for tokens in inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(4, 2, 8, dtype=torch.int64)}, TypeError, "query must be fp16, bf16, fp32 or fp64"),
        ({"query": torch.zeros(4, 16)}, ValueError, r"query must have the shape \[tokens, heads, d\], not \[4, 16\]"),
        ({"key": torch.zeros(5, 2, 8).half()}, TypeError, "key must be torch.float32 like query, not torch.float16"),
        ({"key": torch.zeros(5, 2, 9)}, ValueError, r"key must have the shape \[tokens, 2, 8\]"),
        ({"value": torch.zeros(6, 2, 8)}, ValueError, "value must have 5 tokens like key, not 6"),
        ({"value": torch.zeros(5, 2, 8, device="meta")}, ValueError, "value must be on cpu like query, not on meta"),
        ({"cu_seqlens_k": offsets([5]).to("meta")}, ValueError, "cu_seqlens_k must be on cpu like query, not on meta"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, TypeError, "cu_seqlens_q must be int32, not torch.int64"),
        ({"cu_seqlens_k": offsets([2, 3])}, ValueError, r"cu_seqlens_k must have the shape \[samples \+ 1\]"),
        ({"cu_seqlens_k": offsets([6])}, ValueError, "cu_seqlens_k must rise from 0 to its 5 tokens"),
        ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q must be at least the longest sequence, 4, not 3"),
        ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k must be at least the longest sequence, 5, not 4"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": 0.1}, ValueError, "seed must be an int64 tensor of shape"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed must be int64, not torch.float32"),
        ({"seed": torch.tensor(1)}, ValueError, r"seed must have the shape \[1\]"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"query": torch.zeros(4, 2, 8), "key": torch.zeros(5, 2, 8), "value": torch.zeros(5, 2, 8)}
    arguments |= packing([[4], [5]])
    with pytest.raises(error, match=message):
        packed_attention(**(arguments | changes))
