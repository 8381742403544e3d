"""What all launches of Triton kernels share: which tensors they take, where they start, and the meta device.

The meta device stands for a GPU: its tensors take the same way through every operation, keep the same tensors for the
backward pass and give results of the same shapes. Only the launch is left out; where it multiplies matrices,
`count_flops` does what `torch.utils.flop_counter.FlopCounterMode` counts.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of an A100, H100, B200 and MI300X."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

FORCE_TRITON = False
"""Tests set this, with TRITON_INTERPRET=1 in the environment, to run the Triton kernels on CPU tensors."""


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether Triton kernels take such tensors: CUDA and HIP devices are both "cuda"."""
    return dtype in TRITON_DTYPES and (device.type in ("cuda", "meta") or FORCE_TRITON)


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
    if device.type == "meta" or not all(grid):
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
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
