"""Lets the encoders of transformers, BERT and ELECTRA, compute by our operations on valid tokens alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from xdscale.kernels import DEFINITIONS, packed_attention
from xdscale.models.operations import (
    ATTENTION,
    PLAIN_ATTENTION,
    ActivatedLinear,
    Linear,
    ResidualNorm,
    activation_of,
    attend,
)
from xdscale.models.packed_tokens import PackedTokens, packed_by_lengths, packed_evenly, unpack


def use_kernels(encoder: PreTrainedModel) -> None:
    """Lets an encoder attend, project, end its sublayers and activate its feed-forwards by the kernels.

    PyTorch's own attention takes its slow path with dropout and keeps the whole matrix of weights for the backward
    pass; here nothing of that size is kept, and padding is not computed. Names of parameters stay as they are.

    Args:
        encoder: BERT or ELECTRA as transformers builds it, alone or in one of its models with a head.

    Raises:
        ValueError: it was called before; there is no dropout and no activation left to take over.
    """
    layers = encoder.base_model.encoder.layer
    if any(isinstance(layer.output, _Output) for layer in layers):
        raise ValueError("the encoder was changed to the kernels before")
    encoder.set_attn_implementation(ATTENTION)
    if hasattr(encoder.base_model, "embeddings_project"):  # ELECTRA's small one
        encoder.base_model.embeddings_project = Linear(encoder.base_model.embeddings_project)
    for layer in layers:
        activation = activation_of(layer.intermediate.intermediate_act_fn)
        layer.intermediate.intermediate_act_fn = nn.Identity()
        layer.output.dense = ActivatedLinear(layer.output.dense, activation)
        attention = layer.attention.self
        attention.query, attention.key, attention.value = map(Linear, (attention.query, attention.key, attention.value))
        for owner in (layer.attention.output, layer.intermediate):
            owner.dense = Linear(owner.dense)
        for owner in (layer.attention, layer):
            owner.output = _Output(owner.output)


def recompute_layers(encoder: PreTrainedModel) -> None:
    """Makes an encoder of transformers recompute each layer in the backward pass; 5.17 has the older name alone."""
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def valid_tokens(mask: torch.Tensor, positions: torch.Tensor) -> tuple[PackedTokens, torch.Tensor]:
    """Returns what an encoder after `use_kernels` takes as `valid`, beside the mask itself.

    Args:
        mask: bool [batch, length].
        positions: int64 [tokens], where it is True: flat index into batch * length, ascending.

    Returns:
        How the valid tokens are packed, and `positions`.
    """
    return packed_by_lengths(mask.sum(1), mask.shape[1]), positions


class _Output(nn.Module):
    """The end of a sublayer of BERT or ELECTRA: dense, dropout, LayerNorm(residual), under the same names."""

    def __init__(self, original: nn.Module) -> None:
        """Takes over the parameters of the module that it replaces."""
        super().__init__()
        norm, rate = original.LayerNorm, original.dropout.p
        self.dense = original.dense
        self.LayerNorm = ResidualNorm(norm.weight.numel(), eps=norm.eps, dropout=rate, device="meta")
        self.LayerNorm.weight, self.LayerNorm.bias = norm.weight, norm.bias
        self.train(original.training)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Maps [batch, length, any size] and the residual [batch, length, size] to the latter's shape."""
        return self.LayerNorm(self.dense(hidden_states), input_tensor)


def _self_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    function: Callable[..., torch.Tensor],
    dropout: float = 0.0,
    valid: tuple[PackedTokens, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: [batch, heads, length, d] three times to [batch, length, heads, d].

    `valid` is what the caller of the encoder knows of `attention_mask` (see `valid_tokens`), handed on by transformers
    as any keyword that it does not know. Without it every layer waits for a GPU to look at the mask.
    """
    batch, _heads, length, _size = query.shape
    tokens = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [batch * length, heads, d]
    if attention_mask is None:
        packed = packed_evenly(batch, length, query.device)
    else:
        packed, positions = valid or valid_tokens(attention_mask, attention_mask.flatten().nonzero().squeeze(1))
        tokens = [states.index_select(0, positions) for states in tokens]
    attended = attend(function, *tokens, packed, packed, dropout)
    if attention_mask is None:
        return attended.unflatten(0, (batch, length)), None
    return unpack(attended.flatten(1), positions, (batch, length)).unflatten(-1, attended.shape[1:]), None


def _unchanged(*, attention_mask: torch.Tensor | None, **_: Any) -> torch.Tensor | None:
    """What transformers calls once per forward pass, to prepare the mask for all layers."""
    return attention_mask


for _name, _function in ((ATTENTION, packed_attention), (PLAIN_ATTENTION, DEFINITIONS[packed_attention])):
    AttentionInterface.register(_name, partial(_self_attention, function=_function))
    AttentionMaskInterface.register(_name, _unchanged)
