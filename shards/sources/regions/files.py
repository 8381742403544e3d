"""Files of published features as images with regions: an index of what lies where, then units that workers read.

Units are cut by numbers of images, so that shards depend on the inputs alone. The process that cuts them holds
an index: a place for each image, and while ids are compared a hash.
"""

import hashlib
import os
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, is_text, read_json, shown
from xdscale.names import expand_home
from xdscale.shards.manifest import InputFile
from xdscale.shards.sources.regions.checks import check_jpeg
from xdscale.shards.sources.regions.source import RegionImage

_TRAILING_NUMBER = re.compile(r"0*(\d+)$")


@dataclass(frozen=True)
class Reading:
    """How files are read, where the format alone does not say.

    Attributes:
        columns: of a TSV, in their order; empty for the format's own.
        sizes: width and height of images by id, for formats that do not hold them; or one size of all.
        ids: what ids become: "as-given", their "stem" (no folder, no ending), or the "number" that they end with.
        jpegs: folder of the images themselves, ID.jpg, to be stored too.
        bad_images: "refuse" those whose file is not there or cannot be read, or "skip" them with a warning.
        class_names: of detections whose classes are named.
        objects: how many classes the detector has, background aside; 0 where that is not known.
    """

    columns: tuple[str, ...] = ()
    sizes: "ImageSizes | None" = None
    ids: Literal["as-given", "stem", "number"] = "as-given"
    jpegs: Path | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"
    class_names: tuple[str, ...] = ()
    objects: int = 0


class RegionFormat(ABC):
    """One format of files.

    Attributes:
        box_units: of its boxes.
        box_form: of its boxes.
        background: which class of its distributions is no object.
        reading: how files are to be read.
    """

    box_units: ClassVar[str] = "pixels"
    box_form: ClassVar[str] = "xyxy"
    background: ClassVar[int | None] = 0

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """Returns all files that are read of one input.

        Raises:
            XdscaleError: it is no input of this format.
        """

    @abstractmethod
    def places(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yields the id of each image of an input, and where it lies; picklable."""

    @abstractmethod
    def read(self, path: Path, places: Sequence[Any]) -> Iterator[RegionImage]:
        """Yields the images at these places."""


class LinePlace(NamedTuple):
    """Where a line lies: its number, counted from 1, and its first byte. Kept in 16 bytes."""

    number: int
    at: int


class _Places:
    """Where the images of an input lie. Lines, which are many, are kept as plain numbers."""

    def __init__(self) -> None:
        self._lines, self._others = array("q"), list[Any]()

    def __len__(self) -> int:
        return len(self._others) + len(self._lines) // 2

    def append(self, place: Any) -> None:
        if isinstance(place, LinePlace):
            self._lines.extend(place)
        else:
            self._others.append(place)

    def part(self, first: int, end: int) -> list[Any]:
        if self._others:
            return self._others[first:end]
        numbers = self._lines[2 * first : 2 * end]
        return list(map(LinePlace, numbers[::2], numbers[1::2]))


@dataclass
class ImageSizes:
    """Width and height of images that a format does not state; None for a name of images of several sizes."""

    name: str
    known: dict[str, tuple[int, int] | None] = field(repr=False)
    every: tuple[int, int] | None = None
    sha256: str = ""

    def of(self, image_id: str, where: str) -> tuple[int, int]:
        """Returns an image's width and height.

        Raises:
            XdscaleError: they are not known, or several images have this name.
        """
        for name in (image_id, PurePosixPath(image_id).stem, trailing_number(image_id)):
            if name in self.known:
                if (size := self.known[name]) is None:
                    raise XdscaleError(
                        f"{where}: image {shown(image_id)}: {self.name} (--sizes) has images of different sizes with "
                        f"the id or file name {name!r}; give a file that says id: [width, height]"
                    )
                return size
        if self.every is not None:
            return self.every
        raise XdscaleError(f"{where}: image {shown(image_id)}: its size does not stand in {self.name} (--sizes)")


def load_sizes(name: str) -> ImageSizes:
    """Reads `WIDTHxHEIGHT` of all images, COCO annotations with `images`, or a JSON object of id: [width, height].

    Raises:
        XdscaleError: it is none of these.
    """
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", name):
        return ImageSizes(name, {}, (int(match[1]), int(match[2])))
    path = Path(expand_home(name))
    if not is_text(path.name):
        raise XdscaleError(f"--sizes {name}: its name is not UTF-8 text; rename the file")
    values = read_json(path)
    known: dict[str, tuple[int, int] | None] = {}
    try:
        if "images" in values:
            for image in values["images"]:
                size = _side(image["width"]), _side(image["height"])
                names = [str(image["id"])]
                names += [PurePosixPath(image["file_name"]).stem] if "file_name" in image else []
                for key in names:
                    known[key] = size if known.get(key, size) == size else None
        else:
            known = {str(key): (_side(width), _side(height)) for key, (width, height) in values.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise XdscaleError(
            f"{path}: expected COCO's 'images' with id, width and height, or id: [width, height]: {error!r}"
        ) from None
    return ImageSizes(path.name, known, sha256=file_sha256(path))


def _side(value: Any) -> int:
    """Returns a width or height, a whole number as text or not."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{shown(value)} is not a whole number")
    return int(value)


def trailing_number(image_id: str) -> str | None:
    """Returns the number that an id (without its ending) ends with, without zeros before it."""
    match = _TRAILING_NUMBER.search(PurePosixPath(image_id).stem)
    return match and match[1]


class FileImages:
    """Images with regions in files of one format.

    Attributes:
        inputs: as `dataset.json` states them: one for each named file or folder, with all that is read of it.
        total_bytes: of all.

    Args:
        paths: files or folders, read in this order.
        format: of all of them.
        reading: how.
        shard_images: images per unit.

    Raises:
        XdscaleError: a file cannot be read or is of another format, two images have the same id, or one JPEG file would
            be that of two.
    """

    def __init__(self, paths: list[Path], format: RegionFormat, reading: Reading, shard_images: int) -> None:
        self._paths, self._format, self._reading, self._shard_images = paths, format, reading, shard_images
        try:
            self.inputs = [describe(path, format.files(path)) for path in paths]
            if reading.jpegs is not None:
                self.inputs.append(describe(reading.jpegs, sorted(reading.jpegs.glob("*.jpg"))))
            self._places = self._index()
        except OSError as error:
            raise XdscaleError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        self.total_bytes = sum(item.bytes for item in self.inputs)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what goes to other processes: not the index."""
        return {name: value for name, value in vars(self).items() if name != "_places"}

    def first(self) -> RegionImage:
        """Returns the first image, which shows which columns there are.

        Raises:
            XdscaleError: there is none.
        """
        for number, places in enumerate(self._places):
            for image in (one for at in range(len(places)) for one in self.images((number, places.part(at, at + 1)))):
                return image
        names = ", ".join(path.name for path in self._paths[:3])
        raise XdscaleError(f"{names}: no images with regions; is the format right?")

    def units(self, threads: int) -> Iterator[tuple[Any, int]]:
        """Yields (number of the input, places) of up to `shard_images` images."""
        before = 0
        for number, (places, item) in enumerate(zip(self._places, self.inputs)):
            for first in range(0, len(places), self._shard_images):
                some = places.part(first, first + self._shard_images)
                yield (number, some), before + item.bytes * (first + len(some)) // len(places)
            before += item.bytes

    def digest(self, work: tuple[int, list[Any]]) -> bytes:
        """Returns the hash of which images are in a unit; what they hold is in `inputs`."""
        return hashlib.sha256(repr(work).encode()).digest()

    def images(self, work: tuple[int, list[Any]]) -> Iterator[RegionImage]:
        """Yields the images of a unit, with the ids that were asked for."""
        number, places = work
        path, skips = self._paths[number], self._reading.bad_images == "skip"
        try:
            for image in self._format.read(path, places):
                try:
                    found = image._replace(jpeg=self._jpeg(image))
                    if skips and found.jpeg is not None:
                        check_jpeg(found)
                except XdscaleError as error:
                    if not skips:
                        raise
                    print(f"warning: left out: {error}", file=sys.stderr, flush=True)
                    continue
                yield found._replace(image_id=self._renamed(image.image_id, image.where))
        except OSError as error:
            raise XdscaleError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None

    def _index(self) -> list[_Places]:
        """Returns the places of all images of each input, after comparing their ids."""
        index: list[_Places] = []
        ids, files = bytearray(), bytearray()
        for path in self._paths:
            places = _Places()
            for number, (image_id, place) in enumerate(self._format.places(path), 1):
                ids += _hash(self._renamed(image_id, f"{path.name}, image {number}"))
                if self._reading.jpegs is not None:
                    file = self._jpeg_file(image_id)
                    files += _hash(f"{len(index)}/{number}" if file is None else file.name)
                places.append(place)
            index.append(places)
        lengths = [len(places) for places in index]
        if twins := _twins(ids):
            said = [self._described(image, lengths) for image in twins]
            raise XdscaleError(
                f"{said[1]}: image id: stands already in {said[0]}; ids must be unique: take one away"
                + ("" if self._reading.ids == "as-given" else f", or keep ids apart (--ids {self._reading.ids} now)")
            )
        if twins := _twins(files):
            said = [self._described(image, lengths) for image in twins]
            raise XdscaleError(
                f"{said[1]}: its file in {self._reading.jpegs} (--jpegs) is that of {said[0]} already, since files are "
                "found by what stands behind the last / of an id; import the two into tables of their own, each with "
                "the folder of its files"
            )
        return index

    def _described(self, image: int, lengths: list[int]) -> str:
        """Returns where an image stands, counted over all inputs of these lengths."""
        ends = np.cumsum(lengths)
        number = int(np.searchsorted(ends, image, side="right"))
        row = int(image - ends[number] + lengths[number])
        path = self._paths[number]
        name, place = next(islice(self._format.places(path), row, None))
        next(self._format.read(path, [place]))  # what is no image at all has a message that says more
        return f"{path.name}, image {row + 1} ({name})"

    def _renamed(self, image_id: str, where: str) -> str:
        if not is_text(image_id):
            raise XdscaleError(f"{where}: image id {shown(image_id)} is not UTF-8 text; rename the image")
        if self._reading.ids == "as-given":
            return image_id
        name = PurePosixPath(image_id).stem if self._reading.ids == "stem" else trailing_number(image_id)
        if not name:
            raise XdscaleError(f"{where}: image id {shown(image_id)} does not end with a number (--ids number)")
        return name

    def _jpeg(self, image: RegionImage) -> bytes | None:
        if self._reading.jpegs is None:
            return None
        if path := self._jpeg_file(image.image_id):
            return path.read_bytes()
        expected = self._reading.jpegs / PurePosixPath(image.image_id).name
        raise XdscaleError(
            f"{image.where}: image {shown(image.image_id)}: {expected}.jpg does not exist (--jpegs); "
            "--bad-images skip leaves such images out"
        )

    def _jpeg_file(self, image_id: str) -> Path | None:
        """Returns the file of an image among those of `--jpegs`; None where there is none."""
        name, folder = PurePosixPath(image_id).name, self._reading.jpegs
        files = (folder / name, folder / f"{name}.jpg", folder / f"{PurePosixPath(name).stem}.jpg")
        return next((path for path in files if os.path.isfile(path)), None)  # unlike Path.is_file for any name


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _twins(hashes: bytes) -> tuple[int, int] | None:
    """Returns the places of the first two equal ones of hashes of 8 bytes, by their value."""
    whole = np.frombuffer(bytes(hashes), np.uint64)
    order = np.argsort(whole, kind="stable")
    same = np.flatnonzero(whole[order][1:] == whole[order][:-1])
    return (int(order[same[0]]), int(order[same[0] + 1])) if same.size else None


def describe(path: Path, files: Sequence[Path]) -> InputFile:
    """Returns what `dataset.json` states of an input: of several files one hash of theirs, in their order."""
    hashes = [file_sha256(file) for file in files]
    if not files:
        raise XdscaleError(f"{path}: {'holds no .jpg files' if path.is_dir() else 'no such folder'} (--jpegs)")
    whole = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return InputFile(name=path.name, bytes=sum(file.stat().st_size for file in files), sha256=whole)
