"""`dataset.json`: which tables a folder of shards holds, how each was built, and how they are linked."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from xdscale.errors import XdscaleError
from xdscale.files import is_text, require_real_file

MANIFEST_NAME = "dataset.json"
WORK_FOLDER = ".build"
PART_FILES = "part-*-of-*.json"
"""Both are there while a build is not finished."""
FORMAT_VERSION = 4
TABLE_MAKERS = {
    "text": "'xdscale shards build'",
    "captions": "'xdscale shards captions'",
    "regions": "'xdscale regions import' or 'xdscale regions extract'",
}
"""The commands that make tables, by the tables' names, for messages."""
ALL = "all"
"""The split of a table that is not split: rows of every split of another table may link to it."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Counts = dict[str, Count | list[Count]]
"""What a source counts, by name: numbers, and histograms."""
NAME = "^[a-z][a-z0-9_]*$"
Name = Annotated[str, Field(pattern=NAME)]


class ManifestSection(BaseModel):
    """A part of `dataset.json`: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(ManifestSection):
    """What a table holds for each row: an array of one shape, or any number of elements of one shape.

    Attributes:
        name: also of its members in a shard.
        dtype: of an element, in numpy's notation with byte order.
        shape: of a row; in a ragged column of each of a row's elements. May be empty.
        offsets: None for rows of one shape. For a ragged column the member that says where each row's elements begin
            and end; columns that have equally many elements in every row share it.
        fewest: elements of a row, at least.
        most: elements of a row, at most.
        rows_of: the table whose row numbers the values are: those of its split of the same name, or of `ALL`.
    """

    name: Name
    dtype: Annotated[str, Field(pattern=r"^(\|[iu]1|<[iuf][248])$")]
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(max_length=3)] = ()
    offsets: Name | None = None
    fewest: Count = 0
    most: Annotated[int, Field(gt=0)] | None = None
    rows_of: Name | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of a row, or in a ragged column of one element."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @model_validator(mode="after")
    def _links_are_row_numbers(self) -> Self:
        if self.rows_of is not None and np.dtype(self.dtype).kind != "u":
            raise ValueError(f"{self.name} holds rows of {self.rows_of}, so its dtype must be unsigned")
        return self


class InputFile(ManifestSection):
    """A file that a table was built from, by its content; only the last part of its path is kept."""

    name: str
    bytes: Count
    sha256: Sha256

    @field_validator("name")
    @classmethod
    def _can_be_stated(cls, value: str) -> str:
        if not is_text(value):  # said before the work, not when the file is written behind it
            raise XdscaleError(f"{value}: its name is not UTF-8 text, as {MANIFEST_NAME} is; rename the file")
        return value


class ShardRecord(ManifestSection):
    """One tar file of a split.

    Attributes:
        file: its name.
        rows: how many it holds.
        blocks: how many of them lie in it.
        bytes: of the file.
        sha256: of the file.
        elements: of all rows together, by the member that tells the rows of ragged columns apart.
        largest: row number of another table in each column that holds such.
    """

    file: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*-[0-9]{6,}\.tar$")]
    rows: Annotated[int, Field(gt=0, lt=2**40)]
    blocks: Annotated[int, Field(gt=0, lt=2**24)]
    bytes: Annotated[int, Field(gt=0)]
    sha256: Sha256
    elements: dict[str, Count] = {}
    largest: dict[str, Count] = {}


class Split(ManifestSection):
    """The shards of one split; rows are numbered through them in this order. `counts` are the source's."""

    rows: Count
    counts: Counts = {}
    shards: list[ShardRecord]

    @classmethod
    def of(cls, shards: list[ShardRecord], counts: Counts) -> Self:
        """Returns the split that shards make."""
        return cls(rows=sum(shard.rows for shard in shards), counts=counts, shards=shards)

    @property
    def elements(self) -> Counter[str]:
        """How many elements all rows have, by the member that tells rows of ragged columns apart."""
        return sum((Counter(shard.elements) for shard in self.shards), Counter())

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        found = sum(shard.rows for shard in self.shards)
        if found != self.rows:
            raise ValueError(f"rows is {self.rows}, but the shards hold {found}")
        return self


class TableManifest(ManifestSection):
    """One table.

    Attributes:
        build: all that decides the bytes of the shards; `source` says what it was built from, the rest is the source's.
        counts: of what the source read, kept and left out.
        columns: in the order in which they stand in each block.
        splits: by name.
    """

    build: dict[str, Any]
    counts: Counts = {}
    columns: Annotated[list[Column], Field(min_length=1)]
    splits: dict[Name, Split]

    @model_validator(mode="after")
    def _names_are_single(self) -> Self:
        if twice := _twice(members(self.columns)):
            raise ValueError(f"two columns, or a column and what tells rows apart, are named {twice}")
        return self

    @property
    def shards(self) -> list[ShardRecord]:
        """Those of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def payload_bytes(self, split: str) -> int:
        """Returns the bytes of a split's values alone: what a file without headers or offsets would need."""
        found = self.splits[split]
        counts = {None: found.rows, **found.elements}
        return sum(column.element_bytes * counts.get(column.offsets, 0) for column in self.columns)


class Manifest(ManifestSection):
    """The whole of `dataset.json`."""

    format_version: Literal[4] = FORMAT_VERSION
    tables: Annotated[dict[Name, TableManifest], Field(min_length=1)]

    @model_validator(mode="after")
    def _shards_are_single(self) -> Self:
        if twice := _twice([shard.file for shard in self.shards]):
            raise ValueError(f"{twice} stands twice in it")
        return self

    @model_validator(mode="after")
    def _links_hold(self) -> Self:
        for name, table in self.tables.items():
            for column in table.columns:
                for split in table.splits if column.rows_of else ():
                    try:
                        rows = self.linked_rows(column.rows_of, split)
                    except KeyError as error:
                        raise ValueError(f"{name}.{column.name}: links to {error.args[0]}") from None
                    for shard in table.splits[split].shards:
                        if (largest := shard.largest.get(column.name, 0)) >= rows:
                            raise ValueError(
                                f"{name}.{column.name}: {shard.file} links to row {largest} of {column.rows_of}, which "
                                f"has rows 0 to {rows - 1}"
                            )
        return self

    def linked_split(self, table: str, split: str) -> str:
        """Returns which split of a table the rows of another table's `split` link to.

        Raises:
            KeyError: there is no such table, or no such split; in words.
        """
        if table not in self.tables:
            raise KeyError(f"the table {table}, which is not there")
        found = next((name for name in (split, ALL) if name in self.tables[table].splits), None)
        if found is None:
            raise KeyError(f"the table {table}, which has neither a split {split} nor {ALL}")
        return found

    def linked_rows(self, table: str, split: str) -> int:
        """Returns how many rows there are for a link to a table from another table's `split`; errors as above."""
        found = self.linked_split(table, split)
        return self.tables[table].splits[found].rows

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `folder/dataset.json`.

        Raises:
            XdscaleError: the folder or the file is missing or invalid, or the build was not finished.
        """
        path = Path(folder) / MANIFEST_NAME
        require_real_file(path)
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

    def table(self, name: str | None, folder: Path) -> tuple[str, TableManifest]:
        """Returns a table by its name; without one, the only one.

        Raises:
            XdscaleError: no such table, or several and no name; `folder` stands in the message.
        """
        if name is None and len(self.tables) == 1:
            name = next(iter(self.tables))
        if name not in self.tables:
            missing = "several tables: say which one" if name is None else f"no table {name!r}"
            made = f" ({TABLE_MAKERS[name]} makes it)" if name in TABLE_MAKERS else ""
            raise XdscaleError(f"{folder}: {missing}{made}; the dataset has: {', '.join(sorted(self.tables))}")
        return name, self.tables[name]

    @property
    def shards(self) -> list[ShardRecord]:
        """Those of all tables."""
        return [shard for table in self.tables.values() for shard in table.shards]

    def only(self, names: Iterable[str]) -> Self:
        """Returns the dataset with these tables and all that they link to; others may come and go beside them."""
        kept: dict[str, TableManifest] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in kept:
                kept[name] = self.tables[name]
                waiting += [column.rows_of for column in kept[name].columns if column.rows_of]
        return type(self)(tables=kept)

    def to_json(self) -> str:
        """Returns the text of `dataset.json`: sorted keys, so equal manifests are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON: the identity of the data a run was trained on."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The same of each table, by name: so what a run was trained on can be told table by table."""
        tables = self.model_dump(mode="json")["tables"]
        return {name: hashlib.sha256(canonical_json(table)).hexdigest() for name, table in sorted(tables.items())}


def shard_prefix(table: str, split: str) -> str:
    """Returns what the names of a split's shards begin with; packed text, the oldest table, does without its name."""
    return split if table == "text" else f"{table}-{split}"


def members(columns: Sequence[Column]) -> list[str]:
    """Returns the names of the arrays that a block holds, in their order: the columns, then what tells rows apart."""
    offsets = dict.fromkeys(column.offsets for column in columns if column.offsets)
    return [*(column.name for column in columns), *offsets]


def add_counts(parts: Iterable[Mapping[str, int | list[int]]]) -> Counts:
    """Returns the sums of counts by name; histograms are as long as the longest."""
    total: Counts = {}
    for part in parts:
        for name, count in part.items():
            if isinstance(count, list):
                total[name] = [sum(pair) for pair in zip_longest(total.get(name, []), count, fillvalue=0)]
            else:
                total[name] = total.get(name, 0) + count
    return total


def canonical_json(value: object) -> bytes:
    """Returns `value` as UTF-8 JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _twice(names: Sequence[str]) -> str | None:
    """Returns the first name that stands more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _missing_message(folder: Path) -> str:
    made = f"'xdscale shards build INPUT... --out {folder}', or one of image regions with {TABLE_MAKERS['regions']}"
    if not folder.is_dir():
        return f"{folder}: no such folder; make it with {made}"
    if (folder / WORK_FOLDER).is_dir():
        return f"{folder}: the build was not finished; run the same command again"
    return f"{folder}: has no {MANIFEST_NAME}, so it is no dataset; make one with {made}"
