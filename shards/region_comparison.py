"""Two tables of image regions side by side: are these features the published ones?

Boxes of an image are paired one to one so that their IoUs sum to the most; pairs below a limit do not count.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from xdscale.errors import XdscaleError
from xdscale.shards.regions import Detector, RegionTable

_AT_ONCE = 64


class ImageComparison(NamedTuple):
    """One image in both tables.

    Attributes:
        image_id: of it.
        boxes: in the first table and in the second.
        matched: pairs of boxes.
        in_place: pairs whose boxes have the same place in both tables.
        iou: mean over the pairs; nan without pairs.
        cosine: of the features of pairs, mean; nan where a table has none, or they differ in width.
        lowest_cosine: of them.
        same_class: pairs with the same class; None where a table has no classes.
    """

    image_id: str
    boxes: tuple[int, int]
    matched: int
    in_place: int
    iou: float
    cosine: float
    lowest_cosine: float
    same_class: int | None


class Overall(NamedTuple):
    """All images together; means are over pairs, and shares of pairs."""

    images: int
    only: tuple[int, int]
    boxes: tuple[int, int]
    matched: int
    in_place: float
    iou: float
    cosine: float
    lowest_cosine: float
    same_class: float | None


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of every box of one list and of another: float64 [n, m]; 0 without area."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.maximum(high - low, 0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - both
    return both / np.where(union > 0, union, 1)


def common_images(first: RegionTable, second: RegionTable) -> list[str]:
    """Returns the ids of images that both tables have, in the order of the first.

    Raises:
        XdscaleError: there is none.
    """
    known = set(second.image_ids(np.arange(len(second))))
    found = [name for name in first.image_ids(np.arange(len(first))) if name in known]
    if not found:
        one, other = (table.image_ids(np.array([0]))[0] for table in (first, second))
        raise XdscaleError(
            f"{first.table.folder} and {second.table.folder} have no image in common: ids look like {one!r} and "
            f"{other!r}; make one of them again with other ids ('xdscale regions import --ids')"
        )
    return found


def compare_images(
    first: RegionTable, second: RegionTable, names: Sequence[str], *, least_iou: float = 0.5
) -> Iterator[ImageComparison]:
    """Yields how each image that is in both tables differs.

    Args:
        first: one table.
        second: the other.
        names: ids of images.
        least_iou: of a pair of boxes.

    Raises:
        XdscaleError: an image is in only one of them, or a shard is damaged.
    """
    tables = (first, second)
    translated = _translation(*(table.build.detector for table in tables))
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        rows = [table.rows(some) for table in tables]
        read = [table.read(these) for table, these in zip(tables, rows)]
        classes = [_classes(table, these) for table, these in zip(tables, rows)]
        if translated is not None and classes[1] is not None:
            classes[1] = translated[classes[1]]
        for place, name in enumerate(some):
            parts = [slice(*regions.offsets[place : place + 2]) for regions in read]
            boxes = [regions.boxes[part] for regions, part in zip(read, parts)]
            iou = box_iou(*boxes)
            one, other = linear_sum_assignment(-iou)
            kept = iou[one, other] >= least_iou
            pairs = one[kept], other[kept]
            cosine = _cosines(*(regions.features[part][pair] for regions, part, pair in zip(read, parts, pairs)))
            same = None
            if classes[0] is not None and classes[1] is not None:
                same = int((classes[0][parts[0]][pairs[0]] == classes[1][parts[1]][pairs[1]]).sum())
            yield ImageComparison(
                image_id=name,
                boxes=(len(boxes[0]), len(boxes[1])),
                matched=len(pairs[0]),
                in_place=int((pairs[0] == pairs[1]).sum()),
                iou=float(iou[pairs].mean()) if len(pairs[0]) else np.nan,
                cosine=float(cosine.mean()) if cosine.size else np.nan,
                lowest_cosine=float(cosine.min()) if cosine.size else np.nan,
                same_class=same,
            )


def overall(found: Sequence[ImageComparison], images: tuple[int, int]) -> Overall:
    """Returns all images together.

    Args:
        found: one image or more.
        images: in the first table and in the second.
    """
    matched = np.array([image.matched for image in found])
    pairs = int(matched.sum())

    def mean(values: list[float]) -> float:
        there = matched * np.isfinite(values)
        return float(np.nansum(matched * values) / there.sum()) if there.any() else np.nan

    cosines = [image.lowest_cosine for image in found if np.isfinite(image.lowest_cosine)]
    classes = [image.same_class for image in found if image.same_class is not None]
    return Overall(
        images=len(found),
        only=(images[0] - len(found), images[1] - len(found)),
        boxes=tuple(sum(image.boxes[side] for image in found) for side in (0, 1)),
        matched=pairs,
        in_place=sum(image.in_place for image in found) / max(pairs, 1),
        iou=mean([image.iou for image in found]),
        cosine=mean([image.cosine for image in found]),
        lowest_cosine=min(cosines, default=np.nan),
        same_class=sum(classes) / max(pairs, 1) if classes else None,
    )


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosine of each pair of features: float64 [n]; empty where there are none to compare."""
    if first.shape[1] != second.shape[1] or not first.shape[1]:
        return np.empty(0)
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / np.where(norms > 0, norms, 1)


def _translation(first: Detector, second: Detector) -> np.ndarray | None:
    """Returns for each class of the second detector, and at the end for background, the first's of the same name.

    It is -2 where that has none. Returns None unless both detectors say names.
    """
    lists = [[name for place, name in enumerate(one.classes) if place != one.background] for one in (first, second)]
    if not all(lists):
        return None
    known = {name: place for place, name in enumerate(lists[0])}
    return np.array([known.get(name, -2) for name in lists[1]] + [-1])


def _classes(table: RegionTable, rows: np.ndarray) -> np.ndarray | None:
    """Returns the class of each region, counted without the background, which is -1; None where nothing tells."""
    if "object_ids" in table.table.columns:
        ids = table.table.read_ragged("object_ids", rows).values.astype(np.int64)
    elif table.build.class_probs != "none":
        ids = table.class_probs(rows).argmax(axis=1)
    else:
        return None
    background = table.build.detector.background
    if background is None:
        return ids
    return np.where(ids == background, -1, ids - (ids > background))
