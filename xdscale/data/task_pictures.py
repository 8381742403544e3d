"""The pictures of a task's examples, for encoders whose features of regions are computed along from pixels."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from xdscale.data.outlines import SIDE
from xdscale.data.pictures import Normalise, less_means, mirrored, read_pictures, require_pictures, scaled_boxes
from xdscale.data.task_files import Example
from xdscale.recipes.pixels import Pixels
from xdscale.shards.regions import Regions, RegionTable


class ObjectTask(Protocol):
    """What a task knows of the objects of its examples, where they are read: as `xdscale.tasks.vcr` has it."""

    def object_classes(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Returns the classes of each example's objects, int64 [objects], counted from 1."""

    def object_masks(self, examples: Sequence[Example], *, centres: bool = False) -> list[np.ndarray]:
        """Returns which places of each object's box show it, of each example: bool [objects, 14, 14]."""


class Look(NamedTuple):
    """How an encoder's ResNet looks at pictures.

    Attributes:
        pixels: how large they are.
        normalise: what it reads of their pixels.
        outlines: whether it reads the task's outlines of objects.
        centres: how these become masks; see `xdscale.data.outlines.object_mask`.
        classes: whether it reads the classes of objects.
    """

    pixels: Pixels
    normalise: Normalise = less_means
    outlines: bool = False
    centres: bool = False
    classes: bool = False


class TaskPictures:
    """Reads, for each example i of a micro-batch:

    picture_i fp32 [3, height, width], see `xdscale.data.pictures`; boxes_i fp32 [k, 4], its regions there; and
    feature_rows int64 [total]: which of all these boxes each region of an input is. Choices share those of their
    example. With the outlines of objects there is masks_i bool [k, 14, 14] too: which places of a box show its object;
    with their classes classes_i int64 [k], 0 for what is no object.

    Args:
        task: whose.
        regions: the table with the images themselves.
        look: see there.
        named: whether the regions that an example speaks of are read alone.

    Raises:
        XdscaleError: the table has no images.
    """

    def __init__(self, task: ObjectTask, regions: RegionTable, look: Look, *, named: bool = False) -> None:
        require_pictures(regions.build)
        self._task, self._regions, self._look, self._named = task, regions, look, named

    def check(self, examples: Sequence[Example]) -> None:
        """Checks what is known of examples' objects as far as it costs little.

        Raises:
            XdscaleError: a class is unknown, or the download has no outlines.
        """
        if self._look.classes:
            self._task.object_classes(examples)
        if self._look.outlines:
            self._task.object_masks(examples[:1])

    def __call__(
        self, examples: Sequence[Example], rows: np.ndarray, regions: Regions, flipped: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of the class.

        Args:
            examples: of a micro-batch.
            rows: int64 [n], their images in the table.
            regions: of their inputs, in which choices stand one after the other.
            flipped: bool [n], whose pictures are mirrored; None for none.
        """
        choices = len(regions.sizes) // len(rows)
        sizes = regions.sizes[::choices]
        flips = [False] * len(rows) if flipped is None else flipped.tolist()
        arrays, places, count = {}, [], 0
        pictures = read_pictures(self._regions, rows, sizes, self._look.pixels, self._look.normalise)
        for number, (picture, mirror) in enumerate(zip(pictures, flips)):
            mine = regions.boxes[slice(*regions.offsets[number * choices :][:2])]
            boxes = scaled_boxes(mine, tuple(sizes[number].tolist()), picture.shape[:0:-1], mirror=mirror)
            arrays |= {f"picture_{number}": mirrored(picture) if mirror else picture, f"boxes_{number}": boxes}
            places.append(np.tile(np.arange(count, count + len(boxes)), choices))
            count += len(boxes)
            arrays |= self._of_objects(number, examples[number], len(boxes), mirror)
        return arrays | {"feature_rows": np.concatenate(places)}

    def _of_objects(self, number: int, example: Example, count: int, mirror: bool) -> dict[str, np.ndarray]:
        """Returns masks and classes of an example's boxes, of which the objects are the last ones."""
        arrays, look = {}, self._look
        kept = [region - 1 for region in example.named if region] if self._named else slice(None)
        if look.outlines:
            found = self._task.object_masks([example], centres=look.centres)[0][kept]
            masks = np.concatenate([np.ones((count - len(found), SIDE, SIDE), bool), found])
            arrays[f"masks_{number}"] = mirrored(masks) if mirror else masks
        if look.classes:
            found = self._task.object_classes([example])[0][kept]
            arrays[f"classes_{number}"] = np.concatenate([np.zeros(count - len(found), np.int64), found])
        return arrays
