"""Reading sequences by number, in any order and at one cost, however many shards there are."""

import os
import resource
import weakref
from collections.abc import Collection
from pathlib import Path

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.shards.layout import IDS, OFFSETS, read_layout
from xdscale.shards.manifest import Manifest

CLIP_CONTENT = 75  # content ids of a CLIP block
MAX_BOUNDS = 8 << 20
"""Places of texts kept in memory, 4 bytes each: more than all of Wikipedia in sequences of 512."""
CLOSED = NOT_KEPT = -1


class ShardedSplit:
    """One split of a folder of shards, as an indexable table of sequences.

    Sample ids are 0 .. len - 1 in the order of the manifest. A batch of a global shuffle touches about as many shards
    as it has samples, so nothing here is done shard by shard but opening them. Sequences are read with `pread`, not
    through memory maps: a map would count all it has touched as this process's memory, fault at every new page, and
    answer a failing disk with a signal that names no file. Memory stays under 32 MiB, and 32 bytes per block.

    Args:
        folder: written by `xdscale shards build`.
        split: "train" or "validation".
        quarantined: names of shards that must not be read.
        max_open_shards: most file descriptors held, the least recently used is closed first; by default a quarter of
            what this process may have (`ulimit -n`).

    Raises:
        XdscaleError: no valid manifest, no such split, or every shard of it in quarantine.
    """

    def __init__(
        self, folder: Path, split: str, *, quarantined: Collection[str] = (), max_open_shards: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if split not in self.manifest.splits:
            known = ", ".join(sorted(self.manifest.splits)) or "none"
            raise XdscaleError(f"{self.folder}: no split {split!r}; the dataset has: {known}")
        self.split = split
        self._shards = self.manifest.splits[split].shards
        self._healthy = np.array([shard.file not in quarantined for shard in self._shards], bool)
        self._all_healthy = bool(self._healthy.all())
        if self._shards and not self._healthy.any():
            raise XdscaleError(f"{self.folder}: every shard of {split} is damaged; copy the shards again")
        # Sample ids at which each shard begins, and the end: int64 [shards + 1].
        self._starts = np.cumsum([0, *(shard.samples for shard in self._shards)], dtype=np.int64)
        self._length = self.manifest.build.sequence_length
        self._block = self.manifest.build.block_sequences
        blocks = [-(-shard.samples // self._block) for shard in self._shards]
        self._first_block = np.cumsum([0, *blocks], dtype=np.int64)
        self._layout = np.zeros((3, int(self._first_block[-1])), np.int64)  # filled when a shard is first opened
        self._known = np.zeros(len(self._shards), bool)
        self._bounds_at = np.full(int(self._first_block[-1]), NOT_KEPT, np.int64)
        self._bounds = np.empty(
            min(len(self) + len(self._bounds_at), MAX_BOUNDS), OFFSETS
        )  # fills as shards are opened
        self._bounds_kept = 0
        self._max_open = max_open_shards or resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._descriptors = np.full(len(self._shards), CLOSED, np.int64)
        self._last_use = np.zeros(len(self._shards), np.int64)
        self._batches = 0
        weakref.finalize(self, _close, self._descriptors, slice(None))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def usable(self, sample_ids: np.ndarray) -> np.ndarray:
        """Returns whether each sample lies in a shard that may be read: bool [n]."""
        if self._all_healthy:
            return np.ones(len(sample_ids), bool)
        return self._healthy[self._shard_of(sample_ids)]

    def first_usable(self) -> int:
        """Returns the lowest sample id that may be read."""
        return int(self._starts[np.argmax(self._healthy)])

    def language_ids(self, sample_ids: np.ndarray) -> np.ndarray:
        """Returns the samples' language ids, without [CLS] and [SEP]: uint16 [n, sequence_length].

        Args:
            sample_ids: int64 [n], any order, repeats allowed.

        Raises:
            XdscaleError: an id out of range, or a shard that is missing, in quarantine or not as the manifest says.
        """
        shard, block, row = self._locate(sample_ids)
        row_bytes = self._length * IDS.itemsize
        begin = self._layout[0, block] + row * row_bytes
        return np.frombuffer(self._read(shard, begin, np.full(len(shard), row_bytes)), IDS).reshape(-1, self._length)

    def clip_ids(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the CLIP ids of the samples, without start and end, one after another.

        Args:
            sample_ids: int64 [n], any order, repeats allowed.

        Returns:
            (ids uint16 [total], offsets int64 [n + 1]); sample i owns ids[offsets[i]:offsets[i + 1]].

        Raises:
            XdscaleError: an id out of range, or a shard that is missing, in quarantine or not as the manifest says.
        """
        shard, block, row = self._locate(sample_ids)
        first, last = self._text_bounds(shard, block, row)
        lengths = last - first
        longest = self.manifest.build.clip_blocks * CLIP_CONTENT
        wrong = np.flatnonzero((lengths < 1) | (lengths > longest))
        if wrong.size:
            raise self._damaged(
                shard[wrong[0]],
                f"gives {lengths[wrong[0]]} CLIP ids to sample {sample_ids[wrong[0]]}, expected 1 to {longest}",
            )
        begin = self._layout[1, block] + first * IDS.itemsize
        ids = np.frombuffer(self._read(shard, begin, lengths * IDS.itemsize), IDS)
        return ids, np.concatenate([[0], np.cumsum(lengths)])

    def _locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (shard, block counted over all shards, row in the block), int64 [n] each."""
        sample_ids = np.asarray(sample_ids, np.int64)
        if sample_ids.size and not 0 <= sample_ids.min() <= sample_ids.max() < len(self):
            outside = sample_ids[(sample_ids < 0) | (sample_ids >= len(self))]
            raise XdscaleError(
                f"{self.folder}: sample {outside[0]} does not exist; {self.split} has samples 0 to {len(self) - 1}"
            )
        shard = self._shard_of(sample_ids)
        unknown = np.unique(shard[~self._known[shard]])
        for first in range(0, len(unknown), self._max_open):
            some = unknown[first : first + self._max_open]
            for number, descriptor in zip(some.tolist(), self._open(some).tolist()):
                self._learn(number, descriptor)
        block, row = np.divmod(sample_ids - self._starts[shard], self._block)
        return shard, self._first_block[shard] + block, row

    def _shard_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, sample_ids, side="right") - 1

    def _text_bounds(self, shard: np.ndarray, block: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where texts begin and end in the CLIP ids of their blocks, int64 [n] each."""
        at = self._bounds_at[block]
        if (at != NOT_KEPT).all():
            return self._bounds[at + row].astype(np.int64), self._bounds[at + row + 1].astype(np.int64)
        begin = self._layout[2, block] + row * OFFSETS.itemsize
        found = np.frombuffer(self._read(shard, begin, np.full(len(shard), 2 * OFFSETS.itemsize)), OFFSETS)
        first, last = found.astype(np.int64).reshape(-1, 2).T
        return first, last

    def _read(self, shard: np.ndarray, begin: np.ndarray, sizes: np.ndarray) -> bytes:
        """Returns the bytes of places in shards, one after another; all arguments int64 [n]."""
        pieces: list[bytes] = []
        for first in range(0, len(shard), self._max_open):  # so many places lie in so many shards at most
            part = slice(first, first + self._max_open)
            descriptors = self._open(shard[part])
            try:
                pieces.extend(map(os.pread, descriptors.tolist(), sizes[part].tolist(), begin[part].tolist()))
            except OSError as error:
                raise self._unreadable(shard[len(pieces)], error) from None
        joined = b"".join(pieces)
        if len(joined) != sizes.sum():
            short = next(number for number, piece in enumerate(pieces) if len(piece) < sizes[number])
            raise self._damaged(shard[short], f"ends before byte {begin[short] + sizes[short]}")
        return joined

    def _open(self, shard: np.ndarray) -> np.ndarray:
        """Returns a file descriptor for each element, opening what is closed and closing the longest unused."""
        self._batches += 1
        self._last_use[shard] = self._batches
        found = self._descriptors[shard]
        if (found != CLOSED).all():
            return found
        closed = np.unique(shard[found == CLOSED])
        opened = np.flatnonzero(self._descriptors != CLOSED)
        surplus = len(opened) + len(closed) - self._max_open
        if surplus > 0:
            _close(self._descriptors, opened[np.argsort(self._last_use[opened], kind="stable")[:surplus]])
        for number in closed.tolist():
            self._descriptors[number] = self._open_file(number)
        return self._descriptors[shard]

    def _open_file(self, number: int) -> int:
        record = self._shards[number]
        if not self._healthy[number]:
            raise XdscaleError(f"{self.folder / record.file}: is in quarantine and was asked for")
        try:
            descriptor = os.open(self.folder / record.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(number, error) from None
        found = os.fstat(descriptor).st_size
        if found != record.bytes:
            os.close(descriptor)
            raise self._damaged(number, f"expected {record.bytes} bytes, found {found}")
        return descriptor

    def _learn(self, number: int, descriptor: int) -> None:
        """Finds where a shard's arrays lie, and keeps where its texts begin and end."""
        first_block = int(self._first_block[number])
        try:
            starts = read_layout(descriptor, self._shards[number], self.manifest.build)
            self._layout[:, first_block : first_block + starts.shape[1]] = starts
            self._keep_bounds(number, descriptor, first_block, starts[2])
        except OSError as error:
            raise self._unreadable(number, error) from None
        except ValueError as error:
            raise self._damaged(number, f"not a shard of this dataset ({error})") from None
        self._known[number] = True

    def _keep_bounds(self, number: int, descriptor: int, first_block: int, begins: np.ndarray) -> None:
        """Keeps the bounds of a shard's texts while there is room: one read less per sample."""
        samples = self._shards[number].samples
        if self._bounds_kept + samples + len(begins) > len(self._bounds):
            return
        for block, begin in enumerate(begins.tolist()):
            count = min(self._block, samples - block * self._block) + 1
            place = slice(self._bounds_kept, self._bounds_kept + count)
            self._bounds[place] = np.frombuffer(os.pread(descriptor, count * OFFSETS.itemsize, begin), OFFSETS)
            self._bounds_at[first_block + block] = place.start
            self._bounds_kept = place.stop

    def _damaged(self, number: int, problem: str) -> XdscaleError:
        path = self.folder / self._shards[number].file
        return XdscaleError(f"{path}: {problem}; copy the shard again ('xdscale shards verify' finds all such shards)")

    def _unreadable(self, number: int, error: OSError) -> XdscaleError:
        return XdscaleError(f"{self.folder / self._shards[number].file}: cannot be read: {error.strerror or error}")


def _close(descriptors: np.ndarray, which: np.ndarray | slice) -> None:
    for descriptor in descriptors[which].tolist():
        if descriptor != CLOSED:
            os.close(descriptor)
    descriptors[which] = CLOSED
