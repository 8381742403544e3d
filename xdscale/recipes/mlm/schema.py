"""The recipe of MLM alone: a language encoder trained on, the fair baseline of XDBERT's paper (§3)."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import OBJECTIVE_WEIGHT, NameOrPath, Objectives, Recipe, Section


class Language(Section):
    """The language encoder: BERT or ELECTRA, through transformers."""

    name: NameOrPath = Field(description="known architecture, hub name, local folder or package:NAME/folder")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: the architecture alone")
    sha256: str | None = Field(None, description="expected SHA-256 of the weights file, checked before loading")


class LanguageModel(Section):
    """The language encoder by itself."""

    language: Language
    dropout: float = Field(0.1, ge=0, lt=1, description="of the language encoder")
    start: NameOrPath | None = Field(None, description="run folder or export to take first weights from, with heads")


class MaskedLM(Section):
    """XDBERT §2.3.1; rates of Devlin et al.: 15 % selected, of which 80 % [MASK], 10 % random, 10 % kept."""

    weight: float = OBJECTIVE_WEIGHT
    select: float = Field(0.15, gt=0, lt=1, description="share of the tokens to be predicted")
    mask: float = Field(0.8, ge=0, le=1, description="share of those that the encoder sees as [MASK]")
    random: float = Field(0.1, ge=0, le=1, description="share of those that it sees as another token; the rest is kept")

    def problem(self, name: str = "mlm") -> str | None:
        """Returns what is inconsistent, if anything is, of the objective of a name."""
        if self.mask + self.random > 1:
            return f"objectives.{name}: mask {self.mask} + random {self.random} is more than 1"
        return None


class MaskedLMObjectives(Objectives):
    """The one objective."""

    mlm: MaskedLM = MaskedLM()


class MaskedLMRecipe(Recipe):
    """Everything that decides the result of training a language encoder on with MLM."""

    implementation: ClassVar[str] = "xdscale.systems.mlm:MaskedLMSystem"

    system: Literal["mlm"] = Field(description="the system that is trained")
    model: LanguageModel
    objectives: MaskedLMObjectives = MaskedLMObjectives()

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is."""
        return super().problem() or self.objectives.mlm.problem()
