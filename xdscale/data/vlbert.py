"""What VL-BERT reads: texts, the regions of their images and where these are, packed (spec VL-BERT §1.1, §1.3)."""

from collections.abc import Sequence

import numpy as np

from xdscale.data.pictures import mirrored_boxes
from xdscale.data.visual_text import chosen_regions, pack_tokens
from xdscale.shards.regions import Regions


def pack(
    texts: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    regions: Regions,
    looks_at: Sequence[np.ndarray] | None = None,
    masked: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Packs samples: each one's text, then its regions, then [END].

    Of a sample i, text token k stands at `cu_seqlens[i] + k` of the row, region k at
    `cu_seqlens[i] + text_lengths[i] + k`, and [END] at `cu_seqlens[i + 1] - 1`. All regions have the position
    `text_lengths[i]`, [END] the next one.

    Args:
        texts: of b samples: ids int [n], with [CLS] and [SEP] where they belong.
        segments: of each: int [n], 0 and 1.
        regions: of each; region 0 is the whole image. A sample may have none: its words then see no image.
        looks_at: of each sample int [n], the region that each word sees; None for the whole image.
        masked: bool [total], the regions that are masked; None for none.

    Returns:
        text_lengths int64 [b], cu_seqlens int32 [b + 1], longest int64 [] (tokens of the longest sample); text_ids,
        text_positions, text_segments int64 [t] and text_visual int64 [t], the region that a word sees among all, or
        their number for none; end_visual int64 [b], the same of [END], where it sees the whole image; features
        [total, D], places fp32 [total, 4] as `centres`, masked_regions and region_positions int64 [total]; rows int64
        [t + total + b], of each place in the row the token that stands there, where texts count before regions, and
        regions before [END].

    Raises:
        ValueError: numbers of samples, or of tokens and segments, do not agree; or a word sees a region that its sample
            has not.
    """
    arrays = pack_tokens(texts, segments, regions, behind=1)
    counts, region_counts, total = arrays["text_lengths"], np.diff(regions.offsets), int(regions.offsets[-1])
    return arrays | {
        "text_visual": _seen_by_words(counts, regions, looks_at),
        "end_visual": np.where(region_counts > 0, regions.offsets[:-1], total),
        "places": centres(regions),
        "masked_regions": np.zeros(total, np.int64) if masked is None else masked.astype(np.int64),
        "region_positions": np.repeat(counts, region_counts),
    }


def _seen_by_words(counts: np.ndarray, regions: Regions, looks_at: Sequence[np.ndarray] | None) -> np.ndarray:
    """Returns the region among all that each word sees, or their number for none: int64 [t]; arguments as `pack`."""
    of_words = np.repeat(np.arange(len(counts)), counts)
    there = np.diff(regions.offsets)[of_words]
    seen = np.zeros(len(of_words), np.int64) if looks_at is None else np.concatenate(looks_at).astype(np.int64)
    if len(seen) != len(of_words) or ((there > 0) & ((seen < 0) | (seen >= there))).any():
        raise ValueError("a word looks at a region that its sample has not")
    return np.where(there > 0, regions.offsets[of_words] + seen, regions.offsets[-1])


def objects_of(regions: Regions, has_whole: bool) -> tuple[Regions, np.ndarray]:
    """Leaves the whole image out where a table has it as the first region of each image.

    Args:
        regions: of several images.
        has_whole: whether the table has, as `xdscale.shards.regions.RegionBuild.whole_image_first` says it.

    Returns:
        The other regions; and bool [total], which of the given ones they are.
    """
    kept = np.ones(len(regions.boxes), bool)
    if has_whole:
        kept[regions.offsets[:-1]] = False
    return chosen_regions(regions, kept), kept


def whole_image_first(regions: Regions, has_whole: bool, *, mean: bool) -> Regions:
    """Returns the regions of a table with the whole image before those of each image, as VL-BERT reads them.

    Args:
        regions: of several images.
        has_whole: as `objects_of`.
        mean: whether the mean of the others' features stands for the whole image also where the table has its own.
    """
    return regions if has_whole and not mean else with_whole_image(objects_of(regions, has_whole)[0])[0]


def mirrored_regions(regions: Regions, which: np.ndarray) -> Regions:
    """Returns regions with the boxes of some images where they are in their mirror images.

    Args:
        regions: of several images.
        which: bool [n], the images.
    """
    counts = np.diff(regions.offsets)
    widths = np.repeat(regions.sizes[:, 0].astype(np.float32), counts)
    found = mirrored_boxes(regions.boxes, widths)
    return regions._replace(boxes=np.where(np.repeat(which, counts)[:, None], found, regions.boxes))


def with_whole_image(objects: Regions, seen: np.ndarray | None = None) -> tuple[Regions, np.ndarray]:
    """Puts the whole image in front of the regions of each image, with the mean of their features.

    Args:
        objects: of several images.
        seen: bool [total], the regions that the mean is of, as it must not tell what is masked; None for all.

    Returns:
        All regions; and bool [total], which of them are the whole image.
    """
    images = np.arange(len(objects.sizes))
    parts = zip(objects.offsets, objects.offsets[1:])
    sums, counts = np.zeros((len(images), objects.features.shape[1]), np.float32), np.ones((len(images), 1))
    for image, part in enumerate(slice(*bounds) for bounds in parts):  # np.add.at takes a hundred times as long
        mine = objects.features[part] if seen is None else objects.features[part][seen[part]]
        sums[image], counts[image] = mine.astype(np.float32).sum(0), max(1, len(mine))
    means = sums / counts
    boxes = np.concatenate([np.zeros_like(objects.sizes, np.float32), objects.sizes.astype(np.float32)], 1)
    places = objects.offsets[:-1]
    joined = Regions(
        np.insert(objects.features, places, means.astype(objects.features.dtype), 0),
        np.insert(objects.boxes, places, boxes, 0),
        np.insert(objects.confidences, places, 1, 0),
        objects.sizes,
        objects.offsets + np.arange(len(images) + 1),
    )
    whole = np.zeros(len(joined.boxes), bool)
    whole[joined.offsets[:-1]] = True
    return joined, whole


def centres(regions: Regions) -> np.ndarray:
    """Returns of each region centre x, centre y, width and height, in hundredths of its image's width and height.

    Args:
        regions: of several images, one entry of `offsets` and `sizes` each.

    Returns:
        fp32 [total, 4]; (50, 50, 100, 100) is the whole image.
    """
    scale = np.repeat(regions.sizes, np.diff(regions.offsets), axis=0).astype(np.float64)  # [total, 2]
    first, last = regions.boxes[:, :2].astype(np.float64), regions.boxes[:, 2:].astype(np.float64)
    return (100 * np.concatenate([(first + last) / 2 / scale, (last - first) / scale], 1)).astype(np.float32)
