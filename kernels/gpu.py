"""What all launches of Triton kernels share: which tensors they take, where they start, and the meta device.

The meta device stands for a GPU: its tensors take the same way through every operation, keep the same tensors for the
backward pass and give results of the same shapes. Only the launch is left out; where it multiplies matrices,
`count_flops` does what `torch.utils.flop_counter.FlopCounterMode` counts.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of an A100, H100, B200 and MI300X."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

FORCE_TRITON = False
"""Tests set this, with TRITON_INTERPRET=1 in the environment, to run the Triton kernels on CPU tensors."""


class Launch(NamedTuple):
    """One launch of a kernel: programs, arguments in the kernel's order, and the others by name."""

    kernel: Any
    grid: Sequence[int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def nbytes(self, without: tuple[str, ...] = ()) -> int:
        """Returns the bytes of its floating-point tensors, each counted once, but for those of some parameters."""
        named = zip(self.kernel.arg_names, self.arguments)
        tensors = {id(value): value for name, value in named if isinstance(value, torch.Tensor) and name not in without}
        return sum(tensor.nbytes for tensor in tensors.values() if tensor.is_floating_point())


class _Meta:
    """The GPU that the meta device stands for, and where launches on it are noted."""

    architecture = "sm_80"
    launches: list[Launch] | None = None


@contextlib.contextmanager
def launches_on(architecture: str) -> Iterator[list[Launch]]:
    """Lets the meta device stand for a GPU of this architecture while it is open; yields what is launched there."""
    before = _Meta.architecture, _Meta.launches
    _Meta.architecture, _Meta.launches = architecture, []
    try:
        yield _Meta.launches
    finally:
        _Meta.architecture, _Meta.launches = before


def architecture(device: torch.device) -> str:
    """Returns the newest of `PROCESSORS` that is not newer than a device; Triton's interpreter takes "sm_80"."""
    return _Meta.architecture if device.type == "meta" else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return "sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"


def processors(device: torch.device) -> int:
    """Returns the multiprocessors of a device; the interpreter has one."""
    return PROCESSORS[_Meta.architecture] if device.type == "meta" else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether Triton kernels take such tensors: CUDA and HIP devices are both "cuda"."""
    return dtype in TRITON_DTYPES and (device.type in ("cuda", "meta") or FORCE_TRITON)


def cdiv(number: int, divisor: int) -> int:
    """Returns a quotient, rounded up.

    `triton.cdiv` serves kernels too, and takes a host some thirty times as long: a launch has several.
    """
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is at least a positive number, as `triton.next_power_of_2` slowly does."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launches a Triton kernel on the GPU of its first argument, on that GPU's current stream.

    An empty grid starts nothing, and neither do tensors on the meta device.

    Args:
        kernel: the `triton.JITFunction`.
        grid: programs in up to three dimensions.
        arguments: of the kernel, of which the first is a tensor.
        options: compile-time arguments of the kernel, and those of the launch.
    """
    device = arguments[0].device
    if device.type == "meta":
        if _Meta.launches is not None:
            _Meta.launches.append(Launch(kernel, grid, arguments, options))
        return
    if not all(grid):
        return
    # Triton launches on the current GPU, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **options)


def count_flops(flops: int) -> None:
    """Stands for matrix products of so many FLOPs on the meta device: makes one of as many, without values."""
    element = torch.empty((1, 1), device="meta")
    torch.mm(element.expand(1, flops // 2), element.expand(flops // 2, 1))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that `torch.autocast` casts to on this kind of device; None where it is off."""
    kind = device.type
    # A kind of device without autocast cannot even be asked.
    available = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Leaves autocast while it is open."""
    # Where it is off already there is nothing to leave, and leaving takes a host microseconds in every operation.
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
