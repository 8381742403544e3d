import pytest
import torch
from transformers import AutoModel

from xdscale import recipe
from xdscale.tasks.xdbert import build_model


def spec(language="bert-base-uncased", clip="ViT-B-32", *, weights="random", layers=2, dropout=0.1):
    return recipe.Model(
        language=recipe.Language(name=str(language), weights=weights),
        clip=recipe.Clip(name=str(clip), weights="random"),
        cross_layers=layers,
        dropout=dropout,
    )


@pytest.fixture(scope="module")
def small(cassette_model, clip_tiny):
    """The real 2-layer BERT with a small CLIP text tower."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return build_model(spec(cassette_model, clip_tiny, weights="pretrained")).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    language_ids = torch.randint(1000, 30522, (2, 20), generator=generator)
    clip_ids = torch.randint(1, 49406, (2, 3, 77), generator=generator)
    clip_lengths = torch.tensor([[77, 77, 30], [77, 12, 0]])
    clip_ids[torch.arange(77) >= clip_lengths[..., None]] = 0
    return language_ids, clip_ids, clip_lengths


@pytest.mark.parametrize(("name", "size"), [("bert-base-uncased", 768), ("google/electra-large-discriminator", 1024)])
@pytest.mark.parametrize(("length", "blocks", "clip_length"), [(512, 9, 693), (128, 4, 308)])
def test_output_shapes(name, size, length, blocks, clip_length):
    """Spec xdbert §10 fact 2, at the published sizes, without memory."""
    with torch.device("meta"):
        model = build_model(spec(name))
        language, clip = model(
            torch.zeros(3, length, dtype=torch.int64),
            torch.zeros(3, blocks, 77, dtype=torch.int64),
            torch.zeros(3, blocks, dtype=torch.int64),
        )
    assert language.shape == (3, length, size)
    assert clip.shape == (3, clip_length, 512)


@torch.no_grad()
def test_runs_at_the_published_size():
    """BERT-base with ViT-B/32's text tower, one forward pass with real memory."""
    torch.manual_seed(0)
    model = build_model(spec(layers=1)).eval()
    ids = torch.randint(0, 30522, (1, 32)), torch.randint(0, 49408, (1, 1, 77))
    language, clip = model(*ids, torch.tensor([[77]]))
    assert language.isfinite().all()
    assert clip.isfinite().all()
    # The last sublayer is a fresh LayerNorm: mean 0 and variance 1 in every state.
    for states in (language, clip):
        torch.testing.assert_close(states.mean(-1), torch.zeros(states.shape[:-1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(states.var(-1, unbiased=False), torch.ones(states.shape[:-1]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_later_clip_tokens_reach_earlier_positions_through_the_cross_layers(small, inputs):
    """Spec xdbert §10 fact 4, second half: the cross-modal layers are bidirectional."""
    language_ids, clip_ids, clip_lengths = inputs
    changed = clip_ids.clone()
    changed[0, 0, 40] += 1
    assert torch.equal(small.clip(changed)[0, :40], small.clip(clip_ids)[0, :40])
    language, clip = small(language_ids, clip_ids, clip_lengths)
    changed_language, changed_clip = small(language_ids, changed, clip_lengths)
    assert (changed_clip[0, :40] - clip[0, :40]).abs().amax(-1).min() > 1e-6
    assert (changed_language[0] - language[0]).abs().amax(-1).min() > 1e-6
    assert torch.equal(changed_language[1], language[1])


@torch.no_grad()
def test_padding_is_invisible_and_word_zero_is_not(small, inputs):
    """Spec xdbert §10 fact 5, and §9: id 0 in a text is a word, so the mask comes from lengths."""
    language_ids, clip_ids, clip_lengths = inputs
    before, _ = small(language_ids, clip_ids, clip_lengths)
    with_word = clip_ids.clone()
    with_word[0, 0, 5] = 0
    before_word, _, maps = small(language_ids, with_word, clip_lengths, return_attention=True)
    assert min(weights[:, 5].min() for weights in maps) > 0
    embedding = small.clip.tower.token_embedding.weight
    original = embedding[0].clone()
    embedding[0] = torch.randn(len(original))
    after, _ = small(language_ids, clip_ids, clip_lengths)
    after_word, _ = small(language_ids, with_word, clip_lengths)
    embedding[0] = original
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert (after_word[0] - before_word[0]).abs().max() > 1e-4


@torch.no_grad()
def test_an_empty_block_changes_nothing(small, inputs):
    """A batch may be cut to the blocks that its longest text needs."""
    language_ids, clip_ids, clip_lengths = inputs
    clip_ids, clip_lengths = clip_ids[1:, :2], clip_lengths[1:, :2]
    short = small(language_ids[1:], clip_ids, clip_lengths)
    padded_ids = torch.cat([clip_ids, torch.zeros(1, 7, 77, dtype=torch.int64)], 1)
    padded_lengths = torch.cat([clip_lengths, torch.zeros(1, 7, dtype=torch.int64)], 1)
    padded = small(language_ids[1:], padded_ids, padded_lengths)
    torch.testing.assert_close(padded[0], short[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1][:, :89], short[1][:, :89], rtol=0, atol=1e-5)


@torch.no_grad()
def test_language_padding_is_invisible_with_a_mask(small, inputs):
    language_ids, clip_ids, clip_lengths = inputs
    mask = torch.ones_like(language_ids, dtype=torch.bool)
    mask[1, 12:] = False
    other = language_ids.clone()
    other[1, 12:] = 5
    first = small(language_ids, clip_ids, clip_lengths, mask)
    second = small(other, clip_ids, clip_lengths, mask)
    torch.testing.assert_close(second[0][mask], first[0][mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[1][1, :89], first[1][1, :89], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_language_encoder_is_the_pretrained_one(small, inputs, cassette_model):
    reference = AutoModel.from_pretrained(cassette_model, add_pooling_layer=False).eval()
    expected = reference(inputs[0]).last_hidden_state
    assert torch.equal(small.language(inputs[0]).last_hidden_state, expected)


def test_only_unreachable_parameters_are_frozen(small, inputs):
    """BERT's own pooler and CLIP's logit_scale are counted in Table 6 but no loss reaches them."""
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"language.pooler.dense.weight", "language.pooler.dense.bias", "clip.logit_scale"}
    language, clip = small(*inputs)
    (language.square().sum() + clip.square().sum()).backward()
    assert {name for name, p in small.named_parameters() if p.grad is None} == frozen
    small.zero_grad()


def test_bf16_stays_near_fp32(small, inputs, cassette_model, clip_tiny):
    """DeepSpeed casts the whole module."""
    half = build_model(spec(cassette_model, clip_tiny, weights="pretrained")).eval()
    half.load_state_dict(small.state_dict())
    half.bfloat16()
    language, clip = half(*inputs)
    assert language.dtype == clip.dtype == torch.bfloat16
    (language.float().square().sum() + clip.float().square().sum()).backward()
    with torch.no_grad():
        expected = small(*inputs)
    for found, wanted in zip((language, clip), expected, strict=True):
        assert (found.float() - wanted).abs().mean() < 0.03  # states have unit variance; bf16 steps are 2**-8


@pytest.fixture
def plain_and_thrifty(cassette_model, clip_tiny):
    """Twice the same model, the second with activation checkpointing."""
    torch.manual_seed(0)
    plain, thrifty = (build_model(spec(cassette_model, clip_tiny, weights="pretrained")).train() for _ in range(2))
    thrifty.load_state_dict(plain.state_dict())
    thrifty.enable_activation_checkpointing()
    return plain, thrifty


def test_activation_checkpointing_changes_no_gradient(plain_and_thrifty, inputs):
    for model in plain_and_thrifty:
        torch.manual_seed(7)  # dropout is on, and must be drawn alike in the second pass
        language, clip = model(*inputs)
        (language.square().sum() + (clip**3).sum()).backward()
    pairs = zip(*(model.named_parameters() for model in plain_and_thrifty), strict=True)
    for (name, expected), (_, found) in pairs:
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("part", ["language encoder", "CLIP text tower", "whole"])
def test_activation_checkpointing_keeps_less(plain_and_thrifty, inputs, part):
    sizes = []
    for model in plain_and_thrifty:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            if part == "language encoder":
                model.language(inputs[0])
            elif part == "CLIP text tower":
                model.clip(inputs[1])
            else:
                model(*inputs)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 3


@torch.no_grad()
def test_attention_maps(small, inputs):
    language, clip, maps = small(*inputs, return_attention=True)
    assert torch.equal(language, small(*inputs)[0])
    assert [tuple(weights.shape) for weights in maps] == [(20, 231)] * 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(20))
        assert not weights[:, 154 + 30 :].any()
        assert weights[:, : 154 + 30].min() > 0
