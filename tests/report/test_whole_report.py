"""A report as its reader sees it, word for word; its numbers are checked against other libraries elsewhere.

Where a change of it is meant, read the difference, and put the file that the test names in the place of the stored one.
"""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from .conftest import write_run

STORED = Path(__file__).with_name("whole_report.txt")
TASKS = {"rte": 60, "read": 12, "reviews": 40, "mrpc": 30}
SEEDS = {"rte": 3, "read": 3, "reviews": 3, "mrpc": 1, "vcr_qa": 2}


def answers(task, label, seed, labels):
    """Predictions without chance: a model is wrong in every so manyth example, later seeds elsewhere."""
    better = label != "BERT-b"
    if task == "read":
        return labels + 0.1 * (1 + (np.arange(len(labels)) + seed) % 4) / (1 + better)
    wrong = (np.arange(len(labels)) + seed) % ({"rte": 3, "reviews": 6}.get(task, 5) * (1 + better)) == 0
    return np.where(wrong, 1 - labels, labels)


@pytest.fixture
def sweeps(tmp_path):
    """A baseline, a model that is better at most, and one that the paper does not know and that has only begun."""
    folders = []
    for label, tasks in (("BERT-b", TASKS), ("XDBERT-b", TASKS), ("m<i>ne|", {"rte": 60, "sst2": 8, "vcr_qa": 10})):
        folder = tmp_path / f"sweep-{len(folders)}"
        folders.append(folder)
        for task, count in tasks.items():
            labels = np.arange(count) * 0.25 if task == "read" else np.arange(count) % 2
            for seed in range(SEEDS.get(task, 0) - (label == "m<i>ne|")):
                more = {"patience": 2, "steps": 300} if task == "reviews" else {}
                run = folder / task / f"seed-{seed}"
                write_run(run, task, label, seed, labels, answers(task, label, seed, labels), more)
                result = json.loads((run / "result.json").read_text())
                result["curve"] = [{"step": step, "loss": 0.9 / step + seed / 8} for step in (1, 2, 240)]
                result["best_step"] = 120 if task == "reviews" and seed == 1 else None
                (run / "result.json").write_text(json.dumps(result))
        model = {"name": f"exports/{label}", "label": label, "subject": "language", "weights_sha256": "ab" * 32}
        planned = {task: {"seeds": [0, 1, 2][: SEEDS.get(task, 3)]} for task in tasks}
        (folder / "sweep.json").write_text(json.dumps({"format": 1, "model": model, "tasks": planned}))
    return folders


def words_of(page):
    """What a page says, a line for each piece of text, with what it says of its pictures."""
    body = page[page.index("<body") :]
    body = re.sub(r'<svg [^>]*aria-label="([^"]*)".*?</svg>', r"picture: \1<br>", body, flags=re.DOTALL)
    lines = (html.unescape(" ".join(part.split())) for part in re.split(r"<[^>]*>", body))
    return "\n".join(line for line in lines if line) + "\n"


def test_a_report_reads_as_it_did(report, sweeps, tmp_path, capsys):
    report(sweeps, tmp_path / "out")
    printed = capsys.readouterr()
    out = tmp_path / "out"
    names = ("report.md", "report.csv", "comparisons/read-XDBERT-b.csv")
    parts = {name: (out / name).read_text(encoding="utf-8") for name in names}
    parts["report.csv"] = re.sub(r"-?\d+\.\d{7,}", lambda number: f"{float(number[0]):.6f}", parts["report.csv"])
    parts |= {"page": words_of((out / "report.html").read_text(encoding="utf-8"))}
    parts |= {"stdout": printed.out, "stderr": printed.err}
    found = "".join(f"==== {name}\n{re.sub(r' +$', '', text, flags=re.MULTILINE)}" for name, text in parts.items())
    (tmp_path / STORED.name).write_text(found, encoding="utf-8")
    assert found == STORED.read_text(encoding="utf-8"), f"found: {tmp_path / STORED.name}"
