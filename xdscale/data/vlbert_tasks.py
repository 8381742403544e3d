"""Builds finetuning batches of texts with image regions for VL-BERT (spec VL-BERT §5)."""

from typing import Any

import numpy as np

from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.data.vlbert import objects_of, pack, with_whole_image
from xdscale.shards.regions import Regions

NONE = "none"


class VLBERTTaskCollator(VisualTaskCollator):
    """As `VisualTaskCollator`, with what `xdscale.data.vlbert.pack` returns.

    The whole image is always the first region, also of tables that have it not: then a task's regions follow it. Words
    that name a region look at it, others at the whole.

    Args:
        means: whether its features are the mean of the others, as in pretraining on features; else those of a table
            that has it are taken, as pretraining from pixels computes them.
    """

    separates_answers = True

    def __init__(self, *arguments: Any, means: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._means = means

    @property
    def own_regions(self) -> int:
        """Regions of an input that its task does not count."""
        return int(bool(self._task.images) and self._whole_image == NONE)

    @property
    def _whole_image(self) -> str:
        return self._regions.build.whole_image

    def _pack(
        self,
        texts: list[np.ndarray],
        text_segments: list[np.ndarray],
        regions: Regions,
        region_segments: np.ndarray,
        alignments: list[np.ndarray],
    ) -> dict[str, np.ndarray]:
        looks_at = [np.zeros(len(text), np.int64) for text in texts]
        if not self._task.images:
            return pack(texts, text_segments, regions._replace(sizes=np.ones((len(texts), 2), np.uint16)), looks_at)
        if self._means or self.own_regions:
            regions, _ = with_whole_image(objects_of(regions, self._whole_image)[0])
        for places, pairs in zip(looks_at, alignments):
            for region, first, last in pairs:
                places[first : last + 1] = region + self.own_regions
        return pack(texts, text_segments, regions, looks_at)
