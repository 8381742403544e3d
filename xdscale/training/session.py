"""A run on its engine: opened, continued where it stopped, trained to the end or to a signal; whatever is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from xdscale.ds_config import activation_checkpointing, precision, split_batch, zero_stage
from xdscale.errors import EXIT_STOPPED, XdscaleError
from xdscale.training import checkpoint as ckpt
from xdscale.training.distributed import Ranks
from xdscale.training.engine import build_engine
from xdscale.training.loop import Trainer
from xdscale.training.monitor import Monitor
from xdscale.training.prefetch import Prefetcher
from xdscale.training.protocols import MicroBatch, SampleOrder, SampleSlots, StepData
from xdscale.training.resharding import needs_resharding, reshard
from xdscale.training.run_folder import RunFolder, read_log
from xdscale.training.signals import StopRequest
from xdscale.training.skipping import skipped_so_far
from xdscale.training.throughput import matmul_flops_per_second, peak_memory_gib
from xdscale.training.watchdog import Watchdog


class Setup(NamedTuple):
    """What a rank's process has before any data: of a run of adaptation or of finetuning.

    Attributes:
        recipe: with the sections `training`, `optim` and `output`.
        ds_config: the resolved DeepSpeed configuration.
        run: the run folder.
        ranks: this process among the others.
        stop: catches the signals.
        watchdog: hears which phase this rank is in.
    """

    recipe: Any
    ds_config: dict[str, Any]
    run: RunFolder
    ranks: Ranks
    stop: StopRequest
    watchdog: Watchdog


class RunData(NamedTuple):
    """What a rank reads, and how its place in the data is recorded.

    Attributes:
        prepare: makes this rank's data of a step.
        validation: this rank's held-out batches.
        order: which samples a step has.
        stream_hash: maps steps done to the hash of what is drawn next, on all ranks together.
        fingerprint: of the data.
        damaged: what is wrong with each shard that the run does without, by file name.
        prefetch: told some steps ahead that a step's data will be asked for; returns at once.
    """

    prepare: Callable[[int], StepData]
    validation: list[MicroBatch]
    order: SampleOrder
    stream_hash: Callable[[int], str]
    fingerprint: str
    damaged: dict[str, str]
    prefetch: Callable[[int], None] | None = None


class Session(NamedTuple):
    """A module on its engine, the steps done already, and (on the first rank) what changed since the start before."""

    engine: Any
    module: Any
    start_step: int
    continued: bool
    changes: list[str]


def open_session(setup: Setup, data: RunData, build: Callable[[bool], Any]) -> Session:
    """Builds module and engine and continues from the newest undamaged checkpoint, if there is one.

    Args:
        setup: of this process.
        data: what is trained on.
        build: makes the module; it is told whether a checkpoint gives the weights.

    Raises:
        XdscaleError: checkpoints are missing, damaged or of another run, or their steps are more than the recipe's.
    """
    recipe, ds_config, run, ranks = setup.recipe, setup.ds_config, setup.run, setup.ranks
    setup.watchdog.samples = lambda step, micro_batch: _sample_ids(data.order.slots(step), micro_batch)
    found = ckpt.find_checkpoint(run.checkpoints, ranks)
    position = ckpt.read_position(found) if found else None
    ranks.on_first(lambda: run.check_checkpoints(found=found is not None))
    if position is not None:
        if position.step > recipe.training.steps:
            raise XdscaleError(
                f"training.steps = {recipe.training.steps}: the run in {run.folder} has done {position.step} steps "
                "already; ask for as many or more, or choose another output.folder"
            )
        ckpt.check_compatible(
            found,
            position,
            zero_stage=zero_stage(ds_config),
            precision=precision(ds_config),
            data_fingerprint=data.fingerprint,
            stream_hash=data.stream_hash(position.step),
        )
    convert = position is not None and needs_resharding(position, ranks.world_size)
    source = reshard(found, ranks) if convert else found
    torch.manual_seed(recipe.training.seed)
    module = build(position is not None)
    if activation_checkpointing(ds_config):
        module.enable_activation_checkpointing()
    engine = build_engine(module, recipe.optim, ds_config, load_universal=convert)
    if source is not None:
        ckpt.load_checkpoint(engine, source, found, ranks)
        ckpt.remove_leftovers(run.checkpoints, ranks)
    step, continued, changes = position.step if position else 0, position is not None, []
    if ranks.is_first:
        changes = run.write_records(recipe, ds_config, ranks.world_size, step, continued=continued)
    return Session(engine, module, step, continued, changes)


def train_session(setup: Setup, data: RunData, session: Session, weights: dict[str, float]) -> int:
    """Trains to the end or a signal.

    Args:
        setup: of this process.
        data: what is trained on.
        session: where it begins.
        weights: of each objective's mean loss in the total.

    Returns:
        The exit code.
    """
    recipe, ranks, run = setup.recipe, setup.ranks, setup.run
    engine, start_step = session.engine, session.start_step
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(setup.ds_config)]
    monitor = _open_monitor(setup, data, session, list(weights)) if ranks.is_first else None
    history = read_log(run.log) if monitor else []
    validated = any(entry["kind"] == "validation" and entry["step"] == start_step for entry in history)
    due = start_step % recipe.training.eval_every == 0 or start_step == recipe.training.steps
    validate_first, skipped = ranks.gather((due and not validated, skipped_so_far(history)))[0]
    with Prefetcher(data.prepare, range(start_step, recipe.training.steps), hint=data.prefetch) as source:
        trainer = Trainer(
            engine=engine,
            recipe=recipe,
            ranks=ranks,
            weights=weights,
            source=source,
            order=data.order,
            validation=data.validation,
            position=_positions(setup.ds_config, data, ranks),
            flops=session.module.flops,
            matmul_flops_per_second=matmul_flops_per_second(engine.device, dtype),
            run=run.folder,
            checkpoints=run.checkpoints,
            monitor=monitor,
            stop=setup.stop,
            skipped=skipped,
            watchdog=setup.watchdog,
        )
        stopped, step = trainer.train(start_step, validate_first=validate_first)
    peaks_gib = ranks.gather(peak_memory_gib(engine.device))
    if monitor:
        monitor.end(step, peaks_gib, stopped)
    return EXIT_STOPPED if stopped else 0


def _open_monitor(setup: Setup, data: RunData, session: Session, objectives: list[str]) -> Monitor:
    """Opens the records of a run and says how this start begins."""
    training, step = setup.recipe.training, session.start_step
    monitor = Monitor(setup.run, setup.recipe, step, objectives)
    micro_batch = setup.ds_config["train_micro_batch_size_per_gpu"]
    monitor.split(step, split_batch(training.global_batch, setup.ranks.world_size, micro_batch))
    if step:
        monitor.message(f"continuing after step {step} of {training.steps}")
    if session.continued and step == 0:
        monitor.checkpoint(step)  # what stood in the log goes with a start at step 0
    if session.changes:
        monitor.changed(step, session.changes)
    if data.damaged or step:
        monitor.quarantine(step, data.damaged)
    return monitor


def _sample_ids(slots: list[SampleSlots], micro_batch: int | None) -> list[int]:
    """Returns the real samples of a step's slots, or of one micro-batch of them."""
    chosen = slots if micro_batch is None else [slots[micro_batch]]
    return [sample for part in chosen for sample in part.sample_ids[part.real].tolist()]


def _positions(ds_config: dict[str, Any], data: RunData, ranks: Ranks) -> Callable[[int], ckpt.CheckpointPosition]:
    """Returns the function from steps done to the record that a checkpoint keeps of them."""

    def position(step: int) -> ckpt.CheckpointPosition:
        place = data.order.position(step)
        return ckpt.CheckpointPosition(
            step=step,
            epoch=place.epoch,
            index=place.index,
            world_size=ranks.world_size,
            zero_stage=zero_stage(ds_config),
            precision=precision(ds_config),
            data_fingerprint=data.fingerprint,
            stream_hash=data.stream_hash(step),
            quarantined=sorted(data.damaged),
        )

    return position
