"""VisualBERT's weights: from a BERT, from what others published, and for transformers to load."""

from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, VisualBertConfig

from xdscale.errors import XdscaleError
from xdscale.files import shown
from xdscale.models.single_stream import BERT_NAMES
from xdscale.models.visualbert import VisualBERT
from xdscale.pretrained.bert_checkpoint import FROM_BERT, TRUNK_PREFIX, bert_sizes, filled, save_model
from xdscale.pretrained.language import MASKED_LM_HEAD, MASKED_LM_KEYS, SENTENCE_HEAD, check_sizes, read_config
from xdscale.weights import matrix_shapes, part_of, read_state_dict, weight_files

ENCODER = "visual_bert."
"""What the names of the encoder's weights begin with where a file also holds heads."""

DETECTOR = "detector.safetensors"
"""Of a finetuned VisualBERT: the branch of ResNet-50 that was tuned along."""

_RELEASE = (
    ("bert.bert.", ENCODER),
    ("bert.cls.", "cls."),
    ("embeddings.token_type_embeddings_visual.", "embeddings.visual_token_type_embeddings."),
    ("embeddings.position_embeddings_visual.", "embeddings.visual_position_embeddings."),
    ("embeddings.projection.", "embeddings.visual_projection."),
    (".gamma", ".weight"),
    (".beta", ".bias"),
)
"""What the release's checkpoints have in names, and transformers' in its place."""

_HEADS = {
    **{f"mlm.{ours}": MASKED_LM_HEAD + theirs for ours, theirs in MASKED_LM_KEYS.items()},
    "mlm.decoder_weight": MASKED_LM_HEAD + "decoder.weight",
    "match.weight": SENTENCE_HEAD + "weight",
    "match.bias": SENTENCE_HEAD + "bias",
}
"""Names of the heads in training, and in published checkpoints."""

_TASK_HEADS = ("classifier.", "query.", "key.")
"""What the names of a task's own head begin with, in training and in a kept model."""


def published_name(name: str) -> str:
    """Returns what transformers' `VisualBertModel` calls a parameter of `VisualBERT`."""
    stem, _, kind = name.rpartition(".")
    layer, _, inner = stem.removeprefix("layers.").partition(".")
    if stem.startswith("layers."):
        return f"encoder.layer.{layer}.{BERT_NAMES[inner]}.{kind}"
    if stem.startswith("fusion."):
        return f"additional_layer.{BERT_NAMES[stem.removeprefix('fusion.')]}.{kind}"
    return f"pooler.dense.{kind}" if stem == "pooler" else name


def config_from_bert(config: PretrainedConfig, *, region_size: int, early_fusion: bool = True) -> VisualBertConfig:
    """Returns the configuration of a VisualBERT that is made of a BERT.

    Args:
        config: of the BERT.
        region_size: width of the features.
        early_fusion: whether regions enter BERT's layers, or one new layer behind them.

    Raises:
        XdscaleError: it is no BERT, or has one segment alone.
    """
    if config.model_type != "bert":
        raise XdscaleError(f"model.language: VisualBERT is made of a BERT, not of {config.model_type!r}")
    if config.type_vocab_size < 2:
        raise XdscaleError("model.language: VisualBERT tells two captions, or images, by segments: it needs 2, not 1")
    values = {name: getattr(config, name) for name in (*FROM_BERT, "type_vocab_size")}
    return VisualBertConfig(**values, visual_embedding_dim=region_size, bypass_transformer=not early_fusion)


def from_bert(
    language: PreTrainedModel, *, region_size: int, early_fusion: bool = True, alignment: str = "sum"
) -> VisualBERT:
    """Builds VisualBERT from a BERT: what BERT has is taken over, tables of regions start as copies of the text's.

    Args:
        language: BERT, with its pooler; it is not to be used afterwards.
        region_size: and
        early_fusion: see `config_from_bert`.
        alignment: see `xdscale.models.visualbert.VisualTextEmbeddings`.

    Raises:
        XdscaleError: as `config_from_bert`.
    """
    config = config_from_bert(language.config, region_size=region_size, early_fusion=early_fusion)
    model = VisualBERT(config, alignment=alignment)
    bert = language.state_dict()
    own = model.state_dict()
    start = {name: bert[published_name(name)] for name in own if published_name(name) in bert}
    for table in ("token_type_embeddings", "position_embeddings"):
        start[f"embeddings.visual_{table}.weight"] = bert[f"embeddings.{table}.weight"].clone()
    model.load_state_dict(start, strict=False)
    return model.train(language.training)


def load_visualbert(place: Path, *, dropout: float | None = None) -> tuple[VisualBERT, dict[str, torch.Tensor]]:
    """Loads a VisualBERT in fp32: an export, any `visual_bert` folder of transformers, or a checkpoint of the release.

    Args:
        place: the folder, or the release's `.th` file.
        dropout: in the place of the configuration's.

    Returns:
        The encoder, and the heads that come with it under the names that they have in training.

    Raises:
        XdscaleError: nothing of the kind, or weights that are damaged or not those of the configuration.
    """
    config, state = _read(place)
    check_sizes(config, str(place))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    alignment = getattr(config, "alignment", "mean")  # an export says which; transformers and the release: the mean
    if alignment not in ("sum", "mean"):
        raise XdscaleError(f"{place / 'config.json'}: alignment is {shown(alignment)}; expected 'sum' or 'mean'")
    heads = {ours: state[theirs] for ours, theirs in _HEADS.items() if theirs in state}
    build = partial(VisualBERT, config, alignment=alignment)
    return filled(build, part_of(state, ENCODER), heads, place, published_name)


def published_weights(config: VisualBertConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights under the names of transformers' `VisualBertForPreTraining`, tied ones once.

    Args:
        config: of the model.
        state: of a module in training: `model.…`, and `mlm.…`, `match.…` and a task's own head if it has them.
    """
    encoder = (name for name in state if name.startswith("model."))
    names = {name: ENCODER + published_name(name.removeprefix("model.")) for name in encoder}
    names |= {ours: theirs for ours, theirs in _HEADS.items() if ours in state}
    names |= {name: name for name in state if name.startswith(_TASK_HEADS)}
    if config.tie_word_embeddings:
        names.pop("mlm.decoder_weight", None)  # it is the word embedding
    return {theirs: state[ours] for ours, theirs in names.items()}


def save_visualbert(config: VisualBertConfig, state: dict[str, torch.Tensor], out: Path, *, alignment: str) -> None:
    """Writes `config.json` and `model.safetensors` of transformers' `VisualBertModel` or `VisualBertForPreTraining`.

    A branch that was tuned along goes into `detector.safetensors`, which `xdscale.models.r2c.load_detector` reads.

    Args:
        config: of the model.
        state: as for `published_weights`, in fp32, and `trunk.…`, the branch, if it has one.
        out: an existing folder.
        alignment: of the model; transformers always computes the mean.
    """
    trunk = {name: value for name, value in state.items() if name.startswith(TRUNK_PREFIX)}
    values = {"architectures": ["VisualBertForPreTraining"], "alignment": alignment}
    save_model(config, published_weights(config, state) | trunk, out, DETECTOR, **values)


def _read(place: Path) -> tuple[VisualBertConfig, dict[str, torch.Tensor]]:
    """Returns configuration and weights, the latter under transformers' names with the prefix of the encoder."""
    if not place.exists():
        raise XdscaleError(f"{place}: no such folder or file; expected a VisualBERT")
    files = [place] if place.is_file() else weight_files(place)
    state: dict[str, torch.Tensor] = {}
    for path in files:
        for name, value in read_state_dict(path).items():
            for theirs, ours in _RELEASE:
                name = name.replace(theirs, ours)
            state[name if name.startswith((ENCODER, "cls.")) else ENCODER + name] = value
    config = _config_of(state, place) if place.is_file() else read_config(place / "config.json", VisualBertConfig)
    return config, state


def _config_of(state: dict[str, torch.Tensor], path: Path) -> VisualBertConfig:
    """Returns the configuration that the weights of a checkpoint have."""
    embeddings, what = f"{ENCODER}embeddings.", "VisualBERT"
    sizes = bert_sizes(state, embeddings, f"{ENCODER}encoder.layer.", path, what)
    names = [f"{embeddings}visual_projection.weight", f"{embeddings}token_type_embeddings.weight"]
    projection, segments = matrix_shapes(state, names, path, what)
    return VisualBertConfig(
        **sizes,
        visual_embedding_dim=projection[1],
        type_vocab_size=segments[0],
        bypass_transformer=any(name.startswith(ENCODER + "additional_layer.") for name in state),
        pad_token_id=0,
    )
