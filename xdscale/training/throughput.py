"""What the device can do and what the process takes."""

import resource
import sys
import time

import torch

_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.3


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measures this rank's rate on a plain square matrix product, the honest base of a utilisation figure.

    All ranks measure at the same time, so ranks that share a machine share it here too.

    Args:
        device: the training device.
        dtype: the dtype of the model's matrix products.

    Returns:
        FLOPs per second, the best of several products within about 0.3 s.
    """
    size = _MATRIX_SIZE.get(device.type, 4096)
    left = torch.randn(size, size, device=device).to(dtype)
    left @ left
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        _wait(device)
        start = time.perf_counter()
        left @ left
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib() -> float:
    """Returns the peak memory of this rank: allocated on the GPU, or the resident set on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
