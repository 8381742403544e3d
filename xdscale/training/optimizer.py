"""The optimizer of a run: AdamW or SGD with momentum, in groups of parameters with a rate and a weight decay each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.names import unknown_key
from xdscale.recipe import Optim

GROUP_KEYS = ("rate_factor", "decays")
"""What a group has besides PyTorch's own values: factor of the schedule's rate, and whether its weights decay."""


class MomentumSGD(torch.optim.Optimizer):
    """SGD with momentum, `m = momentum * m + (gradient + decay * p)`, `p = p - rate * m`, as PyTorch's.

    Its state has the names of Adam's, the only ones that DeepSpeed's universal format knows: `exp_avg` is the momentum,
    `exp_avg_sq` the same tensor again, which takes no memory.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates every parameter that has a gradient; takes no closure."""
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not weights:
                continue
            for parameter in weights:
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
                state["exp_avg_sq"] = state["exp_avg"]
                state["step"] += 1
            momenta = [self.state[parameter]["exp_avg"] for parameter in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [parameter.grad for parameter in weights])
            torch._foreach_add_(momenta, weights, alpha=group["weight_decay"])
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def build_optimizer(module: nn.Module, optim: Optim, parts: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """Makes the optimizer of a module, with a rate of 0 until `set_learning_rate` gives it one.

    AdamW is PyTorch's fused one on every device, so that the same recipe gives the same update everywhere and no first
    run waits for a compiler.

    Args:
        module: the trained module.
        optim: the recipe's optimizer section.
        parts: the module's parts by name, which the recipe's rate factors are for.

    Raises:
        XdscaleError: a rate factor is for no part, or for one without trained parameters of its own.
    """
    groups = _groups(module, optim, parts)
    if optim.optimizer == "sgd":
        return MomentumSGD(groups, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay)
    options = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)


def set_learning_rate(engine: Any, rate: float, optim: Optim, update: int) -> None:
    """Sets the learning rate of the next optimiser step.

    Without bias correction AdamW's step is `rate * (m / (sqrt(v) + eps) + decay * p)` of the bare moments, as in the
    BertAdam of BERT's release. PyTorch's AdamW divides m by c1 = 1 - beta1^t and v by c2 = 1 - beta2^t. A rate times
    c1 / sqrt(c2), an eps divided by sqrt(c2) and a decay divided by that factor cancel the division.

    Args:
        engine: the DeepSpeed engine.
        rate: of the schedule.
        optim: the recipe's optimizer section.
        update: how many updates the optimizer has made so far, without skipped ones.
    """
    root, factor = 1.0, 1.0
    if not optim.bias_correction:
        c1, c2 = (1 - beta ** (update + 1) for beta in optim.betas)
        root, factor = c2**0.5, c1 / c2**0.5
    for group in engine.optimizer.param_groups:
        decay = optim.weight_decay / factor if group["decays"] else 0.0
        group.update(lr=rate * factor * group["rate_factor"], weight_decay=decay)
        if optim.optimizer == "adamw":
            group["eps"] = optim.eps / root


def _groups(module: nn.Module, optim: Optim, parts: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Returns the groups; parameters that take no gradient are in none: AdamW would decay them."""
    unknown = [name for name in optim.rate_factors if name not in parts]
    if unknown:
        raise XdscaleError(
            f"optim.rate_factors.{unknown[0]}: no part of the model; {unknown_key(unknown[0], list(parts))}"
        )
    owners: dict[nn.Parameter, str] = {}
    for name, part in parts.items():
        for parameter in part.parameters():
            owners.setdefault(parameter, name)  # tied weights belong to the first part that has them
    spared = {"all": (), "weights": (True,), "biases_and_norms": (False,)}[optim.decayed]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    used = set()
    for parameter, is_bias_or_norm in _trained(module).items():
        owner = owners.get(parameter, "")
        used.add(owner)
        key = optim.rate_factors.get(owner, 1.0), is_bias_or_norm not in spared
        groups.setdefault(key, []).append(parameter)
    unused = [name for name in optim.rate_factors if name not in used]
    if unused:
        raise XdscaleError(f"optim.rate_factors.{unused[0]}: this part has no trained parameters of its own")
    return [{"params": found} | dict(zip(GROUP_KEYS, key)) for key, found in groups.items()]


def _trained(module: nn.Module) -> dict[nn.Parameter, bool]:
    """Returns the parameters that take gradients, in the module's order, and whether each is a bias or a norm's."""
    norms = {parameter for part in module.modules() if "Norm" in type(part).__name__ for parameter in part.parameters()}
    return {
        parameter: name.endswith("bias") or parameter in norms
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
