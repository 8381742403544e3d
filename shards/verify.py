"""Checking that a folder holds exactly the shards its manifest names."""

from collections.abc import Callable
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import count_of, file_sha256
from xdscale.shards.manifest import MANIFEST_NAME, PART_FILES, WORK_FOLDER, Manifest, ShardRecord


def verify_shards(folder: Path, *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Reads all shards of all tables whole and compares sizes and SHA-256 with the manifest.

    Args:
        folder: written by `xdscale shards build`.
        on_progress: called after each shard with (bytes checked, bytes of all).

    Raises:
        XdscaleError: names every shard that is missing, truncated, altered or extra, with expected and found.
    """
    folder = Path(folder)
    every = Manifest.load(folder).shards
    problems = list(damaged_shards(folder, every, every, on_progress=on_progress).values())
    known = {record.file for record in every}
    # While another table is built there, its shards have no table yet.
    unfinished = (folder / WORK_FOLDER).is_dir() or any(folder.glob(PART_FILES))
    extra = [] if unfinished else sorted(path for path in folder.glob("*.tar") if path.name not in known)
    problems += [f"{path}: extra: not named in {MANIFEST_NAME}; remove it" for path in extra]
    if problems:
        hint = "copy the named files again, or build the dataset again with --overwrite, or in another folder"
        raise XdscaleError("\n".join([f"{folder}: {count_of(len(problems), 'problem')} found; {hint}", *problems]))


def damaged_shards(
    folder: Path,
    chosen: list[ShardRecord],
    every: list[ShardRecord],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Reads shards whole and returns what is wrong with each that is missing, truncated or altered, by file name.

    Args:
        folder: where the shards lie.
        chosen: the shards to read.
        every: all shards of the dataset, so that one with the content of another can be told.
        on_progress: called after each shard with (bytes checked, bytes of the chosen).
    """
    names = {record.sha256: record.file for record in every}
    problems = {}
    done, total = 0, sum(record.bytes for record in chosen)
    for record in chosen:
        problem = _problem(folder / record.file, record, names)
        if problem is not None:
            problems[record.file] = problem
        done += record.bytes
        if on_progress is not None:
            on_progress(done, total)
    return problems


def _problem(path: Path, record: ShardRecord, names: dict[str, str]) -> str | None:
    """Returns what is wrong with a shard, or None. Its size is looked at first: that costs no reading.

    Args:
        path: where it should be.
        record: what it should be.
        names: shards by SHA-256, to recognise one under another's name.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            kind = "truncated" if size < record.bytes else "altered"
            return f"{path}: {kind}: expected {record.bytes} bytes, found {size}"
        found = file_sha256(path)
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    if found == record.sha256:
        return None
    whose = f" (the content of {names[found]})" if found in names else ""
    return f"{path}: altered: expected sha256 {record.sha256}, found {found}{whose}"
