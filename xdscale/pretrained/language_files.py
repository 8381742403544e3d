"""The language encoder's own files: kept with a run, and written out with new weights as a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers.normalizers import BertNormalizer
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from xdscale.errors import XdscaleError
from xdscale.files import read_json
from xdscale.pretrained.language import language_config, tokenizer_folder
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.language import FILE_NAME, SETTINGS, SPECIAL_TOKENS, VOCABULARY, read_tokenizer


def save_language_files(spec: Language, folder: Path) -> None:
    """Keeps the language encoder's config and tokenizer with the run, so that exporting needs no original.

    Args:
        spec: the recipe's language encoder.
        folder: the run's `language` folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, source = language_config(spec), tokenizer_folder(spec)
    config.save_pretrained(folder)
    if source is not None:
        save_tokenizer(source, folder, positions=config.max_position_embeddings)


def save_tokenizer(source: Path, folder: Path, *, positions: int) -> None:
    """Writes an encoder's tokenizer into another folder.

    `AutoTokenizer` reads the tokenizer of the folder as shards and finetuning did: of a `vocab.txt` a tokenizer.json is
    made, and tokenizer_config.json says that the stages in it are to be taken as they are. transformers would put
    other ones in their place, which lower the case of a text unless told not to.

    Args:
        source: the encoder's folder.
        folder: an existing one.
        positions: of the encoder.
    """
    tokenizer = read_tokenizer(str(source))
    tokenizer.save(str(folder / FILE_NAME))
    for name in (FILE_NAME, VOCABULARY, SETTINGS, "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    special = {f"{key.removesuffix('_id')}_token": token for key, token in SPECIAL_TOKENS.items()}
    settings = special | {"unk_token": "[UNK]", "model_max_length": positions}
    if (folder / SETTINGS).is_file():
        settings |= read_json(folder / SETTINGS)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.normalizer, BertNormalizer):  # for those who load it as a BertTokenizer nevertheless
        stages = tokenizer.normalizer
        settings |= {"do_lower_case": stages.lowercase, "strip_accents": stages.strip_accents}
        settings["tokenize_chinese_chars"] = stages.handle_chinese_chars
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies the tokenizer's files, all that `save_language_files` wrote but the configuration.

    Args:
        source: what it wrote.
        out: an existing folder.

    Raises:
        XdscaleError: the encoder's files are not there.
    """
    if not (source / "config.json").is_file():
        raise XdscaleError(f"{source}: holds no config.json; copy the whole run folder, which has the encoder's files")
    for path in source.iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, out / path.name)


def export_language(source: Path, weights: dict[str, Any], out: Path) -> str:
    """Writes a Hugging Face folder with a language encoder's weights; returns what was written, in words.

    Args:
        source: what `save_language_files` wrote.
        weights: fp32, exactly those of the encoder.
        out: an existing folder.

    Raises:
        XdscaleError: the encoder's files are not there.
    """
    copy_tokenizer(source, out)
    logging.disable_progress_bar()
    model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    model.load_state_dict(weights, strict=True)
    model.save_pretrained(out)
    said = f"language encoder ({sum(value.numel() for value in model.parameters()):,} parameters)"
    if (source / FILE_NAME).is_file():
        return said
    return f"{said} without a tokenizer: the run began from a bare architecture; put the tokenizer of its shards there"
