"""Where the arrays lie in a shard, by its tar and npy headers, every one of them checked."""

import io
import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from xdscale.shards.manifest import Column, ShardRecord, members

OFFSETS = np.dtype("<u4")
TAR_HEADER_BYTES = 512
NPY_HEADER_BYTES = 128
"""What numpy writes before arrays of one to four dimensions."""


def read_layout(descriptor: int, record: ShardRecord, columns: Sequence[Column], block_rows: int) -> np.ndarray:
    """Finds the arrays of every block.

    Args:
        descriptor: of the open shard.
        record: what the manifest says of it.
        columns: of the table.
        block_rows: rows per block; the last block of a shard may have fewer.

    Returns:
        int64 [members, blocks]: byte at which each array of `members(columns)` begins in each block.

    Raises:
        ValueError: a header is not what this table's writer writes; names the member, expected and found.
        OSError: the file cannot be read.
    """
    names = members(columns)
    blocks = -(-record.samples // block_rows)
    starts = np.empty((len(names), blocks), np.int64)
    at = 0
    for number in range(blocks):
        rows = min(block_rows, record.samples - number * block_rows)
        elements: dict[str, int] = {}  # of ragged columns, by the member that tells their rows apart
        for place, name in enumerate(names):
            member, dtype, shape, length = f"{number:06d}.{name}.npy", OFFSETS, (), rows + 1
            column = columns[place] if place < len(columns) else None
            if column is not None:
                dtype, shape = np.dtype(column.dtype), column.shape
                length = elements.get(column.offsets) if column.offsets else rows
            starts[place, number], end, found = _array(descriptor, at, member, dtype, length, shape)
            if column is not None and column.offsets:
                elements[column.offsets] = found
            if end > record.bytes:
                raise ValueError(f"{member} ends at byte {end} of {record.bytes}")
            at = -(-end // TAR_HEADER_BYTES) * TAR_HEADER_BYTES
    return starts


def _array(
    descriptor: int, at: int, name: str, dtype: np.dtype, length: int | None, shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Returns the bytes where an array's values begin and end, and its length, which without `length` may be any."""
    headers = os.pread(descriptor, TAR_HEADER_BYTES + NPY_HEADER_BYTES, at)
    found = headers[:100].rstrip(b"\0")
    if found != name.encode():
        raise ValueError(f"byte {at}: expected the member {name}, found {found.decode(errors='replace')!r}")
    size = int(headers[124:135], 8)
    element_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
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
