"""Several passes for a micro-batch, and objectives that some lack: one result, whatever the split and the stage.

Independent reference: autograd on the whole batch in one process, without an engine.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from xdscale.recipe import load_recipe
from xdscale.systems.contract import Slots
from xdscale.training.schedule import learning_rate
from xdscale.training.tracing import on_meta, trace

from . import passes_worker as small

WORKER = Path(__file__).with_name("passes_worker.py")
HALVES = ["left"] * 6 + ["right"] * 6
LEFT = ["left"] * 12
# Ranks, micro-batch and ZeRO stage. Micro-batches of one number have samples of one half, but for splits 1, 2 and 5.
SPLITS = [(1, 12, 0), (1, 4, 1), (1, 3, 0), (1, 6, 3), (1, 12, 3), (2, 3, 0), (2, 3, 1), (2, 1, 2), (2, 3, 3)]
CASES = {"passes": (3, [LEFT]), "absent": (1, [HALVES, LEFT, HALVES]), "both": (3, [HALVES, LEFT])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch_ranks):
    """What every split leaves; one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("passes")
    for ranks in (1, 2):
        runs = [
            (f"{case}-{micro}-{stage}", micro, stage, passes, steps)
            for case, (passes, steps) in CASES.items()
            for count, micro, stage in SPLITS
            if count == ranks
        ]
        runs += [("unlike", 6, 3, 1, [HALVES]), ("offloaded", 3, 2, 1, [HALVES])] if ranks == 2 else []
        done = launch_ranks(WORKER, "--out", folder / str(ranks), "--runs", json.dumps(runs), ranks=ranks)
        assert done.code == 0, done.stderr[-3000:]
    return folder


def reference(passes, steps):
    """Returns weights, the last step's gradients and the logged means, by PyTorch alone."""
    optim = load_recipe("quickstart", ["optim.learning_rate=0.05"]).optim
    module = small.Small(1)
    weights = list(module.parameters())
    optimizer = torch.optim.AdamW(weights, eps=optim.eps, betas=optim.betas, weight_decay=optim.weight_decay)
    logged = []
    for step, kinds in enumerate(steps):
        slots = Slots(np.zeros(small.SAMPLES), np.arange(small.SAMPLES), np.ones(small.SAMPLES, bool))
        batch = small.batch_of(slots, np.array(kinds))
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        delta = torch.zeros(*arrays["ids"].shape, module.words.embedding_dim)
        gradients, sums = [torch.zeros_like(weight) for weight in weights], {}
        for _ in range(passes):
            module.delta = delta = delta.requires_grad_()
            terms = perturbed(module, arrays, delta)
            losses = {name: term.loss_sum / batch.targets[name] for name, term in terms.items()}
            loss = sum(small.OBJECTIVES[name].weight * value for name, value in losses.items())
            *found, ascent = torch.autograd.grad(loss, [*weights, delta], allow_unused=True)
            gradients = [g if more is None else g + more / passes for g, more in zip(gradients, found)]
            delta = (delta + small.ASCENT * ascent / ascent.flatten(1).norm(dim=1)[:, None, None]).detach()
            for name, term in terms.items():
                for kind, value in {"loss": term.loss_sum, **term.metrics}.items():
                    key = f"{kind}/{name}"
                    sums[key] = sums.get(key, 0.0) + value.item() / batch.targets[name] / passes
        logged.append(sums)
        norm = torch.nn.utils.get_total_norm(gradients)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient * min(1.0, optim.gradient_clipping / (norm.item() + 1e-6))
        optimizer.param_groups[0]["lr"] = learning_rate(step, optim, load_recipe("quickstart").training.steps)
        optimizer.step()
    names = [name for name, _ in module.named_parameters()]
    gradients = {f"gradient {name}": gradient.numpy() for name, gradient in zip(names, gradients)}
    return {name: weight.detach().numpy() for name, weight in zip(names, weights)}, gradients, logged


def perturbed(module, arrays, delta):
    """Returns the terms at embeddings that are moved by delta, without the module's own passes."""
    hook = module.words.register_forward_hook(lambda part, inputs, words: words + delta)
    terms = module(arrays)
    hook.remove()
    return terms


@pytest.fixture(scope="module")
def expected():
    return {case: reference(*arguments) for case, arguments in CASES.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ranks", "micro_batch", "stage"), SPLITS)
def test_gradient_weights_and_log(folder, expected, case, ranks, micro_batch, stage):
    name = f"{ranks}-{case}-{micro_batch}-{stage}"
    weights, gradients, logged = expected[case]
    found = dict(np.load(folder / f"{name}.npz"))
    for parameter, gradient in gradients.items():
        np.testing.assert_allclose(found[parameter] + 0 * gradient, gradient, atol=1e-6, err_msg=parameter)
    for parameter, weight in weights.items():
        np.testing.assert_allclose(found[parameter], weight, atol=2e-5, err_msg=parameter)
    said = json.loads((folder / f"{name}.json").read_text())
    assert said["error"] == ""
    for mine, theirs in zip(said["scalars"], logged, strict=True):
        losses = {key[5:]: value for key, value in theirs.items() if key.startswith("loss/")}
        total = sum(small.OBJECTIVES[name].weight * value for name, value in losses.items())
        assert mine == pytest.approx(theirs | {"loss/total": total}, rel=1e-4)


def test_a_perturbation_changes_the_gradient():
    """So the comparison above is not one of three equal passes."""
    one, three = (reference(passes, [LEFT])[1] for passes in (1, 3))
    assert abs(one["gradient layer.weight"] - three["gradient layer.weight"]).max() > 1e-3


def test_where_an_objective_cannot_be_left_out_it_is_refused(folder):
    said = json.loads((folder / "2-unlike.json").read_text())
    assert said["error"].startswith("step 1, micro-batch 0: 1 of 2 ranks have 'left' in its targets")

    said = json.loads((folder / "2-offloaded.json").read_text())
    assert said["error"].startswith("step 1, micro-batch 0: 'right' is not in its targets; with zero_optimization.offl")


def test_traces_count_every_pass():
    arrays = small.batch_of(Slots(np.zeros(4), np.arange(4), np.ones(4, bool)), np.array(LEFT)).arrays
    one, three = (trace(on_meta(small.Small(passes)), arrays, small.OBJECTIVES) for passes in (1, 3))
    assert three.flops == 3 * one.flops > 0
