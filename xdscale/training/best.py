"""The best held-out figure of a run, and whether it is time to stop: worked out from the run's log."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.names import unknown_key
from xdscale.recipe import Recipe, Training
from xdscale.systems.contract import MicroBatch, Objective
from xdscale.training.checkpoint_folder import checkpoint_name
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log


@dataclass
class Best:
    """The best figure that validations of a run have had, those before its first step aside.

    Attributes:
        metric: `loss/NAME`, of which less is better, or another, of which more is; None for none.
        patience: validations in a row without a better figure that end the run; None for no end.
        step: steps done at the best one; None before any.
        value: the figure there.
        waited: validations since.
    """

    metric: str | None = None
    patience: int | None = None
    step: int | None = None
    value: float = math.nan
    waited: int = 0

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a validation after `step` steps; one that is not finite is not better.

        Raises:
            XdscaleError: it has no such figure, as in a run folder whose recipe or log was changed by hand.
        """
        if self.metric is None or step == 0:
            return
        try:
            value = float(metrics[self.metric])
        except (KeyError, TypeError, ValueError):
            known = ", ".join(name for name in metrics if "/" in name)
            raise XdscaleError(
                f"training.best = {self.metric}: the validation after step {step} has no such figure, only {known}"
            ) from None
        gain = self.value - value if self.metric.startswith("loss/") else value - self.value
        if math.isfinite(value) and (self.step is None or gain > 0):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def ended(self) -> bool:
        """Whether the run has waited long enough for a better figure."""
        return self.patience is not None and self.waited >= self.patience


def best_so_far(training: Training, entries: Iterable[Mapping[str, Any]]) -> Best:
    """Returns the best figure in the entries of a run's log."""
    best = Best(training.best, training.patience)
    for entry in entries:
        if entry["kind"] == "validation":
            best.see(entry["step"], {name.removeprefix("validation/"): value for name, value in entry.items()})
    return best


def final_step(run: Path, recipe: Recipe) -> int | None:
    """Returns the step whose checkpoint a run gives others: the best one, or None for the newest."""
    if recipe.training.best is None:
        return None
    step = best_so_far(recipe.training, read_log(run / "log.jsonl")).step
    return step if step is not None and (run / "checkpoints" / checkpoint_name(step)).is_dir() else None


def check_metric(training: Training, objectives: Mapping[str, Objective]) -> None:
    """Checks that a system measures what the recipe names.

    Raises:
        XdscaleError: it does not, and what it does.
    """
    known = [f"{kind}/{name}" for name, objective in objectives.items() for kind in ("loss", *objective.metrics)]
    if training.best is not None and training.best not in known:
        raise XdscaleError(f"training.best = {training.best}: not measured here; {unknown_key(training.best, known)}")


def check_held_out(
    training: Training, objectives: Iterable[str], validation: Sequence[MicroBatch], ranks: Ranks
) -> None:
    """Checks the held-out batches; every rank calls it.

    Raises:
        XdscaleError: ranks carry unlike objectives in batches of one number, so that their exchanges would differ; or
            the objective that the recipe names has no targets in any.
    """
    carried = ranks.gather([[name for name in objectives if name in batch.targets] for batch in validation])
    for rank, batches in enumerate(carried):
        for number, names in enumerate(batches):
            if names != carried[0][number]:
                raise XdscaleError(
                    f"held-out micro-batch {number}: rank {rank} has {names} in its targets, rank 0 "
                    f"{carried[0][number]}; all ranks must have the same"
                )
    name = (training.best or "").partition("/")[2]
    if name and not sum(ranks.gather(sum(batch.targets.get(name, 0) for batch in validation))):
        raise XdscaleError(
            f"training.best = {training.best}: the held-out samples have no targets of {name!r}; name another figure, "
            "or raise run.eval_samples"
        )
