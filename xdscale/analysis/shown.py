"""What analyses print and write: tables, and attention maps as CSV."""

from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from xdscale.files import csv_text


class AttentionMap(NamedTuple):
    """What one caption's word pieces read in its image's regions.

    Attributes:
        pieces: with [CLS] and [SEP].
        keys: numbers of the regions, or names of categories of them.
        weights: float32 [layers, heads, pieces, keys]; of a category the sum over its regions.
    """

    pieces: list[str]
    keys: list[str]
    weights: np.ndarray


def map_csv(shown: AttentionMap, *, first: int = 1, **more: np.ndarray) -> str:
    """Returns one line for each weight: layer, head, position, word piece, region or category, weight.

    Args:
        shown: the map.
        first: number of the first layer and head.
        more: columns of the shape of the weights.
    """
    rows = []
    for place in np.ndindex(shown.weights.shape):
        layer, head, piece, key = place
        values = [f"{weights[place]:.6f}" for weights in (shown.weights, *more.values())]
        rows.append([layer + first, head + first, piece, shown.pieces[piece], shown.keys[key], *values])
    return csv_text(["layer", "head", "position", "piece", "region", "weight", *more], rows)


def new_table(*columns: str) -> Table:
    """Returns an empty table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def print_table(title: str, table: Table) -> None:
    """Prints a table under its title."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # in a file or a pipe nothing is cut off to fit a window
    console.print(title, soft_wrap=True)
    console.print(table)
