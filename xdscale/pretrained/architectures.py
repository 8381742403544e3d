"""Language encoders known by name, without a network and without torch (spec xdbert §2.1)."""

from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import read_json

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", **_BASE},
    "bert-large-uncased": {"model_type": "bert", **_LARGE},
    "google/electra-base-discriminator": {"model_type": "electra", "embedding_size": 768, **_BASE},
    "google/electra-large-discriminator": {"model_type": "electra", "embedding_size": 1024, **_LARGE},
}
"""Architectures under their hub names.

What is not stated is equal in all four and transformers' default: 30,522 word pieces, 512 positions,
2 segments, LayerNorm eps 1e-12, GELU.
"""

FAMILIES = ("bert", "electra")
"""Language encoders that can be adapted, by the `model_type` of their config.json."""

_LOADERS = {
    "visual_bert": "transformers' VisualBertModel (docs/python.md)",
    "vl_bert": "xdscale.pretrained.vlbert.load_vlbert (docs/python.md)",
}


def read_encoder_config(folder: Path) -> dict[str, Any]:
    """Returns what an encoder's config.json says.

    Raises:
        XdscaleError: there is none (a run folder is told by name), it is not JSON, or the model is not an encoder of a
            supported family.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "recipe.yaml").is_file():
        raise XdscaleError(
            f"{folder}: this is a run folder, not an encoder; export it first: xdscale export {folder} NEW_FOLDER"
        )
    values = read_json(path)
    family = values.get("model_type")
    if family not in FAMILIES:
        seeing = f"; it reads image regions too, and is loaded by {_LOADERS[family]}" if family in _LOADERS else ""
        raise XdscaleError(f"{path}: model_type is {family!r}; supported are {', '.join(map(repr, FAMILIES))}{seeing}")
    for key, wanted in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if values.get(key, wanted) != wanted:
            raise XdscaleError(f"{path}: {key} is {values[key]!r}; supported is {wanted!r} alone")
    return values
