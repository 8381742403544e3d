"""What is to run: a recipe and a DeepSpeed configuration, checked before anybody waits in a queue."""

import re
from dataclasses import dataclass
from pathlib import Path

from xdscale.ds_config import read_ds_config, resolve_ds_config
from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe, load_recipe

_SHIPPED_FOLDERS = (Path("ds_configs"), Path(__file__).parents[2] / "ds_configs")


@dataclass(frozen=True)
class Job:
    """A training run that fits together.

    Attributes:
        name: the recipe's file name without its suffix, fit for a folder and a queue.
        recipe: the recipe with its overrides applied.
        arguments: what `xdscale.adapt` is given.
        world_size: number of ranks.
    """

    name: str
    recipe: Recipe
    arguments: tuple[str, ...]
    world_size: int


def check_job(name: str, overrides: list[str] | tuple[str, ...], ds_config: str | None, world_size: int) -> Job:
    """Reads and checks everything that a rank would refuse after the wait in the queue.

    Args:
        name: recipe file or name of a shipped recipe.
        overrides: `section.key=value` items.
        ds_config: DeepSpeed JSON file; None takes the shipped ZeRO-2 file for the recipe's language model.
        world_size: number of ranks.

    Raises:
        XdscaleError: as `load_recipe`, `read_ds_config` and `resolve_ds_config`; or no shipped file fits.
    """
    recipe = load_recipe(name, overrides)
    ds_file = ds_config or shipped_ds_config(recipe)
    resolve_ds_config(ds_file, read_ds_config(ds_file), recipe, world_size)
    return Job(
        name=re.sub(r"[^\w.-]+", "-", Path(name).stem),
        recipe=recipe,
        arguments=(name, *overrides, "--deepspeed_config", ds_file),
        world_size=world_size,
    )


def shipped_ds_config(recipe: Recipe) -> str:
    """Returns the shipped ZeRO-2 configuration for a recipe's language model.

    Raises:
        XdscaleError: none is for such a model.
    """
    language = recipe.model.language.name
    folder = next((folder for folder in _SHIPPED_FOLDERS if folder.is_dir()), None)
    shipped = sorted(folder.glob("*-zero2.json")) if folder else []
    for path in shipped:
        size = path.stem.removesuffix("-zero2")
        if size in language or (size == "quickstart" and language.startswith("package:")):
            return str(path)
    known = ", ".join(path.name for path in shipped) or "none found beside the package"
    raise XdscaleError(
        f"model.language.name = {language}: no shipped DeepSpeed config is for such a model ({known}); "
        "name one with --deepspeed-config"
    )


def path_warnings(recipe: Recipe) -> list[str]:
    """Returns what to know about paths that stand for another place where the working folder is another."""
    paths = {"data.shards": recipe.data.shards, "output.folder": recipe.output.folder}
    return [
        f"{key} = {value} is relative: every machine takes it from {Path.cwd()}, which must be one shared folder; "
        "an absolute path on a shared file system is safer, and 'xdscale doctor' checks either"
        for key, value in paths.items()
        if not value.startswith(("/", "package:"))
    ]
