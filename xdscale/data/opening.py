"""Before the first step: where the shards lie, and which of them are damaged, the same on every rank."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xdscale.data.held_out import held_out_batches
from xdscale.data.order import Order, validation_slots
from xdscale.data.token_order import TokenOrder
from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.names import is_url, shards_folder
from xdscale.recipe import Recipe, Run
from xdscale.shards.cache import ShardCache
from xdscale.shards.manifest import Manifest, ShardRecord
from xdscale.shards.remote import fetch_manifest, fetch_shards, place_manifest
from xdscale.shards.table import Table
from xdscale.shards.verify import damaged_shards
from xdscale.systems.contract import Collator, Data, Place

SECONDS_BETWEEN_LINES = 15.0


class Shards(NamedTuple):
    """Where a dataset's shards are.

    Attributes:
        folder: on this node.
        damaged: what is wrong with each damaged shard, by file name.
        cache: fetches those that are not in the folder; None if all are.
    """

    folder: Path
    damaged: dict[str, str]
    cache: ShardCache | None

    def table(self, split: str, name: str | None = None) -> Table:
        """Opens a split of a table, which may go unnamed where it is the only one; errors as `Table`."""
        return Table(self.folder, split, name, quarantined=self.damaged, cache=self.cache)


def open_data(
    recipe: Recipe,
    place: Place,
    table: str,
    check: Callable[[Manifest], None],
    collator: Callable[[Table], Collator],
    lengths: Callable[[Table], np.ndarray] | None = None,
) -> Data:
    """Opens the shards of a recipe, training and validation split; every rank calls it.

    Args:
        recipe: with `data.shards`.
        place: of this process.
        table: its name in the dataset.
        check: refuses a dataset that does not fit the model, before any shard is read.
        collator: made for each of the two splits.
        lengths: tokens of each row, for recipes that state `training.batch_tokens`; None if the system takes none.

    Raises:
        XdscaleError: as `open_shards`, or as the order that the recipe asks for.
    """
    ranks = place.ranks
    shards = open_shards(
        recipe.data.shards,
        recipe.run,
        ranks,
        [table],
        check=lambda folder: check(Manifest.load(folder)),
        on_shard=place.tick,
    )
    train, held_out = shards.table("train", table), shards.table("validation", table)
    micro_batch = place.micro_batch
    if recipe.training.batch_tokens is None or lengths is None:
        order = Order.of(recipe, place, len(train))
    else:
        order = TokenOrder.of(recipe, place, lengths(train))
        micro_batch = max(1, micro_batch // int(lengths(held_out).max()))
    slots = validation_slots(len(held_out), recipe.run.eval_samples, ranks.world_size, ranks.rank, micro_batch)
    validation = held_out_batches(collator(held_out), slots)
    fingerprints = train.manifest.only([table]).fingerprints
    return Data(order, collator(train), validation, fingerprints, shards.damaged, shards.cache is not None)


def open_shards(
    shards: str,
    run: Run,
    ranks: Any,
    tables: Sequence[str],
    *,
    check: Callable[[Path], None],
    on_shard: Callable[[], None] | None = None,
) -> Shards:
    """Finds, fetches and verifies the shards; every rank calls it and does a share.

    With `run.cache_bytes` shards from a URL are fetched later, when they are needed.

    Args:
        shards: folder or URL.
        run: the recipe's section: cache, verification, budget of damaged shards.
        ranks: this process among the others: `rank`, `world_size`, `local_rank`, `is_first`, `gather`, `raise_first`.
        tables: what is read; shards of these tables, and of those that they link to, are fetched and verified.
        check: called with the folder when its manifest is there, before any shard is read; may refuse it.
        on_shard: called after each shard of this rank's share, and later as bytes of shards arrive.

    Returns:
        Where they are, with at most `run.max_damaged_shards` damaged.

    Raises:
        XdscaleError: no dataset, one that `check` refuses, or more damaged shards than allowed; names them.
    """
    remote = is_url(shards)
    folder = _fetch_manifest(shards, run, ranks) if remote else shards_folder(shards)
    check(folder)
    manifest = Manifest.load(folder)
    every = manifest.only(manifest.table(name, folder)[0] for name in tables).shards
    problem, mine, cache = None, {}, None
    progress = _Lines("fetching and verifying" if remote else "verifying", ranks.is_first, on_shard)
    try:
        if remote:
            # Every node has a cache of its own, so its ranks alone share the work.
            here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
            part = every[ranks.local_rank % here :: here]
            if run.cache_bytes is None:
                mine = fetch_shards(shards, folder, part, verify=run.verify, on_progress=progress)
            else:
                tick = on_shard or (lambda: None)
                cache = ShardCache(shards, folder, every, budget=run.cache_bytes, sharers=here, on_arrival=tick)
                mine = cache.damaged(part, verify=run.verify, on_progress=progress)
        elif run.verify:
            part = every[ranks.rank :: ranks.world_size]
            mine = damaged_shards(folder, part, every, on_progress=progress)
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "data.shards")
    damaged = {file: text for part in ranks.gather(mine) for file, text in sorted(part.items())}
    _check_budget(shards, run, damaged, every)
    return Shards(folder, damaged, cache)


def verify_table(table: Table, ranks: Any, *, on_shard: Callable[[], None] | None = None) -> None:
    """Hashes the shards of a table that cannot do without one; every rank calls it and does a share.

    Args:
        table: in a folder of this machine.
        ranks: as `open_shards`.
        on_shard: called after each shard of this rank's share.

    Raises:
        XdscaleError: names every damaged shard.
    """
    every = table.manifest.only([table.name]).shards
    progress = _Lines("verifying", ranks.is_first, on_shard)
    mine = damaged_shards(table.folder, every[ranks.rank :: ranks.world_size], every, on_progress=progress)
    damaged = {file: text for part in ranks.gather(mine) for file, text in sorted(part.items())}
    if damaged:
        told = f"{table.folder}: {len(damaged)} of {count_of(len(every), 'shard')} of {table.name} damaged"
        raise XdscaleError("\n".join([f"{told}; copy them again", *damaged.values()]))


def _fetch_manifest(shards: str, run: Run, ranks: Any) -> Path:
    """Returns this node's folder for the dataset; the first rank fetches the manifest for all."""
    text, problem, folder = None, None, Path()
    try:
        text = fetch_manifest(shards) if ranks.is_first else None
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "data.shards")
    text = ranks.gather(text)[0]
    try:
        folder = place_manifest(text, Path(run.cache))
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "run.cache")
    return folder


def _check_budget(shards: str, run: Run, damaged: dict[str, str], every: list[ShardRecord]) -> None:
    if len(damaged) > run.max_damaged_shards:
        raise XdscaleError(
            "\n".join(
                [
                    f"data.shards = {shards}: {len(damaged)} of {count_of(len(every), 'shard')} damaged; copy them "
                    f"again, or train without them: run.max_damaged_shards={len(damaged)} or more, "
                    f"now {run.max_damaged_shards}",
                    *damaged.values(),
                ]
            )
        )


class _Lines:
    """Says now and then on stderr how far a long work is; the first rank only."""

    def __init__(self, what: str, speaks: bool, on_shard: Callable[[], None] | None) -> None:
        self._what, self._speaks, self._on_shard, self._last = what, speaks, on_shard, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._on_shard is not None:
            self._on_shard()
        if self._speaks and time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._what} shards: {done / max(1, total):.0%} of this rank's share", file=sys.stderr, flush=True)
