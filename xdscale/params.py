"""Parameter counts of a recipe's model, part by part (spec xdbert §2.5, paper table 6)."""

from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from xdscale.recipe import Recipe
from xdscale.systems.contract import open_system
from xdscale.systems.xdbert import XDBERTAdaptation


class PartCount(NamedTuple):
    """One line of the table.

    Attributes:
        part: what is counted.
        parameters: how many it has; tied decoder weights count once, with the embedding they share.
        total: whether this line sums up lines above it.
    """

    part: str
    parameters: int
    total: bool = False


def build_on_meta(spec: Recipe) -> nn.Module:
    """Builds a recipe's module on the meta device: without weights, and with the kernels whatever it says.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    encoders = {
        name: part.model_copy(update={"weights": "random"}) for name, part in spec.model if name in ("language", "clip")
    }
    bare = {
        "model": spec.model.model_copy(update=encoders),
        "run": spec.run.model_copy(update={"kernels": "fused"}),
    }
    with torch.device("meta"):
        return open_system(spec.model_copy(update=bare)).build(continued=True)


def parameter_table(spec: Recipe) -> list[PartCount]:
    """Counts parameters without allocating any: the model is built on the meta device, without weights.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    adaptation = build_on_meta(spec)
    if spec.system == "mlm":
        return [
            PartCount(f"language model, {spec.model.language.name}", _count(adaptation.model["language"]), total=True),
            PartCount("masked-LM head", _count(adaptation.mlm, shared=adaptation.model)),
            PartCount("model during adaptation", _count(adaptation), total=True),
        ]
    model = adaptation.model
    layers = spec.model.cross_layers
    projection = _count(model.clip) - _count(model.clip.tower) + model.clip.tower.text_projection.numel()
    rows = [
        PartCount(f"language model, {spec.model.language.name}", _count(model.language)),
        PartCount(f"CLIP text transformer, {spec.model.clip.name}", _count(model.clip) - projection),
        PartCount("text_projection + logit_scale", projection),
        PartCount("one cross-modal layer", _count(model.layers[0])),
        PartCount(f"model with {layers} cross-modal layer{'s' if layers > 1 else ''}", _count(model), total=True),
    ]
    rows += _head_rows(adaptation)
    rows.append(PartCount("model during adaptation", _count(adaptation), total=True))
    return rows


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


def _head_rows(adaptation: XDBERTAdaptation) -> list[PartCount]:
    heads = (
        ("masked-LM head", adaptation.mlm),
        ("MATCH head", adaptation.match),
        ("CLIP token head", adaptation.clip_tokens),
    )
    return [PartCount(name, _count(head, shared=adaptation.model)) for name, head in heads if head is not None]


def _count(module: nn.Module, *, shared: nn.Module | None = None) -> int:
    """Counts a module's parameters without those that are also another module's, as a tied decoder's are."""
    others = set(shared.parameters()) if shared is not None else ()
    return sum(parameter.numel() for parameter in module.parameters() if parameter not in others)
