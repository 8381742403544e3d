"""What a bench promises: figures with goals, and the table of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One promise: the figure, what it must reach, and whether it does; without a goal a figure that others are of."""

    name: str
    figure: str
    goal: str
    reached: bool


def print_promises(rows: list[Promise], title: str) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measured", title=title)
    for column in ("figure", "goal", "reached"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, row.figure, row.goal, ("yes" if row.reached else "NO") if row.goal else "")
    Console(highlight=False, width=None if Console().is_terminal else 120).print(table)
