"""One shard: a reproducible tar of plain `.npy` blocks. How it is written, and where its arrays are found again."""

import hashlib
import io
import math
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import replaced_when_complete
from xdscale.shards.manifest import Column, ShardRecord, members

BLOCK_BYTES = 16 << 20
"""A block ends before the row with which its arrays would be larger; a row that is larger by itself is one block."""
BLOCK_ROWS = 1024
"""Most rows per block: tar and npy headers then cost well under 1 % of 512-token sequences."""
OFFSETS = np.dtype("<u4")
TAR_HEADER_BYTES = 512
NPY_HEADER_BYTES = 128
"""What numpy writes before arrays of one to four dimensions."""

Arrays = Mapping[str, np.ndarray]
"""Rows of a table. For each column its rows [n, *shape], or for a ragged one the elements of all rows one after another
[total, *shape]; for each name of offsets int64 [n + 1]: row i owns elements `offsets[i]` to `offsets[i + 1] - 1`."""


class Ragged(NamedTuple):
    """Rows of any number of elements, one after another.

    Attributes:
        values: [total, *shape].
        offsets: int64 [n + 1]; row i owns elements `offsets[i]` to `offsets[i + 1] - 1`.
    """

    values: np.ndarray
    offsets: np.ndarray


class ShardWriter:
    """Writes rows as they come; the file appears when `finish` is called, not if an exception ends the block.

    Equal rows give equal bytes, however they are dealt out to calls: ustar headers, no times, no owners, fixed order of
    members. Memory is one block and the rows of one call.

    Args:
        path: `PREFIX-NNNNNN.tar`; its folder exists.
        columns: of the table.
        linked_rows: how many rows there are to link to, by column; a column that is not named is not checked.
    """

    def __init__(self, path: Path, columns: Sequence[Column], linked_rows: Mapping[str, int] | None = None) -> None:
        self._path = path
        self._columns = columns
        self._linked_rows = linked_rows or {}
        self._waiting: list[Arrays] = []
        self._sizes = np.empty(0, np.int64)  # bytes of each waiting row
        self._rows = self._blocks = 0
        self._elements: Counter[str] = Counter()
        self._largest = {column.name: 0 for column in columns if column.rows_of}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._hashing = _HashingStream(self._stack.enter_context(replaced_when_complete(self._path)))
        # "w|" only ever appends, so what was hashed is what stands in the file.
        tar = tarfile.open(fileobj=self._hashing, mode="w|", format=tarfile.USTAR_FORMAT)
        self._tar = self._stack.enter_context(tar)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def add(self, arrays: Arrays) -> None:
        """Appends rows.

        Raises:
            XdscaleError: an array is missing, of another type, shape or length than its column says, has rows of too
                few or too many elements, or links to a row that does not exist.
            OSError: the file cannot be written.
        """
        self._waiting.append(arrays)
        self._sizes = np.concatenate([self._sizes, self._checked_sizes(arrays)])
        while len(self._sizes) > BLOCK_ROWS or self._sizes.sum() > BLOCK_BYTES:
            fitting = np.searchsorted(np.cumsum(self._sizes), BLOCK_BYTES, side="right")
            self._write_block(max(1, min(int(fitting), BLOCK_ROWS)))

    def finish(self) -> ShardRecord:
        """Writes what waits and puts the file in its place."""
        if len(self._sizes):
            self._write_block(len(self._sizes))
        self._stack.close()
        return ShardRecord(
            file=self._path.name,
            rows=self._rows,
            blocks=self._blocks,
            bytes=self._hashing.bytes_written,
            sha256=self._hashing.digest.hexdigest(),
            elements=dict(self._elements),
            largest=self._largest,
        )

    def _checked_sizes(self, arrays: Arrays) -> np.ndarray:
        """Returns the bytes of each row, int64 [n]."""
        names = members(self._columns)
        if set(names) != set(arrays):
            raise self._refusal(f"rows have the arrays {', '.join(sorted(arrays))}, expected {', '.join(names)}")
        first = self._columns[0]
        rows = len(arrays[first.name]) if first.offsets is None else len(arrays[first.offsets]) - 1
        sizes = np.zeros(rows, np.int64)
        for name in names[len(self._columns) :]:
            bounds = arrays[name]
            if bounds.shape != (rows + 1,) or bounds[0] != 0 or (np.diff(bounds.astype(np.int64)) < 0).any():
                raise self._refusal(f"{name}: expected {rows + 1} offsets that begin with 0 and never fall")
            sizes += OFFSETS.itemsize
        for column in self._columns:
            array, lengths = arrays[column.name], np.ones(rows, np.int64)
            if column.offsets:
                lengths = np.diff(arrays[column.offsets].astype(np.int64))
                if ((lengths < column.fewest) | (lengths > (column.most or lengths.max(initial=0)))).any():
                    raise self._refusal(
                        f"{column.name}: rows of {lengths.min()} to {lengths.max()} elements, expected {column.fewest} "
                        f"to {column.most or 'any number'}"
                    )
            expected = (int(lengths.sum()), *column.shape)
            if array.shape != expected or array.dtype != np.dtype(column.dtype):
                wanted = f"{np.dtype(column.dtype)} {list(expected)}"
                raise self._refusal(f"{column.name}: {array.dtype} {list(array.shape)}, expected {wanted}")
            self._check_link(column, array)
            sizes += lengths * column.element_bytes
        return sizes

    def _check_link(self, column: Column, array: np.ndarray) -> None:
        if column.rows_of is None or not array.size:
            return
        largest, rows = int(array.max()), self._linked_rows.get(column.name)
        if rows is not None and largest >= rows:
            raise self._refusal(f"{column.name}: links to row {largest} of {column.rows_of}, which has {rows} rows")
        self._largest[column.name] = max(self._largest[column.name], largest)

    def _refusal(self, problem: str) -> XdscaleError:
        return XdscaleError(
            f"{self._path.name}, after row {self._rows}: {problem}; the source of the table must be mended"
        )

    def _write_block(self, rows: int) -> None:
        whole = self._waiting[0] if len(self._waiting) == 1 else _joined(self._columns, self._waiting)
        block = _part(self._columns, whole, 0, rows)
        for name, array in block.items():
            _add_member(self._tar, f"{self._blocks:06d}.{name}.npy", array)
        for name in members(self._columns)[len(self._columns) :]:
            self._elements[name] += int(block[name][-1])
        self._waiting = [_part(self._columns, whole, rows, len(self._sizes))]
        self._sizes = self._sizes[rows:]
        self._rows += rows
        self._blocks += 1


def write_shard(path: Path, columns: Sequence[Column], arrays: Arrays) -> ShardRecord:
    """Writes one tar shard of rows that are all there, and returns its record; errors as `ShardWriter.add`."""
    with ShardWriter(path, columns) as writer:
        writer.add(arrays)
        return writer.finish()


def _joined(columns: Sequence[Column], parts: Sequence[Arrays]) -> Arrays:
    whole = {column.name: np.concatenate([part[column.name] for part in parts]) for column in columns}
    for name in members(columns)[len(columns) :]:
        lengths = [np.diff(part[name].astype(np.int64)) for part in parts]
        whole[name] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return whole


def _part(columns: Sequence[Column], arrays: Arrays, first: int, end: int) -> dict[str, np.ndarray]:
    """Returns rows `first` to `end` - 1; offsets count from the first of their elements."""
    part = {}
    for column in columns:
        rows = slice(first, end)
        if column.offsets is not None:
            rows = slice(arrays[column.offsets][first], arrays[column.offsets][end])
        part[column.name] = arrays[column.name][rows]
    for name in members(columns)[len(columns) :]:
        bounds = arrays[name][first : end + 1]
        part[name] = (bounds - bounds[0]).astype(OFFSETS)
    return part


class _HashingStream:
    """Passes writes on while hashing and counting them."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes_written = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes_written += len(data)
        return self._stream.write(data)


def _add_member(tar: tarfile.TarFile, name: str, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    member = tarfile.TarInfo(name)  # its defaults are mtime 0, uid 0, gid 0, no names, mode 644
    member.size = content.tell()
    content.seek(0)
    tar.addfile(member, content)


def read_layout(descriptor: int, record: ShardRecord, columns: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the arrays of every block by the tar and npy headers, every one of which is checked.

    Args:
        descriptor: of the open shard.
        record: what the manifest says of it.
        columns: of the table.

    Returns:
        (int64 [members, blocks]: byte at which each array of `members(columns)` begins in each block;
        int64 [blocks + 1]: row of the shard with which each block begins, and the end).

    Raises:
        ValueError: a header is not what this table's writer writes; names the member, expected and found.
        OSError: the file cannot be read.
    """
    names = members(columns)
    starts = np.empty((len(names), record.blocks), np.int64)
    rows = np.zeros(record.blocks + 1, np.int64)
    at = 0
    for number in range(record.blocks):
        # Lengths of the block's arrays, by the member that tells rows apart; None is that of rows of one shape.
        lengths: dict[str | None, int] = {None: record.rows - int(rows[number])} if number == record.blocks - 1 else {}
        for place, name in enumerate(names):
            column = columns[place] if place < len(columns) else None
            dtype, shape, group = (
                (np.dtype(column.dtype), column.shape, column.offsets) if column else (OFFSETS, (), None)
            )
            length = lengths.get(group)
            wanted = length + 1 if column is None and length is not None else length
            member = f"{number:06d}.{name}.npy"
            starts[place, number], end, found = _find_array(descriptor, at, member, dtype, wanted, shape)
            lengths[group] = found - (column is None)
            if end > record.bytes:
                raise ValueError(f"{member} ends at byte {end} of {record.bytes}")
            at = -(-end // TAR_HEADER_BYTES) * TAR_HEADER_BYTES
        rows[number + 1] = rows[number] + lengths[None]
    if (np.diff(rows) <= 0).any():  # the last one has what the record states beyond the others, or was refused
        raise ValueError(f"one of its {record.blocks} blocks holds no rows")
    return starts, rows


def _find_array(
    descriptor: int, at: int, name: str, dtype: np.dtype, length: int | None, shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Returns the bytes where an array's values begin and end, and its length, which without `length` may be any."""
    headers = os.pread(descriptor, TAR_HEADER_BYTES + NPY_HEADER_BYTES, at)
    found = headers[:100].rstrip(b"\0")
    if found != name.encode():
        raise ValueError(f"byte {at}: expected the member {name}, found {found.decode(errors='replace')!r}")
    size = int(headers[124:135], 8)
    element_bytes = dtype.itemsize * math.prod(shape)
    if length is None:
        length = (size - NPY_HEADER_BYTES) // element_bytes
    begin = at + TAR_HEADER_BYTES + NPY_HEADER_BYTES
    end = begin + length * element_bytes
    whole = (length, *shape)
    if headers[TAR_HEADER_BYTES:] != _npy_header(dtype.str, whole) or end != at + TAR_HEADER_BYTES + size:
        raise ValueError(f"{name} holds {_description(headers[TAR_HEADER_BYTES:])}, expected {dtype} {list(whole)}")
    return begin, end, length


@lru_cache(maxsize=64)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _description(header: bytes) -> str:
    stream = io.BytesIO(header)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        return f"no .npy file of version 1.0 ({error})"
    return f"{dtype} {list(shape)}"
