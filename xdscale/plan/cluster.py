"""Step time on a cluster: computing at a stated rate, then collectives that nothing hides.

    step = samples per GPU / rate of one GPU + Σ collectives ( inside a node + between nodes ) / efficiency + latency

A collective runs on a ring inside each node (reduce-scatter and all-gather over the GPUs' links) and between nodes
(each GPU's share over the node's network cards together). One number is fitted, `NETWORK_EFFICIENCY`, on one published
row; docs/scaling.md and tests/plan/test_cluster.py name the rows it is checked on. That no overlap with the backward
pass is assumed makes the model pessimistic for configurations that overlap well.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from xdscale.plan.hardware import Gpu
from xdscale.plan.traffic import Collective

NETWORK_EFFICIENCY = 0.43
"""Share of the links' nominal rate that collectives reach, fitted on NVIDIA's 32 nodes of A100, sequence length 128."""

LATENCY_SECONDS = 10e-6
"""Of one step of a tree between nodes: an assumption, it matters beyond a hundred nodes."""

REFERENCE_MFU = 0.40
"""Model FLOPs utilisation on one GPU where nothing is stated. Published on A100: BERT-large at 128 tokens 44.7 %
(NVIDIA, 580 sequences/s), GPT of 125 and 350 million parameters 42.6 and 50.6 % (MosaicML); on H100 40.4 %."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        gpu: their kind.
        gpus: how many.
        nodes: machines they stand in, evenly.
    """

    gpu: Gpu
    gpus: int
    nodes: int

    @property
    def per_node(self) -> int:
        """GPUs of one node."""
        return -(-self.gpus // self.nodes)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    computing_seconds: float
    communicating_seconds: float


def collective_seconds(cluster: Cluster, operation: str, payload: float, calls: int = 1) -> float:
    """Returns the time of collectives.

    Args:
        cluster: where they run.
        operation: `all_reduce`, `reduce_scatter` or `all_gather`.
        payload: bytes that each rank hands over, in all calls together; for all_gather its own part.
        calls: over how many calls.
    """
    passes = 2 if operation == "all_reduce" else 1
    whole = payload * (cluster.gpus if operation == "all_gather" else 1)  # bytes of the unsharded tensor
    inside = passes * (cluster.per_node - 1) / cluster.per_node * whole / cluster.gpu.node_link
    # Each GPU of a node carries its share of the tensor, and the node's cards carry them all at once.
    between = passes * (cluster.nodes - 1) / cluster.nodes * whole / cluster.gpu.network
    latency = passes * calls * LATENCY_SECONDS * math.ceil(math.log2(cluster.nodes)) if cluster.nodes > 1 else 0.0
    return (inside + between) / NETWORK_EFFICIENCY + latency


def step_time(cluster: Cluster, samples: float, samples_per_second: float, listed: Iterable[Collective]) -> StepTime:
    """Returns the time of one optimiser step.

    Args:
        cluster: where it runs.
        samples: of each GPU, all micro-batches together.
        samples_per_second: of one GPU alone.
        listed: collectives of the step.
    """
    seconds = sum(collective_seconds(cluster, each.operation, each.payload_bytes, each.calls) for each in listed)
    return StepTime(samples / samples_per_second, seconds if cluster.gpus > 1 else 0.0)
