"""Bytes that ranks hand to collectives in one optimiser step, exactly, and what travels for them.

Counted is the payload: the size of the tensor that each rank passes to an all-reduce, all-gather (its own part) or
reduce-scatter. Included are the loop's own exchanges of counts and losses, the gradient norm and the overflow flag;
excluded are saving, validating and the first step, in which stage 3 also compares its trace between ranks.

DeepSpeed 0.19.8 reduces the gradients of every micro-batch under stages 2 and 3, once per step under stages 0 and 1.
Stage 2 all-reduces them (`use_multi_rank_bucket_allreduce`), stage 3 scatters.
"""

from typing import NamedTuple

from xdscale.plan.settings import Settings
from xdscale.plan.states import Module, partition, shard, sizes

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Collective(NamedTuple):
    """Collectives of one kind in one optimiser step.

    Attributes:
        operation: `all_reduce`, `all_gather` or `reduce_scatter`.
        dtype: torch's name of the element type.
        payload_bytes: what each rank hands over.
        why: what they are for.
        calls: about how many, for their latency.
    """

    operation: str
    dtype: str
    payload_bytes: int
    why: str
    calls: int = 1

    def wire_bytes(self, ranks: int) -> float:
        """Returns the bytes that each rank sends when the collective runs on a ring."""
        share = {
            "all_reduce": 2 * (ranks - 1) / ranks,
            "reduce_scatter": (ranks - 1) / ranks,
            "all_gather": ranks - 1,
        }
        return self.payload_bytes * share[self.operation]


def collectives(found: list[Module], settings: Settings, ranks: int, accumulation: int, tasks: int) -> list[Collective]:
    """Returns the collectives of one optimiser step.

    Args:
        found: the modules of the model.
        settings: of DeepSpeed.
        ranks: their number.
        accumulation: micro-batches per step and rank.
        tasks: number of objectives that are on.
    """
    dtype, width = _DTYPES[settings.precision], settings.parameter_bytes
    listed = [
        Collective(
            "all_reduce",
            "int64",
            8 * (tasks + 2 + accumulation * tasks),
            "targets, tokens, stop requests, objectives of each micro-batch",
        ),
        Collective("all_reduce", "float64", 8 * 2 * tasks, "losses"),
    ]
    if settings.stage == 3:
        listed += _stage_3(found, settings, ranks, accumulation)
    else:
        trained = sum(sizes(found, trained=True))
        part = partition(trained, ranks)
        unsharded = settings.stage == 0
        bf16_stage_1 = settings.stage == 1 and settings.precision == "bf16" and not settings.offload_optimizer
        times = accumulation if settings.stage == 2 else 1
        elements = part * ranks if bf16_stage_1 else trained
        calls = times * -(-elements // settings.reduce_bucket)
        listed.append(Collective("all_reduce", dtype, times * width * elements, "gradients", calls))
        if not unsharded:
            listed.append(Collective("all_gather", dtype, width * part, "updated parameters"))
        if settings.precision == "fp32" or not (unsharded or bf16_stage_1):
            listed.append(Collective("all_reduce", "float32", 4, "gradient norm"))
        if settings.precision != "fp32" and not (unsharded or bf16_stage_1):
            listed.append(Collective("all_reduce", "uint8", 1, "overflow"))
    return listed if ranks > 1 else []


def keeps_gathered(found: list[Module], settings: Settings) -> bool | None:
    """Returns whether stage 3 gathers each parameter once per micro-batch, or anew for each use; None if between.

    DeepSpeed releases a parameter after a module unless it is needed again within the reuse distance. Twice all
    parameters is the longest distance there is; with distance 0 and no prefetching nothing is kept. In between, and
    where released parameters are needed once more for recomputing layers, what is counted is an estimate.
    """
    if settings.reuse_distance >= 2 * sum(module.elements + module.tied for module in found):
        return True
    released = settings.reuse_distance == settings.prefetch_bucket == 0 and not settings.checkpointing
    return False if released else None


def _stage_3(found: list[Module], settings: Settings, ranks: int, accumulation: int) -> list[Collective]:
    dtype, width = _DTYPES[settings.precision], settings.parameter_bytes
    large = settings.persistence_threshold
    once = sum(shard(size, ranks) for module in found for size in module.own if size > large)
    if keeps_gathered(found, settings) is not True:
        # Before each forward and, where something is trained, each backward; a tied weight for each of its two modules.
        uses = [(size, 1 + module.trained) for module in found for size in (*module.own, module.tied) if size > large]
        once = sum(times * shard(size, ranks) for size, times in uses)
    gathers = accumulation * 2 * sum(any(size > large for size in (*module.own, module.tied)) for module in found)
    persistent = sum(shard(size, ranks) for module in found for size in module.own if size <= large)
    scattered = ranks * sum(shard(size, ranks) for size in sizes(found, trained=True))
    listed = [
        Collective("all_gather", dtype, accumulation * width * once, "parameters to compute with", gathers),
        Collective("all_gather", dtype, width * persistent, "updated small parameters"),
        Collective(
            "reduce_scatter",
            dtype,
            accumulation * width * scattered,
            "gradients",
            accumulation * -(-scattered // settings.reduce_bucket),
        ),
    ]
    if settings.offload_optimizer:
        listed.append(Collective("all_reduce", "float32", 4, "gradient norm"))
    else:
        listed.append(Collective("all_reduce", "float64", 8, "gradient norm"))
    if settings.precision == "fp16":
        listed.append(Collective("all_reduce", "uint8", 1, "overflow"))
    return listed
