"""Bytes of model states per rank: what DeepSpeed 0.19.8 really holds, by stage and precision.

Read in DeepSpeed's source and checked on two CPU ranks, by the unique storages of all live tensors (tests/plan). The
moment is the end of a backward pass, the fuller one of the first and the last of a step: nothing later in the step
needs more than the activations did before it. P is the number of trained parameters, N of
ranks. What one expects from the ZeRO paper holds, with these exceptions:

- Stage 1 in bf16 with fp32 accumulation is another optimizer (`BF16_Optimizer`): it keeps all gradients twice, 2P bytes
  in bf16 and 4P in fp32. Stage 2 keeps 4P / N.
- Stage 1 in fp16 or fp32 keeps all gradients in fp32 until the step's last backward pass.
- Stage 2 in fp32 keeps whole gradients of the parameters that straddle two partitions, not only their share.
- Stage 3 keeps parameters of few elements whole on every rank, beside their shard.
- Offloading stage 2 leaves the fp32 gradient partition on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from xdscale.plan.settings import Settings

_MASTER, _SUM = 4, 4
"""Bytes per parameter of the fp32 master weight, and of a gradient summed in fp32."""


class Module(NamedTuple):
    """A module that holds parameters itself.

    Attributes:
        name: dotted path, for messages.
        own: elements of each of its parameters, in order, without those that an earlier module holds as well.
        trained: whether the optimizer updates them.
        tied: elements of a parameter that it shares with an earlier module.
    """

    name: str
    own: tuple[int, ...]
    trained: bool = True
    tied: int = 0

    @property
    def elements(self) -> int:
        """Elements of its parameters, those that are tied left out."""
        return sum(self.own)


def count(found: list[Module], *, trained: bool | None = None) -> int:
    """Returns the number of parameters of all modules, or only of those that are trained or are not."""
    return sum(module.elements for module in found if trained is None or module.trained == trained)


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank.

    Attributes:
        parameters: in the precision of the forward pass, on the device.
        gradients: on the device.
        optimizer: master weights, moments and the moving average, on the device.
        buckets: buffers through which gradients are reduced, on the device.
        gathered: parameters that stage 3 gathers for computing, at their most.
        host: what offloading moves to the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int = 0
    host: int = 0

    @property
    def resident(self) -> int:
        """Bytes of model states wherever they are: without buffers, and without what is gathered only to compute."""
        return self.parameters + self.gradients + self.optimizer + self.host

    @property
    def device(self) -> int:
        """Bytes on the device, buffers included."""
        return self.parameters + self.gradients + self.optimizer + self.buckets + self.gathered


def model_states(found: list[Module], settings: Settings, ranks: int, rank: int = 0) -> States:
    """Returns the bytes of model states of one rank.

    Args:
        found: the modules of the model.
        settings: of DeepSpeed.
        ranks: their number.
        rank: whose bytes; ranks differ only in what straddles partitions, in fp32.
    """
    if settings.stage == 0:
        return _unsharded(found, settings)
    if settings.stage == 3:
        return _stage_3(found, settings, ranks)
    return _stages_1_and_2(found, settings, ranks, rank)


def sizes(found: list[Module], *, trained: bool) -> Iterator[int]:
    """Yields the elements of each parameter that is trained, or that is not."""
    return chain.from_iterable(module.own for module in found if module.trained == trained)


def partition(parameters: int, ranks: int) -> int:
    """Returns the elements of one rank's part of the flat buffer, which is padded to a multiple of two per rank."""
    return -(-parameters // (2 * ranks)) * 2


def shard(elements: int, ranks: int) -> int:
    """Returns the elements of one rank's part of a parameter under stage 3."""
    return -(-elements // ranks)


def _unsharded(found: list[Module], settings: Settings) -> States:
    trained, frozen = (sum(sizes(found, trained=kind)) for kind in (True, False))
    width = settings.parameter_bytes
    master = 0 if settings.precision == "fp32" else _MASTER
    return States(
        parameters=width * (trained + frozen),
        gradients=width * trained,
        optimizer=(master + settings.kept_bytes) * trained,
        buckets=width * trained,  # flattened copy that is reduced, in pieces of 500 million elements
    )


def _stages_1_and_2(found: list[Module], settings: Settings, ranks: int, rank: int) -> States:
    trained = list(sizes(found, trained=True))
    part, width = partition(sum(trained), ranks), settings.parameter_bytes
    parameters = width * (part * ranks + sum(sizes(found, trained=False)))
    state = (_MASTER + settings.kept_bytes) * part
    gradients, buckets = _SUM * part, settings.reduce_bucket * width * (2 if settings.overlap else 1)
    if settings.precision == "fp32":
        gradients = _SUM * sum(_touching(trained, rank * part, (rank + 1) * part))
        gradients = max(gradients, _SUM * sum(trained) * (settings.stage == 1))
    elif settings.stage == 1 and settings.precision == "bf16" and not settings.offload_optimizer:
        gradients = width * sum(trained) + _SUM * part * ranks
        buckets = width * part * ranks  # the sums in bf16, on their way
    elif settings.stage == 1:
        gradients = _SUM * sum(trained)
        buckets *= _SUM // width  # fp32 sums go through it
    if not settings.offload_optimizer:
        return States(parameters=parameters, gradients=gradients, optimizer=state, buckets=buckets)
    longest = max(trained)
    return States(
        parameters=parameters,
        gradients=gradients,
        optimizer=0,
        buckets=buckets + width * longest,
        # Master weights, moments, their gradients, a copy of the partition on its way back, the longest gradient.
        host=state + (_SUM + width) * part + width * longest,
    )


def _stage_3(found: list[Module], settings: Settings, ranks: int) -> States:
    width = settings.parameter_bytes
    everything = [size for module in found for size in module.own]
    shards = sum(shard(size, ranks) for size in everything)
    part = sum(shard(size, ranks) for size in sizes(found, trained=True))
    persistent = sum(shard(size, ranks) * ranks for size in everything if size <= settings.persistence_threshold)
    state = (_MASTER + settings.kept_bytes) * part
    return States(
        parameters=width * (persistent + (0 if settings.offload_parameters else shards)),
        gradients=0 if settings.offload_optimizer else _SUM * part,
        optimizer=0 if settings.offload_optimizer else state,
        buckets=width * settings.reduce_bucket,
        gathered=width * _gathered(found, settings),
        # Offloaded: the sums of gradients, and a second copy of them for the optimizer.
        host=(state + 2 * _SUM * part if settings.offload_optimizer else 0)
        + (width * shards if settings.offload_parameters else 0),
    )


def _gathered(found: list[Module], settings: Settings) -> int:
    """Returns the most elements that are gathered at once: all, or the largest module, its successor and prefetches."""
    large = [
        sum(size for size in (*module.own, module.tied) if size > settings.persistence_threshold) for module in found
    ]
    everything = sum(size for module in found for size in module.own if size > settings.persistence_threshold)
    return min(everything, settings.reuse_distance + settings.prefetch_bucket + 2 * max(large))


def _touching(trained: list[int], begin: int, end: int) -> Iterator[int]:
    """Yields the sizes of the parameters that lie in the flat range, whole even where they stick out of it."""
    offset = 0
    for size in trained:
        if offset < end and offset + size > begin:
            yield size
        offset += size
