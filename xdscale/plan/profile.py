"""What a plan has to know of a model: its parameters, FLOPs and activations, from the module itself without values."""

from typing import NamedTuple

import torch
from torch import nn

from xdscale.plan.states import Module
from xdscale.recipe import Recipe, with_random_weights
from xdscale.systems.contract import PartCount, open_system, recompute_activations
from xdscale.training.tracing import trace

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SAMPLES = 64
"""Of a traced micro-batch: many, so that the targets drawn are as many as expected."""


class Line(NamedTuple):
    """Bytes as a function of the micro-batch."""

    fixed: float
    per_sample: float

    def __call__(self, micro_batch: int) -> float:
        """Returns the bytes of so many samples."""
        return self.fixed + self.per_sample * micro_batch


class Profile(NamedTuple):
    """A recipe's model.

    Attributes:
        modules: those that hold parameters, in torch's order.
        objectives: number of objectives that are on.
        sequence_length: language tokens with [CLS] and [SEP].
        flops_per_sequence: forward and backward of average texts; what checkpointing computes again does not count.
        pictures_per_sequence: that are decoded for a sequence, on average.
        precision: of parameters and activations.
        checkpointing: whether layers are recomputed in the backward pass.
        kept: activations held at the end of the forward pass, of the longest texts.
        peak: the same at the fullest moment, with gradients inside a layer and scratch.
    """

    modules: list[Module]
    objectives: int
    sequence_length: int
    flops_per_sequence: float
    pictures_per_sequence: float
    precision: str
    checkpointing: bool
    kept: Line
    peak: Line


def profile_model(
    recipe: Recipe, *, precision: str, checkpointing: bool = False, sequence_length: int | None = None
) -> Profile:
    """Builds a recipe's model without values and runs it forward and backward, as it runs on a GPU.

    Args:
        recipe: to be trained; weights are not read, and the kernels are taken whatever it says.
        precision: `bf16`, `fp16` or `fp32`.
        checkpointing: whether layers are recomputed in the backward pass.
        sequence_length: language tokens with [CLS] and [SEP]; None for as many as the encoder has positions.

    Raises:
        XdscaleError: an architecture is not known, or the sequence does not fit it.
    """
    system, module = open_system(recipe), build_on_meta(recipe).train().to(_DTYPES[precision])
    objectives = system.objectives()
    average = system.example(module, _SAMPLES, sequence_length)
    # Blank ones stand in where a sample has no image: they are small, and nothing is decoded.
    pictures = [array.size for name, array in average.arrays.items() if name.startswith("picture_")]
    decoded = [size for size in pictures if size > max(pictures) / 2]
    flops = trace(module, average.arrays, objectives).flops / _SAMPLES
    if checkpointing:
        recompute_activations(module)
    # Nearly straight lines: the fullest moment is that of the largest gradient for few samples, of the loss for many.
    counts = max(1, _SAMPLES // 8), _SAMPLES
    few, many = (
        trace(module, system.example(module, samples, sequence_length, longest=True).arrays, objectives)
        for samples in counts
    )
    return Profile(
        modules=modules(module),
        objectives=len(objectives),
        sequence_length=average.tokens // _SAMPLES,
        flops_per_sequence=flops,
        pictures_per_sequence=len(decoded) / _SAMPLES,
        precision=precision,
        checkpointing=checkpointing,
        kept=_line(counts, few.kept_bytes, many.kept_bytes),
        peak=_line(counts, few.peak_bytes, many.peak_bytes),
    )


def build_on_meta(spec: Recipe) -> nn.Module:
    """Builds a recipe's module on the meta device: without weights, and with the kernels whatever it says.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    with torch.device("meta"):
        return open_system(with_random_weights(spec)).build()


def parameter_table(recipe: Recipe) -> list[PartCount]:
    """Counts parameters without allocating any: the model is built on the meta device, without weights.

    Raises:
        XdscaleError: an architecture is neither known nor in a local folder, or cannot be built.
    """
    return open_system(recipe).count(build_on_meta(recipe))


def modules(module: nn.Module) -> list[Module]:
    """Returns the modules that hold parameters themselves, in the order in which DeepSpeed lays parameters out."""
    seen: set[nn.Parameter] = set()
    found = []
    for name, part in module.named_modules():
        held = list(part.parameters(recurse=False))
        own = [parameter for parameter in held if parameter not in seen]
        tied = sum(parameter.numel() for parameter in held if parameter in seen)
        seen.update(own)
        if held:
            trained = all(parameter.requires_grad for parameter in own)
            found.append(Module(name, tuple(parameter.numel() for parameter in own), trained, tied))
    return found


def _line(counts: tuple[int, int], few: int, many: int) -> Line:
    """Returns the line through the bytes of few and of many samples."""
    per_sample = (many - few) / (counts[1] - counts[0])
    return Line(few - per_sample * counts[0], per_sample)
