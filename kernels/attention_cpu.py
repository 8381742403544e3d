"""Packed attention on the CPU: blocks of scores that stay in cache, in PyTorch operations.

Nothing of size [queries, keys] outlives a block: the backward pass recomputes the probabilities, which costs one
more product but saves writing and reading them through main memory. Dropout is a bitwise "and" of the scores'
own representation with 0 or -1, the cheapest way PyTorch has to zero selected elements.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from xdscale.kernels.dropout_mask import keep_rate
from xdscale.kernels.dropout_mask_cpu import Masks
from xdscale.kernels.packing import Packing

BLOCK_SCORES = 1 << 18
"""Most scores per block, unless a single row has more: what fits in a core's cache beside its mask. Half a head of
512 queries and 693 keys is one block."""


@dataclass(frozen=True)
class _Block:
    """Some heads and queries of one sample, against all of its keys."""

    sample: int
    heads: slice
    queries: slice  # tokens
    keys: slice  # tokens
    first_query: int  # within the sample
    last: bool  # of the sample's blocks with these heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, queries and keys of its scores."""
        return (
            self.heads.stop - self.heads.start,
            self.queries.stop - self.queries.start,
            self.keys.stop - self.keys.start,
        )

    def query_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.queries, self.heads].transpose(0, 1)  # [block heads, block queries, d]

    def key_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.keys, self.heads].transpose(0, 1)  # [block heads, keys, d]


class _Buffer:
    """Memory that is reused from block to block: fresh pages would cost more than the operations on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Returns an uninitialised contiguous tensor that is valid until the next call."""
        size = math.prod(shape)
        if size > len(self.memory):
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


class _KeySums:
    """Sums products over the blocks of queries that read the same keys."""

    def __init__(self, dtype: torch.dtype) -> None:
        # Sums over blocks run in fp32, as they do inside a product.
        self.product, self.wide = _Buffer(dtype), _Buffer(torch.float32)

    def add(self, block: _Block, scores: torch.Tensor, rows: torch.Tensor, factor: float, out: torch.Tensor) -> None:
        """Adds `factor * scores.T @ rows` per head; the last block's sum is written to its keys' rows of `out`."""
        shape = block.shape[0], block.shape[2], rows.shape[-1]
        total = _product(scores.transpose(1, 2), rows, factor, self.product(*shape))
        if not (block.last and block.first_query == 0):
            if block.first_query == 0:
                self.total = self.wide(*shape).zero_()
            total = self.total.add_(total)
        if block.last:
            block.key_rows(out).copy_(total)


class _Dropout:
    """Applies the masks of one call, block by block."""

    def __init__(self, packing: Packing, heads: int, dtype: torch.dtype) -> None:
        self.threshold = packing.threshold
        self.rescale = 1.0 / keep_rate(packing.threshold)
        if packing.threshold:
            self.masks = Masks(packing.seed, packing.samples, heads, packing.threshold)
            self.wide = _Buffer(torch.int32 if dtype.itemsize == 4 else torch.int16)

    def draw(self, block: _Block) -> None:
        """Fixes the bits for `apply_`: -1 where a score of the block stays and 0 where not, as wide as a score."""
        if self.threshold:
            kept = self.masks.keep(block.sample, block.heads, block.first_query, *block.shape[1:]).view(np.int8)
            np.negative(kept, out=kept)
            self.bits = self.wide(*block.shape).copy_(torch.from_numpy(kept)[:, :, : block.shape[2]])

    def apply_(self, scores: torch.Tensor) -> None:
        """Zeroes what the block's mask drops; the caller divides by the keep rate inside the next product."""
        if self.threshold:
            scores.view(self.bits.dtype).bitwise_and_(self.bits)


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> tuple[torch.Tensor]:
    """Returns the attended values [Tq, heads, d], and nothing to save; arguments as in `packed_attention`."""
    out = query.new_zeros(query.shape)
    dropout = _Dropout(packing, query.shape[1], query.dtype)
    scores, rows = _Buffer(query.dtype), _Buffer(query.dtype)
    for block in _blocks(packing, query.shape[1]):
        probabilities = _probabilities(block, query, key, scores(*block.shape))
        dropout.draw(block)
        dropout.apply_(probabilities)
        _to_queries(block, probabilities, block.key_rows(value), dropout.rescale, rows, out)
    return (out,)


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value; arguments as in `packed_attention`."""
    scale = query.shape[-1] ** -0.5
    grad_query, grad_key, grad_value = (tokens.new_zeros(tokens.shape) for tokens in (query, key, value))
    dropout = _Dropout(packing, query.shape[1], query.dtype)
    buffers, rows = (_Buffer(query.dtype), _Buffer(query.dtype)), _Buffer(query.dtype)
    sums = _KeySums(query.dtype), _KeySums(query.dtype)
    for block in _blocks(packing, query.shape[1]):
        grad_rows = block.query_rows(grad)
        probabilities = _probabilities(block, query, key, buffers[0](*block.shape))
        grad_scores = buffers[1](*block.shape)
        _product(grad_rows, block.key_rows(value).transpose(1, 2), dropout.rescale, grad_scores)
        dropout.draw(block)
        dropout.apply_(grad_scores)
        torch._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores)
        dropout.apply_(probabilities)
        sums[0].add(block, probabilities, grad_rows, dropout.rescale, grad_value)
        sums[1].add(block, grad_scores, block.query_rows(query), scale, grad_key)
        _to_queries(block, grad_scores, block.key_rows(key), scale, rows, grad_query)
    return grad_query, grad_key, grad_value


def attend_without_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> torch.Tensor:
    """Returns the attended values [Tq, heads, d] by PyTorch's attention, sample by sample; differentiable."""
    query_lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths))
    attended = [
        F.scaled_dot_product_attention(*(tokens.transpose(0, 1)[None] for tokens in sample))[0].transpose(0, 1)
        for sample in rows
    ]
    return torch.cat(attended)


def _blocks(packing: Packing, heads: int) -> Iterator[_Block]:
    """Cuts the batch into blocks: several heads of a short sample, or some of the queries of a long one."""
    query_bounds, key_bounds = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    for sample in range(packing.samples):
        start, stop = query_bounds[sample : sample + 2]
        keys = slice(*key_bounds[sample : sample + 2])
        scores = (stop - start) * (keys.stop - keys.start)
        if not scores:
            continue
        heads_step = max(1, BLOCK_SCORES // scores)
        parts = min(stop - start, -(-scores // BLOCK_SCORES))
        rows = -(-(stop - start) // parts)
        for head in range(0, heads, heads_step):
            for first in range(start, stop, rows):
                queries = slice(first, min(first + rows, stop))
                some_heads = slice(head, min(head + heads_step, heads))
                yield _Block(sample, some_heads, queries, keys, first - start, queries.stop == stop)


def _probabilities(block: _Block, query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    _product(block.query_rows(query), block.key_rows(key).transpose(1, 2), query.shape[-1] ** -0.5, out)
    return torch.softmax(out, -1, out=out)


def _product(left: torch.Tensor, right: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """Writes `factor * left @ right` per head to `out`; the factor is applied inside the product."""
    return torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)


def _to_queries(
    block: _Block, scores: torch.Tensor, rows: torch.Tensor, factor: float, buffer: _Buffer, out: torch.Tensor
) -> None:
    """Writes `factor * scores @ rows` per head to the rows of the block's queries in `out`."""
    queries = block.query_rows(out)
    if out.dtype.itemsize < 4:
        _product(scores, rows, factor, queries)
    else:  # into rows that do not lie one behind the other, PyTorch multiplies these head after head
        queries.copy_(_product(scores, rows, factor, buffer(*queries.shape)))
