"""Texts and regions in one row, and what boxes say as features."""

import numpy as np
import pytest

from xdscale.data.visual_text import pack, spatial, with_spatial
from xdscale.shards.regions import Regions


def regions(counts, width=3):
    """Features that name their sample and their place in it."""
    features = [[sample, place, 0.5][:width] for sample, count in enumerate(counts) for place in range(count)]
    boxes = np.zeros((len(features), 4), np.float32)
    return Regions(
        np.array(features, np.float16).reshape(-1, width), boxes, boxes[:, 0], np.ones((len(counts), 2), np.uint16),
        np.cumsum([0, *counts]),
    )  # fmt: skip


def test_each_sample_is_its_text_and_then_its_regions():
    counts, texts = (2, 0, 3), [np.array([5, 6, 7], np.uint16), np.array([8]), np.array([9, 10])]
    given = regions(counts)
    given.features.flags.writeable = False  # as tables give them
    found = pack(texts, [np.array([0, 0, 1]), np.array([0]), np.array([1, 1])], given)
    row = np.concatenate([np.stack([found["text_ids"], -np.ones(6)], 1), given.features[:, :2]])[found["rows"]]
    assert row.tolist() == [
        [5, -1], [6, -1], [7, -1], [0, 0], [0, 1], [8, -1], [9, -1], [10, -1], [2, 0], [2, 1], [2, 2],
    ]  # fmt: skip
    assert found["cu_seqlens"].tolist() == [0, 5, 6, 11]
    assert found["cu_seqlens"].dtype == np.int32
    assert found["longest"] == 5
    assert next(iter(found.values())).tolist() == [3, 1, 2]  # its first dimension counts the samples
    assert found["text_positions"].tolist() == [0, 1, 2, 0, 0, 1]
    assert found["text_segments"].tolist() == [0, 0, 1, 0, 1, 1]
    assert found["region_segments"].tolist() == [0] * 5
    assert found["features"].dtype == np.float16
    assert found["features"].flags.writeable
    assert "aligned_regions" not in found


def test_alignments_count_from_the_first_sample():
    pairs = [np.array([[1, 2], [0, 1], [1, 0]]), np.empty((0, 2), int), np.array([[2, 1]])]
    texts = [np.array([5, 6, 7]), np.array([8]), np.array([9, 10])]
    found = pack(texts, [np.zeros_like(text) for text in texts], regions((2, 0, 3)), np.array([0, 1, 1, 0, 1]), pairs)
    assert found["aligned_regions"].tolist() == [1, 0, 1, 4]
    assert found["aligned_positions"].tolist() == [2, 1, 0, 1]
    assert found["aligned_counts"].tolist() == [2, 1, 2, 1]
    assert found["region_segments"].tolist() == [0, 1, 1, 0, 1]
    nothing = pack(texts, texts, regions((2, 0, 3)), alignments=[np.empty((0, 2), int)] * 3)
    assert nothing["aligned_regions"].shape == nothing["aligned_counts"].shape == (0,)


def test_rows_that_do_not_belong_together_are_refused():
    texts = [np.array([5, 6, 7]), np.array([8])]
    for segments, counts in (([np.zeros(3), np.zeros(2)], (1, 1)), ([np.zeros(3), np.zeros(1)], (1, 1, 1))):
        with pytest.raises(ValueError, match=r"2 texts, 2 rows of segments and [23] of regions"):
            pack(texts, segments, regions(counts))


def test_boxes_as_shares_of_their_image():
    """Spec VisualBERT fact 15: a box of the whole image is (0, 0, 1, 1, 1, 1)."""
    boxes = np.array([[0, 0, 640, 480], [64, 120, 320, 240], [0, 0, 100, 50]], np.float32)
    sizes = np.array([[640, 480], [100, 50]], np.uint16)
    found = spatial(Regions(np.empty((3, 0), np.float16), boxes, boxes[:, 0], sizes, np.array([0, 2, 3])))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 0, 1, 1, 1, 1], [0.1, 0.25, 0.5, 0.5, 0.4, 0.25], [0, 0, 1, 1, 1, 1]])
    both = with_spatial(Regions(np.ones((3, 2), np.float16), boxes, boxes[:, 0], sizes, np.array([0, 2, 3]))).features
    assert both.dtype == np.float32
    np.testing.assert_array_equal(both, np.concatenate([np.ones((3, 2), np.float32), found], 1))
