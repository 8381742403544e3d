"""The language encoder: BERT or ELECTRA, through transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json, shown
from xdscale.names import PACKAGE_PREFIX, resolve_path
from xdscale.pretrained.architectures import KNOWN, read_encoder_config
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.language import TOKENIZER_FILES, has_tokenizer, load_language_tokenizer
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.weights import (
    WEIGHT_FILES,
    check_sha256,
    part_of,
    read_state_dict,
    reason,
    require_floats,
    require_numbers,
    some,
    weight_files,
)

_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertModel),
    "electra": (ElectraConfig, ElectraModel),
}
_Config = TypeVar("_Config", bound=PretrainedConfig)
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 2**10,
    "intermediate_size": 2**18,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**10,
    "embedding_size": 2**16,
    "appearance_size": 2**20,
    "visual_embedding_dim": 2**20,
}
"""Far more than any encoder has: building one of more ends in an error of the library's, or without memory."""
_SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range")


def language_config(spec: Language) -> PretrainedConfig:
    """Returns the encoder's configuration as published, without loading weights.

    Raises:
        XdscaleError: the name is neither known, nor a folder with a config.json, nor to be had from the hub;
            or the model is not of a supported family.
    """
    if _is_bare(spec.name):
        source, values = spec.name, KNOWN[spec.name]
    else:
        folder = _language_folder(spec.name)
        source, values = str(folder / "config.json"), read_encoder_config(folder)
    return _checked_config(_CLASSES[values["model_type"]][0], values, source)


def read_config(path: Path, kind: type[_Config]) -> _Config:
    """Reads the config.json of a model that is made of a BERT.

    Args:
        path: the file.
        kind: the class of its configuration.

    Raises:
        XdscaleError: unreadable, of another architecture, or with values that no layer of BERT can be built of.
    """
    values = read_json(path)
    if values.get("model_type") != kind.model_type:
        raise XdscaleError(f"{path}: model_type is {values.get('model_type')!r}; expected {kind.model_type!r}")
    return _checked_config(kind, values, str(path))


def _checked_config(kind: type[_Config], values: dict[str, Any], source: str) -> _Config:
    try:
        config = kind.from_dict(values)
    except Exception as error:  # transformers and what it checks values with raise unrelated kinds
        raise XdscaleError(f"{source}: not a {kind.model_type} configuration: {one_line(error)}") from None
    check_sizes(config, source)
    if config.hidden_act not in ACT2FN:
        raise XdscaleError(f"{source}: hidden_act is {config.hidden_act!r}, which transformers does not know")
    for name, default in vars(kind).items():  # of its own switches; a text would count as true
        if isinstance(default, bool) and not isinstance(getattr(config, name), bool):
            raise XdscaleError(f"{source}: {name} is {getattr(config, name)!r}; expected true or false")
    return config


def check_sizes(config: PretrainedConfig, source: str) -> None:
    """Refuses a configuration of sizes that no encoder has.

    Raises:
        XdscaleError: begins with `source`.
    """
    for name, most in _LARGEST.items():
        size = getattr(config, name, 1)
        if not isinstance(size, int) or not 1 <= size <= most:
            raise XdscaleError(f"{source}: {name} is {shown(size)}; expected a whole number from 1 to {most:,}")
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise XdscaleError(
            f"{source}: hidden_size = {config.hidden_size} is not a multiple of num_attention_heads = "
            f"{config.num_attention_heads}"
        )
    for name in _SHARES:
        if not 0 <= getattr(config, name) <= 1:  # NaN is neither
            raise XdscaleError(f"{source}: {name} is {shown(getattr(config, name))}; expected 0 to 1")
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise XdscaleError(f"{source}: pad_token_id is {shown(pad)}; vocab_size is {config.vocab_size}")


def load_language_encoder(spec: Language, *, dropout: float) -> PreTrainedModel:
    """Builds the language encoder in fp32: BERT with its pooler, ELECTRA (which has none) as it is.

    Args:
        spec: the recipe's `model.language`.
        dropout: replaces the configuration's rates for hidden states and attention weights.

    Raises:
        XdscaleError: as `language_config`; or there are no weights, they differ from `spec.sha256`, they do not hold
            the encoder, or hold NaN or whole numbers.
    """
    config = language_config(spec)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model_class = _CLASSES[config.model_type][1]
    if spec.weights == "random":
        return model_class(config)
    folder = _language_folder(spec.name)
    files = weight_files(folder)
    if spec.sha256 is not None:
        check_sha256(files, spec.sha256)
    weights = files[0] if len(files) == 1 else folder
    try:
        with _quiet_transformers():
            model, found = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=files[0].suffix == ".safetensors",
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
    own, stored = model.state_dict(), {}
    for path in files:  # transformers makes floats of whatever is there
        for name, value in read_state_dict(path).items():
            stored[_name_today(name.removeprefix(f"{model.base_model_prefix}."))] = value
    require_floats({name: stored[name] for name in own if name in stored}, weights)
    require_numbers(own, weights)
    return model


def _name_today(name: str) -> str:
    """Returns the name of a parameter today: BERT's first checkpoints call LayerNorm's gamma and beta."""
    return name.replace(".gamma", ".weight").replace(".beta", ".bias")


MASKED_LM_HEAD = "cls.predictions."
MASKED_LM_KEYS = {
    "transform.weight": "transform.dense.weight",
    "transform.bias": "transform.dense.bias",
    "norm.weight": "transform.LayerNorm.weight",
    "norm.bias": "transform.LayerNorm.bias",
    "decoder_bias": "bias",
}
"""Where a published head of masked LM has what `MaskedTokenHead` has."""
SENTENCE_HEAD = "cls.seq_relationship."
"""BERT's next-sentence classifier."""
_WORDS = "embeddings.word_embeddings.weight"


def masked_lm_head_state(spec: Language) -> dict[str, torch.Tensor] | None:
    """Returns the masked-LM head that a pretrained BERT was published with, under `MaskedTokenHead`'s names.

    A head that fits its encoder saves adaptation from learning the map to the vocabulary anew. ELECTRA's
    discriminators and bare encoders have none.

    Returns:
        transform.{weight, bias}, norm.{weight, bias}, decoder_bias, and decoder_weight where the configuration says
        that it is not the embedding, in fp32; None when the weights are random or hold no such head.

    Raises:
        XdscaleError: the weights cannot be read, hold only a part of a head or one that is no numbers, or a decoder
            that is not the embedding though the configuration says so.
    """
    if spec.weights == "random":
        return None
    head, words, files = {}, None, weight_files(_language_folder(spec.name))
    for path in files:
        for name, value in read_state_dict(path).items():
            if name.startswith(MASKED_LM_HEAD):
                head[_name_today(name.removeprefix(MASKED_LM_HEAD))] = value
            elif name.endswith(_WORDS):
                words = value
    if not head:
        return None
    keys, decoder, tied = MASKED_LM_KEYS, head.get("decoder.weight"), language_config(spec).tie_word_embeddings
    if "decoder.bias" in head and not (tied and "bias" in head):  # transformers ties the two as it ties the weights
        head["bias"] = head["decoder.bias"]
    if not tied:
        keys = keys | {"decoder_weight": "decoder.weight"}
    elif decoder is not None and (words is None or not torch.equal(decoder, words)):
        raise XdscaleError(
            f"{files[0].parent}: {MASKED_LM_HEAD}decoder.weight is not the word embedding, though config.json does not "
            'say so; write "tie_word_embeddings": false into it, or leave the decoder out of the weights'
        )
    missing = [MASKED_LM_HEAD + name for name in keys.values() if name not in head]
    if missing:
        raise XdscaleError(f"{files[0].parent}: the weights hold a masked-LM head without {some(missing)}")
    return _as_floats({ours: head[theirs] for ours, theirs in keys.items()}, files[0].parent)


def sentence_head_state(spec: Language) -> dict[str, torch.Tensor] | None:
    """Returns the next-sentence classifier that a pretrained BERT was published with: weight and bias, in fp32.

    None where the weights are random or hold no such head.

    Raises:
        XdscaleError: the weights cannot be read, or are no numbers.
    """
    head: dict[str, torch.Tensor] = {}
    for path in language_weights(spec) or ():
        head |= part_of(read_state_dict(path), SENTENCE_HEAD)
    return _as_floats(head, _language_folder(spec.name)) if {*head} == {"weight", "bias"} else None


def _as_floats(head: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    require_floats(head, folder)
    require_numbers(head, folder)
    return {name: value.float() for name, value in head.items()}


def tokenizer_folder(spec: Language) -> Path | None:
    """Returns the folder that holds the encoder's own tokenizer; None where there is none, as for a bare architecture.

    Raises:
        XdscaleError: the folder does not exist, or the hub is needed and cannot be reached.
    """
    if spec.weights == "random" and _is_bare(spec.name):
        return None
    folder = _language_folder(spec.name)
    return folder if has_tokenizer(folder) else None


def own_tokenizer(name: str) -> tuple[Tokenizer, LanguageTokenizer]:
    """Returns the tokenizer that an encoder was trained with, as `load_language_tokenizer` does.

    Raises:
        XdscaleError: there is none, so that nobody can say what ids mean; it is damaged, of another kind, or has more
            ids than the encoder has embeddings.
    """
    return tokenizer_of(_language_folder(name), name, language_config(Language(name=name)).vocab_size)


def tokenizer_of(folder: Path, name: str, embeddings: int) -> tuple[Tokenizer, LanguageTokenizer]:
    """Returns the tokenizer in an encoder's folder; `name` is the encoder, for messages; errors as `own_tokenizer`."""
    tokenizer, info = load_language_tokenizer(str(folder))
    if info.vocab_size > embeddings:
        raise XdscaleError(
            f"{name}: its tokenizer has {info.vocab_size} ids, but the encoder has embeddings for {embeddings} "
            "(vocab_size in config.json); put the tokenizer there that the weights were trained with"
        )
    return tokenizer, info


def language_weights(spec: Language) -> list[Path] | None:
    """Returns the files of the encoder's weights; None when they are random.

    Raises:
        XdscaleError: the folder does not exist or holds no weights, or the hub is needed and cannot be reached.
    """
    return None if spec.weights == "random" else weight_files(_language_folder(spec.name))


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
        for weights in WEIGHT_FILES:
            stem, suffix = weights.split(".")
            parts = [weights, f"{weights}.index.json", f"{stem}-*.{suffix}"]
            folder = Path(snapshot_download(name, allow_patterns=["config.json", *TOKENIZER_FILES, *parts]))
            if any((folder / part).is_file() for part in parts):
                break
    except Exception as error:  # the hub client raises unrelated kinds for no network, no such name, no access
        raise XdscaleError(
            f"{name}: no such folder, and not to be had from the hub ({one_line(error)}); give (in a recipe as "
            "model.language.name) a local folder with config.json, model.safetensors and tokenizer.json or vocab.txt, "
            f"or one of {', '.join(KNOWN)} with weights: random"
        ) from None
    return folder


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
