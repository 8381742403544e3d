"""A recipe from 1 to 1,024 GPUs: steps, hours and cost, with the recipe's own batch and with one that grows."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError
from xdscale.plan.cluster import Cluster
from xdscale.plan.planner import Machine, make_plan
from xdscale.recipe import Recipe

if TYPE_CHECKING:
    from xdscale.plan.profile import Profile

COUNTS = tuple(2**power for power in range(11))
"""1, 2, 4, … 1,024."""

FEWEST_PER_GPU = 18
"""Sequences per GPU and step that the growing batch keeps: fewer, and waiting outweighs computing."""


@dataclass(frozen=True)
class ScalingPoint:
    """The whole run on some number of GPUs.

    Attributes:
        gpus: how many.
        nodes: machines.
        way: how model states are shared.
        global_batch: sequences per optimiser step.
        steps: that cover as many sequences as the recipe does.
        step_seconds: of one step.
        hours: of all steps.
        cost: dollars, where a price is known.
        efficiency: sequences per second and GPU, relative to one GPU.
    """

    gpus: int
    nodes: int
    way: str
    global_batch: int
    steps: int
    step_seconds: float
    hours: float
    cost: float | None
    efficiency: float


def scale(name: str, recipe: Recipe, machine: Machine, profile: "Profile", *, grow: bool) -> list[ScalingPoint]:
    """Plans a recipe on each number of GPUs.

    Args:
        name: of the recipe.
        recipe: to be trained.
        machine: the kind of GPU, its memory, utilisation and price; how many is replaced.
        profile: of the recipe's model.
        grow: whether the global batch grows so that each GPU keeps `FEWEST_PER_GPU` sequences; otherwise it is the
            recipe's, and numbers of GPUs beyond it are left out. A larger batch needs its own learning rate.

    Raises:
        XdscaleError: the recipe fits on none.
    """
    points: list[ScalingPoint] = []
    training = recipe.training
    for gpus in COUNTS:
        batch = max(training.global_batch, FEWEST_PER_GPU * gpus) if grow else training.global_batch
        if gpus > batch:
            continue
        steps = math.ceil(training.steps * training.global_batch / batch)
        sized = recipe.model_copy(
            update={"training": training.model_copy(update={"global_batch": batch, "steps": steps})}
        )
        gpu = machine.cluster.gpu
        cluster = Cluster(gpu, gpus, math.ceil(gpus / gpu.node_gpus))
        plan = make_plan(name, sized, replace(machine, cluster=cluster), profile)
        row = next((row for row in plan.rows if row.way == plan.best), None)
        if row is None:
            continue
        rate = batch / row.step_seconds / gpus
        points.append(
            ScalingPoint(
                gpus,
                plan.machine.cluster.nodes,
                row.way,
                batch,
                steps,
                row.step_seconds,
                row.hours,
                row.cost,
                rate / (points[0].global_batch / points[0].step_seconds / points[0].gpus) if points else 1.0,
            )
        )
    if not points:
        raise XdscaleError(f"{name}: fits on no number of {machine.cluster.gpu.name} up to {max(COUNTS)}")
    return points


def markdown(points: list[ScalingPoint]) -> str:
    """Returns the points as a Markdown table."""
    lines = [
        "| GPUs | nodes | sharing | global batch | steps | s per step | efficiency | hours | $ |",
        "|---" * 9 + "|",
    ]
    for point in points:
        cost = "-" if point.cost is None else f"{point.cost:,.0f}"
        lines.append(
            f"| {point.gpus:,} | {point.nodes} | {point.way} | {point.global_batch:,} | {point.steps:,} "
            f"| {point.step_seconds:.3f} | {point.efficiency:.0%} | {point.hours:.3g} | {cost} |"
        )
    return "\n".join(lines)


_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 40, 560, 320
_COLOURS = {"batch of the recipe": "#c05621", "growing batch": "#2b6cb0"}


def chart(curves: dict[str, list[ScalingPoint]], title: str) -> str:
    """Returns an SVG of hours over GPUs, both logarithmic, with the straight line of perfect scaling.

    Args:
        curves: points by name, of `batch of the recipe` and `growing batch`.
        title: printed above.
    """
    points = [point for curve in curves.values() for point in curve]
    most = math.ceil(math.log10(max(point.hours for point in points)))
    least = math.floor(math.log10(min(point.hours for point in points)))
    last = math.log2(max(point.gpus for point in points))

    def place(gpus: float, hours: float) -> str:
        x = _LEFT + _WIDTH * math.log2(gpus) / last
        y = _TOP + _HEIGHT * (most - math.log10(hours)) / (most - least)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{_LEFT}" y="24" font-size="15">{title}</text>']
    for exponent in range(least, most + 1):
        x, y = place(1, 10**exponent).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{_LEFT + _WIDTH}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{10**exponent:g} h</text>')
    for power in range(int(last) + 1):
        x, y = place(2**power, 10**least).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{2**power}</text>')
    one = next(iter(curves.values()))[0]
    final = max(point.gpus for point in points)
    ideal = f"{place(one.gpus, one.hours)} {place(final, max(one.hours * one.gpus / final, 10**least))}"
    parts.append(f'<polyline points="{ideal}" fill="none" stroke="#999" stroke-dasharray="4 4"/>')
    for number, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(point.gpus, point.hours) for point in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>')
        y = _TOP + 20 + 20 * number
        parts.append(f'<text x="{_LEFT + _WIDTH - 170}" y="{y}" fill="{_COLOURS[name]}">{name}</text>')
    size = f'width="{_LEFT + _WIDTH + 30}" height="{_TOP + _HEIGHT + 50}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect {size} fill="white"/>\n{body}\n</svg>\n'
