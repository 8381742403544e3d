"""Running units in one process or several, in order, with a bounded number of them in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Build
from xdscale.shards.unit import Unit, UnitBuilder, UnitRecord

_builder: UnitBuilder | None = None  # of this worker process


def run_units(
    units: Iterable[Unit], out: Path, build: Build, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Unit, UnitRecord, bool]]:
    """Yields (unit, record, kept from an earlier build) in the order of the units.

    Args:
        units: read lazily, at most 2 * workers + 1 ahead of what was yielded.
        out: the folder of the dataset.
        build: what the manifest will state.
        tokenizer: the one that `build` names; other processes load it for themselves.
        workers: processes; 1 works in this one.

    Raises:
        XdscaleError: from a unit, or a worker process died.
    """
    with one_thread_per_process():
        if workers == 1:
            builder = UnitBuilder(out, build, tokenizer)
            for unit in units:
                yield unit, *builder(unit)
        else:
            yield from _run_in_processes(units, out, build, workers)


def _run_in_processes(
    units: Iterable[Unit], out: Path, build: Build, workers: int
) -> Iterator[tuple[Unit, UnitRecord, bool]]:
    # Spawned, not forked: a fork would copy the locks of threads that it does not copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(out, build))
    waiting: deque[tuple[Unit, Future]] = deque()
    try:
        for unit in units:
            waiting.append((unit, pool.submit(_build_unit, unit)))
            if len(waiting) > 2 * workers:
                yield _next_result(waiting)
        while waiting:
            yield _next_result(waiting)
    except BrokenProcessPool:
        raise XdscaleError(
            f"{out}: a worker process died (killed, or out of memory); finished shards are kept: "
            "run the same command again, with fewer --workers if memory was short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _next_result(waiting: deque[tuple[Unit, Future]]) -> tuple[Unit, UnitRecord, bool]:
    unit, future = waiting.popleft()
    return unit, *future.result()


def _start_worker(out: Path, build: Build) -> None:
    global _builder
    # Ctrl-C ends a worker at once: what it was writing has no name yet, and the parent reports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer, found = load_language_tokenizer(build.language_tokenizer.name)
    if found != build.language_tokenizer:
        raise XdscaleError(f"{found.name}: the tokenizer changed while the shards were built")
    _builder = UnitBuilder(out, build, tokenizer)


def _end_with_parent() -> None:
    """Ends this worker when the parent is gone: killed, it could not tell its workers, and they would wait."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _build_unit(unit: Unit) -> tuple[UnitRecord, bool]:
    return _builder(unit)


@contextmanager
def one_thread_per_process() -> Iterator[None]:
    """Keeps the tokenizers' own threads off, here and in child processes: `workers` says how many cores."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
