"""Where the arrays lie in a shard, by its tar and npy headers, every one of them checked."""

import io
import os
from functools import lru_cache

import numpy as np

from xdscale.shards.manifest import Build, ShardRecord
from xdscale.shards.writer import CLIP, CLIP_OFFSETS, LANGUAGE

IDS, OFFSETS = np.dtype("<u2"), np.dtype("<u4")
TAR_HEADER_BYTES = 512
NPY_HEADER_BYTES = 128
"""What numpy writes before arrays of one or two dimensions."""


def read_layout(descriptor: int, record: ShardRecord, build: Build) -> np.ndarray:
    """Finds the arrays of every block.

    Args:
        descriptor: of the open shard.
        record: what the manifest says of it.
        build: how it was built.

    Returns:
        int64 [3, blocks]: byte at which the language ids, CLIP ids and CLIP offsets of each block begin.

    Raises:
        ValueError: a header is not what this dataset's writer writes; names the member, expected and found.
        OSError: the file cannot be read.
    """
    block, length = build.block_sequences, build.sequence_length
    blocks = -(-record.samples // block)
    starts = np.empty((3, blocks), np.int64)
    at = 0
    for number in range(blocks):
        sequences = min(block, record.samples - number * block)
        members = ((LANGUAGE, IDS, (sequences, length)), (CLIP, IDS, None), (CLIP_OFFSETS, OFFSETS, (sequences + 1,)))
        for row, (kind, dtype, shape) in enumerate(members):
            starts[row, number], end = _array(descriptor, at, f"{number:06d}.{kind}", dtype, shape)
            if end > record.bytes:
                raise ValueError(f"{number:06d}.{kind} ends at byte {end} of {record.bytes}")
            at = -(-end // TAR_HEADER_BYTES) * TAR_HEADER_BYTES
    return starts


def _array(descriptor: int, at: int, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> tuple[int, int]:
    """Returns the bytes where an array's values begin and end; without a shape it may have any length."""
    headers = os.pread(descriptor, TAR_HEADER_BYTES + NPY_HEADER_BYTES, at)
    found = headers[:100].rstrip(b"\0")
    if found != name.encode():
        raise ValueError(f"byte {at}: expected the member {name}, found {found.decode(errors='replace')!r}")
    size = int(headers[124:135], 8)
    if shape is None:
        shape = ((size - NPY_HEADER_BYTES) // dtype.itemsize,)
    begin = at + TAR_HEADER_BYTES + NPY_HEADER_BYTES
    end = begin + int(np.prod(shape)) * dtype.itemsize
    if headers[TAR_HEADER_BYTES:] != _npy_header(dtype.str, shape) or end != at + TAR_HEADER_BYTES + size:
        raise ValueError(f"{name} holds {_description(headers[TAR_HEADER_BYTES:])}, expected {dtype} {list(shape)}")
    return begin, end


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
