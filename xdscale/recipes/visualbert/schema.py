"""The recipe of VisualBERT: a BERT trained on with captions and the regions of their images (spec VisualBERT §2)."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import OBJECTIVE_WEIGHT, Objectives, Recipe, Section
from xdscale.recipes.mlm.schema import LanguageModel, MaskedLM
from xdscale.recipes.pixels import PixelSettings


class VisualModel(LanguageModel):
    """The BERT that it is made of, and how it reads regions."""

    dropout: float = Field(0.1, ge=0, lt=1, description="everywhere")
    region_size: int = Field(ge=1, lt=2**20, description="width of a region's features in the table")
    spatial: bool = Field(False, description="append each box to its features: six shares of the image's size")
    max_regions: int | None = Field(None, ge=1, lt=2**16, description="of an image, the first ones; null for all")
    max_text: int = Field(
        128, ge=4, lt=2**16, description="word pieces with [CLS] and [SEP]; the longer caption is cut first"
    )
    images: bool = Field(True, description="false: captions alone, the ablation without images")
    early_fusion: bool = Field(True, description="false: regions enter one new layer behind those of BERT")
    alignment: Literal["sum", "mean"] = Field(
        "sum", description="of the positions of words that name a region, where tasks say so: VCR"
    )
    freeze_pooler: bool = Field(True, description="leave BERT's pooler as it is, as the release does")


class TaskInput(Section):
    """What VisualBERT reads of a task's examples."""

    objects: Literal["all", "named"] = Field(
        "all", description="named: of VCR's objects those that the item speaks of, as VisualBERT's release does"
    )
    truncation: Literal["longest_first", "second_from_front"] = Field(
        "longest_first", description="second_from_front: what is too long loses the second text's beginning, as there"
    )


class SamePicture(Section):
    """Do both captions describe the image? The first one always does."""

    weight: float = OBJECTIVE_WEIGHT
    mismatch: float = Field(0.5, gt=0, lt=1, description="share of the pairs whose second caption is of another image")


class VisualBERTObjectives(Objectives):
    """Those that are on; without `match` a sample is one caption."""

    mlm: MaskedLM | None = MaskedLM()
    match: SamePicture | None = SamePicture()


class VisualBERTRecipe(Recipe):
    """Everything that decides the result of pretraining on captions."""

    implementation: ClassVar[str] = "xdscale.systems.visualbert:VisualBERTSystem"
    step_bench: ClassVar[str | None] = "xdscale.bench.visualbert_step:bench_visualbert"

    system: Literal["visualbert"] = Field(description="the system that is trained")
    model: VisualModel
    objectives: VisualBERTObjectives = VisualBERTObjectives()

    @property
    def region_width(self) -> int:
        """Numbers that the model reads of each region."""
        return self.model.region_size + 6 * self.model.spatial

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is."""
        mlm = self.objectives.mlm
        return super().problem() or (mlm and mlm.problem())


class VisualBERTSettings(PixelSettings, TaskInput):
    """How VisualBERT is finetuned."""

    implementation: ClassVar[str] = "xdscale.tasks.visualbert:VisualBERTSubject"
    model_types: ClassVar[tuple[str, ...]] = ("visual_bert",)
