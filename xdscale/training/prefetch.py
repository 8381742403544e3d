"""Prepares the next steps in a thread while the model computes the present one."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
HINTS_AHEAD = 8
"""Steps; what a hint sends for is bounded by whoever it is given to."""


class StepData(NamedTuple):
    """What one rank needs for one optimiser step.

    Attributes:
        batches: its micro-batches.
        samples: hash of the sample ids of the global batch, the same on every rank.
    """

    batches: list[Any]
    samples: str


class Prefetcher(Generic[Item]):
    """Iterates over `(step, prepare(step))`, kept ready ahead of time by one daemon thread.

    A thread, not worker processes: numpy releases the interpreter lock where it counts, and the deepspeed
    launcher would end a rank's child processes before the rank could save its state.

    Attributes:
        wait_seconds: how long the consumer has waited for items so far.
    """

    def __init__(
        self,
        prepare: Callable[[int], Item],
        steps: Sequence[int],
        *,
        depth: int = 2,
        hint: Callable[[int], None] | None = None,
    ) -> None:
        """Starts preparing at once.

        Args:
            prepare: makes the item of a step; runs in the thread. What it raises is raised again by the
                iteration, in the place of the item.
            steps: the steps in order.
            depth: most items that wait ready.
            hint: called in the thread with each step, `HINTS_AHEAD` steps before its item is prepared, so that what
                takes long to arrive can be sent for; what it raises counts as what `prepare` raises.
        """
        self.wait_seconds = 0.0
        self._prepare = prepare
        self._steps = steps
        self._depth = depth
        self._hint = hint
        self._ready: deque[tuple[int, Item]] = deque()
        self._failure: BaseException | None = None
        self._ended = False  # the thread adds nothing more
        self._closed = False  # the consumer takes nothing more
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="xdscale-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        """Returns itself: the items can be iterated over once."""
        return self

    def __next__(self) -> tuple[int, Item]:
        """Returns the next step and its item, waiting for it if need be.

        Raises:
            StopIteration: after the last step, and after `close`.
        """
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._closed)
            self.wait_seconds += time.perf_counter() - began
            if self._closed:
                raise StopIteration
            if self._ready:
                pair = self._ready.popleft()
                self._changed.notify_all()
                return pair
            if self._failure is not None:
                raise self._failure
            raise StopIteration

    def close(self) -> None:
        """Ends the thread after the item it is preparing and drops what is ready; may be called again."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            hinted = 0
            for place, step in enumerate(self._steps):
                while self._hint is not None and hinted < min(place + 1 + HINTS_AHEAD, len(self._steps)):
                    self._hint(self._steps[hinted])
                    hinted += 1
                item = self._prepare(step)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                    self._ready.append((step, item))
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it instead of waiting for ever
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
