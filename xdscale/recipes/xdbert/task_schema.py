"""Settings of what is finetuned on texts: a language encoder, the full cross-modal model, or CLIP-T (paper §3)."""

from typing import ClassVar

from pydantic import Field

from xdscale.recipe import NameOrPath
from xdscale.recipes.finetune.schema import ModelSettings


class TextSettings(ModelSettings):
    """One recipe serves all three, which stand in one table."""

    of_model: ClassVar[frozenset[str]] = frozenset({"clip_weights"})

    clip_weights: NameOrPath = Field("openai", description="for CLIP-T alone: open_clip tag, weights file, or 'random'")


class LanguageSettings(TextSettings):
    """Of the language encoder alone."""

    implementation: ClassVar[str] = "xdscale.tasks.text_subjects:LanguageSubject"
    model_types: ClassVar[tuple[str, ...]] = ("bert", "electra")


class CrossModalSettings(TextSettings):
    """Of the full model."""

    implementation: ClassVar[str] = "xdscale.tasks.text_subjects:CrossModalSubject"


class ClipSettings(TextSettings):
    """Of CLIP-T alone."""

    implementation: ClassVar[str] = "xdscale.tasks.text_subjects:ClipSubject"
