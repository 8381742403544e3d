"""Fetches tasks from the model hub and writes them down in their public formats, where a network exists."""

import csv
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import one_line
from xdscale.tasks.text import Hub, TextTask


def fetch_task(task: TextTask, data: Path) -> None:
    """Writes a task's files into `data` unless they are there, so that one reader reads everything.

    Args:
        task: which.
        data: gets the task's folder.

    Raises:
        XdscaleError: the task is nowhere free to fetch, `datasets` is not installed, the hub cannot be reached, or
            `data` cannot be written.
    """
    folder = data / task.folder
    if (folder / task.train).is_file():
        return
    if task.hub is None:
        raise XdscaleError(
            f"--task {task.name}: the competition's data cannot be fetched; download it and name the folder that holds "
            f"{task.folder}/{task.train} with --data"
        )
    try:
        import datasets
    except ImportError:
        raise XdscaleError(
            f"--task {task.name}: no --data given, and the package 'datasets', which fetches tasks, is not installed; "
            "give a local folder with --data, or: pip install 'xdscale[hub]'"
        ) from None
    # Two sweeps may fetch at once, also on two machines.
    aside = folder.with_name(f".{folder.name}.{platform.node()}-{os.getpid()}.partial")
    datasets.disable_progress_bars()
    splits = {name: _load(datasets, task, task.hub, split) for name, split in task.hub.splits.items()}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, rows in splits.items():
            _write(task, task.hub, aside / name, rows, labelled=not name.startswith("test"))
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if (folder / task.train).is_file():
            return  # the other one was quicker
        raise XdscaleError(
            f"{folder}: cannot be written: {error.strerror or error}; give a local folder with --data"
        ) from None


def _load(datasets: Any, task: TextTask, hub: Hub, split: str) -> Any:
    try:
        return datasets.load_dataset(hub.path, hub.config, split=split)
    except Exception as error:  # the library raises unrelated kinds for no network, no such name, no such split
        raise XdscaleError(
            f"--task {task.name}: {hub.path} could not be fetched ({one_line(error)}); give a local folder with --data"
        ) from None


def _write(task: TextTask, hub: Hub, path: Path, rows: Any, *, labelled: bool) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows(_lines(task, hub, rows, labelled=labelled))
        else:
            for line in _lines(task, hub, rows, labelled=labelled):
                file.write("\t".join(" ".join(cell.split()) for cell in line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(task: TextTask, hub: Hub, rows: Any, *, labelled: bool) -> Iterator[list[str]]:
    texts = [*([task.id] if task.id else []), task.first, *([task.prefix] if task.prefix else []), *task.seconds]
    columns = list(task.headerless) if labelled and task.headerless else [*texts, *([task.label] if labelled else [])]
    if not (labelled and task.headerless):
        yield columns
    for row in rows:
        cells = {name: str(row[hub.columns.get(name, name)]) for name in texts}
        if labelled:
            label = row[hub.columns.get(task.label, task.label)]
            cells[task.label] = str(label) if task.regression else task.labels[label]
        yield [cells.get(name, "") for name in columns]
