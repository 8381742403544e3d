"""Tab-separated files, a line an image: bottom-up attention's and LXMERT's. Columns have no header."""

import codecs
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import count_of, no_text, shown
from xdscale.shards.sources.regions.fields import NAMES, image_of
from xdscale.shards.sources.regions.files import LinePlace, Reading, RegionFormat
from xdscale.shards.sources.regions.source import RegionImage

LONGEST_LINE = 1 << 28
"""Bytes of an image's line, at most: a thousand regions of 2,048 are 11 MB."""
_IDS = ("image_id", "img_id")


def each_line(path: Path, columns: int) -> Iterator[tuple[list[bytes], LinePlace]]:
    """Yields the first columns of each line that is not empty, and where it lies.

    Raises:
        XdscaleError: a line is too long to be an image.
    """
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:  # else it would stand in the first image's id
            file.seek(0)
        at = file.tell()
        for number in count(1):
            line = file.readline(LONGEST_LINE)
            if len(line) == LONGEST_LINE:
                raise XdscaleError(
                    f"{path.name}, line {number}: longer than {LONGEST_LINE:,} bytes; is it a TSV of regions?"
                )
            if not line:
                return
            if line.strip():
                yield line.rstrip(b"\r\n").split(b"\t", columns), LinePlace(number, at)
            at += len(line)


def lines_at(path: Path, places: Sequence[LinePlace]) -> Iterator[tuple[list[bytes], str]]:
    """Yields all columns of lines, and file and line in words."""
    with path.open("rb") as file:
        for line in places:
            file.seek(line.at)
            yield file.readline(LONGEST_LINE).rstrip(b"\r\n").split(b"\t"), f"{path.name}, line {line.number}"


def text_of(values: list[bytes], where: str) -> str:
    """Returns the text of a column.

    Raises:
        XdscaleError: it is not there, empty or no text.
    """
    try:
        if not values or not values[0]:
            raise XdscaleError(f"{where}: no image id")
        return values[0].decode()
    except UnicodeDecodeError:
        raise XdscaleError(
            f"{where}: image id: {shown(values[0])} is not UTF-8 text; is it a TSV of regions?"
        ) from None


def existing(path: Path) -> Path:
    """Returns a path that is a file, and not a compressed one: lines are read where they lie.

    Raises:
        XdscaleError: it is none.
    """
    if not path.is_file():
        raise XdscaleError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}; name the files themselves")
    if problem := no_text(path):
        raise XdscaleError(f"{path}: not a TSV of regions: {problem}")
    return path


class ButdTsv(RegionFormat):
    """Bottom-up attention: image_id, image_w, image_h, num_boxes, boxes, features."""

    columns: tuple[str, ...] = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.columns = reading.columns or self.columns
        known = {*_IDS, *(name for names in NAMES.values() for name in names)}
        for name in self.columns:
            if name not in known and name != "-":
                raise XdscaleError(
                    f"--columns: no column {name!r}; known are {', '.join(sorted(known))}, and - for any other"
                )
        if not set(_IDS) & set(self.columns):
            raise XdscaleError(f"--columns {','.join(self.columns)}: one of them must be image_id")
        self._id = next(place for place, name in enumerate(self.columns) if name in _IDS)

    def files(self, path: Path) -> list[Path]:
        """Returns the file itself."""
        return [existing(path)]

    def places(self, path: Path) -> Iterator[tuple[str, LinePlace]]:
        """Yields each line's id, and where it lies."""
        for values, line in each_line(path, self._id + 1):
            yield text_of(values[self._id : self._id + 1], f"{path.name}, line {line.number}"), line

    def read(self, path: Path, places: Sequence[LinePlace]) -> Iterator[RegionImage]:
        """Yields the images of lines."""
        for values, where in lines_at(path, places):
            yield self._image(values, where)

    def _image(self, values: list[bytes], where: str) -> RegionImage:
        if len(values) != len(self.columns):
            raise XdscaleError(
                f"{where}: {count_of(len(values), 'column')}, expected {len(self.columns)}: {', '.join(self.columns)} "
                "(--columns says others)"
            )
        fields = {name: value for name, value in zip(self.columns, values) if name != "-"}
        if values[self._id] == self.columns[self._id].encode():
            raise XdscaleError(f"{where}: names of columns; take this line away, and say their order with --columns")
        return image_of(fields, text_of([values[self._id]], where), where)


class LxmertTsv(ButdTsv):
    """LXMERT: height before width, and classes and attributes, of which none is background."""

    background = None
    columns = (
        "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
        "features",
    )  # fmt: skip
