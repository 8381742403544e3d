"""Paired bootstrap of the difference between two models on the same examples.

For seeds s = 1 … S both models predict the same n examples. The difference is

    D = mean over s of [ metric(ours, s) − metric(baseline, s) ].

A resample draws n examples with replacement, the same ones for both models and all seeds, and computes D anew: the
seeds are held fixed, and the interval says what other examples of the same kind would have given. For the wider
interval S seeds are drawn with replacement too, both models' together.
"""

from dataclasses import dataclass

import numpy as np

from xdscale.report.metrics import measure
from xdscale.tasks.metrics import METRICS

RESAMPLES = 10_000
SEED = 20_220_522
LEVEL = 0.95
_CHUNK_NUMBERS = 2_000_000
"""Weights held at once: 16 MB."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval of level 95 %."""

    low: float
    high: float

    def holds_zero(self) -> bool:
        """Returns whether no difference at all lies inside."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """A difference to the baseline, ours minus theirs.

    Attributes:
        observed: D.
        over_examples: D of each resample of the examples, float64 [resamples].
        over_both: the same with resampled seeds.
        seeds: S.
        examples: n.
    """

    observed: float
    over_examples: np.ndarray
    over_both: np.ndarray
    seeds: int
    examples: int

    @property
    def interval(self) -> Interval:
        """For other examples, with these seeds."""
        return _interval(self.over_examples)

    @property
    def wide_interval(self) -> Interval | None:
        """For other examples and other seeds; None with one seed, which says nothing about others."""
        return _interval(self.over_both) if self.seeds > 1 else None

    @property
    def stands(self) -> bool:
        """Whether it is beyond what other examples or other seeds would change."""
        wide = self.wide_interval
        return wide is not None and not wide.holds_zero() and not self.interval.holds_zero()


def paired_bootstrap(
    metric: str,
    labels: np.ndarray,
    ours: np.ndarray,
    baseline: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    stream: str = "",
) -> Difference:
    """Resamples the difference between two models.

    Args:
        metric: a key of `xdscale.tasks.metrics.METRICS`.
        labels: [examples].
        ours: predictions [examples, seeds].
        baseline: the same of the baseline; seed by seed the counterpart of `ours`.
        resamples: how many.
        stream: name of what is compared; its resamples are the same in every run and independent of other names'.
    """
    examples, seeds = ours.shape
    predictions = np.concatenate([ours, baseline], axis=1)
    if metric == "accuracy":  # only right or wrong matters: far fewer kinds of example
        labels, predictions = np.ones_like(labels), (predictions == labels[:, None]).astype(float)
    elif METRICS[metric].of == "credits":
        labels = np.ones_like(labels)
    # Examples that all runs answered alike are one kind; how often each kind is drawn is multinomial.
    kinds, counts = np.unique(np.column_stack([labels, predictions]), axis=0, return_counts=True)

    def differences(weights: np.ndarray) -> np.ndarray:
        values = measure(metric, weights, kinds[:, 0], kinds[:, 1:])
        return values[:, :seeds] - values[:, seeds:]

    generator = np.random.default_rng([SEED, *stream.encode()])
    chunk = max(1, _CHUNK_NUMBERS // len(kinds))
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        parts.append(differences(generator.multinomial(examples, counts / examples, size=size).astype(float)))
    by_seed = np.concatenate(parts)  # [resamples, seeds]
    picked = generator.integers(seeds, size=by_seed.shape)
    over_both = np.take_along_axis(by_seed, picked, axis=1).mean(1)
    observed = float(differences(counts[None].astype(float)).mean())
    return Difference(observed, by_seed.mean(1), over_both, seeds, examples)


def average(differences: list[Difference]) -> Difference:
    """Returns the mean over tasks, whose resamples are independent of each other.

    Args:
        differences: one of each task, with equally many resamples.
    """
    return Difference(
        float(np.mean([difference.observed for difference in differences])),
        np.mean([difference.over_examples for difference in differences], axis=0),
        np.mean([difference.over_both for difference in differences], axis=0),
        min(difference.seeds for difference in differences),
        sum(difference.examples for difference in differences),
    )


def _interval(values: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
