"""From names in a recipe to encoders: architectures, local folders and hub names; random or stored weights.

Nothing here needs a network unless the recipe asks for weights that are not on this machine.
"""

import hashlib
import json
import pickle
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.transformer import QuickGELU, TextTransformer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from xdscale import recipe
from xdscale.errors import XdscaleError
from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.names import PACKAGE_PREFIX, resolve_path

FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertModel),
    "electra": (ElectraConfig, ElectraModel),
}
"""Language encoders that can be adapted, by the `model_type` of their config.json."""

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", **_BASE},
    "bert-large-uncased": {"model_type": "bert", **_LARGE},
    "google/electra-base-discriminator": {"model_type": "electra", "embedding_size": 768, **_BASE},
    "google/electra-large-discriminator": {"model_type": "electra", "embedding_size": 1024, **_LARGE},
}
"""Architectures known without a network (spec xdbert §2.1), under their hub names.

What is not stated is equal in all four and transformers' default: 30,522 word pieces, 512 positions,
2 segments, LayerNorm eps 1e-12, GELU.
"""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In order of preference."""

_SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)

CLIP_CONTEXT = 77
"""Positions of one CLIP block; shards are cut for it."""


def language_config(spec: recipe.Language) -> PretrainedConfig:
    """Returns the encoder's configuration as published, without loading weights.

    Raises:
        XdscaleError: the name is neither known, nor a folder with a config.json, nor to be had from the hub;
            or the model is not of a supported family.
    """
    if _is_bare(spec.name):
        values = dict(KNOWN[spec.name])
        return FAMILIES[values.pop("model_type")][0](**values)
    path = _language_folder(spec.name) / "config.json"
    values = _read_json(path)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise XdscaleError(f"{path}: model_type is {family!r}; supported are {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[family][0].from_dict(values)


def load_language_encoder(spec: recipe.Language, *, dropout: float) -> PreTrainedModel:
    """Builds the language encoder in fp32: BERT with its pooler, ELECTRA (which has none) as it is.

    Args:
        spec: the recipe's `model.language`.
        dropout: replaces the configuration's rates for hidden states and attention weights.

    Raises:
        XdscaleError: as `language_config`; or there are no weights, they differ from `spec.sha256`, or they
            do not hold the encoder.
    """
    config = language_config(spec)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model_class = FAMILIES[config.model_type][1]
    if spec.weights == "random":
        return model_class(config)
    folder = _language_folder(spec.name)
    weights = _weights_file(folder)
    if spec.sha256 is not None:
        _check_sha256(weights, spec.sha256)
    try:
        with _quiet_transformers():
            model, found = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=weights.suffix == ".safetensors",
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # unpickling, zip and safetensors raise unrelated kinds
        raise XdscaleError(f"{weights}: cannot be loaded: {_reason(error)}") from None
    # A checkpoint of a masked language model has no pooler; no loss reaches it, so a fresh one does no harm.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    mismatched = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if missing or mismatched:
        raise XdscaleError(
            f"{weights}: not the weights of the encoder in {folder / 'config.json'}: "
            f"missing {_some(missing)}; of another shape {_some(mismatched)}"
        )
    return model


def tokenizer_folder(spec: recipe.Language) -> Path | None:
    """Returns the folder that holds the encoder's own tokenizer; None for a bare architecture.

    Raises:
        XdscaleError: the folder does not exist, or the hub is needed and cannot be reached.
    """
    if spec.weights == "random" and _is_bare(spec.name):
        return None
    folder = _language_folder(spec.name)
    return folder if (folder / "tokenizer.json").is_file() else None


class ClipTextConfig(BaseModel):
    """The `text_cfg` of open_clip's model configurations, as far as OpenAI's text tower has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_length: int = Field(CLIP_CONTEXT, ge=CLIP_CONTEXT, le=CLIP_CONTEXT)
    vocab_size: int = Field(49408, ge=1)
    width: int = Field(512, ge=1)
    heads: int = Field(8, ge=1)
    layers: int = Field(12, ge=1)


class ClipConfig(BaseModel):
    """The text side of an open_clip model configuration; other keys (`vision_cfg`) are left aside."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    embed_dim: int = Field(ge=1)
    quick_gelu: bool = False
    text_cfg: ClipTextConfig


def clip_config(spec: recipe.Clip) -> ClipConfig:
    """Returns the shape of CLIP's text tower.

    For an open_clip architecture the activation is the one that the weights were trained with. Where the
    weights do not tell (random or a file), an architecture that OpenAI published is taken with OpenAI's
    QuickGELU (spec xdbert §2.2); a JSON file says `quick_gelu` itself.

    Raises:
        XdscaleError: the name is not known to open_clip, or the tower is not a plain CLIP text tower.
    """
    if spec.name.endswith(".json"):
        source = str(resolve_path(spec.name, base=recipe.SHIPPED))
        values = _read_json(Path(source))
    else:
        source = f"open_clip architecture {spec.name}"
        values = _open_clip_config(spec)
    try:
        config = ClipConfig.model_validate(values)
    except ValidationError as error:
        raise XdscaleError(recipe.describe_validation_error(source, error, ClipConfig)) from None
    heads = config.text_cfg.heads
    # The cross-modal layers take over CLIP's number of heads, for states of size embed_dim.
    for key, size in (("text_cfg.width", config.text_cfg.width), ("embed_dim", config.embed_dim)):
        if size % heads:
            raise XdscaleError(f"{source}: {key} = {size} is not a multiple of text_cfg.heads = {heads}")
    return config


def _open_clip_config(spec: recipe.Clip) -> dict[str, Any]:
    name = _open_clip_name(spec.name)
    if name not in open_clip.list_models():
        raise XdscaleError(
            f"model.clip.name = {spec.name!r}: not an architecture of open_clip (such as 'ViT-B-32') and not a "
            ".json file in open_clip's model-config format"
        )
    values = open_clip.get_model_config(name)
    other = sorted(values["text_cfg"].keys() - ClipTextConfig.model_fields.keys())
    if other:
        raise XdscaleError(
            f"model.clip.name = {spec.name!r}: its text tower is not a plain CLIP text tower (it has "
            f"{', '.join(other)}); use an architecture such as 'ViT-B-32' or 'ViT-L-14'"
        )
    weights = open_clip.get_pretrained_cfg(name, spec.weights) or open_clip.get_pretrained_cfg(name, "openai")
    values["quick_gelu"] = values.get("quick_gelu", False) or weights.get("quick_gelu", False)
    return values


def load_clip_text_tower(spec: recipe.Clip) -> CLIPTextEncoder:
    """Builds CLIP's text tower in fp32, without the vision tower.

    Raises:
        XdscaleError: as `clip_config`; or the weights are neither 'random', nor a file, nor a tag of
            open_clip, cannot be fetched, or are not those of this tower.
    """
    config = clip_config(spec)
    tower = TextTransformer(
        **config.text_cfg.model_dump(),
        output_dim=config.embed_dim,
        act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        pool_type="none",
    )
    encoder = CLIPTextEncoder(tower)
    if spec.weights != "random":
        path = _clip_weights_file(spec)
        _load_text_weights(encoder, _read_state_dict(path), path)
    return encoder


def _clip_weights_file(spec: recipe.Clip) -> Path:
    if spec.weights.startswith(PACKAGE_PREFIX) or Path(spec.weights).suffix or Path(spec.weights).is_file():
        return resolve_path(spec.weights)
    name = _open_clip_name(spec.name)
    tag = open_clip.get_pretrained_cfg(name, spec.weights)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise XdscaleError(
            f"model.clip.weights = {spec.weights!r}: not a file and not a tag of {spec.name}; use 'random', "
            f"a .safetensors or .pt file, or one of: {', '.join(tags) or '(this architecture has no tags)'}"
        )
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub client and urllib raise unrelated kinds
        raise XdscaleError(
            f"model.clip.weights = {spec.weights!r}: could not be fetched ({_one_line(error)}); give a local "
            ".safetensors or .pt file of the CLIP model, or 'random'"
        ) from None


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors only: safetensors, or a torch file with `weights_only=True`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                torchscript = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if torchscript:
                raise XdscaleError(
                    f"{path}: a TorchScript archive, which holds code and is not opened; give its state dict "
                    "as a .safetensors or .pt file, or use the open_clip tag (weights: openai)"
                )
        values = torch.load(path, map_location="cpu", weights_only=True)
    except XdscaleError:
        raise
    except Exception as error:  # unpickling, zip and safetensors raise unrelated kinds
        raise XdscaleError(f"{path}: not a readable weights file: {_reason(error)}") from None
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping):
        raise XdscaleError(f"{path}: expected a state dict, found {type(values).__name__}")
    return {str(key): value for key, value in values.items() if isinstance(value, torch.Tensor)}


def _load_text_weights(encoder: CLIPTextEncoder, state: dict[str, torch.Tensor], path: Path) -> None:
    """Copies the text side of a CLIP state dict into `encoder`; fp16 values become fp32."""
    found = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        # Besides the image side: constants of OpenAI's files and a buffer of older ones.
        not_text = ("input_resolution", "context_length", "vocab_size", "logit_bias", "attn_mask")
        if not name.startswith("visual.") and name.removeprefix("text.") not in not_text:
            found[name.removeprefix("text.")] = value
    scale = found.pop("logit_scale", None)
    wanted = encoder.tower.state_dict()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = sorted(
        f"{name} {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    )
    if missing or unexpected or reshaped:
        raise XdscaleError(
            f"{path}: not the weights of this CLIP text tower: missing {_some(missing)}; unexpected "
            f"{_some(unexpected)}; of another shape {_some(reshaped)}"
        )
    encoder.tower.load_state_dict(found)
    if scale is not None:
        with torch.no_grad():
            encoder.logit_scale.copy_(scale.reshape(1))


def _open_clip_name(name: str) -> str:
    return name.replace("/", "-")  # OpenAI writes ViT-B/32


def _is_bare(name: str) -> bool:
    """Whether the table is to be asked: a folder of that name goes before it."""
    return name in KNOWN and not Path(name).is_dir()


def _language_folder(name: str) -> Path:
    """Returns the folder with the model's files; those of a hub name are fetched into the hub's cache."""
    looks_local = name.startswith((PACKAGE_PREFIX, "/", "./", "../", "~")) or Path(name).is_dir()
    if looks_local:
        folder = resolve_path(name)
        if not folder.is_dir():
            raise XdscaleError(f"{name}: expected a folder with config.json and the weights")
        return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, WEIGHT_FILES[0]]))
        if not (folder / WEIGHT_FILES[0]).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, WEIGHT_FILES[1]]))
    except Exception as error:  # the hub client raises unrelated kinds for no network, no such name, no access
        raise XdscaleError(
            f"model.language.name = {name!r}: no such folder, and not to be had from the hub "
            f"({_one_line(error)}); give a local folder with config.json, model.safetensors and "
            f"tokenizer.json, or one of {', '.join(KNOWN)} with weights: random"
        ) from None
    return folder


def _weights_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise XdscaleError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)}; or use weights: random")


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise XdscaleError(
            f"{path}: SHA-256 is {found}, but model.language.sha256 says {expected}; the file is damaged or "
            "not the one the recipe was written for"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XdscaleError(f"{path}: not a readable JSON file: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences the loading report of transformers: what matters of it is checked and raised here."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to load it unsafely
        return "it is damaged or holds other things than tensors; give a .safetensors file"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
