"""Tasks that are fetched: what is asked of the hub, and that its rows, as published, are read as the examples."""

import sys
from types import SimpleNamespace

import pytest

from xdscale.errors import XdscaleError
from xdscale.tasks import hub
from xdscale.tasks.contract import find_task

GLUE, SWAG = "nyu-mll/glue", "allenai/swag"
MATCHED = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
USUAL = ["train", "validation", "test"]
ENDINGS = tuple(f"sent2 of {{0}} ending{number} of {{0}}" for number in range(4))

# Name, dataset, configuration, its splits and columns; the texts and ids read of one row, what label 1 is, the files
# with predictions, the metrics, and the one that stands in tables.
TASKS = [
    ("rte", GLUE, "rte", USUAL, ["sentence1", "sentence2"], 7, 1, "RTE.tsv", ["accuracy"], "accuracy"),
    ("mrpc", GLUE, "mrpc", USUAL, ["sentence1", "sentence2"], 0, 1, "MRPC.tsv", ["accuracy", "f1"], "f1"),
    (
        "stsb", GLUE, "stsb", USUAL, ["sentence1", "sentence2"], 7, 1.0, "STS-B.tsv",
        ["pearson", "spearman", "pearson_spearman"], "pearson_spearman",
    ),
    ("cola", GLUE, "cola", USUAL, ["sentence"], 0, 1, "CoLA.tsv", ["matthews", "accuracy"], "matthews"),
    ("sst2", GLUE, "sst2", USUAL, ["sentence"], 0, 1, "SST-2.tsv", ["accuracy"], "accuracy"),
    ("qnli", GLUE, "qnli", USUAL, ["question", "sentence"], 7, 1, "QNLI.tsv", ["accuracy"], "accuracy"),
    ("qqp", GLUE, "qqp", USUAL, ["question1", "question2"], 7, 1, "QQP.tsv", ["accuracy", "f1"], "accuracy"),
    (
        "mnli", GLUE, "mnli", MATCHED, ["premise", "hypothesis"], 7, 1, "MNLI-m.tsv MNLI-mm.tsv", ["accuracy"],
        "accuracy",
    ),
    (
        "swag", SWAG, "regular", USUAL, ["sent1", "sent2", "ending0", "ending1", "ending2", "ending3"], 0, 1,
        "SWAG.tsv", ["accuracy"], "accuracy",
    ),
]  # fmt: skip


@pytest.fixture
def datasets(monkeypatch):
    """Stands for the library of that name."""
    library = SimpleNamespace(disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


@pytest.mark.parametrize(
    ("name", "path", "config", "splits", "columns", "number", "label", "submitted", "metrics", "score"),
    TASKS,
    ids=[task[0] for task in TASKS],
)
def test_a_fetched_task_is_read_as_the_hub_publishes_it(
    datasets, tmp_path, name, path, config, splits, columns, number, label, submitted, metrics, score
):
    asked = []

    def load(dataset, configuration, *, split):
        asked.append((dataset, configuration, split))
        row = {column: f"{column} of {split}" for column in columns}
        return [row | {"idx": 7, "label": -1 if split.startswith("test") else label, "startphrase": "x"}]

    datasets.load_dataset = load
    task = find_task(name)
    task.fetch(tmp_path)
    assert asked == [(path, config, split) for split in splits]
    task.fetch(tmp_path)  # what is there stays
    assert len(asked) == len(splits)
    data = task.read(tmp_path)
    found = [data.train, *data.dev.values(), *data.test.values()]
    for split, (example,) in zip(splits, found, strict=True):
        if name == "swag":
            expected = tuple((f"sent1 of {split}", ending.format(split)) for ending in ENDINGS)
        else:
            expected = (tuple(f"{column} of {split}" for column in columns),)
        assert example.texts == expected
        assert example.id == str(number)
        assert example.label == (None if split.startswith("test") else label)
    assert list(data.test) == submitted.split()
    assert (list(task.metrics), task.score) == (metrics, score)


def test_what_cannot_be_fetched_is_told_with_what_to_do(datasets, monkeypatch, tmp_path):
    def load(*_, **__):
        raise ConnectionError("no route\nto host")

    datasets.load_dataset = load
    with pytest.raises(
        XdscaleError,
        match=r"^--task rte: nyu-mll/glue could not be fetched \(.*no route to host\); give a local folder",
    ):
        hub.fetch_task(find_task("rte"), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        XdscaleError, match=r"--task rte: no --data given, and the package 'datasets', .*xdscale\[hub\]"
    ):
        hub.fetch_task(find_task("rte"), tmp_path)
    assert not any(tmp_path.iterdir())
