"""Learning rate, against an independent piecewise-linear interpolation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.recipe import Optim, load_recipe
from xdscale.training.schedule import learning_rate


@given(steps=st.integers(2, 3000), ratio=st.floats(0, 0.5), peak=st.floats(1e-6, 1))
def test_linear_warmup_then_linear_decay(steps, ratio, peak):
    warmup = round(ratio * steps)
    optim = Optim(learning_rate=peak, warmup_ratio=ratio)
    rates = [learning_rate(step, optim, steps) for step in range(steps)]
    # The rate of step k is the line's value at the end of warm-up step k, at the start of decay step k.
    places = [step + 1 if step < warmup else step for step in range(steps)]
    line = np.interp(places, [0, warmup, steps], [0 if warmup else peak, peak, 0])
    np.testing.assert_allclose(rates, line, rtol=1e-9, atol=1e-12)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(peak)


def test_the_papers_run_warms_up_for_40_of_800_steps():
    """Spec xdbert §5.1: warm-up .05, over real optimiser steps (the release never left warm-up)."""
    rates = [learning_rate(step, Optim(learning_rate=1e-4, warmup_ratio=0.05), 800) for step in range(800)]
    assert int(np.argmax(rates)) == 39
    assert rates[420] == pytest.approx(0.5e-4)


def test_a_step_schedule_is_torchs():
    """VL-BERT on VCR (spec vlbert §5): warm-up, then a tenth of the rate at epochs 14 and 18 of 20."""
    optim = Optim(learning_rate=4.48e-3, schedule="step", drop_at=(0.7, 0.9), warmup_ratio=0.05)
    torchs = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=4.48e-3)
    drops = torch.optim.lr_scheduler.MultiStepLR(torchs, [140, 180], 0.1)
    for step in range(200):
        warm = min(1.0, (step + 1) / 10)
        assert learning_rate(step, optim, 200) == pytest.approx(warm * torchs.param_groups[0]["lr"])
        torchs.step()
        drops.step()


def test_a_constant_schedule_stays_at_the_peak():
    optim = Optim(learning_rate=4e-5, schedule="constant", warmup_ratio=0.1)
    rates = [learning_rate(step, optim, 100) for step in range(100)]
    assert rates == pytest.approx([4e-6 * (step + 1) for step in range(10)] + [4e-5] * 90)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.schedule=step"], r"optim\.drop_at = \(\): .*optim\.schedule=step needs shares such as \[0\.7, 0\.9\]"),
        (["optim.drop_at=[0.5]"], r"optim\.drop_at = \[0\.5\]: .*optim\.schedule=linear needs none"),
        (["optim.schedule=step", "optim.drop_at=[0.9, 0.7]"], "expected shares that rise"),
        (["optim.schedule=step", "optim.drop_at=[0.05]"], "expected shares that rise, all of them after optim.warmup"),
        (["optim.schedule=step", "optim.drop_at=[1.0]"], "optim.drop_at.0 = 1.0"),
        (["optim.drop_factor=0.5"], r"optim\.drop_factor = 0\.5: .*only optim\.schedule=step uses it, not linear"),
        (["optim.momentum=0.5"], r"optim\.momentum = 0\.5: .*only optim\.optimizer=sgd uses it, not adamw"),
        (["optim.optimizer=sgd", "optim.eps=0.1"], "only optim.optimizer=adamw uses it, not sgd"),
        (["optim.optimizer=sgd", "optim.bias_correction=false"], "only optim.optimizer=adamw uses it, not sgd"),
        (["optim.rate_factors.heads=0"], r"optim\.rate_factors\.heads = 0"),
    ],
)
def test_values_that_nothing_uses_or_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(XdscaleError, match=message):
        load_recipe("quickstart", overrides)


def test_a_recipe_of_sgd_with_all_its_values_written_out_is_read_again(tmp_path):
    values = ["optim.optimizer=sgd", "optim.momentum=0.8", "optim.schedule=step", "optim.drop_at=[0.7, 0.9]"]
    recipe = load_recipe("quickstart", [*values, "optim.rate_factors.language=0.1", "output.folder=x"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "recipe.yaml")).optim == recipe.optim
