"""Learning rate, against an independent piecewise-linear interpolation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.training.schedule import learning_rate


@given(steps=st.integers(2, 3000), ratio=st.floats(0, 0.5), peak=st.floats(1e-6, 1))
def test_linear_warmup_then_linear_decay(steps, ratio, peak):
    warmup = round(ratio * steps)
    rates = [learning_rate(step, peak=peak, steps=steps, warmup_ratio=ratio) for step in range(steps)]
    # The rate of step k is the line's value at the end of warm-up step k, at the start of decay step k.
    places = [step + 1 if step < warmup else step for step in range(steps)]
    line = np.interp(places, [0, warmup, steps], [0 if warmup else peak, peak, 0])
    np.testing.assert_allclose(rates, line, rtol=1e-9, atol=1e-12)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(peak)


def test_the_papers_run_warms_up_for_40_of_800_steps():
    """Spec xdbert §5.1: warm-up .05, over real optimiser steps (the release never left warm-up)."""
    rates = [learning_rate(step, peak=1e-4, steps=800, warmup_ratio=0.05) for step in range(800)]
    assert int(np.argmax(rates)) == 39
    assert rates[420] == pytest.approx(0.5e-4)
