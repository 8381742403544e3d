"""From a run to Hugging Face folders: the adapted language encoder and the full cross-modal model; and back."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.recipe import Language, Recipe, describe_validation_error

if TYPE_CHECKING:
    from xdscale.models.xdbert import XDBERT

MODEL_PREFIX = "model."
LANGUAGE_PREFIX = MODEL_PREFIX + "language."
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
    if recipe.model.clip is not None:
        _export_full_model(recipe, state, aside / FULL_MODEL)
    if out.exists():
        out.rmdir()
    aside.rename(out)
    full = f", full model in {out / FULL_MODEL}" if recipe.model.clip is not None else ""
    return f"{out}: language encoder of {checkpoint.name} ({parameters:,} parameters){full}"


def load_cross_modal(folder: Path) -> "XDBERT":
    """Builds the adapted cross-modal model in fp32, for evaluation.

    Neither the original encoders nor a network are needed: all weights come from `folder`.

    Args:
        folder: a run folder (its newest undamaged checkpoint is read, checksums verified), or an export.

    Raises:
        XdscaleError: neither of the two, no checkpoint yet, or the weights are damaged or not those of the recipe.
    """
    from xdscale.pretrained.clip import build_clip_text_tower
    from xdscale.pretrained.files import some
    from xdscale.pretrained.language import load_language_encoder
    from xdscale.tasks.xdbert import join_encoders

    spec = adapted_recipe(folder).model
    source = Language(name=str(language_folder(folder).resolve()), weights="random")
    language = load_language_encoder(source, dropout=spec.dropout)
    model = join_encoders(spec, language, build_clip_text_tower(spec.clip, plain=spec.kernels == "plain"))
    state = _adapted_state(folder)
    found = {name.removeprefix(MODEL_PREFIX): value for name, value in state.items() if name.startswith(MODEL_PREFIX)}
    wanted = model.state_dict()
    wrong = sorted(name for name, value in wanted.items() if name not in found or found[name].shape != value.shape)
    if wrong:
        raise XdscaleError(f"{folder}: holds no fitting weights for {some(wrong)} of the model in its recipe")
    model.load_state_dict({name: found[name] for name in wanted})
    return model.eval()


def begin_with(module: Any, folder: Path) -> None:
    """Gives a newly built adaptation module the weights of a run or an export, heads included.

    The head of an objective that was off there keeps the values it was built with.

    Args:
        module: what `build_adaptation` returned.
        folder: a run folder (its newest undamaged checkpoint is read, checksums verified), or an export.

    Raises:
        XdscaleError: neither of the two, no checkpoint yet, or the weights do not fit the module.
    """
    from xdscale.pretrained.files import some

    adapted_recipe(folder)
    state, wanted = _adapted_state(folder), module.state_dict()
    wrong = [name for name in wanted if name.startswith(MODEL_PREFIX) and name not in state]
    wrong += [name for name in wanted.keys() & state.keys() if state[name].shape != wanted[name].shape]
    if wrong:
        raise XdscaleError(f"model.start = {folder}: holds no fitting weights for {some(sorted(wrong))} of this recipe")
    module.load_state_dict({name: state[name] for name in wanted.keys() & state.keys()}, strict=False)


def adapted_recipe(folder: Path) -> Recipe:
    """Returns the recipe that a run or an export was made with.

    Raises:
        XdscaleError: `folder` is neither, or its recipe is damaged.
    """
    from xdscale.pretrained.files import read_json

    exported = folder / FULL_MODEL / "config.json"
    if (folder / "recipe.yaml").is_file():
        return _read_recipe(folder)
    if not exported.is_file():
        raise XdscaleError(
            f"{folder}: neither a run folder (no recipe.yaml) nor an export (no {FULL_MODEL}/config.json)"
        )
    values = read_json(exported)
    try:
        return Recipe.model_validate(values.get("recipe"))
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(str(exported), error, Recipe)) from None


def language_folder(folder: Path) -> Path:
    """Returns where a run or an export keeps the language encoder's config.json and tokenizer.json."""
    return folder if (folder / FULL_MODEL).is_dir() else folder / "language"


def _adapted_state(folder: Path) -> dict[str, Any]:
    """The fp32 weights of a run or an export, with heads, under the adaptation module's names."""
    from xdscale.pretrained.files import read_json, read_state_dict
    from xdscale.training.checkpoint import choose_checkpoint
    from xdscale.training.distributed import Ranks

    exported = folder / FULL_MODEL
    if not exported.is_dir():
        return consolidated_state(choose_checkpoint(folder, None, Ranks(0, 1, 0)))
    state = read_state_dict(exported / "model.safetensors")
    tied = read_json(exported / "config.json").get("tied_weights", {})
    return state | {name: state[stored] for name, stored in tied.items() if stored in state}


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
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(str(path), error, Recipe)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise XdscaleError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


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
