"""Which samples make a global batch: a pure function of (seed, step), the same at any world size.

The consumed samples, counted over all epochs, are the only position there is: step * global_batch. Any rank
finds its part of any step at once, so that continuing a run, also at another world size, needs nothing but
the step. With several tables every global batch has a fixed number of samples of each, and each table has epochs of
its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from xdscale.data.hashing import MAX_EPOCH, MAX_SAMPLES
from xdscale.data.permutation import permute
from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe
from xdscale.systems.contract import Place, Slots

VALIDATION_EPOCH = MAX_EPOCH
"""Epoch number of every validation draw: no training epoch has it and the masks of a sample never change."""

WINDOW = 8192
"""Positions permuted at once: a small batch alone would spend its time in calls, not in numbers."""


@dataclass(frozen=True)
class Position:
    """Where the order stands: the epoch and the index of the next sample within it."""

    epoch: int
    index: int


class Order:
    """The order of the training samples, as one rank sees it."""

    def __init__(
        self,
        *sizes: int,
        shares: Sequence[int] = (1,),
        seed: int,
        global_batch: int,
        world_size: int,
        rank: int,
        micro_batch: int,
    ) -> None:
        """Sets the order up; nothing is read or shuffled.

        Args:
            sizes: samples per epoch of each table. Sample ids count through: those of the second table begin where
                those of the first one end.
            shares: of each table in every global batch, in proportion: (1, 1) for equal numbers of samples. Tables
                alternate within the batch, so that every micro-batch has its share too, give or take a sample.
            seed: of the shuffle, below 2**32.
            global_batch: samples per step over all ranks.
            world_size: number of ranks.
            rank: this one.
            micro_batch: samples per forward of one rank.

        Raises:
            XdscaleError: a table is empty, all of them hold more than 2**32 samples, or the shares do not divide the
                global batch.
        """
        check_size(min(sizes))
        check_size(sum(sizes))
        if global_batch % sum(shares):
            raise XdscaleError(
                f"training.global_batch = {global_batch} cannot be shared {' : '.join(map(str, shares))} among tables; "
                f"choose a multiple of {sum(shares)}"
            )
        self.sizes = sizes
        self.seed = seed
        self.global_batch = global_batch
        self._counts = [share * global_batch // sum(shares) for share in shares]
        self._starts = np.cumsum([0, *sizes[:-1]])
        # The k-th of a table's n samples stands at (k + 1/2) / n of the batch.
        within = np.concatenate([np.arange(count) for count in self._counts])
        tables = np.repeat(np.arange(len(sizes)), self._counts)
        places = np.argsort((within + 0.5) / np.array(self._counts)[tables], kind="stable")
        self._tables, self._within = tables[places], within[places]
        index, self._real = _rank_slots(global_batch, world_size, rank, micro_batch)
        self._slots_by_table = self._by_table(index.reshape(-1))

    @classmethod
    def of(cls, recipe: Recipe, place: Place, *sizes: int, shares: Sequence[int] = (1,)) -> Self:
        """Returns a recipe's order as one rank of a run sees it; `sizes`, `shares` and errors as the constructor.

        Raises:
            XdscaleError: the recipe counts tokens.
        """
        training, ranks = recipe.training, place.ranks
        refuse_tokens(recipe, f"the system {recipe.system!r}")
        split = {"world_size": ranks.world_size, "rank": ranks.rank, "micro_batch": place.micro_batch}
        return cls(*sizes, shares=shares, seed=training.seed, global_batch=training.global_batch, **split)

    def position(self, step: int) -> Position:
        """Returns the position before `step` (steps count from 0), of several tables that of the first one."""
        epoch, index = divmod(step * self._counts[0], self.sizes[0])
        return Position(epoch, index)

    def global_batch_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epochs, sample ids), each int64 [global_batch]: what all ranks together see in `step`."""
        return self._locate(step, self._by_table(np.arange(self.global_batch)))

    def slots(self, step: int) -> list[Slots]:
        """Returns this rank's micro-batches of `step`.

        Round m takes the next world_size * micro_batch samples of the global batch, rank after rank. Those that are
        left for the last round are spread evenly, so that ranks differ by one sample at most; its other slots are
        padding.
        """
        epochs, sample_ids = self._locate(step, self._slots_by_table)
        shape = self._real.shape
        return [Slots(*part) for part in zip(epochs.reshape(shape), sample_ids.reshape(shape), self._real)]

    def _by_table(self, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns of each table which of these places in a global batch it fills, and with which of its samples."""
        owned = [np.flatnonzero(self._tables[places] == table) for table in range(len(self.sizes))]
        return [(here, self._within[places[here]]) for here in owned]

    def _locate(self, step: int, by_table: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epochs, sample ids) of the places in the global batch of `step` that `_by_table` sorted."""
        epochs, sample_ids = np.empty((2, sum(len(here) for here, _ in by_table)), np.int64)
        for table, (here, within) in enumerate(by_table):
            size, start = self.sizes[table], self._starts[table]
            epoch, index = divmod(step * self._counts[table], size)
            laps, index = np.divmod(index + within, size)
            epochs[here] = epoch + laps
            for lap in np.unique(laps):  # one, or two at an epoch border, unless the batch exceeds the data
                now = laps == lap
                sample_ids[here[now]] = start + permuted(index[now], size, self.seed, epoch + int(lap), table)
        return epochs, sample_ids


def validation_slots(size: int, limit: int, world_size: int, rank: int, micro_batch: int) -> list[Slots]:
    """Returns one rank's share of the validation samples 0 .. min(limit, size) - 1, in fixed order.

    All ranks together see each of them once; padding gives every rank the same number of micro-batches.

    Args:
        size: samples in the validation split.
        limit: most samples to use.
        world_size: number of ranks.
        rank: this one.
        micro_batch: samples per forward of one rank.

    Raises:
        XdscaleError: the split is empty or holds more than 2**32 samples.
    """
    check_size(size, "validation")
    index, real = _rank_slots(min(limit, size), world_size, rank, micro_batch)
    epochs = np.full(micro_batch, VALIDATION_EPOCH, np.int64)
    return [Slots(epochs, *part) for part in zip(index, real)]


def sample_hash(epochs: np.ndarray, sample_ids: np.ndarray) -> str:
    """Returns 16 hex digits that stand for a global batch: which samples, of which epochs, in which order."""
    digest = hashlib.sha256(np.stack([epochs, sample_ids]).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _rank_slots(total: int, world_size: int, rank: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (place in the batch int64, real bool), each [micro-batches, micro_batch]."""
    per_round = world_size * micro_batch
    begins = np.arange(0, total, per_round)[:, None]
    each, more = np.divmod(np.minimum(per_round, total - begins), world_size)  # the first `more` ranks have one more
    slot = np.arange(micro_batch)
    place = begins + rank * each + np.minimum(rank, more) + slot
    return place % total, slot < each + (rank < more)


def permuted(index: np.ndarray, size: int, seed: int, epoch: int, table: int = 0) -> np.ndarray:
    """Returns the sample ids at positions of an epoch of a table; `permute`, faster where calls ask for few."""
    windows, within = np.divmod(index, WINDOW)
    sample_ids = np.empty_like(index)
    for number in np.unique(windows).tolist():
        here = windows == number
        sample_ids[here] = window(size, seed, epoch, table, number)[within[here]]
    return sample_ids


@lru_cache(maxsize=16)
def window(size: int, seed: int, epoch: int, table: int, number: int) -> np.ndarray:
    """Returns the sample ids of `WINDOW` positions of an epoch's order, fewer at its end; not to be changed."""
    index = np.arange(number * WINDOW, min(size, (number + 1) * WINDOW))
    return permute(index, size, seed=seed, epoch=epoch, table=table)


def refuse_tokens(recipe: Recipe, counter: str) -> None:
    """Refuses a recipe whose steps are counted in tokens, where samples are counted.

    Raises:
        XdscaleError: names who counts samples.
    """
    if recipe.training.batch_tokens is not None:
        raise XdscaleError(
            f"training.batch_tokens = {recipe.training.batch_tokens}: {counter} counts samples; give "
            "training.batch_tokens=null training.global_batch=N, about as many samples as have these tokens"
        )


def check_size(size: int, split: str = "train") -> None:
    """Refuses a split that no order is for.

    Raises:
        XdscaleError: it is empty or holds more than 2**32 samples.
    """
    if not 1 <= size <= MAX_SAMPLES:
        hint = "build shards from more text, or from less with a longer sequence length"
        if split.startswith("validation") and size == 0:
            hint = "build the shards again with a larger --validation-fraction, or say otherwise what is held out"
        raise XdscaleError(f"the split {split} holds {size} samples; expected 1 to {MAX_SAMPLES}: {hint}")
