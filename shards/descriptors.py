"""Open files, few at a time, that several threads read at once."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

_CLOSED = -1


class Descriptors:
    """File descriptors of numbered files, of which the least recently used are closed first.

    Locks are held only to open and to close, not while somebody reads: two threads read at the same time. What one
    reads stays open. A thread that needs more than is left waits until others have read, those after it behind it.

    Args:
        files: how many there are.
        most: of them that are open at once.
    """

    def __init__(self, files: int, most: int) -> None:
        self._most = most
        self._open = np.full(files, _CLOSED, np.int64)
        self._last_use = np.zeros(files, np.int64)
        self._batches = 0
        self._reading: set[int] = set()  # batches in use: all files used since the first of them stay open
        self._changed = threading.Condition()
        self._next = threading.Lock()  # held by who waits for room, so that nobody overtakes
        weakref.finalize(self, _close, self._open, slice(None))

    @contextmanager
    def opened(self, numbers: np.ndarray, open_file: Callable[[int], int]) -> Iterator[np.ndarray]:
        """Gives a descriptor for each number, to be used in the block.

        A thread that is in such a block must not begin another: it might wait for itself.

        Args:
            numbers: int64 [n], repeats allowed, `most` different ones at most.
            open_file: opens a file that is closed.
        """
        with self._next, self._changed:
            batch = self._batches = self._batches + 1
            self._last_use[numbers] = batch
            found = self._open[numbers]
            if (found == _CLOSED).any():
                self._changed.wait_for(lambda: self._make_room(numbers))
                for number in np.unique(numbers[self._open[numbers] == _CLOSED]).tolist():
                    self._open[number] = open_file(number)
                found = self._open[numbers]
            self._reading.add(batch)
        try:
            yield found
        finally:
            with self._changed:
                self._reading.remove(batch)
                self._changed.notify()

    def _make_room(self, numbers: np.ndarray) -> bool:
        """Closes as many files as those that are wanted need; returns False where what is in use leaves no room."""
        closed = numbers[self._open[numbers] == _CLOSED]
        opened = np.flatnonzero(self._open != _CLOSED)
        surplus = len(opened) + len(np.unique(closed)) - self._most
        if surplus > 0:
            oldest = opened[np.argsort(self._last_use[opened], kind="stable")[:surplus]]
            if self._reading and self._last_use[oldest[-1]] >= min(self._reading):
                return False
            _close(self._open, oldest)
        return True


def _close(descriptors: np.ndarray, which: np.ndarray | slice) -> None:
    for descriptor in descriptors[which].tolist():
        if descriptor != _CLOSED:
            os.close(descriptor)
    descriptors[which] = _CLOSED
