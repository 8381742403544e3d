"""The training loop: one for every system, on the DeepSpeed engine. It knows no model by name."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe
from xdscale.systems.contract import MicroBatch, Objective, SampleOrder, pass_numbers
from xdscale.training.best import Best
from xdscale.training.checkpoint import CheckpointPosition, save_checkpoint
from xdscale.training.checkpoint_folder import Retention
from xdscale.training.distributed import Ranks
from xdscale.training.engine import forget_gradients, make_step, plain_gradient_norm, to_device
from xdscale.training.evaluation import evaluate
from xdscale.training.monitor import Monitor
from xdscale.training.optimizer import set_learning_rate
from xdscale.training.prefetch import Prefetcher, StepData
from xdscale.training.schedule import learning_rate
from xdscale.training.signals import StopRequest
from xdscale.training.skipping import Skipped, describe_skip
from xdscale.training.sums import loss_columns, means, term_sums, weighted_loss
from xdscale.training.throughput import peak_memory_gib
from xdscale.training.watchdog import Watchdog
from xdscale.training.weight_average import WeightAverage, using


@dataclass(kw_only=True)
class Trainer:
    """Everything one rank trains with.

    Attributes:
        engine: the DeepSpeed engine; its forward maps a batch to a `Term` for each objective.
        objectives: by name.
        source: training data, step by step.
        order: which samples a step has.
        validation: this rank's held-out batches; every rank has equally many.
        position: maps steps done to the checkpoint record.
        flops: FLOPs of forward and backward on a batch; nan where they are not known.
        matmul_flops_per_second: what this rank's device reaches on a plain matrix product, the base of MFU.
        run: the run folder.
        monitor: on the first rank only.
        skipped: the non-finite steps so far.
        watchdog: hears which phase this rank is in.
        best: the best held-out figure so far, whose checkpoint stays.
        average: of the weights, if the run keeps one; what validation measures then.
    """

    engine: Any
    recipe: Recipe
    ranks: Ranks
    objectives: dict[str, Objective]
    source: Prefetcher[StepData]
    order: SampleOrder
    validation: list[MicroBatch]
    position: Callable[[int], CheckpointPosition]
    flops: Callable[[dict[str, np.ndarray]], float]
    matmul_flops_per_second: float
    run: Path
    checkpoints: Path
    monitor: Monitor | None
    stop: StopRequest
    skipped: Skipped
    watchdog: Watchdog
    best: Best = field(default_factory=Best)
    average: WeightAverage | None = None

    def train(self, start_step: int, *, validate_first: bool) -> tuple[bool, int]:
        """Trains from `start_step` to the end, or until a signal, `run.stop_at_step` or `training.patience` ends it.

        A request to stop is honoured between steps and between held-out batches. Whatever it interrupts, there is a
        checkpoint of the last finished step afterwards, be it step 0.

        Args:
            start_step: steps already done.
            validate_first: whether the held-out losses after `start_step` are still to be measured.

        Returns:
            Whether a signal ended the run early, and the steps done; a checkpoint of that step is saved.
        """
        training, run = self.recipe.training, self.recipe.run
        last_step = max(start_step, min(training.steps, run.stop_at_step or training.steps))
        done, saved = start_step, start_step or None
        stopped = validate_first and not self._validate(done)
        # transformers hands pretrained encoders over in evaluation mode, without dropout.
        self.engine.train()
        while done < last_step and not stopped and not self.best.ended:
            if not self._step(done):
                stopped = True
                break
            done += 1
            if done % run.eval_every == 0 or done == training.steps:
                stopped = not self._validate(done)
            if done % run.checkpoint_every == 0 or done in (last_step, self.best.step) or self.best.ended:
                self._save(done)
                saved = done
        if stopped and saved != done:
            self._save(done)
        return stopped, done

    def _step(self, step: int) -> bool:
        """Makes one optimiser step; returns False, with nothing done, when any rank was asked to stop.

        Every objective's loss is a sum divided by its number of targets in the *global* batch, so any split over
        ranks, accumulation steps and micro-batches gives the same gradient. DeepSpeed averages over both; the factor
        `ranks × accumulation` undoes that.
        """
        began = time.perf_counter()
        waited = self.source.wait_seconds
        self.watchdog.enter("data", step)
        _, data = next(self.source)
        waited = self.source.wait_seconds - waited
        self.watchdog.enter("counts", step)
        counts, tokens, stopped = self._agree_on_counts(step, data)
        if stopped:
            return False
        rate = self._set_rate(step)
        _seed_dropout(self.recipe.training.seed, step, self.ranks)
        forget_gradients(self.engine)
        losses = [self._forward_backward(step, number, data, counts) for number in range(len(data.batches))]
        self.watchdog.enter("optimizer", step)
        scalars = self._means(sum(losses), counts)
        norm = plain_gradient_norm(self.engine)
        finite = np.isfinite(scalars["loss/total"])
        applied = make_step(self.engine, skip=not finite or (norm is not None and not np.isfinite(norm)))
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        if applied and self.average is not None:
            self.average.update()
        overflow = not applied and finite and self.engine.fp16_enabled()
        if not applied and not overflow:
            self._skip(step, torch.stack(losses), scalars, norm, data)
            return True
        self.skipped.in_row = 0
        self.skipped.overflows += overflow
        if self.monitor:
            seconds = time.perf_counter() - began
            flops = sum(self.flops(batch.arrays) for batch in data.batches)
            self.monitor.step(
                step + 1,
                scalars
                | {
                    "optim/lr": rate,
                    "optim/grad_norm": norm,
                    "throughput/tokens_per_second": tokens / seconds,
                    "data/wait_fraction": waited / seconds,
                    "memory/peak_gib": peak_memory_gib(self.engine.device),
                    "health/skipped_steps": self.skipped.steps,
                    "health/loss_scale_overflows": self.skipped.overflows,
                }
                | ({} if np.isnan(flops) else {"throughput/mfu": flops / seconds / self.matmul_flops_per_second}),
                data.samples,
            )
        return True

    def _set_rate(self, step: int) -> float:
        optim = self.recipe.optim
        rate = learning_rate(step, optim, self.recipe.training.steps)
        updates = step - self.skipped.steps - self.skipped.overflows
        set_learning_rate(self.engine, rate, optim, updates)
        return rate

    def _forward_backward(self, step: int, number: int, data: StepData, counts: dict[str, int]) -> torch.Tensor:
        """Adds one micro-batch's gradient, the mean of its passes; returns its sums as `term_sums`, their means too."""
        batch = data.batches[number]
        arrays = to_device(batch.arrays, self.engine.device)
        undo_average = self.ranks.world_size * len(data.batches)  # what DeepSpeed divides by, but for the passes
        passes, sums = pass_numbers(self.engine.module), []
        for which in passes:
            self.watchdog.enter("forward", step, number)
            outputs = self.engine(arrays, *which)
            loss = weighted_loss(outputs, self.objectives, counts, batch.targets)
            self.watchdog.enter("backward", step, number)
            self.engine.backward(loss * undo_average)
            sums.append(term_sums(outputs, self.objectives))
            if number < len(data.batches) - 1 or len(sums) < len(passes):
                self.engine.step()  # only counts: the update belongs to the last pass of the last micro-batch
        return sum(sums) / len(passes)

    def _agree_on_counts(self, step: int, data: StepData) -> tuple[dict[str, int], int, bool]:
        """Sums over ranks, in one exchange: targets per objective that the step carries, tokens, requests to stop."""
        mine = [sum(batch.targets.get(name, 0) for batch in data.batches) for name in self.objectives]
        mine += [sum(batch.tokens for batch in data.batches), int(self.stop.requested)]
        size = len(mine)
        mine += [int(name in batch.targets) for batch in data.batches for name in self.objectives]
        all_of_them = self.ranks.sum(torch.tensor(mine, device=self.engine.device)).tolist()
        *counts, tokens, stop = all_of_them[:size]
        carrying = np.reshape(all_of_them[size:], (len(data.batches), len(self.objectives)))
        self._check_carried(step, carrying)
        carried = carrying.any(0)
        return {name: count for name, count, is_in in zip(self.objectives, counts, carried) if is_in}, tokens, stop > 0

    def _check_carried(self, step: int, carrying: np.ndarray) -> None:
        """Checks how many ranks carry each objective in each micro-batch, [micro-batches, objectives].

        Raises:
            XdscaleError: some and not all, so that their exchanges would differ; or none, where the gradients of
                parameters that get none are not forgotten.
        """
        ranks = self.ranks.world_size
        for number, objective in np.argwhere(carrying < ranks):
            where, name = f"step {step + 1}, micro-batch {number}", list(self.objectives)[objective]
            if count := carrying[number, objective]:
                raise XdscaleError(
                    f"{where}: {count} of {ranks} ranks have {name!r} in its targets; it must be all of them or none"
                )
            offload = self.engine.zero_offload_optimizer()
            if offload and offload.device != "none":
                raise XdscaleError(
                    f"{where}: {name!r} is not in its targets; with zero_optimization.offload_optimizer DeepSpeed "
                    "would use an older gradient for it: leave offloading out"
                )

    def _means(self, sums: torch.Tensor, counts: dict[str, int]) -> dict[str, float]:
        """Returns losses and metrics of the global batch, of objectives that have targets there.

        The total is not finite where any loss sum is not.
        """
        scalars = means(self.ranks.sum(sums), self.objectives, counts)
        total = sum(self.objectives[name].weight * scalars[f"loss/{name}"] for name in counts)
        without = tuple(f"/{name}" for name, count in counts.items() if not count)
        return {"loss/total": total} | {name: value for name, value in scalars.items() if not name.endswith(without)}

    def _skip(self, step: int, sums: torch.Tensor, scalars: dict[str, float], norm: float, data: StepData) -> None:
        losses = sums[:, loss_columns(self.objectives)]
        entry = describe_skip(step, losses, scalars, norm, self.order, self.ranks, self.run)
        if self.monitor:
            self.monitor.skipped(step + 1, entry, data.samples, self.skipped.steps + 1)
        self.skipped.add(step + 1, self.recipe.run.max_skipped_in_row, entry["replay"])

    def _validate(self, step: int) -> bool:
        """Measures the held-out losses; returns False when a request to stop came in between."""
        with using(self.average):
            measured = evaluate(
                self.engine, self.validation, self.objectives, self.ranks, lambda number: self._go_on(step, number)
            )
        if measured is None:
            return False
        metrics, maps = measured
        self.best.see(step, metrics)
        if self.monitor:
            self.monitor.validation(step, metrics)
            for layer, weights in enumerate(maps):
                self.monitor.attention(step, layer, weights)
        return True

    def _go_on(self, step: int, number: int) -> bool:
        """Agrees before each held-out batch, so that no rank is left alone in a collective."""
        self.watchdog.enter("evaluation", step, number)
        stop = torch.tensor(int(self.stop.requested), device=self.engine.device)
        return self.ranks.sum(stop).item() == 0

    def _save(self, step: int) -> None:
        self.watchdog.enter("saving", step)
        run = self.recipe.run
        retention = Retention(newest=run.keep_checkpoints, every=run.keep_every, best=self.best.step)
        save_checkpoint(self.engine, self.checkpoints, self.position(step), retention, self.ranks, self.average)
        if self.monitor:
            self.monitor.checkpoint(step)


def _seed_dropout(seed: int, step: int, ranks: Ranks) -> None:
    """Makes dropout a function of (seed, step, rank), so that a resumed run draws what an unbroken one draws."""
    torch.manual_seed(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1, np.uint64)[0].item())
