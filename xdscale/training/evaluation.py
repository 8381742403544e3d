"""Held-out losses and metrics."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from xdscale.systems.contract import Objective
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.sums import means, term_sums


def evaluate(
    engine: Any, batches: list[Any], objectives: dict[str, Objective], ranks: Ranks, go_on: Callable[[int], bool]
) -> tuple[dict[str, float], list[np.ndarray]] | None:
    """Measures a model on the held-out batches; every rank calls it with equally many.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches, always the same ones with the same masks.
        objectives: by name.
        ranks: this process among the others.
        go_on: asked before each batch, by its number; the same answer on every rank.

    Returns:
        None when `go_on` said no; else
        `loss/NAME` and `METRIC/NAME` per objective that has targets there, means over all of them on all ranks; and the
        cross-attention maps of the first sample, one per cross-modal layer.
    """
    columns = sum(1 + len(objective.metrics) for objective in objectives.values())
    carried = [name for name in objectives if any(name in batch.targets for batch in batches)]
    sums = torch.zeros(columns + len(carried), dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad(), ExitStack() as recording:
        # Every rank records: under ZeRO-3 a forward is a collective.
        maps = [
            recording.enter_context(part.recorded_attention())
            for part in engine.module.modules()
            if hasattr(part, "recorded_attention")
        ]
        for number, batch in enumerate(batches):
            if not go_on(number):
                engine.train()
                return None
            outputs = engine(to_device(batch.arrays, engine.device))
            recording.close()  # of the first batch alone
            sums[:columns] += term_sums(outputs, objectives)
            sums[columns:] += torch.tensor([batch.targets.get(name, 0) for name in carried], device=engine.device)
    engine.train()
    sums = ranks.sum(sums)
    counts = {name: int(count) for name, count in zip(carried, sums[columns:].tolist()) if count}
    attention = [weights.float().cpu().numpy() for weights in itertools.chain(*maps)]
    return means(sums[:columns], objectives, counts), attention
