"""What a report says, before it is written in any form."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.report.bootstrap import Difference, average
from xdscale.report.comparison import Comparison, compare, require_comparable, unlike
from xdscale.report.published import Layout, PublishedRow, TaskColumn, layouts
from xdscale.report.sweep import Sweep
from xdscale.tasks.metrics import METRICS


@dataclass(frozen=True)
class Cell:
    """A model's result on a task.

    Attributes:
        median: over the finished seeds.
        low: the lowest.
        high: the highest.
        finished: how many seeds are.
        planned: how many will be.
    """

    median: float
    low: float
    high: float
    finished: int
    planned: int


@dataclass(frozen=True)
class ReportRow:
    """A line of the table.

    Attributes:
        published: the paper's line; None for a model that the paper does not have.
        sweep: ours; None for a model that only the paper has.
    """

    published: PublishedRow | None
    sweep: Sweep | None


@dataclass(frozen=True)
class Report:
    """Everything that is shown.

    Attributes:
        layout: the paper's table, with a column for each task that the paper does not have.
        sweeps: ours, in the order of the command line.
        baselines: label of each compared model to its baseline's.
        comparisons: by model, then by task in the table's order.
        averages: by label, the mean difference over the tasks in `averaged`.
        averaged: by label, which tasks: those whose metric is a fraction.
        remarks: what a reader must know about these runs.
    """

    layout: Layout
    sweeps: tuple[Sweep, ...]
    baselines: dict[str, str]
    comparisons: tuple[Comparison, ...]
    averages: dict[str, Difference]
    averaged: dict[str, tuple[str, ...]]
    remarks: tuple[str, ...]

    def rows(self) -> list[ReportRow]:
        """Returns the paper's lines in its order, each with our run of the same model, then our other runs."""
        rows, placed = [], set()
        for published in self.layout.rows:
            ours = [sweep for sweep in self.sweeps if self.published_row(sweep) is published]
            placed.update(sweep.model.label for sweep in ours)
            rows += [ReportRow(published, sweep) for sweep in ours] or [ReportRow(published, None)]
        return rows + [ReportRow(None, sweep) for sweep in self.sweeps if sweep.model.label not in placed]

    def published_row(self, sweep: Sweep) -> PublishedRow | None:
        """Returns the paper's line of the same model."""
        return next((row for row in self.layout.rows if row.stands_for(sweep.model.label)), None)

    def published_value(self, sweep: Sweep, column: TaskColumn) -> float | None:
        """Returns what the paper printed for a run, in its own unit, if it is of the same metric."""
        row, runs = self.published_row(sweep), sweep.tasks.get(column.task)
        if row is None or (runs is not None and runs.score.name != column.metric):
            return None
        return row.values.get(column.task)

    def cell(self, sweep: Sweep, task: str) -> Cell | None:
        """Returns a model's result on a task; None where no seed is finished."""
        runs = sweep.tasks.get(task)
        if runs is None:
            return None
        scores = runs.scores
        return Cell(
            float(np.median(scores)), float(scores.min()), float(scores.max()), len(runs.runs), len(runs.planned)
        )

    def comparison(self, label: str, task: str) -> Comparison | None:
        """Returns how a model compares with its baseline on a task."""
        return next((one for one in self.comparisons if (one.label, one.task) == (label, task)), None)

    def comparisons_of(self, label: str) -> list[Comparison]:
        """Returns a model's comparisons, in the order of the table."""
        return [one for one in self.comparisons if one.label == label]

    def sweep(self, label: str) -> Sweep:
        """Returns the sweep of a label."""
        return next(sweep for sweep in self.sweeps if sweep.model.label == label)

    def column(self, task: str) -> TaskColumn:
        """Returns the column of a task."""
        return next(column for column in self.layout.columns if column.task == task)


def assemble(sweeps: Sequence[Sweep], layout: Layout, baselines: Sequence[str]) -> Report:
    """Compares sweeps with their baselines.

    Args:
        sweeps: in the order of the command line.
        layout: the table to be filled. Tasks that no table of the paper has get columns beside it; where nothing else
            is finished they alone are shown.
        baselines: labels; each is the baseline of the runs after it, up to the next one. None given: the first run's,
            if the paper's table compares at all.

    Raises:
        XdscaleError: two runs of one label, a baseline that is none of them, no task of the table, or runs that may
            not be compared.
    """
    layout = _with_own_columns(layout, sweeps)
    _check_labels(sweeps, layout, baselines)
    pairs = _pairs(sweeps, baselines or ([sweeps[0].model.label] if layout.compare else []))
    for sweep in sweeps:
        require_comparable(sweep, sweep)
    for ours, baseline in pairs:
        require_comparable(ours, baseline)
    remarks = _remarks(sweeps, layout)
    comparisons: list[Comparison] = []
    averages, averaged = {}, {}
    for ours, baseline in pairs:
        found: list[Comparison] = []
        refused: dict[str, list[str]] = {}
        remarks += unlike(ours, baseline)
        for column in layout.columns:
            there = [sweep for sweep in (ours, baseline) if column.task in sweep.tasks]
            if len(there) == 1:
                missing = baseline if there == [ours] else ours
                reason = f"{ours.model.label} is not compared: {missing.model.label} has no finished seed"
                refused.setdefault(reason, []).append(column.title)
            elif there:
                result = compare(ours, baseline, column.task)
                if isinstance(result, str):
                    refused.setdefault(result, []).append(column.title)
                else:
                    found.append(result)
        remarks += [f"{', '.join(titles)}: {reason}" for reason, titles in refused.items()]
        comparisons += found
        fractions = [one for one in found if METRICS[one.metric].fraction]
        if len(fractions) > 1:
            averages[ours.model.label] = average([one.difference for one in fractions])
            averaged[ours.model.label] = tuple(one.task for one in fractions)
    names = {ours.model.label: baseline.model.label for ours, baseline in pairs}
    return Report(layout, tuple(sweeps), names, tuple(comparisons), averages, averaged, tuple(remarks))


def _with_own_columns(layout: Layout, sweeps: Sequence[Sweep]) -> Layout:
    found = {name: runs for sweep in sweeps for name, runs in sweep.tasks.items()}
    own = tuple(
        TaskColumn(name, runs.title, runs.score.name, None) for name, runs in found.items() if name not in _papers()
    )
    if own and not any(column.task in found for column in layout.columns):
        return Layout(
            "Own tasks", "Models finetuned on tasks that the paper does not have.", "", layout.compare, own, ()
        )
    return replace(layout, columns=(*layout.columns, *own))


def _papers() -> set[str]:
    """Returns the tasks that some table of the paper has."""
    return {column.task for layout in layouts().values() for column in layout.columns}


def _check_labels(sweeps: Sequence[Sweep], layout: Layout, baselines: Sequence[str]) -> None:
    seen: dict[str, Sweep] = {}
    for sweep in sweeps:
        label = sweep.model.label
        for other in seen.values():
            if sweep.folder.resolve() == other.folder.resolve():
                raise XdscaleError(f"{sweep.folder} and {other.folder} are one folder; name each run once")
            if file_name(label) == file_name(other.model.label):
                same = label == other.model.label
                both = f"both labelled {label!r}" if same else f"labelled {other.model.label!r} and {label!r}, alike"
                raise XdscaleError(
                    f"{sweep.folder} and {other.folder} are {both}; change model.label in one's sweep.json"
                )
        seen[label] = sweep
    unknown = [label for label in baselines if label not in seen]
    if unknown:
        raise XdscaleError(f"--baseline {unknown[0]}: no run has this label; they are {', '.join(seen)}")
    tasks = {column.task for column in layout.columns}
    if not any(tasks & sweep.tasks.keys() for sweep in sweeps):
        finished = {task for sweep in sweeps for task in sweep.tasks}
        others = [name for name, other in layouts().items() if any(one.task in finished for one in other.columns)]
        raise XdscaleError(
            f"{', '.join(str(sweep.folder) for sweep in sweeps)}: no seed of a task of {layout.title} is finished"
            + (f"; --layout {' or '.join(others)} has columns for what is finished" if others else "")
        )


def file_name(label: str) -> str:
    """Returns a label as it stands in the names of files."""
    return "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in label)


def _pairs(sweeps: Sequence[Sweep], baselines: Sequence[str]) -> list[tuple[Sweep, Sweep]]:
    """Pairs each run with the nearest baseline before it; runs before the first one belong to the first."""
    found = []
    current = next((sweep for sweep in sweeps if sweep.model.label in baselines), None)
    for sweep in sweeps:
        if sweep.model.label in baselines:
            current = sweep
        elif current is not None:
            found.append((sweep, current))
    return found


def _remarks(sweeps: Sequence[Sweep], layout: Layout) -> list[str]:
    remarks = []
    for sweep in sweeps:
        label = sweep.model.label
        if layout.rows and not any(row.stands_for(label) for row in layout.rows):
            remarks.append(
                f"{label}: no published value stands beside it, because {layout.title} has no row of this label "
                f"({', '.join(row.label for row in layout.rows)})"
            )
        columns = {column.task: column for column in layout.columns}
        others = [task for task in (*sweep.tasks, *sweep.unfinished) if task not in columns]
        left_out = [task for task in others if task in _papers()]
        remarks += [f"{label}, {task}: no seed is finished yet" for task in others if task not in _papers()]
        if left_out:
            remarks.append(f"{label}: {', '.join(left_out)} left out, which {layout.title} does not have")
        counts: dict[str, list[str]] = {}
        for task, column in columns.items():
            for count in (*_seed_counts(sweep, task, column.seeds), *_endings(sweep, task)):
                counts.setdefault(count, []).append(column.title)
        remarks += [f"{label}, {', '.join(titles)}: {count}" for count, titles in counts.items()]
    return remarks


def _endings(sweep: Sweep, task: str) -> list[str]:
    """Returns which runs ended before their last step, and of which step the predictions are, where that was chosen."""
    told, early = [], 0
    results = [run.result for run in sweep.tasks[task].runs] if task in sweep.tasks else []
    for one in results:
        done, steps = one.curve[-1].step if one.curve else 0, one.settings.get("steps")
        ended = "patience" in one.settings and isinstance(steps, int) and 0 < done < steps
        early += ended
        if ended or one.best_step is not None:
            of = f" of {steps:,}" if ended else ""
            best = "" if one.best_step is None else f", the best after {one.best_step:,}"
            told.append(f"seed {one.seed} ended after step {done:,}{of}{best}")
    if early:
        told.insert(0, f"training.patience ended {early} of {count_of(len(results), 'seed')}")
    return ["; ".join(told)] if told else []


def _seed_counts(sweep: Sweep, task: str, expected: int | None) -> list[str]:
    if task in sweep.unfinished:
        return ["no seed is finished yet"]
    if task not in sweep.tasks:
        return []
    finished, planned = len(sweep.tasks[task].runs), len(sweep.tasks[task].planned)
    counts = []
    if finished < planned:
        counts.append(f"{finished} of {planned} seeds are finished")
    if expected is not None and planned < expected:
        counts.append(f"{count_of(planned, 'seed')}, the paper's median is of {expected}")
    return counts
