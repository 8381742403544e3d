"""Image regions as a table: what it holds, how it says where they came from, and how they are read.

One row per image, in the order of the source. A dataset has one such table, `regions`; text tables link to its rows.
Light to import. What makes such a table is in `xdscale.shards.sources.regions`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import ALL, Column, Count, InputFile, ManifestSection, Sha256
from xdscale.shards.region_encoding import KEPT_CLASSES, LARGEST_ERROR, expand, whole_distributions
from xdscale.shards.table import Table

REGIONS = "regions"
"""Name of the table, and of the source."""
LABELS = ("confidences", "object_ids", "attribute_ids", "attribute_confidences")
"""Columns of one value per region that a source may have."""
_LABEL_TYPES = dict(zip(LABELS, ("<f4", "<u2", "<u2", "<f4")))
_IDS_AT_ONCE = 1 << 16


class Detector(ManifestSection):
    """What found the regions and computed their features.

    Attributes:
        model: what it is called.
        sha256: of its weights, where they are known.
        classes: names of its classes, in the order of class ids and of distributions; empty where nobody says them.
        attributes: the same of its attributes.
        class_count: how many classes a class id or a distribution counts; 0 where that is not known.
        attribute_count: the same of attributes.
        background: which of the classes is no object; None where there is none.
        settings: what else it was run with, such as thresholds.
    """

    model: Annotated[str, Field(min_length=1)]
    sha256: Sha256 | None = None
    classes: list[str] = []
    attributes: list[str] = []
    class_count: Count = 0
    attribute_count: Count = 0
    background: Count | None = None
    settings: dict[str, Any] = {}


class RegionLayout(ManifestSection):
    """Which columns a table of regions has.

    Attributes:
        width: of a region's features; 0 where there are boxes alone.
        encoding: of features: "fp16", or "u8", companded bytes.
        largest_error: relative L2 error of each region's features by companding, at most; 0 without.
        class_probs: "all" of each region's distribution, "top-64" with the rest spread equally, or "none".
        probabilities: how many a distribution has; 0 without.
        labels: those of `LABELS` that are there.
        jpeg: whether the images themselves are there.
    """

    width: Count
    encoding: Literal["fp16", "u8"] = "fp16"
    largest_error: Annotated[float, Field(ge=0, le=1)] = Field(
        default_factory=lambda known: LARGEST_ERROR * (known.get("encoding") == "u8")
    )
    class_probs: Literal["none", "all", "top-64"] = "none"
    probabilities: Annotated[int, Field(ge=0, le=2**16)] = 0
    labels: tuple[Literal["confidences", "object_ids", "attribute_ids", "attribute_confidences"], ...] = ()
    jpeg: bool = False

    @property
    def columns(self) -> list[Column]:
        """Those of the table; all that is said of regions shares one member of offsets."""

        def of_regions(name: str, dtype: str, *shape: int) -> Column:
            return Column(name=name, dtype=dtype, shape=shape, offsets="region_offsets", fewest=1)

        columns = []
        if self.width and self.encoding == "u8":
            columns = [of_regions("features", "|u1", self.width), of_regions("scales", "<f4")]
        elif self.width:
            columns = [of_regions("features", "<f2", self.width)]
        columns.append(of_regions("boxes", "<f4", 4))
        columns += [of_regions(name, _LABEL_TYPES[name]) for name in LABELS if name in self.labels]
        if self.class_probs == "top-64":
            columns += [of_regions("class_ids", "<u2", KEPT_CLASSES), of_regions("class_probs", "<f2", KEPT_CLASSES)]
        elif self.class_probs == "all":
            columns.append(of_regions("class_probs", "<f2", self.probabilities))
        columns.append(Column(name="sizes", dtype="<u2", shape=(2,)))
        columns.append(Column(name="image_ids", dtype="|u1", offsets="id_offsets", fewest=1))
        if self.jpeg:
            columns.append(Column(name="jpeg", dtype="|u1", offsets="jpeg_offsets", fewest=1))
        return columns


class RegionBuild(RegionLayout):
    """All that decides the bytes of a table of regions.

    Attributes:
        format: of the inputs; "extracted" where a network of ours made the regions.
        inputs: the files.
        options: how they were read, such as the order of columns, or extracted.
        detector: what found the regions.
        box_form: of the source: "xyxy" (left, top, right, bottom) or "xywh" (left, top, width, height).
        box_units: of the source: "pixels", or "shares" of the image's width and height.
        region_order: the source's, which is kept: "confidence" where that of regions falls, else "source".
        whole_image: "first" where region 0 of each image is the whole image, else "none".
        shard_images: images per shard.
    """

    source: Literal["regions"] = REGIONS
    format: str
    inputs: list[InputFile]
    options: dict[str, Any] = {}
    detector: Detector
    box_form: Literal["xyxy", "xywh"] = "xyxy"
    box_units: Literal["pixels", "shares"] = "pixels"
    region_order: Literal["source", "confidence"] = "source"
    whole_image: Literal["none", "first"] = "none"
    shard_images: Annotated[int, Field(gt=0, lt=2**31)] = 1024

    @property
    def whole_image_first(self) -> bool:
        """Whether region 0 of each image is the whole image."""
        return self.whole_image == "first"


class Regions(NamedTuple):
    """Regions of several images, one image after the other.

    Attributes:
        features: float16 or float32 [total, width]; width 0 where the table has boxes alone.
        boxes: float32 [total, 4], in pixels: left, top, right, bottom.
        confidences: float32 [total]; 1 where the table has none.
        sizes: uint16 [n, 2], width and height of each image.
        offsets: int64 [n + 1]; image i owns regions `offsets[i]` to `offsets[i + 1] - 1`.
    """

    features: np.ndarray
    boxes: np.ndarray
    confidences: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray


class RegionTable:
    """The regions of a dataset.

    Attributes:
        table: what is read, with all its columns.
        build: how it was made.
        width: of a region's features.

    Args:
        table: the table `regions`, for example `captions.linked("image")`.

    Raises:
        XdscaleError: `dataset.json` does not say how the table was made.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        try:
            self.build = RegionBuild.model_validate(table.manifest.tables[table.name].build)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise XdscaleError(
                f"{table.folder}: {table.name} is not a table of image regions: build.{key}: {first['msg']}; "
                "make one with 'xdscale regions import' or 'xdscale regions extract'"
            ) from None
        self.width = self.build.width
        found, stated = list(table.columns.values()), self.build.columns
        if found != stated:
            raise XdscaleError(
                f"{table.folder}: {table.name} has the columns {', '.join(table.columns)}, but its build those of "
                f"{', '.join(column.name for column in stated)}, or of other types: make the table again"
            )

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens the table `regions` of a dataset.

        Raises:
            XdscaleError: there is none.
        """
        return cls(Table(folder, ALL, REGIONS))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex): the identity of the data."""
        return self.table.fingerprint

    def find(self, image_ids: Sequence[str]) -> np.ndarray:
        """Returns the rows of images, -1 for those that are not there: int64 [n].

        The first call reads the ids of all images, and keeps 16 bytes of each.
        """
        hashes, order = self._index
        wanted = np.array([_hash(name.encode()) for name in image_ids], np.uint64)
        place = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        return np.where(hashes[place] == wanted, order[place], -1)

    def rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """Returns the rows of images, as `find`: int64 [n].

        Raises:
            XdscaleError: images are not in the table: names the first of them, and the form in which it has one.
        """
        found = self.find(image_ids)
        if (found < 0).any():
            missing = [name for name, row in zip(image_ids, found) if row < 0]
            raise XdscaleError(self._missing(list(dict.fromkeys(missing))))
        return found

    def image_ids(self, rows: np.ndarray) -> list[str]:
        """Returns the ids of images."""
        values, offsets = self.table.read_ragged("image_ids", rows)
        whole, bounds = values.tobytes(), offsets.tolist()
        try:
            return [whole[first:end].decode() for first, end in zip(bounds, bounds[1:])]
        except UnicodeDecodeError as error:
            raise XdscaleError(
                f"{self.table.folder}: an image's id in {self.table.name} is not text ({error}): a shard is damaged "
                "('xdscale shards verify' finds it)"
            ) from None

    def read(self, rows: np.ndarray, *, boxes_only: bool = False) -> Regions:
        """Returns the regions of images, in the order of `rows`; errors as `Table.read_ragged`.

        Args:
            rows: int64 [n], any order, repeats allowed.
            boxes_only: leave features out, which are most of the bytes: then their width is 0.
        """
        boxes, offsets = self.table.read_ragged("boxes", rows)
        if boxes_only or not self.width:
            features = np.empty((len(boxes), 0), np.float16)
        else:
            features = self.table.read_ragged("features", rows).values
            if "scales" in self.table.columns:
                features = expand(features, self.table.read_ragged("scales", rows).values)
        if "confidences" in self.table.columns:
            confidences = self.table.read_ragged("confidences", rows).values
        else:
            confidences = np.ones(len(boxes), np.float32)
        return Regions(features, boxes, confidences, self.table.read("sizes", rows), offsets)

    def class_probs(self, rows: np.ndarray) -> np.ndarray:
        """Returns the class distributions of all regions of images: float32 [total, classes].

        Raises:
            XdscaleError: the table has none, or as `Table.read_ragged`.
        """
        probs = self.table.read_ragged("class_probs", rows).values
        if self.build.class_probs == "all":
            return probs.astype(np.float32)
        ids = self.table.read_ragged("class_ids", rows).values
        return whole_distributions(ids, probs, self.build.probabilities)

    def prefetch(self, rows: np.ndarray) -> None:
        """Says that these rows will be read soon; as `Table.prefetch`."""
        self.table.prefetch(rows)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all ids, ascending, and their rows: uint64 and int64 [rows]."""
        hashes = np.empty(len(self), np.uint64)
        for first in range(0, len(self), _IDS_AT_ONCE):
            some = np.arange(first, min(first + _IDS_AT_ONCE, len(self)))
            hashes[some] = [_hash(name.encode()) for name in self.image_ids(some)]
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _missing(self, names: list[str]) -> str:
        shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
        return f"{self.table.folder}: the table of regions has no image {shown}; {self.hint(names[:1])}"

    def hint(self, names: Sequence[str]) -> str:
        """Returns what to do about an image that is not there.

        Args:
            names: what it is called; the first one that the table has in another form is told with that.
        """
        pairs = ((name, form) for name in names for form in other_forms(name) if self.find([form])[0] >= 0)
        name, form = next(pairs, (None, None))
        if form is None:
            known = f"its ids look like {self.image_ids(np.array([0]))[0]!r}"
        elif unicodedata.is_normalized("NFC", form) != unicodedata.is_normalized("NFC", name):
            known = f"it has {form!a} for {name!a}, its letters in another form of Unicode"  # shown, they look alike
        else:
            known = f"it has {form!r} for {name!r}"
        return f"{known}: name images as it does, or make it again with other ids ('xdscale regions import --ids')"


def other_forms(name: str) -> list[str]:
    """Returns other names of the same image that are in use.

    They are without folder and ending, its number alone, COCO's, and with accents as macOS writes them or as others do.
    """
    stem = PurePosixPath(name).stem
    forms = [PurePosixPath(name).name, stem, f"{stem}.jpg"]
    if number := re.search(r"(\d+)$", stem):
        short = number[1].lstrip("0") or "0"
        long = short.zfill(12)
        forms += [short, long, f"{long}.jpg"]
        for split in ("train2014", "val2014", "test2015"):
            forms += [f"COCO_{split}_{long}", f"COCO_{split}_{long}.jpg", f"coco_{split}_{long}"]
    forms += [unicodedata.normalize(kind, form) for form in [name, *forms] for kind in ("NFC", "NFD")]
    return list(dict.fromkeys(form for form in forms if form != name))


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
