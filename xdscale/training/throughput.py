"""What the device can do and what the process takes."""

import functools
import resource
import sys
import time

import torch

_SMALLEST_SIZE = 256
_LARGEST_SIZE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.3


@functools.cache  # of a sweep's short runs in one process each would spend a third of a second on it
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measures this rank's rate on a plain square matrix product, the honest base of a utilisation figure.

    All ranks measure at the same time, so ranks that share a machine share it here too. A CPU without instructions for
    a dtype may be a hundred times slower in it: matrices grow only as long as a product stays short. A process measures
    once.

    Args:
        device: the training device.
        dtype: the dtype of the model's matrix products.

    Returns:
        FLOPs per second, the best of several products within about 0.3 s.
    """
    size, largest = _SMALLEST_SIZE, _LARGEST_SIZE.get(device.type, 4096)
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = _product_seconds(matrix)
    while size < largest and 8 * best < _SECONDS:  # what a product of twice the size takes
        size *= 2
        matrix = torch.randn(size, size, device=device).to(dtype)
        best = _product_seconds(matrix)
    began = time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        best = min(best, _product_seconds(matrix))
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this rank: allocated on its GPU, or the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30


def wait(device: torch.device) -> None:
    """Waits until the device has come to the end of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_seconds(matrix: torch.Tensor) -> float:
    """Returns the shorter of two products: the first one chooses kernels."""
    seconds = []
    for _ in range(2):
        wait(matrix.device)
        start = time.perf_counter()
        matrix @ matrix
        wait(matrix.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
