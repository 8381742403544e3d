"""How far the device of a rank has come, as the host sees it without waiting.

A GPU is only given work: exchanges with other ranks are enqueued like everything else, so that the host of a rank that
waits and the host of the rank that it waits for end up at the same line. An event that is recorded before each exchange
tells them apart: behind it lies what needs the other ranks, before it only this rank's own work.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Event(Protocol):
    """What a stream comes past, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Returns whether the device has come to it; never waits."""


class Arrival(NamedTuple):
    """A place in a run; places are comparable across ranks, which make the same exchanges in the same order.

    Attributes:
        entered: phases entered so far.
        exchange: exchanges begun in this phase.
        phase: its name.
    """

    entered: int
    exchange: int
    phase: str


def record_cuda_event() -> Event:
    """Records an event on the current stream; no timing, which would cost more."""
    event = torch.cuda.Event()
    event.record()
    return event


class Arrivals:
    """The places that the host has passed and the device not yet.

    Args:
        record: puts an event behind the work that the device was given so far; None where the host computes itself.
    """

    def __init__(self, record: Callable[[], Event] | None) -> None:
        self._record = record
        self._ahead: deque[tuple[Arrival, Event]] = deque()
        self._last: Arrival | None = None
        self._looking = threading.Lock()

    def pass_by(self, place: Arrival) -> None:
        """Says that the host begins a phase or an exchange here."""
        if self._record is None:
            self._last = place
        else:
            self._ahead.append((place, self._record()))

    def last(self) -> Arrival | None:
        """Returns the last place that the device has come to; None before the first."""
        # The watchdog's thread asks, and a main thread that ends or failed.
        with self._looking, contextlib.suppress(RuntimeError):  # a failed device, of which the main thread hears too
            while self._ahead and self._ahead[0][1].query():
                self._last = self._ahead.popleft()[0]
        return self._last
