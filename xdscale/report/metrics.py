"""Metrics of many resamples at once.

A resample is a row of weights: how often each example (or group of equal examples) was drawn. Every metric is a
function of a few weighted sums, so that 10,000 resamples are a few matrix products.
"""

from collections.abc import Callable

import numpy as np

from xdscale.tasks.metrics import METRICS

Array = np.ndarray


def measure(name: str, weights: Array, labels: Array, predictions: Array) -> Array:
    """Measures several systems on several resamples.

    Args:
        name: a key of `xdscale.tasks.metrics.METRICS`.
        weights: float64 [resamples, examples], how often each example counts.
        labels: [examples]: class numbers or targets.
        predictions: [examples, systems]; of a metric of credits, these.

    Returns:
        float64 [resamples, systems]: fractions, RMSE in units of the target. What is undefined (a correlation of
        constant values, F1 without a positive) counts as 0.
    """
    function = _mean if METRICS[name].of == "credits" else _FUNCTIONS[name]
    return function(weights, labels, predictions)


def _mean(weights: Array, labels: Array, predictions: Array) -> Array:
    return weights @ predictions / weights.sum(1, keepdims=True)


def _accuracy(weights: Array, labels: Array, predictions: Array) -> Array:
    return weights @ (predictions == labels[:, None]) / weights.sum(1, keepdims=True)


def _f1(weights: Array, labels: Array, predictions: Array) -> Array:
    """F1 of class 1."""
    positive, predicted = (labels == 1)[:, None], predictions == 1
    both = weights @ (positive & predicted)
    return _ratio(2 * both, weights @ positive + weights @ predicted)


def _macro_f1(weights: Array, labels: Array, predictions: Array) -> Array:
    """Mean F1 of the classes that are drawn or predicted."""
    total = classes = np.zeros((len(weights), predictions.shape[1]))
    for label in np.union1d(labels, predictions):
        true, predicted = (labels == label)[:, None], predictions == label
        either = weights @ true + weights @ predicted
        total = total + _ratio(2 * (weights @ (true & predicted)), either)
        classes = classes + (either > 0)
    return _ratio(total, classes)


def _matthews(weights: Array, labels: Array, predictions: Array) -> Array:
    """Matthews correlation of any number of classes (Gorodkin 2004)."""
    total = weights.sum(1, keepdims=True)
    agreed = weights @ (predictions == labels[:, None])
    chance, true_squares, predicted_squares = (np.zeros_like(agreed) for _ in range(3))
    for label in np.union1d(labels, predictions):
        true, predicted = weights @ (labels == label)[:, None], weights @ (predictions == label)
        chance += true * predicted
        true_squares += true**2
        predicted_squares += predicted**2
    return _ratio(agreed * total - chance, np.sqrt(total**2 - true_squares) * np.sqrt(total**2 - predicted_squares))


def _pearson(weights: Array, labels: Array, predictions: Array) -> Array:
    total = weights.sum(1, keepdims=True)
    # Centred first: sums of squares of uncentred values lose half of the digits.
    left, right = (labels - labels.mean())[:, None], predictions - predictions.mean(0)
    left_mean, right_mean = weights @ left / total, weights @ right / total
    products = weights @ (left * right) - total * left_mean * right_mean
    squares = weights @ left**2 - total * left_mean**2
    others = weights @ right**2 - total * right_mean**2
    return _ratio(products, np.sqrt(_positive(squares) * _positive(others)))


def _spearman(weights: Array, labels: Array, predictions: Array) -> Array:
    transposed = np.ascontiguousarray(weights.T)
    ranks = _centred_ranks(transposed, labels)
    weighted = transposed * ranks
    squares = (weighted * ranks).sum(0)
    columns = []
    for column in predictions.T:
        other = _centred_ranks(transposed, column)
        products = (weighted * other).sum(0)
        np.square(other, out=other)
        columns.append(_ratio(products, np.sqrt(squares * (transposed * other).sum(0))))
    return np.stack(columns, axis=1)


def _pearson_spearman(weights: Array, labels: Array, predictions: Array) -> Array:
    return (_pearson(weights, labels, predictions) + _spearman(weights, labels, predictions)) / 2


def _rmse(weights: Array, labels: Array, predictions: Array) -> Array:
    return np.sqrt(weights @ (predictions - labels[:, None]) ** 2 / weights.sum(1, keepdims=True))


_FUNCTIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": _pearson_spearman,
    "rmse": _rmse,
}


def _centred_ranks(weights: Array, values: Array) -> Array:
    """Rank of each example in each resample, ties sharing their mean rank, minus the mean of all ranks.

    Args:
        weights: [examples, resamples].
        values: [examples].

    Returns:
        [examples, resamples].
    """
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    drawn = weights[order]
    if len(distinct) < len(values):
        drawn = np.add.reduceat(drawn, np.searchsorted(place[order], np.arange(len(distinct))), axis=0)
    ranks = np.cumsum(drawn, axis=0)
    # Before: the last rank of each value. Its mean rank is half of the others' lower, (total + 1) / 2 the mean of all.
    ranks -= drawn / 2
    ranks -= weights.sum(0) / 2
    return ranks[place]


def _positive(sums: Array) -> Array:
    """Sets to 0 what is only rounding left of a variance of 0."""
    return np.where(sums > 1e-13 * np.abs(sums).max(initial=0), sums, 0)


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator > 0)
