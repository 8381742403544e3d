"""A recipe's `kernels: plain` computes the same as the kernels, dropout included."""

import pytest
import torch

from xdscale.systems.contract import open_system
from xdscale.training.stored import build_module


def losses_and_gradients(module, batch, seed):
    module.zero_grad()
    torch.manual_seed(seed)
    terms = module(batch)
    sum(loss / max(len(batch["match_labels"]), 1) for loss, _ in terms.values()).backward()
    counts = {name: term.metrics["accuracy"].item() for name, term in terms.items()}
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {name: loss.item() for name, (loss, _) in terms.items()}, counts, gradients


@pytest.fixture(scope="module", params=[0.0, 0.1])
def pair(request, adaptation_spec):
    """The same weights with the kernels and with their definitions."""
    torch.set_num_threads(1)
    modules = []
    for kernels in ("fused", "plain"):
        torch.manual_seed(0)
        modules.append(
            build_module(open_system(adaptation_spec(dropout=request.param, kernels=kernels)), continued=True).train()
        )
    return request.param, *modules


def test_losses_and_gradients_are_equal(pair, batch):
    """The same seed drops the same states and the same attention weights; fp32."""
    dropout, fused, plain = pair
    losses, counts, gradients = losses_and_gradients(fused, batch, 5)
    expected_losses, expected_counts, expected = losses_and_gradients(plain, batch, 5)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert counts == expected_counts
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        # The bias of keys has the gradient 0 up to rounding, hence the part of the whole gradient's norm.
        assert (gradients[name] - gradient).norm() <= 1e-5 * (gradient.norm() + 0.01 * whole), name
    other = losses_and_gradients(plain, batch, 6)[0]
    assert (other["mlm"] != pytest.approx(expected_losses["mlm"], rel=1e-4)) == (dropout > 0)
