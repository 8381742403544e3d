"""Learning rate: linear warm-up, then linear decay, a constant, or steps."""

from xdscale.recipe import Optim


def learning_rate(step: int, optim: Optim, steps: int) -> float:
    """Returns the learning rate of one optimiser step (spec xdbert §5.1).

    The first step already learns (peak / warm-up steps) and the last one of a linear decay still does, unlike
    DeepSpeed's own schedulers, which hold the rate at 0 for two steps.

    Args:
        step: 0 for the first optimiser step.
        optim: the recipe's optimizer section.
        steps: optimiser steps of the whole run.
    """
    peak, warmup_steps = optim.learning_rate, round(optim.warmup_ratio * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if optim.schedule == "linear":
        return peak * (steps - step) / (steps - warmup_steps)
    return peak * optim.drop_factor ** sum(step >= round(share * steps) for share in optim.drop_at)
