"""The encoders of transformers with feed-forwards that keep less, against the authors' own modules."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from xdscale.models.activated_linear import use_activated_linear
from xdscale.models.attention import recompute_layers

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
IDS = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=[(BertConfig, BertModel), (ElectraConfig, ElectraModel)], ids=["bert", "electra"])
def encoder(request):
    config_class, model_class = request.param
    torch.manual_seed(1)
    return model_class(config_class(**SIZES)).eval()


def states_and_gradients(encoder):
    encoder.zero_grad()
    states = encoder(input_ids=IDS).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_states_and_gradients_are_those_of_transformers(encoder, plain, activation):
    config = copy.deepcopy(encoder.config)
    config.hidden_act = activation
    torch.manual_seed(1)
    encoder = type(encoder)(config).double().eval()
    expected, expected_gradients = states_and_gradients(encoder)
    use_activated_linear(encoder, plain=plain)
    found, gradients = states_and_gradients(encoder)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plain", [False, True])
def test_recomputed_layers_have_the_same_gradients(encoder, plain):
    use_activated_linear(encoder.train(), plain=plain)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _, expected = states_and_gradients(encoder)
    recompute_layers(encoder)
    _, found = states_and_gradients(encoder)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_parameters_are_the_same_objects_under_the_same_names(encoder, tmp_path):
    """Checkpoints, exports, counts and optimizers see no difference; a copy is whole."""
    before = dict(encoder.named_parameters())
    use_activated_linear(encoder, plain=False)
    after = dict(encoder.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    encoder.save_pretrained(tmp_path)
    loaded, report = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = encoder(IDS).last_hidden_state
    torch.testing.assert_close(loaded.eval()(IDS).last_hidden_state, expected)
    assert torch.equal(copy.deepcopy(encoder)(IDS).last_hidden_state, expected)


def test_a_second_call_is_refused(encoder):
    """It would take no activation for the first one's."""
    use_activated_linear(encoder, plain=False)
    with pytest.raises(ValueError, match="before"):
        use_activated_linear(encoder, plain=False)
