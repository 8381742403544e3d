"""Encoders of transformers on the packed kernels, and CLIP's blocks, against the authors' own attention."""

from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from xdscale.kernels.causal_attention import causal_attention, causal_attention_plain
from xdscale.models.attention import recompute_layers, use_packed_attention
from xdscale.models.clip_text import CausalBlockAttention

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


@pytest.fixture(params=[(BertConfig, BertModel), (ElectraConfig, ElectraModel)], ids=["bert", "electra"])
def encoder(request):
    """A small encoder in fp64, and two texts of 11 and 5 tokens padded to 11."""
    config_class, model_class = request.param
    torch.manual_seed(1)
    return model_class(config_class(**SIZES)).double().eval()


@pytest.fixture
def padded():
    ids = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(2))
    return ids, torch.arange(11) < torch.tensor([[11], [5]])


def states_and_gradients(encoder, ids, mask, seed=0):
    """The valid states and the gradients of a fixed weighting of them."""
    encoder.zero_grad()
    torch.manual_seed(seed)
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    valid = states if mask is None else states[mask]
    (valid * torch.linspace(-1, 1, valid.numel(), dtype=valid.dtype).view_as(valid)).sum().backward()
    return valid.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_states_and_gradients_are_those_of_transformers(encoder, padded, plain, masked, dtype):
    ids, mask = padded[0], padded[1] if masked else None
    encoder.set_attn_implementation("eager")
    expected, expected_gradients = states_and_gradients(encoder, ids, mask)
    encoder.to(dtype)
    use_packed_attention(encoder, plain=plain)
    found, gradients = states_and_gradients(encoder, ids, mask)
    error = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
    assert len(gradients) == len(expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient.double(), wanted, rtol=10 * error, atol=10 * error)


def test_kernels_and_definition_drop_the_same_weights(encoder, padded):
    encoder.float().train()
    curves = []
    for plain, seed in ((False, 3), (True, 3), (True, 4)):
        use_packed_attention(encoder, plain=plain)
        curves.append(states_and_gradients(encoder, *padded, seed=seed)[0])
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(curves[1], curves[2], atol=1e-2)


def test_recomputed_layers_draw_the_same_mask(encoder, padded):
    encoder.float().train()
    use_packed_attention(encoder, plain=False)
    _, expected = states_and_gradients(encoder, *padded)
    recompute_layers(encoder)
    _, found = states_and_gradients(encoder, *padded)
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


def test_saved_configuration_does_not_name_our_attention(encoder, tmp_path):
    """Exports load where xdscale is not installed."""
    use_packed_attention(encoder, plain=False)
    encoder.save_pretrained(tmp_path)
    assert "xdscale" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("function", "dtype", "error"),
    [
        (causal_attention_plain, torch.float64, 1e-12),
        (causal_attention, torch.float64, 1e-12),
        (causal_attention, torch.float32, 2e-6),
        (causal_attention, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("shape", [(3, 2, 77, 16), (2, 1, 1, 8), (1, 4, 13, 24)])
def test_causal_attention(function, dtype, error, shape):
    """Against PyTorch's with the mask spelt out, in fp64, values and gradients."""
    torch.manual_seed(5)
    inputs = [torch.randn(shape).to(dtype).double().requires_grad_() for _ in range(3)]
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(*inputs, attn_mask=mask)
    weighting = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, weighting)
    narrow = [states.detach().to(dtype).requires_grad_() for states in inputs]
    found = function(*narrow)
    gradients = torch.autograd.grad(found, narrow, weighting.to(dtype))
    for ours, theirs in zip((found, *gradients), (expected, *wanted)):
        assert ours.dtype == dtype
        # One token reads itself alone, whatever its query and key: where zero is true, terms as large as this cancel.
        scale = theirs.norm() if theirs.norm() > 1e-12 else weighting.norm()
        assert (ours.double() - theirs).norm() <= error * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_reads_a_later_one(dtype):
    torch.manual_seed(6)
    states = torch.randn(1, 2, 9, 8, dtype=dtype)
    later = states.clone()
    later[:, :, 5:] *= -7
    assert torch.equal(causal_attention(*[states] * 3)[:, :, :5], causal_attention(*[later] * 3)[:, :, :5])


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
    block.attn = CausalBlockAttention(block.attn, plain=plain)
    torch.testing.assert_close(block(states, attn_mask=causal), expected, rtol=1e-12, atol=1e-12)
    assert sorted(block.state_dict()) == names


def test_recomputing_goes_by_either_name_of_transformers():
    """5.23 warns of the older name, 5.17 has no other."""
    enabled = []
    recompute_layers(SimpleNamespace(gradient_checkpointing_enable=lambda options: enabled.append(("older", options))))
    both = {"gradient_checkpointing_enable": pytest.fail}
    both["activation_checkpointing_enable"] = lambda options: enabled.append(("newer", options))
    recompute_layers(SimpleNamespace(**both))
    assert enabled == [("older", {"use_reentrant": False}), ("newer", {"use_reentrant": False})]
