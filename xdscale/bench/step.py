"""`xdscale bench step`: a whole training step against another computation of it, which each system's bench brings."""

import os
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from xdscale.devices import keep_freed_memory, uses_gpus
from xdscale.errors import XdscaleError
from xdscale.recipe import GROUP, Recipe
from xdscale.registry import SYSTEMS, find, load
from xdscale.training.throughput import matmul_flops_per_second

_GRADIENT = "xdscale gradient of bytes "


def bench_step(recipe: Recipe, against: str = "plain", pairs: int = 5, sequences: int | None = None) -> None:
    """Measures the training step and prints a table.

    Args:
        recipe: its model and objectives are measured, with random weights.
        against: what XDBERT's is measured against; others have one rival each.
        pairs: how many times each path is measured, in turns.
        sequences: samples per step; None for as many as the system's bench has.

    Raises:
        XdscaleError: nothing else computes the system's step, an argument is out of range, or its bench cannot read
            what it needs.
    """
    place, where = recipe.step_bench, f"system = {recipe.system!r}"
    if place is None:
        having = [name for name in SYSTEMS if find(GROUP, SYSTEMS, name, where, Recipe).step_bench is not None]
        raise XdscaleError(
            f"{where}: nothing else computes its step, to be measured beside it; choose a recipe of {', '.join(having)}"
        )
    if not uses_gpus():
        keep_freed_memory()  # as ranks do, for all that are measured
    load(place, where)(recipe, against, pairs, sequences)


def check_counts(pairs: int, sequences: int) -> None:
    """Refuses numbers below 1."""
    for name, value in (("pairs", pairs), ("sequences", sequences)):
        if value < 1:
            raise XdscaleError(f"--{name} {value}: expected at least 1")


def activation_bytes(run: Callable[[], None], parameters: Iterable[nn.Parameter]) -> int:
    """Returns the peak memory of a forward and backward pass, above what existed before and gradients.

    On a GPU that is what its allocator counts in a second pass. Of PyTorch's CPU allocator, counts every allocation as
    it happens: saved activations, masks, temporaries and scratch inside operators, casts of weights. A gradient counts
    until it has arrived in `.grad`, from then on not. What libraries allocate by themselves (oneDNN's scratch) is not
    seen.

    Args:
        run: one forward and backward pass, gradients not allocated before.
        parameters: whose gradients are left out.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    if device.type == "cuda":
        run()  # from now on gradients exist, and a new one counts until it is added
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before

    def arrived(parameter: nn.Parameter) -> None:
        with record_function(f"{_GRADIENT}{parameter.grad.nbytes}"):
            pass

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and a missing GPU on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    for hook in hooks:
        hook.remove()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name().startswith(_GRADIENT):
            live -= int(event.name().removeprefix(_GRADIENT))
        peak = max(peak, live)
    return peak


def update_masters(
    optimizer: torch.optim.Optimizer, masters: nn.Module, narrow: nn.Module, gradients: list[torch.Tensor]
) -> None:
    """Makes a step of the fp32 weights by the gradients of their copy in bf16, and copies them anew.

    Args:
        optimizer: of the masters.
        masters: in fp32.
        narrow: the same module in bf16, with gradients.
        gradients: one tensor like each master, which are kept: fresh pages would cost more than the copies.
    """
    triples = list(zip(masters.parameters(), narrow.parameters(), gradients, strict=True))
    with torch.no_grad():
        for master, parameter, gradient in triples:
            if parameter.grad is not None:
                master.grad = gradient.copy_(parameter.grad)
        optimizer.step()
        for master, parameter, _ in triples:
            parameter.copy_(master)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOPs per second of matrix products, the best of three measurements."""
    return max(matmul_flops_per_second(device, dtype) for _ in range(3))
