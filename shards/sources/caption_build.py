"""What `dataset.json` says of a table of captions. Light to import: whoever reads such a table needs it."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Column, InputFile, Manifest, ManifestSection, Sha256
from xdscale.shards.regions import REGIONS
from xdscale.shards.sources.text_build import LanguageTokenizer, named_problem

CAPTIONS = "captions"
"""Name of the table, and of the source."""

COLUMNS = [
    Column(name="words", dtype="<u2", offsets="word_offsets", fewest=1),
    Column(name="image", dtype="<u4", rows_of=REGIONS),
    Column(name="siblings", dtype="<u4", shape=(2,)),
]
"""Word pieces without [CLS] and [SEP]; the row of the image; and the first of the rows of this split that hold captions
of that image, which stand one after the other, with their number."""


class CaptionOptions(ManifestSection):
    """How captions become rows.

    Attributes:
        split: which images are held out: those of a "hash" of the image's id, those that a "karpathy" file says (which
            also leaves its test images out), those in a "list" of ids, or those of other "files" of captions.
        validation_fraction: share of the images that a hash holds out.
        missing: "refuse" images that the table of regions has not, or "leave-out" them with their captions.
        shard_images: per shard.
    """

    split: Literal["hash", "karpathy", "list", "files"] = "hash"
    validation_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    missing: Literal["refuse", "leave-out"] = "refuse"
    shard_images: Annotated[int, Field(gt=0, lt=2**31)] = 8192


class CaptionBuild(CaptionOptions):
    """Everything that decides the bytes of the shards.

    Attributes:
        inputs: files of captions.
        held_out: the file, or files, that say what is held out; none for a hash.
        language_tokenizer: of the word pieces.
        image_names: which form the images' names have in the table of regions.
        regions: fingerprint of that table.
    """

    source: Literal["captions"] = CAPTIONS
    inputs: list[InputFile]
    held_out: list[InputFile]
    language_tokenizer: LanguageTokenizer
    image_names: str
    regions: Sha256

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns how a dataset's captions were built.

        Raises:
            XdscaleError: it has none, or they are of another table of regions than the one beside them.
        """
        try:
            built = cls.model_validate(manifest.tables[CAPTIONS].build)
        except KeyError:
            tables = ", ".join(sorted(manifest.tables))
            raise XdscaleError(
                f"the dataset has no table of captions, only {tables}; make one with 'xdscale shards captions'"
            ) from None
        except ValidationError as error:
            raise XdscaleError(f"dataset.json: tables.{CAPTIONS}.build.{named_problem(error)}") from None
        if built.regions != manifest.only([REGIONS]).fingerprint:
            raise XdscaleError(
                "dataset.json: the captions were built beside another table of regions than the one that is there now: "
                "their rows are not its rows; build them again with 'xdscale shards captions … --overwrite'"
            )
        return built
