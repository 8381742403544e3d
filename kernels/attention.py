"""Attention between two sequences, with padding and dropout: the plain PyTorch definition."""

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Returns softmax(Q Kᵀ / √d) V for each head (paper eq. 1; spec xdbert §2.3).

    Args:
        query: [batch, heads, q, d].
        key: [batch, heads, k, d].
        value: [batch, heads, k, d].
        key_mask: bool [batch, k], True for keys that may be attended to; None for all. A sample without
            a single valid key gets zeros.
        dropout: rate on the attention weights; the caller passes 0 outside of training.

    Returns:
        [batch, heads, q, d], in the dtype of `query`.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the weights that `attention` gives to its values, for attention maps.

    Args:
        query: [batch, heads, q, d].
        key: [batch, heads, k, d].
        key_mask: bool [batch, k], True for keys that may be attended to; None for all.

    Returns:
        [batch, heads, q, k], in fp32 or wider; rows sum to 1, or to 0 for a sample without a valid key.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * query.shape[-1] ** -0.5
    if key_mask is None:
        return scores.softmax(-1)
    valid = key_mask[:, None, None, :]
    # The lowest finite score instead of -inf: a row without valid keys stays finite and is zeroed below.
    return scores.masked_fill(~valid, torch.finfo(wide).min).softmax(-1) * valid
