import pytest
import torch
from transformers import AutoModel

from xdscale.models.operations import use_definitions
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip, Model
from xdscale.systems.xdbert import build_model


def spec(language="bert-base-uncased", clip="ViT-B-32", *, weights="random", layers=2, dropout=0.1):
    return Model(
        language=Language(name=str(language), weights=weights),
        clip=Clip(name=str(clip), weights="random"),
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


def check_shapes(model, size, length, blocks):
    """One text that fills all blocks but the last, which holds three tokens; fresh LayerNorms end both streams."""
    torch.manual_seed(0)
    clip_lengths = torch.full((1, blocks), 77)
    clip_lengths[0, -1] = 3
    with torch.no_grad():
        language, clip = model(
            torch.randint(0, 30522, (1, length)), torch.randint(0, 49408, (1, blocks, 77)), clip_lengths
        )
    assert language.shape == (1, length, size)
    assert clip.shape == (1, blocks * 77, model.clip.output_size)
    assert not clip[0, -74:].any()
    for states in (language[0], clip[0, :-74]):
        torch.testing.assert_close(states.mean(-1), torch.zeros(len(states)), rtol=0, atol=1e-5)
        torch.testing.assert_close(states.var(-1, unbiased=False), torch.ones(len(states)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "inputs"),
    [
        ("bert-base-uncased", 768, [(512, 9), (128, 4)]),
        ("google/electra-large-discriminator", 1024, [(128, 4)]),
    ],
)
def test_output_shapes(name, size, inputs):
    """Spec xdbert §10 fact 2, (B, 512) with (B, 9, 77) and (B, 128) with (B, 4, 77), at the published sizes."""
    torch.set_num_threads(2)
    model = build_model(spec(name)).eval()
    assert model.clip.output_size == 512
    for length, blocks in inputs:
        check_shapes(model, size, length, blocks)
    torch.set_num_threads(1)


@pytest.mark.parametrize(("length", "blocks"), [(512, 9), (128, 4)])
def test_output_shapes_of_a_small_model(small, length, blocks):
    check_shapes(small, 128, length, blocks)


@pytest.fixture(scope="module")
def wide(cassette_model, clip_tiny):
    """The small model in fp64."""
    torch.manual_seed(0)
    return build_model(spec(cassette_model, clip_tiny, weights="pretrained")).double().eval()


def test_equals_the_parts_sample_by_sample(wide, inputs, layer_formula):
    """Both encoders and the formula of spec xdbert §2.3 on each text alone, without any padding, fp64."""
    language_ids, clip_ids, clip_lengths = inputs
    lengths = torch.tensor([13, 20])
    mask = torch.arange(20) < lengths[:, None]
    with wide.recorded_attention() as maps:
        language, clip = wide(language_ids, clip_ids, clip_lengths, mask)
    expected_language, expected_clip = torch.zeros_like(language), torch.zeros_like(clip)
    for sample, length in enumerate(lengths):
        states = wide.language(language_ids[sample : sample + 1, :length]).last_hidden_state[0]
        features = zip(wide.clip.tower(clip_ids[sample]), clip_lengths[sample], strict=True)
        text = torch.cat([block[:valid] for block, valid in features])  # the tower's states at valid positions
        for layer in wide.layers:
            states, text = layer_formula(layer, states, text, 2, 2)
        expected_language[sample, :length] = states
        places = (torch.arange(77) < clip_lengths[sample, :, None]).flatten()
        expected_clip[sample, places] = text
    torch.testing.assert_close((language, clip), (expected_language, expected_clip), rtol=1e-10, atol=1e-10)
    assert [tuple(weights.shape) for weights in maps] == [(13, 184)] * 2
    found, expected = (
        torch.autograd.grad((x**3).sum() + (y**3).sum(), trained(wide))
        for x, y in ((language, clip), (expected_language, expected_clip))
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    ("language", "clip"),
    [
        ([0, 4, 5, 20, 31], [1, 2, 78, 183, 231, 308, 319]),
        ([3, 8], [240]),  # no row of one sample on either side
        ([20, 21], []),
        ([], [17, 250]),
    ],
)
def test_selected_states_are_those_of_the_whole_model(wide, inputs, language, clip, with_mask):
    """The last layer at some positions only: the same states and gradients as at all positions, fp64."""
    mask = torch.arange(20) < torch.tensor([[13], [20]]) if with_mask else None
    selected = torch.tensor(language, dtype=torch.int64), torch.tensor(clip, dtype=torch.int64)
    everything = wide(*inputs, mask)
    expected = tuple(states.flatten(0, 1)[rows] for states, rows in zip(everything, selected, strict=True))
    found = wide(*inputs, mask, selected=selected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pair = (torch.autograd.grad(sum((x**3).sum() for x in states), trained(wide)) for states in (found, expected))
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_last_layer_is_cut_and_only_to_what_is_selected(cassette_model, clip_tiny, inputs, checkpointing):
    model = build_model(spec(cassette_model, clip_tiny, weights="pretrained", layers=3))
    if checkpointing:
        model.enable_activation_checkpointing()
    rows = []
    for layer in model.layers:
        for side in (layer.language_feed_forward, layer.clip_feed_forward):
            side.register_forward_hook(lambda _, args, out: rows.append((len(args[0]), len(out))))
    with torch.set_grad_enabled(checkpointing):
        model(*inputs, selected=(torch.tensor([3, 8, 22]), torch.tensor([240])))
    # 2 x 20 language tokens; 77 + 77 + 30 and 77 + 12 CLIP tokens
    assert rows == [(40, 40), (273, 273)] * 2 + [(3, 3), (1, 1)]


def test_no_language_mask_means_all_positions(wide, inputs):
    everything = torch.ones_like(inputs[0], dtype=torch.bool)
    with torch.no_grad():
        found, expected = wide(*inputs), wide(*inputs, everything)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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
    with small.recorded_attention() as maps:
        before_word, _ = small(language_ids, with_word, clip_lengths)
    assert [weights.shape[1] for weights in maps] == [77 + 77 + 30] * 2  # the word at position 5 is among them
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


@pytest.fixture(params=["fused", "plain"])
def plain_and_thrifty(request, cassette_model, clip_tiny):
    """Twice the same model, the second with activation checkpointing."""
    torch.manual_seed(0)
    model = spec(cassette_model, clip_tiny, weights="pretrained")
    plain, thrifty = (build_model(model).train() for _ in range(2))
    if request.param == "plain":
        use_definitions(plain), use_definitions(thrifty)
    thrifty.load_state_dict(plain.state_dict())
    thrifty.enable_activation_checkpointing()
    return plain, thrifty


def all_gradients(model, inputs, seed, selected):
    """By name, after one forward pass with dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    language, clip = model(*inputs, selected=selected)
    (language.square().sum() + (clip**3).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("selected", [None, (torch.tensor([0, 7, 9]), torch.tensor([3, 232, 300]))])
def test_activation_checkpointing_changes_no_gradient(plain_and_thrifty, inputs, selected):
    """Dropout is on, of states and of attention weights, and is drawn alike in the second pass."""
    plain, thrifty = plain_and_thrifty
    expected = all_gradients(plain, inputs, 7, selected)
    torch.testing.assert_close(all_gradients(thrifty, inputs, 7, selected), expected)
    other = all_gradients(plain, inputs, 8, selected)
    name = "layers.0.language_self.value.weight"
    assert (other[name] - expected[name]).norm() > 0.1 * expected[name].norm()  # masks matter


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
    """The first sample's tokens without padding: 77 + 77 + 30 of CLIP."""
    with small.recorded_attention() as maps:
        language, clip = small(*inputs)
    assert torch.equal(language, small(*inputs)[0])
    assert torch.equal(clip, small(*inputs)[1])
    assert [tuple(weights.shape) for weights in maps] == [(20, 184)] * 2
    for weights in maps:
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(20))
        assert weights.min() > 0
    assert len(maps) == 2  # what runs after it is not recorded
    with small.recorded_attention() as alone:
        small(*(x[:1] for x in inputs))
    torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-7)
