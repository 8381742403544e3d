"""The cross-modal layer written out for one sample without padding, as an independent reference; a small BERT."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel


@pytest.fixture(scope="session")
def layer_formula():
    """Returns a function (layer, language [s, H], clip [c, D], language_heads, clip_heads) -> both new states."""
    return _layer


@pytest.fixture(scope="session")
def varied_bert():
    """Returns a function (sizes) -> BERT, whose norms and biases are not those of the start."""

    def of(sizes):
        torch.manual_seed(2)
        model = BertModel(BertConfig(**sizes)).eval()
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    return of


def _layer(layer, language, clip, language_heads, clip_heads):
    """Spec xdbert §2.3: cross-attention from the layer's inputs, self-attention, feed-forward, all post-LN."""
    crossed = _attend(language, clip, layer.language_cross, language_heads)
    clip = _attend(clip, language, layer.clip_cross, clip_heads)
    language = _attend(crossed, crossed, layer.language_self, language_heads)
    clip = _attend(clip, clip, layer.clip_self, clip_heads)
    return _feed_forward(language, layer.language_feed_forward), _feed_forward(clip, layer.clip_feed_forward)


def _dense(x, module):
    return x @ module.weight.T + module.bias


def _layer_norm(x, module):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-12).sqrt() * module.weight + module.bias


def _attend(x, context, module, heads):
    """Post-LN multi-head attention, one head at a time."""
    query, key, value = _dense(x, module.query), _dense(context, module.key), _dense(context, module.value)
    size = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        powers = (query[:, part] @ key[:, part].T / math.sqrt(size)).exp()
        outputs.append(powers / powers.sum(-1, keepdim=True) @ value[:, part])
    return _layer_norm(x + _dense(torch.cat(outputs, -1), module.output), module.norm)


def _feed_forward(x, module):
    hidden = _dense(x, module.intermediate)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return _layer_norm(x + _dense(hidden, module.output), module.norm)
