"""Reading sequences by number: memory-mapped shards, any order, a bounded number of open files."""

import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest, ShardRecord
from xdscale.shards.writer import CLIP, CLIP_OFFSETS, LANGUAGE

MEMBERS = (LANGUAGE, CLIP, CLIP_OFFSETS)
DTYPES = {LANGUAGE: np.dtype("<u2"), CLIP: np.dtype("<u2"), CLIP_OFFSETS: np.dtype("<u4")}


@dataclass(frozen=True)
class _Layout:
    """Where the arrays of a shard's blocks begin, int64 [blocks] each, in elements of their own type."""

    language: np.ndarray
    clip: np.ndarray
    clip_offsets: np.ndarray


@dataclass(frozen=True)
class _Mapped:
    """An open shard: its whole file seen as 16-bit and as 32-bit numbers, and where the blocks are."""

    rows: np.ndarray  # uint16 [positions, sequence_length]: the sequence_length numbers from each position on
    ids: np.ndarray  # uint16 [bytes / 2]
    offsets: np.ndarray  # uint32 [bytes / 4]
    layout: _Layout


class ShardedSplit:
    """One split of a folder of shards, as an indexable table of sequences.

    Sample ids are 0 .. len - 1 in the order of the manifest. Shards are opened on first use; at most
    `max_open_shards` are mapped at a time (each holds one file descriptor), the least recently used one is
    closed first. What is kept for closed shards, the positions of their blocks, is 24 bytes per block.

    Args:
        folder: written by `xdscale shards build`.
        split: "train" or "validation".
        max_open_shards: most shards mapped at a time.

    Raises:
        XdscaleError: no valid manifest, or no such split.
    """

    def __init__(self, folder: Path, split: str, *, max_open_shards: int = 256) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if split not in self.manifest.splits:
            known = ", ".join(sorted(self.manifest.splits)) or "none"
            raise XdscaleError(f"{self.folder}: no split {split!r}; the dataset has: {known}")
        self.split = split
        self._shards = self.manifest.splits[split].shards
        # Sample ids at which each shard begins, and the end: int64 [shards + 1].
        self._starts = np.cumsum([0, *(shard.samples for shard in self._shards)], dtype=np.int64)
        self._sequence_length = self.manifest.build.sequence_length
        self._block = self.manifest.build.block_sequences
        self._max_open = max_open_shards
        self._layouts: dict[int, _Layout] = {}
        self._mapped: OrderedDict[int, _Mapped] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def language_ids(self, sample_ids: np.ndarray) -> np.ndarray:
        """Returns the samples' language ids, without [CLS] and [SEP]: uint16 [n, sequence_length].

        Args:
            sample_ids: int64 [n], any order, repeats allowed.

        Raises:
            XdscaleError: an id out of range, or a shard that is missing or not as the manifest says.
        """
        length = self._sequence_length
        result = np.empty((len(sample_ids), length), np.uint16)
        for where, shard, block, row in self._by_shard(sample_ids):
            mapped = self._open(shard)
            result[where] = mapped.rows[mapped.layout.language[block] + row * length]
        return result

    def clip_ids(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the CLIP ids of the samples, without start and end, one after another.

        Args:
            sample_ids: int64 [n], any order, repeats allowed.

        Returns:
            (ids uint16 [total], offsets int64 [n + 1]); sample i owns ids[offsets[i]:offsets[i + 1]].

        Raises:
            XdscaleError: an id out of range, or a shard that is missing or not as the manifest says.
        """
        pieces = [np.empty(0, np.uint16)] * len(sample_ids)
        lengths = np.empty(len(sample_ids), np.int64)
        for where, shard, block, row in self._by_shard(sample_ids):
            mapped = self._open(shard)
            at = mapped.layout.clip_offsets[block] + row
            begin = mapped.layout.clip[block] + mapped.offsets[at]
            end = mapped.layout.clip[block] + mapped.offsets[at + 1]
            lengths[where] = end - begin
            # Slices and one concatenation: several times faster than an index for every id.
            for position, first, last in zip(where.tolist(), begin.tolist(), end.tolist()):
                pieces[position] = mapped.ids[first:last]
        ids = np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
        return ids, np.concatenate([[0], np.cumsum(lengths)])

    def _by_shard(self, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray, np.ndarray]]:
        """Yields (positions in `sample_ids`, shard, block in the shard, row in the block) for each shard."""
        sample_ids = np.asarray(sample_ids, np.int64)
        outside = (sample_ids < 0) | (sample_ids >= len(self))
        if outside.any():
            raise XdscaleError(
                f"{self.folder}: sample {sample_ids[outside][0]} does not exist; "
                f"{self.split} has samples 0 to {len(self) - 1}"
            )
        order = np.argsort(sample_ids, kind="stable")  # neighbours on disk are then read together
        sorted_ids = sample_ids[order]
        cuts = np.searchsorted(sorted_ids, self._starts)
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            chosen = slice(cuts[shard], cuts[shard + 1])
            block, row = np.divmod(sorted_ids[chosen] - self._starts[shard], self._block)
            yield order[chosen], shard, block, row

    def _open(self, shard: int) -> _Mapped:
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        while len(self._mapped) >= self._max_open:
            self._mapped.popitem(last=False)
        record = self._shards[shard]
        path = self.folder / record.file
        try:
            with path.open("rb") as stream:
                _check_size(path, stream, record)
                if shard not in self._layouts:
                    self._layouts[shard] = _read_layout(path, stream, record, self.manifest)
                data = np.memmap(stream, np.uint8, mode="r")
        except OSError as error:
            raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None
        data = data.view(np.ndarray)  # plain: the subclass checks of np.memmap cost at every index
        ids = data.view(DTYPES[CLIP])
        self._mapped[shard] = _Mapped(
            # A window view makes "the row that starts here" one fancy index, whatever block it lies in.
            rows=sliding_window_view(ids, self._sequence_length),
            ids=ids,
            offsets=data.view(DTYPES[CLIP_OFFSETS]),
            layout=self._layouts[shard],
        )
        return self._mapped[shard]


def _check_size(path: Path, stream: BinaryIO, record: ShardRecord) -> None:
    found = stream.seek(0, 2)
    stream.seek(0)
    if found != record.bytes:
        raise XdscaleError(
            f"{path}: expected {record.bytes} bytes, found {found}; the file is torn or of another build: "
            "copy it again, or build the shards again"
        )


def _read_layout(path: Path, stream: BinaryIO, record: ShardRecord, manifest: Manifest) -> _Layout:
    """Finds every block's arrays by the tar's headers, and checks their types and shapes."""
    length, block = manifest.build.sequence_length, manifest.build.block_sequences
    starts: dict[str, list[int]] = {member: [] for member in MEMBERS}
    blocks = -(-record.samples // block)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            members = {info.name: info for info in tar}
            for number in range(blocks):
                sequences = min(block, record.samples - number * block)
                shapes = {LANGUAGE: (sequences, length), CLIP: None, CLIP_OFFSETS: (sequences + 1,)}
                for member in MEMBERS:
                    info = members[f"{number:06d}.{member}"]
                    starts[member].append(_array_start(stream, info, DTYPES[member], shapes[member]))
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise XdscaleError(
            f"{path}: not a shard of this dataset ({error}); check the folder with 'xdscale shards verify'"
        ) from None
    return _Layout(*(np.array(starts[member], np.int64) for member in MEMBERS))


def _array_start(stream: BinaryIO, info: tarfile.TarInfo, dtype: np.dtype, expected: tuple[int, ...] | None) -> int:
    """Returns where an .npy member's values begin, in elements of `dtype` from the start of the file."""
    stream.seek(info.offset_data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{info.name} is not an .npy file of version 1.0")
    shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    size = stream.tell() - info.offset_data + int(np.prod(shape)) * dtype.itemsize
    if found != dtype or fortran or size != info.size or (expected is not None and shape != expected):
        wanted = f"{dtype} {list(expected or shape)}"
        raise ValueError(f"{info.name} holds {found} {list(shape)}, expected {wanted}")
    start, rest = divmod(stream.tell(), dtype.itemsize)
    if rest:
        raise ValueError(f"{info.name} is not aligned")
    return start
