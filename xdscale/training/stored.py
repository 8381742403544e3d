"""What a run or an export holds: the recipe that it was made with, and the module's weights."""

import json
from pathlib import Path
from typing import Any

import torch

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json
from xdscale.models.operations import use_definitions
from xdscale.names import resolve_path
from xdscale.recipe import Recipe, recipe_file, schema_of
from xdscale.recipe_values import NOT_YAML, validated
from xdscale.recipe_yaml import read_yaml
from xdscale.systems.contract import System
from xdscale.training.best import final_step
from xdscale.training.checkpoint import choose_checkpoint
from xdscale.training.consolidate import final_state
from xdscale.training.distributed import Ranks
from xdscale.weights import part_of, read_state_dict, require_fitting

MODEL_PREFIX = "model."
LANGUAGE_PREFIX = MODEL_PREFIX + "language."

FULL_MODEL = "cross_modal"
"""Folder of the full model inside an export."""


def run_recipe(run: Path) -> Recipe:
    """Returns the recipe that a run folder was made with.

    Raises:
        XdscaleError: no run folder, or its recipe is damaged.
    """
    path = recipe_file(run)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, *NOT_YAML) as error:
        raise XdscaleError(f"{path}: not YAML: {one_line(error)}") from None
    return _recipe(values, path)


def stored_recipe(folder: Path) -> Recipe:
    """Returns the recipe that a run or an export was made with.

    Raises:
        XdscaleError: `folder` is neither, or its recipe is damaged.
    """
    if (folder / "recipe.yaml").is_file():
        return run_recipe(folder)
    exported = folder / FULL_MODEL / "config.json"
    if not exported.is_file():
        raise XdscaleError(
            f"{folder}: neither a run folder (no recipe.yaml) nor an export of a cross-modal model (no "
            f"{FULL_MODEL}/config.json)"
        )
    return _recipe(read_json(exported).get("recipe"), exported)


def stored_state(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the fp32 weights of a run (its best checkpoint, if it keeps one, or its newest) or an export, with heads.

    Raises:
        XdscaleError: no checkpoint yet, or damaged weights.
    """
    if (folder / "recipe.yaml").is_file():
        return final_state(choose_checkpoint(folder, final_step(folder, run_recipe(folder)), Ranks(0, 1, 0)))
    inner = folder / FULL_MODEL
    state, path = read_state_dict(inner / "model.safetensors"), inner / "config.json"
    tied = read_json(path).get("tied_weights")
    if not (isinstance(tied, dict) and all(isinstance(name, str) and name in state for name in tied.values())):
        raise XdscaleError(f"{path}: tied_weights = {tied!r}: expected names of weights that model.safetensors holds")
    return state | {name: state[source] for name, source in tied.items()}


def language_folder(folder: Path) -> Path:
    """Returns where a run or an export keeps the language encoder's config.json and tokenizer.json."""
    return folder / "language" if (folder / "recipe.yaml").is_file() else folder


def load_part(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, folder: Path) -> None:
    """Loads a module that is a part of what `folder` holds, under names that begin with a prefix.

    Raises:
        XdscaleError: the weights are not those of the module.
    """
    found, wanted = part_of(state, prefix), module.state_dict()
    require_fitting(wanted, found, folder, "the model in its recipe")
    module.load_state_dict({name: found[name] for name in wanted})


def save_full_model(recipe: Recipe, state: dict[str, torch.Tensor], out: Path) -> None:
    """Writes a module's weights (safetensors, fp32; tied ones once) and the recipe that it was built from.

    Args:
        recipe: of the run.
        state: the weights; tied ones share storage.
        out: a folder that does not exist yet.
    """
    from safetensors.torch import save_file

    out.mkdir()
    unique, seen, tied = {}, {}, {}
    for name, value in state.items():
        if value.data_ptr() in seen and value.shape == unique[seen[value.data_ptr()]].shape:
            tied[name] = seen[value.data_ptr()]
        else:
            seen[value.data_ptr()] = name
            unique[name] = value.contiguous()
    save_file(unique, out / "model.safetensors", metadata={"format": "pt"})
    config = {"recipe": recipe.model_dump(mode="json"), "tied_weights": tied}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_module(system: System, *, continued: bool) -> torch.nn.Module:
    """Builds what a recipe trains, with the weights of `model.start` and by the definitions, where it says so.

    Args:
        system: of the recipe.
        continued: whether a checkpoint of the run gives the weights.

    Raises:
        XdscaleError: weights are missing, damaged or do not fit.
    """
    module, start = system.build(), getattr(system.recipe.model, "start", None)
    if start is not None and not continued:
        folder = resolve_path(start)
        begin_with(module, folder, system.published_state(folder))
    return use_definitions(module) if system.recipe.run.kernels == "plain" else module


def begin_with(module: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Gives a newly built module the weights of a run or an export, heads included.

    The head of an objective that was off there keeps the values it was built with.

    Args:
        module: what a system built.
        folder: a run folder (the checkpoint is read that an export would take, checksums verified), or an export.
        state: its weights, where the system has read them.

    Raises:
        XdscaleError: neither of the two, no checkpoint yet, or the weights do not fit the module.
    """
    if state is None:
        stored_recipe(folder)
        state = stored_state(folder)
    wanted = module.state_dict()
    needed = {name: value for name, value in wanted.items() if name.startswith(MODEL_PREFIX) or name in state}
    require_fitting(needed, state, f"model.start = {folder}", "this recipe")
    module.load_state_dict({name: state[name] for name in wanted.keys() & state.keys()}, strict=False)


def _recipe(values: Any, path: Path) -> Recipe:
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: holds no recipe")
    return validated(values, schema_of(values, str(path)), str(path))
