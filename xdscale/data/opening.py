"""Before the first step: where the shards lie, and which of them are damaged, the same on every rank."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from xdscale import recipe
from xdscale.errors import XdscaleError
from xdscale.names import is_url, shards_folder
from xdscale.shards.cache import ShardCache
from xdscale.shards.manifest import Manifest, ShardRecord
from xdscale.shards.remote import fetch_manifest, fetch_shards, place_manifest
from xdscale.shards.table import Table
from xdscale.shards.verify import damaged_shards

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


def open_shards(
    section: recipe.Data, ranks: Any, *, check: Callable[[Path], None], on_shard: Callable[[], None] | None = None
) -> Shards:
    """Finds, fetches and verifies the shards; every rank calls it and does a share.

    With `data.cache_bytes` shards from a URL are fetched later, when they are needed.

    Args:
        section: of the recipe.
        ranks: this process among the others: `rank`, `world_size`, `local_rank`, `is_first`, `gather`, `raise_first`.
        check: called with the folder when its manifest is there, before any shard is read; may refuse it.
        on_shard: called after each shard of this rank's share.

    Returns:
        Where they are, with at most `data.max_damaged_shards` damaged.

    Raises:
        XdscaleError: no dataset, one that `check` refuses, or more damaged shards than allowed; names them.
    """
    remote = is_url(section.shards)
    folder = _fetch_manifest(section, ranks) if remote else shards_folder(section.shards)
    check(folder)
    every = Manifest.load(folder).shards
    problem, mine, cache = None, {}, None
    progress = _Lines("fetching and verifying" if remote else "verifying", ranks.is_first, on_shard)
    try:
        if remote:
            # Every node has a cache of its own, so its ranks alone share the work.
            here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
            part = every[ranks.local_rank % here :: here]
            if section.cache_bytes is None:
                mine = fetch_shards(section.shards, folder, part, verify=section.verify, on_progress=progress)
            else:
                cache = ShardCache(section.shards, folder, every, budget=section.cache_bytes, sharers=here)
                mine = cache.damaged(part, verify=section.verify, on_progress=progress)
        elif section.verify:
            part = every[ranks.rank :: ranks.world_size]
            mine = damaged_shards(folder, part, every, on_progress=progress)
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "data.shards")
    damaged = {file: text for part in ranks.gather(mine) for file, text in sorted(part.items())}
    _check_budget(section, damaged, every)
    return Shards(folder, damaged, cache)


def _fetch_manifest(section: recipe.Data, ranks: Any) -> Path:
    """Returns this node's folder for the dataset; the first rank fetches the manifest for all."""
    text, problem, folder = None, None, Path()
    try:
        text = fetch_manifest(section.shards) if ranks.is_first else None
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "data.shards")
    text = ranks.gather(text)[0]
    try:
        folder = place_manifest(text, Path(section.cache))
    except XdscaleError as error:
        problem = str(error)
    ranks.raise_first(problem, "data.cache")
    return folder


def _check_budget(section: recipe.Data, damaged: dict[str, str], every: list[ShardRecord]) -> None:
    if len(damaged) > section.max_damaged_shards:
        raise XdscaleError(
            "\n".join(
                [
                    f"data.shards = {section.shards}: {len(damaged)} of {len(every)} shards damaged; copy them again, "
                    f"or train without them: data.max_damaged_shards={len(damaged)} or more, "
                    f"now {section.max_damaged_shards}",
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
