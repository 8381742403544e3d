"""Boxes as numpy arrays: x1, y1, x2, y2, in pixels."""

import numpy as np


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Computes the intersection over union of each box with each other one; widths are x2 - x1.

    Args:
        boxes: [n, 4].
        others: [m, 4].

    Returns:
        float64 [n, m]; 0 where neither of two boxes has an area.
    """
    boxes, others = np.asarray(boxes, np.float64)[:, None], np.asarray(others, np.float64)[None]
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    shared = sides.clip(min=0).prod(-1)
    union = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
