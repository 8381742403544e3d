"""One part of a build, as one machine of several makes it, and the file that says what it made.

All parts read the whole corpus, which is cheap, and so agree on the units and their numbers; part i of n tokenises
the units i, i + n, i + 2n and so on. A part's shards have their final names.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xdscale.errors import XdscaleError
from xdscale.files import replaced_when_complete
from xdscale.shards.manifest import Build
from xdscale.shards.unit import UnitRecord

PART_FILES = "part-*-of-*.json"


@dataclass(frozen=True)
class Part:
    """Part `index` of `of`, counted from 0."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "i/n".

        Raises:
            XdscaleError: anything else, or not 0 <= i < n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise XdscaleError(f"part {text!r}: expected i/n with i from 0 to n - 1, for example 0/8 to 7/8")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """As it stands in names of files."""
        return f"{self.index:05d}-of-{self.of:05d}"

    def has(self, unit_number: int) -> bool:
        """Tells whether a unit belongs to this part."""
        return unit_number % self.of == self.index


WHOLE = Part(0, 1)


class PartManifest(BaseModel):
    """What a finished part gave: the records of its units, in order; `units` counts those of all parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(gt=0)]
    units: Annotated[int, Field(ge=0)]
    build: Build
    records: list[UnitRecord]

    @property
    def part(self) -> Part:
        """Which part this is."""
        return Part(self.index, self.of)

    def numbered(self) -> list[tuple[int, UnitRecord]]:
        """Returns the records with the numbers of their units.

        Raises:
            ValueError: there are not as many as this part has units.
        """
        numbers = range(self.index, self.units, self.of)
        return list(zip(numbers, self.records, strict=True))

    def write(self, out: Path) -> None:
        """Writes the part's file into the folder of the dataset.

        Raises:
            OSError: it cannot be written.
        """
        with replaced_when_complete(out / f"part-{self.part.name}.json") as stream:
            stream.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")


def read_part_files(out: Path) -> list[PartManifest]:
    """Returns what the part files in a folder say, by index.

    Raises:
        XdscaleError: a file is damaged.
    """
    return sorted((_read(path) for path in out.glob(PART_FILES)), key=lambda manifest: manifest.index)


def require_all_parts(out: Path, parts: list[PartManifest]) -> None:
    """Checks that these are all parts of one build.

    Raises:
        XdscaleError: no parts, some missing (named), or of different builds.
    """
    if not parts:
        raise XdscaleError(f"{out}: holds no finished part; make them with 'xdscale shards build ... --part i/n'")
    first = parts[0]
    for other in parts[1:]:
        same = (other.of, other.units, other.build.identity()) == (first.of, first.units, first.build.identity())
        if not same:
            raise XdscaleError(
                f"{out}: part {other.index}/{other.of} is of another build than part {first.index}/{first.of} "
                "(other inputs, options or number of parts); build it again like the others"
            )
    missing = sorted(set(range(first.of)) - {manifest.index for manifest in parts})
    if missing:
        names = ", ".join(f"{index}/{first.of}" for index in missing)
        raise XdscaleError(f"{out}: parts that are missing or not finished: {names}; build them, then merge again")


def _read(path: Path) -> PartManifest:
    try:
        manifest = PartManifest.model_validate_json(path.read_bytes())
        manifest.numbered()
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise XdscaleError(f"{path}: cannot be read ({reason}); remove it and build this part again") from None
    return manifest
