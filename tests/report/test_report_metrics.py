"""Metrics of resamples against scikit-learn and SciPy on the drawn examples themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error

from xdscale.report.metrics import measure
from xdscale.tasks.metrics import METRICS

CLASSES = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predictions: f1_score(labels, predictions, zero_division=0),
    "macro_f1": lambda labels, predictions: f1_score(labels, predictions, average="macro", zero_division=0),
    "matthews": matthews_corrcoef,
}
NUMBERS = {
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
    "rmse": root_mean_squared_error,
}


def drawn(weights, values):
    """The examples that weights stand for, written out."""
    return np.repeat(values, weights.astype(int))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_classes(seed, count):
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, 4, (3, count)).astype(float)
    weights[:, :2] += 1
    labels, predictions = generator.integers(0, 2, count), generator.integers(0, 2, (count, 3))
    labels[:2] = 0, 1
    for name, reference in CLASSES.items():
        found = measure(name, weights, labels, predictions)
        for row, column in np.ndindex(found.shape):
            expected = reference(drawn(weights[row], labels), drawn(weights[row], predictions[:, column]))
            assert found[row, column] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [3, 4])
def test_matthews_of_several_classes(classes):
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 200)
    predictions = np.where(generator.random(200) < 0.6, labels, generator.integers(0, classes, 200))
    found = measure("matthews", np.ones((1, 200)), labels, predictions[:, None])
    assert found[0, 0] == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.floats(-1e3, 1e3))
def test_numbers_with_ties(seed, count, shift):
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, 4, (4, count)).astype(float)
    weights[:, :5] += 1
    labels = np.round(generator.uniform(0, 5, count)) + shift  # many ties
    labels[:5] = shift + np.arange(5)
    predictions = labels[:, None] + generator.normal(0, 1, (count, 3))
    for name, reference in NUMBERS.items():
        found = measure(name, weights, labels, predictions)
        for row, column in np.ndindex(found.shape):
            expected = reference(drawn(weights[row], labels), drawn(weights[row], predictions[:, column]))
            assert found[row, column] == pytest.approx(expected, abs=1e-12)


def test_credits_are_averaged_as_often_as_they_are_drawn():
    weights, credits = np.array([[1.0, 1, 1], [3, 0, 1]]), np.array([[0.3, 1], [0.9, 0], [0.6, 0]])
    found = measure("vqa_accuracy", weights, np.ones(3), credits)
    np.testing.assert_allclose(found, [[1.8 / 3, 1 / 3], [(3 * 0.3 + 0.6) / 4, 3 / 4]], atol=1e-12)


def test_the_mean_of_both_correlations():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=50)
    predictions = np.exp(labels + generator.normal(size=50))
    both = pearsonr(labels, predictions).statistic + spearmanr(labels, predictions).statistic
    found = measure("pearson_spearman", np.ones((1, 50)), labels, predictions[:, None])
    assert found[0, 0] == pytest.approx(both / 2, abs=1e-12)


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"accuracy", "macro_f1", "rmse", "consistency"}))
def test_what_is_undefined_counts_as_nothing(name):
    assert measure(name, np.ones((1, 3)), np.zeros(3), np.zeros((3, 1)))[0, 0] == 0
