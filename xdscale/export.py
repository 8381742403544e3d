"""From a run to Hugging Face folders: the adapted language encoder and the full cross-modal model."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xdscale.devices import uses_gpus
from xdscale.errors import XdscaleError
from xdscale.files import DISKS_OWN, follow_umask, one_line, read_json
from xdscale.recipe import NOT_YAML, Language, Recipe, describe_validation_error, recipe_file
from xdscale.recipe_yaml import read_yaml

MODEL_PREFIX = "model."
LANGUAGE_PREFIX = MODEL_PREFIX + "language."
FULL_MODEL = "cross_modal"
_UNFINISHED = ".xdscale-export"


def save_language_files(spec: Language, folder: Path) -> None:
    """Keeps the language encoder's config and tokenizer with the run, so that exporting needs no original.

    `AutoTokenizer` reads the tokenizer of the folder as shards and finetuning did: of a `vocab.txt` a tokenizer.json is
    made, and tokenizer_config.json says that the stages in it are to be taken as they are. transformers would put
    other ones in their place, which lower the case of a text unless told not to.

    Args:
        spec: the recipe's language encoder.
        folder: the run's `language` folder.
    """
    from tokenizers.normalizers import BertNormalizer

    from xdscale.pretrained.language import language_config, tokenizer_folder
    from xdscale.shards.language import FILE_NAME, SETTINGS, SPECIAL_TOKENS, VOCABULARY, read_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config, source = language_config(spec), tokenizer_folder(spec)
    config.save_pretrained(folder)
    if source is None:
        return
    tokenizer = read_tokenizer(str(source))
    tokenizer.save(str(folder / FILE_NAME))
    for name in (FILE_NAME, VOCABULARY, SETTINGS, "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    special = {f"{key.removesuffix('_id')}_token": token for key, token in SPECIAL_TOKENS.items()}
    settings = special | {"unk_token": "[UNK]", "model_max_length": config.max_position_embeddings}
    if (folder / SETTINGS).is_file():
        settings |= read_json(folder / SETTINGS)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.normalizer, BertNormalizer):  # for those who load it as a BertTokenizer nevertheless
        stages = tokenizer.normalizer
        settings |= {"do_lower_case": stages.lowercase, "strip_accents": stages.strip_accents}
        settings["tokenize_chinese_chars"] = stages.handle_chinese_chars
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def export_run(run: str | Path, out: str | Path, *, step: int | None = None) -> str:
    """Exports a run's checkpoint.

    `OUT` is a Hugging Face folder: `AutoModel.from_pretrained(OUT)` gives the adapted language encoder with exactly
    the original's parameters. `OUT/cross_modal` holds the full model: safetensors (fp32) and the recipe it was built
    from.

    Args:
        run: the run folder.
        out: a folder that does not exist yet, or is empty; also a link to one, or where a disk is mounted.
        step: whose checkpoint; None for the newest undamaged one.

    Returns:
        One line that says what was exported.

    Raises:
        XdscaleError: no such run or checkpoint, a damaged checkpoint (the file is named), or `out` is in use or cannot
            be written; nothing is left in it then.
    """
    from xdscale.training.checkpoint import choose_checkpoint
    from xdscale.training.distributed import Ranks

    run, out = Path(run), Path(out)
    recipe = run_recipe(run)
    source = run / "language"
    if not (source / "config.json").is_file():
        raise XdscaleError(f"{source}: holds no config.json; copy the whole run folder, which has the encoder's files")
    _refuse_used(out)
    checkpoint = choose_checkpoint(run, step, Ranks(0, 1, 0))
    with _published(out) as folder:
        state = consolidated_state(checkpoint)
        parameters = _export_language(source, state, folder)
        if recipe.model.clip is not None:
            _export_full_model(recipe, state, folder / FULL_MODEL)
    full = f", full model in {out / FULL_MODEL}" if recipe.model.clip is not None else ""
    if not (source / "tokenizer.json").is_file():
        used = "the run began from a bare architecture; put the tokenizer of its shards there"
        full += f"\n{out}: holds no tokenizer: {used}"
    return f"{out}: language encoder of {checkpoint.name} ({parameters:,} parameters){full}"


def _refuse_used(out: Path) -> None:
    try:
        used = out.is_symlink() or out.exists()
        if used and (not out.is_dir() or any(path.name not in (_UNFINISHED, DISKS_OWN) for path in out.iterdir())):
            raise XdscaleError(f"{out}: exists and is not an empty folder; choose another one for the export")
    except OSError as error:
        raise XdscaleError(f"{out}: cannot be written: {error.strerror}") from None


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Gives a folder to fill, whose content moves into `out` only if the block ends without an exception.

    It lies in `out` itself, which thereby may be a link, the working folder or the root of a disk. What is read first,
    config.json, is moved last.
    """
    from safetensors import SafetensorError

    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    aside, moved = out / _UNFINISHED, []
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                follow_umask(path)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(path.rename(out / path.name))
        aside.rmdir()
    except BaseException as error:
        for path in (*moved, aside):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise XdscaleError(f"{out}: the export cannot be written: {one_line(error)}") from None
        raise


def consolidated_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the fp32 weights of a checkpoint, put together from all ranks' files.

    Tied weights appear under each of their names and share storage.

    Args:
        checkpoint: a published checkpoint of any ZeRO stage, whose checksums have been verified.

    Raises:
        XdscaleError: a file could run code when DeepSpeed reads it.
    """
    if not uses_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it found no GPU
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


def run_recipe(run: Path) -> Recipe:
    """Returns the recipe that a run folder was made with.

    Raises:
        XdscaleError: no run folder, or its recipe is damaged.
    """
    path = recipe_file(run)
    try:
        return Recipe.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(str(path), error, Recipe)) from None
    except NOT_YAML as error:
        raise XdscaleError(f"{path}: not YAML: {one_line(error)}") from None


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
