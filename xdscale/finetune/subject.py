"""What is finetuned: finding a model's files, its tokenizers, and building it for a task."""

from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import LARGE_FROM, FinetuneRecipe, ModelSettings, Subject
from xdscale.models.operations import use_definitions
from xdscale.names import resolve_path
from xdscale.pretrained.clip import clip_config, clip_weights_path
from xdscale.pretrained.language import language_config, language_weights, own_tokenizer
from xdscale.pretrained.weights import weights_sha256
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.sources.text_build import ClipTokenizer, LanguageTokenizer
from xdscale.systems.stored import FULL_MODEL
from xdscale.tasks.contract import Task
from xdscale.tasks.finetuning import (
    Finetuning,
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
    read_full_model,
)


class Readers(NamedTuple):
    """The tokenizers that a subject's encoders need, with their special ids; None where it has no such encoder."""

    language: tuple[Tokenizer, LanguageTokenizer] | None
    clip: tuple[ClipBPE, ClipTokenizer] | None


def describe_subject(name: str, subject: Subject, settings: ModelSettings) -> dict[str, Any]:
    """Checks a model and returns what identifies it: name, subject, size, encoder (in words), weights_sha256.

    Args:
        name: folder, hub name or `package:NAME/folder`; for CLIP-T alone an open_clip architecture or its JSON file.
        subject: which of the three.
        settings: of the recipe.

    Raises:
        XdscaleError: no such model, its weights or its tokenizer are missing, or it has too few positions.
    """
    if subject == "clip":
        spec = Clip(name=name, weights=settings.clip_weights)
        text = clip_config(spec).text_cfg
        size, encoder = text.width, f"CLIP text, {text.layers} layers of {text.width}"
        path = clip_weights_path(spec)
        weights = None if path is None else [path]
    else:
        language = Language(name=name, weights="pretrained" if subject == "language" else "random")
        config = language_config(language)
        size = config.hidden_size
        encoder = f"{config.model_type}, {config.num_hidden_layers} layers of {size}"
        if settings.max_length > config.max_position_embeddings:
            raise XdscaleError(
                f"model.max_length = {settings.max_length}: {name} has {config.max_position_embeddings} positions"
            )
        own_tokenizer(name)
        weights = language_weights(language)
        if subject == "cross-modal":
            read_full_model(resolve_path(name))
            weights = [resolve_path(name) / FULL_MODEL / "model.safetensors"]
    known = weights is not None and settings.weights == "pretrained"
    return {
        "name": name,
        "subject": subject,
        "size": "large" if size >= LARGE_FROM else "base",
        "encoder": encoder,
        "weights_sha256": weights_sha256(weights) if known else None,
    }


def open_readers(name: str, subject: Subject) -> Readers:
    """Returns the tokenizers of a subject.

    Raises:
        XdscaleError: the model comes without one.
    """
    language = None if subject == "clip" else own_tokenizer(name)
    return Readers(language, None if subject == "language" else (ClipBPE(), describe_clip_tokenizer()))


def build_subject(recipe: FinetuneRecipe, task: Task) -> Finetuning:
    """Builds the module of a run.

    Raises:
        XdscaleError: the weights cannot be loaded.
    """
    module = Finetuning(_classifier(recipe, task), task)
    return use_definitions(module) if recipe.run.kernels == "plain" else module


def _classifier(recipe: FinetuneRecipe, task: Task) -> nn.Module:
    model = recipe.model
    if model.subject == "clip":
        weights = "random" if model.weights == "random" else model.clip_weights
        return build_clip_classifier(Clip(name=model.name, weights=weights), task, dropout=model.dropout)
    if model.subject == "cross-modal":
        return build_cross_modal_classifier(resolve_path(model.name), task, dropout=model.dropout)
    spec = Language(
        name=model.name, weights=model.weights, sha256=model.weights_sha256 if model.weights == "pretrained" else None
    )
    return build_language_classifier(spec, task, dropout=model.dropout)
