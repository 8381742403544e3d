"""The output folder of a build: what it may already hold, the lock while it is written, the last step."""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import MANIFEST_NAME, Build, Manifest
from xdscale.shards.unit import SPLITS, WORK_FOLDER
from xdscale.shards.verify import verify_shards
from xdscale.shards.writer import replaced_when_complete

PLAN_NAME = "plan.json"
LOCK_NAME = "lock"

_OURS = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar|\.({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar\.partial")
_ELSEWHERE = "choose another folder, or replace it with --overwrite"


def existing_dataset(out: Path, build: Build) -> Manifest | None:
    """Returns the finished dataset in `out` if it is the one to be built, verified.

    Returns None if the folder is free, or holds an unfinished part of the same build.

    Raises:
        XdscaleError: the folder holds something else (named), or damaged shards (named).
    """
    if out.exists() and not out.is_dir():
        raise XdscaleError(f"{out}: is a file; choose a folder for the shards")
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        _require_same(f"{out}: holds a dataset", manifest.build.identity(), build.identity())
        verify_shards(out)
        return manifest
    plan = out / WORK_FOLDER / PLAN_NAME
    if plan.exists():
        _require_same(f"{out}: holds an unfinished build", _read_plan(plan), build.identity())
        return None
    others = sorted(path.name for path in out.glob("*") if path.name != WORK_FOLDER)
    if others:
        raise XdscaleError(f"{out}: holds {others[0]} and is not a dataset of xdscale; {_ELSEWHERE}")
    return None


@contextmanager
def workplace(out: Path, build: Build, *, overwrite: bool) -> Iterator[None]:
    """Makes `out` ready and keeps other builds out of it meanwhile.

    Args:
        out: the folder of the dataset.
        build: what is being built; written down, so that a later start knows whose parts it finds.
        overwrite: remove what an earlier build left. Files that no build writes are never touched.

    Raises:
        XdscaleError: another process is building here.
        OSError: the folder cannot be written.
    """
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise XdscaleError(f"{out}: another process is building here; wait for it or end it") from None
        if overwrite:
            for record in work.glob("unit-*.json"):
                record.unlink()
        with replaced_when_complete(work / PLAN_NAME) as stream:
            stream.write(json.dumps(build.identity(), indent=2, sort_keys=True).encode("utf-8"))
        if overwrite:
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            _remove_shards(out, keep=set())
        yield


def publish(out: Path, manifest: Manifest) -> None:
    """Makes a finished build a dataset: `dataset.json` appears last, then the work folder goes.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove_shards(out, keep={shard.file for split in manifest.splits.values() for shard in split.shards})
    with replaced_when_complete(out / MANIFEST_NAME) as stream:
        stream.write(manifest.to_json().encode("utf-8"))
    shutil.rmtree(out / WORK_FOLDER)


def _remove_shards(out: Path, keep: set[str]) -> None:
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()


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
