"""The operations of `xdscale.kernels` as modules, for our own layers and for the encoders of transformers.

A module calls its operation in its own forward because ZeRO-3 gathers a parameter for the module that owns it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from xdscale.kernels import DEFINITIONS, activated_linear, linear, packed_attention, residual_norm
from xdscale.kernels.activated_linear import Activation
from xdscale.models.packed_tokens import PackedTokens

ATTENTION, PLAIN_ATTENTION = "xdscale", "xdscale_plain"
"""Names under which transformers knows `packed_attention` and its definition."""


def use_definitions(model: nn.Module) -> nn.Module:
    """Lets all of a model compute by the readable definitions instead of the kernels; both drop the same elements.

    Returns:
        The model itself.
    """
    for module in model.modules():
        for name in ("function", "activation", "projection"):
            chosen = getattr(module, name, None)
            if chosen in DEFINITIONS:
                setattr(module, name, DEFINITIONS[chosen])
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == ATTENTION:
            module.set_attn_implementation(PLAIN_ATTENTION)
    return model


def initialise(modules: Iterable[nn.Module], std: float) -> None:
    """Gives new modules BERT's first values: weights from a normal distribution, biases 0."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def dropout_seed(rate: float, device: torch.device) -> torch.Tensor | None:
    """Draws the seed of one call's dropout: recomputed activations restore the generator and so draw the same again."""
    return torch.randint(2**62, (1,), device=device) if rate else None


def attend(
    function: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: PackedTokens,
    keys: PackedTokens,
    dropout: float,
) -> torch.Tensor:
    """Calls `packed_attention` or its definition; arguments as of `PackedAttention.forward`."""
    longest = {"max_seqlen_q": queries.max_seqlen, "max_seqlen_k": keys.max_seqlen}
    drop = {"dropout": dropout, "seed": dropout_seed(dropout, query.device)}
    return function(query, key, value, queries.cu_seqlens, keys.cu_seqlens, **longest, **drop)


class PackedAttention(nn.Module):
    """Multi-head attention within each sample, with dropout on the weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.function = packed_attention

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: PackedTokens, keys: PackedTokens
    ) -> torch.Tensor:
        """Attends from each query to the keys of its sample.

        Args:
            query: [q tokens, heads, d].
            key: [k tokens, heads, d].
            value: [k tokens, heads, d].
            queries: how the tokens of `query` are packed.
            keys: how those of `key` and `value` are packed.

        Returns:
            [q tokens, heads, d].
        """
        return attend(self.function, query, key, value, queries, keys, self.dropout if self.training else 0.0)


@contextmanager
def recorded(attentions: Iterable[nn.Module], weights: Callable[..., torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Records what these attentions weigh in the forward passes made while it is open.

    Args:
        attentions: modules, one for each layer.
        weights: makes of an attention's inputs what is recorded: `attention_map` or `attention_by_head`.

    Yields:
        A list that grows with each of them that runs.
    """
    found: list[torch.Tensor] = []

    def record(_module: nn.Module, inputs: tuple, _output: object) -> None:
        found.append(weights(*inputs))

    hooks = [attention.register_forward_hook(record) for attention in attentions]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def attention_map(*inputs: torch.Tensor | PackedTokens) -> torch.Tensor:
    """Returns what `attention_by_head` does, averaged over the heads: [queries, keys]."""
    return attention_by_head(*inputs).mean(0)


def attention_by_head(
    query: torch.Tensor, key: torch.Tensor, _value: torch.Tensor, queries: PackedTokens, keys: PackedTokens
) -> torch.Tensor:
    """Returns the first sample's attention weights without dropout, of what a `PackedAttention` was called with.

    Returns:
        [heads, its queries, its keys], in fp32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query[: int(queries.cu_seqlens[1])].to(wide).transpose(0, 1)  # [heads, queries, d]
    columns = key[: int(keys.cu_seqlens[1])].to(wide).permute(1, 2, 0)  # [heads, d, keys]
    return (rows @ columns * query.shape[-1] ** -0.5).softmax(-1)


class ResidualNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(states)), the end of every sublayer, under a LayerNorm's parameter names."""

    def __init__(self, size: int, *, eps: float, dropout: float, device: torch.device | str | None = None) -> None:
        """Builds it with weight 1 and bias 0.

        Args:
            size: of a state.
            eps: is added to the variance.
            dropout: rate on the states that are not the residual.
            device: of weight and bias.
        """
        super().__init__(size, eps=eps, device=device)
        self.dropout = dropout
        self.function = residual_norm

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Maps states and residual, [..., size] both, to one tensor like `states`."""
        rate = self.dropout if self.training else 0.0
        seed = dropout_seed(rate, states.device)
        rows = (tokens.flatten(0, -2) for tokens in (states, residual))  # [tokens, size]
        return self.function(*rows, self.weight, self.bias, eps=self.eps, dropout=rate, seed=seed).view(states.shape)


class Linear(nn.Linear):
    """A Linear on many rows, whose bias gradient is summed at the speed of memory on a GPU."""

    def __init__(self, original: nn.Linear) -> None:
        """Takes over the parameters of the module that it replaces, which has a bias."""
        super().__init__(original.in_features, original.out_features, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.function = linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return self.function(states, self.weight, self.bias)


def activation_of(module: nn.Module) -> Activation:
    """Returns the function of an activation of transformers: PyTorch's GELU by its own name, for which kernels look."""
    return F.gelu if isinstance(module, GELUActivation) and module.act is F.gelu else module.forward


class ActivatedLinear(Linear):
    """The second half of a feed-forward: a Linear that activates what comes in, and keeps that alone for gradients."""

    def __init__(self, original: nn.Linear, activation: Activation) -> None:
        """Takes over the parameters of the module that it replaces.

        Args:
            original: with a bias.
            activation: a function and not a module, whose hooks would run again in the backward pass.
        """
        super().__init__(original)
        self.activation = activation
        self.function = activated_linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features], not yet activated, to [..., out_features]."""
        return self.function(states, self.weight, self.bias, self.activation)
