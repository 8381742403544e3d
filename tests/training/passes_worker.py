"""Optimiser steps of the real trainer with a small system; rank 0 saves gradients, weights and what was logged.

Its module perturbs embeddings against the loss in three passes (VILLA's way); the micro-batches of a step may carry one
of its two objectives only. Run by test_passes with different numbers of ranks.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from xdscale.systems.contract import MicroBatch, Objective, Slots, Term
from xdscale.training.environment import calm_environment

SAMPLES, LENGTH, WORDS, WIDTH, ASCENT = 12, 5, 7, 8, 0.3
OBJECTIVES = {"left": Objective(1.0), "right": Objective(0.5)}


class Small(nn.Module):
    """Mean embeddings, a layer, and a classifier for each objective."""

    def __init__(self, passes):
        super().__init__()
        torch.manual_seed(3)
        self.words, self.layer = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)
        self.delta = None
        if passes > 1:
            self.passes = passes

    def forward(self, batch, number=None):
        words = self.words(batch["ids"])  # [b, s, d]
        if number == 0:
            self.delta = torch.zeros_like(words).requires_grad_()
        elif number is not None:
            norm = self.delta.grad.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
            self.delta = (self.delta + ASCENT * self.delta.grad / norm).detach().requires_grad_()
        states = torch.tanh(self.layer(words if number is None else words + self.delta)).mean(1)
        terms = {}
        for name in OBJECTIVES:
            if f"{name}_labels" in batch:
                logits, labels = getattr(self, name)(states), batch[f"{name}_labels"]
                loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
                terms[name] = Term.scored(loss, (logits.argmax(1) == labels).sum())
        return terms


def batch_of(slots, kinds):
    """Returns a micro-batch; a sample has a target of the objective that `kinds` gives for it."""
    random = np.random.default_rng(0)
    ids = random.integers(0, WORDS, (SAMPLES, LENGTH))
    labels = {"left": random.integers(0, 2, SAMPLES), "right": random.integers(0, 3, SAMPLES)}
    arrays, targets = {"ids": ids[slots.sample_ids]}, {}
    for name, mine in labels.items():
        here = slots.real & (kinds[slots.sample_ids] == name)
        if (kinds[slots.sample_ids] == name).any():
            arrays[f"{name}_labels"] = np.where(here, mine[slots.sample_ids], -1)
            targets[name] = int(here.sum())
    return MicroBatch(arrays, targets, tokens=ids.shape[1])


def main():
    parser = argparse.ArgumentParser()
    for name in ("--out", "--runs", "--local_rank"):
        parser.add_argument(name)
    options = parser.parse_args()
    calm_environment()
    from xdscale.training.distributed import start_distributed

    ranks = start_distributed()
    for name, micro_batch, stage, passes, steps in json.loads(options.runs):
        train(Path(f"{options.out}-{name}"), micro_batch, stage, passes, steps, ranks)


def train(out, micro_batch, stage, passes, steps, ranks):
    """Trains one step for each item of `steps`: the kinds of its samples, in the order of the ranks' micro-batches."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from xdscale.ds_config import resolve_ds_config
    from xdscale.errors import XdscaleError
    from xdscale.recipe import load_recipe
    from xdscale.training.engine import build_engine
    from xdscale.training.loop import Trainer
    from xdscale.training.prefetch import StepData
    from xdscale.training.signals import StopRequest
    from xdscale.training.skipping import Skipped
    from xdscale.training.watchdog import Watchdog

    recipe = load_recipe("quickstart", [f"training.global_batch={SAMPLES}", "optim.learning_rate=0.05"])
    zero = {"stage": stage, "reduce_bucket_size": 100}
    zero |= {"offload_optimizer": {"device": "cpu"}} if out.name.endswith("offloaded") else {}
    values = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero}
    values["zero_force_ds_cpu_optimizer"] = False
    engine = build_engine(
        Small(passes), recipe.optim, resolve_ds_config("test", values, recipe, ranks.world_size), load_universal=False
    )
    each, rounds = micro_batch, range(SAMPLES // (micro_batch * ranks.world_size))
    places = [np.arange(each) + each * (ranks.rank + ranks.world_size * number) for number in rounds]
    slots = [Slots(np.zeros(each, int), place, np.ones(each, bool)) for place in places]
    data = iter([StepData([batch_of(part, np.array(kinds)) for part in slots], "") for kinds in steps])
    saved, make_step, scalars = {}, engine.step, []

    def step():
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                saved[f"gradient {name}"] = np.zeros(1) if gradient is None else gradient.numpy().copy()
        make_step()

    engine.step = step

    class Source:
        wait_seconds = 0.0

        def __next__(self):
            return 0, next(data)

    class Log:
        def step(self, step, values, samples):
            scalars.append({key: value for key, value in values.items() if key.split("/")[0] in ("loss", "accuracy")})

    trainer = Trainer(
        engine=engine,
        recipe=recipe,
        ranks=ranks,
        objectives=OBJECTIVES,
        source=Source(),
        order=None,
        validation=[],
        position=lambda step: None,
        flops=lambda arrays: 0.0,
        matmul_flops_per_second=1.0,
        run=out,
        checkpoints=out,
        monitor=Log(),
        stop=StopRequest(),
        skipped=Skipped(),
        watchdog=Watchdog(ranks, out, 45),
    )
    error = ""
    try:
        for number in range(len(steps)):
            trainer._step(number)
    except XdscaleError as refused:
        error = str(refused)
    for name, parameter in engine.module.named_parameters():
        saved[name] = safe_get_full_fp32_param(parameter).numpy() if stage else parameter.detach().numpy()
    if ranks.is_first:
        np.savez(f"{out}.npz", **saved)
        Path(f"{out}.json").write_text(json.dumps({"scalars": scalars, "error": error}))
    ranks.barrier()


if __name__ == "__main__":
    main()
