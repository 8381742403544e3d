"""Numbers and sentences as a reader sees them, the same in every form of the report."""

from xdscale.files import count_of
from xdscale.report.assemble import Cell, Report
from xdscale.report.bootstrap import Difference, Interval
from xdscale.report.comparison import Comparison
from xdscale.tasks.metrics import METRICS

_FRACTION = "accuracy"
"""Stands for every metric that is shown times 100."""


def value(metric: str, number: float) -> str:
    """Returns a score as the paper prints it: a fraction times 100, RMSE as it is."""
    return f"{100 * number:.2f}" if METRICS[metric].fraction else f"{number:.3f}"


def published(metric: str, number: float | None) -> str:
    """Returns a published value, which is in the paper's unit already."""
    if number is None:
        return "–"
    return f"{number:.2f}" if METRICS[metric].fraction else f"{number:.3f}"


def change(metric: str, number: float, *, digits: int = 2) -> str:
    """Returns a difference of scores with its sign; no sign where it rounds to nothing."""
    digits, unit = (digits, 100) if METRICS[metric].fraction else (digits + 1, 1)
    number = round(unit * number, digits)
    return f"{number:+.{digits}f}".replace("-", "−") if number else f"{0:.{digits}f}"


def interval(metric: str, ends: Interval, *, digits: int = 2) -> str:
    """Returns an interval of differences."""
    return f"{change(metric, ends.low, digits=digits)} … {change(metric, ends.high, digits=digits)}"


def spread(metric: str, cell: Cell) -> str:
    """Returns lowest and highest, or nothing where there is one seed."""
    return f"{value(metric, cell.low)}–{value(metric, cell.high)}" if cell.finished > 1 else ""


def seeds(cell: Cell) -> str:
    """Returns how many seeds a cell is made of, "3 of 5 seeds" where some are missing."""
    missing = cell.finished < cell.planned
    return f"{cell.finished} of {cell.planned} seeds" if missing else count_of(cell.finished, "seed")


def shortfall(cell: Cell) -> str:
    """Returns the number of seeds where it is one, or smaller than planned; else nothing."""
    return seeds(cell) if cell.finished == 1 or cell.finished < cell.planned else ""


def verdict(difference: Difference, *, higher_is_better: bool, baseline: str) -> str:
    """Returns what a difference means, in words.

    Four cases: the interval over examples holds zero; it does not, but there is one seed; the interval over examples
    and seeds holds zero; neither does.
    """
    if difference.interval.holds_zero():
        return f"not distinguishable from {baseline} with these {difference.examples:,} examples"
    word = "better" if (difference.observed > 0) == higher_is_better else "worse"
    if difference.seeds == 1:
        return f"{word} than {baseline} with this one seed, which says nothing about others"
    if not difference.stands:
        return f"{word} than {baseline} with these {difference.seeds} seeds, but others could undo it"
    return f"{word} than {baseline}, beyond what other examples or seeds would change"


def sentence(report: Report, comparison: Comparison) -> str:
    """Returns the significance statement of one task."""
    difference, metric = comparison.difference, comparison.metric
    words = verdict(difference, higher_is_better=comparison.higher_is_better, baseline=comparison.baseline)
    return (
        f"{report.column(comparison.task).title}: {change(metric, difference.observed, digits=1)} "
        f"{METRICS[metric].title} (95 % CI {interval(metric, difference.interval, digits=1)}): {words}. "
        f"{count_of(comparison.improved, 'example')} improved, {comparison.worsened:,} worsened."
    )


def average_sentence(report: Report, label: str) -> str:
    """Returns the significance statement over all tasks."""
    difference = report.averages[label]
    titles = ", ".join(report.column(task).title for task in report.averaged[label])
    words = verdict(difference, higher_is_better=True, baseline=report.baselines[label])
    return (
        f"Mean of {titles}: {change(_FRACTION, difference.observed, digits=1)} "
        f"(95 % CI {interval(_FRACTION, difference.interval, digits=1)}): {words}."
    )


METHOD = (
    "A score is the median of the finished seeds, with the lowest and the highest; times 100, RMSE as it is.",
    "A difference is the mean over seeds of the model's score minus its baseline's with the same seed, on the same "
    "examples. It need not be the difference of the medians.",
    "CI: paired percentile bootstrap, 10,000 resamples of the examples, the same for both models and all seeds, the "
    "metric computed anew on each; the seeds are held fixed. The second interval resamples the seeds too, pairs "
    "together; in simulations with 5 or 9 seeds it held the truth in 91 % of the cases or more, with fewer it is too "
    "narrow. One seed has no such interval, and no mark in the table.",
    "Intervals are per task: of twenty, one excludes zero by chance.",
    "Weights lie in the folder model of each task's best seed (run.keep_model=true: of all, false: of none). A "
    "finished run without cannot give them later: finetune it anew.",
    "Improved: examples that the model got right in more seeds than its baseline (in a regression: came nearer to "
    "the target); worsened: in fewer.",
)
