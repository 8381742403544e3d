"""XDBERT as the released code computes it: the readable reference that the training step is measured against.

Eager attention with the whole matrix of weights in memory, every CLIP block whether it holds text or not, padded
positions masked by adding -10,000 to scores, logits over the whole vocabulary at every position, and losses that
ignore most of them (spec xdbert §2 and §3). It reads the weights of an `XDBERTAdaptation` and calls none of its
code but `nn.Linear`, `nn.LayerNorm` and `nn.Embedding`, so that both can be compared.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.cross_modal import AttentionSublayer, CrossModalLayer, FeedForward
from xdscale.models.heads import MaskedTokenHead, MatchHead
from xdscale.systems.xdbert import XDBERTAdaptation

CLIP_BLOCKS = 9
"""Blocks of every text in the released code (spec xdbert §2.2)."""

MASKED_SCORE = -10000.0
"""What the released code adds to the scores of padding."""

Run = Callable[..., Any]
"""Calls a part of the model: `run(name, function, *arguments)`."""


def _call(_name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def plain_losses(
    module: XDBERTAdaptation, batch: Mapping[str, torch.Tensor], *, dropout: float, run: Run = _call
) -> dict[str, torch.Tensor]:
    """Computes the summed loss of each objective that is on.

    Args:
        module: whose weights are used.
        batch: as for `XDBERTAdaptation.forward`; CLIP blocks are filled up to the released code's number.
        dropout: rate everywhere but in CLIP-T; 0 for evaluation.
        run: calls each part; a stopwatch may stand here.

    Returns:
        The loss of each of "mlm", "match", "clip_tokens", summed over its targets.
    """
    clip_ids, clip_mask, clip_positions = _filled_up(batch)
    model = module.model
    language = run("language encoder", language_states, model.language, batch["language_ids"], dropout)  # [b, S, H]
    clip = run("CLIP text tower", clip_states, model.clip, clip_ids)  # [b, N * 77, D]
    for layer in model.layers:
        language, clip = run("cross-modal layers", cross_layer, layer, language, clip, clip_mask, dropout)
    losses = {}
    if module.mlm is not None:
        places = batch["masked_lm_positions"], batch["masked_lm_labels"]
        losses["mlm"] = run("heads", masked_token_loss, module.mlm, language, *places)
    if module.match is not None:
        losses["match"] = run("heads", match_loss, module.match, language, batch["match_labels"])
    if module.clip_tokens is not None:
        places = clip_positions, batch["clip_labels"]
        losses["clip_tokens"] = run("heads", masked_token_loss, module.clip_tokens, clip, *places)
    return losses


def language_states(encoder: PreTrainedModel, ids: torch.Tensor, dropout: float) -> torch.Tensor:
    """BERT or ELECTRA without its pooler: int64 [b, S] to [b, S, H]."""
    embeddings = encoder.embeddings
    places = torch.arange(ids.shape[1], device=ids.device)
    states = embeddings.word_embeddings(ids) + embeddings.position_embeddings(places)
    states = states + embeddings.token_type_embeddings(torch.zeros_like(ids))
    states = F.dropout(embeddings.LayerNorm(states), dropout)
    if hasattr(encoder, "embeddings_project"):  # ELECTRA's small discriminator
        states = _linear(encoder.embeddings_project, states)
    for layer in encoder.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        heads = encoder.config.num_attention_heads
        projected = (_linear(part, states) for part in (attention.query, attention.key, attention.value))
        attended = F.dropout(_linear(output.dense, attend(*projected, heads, None, dropout)), dropout)
        states = _layer_norm(output.LayerNorm, states + attended)
        hidden = F.gelu(_linear(layer.intermediate.dense, states))  # [b, S, intermediate size]
        output = layer.output
        states = _layer_norm(output.LayerNorm, states + F.dropout(_linear(output.dense, hidden), dropout))
    return states


def clip_states(encoder: CLIPTextEncoder, ids: torch.Tensor) -> torch.Tensor:
    """CLIP-T, each block on its own: int64 [b, N, 77] to [b, N * 77, D]."""
    tower, positions = encoder.tower, ids.shape[-1]
    states = tower.token_embedding(ids.flatten(0, 1)) + tower.positional_embedding  # [b * N, 77, width]
    causal = torch.full((positions, positions), float("-inf"), device=ids.device, dtype=states.dtype).triu(1)
    for block in tower.transformer.resblocks:
        attention = block.attn
        normed = _layer_norm(block.ln_1, states)
        projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        states = states + _linear(attention.out_proj, attend(*projected, tower.heads, causal, 0.0))
        hidden = _linear(block.mlp.c_fc, _layer_norm(block.ln_2, states))  # [b * N, 77, 4 * width]
        quick = block.mlp.c_proj.activation is not F.gelu
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        states = states + _linear(block.mlp.c_proj, hidden)
    return (_layer_norm(tower.ln_final, states) @ tower.text_projection).reshape(len(ids), -1, encoder.output_size)


def cross_layer(
    layer: CrossModalLayer, language: torch.Tensor, clip: torch.Tensor, clip_mask: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One cross-modal layer at all positions; `clip_mask` is added to scores of CLIP keys, [b, 1, 1, N * 77]."""
    crossed_language = _attention_sublayer(layer.language_cross, language, clip, clip_mask, dropout)
    crossed_clip = _attention_sublayer(layer.clip_cross, clip, language, None, dropout)
    language = _attention_sublayer(layer.language_self, crossed_language, crossed_language, None, dropout)
    clip = _attention_sublayer(layer.clip_self, crossed_clip, crossed_clip, clip_mask, dropout)
    return (
        _feed_forward(layer.language_feed_forward, language, dropout),
        _feed_forward(layer.clip_feed_forward, clip, dropout),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """dropout(softmax(Q Kᵀ / √d + mask)) V: [b, q, size] and [b, k, size] to [b, q, size]."""
    query, key, value = (_by_head(tokens, heads) for tokens in (query, key, value))
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # [b, heads, q, k]
    if mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).flatten(-2)


def fused_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """As `attend`, by PyTorch's own operation."""
    split = [_by_head(tokens, heads) for tokens in (query, key, value)]
    mask = None if mask is None else mask.to(query.dtype)
    return F.scaled_dot_product_attention(*split, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(-2)


def _by_head(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns [b, tokens, size] as [b, heads, tokens, d]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextlib.contextmanager
def attending_by(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Lets `plain_losses` attend by another function than `attend` while it is open."""
    global attend
    before, attend = attend, function
    try:
        yield
    finally:
        attend = before


def masked_token_loss(
    head: MaskedTokenHead, states: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy over the vocabulary at all positions, of which those without a label are ignored."""
    hidden = head.norm(F.gelu(_linear(head.transform, states)))
    logits = F.linear(hidden, head.decoder_weight, head.decoder_bias)  # [b, positions, V]
    everywhere = torch.full(states.shape[:2], -1, device=labels.device).flatten()
    everywhere[positions] = labels
    return F.cross_entropy(logits.flatten(0, 1), everywhere, ignore_index=-1, reduction="sum")


def match_loss(head: MatchHead, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "same text" from the first position."""
    logits = head.classifier(torch.tanh(head.pooler(states[:, 0])))  # [b, 2]
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")


def _attention_sublayer(
    sublayer: AttentionSublayer,
    states: torch.Tensor,
    context: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    projected = _linear(sublayer.query, states), _linear(sublayer.key, context), _linear(sublayer.value, context)
    attended = _linear(sublayer.output, attend(*projected, sublayer.heads, mask, dropout))
    return _layer_norm(sublayer.norm, states + F.dropout(attended, dropout))


def _feed_forward(sublayer: FeedForward, states: torch.Tensor, dropout: float) -> torch.Tensor:
    hidden = F.gelu(_linear(sublayer.intermediate, states))
    return _layer_norm(sublayer.norm, states + F.dropout(_linear(sublayer.output, hidden), dropout))


def _layer_norm(norm: nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
    """PyTorch's LayerNorm; the model's own module would add the residual itself."""
    return F.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """PyTorch's Linear; the model's own modules call kernels, and some activate the states."""
    return F.linear(states, linear.weight, linear.bias)


def _filled_up(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns CLIP ids [b, N, 77] with all blocks, the mask for scores [b, 1, 1, N * 77], and where targets stand."""
    samples, used, positions = batch["clip_ids"].shape
    blocks = max(CLIP_BLOCKS, used)
    ids = F.pad(batch["clip_ids"], (0, 0, 0, blocks - used))
    lengths = F.pad(batch["clip_lengths"], (0, blocks - used))
    valid = torch.arange(positions, device=ids.device) < lengths.unsqueeze(-1)  # [b, N, 77]
    mask = (~valid).flatten(1)[:, None, None, :] * MASKED_SCORE
    targets = batch.get("clip_positions", ids.new_empty(0))
    sample, place = targets // (used * positions), targets % (used * positions)
    return ids, mask, sample * blocks * positions + place
