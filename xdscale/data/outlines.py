"""Outlines of objects as masks: which of 14 × 14 places of a box show its object (spec VL-BERT §1.4, VisualBERT §4)."""

from collections.abc import Sequence

import numpy as np

SIDE = 14
"""Places along each side, as RoIAlign has them."""
_AT_ONCE = 4096
"""Edges of a polygon, which take 4 KB of memory each."""


def object_mask(outlines: Sequence[np.ndarray], box: Sequence[float], *, centres: bool = False) -> np.ndarray:
    """Returns the places of a box that lie in one of the polygons, or on its edge: bool [14, 14], rows first.

    As VL-BERT's release: the box, with sides a pixel longer, becomes 14 × 14 places; what leads out of it is moved to
    its edge. A place counts as its upper left corner does. With `centres` as r2c and VisualBERT's release: the box as
    it is becomes 14 × 14 places, and a place counts as its centre does.

    Args:
        outlines: polygons, each float [n, 2] of x and y in the pixels of the image; none for an empty mask.
        box: left, top, right, bottom.
        centres: see above.
    """
    places = np.arange(SIDE) + 0.5 * centres
    found = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = box
    corner, ratios = np.array([left, top]), SIDE / (np.array([right - left, bottom - top]) + (not centres))
    for outline in outlines:
        points = (np.asarray(outline, np.float64) - corner) * ratios
        if not centres:
            points = np.clip(points, 0, SIDE - 1)
        edges, sides = np.concatenate([points, np.roll(points, -1, 0)], 1), np.zeros((2, SIDE, SIDE), np.int64)
        for first in range(0, len(edges), _AT_ONCE):
            sides += _sides(edges[first : first + _AT_ONCE], places, found)
        # Odd numbers of edges to both sides are inside; unlike numbers mean that the place is on an edge.
        found |= (sides[0] | sides[1]) % 2 == 1
    return found


def _sides(edges: np.ndarray, places: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns how many edges pass to the right and to the left of each place: int64 [2, 14, 14].

    Args:
        edges: float64 [n, 4], x and y of both ends.
        places: float64 [14], along each side.
        found: bool [14, 14], where the places are marked that an edge begins at.
    """
    x1, x2 = (edges[:, end] - places[None, :, None] for end in (0, 2))  # from each place
    y1, y2 = (edges[:, end] - places[:, None, None] for end in (1, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = (x2 * y1 - x1 * y2) / (y1 - y2)  # where an edge meets the place's horizontal; unused if level
    found |= ((x1 == 0) & (y1 == 0)).any(-1)
    to_right = (((y1 > 0) != (y2 > 0)) & (crossing > 0)).sum(-1)
    return np.stack([to_right, (((y1 < 0) != (y2 < 0)) & (crossing < 0)).sum(-1)])
