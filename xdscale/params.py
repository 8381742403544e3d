"""Parameter counts of a recipe's model, part by part (spec xdbert §2.5, paper table 6)."""

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from xdscale.recipe import Recipe
from xdscale.systems.contract import PartCount, open_system


def build_on_meta(spec: Recipe) -> nn.Module:
    """Builds a recipe's module on the meta device: without weights, and with the kernels whatever it says.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    encoders = {
        name: part.model_copy(update={"weights": "random"}) for name, part in spec.model if hasattr(part, "weights")
    }
    bare = {
        "model": spec.model.model_copy(update=encoders),
        "run": spec.run.model_copy(update={"kernels": "fused"}),
    }
    with torch.device("meta"):
        return open_system(spec.model_copy(update=bare)).build(continued=True)


def parameter_table(recipe: Recipe) -> list[PartCount]:
    """Counts parameters without allocating any: the model is built on the meta device, without weights.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    return open_system(recipe).count(build_on_meta(recipe))


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
