"""Contestants of `xdscale bench kernels` that drop nothing compute the same, or their times would say nothing."""

import pytest
import torch

from xdscale.bench import kernels

PLAN = kernels.Plan("cpu", attention_samples=1, loss_samples=1, rounds=1, calls=1)


@pytest.mark.parametrize(
    "contestants",
    [
        lambda: kernels.attention_contestants(PLAN, torch.float32, 0.0),
        lambda: kernels.loss_contestants(PLAN, torch.float32),
        lambda: kernels.quick_gelu_contestants(PLAN, torch.float32),
        lambda: kernels.activated_linear_contestants(PLAN, torch.float32),
    ],
    ids=["attention", "loss", "quick_gelu", "activated_linear"],
)
def test_all_contestants_return_the_same_gradients(contestants):
    ours, *others = (run() for run in contestants().values())
    assert others
    for found in others:
        for expected, gradient in zip(ours, found, strict=True):
            # The padded attention of one sample has heads before tokens, and keys beyond the shorter length.
            if gradient.ndim == 4:
                gradient = gradient[0].transpose(0, 1)[: len(expected)]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
