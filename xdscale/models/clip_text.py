"""CLIP's text tower as a feature extractor for every position (spec xdbert §2.2)."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer
from torch import nn

from xdscale.kernels import causal_attention, linear, pre_norm, quick_gelu
from xdscale.models.operations import ActivatedLinear, Linear


class CausalBlockAttention(nn.MultiheadAttention):
    """CLIP's self-attention under its own parameter names, through `causal_attention`."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        """Takes over the parameters of the module that it replaces."""
        super().__init__(original.embed_dim, original.num_heads, batch_first=True, device="meta")
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = Linear(original.out_proj)
        self.function, self.projection = causal_attention, linear

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Attends as open_clip's blocks ask for it, with three times the same states and the causal mask.

        Args:
            query: [blocks, length, width].
            key: the same tensor.
            value: the same tensor.
            need_weights: not available.
            attn_mask: the causal mask, which is understood.

        Returns:
            [blocks, length, width], and None for the weights.
        """
        projected = self.projection(query, self.in_proj_weight, self.in_proj_bias)
        attended = self.function(projected.unflatten(-1, (3, self.num_heads, -1)))  # [blocks, length, heads, d]
        return self.out_proj(attended.flatten(2)), None


def _feed_forward(block: ResidualAttentionBlock) -> nn.Sequential:
    """Returns the block's feed-forward, which activates in its second product; the parameters keep their names."""
    activation = quick_gelu if isinstance(block.mlp.gelu, QuickGELU) else F.gelu
    c_fc, c_proj = Linear(block.mlp.c_fc), ActivatedLinear(block.mlp.c_proj, activation)
    return nn.Sequential(OrderedDict(c_fc=c_fc, c_proj=c_proj))


Terms = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""States, or a residual and the states that are still to be added to it; [blocks, length, width] each."""


class PreNorm(nn.LayerNorm):
    """One of CLIP's LayerNorms under its own parameter names, which adds up what it normalises."""

    def __init__(self, original: nn.LayerNorm) -> None:
        """Takes over the parameters of the module that it replaces."""
        super().__init__(original.normalized_shape, original.eps, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.function = pre_norm

    def forward(self, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum of the terms and its norm, shaped as each of them."""
        residual, states = terms if isinstance(terms, tuple) else (None, terms)
        rows = [None if term is None else term.flatten(0, -2) for term in (states, residual)]
        total, normed = self.function(*rows, self.weight, self.bias, eps=self.eps)
        return total.view(states.shape), normed.view(states.shape)


class FinalNorm(PreNorm):
    """The tower's last LayerNorm, after which nothing needs the sum."""

    def forward(self, terms: Terms) -> torch.Tensor:
        """Returns the norm of the sum of the terms."""
        return super().forward(terms)[1]


class PreNormBlock(ResidualAttentionBlock):
    """One of CLIP's blocks, which leaves its last addition to the LayerNorm that follows."""

    def __init__(self, original: ResidualAttentionBlock) -> None:
        """Takes over the parameters of the module that it replaces, in their order."""
        nn.Module.__init__(self)
        self.ln_1, self.attn, self.ls_1 = PreNorm(original.ln_1), CausalBlockAttention(original.attn), original.ls_1
        self.ln_2, self.mlp, self.ls_2 = PreNorm(original.ln_2), _feed_forward(original), original.ls_2
        self.adds = False
        """Whether it adds up what it returns: a checkpoint, which keeps that, then keeps one tensor instead of two."""

    def forward(
        self, terms: Terms, _key: None = None, _value: None = None, attn_mask: torch.Tensor | None = None
    ) -> Terms:
        """Maps the terms of a sum to those of the next block; the causal mask is understood."""
        residual, normed = self.ln_1(terms)
        residual, normed = self.ln_2((residual, self.ls_1(self.attention(normed, attn_mask=attn_mask))))
        states = self.ls_2(self.mlp(normed))
        return residual + states if self.adds else (residual, states)


class CLIPTextEncoder(nn.Module):
    """CLIP-T: blocks of 77 tokens in, a projected state for each position out.

    Every block goes through CLIP on its own, with positions 0..76 and CLIP's causal mask; there is no padding
    mask inside CLIP. The final LayerNorm and `text_projection` are applied at every position, not only at the
    end-of-text token, and the features are not normalised.
    """

    def __init__(self, tower: TextTransformer) -> None:
        """Wraps a text tower; its parameters keep their names.

        Args:
            tower: open_clip's text transformer. Its `pool_type` must be "none", so that its own forward (for
                which ZeRO-3 gathers `positional_embedding` and `text_projection`) returns all positions.
        """
        super().__init__()
        if tower.pool_type != "none":
            raise ValueError(f"the tower must be built with pool_type 'none', found {tower.pool_type!r}")
        self.tower = tower
        tower.transformer.resblocks = nn.ModuleList(map(PreNormBlock, tower.transformer.resblocks))
        tower.ln_final = FinalNorm(tower.ln_final)
        # CLIP's temperature belongs to the module that the paper counts (Table 6), but nothing uses it here.
        # One element, not a 0-dimensional tensor: DeepSpeed cannot broadcast those.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)), requires_grad=False)

    @property
    def output_size(self) -> int:
        """Size of one projected state."""
        return self.tower.output_dim

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.tower.set_grad_checkpointing(True)
        for block in self.tower.transformer.resblocks:
            block.adds = True

    def forward(self, clip_ids: torch.Tensor) -> torch.Tensor:
        """Encodes each block separately.

        Args:
            clip_ids: int64 [batch, blocks, 77].

        Returns:
            [batch, blocks * 77, output_size].
        """
        batch, blocks, positions = clip_ids.shape
        states = self.tower(clip_ids.reshape(batch * blocks, positions))  # [batch * blocks, 77, output_size]
        return states.reshape(batch, blocks * positions, -1)
