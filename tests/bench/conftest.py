"""What the measured steps share: one thread, so that other jobs weigh less."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def _no_waiting_for_the_disk() -> None:
    """What is measured waits for it, as with users."""
