"""JSON: VL-BERT's, a file for each image, and detections in COCO's form, all in one list."""

import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.shards.sources.regions.decoding import LARGEST_IMAGE_BYTES, from_json
from xdscale.shards.sources.regions.fields import image_of
from xdscale.shards.sources.regions.files import Reading, RegionFormat
from xdscale.shards.sources.regions.source import RegionImage

_SUFFIX = ".json"


class VlbertJson(RegionFormat):
    """VL-BERT: `ID.json` in a folder or zip: image_w, image_h, num_boxes, boxes, classes and features in base64."""

    def files(self, path: Path) -> list[Path]:
        """Returns all files of a folder, or the zip or JSON file."""
        if path.is_dir():
            return [path / name for name in _members(path)]
        if not path.is_file():
            raise XdscaleError(f"{path}: no such file or folder")
        return [path]

    def places(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yields ids and names of files."""
        for name in _members(path):
            yield PurePosixPath(name).name.removesuffix(_SUFFIX), name

    def read(self, path: Path, places: Sequence[str]) -> Iterator[RegionImage]:
        """Yields the images of files."""
        with _opened(path) as content:
            for name in places:
                where = name if path.is_dir() else path.name if path.suffix == _SUFFIX else f"{path.name}, {name}"
                fields = from_json(content(name), where)
                if not isinstance(fields, dict):
                    raise XdscaleError(f"{where}: expected a JSON object, found {shown(fields)}")
                yield image_of(fields, PurePosixPath(name).name.removesuffix(_SUFFIX), where)


class CocoDetections(RegionFormat):
    """Detections in COCO's form, without features: a list of image_id, category_id, bbox (xywh) and score."""

    box_form = "xywh"
    background = None

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        if reading.sizes is None:
            raise XdscaleError("detections do not say how large images are; name COCO's annotation file with --sizes")

    def files(self, path: Path) -> list[Path]:
        """Returns the file itself."""
        if not path.is_file():
            raise XdscaleError(f"{path}: no such file")
        return [path]

    def places(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yields ids, and the detections themselves: the file is one list, which is read whole."""
        found = from_json(path.read_bytes(), path.name)
        if isinstance(found, dict):
            found = found.get("annotations")
        if not isinstance(found, list):
            raise XdscaleError(
                f"{path.name}: expected a list of detections, or COCO's annotations, found {shown(found)}"
            )
        by_image: dict[str, list[tuple]] = defaultdict(list)
        for number, one in enumerate(found):
            image_id, row = detection(one, f"{path.name}, record {number}")
            by_image[image_id].append((number, *row))
        for image_id, rows in by_image.items():
            yield image_id, (image_id, rows)

    def read(self, path: Path, places: Sequence[Any]) -> Iterator[RegionImage]:
        """Yields the images, their detections in the order of the file."""
        for image_id, rows in places:
            where = f"{path.name}, record {rows[0][0]}"
            labels = {"object_ids": np.array([row[2] for row in rows])}
            scores = [row[3] for row in rows]
            if None not in scores:
                labels["confidences"] = np.array(scores, np.float64)
            boxes = np.array([row[1] for row in rows], np.float64)
            yield RegionImage(image_id, self.reading.sizes.of(image_id, where), boxes, labels=labels, where=where)


def detection(one: Any, where: str) -> tuple[str, tuple]:
    """Returns an image id, and (box as left, top, width and height, category, score or None).

    Args:
        one: a detection in COCO's form, or in MAttNet's.
        where: its place, for messages.

    Raises:
        XdscaleError: it is none.
    """
    if not isinstance(one, dict):
        raise XdscaleError(f"{where}: expected an object, found {shown(one)}")
    image_id, category, score = (one.get(name) for name in ("image_id", "category_id", "score"))
    box = one.get("bbox", one.get("box"))  # as MAttNet calls it
    if not isinstance(image_id, str | int) or isinstance(image_id, bool):
        raise XdscaleError(f"{where}: image_id: expected a number or a text, found {shown(image_id)}")
    if not isinstance(category, int) or isinstance(category, bool) or not 0 <= category < 2**16:
        raise XdscaleError(f"{where}: category_id: expected a number, found {shown(category)}")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise XdscaleError(f"{where}: bbox: expected left, top, width, height, found {shown(box)}")
    if score is not None and not _is_number(score):
        raise XdscaleError(f"{where}: score: expected a number, found {shown(score)}")
    return str(image_id), (box, category, score)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _members(path: Path) -> list[str]:
    """Returns the names of all JSON files in a folder or zip, sorted; or of the one file."""
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.name.endswith(_SUFFIX))
    elif path.suffix == _SUFFIX:
        names = [path.name]
    else:
        with _archive(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(_SUFFIX))
    if not names:
        raise XdscaleError(f"{path}: holds no {_SUFFIX} files of images")
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Gives the function that returns the content of a file."""
    if path.is_dir() or path.suffix == _SUFFIX:
        yield lambda name: (path / name if path.is_dir() else path).read_bytes()
        return
    with _archive(path) as archive:

        def content(name: str) -> bytes:
            if archive.getinfo(name).file_size > LARGEST_IMAGE_BYTES:
                raise XdscaleError(f"{path.name}, {name}: larger than {LARGEST_IMAGE_BYTES:,} bytes")
            return archive.read(name)

        yield content


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
        # The second is zipfile's for a compression that it does not know, the fourth for a password.
        raise XdscaleError(f"{path}: expected a folder, a .zip or a .json file of images: {one_line(error)}") from None
