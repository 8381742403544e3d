"""A model beside its baseline: whether they may be compared, by how much they differ, where."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import csv_text
from xdscale.report.bootstrap import Difference, paired_bootstrap
from xdscale.report.sweep import FinetunedRun, Sweep, TaskRuns
from xdscale.tasks.metrics import METRICS

_NAMED_DIFFERENCES = 5


@dataclass(frozen=True)
class Comparison:
    """One task of a model and its baseline, over the same seeds.

    Attributes:
        task: name.
        label: of the model.
        baseline: label of its baseline.
        higher_is_better: of the metric.
        metric: what is compared.
        difference: ours minus theirs, with its resamples.
        correct_ours: seeds in which our model answered right, int64 [examples]; in a regression, seeds in which it
            came nearer to the target than the baseline; where answers earn credits, seeds in which it earned more.
        correct_baseline: the same of the baseline.
    """

    task: str
    label: str
    baseline: str
    higher_is_better: bool
    metric: str
    difference: Difference
    correct_ours: np.ndarray
    correct_baseline: np.ndarray

    @property
    def verdict(self) -> Literal["better", "worse", ""]:
        """What is said without reserve: nothing where other examples or seeds could undo it, or with a single seed."""
        if not self.difference.stands:
            return ""
        return "better" if (self.difference.observed > 0) == self.higher_is_better else "worse"

    @property
    def improved(self) -> int:
        """Examples that our model got right in more seeds."""
        return int((self.correct_ours > self.correct_baseline).sum())

    @property
    def worsened(self) -> int:
        """Examples that it got right in fewer."""
        return int((self.correct_ours < self.correct_baseline).sum())


def require_comparable(ours: Sweep, baseline: Sweep) -> None:
    """Refuses two sweeps that differ in more than the model; a sweep against itself: whether its seeds differ.

    Raises:
        XdscaleError: files or settings of a common task differ; each difference is named with both values.
    """
    for task, there in baseline.tasks.items():
        first = there.runs[0]
        for run in ours.tasks[task].runs if task in ours.tasks else ():
            differences = _differences(run, first)
            if differences:
                more = len(differences) - _NAMED_DIFFERENCES
                named = "\n  ".join(differences[:_NAMED_DIFFERENCES]) + (f"\n  and {more} more" if more > 0 else "")
                what_to_do = (
                    "seeds of one sweep must be alike: finetune this task anew in another --out"
                    if ours is baseline
                    else "finetune both with the same files and settings, name another --baseline, or have a report of "
                    f"each by itself: 'xdscale report {ours.folder}'"
                )
                raise XdscaleError(f"{run.folder}: cannot be compared with {first.folder}:\n  {named}\n{what_to_do}")


def compare(ours: Sweep, baseline: Sweep, task: str) -> Comparison | str:
    """Compares a task of two comparable sweeps.

    Returns:
        The comparison, or why there is none: other seeds.

    Raises:
        XdscaleError: the examples differ although the files are the same.
    """
    mine, theirs = ours.tasks[task], baseline.tasks[task]
    if mine.seeds != theirs.seeds:
        return (
            f"no paired statistics, because the finished seeds differ: {_list(mine.seeds)} of {ours.model.label}, "
            f"{_list(theirs.seeds)} of {baseline.model.label}"
        )
    if mine.ids != theirs.ids or not np.array_equal(mine.labels, theirs.labels):
        raise XdscaleError(
            f"{mine.runs[0].folder}: its examples are not those of {theirs.runs[0].folder}, though both were read "
            "from the same files; finetune both with the same version of xdscale"
        )
    metric = mine.score.name
    difference = paired_bootstrap(metric, mine.labels, mine.predictions, theirs.predictions, stream=task)
    right, right_there = _right(metric, mine, theirs)
    return Comparison(
        task=task,
        label=ours.model.label,
        baseline=baseline.model.label,
        higher_is_better=mine.score.higher_is_better,
        metric=metric,
        difference=difference,
        correct_ours=right.sum(1),
        correct_baseline=right_there.sum(1),
    )


def unlike(ours: Sweep, baseline: Sweep) -> list[str]:
    """Returns what a reader must know of two models that are not an encoder before and after adaptation."""
    mine, theirs = ours.model, baseline.model
    names = f"{mine.label} against {theirs.label}"
    found = []
    if mine.subject != theirs.subject:
        found.append(
            f"{names}: unlike subjects, {mine.subject} and {theirs.subject}: they differ in parameters and in what "
            "they read, so the difference is not that of adaptation"
        )
    if mine.encoder is not None and theirs.encoder is not None and mine.encoder != theirs.encoder:
        found.append(
            f"{names}: unlike encoders, {mine.encoder} and {theirs.encoder}: the difference is not that of adaptation"
        )
    common = [(ours.tasks[task], runs) for task, runs in baseline.tasks.items() if task in ours.tasks]
    if common and all(
        one.seeds == other.seeds and np.array_equal(one.predictions, other.predictions) for one, other in common
    ):
        found.append(f"{names}: all answers are the same in every seed; is one a copy of the other?")
    elif mine.weights_sha256 and (mine.weights_sha256, mine.subject) == (theirs.weights_sha256, theirs.subject):
        found.append(f"{names}: the same weights (SHA-256 {mine.weights_sha256[:12]}…), a model against itself")
    return found


def comparison_csv(comparison: Comparison, runs: TaskRuns) -> str:
    """Returns the examples one by one, as `xdscale grounded-ratio` reads them.

    Args:
        comparison: the counts.
        runs: our model's, for the texts.
    """
    counts = zip(map(int, comparison.correct_baseline), map(int, comparison.correct_ours))
    rows = ([identifier, *texts, *correct] for identifier, texts, correct in zip(runs.ids, runs.texts, counts))
    return csv_text(["id", "sentence1", "sentence2", "correct_baseline", "correct_ours"], rows)


def _right(metric: str, mine: TaskRuns, theirs: TaskRuns) -> tuple[np.ndarray, np.ndarray]:
    labels = mine.labels[:, None]
    if METRICS[metric].of == "classes":
        return mine.predictions == labels, theirs.predictions == labels
    if METRICS[metric].of == "credits":
        return mine.predictions > theirs.predictions, theirs.predictions > mine.predictions
    error, error_there = abs(mine.predictions - labels), abs(theirs.predictions - labels)
    return error < error_there, error_there < error


def _differences(run: FinetunedRun, other: FinetunedRun) -> list[str]:
    """Names what differs: rows before hashes, because that is what people recognise."""
    found = []
    if run.score.name != other.score.name:
        found.append(f"metric is {run.score.name}, there {other.score.name}")
    for name in sorted(run.result.data.keys() | other.result.data.keys()):
        here, there = run.result.data.get(name), other.result.data.get(name)
        if here is None or there is None:
            found.append(f"{name} was read only {'there' if here is None else 'here'}")
        elif here.rows != there.rows:
            found.append(f"{name} has {here.rows} rows, there {there.rows}")
        elif here.sha256 != there.sha256:
            found.append(f"{name} has SHA-256 {here.sha256[:12]}…, there {there.sha256[:12]}…")
    settings, others = run.result.settings, other.result.settings
    for key in sorted(settings.keys() | others.keys()):
        if key not in settings or key not in others or settings[key] != others[key]:
            found.append(f"{key} is {_shown(settings, key)}, there {_shown(others, key)}")
    return found


def _shown(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key], sort_keys=True) if key in settings else "not set"


def _list(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds)) or "none"
