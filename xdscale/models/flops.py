"""Matrix-multiplication FLOPs of XDBERT's parts, on the positions that are computed.

A multiply-add counts as two. Biases, norms, softmax and embedding look-ups are left out, as is usual for
model FLOPs utilisation. All functions give the forward pass; a training step costs three times that, since
each product has two more of its size in the backward pass. What activation checkpointing computes again does
not count. Imports neither torch nor transformers, so that a plan starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from xdscale.models.clip_text import CLIPTextEncoder


def language_flops(config: PretrainedConfig, batch: int, length: int) -> int:
    """Returns the FLOPs of a BERT or ELECTRA encoder, without BERT's pooler."""
    size, tokens = config.hidden_size, batch * length
    layer = self_attention_flops(size, batch, length) + feed_forward_flops(size, config.intermediate_size, tokens)
    embedding_size = getattr(config, "embedding_size", size)
    project = 2 * tokens * embedding_size * size if embedding_size != size else 0
    return project + config.num_hidden_layers * layer


def clip_flops(encoder: CLIPTextEncoder, blocks: int) -> int:
    """Returns the FLOPs of CLIP's text tower for so many blocks of 77; its causal mask saves nothing."""
    tower = encoder.tower
    hidden = tower.transformer.resblocks[0].mlp.c_fc.out_features
    sizes = tower.width, hidden, tower.output_dim
    return clip_tower_flops(*sizes, tower.transformer.layers, blocks, encoder.context_length)


def clip_tower_flops(width: int, hidden: int, output_size: int, layers: int, blocks: int, length: int) -> int:
    """Returns the FLOPs of a text tower with so many layers, for so many blocks of `length` tokens."""
    tokens = blocks * length
    layer = self_attention_flops(width, blocks, length) + feed_forward_flops(width, hidden, tokens)
    return layers * layer + 2 * tokens * width * output_size


def cross_layer_flops(
    language_size: int,
    clip_size: int,
    intermediate_size: int,
    language: np.ndarray,
    clip: np.ndarray,
    wanted_language: np.ndarray,
    wanted_clip: np.ndarray,
) -> int:
    """Returns the FLOPs of one cross-modal layer on packed tokens.

    Args:
        language_size: size of the language states.
        clip_size: size of the CLIP states.
        intermediate_size: of both feed-forward parts.
        language: int [batch], language tokens of each sample.
        clip: int [batch], CLIP tokens of each sample.
        wanted_language: int [batch], those that are read after the layer.
        wanted_clip: int [batch], likewise.
    """
    flops = 0
    for size, tokens, wanted, context_size, context in (
        (language_size, language, wanted_language, clip_size, clip),
        (clip_size, clip, wanted_clip, language_size, language),
    ):
        flops += attention_flops(size, context_size, tokens, context)
        flops += attention_flops(size, size, wanted, tokens)
        flops += feed_forward_flops(size, intermediate_size, int(wanted.sum()))
    return flops


def attention_flops(size: int, context_size: int, queries: np.ndarray, keys: np.ndarray) -> int:
    """Returns the FLOPs of the four projections, the scores and the weighted sum; arguments as tokens per sample."""
    projections = 4 * size * (size * queries.sum() + context_size * keys.sum())
    return int(projections + 4 * size * (queries * keys).sum())


def self_attention_flops(size: int, batch: int, length: int) -> int:
    """Returns the FLOPs of the four projections, the scores and the weighted sum."""
    return 8 * batch * length * size * size + 4 * batch * length * length * size


def feed_forward_flops(size: int, intermediate_size: int, tokens: int) -> int:
    """Returns the FLOPs of the two projections."""
    return 4 * tokens * size * intermediate_size


def masked_token_flops(size: int, embedding_size: int, vocabulary: int, labelled: int) -> int:
    """Returns the FLOPs of a masked-token head on its labelled positions."""
    return 2 * labelled * embedding_size * (size + vocabulary)


def match_flops(size: int, batch: int) -> int:
    """Returns the FLOPs of the MATCH head."""
    return 2 * batch * size * (size + 2)
