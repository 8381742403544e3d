"""The language encoder: BERT or ELECTRA, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from xdscale import recipe
from xdscale.architectures import KNOWN
from xdscale.errors import XdscaleError
from xdscale.names import PACKAGE_PREFIX, resolve_path
from xdscale.pretrained.files import check_sha256, one_line, read_json, read_state_dict, reason, some

FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertModel),
    "electra": (ElectraConfig, ElectraModel),
}
"""Language encoders that can be adapted, by the `model_type` of their config.json."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In order of preference."""

_SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


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
    values = read_json(path)
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
        check_sha256(weights, spec.sha256)
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
        raise XdscaleError(f"{weights}: cannot be loaded: {reason(error)}") from None
    # A checkpoint of a masked language model has no pooler; no loss reaches it, so a fresh one does no harm.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    mismatched = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if missing or mismatched:
        raise XdscaleError(
            f"{weights}: not the weights of the encoder in {folder / 'config.json'}: "
            f"missing {some(missing)}; of another shape {some(mismatched)}"
        )
    return model


_HEAD_KEYS = {
    "cls.predictions.transform.dense.weight": "transform.weight",
    "cls.predictions.transform.dense.bias": "transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "decoder_bias",
}


def masked_lm_head_state(spec: recipe.Language) -> dict[str, torch.Tensor] | None:
    """Returns the masked-LM head that a pretrained BERT was published with, under `MaskedTokenHead`'s names.

    A head that fits its encoder saves adaptation from learning the map to the vocabulary anew. ELECTRA's
    discriminators and bare encoders have none.

    Returns:
        transform.{weight, bias}, norm.{weight, bias} and decoder_bias in fp32; None when the weights are random or
        hold no such head.

    Raises:
        XdscaleError: the weights cannot be read.
    """
    if spec.weights == "random":
        return None
    state = read_state_dict(_weights_file(_language_folder(spec.name)))
    # BERT's first checkpoints call LayerNorm's parameters gamma and beta.
    state = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): value for name, value in state.items()}
    if not _HEAD_KEYS.keys() <= state.keys():
        return None
    return {ours: state[theirs].float() for theirs, ours in _HEAD_KEYS.items()}


def tokenizer_folder(spec: recipe.Language) -> Path | None:
    """Returns the folder that holds the encoder's own tokenizer; None for a bare architecture.

    Raises:
        XdscaleError: the folder does not exist, or the hub is needed and cannot be reached.
    """
    if spec.weights == "random" and _is_bare(spec.name):
        return None
    folder = _language_folder(spec.name)
    return folder if (folder / "tokenizer.json").is_file() else None


def language_weights_path(spec: recipe.Language) -> Path | None:
    """Returns the file of the encoder's weights; None when they are random.

    Raises:
        XdscaleError: the folder does not exist or holds no weights, or the hub is needed and cannot be reached.
    """
    return None if spec.weights == "random" else _weights_file(_language_folder(spec.name))


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
            f"({one_line(error)}); give a local folder with config.json, model.safetensors and "
            f"tokenizer.json, or one of {', '.join(KNOWN)} with weights: random"
        ) from None
    return folder


def _weights_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise XdscaleError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)}; or use weights: random")


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
