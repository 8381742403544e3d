"""From a run to Hugging Face folders: the adapted language encoder, and the full cross-modal model."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from xdscale.errors import XdscaleError
from xdscale.recipe import Language, Recipe

LANGUAGE_PREFIX = "model.language."
FULL_MODEL = "cross_modal"


def save_language_files(spec: Language, folder: Path) -> None:
    """Keeps the language encoder's config and tokenizer with the run, so that exporting needs no original.

    Args:
        spec: the recipe's language encoder.
        folder: the run's `language` folder.
    """
    from xdscale.pretrained.language import language_config, tokenizer_folder

    folder.mkdir(parents=True, exist_ok=True)
    language_config(spec).save_pretrained(folder)
    source = tokenizer_folder(spec)
    for path in source.iterdir() if source is not None else ():
        if path.name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copyfile(path, folder / path.name)


def export_run(run: Path, out: Path, *, step: int | None = None) -> str:
    """Exports a run's checkpoint.

    `OUT` is a Hugging Face folder: `AutoModel.from_pretrained(OUT)` gives the adapted language encoder with exactly
    the original's parameters. `OUT/cross_modal` holds the full model: safetensors (fp32) and the recipe it was built
    from.

    Args:
        run: the run folder.
        out: a folder that does not exist yet, or is empty.
        step: whose checkpoint; None for the newest undamaged one.

    Returns:
        One line that says what was exported.

    Raises:
        XdscaleError: no such run or checkpoint, a damaged checkpoint (the file is named), or `out` is in use.
    """
    from xdscale.training.checkpoint import choose_checkpoint
    from xdscale.training.distributed import Ranks

    recipe = _read_recipe(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise XdscaleError(f"{out}: exists and is not an empty folder; choose another one for the export")
    checkpoint = choose_checkpoint(run, step, Ranks(0, 1, 0))
    state = consolidated_state(checkpoint)
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    parameters = _export_language(run / "language", state, aside)
    _export_full_model(recipe, state, aside / FULL_MODEL)
    if out.exists():
        out.rmdir()
    aside.rename(out)
    return f"{out}: language encoder of {checkpoint.name} ({parameters:,} parameters), full model in {out / FULL_MODEL}"


def consolidated_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the fp32 weights of a checkpoint, put together from all ranks' files.

    Tied weights appear under each of their names and share storage.

    Args:
        checkpoint: a published checkpoint of any ZeRO stage, whose checksums have been verified.

    Raises:
        XdscaleError: a file could run code when DeepSpeed reads it.
    """
    from xdscale.training.checkpoint import read_position
    from xdscale.training.integrity import check_pickles, read_pickle

    check_pickles(checkpoint)
    stage = read_position(checkpoint).zero_stage
    if stage == 0:
        # Nothing is sharded, and DeepSpeed's own consolidation does not know this case.
        saved = read_pickle(checkpoint / "mp_rank_00_model_states.pt")["module"]
        wide = {value.data_ptr(): value.float() for value in saved.values()}  # ties keep sharing storage
        return {name: wide[value.data_ptr()] for name, value in saved.items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It reports its progress by printing, and with a bar of its own.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if stage == 1:
        # DeepSpeed forgets parameters that take no gradient here.
        saved = read_pickle(checkpoint / "mp_rank_00_model_states.pt")["module"]
        state |= {name: value.float() for name, value in saved.items() if name not in state}
    return state


def _read_recipe(run: Path) -> Recipe:
    path = run / "recipe.yaml"
    if not path.is_file():
        raise XdscaleError(f"{run}: not a run folder (no recipe.yaml); give the recipe's output.folder")
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def _export_language(source: Path, state: dict[str, Any], out: Path) -> int:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
    model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    weights = {
        name.removeprefix(LANGUAGE_PREFIX): value for name, value in state.items() if name.startswith(LANGUAGE_PREFIX)
    }
    model.load_state_dict(weights, strict=True)
    model.save_pretrained(out)
    return sum(value.numel() for value in model.parameters())


def _export_full_model(recipe: Recipe, state: dict[str, Any], out: Path) -> None:
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
