"""VL-BERT: one BERT whose words look at the image and whose image regions stand among them (spec VL-BERT §1)."""

import torch
from torch import nn
from transformers import BertConfig

from xdscale.models.operations import Linear, initialise
from xdscale.models.single_stream import Batch, PackedStates, SelfAttentionLayer, encode_and_pool

WAVES = 256
LONGEST_WAVE = 1000.0
GEOMETRY = 4 * 2 * WAVES
"""Numbers of a region's geometry: as many sines and cosines of each of four numbers."""
REGION_SEGMENT = 2
"""Segment of regions and of [END]; texts have 0 and 1."""


class VLBertConfig(BertConfig):
    """BERT's, with three segments.

    Attributes:
        appearance_size: numbers of a region's appearance: 2,048, what Fast R-CNN has before its classifier.
        masks_features: whether a masked region's appearance is replaced by a learned vector, as where features are
            computed beforehand. Where they are not, its pixels are blank instead.
        with_pooler: whether there is BERT's pooler, as for VCR.
        second_segment: whether texts' second segment was trained, as for VCR; pretraining has the first one alone.
        corners: whether a region's corners are embedded, as shares of the image (paper), or its centre and size, in
            hundredths (release).
        end_sees_image: whether [END] sees the whole image, as words do (paper), or nothing (release).
        own_masked_token: whether a masked region has a token of its own (release), or that of all regions (paper).
    """

    model_type = "vl_bert"
    type_vocab_size: int = 3
    appearance_size: int = 2048
    masks_features: bool = True
    with_pooler: bool = False
    second_segment: bool = False
    corners: bool = False
    end_sees_image: bool = False
    own_masked_token: bool = True


def geometry_embedding(places: torch.Tensor) -> torch.Tensor:
    """Returns sines and cosines of where regions are, [n, 2048]: of each of the four numbers its sines first.

    Args:
        places: fp32 [n, 4], as `xdscale.data.vlbert.centres` or `corners` has them. Half precision would lose the short
            waves.
    """
    steps = torch.arange(WAVES, dtype=places.dtype, device=places.device) / WAVES
    angles = places.unsqueeze(-1) / LONGEST_WAVE**steps  # [n, 4, 256]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def corners(places: torch.Tensor) -> torch.Tensor:
    """Turns what `xdscale.data.vlbert.centres` returns into corners as shares of the image: x1, y1, x2, y2, [n, 4]."""
    middle, half = places[:, :2], places[:, 2:] / 2
    return torch.cat([middle - half, middle + half], 1) / 100


class RegionFeatures(nn.Module):
    """What is seen of each region: geometry and appearance, through dropout, Linear and ReLU."""

    def __init__(self, config: VLBertConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.projection = Linear(nn.Linear(GEOMETRY + config.appearance_size, config.hidden_size))
        self.mask = nn.Embedding(1, config.appearance_size) if config.masks_features else None
        self.corners = config.corners

    def forward(self, features: torch.Tensor, places: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Maps features [r, D], places fp32 [r, 4] and masked int64 [r], 1 where a region is masked, to [r, H]."""
        if self.mask is not None:
            features = torch.where(masked.unsqueeze(1) == 1, self.mask(torch.zeros_like(masked[:1])), features)
        where = geometry_embedding(corners(places) if self.corners else places)
        seen = torch.cat([where.to(features.dtype), features], 1)
        return torch.relu(self.projection(self.dropout(seen)))


class VLBertEmbeddings(nn.Module):
    """Words, regions and [END], each with its visual part, segment and position.

    The gains of the two LayerNorms of visual parts start at 0: what BERT has learned stays as it is at first.
    """

    def __init__(self, config: VLBertConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.end_embedding = nn.Embedding(1, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.end_sees_image = config.end_sees_image
        self.visual_norm_text = nn.LayerNorm(size, eps=eps)
        self.visual_norm_region = nn.LayerNorm(size, eps=eps)
        self.LayerNorm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, batch: Batch, seen: torch.Tensor, region_tokens: torch.Tensor, text_only: torch.Tensor
    ) -> torch.Tensor:
        """Embeds the words of all samples, then the regions of all samples, then each sample's [END].

        Args:
            batch: as `VLBERT.forward`.
            seen: [r, H], of the regions.
            region_tokens: [r, H], what stands for each region as a token.
            text_only: [1, H], what words see that have no image.

        Returns:
            [words + regions + b, H].
        """
        lengths, positions = batch["text_lengths"], batch["region_positions"]
        visual = self.visual_norm_text(torch.cat([seen, text_only]))
        words = self.word_embeddings(batch["text_ids"]) + visual.index_select(0, batch["text_visual"])
        regions = region_tokens + self.visual_norm_region(seen)
        ends = self.end_embedding(torch.zeros_like(lengths))
        if self.end_sees_image:
            ends = ends + visual.index_select(0, batch["end_visual"])
        tokens = torch.cat([words, regions, ends])
        places = torch.cat([batch["text_positions"], positions, lengths + 1])
        behind = torch.full_like(places[: len(positions) + len(lengths)], REGION_SEGMENT)
        segments = torch.cat([batch["text_segments"], behind])
        tokens = tokens + self.position_embeddings(places) + self.token_type_embeddings(segments)
        return self.dropout(self.LayerNorm(tokens))


class VLBERT(nn.Module):
    """The encoder.

    Attributes:
        config: sizes and rates.
        embeddings: of words, regions and [END].
        layers: BERT's.
        regions: what is seen of regions.
        region_tokens: the vector that stands for a region as a token, and the one for a masked region.
        text_only: the vector that words without an image see.
        pooler: Linear on the first token, before tanh; None without.
    """

    def __init__(self, config: VLBertConfig) -> None:
        """Builds it with BERT's initialisation, and gains of 0 for what is seen."""
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.embeddings = VLBertEmbeddings(config)
        self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.regions = RegionFeatures(config)
        self.region_tokens = nn.Embedding(2, size)
        self.text_only = nn.Embedding(1, size)
        self.pooler = nn.Linear(size, size) if config.with_pooler else None
        self._checkpoint_layers = False
        initialise(self.modules(), config.initializer_range)
        for norm in (self.embeddings.visual_norm_text, self.embeddings.visual_norm_region):
            nn.init.zeros_(norm.weight)
        if self.regions.mask is not None:
            nn.init.zeros_(self.regions.mask.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the table of words, to which a head's decoder is tied."""
        return self.embeddings.word_embeddings

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass; the result stays the same."""
        self._checkpoint_layers = True

    def forward(self, batch: Batch, selected: torch.Tensor | None = None) -> PackedStates:
        """Encodes samples; padding is not computed, for there is none.

        Args:
            batch: what `xdscale.data.vlbert.pack` returns, as tensors.
            selected: int64 [n], places in the row, each once, in any order: the only ones whose states are needed. The
                last layer is computed for these alone, and, where there is a pooler, for the first tokens.

        Returns:
            States of all tokens, or of the selected ones in their order, and what the pooler makes of the first ones.
        """
        masked = batch["masked_regions"]
        tokens = self.region_tokens(masked if self.config.own_masked_token else torch.zeros_like(masked))
        text_only = self.text_only(torch.zeros_like(batch["text_lengths"][:1]))
        seen = self.regions(batch["features"].to(tokens.dtype), batch["places"], masked)
        states = self.embeddings(batch, seen, tokens, text_only).index_select(0, batch["rows"])
        recompute = self._checkpoint_layers
        return encode_and_pool(self.layers, states, batch, selected, self.pooler, recompute=recompute)
