"""What an image with regions must be like: each refusal names file, row, field, what was found and what to do."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.shards.region_encoding import KEPT_CLASSES
from xdscale.shards.regions import LABELS, RegionBuild

if TYPE_CHECKING:
    from xdscale.shards.sources.regions.source import RegionImage

LARGEST_SIDE = 2**16 - 1
JPEG_BEGINS = b"\xff\xd8"
OUTSIDE_PIXELS = 2.0
"""How far a box may reach out of its image: detectors round, and some count pixels from their middles."""
SUM_OF_PROBABILITIES = 0.1
"""How far a class distribution's sum may be from 1: published ones were rounded and cut (spec vlbert)."""
_LARGEST_HALF, _LARGEST_SINGLE = (float(np.finfo(kind).max) for kind in (np.float16, np.float32))


def require_arrays(image: "RegionImage") -> None:
    """Refuses what a program may give and files do not: ids that are no text, lists for arrays, labels of any name."""
    if not isinstance(image.image_id, str):
        raise refusal(image, "image id", f"is {type(image.image_id).__name__}, expected a text")
    if not isinstance(image.size, Sequence) or len(image.size) != 2:
        raise refusal(image, "size", f"is {shown(image.size)}, expected width and height")
    if unknown := sorted(set(image.labels) - set(LABELS)):
        raise refusal(image, "labels", f"has {', '.join(map(repr, unknown))}; expected {', '.join(LABELS)}")
    arrays = {"boxes": image.boxes, "features": image.features, "class_probs": image.class_probs} | image.labels
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) and (array is not None or name == "boxes" or name in image.labels):
            raise refusal(image, name, f"is {type(array).__name__}, expected an array of numpy")


def checked_image(image: "RegionImage", build: RegionBuild, regions: int) -> dict[str, np.ndarray]:
    """Returns the labels of each region in the types of their columns, after checking all but boxes and features."""
    if not image.image_id or "\0" in image.image_id:
        raise refusal(image, "image id", f"is {image.image_id!r}, expected a text")
    found = set(image.labels)
    if found != set(build.labels):
        raise refusal(
            image, "fields", f"has {_names(found)}, but the first image {_names(build.labels)}; all must have the same"
        )
    labels = {}
    for name in LABELS:
        if name in build.labels:
            labels[name] = _checked_label(image, build, name, regions)
    if build.region_order == "confidence":
        rises = np.flatnonzero(np.diff(labels.get("confidences", [0, 1])) > 0)
        if rises.size:
            raise refusal(image, "confidences", f"rise after region {rises[0]}, but were declared to fall (--order)")
    if (image.jpeg is not None) != build.jpeg:
        raise refusal(image, "jpeg", "some images have their file, others do not")
    if image.jpeg is not None:
        check_jpeg(image)
    return labels


def checked_boxes(image: "RegionImage", build: RegionBuild) -> np.ndarray:
    """Returns boxes as float32 [n, 4] in pixels: left, top, right, bottom."""
    width, height = image.size
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise refusal(
            image, "width and height", f"are {shown(width)} and {shown(height)}, expected 1 to {LARGEST_SIDE}"
        )
    boxes = _numbers(image, "boxes", image.boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise refusal(
            image, "boxes", f"have the shape {list(boxes.shape)}, expected [regions, 4] with a region or more"
        )
    boxes = boxes.astype(np.float64)
    if build.box_form == "xywh":
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    if build.box_units == "shares":
        boxes = boxes * [width, height, width, height]
    elif boxes.max() <= 1 < min(width, height):
        raise refusal(image, "boxes", "lie between 0 and 1: shares of the image and not pixels; say --units shares")
    _check_order(image, boxes, build)
    _check_inside(image, boxes, build)
    if build.whole_image_first and (np.abs(boxes[0] - [0, 0, width, height]) > OUTSIDE_PIXELS).any():
        raise refusal(
            image,
            "boxes",
            f"region 0 is {_box(boxes[0])} of an image of {width} × {height}, but was declared to be the whole image; "
            "take --whole-image first away",
        )
    return boxes.astype("<f4")


def checked_features(image: "RegionImage", build: RegionBuild, regions: int) -> np.ndarray:
    """Returns features as they are: [n, width], finite, and not too large for the precision they are stored in."""
    if image.features is None:
        raise refusal(image, "features", "are missing")
    features = _numbers(image, "features", image.features)
    if features.shape != (regions, build.width):
        raise refusal(image, "features", f"have the shape {list(features.shape)}, expected {[regions, build.width]}")
    largest = max(float(features.max()), -float(features.min()))  # the least integer has no absolute value
    if largest > _LARGEST_HALF and build.encoding == "fp16":
        raise refusal(image, "features", f"reach {largest:.3g}, but half precision ends at {_LARGEST_HALF:.0f}")
    if largest > _LARGEST_SINGLE:
        raise refusal(image, "features", f"reach {largest:.3g}, but single precision ends at {_LARGEST_SINGLE:.3g}")
    return features


def checked_probs(image: "RegionImage", build: RegionBuild, regions: int) -> np.ndarray:
    """Returns class distributions of sum 1: float32 [n, classes]."""
    if image.class_probs is None:
        raise refusal(image, "class distributions", "are missing")
    probs = _numbers(image, "class distributions", image.class_probs)
    if probs.shape != (regions, build.probabilities):
        wanted = [regions, build.probabilities]
        raise refusal(image, "class distributions", f"have the shape {list(probs.shape)}, expected {wanted}")
    if build.class_probs == "top-64" and build.probabilities <= KEPT_CLASSES:
        raise refusal(
            image, "class distributions", f"have {build.probabilities} classes, store them with --class-probs all"
        )
    probs = probs.astype(np.float32)
    sums = probs.sum(axis=1)
    wrong = np.flatnonzero((probs < 0).any(axis=1) | (np.abs(sums - 1) > SUM_OF_PROBABILITIES))
    if wrong.size:
        region = wrong[0]
        raise refusal(
            image,
            "class distributions",
            f"region {region} has the sum {sums[region]:.4g} and the least value {probs[region].min():.4g}, "
            f"expected 1 (within {SUM_OF_PROBABILITIES}) and nothing negative",
        )
    return probs / sums[:, None]


def refusal(image: "RegionImage", field: str, problem: str) -> XdscaleError:
    """Returns the error that names file, row, image and field."""
    return XdscaleError(f"{image.where}: image {shown(image.image_id)}: {field}: {problem}")


def check_jpeg(image: "RegionImage") -> None:
    """Refuses a file that is no whole JPEG of the image's size: training would stop at it, in whatever step."""
    if not image.jpeg.startswith(JPEG_BEGINS):
        raise refusal(image, "jpeg", f"the file begins with {image.jpeg[:4]!r}, which no JPEG does")
    try:
        found = Image.open(io.BytesIO(image.jpeg), formats=("JPEG",))
        turned = found.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        size = found.size[::-1] if turned else found.size
        if size == tuple(image.size):
            found.draft("L", (1, 1))  # all of the file is read, but few pixels are computed
            found.load()
    except Exception as error:  # Pillow's decoders raise what they come upon
        raise refusal(
            image, "jpeg", f"not a readable image: {one_line(error)}; mend it, or leave it out: --bad-images skip"
        ) from None
    if size != tuple(image.size):
        width, height = image.size
        raise refusal(
            image,
            "jpeg",
            f"has {size[0]} × {size[1]} pixels, but the boxes are of an image of {width} × {height}; "
            "give the file that they were found in, or leave it out: --bad-images skip",
        )


def _checked_label(image: "RegionImage", build: RegionBuild, name: str, regions: int) -> np.ndarray:
    values = _numbers(image, name, image.labels[name])
    if values.shape != (regions,):
        raise refusal(image, name, f"have the shape {list(values.shape)}, expected {[regions]}")
    if not name.endswith("_ids"):
        if name == "confidences" and ((values < 0) | (values > 1)).any():
            worst = values[np.argmax(np.abs(values - 0.5))]
            raise refusal(image, name, f"hold {worst:.6g}, expected 0 to 1")
        if (np.abs(values) > _LARGEST_SINGLE).any():
            raise refusal(image, name, f"hold {values[np.abs(values).argmax()]:.6g}, too large for single precision")
        return values.astype("<f4")
    detector = build.detector
    count = detector.class_count if name == "object_ids" else detector.attribute_count
    most = (count or 2**16) - 1
    wrong = np.flatnonzero((values < 0) | (values > most) | (values != np.floor(values)))
    if wrong.size:
        value, region = values[wrong[0]], wrong[0]
        raise refusal(image, name, f"region {region} has {value:g}, expected a whole number from 0 to {most}")
    return values.astype("<u2")


def _numbers(image: "RegionImage", field: str, values: np.ndarray) -> np.ndarray:
    """Returns an array of numbers, all finite."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        kind = getattr(values, "dtype", type(values).__name__)
        raise refusal(image, field, f"are {kind}, expected numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise refusal(image, field, f"{values[tuple(place)]} at {place}: not a finite number")
    return values


def _check_order(image: "RegionImage", boxes: np.ndarray, build: RegionBuild) -> None:
    wrong = np.flatnonzero((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]))
    if wrong.size:
        hint = "; left, top, width, height would be --boxes xywh" if build.box_form == "xyxy" else ""
        raise refusal(
            image,
            "boxes",
            f"region {wrong[0]} is {_box(boxes[wrong[0]])}: its right or lower edge is before the other{hint}",
        )


def _check_inside(image: "RegionImage", boxes: np.ndarray, build: RegionBuild) -> None:
    width, height = image.size
    outside = _outside(boxes, width, height)
    wrong = np.flatnonzero(outside > OUTSIDE_PIXELS)
    if not wrong.size:
        return
    region = int(np.argmax(outside))
    hint = ""
    if width != height and (_outside(boxes, height, width) <= OUTSIDE_PIXELS).all():
        hint = "; are width and height swapped? With the other order all boxes fit: look at --columns and --format"
    far = f"{outside[region]:.1f} pixels outside the image of {width} × {height} (allowed: {OUTSIDE_PIXELS:g})"
    raise refusal(image, "boxes", f"region {region} is {_box(boxes[region])}, {far}{hint}")


def _outside(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns how far each box reaches out of an image, float64 [n]."""
    over = np.concatenate([-boxes[:, :2], boxes[:, 2:] - [width, height]], axis=1)
    return over.max(axis=1)


def _box(box: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in box) + ")"


def _names(names: object) -> str:
    return ", ".join(sorted(names)) or "none"
