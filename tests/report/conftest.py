"""Finetuning sweeps as `xdscale finetune` writes them, with scores from scikit-learn and SciPy."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error

from xdscale.report.command import make_report

SCORES = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "macro_f1": lambda labels, predictions: f1_score(labels, predictions, average="macro"),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
    "pearson_spearman": lambda labels, predictions: (
        (SCORES["pearson"](labels, predictions) + SCORES["spearman"](labels, predictions)) / 2
    ),
    "rmse": root_mean_squared_error,
    "vqa_accuracy": lambda labels, predictions: float(credits_of(labels, predictions).mean()),
}
METRICS = {
    "rte": ["accuracy"],
    "mrpc": ["f1", "accuracy"],
    "stsb": ["pearson_spearman", "pearson", "spearman"],
    "cola": ["matthews", "accuracy"],
    "sst2": ["accuracy"],
    "mnli": ["accuracy"],
    "read": ["rmse"],
    "reviews": ["macro_f1", "accuracy"],
    "vqa": ["vqa_accuracy"],
    "vcr_qa": ["accuracy"],
    "vcr_qar": ["accuracy"],
}
EXAMPLES = {
    "rte": 277,
    "mrpc": 408,
    "stsb": 150,
    "cola": 300,
    "sst2": 200,
    "mnli": 250,
    "read": 120,
    "reviews": 90,
    "vqa": 80,
    "vcr_qa": 70,
    "vcr_qar": 70,
}


def credits_of(labels, predictions):
    """What an answer earns in these files: 1 if it is the best one, else .3."""
    return np.where(labels == predictions, 1.0, 0.3)


def guesses(task, labels, skill, generator):
    """Predictions that are right in a share `skill` of the examples, or that far correlated."""
    if task in ("stsb", "read"):
        return labels + generator.normal(0, 2 * (1 - skill) + 0.05, len(labels))
    wrong = generator.random(len(labels)) > skill
    classes = 3 if task == "mnli" else 2
    return np.where(wrong, (labels + generator.integers(1, classes, len(labels))) % classes, labels)


def write_run(folder, task, label, seed, labels, predictions, settings=None):
    """Writes one finished seed."""
    folder.mkdir(parents=True)
    regression = task in ("stsb", "read")
    split = "dev-m" if task == "mnli" else "dev"
    metrics = {name: float(SCORES[name](labels, predictions)) for name in METRICS[task]}
    name, value = next(iter(metrics.items()))
    with (folder / f"predictions-{split}.jsonl").open("w", encoding="utf-8") as file:
        for index, (right, found) in enumerate(zip(labels.tolist(), predictions.tolist())):
            second = f"Hypothesis, “{index}”." if task in ("rte", "mrpc", "stsb", "mnli") else None
            credits = {"credits": {name: float(credits_of(right, found)) for name in metrics}} if task == "vqa" else {}
            answer = {"squared_error": (right - found) ** 2} if regression else {"correct": right == found}
            line = {
                "index": index,
                "id": str(1000 + index),
                "sentence1": f"Premise {index}, said\nA.",
                "sentence2": second,
            }
            file.write(
                json.dumps(line | {"label": right, "prediction": found, "scores": [0.0]} | answer | credits) + "\n"
            )
    if task == "mnli":
        metrics["accuracy_mismatched"] = 1.0
        (folder / "predictions-mismatched.jsonl").write_text(
            json.dumps({"index": 0, "id": "m", "sentence1": "a", "sentence2": "b", "label": 2, "prediction": 2}) + "\n"
        )
    generator = np.random.default_rng(seed)
    curve = [
        {"step": step, "loss": float(0.15 + 0.55 * np.exp(-step / 60) + generator.normal(0, 0.03))}
        for step in range(10, 241, 10)
    ]
    data = {
        name: {"sha256": hashlib.sha256((task + name).encode()).hexdigest(), "rows": rows}
        for name, rows in {"train.tsv": 2490, "dev.tsv": len(labels)}.items()
    }
    result = {
        "format": 1, "task": task, "title": task.upper(), "subject": "language", "label": label,
        "seed": seed, "split": split,
        "metrics": metrics, "score": {"name": name, "value": value, "higher_is_better": name != "rmse"},
        "examples": len(labels), "data": data,
        "settings": {"learning_rate": 1e-4, "epochs": 3, "batch": 32, "max_length": 128} | (settings or {}),
        "curve": curve, "seconds": 12.3,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def write_sweep(tmp_path):
    """Writes a sweep: label, skill by task, seeds, and which of them are unfinished."""

    def write(label, skills, *, seeds=5, unfinished=(), settings=None, folder=None):
        folder = tmp_path / (folder or label)
        folder.mkdir(exist_ok=True)
        for task, skill in skills.items():
            draw = np.random.default_rng([1, *task.encode()])  # the same examples in every sweep
            count = EXAMPLES[task]
            if task in ("stsb", "read"):
                labels = np.round(draw.uniform(0, 5, count), 1)
            else:
                labels = draw.integers(0, 3 if task == "mnli" else 2, count)
            for seed in range(seeds):
                if seed in unfinished:
                    continue
                generator = np.random.default_rng([seed, *f"{label}{task}".encode()])
                predictions = guesses(task, labels, skill + generator.normal(0, 0.01), generator)
                write_run(folder / task / f"seed-{seed}", task, label, seed, labels, predictions, settings)
        model = {"name": f"exports/{label}", "label": label, "subject": "language", "weights_sha256": "ab" * 32}
        tasks = {task: {"seeds": list(range(seeds))} for task in skills}
        (folder / "sweep.json").write_text(json.dumps({"format": 1, "model": model, "tasks": tasks}))
        return folder

    return write


@pytest.fixture(scope="session")
def report() -> Callable[..., dict[tuple[str, str], dict[str, str]]]:
    """Makes a report; returns the lines of its CSV by model and task."""

    def report(runs: list[Path], out: Path, **options: Any) -> dict[tuple[str, str], dict[str, str]]:
        make_report(runs, **{"layout": "table-1", "baselines": [], "metrics": [], "out": out} | options)
        with (out / "report.csv").open(newline="", encoding="utf-8") as file:
            return {(line["model"], line["task"]): line for line in csv.DictReader(file)}

    return report
