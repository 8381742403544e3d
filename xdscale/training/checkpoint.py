"""Checkpoints: written aside by all ranks, published by one rename, verified before and after every load.

DeepSpeed publishes its `latest` file before all ranks have written and loads flipped bytes without a word, so the
publishing and the checking are ours; the files inside are DeepSpeed's. `checkpoint_folder` says which stay,
`integrity` checks the files, `engine_state` what was loaded from them, `resharding` converts them for another number of
ranks.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdscale.errors import XdscaleError, free_mib, refusal
from xdscale.files import count_of, file_sha256, one_line, require_real_file, sync, write_atomically
from xdscale.training.checkpoint_folder import (
    LATEST,
    Retention,
    checkpoint_name,
    clear,
    list_checkpoints,
    no_checkpoint,
    prune,
    remove,
    step_of,
)
from xdscale.training.integrity import (
    CHECKSUMS,
    check_pickles,
    check_room,
    checksum_text,
    damage,
    file_names,
    sync_tree,
)

if TYPE_CHECKING:  # listing and verifying need no torch
    from xdscale.training.distributed import Ranks
    from xdscale.training.engine_state import EngineState
    from xdscale.training.weight_average import WeightAverage

POSITION = "position.json"


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
        data_fingerprints: SHA-256 of each table or file of the data, by name.
        draws_hash: SHA-256 of the samples, masks and pairs of the next step, on all ranks together.
        quarantined: shards that the run did without.
    """

    step: int
    epoch: int
    index: int
    world_size: int
    zero_stage: int
    precision: str
    data_fingerprints: dict[str, str]
    draws_hash: str
    quarantined: list[str]


def read_position(checkpoint: Path) -> CheckpointPosition:
    """Reads where a checkpoint stands.

    Raises:
        XdscaleError: the record is missing or damaged.
    """
    return _read_record(checkpoint, lambda record: CheckpointPosition(**record["position"]))


def save_checkpoint(
    engine: Any,
    folder: Path,
    position: CheckpointPosition,
    retention: Retention,
    ranks: "Ranks",
    average: "WeightAverage | None" = None,
) -> None:
    """Writes, checksums and publishes a checkpoint; every rank calls it.

    Nothing has a checkpoint's name before all ranks have confirmed that all files are on the disk and hashed.

    Args:
        engine: the DeepSpeed engine.
        folder: the run's `checkpoints` folder.
        position: where the run stands.
        retention: which older checkpoints stay.
        ranks: this process among the others.
        average: of the weights, if the run keeps one.

    Raises:
        XdscaleError: the disk is full or not writable on any rank; nothing is published then, what was written is
            deleted and older checkpoints stay.
    """
    from xdscale.training.engine_state import engine_state, give_moments

    final = folder / checkpoint_name(position.step)
    aside = folder / f".partial-{final.name}"
    give_moments(engine)
    record = {"position": asdict(position), "engine": asdict(engine_state(engine, ranks))}
    what = _cannot_write(engine, final)
    try:
        _all(ranks, what, lambda: _start_aside(aside) if ranks.is_first else None)
        _alone(ranks, what, lambda: _write(engine, aside, average))
        checksums = _sync_and_hash(aside, what, ranks)
        _all(ranks, what, lambda: _publish(aside, final, record, checksums) if ranks.is_first else None)
    except XdscaleError:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)  # what fills the disk
        raise
    prune(final, retention, ranks)


def find_checkpoint(folder: Path, ranks: "Ranks") -> Path | None:
    """Returns the newest checkpoint that verifies, or None when the run has none.

    A damaged one is named in a warning and the one before is used. Ranks share the hashing.

    Raises:
        XdscaleError: checkpoints exist but none is undamaged.
    """
    candidates = ranks.gather(list_checkpoints(folder))[0]
    for checkpoint in reversed(candidates):
        problems = [line for part in ranks.gather(damage(checkpoint, (ranks.rank, ranks.world_size))) for line in part]
        if not problems:
            return checkpoint
        if ranks.is_first:
            print(f"warning: skipping damaged checkpoint {checkpoint.name}: {'; '.join(problems)}", file=sys.stderr)
    if candidates:
        raise XdscaleError(
            f"{folder}: none of the {count_of(len(candidates), 'checkpoint')} is undamaged; restore one from a "
            "backup, or delete the run folder to start again"
        )
    return None


def choose_checkpoint(run: Path, step: int | None, ranks: "Ranks") -> Path:
    """Returns the verified checkpoint of a step of a run.

    Args:
        run: the run folder.
        step: which one; None for the newest undamaged one.
        ranks: this process among the others.

    Raises:
        XdscaleError: there is none (those that exist are named), or it is damaged (the file is named).
    """
    folder = run / "checkpoints"
    if step is None:
        found = find_checkpoint(folder, ranks)
        if found is None:
            raise no_checkpoint(run)
        return found
    found = folder / checkpoint_name(step)
    if not found.is_dir():
        steps = ", ".join(str(step_of(path)) for path in list_checkpoints(folder)) or "none"
        raise XdscaleError(f"{run}: no checkpoint of step {step}; there are: {steps}")
    problems = damage(found)
    if problems:
        raise XdscaleError(f"{found}: damaged: {'; '.join(problems)}")
    return found


def load_checkpoint(engine: Any, source: Path, checkpoint: Path, ranks: "Ranks") -> None:
    """Loads a checkpoint into a fresh engine and checks that the engine then holds what was saved.

    Args:
        engine: the DeepSpeed engine.
        source: the folder to read: the checkpoint, or its conversion for another number of ranks.
        checkpoint: the verified checkpoint, whose record says what must be there.
        ranks: this process among the others.

    Raises:
        XdscaleError: a file could run code, DeepSpeed cannot load it, or parameters, buffers, optimizer, its step or
            the learning rate are not those that were saved.
    """
    from xdscale.training.engine import put_fixed
    from xdscale.training.engine_state import engine_state

    mine = file_names(source)[ranks.rank :: ranks.world_size]
    _all(ranks, f"cannot load {checkpoint}", lambda: check_pickles(source, mine))
    _alone(ranks, f"cannot load {checkpoint}", lambda: _load(engine, source))
    if source != checkpoint:
        _alone(ranks, f"cannot load {checkpoint}", lambda: put_fixed(engine, source))
    differences = _read_engine_state(checkpoint).differences(engine_state(engine, ranks))
    problem = "; ".join(differences) or None
    ranks.raise_first(problem, f"{checkpoint}: DeepSpeed loaded it without an error, but not what was saved")


def check_compatible(
    checkpoint: Path,
    position: CheckpointPosition,
    *,
    zero_stage: int,
    precision: str,
    data_fingerprints: dict[str, str],
    draws_hash: str,
) -> None:
    """Refuses to continue with other shards, another order, another precision or another way of sharding.

    Raises:
        XdscaleError: names what the checkpoint was written with and what to do.
    """
    if position.data_fingerprints != data_fingerprints:
        before, now = position.data_fingerprints, data_fingerprints
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        told = (f"{name} (it was {_shown(before.get(name))}, now {_shown(now.get(name))})" for name in names)
        raise XdscaleError(
            f"{checkpoint}: was trained on other data: {', '.join(told)}; name the original in the recipe's section "
            "data, or begin another run in another output.folder"
        )
    if position.draws_hash != draws_hash:
        raise XdscaleError(
            f"{checkpoint}: the next batch, number {position.step}, is not the one that would have followed: samples, "
            f"masks and pairs give {draws_hash[:12]}…, the checkpoint holds {position.draws_hash[:12]}…; continue "
            "with the version of xdscale and the recipe that wrote it"
        )
    same_layout = position.zero_stage == zero_stage or {position.zero_stage, zero_stage} == {1, 2}
    if not same_layout or position.precision != precision:
        raise XdscaleError(
            f"{checkpoint}: written under ZeRO stage {position.zero_stage} in {position.precision}, the "
            f"DeepSpeed config asks for stage {zero_stage} in {precision}; continue with the former"
        )


def _shown(sha256: str | None) -> str:
    return "not there" if sha256 is None else f"SHA-256 {sha256[:12]}…"


def _cannot_write(engine: Any, final: Path) -> str:
    """Returns what a failed save begins its message with: what was needed, what was there, what is left."""
    # Parameters as the module computes with them, and fp32 weights and both moments of those that are trained.
    needed = sum(
        getattr(parameter, "ds_numel", parameter.numel()) * (parameter.element_size() + 12 * parameter.requires_grad)
        for parameter in engine.module.parameters()
    )
    older = "older checkpoints stay and the same command continues from them"
    if not list_checkpoints(final.parent):
        older = "the run has no older checkpoint"
    return (
        f"cannot write checkpoint {final} (about {needed / 2**20:,.0f} MiB are needed, {free_mib(final.parent)} were "
        f"free; {older})"
    )


def _write(engine: Any, aside: Path, average: "WeightAverage | None") -> None:
    try:
        engine.save_checkpoint(str(aside.parent), tag=aside.name, save_latest=False)
        if average is not None:
            average.save(aside)
    except RuntimeError:
        check_room(aside)
        raise


def _start_aside(aside: Path) -> None:
    clear(aside.parent)
    aside.mkdir(parents=True)


def _sync_and_hash(aside: Path, what: str, ranks: "Ranks") -> dict[str, str]:
    """Forces all files to the disk and returns their SHA-256; ranks share the hashing.

    Every rank syncs every file, since only the machine that wrote one can and a second sync costs nothing; and the
    list of files is put together from all ranks, since a network file system may show a rank's file late to others.
    """
    _all(ranks, what, lambda: [sync(aside / name) for name in file_names(aside)])
    names = sorted({name for part in ranks.gather(file_names(aside)) for name in part})
    mine: dict[str, str] = {}
    share = names[ranks.rank :: ranks.world_size]
    _all(ranks, what, lambda: mine.update({name: file_sha256(aside / name) for name in share}))
    return {name: digest for part in ranks.gather(mine) for name, digest in part.items()}


def _publish(aside: Path, final: Path, record: dict[str, Any], checksums: dict[str, str]) -> None:
    write_atomically(aside / POSITION, json.dumps(record, indent=2) + "\n")
    write_atomically(aside / CHECKSUMS, checksum_text(checksums | {POSITION: file_sha256(aside / POSITION)}))
    sync_tree(aside)
    if final.exists():
        remove(final)  # a damaged one: had it been whole, the run would have continued from it
    aside.rename(final)
    sync(final.parent)
    write_atomically(final.parent / LATEST, final.name + "\n")


def _load(engine: Any, source: Path) -> None:
    from xdscale.training.engine_state import adam_of, place_state
    from xdscale.training.optimizer import GROUP_KEYS

    groups = adam_of(engine).param_groups
    kept = [{key: group[key] for key in GROUP_KEYS if key in group} for group in groups]
    try:
        path, _ = engine.load_checkpoint(str(source.parent), tag=source.name)
    except ValueError as error:
        if "size of optimizer's group" not in str(error):
            raise
        raise XdscaleError(
            "it was written with another zero_optimization.sub_group_size, which splits the optimizer's state; "
            "continue with that one, which the run's ds_config.json holds"
        ) from None
    if path is None:
        raise RuntimeError("DeepSpeed found nothing to load")
    for group, own in zip(adam_of(engine).param_groups, kept):
        group.update(own)  # from a universal checkpoint, stage 3 gives every group the values of the first one
    place_state(adam_of(engine))


def _read_engine_state(checkpoint: Path) -> "EngineState":
    from xdscale.training.engine_state import EngineState

    return _read_record(checkpoint, lambda record: EngineState(**record["engine"]))


def _read_record(checkpoint: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    path = checkpoint / POSITION
    require_real_file(path)
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise XdscaleError(f"{path}: not a readable checkpoint record: {error}") from None


def _all(ranks: "Ranks", what: str, action: Callable[[], object]) -> None:
    """Runs an action on every rank; when it fails on any, all raise the same error, so that none is left waiting."""
    ranks.raise_first(_attempt(action), what)


def _alone(ranks: "Ranks", what: str, action: Callable[[], object]) -> None:
    """Runs a call of DeepSpeed's; a rank on which it fails raises alone.

    The other ranks may wait in DeepSpeed's own exchanges and could not answer ours; the launcher ends them.
    """
    problem = _attempt(action)
    if problem is not None:
        raise XdscaleError(f"{what}: rank {ranks.rank}: {problem}")


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as error:
        return refusal(error)
    except (RuntimeError, AssertionError, XdscaleError) as error:
        return one_line(error)
    return None
