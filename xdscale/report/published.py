"""What the papers printed: a file for each table in `tables`, and the tasks' columns in tasks.yaml.

In a row `also` are other labels of it: the recipes and encoders that ship with, or are named by, xdscale. What a paper
did not print is null.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class TaskColumn:
    """A task as it stands in the tables.

    Attributes:
        task: its name on the command line.
        title: its name in the paper.
        metric: what published values are.
        seeds: runs whose median the paper reports; None of a task that it does not have.
    """

    task: str
    title: str
    metric: str
    seeds: int | None


@dataclass(frozen=True)
class PublishedRow:
    """One model.

    Attributes:
        label: as printed.
        also: other labels under which our runs of it are found.
        values: task to value; fractions times 100, RMSE as it is.
    """

    label: str
    also: tuple[str, ...]
    values: dict[str, float]

    def stands_for(self, label: str) -> bool:
        """Returns whether a run of this label is the same model, whatever its capitals."""
        return label.casefold() in {name.casefold() for name in (self.label, *self.also)}


@dataclass(frozen=True)
class Layout:
    """A table of the paper.

    Attributes:
        title: such as "Table 1".
        caption: what it shows.
        note: what a reader must know to compare with it.
        compare: whether the first run is the others' baseline when none is named.
        columns: tasks, left to right.
        rows: models, top to bottom.
    """

    title: str
    caption: str
    note: str
    compare: bool
    columns: tuple[TaskColumn, ...]
    rows: tuple[PublishedRow, ...]


@cache
def layouts() -> dict[str, Layout]:
    """Returns all tables by their name on the command line."""
    folder, tables = Path(__file__).parent, {}
    tasks = yaml.safe_load((folder / "tasks.yaml").read_text(encoding="utf-8"))
    for path in sorted((folder / "tables").glob("*.yaml"), key=lambda path: path.stem):
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = tuple(
            TaskColumn(task, known["title"], known["metric"], table.get("seeds", known.get("seeds")))
            for task, known in ((task, tasks[task]) for task in table["tasks"])
        )
        rows = tuple(
            PublishedRow(
                row["label"],
                tuple(row["also"]),
                {task: value for task, value in zip(table["tasks"], row["values"]) if value is not None},
            )
            for row in table["rows"]
        )
        tables[path.stem] = Layout(table["title"], table["caption"], table["note"], table["compare"], columns, rows)
    return tables
