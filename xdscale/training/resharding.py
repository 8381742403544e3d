"""Checkpoints for another number of ranks: DeepSpeed's universal format, made when it is needed or ahead of time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError, free_mib, refusal
from xdscale.files import file_sha256, sync
from xdscale.training.checkpoint import POSITION, CheckpointPosition
from xdscale.training.checkpoint_folder import UNIVERSAL
from xdscale.training.integrity import (
    CHECKSUMS,
    check_pickles,
    check_room,
    checksum_text,
    damage,
    file_names,
    sync_tree,
)

if TYPE_CHECKING:
    from xdscale.training.distributed import Ranks


def needs_resharding(position: CheckpointPosition, world_size: int) -> bool:
    """Returns whether the sharded optimizer state must be converted for this number of ranks."""
    return position.zero_stage > 0 and position.world_size != world_size


def reshard(checkpoint: Path, ranks: "Ranks") -> Path:
    """Returns a conversion of a checkpoint that any number of ranks can load.

    One made ahead of time (`reshard_ahead`) is used when it verifies. Otherwise the first rank converts, into a hidden
    folder that `remove_leftovers` deletes after loading, and the others wait.

    Args:
        checkpoint: a verified checkpoint.
        ranks: this process among the others.

    Raises:
        XdscaleError: the conversion failed; the converter's last words are in the message.
    """
    ready = checkpoint.with_name(UNIVERSAL + checkpoint.name)
    if ranks.gather(_belongs(ready, checkpoint))[0]:
        problems = [line for part in ranks.gather(damage(ready, (ranks.rank, ranks.world_size))) for line in part]
        if not problems:
            return ready
        if ranks.is_first:
            print(f"warning: converting anew, {ready.name} is damaged: {'; '.join(problems)}", file=sys.stderr)
    target = _hidden(checkpoint)
    problem = _convert(checkpoint, target) if ranks.is_first else None
    ranks.raise_first(problem, f"cannot convert {checkpoint} for {ranks.world_size} ranks")
    return target


def reshard_ahead(checkpoint: Path) -> Path:
    """Converts a checkpoint ahead of time, on any machine: the next start at another world size needs not do it.

    Args:
        checkpoint: a verified checkpoint of stage 1, 2 or 3.

    Returns:
        The conversion beside the checkpoint, with checksums of its own; retention deletes both together.

    Raises:
        XdscaleError: the conversion failed or the disk is full; nothing is left then.
    """
    target, ready = _hidden(checkpoint), checkpoint.with_name(UNIVERSAL + checkpoint.name)
    try:
        problem = _convert(checkpoint, target)
        if problem:
            raise XdscaleError(f"cannot convert {checkpoint}: {problem}")
        shutil.copyfile(checkpoint / POSITION, target / POSITION)
        names = file_names(target)
        checksums = {name: file_sha256(target / name) for name in names}
        (target / CHECKSUMS).write_text(checksum_text(checksums), encoding="utf-8")
        for name in (*names, CHECKSUMS):
            sync(target / name)
        sync_tree(target)
        shutil.rmtree(ready, ignore_errors=True)
        target.rename(ready)
        sync(ready.parent)
    except OSError as error:
        raise XdscaleError(f"cannot convert {checkpoint}: {refusal(error)}") from None
    finally:
        shutil.rmtree(target.parent, ignore_errors=True)
    return ready


def _belongs(ready: Path, checkpoint: Path) -> bool:
    """Returns whether a conversion was made of this checkpoint, not of one that had the same step before."""
    try:
        return (ready / POSITION).read_bytes() == (checkpoint / POSITION).read_bytes()
    except OSError:
        return False


def _hidden(checkpoint: Path) -> Path:
    # One level down: the converter writes a file of its own beside its output.
    return checkpoint.with_name(f".{UNIVERSAL}{checkpoint.name}") / "universal"


def _convert(checkpoint: Path, target: Path) -> str | None:
    """Runs DeepSpeed's converter; returns what went wrong, if anything."""
    try:
        check_pickles(checkpoint)
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
    except OSError as error:
        return refusal(error)
    except XdscaleError as error:
        return str(error)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"DS_ACCELERATOR": "cpu"}, check=False
    )
    if result.returncode == 0:
        return None
    problem = (result.stderr.strip().splitlines() or [f"the converter ended with code {result.returncode}"])[-1]
    try:
        check_room(target.parent)
    except OSError as error:
        problem = f"{refusal(error)}; {free_mib(checkpoint)} are free with what was converted so far"
    shutil.rmtree(target.parent, ignore_errors=True)
    return problem
