"""The run folder: one run, one recipe, one writer at a time."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xdscale import __version__
from xdscale.errors import XdscaleError, writing
from xdscale.files import DISKS_OWN, lock, one_line, require_real_file, write_atomically
from xdscale.recipe import Recipe
from xdscale.recipe_values import NOT_YAML
from xdscale.recipe_yaml import read_yaml
from xdscale.version import commit

if TYPE_CHECKING:
    from xdscale.training.distributed import Ranks

_SECONDS_TO_SEE_A_FILE = 10
_TOKEN = ".seen-by-all-"
_RECORDED_PACKAGES = ("torch", "deepspeed", "transformers", "open_clip_torch", "tokenizers", "triton", "numpy")


class RunFolder:
    """Paths and records of a run: recipe, DeepSpeed configuration, environment, all starts, the log, and folders.

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
        self._lock: BinaryIO | None = None

    def check(self, recipe: Recipe) -> None:
        """Refuses a folder that holds another experiment.

        Raises:
            XdscaleError: the folder's recipe differs (the differing keys are named), or the folder is not a run's.
        """
        stored = self.folder / "recipe.yaml"
        with writing("a run", self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise XdscaleError(f"output.folder = {self.folder}: exists and is not a folder")
            started = stored.exists()
        if not started:
            # What a start leaves that failed before its records, and what a disk of its own has.
            known = (".lock", "faults", ".recipe.yaml.partial", _TOKEN, DISKS_OWN)
            foreign = [path.name for path in self.folder.glob("*") if not path.name.startswith(known)]
            if foreign:
                raise XdscaleError(
                    f"output.folder = {self.folder}: holds files but no recipe.yaml, so it is not a run "
                    f"folder ({foreign[0]} …); choose an empty or new one"
                )
            return
        require_real_file(stored)
        try:
            before = type(recipe).model_validate(read_yaml(stored.read_text(encoding="utf-8"))).identity()
        except (OSError, UnicodeDecodeError) as error:
            raise XdscaleError(f"{stored}: cannot be read: {error}; mend it, or choose another folder") from None
        except NOT_YAML:  # or values of another kind, ValueErrors too
            raise XdscaleError(
                f"output.folder = {self.folder}: holds a run of another system or version; "
                "choose another folder, or delete this one"
            ) from None
        differences = _differences(before, recipe.identity())
        # A run may be made longer or shorter on purpose; its records tell of it.
        differences = [difference for difference in differences if not difference.startswith("training.steps ")]
        if differences:
            raise XdscaleError(
                f"output.folder = {self.folder}: holds a run of a different recipe ("
                + "; ".join(differences)
                + "); choose another folder, or delete this one. When a run continues, only training.steps, where its "
                "data lies and the keys of `run` may be other than before"
            )

    def check_checkpoints(self, *, found: bool) -> None:
        """Refuses to start a run again from its beginning when it has saved checkpoints that are not there now.

        Args:
            found: whether there is a checkpoint to continue from.

        Raises:
            XdscaleError: `checkpoints` is no folder, or empty although the log tells of a checkpoint.
        """
        what_to_do = (
            f"bring the folder back (is its disk mounted?); to begin again at step 0, delete all of {self.folder} or "
            "choose another output.folder"
        )
        if not self.checkpoints.is_dir() and os.path.lexists(self.checkpoints):
            link = f", but a link to {self.checkpoints.readlink()}" if self.checkpoints.is_symlink() else ""
            raise XdscaleError(f"{self.checkpoints}: is no folder{link}; {what_to_do}")
        saved = [entry["step"] for entry in read_log(self.log) if entry["kind"] == "checkpoint"]
        if saved and not found:
            raise XdscaleError(
                f"{self.checkpoints}: holds no checkpoint, though {self.log} tells of one after step {saved[-1]}; "
                f"nothing was changed: {what_to_do}"
            )

    def claim(self) -> None:
        """Takes the folder for this process until it ends; a crash releases it.

        Where the file system has no locks, a warning says so, and the run goes on without.

        Raises:
            XdscaleError: another process trains in it, or it takes no files.
        """
        with writing("a run", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a+b", buffering=0)
            try:
                no_locks = lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().decode(errors="replace").strip() or "another process"
                raise XdscaleError(
                    f"output.folder = {self.folder}: in use by {owner}; wait for it to end or choose another folder"
                ) from None
            if no_locks:
                print(
                    f"warning: {self.folder}: its file system has no locks ({no_locks}): nothing keeps a second run "
                    "out of this folder, so start none",
                    file=sys.stderr,
                )
            self._lock = file
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())

    def check_shared(self, ranks: "Ranks") -> None:
        """Refuses a folder that is not the same one for all ranks; every rank calls it, after the first has claimed.

        Raises:
            XdscaleError: names the rank and its machine; its part of a checkpoint would lie where nobody finds it.
        """
        token = self.folder / ranks.gather(_TOKEN + os.urandom(8).hex())[0]
        if ranks.is_first:
            with writing("a run", self.folder):
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

    def write_records(
        self, recipe: Recipe, ds_config: dict[str, Any], world_size: int, step: int, *, continued: bool
    ) -> list[str]:
        """Writes what this start trains with, and adds it to the list of all starts.

        `recipe.yaml`, `ds_config.json` and `environment.json` tell of the newest start; `starts.jsonl` has a line with
        all of them for every start.

        Args:
            recipe: the resolved recipe.
            ds_config: the resolved DeepSpeed configuration.
            world_size: number of ranks.
            step: steps that the run has done.
            continued: whether from a checkpoint.

        Returns:
            What differs from the start before, one phrase per value; nothing for a run that is not continued.

        Raises:
            XdscaleError: the folder takes no files, or the list of starts is damaged.
        """
        environment = {
            "xdscale": {"version": __version__, "commit": commit() or None},
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "world_size": world_size,
            "command": sys.argv,
            "packages": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        }
        now = {"recipe": recipe.model_dump(mode="json"), "ds_config": ds_config, "environment": environment}
        starts = self.folder / "starts.jsonl"
        lines, before = _starts(starts)
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_atomically(self.folder / "recipe.yaml", recipe.to_yaml())
        write_atomically(self.folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        write_atomically(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_atomically(starts, lines + json.dumps({"step": step, "time": began} | now) + "\n")
        if before is None or not continued:
            return []
        after = json.loads(json.dumps(now))
        for start in (before, after):
            start["environment"].pop("command", None)  # it says what the others say
        return _differences({name: before[name] for name in now}, after)

    def truncate_log(self, step: int) -> None:
        """Drops log lines of steps after `step`, which a resumed run will write again."""
        kept = [json.dumps(entry) + "\n" for entry in read_log(self.log) if entry["step"] <= step]
        write_atomically(self.log, "".join(kept))


def _starts(path: Path) -> tuple[str, dict[str, Any] | None]:
    """Returns the list of a run's starts, and the last of them; nothing where there is no list."""
    require_real_file(path)
    if not path.exists() or not path.stat().st_size:
        return "", None
    try:
        lines = path.read_text(encoding="utf-8")
        last = json.loads(lines.splitlines()[-1])
        if not all(isinstance(last[name], dict) for name in ("recipe", "ds_config", "environment")):
            raise ValueError("no recipe, ds_config and environment")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise XdscaleError(
            f"{path}: its last line is no record of a start ({one_line(error)}); mend it, or take the file away"
        ) from None
    return lines, last


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run's `log.jsonl`, oldest first; none where there is no log.

    Half of a last line, which a killed run leaves, is passed over.

    Raises:
        XdscaleError: it cannot be read, or holds something that no run writes.
    """
    entries = []
    require_real_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise XdscaleError(f"{path}: cannot be read: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            entry = json.loads(line)
            if not (isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry):
                raise XdscaleError(f"{path}, line {number}: {line[:80]}: expected an object with its kind and step")
            entries.append(entry)
    return entries


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return sorted(found)
