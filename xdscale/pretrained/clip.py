"""CLIP's text tower, through open_clip."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json
from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.names import PACKAGE_PREFIX, resolve_path
from xdscale.recipe import SHIPPED
from xdscale.recipe_values import describe_validation_error
from xdscale.recipes.xdbert.schema import Clip
from xdscale.weights import read_state_dict, require_floats, require_numbers, some

CLIP_CONTEXT = 77
"""Positions of one CLIP block; shards are cut for it."""


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


def clip_config(spec: Clip) -> ClipConfig:
    """Returns the shape of CLIP's text tower.

    For an open_clip architecture the activation is the one that the weights were trained with. Where the
    weights do not tell (random or a file), an architecture that OpenAI published is taken with OpenAI's
    QuickGELU (spec xdbert §2.2); a JSON file says `quick_gelu` itself.

    Raises:
        XdscaleError: the name is not known to open_clip, or the tower is not a plain CLIP text tower.
    """
    if spec.name.endswith(".json"):
        source = str(resolve_path(spec.name, base=SHIPPED))
        values = read_json(Path(source))
    else:
        source = f"open_clip architecture {spec.name}"
        values = _open_clip_config(spec)
    try:
        config = ClipConfig.model_validate(values)
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(source, error, ClipConfig)) from None
    heads = config.text_cfg.heads
    # The cross-modal layers take over CLIP's number of heads, for states of size embed_dim.
    for key, size in (("text_cfg.width", config.text_cfg.width), ("embed_dim", config.embed_dim)):
        if size % heads:
            raise XdscaleError(f"{source}: {key} = {size} is not a multiple of text_cfg.heads = {heads}")
    return config


def _open_clip_config(spec: Clip) -> dict[str, Any]:
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


def build_clip_text_tower(spec: Clip) -> CLIPTextEncoder:
    """Builds CLIP's text tower in fp32 with random weights, shaped for the weights that `spec` names.

    Args:
        spec: names the architecture.

    Raises:
        XdscaleError: as `clip_config`.
    """
    config = clip_config(spec)
    tower = TextTransformer(
        **config.text_cfg.model_dump(),
        output_dim=config.embed_dim,
        act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        pool_type="none",
    )
    return CLIPTextEncoder(tower)


def load_clip_text_tower(spec: Clip) -> CLIPTextEncoder:
    """Builds CLIP's text tower in fp32, without the vision tower, and loads its weights.

    Args:
        spec: names architecture and weights.

    Raises:
        XdscaleError: as `clip_config`; or the weights are neither 'random', nor a file, nor a tag of
            open_clip, cannot be fetched, or are not those of this tower.
    """
    encoder = build_clip_text_tower(spec)
    if spec.weights != "random":
        path = _clip_weights_file(spec)
        _load_text_weights(encoder, read_state_dict(path), path)
    return encoder


def clip_weights_path(spec: Clip) -> Path | None:
    """Returns the file of CLIP's weights; None when they are random.

    Raises:
        XdscaleError: as `load_clip_text_tower`.
    """
    return None if spec.weights == "random" else _clip_weights_file(spec)


def _clip_weights_file(spec: Clip) -> Path:
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
            f"model.clip.weights = {spec.weights!r}: could not be fetched ({one_line(error)}); give a local "
            ".safetensors or .pt file of the CLIP model, or 'random'"
        ) from None


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
            f"{path}: not the weights of this CLIP text tower: missing {some(missing)}; unexpected "
            f"{some(unexpected)}; of another shape {some(reshaped)}"
        )
    numbers = found if scale is None else found | {"logit_scale": scale}
    require_floats(numbers, path)
    require_numbers(numbers, path)
    encoder.tower.load_state_dict(found)
    if scale is not None:
        with torch.no_grad():
            encoder.logit_scale.copy_(scale.reshape(1))


def _open_clip_name(name: str) -> str:
    return name.replace("/", "-")  # OpenAI writes ViT-B/32
