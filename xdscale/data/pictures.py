"""Pictures as ResNets read them, scaled (spec VL-BERT §1.4, VisualBERT §3)."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xdscale.data.hashing import Purpose, below, random_bits
from xdscale.errors import XdscaleError
from xdscale.files import one_line
from xdscale.recipes.pixels import Pixels
from xdscale.shards.regions import RegionBuild, RegionTable
from xdscale.systems.contract import Slots

MEANS = np.array([102.9801, 115.9465, 122.7717], np.float32)
"""Of blue, green and red."""
JPEG = ("JPEG",)
"""What a table holds; of other kinds that Pillow knows it would run a program on some, such as EPS."""
_IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32) * 255
"""Mean and deviation of red, green and blue."""
Normalise = Callable[[np.ndarray], np.ndarray]
"""From pixels, fp32 [3, height, width] of red, green and blue up to 255, to what a ResNet reads of them."""


def less_means(pixels: np.ndarray) -> np.ndarray:
    """Returns blue, green, red, less the mean of each, as VL-BERT's ResNet reads them."""
    return pixels[::-1] - MEANS[:, None, None]


def standardised(pixels: np.ndarray) -> np.ndarray:
    """Returns red, green, blue, less the mean of each and over its deviation, as torchvision's ResNets read them."""
    mean, deviation = _IMAGENET[:, :, None, None]
    return (pixels - mean) / deviation


def require_pictures(build: RegionBuild) -> None:
    """Checks that a table of regions holds the images themselves.

    Raises:
        XdscaleError: it does not.
    """
    if not build.jpeg:
        raise XdscaleError(
            "model.pixels needs the images themselves, which this table of regions has not; make it again with "
            "'xdscale regions import --jpegs FOLDER' or 'xdscale regions extract --store-images', or read features: "
            "model.pixels=null"
        )


def read_pictures(
    regions: RegionTable,
    rows: np.ndarray,
    sizes: np.ndarray,
    pixels: Pixels,
    normalise: Normalise = less_means,
) -> list[np.ndarray]:
    """Returns images of a table, decoded and scaled by as many threads as `OMP_NUM_THREADS` says; see `read_picture`.

    A GPU takes hundreds of images a second, a thread makes tens.

    Args:
        regions: the table.
        rows: int64 [n], which images.
        sizes: [n, 2], width and height of each.
        pixels: how large they are to be.
        normalise: see `Normalise`.
    """
    files, bounds = regions.table.read_ragged("jpeg", rows)

    def read(row: int, size: tuple[int, int], start: int, end: int) -> np.ndarray:
        scaled = scaled_size(*size, pixels.short_side, pixels.long_side)
        where = f"{regions.table.folder}: row {row} of {regions.table.name}"
        return read_picture(files[start:end].tobytes(), size, scaled, where, normalise)

    images = rows.tolist(), list(map(tuple, sizes.tolist())), bounds, bounds[1:]
    stated = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(stated) if stated.isdecimal() else 1, len(rows))
    if threads < 2:
        return list(map(read, *images))
    with ThreadPoolExecutor(threads, thread_name_prefix="xdscale-pictures") as pool:
        return list(pool.map(read, *images))  # in the order of the rows, also what is raised


def scaled_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """Returns width and height when the shorter side is scaled to a length, or less so that the longer one fits."""
    least, most = min(width, height), max(width, height)
    if most / least * short > long:
        short = max(1, int(long * least / most))  # 1 where an image is longer than `long` times its width
    other = min(int(short * most / least), long)
    return (short, other) if width < height else (other, short)


def read_picture(
    jpeg: bytes, size: tuple[int, int], scaled: tuple[int, int], where: str, normalise: Normalise = less_means
) -> np.ndarray:
    """Decodes and scales a picture.

    Args:
        jpeg: the file.
        size: width and height that it is said to have.
        scaled: width and height that it is to have.
        where: table and image, for messages.
        normalise: see `Normalise`.

    Returns:
        fp32 [3, height, width].

    Raises:
        XdscaleError: it is no picture, or of another size.
    """
    try:
        image = Image.open(io.BytesIO(jpeg), formats=JPEG)
        if sorted(image.size) == sorted(size):  # else its header says enough: what it holds may be of any size
            image = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise XdscaleError(
            f"{where}: not a readable image: the table holds {len(jpeg):,} bytes that are no JPEG"
        ) from None
    except Exception as error:  # Pillow's decoders raise what they come upon
        raise XdscaleError(f"{where}: not a readable image: {one_line(error)}") from None
    if image.size != size:
        raise XdscaleError(f"{where}: the image has {image.size[0]} × {image.size[1]} pixels, the table says "
                           f"{size[0]} × {size[1]}")  # fmt: skip
    pixels = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))  # as bytes: turned as fp32 it takes half as long again
    return np.ascontiguousarray(normalise(planes.astype(np.float32)))


def blank(picture: np.ndarray, boxes: np.ndarray) -> None:
    """Takes what is in boxes out of a picture, in place: pixels of 0, the mean colour, with those on their edges.

    Args:
        picture: fp32 [3, height, width].
        boxes: float [n, 4], in its pixels, inside it.
    """
    for left, top, right, bottom in boxes.astype(np.int64).tolist():
        picture[:, top : bottom + 1, left : right + 1] = 0


def scaled_boxes(
    boxes: np.ndarray, size: tuple[int, int], scaled: tuple[int, int], *, mirror: bool = False
) -> np.ndarray:
    """Returns boxes of a picture in the pixels of the scaled one, or of its mirror image, inside it: fp32 [n, 4]."""
    ratios, last = np.tile(np.array(scaled) / np.array(size), 2), np.tile(np.array(scaled) - 1, 2)
    found = np.clip(boxes * ratios, 0, last).astype(np.float32)
    return mirrored_boxes(found, last[0]) if mirror else found


def mirrored_boxes(boxes: np.ndarray, right: np.ndarray | float) -> np.ndarray:
    """Returns boxes in the mirror image.

    Args:
        boxes: [n, 4].
        right: where what is at 0 comes to lie, of all or of each box: the last column of pixels, or a width.
    """
    found = boxes.copy()
    found[:, 0], found[:, 2] = right - boxes[:, 2], right - boxes[:, 0]
    return found


def mirrored(picture: np.ndarray) -> np.ndarray:
    """Returns the mirror image of a picture, or of masks: [n, height, width]."""
    return np.ascontiguousarray(picture[:, :, ::-1])


def draw_flips(slots: Slots, share: float, seed: int) -> np.ndarray:
    """Draws which samples' images are mirrored, bool [b]: so large a share of them."""
    return below(random_bits(seed, slots.epochs, slots.sample_ids, Purpose.FLIP, 1)[:, 0], share)
