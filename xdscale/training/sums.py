"""The sums that a module gives for each objective, as one row of numbers: what ranks exchange."""

from collections.abc import Collection, Mapping

import torch

from xdscale.errors import XdscaleError
from xdscale.systems.contract import Objective, Term


def weighted_loss(
    outputs: Mapping[str, Term],
    objectives: Mapping[str, Objective],
    counts: Mapping[str, int],
    carried: Collection[str],
) -> torch.Tensor:
    """Returns a micro-batch's part of the total loss of the global batch.

    Args:
        outputs: of the module.
        objectives: by name.
        counts: targets of each in the global batch.
        carried: objectives that the micro-batch says it carries.

    Raises:
        XdscaleError: the module gave other terms than these, or the micro-batch carries none.
    """
    given = [name for name in objectives if name in outputs]
    wanted = [name for name in objectives if name in carried]
    if given != wanted or not wanted:
        raise XdscaleError(
            f"a micro-batch whose targets name {' and '.join(wanted) or 'no objective'} made the module give terms of "
            f"{' and '.join(given) or 'none'}; the two must be the same, and at least one"
        )
    losses = [objectives[name].weight * outputs[name].loss_sum / max(1, counts[name]) for name in given]
    return torch.stack(losses).sum()


def term_sums(outputs: Mapping[str, Term], objectives: Mapping[str, Objective]) -> torch.Tensor:
    """Returns fp64 [columns]: of each objective in turn its loss sum and its metrics' sums, 0 where it has no term."""
    nothing = torch.zeros((), device=next(iter(outputs.values())).loss_sum.device)
    values = []
    for name, objective in objectives.items():
        term = outputs.get(name)
        if term is None:
            values += [nothing] * (1 + len(objective.metrics))
        else:
            values += [term.loss_sum, *(term.metrics[metric] for metric in objective.metrics)]
    return torch.stack([value.detach().double() for value in values])


def loss_columns(objectives: Mapping[str, Objective]) -> list[int]:
    """Returns which columns of `term_sums` are losses."""
    columns, column = [], 0
    for objective in objectives.values():
        columns.append(column)
        column += 1 + len(objective.metrics)
    return columns


def means(sums: torch.Tensor, objectives: Mapping[str, Objective], counts: Mapping[str, int]) -> dict[str, float]:
    """Returns `loss/NAME` and `METRIC/NAME` for each objective that is counted.

    Args:
        sums: `term_sums` over all micro-batches and ranks.
        objectives: by name.
        counts: targets of each that these carry.
    """
    found, values = {}, iter(sums.tolist())
    for name, objective in objectives.items():
        for kind in ("loss", *objective.metrics):
            value = next(values)
            if name in counts:
                found[f"{kind}/{name}"] = value / max(1, counts[name])
    return found
