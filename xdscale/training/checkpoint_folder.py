"""The folder of a run's checkpoints: their names, which of them stay, and what interrupted saves left there."""

import contextlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError, refusal
from xdscale.files import sync
from xdscale.training.integrity import damage

if TYPE_CHECKING:  # listing and verifying need no torch
    from xdscale.training.distributed import Ranks

LATEST = "latest"
UNIVERSAL = "universal-"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVERS = (".partial-*", ".removed-*", ".universal-*")


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's folder name states."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def no_checkpoint(run: Path) -> XdscaleError:
    """Returns the error of a run that has no checkpoint: none yet, or none any more, since it is finished.

    Args:
        run: the run folder; a finished one of finetuning has its model in the folder `model`, if it was kept.
    """
    kept = run / "model"
    ended = f"{run}: has no checkpoint any more, since it is finished"
    if (kept / "config.json").is_file():
        return XdscaleError(f"{ended}; its model is the folder {kept}")
    if (run / "result.json").is_file():
        return XdscaleError(f"{ended}, and its model was not kept (run.keep_model); take that of another seed")
    return XdscaleError(f"{run}: has no checkpoint yet")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        newest: how many of the newest.
        every: those of steps that are multiples of this stay for good; None for no others.
        best: the step of another one that stays.
    """

    newest: int
    every: int | None = None
    best: int | None = None

    def outdated(self, checkpoints: list[Path], step: int) -> list[Path]:
        """Returns those of `checkpoints` (oldest first) that may go now that the one of `step` is published.

        Later ones are left of a run that was continued from before them: they neither go nor count.
        """
        past = [path for path in checkpoints if step_of(path) <= step]
        older = [path for path in past[: -self.newest] if step_of(path) != self.best]
        return [path for path in older if not self.every or step_of(path) % self.every]


def prune(final: Path, retention: Retention, ranks: "Ranks") -> None:
    """Deletes outdated checkpoints, but only if the new one, read back from the disk, verifies.

    Each file is read by another rank than the one that hashed it, on a cluster mostly by another machine.
    """
    outdated = ranks.gather(retention.outdated(list_checkpoints(final.parent), step_of(final)))[0]
    if not outdated:
        return
    other = (ranks.rank + 1) % ranks.world_size
    problems = [line for part in ranks.gather(damage(final, (other, ranks.world_size))) for line in part]
    if problems and ranks.is_first:
        print(f"warning: older checkpoints stay, {final.name} is damaged: {'; '.join(problems)}", file=sys.stderr)
    elif ranks.is_first:
        outdated += [path.with_name(UNIVERSAL + path.name) for path in outdated]
        try:
            for path in outdated:
                if path.exists():
                    remove(path)
        except OSError as error:
            print(f"warning: cannot delete an old checkpoint: {refusal(error)}", file=sys.stderr)


def remove(path: Path) -> None:
    """Deletes a folder so that no moment shows half of it under its name."""
    hidden = path.with_name(f".removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    sync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path, ranks: "Ranks") -> None:
    """Deletes conversions made for one load, and what interrupted saves left, once every rank is here."""
    ranks.barrier()
    if ranks.is_first:
        clear(folder)


def clear(folder: Path) -> None:
    """Deletes what interrupted saves and conversions left."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / f".{LATEST}.partial").unlink(missing_ok=True)
