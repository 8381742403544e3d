"""Texts and the regions of their images as one row of packed tokens: what models of text and regions read."""

from collections.abc import Sequence

import numpy as np

from xdscale.shards.regions import Regions


def pack(
    texts: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    regions: Regions,
    visual_segments: np.ndarray | None = None,
    alignments: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Packs samples, each one's text first and then its regions; all that a device would have to ask for is counted.

    Of a sample i, text token k stands at `cu_seqlens[i] + k` of the row, and region k at
    `cu_seqlens[i] + text_lengths[i] + k`.

    Args:
        texts: of b samples: ids int [n], with [CLS] and [SEP].
        segments: of each: int [n].
        regions: of each: `regions.offsets` [b + 1] says whose they are, so those of a sample with two images are one.
        visual_segments: int [total], such as 0 and 1 for the two images of a sample; None for 0.
        alignments: of each sample: int [m, 2], a region of the sample and the position in its text of a word that names
            it; None where nothing is aligned.

    Returns:
        text_lengths int64 [b], cu_seqlens int32 [b + 1], longest int64 [] (tokens of the longest sample); text_ids,
        text_positions, text_segments int64 [t], the texts one after the other; features [total, D] and region_segments
        int64 [total]; rows int64 [t + total], of each place in the row the token that stands there, where texts count
        before regions. With alignments aligned_regions and aligned_positions int64 [a], into `features` and the text's
        positions, and aligned_counts int64 [a]: how many words are aligned with that region.

    Raises:
        ValueError: as `pack_tokens`.
    """
    arrays = pack_tokens(texts, segments, regions)
    none = np.zeros(len(regions.features), np.int64)
    arrays["region_segments"] = none if visual_segments is None else visual_segments.astype(np.int64)
    return arrays if alignments is None else arrays | _aligned(alignments, regions.offsets)


def pack_tokens(
    texts: Sequence[np.ndarray], segments: Sequence[np.ndarray], regions: Regions, behind: int = 0
) -> dict[str, np.ndarray]:
    """Packs what any model of texts and regions reads: each sample's text, then its regions, then tokens of its own.

    Args:
        texts: as `pack`.
        segments: as `pack`.
        regions: as `pack`.
        behind: how many tokens of its own the model has behind the regions of each sample.

    Returns:
        text_lengths, cu_seqlens, longest, text_ids, text_positions, text_segments, features and rows, as `pack`; in
        `rows` regions count before tokens of the model's own.

    Raises:
        ValueError: numbers of samples, or of tokens and segments, do not agree.
    """
    counts = np.array([len(text) for text in texts], np.int64)
    region_counts = np.diff(regions.offsets).astype(np.int64)
    if len(counts) != len(region_counts) or [len(row) for row in segments] != counts.tolist():
        raise ValueError(f"{len(counts)} texts, {len(segments)} rows of segments and {len(region_counts)} of regions")
    cu_seqlens, rows = interleaved(counts, region_counts, np.full_like(counts, behind))
    text_starts = _starts(counts)
    return {
        "text_lengths": counts,
        "cu_seqlens": cu_seqlens.astype(np.int32),
        "longest": np.array(np.diff(cu_seqlens).max(initial=0)),
        "text_ids": np.concatenate(texts).astype(np.int64),
        "text_positions": np.arange(text_starts[-1]) - np.repeat(text_starts[:-1], counts),
        "text_segments": np.concatenate(segments).astype(np.int64),
        "features": np.require(regions.features, requirements="CW"),  # torch takes no array that it may not write
        "rows": rows,
    }


def region_rows(packed: dict[str, np.ndarray], offsets: np.ndarray) -> np.ndarray:
    """Returns the place in the row of each region, int64 [total].

    Args:
        packed: with `cu_seqlens` and `text_lengths`, where regions stand right behind the text of their sample.
        offsets: int64 [b + 1], whose regions are whose.
    """
    counts = np.diff(offsets)
    first = packed["cu_seqlens"][:-1].astype(np.int64) + packed["text_lengths"]
    return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], counts)


def first_regions(regions: Regions, most: int) -> Regions:
    """Returns the first so many regions of each image: where sources order them by confidence, the best ones."""
    kept = np.arange(len(regions.boxes)) - np.repeat(regions.offsets[:-1], np.diff(regions.offsets)) < most
    return chosen_regions(regions, kept)


def chosen_regions(regions: Regions, kept: np.ndarray) -> Regions:
    """Returns some of the regions of each image: those where kept, bool [total], is True."""
    features, boxes, confidences = (array[kept] for array in regions[:3])
    before = np.concatenate([[0], np.cumsum(kept)])
    return Regions(features, boxes, confidences, regions.sizes, before[regions.offsets])


def spatial(regions: Regions) -> np.ndarray:
    """Returns of each region x1, y1, x2, y2, width and height, as shares of its image's (spec VisualBERT §3).

    Args:
        regions: of several images, one entry of `offsets` and `sizes` each.

    Returns:
        fp32 [total, 6]; (0, 0, 1, 1, 1, 1) is the whole image.
    """
    scale = np.repeat(regions.sizes, np.diff(regions.offsets), axis=0).astype(np.float32)  # [total, 2]
    corners = regions.boxes / np.concatenate([scale, scale], 1)
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1).astype(np.float32)


def interleaved(*counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lays tokens of several kinds out sample by sample, and within a sample kind by kind.

    Args:
        counts: for each kind int64 [b], how many of its tokens each sample has.

    Returns:
        cu_seqlens int64 [b + 1]; and int64 [tokens], of each place in the row the token that stands there, where all
        tokens of a kind count before those of the next.
    """
    kinds = np.stack(counts)  # [kinds, b]
    lengths = kinds.T.ravel()  # of the runs of one sample and kind, in the order of the row
    run_starts, kind_starts = _starts(lengths)[:-1], _starts(kinds.ravel())[:-1].reshape(kinds.shape).T.ravel()
    return _starts(kinds.sum(0)), np.arange(lengths.sum()) + np.repeat(kind_starts - run_starts, lengths)


def with_spatial(regions: Regions) -> Regions:
    """Returns regions with `spatial` behind their features, all in fp32."""
    return regions._replace(features=np.concatenate([regions.features, spatial(regions)], 1))


def _aligned(alignments: Sequence[np.ndarray], offsets: np.ndarray) -> dict[str, np.ndarray]:
    pairs = [np.asarray(found, np.int64).reshape(-1, 2) + [start, 0] for found, start in zip(alignments, offsets)]
    regions, positions = np.concatenate(pairs).T
    counts = np.bincount(regions)
    return {
        "aligned_regions": np.ascontiguousarray(regions),
        "aligned_positions": np.ascontiguousarray(positions),
        "aligned_counts": counts[regions],
    }


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Returns int64 [n + 1]: where rows of some lengths begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
