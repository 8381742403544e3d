"""XDBERT: a language encoder and CLIP's text tower joined by cross-modal layers (spec xdbert §2)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.cross_modal import CrossModalLayer, SelectedTokens
from xdscale.models.encoders import recompute_layers, valid_tokens
from xdscale.models.operations import attention_map, recorded
from xdscale.models.packed_tokens import PackedTokens, chosen_tokens, packed_by_lengths, packed_evenly, unpack
from xdscale.padding import clip_layout, language_layout


class _Encoded(NamedTuple):
    """The states of both encoders, packed, and where they stand in the padded shapes."""

    language: torch.Tensor  # [language tokens, language size]
    clip: torch.Tensor  # [CLIP tokens, CLIP size]
    language_packed: PackedTokens
    clip_packed: PackedTokens
    language_positions: torch.Tensor | None  # None: every position is valid
    clip_positions: torch.Tensor


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
        recompute_layers(self.language)
        self.clip.enable_activation_checkpointing()
        self._checkpoint_layers = True

    def forward(
        self,
        language_ids: torch.Tensor,
        clip_ids: torch.Tensor,
        clip_lengths: torch.Tensor,
        language_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        *,
        layout: Mapping[str, torch.Tensor | int] | None = None,
        selected: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes a text through both encoders and the cross-modal layers.

        Padding comes from `clip_lengths` and never from ids: CLIP's id 0 is a word (spec xdbert §9). Padding is not
        computed at all: the cross-modal layers work on the valid tokens alone.

        Args:
            language_ids: int64 [batch, s].
            clip_ids: int64 [batch, blocks, 77].
            clip_lengths: int64 [batch, blocks], valid positions of each block; 0 for an empty block.
            language_mask: bool [batch, s], True for valid positions; None for all.
            segments: int64 [batch, s], the language encoder's segment ids; None for 0, as in adaptation.
            layout: what `xdscale.padding` says of `clip_lengths`, and of `language_mask` if there is one, by name;
                whatever else is in it, as in a batch, is left aside. None: made here, for which a GPU is waited for.
            selected: the only positions whose states are needed, ascending and valid: int64 [n] into batch * s, and
                int64 [m] into batch * blocks * 77. None for all.

        Returns:
            Language states [batch, s, language size] and CLIP states [batch, blocks * 77, CLIP size], zeros at
            padding; or, with `selected`, [n, language size] and [m, CLIP size].
        """
        if layout is None:
            layout = _layout_of(clip_lengths, language_mask, clip_ids.shape[-1])
        encoded = self._encode(language_ids, clip_ids, clip_lengths, language_mask, segments, layout)
        language, clip = encoded.language, encoded.clip
        packed = encoded.language_packed, encoded.clip_packed
        last = None if selected is None else _selected_tokens(encoded, *selected)
        for number, layer in enumerate(self.layers, 1):
            rows = last if number == len(self.layers) else None
            if self._checkpoint_layers and torch.is_grad_enabled():
                language, clip = checkpoint(layer, language, clip, *packed, rows, use_reentrant=False)
            else:
                language, clip = layer(language, clip, *packed, rows)
        if selected is None:
            if encoded.language_positions is not None:
                language = unpack(language, encoded.language_positions, language_ids.shape)
            language = language.view(*language_ids.shape, -1)
            clip = unpack(clip, encoded.clip_positions, (len(clip_ids), clip_ids[0].numel()))
        return language, clip

    def recorded_attention(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Records the attention weights from language to CLIP tokens in the forward passes made while it is open.

        Returns:
            What gives a list that grows with each cross-modal layer that runs: the weights of the first sample without
            dropout, averaged over heads, fp32 [its language tokens, its CLIP tokens].
        """
        return recorded([layer.language_cross.attention for layer in self.layers], attention_map)

    def _encode(
        self,
        language_ids: torch.Tensor,
        clip_ids: torch.Tensor,
        clip_lengths: torch.Tensor,
        language_mask: torch.Tensor | None,
        segments: torch.Tensor | None,
        layout: Mapping[str, torch.Tensor | int],
    ) -> _Encoded:
        filled, clip_positions, length = layout["clip_blocks"], layout["clip_valid"], clip_ids.shape[-1]
        clip_packed = packed_by_lengths(clip_lengths.sum(1), layout["clip_longest"])
        # CLIP never sees the empty blocks of shorter texts.
        clip = self.clip(clip_ids.flatten(0, 1).index_select(0, filled).unsqueeze(0)).squeeze(0)  # [filled * 77, D]
        block = torch.searchsorted(filled, clip_positions // length)  # of each token, among the filled ones
        clip = clip.index_select(0, block * length + clip_positions % length)  # [CLIP tokens, CLIP size]
        valid = None if language_mask is None else valid_tokens(language_mask, layout["language_valid"])
        language = self.language(
            input_ids=language_ids, attention_mask=language_mask, token_type_ids=segments, use_cache=False, valid=valid
        ).last_hidden_state.flatten(0, 1)  # [batch * s, language size]
        if valid is None:
            language_packed, language_positions = packed_evenly(*language_ids.shape, language_ids.device), None
        else:
            language_packed, language_positions = valid
            language = language.index_select(0, language_positions)
        return _Encoded(language, clip, language_packed, clip_packed, language_positions, clip_positions)


def _layout_of(
    clip_lengths: torch.Tensor, language_mask: torch.Tensor | None, block_length: int
) -> dict[str, torch.Tensor | int]:
    """Looks at lengths and mask on the host, and brings what it finds back to their device."""
    arrays, device = clip_layout(clip_lengths.cpu().numpy(), block_length), clip_lengths.device
    if language_mask is not None:
        arrays |= language_layout(language_mask.cpu().numpy())
    return {name: torch.from_numpy(array).to(device) if array.ndim else array.item() for name, array in arrays.items()}


def _selected_tokens(encoded: _Encoded, language_rows: torch.Tensor, clip_positions: torch.Tensor) -> SelectedTokens:
    """Turns positions in the padded shapes into places in the packed tokens."""
    if encoded.language_positions is not None:
        language_rows = torch.searchsorted(encoded.language_positions, language_rows)
    clip_rows = torch.searchsorted(encoded.clip_positions, clip_positions)
    return SelectedTokens(
        language_rows,
        chosen_tokens(language_rows, encoded.language_packed),
        clip_rows,
        chosen_tokens(clip_rows, encoded.clip_packed),
    )
