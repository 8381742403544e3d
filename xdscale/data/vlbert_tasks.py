"""Builds finetuning batches of texts with image regions for VL-BERT (spec VL-BERT §5)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xdscale.data.outlines import SIDE
from xdscale.data.pictures import draw_flips, mirrored, read_pictures, require_pictures, scaled_boxes
from xdscale.data.task_files import Example
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.data.visual_text import region_rows
from xdscale.data.vlbert import mirrored_regions, pack, whole_image_first
from xdscale.recipes.vlbert.schema import Pixels
from xdscale.shards.regions import Regions
from xdscale.systems.contract import MicroBatch, Slots

OBJECT_CLASS = "object_class"
"""The objective on classes of objects."""


class VLBERTTaskCollator(VisualTaskCollator):
    """As `VisualTaskCollator`, with what `xdscale.data.vlbert.pack` returns.

    The whole image is always the first region, also of tables that have it not: then a task's regions follow it. Words
    that name a region look at it, others at the whole.

    Of pixels there are, in the place of features, for each example i: `picture_i` fp32 [3, height, width], see
    `xdscale.data.pictures`, and `boxes_i` fp32 [k, 4], its regions there; and feature_rows int64 [total]: which of all
    these boxes each region of an input is. Choices share those of their example. With the outlines of objects there is
    `masks_i` bool [k, 14, 14] too: which places of a box show its object.

    For the loss on classes of objects there are object_rows int64 [r], the places in the row of the regions of real
    examples, and object_labels fp32 [r, classes], 1 for the class of each.

    Args:
        means: whether its features are the mean of the others, as in pretraining on features; else those of a table
            that has it are taken, as pretraining from pixels computes them.
        pixels: how images are read; None where features are.
        outlines: whether the task's outlines of objects are read.
        classes: how many classes objects have, with the background; 0 for no loss on them.
        flip: share of the images that are mirrored, with their boxes and outlines.
        sides: ids of "left" and "right", which are exchanged then in texts, as these words are in answers; None to
            leave them.
        seed: of which these are.
    """

    separates_answers = True

    def __init__(
        self,
        *arguments: Any,
        means: bool,
        pixels: Pixels | None = None,
        outlines: bool = False,
        classes: int = 0,
        flip: float = 0.0,
        sides: tuple[int, int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._means, self._pixels, self._outlines, self._classes = means, pixels, outlines, classes
        self._flip, self._sides, self._seed = flip, sides, seed
        self._answers = None
        if flip and sides is not None and self._task.reads == "answer":
            self._answers = mirrored_answers(self._task.labels)
        if pixels is not None:
            require_pictures(self._regions.build)
        if classes:
            self._task.object_classes(self.examples)  # refuses unknown ones
        if outlines:
            self._task.object_masks(self.examples[:1])  # refuses a download without them

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns which images are mirrored, if any are."""
        return [draw_flips(slots, self._flip, self._seed)] if self._flip else []

    def __call__(self, slots: Slots) -> MicroBatch:
        """Prepares the examples of one micro-batch."""
        batch = super().__call__(slots)
        if self._answers is not None:
            labels, flipped = batch.arrays["labels"], draw_flips(slots, self._flip, self._seed)
            none = np.zeros((len(labels), 1), labels.dtype)
            labels[flipped] = np.concatenate([labels, none], 1)[flipped][:, self._answers]
        if self._classes:
            batch = replace(batch, targets=batch.targets | {OBJECT_CLASS: len(batch.arrays["object_rows"])})
        return batch

    @property
    def own_regions(self) -> int:
        """Regions of an input that its task does not count."""
        return int(bool(self._task.images) and not self._regions.build.whole_image_first)

    def _read(self, rows: np.ndarray) -> Regions:
        regions = super()._read(rows)
        return regions if self._pixels is None else regions._replace(features=regions.features[:, :0])

    def _pack(
        self,
        slots: Slots,
        texts: list[np.ndarray],
        text_segments: list[np.ndarray],
        regions: Regions,
        region_segments: np.ndarray,
        alignments: list[np.ndarray],
    ) -> dict[str, np.ndarray]:
        looks_at = [np.zeros(len(text), np.int64) for text in texts]
        if not self._task.images:
            return pack(texts, text_segments, regions._replace(sizes=np.ones((len(texts), 2), np.uint16)), looks_at)
        regions = whole_image_first(
            regions, self._regions.build.whole_image_first, mean=self._means or self._pixels is not None
        )
        for places, pairs in zip(looks_at, alignments):
            for region, first, last in pairs:
                places[first : last + 1] = region + self.own_regions
        choices, flipped = len(texts) // len(slots.real), draw_flips(slots, self._flip, self._seed)
        of_inputs = np.repeat(flipped, choices)
        if self._sides is not None:
            texts = [exchanged(text, *self._sides) if flip else text for text, flip in zip(texts, of_inputs.tolist())]
        packed = pack(texts, text_segments, mirrored_regions(regions, of_inputs), looks_at)
        if self._pixels is not None:
            del packed["features"]
            packed |= self._seen(slots, regions, flipped)
        if self._classes:
            packed |= self._labelled(slots, regions, region_rows(packed, regions.offsets))
        return packed

    def _seen(self, slots: Slots, regions: Regions, flipped: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the pictures of examples and where the regions of their inputs are there; see the class."""
        rows = self._rows[slots.sample_ids, 0]
        choices = len(regions.sizes) // len(rows)
        sizes = regions.sizes[::choices]
        pictures = read_pictures(self._regions, rows, sizes, self._pixels)
        arrays, places, count = {}, [], 0
        for number, (picture, mirror) in enumerate(zip(pictures, flipped.tolist())):
            mine = regions.boxes[slice(*regions.offsets[number * choices :][:2])]
            boxes = scaled_boxes(mine, tuple(sizes[number].tolist()), picture.shape[:0:-1], mirror=mirror)
            arrays |= {f"picture_{number}": mirrored(picture) if mirror else picture, f"boxes_{number}": boxes}
            places.append(np.tile(np.arange(count, count + len(boxes)), choices))
            count += len(boxes)
        if self._outlines:
            for number, found in enumerate(self._task.object_masks(self._examples_of(slots))):
                whole = np.ones((len(arrays[f"boxes_{number}"]) - len(found), SIDE, SIDE), bool)
                masks = np.concatenate([whole, found])
                arrays[f"masks_{number}"] = mirrored(masks) if flipped[number] else masks
        return arrays | {"feature_rows": np.concatenate(places)}

    def _labelled(self, slots: Slots, regions: Regions, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns where the regions of real examples stand, and their classes; what is no object is background."""
        choices = len(regions.sizes) // len(slots.real)
        counts = np.diff(regions.offsets)
        labels = np.zeros(len(regions.boxes), np.int64)
        for number, found in enumerate(self._task.object_classes(self._examples_of(slots))):
            for end in regions.offsets[number * choices + 1 :][:choices]:
                labels[end - len(found) : end] = found
        real = np.repeat(np.repeat(slots.real, choices), counts)
        classes = np.eye(self._classes, dtype=np.float32)[labels[real]]
        return {"object_rows": rows[real], "object_labels": classes}

    def _examples_of(self, slots: Slots) -> list[Example]:
        return [self.examples[sample] for sample in slots.sample_ids.tolist()]


def exchanged(ids: np.ndarray, left: int, right: int) -> np.ndarray:
    """Returns word pieces with two of them exchanged."""
    return np.where(ids == left, right, np.where(ids == right, left, ids))


def mirrored_answers(answers: Sequence[str]) -> np.ndarray:
    """Returns of each answer which one says the same of the mirror image, -1 for none: int64 [n]."""
    words, numbers = {"left": "right", "right": "left"}, {answer: number for number, answer in enumerate(answers)}
    others = (" ".join(words.get(word, word) for word in answer.split(" ")) for answer in answers)
    return np.array([numbers.get(other, -1) for other in others], np.int64)
