"""Global batches counted in tokens: as many samples as a budget holds, in the order of `xdscale.data.order`.

Each step has a fixed stretch of the tokens of the shuffled samples, epoch after epoch, and takes the samples that begin
in it. An epoch has the same number of tokens whatever its order, so the stretch of any step is known at once, and no
batch depends on the one before. The stretch is shorter than the budget by what the longest sample may reach beyond it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from xdscale.data.order import WINDOW, Position, check_size, window
from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.recipe import Recipe
from xdscale.systems.contract import Place, Slots


class TokenSplit(NamedTuple):
    """How the tokens of one optimizer step are split.

    Attributes:
        batch_tokens: most tokens over all ranks.
        ranks: their number.
        micro_tokens: most tokens of one pass of a rank.
        stretch: tokens in which the samples of a step begin; the mean of a step's tokens.
        accumulation: passes of each rank (gradient accumulation steps).
    """

    batch_tokens: int
    ranks: int
    micro_tokens: int
    stretch: int
    accumulation: int

    @property
    def padding(self) -> float:
        """Share of what ranks compute that is padding: none."""
        return 0.0

    def __str__(self) -> str:
        ranks = count_of(self.ranks, "rank")
        passes = f"{self.accumulation} micro-batch{'es' * (self.accumulation > 1)} of at most {self.micro_tokens}"
        return f"a step of at most {self.batch_tokens} tokens, {self.stretch} on average: {ranks} × {passes}"


def split_tokens(batch_tokens: int, longest: int, ranks: int, micro_tokens: int) -> TokenSplit:
    """Splits a budget of tokens in as few passes as each rank's own budget allows.

    Args:
        batch_tokens: most tokens of one optimizer step, over all ranks.
        longest: tokens of the longest sample.
        ranks: their number.
        micro_tokens: most tokens of one pass of a rank.

    Raises:
        XdscaleError: a budget is too small for the longest sample, or for one sample on each rank.
    """
    stretch = batch_tokens - longest + 1
    if stretch < ranks * longest:
        raise XdscaleError(
            f"training.batch_tokens = {batch_tokens}: the longest sample has {longest} tokens, so "
            f"{count_of(ranks, 'rank')} need at least {(ranks + 1) * longest - 1} to have a sample each in every step"
        )
    if micro_tokens < longest:
        raise XdscaleError(
            f"train_micro_batch_size_per_gpu = {micro_tokens} tokens: the longest sample has {longest}; allow as many"
        )
    accumulation = math.ceil(stretch / (ranks * (micro_tokens - longest + 1)))
    return TokenSplit(batch_tokens, ranks, micro_tokens, stretch, accumulation)


class TokenOrder:
    """The order of the training samples, as one rank sees it, in batches of a fixed budget of tokens.

    Attributes:
        split: of each step.
    """

    def __init__(
        self, lengths: np.ndarray, *, seed: int, batch_tokens: int, world_size: int, rank: int, micro_tokens: int
    ) -> None:
        """Sets the order up.

        Args:
            lengths: tokens of each sample, integers [n], each at least 1.
            seed: of the shuffle, below 2**32.
            batch_tokens: most tokens of a step over all ranks.
            world_size: number of ranks.
            rank: this one.
            micro_tokens: most tokens per forward of one rank.

        Raises:
            XdscaleError: a budget is too small, or there are no samples or more than 2**32.
        """
        check_size(len(lengths))
        self.seed = seed
        self._lengths = lengths
        self._epoch_tokens = int(lengths.sum(dtype=np.int64))
        self.split = split_tokens(batch_tokens, int(lengths.max()), world_size, micro_tokens)
        self._stretch = self.split.stretch
        self._part_count = world_size * self.split.accumulation
        self._parts = range(rank, self._part_count, world_size)
        self._windows: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, recipe: Recipe, place: Place, lengths: np.ndarray) -> Self:
        """Returns a recipe's order as one rank of a run sees it; `lengths` and errors as the constructor."""
        training, ranks = recipe.training, place.ranks
        split = {"world_size": ranks.world_size, "rank": ranks.rank, "micro_tokens": place.micro_batch}
        return cls(lengths, seed=training.seed, batch_tokens=training.batch_tokens, **split)

    def position(self, step: int) -> Position:
        """Returns the position before `step` (steps count from 0)."""
        epoch, index, _, _ = next(self._begin_at(step * self._stretch))
        return Position(epoch, int(index[0]))

    def global_batch_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epochs, sample ids), each int64: what all ranks together see in `step`."""
        epochs, sample_ids, _ = self._batch(step)
        return epochs, sample_ids

    def slots(self, step: int) -> list[Slots]:
        """Returns this rank's micro-batches of `step`.

        The batch is cut at equal numbers of tokens into parts, which go to rank after rank, round after round. No part
        is empty where there are as many samples as parts; an empty one repeats a sample that does not count.
        """
        epochs, sample_ids, begins = self._batch(step)
        bounds = _bounds(begins - step * self._stretch, self._stretch, self._part_count)
        found = []
        for part in self._parts:
            first, last = bounds[part : part + 2]
            places = np.arange(first, last) if last > first else np.zeros(1, np.int64)
            found.append(Slots(epochs[places], sample_ids[places], np.full(len(places), last > first)))
        return found

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (epochs, sample ids, tokens before each sample since the run's start) of a global batch."""
        end = (step + 1) * self._stretch
        parts = []
        for epoch, _, sample_ids, begins in self._begin_at(step * self._stretch):
            inside = begins < end
            parts.append((np.full(inside.sum(), epoch), sample_ids[inside], begins[inside]))
            if not inside.all():
                break
        return tuple(np.concatenate(arrays) for arrays in zip(*parts))

    def _begin_at(self, token: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (epoch, indices in its order, sample ids, tokens before each), of samples from a token on, by window.

        Window after window without an end; those in which no sample begins any more are left out.
        """
        size = len(self._lengths)
        epoch, within = divmod(token, self._epoch_tokens)
        number = int(np.searchsorted(self._window_begins(epoch), within, side="right")) - 1
        while True:
            sample_ids = window(size, self.seed, epoch, 0, number)
            lengths = self._lengths[sample_ids].astype(np.int64)
            begins = epoch * self._epoch_tokens + self._window_begins(epoch)[number] + np.cumsum(lengths) - lengths
            here = np.flatnonzero(begins >= token)
            if len(here):
                yield epoch, number * WINDOW + here, sample_ids[here], begins[here]
            number += 1
            if number * WINDOW >= size:
                epoch, number = epoch + 1, 0

    def _window_begins(self, epoch: int) -> np.ndarray:
        """Returns how many tokens of an epoch come before each of its windows; made once per epoch, in one pass."""
        if epoch not in self._windows:
            size = len(self._lengths)
            windows = range(math.ceil(size / WINDOW))
            tokens = [
                self._lengths[window(size, self.seed, epoch, 0, number)].sum(dtype=np.int64) for number in windows
            ]
            # Two epochs are in use at a border; a new dictionary, since the thread that prepares data reads it too.
            kept = {old: begins for old, begins in self._windows.items() if old in (epoch - 1, epoch + 1)}
            self._windows = kept | {epoch: np.cumsum([0, *tokens[:-1]])}
        return self._windows[epoch]


def _bounds(begins: np.ndarray, stretch: int, parts: int) -> np.ndarray:
    """Returns the place of the first sample of each part, and the number of samples; [parts + 1].

    A part has the samples that begin in its share of the stretch. One that would be empty takes the next sample from
    its neighbour, so no part has more tokens than its share and the longest sample, less one.
    """
    count, part = len(begins), np.arange(parts + 1)
    bounds = np.searchsorted(begins, -(-part * stretch // parts))
    bounds = np.maximum.accumulate(bounds - part) + part  # at least one sample more in each
    return np.minimum(np.minimum(bounds, np.maximum(count - parts, 0) + part), count)
