import pytest
import torch

from xdscale.models.cross_modal import CrossModalLayer, SelectedTokens
from xdscale.models.operations import ResidualNorm, attention_map, use_definitions
from xdscale.models.packed_tokens import chosen_tokens, packed_by_lengths

LANGUAGE_MASK = [[True] * 5, [True, True, True, False, False], [False, True, False, True, False]]
CLIP_MASK = [[True, True, True, False, True, False], [True] * 6, [True] + [False] * 5]


@pytest.fixture(params=["fused", "plain"])
def layer(request):
    torch.manual_seed(0)
    layer = CrossModalLayer(12, 8, 3, 2, 20, 0.1).double().eval()
    return use_definitions(layer) if request.param == "plain" else layer


@pytest.fixture
def padded():
    """Language and CLIP states of three samples with their padding."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 5, 12), (3, 6, 8)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


@pytest.fixture
def packed_states(padded):
    """What the layer takes: states without padding, and how they are packed; samples of 5/4, 3/6 and 2/1 tokens."""
    masks = torch.tensor(LANGUAGE_MASK), torch.tensor(CLIP_MASK)
    language, clip = (packed_by_lengths(mask.sum(1), mask.shape[1]) for mask in masks)
    states = (x[mask].requires_grad_() for x, mask in zip(padded, masks, strict=True))
    return *states, language, clip


def sample_rows(packed):
    """A slice of the packed tokens for each sample."""
    bounds = packed.cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def gradients(outputs, inputs):
    """Of a fixed random projection of both outputs."""
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


def test_equals_the_formulas_of_the_spec(layer, padded, packed_states, layer_formula):
    """Spec xdbert §2.3, on each sample's valid positions alone, read through its mask."""
    leaves = [x.detach().requires_grad_() for x in padded]
    results = []
    for language, clip, language_mask, clip_mask in zip(*leaves, LANGUAGE_MASK, CLIP_MASK, strict=True):
        results.append(layer_formula(layer, language[language_mask], clip[clip_mask], 3, 2))
    expected = tuple(torch.cat(side) for side in zip(*results, strict=True))
    found = layer(*packed_states)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found = gradients(found, [*packed_states[:2], *layer.parameters()])
    expected = list(gradients(expected, [*leaves, *layer.parameters()]))
    for side, mask in enumerate((LANGUAGE_MASK, CLIP_MASK)):
        assert not expected[side][~torch.tensor(mask)].any()
        expected[side] = expected[side][torch.tensor(mask)]
    torch.testing.assert_close(found, tuple(expected), rtol=1e-8, atol=1e-10)


def test_the_order_of_the_two_directions_does_not_matter(layer, packed_states):
    """Spec xdbert §10 fact 6: both cross-attentions read pre-update inputs."""
    language, clip, language_packed, clip_packed = packed_states
    calls = []
    layer.language_cross.register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    layer.clip_cross.register_forward_pre_hook(lambda _, args: calls.append(args[:2]))
    found = layer(*packed_states)
    assert [
        tuple(x is y for x, y in zip(call, expected, strict=True))
        for call, expected in zip(calls, ((language, clip), (clip, language)), strict=True)
    ] == [(True, True), (True, True)]
    text = layer.clip_cross(clip, language, clip_packed, language_packed)
    lang = layer.language_cross(language, clip, language_packed, clip_packed)
    lang = layer.language_feed_forward(layer.language_self(lang, lang, language_packed, language_packed))
    text = layer.clip_feed_forward(layer.clip_self(text, text, clip_packed, clip_packed))
    assert torch.equal(found[0], lang)
    assert torch.equal(found[1], text)


SELECTED = {
    "some": ([0, 3, 4, 6], [2, 3, 5, 9, 10]),
    "none of the second sample": ([1, 8, 9], [0, 10]),
    "one sample": ([5, 7], [4]),
    "no language": ([], [0, 1, 10]),
    "no CLIP": ([0, 5, 8], []),
    "all": (list(range(10)), list(range(11))),
}


@pytest.mark.parametrize("rows", SELECTED.values(), ids=SELECTED)
def test_selected_tokens_are_those_of_the_whole_layer(layer, packed_states, rows):
    """What is left out changes no selected state and no gradient, fp64."""
    language_rows, clip_rows = (torch.tensor(side, dtype=torch.int64) for side in rows)
    language, clip, language_packed, clip_packed = packed_states
    selected = SelectedTokens(
        language_rows,
        chosen_tokens(language_rows, language_packed),
        clip_rows,
        chosen_tokens(clip_rows, clip_packed),
    )
    everything = layer(*packed_states)
    expected = everything[0][language_rows], everything[1][clip_rows]
    found = layer(*packed_states, selected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [language, clip, *layer.parameters()]
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("plain", [False, True])
def test_dropout_acts_in_training_only(packed_states, plain):
    torch.manual_seed(0)
    layer = CrossModalLayer(12, 8, 3, 2, 20, 0.5).double()
    if plain:
        use_definitions(layer)
    first, second = layer(*packed_states), layer(*packed_states)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    layer.eval()
    assert torch.equal(layer(*packed_states)[0], layer(*packed_states)[0])


def test_attention_dropout_follows_the_rate(packed_states):
    """The kernel gets the rate in training only, with a seed of its own for every call."""
    layer = CrossModalLayer(12, 8, 3, 2, 20, 0.1).double().eval()
    rates, seeds = [], []

    def spy(query, key, value, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, dropout, seed):
        rates.append(dropout)
        seeds.append(None if seed is None else seed.item())
        return torch.zeros_like(query)

    for name in ("language_cross", "clip_cross", "language_self", "clip_self"):
        getattr(layer, name).attention.function = spy
    layer(*packed_states)
    layer.train()(*packed_states)
    assert rates == [0.0] * 4 + [0.1] * 4
    assert seeds[:4] == [None] * 4
    assert None not in seeds[4:]
    assert len(set(seeds[4:])) == 4


@pytest.mark.parametrize("plain", [False, True])
def test_attention_weights_are_dropped_and_not_only_the_output(packed_states, plain):
    """Without the dropout of states, the masks of the attention weights alone decide."""
    torch.manual_seed(0)
    layer = CrossModalLayer(12, 8, 3, 2, 20, 0.5).double()
    if plain:
        use_definitions(layer)
    for module in layer.modules():
        if isinstance(module, ResidualNorm):
            module.eval()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(*packed_states))
    for first, again, other in zip(*outputs, strict=True):
        assert torch.equal(first, again)
        assert (first - other).abs().max() > 1e-3


def test_attention_map_is_the_mean_over_heads_of_the_first_sample(layer, packed_states):
    language, clip, language_packed, clip_packed = packed_states
    module = layer.language_cross
    calls = []
    module.attention.register_forward_hook(lambda _, inputs, __: calls.append(inputs))
    layer(*packed_states)
    found = attention_map(*calls[0])
    query = language[sample_rows(language_packed)[0]] @ module.query.weight.T + module.query.bias
    key = clip[sample_rows(clip_packed)[0]] @ module.key.weight.T + module.key.bias
    expected = 0
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        expected = expected + (query[:, part] @ key[:, part].T / 2).softmax(-1) / 3
    assert found.shape == (5, 4)
    torch.testing.assert_close(found, expected)


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match="5 heads do not divide states of size 12"):
        CrossModalLayer(12, 8, 5, 2, 20, 0.1)
