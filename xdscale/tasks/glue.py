"""GLUE's tasks, in the layout of its download (`glue_data/RTE/dev.tsv`)."""

from collections.abc import Mapping
from typing import Any

from xdscale.tasks.text import Hub, TextTask


def _hub(config: str, columns: Mapping[str, str] | None = None, splits: Mapping[str, str] | None = None) -> Hub:
    usual = {"train.tsv": "train", "dev.tsv": "validation", "test.tsv": "test"}
    return Hub(path="nyu-mll/glue", config=config, splits=splits or usual, columns={"index": "idx"} | (columns or {}))


def _glue(*, name: str, folder: str, columns: Mapping[str, str] | None = None, **own: Any) -> TextTask:
    test = {f"{folder}.tsv": "test.tsv"}
    return TextTask(name=name, folder=folder, test=test, hub=_hub(name, columns), **own)


_ENTAILED = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_MNLI_SPLITS = {
    "train.tsv": "train",
    "dev_matched.tsv": "validation_matched",
    "dev_mismatched.tsv": "validation_mismatched",
    "test_matched.tsv": "test_matched",
    "test_mismatched.tsv": "test_mismatched",
}

RTE = _glue(
    name="rte",
    title="RTE",
    folder="RTE",
    first="sentence1",
    seconds=("sentence2",),
    label="label",
    labels=_ENTAILED,
)

MRPC = _glue(
    name="mrpc",
    title="MRPC",
    folder="MRPC",
    columns={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
    first="#1 String",
    seconds=("#2 String",),
    label="Quality",
    labels=_BINARY,
    id=None,
    metrics=("accuracy", "f1"),
    score="f1",  # §4 calls F1 MRPC's "original metric"
)

STSB = _glue(
    name="stsb",
    title="STSB",
    folder="STS-B",
    columns={"score": "label"},
    first="sentence1",
    seconds=("sentence2",),
    label="score",
    span=(0.0, 5.0),
    metrics=("pearson", "spearman", "pearson_spearman"),
    score="pearson_spearman",  # GLUE's; the paper does not say
)

COLA = _glue(
    name="cola",
    title="CoLA",
    folder="CoLA",
    first="sentence",
    label="label",
    labels=_BINARY,
    id=None,
    headerless=("source", "label", "star", "sentence"),
    metrics=("matthews", "accuracy"),
    score="matthews",
)

SST2 = _glue(
    name="sst2",
    title="SST2",
    folder="SST-2",
    first="sentence",
    label="label",
    labels=_BINARY,
    id=None,
)

QNLI = _glue(
    name="qnli",
    title="QNLI",
    folder="QNLI",
    first="question",
    seconds=("sentence",),
    label="label",
    labels=_ENTAILED,
)

QQP = _glue(
    name="qqp",
    title="QQP",
    folder="QQP",
    columns={"is_duplicate": "label", "id": "idx"},
    first="question1",
    seconds=("question2",),
    label="is_duplicate",
    labels=_BINARY,
    id="id",
    torn_rows=True,  # some questions of the public file hold a line break
    metrics=("accuracy", "f1"),
    score="accuracy",  # the paper names no metric of its own; GLUE has both
)

MNLI = TextTask(
    name="mnli",
    title="MNLI",
    folder="MNLI",
    dev={"dev-m": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
    test={"MNLI-m.tsv": "test_matched.tsv", "MNLI-mm.tsv": "test_mismatched.tsv"},
    first="sentence1",
    seconds=("sentence2",),
    label="gold_label",
    labels=("entailment", "neutral", "contradiction"),
    hub=_hub("mnli", {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}, splits=_MNLI_SPLITS),
)
