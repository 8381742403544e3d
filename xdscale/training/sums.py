"""The sums that a module gives for each objective, as one row of numbers: what ranks exchange."""

from collections.abc import Mapping

import torch

from xdscale.systems.contract import Objective, Term


def term_sums(outputs: Mapping[str, Term], objectives: Mapping[str, Objective]) -> torch.Tensor:
    """Returns fp64 [columns]: of each objective in turn its loss sum and its metrics' sums."""
    values = [
        value
        for name, objective in objectives.items()
        for value in (outputs[name].loss_sum, *(outputs[name].metrics[metric] for metric in objective.metrics))
    ]
    return torch.stack([value.detach().double() for value in values])


def loss_columns(objectives: Mapping[str, Objective]) -> list[int]:
    """Returns which columns of `term_sums` are losses."""
    columns, column = [], 0
    for objective in objectives.values():
        columns.append(column)
        column += 1 + len(objective.metrics)
    return columns


def means(sums: torch.Tensor, objectives: Mapping[str, Objective], counts: Mapping[str, int]) -> dict[str, float]:
    """Returns `loss/NAME` and `METRIC/NAME` for each objective.

    Args:
        sums: `term_sums` over all micro-batches and ranks.
        objectives: by name.
        counts: targets of each in the same.
    """
    found, values = {}, iter(sums.tolist())
    for name, objective in objectives.items():
        for kind in ("loss", *objective.metrics):
            found[f"{kind}/{name}"] = next(values) / max(1, counts[name])
    return found
