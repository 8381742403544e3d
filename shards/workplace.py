"""The output folder of a build: what it may already hold, the lock while it is written, the last step."""

import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import DISKS_OWN, lock, replaced_when_complete
from xdscale.shards.manifest import MANIFEST_NAME, Build, Manifest
from xdscale.shards.part import PART_FILES, Part, read_part_files
from xdscale.shards.unit import SPLITS, WORK_FOLDER
from xdscale.shards.verify import verify_shards

LOCK_NAME = "lock"

_OURS = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar|\.({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar\.partial")
_PLANS = "plan*.json"
_ELSEWHERE = "choose another folder, or replace it with --overwrite"


def existing_dataset(out: Path, build: Build, part: Part) -> Manifest | None:
    """Returns the finished dataset in `out` if it is the one to be built, verified.

    Returns None if the folder is free, or holds unfinished work of the same build in as many parts.

    Raises:
        XdscaleError: the folder holds something else (named), or damaged shards (named).
    """
    if out.exists() and not out.is_dir():
        raise XdscaleError(f"{out}: is a file; choose a folder for the shards")
    if out.is_symlink() and not out.exists():
        raise XdscaleError(
            f"{out}: is a link to {out.readlink()}, which is not there; make that folder, or remove the link"
        )
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        _require_same(f"{out}: holds a dataset", manifest.build.identity(), build.identity())
        verify_shards(out)
        tidy(out)
        return manifest
    plans = [_read_plan(path) for path in sorted((out / WORK_FOLDER).glob(_PLANS))]
    plans += [_plan(found.build, found.part) for found in read_part_files(out)]  # copied here without their plans
    for plan in plans:
        _require_same(f"{out}: holds an unfinished build", plan, _plan(build, part))
    if plans:
        return None
    others = sorted(path.name for path in out.glob("*") if path.name not in (WORK_FOLDER, DISKS_OWN))
    if others:
        raise XdscaleError(f"{out}: holds {others[0]} and is not a dataset of xdscale; {_ELSEWHERE}")
    return None


@contextmanager
def workplace(out: Path, build: Build, part: Part, *, overwrite: bool) -> Iterator[None]:
    """Makes `out` ready and keeps other builds out of it meanwhile; other parts of the same build may work there.

    Args:
        out: the folder of the dataset.
        build: what is being built; written down, so that a later start knows whose work it finds.
        part: which part of it.
        overwrite: remove what an earlier build left. Files that no build writes are never touched.

    Raises:
        XdscaleError: another process is building here.
        OSError: the folder cannot be written.
    """
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
        plan = json.dumps(_plan(build, part), indent=2, sort_keys=True)
        # Parts write files of their own: two processes must never write one.
        with replaced_when_complete(work / f"plan-{part.name}.json") as stream:
            stream.write(plan.encode("utf-8"))
        if overwrite:
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            _remove_shards(out, keep=set())
        try:
            yield
        except XdscaleError:
            if part.of == 1 and not any(_OURS.fullmatch(path.name) for path in out.iterdir()):
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


def publish(out: Path, manifest: Manifest) -> None:
    """Makes a finished build a dataset: `dataset.json` appears last, then the traces of the work go.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove_shards(out, keep={shard.file for split in manifest.splits.values() for shard in split.shards})
    with replaced_when_complete(out / MANIFEST_NAME) as stream:
        stream.write(manifest.to_json().encode("utf-8"))
    _remove_work(out)


def tidy(out: Path) -> None:
    """Removes what a build that was killed after its last step left beside the dataset, unless one is at work."""
    try:
        with locked(out / WORK_FOLDER / LOCK_NAME):
            _remove_work(out)
    except (OSError, XdscaleError):
        return  # nothing there, or a dataset that may only be read


def _remove_work(out: Path) -> None:
    for path in sorted(out.glob(PART_FILES)):
        path.unlink()
    shutil.rmtree(out / WORK_FOLDER)


def _remove_shards(out: Path, keep: set[str]) -> None:
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _plan(build: Build, part: Part) -> dict[str, Any]:
    """Returns what all parts of one dataset must have in common."""
    return build.identity() | {"parts": part.of}


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes())
    except (OSError, ValueError):
        plan = None
    return plan if isinstance(plan, dict) else {}


def _require_same(what: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(there.keys() | wanted.keys()):
        old, new = there.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict | list) or isinstance(new, dict | list):
            difference = f"another {key.replace('_', ' ').removesuffix('s')}"
            raise XdscaleError(f"{what} of {difference}; {_ELSEWHERE}")
        raise XdscaleError(f"{what} with {key} {old!r}, now {new!r}; {_ELSEWHERE}")
