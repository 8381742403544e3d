"""What is finetuned on texts: a language encoder, the full cross-modal model, or CLIP-T (spec xdbert §5.2)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from xdscale.data.task_batches import TaskCollator, encode_examples
from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.pretrained.clip import clip_config, clip_weights_path
from xdscale.pretrained.language import language_config, language_weights, own_tokenizer
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip, TextSettings
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.sources.text_build import ClipTokenizer, LanguageTokenizer
from xdscale.tasks.contract import Subject, SubjectFacts, Task
from xdscale.tasks.finetuning import (
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
    read_full_model,
    save_language_classifier,
)
from xdscale.tasks.subjects import ClipClassifier, CrossModalClassifier, LanguageClassifier
from xdscale.training.stored import FULL_MODEL
from xdscale.weights import part_of


class LanguageSubject(Subject):
    """A language encoder in a Hugging Face folder, with the published head."""

    def describe(self) -> SubjectFacts:
        """Checks configuration, tokenizer and weights."""
        spec = self._spec()
        return _language_facts(spec, self.settings)._replace(weights=language_weights(spec))

    def collator(self, task: Task, examples: Sequence[Example]) -> TaskCollator:
        """Tokenises for the language encoder."""
        return _collator(self, task, examples, language=own_tokenizer(self.model))

    def tokenizer(self) -> Tokenizer:
        """Returns the encoder's own."""
        return own_tokenizer(self.model)[0]

    def build(self, task: Task, *, sha256: str | None = None) -> LanguageClassifier:
        """Builds the encoder with a new head."""
        pretrained = self.settings.weights == "pretrained"
        return build_language_classifier(
            self._spec(sha256 if pretrained else None), task, dropout=self.settings.dropout
        )

    @classmethod
    def exports(cls) -> bool:
        """Returns whether this is it, or has its own way: a folder says nothing of what a derived one computes."""
        return cls is LanguageSubject or "export" in vars(cls)

    def export(self, task: Task, state: dict[str, torch.Tensor], out: Path) -> str:
        """Writes encoder and head as a Hugging Face folder."""
        weights, dropout = part_of(state, "model."), self.settings.dropout
        model = save_language_classifier(self._spec(), task, weights, out, dropout=dropout)
        return f"finetuned {type(model).__name__}"

    def _spec(self, sha256: str | None = None) -> Language:
        return Language(name=self.model, weights=self.settings.weights, sha256=sha256)


class CrossModalSubject(Subject):
    """The full cross-modal model of an export of XDBERT."""

    def describe(self) -> SubjectFacts:
        """Checks the export."""
        facts = _language_facts(Language(name=self.model, weights="random"), self.settings)
        folder = resolve_path(self.model)
        read_full_model(folder)
        return facts._replace(weights=[folder / FULL_MODEL / "model.safetensors"])

    def collator(self, task: Task, examples: Sequence[Example]) -> TaskCollator:
        """Tokenises for both encoders."""
        clip = ClipBPE(), describe_clip_tokenizer()
        return _collator(self, task, examples, language=own_tokenizer(self.model), clip=clip)

    def build(self, task: Task, *, sha256: str | None = None) -> CrossModalClassifier:
        """Builds both encoders and the cross-modal layers with a new head."""
        return build_cross_modal_classifier(resolve_path(self.model), task, dropout=self.settings.dropout)


class ClipSubject(Subject):
    """CLIP-T alone, by an open_clip architecture or its JSON file."""

    settings: TextSettings

    def describe(self) -> SubjectFacts:
        """Checks architecture and weights."""
        spec = Clip(name=self.model, weights=self.settings.clip_weights)
        text, path = clip_config(spec).text_cfg, clip_weights_path(spec)
        encoder = f"CLIP text, {text.layers} layers of {text.width}"
        return SubjectFacts(text.width, encoder, None if path is None else [path])

    def collator(self, task: Task, examples: Sequence[Example]) -> TaskCollator:
        """Tokenises for CLIP."""
        return _collator(self, task, examples, clip=(ClipBPE(), describe_clip_tokenizer()))

    def build(self, task: Task, *, sha256: str | None = None) -> ClipClassifier:
        """Builds the text tower with a new head."""
        weights = "random" if self.settings.weights == "random" else self.settings.clip_weights
        return build_clip_classifier(Clip(name=self.model, weights=weights), task, dropout=self.settings.dropout)


def _language_facts(spec: Language, settings: TextSettings) -> SubjectFacts:
    config = language_config(spec)
    if settings.max_length > config.max_position_embeddings:
        raise XdscaleError(
            f"model.max_length = {settings.max_length}: {spec.name} has {config.max_position_embeddings} positions"
        )
    own_tokenizer(spec.name)
    encoder = f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"
    return SubjectFacts(config.hidden_size, encoder, None)


def _collator(
    subject: Subject,
    task: Task,
    examples: Sequence[Example],
    *,
    language: tuple[Tokenizer, LanguageTokenizer] | None = None,
    clip: tuple[ClipBPE, ClipTokenizer] | None = None,
) -> TaskCollator:
    split = encode_examples(examples, task.targets, language and language[0], clip and clip[0])
    ids = language and language[1], clip and clip[1]
    return TaskCollator(split, *ids, max_length=subject.settings.max_length)
