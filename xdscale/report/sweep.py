"""Reads what `xdscale finetune` wrote, and believes none of it before it is checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from xdscale.data.json_shapes import read_lines, read_whole
from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.report.metrics import measure
from xdscale.tasks.metrics import METRICS

AGREEMENT = 1e-6
"""Largest difference between a stored score and the one of the stored predictions."""


JOINT, PARTS = "vcr_q2ar", ("vcr_qa", "vcr_qar")
"""VCR's Q→AR, which no model is finetuned on: right are the questions of which answer and reason are both right."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class FinetunedModel(_Stored):
    """Which model a sweep finetuned; `encoder` says in words what its language encoder is."""

    name: str
    label: str
    subject: str
    encoder: str | None = None
    weights_sha256: str | None = None


class Seeds(_Stored):
    """Which seeds a sweep set out to run on a task."""

    seeds: list[int]


class SweepFile(_Stored):
    """`sweep.json`."""

    format: Literal[1]
    model: FinetunedModel
    tasks: dict[Annotated[str, Field(pattern=r"^[^/.\x00][^/\x00]*$")], Seeds]  # they name folders and files


class Score(_Stored):
    """A run's headline figure."""

    name: str
    value: FiniteFloat
    higher_is_better: bool


class DataFile(_Stored):
    """A file that a run read."""

    sha256: str
    rows: int


class Point(_Stored):
    """A point of a learning curve; the loss of a run that diverged may be no number."""

    step: int
    loss: float | None


class Result(_Stored):
    """`result.json` of one run.

    `title` is the head of its task's column; `model` what all seeds have of the model, beside the settings;
    `kept_model` as `run.keep_model`, False where nothing was kept; `best_step` that whose weights predicted, where
    validations decided.
    """

    format: Literal[1]
    task: str
    title: str = ""
    seed: int
    split: str
    metrics: dict[str, FiniteFloat]
    score: Score
    examples: int
    data: dict[str, DataFile]
    model: dict[str, Any] = {}
    settings: dict[str, Any]
    curve: list[Point]
    best_step: int | None = None
    kept_model: bool | Literal["best"] = False
    seconds: float = 0.0


class Prediction(_Stored):
    """A line of `predictions-SPLIT.jsonl`; `credits` by the names of metrics, where the task's answers earn some."""

    index: int
    id: str | int
    sentence1: str
    sentence2: str | list[str] | None = None
    label: FiniteFloat
    prediction: FiniteFloat
    credits: dict[str, FiniteFloat] = {}


@dataclass(frozen=True)
class FinetunedRun:
    """One seed.

    Attributes:
        folder: where it lies.
        result: its `result.json`.
        score: what is reported of it: the task's headline, or the metric that was asked for.
        labels: float64 [examples].
        predictions: float64 [examples]; the credits, where the score is their mean.
    """

    folder: Path
    result: Result
    score: Score
    labels: np.ndarray
    predictions: np.ndarray


@dataclass(frozen=True)
class TaskRuns:
    """All finished seeds of one task, in the order of their numbers.

    Attributes:
        task: name.
        planned: seeds that the sweep set out to run.
        runs: the finished ones; at least one.
        ids: of the examples.
        texts: of the examples: (sentence1, sentence2 or "").
    """

    task: str
    planned: tuple[int, ...]
    runs: tuple[FinetunedRun, ...]
    ids: tuple[str, ...]
    texts: tuple[tuple[str, str], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The finished seeds."""
        return tuple(run.result.seed for run in self.runs)

    @property
    def title(self) -> str:
        """The head of the task's column."""
        return self.runs[0].result.title or self.task

    @property
    def scores(self) -> np.ndarray:
        """The score of each finished seed, float64 [seeds]."""
        return np.array([run.score.value for run in self.runs])

    @property
    def score(self) -> Score:
        """What is scored; the value is the first seed's."""
        return self.runs[0].score

    @property
    def labels(self) -> np.ndarray:
        """float64 [examples]."""
        return self.runs[0].labels

    @property
    def predictions(self) -> np.ndarray:
        """float64 [examples, seeds]."""
        return np.stack([run.predictions for run in self.runs], axis=1)


@dataclass(frozen=True)
class Sweep:
    """One model on several tasks.

    Attributes:
        folder: as named on the command line.
        model: which.
        tasks: those with a finished seed, by name.
        unfinished: tasks without one.
    """

    folder: Path
    model: FinetunedModel
    tasks: dict[str, TaskRuns]
    unfinished: tuple[str, ...]


def read_sweep(folder: Path, metrics: dict[str, str]) -> Sweep:
    """Reads a sweep folder.

    Args:
        folder: written by `xdscale finetune`.
        metrics: task to the metric that is reported instead of the task's headline.

    Raises:
        XdscaleError: no sweep, a file is broken or missing, or its parts contradict each other; the file is named.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise XdscaleError(f"{folder}: has no sweep.json; expected a folder written by 'xdscale finetune --out FOLDER'")
    stored = read_sweep_file(path)
    tasks = {}
    for task, planned in stored.tasks.items():
        runs = _read_task(folder / task, task, planned.seeds, metrics.get(task))
        if runs is not None:
            tasks[task] = runs
    return Sweep(folder, stored.model, tasks | _joint(tasks), tuple(task for task in stored.tasks if task not in tasks))


def read_sweep_file(path: Path) -> SweepFile:
    """Reads the `sweep.json` of a sweep.

    Raises:
        XdscaleError: missing, unreadable or not one.
    """
    return read_whole(path, SweepFile)


def read_result(path: Path) -> Result:
    """Reads the `result.json` of a run.

    Raises:
        XdscaleError: missing, unreadable or not one.
    """
    return read_whole(path, Result)


def _read_task(folder: Path, task: str, planned: list[int], metric: str | None) -> TaskRuns | None:
    seeds = [seed for seed in sorted(set(planned)) if (folder / f"seed-{seed}" / "result.json").is_file()]
    runs: list[FinetunedRun] = []
    first: list[Prediction] = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        result = read_result(place / "result.json")
        if (result.task, result.seed) != (task, seed):
            raise XdscaleError(
                f"{place / 'result.json'}: is of task {result.task}, seed {result.seed}; was the folder renamed?"
            )
        if runs and result.model != runs[0].result.model:
            raise XdscaleError(
                f"{place}: is a run of another model than {runs[0].folder} (other weights, or other pixels); was the "
                "folder copied here? Finetune this task anew"
            )
        run, lines = _read_run(place, result, metric)
        first = first or lines
        if [(line.id, line.label) for line in lines] != [(line.id, line.label) for line in first]:
            raise XdscaleError(f"{place}: holds other examples than {runs[0].folder}; finetune this task anew")
        runs.append(run)
    if not runs:
        return None
    ids = tuple(str(line.id) for line in first)
    return TaskRuns(task, tuple(sorted(set(planned))), tuple(runs), ids, tuple(_texts(line) for line in first))


def _joint(tasks: dict[str, TaskRuns]) -> dict[str, TaskRuns]:
    """Returns VCR's Q→AR, for the seeds that are finished on both of its parts; nothing where there are none."""
    answers, reasons = (tasks.get(part) for part in PARTS)
    if answers is None or reasons is None:
        return {}
    if answers.ids != reasons.ids:
        raise XdscaleError(
            f"{reasons.runs[0].folder}: holds other examples than {answers.runs[0].folder}; finetune both anew"
        )
    others = {run.result.seed: run for run in reasons.runs}
    runs = tuple(_joint_run(run, others[run.result.seed]) for run in answers.runs if run.result.seed in others)
    planned = tuple(sorted(set(answers.planned) & set(reasons.planned)))
    return {JOINT: TaskRuns(JOINT, planned, runs, answers.ids, answers.texts)} if runs else {}


def _joint_run(answer: FinetunedRun, reason: FinetunedRun) -> FinetunedRun:
    right = ((answer.predictions == answer.labels) & (reason.predictions == reason.labels)).astype(float)
    score = Score(name="accuracy", value=float(right.mean()), higher_is_better=True)
    settings = {
        f"{part}: {key}": value
        for part, run in zip(PARTS, (answer, reason))
        for key, value in run.result.settings.items()
    }
    changed = {
        "task": JOINT, "title": "VCR Q→AR", "score": score, "metrics": {"accuracy": score.value}, "curve": [],
        "best_step": None,
        "data": answer.result.data | reason.result.data, "settings": settings,
    }  # fmt: skip
    return FinetunedRun(answer.folder, answer.result.model_copy(update=changed), score, np.ones(len(right)), right)


def _read_run(folder: Path, result: Result, metric: str | None) -> tuple[FinetunedRun, list[Prediction]]:
    name, split, value = result.score.name, result.split, result.score.value
    if metric is not None:
        if metric not in result.metrics:
            raise XdscaleError(
                f"--metric {result.task}={metric}: {folder / 'result.json'} has {', '.join(result.metrics)}"
            )
        value, name = result.metrics[metric], metric
        if metric not in METRICS:  # of a further split, METRIC_SPLIT
            name = max((known for known in METRICS if metric.startswith(f"{known}_")), key=len, default=metric)
            split = metric.removeprefix(f"{name}_")
    if name not in METRICS:
        raise XdscaleError(f"{folder / 'result.json'}: unknown metric {name!r}; known: {', '.join(METRICS)}")
    if METRICS[name].of == "groups":
        raise XdscaleError(
            f"--metric {result.task}={metric}: {name} is of groups of examples, a report compares single ones; "
            f"{folder / 'result.json'} has its value"
        )
    path = folder / f"predictions-{split}.jsonl"
    lines = _read_predictions(path)
    if split == result.split and len(lines) != result.examples:
        found = count_of(len(lines), "line")
        raise XdscaleError(f"{path}: has {found}, {folder / 'result.json'} says {result.examples} examples")
    labels = np.array([line.label for line in lines])
    predictions = np.array(_credits(path, lines, name) or [line.prediction for line in lines])
    found = float(measure(name, np.ones((1, len(lines))), labels, predictions[:, None])[0, 0])
    if abs(found - value) > AGREEMENT:
        raise XdscaleError(
            f"{path}: its {name} is {found:.6f}, but {folder / 'result.json'} says {value:.6f}; one of them was changed"
        )
    score = Score(name=name, value=value, higher_is_better=METRICS[name].higher_is_better)
    return FinetunedRun(folder, result, score, labels, predictions), lines


def _credits(path: Path, lines: list[Prediction], metric: str) -> list[float] | None:
    """Returns what each example earned; None where the metric compares predictions with labels."""
    if METRICS[metric].of != "credits":
        return None
    for number, line in enumerate(lines, 1):
        if metric not in line.credits:
            raise XdscaleError(f"{path}, line {number}: credits has no {metric}; finetune this seed anew")
    return [line.credits[metric] for line in lines]


def _read_predictions(path: Path) -> list[Prediction]:
    if not path.is_file():
        raise XdscaleError(f"{path}: is missing, though the run beside it is finished; finetune this seed anew")
    lines: list[Prediction] = []
    for number, line in read_lines(path, Prediction):
        if line.index != len(lines):
            raise XdscaleError(f"{path}, line {number}: index {line.index}, expected {len(lines)}; a line is missing")
        lines.append(line)
    if not lines:
        raise XdscaleError(f"{path}: holds no examples")
    return lines


def _texts(line: Prediction) -> tuple[str, str]:
    second = line.sentence2
    return line.sentence1, " ".join(second) if isinstance(second, list) else second or ""
