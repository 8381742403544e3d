"""VL-BERT's weights: from a BERT, from the release's `.model` files and back, and in a folder of ours."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from xdscale.errors import XdscaleError
from xdscale.models.single_stream import BERT_NAMES
from xdscale.models.vlbert import GEOMETRY, REGION_SEGMENT, VLBERT, VLBertConfig
from xdscale.names import expand_home
from xdscale.pretrained.bert_checkpoint import FROM_BERT, TRUNK_PREFIX, bert_sizes, filled, save_model
from xdscale.pretrained.language import MASKED_LM_KEYS, check_sizes, language_weights, read_config
from xdscale.recipes.mlm.schema import Language
from xdscale.weights import matrix_shapes, part_of, read_state_dict, weight_files

TRUNK = "fast_rcnn.safetensors"
"""The branch of Fast R-CNN in an export."""
_TRUNK_PLACES = ("image_feature_extractor.roi_head_feature_extractor.", "image_feature_extractor.head.0.")
"""Where the release has C5, twice; the rest of the branch is in its `image_feature_extractor.backbone.`."""
POOLER = "pooler.safetensors"
"""The BERT's, in a run's `language` folder and in an export."""

_RELEASE = {
    "embeddings.LayerNorm": "vlbert.embedding_LayerNorm",
    "embeddings.visual_norm_text": "vlbert.visual_ln_text",
    "embeddings.visual_norm_region": "vlbert.visual_ln_object",
    "pooler": "vlbert.pooler.dense",
    "regions.projection": "image_feature_extractor.obj_downsample.1",
    "regions.mask": "object_mask_visual_embedding",
    "text_only": "aux_text_visual_embedding",
}
"""Modules outside the layers, and what the release calls them; its other embeddings stand in `vlbert` as ours."""
_REGION_TOKENS = ("object_linguistic_embeddings.weight", "object_mask_word_embedding.weight")
"""What the two rows of our table of region tokens are in the release."""
_HEADS = {
    **{f"mlm.{ours}": f"vlbert.mlm_head.predictions.{theirs}" for ours, theirs in MASKED_LM_KEYS.items()},
    "mlm.decoder_weight": "vlbert.mlm_head.predictions.decoder.weight",
    "masked_region.transform.weight": "vlbert.mvrc_head.transform.dense.weight",
    "masked_region.transform.bias": "vlbert.mvrc_head.transform.dense.bias",
    "masked_region.classifier.weight": "vlbert.mvrc_head.region_cls_pred.weight",
    "masked_region.classifier.bias": "vlbert.mvrc_head.region_cls_pred.bias",
}
"""Names of the heads in training, and in the release's checkpoints."""
_PRETRAINING_ALONE = ("aux_text_visual_embedding.weight", _REGION_TOKENS[1], "object_mask_visual_embedding.weight")
"""What the release's finetuned checkpoints have not."""


def published_name(name: str) -> str:
    """Returns what the release calls a parameter of `VLBERT`; its table of region tokens is two there."""
    stem, _, kind = name.rpartition(".")
    layer, _, inner = stem.removeprefix("layers.").partition(".")
    if stem.startswith("layers."):
        return f"vlbert.encoder.layer.{layer}.{BERT_NAMES[inner]}.{kind}"
    return f"{_RELEASE.get(stem, stem.replace('embeddings.', 'vlbert.', 1))}.{kind}"


def from_bert(language: PreTrainedModel, **more: bool | int) -> VLBERT:
    """Builds VL-BERT from a BERT: what BERT has is taken over; its third segment and all that sees images are new.

    Args:
        language: BERT; it is not to be used afterwards.
        more: what `config_from_bert` takes.

    Raises:
        XdscaleError: it is no BERT.
    """
    model = VLBERT(config_from_bert(language.config, **more))
    bert, own = language.state_dict(), model.state_dict()
    for name, value in own.items():
        inner = published_name(name).removeprefix("vlbert.")
        theirs = next((theirs for theirs in (inner, name) if theirs in bert), None)
        if name == "embeddings.token_type_embeddings.weight":
            value[:REGION_SEGMENT] = bert[name][:REGION_SEGMENT]  # of a BERT with one segment its row stands for both
        elif theirs is not None:
            own[name] = bert[theirs]
    model.load_state_dict(own)
    return model.train(language.training)


def config_from_bert(bert: PretrainedConfig, **more: bool | int) -> VLBertConfig:
    """Returns the configuration of the VL-BERT that is made of a BERT.

    Args:
        bert: its configuration.
        more: of `VLBertConfig` what is not BERT's.

    Raises:
        XdscaleError: it is no BERT's.
    """
    if bert.model_type != "bert":
        raise XdscaleError(f"model.language: VL-BERT is made of a BERT, not of {bert.model_type!r}")
    return VLBertConfig(**{name: getattr(bert, name) for name in FROM_BERT}, **more)


def load_vlbert(place: str | Path, *, dropout: float | None = None) -> tuple[VLBERT, dict[str, torch.Tensor]]:
    """Loads a VL-BERT in fp32: an export, or a checkpoint of the release.

    Args:
        place: the folder, or the release's `.model` file.
        dropout: in the place of the configuration's.

    Returns:
        The encoder, and the heads that come with it, and the branch of Fast R-CNN, under the names that they have in
        training.

    Raises:
        XdscaleError: nothing of the kind, or weights that are damaged or not those of the configuration.
    """
    place = Path(expand_home(str(place)))
    if not place.exists():
        raise XdscaleError(f"{place}: no such folder or file; expected a VL-BERT")
    if place.is_file():
        config, state = _from_release(place)
    else:
        config, state = read_config(place / "config.json", VLBertConfig), {}
        for path in weight_files(place):
            state |= read_state_dict(path)
        if (place / TRUNK).is_file():
            state |= {TRUNK_PREFIX + name: value for name, value in read_state_dict(place / TRUNK).items()}
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    heads = {name: value for name, value in state.items() if name in _HEADS or name.startswith(TRUNK_PREFIX)}
    return filled(partial(VLBERT, config), part_of(state, "model."), heads, place)


def save_vlbert(config: VLBertConfig, state: dict[str, torch.Tensor], out: Path) -> None:
    """Writes `config.json` and `model.safetensors`, which `load_vlbert` reads.

    A branch of Fast R-CNN goes into `fast_rcnn.safetensors`, which `xdscale regions extract` reads.

    Args:
        config: of the model.
        state: of a module in training, in fp32: `model.…`, and `mlm.…`, `masked_region.…` and `trunk.…` if it has them.
        out: an existing folder.
    """
    tied = {"mlm.decoder_weight"} if config.tie_word_embeddings else set()
    kept = {name: value for name, value in state.items() if name not in tied}
    save_model(config, kept, out, TRUNK, architectures=["VLBERT"])


def save_release(state: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a `.model` file that the release loads.

    Args:
        state: of a module in training, in fp32, as `save_vlbert`.
        path: of the new file.
    """
    torch.save({"state_dict": {f"module.{name}": value for name, value in release_weights(state).items()}}, path)


def release_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of a module in training under the names that they have in the release."""
    model = part_of(state, "model.")
    found = dict(zip(_REGION_TOKENS, model.pop("region_tokens.weight").split(1)))
    found |= {published_name(name): value for name, value in model.items()}
    found |= {theirs: state[ours] for ours, theirs in _HEADS.items() if ours in state}
    for name, value in part_of(state, TRUNK_PREFIX).items():
        places = [f"{place}{name[7:]}" for place in _TRUNK_PLACES] if name.startswith("layer4.") else [
            f"image_feature_extractor.backbone.{name}"]  # fmt: skip
        found |= dict.fromkeys(places, value)
    if "mlm.decoder_bias" in state:
        found.setdefault("vlbert.mlm_head.predictions.decoder.weight", model["embeddings.word_embeddings.weight"])
    return found


def save_pooler(spec: Language, folder: Path) -> None:
    """Keeps a pretrained BERT's pooler, which pretraining leaves out and VCR begins with, if it has one.

    Raises:
        XdscaleError: the weights cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    for path in language_weights(spec) or ():
        for name, value in read_state_dict(path).items():
            if (inner := name.removeprefix("bert.")).startswith("pooler.dense."):
                found[inner.replace(".dense", "")] = value.float()
    if found:
        save_file(found, folder / POOLER)


def read_pooler(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the pooler that was kept, under the names that it has in `VLBERT`; nothing where there is none."""
    return read_state_dict(folder / POOLER) if (folder / POOLER).is_file() else {}


def _from_release(path: Path) -> tuple[VLBertConfig, dict[str, torch.Tensor]]:
    """Returns the configuration and the weights of a checkpoint of the release, the latter under our names.

    What only pretraining needs is 0 where a finetuned checkpoint has it no more.
    """
    found = {
        name.removeprefix("module.").replace("vlbert._module.", "vlbert.", 1): value
        for name, value in read_state_dict(path).items()
    }
    config = _config_of(found, path)
    check_sizes(config, str(path))
    size = config.hidden_size
    for name in _PRETRAINING_ALONE[:2]:
        found.setdefault(name, torch.zeros(1, size))
    tokens = [found.pop(name, torch.empty(0, size)) for name in _REGION_TOKENS]
    if all(token.shape[1:] == (size,) for token in tokens):  # else they are missed below
        found["region_tokens.weight"] = torch.cat(tokens)
    with torch.device("meta"):
        names = VLBERT(config).state_dict()
    state = {f"model.{name}": found[published_name(name)] for name in names if published_name(name) in found}
    state |= {ours: found[theirs] for ours, theirs in _HEADS.items() if theirs in found}
    return config, state | _trunk_of(found)


def _trunk_of(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the branch of Fast R-CNN of a checkpoint of the release, under the names that it has in training."""
    places = {"image_feature_extractor.backbone.": TRUNK_PREFIX, _TRUNK_PLACES[0]: f"{TRUNK_PREFIX}layer4."}
    return {ours + name: value for place, ours in places.items() for name, value in part_of(found, place).items()}


def _config_of(found: dict[str, torch.Tensor], path: Path) -> VLBertConfig:
    """Returns the configuration that the weights of a checkpoint have."""
    name, what = published_name("regions.projection.weight"), "VL-BERT"
    sizes = bert_sizes(found, "vlbert.", "vlbert.encoder.layer.", path, what)
    ((_, width),) = matrix_shapes(found, [name], path, what)
    if width <= GEOMETRY:
        raise XdscaleError(
            f"{path}: no checkpoint of {what}: {name} reads {width} numbers; {GEOMETRY:,} are of the box"
        )
    return VLBertConfig(
        **sizes,
        appearance_size=width - GEOMETRY,
        masks_features=_PRETRAINING_ALONE[2] in found,
        with_pooler="vlbert.pooler.dense.weight" in found,
    )
