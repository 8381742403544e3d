"""What checkpoints of models that are made of a BERT share: sizes, how weights are checked, and how they are kept."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from xdscale.weights import matrix_shapes, part_of, require_fitting, require_numbers

FROM_BERT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range"),
    *("layer_norm_eps", "pad_token_id", "tie_word_embeddings"),
)
"""What a configuration has from that of its BERT."""
TRUNK_PREFIX = "trunk."
"""What the names of a branch that computes features from pixels begin with in training."""
_Model = TypeVar("_Model", bound=nn.Module)


def bert_sizes(
    state: Mapping[str, torch.Tensor], embeddings: str, layers: str, path: Path, what: str
) -> dict[str, int]:
    """Returns the sizes of the BERT in a checkpoint, as configurations name them; heads are of 64, as in every BERT.

    `embeddings` and `layers` are what names in `state` begin with; the rest is as in `matrix_shapes`.
    """
    tables = [f"{embeddings}word_embeddings.weight", f"{embeddings}position_embeddings.weight"]
    words, positions, inner = matrix_shapes(state, [*tables, f"{layers}0.intermediate.dense.weight"], path, what)
    return {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "num_attention_heads": max(1, words[1] // 64),
        "num_hidden_layers": len({match[1] for name in state if (match := re.match(rf"{layers}(\d+)\.", name))}),
        "intermediate_size": inner[0],
        "max_position_embeddings": positions[0],
    }


def filled(
    build: Callable[[], _Model],
    state: Mapping[str, torch.Tensor],
    heads: Mapping[str, torch.Tensor],
    place: Path,
    published: Callable[[str], str] = str,
) -> tuple[_Model, dict[str, torch.Tensor]]:
    """Returns an encoder with the weights of a checkpoint, and the heads that come with it, all in fp32.

    Args:
        build: makes the encoder.
        state: its weights.
        heads: the rest, under the names that it has in training.
        place: of the checkpoint, for messages.
        published: gives the name in `state` of a parameter.

    Raises:
        XdscaleError: weights are missing, of another shape, or no numbers.
    """
    with torch.device("meta"):  # what does not fit may be of any size
        model = build()
        wanted = {published(name): value for name, value in model.state_dict().items()}
        inner = [name for name in heads if ".transform." in name or ".norm." in name]
        wanted |= {name: torch.empty([model.config.hidden_size] * heads[name].ndim) for name in inner}
    require_fitting(wanted, {**state, **heads}, place, f"its {type(model).__name__}")
    own = {name: state[published(name)].float() for name in model.state_dict()}
    rest = {name: value.float() for name, value in heads.items()}
    if model.config.tie_word_embeddings:
        rest.pop("mlm.decoder_weight", None)
    require_numbers(own | rest, place)
    model = build()
    model.load_state_dict(own)
    return model.eval(), rest


def save_model(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], out: Path, trunk: str, **values: Any
) -> None:
    """Writes `config.json`, with `values` too, `model.safetensors` and, if there is a branch, the file `trunk`.

    `state` is in fp32, under the names of the file; those of the branch begin with `TRUNK_PREFIX`.
    """
    whole = {name: value.contiguous() for name, value in state.items()}
    if branch := part_of(whole, TRUNK_PREFIX):
        save_file(branch, out / trunk)
    weights = {name: value for name, value in whole.items() if not name.startswith(TRUNK_PREFIX)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config.to_dict() | values, indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
