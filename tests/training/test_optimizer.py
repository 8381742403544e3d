"""AdamW with and without bias correction, against the formulas of Adam's paper and of BERT's release, in fp64."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.recipe import Optim
from xdscale.training.engine import set_learning_rate

RATES = [1e-3, 5e-3, 2e-2, 1e-2, 3e-3, 1e-4] * 4


def by_formula(parameter, gradients, optim):
    """BertAdam's update is `lr * (m / (sqrt(v) + eps) + decay * p)`; Adam's divides m and v first."""
    m = v = torch.zeros_like(parameter)
    for number, (rate, gradient) in enumerate(zip(RATES, gradients), 1):
        m = optim.betas[0] * m + (1 - optim.betas[0]) * gradient
        v = optim.betas[1] * v + (1 - optim.betas[1]) * gradient**2
        c1, c2 = (1 - beta**number for beta in optim.betas) if optim.bias_correction else (1, 1)
        update = (m / c1) / ((v / c2).sqrt() + optim.eps)
        parameter = parameter - rate * (update + optim.weight_decay * parameter)
    return parameter


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_updates_are_those_of_the_formula(bias_correction, eps):
    optim = Optim(bias_correction=bias_correction, eps=eps, weight_decay=0.1)
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    gradients = torch.randn(len(RATES), 50, dtype=torch.float64) * torch.logspace(-3, 0, 50, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    engine = SimpleNamespace(optimizer=torch.optim.AdamW([parameter], betas=optim.betas, fused=True))
    for number, (rate, gradient) in enumerate(zip(RATES, gradients)):
        set_learning_rate(engine, rate, optim, number)
        parameter.grad = gradient.clone()
        engine.optimizer.step()
    torch.testing.assert_close(parameter.data, by_formula(start, gradients, optim), rtol=1e-10, atol=1e-12)
    other = by_formula(start, gradients, optim.model_copy(update={"bias_correction": not bias_correction}))
    assert (parameter.data - other).abs().max() > 1e-3


def test_the_releases_first_update_is_about_three_times_as_large():
    """m / sqrt(v) of one gradient is (1 - .9) / sqrt(1 - .999) = 3.16 without correction, 1 with it."""
    moved = []
    for bias_correction in (True, False):
        parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        engine = SimpleNamespace(optimizer=torch.optim.AdamW([parameter]))
        set_learning_rate(engine, 1e-3, Optim(bias_correction=bias_correction, weight_decay=0), 0)
        parameter.grad = torch.tensor(0.5, dtype=torch.float64)
        engine.optimizer.step()
        moved.append(1 - parameter.item())
    assert moved == pytest.approx([1e-3, 3.162e-3], rel=1e-3)
