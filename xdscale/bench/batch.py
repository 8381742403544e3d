"""The batch that `xdscale bench step` computes on."""

import numpy as np

from xdscale.data.collate import XDBERTCollator
from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.recipe import Recipe
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch, Slots
from xdscale.systems.xdbert import XDBERTAdaptation, check_shards, example_batch

CLIP_TOKENS = 560
"""Positions that the invented CLIP texts fill of the 693, start and end tokens of eight blocks counted."""


def bench_batch(recipe: Recipe, module: XDBERTAdaptation, sequences: int) -> MicroBatch:
    """Returns a batch of the recipe's shards, or of invented sequences at the true shape where there are none.

    Raises:
        XdscaleError: the shards were not made for the recipe's model.
    """
    try:
        folder = resolve_path(recipe.data.shards)
    except XdscaleError:  # the recipe's data is not on this machine
        return example_batch(recipe, module, sequences, texts=lambda texts, _: np.full(texts, CLIP_TOKENS - 16))
    table = Table(folder, "train")
    check_shards(recipe.model, table.manifest)
    slots = Slots.of(np.arange(sequences) % len(table))
    return XDBERTCollator(table, seed=recipe.training.seed, objectives=recipe.objectives)(slots)
