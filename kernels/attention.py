"""Attention between packed tokens of samples of any length, with dropout on the weights, forward and backward.

The plain definition below is the reference. On the CPU `attention_cpu` computes the same in cache-sized blocks, on
GPUs `attention_launch` in the fused kernels of `attention_triton`; `_backend` chooses. All three drop the same
scores (`dropout_mask`).
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType

import torch
from torch.autograd.function import once_differentiable

from xdscale.kernels import attention_cpu
from xdscale.kernels.dropout_mask import check_dropout, drop_threshold, keep_mask, keep_rate
from xdscale.kernels.gpu import TRITON_DTYPES, autocast_dtype, runs_triton, without_autocast
from xdscale.kernels.packing import Packing

LARGEST_TRITON_HEAD = 128


@torch.compiler.disable
def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns dropout(softmax(Q Kᵀ / √d)) V for each head, samples apart (paper eq. 1; spec xdbert §2.3).

    The tokens of all samples stand in one row without padding: sample b owns the queries
    `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1`, and the keys likewise. Under autocast the inputs are
    cast as for PyTorch's own attention. With `torch.compile` the call is a graph break. On a GPU nothing
    waits for the device (fp64 apart), so it can be captured in a CUDA graph; there `cu_seqlens` is
    trusted, and tokens that pad a buffer of fixed size must belong to some sample, for instance a last one. On the
    meta device `cu_seqlens` may be on the CPU: then FLOPs are counted of the true lengths, else of equal ones.

    Args:
        query: [Tq, heads, d], fp16, bf16, fp32 or fp64.
        key: [Tk, heads, d].
        value: [Tk, heads, d].
        cu_seqlens_q: int32 [samples + 1], from 0 to Tq; at least one sample.
        cu_seqlens_k: int32 [samples + 1], from 0 to Tk.
        max_seqlen_q: at least the largest number of queries of a sample.
        max_seqlen_k: at least the largest number of keys of a sample.
        dropout: rate on the attention weights, rounded to 1 / 256; kept weights are divided by the
            share that is really kept. The caller passes 0 outside of training.
        seed: int64 [1] on the device of `query`, drawn anew by the caller for every call, so that
            checkpointed activations are recomputed with the same mask. Needed where `dropout` is not 0.

    Returns:
        [Tq, heads, d] in the dtype of the inputs; zeros for samples without keys.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or range.
    """
    narrow = autocast_dtype(query.device)
    if narrow and query.dtype != torch.float64:
        query, key, value = (tokens.to(narrow) for tokens in (query, key, value))
    _check_tokens(query, key, value)
    _check_packing(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_dropout(dropout, seed, query.device)
    threshold = drop_threshold(dropout)
    backend = _backend(query)
    with without_autocast(query.device):
        if backend is None:
            return plain_packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, dropout=dropout, seed=seed)
        if backend is attention_cpu and query.dtype == torch.float32 and not threshold:
            # PyTorch's own kernel is 1.2 times as fast here; in bf16 and with dropout it is the slower one.
            return attention_cpu.attend_without_dropout(query, key, value, cu_seqlens_q, cu_seqlens_k)
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, threshold, seed)
        return _PackedAttention.apply(query, key, value, packing, backend)


def plain_packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `packed_attention`, sample by sample; differentiable by PyTorch itself.

    Scores, softmax and sums are fp32, or fp64 for fp64 inputs. What the longest samples are is not asked.
    """
    threshold = drop_threshold(dropout)
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, outputs = query.shape[1], []
    bounds = zip(_bounds(cu_seqlens_q, len(query)), _bounds(cu_seqlens_k, len(key)))
    for sample, (queries, keys) in enumerate((slice(*rows), slice(*columns)) for rows, columns in bounds):
        rows = query[queries].to(wide).transpose(0, 1)  # [heads, queries, d]
        scores = rows @ key[keys].to(wide).permute(1, 2, 0) * query.shape[-1] ** -0.5  # [heads, queries, keys]
        weights = scores.softmax(-1)
        if threshold:
            weights = weights * keep_mask(seed, sample, heads, *weights.shape[1:], threshold) / keep_rate(threshold)
        attended = weights @ value[keys].to(wide).transpose(0, 1)  # [heads, queries, d]; an empty sum without keys
        outputs.append(attended.transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


def _bounds(cu_seqlens: torch.Tensor, tokens: int) -> Iterable[tuple[int, int]]:
    """Returns where each sample begins and ends; without values, on the meta device, all are equally long."""
    samples = len(cu_seqlens) - 1
    ends = [tokens * sample // samples for sample in range(samples + 1)] if cu_seqlens.is_meta else cu_seqlens.tolist()
    return itertools.pairwise(ends)


class _PackedAttention(torch.autograd.Function):
    """Saves inputs, and what the backend returns besides the output; recomputes the weights in the backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packing: Packing,
        backend: ModuleType,
    ) -> torch.Tensor:
        out, *saved = backend.forward(query, key, value, packing)
        # Saved rather than kept on ctx, so that PyTorch notices a seed that is overwritten before the backward.
        ctx.save_for_backward(query, key, value, packing.cu_seqlens_q, packing.cu_seqlens_k, packing.seed, *saved)
        ctx.packing, ctx.backend = packing, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
        query, key, value, cu_seqlens_q, cu_seqlens_k, seed, *saved = ctx.saved_tensors
        packing = replace(ctx.packing, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seed=seed)
        with without_autocast(query.device):
            return *ctx.backend.backward(grad, query, key, value, packing, *saved), None, None


def _backend(query: torch.Tensor) -> ModuleType | None:
    """Returns what computes this call: None for the plain definition."""
    if runs_triton(query.device, query.dtype) and query.shape[-1] <= LARGEST_TRITON_HEAD:
        from xdscale.kernels import attention_launch  # kernels are decorated only where they can run

        return attention_launch
    return attention_cpu if query.device.type == "cpu" and query.dtype in TRITON_DTYPES else None


def _check_tokens(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if not query.is_floating_point():
        raise TypeError(f"query must be fp16, bf16, fp32 or fp64, not {query.dtype}")
    if query.ndim != 3:
        raise ValueError(f"query must have the shape [tokens, heads, d], not {list(query.shape)}")
    for name, tokens in (("key", key), ("value", value)):
        if tokens.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} like query, not {tokens.dtype}")
        if tokens.ndim != 3 or tokens.shape[1:] != query.shape[1:]:
            expected = f"[tokens, {query.shape[1]}, {query.shape[2]}] like query"
            raise ValueError(f"{name} must have the shape {expected}, not {list(tokens.shape)}")
        if tokens.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, not on {tokens.device}")
    if len(value) != len(key):
        raise ValueError(f"value must have {len(key)} tokens like key, not {len(value)}")


def _check_packing(
    query: torch.Tensor,
    key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    for side, tokens, cu_seqlens, longest in (
        ("q", query, cu_seqlens_q, max_seqlen_q),
        ("k", key, cu_seqlens_k, max_seqlen_k),
    ):
        name = f"cu_seqlens_{side}"
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, not {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or len(cu_seqlens) != len(cu_seqlens_q):
            expected = "[samples + 1], at least 2 and the same for both"
            raise ValueError(f"{name} must have the shape {expected}, not {list(cu_seqlens.shape)}")
        if cu_seqlens.device != query.device and not query.is_meta:
            raise ValueError(f"{name} must be on {query.device} like query, not on {cu_seqlens.device}")
        if cu_seqlens.device.type != "cpu":
            continue  # reading the values would wait for the device
        bounds = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:])]
        if bounds[0] != 0 or bounds[-1] != len(tokens) or min(lengths, default=0) < 0:
            raise ValueError(f"{name} must rise from 0 to its {len(tokens)} tokens, not be {bounds}")
        if longest < max(lengths, default=0):
            raise ValueError(f"max_seqlen_{side} must be at least the longest sequence, {max(lengths)}, not {longest}")
