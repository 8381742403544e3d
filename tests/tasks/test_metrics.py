"""Metrics against scikit-learn, SciPy and their plain formulas."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from xdscale.tasks.contract import SHIPPED, find_task
from xdscale.tasks.metrics import METRICS, measure

LABELS = np.array([0, 1, 1, 0, 1, 0, 1, 1, 0, 1])
PREDICTIONS = np.array([0, 1, 0, 0, 1, 1, 1, 0, 0, 1])


def test_classification_metrics_are_scikit_learns_and_the_formulas():
    found = measure(("accuracy", "f1", "macro_f1", "matthews"), PREDICTIONS, LABELS)
    right, wrong, missed, false = 4, 3, 2, 1  # of class 1; `wrong` are the true negatives
    assert found["accuracy"] == pytest.approx((right + wrong) / 10, abs=1e-12)
    assert found["f1"] == pytest.approx(2 * right / (2 * right + missed + false), abs=1e-12)
    other = 2 * wrong / (2 * wrong + missed + false)  # F1 of class 0
    assert found["macro_f1"] == pytest.approx((found["f1"] + other) / 2, abs=1e-12)
    matthews = (right * wrong - false * missed) / math.sqrt(5 * 6 * 4 * 5)
    assert found["matthews"] == pytest.approx(matthews, abs=1e-12)
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(LABELS, PREDICTIONS), abs=1e-12)
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(LABELS, PREDICTIONS), abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(-1, 6)), min_size=3, max_size=40))
def test_regression_metrics_are_scipys_and_the_formulas(pairs):
    labels, predictions = map(np.array, zip(*pairs))
    found = measure(("pearson", "spearman", "pearson_spearman", "rmse"), predictions, labels)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean((labels - predictions) ** 2)), abs=1e-12)
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2, abs=1e-12)
    if min(np.ptp(labels), np.ptp(predictions)) > 1e-3:
        assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predictions, labels).statistic, abs=1e-12)
        assert found["pearson"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1], abs=1e-9)
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(predictions, labels).statistic, abs=1e-12)


def test_what_is_not_defined_counts_as_nothing_rather_than_as_nan():
    constant = np.zeros(10)
    assert measure(("pearson", "spearman", "matthews", "f1"), constant, LABELS) == dict.fromkeys(
        ("pearson", "spearman", "matthews", "f1"), 0.0
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_every_tasks_headline_is_among_its_metrics(name):
    task = find_task(name)
    assert task.score in task.metrics
    assert set(task.metrics) <= METRICS.keys()


@pytest.mark.parametrize("name", [name for name in SHIPPED if not find_task(name).images])
def test_every_headline_of_a_task_on_texts_is_measured(name):
    task = find_task(name)
    found = measure(task.metrics, PREDICTIONS, LABELS)
    assert task.score in found
    assert METRICS[task.score].higher_is_better == (name != "read")


@pytest.mark.parametrize("metric", ["pearson", "spearman", "pearson_spearman"])
def test_a_correlation_needs_two_values_that_differ_on_either_side(metric):
    def value(predictions, labels):
        return measure((metric,), np.array(predictions, float), np.array(labels, float))[metric]

    assert value([1.5], [2.0]) == 0.0
    assert value([1.0, 2.0], [3.0, 3.0]) == value([3.0, 3.0], [1.0, 2.0]) == 0.0
    assert value([1.0, 2.0], [3.0, 5.0]) == pytest.approx(1.0)
    assert value([1.0, 2.0], [5.0, 3.0]) == pytest.approx(-1.0)
