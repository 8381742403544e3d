"""Numbers and verdicts of a report in words."""

import numpy as np
import pytest

from xdscale.report import wording
from xdscale.report.assemble import Cell
from xdscale.report.bootstrap import Difference, Interval


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (wording.value("accuracy", 0.66431), "66.43"),
        (wording.value("rmse", 0.61239), "0.612"),
        (wording.published("f1", 88.0), "88.00"),
        (wording.published("rmse", 0.6), "0.600"),
        (wording.published("rmse", None), "–"),
        (wording.change("accuracy", 0.01237), "+1.24"),
        (wording.change("accuracy", -0.01237, digits=1), "−1.2"),
        (wording.change("accuracy", -0.00004), "0.00"),
        (wording.change("accuracy", 0.0004, digits=1), "0.0"),
        (wording.change("rmse", 0.01237), "+0.012"),
        (wording.change("rmse", -0.0004), "0.000"),
        (wording.change("rmse", -0.0124, digits=1), "−0.01"),
        (wording.interval("accuracy", Interval(-0.012, 0.5), digits=1), "−1.2 … +50.0"),
        (wording.interval("rmse", Interval(-0.012, 0.5)), "−0.012 … +0.500"),
    ],
)
def test_numbers(said, words):
    assert said == words


@pytest.mark.parametrize(
    ("finished", "planned", "spread", "seeds", "shortfall"),
    [
        (1, 1, "", "1 seed", "1 seed"),
        (1, 2, "", "1 of 2 seeds", "1 of 2 seeds"),
        (2, 2, "50.00–70.00", "2 seeds", ""),
        (2, 3, "50.00–70.00", "2 of 3 seeds", "2 of 3 seeds"),
    ],
)
def test_how_many_seeds_a_cell_is_made_of(finished, planned, spread, seeds, shortfall):
    cell = Cell(0.6, 0.5, 0.7, finished, planned)
    said = wording.spread("accuracy", cell), wording.seeds(cell), wording.shortfall(cell)
    assert said == (spread, seeds, shortfall)


@pytest.mark.parametrize(("low", "high", "holds"), [(0, 1, True), (-1, 0, True), (0.01, 2, False), (-2, -0.01, False)])
def test_an_interval_that_ends_at_zero_holds_it(low, high, holds):
    assert Interval(low, high).holds_zero() == holds


@pytest.mark.parametrize(
    ("examples", "both", "seeds", "higher", "words"),
    [
        ((-0.1, 0.3), (-0.2, 0.4), 5, True, "not distinguishable from base with these 1,234 examples"),
        ((0.1, 0.3), (0.1, 0.4), 1, True, "better than base with this one seed, which says nothing about others"),
        ((0.1, 0.3), (-0.1, 0.4), 2, True, "better than base with these 2 seeds, but others could undo it"),
        ((0.1, 0.3), (0.05, 0.4), 2, True, "better than base, beyond what other examples or seeds would change"),
        ((0.1, 0.3), (0.05, 0.4), 2, False, "worse than base, beyond what other examples or seeds would change"),
        ((-0.3, -0.1), (-0.4, -0.1), 2, False, "better than base, beyond what other examples or seeds would change"),
        ((-0.3, -0.1), (-0.4, -0.1), 2, True, "worse than base, beyond what other examples or seeds would change"),
    ],
)
def test_what_a_difference_means(examples, both, seeds, higher, words):
    found = Difference(float(np.mean(examples)), np.linspace(*examples, 99), np.linspace(*both, 99), seeds, 1234)
    assert wording.verdict(found, higher_is_better=higher, baseline="base") == words
