"""`xdscale params`: a recipe's parameters, part by part (paper table 6)."""

from rich.console import Console
from rich.table import Table

from xdscale.plan.profile import parameter_table
from xdscale.recipe import Recipe


def print_parameters(spec: Recipe) -> None:
    """Prints `parameter_table` for people.

    Raises:
        XdscaleError: as `parameter_table`.
    """
    table = Table(caption="decoders of the token heads are tied to the embeddings and counted once")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for row in parameter_table(spec):
        table.add_row(row.part, f"{row.parameters:,}", style="bold" if row.total else None, end_section=row.total)
    Console().print(table)
