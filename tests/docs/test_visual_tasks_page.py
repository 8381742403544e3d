"""docs/visual-tasks.md names the files, metrics and ids that the tasks really use, and its join of two files works."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from xdscale.data.task_files import Example
from xdscale.tasks.contract import SHIPPED, find_task
from xdscale.tasks.vcr import VCR_QA, VCR_QAR
from xdscale.tasks.vqa import ANSWERS, _annotations_of

PAGE = (Path(__file__).parents[2] / "docs" / "visual-tasks.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
TASKS = [task for task in map(find_task, SHIPPED) if task.images]


def test_the_table_has_every_task_and_its_metrics():
    rows = {
        row[1].strip(" `"): row[3] for row in (line.split("|") for line in PAGE.splitlines() if line.startswith("| `"))
    }
    assert list(rows) == [task.name for task in TASKS]
    for task in TASKS:
        named = re.findall(r"`([^`]*)`", rows[task.name])
        whole = [named[0].removesuffix("1") + name[1:] if name.startswith("_") else name for name in named]
        assert tuple(whole) == task.metrics


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_layout_has_every_file(task):
    layout = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]
    (part,) = re.findall(rf"^  {re.escape(task.folder)}/\n((?:    .*\n)+)", layout, re.MULTILINE)
    files = {task.train, *task.dev.values(), *task.test.values()}
    if task.name == "vqa":
        files |= {_annotations_of(name) for name in (task.train, *task.dev.values())} | {ANSWERS}
    assert {word for word in part.split() if word.endswith((".json", ".jsonl", ".txt", ".p"))} >= files


def test_vcrs_two_files_become_the_leaderboards(tmp_path):
    (command,) = re.findall(r"^paste .*", PAGE, re.MULTILINE)
    for task, count in ((VCR_QA, 1), (VCR_QAR, 4)):
        names = [f"test-{n}" + f"#{k}" * task.reasons for n in range(3) for k in range(count)]
        examples = [Example(name, ((),), None, 1) for name in names]
        folder = tmp_path / "finetuned" / "model" / task.name / "seed-0" / "predictions"
        folder.mkdir(parents=True)
        (name,) = task.test
        (folder / name).write_text(task.submission(name, examples, np.full((len(examples), 4), 0.25)))
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    head, *rows = (tmp_path / "vcr.csv").read_text().splitlines()
    groups = ["answer", *(f"rationale_conditioned_on_a{n}" for n in range(4))]
    assert head.split(",") == ["annot_id", *(f"{group}_{n}" for group in groups for n in range(4))]
    assert rows == [f"test-{n}" + ",0.25" * 20 for n in range(3)]
