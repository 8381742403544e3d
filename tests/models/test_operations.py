"""The operations as modules."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from xdscale.kernels import plain_packed_attention
from xdscale.models.operations import (
    ActivatedLinear,
    Linear,
    ResidualNorm,
    activation_of,
    attention_map,
    use_definitions,
)
from xdscale.models.packed_tokens import packed_by_lengths


@pytest.mark.parametrize("plain", [False, True])
def test_rate_acts_on_the_states_alone_and_in_training_only(plain):
    """Without states the result is the residual's LayerNorm whatever is dropped; 1 / (1 - rate) of the states else."""
    torch.manual_seed(0)
    states, residual = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    module = ResidualNorm(16, eps=1e-12, dropout=0.5).double()
    if plain:
        use_definitions(module)
    reference = nn.LayerNorm(16, eps=1e-12).double()
    torch.testing.assert_close(module(torch.zeros_like(states), residual), reference(residual))
    assert not torch.equal(module(states, residual), module(states, residual))
    torch.testing.assert_close(module.eval()(states, residual), reference(residual + states))


@pytest.mark.parametrize("plain", [False, True])
def test_under_autocast_states_keep_the_dtype_of_the_products(plain):
    module = ResidualNorm(16, eps=1e-12, dropout=0.5)
    if plain:
        use_definitions(module)
    dense = nn.Linear(16, 16)
    residual = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = module(dense(residual), residual)
        twice = module(dense(once), once)
    assert once.dtype == twice.dtype == torch.bfloat16
    twice.float().sum().backward()
    assert {p.grad.dtype for p in (*module.parameters(), *dense.parameters())} == {torch.float32}


def test_maps_are_the_weights_of_the_first_sample():
    """Those that its output is made with, head by head; the map is their mean."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(tokens, 2, 16).bfloat16() for tokens in (9, 14, 14))
    queries, keys = (packed_by_lengths(torch.tensor(lengths), max(lengths)) for lengths in ([6, 3], [5, 9]))
    heads = [
        attention_map(query[:, head, None], key[:, head, None], value[:, head, None], queries, keys) for head in (0, 1)
    ]
    maps = torch.stack(heads)
    assert maps.shape == (2, 6, 5)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.sum(-1), torch.ones(2, 6))
    out = plain_packed_attention(query.float(), key.float(), value.float(), queries.cu_seqlens, keys.cu_seqlens)
    assert torch.allclose(maps @ value[:5].float().transpose(0, 1), out[:6].transpose(0, 1), atol=1e-5)
    assert torch.allclose(attention_map(query, key, value, queries, keys), maps.mean(0))


@pytest.mark.parametrize("build", [Linear, lambda original: ActivatedLinear(original, torch.tanh)])
def test_a_linear_is_replaced_under_its_names_with_its_values(build):
    """The generator's next number is the same as well, so that all that is initialised later is."""
    torch.manual_seed(0)
    original, following = nn.Linear(6, 4), torch.rand(())
    torch.manual_seed(0)
    replaced = build(nn.Linear(6, 4))
    assert torch.equal(torch.rand(()), following)
    assert list(replaced.state_dict()) == list(original.state_dict()) == ["weight", "bias"]
    assert all(torch.equal(one, other) for one, other in zip(replaced.parameters(), original.parameters()))
    taken = build(original)
    assert taken.weight is original.weight
    assert taken.bias is original.bias
    states = torch.randn(3, 6)
    expected = original(states if build is Linear else states.tanh())
    assert torch.equal(replaced(states), expected)
    assert torch.equal(use_definitions(replaced)(states), expected)


def test_kernels_recognise_the_activation_of_an_encoder():
    """PyTorch's GELU has a kernel; what else an encoder may have computes by itself."""
    states = torch.linspace(-4, 4, 100)
    for name in ("gelu", "gelu_python", "gelu_new", "gelu_10", "relu", "tanh"):
        module = ACT2FN[name]
        assert (activation_of(module) is nn.functional.gelu) == (name == "gelu")
        assert torch.equal(activation_of(module)(states), module(states))
