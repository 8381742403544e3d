"""Checkpoints: written aside, checksummed, published by a rename, verified before every load.

DeepSpeed publishes its `latest` file before all ranks have written and loads flipped bytes without a word, so the
publishing and the checking are ours; the files inside are DeepSpeed's. They are pickles: resuming trusts the run
folder, checksums guard against damage, not against malice.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import write_atomically

CHECKSUMS = "checksums.json"
POSITION = "position.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class CheckpointPosition:
    """Where in the run a checkpoint stands, and what it can be continued with.

    Attributes:
        step: optimiser steps done.
        epoch: epoch of the next sample.
        index: index of the next sample within that epoch's order.
        world_size: ranks that wrote it.
        zero_stage: ZeRO stage that wrote it.
        precision: `fp32`, `bf16` or `fp16`.
        data_fingerprint: SHA-256 of the shards' manifest.
        stream_hash: SHA-256 of the samples, masks and pairs of the next step, on all ranks together.
        quarantined: shards that the run did without.
    """

    step: int
    epoch: int
    index: int
    world_size: int
    zero_stage: int
    precision: str
    data_fingerprint: str
    stream_hash: str
    quarantined: list[str]


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the published checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def read_position(checkpoint: Path) -> CheckpointPosition:
    """Reads where a checkpoint stands.

    Raises:
        XdscaleError: the record is missing or damaged.
    """
    path = checkpoint / POSITION
    try:
        return CheckpointPosition(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise XdscaleError(f"{path}: not a readable checkpoint record: {error}") from None


def save_checkpoint(engine: Any, folder: Path, position: CheckpointPosition, keep: int, ranks: Ranks) -> None:
    """Writes, checksums and publishes a checkpoint; every rank calls it.

    Args:
        engine: the DeepSpeed engine.
        folder: the run's `checkpoints` folder.
        position: where the run stands.
        keep: how many of the newest checkpoints stay.
        ranks: this process among the others.

    Raises:
        XdscaleError: the disk is full or not writable; nothing is published then and older checkpoints stay.
    """
    final = folder / checkpoint_name(position.step)
    aside = folder / f".partial-{final.name}"
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    problem = _try(lambda: engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False))
    ranks.raise_first(problem, f"cannot write checkpoint {final}")
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    mine = {str(path.relative_to(aside)): _sync_and_hash(path) for path in files[ranks.rank :: ranks.world_size]}
    checksums = {name: digest for part in ranks.gather(mine) for name, digest in part.items()}
    problem = _try(lambda: _publish(aside, final, position, checksums, keep)) if ranks.is_first else None
    ranks.raise_first(problem, f"cannot publish checkpoint {final}")


def find_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """Returns the newest checkpoint that verifies, or None when the run has none.

    A damaged one is named in a warning and the one before is used. Ranks share the hashing.

    Raises:
        XdscaleError: checkpoints exist but none is undamaged.
    """
    candidates = list_checkpoints(folder)
    for checkpoint in reversed(candidates):
        problems = [line for part in ranks.gather(damage(checkpoint, ranks)) for line in part]
        if not problems:
            return checkpoint
        if ranks.is_first:
            print(f"warning: skipping damaged checkpoint {checkpoint.name}: {'; '.join(problems)}", file=sys.stderr)
    if candidates:
        raise XdscaleError(
            f"{folder}: none of the {len(candidates)} checkpoints is undamaged; restore one from a "
            "backup, or delete the run folder to start again"
        )
    return None


def damage(checkpoint: Path, ranks: Ranks | None = None) -> list[str]:
    """Returns what is wrong with a checkpoint's files, one line each: missing, altered or unreadable.

    Args:
        checkpoint: a published checkpoint.
        ranks: when given, only this rank's share of the files is hashed.
    """
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{checkpoint / CHECKSUMS}: {error}"]
    names = sorted(expected)
    if ranks is not None:
        names = names[ranks.rank :: ranks.world_size]
    problems = []
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (found := _sha256(path)) != expected[name]:
            problems.append(f"{path} is altered: expected SHA-256 {expected[name][:12]}…, found {found[:12]}…")
    return problems


def check_compatible(
    checkpoint: Path,
    position: CheckpointPosition,
    *,
    zero_stage: int,
    precision: str,
    data_fingerprint: str,
    stream_hash: str,
) -> None:
    """Refuses to continue with other shards, another stream, another precision or another way of sharding.

    Raises:
        XdscaleError: names what the checkpoint was written with and what to do.
    """
    if position.data_fingerprint != data_fingerprint:
        raise XdscaleError(
            f"{checkpoint}: was trained on other shards (manifest {position.data_fingerprint[:12]}…, "
            f"now {data_fingerprint[:12]}…); point data.shards at the original ones"
        )
    if position.stream_hash != stream_hash:
        raise XdscaleError(
            f"{checkpoint}: the next batch, number {position.step}, is not the one that would have followed: samples, "
            f"masks and pairs give {stream_hash[:12]}…, the checkpoint holds {position.stream_hash[:12]}…; continue "
            "with the version of xdscale and the recipe that wrote it"
        )
    same_layout = position.zero_stage == zero_stage or {position.zero_stage, zero_stage} == {1, 2}
    if not same_layout or position.precision != precision:
        raise XdscaleError(
            f"{checkpoint}: written under ZeRO stage {position.zero_stage} in {position.precision}, the "
            f"DeepSpeed config asks for stage {zero_stage} in {precision}; continue with the former"
        )


def needs_resharding(position: CheckpointPosition, world_size: int) -> bool:
    """Returns whether the sharded optimizer state must be converted for this number of ranks."""
    return position.zero_stage > 0 and position.world_size != world_size


def reshard(checkpoint: Path, ranks: Ranks) -> Path:
    """Converts a checkpoint to DeepSpeed's universal format, which any number of ranks can load.

    Args:
        checkpoint: a verified checkpoint.
        ranks: the first rank converts, the others wait.

    Returns:
        The converted folder beside the checkpoint; `remove_resharded` deletes it after loading.

    Raises:
        XdscaleError: the conversion failed; the converter's last words are in the message.
    """
    target = checkpoint.with_name(f".universal-{checkpoint.name}")
    problem = None
    if ranks.is_first:
        shutil.rmtree(target, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--inject_missing_state",
            "--input_folder",
            str(checkpoint),
            "--output_folder",
            str(target),
        ]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode:
            problem = (result.stderr.strip().splitlines() or ["no message"])[-1]
    ranks.raise_first(problem, f"cannot convert {checkpoint} for {ranks.world_size} ranks")
    return target


def remove_resharded(folder: Path, ranks: Ranks) -> None:
    """Deletes converted and half-written checkpoints once every rank is past loading."""
    ranks.barrier()
    if ranks.is_first:
        for pattern in (".universal-*", ".partial-*"):
            for path in folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _publish(aside: Path, final: Path, position: CheckpointPosition, checksums: dict[str, str], keep: int) -> None:
    write_atomically(aside / POSITION, json.dumps(asdict(position), indent=2) + "\n")
    checksums[POSITION] = _sha256(aside / POSITION)
    write_atomically(aside / CHECKSUMS, json.dumps(dict(sorted(checksums.items())), indent=2) + "\n")
    _sync_folder(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync_folder(final.parent)
    write_atomically(final.parent / LATEST, final.name + "\n")
    for old in list_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)


def _try(action: Any) -> str | None:
    """Runs an action and returns its failure as text, so that ranks can agree before any of them raises."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
