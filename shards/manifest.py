"""`dataset.json`: what a folder of shards holds and how it was built."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xdscale.errors import XdscaleError

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION = 3
BLOCK_ROWS = 1024
"""Most rows per block: large enough that tar and npy headers cost well under 1 % of 512-token sequences."""
BLOCK_BYTES = 16 << 20
"""About how much one block holds of a column at most."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
NAME = "^[a-z][a-z0-9_]*$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Section):
    """What a table holds for each row: an array of one shape, or any number of elements of one shape.

    Attributes:
        name: also of its members in a shard.
        dtype: of an element, in numpy's notation with byte order.
        shape: of a row; in a ragged column of each of a row's elements. May be empty.
        offsets: None for rows of one shape. For a ragged column the member that says where each row's elements begin
            and end; columns that have equally many elements in every row share it.
        fewest: elements of a row, at least.
        most: elements of a row, at most.
    """

    name: Annotated[str, Field(pattern=NAME)]
    dtype: Annotated[str, Field(pattern=r"^(\|[iu]1|<[iuf][248])$")]
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(max_length=3)] = ()
    offsets: Annotated[str, Field(pattern=NAME)] | None = None
    fewest: Count = 0
    most: Annotated[int, Field(gt=0)] | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of a row, or in a ragged column of one element."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class LanguageTokenizer(_Section):
    """The language model's tokenizer; equal `sha256` means equal ids for equal text."""

    name: str
    sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**16)]
    cls_id: Count
    sep_id: Count
    mask_id: Count
    pad_id: Count


class ClipTokenizer(_Section):
    """CLIP's BPE."""

    name: str
    sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**16)]
    start_id: Count
    end_id: Count


class InputFile(_Section):
    """A corpus file, by its content; only the last part of its path is kept."""

    name: str
    bytes: Count
    sha256: Sha256


class Build(_Section):
    """Everything that decides the bytes of the shards."""

    inputs: list[InputFile]
    format: str
    text_field: str
    encoding: str = "utf-8"
    line_breaks: Literal["auto", "keep", "join"] = "auto"
    min_words: Count
    sequence_length: Annotated[int, Field(gt=0, lt=2**31)]
    clip_blocks: Annotated[int, Field(gt=0, lt=2**31)]
    validation_fraction: Annotated[float, Field(ge=0, le=1)]
    shard_text_bytes: Annotated[int, Field(gt=0)]
    block_rows: Annotated[int, Field(gt=0)] = BLOCK_ROWS
    language_tokenizer: LanguageTokenizer
    clip_tokenizer: ClipTokenizer

    def identity(self) -> dict[str, object]:
        """Returns what must be equal for two builds to give the same shards: all but the names of files."""
        values = self.model_dump(mode="json")
        values["inputs"] = [{"bytes": item.bytes, "sha256": item.sha256} for item in self.inputs]
        del values["language_tokenizer"]["name"], values["clip_tokenizer"]["name"]
        return values


class ShardRecord(_Section):
    """One tar file of a split."""

    file: Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{6,}\.tar$")]
    samples: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(gt=0)]
    sha256: Sha256


class Split(_Section):
    """The shards of one split; sample ids count through them in this order.

    `blocks_needed[k]` is the number of sequences whose whole text fills k + 1 CLIP blocks of 75 tokens,
    before the cut at `clip_blocks`.
    """

    samples: Count
    language_tokens: Count
    clip_tokens: Count
    blocks_needed: list[Count]
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        found = sum(shard.samples for shard in self.shards)
        if found != self.samples:
            raise ValueError(f"samples is {self.samples}, but the shards hold {found}")
        return self


class Corpus(_Section):
    """What was read, what was kept of it and what was not.

    `paragraphs`, `words` and `text_bytes` (UTF-8) are those kept. Left out are headings, and paragraphs of fewer words
    than `min_words`. `dropped_tokens` language tokens filled no sequence at the end of their unit.
    `joined_documents` were hard-wrapped; `bad_bytes` replacements stand for bytes that were no text.
    `document_tokens[k]` is the number of documents of 2^(k-1) to 2^k - 1 language tokens; the first is of those
    that have none.
    """

    documents: Count
    paragraphs: Count
    words: Count
    text_bytes: Count
    headings: Count
    heading_words: Count
    short_paragraphs: Count
    short_words: Count
    dropped_tokens: Count
    joined_documents: Count
    bad_bytes: Count
    document_tokens: list[Count]

    @classmethod
    def total(cls, parts: Iterable[Self]) -> Self:
        """Returns the sum of what parts of a corpus gave."""
        parts = list(parts)
        counts = (name for name in cls.model_fields if name != "document_tokens")
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in counts},
            document_tokens=add_counts(part.document_tokens for part in parts),
        )


def add_counts(histograms: Iterable[list[int]]) -> list[int]:
    """Returns the sum of histograms, as long as the longest."""
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


class Manifest(_Section):
    """The whole of `dataset.json`."""

    format_version: Literal[3] = FORMAT_VERSION
    columns: Annotated[list[Column], Field(min_length=1)]
    build: Build
    corpus: Corpus
    splits: dict[str, Split]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `folder/dataset.json`.

        Raises:
            XdscaleError: the folder or the file is missing or invalid, or the build was not finished.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise XdscaleError(_missing_message(Path(folder))) from None
        except (OSError, UnicodeDecodeError) as error:
            raise XdscaleError(f"{path}: cannot be read: {error}") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise XdscaleError(
                f"{path}: not a dataset of format {FORMAT_VERSION}: {key}: {first['msg']}; "
                "build the shards again with 'xdscale shards build'"
            ) from None

    def to_json(self) -> str:
        """Returns the text of `dataset.json`: sorted keys, so equal manifests are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON: the identity of the data a run was trained on."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


def members(columns: Sequence[Column]) -> list[str]:
    """Returns the names of the arrays that a block holds, in their order: the columns, then what tells rows apart."""
    offsets = dict.fromkeys(column.offsets for column in columns if column.offsets)
    return [*(column.name for column in columns), *offsets]


def canonical_json(value: object) -> bytes:
    """Returns `value` as UTF-8 JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _missing_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; make it with 'xdscale shards build INPUT... --out {folder}'"
    if (folder / ".build").is_dir():
        return f"{folder}: the build was not finished; run the same 'xdscale shards build' command again"
    return f"{folder}: has no {MANIFEST_NAME}; a folder written by 'xdscale shards build' was expected"
