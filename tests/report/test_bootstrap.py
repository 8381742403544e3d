"""The paired bootstrap against SciPy's, and against populations whose true difference is known."""

import time

import numpy as np
import pytest
from scipy.stats import bootstrap

from xdscale.report.bootstrap import average, paired_bootstrap

LABELS = np.random.default_rng(5).integers(0, 2, 300)


def answers(skill, seeds, seed):
    right = np.random.default_rng(seed).random((len(LABELS), seeds)) < skill
    return np.where(right, LABELS[:, None], 1 - LABELS[:, None])


def plain(name, labels, predictions):
    """F1 and Matthews correlation of 0 and 1 from the four counts, over the last axis."""
    hits, misses = (labels & predictions).sum(-1), (labels & (1 - predictions)).sum(-1)
    alarms, rest = ((1 - labels) & predictions).sum(-1), ((1 - labels) & (1 - predictions)).sum(-1)
    if name == "f1":
        return 2 * hits / (2 * hits + misses + alarms)
    margins = (hits + alarms) * (hits + misses) * (rest + alarms) * (rest + misses)
    return (hits * rest - alarms * misses) / np.sqrt(margins)


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_agrees_with_scipy(name):
    ours, baseline = answers(0.8, 2, 1), answers(0.75, 2, 2)

    def statistic(drawn, axis=-1):
        scores = [plain(name, LABELS[drawn], runs[drawn, s]) for runs in (ours, baseline) for s in range(2)]
        return (scores[0] + scores[1] - scores[2] - scores[3]) / 2

    expected = bootstrap(
        (np.arange(len(LABELS)),), statistic, vectorized=True, n_resamples=10_000, batch=1000, method="percentile",
        rng=np.random.default_rng(1),
    )  # fmt: skip
    found = paired_bootstrap(name, LABELS, ours, baseline)
    # The ends of 10,000 resamples have a standard error of 0.027 standard deviations each.
    within = 0.12 * expected.standard_error
    assert found.interval.low == pytest.approx(expected.confidence_interval.low, abs=within)
    assert found.interval.high == pytest.approx(expected.confidence_interval.high, abs=within)
    assert found.observed == pytest.approx(statistic(np.arange(len(LABELS))), abs=1e-12)


def test_agrees_with_scipys_paired_bootstrap_of_means():
    ours, baseline = answers(0.8, 1, 1), answers(0.75, 1, 2)
    found = paired_bootstrap("accuracy", LABELS, ours, baseline, resamples=50_000)
    right, right_there = (ours[:, 0] == LABELS).astype(float), (baseline[:, 0] == LABELS).astype(float)
    expected = bootstrap(
        (right, right_there), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, n_resamples=50_000,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.interval.low == pytest.approx(expected.low, abs=1 / 300 + 1e-12)  # accuracies are multiples of 1/300
    assert found.interval.high == pytest.approx(expected.high, abs=1 / 300 + 1e-12)


def test_covers_a_known_effect_in_95_of_100_populations():
    """200 draws (seed 7) of 277 examples, three seeds of each model; the model is 5 points better on the average.

    95 % ± 2.5 standard errors of 200 draws, and a little less for a percentile interval of so few examples.
    """
    generator = np.random.default_rng(7)
    covered = 0
    for number in range(200):
        easy = generator.beta(2, 1, 277)  # an example's chance to be answered by the baseline; mean 2/3
        labels = np.ones(277)
        baseline = generator.random((277, 3)) < easy[:, None]
        ours = generator.random((277, 3)) < (easy + 0.15 * (1 - easy))[:, None]  # 0.15 * 1/3 = 0.05
        found = paired_bootstrap("accuracy", labels, ours, baseline, resamples=1000, stream=str(number))
        covered += found.interval.low <= 0.05 <= found.interval.high
    assert 0.91 <= covered / 200 <= 0.985


def test_covers_a_known_effect_where_seeds_differ_too():
    """150 draws (seed 11) of 277 examples and five seeds; each seed shifts all its answers by its own luck.

    95 % minus 2.2 standard errors of 150 draws. The interval that holds the seeds fixed must be seen to fail here.
    """
    generator = np.random.default_rng(11)
    covered = fixed = 0  # draws whose interval holds the truth
    for number in range(150):
        easy = generator.beta(2, 1, 277)[:, None]
        luck, luck_there = generator.uniform(-0.3, 0.3, 5), generator.uniform(-0.3, 0.3, 5)
        # Chances are moved by a share of the way to 0 or 1 that averages to nothing over seeds.
        chances = [rate + np.minimum(rate, 1 - rate) * shift for rate, shift in ((easy, luck_there), (easy, luck))]
        chances[1] += 0.15 * (1 - chances[1])
        baseline, ours = (generator.random((277, 5)) < chance for chance in chances)
        found = paired_bootstrap("accuracy", np.ones(277), ours, baseline, resamples=1000, stream=str(number))
        covered += found.wide_interval.low <= 0.05 <= found.wide_interval.high
        fixed += found.interval.low <= 0.05 <= found.interval.high
    assert covered / 150 >= 0.91
    assert fixed / 150 < 0.88


def test_resampled_seeds_widen_by_what_seeds_differ():
    """With one kind of example only seeds vary: the interval is that of a mean of 9 differences."""
    labels = np.ones(4000)
    generator = np.random.default_rng(3)
    shares = generator.normal(0.7, 0.03, 9)
    ours = (np.arange(4000)[:, None] < 4000 * shares).astype(float)
    found = paired_bootstrap("accuracy", labels, ours, np.zeros((4000, 9)))
    wide = found.wide_interval.high - found.wide_interval.low
    by_examples = np.sqrt(0.7 * 0.3 / 4000)
    expected = 3.92 * np.hypot(shares.std(ddof=1) / 3, by_examples)
    assert wide == pytest.approx(expected, rel=0.05)
    assert found.interval.high - found.interval.low < wide


def test_the_same_stream_gives_the_same_interval_and_tasks_are_independent():
    ours, baseline = answers(0.8, 3, 1), answers(0.75, 3, 2)
    first = paired_bootstrap("accuracy", LABELS, ours, baseline, stream="rte")
    assert first.interval == paired_bootstrap("accuracy", LABELS, ours, baseline, stream="rte").interval
    other = paired_bootstrap("accuracy", LABELS, ours, baseline, stream="mrpc")
    assert abs(np.corrcoef(first.over_examples, other.over_examples)[0, 1]) < 0.05
    both = average([first, other])
    assert both.observed == pytest.approx(first.observed)
    assert both.over_examples.std() == pytest.approx(first.over_examples.std() / np.sqrt(2), rel=0.05)


def test_equal_models_do_not_differ():
    ours = answers(0.8, 3, 1)
    found = paired_bootstrap("matthews", LABELS, ours, ours)
    assert (found.observed, found.interval.low, found.interval.high) == (0, 0, 0)
    assert found.interval.holds_zero()


@pytest.mark.parametrize(("metric", "examples"), [("accuracy", 40_430), ("f1", 40_430), ("pearson_spearman", 1500)])
def test_the_papers_largest_tasks_take_seconds(metric, examples):
    """QQP's and STS-B's development sets, five seeds of two models, 10,000 resamples."""
    generator = np.random.default_rng(0)
    if metric == "pearson_spearman":
        labels = generator.uniform(0, 5, examples)
        ours, baseline = (labels[:, None] + generator.normal(0, 1, (examples, 5)) for _ in range(2))
    else:
        labels = generator.integers(0, 2, examples)
        ours, baseline = (
            np.where(generator.random((examples, 5)) < 0.9, labels[:, None], 1 - labels[:, None]) for _ in range(2)
        )
    began = time.process_time()
    paired_bootstrap(metric, labels, ours, baseline)
    assert time.process_time() - began < 15
