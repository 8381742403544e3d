import math

import pytest
import torch

from xdscale.models.cross_modal import CrossModalLayer


def dense(x, module):
    return x @ module.weight.T + module.bias


def layer_norm(x, module):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-12).sqrt() * module.weight + module.bias


def attend(x, context, mask, module, heads):
    """Post-LN multi-head attention, written out (spec §2.3), one head at a time."""
    query, key, value = dense(x, module.query), dense(context, module.key), dense(context, module.value)
    size = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
        weights = (scores.exp() * mask[:, None, :]) / (scores.exp() * mask[:, None, :]).sum(-1, keepdim=True)
        outputs.append(weights @ value[..., part])
    return layer_norm(x + dense(torch.cat(outputs, -1), module.output), module.norm)


def feed_forward(x, module):
    hidden = dense(x, module.intermediate)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return layer_norm(x + dense(hidden, module.output), module.norm)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return CrossModalLayer(12, 8, 3, 2, 20, 0.1).double().eval()


@pytest.fixture
def streams():
    torch.manual_seed(1)
    language = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    clip = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    language_mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    clip_mask = torch.tensor([[True, True, True, False, True, False], [True] * 6])
    return language, clip, language_mask, clip_mask


def test_equals_the_formulas_of_the_spec(layer, streams):
    """Spec xdbert §2.3: cross-attention from the layer's inputs, self-attention, feed-forward, all post-LN."""
    language, clip, language_mask, clip_mask = streams
    found = layer(*streams)
    lang = attend(language, clip, clip_mask, layer.language_cross, 3)
    text = attend(clip, language, language_mask, layer.clip_cross, 2)
    lang = attend(lang, lang, language_mask, layer.language_self, 3)
    text = attend(text, text, clip_mask, layer.clip_self, 2)
    expected = feed_forward(lang, layer.language_feed_forward), feed_forward(text, layer.clip_feed_forward)
    weights = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    inputs = [language, clip, *layer.parameters()]
    gradients = []
    for outputs in (found, expected):
        total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_the_order_of_the_two_directions_does_not_matter(layer, streams):
    """Spec xdbert §10 fact 6: both cross-attentions read pre-update inputs."""
    language, clip, language_mask, clip_mask = streams
    calls = []
    layer.language_cross.register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    layer.clip_cross.register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    found = layer(*streams)
    assert [
        tuple(x is y for x, y in zip(call, expected, strict=True))
        for call, expected in zip(calls, ((language, clip), (clip, language)), strict=True)
    ] == [(True, True), (True, True)]
    text = layer.clip_cross(clip, language, language_mask)
    lang = layer.language_cross(language, clip, clip_mask)
    lang = layer.language_feed_forward(layer.language_self(lang, lang, language_mask))
    text = layer.clip_feed_forward(layer.clip_self(text, text, clip_mask))
    assert torch.equal(found[0], lang)
    assert torch.equal(found[1], text)


def test_no_mask_means_all_positions(layer, streams):
    language, clip, _, _ = streams
    everything = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(layer(language, clip, None, None), layer(language, clip, *everything))


@pytest.mark.parametrize(
    ("sizes", "parts", "total"),
    [
        ((768, 512, 12, 8, 3072), (1_970_688, 1_313_792, 2_363_904, 1_051_648, 4_723_968, 3_150_336), 14_574_336),
        ((1024, 512, 16, 8, 4096), (3_151_872, 1_575_936, 4_200_448, 1_051_648, 8_395_776, 4_199_936), 22_575_616),
    ],
)
def test_parameter_counts_of_the_parts(sizes, parts, total):
    """Spec xdbert §2.5 and §10 fact 1: the sums behind Table 6."""
    with torch.device("meta"):
        layer = CrossModalLayer(*sizes, 0.1)
    names = ("language_cross", "clip_cross", "language_self", "clip_self")
    names += ("language_feed_forward", "clip_feed_forward")
    counts = [sum(p.numel() for p in getattr(layer, name).parameters()) for name in names]
    assert counts == list(parts)
    assert sum(p.numel() for p in layer.parameters()) == total


def test_dropout_acts_in_training_only(streams):
    torch.manual_seed(0)
    layer = CrossModalLayer(12, 8, 3, 2, 20, 0.5).double()
    first, second = layer(*streams), layer(*streams)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    layer.eval()
    assert torch.equal(layer(*streams)[0], layer(*streams)[0])


def test_attention_dropout_follows_the_rate(monkeypatch, layer, streams):
    rates = []

    def spy(query, key, value, key_mask, dropout):
        rates.append(dropout)
        return torch.zeros_like(query)

    monkeypatch.setattr("xdscale.models.cross_modal.attention", spy)
    layer(*streams)
    layer.train()(*streams)
    assert rates == [0.0] * 4 + [0.1] * 4


def test_attention_map_is_the_mean_over_heads(layer, streams):
    language, clip, _, clip_mask = streams
    found = layer.language_cross.attention_map(language, clip, clip_mask)
    query, key = dense(language, layer.language_cross.query), dense(clip, layer.language_cross.key)
    expected = 0
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 2
        expected = expected + scores.masked_fill(~clip_mask[:, None], -torch.inf).softmax(-1) / 3
    torch.testing.assert_close(found, expected)


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match="5 heads do not divide states of size 12"):
        CrossModalLayer(12, 8, 5, 2, 20, 0.1)
