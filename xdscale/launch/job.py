"""What is to run: a recipe and a DeepSpeed configuration, checked before anybody waits in a queue."""

import re
from dataclasses import dataclass
from pathlib import Path

from xdscale.ds_config import (
    SIZES,
    pixels_suffix,
    read_ds_config,
    resolve_ds_config,
    split_batch,
)
from xdscale.errors import XdscaleError
from xdscale.names import is_url, resolve_path
from xdscale.pretrained.architectures import read_encoder_config
from xdscale.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class TrainingJob:
    """A training run that fits together.

    Attributes:
        name: the recipe's file name without its suffix, fit for a folder and a queue.
        recipe: the recipe with its overrides applied.
        arguments: what `xdscale.train` is given.
        split: of each step over the ranks, in words.
    """

    name: str
    recipe: Recipe
    arguments: tuple[str, ...]
    split: str


def check_job(name: str, overrides: list[str] | tuple[str, ...], ds_config: str | None, world_size: int) -> TrainingJob:
    """Reads and checks everything that a rank would refuse after the wait in the queue.

    Args:
        name: recipe file or name of a shipped recipe.
        overrides: `section.key=value` items.
        ds_config: DeepSpeed JSON file or the name of a shipped one; None takes the ZeRO-2 one for the recipe's
            language model.
        world_size: number of ranks.

    Raises:
        XdscaleError: as `load_recipe`, `read_ds_config` and `resolve_ds_config`; or no shipped file fits.
    """
    recipe = load_recipe(name, overrides)
    ds_file = ds_config or shipped_ds_config(recipe)
    resolved = resolve_ds_config(ds_file, read_ds_config(ds_file), recipe, world_size)
    training, micro_batch = recipe.training, resolved["train_micro_batch_size_per_gpu"]
    if training.batch_tokens is None:
        split = str(split_batch(training.global_batch, world_size, micro_batch))
    else:
        split = f"a step of at most {training.batch_tokens} tokens, in micro-batches of at most {micro_batch}"
    return TrainingJob(
        name=re.sub(r"[^\w.-]+", "-", Path(name).stem),
        recipe=recipe,
        arguments=(name, *overrides, "--deepspeed_config", ds_file),
        split=split,
    )


def shipped_ds_config(recipe: Recipe) -> str:
    """Returns the name of the shipped ZeRO-2 configuration for the size of a recipe's language encoder.

    The size stands in the encoder's name, or in the config.json in its folder. There are others for pixels.

    Raises:
        XdscaleError: neither says it, or the recipe's system has no such encoder.
    """
    if not hasattr(recipe.model, "language"):
        raise XdscaleError(
            f"system = {recipe.system!r}: no shipped DeepSpeed config is known to fit it; name one with "
            "--deepspeed-config, such as bert-base-zero2"
        )
    name = recipe.model.language.name
    size = next((size for word, size in SIZES.items() if word in name), None)
    if size is None:
        try:
            width = read_encoder_config(resolve_path(name)).get("hidden_size", 768)
        except XdscaleError as error:
            raise XdscaleError(
                f"model.language.name = {name!r}: no shipped DeepSpeed config is known to fit: {error}; name one with "
                "--deepspeed-config, such as bert-base-zero2"
            ) from None
        size = "quickstart" if width < 512 else "bert-base" if width < 1024 else "electra-large"
    return "quickstart-zero2" if size == "quickstart" else f"{size}{pixels_suffix(recipe)}-zero2"


def path_warnings(recipe: Recipe) -> list[str]:
    """Returns what to know about paths that stand for another place where the working folder is another."""
    paths = recipe.places() | {"output.folder": recipe.output.folder}
    return [
        f"{key} = {value} is relative: every machine takes it from {Path.cwd()}, which must be one shared folder; "
        "an absolute path on a shared file system is safer, and 'xdscale doctor' checks either"
        for key, value in paths.items()
        if not value.startswith(("/", "package:")) and not is_url(value)
    ]
