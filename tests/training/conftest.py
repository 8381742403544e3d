"""What tests of resumed runs share: checkpoints compared bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xdscale.training.integrity import read_pickle


@pytest.fixture(scope="session")
def require_equal_tensors() -> Callable[[Path, Path], None]:
    """Returns a function that asserts that two files of a checkpoint hold the same tensors, bit for bit."""

    def require(one: Path, other: Path) -> None:
        left, right = (tensors(read_pickle(file)) for file in (one, other))
        assert left.keys() == right.keys() != set()
        assert all(torch.equal(value, right[key]) for key, value in left.items())

    return require


def tensors(value, prefix=""):
    """Returns all tensors inside nested containers by their path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: found for key, item in items for path, found in tensors(item, f"{prefix}/{key}").items()}
