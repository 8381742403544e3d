"""An image from the named fields that most formats have, whatever they call them and however they hold arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import shown
from xdscale.shards.sources.regions.decoding import from_base64
from xdscale.shards.sources.regions.source import RegionImage

NAMES = {
    "width": ("image_w", "image_width", "img_w", "width"),
    "height": ("image_h", "image_height", "img_h", "height"),
    "regions": ("num_boxes", "num_bbox"),
    "boxes": ("boxes", "bbox"),
    "features": ("features", "x"),
    "class_probs": ("classes", "cls_prob", "soft_labels"),
    "object_ids": ("objects_id", "objects"),
    "confidences": ("objects_conf", "conf"),
    "attribute_ids": ("attrs_id",),
    "attribute_confidences": ("attrs_conf",),
}
"""What a field is called in one format or another."""
_BASE64_TYPES = {"object_ids": "<i8", "attribute_ids": "<i8"}
_MOST_REGIONS = 2**16


def image_of(
    fields: Mapping[str, Any],
    image_id: str,
    where: str,
    size: tuple[int, int] | None = None,
    *,
    background_left_out: bool = False,
) -> RegionImage:
    """Returns the image that fields describe.

    Args:
        fields: by the names of `NAMES`; arrays, or base64 of little-endian float32 (of int64 for ids).
        image_id: of the image.
        where: file and row, for messages.
        size: width and height, where no field says them.
        background_left_out: whether distributions, and counts of classes, leave the background out: what is missing to
            1. It becomes class 0.

    Raises:
        XdscaleError: a field is missing, of another kind, or of a length that is not the number of regions.
    """
    found = {name: fields[other] for name, names in NAMES.items() for other in names[::-1] if other in fields}
    if size is None:
        size = whole_number(found, "width", where), whole_number(found, "height", where)
    if "boxes" not in found:
        raise XdscaleError(f"{where}: no field of boxes; it has {', '.join(map(str, list(fields)[:12])) or 'none'}")
    stated = whole_number(found, "regions", where) if "regions" in found else None
    arrays = {
        name: array_of(value, name, where)
        for name, value in found.items()
        if name not in ("width", "height", "regions")
    }
    regions = _count(arrays["boxes"], stated, where)
    for name, array in arrays.items():
        arrays[name] = _rows(array, regions, name, where)
    probs = arrays.pop("class_probs", None)
    if probs is not None and background_left_out:
        probs = np.concatenate([np.maximum(1 - probs.sum(axis=1, keepdims=True), 0), probs], axis=1)
        if "object_ids" in arrays:
            arrays["object_ids"] = arrays["object_ids"] + 1
    return RegionImage(
        image_id=image_id,
        size=size,
        boxes=arrays.pop("boxes"),
        features=arrays.pop("features", None),
        class_probs=probs,
        labels=arrays,
        where=where,
    )


def whole_number(fields: Mapping[str, Any], name: str, where: str) -> int:
    """Returns a field that is a whole number, as text or not.

    Raises:
        XdscaleError: it is missing or no such number.
    """
    if name not in fields:
        raise XdscaleError(f"{where}: no field of the {name}; expected one of {', '.join(NAMES[name])}")
    value = fields[name]
    try:
        if isinstance(value, str | bytes):
            text = value.decode() if isinstance(value, bytes) else value
            if len(text) > 12:
                raise ValueError
            value = float(text)
        if isinstance(value, np.ndarray) and value.shape == ():
            value = value.item()
        if isinstance(value, bool) or int(value) != value or abs(value) >= 10**12:
            raise ValueError
        return int(value)
    except (ValueError, TypeError, OverflowError, UnicodeDecodeError):
        raise XdscaleError(f"{where}: {name}: {shown(fields[name])} is not a whole number") from None


def array_of(value: Any, name: str, where: str) -> np.ndarray:
    """Returns a field as numbers: an array as it is, a list of numbers, or base64."""
    if isinstance(value, str | bytes):
        return from_base64(value, _BASE64_TYPES.get(name, "<f4"), where, name)
    if isinstance(value, list):
        try:
            value = np.array(value)
        except ValueError:  # rows of different lengths
            value = None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise XdscaleError(f"{where}: {name}: expected numbers, found {shown(value)}")
    return value


def _count(boxes: np.ndarray, stated: int | None, where: str) -> int:
    """Returns how many regions there are, by their boxes or as is stated."""
    regions = len(boxes) if boxes.ndim == 2 else stated
    if regions is None:
        raise XdscaleError(f"{where}: no field of the number of regions; expected one of {', '.join(NAMES['regions'])}")
    if stated not in (None, regions):
        raise XdscaleError(f"{where}: num_boxes: {shown(stated)} regions are stated, boxes are there for {regions}")
    if not 0 < regions < _MOST_REGIONS:
        raise XdscaleError(f"{where}: num_boxes: {shown(regions)} regions; an image has 1 to {_MOST_REGIONS - 1}")
    return regions


def _rows(array: np.ndarray, regions: int, name: str, where: str) -> np.ndarray:
    """Returns a row of numbers for each region, or a number for each."""
    if array.ndim == 1 and name in ("boxes", "features", "class_probs"):
        width, rest = divmod(len(array), regions)
        if rest or not width or (name == "boxes" and width != 4):
            wanted = f"{4 * regions}" if name == "boxes" else f"a multiple of {regions}"
            raise XdscaleError(f"{where}: {name}: {len(array)} numbers for {regions} regions, expected {wanted}")
        return array.reshape(regions, width)
    if array.ndim == 0 or len(array) != regions:
        raise XdscaleError(
            f"{where}: {name}: {array.size} numbers in {len(array) if array.ndim else 0} rows for {regions} regions"
        )
    return array
