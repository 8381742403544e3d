"""Metrics of finetuning tasks: what they are called, and how scikit-learn and SciPy compute them.

All that computes is imported when something is measured: others need the names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Metric:
    """What is known of a metric without computing it.

    Attributes:
        title: as in sentences and axes.
        of: whether it compares class numbers or numbers, is the mean of what the task itself gives for each answer
            (its credit), or is measured on groups of examples, of which no report says how sure it is.
        fraction: whether it is shown times 100; else in units of the target.
        higher_is_better: whether more is better.
    """

    title: str
    of: Literal["classes", "numbers", "credits", "groups"]
    fraction: bool = True
    higher_is_better: bool = True


METRICS = {
    "accuracy": Metric("accuracy", "classes"),
    "f1": Metric("F1", "classes"),
    "macro_f1": Metric("macro F1", "classes"),
    "matthews": Metric("Matthews correlation", "classes"),
    "pearson": Metric("Pearson correlation", "numbers"),
    "spearman": Metric("Spearman correlation", "numbers"),
    "pearson_spearman": Metric("Pearson–Spearman mean", "numbers"),
    "rmse": Metric("RMSE", "numbers", fraction=False, higher_is_better=False),
    "vqa_accuracy": Metric("VQA accuracy", "credits"),
    "recall_at_1": Metric("R@1", "credits"),
    "recall_at_5": Metric("R@5", "credits"),
    "recall_at_10": Metric("R@10", "credits"),
    "upper_bound": Metric("upper bound of recall", "credits"),
    "consistency": Metric("consistency", "groups"),
}
"""Metric by name: f1 is of class 1, macro_f1 the mean over classes, pearson_spearman the mean of both correlations."""


def measure(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures predictions.

    Args:
        names: keys of `METRICS` that compare classes or numbers.
        predictions: [n], class numbers or regression outputs.
        labels: [n], what they should be.

    Returns:
        Each metric as a fraction, rmse in units of the target. A correlation of constant values, which is not
        defined, counts as 0, as in GLUE's Matthews correlation.
    """
    import numpy as np
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error

    def correlation(function: Callable[..., Any]) -> float:
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions).statistic)

    functions = {
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1": lambda: f1_score(labels, predictions, zero_division=0.0),
        "macro_f1": lambda: f1_score(labels, predictions, average="macro", zero_division=0.0),
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(pearsonr),
        "spearman": lambda: correlation(spearmanr),
        "pearson_spearman": lambda: (correlation(pearsonr) + correlation(spearmanr)) / 2,
        "rmse": lambda: root_mean_squared_error(labels, predictions),
    }
    return {name: float(functions[name]()) for name in names}
