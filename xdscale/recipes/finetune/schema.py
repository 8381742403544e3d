"""The section `model` of a finetuning recipe: keys that all subjects have; each subject's settings add its own."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import Section


class ModelSettings(Section):
    """How the subject is built and what it reads.

    Attributes:
        implementation: `module:class` of the subject (see `xdscale.tasks.contract`), imported when it is needed.
        model_types: what config.json states in the folders that are finetuned as this subject where nobody says.
        of_model: keys that tell models apart; of others the values must be equal for two models to be compared.
        reads_pixels: whether images are read themselves, and what computes features of them is tuned along.
        draws: whether something is drawn for an example each time that it is trained on.
    """

    implementation: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    of_model: ClassVar[frozenset[str]] = frozenset()
    reads_pixels: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    dropout: float = Field(0.1, ge=0, lt=1, description="encoder and head")
    max_length: int = Field(128, ge=8, description="language tokens with [CLS] and [SEP]")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: to see what they are worth")
    freeze_pooler: bool = Field(False, description="leave it as it was pretrained, as VisualBERT's release does")
