"""CLIP's text tower as a feature extractor for every position (spec xdbert §2.2)."""

import math

import torch
from open_clip.transformer import TextTransformer
from torch import nn


class CLIPTextEncoder(nn.Module):
    """CLIP-T: blocks of 77 tokens in, a projected state for each position out.

    Every block goes through CLIP on its own, with positions 0..76 and CLIP's causal mask; there is no padding
    mask inside CLIP. The final LayerNorm and `text_projection` are applied at every position, not only at the
    end-of-text token, and the features are not normalised.
    """

    def __init__(self, tower: TextTransformer) -> None:
        """Wraps a text tower.

        Args:
            tower: open_clip's text transformer. Its `pool_type` must be "none", so that its own forward (for
                which ZeRO-3 gathers `positional_embedding` and `text_projection`) returns all positions.
        """
        super().__init__()
        if tower.pool_type != "none":
            raise ValueError(f"the tower must be built with pool_type 'none', found {tower.pool_type!r}")
        self.tower = tower
        # CLIP's temperature belongs to the module that the paper counts (Table 6), but nothing uses it here.
        # One element, not a 0-dimensional tensor: DeepSpeed cannot broadcast those.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)), requires_grad=False)

    @property
    def context_length(self) -> int:
        """Positions of one block: 77."""
        return self.tower.context_length

    @property
    def output_size(self) -> int:
        """Size of one projected state."""
        return self.tower.output_dim

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.tower.set_grad_checkpointing(True)

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
