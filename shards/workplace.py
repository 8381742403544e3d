"""The folder of a dataset while a table is built in it: what it may already hold, the parts, the locks, the last step.

One table is built at a time. All parts of a build read the whole input, which is cheap, and so agree on the units and
their numbers; part i of n builds the units i, i + n, i + 2n and so on. A part's shards have their final names.
"""

import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationError

from xdscale.errors import XdscaleError
from xdscale.files import DISKS_OWN, lock, replaced_when_complete, require_real_file
from xdscale.shards.manifest import (
    MANIFEST_NAME,
    PART_FILES,
    WORK_FOLDER,
    Column,
    Manifest,
    ManifestSection,
    TableManifest,
    shard_prefix,
)
from xdscale.shards.units import UnitRecord, identity
from xdscale.shards.verify import verify_shards

if TYPE_CHECKING:
    from xdscale.shards.build import Source

LOCK_NAME = "lock"

_PLANS = "plan*.json"
_ELSEWHERE = "choose another folder, or build beside it with --overwrite, which leaves foreign files as they are"
_REPLACE = "choose another folder, or replace this table alone with --overwrite"


@dataclass(frozen=True)
class Part:
    """Part `index` of `of`, counted from 0."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "i/n".

        Raises:
            XdscaleError: anything else, or not 0 <= i < n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise XdscaleError(f"part {text!r}: expected i/n with i from 0 to n - 1, for example 0/8 to 7/8")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """As it stands in names of files."""
        return f"{self.index:05d}-of-{self.of:05d}"

    def has(self, unit_number: int) -> bool:
        """Tells whether a unit belongs to this part."""
        return unit_number % self.of == self.index


WHOLE = Part(0, 1)


class PartManifest(ManifestSection):
    """What a finished part gave: the records of its units, in order; `units` counts those of all parts."""

    index: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(gt=0)]
    units: Annotated[int, Field(ge=0)]
    table: str
    build: dict[str, Any]
    columns: list[Column]
    splits: list[str]
    records: list[UnitRecord]

    @property
    def plan(self) -> dict[str, Any]:
        """What all parts of one table must have in common."""
        return _plan(self.table, self.build, self.of)

    def numbered(self) -> list[tuple[int, UnitRecord]]:
        """Returns the records with the numbers of their units.

        Raises:
            ValueError: there are not as many as this part has units.
        """
        numbers = range(self.index, self.units, self.of)
        return list(zip(numbers, self.records, strict=True))

    def write(self, out: Path) -> None:
        """Writes the part's file into the folder of the dataset.

        Raises:
            OSError: it cannot be written.
        """
        with replaced_when_complete(out / f"part-{Part(self.index, self.of).name}.json") as stream:
            stream.write(self.model_dump_json(indent=2).encode("utf-8") + b"\n")


def read_part_files(out: Path) -> list[PartManifest]:
    """Returns what the part files in a folder say, by index.

    Raises:
        XdscaleError: a file is damaged.
    """
    return sorted((_read_part(path) for path in out.glob(PART_FILES)), key=lambda manifest: manifest.index)


def require_all_parts(out: Path, parts: list[PartManifest]) -> None:
    """Checks that these are all parts of one build.

    Raises:
        XdscaleError: no parts, some missing (named), or of different builds.
    """
    if not parts:
        raise XdscaleError(f"{out}: holds no finished part; make them with 'xdscale shards build ... --part i/n'")
    first = parts[0]
    for other in parts[1:]:
        if (other.units, other.plan) != (first.units, first.plan):
            raise XdscaleError(
                f"{out}: part {other.index}/{other.of} is of another build than part {first.index}/{first.of} "
                "(other inputs, options or number of parts); build it again like the others"
            )
    missing = sorted(set(range(first.of)) - {manifest.index for manifest in parts})
    if missing:
        names = ", ".join(f"{index}/{first.of}" for index in missing)
        raise XdscaleError(f"{out}: parts that are missing or not finished: {names}; build them, then merge again")


def existing_table(out: Path, source: "Source", part: Part) -> TableManifest | None:
    """Returns the finished table in `out` if it is the one to be built, the dataset verified.

    Returns None if the folder is free, or holds other finished tables, or unfinished work of the same build in as many
    parts.

    Raises:
        XdscaleError: the folder holds something else (named), or damaged shards (named).
    """
    if out.exists() and not out.is_dir():
        raise XdscaleError(f"{out}: is a file; choose a folder for the shards")
    if out.is_symlink() and not out.exists():
        raise XdscaleError(
            f"{out}: is a link to {out.readlink()}, which is not there; make that folder, or remove the link"
        )
    tables = Manifest.load(out).tables if (out / MANIFEST_NAME).exists() else {}
    if source.table in tables:
        found = tables[source.table]
        _require_same(f"{out}: holds a dataset", identity(found.build), identity(source.build))
        verify_shards(out)
        tidy(out)
        return found
    plans = _plans(out)
    for plan in plans:
        _require_same(f"{out}: holds an unfinished build", plan, _plan(source.table, source.build, part.of))
    if plans or tables:
        return None
    others = sorted(path.name for path in out.glob("*") if path.name not in (WORK_FOLDER, DISKS_OWN))
    if others:
        raise XdscaleError(f"{out}: holds {others[0]} and is not a dataset of xdscale; {_ELSEWHERE}")
    return None


@contextmanager
def workplace(out: Path, source: "Source", part: Part, *, overwrite: bool) -> Iterator[None]:
    """Makes `out` ready and keeps other builds out of it meanwhile; other parts of the same build may work there.

    Args:
        out: the folder of the dataset.
        source: of what is being built; written down, so that a later start knows whose work it finds.
        part: which part of it.
        overwrite: remove what an earlier build of this table left. Files that no build writes are never touched.

    Raises:
        XdscaleError: another process is building here, or rows of another table link to the table to be replaced.
        OSError: the folder cannot be written.
    """
    left = _without(out, source.table) if overwrite else None
    work = out / WORK_FOLDER
    made = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        locks.enter_context(locked(work / LOCK_NAME, shared=part.of > 1))
        if part.of > 1:
            locks.enter_context(locked(work / f"{LOCK_NAME}-{part.name}"))
        if overwrite:
            for record in work.glob("unit-*.json"):
                record.unlink()
        plan = json.dumps(_plan(source.table, source.build, part.of), indent=2, sort_keys=True)
        # Parts write files of their own: two processes must never write one.
        with replaced_when_complete(work / f"plan-{part.name}.json") as stream:
            stream.write(plan.encode("utf-8"))
        if overwrite:
            if left is None:
                (out / MANIFEST_NAME).unlink(missing_ok=True)
            else:
                _write_manifest(out, left)
            _remove_shards(out, source.table, source.splits, keep=set())
        try:
            yield
        except XdscaleError:
            if part.of == 1 and not _shards(out, source.table, source.splits):
                _remove_work(out)  # nothing is finished: what was wrong with the input must not bind the folder to it
                if made:
                    out.rmdir()
            raise


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds a lock while the block runs; `shared` locks exclude only those that are not.

    Where the file system has no locks, a warning says so, and the block runs without.

    Raises:
        XdscaleError: another process holds it.
    """
    folder = path.parent.parent
    with path.open("w") as file:
        try:
            no_locks = lock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise XdscaleError(f"{folder}: another process is building here; wait or end it") from None
        if no_locks and not shared:
            print(
                f"warning: {folder}: its file system has no locks ({no_locks}): nothing keeps a second build out of "
                "this folder, so start none",
                file=sys.stderr,
            )
        yield


@contextmanager
def locked_for_merge(out: Path) -> Iterator[None]:
    """Keeps builds out of a folder while its parts are merged; errors as `locked`."""
    (out / WORK_FOLDER).mkdir(exist_ok=True)  # copied parts may come without it
    with locked(out / WORK_FOLDER / LOCK_NAME):
        yield


def publish(out: Path, name: str, table: TableManifest) -> None:
    """Makes a finished build a table of the dataset: `dataset.json` names it last, then the traces of the work go.

    Raises:
        XdscaleError: it does not fit the tables that are there.
        OSError: the folder cannot be written.
    """
    tables = Manifest.load(out).tables if (out / MANIFEST_NAME).exists() else {}
    try:
        manifest = Manifest(tables=tables | {name: table})
    except ValidationError as error:
        raise XdscaleError(f"{out}: {error.errors()[0]['msg']}; build the table again with --overwrite") from None
    _remove_shards(out, name, table.splits, keep={shard.file for shard in table.shards})
    _write_manifest(out, manifest)
    _remove_work(out)


def tidy(out: Path) -> None:
    """Removes what a build that was killed after its last step left beside its table, unless one is at work."""
    try:
        finished = Manifest.load(out).tables
        if any(plan.get("table") not in finished for plan in _plans(out)):
            return  # it goes on when it is started again
        with locked(out / WORK_FOLDER / LOCK_NAME):
            _remove_work(out)
    except (OSError, XdscaleError):
        return  # nothing there, or a dataset that may only be read


def _write_manifest(out: Path, manifest: Manifest) -> None:
    with replaced_when_complete(out / MANIFEST_NAME) as stream:
        stream.write(manifest.to_json().encode("utf-8"))


def _without(out: Path, name: str) -> Manifest | None:
    """Returns the dataset without a table, or None if nothing is left; whatever cannot be read is to be replaced."""
    try:
        tables = Manifest.load(out).tables
    except XdscaleError:
        return None
    for other, table in tables.items():
        if other != name and any(column.rows_of == name for column in table.columns):
            raise XdscaleError(f"{out}: rows of {other} link to rows of {name}: build both in another folder")
    others = {other: table for other, table in tables.items() if other != name}
    return Manifest(tables=others) if others else None


def _remove_work(out: Path) -> None:
    for path in sorted(out.glob(PART_FILES)):
        path.unlink()
    shutil.rmtree(out / WORK_FOLDER)


def _shards(out: Path, table: str, splits: Iterable[str]) -> list[Path]:
    """Returns the shards of a table, whole ones and others."""
    prefixes = "|".join(shard_prefix(table, split) for split in splits)
    ours = re.compile(rf"({prefixes})-[0-9]{{6,}}\.tar|\.({prefixes})-[0-9]{{6,}}\.tar\.partial")
    return [path for path in out.iterdir() if ours.fullmatch(path.name)]


def _remove_shards(out: Path, table: str, splits: Iterable[str], keep: set[str]) -> None:
    for path in _shards(out, table, splits):
        if path.name not in keep:
            path.unlink()


def _plan(table: str, build: dict[str, Any], parts: int) -> dict[str, Any]:
    """Returns what all parts of one table must have in common."""
    return identity(build) | {"table": table, "parts": parts}


def _plans(out: Path) -> list[dict[str, Any]]:
    """Returns those of the unfinished builds in a folder, also of parts that were copied here without theirs."""
    plans = []
    for path in sorted((out / WORK_FOLDER).glob(_PLANS)):
        require_real_file(path)
        try:
            plan = json.loads(path.read_bytes())
        except (OSError, ValueError):
            plan = None
        plans.append(plan if isinstance(plan, dict) else {})
    return plans + [part.plan for part in read_part_files(out)]


def _read_part(path: Path) -> PartManifest:
    require_real_file(path)
    try:
        manifest = PartManifest.model_validate_json(path.read_bytes())
        manifest.numbered()
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise XdscaleError(f"{path}: cannot be read ({reason}); remove it and build this part again") from None
    return manifest


def _require_same(what: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(there.keys() | wanted.keys(), key=lambda key: (key != "table", key)):
        old, new = there.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict | list) or isinstance(new, dict | list):
            difference = f"another {key.replace('_', ' ').removesuffix('s')}"
            raise XdscaleError(f"{what} of {difference}; {_REPLACE}")
        raise XdscaleError(f"{what} with {key} {old!r}, now {new!r}; {_REPLACE}")
