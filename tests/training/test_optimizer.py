"""AdamW, against the formulas of Adam's paper and of BERT's release; SGD and groups against torch.optim; in fp64."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.recipe import Optim
from xdscale.training.optimizer import build_optimizer, set_learning_rate

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
    engine = SimpleNamespace(optimizer=build_optimizer(torch.nn.ParameterList([parameter]), optim, {}))
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
        optim = Optim(bias_correction=bias_correction, weight_decay=0)
        engine = SimpleNamespace(optimizer=build_optimizer(torch.nn.ParameterList([parameter]), optim, {}))
        set_learning_rate(engine, 1e-3, optim, 0)
        parameter.grad = torch.tensor(0.5, dtype=torch.float64)
        engine.optimizer.step()
        moved.append(1 - parameter.item())
    assert moved == pytest.approx([1e-3, 3.162e-3], rel=1e-3)


class Tied(torch.nn.Module):
    """An embedding with a norm, and a head whose decoder is the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.ModuleDict({"words": torch.nn.Embedding(5, 4), "norm": torch.nn.LayerNorm(4)})
        self.head = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4), "decoder": torch.nn.Linear(4, 5)})
        self.head.decoder.weight = self.body.words.weight
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.double()

    def parts(self):
        return {"body": self.body, "head": self.head, "frozen": self.frozen}


def train(module, optimizer, set_rate):
    for number, rate in enumerate(RATES):
        set_rate(rate, number)
        torch.manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    return list(module.state_dict().values())


@pytest.mark.parametrize("decayed", ["all", "weights", "biases_and_norms"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_groups_are_torchs_with_their_values_written_out(kind, decayed):
    optim = Optim(optimizer=kind, rate_factors={"head": 10}, decayed=decayed, weight_decay=0.1)
    ours, theirs = Tied(), Tied()
    engine = SimpleNamespace(optimizer=build_optimizer(ours, optim, ours.parts()))
    found = train(ours, engine.optimizer, lambda rate, number: set_learning_rate(engine, rate, optim, number))
    dense, decoder, norm = theirs.head.dense, theirs.head.decoder, theirs.body.norm
    values = [  # parameters, factor, whether weights, so decayed in BERT's recipe
        ([theirs.body.words.weight], 1, True),  # also the decoder's; the part that comes first has it
        ([norm.weight, norm.bias], 1, False),
        ([dense.weight], 10, True),
        ([dense.bias, decoder.bias], 10, False),
    ]
    decays = {"all": (0.1, 0.1), "weights": (0, 0.1), "biases_and_norms": (0.1, 0)}[decayed]
    groups = [{"params": params, "weight_decay": decays[weights]} for params, _, weights in values]
    torchs = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    }[kind]()

    def set_rates(rate, number):
        for group, (_, factor, _) in zip(torchs.param_groups, values):
            group["lr"] = rate * factor

    for one, other in zip(found, train(theirs, torchs, set_rates)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert len(engine.optimizer.param_groups) == (2 if decayed == "all" else 4)


def test_without_factors_there_is_one_group_in_the_modules_order():
    module = Tied()
    (group,) = build_optimizer(module, Optim(), {}).param_groups
    expected = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in expected]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads", "optim.rate_factors.heads: no part of the model; .*'head'"),
        ("frozen", "optim.rate_factors.frozen: this part has no trained parameters of its own"),
    ],
)
def test_factors_for_what_is_not_trained_are_refused(name, message):
    module = Tied()
    with pytest.raises(XdscaleError, match=message):
        build_optimizer(module, Optim(rate_factors={name: 2.0}), module.parts())
