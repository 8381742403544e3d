"""The recipe of XDBERT: a language encoder adapted with what CLIP's text tower knows (paper §2)."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import OBJECTIVE_WEIGHT, NameOrPath, Objectives, Recipe, Section
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.recipes.mlm.schema import LanguageModel, MaskedLM


class Clip(Section):
    """The CLIP text tower, through open_clip."""

    name: NameOrPath = Field(description="open_clip architecture, or a JSON file in open_clip's model-config format")
    weights: NameOrPath = Field("openai", description="open_clip pretrained tag, a weights file, or 'random'")


class Model(LanguageModel):
    """Language encoder, CLIP's text tower and the cross-modal layers between them (paper §2.2)."""

    clip: Clip
    cross_layers: int = Field(2, ge=1, le=1000, description="cross-modal layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="language encoder and cross-modal layers; CLIP-T has none")


class Match(Section):
    """Paper §2.3.2: are the texts of the language encoder and of CLIP the same?"""

    weight: float = OBJECTIVE_WEIGHT
    mismatch: float = Field(0.5, gt=0, lt=1, description="share of the pairs whose texts differ")


class ClipTokens(Section):
    """Paper §2.3.3: name the CLIP token at 15 % of the CLIP positions, input unchanged."""

    weight: float = OBJECTIVE_WEIGHT
    select: float = Field(0.15, gt=0, lt=1, description="share of the CLIP tokens to be predicted")


class XDBERTObjectives(Objectives):
    """The objectives that are on; `null` switches one off (Table 3's ablations)."""

    mlm: MaskedLM | None = MaskedLM()
    match: Match | None = Match()
    clip_tokens: ClipTokens | None = ClipTokens()


class XDBERTRecipe(Recipe):
    """Everything that decides the result of an adaptation."""

    implementation: ClassVar[str] = "xdscale.systems.xdbert:XDBERTSystem"
    step_bench: ClassVar[str | None] = "xdscale.bench.xdbert_step:bench_xdbert"

    system: Literal["xdbert"] = Field(description="the system that is trained")
    model: Model
    objectives: XDBERTObjectives = XDBERTObjectives()

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is."""
        mlm = self.objectives.mlm
        return super().problem() or (mlm and mlm.problem())


class TextSettings(ModelSettings):
    """How what reads texts alone is finetuned; one recipe serves all three, which stand in one table (paper §3)."""

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
