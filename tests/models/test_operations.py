"""The operations as modules."""

import pytest
import torch
from torch import nn

from xdscale.models.operations import ResidualNorm, use_definitions


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
