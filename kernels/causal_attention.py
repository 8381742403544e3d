"""Causal self-attention of many short blocks of equal length: CLIP's text tower, 77 tokens each, without dropout."""

import torch
import torch.nn.functional as F

from xdscale.kernels.attention import packed_attention


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns softmax(Q Kᵀ / √d) V, where no token reads a later one.

    PyTorch's own attention where it is fast. On the CPU it takes a slow path below fp32: 30 ms against 8 ms by the
    definition for 16 blocks of 77 tokens with 8 heads of 64, forward and backward; scores of that size stay in cache.

    Args:
        query: [blocks, heads, length, d].
        key: as `query`.
        value: as `query`.

    Returns:
        [blocks, heads, length, d].
    """
    if query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16):
        return plain_causal_attention(query, key, value)
    if query.is_meta:
        # PyTorch would take its definition there. This keeps and counts what a GPU's fused attention does.
        blocks, _, length, _ = query.shape
        bounds = torch.arange(blocks + 1, dtype=torch.int32, device="meta") * length
        rows = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        attended = packed_attention(*rows, bounds, bounds, max_seqlen_q=length, max_seqlen_k=length)
        return attended.unflatten(0, (blocks, length)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def plain_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition of `causal_attention`."""
    length = query.shape[2]
    hidden = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    rows, columns, values = (states.flatten(0, 1) for states in (query, key, value))  # [blocks * heads, length, d]
    scores = torch.baddbmm(hidden, rows, columns.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, query.shape[:2])
