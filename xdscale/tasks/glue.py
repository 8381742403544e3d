"""GLUE's tasks, in the layout of its download (`glue_data/RTE/dev.tsv`)."""

from collections.abc import Mapping

from xdscale.tasks.text import Hub, TextTask


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

RTE = TextTask(
    name="rte",
    title="RTE",
    folder="RTE",
    test={"RTE.tsv": "test.tsv"},
    first="sentence1",
    seconds=("sentence2",),
    label="label",
    labels=_ENTAILED,
    hub=_glue("rte"),
)

MRPC = TextTask(
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
)

STSB = TextTask(
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
)

COLA = TextTask(
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
)

SST2 = TextTask(
    name="sst2",
    title="SST2",
    folder="SST-2",
    test={"SST-2.tsv": "test.tsv"},
    first="sentence",
    label="label",
    labels=_BINARY,
    id=None,
    hub=_glue("sst2"),
)

QNLI = TextTask(
    name="qnli",
    title="QNLI",
    folder="QNLI",
    test={"QNLI.tsv": "test.tsv"},
    first="question",
    seconds=("sentence",),
    label="label",
    labels=_ENTAILED,
    hub=_glue("qnli"),
)

QQP = TextTask(
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
    hub=_glue("mnli", {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}, splits=_MNLI_SPLITS),
)
