"""How much room a recipe's checkpoints take."""

from xdscale.plan.settings import kept_bytes
from xdscale.recipe import Recipe

_WEIGHTS = 8
"""Bytes per parameter: as computed with (4 in fp32, 2 in bf16), and its fp32 master (4)."""


def checkpoint_bytes(recipe: Recipe) -> int:
    """Estimates one checkpoint; precision and ZeRO stage change little of it.

    Raises:
        XdscaleError: the model cannot be built from the recipe.
    """
    from xdscale.plan.profile import parameter_table

    return (_WEIGHTS + kept_bytes(recipe.optim)) * parameter_table(recipe)[-1].parameters
