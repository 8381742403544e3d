"""Metrics of the finetuning tasks, from scikit-learn and SciPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error


def measure(names: tuple[str, ...], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures predictions.

    Args:
        names: of the metrics: accuracy, f1 (of class 1), matthews, pearson, spearman, pearson_spearman (their mean),
            rmse.
        predictions: [n], class numbers or regression outputs.
        labels: [n], what they should be.

    Returns:
        Each metric as a fraction, rmse in units of the target. A correlation of constant values, which is not
        defined, counts as 0, as in GLUE's Matthews correlation.
    """
    return {name: float(_METRICS[name](labels, predictions)) for name in names}


def _correlation(function: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(function(labels, predictions).statistic)


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    return _correlation(spearmanr, labels, predictions)


def _pearson_spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    return (_pearson(labels, predictions) + _spearman(labels, predictions)) / 2


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    return f1_score(labels, predictions, zero_division=0.0)


_METRICS = {
    "accuracy": accuracy_score,
    "f1": _f1,
    "matthews": matthews_corrcoef,
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": _pearson_spearman,
    "rmse": root_mean_squared_error,
}
