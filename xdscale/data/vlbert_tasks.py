"""Builds finetuning batches of texts with image regions for VL-BERT (spec VL-BERT §5)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xdscale.data.pictures import draw_flips
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.data.visual_text import region_rows
from xdscale.data.vlbert import mirrored_regions, pack, whole_image_first
from xdscale.shards.regions import Regions
from xdscale.systems.contract import MicroBatch, Slots

OBJECT_CLASS = "object_class"
"""The objective on classes of objects."""


class VLBERTTaskCollator(VisualTaskCollator):
    """As `VisualTaskCollator`, with what `xdscale.data.vlbert.pack` returns.

    The whole image is always the first region, also of tables that have it not: then a task's regions follow it. Words
    that name a region look at it, others at the whole.

    For the loss on classes of objects there are object_rows int64 [r], the places in the row of the regions of real
    examples, and object_labels fp32 [r, classes], 1 for the class of each.

    Args:
        means: whether its features are the mean of the others, as in pretraining on features; else those of a table
            that has it are taken, as pretraining from pixels computes them.
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
        classes: int = 0,
        flip: float = 0.0,
        sides: tuple[int, int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._means, self._classes = means, classes
        self._flip, self._sides, self._seed = flip, sides, seed
        self._answers = None
        if flip and sides is not None and self._task.reads == "answer":
            self._answers = mirrored_answers(self._task.labels)
        if classes:
            self._task.object_classes(self.examples)  # refuses unknown ones

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
            regions, self._regions.build.whole_image_first, mean=self._means or self._pictures is not None
        )
        for places, pairs in zip(looks_at, alignments):
            for region, first, last in pairs:
                places[first : last + 1] = region + self.own_regions
        choices, flipped = len(texts) // len(slots.real), draw_flips(slots, self._flip, self._seed)
        of_inputs = np.repeat(flipped, choices)
        if self._sides is not None:
            texts = [exchanged(text, *self._sides) if flip else text for text, flip in zip(texts, of_inputs.tolist())]
        packed = pack(texts, text_segments, mirrored_regions(regions, of_inputs), looks_at)
        packed = self._seen(slots, regions, packed, flipped)
        if self._classes:
            packed |= self._labelled(slots, regions, region_rows(packed, regions.offsets))
        return packed

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


def exchanged(ids: np.ndarray, left: int, right: int) -> np.ndarray:
    """Returns word pieces with two of them exchanged."""
    return np.where(ids == left, right, np.where(ids == right, left, ids))


def mirrored_answers(answers: Sequence[str]) -> np.ndarray:
    """Returns of each answer which one says the same of the mirror image, -1 for none: int64 [n]."""
    words, numbers = {"left": "right", "right": "left"}, {answer: number for number, answer in enumerate(answers)}
    others = (" ".join(words.get(word, word) for word in answer.split(" ")) for answer in answers)
    return np.array([numbers.get(other, -1) for other in others], np.int64)
