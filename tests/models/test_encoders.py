"""The encoders of transformers on our kernels against the authors' own modules."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraForSequenceClassification, ElectraModel

from xdscale.models.encoders import recompute_layers, use_kernels
from xdscale.models.operations import use_definitions

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
FAMILIES = {"bert": (BertConfig, BertModel), "electra": (ElectraConfig, ElectraModel)}


def build(family, activation="gelu"):
    """A small encoder whose LayerNorms are not those of the start."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(1)
    model = model_class(config_class(**SIZES, hidden_act=activation))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return build(request.param)


@pytest.fixture
def padded():
    """Two texts of 11 and 5 tokens padded to 11."""
    ids = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(2))
    return ids, torch.arange(11) < torch.tensor([[11], [5]])


def states_and_gradients(encoder, ids, mask, seed=0):
    """The valid states and the gradients of a fixed weighting of them."""
    encoder.zero_grad()
    torch.manual_seed(seed)
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    valid = states if mask is None else states[mask]
    (valid * torch.linspace(-1, 1, valid.numel(), dtype=valid.dtype).view_as(valid)).sum().backward()
    return valid.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "activation", "error"),
    [(torch.float64, "gelu", 1e-12), (torch.float64, "relu", 1e-12), (torch.float32, "gelu", 1e-5)],
)
def test_states_and_gradients_are_those_of_transformers(family, padded, plain, masked, dtype, activation, error):
    encoder = build(family, activation).double().eval()
    ids, mask = padded[0], padded[1] if masked else None
    encoder.set_attn_implementation("eager")
    expected, expected_gradients = states_and_gradients(encoder, ids, mask)
    use_kernels(encoder.to(dtype))
    if plain:
        use_definitions(encoder)
    found, gradients = states_and_gradients(encoder, ids, mask)
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=10 * error, atol=100 * error)


@pytest.mark.parametrize(("attention", "states"), [(0.3, 0.0), (0.0, 0.3)])
def test_kernels_and_definition_drop_the_same(encoder, padded, attention, states):
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = attention if name.endswith("self.dropout") else states if "output" in name else 0.0
    encoder.train()
    curves = []
    for plain, seed in ((False, 3), (True, 3), (True, 4)):
        model = copy.deepcopy(encoder)
        use_kernels(model)
        if plain:
            use_definitions(model)
        curves.append(states_and_gradients(model, *padded, seed=seed)[0])
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(curves[1], curves[2], atol=1e-2)


@pytest.mark.parametrize("plain", [False, True])
def test_recomputed_layers_draw_the_same_masks(encoder, padded, plain):
    use_kernels(encoder.train())
    if plain:
        use_definitions(encoder)
    _, expected = states_and_gradients(encoder, *padded)
    recompute_layers(encoder)
    _, found = states_and_gradients(encoder, *padded)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_parameters_are_the_same_objects_under_the_same_names(encoder, padded, tmp_path):
    """Checkpoints, counts and optimizers see no difference, exports load where xdscale is not; a copy is whole."""
    before = dict(encoder.named_parameters())
    use_kernels(encoder.eval())
    after = dict(encoder.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    encoder.save_pretrained(tmp_path)
    assert "xdscale" not in (tmp_path / "config.json").read_text()
    loaded, report = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = encoder(padded[0]).last_hidden_state
    torch.testing.assert_close(loaded.eval()(padded[0]).last_hidden_state, expected)
    assert torch.equal(copy.deepcopy(encoder)(padded[0]).last_hidden_state, expected)


def test_a_second_call_is_refused(encoder):
    """It would take no activation for the first one's."""
    use_kernels(encoder)
    with pytest.raises(ValueError, match="before"):
        use_kernels(encoder)


def test_an_encoder_within_a_model_with_a_head():
    torch.manual_seed(1)
    model = ElectraForSequenceClassification(ElectraConfig(**SIZES)).double().eval()
    ids = torch.arange(11)[None]
    expected = model(ids).logits
    use_kernels(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="before"):
        use_kernels(model.base_model)


def test_recomputing_goes_by_either_name_of_transformers():
    """5.23 warns of the older name, 5.17 has no other."""
    enabled = []
    recompute_layers(SimpleNamespace(gradient_checkpointing_enable=lambda options: enabled.append(("older", options))))
    both = {"gradient_checkpointing_enable": pytest.fail}
    both["activation_checkpointing_enable"] = lambda options: enabled.append(("newer", options))
    recompute_layers(SimpleNamespace(**both))
    assert enabled == [("older", {"use_reentrant": False}), ("newer", {"use_reentrant": False})]
