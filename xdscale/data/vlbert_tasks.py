"""Builds finetuning batches of texts with image regions for VL-BERT (spec VL-BERT §5)."""

from typing import Any

import numpy as np

from xdscale.data.pictures import read_pictures, require_pictures, scaled_boxes
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.data.vlbert import objects_of, pack, with_whole_image
from xdscale.recipes.vlbert.schema import Pixels
from xdscale.shards.regions import Regions
from xdscale.systems.contract import Slots

NONE = "none"


class VLBERTTaskCollator(VisualTaskCollator):
    """As `VisualTaskCollator`, with what `xdscale.data.vlbert.pack` returns.

    The whole image is always the first region, also of tables that have it not: then a task's regions follow it. Words
    that name a region look at it, others at the whole.

    Of pixels there are, in the place of features, for each example i: `picture_i` fp32 [3, height, width], see
    `xdscale.data.pictures`, and `boxes_i` fp32 [k, 4], its regions there; and feature_rows int64 [total]: which of all
    these boxes each region of an input is. Choices share those of their example.

    Args:
        means: whether its features are the mean of the others, as in pretraining on features; else those of a table
            that has it are taken, as pretraining from pixels computes them.
        pixels: how images are read; None where features are.
    """

    separates_answers = True

    def __init__(self, *arguments: Any, means: bool, pixels: Pixels | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._means, self._pixels = means, pixels
        if pixels is not None:
            require_pictures(self._regions.build)

    @property
    def own_regions(self) -> int:
        """Regions of an input that its task does not count."""
        return int(bool(self._task.images) and self._whole_image == NONE)

    @property
    def _whole_image(self) -> str:
        return self._regions.build.whole_image

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
        if self._means or self.own_regions or self._pixels is not None:
            regions, _ = with_whole_image(objects_of(regions, self._whole_image)[0])
        for places, pairs in zip(looks_at, alignments):
            for region, first, last in pairs:
                places[first : last + 1] = region + self.own_regions
        packed = pack(texts, text_segments, regions, looks_at)
        if self._pixels is not None:
            del packed["features"]
            packed |= self._seen(slots, regions)
        return packed

    def _seen(self, slots: Slots, regions: Regions) -> dict[str, np.ndarray]:
        """Returns the pictures of examples and where the regions of their inputs are there; see the class."""
        rows = self._rows[slots.sample_ids, 0]
        choices = len(regions.sizes) // len(rows)
        sizes = regions.sizes[::choices]
        arrays, places, count = {}, [], 0
        for number, picture in enumerate(read_pictures(self._regions, rows, sizes, self._pixels)):
            mine = regions.boxes[slice(*regions.offsets[number * choices :][:2])]
            boxes = scaled_boxes(mine, tuple(sizes[number].tolist()), picture.shape[:0:-1])
            arrays |= {f"picture_{number}": picture, f"boxes_{number}": boxes}
            places.append(np.tile(np.arange(count, count + len(boxes)), choices))
            count += len(boxes)
        return arrays | {"feature_rows": np.concatenate(places)}
