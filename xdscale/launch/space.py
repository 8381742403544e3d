"""How much room a recipe's checkpoints take."""

from xdscale.recipe import Recipe

BYTES_PER_PARAMETER = 16
"""The parameter as computed with (4 in fp32, 2 in bf16), its fp32 master and AdamW's two moments (12)."""


def checkpoint_bytes(recipe: Recipe) -> int:
    """Estimates one checkpoint; precision and ZeRO stage change little of it.

    Raises:
        XdscaleError: the model cannot be built from the recipe.
    """
    from xdscale.params import parameter_table

    return BYTES_PER_PARAMETER * parameter_table(recipe)[-1].parameters
