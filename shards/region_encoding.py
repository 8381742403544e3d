"""How features and class distributions of image regions are stored in fewer bytes."""

import numpy as np

LARGEST_ERROR = 7e-3
"""Relative L2 error that companding may make of a region's features: on bottom-up features it made up to 6.4e-3."""
KEPT_CLASSES = 64
"""Classes that are kept of a distribution, the largest; the others share the rest equally (KL divergence 0.004)."""


def compand(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stores the square roots of features as bytes, with one scale per region.

    Most features are small, and few are large: equal steps of the square root spend the bytes where the values are.

    Args:
        features: [n, width], finite. A negative one becomes 0, which the error tells.

    Returns:
        (uint8 [n, width]; float32 [n], the largest feature of each region; float64 [n], the relative L2 error that
        `expand` makes of each region).
    """
    values = np.asarray(features, np.float32)
    scales = values.max(axis=1, initial=0)
    shares = np.maximum(values, 0) / np.where(scales > 0, scales, 1)[:, None]
    codes = np.rint(np.sqrt(shares) * 255).astype(np.uint8)
    lost = np.square(expand(codes, scales) - values, dtype=np.float64).sum(axis=1)
    whole = np.square(values, dtype=np.float64).sum(axis=1)
    return codes, scales, np.sqrt(lost / np.where(whole > 0, whole, 1))


def expand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the features that `compand` stored: float32 [n, width]."""
    values = codes.astype(np.float32)
    np.square(values, out=values)
    np.divide(values, np.float32(255**2), out=values)
    return np.multiply(values, scales[:, None], out=values)


def largest_classes(distributions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the largest classes of distributions over more than `KEPT_CLASSES` classes.

    Args:
        distributions: [n, classes], each row of sum 1.

    Returns:
        (uint16 [n, KEPT_CLASSES]: class ids, the largest first, of equal ones the lower first; float16 [n,
        KEPT_CLASSES]: their probabilities).
    """
    ids = np.argsort(-distributions, axis=1, kind="stable")[:, :KEPT_CLASSES]
    return ids.astype("<u2"), np.take_along_axis(distributions, ids, axis=1).astype("<f2")


def whole_distributions(ids: np.ndarray, kept: np.ndarray, classes: int) -> np.ndarray:
    """Returns distributions of which the largest classes were kept, the rest spread equally: float32 [n, classes]."""
    kept = kept.astype(np.float32)
    rest = np.maximum(1 - kept.sum(axis=1), 0) / (classes - ids.shape[1])
    whole = np.repeat(rest[:, None], classes, axis=1)
    np.put_along_axis(whole, ids.astype(np.int64), kept, axis=1)
    return whole
