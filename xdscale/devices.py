"""Which device a rank has. `DS_ACCELERATOR=cpu` makes CPU ranks, also on a machine that has GPUs."""

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError
from xdscale.files import count_of

if TYPE_CHECKING:
    import torch

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What a driver of NVIDIA, of AMD, or Windows' own under Linux shows; without one nobody has to wait for torch."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: nothing is mapped apart, nothing at the heap's end goes back."""


def asked_for_cpu() -> bool:
    """Returns whether the environment asks for CPU ranks: GPUs are then somebody else's."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def visible_gpus() -> list[str]:
    """Returns the GPUs that ranks of this machine may use, as CUDA_VISIBLE_DEVICES names them; often none."""
    if asked_for_cpu() or not any(Path(driver).exists() for driver in _DRIVERS):
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(count))) if named is None else [name.strip() for name in named.split(",")][:count]


def uses_gpus() -> bool:
    """Returns whether ranks compute on GPUs."""
    import torch

    return not asked_for_cpu() and torch.cuda.is_available()


def rank_device(local_rank: int) -> "torch.device":
    """Returns the device of a rank: its own GPU, or the CPU.

    Args:
        local_rank: number of the rank on its machine.

    Raises:
        XdscaleError: the machine has GPUs, but fewer than ranks.
    """
    import torch

    if not uses_gpus():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise XdscaleError(
            f"{local_rank + 1} ranks or more on this machine, {count_of(count, 'GPU')} visible: every rank needs "
            f"one of its own; start {count} (deepspeed --num_accelerators {count}), or compute on the CPU with "
            "DS_ACCELERATOR=cpu"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees for what it allocates next, as PyTorch does with a GPU's.

    A CPU rank frees all gradients and activations in each step. Where they go back to the system, every page of the
    next step is a fault of its own and filled with zeros: some 90,000 in a step of VL-BERT base. Does nothing with a C
    library that has no `mallopt`, as musl and that of macOS.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def computes_in_bf16() -> bool:
    """Returns whether this rank's GPU has instructions for bf16."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)
