"""What the engine asks of a system, and how a recipe's is found."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe
from xdscale.registry import implementation

if TYPE_CHECKING:  # data comes without it
    import torch
    from torch import nn

    from xdscale.shards.regions import Regions


class Term(NamedTuple):
    """What a module's forward gives for an objective: sums over the targets of a micro-batch.

    Attributes:
        loss_sum: fp32 scalar. Where the micro-batch carries the objective but has no targets it is 0 and still has
            (zero) gradients, so that every rank runs the same collectives.
        metrics: scalars by name, such as the number of right predictions as "accuracy"; means over the targets of all
            ranks are logged.
    """

    loss_sum: "torch.Tensor"
    metrics: "Mapping[str, torch.Tensor]" = {}

    @classmethod
    def scored(cls, losses: "torch.Tensor", correct: "torch.Tensor") -> "Term":
        """Returns the term of a classification.

        Args:
            losses: of its targets, [n], or their sum.
            correct: which of them are predicted right, bool [n], or how many.
        """
        return cls(losses.sum(), {"accuracy": correct.sum()})


class Objective(NamedTuple):
    """A loss that is minimised: the weight of its mean in the total, and the names of its metrics."""

    weight: float
    metrics: tuple[str, ...] = ("accuracy",)


@dataclass(frozen=True)
class Slots:
    """Which samples make up a micro-batch of one rank.

    Attributes:
        epochs: int64 [b].
        sample_ids: int64 [b].
        real: bool [b]; False marks a padding slot, which repeats some sample with weight zero.
    """

    epochs: np.ndarray
    sample_ids: np.ndarray
    real: np.ndarray

    @classmethod
    def of(cls, sample_ids: np.ndarray) -> Self:
        """Returns slots of these samples in the first epoch, none of them padding."""
        return cls(np.zeros_like(sample_ids), sample_ids, np.ones(len(sample_ids), bool))

    def where(self, chosen: np.ndarray) -> Self:
        """Returns the slots for which `chosen`, bool [b], is true."""
        return type(self)(self.epochs[chosen], self.sample_ids[chosen], self.real[chosen])


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes.

    Attributes:
        arrays: the module's inputs and labels by name. The first dimension of the first one counts the samples; one
            without dimensions reaches the module as a plain number. Floats keep their dtype, whatever it computes in.
        targets: how many targets each objective that it carries has in it, 0 for none. One that it does not carry has
            neither an entry here nor a term; the micro-batches of one number carry the same ones on all ranks.
        tokens: of real samples.
        regions: of the images that were read, where a task is to make something of them.
    """

    arrays: dict[str, np.ndarray]
    targets: dict[str, int]
    tokens: int
    regions: "Regions | None" = None


class Collator(Protocol):
    """Makes micro-batches; what it draws depends on seed, epoch and sample alone."""

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares samples."""

    def prefetch(self, step: list[Slots]) -> None:
        """Says that the samples of a step will be read soon; returns at once."""

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns all that is drawn for samples, as integers, reading nothing.

        Its hash proves that a run goes on as it was.
        """


class ExampleCollator(Collator, Protocol):
    """Makes micro-batches of a task's examples; the one objective is called "task"."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def first_cut(self) -> tuple[int, int]:
        """Returns how many examples are longer than the model reads, and the number of the first one."""


class SampleOrder(Protocol):
    """Which samples a step has; steps count from 0."""

    def slots(self, step: int) -> list[Slots]:
        """Returns this rank's micro-batches."""

    def position(self, step: int) -> Any:
        """Returns where the order stands before a step, with `epoch` and `index` of the next sample."""

    def global_batch_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and sample ids of all ranks together."""


class Data(NamedTuple):
    """What a rank reads.

    Attributes:
        order: which training samples a step has.
        collate: makes batches of them.
        validation: this rank's held-out batches, see `xdscale.data.held_out`; every rank has equally many.
        fingerprints: SHA-256 (hex) of each table or file, by name; kept in checkpoints.
        damaged: what is wrong with each shard that the run does without, by file name; of several datasets by folder
            and file name.
        remote: whether shards are fetched as they are needed, so that the collator is told of steps ahead.
        notes: what a person should know of the data.
    """

    order: SampleOrder
    collate: Collator
    validation: list[MicroBatch]
    fingerprints: dict[str, str]
    damaged: dict[str, str] = {}
    remote: bool = False
    notes: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where in a run data is opened.

    Attributes:
        ranks: this process among the others (see `xdscale.training.distributed.Ranks`).
        micro_batch: samples per forward of one rank.
        tick: called now and then during long work.
    """

    ranks: Any
    micro_batch: int
    tick: Callable[[], None] = lambda: None


class PartCount(NamedTuple):
    """One line of the table of parameters.

    Attributes:
        part: what is counted.
        parameters: how many it has; tied decoder weights count once, with the embedding they share.
        total: whether this line sums up lines above it.
    """

    part: str
    parameters: int
    total: bool = False


class System(ABC):
    """A way of training; made from its recipe. Its constructor reads nothing yet."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def objectives(self) -> dict[str, Objective]:
        """Returns the objectives that are on, by name."""
        return {name: Objective(weight) for name, weight in self.recipe.objectives.weights().items()}

    @abstractmethod
    def open(self, place: Place) -> Data:
        """Finds and checks the data, on every rank together.

        Raises:
            XdscaleError: it is missing, damaged or does not fit the model.
        """

    @abstractmethod
    def build(self) -> "nn.Module":
        """Builds the module: `forward(arrays as tensors) -> {objective: Term}`, a term for each that the arrays carry.

        `enable_activation_checkpointing()` of it, and of its parts, is called where a DeepSpeed config asks for that.
        With `passes`, a number above 1, training runs forward and backward so often for a micro-batch, as
        `forward(arrays, number)` from 0 on, and averages gradients and sums. What one pass leaves for the next, such
        as the gradient of a perturbation, the module keeps itself. Validation calls `forward(arrays)`.
        New parts take their values from torch's global generator, which is seeded before, alike on all ranks. What
        `model.start` and `run.kernels` say is done to the module afterwards.

        Raises:
            XdscaleError: weights are missing, damaged or do not fit.
        """

    def example(
        self, module: "nn.Module", samples: int, length: int | None = None, *, longest: bool = False
    ) -> MicroBatch:
        """Invents a micro-batch, for plans.

        Args:
            module: that `build` returned; it may be on the meta device.
            samples: how many.
            length: tokens of each; None for as many as the module takes.
            longest: whether what else varies in length is as long as it gets, instead of average.

        Raises:
            XdscaleError: the module takes fewer tokens than `length`, or this system invents none.
        """
        raise XdscaleError(f"a run of {self.recipe.system!r} cannot be planned: its system invents no samples")

    @abstractmethod
    def parts(self, module: "nn.Module") -> "dict[str, nn.Module]":
        """Returns the module's parts by name, for counting, planning and the optimizer's groups."""

    def count(self, module: "nn.Module") -> list[PartCount]:
        """Returns the table of parameters, part by part."""
        rows, before = [], set()
        for name, part in self.parts(module).items():
            rows.append(PartCount(name, parameter_count(part, shared=before)))
            before |= set(part.parameters())
        return [*rows, PartCount("the whole module", parameter_count(module), total=True)]

    def keep(self, folder: Path) -> None:  # noqa: B027 - most keep nothing
        """Writes into a new run's folder what exporting needs beside the weights: configurations, tokenizers."""

    def export(self, state: "dict[str, torch.Tensor]", run: Path, out: Path) -> str:
        """Writes a run's weights for others to read.

        Args:
            state: the module's fp32 weights.
            run: the run folder, with what `keep` wrote.
            out: an empty folder.

        Returns:
            What was written, in words.

        Raises:
            XdscaleError: this system has nothing to export.
        """
        raise XdscaleError(f"{run}: a run of {self.recipe.system!r} has nothing to export")

    def published_state(self, folder: Path) -> "dict[str, torch.Tensor] | None":
        """Returns weights that are published in another form than a run's, by the module's names, to begin with.

        Args:
            folder: what `model.start` names.

        Returns:
            None where the folder is a run, or an export that holds the module as it is.

        Raises:
            XdscaleError: it is neither, nor what the system reads.
        """
        return None

    def finish(self, setup: Any, engine: Any) -> int:
        """Does what follows the last step, such as predictions; returns the exit code.

        Args:
            setup: see `xdscale.training.session.Setup`.
            engine: the DeepSpeed engine.
        """
        return 0


def recompute_activations(module: "nn.Module") -> None:
    """Has the encoders in a module compute their layers again in the backward pass; the result stays the same.

    Raises:
        XdscaleError: none of them can.
    """
    able = [part for part in module.modules() if hasattr(part, "enable_activation_checkpointing")]
    if not able:
        raise XdscaleError(
            f"activation_checkpointing: {type(module).__name__} has no enable_activation_checkpointing(); leave it out"
        )
    for part in able:
        part.enable_activation_checkpointing()


def pass_numbers(module: "nn.Module") -> list[tuple[int, ...]]:
    """Returns what each pass of a training micro-batch is called with behind the arrays: its number if it has several.

    Their length is the number of passes.
    """
    passes = getattr(module, "passes", 1)
    return [(number,) for number in range(passes)] if passes > 1 else [()]


def parameter_count(module: "nn.Module", *, shared: "Collection[nn.Parameter]" = ()) -> int:
    """Counts a module's parameters without those that are shared, as a tied decoder's are."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter not in shared)


def open_system(recipe: Recipe) -> System:
    """Returns the system of a recipe.

    Raises:
        XdscaleError: it does not say where it is, its module cannot be imported, or holds no whole system there.
    """
    return implementation(type(recipe), f"system = {recipe.system!r}", System)(recipe)
