"""The run folder: one run, one recipe, one writer at a time."""

import fcntl
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml
from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.recipe import Recipe
from xdscale.training.integrity import sync

if TYPE_CHECKING:
    from xdscale.training.distributed import Ranks

_SECONDS_TO_SEE_A_FILE = 10
_TOKEN = ".seen-by-all-"
_RECORDED_PACKAGES = ("torch", "deepspeed", "transformers", "open_clip_torch", "tokenizers", "triton", "numpy")


class RunFolder:
    """Paths and records of a run: `recipe.yaml`, `ds_config.json`, `environment.json`, `log.jsonl`, and folders.

    Args:
        folder: the run folder; created on `claim`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        # TensorBoard names a run by its folder, and one whose files lie in its --logdir itself "."
        self.tensorboard = folder / "tensorboard" / folder.resolve().name
        self.language = folder / "language"
        self.log = folder / "log.jsonl"
        self._lock: TextIO | None = None

    def check(self, recipe: Recipe) -> None:
        """Refuses a folder that holds another experiment.

        Raises:
            XdscaleError: the folder's recipe differs (the differing keys are named), or the folder is not a run's.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise XdscaleError(f"output.folder = {self.folder}: exists and is not a folder")
        stored = self.folder / "recipe.yaml"
        if not stored.exists():
            known = (".lock", "faults", _TOKEN)  # a run that failed before its first record leaves no more
            foreign = [path.name for path in self.folder.glob("*") if not path.name.startswith(known)]
            if foreign:
                raise XdscaleError(
                    f"output.folder = {self.folder}: holds files but no recipe.yaml, so it is not a run "
                    f"folder ({foreign[0]} …); choose an empty or new one"
                )
            return
        try:
            before = type(recipe).model_validate(yaml.safe_load(stored.read_text(encoding="utf-8"))).identity()
        except ValidationError:
            raise XdscaleError(
                f"output.folder = {self.folder}: holds a run of another kind (adaptation or finetuning) or version; "
                "choose another folder, or delete this one"
            ) from None
        differences = _differences(before, recipe.identity())
        if differences:
            raise XdscaleError(
                f"output.folder = {self.folder}: holds a run of a different recipe ("
                + "; ".join(differences)
                + "); choose another folder, or delete this one"
            )

    def claim(self) -> None:
        """Takes the folder for this process until it ends; a crash releases it.

        Raises:
            XdscaleError: another process trains in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise XdscaleError(
                f"output.folder = {self.folder}: in use by {lock.read().strip() or 'another process'}; "
                "wait for it to end or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock

    def check_shared(self, ranks: "Ranks") -> None:
        """Refuses a folder that is not the same one for all ranks; every rank calls it, after the first has claimed.

        Raises:
            XdscaleError: names the rank and its machine; its part of a checkpoint would lie where nobody finds it.
        """
        token = self.folder / ranks.gather(_TOKEN + os.urandom(8).hex())[0]
        if ranks.is_first:
            for left in self.folder.glob(f"{_TOKEN}*"):  # by a process killed right here
                left.unlink()
            token.touch()
        ranks.barrier()
        deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
        while not token.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        where = f"rank {ranks.rank} on {platform.node()} does not see what rank 0 writes there"
        problems = ranks.gather(None if token.exists() else where)
        if ranks.is_first:
            token.unlink()
        for problem in problems:
            if problem is not None:
                raise XdscaleError(
                    f"output.folder = {self.folder}: {problem}; all ranks write one checkpoint together, so name a "
                    "folder on a file system that all machines share"
                )

    def release(self) -> None:
        """Gives the folder back before the process ends, if it was claimed."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_records(self, recipe: Recipe, ds_config: dict[str, Any], world_size: int) -> None:
        """Writes the resolved recipe, the resolved DeepSpeed configuration and the environment."""
        write_atomically(self.folder / "recipe.yaml", recipe.to_yaml())
        write_atomically(self.folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        environment = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "world_size": world_size,
            "command": sys.argv,
            "packages": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        }
        write_atomically(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drops log lines of steps after `step`, which a resumed run will write again."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the torn last line of a killed run
            if entry["step"] <= step:
                kept.append(line + "\n")
        write_atomically(self.log, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file aside, syncs it, renames it and syncs the folder, so that no reader ever sees half of it."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return sorted(found)
