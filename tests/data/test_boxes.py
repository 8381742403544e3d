"""Intersection over union against the fractions of a grid of points that boxes cover, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.data.boxes import box_iou

SIDE = 8
corners = st.tuples(*[st.integers(0, SIDE)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


def cells(box):
    """The unit squares that a box of whole numbers covers."""
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


@given(st.lists(corners, min_size=1, max_size=4), st.lists(corners, min_size=1, max_size=4))
def test_it_counts_the_unit_squares_that_both_and_either_cover(boxes, others):
    found = box_iou(np.array(boxes), np.array(others))
    for (i, box), (j, other) in ((a, b) for a in enumerate(boxes) for b in enumerate(others)):
        both, either = cells(box) & cells(other), cells(box) | cells(other)
        assert found[i, j] == pytest.approx(len(both) / len(either) if either else 0.0, abs=1e-12)


def test_widths_are_differences_with_nothing_added():
    assert box_iou(np.array([[0, 0, 10, 10]]), np.array([[0, 0, 5, 10]]))[0, 0] == 0.5  # 66 / 121 with one more pixel
