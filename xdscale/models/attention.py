"""Attention of the models through the packed kernels: for our own layers, and for the encoders of transformers."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from xdscale.kernels.attention import packed_attention, packed_attention_plain
from xdscale.kernels.dropout_mask import drop_threshold
from xdscale.models.packed_tokens import PackedTokens, packed_by_lengths, packed_evenly, unpack

FUSED, PLAIN = "xdscale_fused", "xdscale_plain"
"""Names under which transformers knows the kernels and their definition."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: PackedTokens,
    keys: PackedTokens,
    *,
    dropout: float,
    plain: bool,
) -> torch.Tensor:
    """Attends within each sample, with fresh dropout on the weights.

    Args:
        query: [q tokens, heads, d].
        key: [k tokens, heads, d].
        value: [k tokens, heads, d].
        queries: how those of `query` are packed.
        keys: how those of `key` and `value` are packed.
        dropout: rate on the attention weights; 0 outside of training.
        plain: by the definition instead of the kernels; both draw the same mask.

    Returns:
        [q tokens, heads, d].
    """
    # Drawn per call: recomputed activations restore the generator and so draw the same mask again.
    seed = torch.randint(2**62, (1,), device=query.device) if dropout else None
    bounds = queries.cu_seqlens, keys.cu_seqlens
    if plain:
        return packed_attention_plain(query, key, value, *bounds, drop_threshold(dropout), seed)
    longest = {"max_query": queries.max_seqlen, "max_key": keys.max_seqlen}
    return packed_attention(query, key, value, *bounds, **longest, dropout=dropout, seed=seed)


def use_packed_attention(encoder: PreTrainedModel, *, plain: bool) -> None:
    """Lets an encoder of transformers attend through the packed kernels, at any place in its life.

    PyTorch's own attention takes its slow path with dropout and keeps the whole matrix of weights for the backward
    pass; here nothing of that size is kept, and padding is not computed.

    Args:
        encoder: BERT, ELECTRA or any other that takes its attention from transformers' registry.
        plain: by the definition instead of the kernels.
    """
    encoder.set_attn_implementation(PLAIN if plain else FUSED)


def recompute_layers(encoder: PreTrainedModel) -> None:
    """Makes an encoder of transformers recompute each layer in the backward pass; 5.17 has the older name alone."""
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def valid_tokens(mask: torch.Tensor, positions: torch.Tensor) -> tuple[PackedTokens, torch.Tensor]:
    """Returns what an encoder after `use_packed_attention` takes as `valid`, beside the mask itself.

    Args:
        mask: bool [batch, length].
        positions: int64 [tokens], where it is True: flat index into batch * length, ascending.

    Returns:
        How the valid tokens are packed, and `positions`.
    """
    return packed_by_lengths(mask.sum(1), mask.shape[1]), positions


def _self_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plain: bool,
    dropout: float = 0.0,
    valid: tuple[PackedTokens, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: [batch, heads, length, d] three times to [batch, length, heads, d].

    `valid` is what the caller of the encoder knows of `attention_mask` (see `valid_tokens`), handed on by transformers
    as any keyword that it does not know. Without it every layer waits for a GPU to look at the mask.
    """
    batch, _heads, length, _size = query.shape
    rows = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [batch * length, heads, d]
    if attention_mask is None:
        packed = packed_evenly(batch, length, query.device)
        return attend(*rows, packed, packed, dropout=dropout, plain=plain).unflatten(0, (batch, length)), None
    packed, positions = valid or valid_tokens(attention_mask, attention_mask.flatten().nonzero().squeeze(1))
    tokens = (states.index_select(0, positions) for states in rows)
    attended = attend(*tokens, packed, packed, dropout=dropout, plain=plain).flatten(1)  # [tokens, heads * d]
    return unpack(attended, positions, (batch, length)).unflatten(-1, rows[0].shape[1:]), None


def _unchanged(*, attention_mask: torch.Tensor | None, **_: Any) -> torch.Tensor | None:
    """What transformers calls once per forward pass, to prepare the mask for all layers."""
    return attention_mask


for _name, _plain in ((FUSED, False), (PLAIN, True)):
    AttentionInterface.register(_name, partial(_self_attention, plain=_plain))
    AttentionMaskInterface.register(_name, _unchanged)
