"""The tasks of the paper's Table 1: where their files are, what is in them, how they are scored.

File layouts are the public ones: GLUE's download (`glue_data/RTE/dev.tsv`), SWAG's repository (`train.csv`,
`val.csv`), and the CommonLit competition (`train.csv`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from xdscale.errors import XdscaleError
from xdscale.names import nearest

HIGHER_IS_BETTER = {"rmse": False}
"""Metrics of which less is better; all others are better when higher."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where `datasets` finds a task.

    Attributes:
        path: dataset name.
        config: its configuration.
        splits: file of the public format to split name.
        columns: column of the public format to column of the hub's, where the two names differ.
    """

    path: str
    config: str
    splits: Mapping[str, str]
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: as on the command line.
        title: as in Table 1.
        folder: in the data folder.
        train: file of the training split.
        dev: name of each development split to its file; a file that is `train` itself is split by a hash of the id.
        test: name of each unlabelled split's submission file to its file; missing ones are left out.
        first: column of the (first) sentence.
        seconds: columns of the second sentence: none, one, or one per choice.
        prefix: column put before each of `seconds`, with a space.
        label: column of the label.
        labels: the words that may stand there, in the order of the classes; empty for regression.
        span: smallest and largest target of a regression.
        id: column that names an example; None: its number, counted from 0.
        headerless: column names of labelled files that have no header line.
        torn_rows: whether a few rows without all columns are left out instead of refused.
        metrics: what is measured on a development split.
        score: the metric that stands in Table 1.
        hub: the same data online; None where it is nowhere free to fetch.
    """

    name: str
    title: str
    folder: str
    train: str = "train.tsv"
    dev: Mapping[str, str] = field(default_factory=lambda: {"dev": "dev.tsv"})
    test: Mapping[str, str]
    first: str
    seconds: tuple[str, ...] = ()
    prefix: str | None = None
    label: str
    labels: tuple[str, ...] = ()
    span: tuple[float, float] = (float("-inf"), float("inf"))
    id: str | None = "index"
    headerless: tuple[str, ...] = ()
    torn_rows: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    score: str = "accuracy"
    hub: Hub | None = None

    @property
    def kind(self) -> Literal["single", "pair", "choice"]:
        """Whether one sentence, two, or one with several possible followers is judged."""
        return ("single", "pair")[len(self.seconds)] if len(self.seconds) < 2 else "choice"

    @property
    def regression(self) -> bool:
        """Whether the target is a number."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Numbers that the head gives per text: one per class; 1 for a regression and for each choice."""
        return 1 if self.regression or self.kind == "choice" else len(self.labels)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is the better one."""
        return HIGHER_IS_BETTER.get(self.score, True)


def _glue(config: str, columns: Mapping[str, str] | None = None, splits: Mapping[str, str] | None = None) -> Hub:
    usual = {"train.tsv": "train", "dev.tsv": "validation", "test.tsv": "test"}
    return Hub(path="nyu-mll/glue", config=config, splits=splits or usual, columns={"index": "idx"} | (columns or {}))


_ENTAILED = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_MNLI_SPLITS = {
    "train.tsv": "train",
    "dev_matched.tsv": "validation_matched",
    "dev_mismatched.tsv": "validation_mismatched",
    "test_matched.tsv": "test_matched",
    "test_mismatched.tsv": "test_mismatched",
}

_ALL = (
    Task(
        name="rte",
        title="RTE",
        folder="RTE",
        test={"RTE.tsv": "test.tsv"},
        first="sentence1",
        seconds=("sentence2",),
        label="label",
        labels=_ENTAILED,
        hub=_glue("rte"),
    ),
    Task(
        name="mrpc",
        title="MRPC",
        folder="MRPC",
        test={"MRPC.tsv": "test.tsv"},
        first="#1 String",
        seconds=("#2 String",),
        label="Quality",
        labels=_BINARY,
        id=None,
        metrics=("accuracy", "f1"),
        score="f1",  # §4 calls F1 MRPC's "original metric"
        hub=_glue("mrpc", {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}),
    ),
    Task(
        name="stsb",
        title="STSB",
        folder="STS-B",
        test={"STS-B.tsv": "test.tsv"},
        first="sentence1",
        seconds=("sentence2",),
        label="score",
        span=(0.0, 5.0),
        metrics=("pearson", "spearman", "pearson_spearman"),
        score="pearson_spearman",  # GLUE's; the paper does not say
        hub=_glue("stsb", {"score": "label"}),
    ),
    Task(
        name="cola",
        title="CoLA",
        folder="CoLA",
        test={"CoLA.tsv": "test.tsv"},
        first="sentence",
        label="label",
        labels=_BINARY,
        id=None,
        headerless=("source", "label", "star", "sentence"),
        metrics=("matthews", "accuracy"),
        score="matthews",
        hub=_glue("cola"),
    ),
    Task(
        name="sst2",
        title="SST2",
        folder="SST-2",
        test={"SST-2.tsv": "test.tsv"},
        first="sentence",
        label="label",
        labels=_BINARY,
        id=None,
        hub=_glue("sst2"),
    ),
    Task(
        name="qnli",
        title="QNLI",
        folder="QNLI",
        test={"QNLI.tsv": "test.tsv"},
        first="question",
        seconds=("sentence",),
        label="label",
        labels=_ENTAILED,
        hub=_glue("qnli"),
    ),
    Task(
        name="qqp",
        title="QQP",
        folder="QQP",
        test={"QQP.tsv": "test.tsv"},
        first="question1",
        seconds=("question2",),
        label="is_duplicate",
        labels=_BINARY,
        id="id",
        torn_rows=True,  # some questions of the public file hold a line break
        metrics=("accuracy", "f1"),
        score="accuracy",  # the paper names no metric of its own; GLUE has both
        hub=_glue("qqp", {"is_duplicate": "label", "id": "idx"}),
    ),
    Task(
        name="mnli",
        title="MNLI",
        folder="MNLI",
        dev={"dev-m": "dev_matched.tsv", "dev-mm": "dev_mismatched.tsv"},
        test={"MNLI-m.tsv": "test_matched.tsv", "MNLI-mm.tsv": "test_mismatched.tsv"},
        first="sentence1",
        seconds=("sentence2",),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        hub=_glue(
            "mnli", {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}, splits=_MNLI_SPLITS
        ),
    ),
    Task(
        name="swag",
        title="SWAG",
        folder="SWAG",
        train="train.csv",
        dev={"dev": "val.csv"},
        test={"SWAG.tsv": "test.csv"},
        first="sent1",
        seconds=("ending0", "ending1", "ending2", "ending3"),
        prefix="sent2",
        label="label",
        labels=("0", "1", "2", "3"),
        id=None,
        hub=Hub(
            path="allenai/swag",
            config="regular",
            splits={"train.csv": "train", "val.csv": "validation", "test.csv": "test"},
        ),
    ),
    Task(
        name="read",
        title="READ",
        folder="READ",
        train="train.csv",
        dev={"dev": "train.csv"},
        test={"READ.csv": "test.csv"},
        first="excerpt",
        label="target",
        id="id",
        metrics=("rmse",),
        score="rmse",
    ),
)

TASKS = {task.name: task for task in _ALL}
"""All tasks by name, in the order of Table 1."""


def find_task(name: str) -> Task:
    """Returns a task by its name.

    Raises:
        XdscaleError: no task has that name; the nearest right one is named.
    """
    if name in TASKS:
        return TASKS[name]
    hint = nearest(name.lower().replace("-", ""), list(TASKS), f"known tasks: {', '.join(TASKS)}")
    raise XdscaleError(f"--task {name}: no such task; {hint}")
