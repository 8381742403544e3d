"""How far long work on bytes is: a bar on a terminal, now and then a plain line elsewhere. Both on stderr."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from xdscale.files import count_of

LINE_SECONDS = 30.0
"""Between plain lines: a log of a day's build stays readable."""
WINDOW_SECONDS = 300.0
"""The rate is that of the last minutes: finished shards that a restart skips say nothing about the rest."""

Item = TypeVar("Item")
Advance = Callable[[int, int, int | None], None]
"""Takes bytes done, bytes of all, and documents so far if those are counted."""


class Pace:
    """Describes work by what it did lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])

    def describe(self, done: int, total: int, documents: int | None = None) -> str:
        """Returns for example "1,204 documents, 0.31 of 14.00 GB (2.2 %), 2.40 MB/s, 1:35:04 left"."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_SECONDS:
            self._seen.popleft()
        (then, before), share = self._seen[0], done / total if total else 1.0
        parts = [] if documents is None else [count_of(documents, "document")]
        parts.append(f"{_size(done, total)} of {_size(total, total)} {_unit(total)[1]} ({share:.1%})")
        if now > then and done > before:
            rate = (done - before) / (now - then)
            parts += [f"{rate / 1e6:.2f} MB/s", time_left((total - done) / rate)]
        return ", ".join(parts)


def counted(what: str, items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """Numbers items, and says now and then on stderr how many are done and how long the others will take."""
    said = began = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - said >= LINE_SECONDS:
            said, left = now, time_left((len(items) - number) * (now - began) / number)
            print(f"{what}: {number}/{len(items)}, {left}", file=sys.stderr, flush=True)
        yield number, item


def time_left(seconds: float) -> str:
    """Returns for example "1:35:04 left"."""
    return f"{timedelta(seconds=round(seconds))} left"


def _unit(total: int) -> tuple[float, str]:
    return (1e9, "GB") if total >= 1e9 else (1e6, "MB")


def _size(count: int, total: int) -> str:
    return f"{count / _unit(total)[0]:.2f}"


@contextmanager
def shown_progress(what: str) -> Iterator[Advance]:
    """Gives the function that shows how far the work `what` is."""
    from rich.console import Console

    if Console(stderr=True).is_terminal:
        with _bar(what) as advance:
            yield advance
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    pace = Pace()
    columns = (TextColumn(what), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(done: int, total: int, documents: int | None = None) -> None:
            bar.update(task, completed=done, total=total, description=pace.describe(done, total, documents))

        yield advance


def _lines(what: str) -> Advance:
    pace = Pace()
    last = time.monotonic()

    def advance(done: int, total: int, documents: int | None = None) -> None:
        nonlocal last
        text = pace.describe(done, total, documents)
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"{what}: {text}", file=sys.stderr, flush=True)

    return advance
