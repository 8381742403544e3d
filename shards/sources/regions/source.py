"""Image regions as a source, whatever they come from: checked image by image, brought to one form, and packed."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.shards.build import Write, build_table
from xdscale.shards.manifest import ALL, Counts, InputFile, TableManifest
from xdscale.shards.region_encoding import KEPT_CLASSES, LARGEST_ERROR, compand, largest_classes
from xdscale.shards.regions import LABELS, REGIONS, Detector, RegionBuild, RegionLayout
from xdscale.shards.shard import Arrays
from xdscale.shards.sources.regions.checks import (
    checked_boxes,
    checked_features,
    checked_image,
    checked_probs,
    refusal,
    require_arrays,
)
from xdscale.shards.sources.text_build import named_problem

_AT_ONCE = 16
"""Images that are packed together: their features are some MiB."""


class RegionImage(NamedTuple):
    """One image with its regions, as a source has them.

    Attributes:
        image_id: unique in the table.
        size: width and height in pixels.
        boxes: [n, 4], in the form and the units that the build states.
        features: [n, width]; None where there are boxes alone.
        labels: by the names of `regions.LABELS`, [n] each.
        class_probs: [n, classes], rows of sum 1 (within 0.1: they are scaled).
        jpeg: the image file.
        where: file and row, for messages.
    """

    image_id: str
    size: tuple[int, int]
    boxes: np.ndarray
    features: np.ndarray | None = None
    labels: dict[str, np.ndarray] = {}
    class_probs: np.ndarray | None = None
    jpeg: bytes | None = None
    where: str = "image"


class RegionImages(Protocol):
    """Where images with regions come from. A pickled copy goes to each worker process."""

    total_bytes: int

    def units(self, threads: int) -> Iterator[tuple[Any, int]]:
        """As `Source.units`; a unit becomes one shard."""

    def digest(self, work: Any) -> bytes:
        """As `Source.digest`."""

    def images(self, work: Any) -> Iterator[RegionImage]:
        """Yields the images of a unit, no two of all units with the same id.

        Raises:
            XdscaleError: an input is bad; names file and row.
        """


class RegionSource:
    """Makes the table of image regions.

    Args:
        images: where they come from.
        build: what the table is to hold, and how it came to be.
    """

    table = REGIONS
    splits = (ALL,)

    def __init__(self, images: RegionImages, build: RegionBuild) -> None:
        self._images, self._build = images, build
        self.build = build.model_dump(mode="json")
        self.columns = build.columns
        self.total_bytes = images.total_bytes

    def units(self, threads: int) -> Iterator[tuple[Any, int]]:
        """Yields what the images are cut into."""
        return self._images.units(threads)

    def digest(self, work: Any) -> bytes:
        """Returns the hash of what goes into a unit."""
        return self._images.digest(work)

    def rows(self, work: Any, write: Write) -> Counts:
        """Packs images.

        Returns:
            `images` and `regions`, and of companded features `relative_error_thousandths[k]`: the regions whose
            relative L2 error is k to k + 1 thousandths.
        """
        counts: Counts = {"images": 0, "regions": 0}
        errors = np.zeros(int(1000 * self._build.largest_error) + 1, np.int64)
        images = self._images.images(work)
        while some := list(islice(images, _AT_ONCE)):
            packed = [self._packed(image, errors) for image in some]
            arrays = _joined(packed, self.columns)
            write(ALL, arrays)
            counts["images"] += len(some)
            counts["regions"] += int(arrays["region_offsets"][-1])
        if self._build.encoding == "u8":
            counts["relative_error_thousandths"] = errors.tolist()
        return counts

    def if_empty(self, counts: Counts) -> str:
        """Returns why there are no rows."""
        names = ", ".join(item.name for item in self._build.inputs[:3]) or self._build.format
        return f"{names}: no images with regions; is the format {self._build.format!r} right?"

    def _packed(self, image: RegionImage, errors: np.ndarray) -> dict[str, np.ndarray]:
        """Returns one image's elements of every column."""
        build = self._build
        boxes = checked_boxes(image, build)
        labels = checked_image(image, build, len(boxes))
        packed: dict[str, np.ndarray] = {"boxes": boxes, **labels}
        if build.width:
            features = checked_features(image, build, len(boxes))
            if build.encoding == "u8":
                packed["features"], packed["scales"] = _companded(image, features, errors, build.largest_error)
            else:
                packed["features"] = features.astype("<f2")
        if build.class_probs != "none":
            probs = checked_probs(image, build, len(boxes))
            if build.class_probs == "all":
                packed["class_probs"] = probs.astype("<f2")
            else:
                packed["class_ids"], packed["class_probs"] = largest_classes(probs)
        packed["sizes"] = np.array([image.size], "<u2")
        packed["image_ids"] = np.frombuffer(image.image_id.encode(), np.uint8)
        if build.jpeg:
            packed["jpeg"] = np.frombuffer(image.jpeg, np.uint8)
        return packed


def _companded(
    image: RegionImage, features: np.ndarray, errors: np.ndarray, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes and scales, and counts the errors by whole thousandths."""
    codes, scales, lost = compand(features)
    worst = int(lost.argmax())
    if lost[worst] > most:
        negative = " (some are negative)" if (features[worst] < 0).any() else ""
        raise XdscaleError(
            f"{image.where}: image {image.image_id!r}: features of region {worst} would change by {lost[worst]:.1e}"
            f"{negative} as companded bytes, allowed are {most:.1e}; store them with --encoding fp16, or allow more "
            "with --largest-error"
        )
    np.add.at(errors, np.minimum((1000 * lost).astype(np.int64), len(errors) - 1), 1)
    return codes, scales.astype("<f4")


def _joined(packed: list[dict[str, np.ndarray]], columns: Sequence[Any]) -> Arrays:
    arrays: dict[str, np.ndarray] = {}
    for column in columns:
        parts = [image[column.name] for image in packed]
        arrays[column.name] = np.concatenate(parts)
        if column.offsets:
            arrays[column.offsets] = np.cumsum([0, *map(len, parts)])
    return arrays


class _Given:
    """Images that somebody gives, who may read each when it is asked for: one unit of them is in memory."""

    def __init__(self, images: Sequence[RegionImage], shard_images: int, total_bytes: int) -> None:
        self._images, self._shard_images, self.total_bytes = images, shard_images, total_bytes

    def __getstate__(self) -> dict[str, Any]:
        """Returns what goes to other processes: not the images, which units bring."""
        return vars(self) | {"_images": ()}

    def units(self, threads: int) -> Iterator[tuple[Any, int]]:
        done = 0
        for first in range(0, len(self._images), self._shard_images):
            places = range(first, min(first + self._shard_images, len(self._images)))
            some = [self._images[place] for place in places]
            done += sum(map(_bytes_of, some))
            yield some, done

    def digest(self, work: list[RegionImage]) -> bytes:
        digest = hashlib.sha256()
        for image in work:
            hash_image(digest, image)
        return digest.digest()

    def images(self, work: list[RegionImage]) -> Iterator[RegionImage]:
        return iter(work)


def build_regions(
    images: Sequence[RegionImage],
    out: Path | str,
    detector: Detector,
    *,
    workers: int = 1,
    overwrite: bool = False,
    format: str = "given",
    **how: Any,
) -> TableManifest:
    """Builds the table of regions of images that a program gives: features of one's own, made anywhere.

    Args:
        images: all with the same columns; a list, or any sequence that reads `images[number]` when it is asked for,
            which it is twice, so that features need not fit into memory.
        out: folder of the dataset.
        detector: what found the regions.
        workers: processes.
        overwrite: replace what another build of this table left in `out`.
        format: what the images are, for `dataset.json`.
        **how: attributes of `RegionBuild`: encoding, class_probs, box_form, whole_image, shard_images and so on.

    Raises:
        XdscaleError: an image is bad, two have the same id, `how` is wrong, or as `build_table`.
    """
    if not isinstance(images, Sequence):
        raise XdscaleError(
            f"images: {type(images).__name__}, expected a list, or a sequence with images[number] and len(images)"
        )
    if not len(images):
        raise XdscaleError("no images with regions were given")
    digest, total_bytes = hashlib.sha256(), 0
    seen: set[str] = set()
    for image in images:
        require_arrays(image)
        if image.image_id in seen:
            raise XdscaleError(f"{image.where}: image id {image.image_id!r} is there twice; ids must be unique")
        seen.add(image.image_id)
        hash_image(digest, image)
        total_bytes += _bytes_of(image)
    content = InputFile(name="given", bytes=0, sha256=digest.hexdigest())
    chosen = {name: how.pop(name) for name in ("encoding", "class_probs", "largest_error") if name in how}
    try:
        layout = layout_of(images[0], **chosen)
        build = RegionBuild(format=format, inputs=[content], detector=detector, **layout.model_dump(), **how)
    except ValidationError as error:
        raise XdscaleError(f"build_regions: {named_problem(error)}") from None
    source = RegionSource(_Given(images, build.shard_images, total_bytes), build)
    return build_table(source, Path(out), workers=workers, overwrite=overwrite)


def layout_of(
    image: RegionImage, encoding: str = "fp16", class_probs: str | None = None, largest_error: float = LARGEST_ERROR
) -> RegionLayout:
    """Returns the columns that a table of images like this one has.

    Args:
        image: one of them.
        encoding: of features.
        class_probs: "all", "top-64" or "none" of its distributions; by default "top-64" of those that are larger.
        largest_error: that companding may make.

    Raises:
        XdscaleError: distributions are to be kept, and there are none.
    """
    probabilities = 0 if image.class_probs is None else image.class_probs.shape[-1]
    if class_probs is None:
        class_probs = "top-64" if probabilities > KEPT_CLASSES else "all"
    elif class_probs != "none" and not probabilities:
        told = f"are missing, so --class-probs {class_probs} keeps none; leave it out"
        raise refusal(image, "class distributions", told)
    if not probabilities:
        class_probs = "none"
    return RegionLayout(
        width=0 if image.features is None else image.features.shape[-1],
        encoding=encoding,
        largest_error=largest_error if encoding == "u8" else 0.0,
        class_probs=class_probs,
        probabilities=0 if class_probs == "none" else probabilities,
        labels=tuple(name for name in LABELS if name in image.labels),
        jpeg=image.jpeg is not None,
    )


def hash_image(digest: Any, image: RegionImage) -> None:
    """Adds all that an image holds to a hash, but not where it comes from."""
    labels = [(name, image.labels[name]) for name in sorted(image.labels)]
    named = [("boxes", image.boxes), ("features", image.features), ("class_probs", image.class_probs), *labels]
    digest.update(f"{image.image_id!r} {image.size} {len(image.jpeg or b'')} ".encode())
    digest.update(image.jpeg or b"")
    for name, array in named:
        if array is not None:
            digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())


def _bytes_of(image: RegionImage) -> int:
    return image.boxes.nbytes + (0 if image.features is None else image.features.nbytes)
