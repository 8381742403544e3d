"""Writing one shard: a reproducible tar of plain `.npy` blocks, put in place only when it is complete."""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xdscale.shards.manifest import BLOCK_SEQUENCES, ShardRecord

LANGUAGE, CLIP, CLIP_OFFSETS = "language.npy", "clip.npy", "clip_offsets.npy"


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write that becomes `path` only if the block ends without an exception.

    The content is on the disk before the name appears (fsync, then rename, then fsync of the folder), so a
    machine that loses power leaves either the whole new file or none of it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_shard(
    path: Path, language: np.ndarray, clip: np.ndarray, clip_offsets: np.ndarray, block: int = BLOCK_SEQUENCES
) -> ShardRecord:
    """Writes one tar shard and returns its record.

    Equal arrays give equal bytes: ustar headers, no times, no owners, fixed order of members.

    Args:
        path: `SPLIT-NNNNNN.tar`; its folder exists.
        language: uint16 [n, sequence_length].
        clip: uint16 [total], the sequences' CLIP ids one after another.
        clip_offsets: int64 [n + 1]; sequence i owns clip[clip_offsets[i]:clip_offsets[i + 1]].
        block: sequences per block.
    """
    with replaced_when_complete(path) as stream:
        hashing = _HashingStream(stream)
        # "w|" only ever appends, so what was hashed is what stands in the file.
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, first in enumerate(range(0, len(language), block)):
                offsets = clip_offsets[first : first + block + 1]
                key = f"{number:06d}"
                _add(tar, f"{key}.{LANGUAGE}", language[first : first + block].astype("<u2", copy=False))
                _add(tar, f"{key}.{CLIP}", clip[offsets[0] : offsets[-1]].astype("<u2", copy=False))
                _add(tar, f"{key}.{CLIP_OFFSETS}", (offsets - offsets[0]).astype("<u4"))
    return ShardRecord(
        file=path.name, samples=len(language), bytes=hashing.bytes_written, sha256=hashing.digest.hexdigest()
    )


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
