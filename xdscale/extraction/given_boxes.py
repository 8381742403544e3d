"""Boxes that are given, not found: a grid, gold boxes of COCO and VCR, or proposals of one's own."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.extraction.pictures import Picture
from xdscale.files import file_sha256, read_bytes, read_json, require_real_file, shown
from xdscale.shards.manifest import InputFile
from xdscale.shards.sources.regions.decoding import from_json
from xdscale.shards.sources.regions.json_files import detection

VCR = "vcr"
_GRID = re.compile(r"grid:(\d{1,3})x(\d{1,3})")
_OUTSIDE = 2.0


class Given(NamedTuple):
    """Boxes of one image, float64 [n, 4] in pixels: left, top, right, bottom; confidences float32 [n], or None."""

    boxes: np.ndarray
    confidences: np.ndarray | None


class GivenBoxes:
    """Where the boxes of images come from.

    Attributes:
        name: as given.
        inputs: the file, for `dataset.json`; what lies beside the images belongs to them.

    Args:
        name: "grid:ROWSxCOLUMNS"; "vcr", the metadata file beside each image; or a JSON file: COCO's instances, a
            list of detections in COCO's form, or an object of image id (or file name): {"boxes": [[left, top, right,
            bottom], …], "scores": […]}.
        whole_image: put the whole image before the others, as region 0.

    Raises:
        XdscaleError: there is no such file, or it is none of these.
    """

    def __init__(self, name: str, *, whole_image: bool = False) -> None:
        self.name = name
        self.inputs: list[InputFile] = []
        self._whole_image = whole_image
        grid = _GRID.fullmatch(name)
        self._grid = None if grid is None else (int(grid[1]), int(grid[2]))
        self._by_image: dict[str, dict[str, Any]] = {}
        if self._grid is not None:
            if 0 in self._grid:
                raise XdscaleError(f"--boxes {name}: a grid has a row and a column at least")
        elif name != VCR:
            path = Path(name)
            if not path.is_file():
                raise XdscaleError(
                    f"--boxes {name}: no such file; expected grid:ROWSxCOLUMNS, vcr or a JSON file of boxes"
                )
            self._by_image = _by_image(path)
            self.inputs = [InputFile(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))]

    @property
    def vcr(self) -> bool:
        """Whether each image has its boxes beside it."""
        return self.name == VCR

    def of(self, picture: Picture, size: tuple[int, int]) -> Given:
        """Returns the boxes of an image, within it.

        Args:
            picture: which.
            size: its width and height.

        Raises:
            XdscaleError: it has none, or they are not boxes in an image of this size.
        """
        if self._grid is not None:
            boxes, scores = _grid(*self._grid, size), None
        else:
            boxes, scores = self._stated(picture, size)
        if self._whole_image:
            boxes = np.concatenate([[[0, 0, *size]], boxes])
            scores = None if scores is None else np.concatenate([[1], scores])
        if not len(boxes):
            raise XdscaleError(
                f"{picture.path}: has no box in {self.name}; with --whole-image every image has a region"
            )
        return Given(boxes, None if scores is None else scores.astype(np.float32))

    def _stated(self, picture: Picture, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        where = picture.path.with_suffix(".json") if self.vcr else Path(self.name)
        found = read_json(where) if self.vcr else self._of_file(picture)
        stated = found.get("width"), found.get("height")
        if None not in stated and stated != size:
            raise XdscaleError(
                f"{where}: image {picture.image_id!r} has {shown(stated[0])} × {shown(stated[1])} pixels there, but "
                f"{picture.path} has {size[0]} × {size[1]}"
            )
        try:
            rows = np.array(found["boxes"], np.float64)
            rows = rows if rows.size else np.zeros((0, 4 + self.vcr))
            scores = rows[:, 4] if self.vcr else found.get("scores")
            scores = None if scores is None else np.array(scores, np.float64)
            if rows.shape != (len(rows), 4 + self.vcr) or (scores is not None and scores.shape != (len(rows),)):
                raise ValueError(f"there they have the shape {rows.shape}")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise XdscaleError(
                f"{where}: image {picture.image_id!r}: expected 'boxes', each left, top, right, bottom"
                f"{', score' if self.vcr else ', and with each or none a score'}: {error!r}"
            ) from None
        return _within(rows[:, :4], size, f"{where}: image {picture.image_id!r}"), scores

    def check_distinct(self, pictures: Iterable[Picture]) -> None:
        """Checks that no two images take the same boxes of a file: those of one name in two folders would.

        Raises:
            XdscaleError: two do.
        """
        taken: dict[str, Picture] = {}
        for picture in pictures:
            name = self._name(picture)
            other = picture if name is None else taken.setdefault(name, picture)
            if other is not picture:
                raise XdscaleError(
                    f"{other.path} and {picture.path}: both would have the boxes of {name!r} in {self.name}; "
                    "name images there as --ids path does here, or extract one folder at a time"
                )

    def _name(self, picture: Picture) -> str | None:
        """Returns under which name the file has an image's boxes; None where it has none."""
        names = picture.image_id, picture.path.name, picture.path.stem
        return next((name for name in names if name in self._by_image), None)

    def _of_file(self, picture: Picture) -> dict[str, Any]:
        if (name := self._name(picture)) is not None:
            return self._by_image[name]
        example = next(iter(self._by_image), None)
        raise XdscaleError(
            f"{picture.path}: {self.name} has no boxes of {picture.image_id!r} or {picture.path.name!r}; "
            f"its images look like {example!r}"
        )


def _by_image(path: Path) -> dict[str, dict[str, Any]]:
    require_real_file(path)
    values = from_json(read_bytes(path), str(path))
    if isinstance(values, list):
        return _of_detections(path, values)
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected a JSON object or a list of detections, found {shown(values)}")
    if not {"images", "annotations"} <= values.keys():
        for name, found in values.items():
            if not isinstance(found, dict):
                raise XdscaleError(f"{path}: {shown(name)}: expected an object with 'boxes', or COCO's instances")
        return values
    boxes: dict[Any, list[list[float]]] = defaultdict(list)
    try:
        for annotation in values["annotations"]:
            left, top, width, height = annotation["bbox"]
            if not all(isinstance(side, int | float) for side in annotation["bbox"]):  # texts have a sum, too
                raise ValueError(f"bbox is {shown(annotation['bbox'])}")
            boxes[annotation["image_id"]].append([left, top, left + width, top + height])
        found = {
            str(image["file_name"]): {
                "boxes": boxes.get(image["id"], []),
                "width": image["width"],
                "height": image["height"],
            }
            for image in values["images"]
        }
        if unknown := boxes.keys() - {image["id"] for image in values["images"]}:
            raise ValueError(f"image_id {shown(min(unknown, key=str))} is not among the file's images")
        if len(found) < len(values["images"]):
            raise ValueError("two images have the same file_name")
        if len({image["id"] for image in values["images"]}) < len(found):
            raise ValueError("two images have the same id")
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise XdscaleError(
            f"{path}: expected COCO's instances: images with id, file_name, width and height, annotations with "
            f"image_id and bbox: {error!r}"
        ) from None


def _of_detections(path: Path, values: list[Any]) -> dict[str, dict[str, Any]]:
    """Returns boxes and scores by the number of the image."""
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"boxes": [], "scores": []})
    for number, one in enumerate(values):
        image_id, ((left, top, width, height), _, score) = detection(one, f"{path}, record {number}")
        if score is None:
            raise XdscaleError(f"{path}, record {number}: score: expected a number; all detections have one")
        found[image_id]["boxes"].append([left, top, left + width, top + height])
        found[image_id]["scores"].append(score)
    return dict(found)


def _grid(rows: int, columns: int, size: tuple[int, int]) -> np.ndarray:
    across, down = (np.linspace(0, side, count + 1) for side, count in zip(size, (columns, rows)))
    return np.array([[x1, y1, x2, y2] for y1, y2 in zip(down, down[1:]) for x1, x2 in zip(across, across[1:])])


def _within(boxes: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    """Returns boxes cut to the image; annotators' boxes reach out by a pixel or two."""
    over = np.concatenate([-boxes[:, :2], boxes[:, 2:] - size], axis=1)
    wrong = ~np.isfinite(boxes).all(axis=1) | (over > _OUTSIDE).any(axis=1) | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if wrong.any():
        number = int(np.argmax(wrong))
        values = ", ".join(f"{value:g}" for value in boxes[number])
        raise XdscaleError(
            f"{where}: box {number} is ({values}), expected left < right and top < bottom within {size[0]} × {size[1]}"
        )
    if len(boxes) and boxes.max() <= 1 < min(size):
        raise XdscaleError(f"{where}: boxes lie between 0 and 1: shares of the image; expected pixels")
    return np.clip(boxes, 0, [*size, *size])
