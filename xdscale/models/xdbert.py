"""XDBERT: a language encoder and CLIP's text tower joined by cross-modal layers (spec xdbert §2)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.cross_modal import CrossModalLayer


class XDBERT(nn.Module):
    """The cross-modal encoder of the adaptation phase, and of the paper's full model "X-BERT"."""

    def __init__(self, language: PreTrainedModel, clip: CLIPTextEncoder, layers: Sequence[CrossModalLayer]) -> None:
        """Joins the two encoders.

        Args:
            language: BERT or ELECTRA encoder of transformers. BERT's own pooler is part of the published
                counts, but no loss reaches it, so it takes no gradient.
            clip: CLIP-T.
            layers: the cross-modal layers, in order.
        """
        super().__init__()
        self.language = language
        self.clip = clip
        self.layers = nn.ModuleList(layers)
        self._checkpoint_layers = False
        if getattr(language, "pooler", None) is not None:
            language.pooler.requires_grad_(False)

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer of both encoders and of the cross-modal part in the backward pass."""
        self.language.activation_checkpointing_enable({"use_reentrant": False})
        self.clip.enable_activation_checkpointing()
        self._checkpoint_layers = True

    def forward(
        self,
        language_ids: torch.Tensor,
        clip_ids: torch.Tensor,
        clip_lengths: torch.Tensor,
        language_mask: torch.Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple:
        """Encodes a text through both encoders and the cross-modal layers.

        Padding comes from `clip_lengths` and never from ids: CLIP's id 0 is a word (spec xdbert §9).

        Args:
            language_ids: int64 [batch, s].
            clip_ids: int64 [batch, blocks, 77].
            clip_lengths: int64 [batch, blocks], valid positions of each block; 0 for an empty block.
            language_mask: bool [batch, s], True for valid positions; None for all.
            return_attention: also return attention maps.

        Returns:
            Language states [batch, s, language size] and CLIP states [batch, blocks * 77, CLIP size]; with
            `return_attention` also a list with, for each cross-modal layer, the first sample's weights from
            language to CLIP positions, averaged over heads, fp32 [s, blocks * 77].
        """
        positions = torch.arange(clip_ids.shape[-1], device=clip_ids.device)
        clip_mask = (positions < clip_lengths.unsqueeze(-1)).flatten(1)  # [batch, blocks * 77]
        language = self.language(
            input_ids=language_ids, attention_mask=language_mask, use_cache=False
        ).last_hidden_state  # [batch, s, language size]
        clip = self.clip(clip_ids)  # [batch, blocks * 77, CLIP size]
        maps = []
        for layer in self.layers:
            if return_attention:
                maps.append(layer.language_cross.attention_map(language[:1], clip[:1], clip_mask[:1])[0])
            if self._checkpoint_layers and torch.is_grad_enabled():
                language, clip = checkpoint(layer, language, clip, language_mask, clip_mask, use_reentrant=False)
            else:
                language, clip = layer(language, clip, language_mask, clip_mask)
        return (language, clip, maps) if return_attention else (language, clip)
