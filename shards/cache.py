"""Shards of a dataset behind a URL that are fetched when they are needed, within a budget of bytes on the local disk.

The ranks of a node share one folder and one budget. A shard that a rank holds open carries a shared lock (`flock`),
which ends with the process however it ends; whoever needs room removes the shards that carry none, the least recently
used first. Each rank holds no more than its share of the budget, what it is fetching included: so there is always room
for the next shard once another has arrived, and ranks that wait for each other cannot stand still.
"""

import contextlib
import fcntl
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import lock
from xdscale.shards.manifest import ShardRecord
from xdscale.shards.remote import AT_ONCE, address_of, download, is_sound

SECONDS_BETWEEN_LOOKS = 0.02
"""While another rank fetches a shard that this one needs too, or holds what must go first."""
_DAMAGED = ".damaged"


@dataclass
class _Held:
    """A shard that is there and open, so that nobody removes it; `read` since it was last said to be needed."""

    record: ShardRecord
    descriptor: int
    read: bool


class ShardCache:
    """The shards of one dataset, as one rank sees them.

    Args:
        url: of the dataset.
        folder: returned by `remote.place_manifest`, on a disk of this node.
        records: all shards of the dataset.
        budget: bytes that the shards in the folder may take together.
        sharers: processes that share the folder and the budget.
        on_arrival: called, in other threads, while bytes of shards arrive.

    Raises:
        XdscaleError: the folder's file system has no locks, or cannot be written.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        records: Iterable[ShardRecord],
        *,
        budget: int,
        sharers: int,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        from filelock import FileLock

        self.folder = folder
        self._url, self._on_arrival = url, on_arrival
        self._records = {record.file: record for record in records}
        self._budget, self._sharers, self._share = budget, sharers, budget // sharers
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the least recently used first
        self._coming: dict[str, Future[None]] = {}
        self._in_use: set[str] = set()
        self._most_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._changed = threading.Condition(threading.RLock())
        self._reading = threading.Lock()  # a read may need the whole share: one at a time
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="xdscale-fetch")
        self._space = FileLock(folder / ".space", poll_interval=0.002)
        try:
            with self._space, (folder / ".locks").open("w") as file:
                problem = lock(file, fcntl.LOCK_EX)
        except (OSError, NotImplementedError) as error:  # the latter is filelock's for systems without locks
            problem = str(error)
        if problem:
            raise XdscaleError(
                f"run.cache: {folder}: nothing can be locked there ({problem}), which run.cache_bytes needs; name a "
                "folder on a disk of the node"
            )

    def most_at_once(self, records: Sequence[ShardRecord]) -> int:
        """Returns how many of these shards, whichever they are, this rank may hold at once.

        Raises:
            XdscaleError: not even the largest one.
        """
        largest = max((record.bytes for record in records), default=1)
        if largest > self._share:
            raise self._too_small(largest, "one shard")
        return self._share // largest

    def prefetch(self, records: Sequence[ShardRecord]) -> None:
        """Begins to fetch what a step will need, as far as this rank's share has room; returns at once.

        Raises:
            XdscaleError: the share cannot hold them all, even when nothing else is in it.
        """
        needed = sum(record.bytes for record in records)
        if needed > self._share:
            raise self._too_small(needed, f"one step's {len(records)} shards")
        with self._changed:
            for name in {record.file for record in records} & self._held.keys():
                self._held[name].read = False  # so that it does not make room for the others
            for record in records:
                if record.file in self._held or record.file in self._coming:
                    continue
                while not self._fits(record) and self._release(read=True):
                    pass
                if not self._fits(record):
                    return
                self._start(record)

    @contextlib.contextmanager
    def opened(self, records: Sequence[ShardRecord]) -> Iterator[list[int]]:
        """Gives file descriptors of shards, which are fetched if need be and stay while the block runs.

        Args:
            records: different shards, `most_at_once` of them at most.

        Raises:
            XdscaleError: one of them cannot be fetched, or is damaged at its source.
        """
        with self._reading:
            self._in_use = {record.file for record in records}
            try:
                coming = [self._begin(record) for record in records]
                yield [self._wait(record, future) for record, future in zip(records, coming)]
            finally:
                self._in_use = set()

    def damaged(
        self, records: Sequence[ShardRecord], *, verify: bool, on_progress: Callable[[int, int], None] | None = None
    ) -> dict[str, str]:
        """Looks at what earlier runs left: shards that were damaged at their source are fetched once more.

        Args:
            records: those to look at.
            verify: whether to hash the shards that are there, and remove what has been damaged since.
            on_progress: called after each shard with (shards looked at, shards of all).

        Returns:
            What is wrong with each shard that is still damaged at its source, by file name.
        """
        problems = {}
        for number, record in enumerate(records, start=1):
            path, marker = self.folder / record.file, self._marker(record)
            if verify and path.is_file() and not is_sound(path, record, verify=True):
                path.unlink(missing_ok=True)
            if marker.is_file():
                marker.unlink(missing_ok=True)
                try:
                    with self.opened([record]):
                        pass
                except XdscaleError as error:
                    if not marker.is_file():
                        raise
                    problems[record.file] = marker.read_text(encoding="utf-8") or str(error)
            if on_progress is not None:
                on_progress(number, len(records))
        return problems

    def close(self) -> None:
        """Waits for what is on its way and lets go of all shards, which stay in the folder."""
        self._pool.shutdown()
        with self._changed:
            while self._release(read=False):
                pass

    def _too_small(self, needed: int, what: str) -> XdscaleError:
        share = f", {self._share:,} for each of the node's {self._sharers} ranks" if self._sharers > 1 else ""
        return XdscaleError(
            f"run.cache_bytes = {self._budget:,}{share}: {what} need{'s' * what.startswith('one shard')} {needed:,} "
            f"bytes; set it to {needed * self._sharers:,} or more, or leave it out to fetch everything first"
        )

    def _marker(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.file}{_DAMAGED}"

    def _fits(self, record: ShardRecord) -> bool:
        """Tells whether this rank's share has room for a shard beside what is held and on its way."""
        taken = sum(self._records[name].bytes for name in (*self._held, *self._coming))
        return taken + record.bytes <= self._share and len(self._held) + len(self._coming) < self._most_open

    def _release(self, *, read: bool) -> bool:
        """Lets go of the shard that was used longest ago; with `read` only of one that has been read since it came."""
        for name, held in self._held.items():
            if name not in self._in_use and (held.read or not read):
                self._held.pop(name)
                os.close(held.descriptor)
                return True
        return False

    def _begin(self, record: ShardRecord) -> "Future[None] | None":
        """Makes room in the share and begins to fetch a shard, unless it is there or on its way."""
        if record.bytes > self._share:
            raise self._too_small(record.bytes, "one shard")
        with self._changed:
            while record.file not in self._held and record.file not in self._coming:
                if self._fits(record):
                    self._start(record)
                elif not (self._release(read=True) or self._release(read=False)):
                    self._changed.wait()  # for what is on its way and can be let go of then
            return self._coming.get(record.file)

    def _wait(self, record: ShardRecord, coming: "Future[None] | None") -> int:
        """Returns the descriptor of a shard once it has come."""
        if coming is not None:
            coming.result()
        with self._changed:
            held = self._held[record.file]  # it is in use, so nobody has let go of it
            held.read = True
            self._held.move_to_end(record.file)
        with contextlib.suppress(OSError):  # of another user
            os.utime(held.descriptor)
        return held.descriptor

    def _start(self, record: ShardRecord) -> None:
        descriptor = self._open_present(record)
        if descriptor is not None:
            self._held[record.file] = _Held(record, descriptor, read=False)
        else:
            self._coming[record.file] = self._pool.submit(self._fetch, record)

    def _fetch(self, record: ShardRecord) -> None:
        descriptor = None
        try:
            descriptor = self._arrive(record)
        except OSError as error:
            raise XdscaleError(f"run.cache: {self.folder}: cannot be written: {error.strerror or error}") from None
        finally:
            with self._changed:
                del self._coming[record.file]
                if descriptor is not None:
                    self._held[record.file] = _Held(record, descriptor, read=False)
                self._changed.notify_all()

    def _open_present(self, record: ShardRecord) -> int | None:
        """Opens a shard that is there, with a shared lock, so that it stays; returns None if it is not."""
        path = self.folder / record.file
        try:
            if path.is_fifo():  # to open it would wait for whoever writes
                return None
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if status.st_nlink and status.st_size == record.bytes:
                return descriptor
        except BlockingIOError:
            pass  # it is being removed
        os.close(descriptor)
        return None

    def _arrive(self, record: ShardRecord) -> int:
        """Fetches a shard, unless another rank does, and returns it open and locked."""
        marker, partial = self._marker(record), self.folder / f".{record.file}.partial"
        while True:
            with self._space:
                present = self._open_present(record)
                if present is not None:
                    return present
                if marker.is_file():
                    raise self._quarantined(record)
                descriptor = self._reserve(record, partial)
            if descriptor is not None:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            address = address_of(self._url, record.file)
            problem = download(address, partial, record, on_arrival=self._on_arrival)
            if problem is not None:
                marker.write_text(problem, encoding="utf-8")
                raise self._quarantined(record)
            with self._space:
                partial.replace(self.folder / record.file)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _quarantined(self, record: ShardRecord) -> XdscaleError:
        return XdscaleError(
            f"{self._marker(record).read_text(encoding='utf-8')}; copy the shard again, or start the same command "
            "again with a larger run.max_damaged_shards to train without it"
        )

    def _reserve(self, record: ShardRecord, partial: Path) -> int | None:
        """Makes room and a locked file to fetch into; returns None while another rank fetches it or holds the room."""
        there: list[tuple[int, Path, int]] = []  # last use, path and bytes of each shard
        taken = record.bytes
        for path in self.folder.iterdir():
            fetched = self._records.get(path.name.removeprefix(".").removesuffix(".partial"))
            with contextlib.suppress(FileNotFoundError):  # whoever fetched it gave up just now
                if path.name.endswith(".partial") and fetched is not None:
                    if _remove_if_free(path):  # whoever fetched it was killed
                        continue
                    if path == partial:
                        return None
                    taken += fetched.bytes
                elif path.suffix == ".tar":
                    status = path.stat()
                    there.append((status.st_mtime_ns, path, status.st_size))
                    taken += status.st_size
        for _, path, size in sorted(there):
            if taken > self._budget and _remove_if_free(path):
                taken -= size
        if taken > self._budget:
            return None
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor


def _remove_if_free(path: Path) -> bool:
    """Removes a file unless some process holds it, and tells whether it did."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True
