"""The cross-modal layer between a language model and CLIP's text tower (spec xdbert §2.3, paper figure 3).

Everything here works on packed tokens, [tokens, size], without padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from xdscale.kernels.attention import packed_attention_probabilities
from xdscale.models.activated_linear import ActivatedLinear
from xdscale.models.attention import attend
from xdscale.models.packed_tokens import PackedTokens
from xdscale.models.residual_norm import ResidualNorm

LAYER_NORM_EPS = 1e-12
"""As in BERT."""


@dataclass(frozen=True)
class Wanted:
    """The tokens of both encoders that are read after the last layer; the others are not computed there.

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

    def __init__(self, size: int, context_size: int, heads: int, dropout: float, *, plain: bool = False) -> None:
        """Builds the projections, with PyTorch's default initialisation as the released code has.

        Args:
            size: of the states that ask, and of the output.
            context_size: of the states that answer; keys and values are projected from it to `size`.
            heads: number of heads; must divide `size`.
            dropout: rate on the attention weights and on the output.
            plain: attention and output by their definitions instead of the kernels.
        """
        super().__init__()
        if size % heads:
            raise ValueError(f"{heads} heads do not divide states of size {size}")
        self.heads = heads
        self.plain = plain
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(context_size, size)
        self.value = nn.Linear(context_size, size)
        self.output = nn.Linear(size, size)
        self.dropout = dropout
        self.norm = ResidualNorm(size, eps=LAYER_NORM_EPS, dropout=dropout, plain=plain)

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
        rate = self.dropout if self.training else 0.0
        attended = attend(query, key, value, queries, keys, dropout=rate, plain=self.plain)  # [q tokens, heads, d]
        return self.norm(self.output(attended.flatten(1)), states)

    def attention_map(
        self, states: torch.Tensor, context: torch.Tensor, queries: PackedTokens, keys: PackedTokens
    ) -> torch.Tensor:
        """Returns the first sample's weights, averaged over the heads: [its queries, its keys], fp32."""
        query, key = self.query(states), self.key(context)
        query, key = (tokens.unflatten(-1, (self.heads, -1)) for tokens in (query, key))
        return packed_attention_probabilities(query, key, queries.cu_seqlens, keys.cu_seqlens).mean(0)


class FeedForward(nn.Module):
    """Linear, GELU (erf), Linear, dropout, LayerNorm(residual)."""

    def __init__(self, size: int, intermediate_size: int, dropout: float, *, plain: bool = False) -> None:
        super().__init__()
        self.intermediate = nn.Linear(size, intermediate_size)
        self.output = ActivatedLinear(nn.Linear(intermediate_size, size), F.gelu, plain=plain)
        self.norm = ResidualNorm(size, eps=LAYER_NORM_EPS, dropout=dropout, plain=plain)

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
        *,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.language_cross = AttentionSublayer(language_size, clip_size, language_heads, dropout, plain=plain)
        self.clip_cross = AttentionSublayer(clip_size, language_size, clip_heads, dropout, plain=plain)
        self.language_self = AttentionSublayer(language_size, language_size, language_heads, dropout, plain=plain)
        self.clip_self = AttentionSublayer(clip_size, clip_size, clip_heads, dropout, plain=plain)
        self.language_feed_forward = FeedForward(language_size, intermediate_size, dropout, plain=plain)
        self.clip_feed_forward = FeedForward(clip_size, intermediate_size, dropout, plain=plain)

    def forward(
        self,
        language: torch.Tensor,
        clip: torch.Tensor,
        language_packed: PackedTokens,
        clip_packed: PackedTokens,
        wanted: Wanted | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets the tokens of the two encoders read each other.

        Args:
            language: [language tokens, language_size].
            clip: [CLIP tokens, clip_size].
            language_packed: how `language` is packed.
            clip_packed: how `clip` is packed.
            wanted: in the last layer, the rows that are read after it. The others still answer in
                self-attention, but ask nothing and pass no feed-forward.

        Returns:
            The new language and CLIP states, of all rows or of the wanted ones.
        """
        crossed_language = self.language_cross(language, clip, language_packed, clip_packed)
        crossed_clip = self.clip_cross(clip, language, clip_packed, language_packed)
        asking_language, asking_clip = crossed_language, crossed_clip
        language_asking, clip_asking = language_packed, clip_packed
        if wanted is not None:
            asking_language = crossed_language.index_select(0, wanted.language_rows)
            asking_clip = crossed_clip.index_select(0, wanted.clip_rows)
            language_asking, clip_asking = wanted.language, wanted.clip
        language = self.language_self(asking_language, crossed_language, language_asking, language_packed)
        clip = self.clip_self(asking_clip, crossed_clip, clip_asking, clip_packed)
        return self.language_feed_forward(language), self.clip_feed_forward(clip)
