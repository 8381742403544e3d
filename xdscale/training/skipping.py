"""Steps whose loss or gradient is not finite: which samples they had, and when there are too many in a row."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.systems.contract import SampleOrder
from xdscale.training.distributed import Ranks


@dataclass
class Skipped:
    """How many steps were left out; continued from the log when a run is.

    Attributes:
        steps: steps whose loss or gradient was not finite.
        in_row: how many of them came last, one after the other.
        overflows: steps that fp16's loss scaling left out while the loss was finite; normal at the start of a run.
    """

    steps: int = 0
    in_row: int = 0
    overflows: int = 0

    def add(self, step: int, most_in_row: int, command: str) -> None:
        """Counts one step more.

        Raises:
            XdscaleError: too many in a row.
        """
        self.steps += 1
        self.in_row += 1
        if self.in_row >= most_in_row:
            raise XdscaleError(
                f"{count_of(self.in_row, 'step')} in a row up to step {step} had no finite loss and gradient "
                f"(run.max_skipped_in_row = {most_in_row}); the parameters are those of before them. "
                f"See why with '{command}'; then lower optim.learning_rate, use bf16 for fp16, or repair the data"
            )


def skipped_so_far(entries: list[dict[str, Any]]) -> Skipped:
    """Returns the counts that stand in the entries of a run's log."""
    counts = Skipped()
    for entry in entries:
        if entry["kind"] == "skipped":
            counts.steps, counts.in_row = entry["health/skipped_steps"], counts.in_row + 1
        elif entry["kind"] == "step":
            counts.in_row, counts.overflows = 0, entry.get("health/loss_scale_overflows", 0)
    return counts


def describe_skip(
    step: int, losses: torch.Tensor, scalars: dict[str, float], norm: float, order: SampleOrder, ranks: Ranks, run: Path
) -> dict[str, Any]:
    """Says which samples a skipped step had, and which of them are suspects; every rank calls it.

    Args:
        step: the step, counted from 0.
        losses: this rank's loss sums, [micro-batches, objectives].
        scalars: the mean losses over all ranks.
        norm: global gradient norm.
        order: where the step's samples come from.
        ranks: this process among the others.
        run: the run folder, for the command.

    Returns:
        The entry for the log: losses and norm, the first rank whose loss was not
        finite (None when only the gradient was), suspects as `{rank, micro_batch, sample_ids}`, the epochs and sample
        ids of the global batch, and the command that replays it.
    """
    bad = (~torch.isfinite(losses)).any(1).tolist()
    mine = [
        {"rank": ranks.rank, "micro_batch": number, "sample_ids": slots.sample_ids[slots.real].tolist()}
        for number, slots in enumerate(order.slots(step))
        if bad[number]
    ]
    suspects = [suspect for part in ranks.gather(mine) for suspect in part]
    suspects.sort(key=lambda suspect: (suspect["micro_batch"], suspect["rank"]))
    epochs, sample_ids = order.global_batch_ids(step)
    return {
        **scalars,
        "optim/grad_norm": norm,
        "first_rank": suspects[0]["rank"] if suspects else None,
        "suspects": suspects,
        "epochs": epochs.tolist(),
        "sample_ids": sample_ids.tolist(),
        "replay": f"xdscale replay {run} {step + 1}",
    }
