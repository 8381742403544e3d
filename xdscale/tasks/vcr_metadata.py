"""What VCR's metadata files say of images: boxes and outlines of objects, and whether a table of regions has these."""

import hashlib
import os
from pathlib import Path
from typing import (
    Annotated,
    NamedTuple,
    NotRequired,  # pydantic needs this one on Python 3.11
)

import numpy as np
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from xdscale.data.json_shapes import read_whole
from xdscale.data.outlines import SIDE, object_mask
from xdscale.errors import XdscaleError
from xdscale.files import shown

_Pixels = Annotated[float, Field(ge=-1e6, le=1e6)]
"""A coordinate: of an object that its image shows in part, outside of it; far from any image nothing is meant."""
_Side = Annotated[int, Field(ge=1, le=1_000_000)]
_OUTSIDE = 2.0
"""Pixels by which a box may reach out of its image, as in `xdscale.extraction`."""
_APART = 2.0
"""Pixels of the smaller of two images by which a table's box may differ: for fp16, whole numbers, a side one longer."""
ORDER = "the whole image, then the boxes of its metadata in their order"
"""Which regions an image must have."""


class _Boxes(TypedDict):
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    names: list[str]
    boxes: list[list[_Pixels]]
    width: _Side
    height: _Side


class _Metadata(_Boxes):
    segms: NotRequired[list[list[list[tuple[_Pixels, _Pixels]]]]]


class _Outlines(TypedDict):
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    boxes: list[list[_Pixels]]
    segms: list[list[list[tuple[_Pixels, _Pixels]]]]


class VCRMetadata(NamedTuple):
    """What is kept of an image's metadata.

    Attributes:
        sha256: of the file.
        size: width and height of the image.
        boxes: float32 [1 + objects, 4], the whole image and the objects, as shares of width and height.
        outlined: how many objects have an outline of three points or more; None where the file has no outlines that
            can be read, without which features can be.
    """

    sha256: str
    size: tuple[int, int]
    boxes: np.ndarray
    outlined: int | None


def read_metadata(path: Path) -> tuple[list[str], VCRMetadata]:
    """Returns the names of an image's objects, and what is kept of its metadata.

    Raises:
        XdscaleError: the file cannot be read, numbers of things in it differ, or a box is none.
    """
    digest = hashlib.sha256()
    try:
        found = read_whole(path, _Metadata, digest)
    except XdscaleError:  # perhaps of outlines alone, of which `outlines_sha256` tells those who read them
        digest = hashlib.sha256()
        found = read_whole(path, _Boxes, digest)
    names, boxes, outlines = found["names"], found["boxes"], found.get("segms")
    width, height = size = found["width"], found["height"]
    if len(boxes) != len(names):
        raise XdscaleError(f"{path}: {len(boxes)} boxes, but {len(names)} names")
    for number, box in enumerate(boxes):
        if len(box) != 5 or not (
            0 <= box[0] < box[2] <= width + _OUTSIDE and 0 <= box[1] < box[3] <= height + _OUTSIDE
        ):
            raise XdscaleError(
                f"{path}: boxes[{number}] = {shown(box)}; expected x1 < x2, y1 < y2 and a score, within "
                f"{width} × {height} pixels"
            )
    shares = np.array([[0, 0, *size], *(box[:4] for box in boxes)], np.float32) / np.array([*size, *size], np.float32)
    outlined = None
    if outlines is not None and len(outlines) == len(names):
        outlined = sum(any(len(one) > 2 for one in mine) for mine in outlines)
    return names, VCRMetadata(digest.hexdigest(), size, np.clip(shares, 0, 1), outlined)


def require_boxes(where: str, boxes: np.ndarray, size: np.ndarray, path: Path, stated: VCRMetadata) -> None:
    """Refuses regions of a table that are not those of the metadata: words and masks would be of other objects.

    Args:
        where: question and image, for the message.
        boxes: float32 [1 + objects, 4], of the table.
        size: uint16 [2], width and height of the image there.
        path: of the metadata.
        stated: what was found there.

    Raises:
        XdscaleError: a box is another one.
    """
    shares = np.clip(boxes / np.tile(size, 2), 0, 1)
    apart = np.abs(shares - stated.boxes) * np.tile(np.minimum(size, stated.size), 2)
    if (apart > _APART).any():
        number = int(apart.max(1).argmax())
        ours, theirs = (", ".join(f"{share:.1%}" for share in of[number]) for of in (shares, stated.boxes))
        raise XdscaleError(
            f"{where}: region {number} in the table is ({ours}) of its width and height, but ({theirs}) in {path}; "
            f"expected {ORDER}: make the table of these metadata, with 'xdscale regions extract … --boxes vcr "
            "--whole-image'"
        )


def outlines_sha256(metadata: dict[Path, VCRMetadata | None]) -> str:
    """Returns the SHA-256 (hex) of files, in the order of their names.

    Raises:
        XdscaleError: one of them is not there, or has no outlines that can be read.
    """
    digest = hashlib.sha256()
    for path, stated in sorted(metadata.items()):
        if stated is None:
            raise _lost(path)
        if stated.outlined is None:
            read_masks(path, len(stated.boxes) - 1, stated, centres=False)  # which says what is wrong
        digest.update(bytes.fromhex(stated.sha256))
    return digest.hexdigest()


def outline_notes(metadata: dict[Path, VCRMetadata]) -> list[str]:
    """Returns how many objects have no outline to speak of, if any.

    Raises:
        XdscaleError: none has one.
    """
    objects = sum(len(stated.boxes) - 1 for stated in metadata.values())
    bare = {path: len(stated.boxes) - 1 - stated.outlined for path, stated in metadata.items()}
    if not (count := sum(bare.values())):
        return []
    first = next(path for path, number in bare.items() if number)
    told = f"{count:,} of {objects:,} objects have no outline of three points or more, the first in {first}"
    if count == objects:
        raise XdscaleError(f"{told}; masks of objects would hide all of them: is the download whole?")
    return [f"{told}; their masks are empty, or nearly so"]


def read_masks(path: Path, objects: int, stated: VCRMetadata | None, *, centres: bool) -> np.ndarray:
    """Returns which places of each object's box show it: bool [objects, 14, 14].

    Args:
        path: of the metadata.
        objects: how many there are.
        stated: what was found in the file before.
        centres: see `xdscale.data.outlines.object_mask`.

    Raises:
        XdscaleError: the file is not there, has not the outlines of these objects, or was changed.
    """
    if not os.path.isfile(path):
        raise _lost(path)
    digest = hashlib.sha256()
    found = read_whole(path, _Outlines, digest)
    if stated is not None and digest.hexdigest() != stated.sha256:
        raise XdscaleError(f"{path}: was changed since the task was read; start again, from the beginning")
    boxes, outlines = found["boxes"], found["segms"]
    if not len(boxes) == len(outlines) == objects or any(len(box) < 4 for box in boxes):
        raise XdscaleError(f"{path}: {len(boxes)} boxes and {len(outlines)} segms; the question has {objects} objects")
    polygons = [[np.array(one) for one in mine if one] for mine in outlines]
    masks = [object_mask(mine, box[:4], centres=centres) for box, mine in zip(boxes, polygons)]
    return np.array(masks, bool).reshape(-1, SIDE, SIDE)


def _lost(path: Path) -> XdscaleError:
    return XdscaleError(f"{path}: no such file; unpack vcr1images.zip, which has the outlines of objects, there")
