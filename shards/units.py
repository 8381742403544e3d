"""Units of work: each becomes at most one shard for each split, in one process or several, and leaves a record.

Units do not know of each other, so any number of workers gives the same bytes. A build that was killed and started
again redoes only the units whose record or shards are missing or torn.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, replaced_when_complete, require_real_file
from xdscale.shards.manifest import (
    MANIFEST_NAME,
    WORK_FOLDER,
    Counts,
    Manifest,
    ManifestSection,
    ShardRecord,
    add_counts,
    canonical_json,
    shard_prefix,
)
from xdscale.shards.shard import Arrays, ShardWriter

if TYPE_CHECKING:
    from xdscale.shards.build import Source


@dataclass(frozen=True)
class Unit:
    """Some work of a source; `bytes_read` is how much of all inputs had been read after it."""

    number: int
    work: Any
    bytes_read: int


class UnitSplit(ManifestSection):
    """One split's share of a unit."""

    counts: Counts
    shard: ShardRecord


class UnitRecord(ManifestSection):
    """What a finished unit gave. `key` is the hash of everything that went in."""

    key: str
    counts: Counts
    splits: dict[str, UnitSplit]


def identity(build: Any) -> Any:
    """Returns what must be equal for two builds to give the same shards: all but the names of files and tokenizers."""
    if isinstance(build, dict):
        return {key: identity(value) for key, value in build.items() if key != "name"}
    return [identity(value) for value in build] if isinstance(build, list) else build


class UnitBuilder:
    """Builds units of a source; one per process.

    Args:
        out: the folder of the dataset; its work folder exists.
        source: what they are made of.
    """

    def __init__(self, out: Path, source: "Source") -> None:
        self._out = out
        self._source = source
        self._linked = {split: _linked_rows(out, source, split) for split in source.splits}

    def __call__(self, unit: Unit) -> tuple[UnitRecord, bool]:
        """Returns the unit's record, and whether it was kept from an earlier build.

        Raises:
            XdscaleError: the shard cannot be written, or the source cannot be read.
        """
        key = hashlib.sha256(canonical_json(identity(self._source.build)) + self._source.digest(unit.work)).hexdigest()
        record_path = self._out / WORK_FOLDER / f"unit-{unit.number:06d}.json"
        kept = self._kept(record_path, key)
        if kept is not None:
            return kept, True
        try:
            record = self._write(unit, key)
            with replaced_when_complete(record_path) as stream:
                stream.write(record.model_dump_json().encode("utf-8"))
        except OSError as error:
            raise XdscaleError(
                f"{self._out}: cannot be written: {error.strerror or error}; finished shards are kept: "
                "mend it and run the same command again"
            ) from None
        return record, False

    def _kept(self, record_path: Path, key: str) -> UnitRecord | None:
        """Returns the record of an earlier build if it and its shards are whole and of the same input."""
        require_real_file(record_path)
        try:
            record = UnitRecord.model_validate_json(record_path.read_bytes())
            shards = [split.shard for split in record.splits.values()]
            whole = all(file_sha256(self._out / shard.file) == shard.sha256 for shard in shards)
        except (OSError, ValidationError):
            return None
        return record if whole and record.key == key else None

    def _write(self, unit: Unit, key: str) -> UnitRecord:
        source = self._source
        writers: dict[str, ShardWriter] = {}
        counted: dict[str, list[Counts]] = defaultdict(list)
        with ExitStack() as stack:

            def write(split: str, arrays: Arrays, **counts: int | list[int]) -> None:
                counted[split].append(counts)
                if split not in writers and any(map(len, (arrays[column.name] for column in source.columns))):
                    path = self._out / f"{shard_prefix(source.table, split)}-{unit.number:06d}.tar"
                    writers[split] = stack.enter_context(ShardWriter(path, source.columns, self._linked[split]))
                if split in writers:
                    writers[split].add(arrays)

            counts = source.rows(unit.work, write)
            splits = {
                split: UnitSplit(counts=add_counts(counted[split]), shard=writers[split].finish())
                for split in source.splits
                if split in writers
            }
        return UnitRecord(key=key, counts=counts, splits=splits)


def _linked_rows(out: Path, source: "Source", split: str) -> dict[str, int]:
    """Returns how many rows each column of a split may link to.

    Raises:
        XdscaleError: there is no such table or split.
    """
    columns = [column for column in source.columns if column.rows_of]
    if not columns:
        return {}
    if not (out / MANIFEST_NAME).exists():
        wanted = columns[0].rows_of
        raise XdscaleError(f"{out}: rows of {source.table} link to rows of {wanted}; build that table first")
    manifest = Manifest.load(out)
    try:
        return {column.name: manifest.linked_rows(column.rows_of, split) for column in columns}
    except KeyError as error:
        raise XdscaleError(f"{out}: rows of {source.table} link to {error.args[0]}; build it first") from None


_builder: UnitBuilder | None = None  # of this worker process


def run_units(
    units: Iterable[Unit], out: Path, source: "Source", workers: int
) -> Iterator[tuple[Unit, UnitRecord, bool]]:
    """Yields (unit, record, kept from an earlier build) in the order of the units.

    Args:
        units: read lazily, at most 2 * workers + 1 ahead of what was yielded.
        out: the folder of the dataset.
        source: what they are made of; other processes get a pickled copy.
        workers: processes; 1 works in this one.

    Raises:
        XdscaleError: from a unit, or a worker process died.
    """
    builder = UnitBuilder(out, source)  # a link that leads nowhere is told before any process starts
    with one_thread_per_process():
        if workers == 1:
            for unit in units:
                yield unit, *builder(unit)
        else:
            yield from _run_in_processes(units, out, source, workers)


def _run_in_processes(
    units: Iterable[Unit], out: Path, source: "Source", workers: int
) -> Iterator[tuple[Unit, UnitRecord, bool]]:
    # Spawned, not forked: a fork would copy the locks of threads that it does not copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(out, source))
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


def _start_worker(out: Path, source: "Source") -> None:
    global _builder
    # Ctrl-C ends a worker at once: what it was writing has no name yet, and the parent reports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _builder = UnitBuilder(out, source)


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
