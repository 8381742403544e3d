"""Outlines of objects as masks: which of 14 × 14 places of a box show its object (spec VL-BERT §1.4, VisualBERT §4)."""

from collections.abc import Sequence

import numpy as np

SIDE = 14
"""Places along each side, as RoIAlign has them."""


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
        x1, y1 = points[:, 0] - places[None, :, None], points[:, 1] - places[:, None, None]  # from each place
        x2, y2 = np.roll(x1, -1, -1), np.roll(y1, -1, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = (x2 * y1 - x1 * y2) / (y1 - y2)  # where an edge meets the place's horizontal; unused if level
        # Odd numbers of edges to both sides are inside; unlike numbers mean that the place is on an edge.
        to_right = (((y1 > 0) != (y2 > 0)) & (crossing > 0)).sum(-1)
        to_left = (((y1 < 0) != (y2 < 0)) & (crossing < 0)).sum(-1)
        found |= ((to_right | to_left) % 2 == 1) | ((x1 == 0) & (y1 == 0)).any(-1)
    return found
