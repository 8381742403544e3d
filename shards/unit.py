"""A unit of work: some consecutive documents that become at most one shard per split.

Units do not know of each other, so any number of workers gives the same bytes. A finished unit leaves a record;
a build that was killed and started again redoes only the units whose record or shards are missing or torn.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, replaced_when_complete
from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.corpus import Document, sort_out
from xdscale.shards.manifest import Build, Corpus, ShardRecord, add_counts, canonical_json
from xdscale.shards.pack import Packed, Packer, is_validation, text_columns
from xdscale.shards.words import count_words
from xdscale.shards.writer import write_shard

WORK_FOLDER = ".build"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Unit:
    """Consecutive documents; `bytes_read` is how much of all inputs had been read after the last of them."""

    number: int
    documents: list[Document]
    bytes_read: int


class UnitSplit(BaseModel):
    """One split's share of a unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language_tokens: Annotated[int, Field(gt=0)]
    clip_tokens: Annotated[int, Field(gt=0)]
    blocks_needed: list[int]
    shard: ShardRecord


class UnitRecord(BaseModel):
    """What a finished unit gave. `key` is the hash of everything that went in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    corpus: Corpus
    splits: dict[str, UnitSplit]


def group_units(documents: Iterable[tuple[Document, int]], unit_text_bytes: int) -> Iterator[Unit]:
    """Groups (document, bytes read so far) to units of at least `unit_text_bytes` of UTF-8 text."""
    number, size = 0, 0
    collected: list[Document] = []
    bytes_read = 0
    for document, bytes_read in documents:
        collected.append(document)
        size += len(document.text.encode("utf-8"))
        if size >= unit_text_bytes:
            yield Unit(number, collected, bytes_read)
            number, size, collected = number + 1, 0, []
    if collected:
        yield Unit(number, collected, bytes_read)


class UnitBuilder:
    """Builds units; one per process, because the tokenizers are loaded once.

    Args:
        out: the folder of the dataset; its work folder exists.
        build: what the manifest will state.
        tokenizer: the one that `build` names, as `load_language_tokenizer` gives it.
    """

    def __init__(self, out: Path, build: Build, tokenizer: Tokenizer) -> None:
        self._out = out
        self._build = build
        self._tokenizer = tokenizer
        self._clip = ClipBPE()

    def __call__(self, unit: Unit) -> tuple[UnitRecord, bool]:
        """Returns the unit's record, and whether it was kept from an earlier build.

        Raises:
            XdscaleError: the shard cannot be written, or the text cannot be read.
        """
        key = self._key(unit)
        record_path = self._out / WORK_FOLDER / f"unit-{unit.number:06d}.json"
        kept = self._kept(record_path, key)
        if kept is not None:
            return kept, True
        try:
            record = self._write(unit, key)
            with replaced_when_complete(record_path) as stream:
                stream.write(record.model_dump_json().encode("utf-8"))
        except OSError as error:
            raise XdscaleError(
                f"{self._out}: cannot be written: {error.strerror or error}; finished shards are kept: "
                "mend it and run the same command again"
            ) from None
        return record, False

    def _key(self, unit: Unit) -> str:
        digest = hashlib.sha256(canonical_json(self._build.identity()))
        for document in unit.documents:
            text = document.text.encode("utf-8")
            digest.update(f"{document.format} {len(text)} ".encode())
            digest.update(text)
        return digest.hexdigest()

    def _kept(self, record_path: Path, key: str) -> UnitRecord | None:
        """Returns the record of an earlier build if it and its shards are whole and of the same input."""
        try:
            record = UnitRecord.model_validate_json(record_path.read_bytes())
            shards = [split.shard for split in record.splits.values()]
            whole = all(file_sha256(self._out / shard.file) == shard.sha256 for shard in shards)
        except (OSError, ValidationError):
            return None
        return record if whole and record.key == key else None

    def _write(self, unit: Unit, key: str) -> UnitRecord:
        build = self._build
        packers = {
            split: Packer(
                self._tokenizer,
                self._clip,
                sequence_length=build.sequence_length,
                clip_blocks=build.clip_blocks,
            )
            for split in SPLITS
        }
        counts: Counter[str] = Counter()
        for document in unit.documents:
            kept, left_out = sort_out(document.text, document.format, build.min_words)
            validation = is_validation(kept, build.validation_fraction)
            packers["validation" if validation else "train"].add(kept)
            counts.update(
                paragraphs=len(kept),
                words=sum(map(count_words, kept)),
                text_bytes=sum(len(paragraph.encode("utf-8")) for paragraph in kept),
                joined_documents=document.joined,
                bad_bytes=document.bad_bytes,
                **asdict(left_out),
            )
        packed = {split: packer.finish() for split, packer in packers.items()}
        return UnitRecord(
            key=key,
            corpus=Corpus(
                documents=len(unit.documents),
                dropped_tokens=sum(item.dropped_tokens for item in packed.values()),
                document_tokens=add_counts(item.document_tokens for item in packed.values()),
                **counts,
            ),
            splits={
                split: self._write_split(split, unit.number, item)
                for split, item in packed.items()
                if len(item.language)
            },
        )

    def _write_split(self, split: str, number: int, packed: Packed) -> UnitSplit:
        shard = write_shard(
            self._out / f"{split}-{number:06d}.tar",
            text_columns(self._build.sequence_length, self._build.clip_blocks),
            {"language": packed.language, "clip": packed.clip, "clip_offsets": packed.clip_offsets},
            self._build.block_rows,
        )
        return UnitSplit(
            language_tokens=packed.language.size,
            clip_tokens=len(packed.clip),
            blocks_needed=packed.blocks_needed,
            shard=shard,
        )
