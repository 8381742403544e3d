"""What recipes say of images that are read themselves, in the place of features of them."""

from typing import Any, ClassVar

from pydantic import Field

from xdscale.recipe import NameOrPath, Section
from xdscale.recipes.finetune.schema import ModelSettings

RANDOM = "random"
"""In the place of a file of weights."""
FLIP: Any = Field(
    0.0, ge=0, lt=1, description="share of the images that training mirrors; where features are read, their boxes alone"
)


class Pixels(Section):
    """The branch of Fast R-CNN that is trained along, on the images themselves."""

    weights: NameOrPath = Field(description="ResNet-101 or its like under torchvision's names: a file, or random")
    short_side: int = Field(
        600, ge=16, le=10_000, description="images are scaled so that their shorter side has these pixels"
    )
    long_side: int = Field(1000, ge=16, le=10_000, description="unless the longer one then has more than these")


class TunedPixels(Pixels):
    """VL-BERT's branch of Fast R-CNN, or r2c's of VisualBERT, that is finetuned along, on the images themselves."""

    weights: NameOrPath | None = Field(
        None, description="ResNet-101 (VisualBERT: -50) or its like: a file, or random; null takes the model's own"
    )
    freeze: bool = Field(
        False, description="leave what comes before RoIAlign as it is, as VisualBERT's runs without COCO do"
    )


class PixelSettings(ModelSettings):
    """Settings of a subject that may tune a branch along, from pixels to features."""

    of_model: ClassVar[frozenset[str]] = frozenset({"pixels"})

    pixels: TunedPixels | None = Field(
        None, description="of VL-BERT, and of VisualBERT on VCR; null reads features from the table of regions"
    )

    @property
    def reads_pixels(self) -> bool:
        """Whether images are read themselves."""
        return self.pixels is not None
