"""Puts a plan together: for each way to share the model states its memory, micro-batch, traffic, time and cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xdscale.ds_config import split_batch
from xdscale.plan.cluster import REFERENCE_MFU, Cluster, step_time
from xdscale.plan.configs import WAYS, ds_config, file_name, model_name
from xdscale.plan.hardware import usable_gib
from xdscale.plan.settings import Settings, kept_bytes, read_settings
from xdscale.plan.states import States, count, model_states, partition
from xdscale.plan.traffic import collectives
from xdscale.recipe import Recipe

if TYPE_CHECKING:
    from xdscale.plan.profile import Profile

GIB = 2**30

HOST_LINK = 25e9
"""Bytes per second between GPU and host: what PCIe 4.0 × 16 reaches. An assumption, for offloading only."""

HOST_MEMORY = 20e9
"""Bytes per second of the host's memory for each rank's AdamW. An assumption, for offloading only."""

_ADAMW_TOUCHES = 28
"""Bytes per parameter that AdamW reads and writes: weight, two moments, gradient."""

_NO_DIFFERENCE = 1.05
"""Step times nearer than this are the same: the model of the network is not better."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is made for.

    Attributes:
        cluster: the GPUs.
        memory_gib: of one GPU, as programs see it.
        mfu: share of the peak rate that computing reaches.
        price: dollars per GPU and hour; None where nothing is known.
    """

    cluster: Cluster
    memory_gib: float
    mfu: float = REFERENCE_MFU
    price: float | None

    @property
    def usable_bytes(self) -> float:
        """What may be filled."""
        return usable_gib(self.memory_gib) * GIB


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank.

    Attributes:
        kept: by autograd, at the end of the forward pass.
        working: beyond that at the fullest moment: gradients inside a layer, a chunk of logits.
    """

    kept: float
    working: float

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return self.kept + self.working


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One way to share the model states.

    Attributes:
        way: `zero0` to `zero3`, with or without `-offload`.
        states: model states and buffers of the first rank.
        activations: at the micro-batch.
        largest_micro_batch: that fits, 0 when none does.
        micro_batch: what training computes with where the largest is allowed (`xdscale.ds_config.split_batch`), or 0.
        accumulation: micro-batches per step and rank.
        padding: share of what ranks compute that no sequence of the global batch is left for.
        payload_bytes: handed to collectives by each rank in one step.
        wire_bytes: sent by each rank in one step, on rings.
        step_seconds: of one optimiser step; None where it does not fit.
        communication_seconds: of those, in collectives and host transfers.
        hours: of all steps of the recipe.
        cost: dollars, where a price is known.
        config: file name of its configuration in `ds_configs/`.
    """

    way: str
    states: States
    activations: Activations
    largest_micro_batch: int
    micro_batch: int
    accumulation: int
    padding: float
    payload_bytes: float
    wire_bytes: float
    step_seconds: float | None
    communication_seconds: float
    hours: float | None
    cost: float | None
    config: str

    @property
    def device_bytes(self) -> float:
        """Everything on the GPU."""
        return self.states.device + self.activations.total


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on a machine.

    Attributes:
        recipe: its name.
        trained: number of parameters that the optimizer updates.
        frozen: number of those that it does not.
        sequence_length: language tokens of a sequence.
        flops_per_sequence: forward and backward.
        pictures_per_step: that all ranks together decode.
        machine: what it is made for.
        precision: of parameters and activations.
        checkpointing: whether layers are recomputed.
        rows: one for each way.
        best: the simplest of those ways in `WAYS` that are fastest within 5 %; None when nothing fits.
    """

    recipe: str
    trained: int
    frozen: int
    sequence_length: int
    flops_per_sequence: float
    pictures_per_step: float
    machine: Machine
    precision: str
    checkpointing: bool
    rows: tuple[PlanRow, ...]
    best: str | None


def make_plan(name: str, recipe: Recipe, machine: Machine, profile: "Profile") -> Plan:
    """Plans a run.

    Args:
        name: of the recipe.
        recipe: to be trained.
        machine: to train on.
        profile: of the recipe's model, in the precision to be trained in.

    Raises:
        XdscaleError: there are more GPUs than sequences in a step.
    """
    rows = tuple(_RowMaker(recipe, machine, profile).rows())
    fitting = [row for row in rows if row.step_seconds is not None and row.way in WAYS]
    fastest = min((row.step_seconds for row in fitting), default=0.0)
    best = next((row for row in fitting if row.step_seconds <= _NO_DIFFERENCE * fastest), None)
    return Plan(
        recipe=name,
        trained=count(profile.modules, trained=True),
        frozen=count(profile.modules, trained=False),
        sequence_length=profile.sequence_length,
        flops_per_sequence=profile.flops_per_sequence,
        pictures_per_step=profile.pictures_per_sequence * recipe.training.global_batch,
        machine=machine,
        precision=profile.precision,
        checkpointing=profile.checkpointing,
        rows=rows,
        best=best.way if best else None,
    )


@dataclass(frozen=True)
class _RowMaker:
    recipe: Recipe
    machine: Machine
    profile: "Profile"

    def rows(self) -> Iterator[PlanRow]:
        # In fp16 DeepSpeed trains wrongly where nothing is shared, and a run is refused there.
        for way in WAYS if self.profile.precision == "fp16" else ("zero0", *WAYS):
            parameters, checkpointing = count(self.profile.modules), self.profile.checkpointing
            values = ds_config(way, self.profile.precision, 1, parameters, checkpointing=checkpointing)
            yield self.row(way, replace(read_settings(values), kept_bytes=kept_bytes(self.recipe.optim)))

    def row(self, way: str, settings: Settings) -> PlanRow:
        gpus = self.machine.cluster.gpus
        states = model_states(self.profile.modules, settings, gpus)
        largest = self._largest(states)
        split = split_batch(self.recipe.training.global_batch, gpus, max(1, largest))
        settings = replace(settings, micro_batch=split.micro_batch)
        listed = collectives(self.profile.modules, settings, gpus, split.accumulation, self.profile.objectives)
        rate = self.machine.mfu * self.machine.cluster.gpu.peak_flops / self.profile.flops_per_sequence
        step = step_time(self.machine.cluster, split.accumulation * split.micro_batch, rate, listed)
        kept = self.profile.kept(split.micro_batch)
        waiting = step.communicating_seconds + self._host_seconds(settings)
        seconds = step.computing_seconds + waiting if largest else None
        hours = seconds * self.recipe.training.steps / 3600 if seconds else None
        return PlanRow(
            way=way,
            states=states,
            activations=Activations(kept, self.profile.peak(split.micro_batch) - kept),
            largest_micro_batch=largest,
            micro_batch=split.micro_batch if largest else 0,
            accumulation=split.accumulation,
            padding=split.padding,
            payload_bytes=sum(each.payload_bytes for each in listed),
            wire_bytes=sum(each.wire_bytes(gpus) for each in listed),
            step_seconds=seconds,
            communication_seconds=waiting,
            hours=hours,
            cost=hours * gpus * self.machine.price if hours and self.machine.price is not None else None,
            config=file_name(model_name(self.recipe), way, settings.precision) if way in WAYS else "",
        )

    def _largest(self, states: States) -> int:
        room = self.machine.usable_bytes - states.device - self.profile.peak.fixed
        return max(0, int(room // self.profile.peak.per_sample))

    def _host_seconds(self, settings: Settings) -> float:
        """Gradients to the host, AdamW there, parameters back."""
        if not settings.offload_optimizer:
            return 0.0
        part = partition(count(self.profile.modules, trained=True), self.machine.cluster.gpus)
        return part * ((4 + settings.parameter_bytes) / HOST_LINK + _ADAMW_TOUCHES / HOST_MEMORY)
