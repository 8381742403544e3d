"""Reading rows by number, in any order and at one cost, however many shards there are."""

import os
import resource
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.names import expand_home
from xdscale.shards.cache import ShardCache
from xdscale.shards.descriptors import Descriptors
from xdscale.shards.manifest import Column, Manifest, members
from xdscale.shards.shard import OFFSETS, Ragged, read_layout
from xdscale.shards.verify import damaged_shards

MAX_BOUNDS = 8 << 20
"""Bounds of ragged rows kept in memory, 4 bytes each: more than all of Wikipedia in sequences of 512."""
LONG_BYTES, LONG_PIECE = 1 << 18, 1 << 13
"""From so many bytes on, in pieces of so many on average, what is read is not copied again."""
NOT_KEPT = -1


class Table:
    """One split of a table of a dataset, with typed columns.

    Rows are 0 .. len - 1 in the order of the manifest. A batch of a global shuffle touches about as many shards
    as it has rows, so nothing here is done shard by shard but opening them. Rows are read with `pread`, not
    through memory maps: a map would count all it has touched as this process's memory, fault at every new page, and
    answer a failing disk with a signal that names no file. Memory stays under 32 MiB, and 48 bytes per block. Several
    threads may read at once.

    Attributes:
        name: of the table.
        split: its split.
        columns: by name.
        manifest: of the whole dataset.

    Args:
        folder: written by `xdscale shards build`, or a cache's.
        split: for example "train" or "validation".
        name: of the table; may be left out where the dataset has one.
        quarantined: names of shards that must not be read.
        max_open_shards: most file descriptors held, the least recently used is closed first; by default a quarter of
            what this process may have (`ulimit -n`).
        cache: fetches shards into the folder when they are needed, and may remove them when they are not read.

    Raises:
        XdscaleError: no valid manifest, no such table or split, or every shard of it in quarantine.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        name: str | None = None,
        *,
        quarantined: Collection[str] = (),
        max_open_shards: int | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.name, table = self.manifest.table(name, self.folder)
        if split not in table.splits:
            raise XdscaleError(f"{folder}: no split {split!r}; the dataset has: {', '.join(sorted(table.splits))}")
        self.split = split
        self.columns = {column.name: column for column in table.columns}
        self._quarantined, self._cache = quarantined, cache
        self._shards = table.splits[split].shards
        self._healthy = np.array([shard.file not in quarantined for shard in self._shards], bool)
        self._all_healthy = bool(self._healthy.all())
        if self._shards and not self._healthy.any():
            raise XdscaleError(f"{self.folder}: every shard of {self.name} ({split}) is damaged; copy the shards again")
        # Sample ids at which each shard begins, and the end: int64 [shards + 1].
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)], dtype=np.int64)
        self._bytes = np.array([shard.bytes for shard in self._shards], np.int64)
        self._places = {name: place for place, name in enumerate(members(table.columns))}
        self._bounded = list(self._places)[len(self.columns) :]  # what tells rows of ragged columns apart
        self._first_block = np.cumsum([0, *(shard.blocks for shard in self._shards)], dtype=np.int64)
        every_block = int(self._first_block[-1])
        blocks = np.diff(self._first_block)
        self._block_shard = np.repeat(np.arange(len(blocks)), blocks)
        # These fill as shards are opened. Until then each block begins with its shard, so that they always ascend.
        self._block_rows = np.repeat(self._starts[:-1], blocks)
        self._layout = np.zeros((len(self._places), every_block), np.int64)
        self._bounds_at = np.full((len(self._bounded), every_block), NOT_KEPT, np.int64)
        # When each file was written, as last opened; of another one, or one put there from now on, its hash decides.
        self._known, self._written = np.zeros(len(self._shards), bool), np.zeros(len(self._shards), np.int64)
        self._began = time.time_ns()
        self._bounds = np.empty(min((len(self) + every_block) * len(self._bounded), MAX_BOUNDS), OFFSETS)
        self._bounds_kept = 0
        self._max_open = max_open_shards or resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        if cache is not None:
            self._max_open = min(self._max_open, cache.most_at_once(self._shards))
        self._descriptors = Descriptors(len(self._shards), self._max_open)
        self._changing = threading.Lock()  # what is known of shards

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Returns one row, by column. So a table can be iterated over.

        Raises:
            IndexError: there is no such row; a negative one counts from the end.
            XdscaleError: as `read`; or not one row is asked for, but a slice, say.
        """
        if not hasattr(row, "__index__"):
            raise XdscaleError(
                f"{self.folder}: [{row!r}]: expected the number of one row; `read` and `read_ragged` take many"
            )
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.folder}: no row {row}; {self.split} has {len(self)}")
        rows = np.array([row % len(self)])
        return {
            name: self.read_ragged(name, rows).values if kind.offsets else self.read(name, rows)[0]
            for name, kind in self.columns.items()
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex): the identity of the data in this table and in those that it links to."""
        return self.manifest.only([self.name]).fingerprint

    def linked(self, column: str) -> Self:
        """Opens the table whose row numbers a column holds, with the same quarantine and cache.

        Raises:
            XdscaleError: the column holds no row numbers, or as the constructor.
        """
        table = self._kind(column).rows_of
        if table is None:
            raise XdscaleError(f"{self.folder}: column {column!r} of {self.name} holds no rows of another table")
        split = self.manifest.linked_split(table, self.split)
        return type(self)(self.folder, split, table, quarantined=self._quarantined, cache=self._cache)

    def prefetch(self, rows: np.ndarray) -> None:
        """Says that these rows, all that one step needs of this table, will be read soon; returns at once.

        Args:
            rows: int64 [n], any order, repeats allowed.

        Raises:
            XdscaleError: a row out of range; their shards do not fit into the cache together, with the bytes that do;
                or a shard that was to be fetched could not be.
        """
        if self._cache is not None:
            shard = self._shard_of(self._checked(rows))
            wanted = np.unique(shard[self._healthy[shard]]).tolist()
            self._cache.prefetch([self._shards[number] for number in wanted])

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """Returns whether each row lies in a shard that may be read: bool [n]."""
        return np.ones(len(rows), bool) if self._all_healthy else self._healthy[self._shard_of(rows)]

    def first_usable(self) -> int:
        """Returns the lowest row that may be read."""
        return int(self._starts[np.argmax(self._healthy)])

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Returns rows of a column of one shape: [n, *shape].

        Args:
            column: its name.
            rows: int64 [n], any order, repeats allowed.

        Raises:
            XdscaleError: a row out of range, or a shard that is missing, in quarantine or not as the manifest says.
        """
        kind = self._column(column, ragged=False)
        shard, block, row = self._locate(rows)
        begin = self._layout[self._places[column], block] + row * kind.element_bytes
        content = self._read(shard, begin, np.full(len(shard), kind.element_bytes))
        values = np.frombuffer(content, kind.dtype).reshape(-1, *kind.shape)
        return self._checked_links(kind, values)

    def read_ragged(self, column: str, rows: np.ndarray) -> Ragged:
        """Returns rows of a ragged column.

        Args:
            column: its name.
            rows: int64 [n], any order, repeats allowed.

        Raises:
            XdscaleError: as `read`, or a row with fewer or more elements than the manifest allows.
        """
        kind = self._column(column, ragged=True)
        shard, block, row = self._locate(rows)
        first, last = self._row_bounds(kind.offsets, shard, block, row)
        lengths = last - first
        most = np.iinfo(np.int64).max if kind.most is None else kind.most
        wrong = (lengths < kind.fewest) | (lengths > most)
        if wrong.any():
            one, limit = wrong.argmax(), "or more" if kind.most is None else f"to {kind.most}"
            gives = f"gives {lengths[one]} elements of {column} to row {np.asarray(rows)[one]}"
            raise self._damaged(shard[one], f"{gives}, expected {kind.fewest} {limit}")
        begin = self._layout[self._places[column], block] + first * kind.element_bytes
        values = np.frombuffer(self._read(shard, begin, lengths * kind.element_bytes), kind.dtype)
        values = self._checked_links(kind, values.reshape(-1, *kind.shape))
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(values, offsets)

    def _checked_links(self, column: Column, values: np.ndarray) -> np.ndarray:
        if column.rows_of is not None and values.size:
            rows = self.manifest.linked_rows(column.rows_of, self.split)
            if (largest := int(values.max())) >= rows:
                raise XdscaleError(
                    f"{self.folder}: {self.name}.{column.name} links to row {largest} of {column.rows_of}, which has "
                    f"rows 0 to {rows - 1}: a shard is damaged ('xdscale shards verify' finds it)"
                )
        return values

    def _kind(self, name: str) -> Column:
        if name not in self.columns:
            raise XdscaleError(f"{self.folder}: no column {name!r}; the table has: {', '.join(self.columns)}")
        return self.columns[name]

    def _column(self, name: str, *, ragged: bool) -> Column:
        column = self._kind(name)
        if (column.offsets is not None) != ragged:
            method = "read_ragged" if column.offsets else "read"
            raise XdscaleError(f"{self.folder}: column {name!r} is read with `{method}`")
        return column

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (shard, block counted over all shards, row in the block), int64 [n] each."""
        rows = self._checked(rows)
        with self._changing:
            block = np.searchsorted(self._block_rows, rows, side="right") - 1
            shard = self._block_shard[block]
            known = self._known[shard]
            if known.all():
                return shard, block, rows - self._block_rows[block]
        self._learn_all(np.unique(shard[~known]))
        return self._locate(rows)

    def _learn_all(self, unknown: np.ndarray) -> None:
        for first in range(0, len(unknown), self._max_open):
            some = unknown[first : first + self._max_open]
            with self._opened(some) as descriptors:
                for number, descriptor in zip(some.tolist(), descriptors.tolist()):
                    self._learn(number, descriptor)

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":  # a mask too, whose True would be row 1
            raise XdscaleError(f"{self.folder}: rows of {rows.dtype}; expected numbers, of a mask np.flatnonzero(mask)")
        if (wrong := rows[(rows < 0) | (rows >= len(self))]).size:
            there = f"{self.split} has rows 0 to {len(self) - 1}"
            raise XdscaleError(f"{self.folder}: row {wrong[0]} does not exist; {there}")
        return rows.astype(np.int64, copy=False)

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _row_bounds(
        self, offsets: str, shard: np.ndarray, block: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns where rows begin and end among the elements of their blocks, int64 [n] each."""
        at = self._bounds_at[self._bounded.index(offsets), block]
        if (at != NOT_KEPT).all():
            return self._bounds[at + row].astype(np.int64), self._bounds[at + row + 1].astype(np.int64)
        begin = self._layout[self._places[offsets], block] + row * OFFSETS.itemsize
        found = np.frombuffer(self._read(shard, begin, np.full(len(shard), 2 * OFFSETS.itemsize)), OFFSETS)
        first, last = found.astype(np.int64).reshape(-1, 2).T
        return first, last

    def _read(self, shard: np.ndarray, begin: np.ndarray, sizes: np.ndarray) -> bytes | memoryview:
        """Returns the bytes of places in shards, one after another; all arguments int64 [n]."""
        total = int(sizes.sum())
        long = total >= max(LONG_BYTES, LONG_PIECE * len(sizes))  # read to where they are wanted
        if long:
            beyond = begin + sizes > self._bytes[shard]
            if beyond.any():  # before room is made for what damaged bounds ask for
                one = beyond.argmax()
                raise self._damaged(shard[one], f"ends before byte {begin[one] + sizes[one]}")
            joined, ends = memoryview(np.empty(total, np.uint8)), np.cumsum(sizes)
        found: list[Any] = []  # the pieces, or the bytes that each of the long ones got
        for first in range(0, len(shard), self._max_open):  # so many places lie in so many shards at most
            part = slice(first, first + self._max_open)
            wanted = sizes[part].tolist()
            if long:
                wanted = [[joined[end - size : end]] for end, size in zip(ends[part].tolist(), wanted)]
            with self._opened(shard[part]) as descriptors:
                try:
                    read = os.preadv if long else os.pread
                    found.extend(map(read, descriptors.tolist(), wanted, begin[part].tolist()))
                except OSError as error:
                    raise self._unreadable(shard[len(found)], error) from None
        if not long:
            joined = b"".join(found)
        if (sum(found) if long else len(joined)) != total:
            lengths = found if long else map(len, found)
            short = next(number for number, length in enumerate(lengths) if length < sizes[number])
            raise self._damaged(shard[short], f"ends before byte {begin[short] + sizes[short]}")
        return joined

    def _opened(self, shard: np.ndarray) -> AbstractContextManager[np.ndarray]:
        """Gives a file descriptor for each element, of `max_open_shards` shards at most, to be used in the block."""
        cache = self._cache
        return self._descriptors.opened(shard, self._open_file) if cache is None else self._fetched(shard, cache)

    @contextmanager
    def _fetched(self, shard: np.ndarray, cache: ShardCache) -> Iterator[np.ndarray]:
        numbers, places = np.unique(shard, return_inverse=True)
        for number in numbers[~self._healthy[numbers]].tolist():
            raise self._in_quarantine(number)
        with cache.opened([self._shards[number] for number in numbers.tolist()]) as descriptors:
            yield np.array(descriptors)[places]

    def _open_file(self, number: int) -> int:
        record = self._shards[number]
        if not self._healthy[number]:
            raise self._in_quarantine(number)
        path = self.folder / record.file
        try:
            if path.is_fifo():  # to open it would wait for whoever writes
                raise self._damaged(number, "is a pipe")
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(number, error) from None
        found, before = os.fstat(descriptor), int(self._written[number])
        problem = f"expected {record.bytes} bytes, found {found.st_size}" if found.st_size != record.bytes else ""
        replaced = before != found.st_mtime_ns if before else found.st_ctime_ns > self._began  # a copy keeps its mtime
        if replaced and not problem and damaged_shards(self.folder, [record], [record]):
            problem = "was replaced by another file while it was in use"
        if problem:
            os.close(descriptor)
            raise self._damaged(number, problem)
        self._written[number] = found.st_mtime_ns
        return descriptor

    def _learn(self, number: int, descriptor: int) -> None:
        """Finds where a shard's arrays lie, and where its ragged rows begin and end; several threads may at once."""
        first_block = int(self._first_block[number])
        try:
            starts, rows = read_layout(descriptor, self._shards[number], list(self.columns.values()))
            counts = np.diff(rows) + 1
            bounds = [self._read_bounds(descriptor, begins, counts) for begins in starts[len(self.columns) :]]
        except OSError as error:
            raise self._unreadable(number, error) from None
        except ValueError as error:
            raise self._damaged(number, f"not a shard of this dataset ({error})") from None
        with self._changing:
            if self._known[number]:
                return
            self._layout[:, first_block : first_block + len(rows) - 1] = starts
            self._block_rows[first_block : first_block + len(rows) - 1] = self._starts[number] + rows[:-1]
            for place, found in enumerate(bounds):
                self._keep_bounds(place, first_block, counts, found)
            self._known[number] = True

    def _read_bounds(self, descriptor: int, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the bounds of a shard's ragged rows, block after block; none where there is no room to keep them."""
        if self._bounds_kept + counts.sum() > len(self._bounds):
            return np.empty(0, OFFSETS)
        places = zip(begins.tolist(), counts.tolist())
        found = b"".join(os.pread(descriptor, count * OFFSETS.itemsize, begin) for begin, count in places)
        return np.frombuffer(found, OFFSETS)

    def _keep_bounds(self, place: int, first_block: int, counts: np.ndarray, bounds: np.ndarray) -> None:
        """Keeps the bounds of a shard's ragged rows while there is room: one read less per row."""
        end = self._bounds_kept + len(bounds)
        if len(bounds) < counts.sum() or end > len(self._bounds):
            return
        self._bounds[self._bounds_kept : end] = bounds
        ends = self._bounds_kept + np.cumsum(counts)
        self._bounds_at[place, first_block : first_block + len(counts)] = ends - counts
        self._bounds_kept = end

    def _damaged(self, number: int, problem: str) -> XdscaleError:
        where = f"{self.folder / self._shards[number].file}: {problem}"
        return XdscaleError(f"{where}; copy the shard again ('xdscale shards verify' finds all such shards)")

    def _in_quarantine(self, number: int) -> XdscaleError:
        return XdscaleError(f"{self.folder / self._shards[number].file}: is in quarantine and was asked for")

    def _unreadable(self, number: int, error: OSError) -> XdscaleError:
        return XdscaleError(f"{self.folder / self._shards[number].file}: cannot be read: {error.strerror or error}")


def open_table(folder: str | Path, split: str = "train", name: str | None = None) -> Table:
    """Opens one split of a table: `len`, rows by number, columns by name, iteration row by row.

    Args:
        folder: written by `xdscale shards build`, or fetched whole.
        split: for example "train" or "validation".
        name: of the table; may be left out where the dataset has one.

    Raises:
        XdscaleError: no valid manifest, or no such table or split.
    """
    return Table(Path(expand_home(str(folder))), split, name)
