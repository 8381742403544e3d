"""The last cross-modal layer is computed where a loss reads it, and nothing else changes."""

import pytest
import torch

from xdscale.systems.contract import open_system, recompute_activations
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.stored import build_module

TASKS = ("mlm", "match", "clip_tokens")


@pytest.fixture(scope="module")
def built(adaptation_spec):
    """Returns a function that gives the small model with some objectives off, in fp64."""
    torch.set_num_threads(1)
    modules = {}

    def make(off):
        if off not in modules:
            torch.manual_seed(0)
            modules[off] = build_adaptation(adaptation_spec(objectives=dict.fromkeys(off))).double()
        return modules[off]

    return make


def whole_losses(module, batch):
    """The objectives from the states of all layers at all positions."""
    language, clip = module.model(batch["language_ids"], batch["clip_ids"], batch["clip_lengths"])
    terms = {}
    if module.mlm is not None:
        terms["mlm"] = module.mlm(language.flatten(0, 1)[batch["masked_lm_positions"]], batch["masked_lm_labels"])
    if module.match is not None:
        terms["match"] = module.match(language[:, 0], batch["match_labels"])
    if module.clip_tokens is not None:
        terms["clip_tokens"] = module.clip_tokens(clip.flatten(0, 1)[batch["clip_positions"]], batch["clip_labels"])
    return terms


def gradients(module, terms):
    """By name; None where no loss reaches the parameter."""
    module.zero_grad(set_to_none=True)
    sum(term[0].sum() for term in terms.values()).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def without_targets_of(batch, samples):
    """The batch where these samples have neither masked nor CLIP targets."""
    changed = dict(batch)
    sizes = {"masked_lm": batch["language_ids"].shape[1], "clip": batch["clip_ids"][0].numel()}
    for name, size in sizes.items():
        keep = ~torch.isin(batch[f"{name}_positions"] // size, torch.tensor(samples))
        assert 0 < keep.sum() < len(keep)
        changed[f"{name}_positions"], changed[f"{name}_labels"] = (
            batch[f"{name}_positions"][keep],
            batch[f"{name}_labels"][keep],
        )
    return changed


@pytest.mark.parametrize(
    ("off", "bare"),
    [
        ((), []),
        ((), [0, 2]),
        (("match",), [1]),
        (("clip_tokens",), [1]),
        (("mlm",), [0, 2]),
        (("match", "clip_tokens"), [0]),
        (("mlm", "match"), [1]),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_model(built, batch, off, bare):
    """Samples differ in length, one is padding without any target, `bare` ones have no rows but [CLS]."""
    assert len(set(batch["clip_lengths"].sum(1).tolist())) > 1
    module, batch = built(off), without_targets_of(batch, bare) if bare else batch
    found, expected = module(batch), whole_losses(module, batch)
    assert set(found) == set(TASKS) - set(off)
    for name, (losses, correct) in expected.items():
        assert found[name][0].item() == pytest.approx(losses.sum().item(), rel=1e-10)
        assert found[name].metrics["accuracy"] == correct.sum()
    found, expected = gradients(module, found), gradients(module, expected)
    for name, gradient in expected.items():
        reached = gradient is not None and gradient.any()
        if not reached:
            assert found[name] is None or not found[name].any(), name
            continue
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1.0)
        assert error < 1e-10, name


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_checkpointing_with_dropout_changes_no_gradient(adaptation_spec, batch, kernels):
    """The masks of the cut last layer are drawn again as they were."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = build_module(open_system(adaptation_spec(dropout=0.1, kernels=kernels)), continued=True).train()
        if checkpointing:
            recompute_activations(module)
        torch.manual_seed(7)
        results.append(gradients(module, module(batch)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)  # sums of about 70 losses, up to 30
