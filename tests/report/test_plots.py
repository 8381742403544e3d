"""What the figures of a report show, before they become SVG."""

import json
from statistics import median

import numpy as np
import pytest

from xdscale.report import plots
from xdscale.report.assemble import assemble
from xdscale.report.published import layouts
from xdscale.report.sweep import read_sweep


@pytest.fixture
def drawn(write_sweep, monkeypatch):
    """Returns what `draw` gives for two models on a task, as matplotlib's axes, and the results of the first one."""
    monkeypatch.setattr(plots, "_svg", lambda figure, description: figure)

    def draw(function, task):
        runs = [write_sweep(label, {task: 0.7}, seeds=4) for label in ("BERT-b", "mine")]
        report = assemble([read_sweep(run, {}) for run in runs], layouts()["table-1"], [])
        (axes,) = function(report, report.column(task)).axes
        paths = sorted((runs[0] / task).glob("seed-*/result.json"))
        return axes, [json.loads(path.read_text()) for path in paths]

    return draw


@pytest.mark.parametrize(("task", "unit", "label"), [("rte", 100, "Accuracy"), ("read", 1, "RMSE")])
def test_a_box_reaches_from_the_lowest_seed_to_the_highest_and_the_paper_is_marked(drawn, task, unit, label):
    axes, results = drawn(plots.box_plot, task)
    assert (axes.get_xlabel(), [text.get_text() for text in axes.get_yticklabels()]) == (label, ["BERT-b", "mine"])
    first, second = axes.get_yticks()
    bottom, top = axes.get_ylim()
    assert bottom < second < first < top  # the first model stands above
    scores = sorted(unit * result["score"]["value"] for result in results)
    mine = [line for line in axes.lines if len(line.get_ydata()) and abs(np.mean(line.get_ydata()) - first) < 0.3]
    (seeds,) = [line for line in mine if line.get_marker() == "o" and len(line.get_xdata()) == 4]
    assert seeds.get_xdata().tolist() == scores
    assert all(one != other for one, other in zip(seeds.get_ydata(), seeds.get_ydata()[1:]))  # beside each other
    marked = [line.get_xdata().tolist() for line in mine if line.get_marker() == "D"]
    assert marked == ([[66.43]] if task == "rte" else [])  # the paper has no READ of BERT
    strokes = [line for line in mine if line.get_linestyle() == "-"]
    ends = np.concatenate([line.get_xdata() for line in strokes])
    assert (ends.min(), ends.max()) == (scores[0], scores[-1])
    widest = max(strokes, key=lambda line: line.get_linewidth())
    assert set(widest.get_xdata()) == {median(scores)}
    assert len(strokes) == 4  # the box, two whiskers without caps, and the median
    assert len({line.get_color() for line in [*strokes, seeds]}) == 1
    assert all(bottom < y < top for line in axes.lines for y in line.get_ydata())


def test_the_median_of_the_curves_stands_out(drawn):
    axes, results = drawn(plots.learning_curves, "rte")
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()[0]) == ("Step", "Training loss", 0)
    assert len(axes.lines) == 2 * (4 + 1)
    *seeds, middle = axes.lines[:5]
    losses = [[point["loss"] for point in result["curve"]] for result in results]
    assert [line.get_ydata().tolist() for line in seeds] == losses
    assert middle.get_ydata() == pytest.approx(np.median(losses, axis=0))
    for line in axes.lines[:5]:
        assert line.get_xdata().tolist() == [point["step"] for point in results[0]["curve"]]
        assert line.get_color() == middle.get_color() != axes.lines[5].get_color()
    assert all(line.get_linewidth() < middle.get_linewidth() for line in seeds)
    assert all(line.get_alpha() < 1 for line in seeds)
    assert middle.get_alpha() is None


@pytest.mark.parametrize("function", [plots.box_plot, plots.learning_curves])
def test_the_page_shows_through_and_nothing_but_the_axis_below_frames_a_figure(drawn, function):
    axes, _ = drawn(function, "rte")
    assert [side for side, spine in axes.spines.items() if spine.get_visible()] == ["bottom"]
    assert axes.patch.get_alpha() == 0
    assert axes.get_axisbelow() is True
    words = [axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert len({(text.get_fontsize(), text.get_color()) for text in words}) == 1


def test_a_run_that_diverged_is_drawn_too(report, write_sweep, tmp_path):
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=2)
    path = sweep / "rte" / "seed-1" / "result.json"
    curve = [{"step": 10, "loss": None}, {"step": 20, "loss": 0.5}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"curve": curve}))
    report([sweep], tmp_path / "out")
