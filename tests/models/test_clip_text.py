import copy

import open_clip
import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from xdscale.models.clip_text import CausalBlockAttention, CLIPTextEncoder
from xdscale.models.operations import use_definitions
from xdscale.pretrained.clip import load_clip_text_tower
from xdscale.recipes.xdbert.schema import Clip

START, END = 49406, 49407


@pytest.fixture(scope="module")
def encoder():
    """ViT-B/32's text tower at its real size, with random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return load_clip_text_tower(Clip(name="ViT-B-32", weights="random")).eval()


@pytest.fixture(scope="module")
def clip_ids():
    return torch.randint(0, 49406, (1, 4, 77), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_features_are_open_clips_at_every_position(tmp_path):
    """Spec xdbert §2.2: ln_final, then text_projection; open_clip's own readout sees the same at the end token."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    reference = open_clip.CLIP(39, vision, text, quick_gelu=True).eval()
    encoder = load_clip_text_tower(_stored(reference, text, tmp_path)).eval()
    ids = torch.randint(1, 49406, (5, 77))
    for row, end in enumerate((2, 10, 33, 60, 76)):
        ids[row, end], ids[row, end + 1 :] = END, 0
    features = encoder(ids.view(1, 5, 77))
    assert features.shape == (1, 385, 39)
    expected = reference.encode_text(ids)
    at_end = features.view(5, 77, 39)[torch.arange(5), ids.argmax(-1)]
    torch.testing.assert_close(at_end, expected, rtol=1e-5, atol=1e-5)
    assert (at_end.norm(dim=-1) - 1).abs().min() > 0.01  # not normalised


def _stored(reference, text, tmp_path):
    import json

    from safetensors.torch import save_file

    config = tmp_path / "clip.json"
    config.write_text(json.dumps({"embed_dim": 39, "quick_gelu": True, "text_cfg": text}))
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, tmp_path / "clip.safetensors")
    return Clip(name=str(config), weights=str(tmp_path / "clip.safetensors"))


@torch.no_grad()
def test_swapping_blocks_swaps_features(encoder, clip_ids):
    """Spec xdbert §10 fact 3: blocks are encoded apart, bit-equal wherever they stand."""
    order = [2, 0, 3, 1]
    features = encoder(clip_ids).view(4, 77, 512)
    swapped = encoder(clip_ids[:, order]).view(4, 77, 512)
    assert torch.equal(swapped, features[order])


@torch.no_grad()
def test_later_tokens_are_invisible(encoder, clip_ids):
    """Spec xdbert §10 fact 4, first half: CLIP is causal within a block."""
    changed = clip_ids.clone()
    changed[0, 1, 41:] = (changed[0, 1, 41:] + 1) % 49406
    before, after = encoder(clip_ids).view(4, 77, 512), encoder(changed).view(4, 77, 512)
    torch.testing.assert_close(after[1, :41], before[1, :41], rtol=0, atol=1e-5)
    assert (after[1, 41:] - before[1, 41:]).abs().amax(-1).min() > 1e-2
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_parameter_count(encoder):
    """Spec xdbert §10 fact 1 and §2.5: 63,165,952 + text_projection 262,144 + logit_scale 1."""
    assert sum(p.numel() for p in encoder.parameters()) == 63_165_952 + 262_144 + 1
    assert encoder.tower.text_projection.numel() == 262_144
    assert [n for n, p in encoder.named_parameters() if not p.requires_grad] == ["logit_scale"]
    assert 1 / encoder.logit_scale.exp().item() == pytest.approx(0.07)  # the temperature that CLIP began with


def test_a_tower_that_pools_is_refused():
    tower = open_clip.transformer.TextTransformer(width=8, heads=2, layers=1, output_dim=8)
    with pytest.raises(ValueError, match="pool_type 'none', found 'argmax'"):
        CLIPTextEncoder(tower)


def features_and_gradients(run, tower, ids, dtype=None):
    tower.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        features = run(ids).view(3, 77, 24)
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    (features * weights).sum().backward()
    return features.detach(), {name: p.grad.clone() for name, p in tower.named_parameters()}


@pytest.fixture(params=[open_clip.transformer.QuickGELU, torch.nn.GELU], ids=["quick", "gelu"])
def tower(request):
    """open_clip's own, with activations on either side of 0."""
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 4, "layers": 2, "output_dim": 24, "vocab_size": 99}
    tower = open_clip.transformer.TextTransformer(**sizes, act_layer=request.param, pool_type="none")
    for block in tower.transformer.resblocks:
        torch.nn.init.normal_(block.mlp.c_fc.weight, std=0.5)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.5)
    return tower


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients_are_open_clips(tower, plain, checkpointing):
    ids = torch.randint(99, (3, 77), generator=torch.Generator().manual_seed(2))
    encoder = CLIPTextEncoder(copy.deepcopy(tower))
    if plain:
        use_definitions(encoder)
    if checkpointing:
        encoder.enable_activation_checkpointing()
    expected, expected_gradients = features_and_gradients(tower, tower, ids)
    found, gradients = features_and_gradients(encoder, encoder.tower, ids.view(1, 3, 77))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert list(gradients) == list(expected_gradients)
    for name, gradient in gradients.items():
        reference = expected_gradients[name]
        # A key's bias has the gradient 0 up to rounding, beside those of queries and values.
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


def test_feed_forwards_keep_one_wide_tensor(tower):
    """The states before the activation; open_clip keeps those after it too, and for QuickGELU the sigmoid."""
    encoder = CLIPTextEncoder(tower)
    wide = []

    def pack(tensor):
        if tensor.shape[-1] == 4 * 32 and tensor.numel() == 3 * 77 * 4 * 32:
            wide.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = encoder(torch.ones(1, 3, 77, dtype=torch.int64))  # alive, so that no address is used twice
    assert kept.requires_grad
    assert len(set(wide)) == 2  # one for each block


def test_under_autocast_gradients_stay_near(tower):
    ids = torch.randint(99, (1, 3, 77), generator=torch.Generator().manual_seed(2))
    encoder = CLIPTextEncoder(tower)
    _, expected = features_and_gradients(encoder, encoder.tower, ids)
    _, gradients = features_and_gradients(encoder, encoder.tower, ids, torch.bfloat16)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("plain", [False, True])
def test_clip_block_computes_what_open_clip_computes(plain):
    """One of open_clip's blocks with its own attention and with ours; names of parameters stay."""
    torch.manual_seed(7)
    block = ResidualAttentionBlock(32, 4).double()
    nn.init.normal_(block.attn.in_proj_bias)
    names = sorted(block.state_dict())
    states = torch.randn(3, 77, 32, dtype=torch.float64)
    causal = torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1)
    expected = block(states, attn_mask=causal)
    block.attn = CausalBlockAttention(block.attn)
    if plain:
        use_definitions(block)
    torch.testing.assert_close(block(states, attn_mask=causal), expected, rtol=1e-12, atol=1e-12)
    assert sorted(block.state_dict()) == names
