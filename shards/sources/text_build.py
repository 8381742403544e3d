"""What `dataset.json` says of a table of packed text. Light to import: whoever reads such a table needs it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Column, Count, InputFile, Manifest, ManifestSection, Sha256

TEXT = "text"
"""Name of the table, and of the source."""
BLOCK_TOKENS = 75
"""Content tokens per CLIP block: a context of 77 less start and end (spec xdbert §4)."""


class LanguageTokenizer(ManifestSection):
    """The language model's tokenizer; equal `sha256` means equal ids for equal text."""

    name: str
    sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**16)]
    cls_id: Count
    sep_id: Count
    mask_id: Count
    pad_id: Count


class ClipTokenizer(ManifestSection):
    """CLIP's BPE."""

    name: str
    sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**16)]
    start_id: Count
    end_id: Count


class PackingOptions(ManifestSection):
    """How text becomes rows.

    Attributes:
        format: one of `corpus.FORMATS`, or "auto".
        text_field: field of the text in JSON Lines, column in parquet.
        encoding: of text and JSON; a byte order mark in a file decides before it.
        line_breaks: "join" or "keep" the lines of a paragraph, or "auto" (see `stream_documents`).
        min_words: paragraphs with fewer words are left out.
        sequence_length: language tokens per sequence, without [CLS] and [SEP].
        clip_blocks: CLIP blocks of 75 tokens at most per sequence; the rest of its text is cut on CLIP's side.
        validation_fraction: share of documents held out, chosen by a hash of their text.
        shard_text_bytes: corpus text per shard, at least.
    """

    format: str = "auto"
    text_field: str = "text"
    encoding: str = "utf-8"
    line_breaks: str = "auto"
    min_words: Count = 5
    sequence_length: Annotated[int, Field(gt=0, lt=2**31)] = 510
    clip_blocks: Annotated[int, Field(gt=0, lt=2**31)] = 9
    validation_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    shard_text_bytes: Annotated[int, Field(gt=0)] = 16 << 20


class TextBuild(PackingOptions):
    """Everything that decides the bytes of the shards."""

    source: Literal["text"] = TEXT
    inputs: list[InputFile]
    language_tokenizer: LanguageTokenizer
    clip_tokenizer: ClipTokenizer

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns how a dataset's packed text was built.

        Raises:
            XdscaleError: it has none.
        """
        try:
            return cls.model_validate(manifest.tables[TEXT].build)
        except KeyError:
            tables = ", ".join(sorted(manifest.tables))
            raise XdscaleError(
                f"the dataset has no table of packed text, only {tables}; make one with 'xdscale shards build'"
            ) from None
        except ValidationError as error:
            raise XdscaleError(f"dataset.json: tables.{TEXT}.build.{named_problem(error)}") from None

    @property
    def columns(self) -> list[Column]:
        """Those of the table: language ids, and CLIP ids of the same characters."""
        most = self.clip_blocks * BLOCK_TOKENS
        return [
            Column(name="language", dtype="<u2", shape=(self.sequence_length,)),
            Column(name="clip", dtype="<u2", offsets="clip_offsets", fewest=1, most=most),
        ]


def named_problem(error: ValidationError) -> str:
    """Returns the first problem in words: which value, what it is, and what was expected."""
    first: Any = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
