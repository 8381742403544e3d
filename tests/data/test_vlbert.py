"""VL-BERT's input, element by element (spec VL-BERT §1.1 to §1.3)."""

import numpy as np
import pytest

from xdscale.data.vlbert import pack
from xdscale.shards.regions import Regions


def regions_of(counts, width=3):
    """Features that name their sample and their place in it."""
    features = [[sample, place, 0.5][:width] for sample, count in enumerate(counts) for place in range(count)]
    boxes = np.array([[0, 0, 100, 50]] * len(features), np.float32).reshape(-1, 4)
    sizes = np.full((len(counts), 2), (100, 50), np.uint16)
    return Regions(
        np.array(features, np.float16).reshape(-1, width), boxes, boxes[:, 0], sizes, np.cumsum([0, *counts])
    )


def test_each_sample_is_its_text_its_regions_and_the_end():
    texts, counts = [np.array([5, 6, 7]), np.array([8]), np.array([9, 10])], (2, 0, 3)
    masked = np.array([False, True, False, False, True])
    looks_at = [np.array([0, 1, 0]), np.array([0]), np.array([2, 0])]
    given = regions_of(counts)
    given.features.flags.writeable = False  # as tables give them
    found = pack(texts, [np.array([0, 0, 1]), np.array([0]), np.array([1, 1])], given, looks_at, masked)
    everything = [*found["text_ids"], *(-1 - np.arange(5)), *(100 + np.arange(3))]
    row = np.array(everything)[found["rows"]]
    assert row.tolist() == [5, 6, 7, -1, -2, 100, 8, 101, 9, 10, -3, -4, -5, 102]
    assert found["cu_seqlens"].tolist() == [0, 6, 8, 14]
    assert found["cu_seqlens"].dtype == np.int32
    assert found["longest"] == 6
    assert next(iter(found.values())).tolist() == [3, 1, 2]  # its first dimension counts the samples
    assert found["text_positions"].tolist() == [0, 1, 2, 0, 0, 1]
    assert found["text_segments"].tolist() == [0, 0, 1, 0, 1, 1]
    assert found["text_visual"].tolist() == [0, 1, 0, 5, 4, 2]  # 5: no image
    assert found["region_positions"].tolist() == [3, 3, 2, 2, 2]
    assert found["masked_regions"].tolist() == [0, 1, 0, 0, 1]
    assert found["places"].tolist() == [[50, 50, 100, 100]] * 5
    assert found["features"].dtype == np.float16
    assert found["features"].flags.writeable
    plain = pack(texts, texts, given)
    assert plain["text_visual"].tolist() == [0, 0, 0, 5, 2, 2]
    assert not plain["masked_regions"].any()


def test_rows_that_do_not_belong_together_are_refused():
    texts = [np.array([5, 6, 7]), np.array([8])]
    for segments, counts in (([np.zeros(3), np.zeros(2)], (1, 1)), ([np.zeros(3), np.zeros(1)], (1, 1, 1))):
        with pytest.raises(ValueError, match=r"2 texts, 2 rows of segments and [23] of regions"):
            pack(texts, segments, regions_of(counts))


@pytest.mark.parametrize("region", [-1, 2])
def test_a_word_looks_at_a_region_of_its_sample(region):
    texts = [np.array([5, 6, 7]), np.array([8])]
    with pytest.raises(ValueError, match="a word looks at a region that its sample has not"):
        pack(texts, texts, regions_of((2, 2)), [np.zeros(3), np.array([region])])
