"""Building a table from a source, on one machine or in parts on several: stopped and resumed, with the same bytes.

A dataset grows table by table: a table is built in a folder of its own or beside those that are there, and may link to
their rows. `dataset.json` names it when all of it is there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import MANIFEST_NAME, Column, Counts, Manifest, Split, TableManifest, add_counts
from xdscale.shards.shard import Arrays
from xdscale.shards.units import Unit, UnitRecord, run_units
from xdscale.shards.verify import damaged_shards, verify_shards
from xdscale.shards.workplace import (
    WHOLE,
    Part,
    PartManifest,
    existing_table,
    locked_for_merge,
    publish,
    read_part_files,
    require_all_parts,
    tidy,
    workplace,
)


class Write(Protocol):
    """Takes rows of a split, any number at once, and what the source counts in them."""

    def __call__(self, split: str, arrays: Arrays, **counts: int | list[int]) -> None:
        """Appends them; as `ShardWriter.add`."""


class Source(Protocol):
    """What a table is made of. A pickled copy goes to each worker process.

    Attributes:
        table: its name.
        columns: its columns.
        splits: names of the splits that it may write to; `manifest.ALL` if it has no splits.
        build: as JSON, all that decides the bytes, with `source`, the name of the kind of source. Values under the key
            "name" say where things came from and decide nothing.
        total_bytes: of all inputs.
    """

    table: str
    columns: Sequence[Column]
    splits: Sequence[str]
    build: dict[str, Any]
    total_bytes: int

    def units(self, threads: int) -> Iterator[tuple[Any, int]]:
        """Yields units of work, picklable, and the bytes of all inputs read so far. Cheap: one process does it.

        A unit becomes at most one shard for each split; units depend on the inputs alone.
        """

    def digest(self, work: Any) -> bytes:
        """Returns a hash of what goes into a unit beside `build`."""

    def rows(self, work: Any, write: Write) -> Counts:
        """Makes the rows of a unit, a few at a time where they are large, and returns what was counted on the way.

        Raises:
            XdscaleError: an input is bad; names it.
        """

    def if_empty(self, counts: Counts) -> str:
        """Returns why there are no rows, and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far a build is; `kept_shards` were found whole from an earlier run."""

    counts: Counts
    bytes_read: int
    bytes_total: int
    rows: int
    kept_shards: int


def build_table(
    source: Source,
    out: Path,
    *,
    workers: int = 1,
    part: Part = WHOLE,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TableManifest:
    """Builds a table, or one part of it, in `out` and returns what the manifest says, or of the part would say.

    A build that was stopped at any point goes on when it is called again with the same source. If `out` already holds
    the finished table, the dataset is verified and the table returned. Parts become a table by `merge_parts`.

    Args:
        source: what the table is made of.
        out: folder of the dataset; made if it does not exist.
        workers: processes; a script that asks for more than 1 needs the `if __name__ == "__main__":` guard.
        part: the part to build; all parts may build in one folder at once, on different machines too.
        overwrite: replace what another build of this table left in `out`; not for parts, which would remove each
            other's shards.
        on_progress: called after each unit.

    Raises:
        XdscaleError: a bad input, another dataset in `out`, a table to link to that is not there, no rows, or the disk
            is full. Finished shards are kept.
    """
    out = Path(out)
    if workers < 1:
        raise XdscaleError(f"workers = {workers}: at least 1 process is needed")
    if overwrite and part.of > 1:
        raise XdscaleError(f"{out}: --overwrite with --part would remove the other parts; remove the folder first")
    report = on_progress or (lambda progress: None)
    try:
        found = None if overwrite else existing_table(out, source, part)
        if found is not None:
            rows = sum(split.rows for split in found.splits.values())
            report(Progress(found.counts, source.total_bytes, source.total_bytes, rows, len(found.shards)))
            return found
        with workplace(out, source, part, overwrite=overwrite):
            return _build(source, out, workers, part, report)
    except OSError as error:
        raise XdscaleError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None


def _build(source: Source, out: Path, workers: int, part: Part, report: Callable[[Progress], None]) -> TableManifest:
    units, records = _run(source, out, workers, part, report)
    manifest = PartManifest(
        index=part.index,
        of=part.of,
        units=units,
        table=source.table,
        build=source.build,
        columns=list(source.columns),
        splits=list(source.splits),
        records=records,
    )
    table = assemble(manifest, records)
    if part.of > 1:
        manifest.write(out)
    elif not table.shards:
        raise XdscaleError(source.if_empty(table.counts))
    else:
        publish(out, source.table, table)
    return table


def _run(
    source: Source, out: Path, workers: int, part: Part, report: Callable[[Progress], None]
) -> tuple[int, list[UnitRecord]]:
    """Builds the part's units; returns how many all parts have, and the records of this one's in order."""
    records: list[UnitRecord] = []
    counts: Counts = {}
    units, rows, kept_shards = 0, 0, 0

    def of_this_part() -> Iterator[Unit]:
        nonlocal units
        for work, bytes_read in source.units(workers):
            if part.has(units):
                yield Unit(units, work, bytes_read)
            units += 1

    with closing(run_units(of_this_part(), out, source, workers)) as results:
        for unit, record, kept in results:
            records.append(record)
            counts = add_counts([counts, record.counts])
            rows += sum(split.shard.rows for split in record.splits.values())
            kept_shards += len(record.splits) if kept else 0
            report(Progress(counts, unit.bytes_read, source.total_bytes, rows, kept_shards))
    return units, records


def assemble(build: PartManifest, records: list[UnitRecord]) -> TableManifest:
    """Returns the table that these units make, in their order."""
    splits = {}
    for name in build.splits:
        parts = [record.splits[name] for record in records if name in record.splits]
        splits[name] = Split.of([part.shard for part in parts], add_counts(part.counts for part in parts))
    counts = add_counts(record.counts for record in records)
    return TableManifest(build=build.build, counts=counts, columns=build.columns, splits=splits)


def merge_parts(out: Path, *, on_progress: Callable[[int, int], None] | None = None) -> TableManifest:
    """Makes a table of the parts in `out`: the same bytes as if one machine had built it.

    Shards are verified first. Killed at any point, it can be called again.

    Args:
        out: the folder in which all parts were built, or into which they were copied.
        on_progress: called after each shard with (bytes verified, bytes of all).

    Returns:
        The table; where nothing was left to merge, the first one of the dataset.

    Raises:
        XdscaleError: parts are missing, of different builds or being built, shards are damaged (named with their
            part), there is no row in all parts, or the folder cannot be written.
    """
    out = Path(out)
    try:
        parts = read_part_files(out)
        merged = Manifest.load(out).tables if (out / MANIFEST_NAME).exists() else {}
        if merged and (not parts or parts[0].table in merged):
            verify_shards(out, on_progress=on_progress)
            tidy(out)
            return merged[parts[0].table] if parts else next(iter(merged.values()))
        require_all_parts(out, parts)
        with locked_for_merge(out):
            _verify(out, parts, on_progress)
            units = sorted((numbered for part in parts for numbered in part.numbered()), key=lambda unit: unit[0])
            table = assemble(parts[0], [record for _, record in units])
            if not table.shards:
                counts = ", ".join(f"{name} {count}" for name, count in table.counts.items() if count)
                raise XdscaleError(f"{out}: the parts hold no rows ({counts}); use more input or other options")
            publish(out, parts[0].table, table)
    except OSError as error:
        raise XdscaleError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    return table


def _verify(out: Path, parts: list[PartManifest], on_progress: Callable[[int, int], None] | None) -> None:
    found = [(part, split.shard) for part in parts for record in part.records for split in record.splits.values()]
    shards = [shard for _, shard in found]
    problems = damaged_shards(out, shards, shards, on_progress=on_progress)
    if problems:
        again = dict.fromkeys(f"{part.index}/{part.of}" for part, shard in found if shard.file in problems)
        hint = f"{out}: damaged shards; build or copy again the parts {', '.join(again)}"
        raise XdscaleError("\n".join([hint, *problems.values()]))
