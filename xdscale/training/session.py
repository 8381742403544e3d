"""A run on its engine: opened, continued where it stopped, trained to the end or to a signal; whatever is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xdscale.data.draws import draws_hash
from xdscale.data.order import sample_hash
from xdscale.ds_config import activation_checkpointing, precision, split_batch, zero_stage
from xdscale.errors import EXIT_STOPPED, XdscaleError, writing
from xdscale.recipe import Recipe
from xdscale.systems.contract import Data, Objective, Place, Slots, System, recompute_activations
from xdscale.training import checkpoint as ckpt
from xdscale.training import checkpoint_folder
from xdscale.training.best import best_so_far, check_held_out, check_metric, final_step
from xdscale.training.consolidate import final_state
from xdscale.training.distributed import Ranks
from xdscale.training.engine import build_engine, put_weights
from xdscale.training.loop import Trainer
from xdscale.training.monitor import Monitor
from xdscale.training.prefetch import Prefetcher, StepData
from xdscale.training.resharding import needs_resharding, reshard
from xdscale.training.run_folder import RunFolder, read_log
from xdscale.training.signals import StopRequest
from xdscale.training.skipping import skipped_so_far
from xdscale.training.stored import build_module
from xdscale.training.throughput import matmul_flops_per_second, peak_memory_gib
from xdscale.training.tracing import TracedFlops, on_meta
from xdscale.training.watchdog import Watchdog
from xdscale.training.weight_average import WeightAverage, using


class Setup(NamedTuple):
    """What a rank's process has before any data.

    Attributes:
        recipe: of the run.
        ds_config: the resolved DeepSpeed configuration.
        run: the run folder.
        ranks: this process among the others.
        stop: catches the signals.
        watchdog: hears which phase this rank is in.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    run: RunFolder
    ranks: Ranks
    stop: StopRequest
    watchdog: Watchdog


class Session(NamedTuple):
    """A module on its engine, its moving average, the steps done, and (on the first rank) what changed since before.

    `shapes` is the module without values, as it was before the engine took it, or why it has no copy.
    """

    engine: Any
    shapes: Any
    average: WeightAverage | None
    start_step: int
    continued: bool
    changes: list[str]


def train_run(
    system: System,
    ds_config: dict[str, Any],
    ranks: Ranks,
    stop: StopRequest,
    say: Callable[[str], None] = print,
) -> int:
    """Trains a recipe from its run folder's newest checkpoint, or from the start, and does what follows the last step.

    Args:
        system: of the recipe.
        ds_config: resolved DeepSpeed configuration.
        ranks: this process among the others.
        stop: catches the signals.
        say: gets, on the first rank, what a person should know of the data.

    Returns:
        The exit code: 0 done, 75 after a signal with a checkpoint, else the failure's, said on stderr.
    """
    recipe = system.recipe
    run = RunFolder(Path(recipe.output.folder))
    with Watchdog(ranks, run.folder, recipe.run.hang_seconds) as watchdog:
        try:
            ranks.on_first(lambda: run.check(recipe))
            check_metric(recipe.training, system.objectives())
            data = system.open(Place(ranks, ds_config["train_micro_batch_size_per_gpu"], watchdog.tick))
            if ranks.is_first:
                for note in data.notes:
                    say(note)
            check_held_out(recipe.training, system.objectives(), data.validation, ranks)
            ds_config |= {"gradient_accumulation_steps": len(data.order.slots(0))}
            setup = Setup(recipe, ds_config, run, ranks, stop, watchdog)
            ranks.on_first(run.claim)
            run.check_shared(ranks)
            session = open_session(setup, data, system)
            if session.start_step == 0 and ranks.is_first:
                with writing("what exporting needs", run.folder):
                    system.keep(run.folder)
            code = train_session(setup, data, session, system.objectives())
            if code == 0 and not recipe.stops_early:
                code = finish(system, setup, session)
            watchdog.end()
            session.engine.destroy()
            return code
        except Exception as error:
            return watchdog.report(error, stopping=stop.requested)
        finally:
            run.release()


def open_session(setup: Setup, data: Data, system: System) -> Session:
    """Builds module and engine and continues from the newest undamaged checkpoint, if there is one.

    Args:
        setup: of this process.
        data: what is trained on.
        system: builds the module.

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
            data_fingerprints=data.fingerprints,
            draws_hash=_draws_hash(data, position.step),
        )
    convert = position is not None and needs_resharding(position, ranks.world_size)
    source = reshard(found, ranks) if convert else found
    torch.manual_seed(recipe.training.seed)
    module = build_module(system, continued=position is not None)
    try:
        shapes = on_meta(module)
    except Exception as error:  # such as one that holds a lock: only a figure needs the copy
        shapes = error.with_traceback(None)  # which would keep all of this frame
    if activation_checkpointing(ds_config):
        recompute_activations(module)
    parts = system.parts(module)
    engine = build_engine(module, recipe.optim, ds_config, load_universal=convert, parts=parts)
    if source is not None:
        ckpt.load_checkpoint(engine, source, found, ranks)
    average = WeightAverage(engine, recipe.optim.ema_decay, ranks) if recipe.optim.ema_decay else None
    if source is not None:
        if average is not None:
            average.load(found)
        checkpoint_folder.remove_leftovers(run.checkpoints, ranks)
    step, continued, changes = position.step if position else 0, position is not None, []
    if ranks.is_first:
        changes = run.write_records(recipe, ds_config, ranks.world_size, step, continued=continued)
    return Session(engine, shapes, average, step, continued, changes)


def train_session(setup: Setup, data: Data, session: Session, objectives: dict[str, Objective]) -> int:
    """Trains to the end or a signal.

    Args:
        setup: of this process.
        data: what is trained on.
        session: where it begins.
        objectives: of the system.

    Returns:
        The exit code.
    """
    recipe, ranks, run = setup.recipe, setup.ranks, setup.run
    engine, start_step = session.engine, session.start_step
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(setup.ds_config)]
    monitor = _open_monitor(setup, data, session, objectives) if ranks.is_first else None
    history = read_log(run.log) if monitor else []
    validated = any(entry["kind"] == "validation" and entry["step"] == start_step for entry in history)
    due = start_step % recipe.run.eval_every == 0 or start_step == recipe.training.steps
    mine = due and not validated, skipped_so_far(history), best_so_far(recipe.training, history)
    validate_first, skipped, best = ranks.gather(mine)[0]

    def prepare(step: int) -> StepData:
        batches = [data.collate(slots) for slots in data.order.slots(step)]
        return StepData(batches, sample_hash(*data.order.global_batch_ids(step)))

    def hint(step: int) -> None:
        data.collate.prefetch(data.order.slots(step))

    steps = range(start_step, recipe.training.steps)
    with Prefetcher(prepare, steps, hint=hint if data.remote else None) as source:
        trainer = Trainer(
            engine=engine,
            average=session.average,
            recipe=recipe,
            ranks=ranks,
            objectives=objectives,
            source=source,
            order=data.order,
            validation=data.validation,
            position=_positions(setup.ds_config, data, ranks),
            flops=TracedFlops(session.shapes, objectives, monitor.message if monitor else print),
            matmul_flops_per_second=matmul_flops_per_second(engine.device, dtype),
            run=run.folder,
            checkpoints=run.checkpoints,
            monitor=monitor,
            stop=setup.stop,
            skipped=skipped,
            best=best,
            watchdog=setup.watchdog,
        )
        stopped, step = trainer.train(start_step, validate_first=validate_first)
    peaks_gib = ranks.gather(peak_memory_gib(engine.device))
    if monitor:
        monitor.end(step, peaks_gib, stopped)
    return EXIT_STOPPED if stopped else 0


def finish(system: System, setup: Setup, session: Session) -> int:
    """Has a system do what follows the last step, with the weights that the run gives others.

    Args:
        system: of the recipe.
        setup: of this process.
        session: at its end.

    Returns:
        The exit code.
    """
    if type(system).finish is System.finish:
        return 0  # nothing follows, for which every rank would read a whole checkpoint
    run = setup.run.folder
    best = setup.ranks.gather(final_step(run, setup.recipe))[0]
    if best is not None:
        put_weights(session.engine, final_state(ckpt.choose_checkpoint(run, best, Ranks(0, 1, 0))))
    with using(session.average if best is None else None):
        return system.finish(setup, session.engine)


def _open_monitor(setup: Setup, data: Data, session: Session, objectives: dict[str, Objective]) -> Monitor:
    """Opens the records of a run and says how this start begins."""
    training, step = setup.recipe.training, session.start_step
    monitor = Monitor(setup.run, setup.recipe, step, objectives)
    if training.batch_tokens is None:
        micro_batch = setup.ds_config["train_micro_batch_size_per_gpu"]
        monitor.split(step, split_batch(training.global_batch, setup.ranks.world_size, micro_batch))
    else:
        monitor.split(step, data.order.split)
    if step:
        monitor.message(f"continuing after step {step} of {training.steps}")
    if session.continued and step == 0:
        monitor.checkpoint(step)  # what stood in the log goes with a start at step 0
    if session.changes:
        monitor.changed(step, session.changes)
    if data.damaged or step:
        monitor.quarantine(step, data.damaged)
    return monitor


def _sample_ids(slots: list[Slots], micro_batch: int | None) -> list[int]:
    """Returns the real samples of a step's slots, or of one micro-batch of them."""
    chosen = slots if micro_batch is None else [slots[micro_batch]]
    return [sample for part in chosen for sample in part.sample_ids[part.real].tolist()]


def _draws_hash(data: Data, step: int) -> str:
    """Returns the hash of what is drawn next, on all ranks together."""
    return draws_hash(data.collate, *data.order.global_batch_ids(step))


def _positions(ds_config: dict[str, Any], data: Data, ranks: Ranks) -> Callable[[int], ckpt.CheckpointPosition]:
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
            data_fingerprints=data.fingerprints,
            draws_hash=_draws_hash(data, step),
            quarantined=sorted(data.damaged),
        )

    return position
