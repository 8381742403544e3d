"""The recipe of VL-BERT: a BERT trained on with captions, image regions and text alone (spec VL-BERT §2, §4)."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import OBJECTIVE_WEIGHT, Objectives, Recipe, Section
from xdscale.recipes.mlm.schema import LanguageModel, MaskedLM
from xdscale.recipes.pixels import FLIP, Pixels, PixelSettings

READING = ("corners", "end_sees_image", "own_masked_token")
"""Of the model: how it reads its input. Weights that were trained in one way are of no use in another."""


class GroundedModel(LanguageModel):
    """The BERT that it is made of, and how it reads regions."""

    dropout: float = Field(0.1, ge=0, lt=1, description="everywhere")
    region_size: int = Field(
        2048, ge=1, lt=2**20, description="width of a region's features: 2,048 of pixels, else the table's"
    )
    region_classes: int = Field(
        1601, ge=2, le=2**16, description="of the detector's distributions, with the background"
    )
    pixels: Pixels | None = Field(None, description="null reads features from the table, which then stay as they are")
    flip: float = FLIP
    corners: bool = Field(
        False, description="embed a region's corners, as shares of the image (paper); false: centre and size (release)"
    )
    end_sees_image: bool = Field(False, description="let [END] see the whole image, as the paper says")
    own_masked_token: bool = Field(
        True, description="a masked region's token is its own (release); false: that of all regions (paper)"
    )
    max_elements: int = Field(
        64,
        ge=4,
        lt=2**16,
        description="words, [CLS], [SEP] and regions with the whole image; the longer side is cut first",
    )

    def encoder_values(self) -> dict[str, int | bool]:
        """Returns what the encoder's configuration has beside its BERT's."""
        own = {"appearance_size": self.region_size, "masks_features": self.pixels is None}
        return own | {name: getattr(self, name) for name in READING}


class MaskedWords(MaskedLM):
    """Words that are predicted from the others, and from what is seen of the image."""

    whole_words: bool = Field(True, description="as the release; false decides for each word piece by itself")


class MaskedTexts(MaskedWords):
    """The same on texts without an image."""

    specials: bool = Field(False, description="put [CLS] and [SEP] around these texts, as the paper says")


class MaskedRegions(Section):
    """The detector's distribution, or its likeliest class, for regions that are masked; the whole image never is."""

    weight: float = OBJECTIVE_WEIGHT
    select: float = Field(0.15, gt=0, lt=1, description="share of the regions to be predicted")
    mask: float = Field(0.9, gt=0, le=1, description="share of those that are masked; the rest is left to be seen")
    target: Literal["distribution", "class"] = Field(
        "distribution", description="predict the detector's distribution (release) or likeliest class (paper)"
    )


class GroundedObjectives(Objectives):
    """Those that are on; without `text_mlm` a batch is captions alone, with it half of it is texts."""

    mlm: MaskedWords | None = MaskedWords()
    text_mlm: MaskedTexts | None = MaskedTexts()
    masked_region: MaskedRegions | None = MaskedRegions()


class VLBERTRecipe(Recipe):
    """Everything that decides the result of pretraining; `global_batch` counts captions and texts."""

    implementation: ClassVar[str] = "xdscale.systems.vlbert:VLBERTSystem"
    step_bench: ClassVar[str | None] = "xdscale.bench.vlbert_step:bench_vlbert"

    system: Literal["vlbert"] = Field(description="the system that is trained")
    model: GroundedModel
    objectives: GroundedObjectives = GroundedObjectives()

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is."""
        if self.model.pixels is not None and self.model.region_size != 2048:
            return f"model.region_size = {self.model.region_size}: of pixels ResNet-101 makes 2,048 numbers"
        words = {name: getattr(self.objectives, name) for name in ("mlm", "text_mlm")}
        wrong = (section.problem(name) for name, section in words.items() if section is not None)
        return super().problem() or next(filter(None, wrong), None)


class VLBERTSettings(PixelSettings):
    """How VL-BERT is finetuned."""

    implementation: ClassVar[str] = "xdscale.tasks.vlbert:VLBERTSubject"
    model_types: ClassVar[tuple[str, ...]] = ("vl_bert",)

    loss: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="of VL-BERT: each answer, choice or region by itself, or as the task has it for others"
    )
    flip: float = FLIP
    swap_words: bool = Field(True, description="exchange the words left and right where the image is mirrored")
    object_loss: float = Field(0.0, ge=0, description="weight of a second loss, on classes of VCR's objects; 0: none")
    object_masks: Literal["input", "output"] | None = Field(
        None, description="what of C5 is multiplied with VCR's masks of objects, with pixels; null for nothing"
    )

    @property
    def draws(self) -> bool:
        """Whether images are mirrored."""
        return self.flip > 0
