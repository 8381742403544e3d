"""Held-out losses and accuracies."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device


def evaluate(
    engine: Any, batches: list[Any], names: list[str], ranks: Ranks, go_on: Callable[[int], bool]
) -> tuple[dict[str, float], list[np.ndarray]] | None:
    """Measures a model on the held-out batches; every rank calls it with equally many.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's micro-batches, always the same ones with the same masks.
        names: the objectives.
        ranks: this process among the others.
        go_on: asked before each batch, by its number; the same answer on every rank.

    Returns:
        None when `go_on` said no; else
        `loss/NAME` and `accuracy/NAME` per objective, means over all targets of all ranks; and the cross-attention
        maps of the first sample, one per cross-modal layer.
    """
    sums = torch.zeros(3 * len(names), dtype=torch.float64, device=engine.device)
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
            rows = [[*outputs[name], torch.tensor(batch.targets[name])] for name in names]
            sums += torch.stack([value.to(engine.device).double() for row in rows for value in row])
    engine.train()
    metrics = {}
    for name, (loss, correct, targets) in zip(names, ranks.sum(sums).view(-1, 3).tolist()):
        metrics[f"loss/{name}"] = loss / max(1, targets)
        metrics[f"accuracy/{name}"] = correct / max(1, targets)
    return metrics, [weights.float().cpu().numpy() for weights in itertools.chain(*maps)]
