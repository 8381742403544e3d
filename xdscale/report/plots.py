"""Plots as inline SVG whose colours follow the page's, light or dark.

Matplotlib draws with stand-in colours; each is then replaced by the CSS variable of the same name in `page.html`.
"""

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from xdscale.files import count_of
from xdscale.report import wording
from xdscale.report.assemble import Report
from xdscale.report.published import TaskColumn
from xdscale.report.sweep import Sweep, TaskRuns
from xdscale.tasks.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 6
"""Colours of models in page.html; further models begin anew."""

_TEXT, _GRID, _PAPER = "#010101", "#020202", "#030303"
_MODELS = [f"#1000{number:02x}" for number in range(SERIES)]
_VARIABLES = {_TEXT: "--text", _GRID: "--line", _PAPER: "--paper"} | {
    stand_in: f"--model-{number}" for number, stand_in in enumerate(_MODELS)
}
_FONT_POINTS = 8


def box_plot(report: Report, column: TaskColumn) -> str:
    """Draws the scores of all models on a task: median, quartiles, lowest to highest, each seed, the paper's value."""
    sweeps = [sweep for sweep in report.sweeps if column.task in sweep.tasks]
    figure, axes = _axes(3.4, 0.75 + 0.42 * len(sweeps))
    for place, sweep in enumerate(sweeps):
        _box(axes, report, column, sweep, -place)
    axes.set_yticks([-place for place in range(len(sweeps))], [_plain(sweep.model.label) for sweep in sweeps])
    axes.set_ylim(0.6 - len(sweeps), 0.6)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.06)
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    name = METRICS[sweeps[0].tasks[column.task].score.name].title
    axes.set_xlabel(name[0].upper() + name[1:])
    described = "; ".join(_described(report, column, sweep) for sweep in sweeps)
    return _svg(figure, f"{column.title}: {described}")


def learning_curves(report: Report, column: TaskColumn) -> str:
    """Draws the training loss of all seeds of all models on a task, and the median over seeds of each model."""
    sweeps = [sweep for sweep in report.sweeps if column.task in sweep.tasks]
    figure, axes = _axes(3.4, 2.0)
    for sweep in sweeps:
        colour = _colour(report, sweep)
        steps, losses = _curves(sweep.tasks[column.task])
        if not len(steps):
            continue
        axes.plot(steps, losses.T, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, np.median(losses, axis=0), color=colour, linewidth=1.8)
    axes.set_xlabel("Step")
    axes.set_ylabel("Training loss")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(color=_GRID, linewidth=0.6)
    described = "; ".join(f"{sweep.model.label} {_fall(sweep.tasks[column.task])}" for sweep in sweeps)
    return _svg(figure, f"{column.title}: training loss, {described}")


def _box(axes: "Axes", report: Report, column: TaskColumn, sweep: Sweep, place: int) -> None:
    runs, colour = sweep.tasks[column.task], _colour(report, sweep)
    scale = 100 if METRICS[runs.score.name].fraction else 1
    scores = scale * runs.scores
    axes.boxplot(
        [scores],
        positions=[place],
        orientation="horizontal",
        widths=0.46,
        whis=(0, 100),
        showcaps=False,
        boxprops={"color": colour, "linewidth": 1.1},
        whiskerprops={"color": colour, "linewidth": 1.1},
        medianprops={"color": colour, "linewidth": 2.6, "solid_capstyle": "butt"},
    )
    # Seeds beside each other where they coincide: drawn in a fixed zigzag, not at random.
    offsets = np.resize([0.0, 0.1, -0.1], len(scores))
    axes.plot(np.sort(scores), place + offsets, "o", color=colour, markersize=2.8, alpha=0.6, markeredgewidth=0)
    printed = report.published_value(sweep, column)
    if printed is not None:
        axes.plot([printed], [place], "D", color=_PAPER, markersize=5, fillstyle="none", markeredgewidth=1.2)


def _curves(runs: TaskRuns) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps that all seeds logged [steps], and their losses [seeds, steps]."""
    curves = [
        {point.step: float("nan") if point.loss is None else point.loss for point in run.result.curve}
        for run in runs.runs
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def _fall(runs: TaskRuns) -> str:
    """Returns the first and the last median loss in words."""
    steps, losses = _curves(runs)
    if not len(steps):
        return "has no step that all seeds logged"
    first, last = np.median(losses[:, [0, -1]], axis=0)
    seeds = count_of(len(losses), "seed")
    return f"from {first:.3f} at step {steps[0]} to {last:.3f} at step {steps[-1]} ({seeds})"


def _colour(report: Report, sweep: Sweep) -> str:
    return _MODELS[report.sweeps.index(sweep) % SERIES]


def _described(report: Report, column: TaskColumn, sweep: Sweep) -> str:
    cell, metric = report.cell(sweep, column.task), sweep.tasks[column.task].score.name
    printed = report.published_value(sweep, column)
    paper = f", paper {wording.published(column.metric, printed)}" if printed is not None else ""
    spread = wording.spread(metric, cell)
    of = f"({spread}, {wording.seeds(cell)})" if spread else f"({wording.seeds(cell)})"
    return f"{sweep.model.label} {wording.value(metric, cell.median)} {of}{paper}"


def _axes(width_inches: float, height_inches: float) -> tuple[object, "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.tick_params(colors=_TEXT, labelsize=_FONT_POINTS, color=_GRID)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=_TEXT, fontsize=_FONT_POINTS)
    return figure, axes


def _svg(figure: object, description: str) -> str:
    """Returns the figure as an `<svg>` element for a page: no ids that could clash, colours from the page."""
    import html

    import matplotlib

    file = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "xdscale", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    label = html.escape(description, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _plain(label: str) -> str:
    return label.replace("$", r"\$")
