"""The cross-modal layer between a language model and CLIP's text tower (spec xdbert §2.3, paper figure 3).

Everything here works on packed tokens, [tokens, size], without padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from xdscale.kernels.activated_linear import Activation
from xdscale.models.operations import ActivatedLinear, Linear, PackedAttention, ResidualNorm
from xdscale.models.packed_tokens import PackedTokens

LAYER_NORM_EPS = 1e-12
"""As in BERT."""


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens of both encoders that are read after the last layer, which is computed no further for the others.

    Attributes:
        language_rows: int64 [n], ascending.
        language: how they are packed.
        clip_rows: int64 [m], ascending.
        clip: how they are packed.
    """

    language_rows: torch.Tensor
    language: PackedTokens
    clip_rows: torch.Tensor
    clip: PackedTokens


class AttentionSublayer(nn.Module):
    """Multi-head attention with BERT's output: dense, dropout, LayerNorm(residual).

    With a context of the other encoder it is cross-attention, with the sublayer's own input self-attention.
    """

    def __init__(
        self, size: int, context_size: int, heads: int, dropout: float, *, eps: float = LAYER_NORM_EPS
    ) -> None:
        """Builds the projections, with PyTorch's default initialisation as the released code has.

        Args:
            size: of the states that queries are projected from, and of the output.
            context_size: of the states that keys and values are projected from.
            heads: number of heads; must divide `size`.
            dropout: rate on the attention weights and on the output.
            eps: of the LayerNorm.
        """
        super().__init__()
        if size % heads:
            raise ValueError(f"{heads} heads do not divide states of size {size}")
        self.heads = heads
        self.query = Linear(nn.Linear(size, size))
        self.key = Linear(nn.Linear(context_size, size))
        self.value = Linear(nn.Linear(context_size, size))
        self.output = Linear(nn.Linear(size, size))
        self.attention = PackedAttention(dropout)
        self.norm = ResidualNorm(size, eps=eps, dropout=dropout)

    def forward(
        self, states: torch.Tensor, context: torch.Tensor, queries: PackedTokens, keys: PackedTokens
    ) -> torch.Tensor:
        """Attends from `states` to `context`, each sample to its own.

        Args:
            states: [q tokens, size].
            context: [k tokens, context_size].
            queries: how `states` are packed.
            keys: how `context` is packed.

        Returns:
            [q tokens, size].
        """
        query, key, value = self.query(states), self.key(context), self.value(context)
        query, key, value = (tokens.unflatten(-1, (self.heads, -1)) for tokens in (query, key, value))
        attended = self.attention(query, key, value, queries, keys)  # [q tokens, heads, d]
        return self.norm(self.output(attended.flatten(1)), states)


class FeedForward(nn.Module):
    """Linear, activation (GELU with erf unless another one is given), Linear, dropout, LayerNorm(residual)."""

    def __init__(
        self,
        size: int,
        intermediate_size: int,
        dropout: float,
        *,
        activation: Activation = F.gelu,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.intermediate = Linear(nn.Linear(size, intermediate_size))
        self.output = ActivatedLinear(nn.Linear(intermediate_size, size), activation)
        self.norm = ResidualNorm(size, eps=eps, dropout=dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [tokens, size] to the same shape."""
        return self.norm(self.output(self.intermediate(states)), states)


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
        language_packed: PackedTokens,
        clip_packed: PackedTokens,
        selected: SelectedTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets the tokens of the two encoders read each other.

        Args:
            language: [language tokens, language_size].
            clip: [CLIP tokens, clip_size].
            language_packed: how `language` is packed.
            clip_packed: how `clip` is packed.
            selected: in the last layer, the tokens that are read after it. Self-attention still has keys and values of
                all tokens, but queries of these alone, which alone pass the feed-forward.

        Returns:
            The new language and CLIP states, of all tokens or of the selected ones.
        """
        crossed_language = self.language_cross(language, clip, language_packed, clip_packed)
        crossed_clip = self.clip_cross(clip, language, clip_packed, language_packed)
        if selected is None:
            language = self.language_self(crossed_language, crossed_language, language_packed, language_packed)
            clip = self.clip_self(crossed_clip, crossed_clip, clip_packed, clip_packed)
        else:
            language = crossed_language.index_select(0, selected.language_rows)
            clip = crossed_clip.index_select(0, selected.clip_rows)
            language = self.language_self(language, crossed_language, selected.language, language_packed)
            clip = self.clip_self(clip, crossed_clip, selected.clip, clip_packed)
        return self.language_feed_forward(language), self.clip_feed_forward(clip)
