"""Finished runs of a sweep: where their results lie, whether they may stay as they are, and the table of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import MODEL, RESULT
from xdscale.report.sweep import read_result
from xdscale.tasks.contract import Task, TaskData


def result_path(out: Path, task: str, seed: int) -> Path:
    """Returns where the result of a run lies that is finished."""
    return out / task / f"seed-{seed}" / RESULT


def require_same_files(path: Path, data: TaskData, source: Path) -> None:
    """Refuses to leave a finished run as it is where the task's files have changed since.

    Args:
        path: its result.
        data: what is read now.
        source: the folder of the task's files.

    Raises:
        XdscaleError: names a file that has changed.
    """
    before = {name: file.sha256 for name, file in read_result(path).data.items()}
    now = {name: file["sha256"] for name, file in data.files.items()}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise XdscaleError(
                f"{path}: this run is finished, but {name} of {source} is another file than then; choose another "
                f"--out, or delete {path.parent} to finetune anew"
            )


def require_model(path: Path) -> None:
    """Refuses to leave a finished run as it is that has kept no model.

    Args:
        path: its result.

    Raises:
        XdscaleError: it has kept none.
    """
    if not (path.parent / MODEL / "config.json").is_file():
        raise XdscaleError(
            f"{path}: this run is finished, but has kept no model (run.keep_model); choose another --out, or delete "
            f"{path.parent} to finetune anew"
        )


def print_table(out: Path, tasks: Mapping[str, Task], seeds: Mapping[str, Sequence[int]]) -> None:
    """Prints the scores of the seeds that are finished, a line for each task.

    Args:
        out: folder of the sweep.
        tasks: by name.
        seeds: that were asked for, by task.
    """
    table = Table("task", "metric", "median", "lowest", "highest", "seeds", "models kept", caption=str(out))
    for name, numbers in seeds.items():
        paths = [result_path(out, name, seed) for seed in numbers]
        values = [read_result(path).score.value for path in paths if path.is_file()]
        if values:
            digits = [f"{value:.4f}" for value in (median(values), min(values), max(values))]
            models = ", ".join(f"{path.parent.name}/{MODEL}" for path in paths if path.with_name(MODEL).is_dir())
            of = tasks[name].title, tasks[name].score
            table.add_row(*of, *digits, f"{len(values)} of {len(numbers)}", models or "none")
    if table.row_count:
        Console(markup=False).print(table)
