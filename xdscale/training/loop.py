"""The training loop: one for every task, on the DeepSpeed engine. It knows no model by name."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe
from xdscale.training.checkpoint import CheckpointPosition, Retention, save_checkpoint
from xdscale.training.distributed import Ranks
from xdscale.training.engine import plain_gradient_norm, set_learning_rate, to_device
from xdscale.training.evaluation import evaluate
from xdscale.training.monitor import Monitor
from xdscale.training.schedule import learning_rate
from xdscale.training.signals import StopRequest
from xdscale.training.throughput import peak_memory_gib


class Batch(Protocol):
    """A micro-batch: arrays for the module, and how many targets each objective has in them."""

    arrays: dict[str, np.ndarray]
    targets: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class StepData:
    """What one rank needs for one optimiser step."""

    batches: list[Batch]
    samples: str
    """Hash of the sample ids of the global batch, the same on every rank."""


class Source(Protocol):
    """Prepares steps ahead of the loop."""

    wait_seconds: float

    def __next__(self) -> tuple[int, StepData]:
        """Returns the next step and its data, waiting for it if need be."""


@dataclass(kw_only=True)
class Trainer:
    """Everything one rank trains with.

    Attributes:
        engine: the DeepSpeed engine; its forward maps a batch to `{objective: (loss sum, correct)}`.
        weights: weight of each objective's mean loss in the total.
        source: training data.
        validation: this rank's held-out batches; every rank has equally many.
        position: maps steps done to the checkpoint record.
        flops: FLOPs of forward and backward on a batch.
        matmul_flops_per_second: what this rank's device reaches on a plain matrix product, the base of MFU.
        monitor: on the first rank only.
    """

    engine: Any
    recipe: Recipe
    ranks: Ranks
    weights: dict[str, float]
    source: Source
    validation: list[Batch]
    position: Callable[[int], CheckpointPosition]
    flops: Callable[[dict[str, np.ndarray]], float]
    matmul_flops_per_second: float
    checkpoints: Path
    monitor: Monitor | None
    stop: StopRequest

    def train(self, start_step: int) -> tuple[bool, int]:
        """Trains from `start_step` to the end, or until a signal or `training.stop_at_step`.

        Returns:
            Whether a signal ended the run early, and the steps done; a checkpoint of that step is saved.
        """
        training = self.recipe.training
        last_step = min(training.steps, training.stop_at_step or training.steps)
        if start_step == 0:
            self._validate(0)
        # transformers hands pretrained encoders over in evaluation mode, without dropout.
        self.engine.train()
        for done in range(start_step + 1, last_step + 1):
            stopped = self._step(done - 1)
            if done % training.eval_every == 0 or done == training.steps:
                self._validate(done)
            if stopped or done % training.checkpoint_every == 0 or done == last_step:
                self._save(done)
            if stopped:
                return True, done
        return False, max(start_step, last_step)

    def _step(self, step: int) -> bool:
        """Makes one optimiser step; returns whether any rank was asked to stop.

        Every objective's loss is a sum divided by its number of targets in the *global* batch, so any split over
        ranks, accumulation steps and micro-batches gives the same gradient. DeepSpeed averages over both; the factor
        `ranks × accumulation` undoes that.
        """
        began = time.perf_counter()
        waited = self.source.wait_seconds
        _, data = next(self.source)
        waited = self.source.wait_seconds - waited
        counts, tokens, stopped = self._agree_on_counts(data)
        rate = learning_rate(
            step,
            peak=self.recipe.optim.learning_rate,
            steps=self.recipe.training.steps,
            warmup_ratio=self.recipe.optim.warmup_ratio,
        )
        set_learning_rate(self.engine, rate)
        _seed_dropout(self.recipe.training.seed, step, self.ranks)
        undo_average = self.ranks.world_size * len(data.batches)
        sums = torch.zeros(2 * len(self.weights), dtype=torch.float64, device=self.engine.device)
        norm = None
        for number, batch in enumerate(data.batches, 1):
            outputs = self.engine(to_device(batch.arrays, self.engine.device))
            terms = [weight * outputs[name][0] / max(1, counts[name]) for name, weight in self.weights.items()]
            self.engine.backward(torch.stack(terms).sum() * undo_average)
            sums += _detached(outputs, self.weights)
            if number == len(data.batches):
                norm = plain_gradient_norm(self.engine)
            self.engine.step()
        losses = self._report(step, sums, counts)
        if self.monitor:
            seconds = time.perf_counter() - began
            flops = sum(self.flops(batch.arrays) for batch in data.batches)
            self.monitor.step(
                step + 1,
                losses
                | {
                    "optim/lr": rate,
                    "optim/grad_norm": float(norm if norm is not None else self.engine.get_global_grad_norm()),
                    "throughput/tokens_per_second": tokens / seconds,
                    "throughput/mfu": flops / seconds / self.matmul_flops_per_second,
                    "data/wait_fraction": waited / seconds,
                    "memory/peak_gib": peak_memory_gib(),
                    "health/skipped_steps": self.engine.skipped_steps,
                },
                data.samples,
            )
        return stopped

    def _agree_on_counts(self, data: StepData) -> tuple[dict[str, int], int, bool]:
        """Sums over ranks, in one exchange: targets per objective, tokens, requests to stop."""
        mine = [sum(batch.targets[name] for batch in data.batches) for name in self.weights]
        mine += [sum(batch.tokens for batch in data.batches), int(self.stop.requested)]
        *counts, tokens, stop = self.ranks.sum(torch.tensor(mine, device=self.engine.device)).tolist()
        return dict(zip(self.weights, counts)), tokens, stop > 0

    def _report(self, step: int, sums: torch.Tensor, counts: dict[str, int]) -> dict[str, float]:
        values = self.ranks.sum(sums).tolist()
        scalars = {}
        for index, name in enumerate(self.weights):
            scalars[f"loss/{name}"] = values[2 * index] / max(1, counts[name])
            scalars[f"accuracy/{name}"] = values[2 * index + 1] / max(1, counts[name])
        total = sum(weight * scalars[f"loss/{name}"] for name, weight in self.weights.items())
        if not np.isfinite(total):
            parts = ", ".join(f"{name} {scalars[f'loss/{name}']}" for name in self.weights)
            raise XdscaleError(
                f"step {step + 1}: the loss is not finite ({parts}); lower optim.learning_rate or use "
                "bf16 instead of fp16, and continue from the last checkpoint"
            )
        return {"loss/total": total} | scalars

    def _validate(self, step: int) -> None:
        metrics, maps = evaluate(self.engine, self.validation, list(self.weights), self.ranks)
        if self.monitor:
            self.monitor.validation(step, metrics)
            for layer, weights in enumerate(maps):
                self.monitor.attention(step, layer, weights)

    def _save(self, step: int) -> None:
        training = self.recipe.training
        retention = Retention(newest=training.keep_checkpoints, every=training.keep_every)
        save_checkpoint(self.engine, self.checkpoints, self.position(step), retention, self.ranks)


def _detached(outputs: dict[str, tuple[torch.Tensor, torch.Tensor]], names: dict[str, float]) -> torch.Tensor:
    return torch.stack([value.detach().double() for name in names for value in outputs[name]])


def _seed_dropout(seed: int, step: int, ranks: Ranks) -> None:
    """Makes dropout a function of (seed, step, rank), so that a resumed run draws what an unbroken one draws."""
    torch.manual_seed(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1, np.uint64)[0].item())
