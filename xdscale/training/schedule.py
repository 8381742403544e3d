"""Learning rate: linear warm-up, then linear decay."""


def learning_rate(step: int, *, peak: float, steps: int, warmup_ratio: float) -> float:
    """Returns the learning rate of one optimiser step (spec xdbert §5.1).

    The first step already learns (peak / warm-up steps) and the last one still does, unlike DeepSpeed's own
    schedulers, which hold the rate at 0 for two steps.

    Args:
        step: 0 for the first optimiser step.
        peak: rate at the end of the warm-up.
        steps: optimiser steps of the whole run.
        warmup_ratio: share of the steps that warm up.
    """
    warmup_steps = round(warmup_ratio * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)
