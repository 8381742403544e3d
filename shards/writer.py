"""Writing one shard: a reproducible tar of plain `.npy` blocks, put in place only when it is complete."""

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xdscale.files import replaced_when_complete
from xdscale.shards.manifest import BLOCK_ROWS, Column, ShardRecord, members


def write_shard(
    path: Path, columns: Sequence[Column], arrays: Mapping[str, np.ndarray], block_rows: int = BLOCK_ROWS
) -> ShardRecord:
    """Writes one tar shard and returns its record.

    Equal arrays give equal bytes: ustar headers, no times, no owners, fixed order of members.

    Args:
        path: `SPLIT-NNNNNN.tar`; its folder exists.
        columns: of the table.
        arrays: for each column its rows [n, *shape], or for a ragged one the elements of all rows one after another
            [total, *shape]. For each name of offsets int64 [n + 1]; row i owns elements `offsets[i]` to
            `offsets[i + 1] - 1`.
        block_rows: rows per block.
    """
    rows = _rows(columns, arrays)
    with replaced_when_complete(path) as stream:
        hashing = _HashingStream(stream)
        # "w|" only ever appends, so what was hashed is what stands in the file.
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, first in enumerate(range(0, rows, block_rows)):
                for name, array in _block(columns, arrays, first, block_rows).items():
                    _add(tar, f"{number:06d}.{name}.npy", array)
    return ShardRecord(file=path.name, samples=rows, bytes=hashing.bytes_written, sha256=hashing.digest.hexdigest())


def _rows(columns: Sequence[Column], arrays: Mapping[str, np.ndarray]) -> int:
    first = columns[0]
    return len(arrays[first.name]) if first.offsets is None else len(arrays[first.offsets]) - 1


def _block(
    columns: Sequence[Column], arrays: Mapping[str, np.ndarray], first: int, block_rows: int
) -> dict[str, np.ndarray]:
    """Returns the members of the block that begins with row `first`; offsets count from the block's first element."""
    block = {}
    for column in columns:
        part = slice(first, first + block_rows)
        if column.offsets is not None:
            bounds = arrays[column.offsets][first : first + block_rows + 1]
            part = slice(bounds[0], bounds[-1])
        block[column.name] = arrays[column.name][part].astype(column.dtype, copy=False)
    for name in members(columns)[len(columns) :]:
        bounds = arrays[name][first : first + block_rows + 1]
        block[name] = (bounds - bounds[0]).astype("<u4")
    return block


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


def _add(tar: tarfile.TarFile, name: str, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    member = tarfile.TarInfo(name)  # its defaults are mtime 0, uid 0, gid 0, no names, mode 644
    member.size = content.tell()
    content.seek(0)
    tar.addfile(member, content)
