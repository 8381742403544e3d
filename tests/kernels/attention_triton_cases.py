"""Packed attention's Triton kernels against the plain definition in fp64; test_triton_kernels.py runs this."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.kernels import attention, attention_cpu, attention_launch, causal_attention, gpu, plain_causal_attention
from xdscale.kernels.attention_launch import Tile
from xdscale.kernels.causal_attention import _CausalAttention
from xdscale.kernels.dropout_mask import drop_threshold, keep_mask
from xdscale.kernels.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RAGGED = [[40, 17, 0, 5, 1], [50, 70, 3, 0, 1]]
CANARIES = 4096


def packing(lengths: list[list[int]], dropout: float = 0.0, seed: int = -987654321987) -> Packing:
    bounds = [torch.tensor([0, *side]).cumsum(0).to(torch.int32).to(DEVICE) for side in lengths]
    drawn = torch.tensor([seed], device=DEVICE)
    return Packing(*bounds, max(lengths[0]), max(lengths[1]), drop_threshold(dropout), drawn)


def draw(lengths: list[list[int]], heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient."""
    generator = torch.Generator().manual_seed(heads * size + sum(map(sum, lengths)))
    tokens = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1]), sum(lengths[0])]
    rows = [torch.randn(count, heads, size, dtype=torch.float64, generator=generator) for count in tokens]
    return [row.to(DEVICE, dtype) for row in rows]


def fused(inputs: list[torch.Tensor], packed: Packing, tile: Tile | None = None) -> list[torch.Tensor]:
    out, *saved = attention_launch.forward(*inputs[:3], packed, tile=tile)
    return [out, *attention_launch.backward(inputs[3], *inputs[:3], packed, *saved, tile=tile)]


def reference(inputs: list[torch.Tensor], packed: Packing) -> list[torch.Tensor]:
    leaves = [tokens.double().requires_grad_() for tokens in inputs[:3]]
    bounds = packed.cu_seqlens_q, packed.cu_seqlens_k
    out = attention.plain_packed_attention(*leaves, *bounds, dropout=packed.threshold / 256, seed=packed.seed)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]


def relative_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_batch(dtype: torch.dtype, dropout: float) -> None:
    inputs, packed = draw(RAGGED, 2, 32, dtype), packing(RAGGED, dropout)
    assert max(relative_errors(fused(inputs, packed), reference(inputs, packed))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("blocks", "length", "heads", "size"), [(3, 77, 2, 16), (2, 1, 1, 64), (1, 130, 1, 24)])
def test_causal_blocks_of_one_projection(blocks: int, length: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """Against the definition in fp64: tokens lie a projection apart, and so do their gradients."""
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(blocks, length, 4, heads, size, dtype=torch.float64, generator=generator).to(DEVICE, dtype)
    projected, grad = drawn[:, :, :3].contiguous(), drawn[:, :, 3]
    outputs, gradients = [], []
    for function, states in ((_CausalAttention.apply, projected), (plain_causal_attention, projected.double())):
        leaf = states.requires_grad_()
        out = function(leaf)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out, leaf, grad.to(leaf.dtype))[0].unbind(2))
    for found, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1])):
        # A token that reads itself alone has queries and keys without a gradient, up to rounding.
        assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm().clamp_min(1.0))


@pytest.mark.parametrize("shape", [(0, 77, 3, 2, 16), (4, 0, 3, 2, 16), (0, 0, 3, 2, 16)])
def test_no_causal_block_and_none_of_a_token(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FORCE_TRITON", True)
    projected = torch.zeros(shape, device=DEVICE, requires_grad=True)
    found = causal_attention(projected)
    found.sum().backward()
    assert (found.shape, projected.grad.shape) == ((*shape[:2], *shape[3:]), shape)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), Tile(32, 32, 2, 1)])
def test_no_tile_reads_later_tokens(tile: Tile) -> None:
    lengths = [[77, 0, 33], [77, 0, 33]]
    inputs, packed = draw(lengths, 1, 16, torch.float32), replace(packing(lengths), causal=True)
    expected = [plain_by_mask(inputs, lengths[0]), fused(inputs, packed, tile)]
    assert max(relative_errors(expected[1], expected[0])) <= 2e-6


def plain_by_mask(inputs: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """PyTorch's attention with the mask spelt out, over all tokens at once, and the gradients."""
    leaves = [tokens.double().requires_grad_() for tokens in inputs[:3]]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    mask = (sample[:, None] == sample) & torch.ones(len(sample), len(sample), dtype=torch.bool, device=DEVICE).tril()
    rows = (tokens.transpose(0, 1) for tokens in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]


@pytest.mark.parametrize("size", [16, 24, 64, 128])
def test_head_sizes(size: int) -> None:
    lengths = [[33], [45]]
    inputs, packed = draw(lengths, 1, size, torch.float32), packing(lengths, 0.1)
    assert max(relative_errors(fused(inputs, packed), reference(inputs, packed))) <= 2e-6


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_lengths(lengths: list[tuple[int, int]], heads: int, dropout: float, seed: int) -> None:
    sides = [[query for query, _ in lengths], [key for _, key in lengths]]
    inputs, packed = draw(sides, heads, 16, torch.float32), packing(sides, dropout, seed)
    for a, b in zip(fused(inputs, packed), reference(inputs, packed), strict=True):
        # Absolute beside relative: the softmax over a single key has the gradient 0, up to rounding.
        assert float((a.double() - b).norm()) <= 2e-6 * (float(b.norm()) + math.sqrt(b.numel()))


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), Tile(32, 64, 2, 1)])
def test_mask_on_every_path_and_tile_is_the_same_bits(tile: Tile) -> None:
    """Equal scores and values that are unit vectors show the mask itself: out[q, k] = keep[q, k] / keys / rate."""
    queries, keys, threshold = 45, 64, drop_threshold(0.25)
    lengths = [[3, queries], [2, keys]]
    zeros = torch.zeros(3 + queries, 2, 64, device=DEVICE)
    unit = torch.zeros(2 + keys, 2, 64, device=DEVICE)
    unit[2:] = torch.eye(keys, device=DEVICE)[:, None]
    packed = packing(lengths, 0.25)
    expected = keep_mask(packed.seed, 1, 2, queries, keys, threshold).transpose(0, 1)
    out, *saved = attention_launch.forward(zeros, torch.zeros_like(unit), unit, packed, tile=tile)
    assert torch.equal(out[3:] != 0, expected)
    # Backward: with unit gradients too, row k of the value's gradient shows the mask's column.
    unit_grad = torch.zeros_like(zeros)
    unit_grad[3:] = torch.eye(keys, device=DEVICE)[:queries, None]
    grads = attention_launch.backward(unit_grad, zeros, torch.zeros_like(unit), unit, packed, *saved, tile=tile)
    assert torch.equal(grads[2][2:, :, :queries] != 0, expected.permute(2, 1, 0))
    on_cpu = [tokens.cpu() for tokens in (zeros, torch.zeros_like(unit), unit)]
    bounds = packed.cu_seqlens_q.cpu(), packed.cu_seqlens_k.cpu()
    plain = Packing(*bounds, queries, keys, threshold, packed.seed.cpu())
    assert torch.equal(attention_cpu.forward(*on_cpu, plain)[0][3:] != 0, expected.cpu())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_nothing_outside_the_buffers_is_read_or_written(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN before and after every input would spread; a mark before and after every output would change."""
    inputs, packed = draw(RAGGED, 2, 24, torch.float32), packing(RAGGED, dropout)
    expected = fused(inputs, packed)

    def guarded(shape: torch.Size, dtype: torch.dtype, mark: float) -> torch.Tensor:
        buffer = torch.full((2 * CANARIES + shape.numel(),), mark, dtype=dtype, device=DEVICE)
        guards.append((buffer, mark))
        return buffer[CANARIES : CANARIES + shape.numel()].view(shape)

    guards: list[tuple[torch.Tensor, float]] = []
    padded = [guarded(tokens.shape, tokens.dtype, math.nan).copy_(tokens) for tokens in inputs]
    monkeypatch.setattr(torch, "empty_like", lambda like: guarded(like.shape, like.dtype, 12345.0))
    original = torch.Tensor.new_empty  # the interpreter uses it too, without a dtype

    def new_empty(tensor: torch.Tensor, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        if "dtype" in options:
            return guarded(torch.Size(shape), options["dtype"], 12345.0)
        return original(tensor, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = fused(padded, packed)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(guards) == 4 + 6  # output, log-sum-exp, row sums, three gradients
    for buffer, mark in guards:
        edges = torch.cat((buffer[:CANARIES], buffer[-CANARIES:]))
        assert edges.isnan().all() if math.isnan(mark) else (edges == mark).all()


def test_the_public_call_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd, with dropout, as on a GPU."""
    monkeypatch.setattr(attention, "_backend", lambda query: attention_launch)
    inputs, packed = draw(RAGGED, 2, 16, torch.float32), packing(RAGGED, 0.5)
    leaves = [tokens.requires_grad_() for tokens in inputs[:3]]
    sizes = {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": packed.max_seqlen_k}
    bounds = packed.cu_seqlens_q, packed.cu_seqlens_k
    out = attention.packed_attention(*leaves, *bounds, **sizes, dropout=0.5, seed=packed.seed)
    found = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    assert max(relative_errors(found, reference(inputs, packed))) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.bfloat16, 0.0)])
def test_true_shape(dtype: torch.dtype, dropout: float) -> None:
    """A language text of 512 tokens over 9 CLIP blocks of 77."""
    lengths = [[512], [693]]
    inputs, packed = draw(lengths, 1, 64, dtype), packing(lengths, dropout)
    assert max(relative_errors(fused(inputs, packed), reference(inputs, packed))) <= TOLERANCE[dtype]
