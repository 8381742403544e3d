"""What encoders of text and image regions in one stream share: BERT's layers on packed tokens of both."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from xdscale.models.cross_modal import AttentionSublayer, FeedForward
from xdscale.models.operations import activation_of
from xdscale.models.packed_tokens import PackedTokens, chosen_tokens

Batch = Mapping[str, torch.Tensor | int]


class PackedStates(NamedTuple):
    """What tasks and objectives read.

    Attributes:
        states: [tokens, H], packed, sample by sample; or those that were selected.
        pooled: [b, H], of the first token of each sample; None of a model without a pooler.
        cu_seqlens: int32 [b + 1]; sample i owns the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1` of the row.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None
    cu_seqlens: torch.Tensor


class SelfAttentionLayer(nn.Module):
    """A layer of BERT on packed tokens: self-attention and feed-forward."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Builds it with the sizes, the activation and the dropout of a configuration."""
        super().__init__()
        size, dropout, eps = config.hidden_size, config.hidden_dropout_prob, config.layer_norm_eps
        self.attention = AttentionSublayer(size, size, config.num_attention_heads, dropout, eps=eps)
        activation = activation_of(ACT2FN[config.hidden_act])
        self.feed_forward = FeedForward(size, config.intermediate_size, dropout, activation=activation, eps=eps)

    def forward(
        self, states: torch.Tensor, packed: PackedTokens, selected: tuple[torch.Tensor, PackedTokens] | None = None
    ) -> torch.Tensor:
        """Lets the tokens of each sample read each other.

        Args:
            states: [tokens, H].
            packed: which of them belong to which sample.
            selected: the only tokens whose new states are needed: int64 [n], ascending, and how they are packed.

        Returns:
            The new states, of all tokens or of the selected ones.
        """
        queries, queries_packed = states, packed
        if selected is not None:
            rows, queries_packed = selected
            queries = states.index_select(0, rows)
        return self.feed_forward(self.attention(queries, states, queries_packed, packed))


BERT_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}
"""Names in a layer, and those that BERT has, as published and in transformers."""


def encode_packed(
    layers: Sequence[SelfAttentionLayer],
    states: torch.Tensor,
    packed: PackedTokens,
    selected: torch.Tensor | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Runs layers one after the other.

    Args:
        layers: one or more.
        states: [tokens, H].
        packed: which of them belong to which sample.
        selected: int64 [n], places in the row, in any order: the only ones for which the last layer is computed. A
            place may be asked for twice where it is the first token of its sample.
        recompute: whether each layer is computed again in the backward pass.

    Returns:
        The new states, of all tokens, or of the selected ones in their order.
    """
    if selected is None:
        return _run(layers, states, packed, None, recompute)
    rows, order = selected.sort()
    chosen = chosen_tokens(rows, packed)
    chosen = PackedTokens(chosen.cu_seqlens, chosen.max_seqlen + 1)  # a first token may be among the others too
    states = _run(layers, states, packed, (rows, chosen), recompute)
    # sorted[k] = wanted[order[k]]: back into the order that was asked for
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return states.index_select(0, place)


def encode_and_pool(
    layers: Sequence[SelfAttentionLayer],
    states: torch.Tensor,
    batch: Batch,
    selected: torch.Tensor | None,
    pooler: nn.Linear | None,
    *,
    recompute: bool,
) -> PackedStates:
    """Runs layers one after the other, and the pooler, if there is one, on the first token of each sample.

    Args:
        layers: one or more.
        states: [tokens, H], sample by sample.
        batch: with `cu_seqlens` and `longest`.
        selected: int64 [n], places in the row, each once, in any order: the only ones whose states are needed. The last
            layer is computed for these, and for the first tokens where they are pooled, alone.
        pooler: Linear before tanh.
        recompute: whether each layer is computed again in the backward pass.

    Returns:
        States of all tokens, or of the selected ones in their order, and what the pooler makes of the first ones.
    """
    packed = PackedTokens(batch["cu_seqlens"], batch["longest"])
    if pooler is None:
        states = encode_packed(layers, states, packed, selected, recompute=recompute)
        return PackedStates(states, None, batch["cu_seqlens"])
    first = batch["cu_seqlens"][:-1].to(torch.int64)
    wanted = None if selected is None else torch.cat([selected, first])
    states = encode_packed(layers, states, packed, wanted, recompute=recompute)
    if selected is None:
        firsts = states.index_select(0, first)
    else:
        states, firsts = states.split([len(selected), len(first)])
    return PackedStates(states, torch.tanh(pooler(firsts)), batch["cu_seqlens"])


def _run(
    layers: Sequence[SelfAttentionLayer],
    states: torch.Tensor,
    packed: PackedTokens,
    selected: tuple[torch.Tensor, PackedTokens] | None,
    recompute: bool,
) -> torch.Tensor:
    for number, layer in enumerate(layers, 1):
        rows = selected if number == len(layers) else None
        if recompute and torch.is_grad_enabled():
            states = checkpoint(layer, states, packed, rows, use_reentrant=False)
        else:
            states = layer(states, packed, rows)
    return states
