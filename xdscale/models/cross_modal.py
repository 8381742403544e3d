"""The cross-modal layer between a language model and CLIP's text tower (spec xdbert §2.3, paper figure 3)."""

import torch
from torch import nn

from xdscale.kernels.attention import attention, attention_probabilities

LAYER_NORM_EPS = 1e-12
"""As in BERT."""


class AttentionSublayer(nn.Module):
    """Multi-head attention with BERT's output: dense, dropout, LayerNorm(residual).

    With a context of another stream it is cross-attention, with the sublayer's own input self-attention.
    """

    def __init__(self, size: int, context_size: int, heads: int, dropout: float) -> None:
        """Builds the projections, with PyTorch's default initialisation as the released code has.

        Args:
            size: of the states that ask, and of the output.
            context_size: of the states that answer; keys and values are projected from it to `size`.
            heads: number of heads; must divide `size`.
            dropout: rate on the attention weights and on the output.
        """
        super().__init__()
        if size % heads:
            raise ValueError(f"{heads} heads do not divide states of size {size}")
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(context_size, size)
        self.value = nn.Linear(context_size, size)
        self.output = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)

    def forward(self, states: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
        """Attends from `states` to `context`.

        Args:
            states: [batch, q, size].
            context: [batch, k, context_size].
            context_mask: bool [batch, k], True for valid positions; None for all.

        Returns:
            [batch, q, size].
        """
        query = self._split_heads(self.query(states))
        key, value = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        rate = self.dropout.p if self.training else 0.0
        attended = attention(query, key, value, context_mask, rate)
        attended = attended.transpose(1, 2).flatten(2)  # [batch, q, size]
        return self.norm(states + self.dropout(self.output(attended)))

    def attention_map(
        self, states: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the weights that `forward` attends with, averaged over the heads: fp32 [batch, q, k]."""
        query, key = self._split_heads(self.query(states)), self._split_heads(self.key(context))
        return attention_probabilities(query, key, context_mask).mean(1)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, positions, head size]


class FeedForward(nn.Module):
    """Linear, GELU (erf), Linear, dropout, LayerNorm(residual)."""

    def __init__(self, size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.intermediate = nn.Linear(size, intermediate_size)
        self.activation = nn.GELU()
        self.output = nn.Linear(intermediate_size, size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [batch, positions, size] to the same shape."""
        hidden = self.activation(self.intermediate(states))  # [batch, positions, intermediate_size]
        return self.norm(states + self.dropout(self.output(hidden)))


class CrossModalLayer(nn.Module):
    """Cross-attention in both directions, then self-attention and feed-forward on each side.

    The two cross-attentions are separate modules (LXMERT shares one) and both read the layer's inputs, so
    their order does not matter. The feed-forward of the CLIP side has the language model's intermediate size
    (spec xdbert §9; Table 6 holds only that way).
    """

    def __init__(
        self,
        language_size: int,
        clip_size: int,
        language_heads: int,
        clip_heads: int,
        intermediate_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.language_cross = AttentionSublayer(language_size, clip_size, language_heads, dropout)
        self.clip_cross = AttentionSublayer(clip_size, language_size, clip_heads, dropout)
        self.language_self = AttentionSublayer(language_size, language_size, language_heads, dropout)
        self.clip_self = AttentionSublayer(clip_size, clip_size, clip_heads, dropout)
        self.language_feed_forward = FeedForward(language_size, intermediate_size, dropout)
        self.clip_feed_forward = FeedForward(clip_size, intermediate_size, dropout)

    def forward(
        self,
        language: torch.Tensor,
        clip: torch.Tensor,
        language_mask: torch.Tensor | None,
        clip_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets the two streams read each other.

        Args:
            language: [batch, s, language_size].
            clip: [batch, c, clip_size].
            language_mask: bool [batch, s], True for valid positions; None for all.
            clip_mask: bool [batch, c]; None for all.

        Returns:
            The new language states [batch, s, language_size] and CLIP states [batch, c, clip_size].
        """
        crossed_language = self.language_cross(language, clip, clip_mask)
        crossed_clip = self.clip_cross(clip, language, language_mask)
        language = self.language_self(crossed_language, crossed_language, language_mask)
        clip = self.clip_self(crossed_clip, crossed_clip, clip_mask)
        return self.language_feed_forward(language), self.clip_feed_forward(clip)
