"""Our sublayers and the encoders of transformers with the fused end of a sublayer, against the authors' own modules."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from xdscale.models.attention import recompute_layers
from xdscale.models.residual_norm import ResidualNorm, use_residual_norm

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
IDS = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=[(BertConfig, BertModel), (ElectraConfig, ElectraModel)], ids=["bert", "electra"])
def encoder(request):
    """A small encoder whose LayerNorms are not those of the start."""
    config_class, model_class = request.param
    torch.manual_seed(1)
    model = model_class(config_class(**SIZES))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def states_and_gradients(encoder, seed=0):
    encoder.zero_grad()
    torch.manual_seed(seed)
    states = encoder(input_ids=IDS).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_states_and_gradients_are_those_of_transformers(encoder, plain, dtype, error):
    encoder.double().eval()
    expected, expected_gradients = states_and_gradients(encoder)
    use_residual_norm(encoder, plain=plain)
    found, gradients = states_and_gradients(encoder.to(dtype))
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=10 * error, atol=100 * error)


def test_parameters_are_the_same_objects_under_the_same_names(encoder, tmp_path):
    """Checkpoints, exports, counts and optimizers see no difference."""
    before = dict(encoder.named_parameters())
    use_residual_norm(encoder, plain=False)
    after = dict(encoder.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    encoder.save_pretrained(tmp_path)
    loaded, report = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded.eval()(IDS).last_hidden_state, encoder.eval()(IDS).last_hidden_state)


def test_kernels_and_definition_drop_the_same_states(encoder):
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if module.p else 0.0
    encoder.config._attn_implementation = "eager"
    curves = []
    for plain, seed in ((False, 3), (True, 3), (True, 4)):
        model = copy.deepcopy(encoder).train()
        use_residual_norm(model, plain=plain)
        curves.append(states_and_gradients(model, seed)[0])
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(curves[1], curves[2], atol=1e-2)


def test_recomputed_layers_draw_the_same_mask(encoder):
    use_residual_norm(encoder.train(), plain=False)
    _, expected = states_and_gradients(encoder)
    recompute_layers(encoder)
    _, found = states_and_gradients(encoder)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("plain", [False, True])
def test_rate_acts_on_the_states_alone_and_in_training_only(plain):
    """Without states the result is the residual's LayerNorm whatever is dropped; 1 / (1 - rate) of the states else."""
    torch.manual_seed(0)
    states, residual = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    module = ResidualNorm(16, eps=1e-12, dropout=0.5, plain=plain).double()
    reference = nn.LayerNorm(16, eps=1e-12).double()
    torch.testing.assert_close(module(torch.zeros_like(states), residual), reference(residual))
    assert not torch.equal(module(states, residual), module(states, residual))
    torch.testing.assert_close(module.eval()(states, residual), reference(residual + states))


@pytest.mark.parametrize("plain", [False, True])
def test_under_autocast_states_keep_the_dtype_of_the_products(plain):
    module = ResidualNorm(16, eps=1e-12, dropout=0.5, plain=plain)
    dense = nn.Linear(16, 16)
    residual = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = module(dense(residual), residual)
        twice = module(dense(once), once)
    assert once.dtype == twice.dtype == torch.bfloat16
    twice.float().sum().backward()
    assert {p.grad.dtype for p in (*module.parameters(), *dense.parameters())} == {torch.float32}
