"""VisualBERT: one BERT that reads a text and the regions of its image together (spec VisualBERT §1)."""

import torch
from torch import nn
from transformers import VisualBertConfig

from xdscale.models.operations import Linear, initialise
from xdscale.models.packed_tokens import packed_by_lengths
from xdscale.models.single_stream import Batch, PackedStates, SelfAttentionLayer, encode_and_pool, encode_packed


class VisualTextEmbeddings(nn.Module):
    """Text and regions as BERT's input, under the names that transformers has.

    All of it passes one LayerNorm. The tables of segments and positions of regions are their own; every region has
    position 0, and beside it, where words are aligned with it, their positions in the *text's* table.
    """

    def __init__(self, config: VisualBertConfig, alignment: str) -> None:
        """Builds the tables.

        Args:
            config: sizes, and `visual_embedding_dim`, the width of the features.
            alignment: "sum" (paper) or "mean" (release) of the positions of the words that a region is aligned with.
        """
        super().__init__()
        size, positions, segments = config.hidden_size, config.max_position_embeddings, config.type_vocab_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(positions, size)
        self.token_type_embeddings = nn.Embedding(segments, size)
        self.visual_token_type_embeddings = nn.Embedding(segments, size)
        self.visual_position_embeddings = nn.Embedding(positions, size)
        self.visual_projection = Linear(nn.Linear(config.visual_embedding_dim, size))
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.alignment = alignment

    def forward(self, batch: Batch) -> torch.Tensor:
        """Embeds the text tokens of all samples, then the regions of all samples; arguments as `VisualBERT`.

        Returns:
            [text tokens + regions, H].
        """
        positions, aligned = batch["text_positions"], batch.get("aligned_positions")
        count = len(positions)
        # A table is called once, also where regions read it too: ZeRO-3 gathers it for each call.
        places = self.position_embeddings(positions if aligned is None else torch.cat([positions, aligned]))
        words = self.word_embeddings(batch["text_ids"]) + self.token_type_embeddings(batch["text_segments"])
        features, segments = batch["features"].to(words.dtype), batch["region_segments"]
        regions = self.visual_projection(features) + self.visual_token_type_embeddings(segments)
        regions = regions + self.visual_position_embeddings(torch.zeros_like(segments[:1]))
        if aligned is not None:
            of_words = places[count:]
            if self.alignment == "mean":
                of_words = of_words / batch["aligned_counts"].unsqueeze(1)
            regions = regions.index_add(0, batch["aligned_regions"], of_words.to(regions.dtype))
        return self.dropout(self.LayerNorm(torch.cat([words + places[:count], regions])))


class VisualBERT(nn.Module):
    """The encoder, with BERT's pooler.

    Attributes:
        config: transformers' own, as exports have it.
        embeddings: of text and regions.
        layers: BERT's, which read text and regions together; without early fusion the text alone.
        fusion: without early fusion the one new layer that reads both; else None.
        pooler: Linear on the first token, before tanh.
    """

    def __init__(self, config: VisualBertConfig, *, alignment: str = "sum") -> None:
        """Builds it with BERT's initialisation.

        Args:
            config: `bypass_transformer` is "without early fusion".
            alignment: see `VisualTextEmbeddings`.
        """
        super().__init__()
        self.config = config
        self.embeddings = VisualTextEmbeddings(config, alignment)
        self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.fusion = SelfAttentionLayer(config) if config.bypass_transformer else None
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self._checkpoint_layers = False
        initialise(self.modules(), config.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the table of words, to which a head's decoder is tied."""
        return self.embeddings.word_embeddings

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass; the result stays the same."""
        self._checkpoint_layers = True

    def forward(self, batch: Batch, selected: torch.Tensor | None = None) -> PackedStates:
        """Encodes samples; padding is not computed, for there is none.

        Args:
            batch: what `xdscale.data.visual_text.pack` returns, as tensors.
            selected: int64 [n], places in the row, each once, in any order: the only ones whose states are needed. The
                last layer is computed for these, and for the first token of each sample, alone.

        Returns:
            States of all tokens, or of the selected ones in their order, and what the pooler makes of the first ones.
        """
        states, recompute = self.embeddings(batch), self._checkpoint_layers
        if self.fusion is not None:
            texts = len(batch["text_ids"])
            packed_texts = packed_by_lengths(batch["text_lengths"], batch["longest"])
            words = encode_packed(self.layers, states[:texts], packed_texts, recompute=recompute)
            states = torch.cat([words, states[texts:]])
        states = states.index_select(0, batch["rows"])
        joint = self.layers if self.fusion is None else [self.fusion]
        return encode_and_pool(joint, states, batch, selected, self.pooler, recompute=recompute)
