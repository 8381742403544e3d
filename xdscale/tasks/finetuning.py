"""Finetuning: a subject with the loss of a task, and where subjects come from (paper §2.4, appendix C)."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    ElectraForMultipleChoice,
    ElectraForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

from xdscale.errors import XdscaleError
from xdscale.models.encoders import use_kernels
from xdscale.pretrained.clip import load_clip_text_tower
from xdscale.pretrained.language import language_config, load_language_encoder, tokenizer_folder
from xdscale.pretrained.language_files import save_tokenizer
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip, XDBERTRecipe
from xdscale.systems.contract import Term
from xdscale.systems.xdbert import build_adapted
from xdscale.tasks.contract import Task
from xdscale.tasks.subjects import ClipClassifier, CrossModalClassifier, LanguageClassifier, name_outputs
from xdscale.training.stored import FULL_MODEL, stored_recipe, stored_state
from xdscale.weights import part_of

_CLASSES: dict[tuple[str, bool], type[PreTrainedModel]] = {
    ("bert", False): BertForSequenceClassification,
    ("bert", True): BertForMultipleChoice,
    ("electra", False): ElectraForSequenceClassification,
    ("electra", True): ElectraForMultipleChoice,
}


class Finetuning(nn.Module):
    """A subject with the loss of its task.

    Attributes:
        subject: one of the classifiers of `xdscale.tasks.subjects`.
    """

    def __init__(self, subject: nn.Module, task: Task) -> None:
        super().__init__()
        self.subject = subject
        self.task = task

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Term | torch.Tensor]:
        """Computes the task's summed loss.

        Args:
            batch: the arrays of `xdscale.data.task_batches.TaskCollator` as tensors.

        Returns:
            "task": its `Term` over the real examples.
            "logits": fp32 [b, outputs], without gradient; for choices [b, choices].
            And the terms of what else the subject learns: it returns these beside its logits then.
        """
        found = self.subject(batch)
        logits, more = found if isinstance(found, tuple) else (found, {})
        logits = logits.float().view(len(batch["real"]), -1)
        loss = getattr(self.subject, "loss", self.task.loss)(logits, batch["labels"], batch["real"])
        return {"task": Term.scored(*loss), **more, "logits": logits.detach()}


def build_language_classifier(spec: Language, task: Task, *, dropout: float) -> LanguageClassifier:
    """Builds the language encoder with a new head.

    The head takes its values from torch's global generator: seed it before, alike on all ranks.

    Raises:
        XdscaleError: the encoder cannot be built or its weights cannot be loaded.
    """
    encoder = load_language_encoder(spec, dropout=dropout)
    config = encoder.config
    config.num_labels = task.outputs
    if config.model_type == "electra":
        config.summary_last_dropout = dropout
    bare = copy.deepcopy(config)
    bare.num_hidden_layers = 0  # only the head of this one is kept
    model = _CLASSES[config.model_type, task.choices > 0](bare)
    setattr(model, model.base_model_prefix, encoder)
    model.config = config
    use_kernels(model)
    return LanguageClassifier(model)


def save_language_classifier(
    spec: Language, task: Task, state: Mapping[str, torch.Tensor], out: Path, *, dropout: float
) -> PreTrainedModel:
    """Writes a finetuned language encoder as a Hugging Face folder, with its head and its tokenizer.

    transformers' `AutoModelForSequenceClassification` loads it, of choices `AutoModelForMultipleChoice`.

    Args:
        spec: what was finetuned.
        task: on which; where it has labels, config.json names the outputs as they are.
        state: fp32, of `LanguageClassifier.model`.
        out: an existing folder.
        dropout: that it was trained with.

    Returns:
        The model.
    """
    config = language_config(spec)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    if config.model_type == "electra":
        config.summary_last_dropout = dropout
    name_outputs(config, task)
    if not task.choices:
        config.problem_type = "regression" if task.outputs == 1 else "single_label_classification"
    model = _CLASSES[config.model_type, task.choices > 0](config)
    model.load_state_dict(state)
    logging.disable_progress_bar()
    model.save_pretrained(out)
    save_tokenizer(tokenizer_folder(spec), out, positions=config.max_position_embeddings)
    return model


def build_cross_modal_classifier(folder: Path, task: Task, *, dropout: float) -> CrossModalClassifier:
    """Builds the full cross-modal model of an export with a new classifier.

    The pooler starts as that of MATCH, where the export has one: it is what adaptation trained on this very output,
    as BERT's own pooler is what next-sentence prediction trained.

    Args:
        folder: written by `xdscale export`.
        task: decides the outputs.
        dropout: of all parts but CLIP-T, which has none.

    Raises:
        XdscaleError: the folder holds no full model.
    """
    state = read_full_model(folder)
    encoder = build_adapted(folder, state, dropout=dropout)
    classifier = CrossModalClassifier(encoder, task.outputs, dropout=dropout)
    pooler = part_of(state, "match.pooler.")
    if pooler:
        classifier.pooler.load_state_dict(pooler)
    return classifier


def build_clip_classifier(spec: Clip, task: Task, *, dropout: float) -> ClipClassifier:
    """Builds CLIP-T with a new classifier.

    Raises:
        XdscaleError: the tower cannot be built or its weights cannot be loaded.
    """
    return ClipClassifier(load_clip_text_tower(spec), task.sentences, task.outputs, dropout=dropout)


def read_full_model(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the fp32 weights of an export's full cross-modal model, heads included.

    Raises:
        XdscaleError: the folder holds no full model, or another system's.
    """
    if not (folder / FULL_MODEL / "config.json").is_file():
        raise XdscaleError(
            f"{folder}: holds no {FULL_MODEL}/config.json; the cross-modal subject needs a folder written by "
            "'xdscale export'"
        )
    recipe = stored_recipe(folder)
    if not isinstance(recipe, XDBERTRecipe):
        raise XdscaleError(f"{folder}: was trained as {recipe.system!r}: there is no cross-modal model in it")
    return stored_state(folder)
