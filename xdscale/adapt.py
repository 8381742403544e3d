"""Entry point of adaptation: `deepspeed [launcher options] --module xdscale.adapt RECIPE [section.key=value …]`."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from xdscale.devices import uses_gpus
from xdscale.ds_config import (
    activation_checkpointing,
    check_sections,
    precision,
    read_ds_config,
    resolve_ds_config,
    split_batch,
    zero_stage,
)
from xdscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, XdscaleError, writing
from xdscale.recipe import Recipe, load_recipe
from xdscale.training.signals import StopRequest
from xdscale.training.words import outlast_listeners

_SECONDS_FOR_FIRST_RANK_TO_SPEAK = 5


def main(arguments: list[str] | None = None) -> int:
    """Adapts a language encoder as a recipe says.

    Args:
        arguments: command line, without the program's name.

    Returns:
        Exit code: 0 done, 2 bad input (one message, no traceback), 70 a rank died, hung or failed (one line says
        which), 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C with the last finished step on the disk, so that the same
        command continues.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    outlast_listeners()
    # From here on a signal is remembered: it is honoured before the next step, however long building takes.
    with StopRequest() as stop:
        try:
            return _adapt(options, stop)
        except XdscaleError as error:
            if os.environ.get("RANK", "0") == "0" or not _told_to_end(stop):
                print(f"error: {error}", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT


def _told_to_end(stop: StopRequest) -> bool:
    """Waits a little; returns whether the launcher ends this rank, because the first one ended and has said why.

    What concerns all ranks only the first one should say.
    """
    deadline = time.monotonic() + _SECONDS_FOR_FIRST_RANK_TO_SPEAK
    before = stop.requested
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if stop.requested and not before:
            return True
    return False


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xdscale.adapt", description=__doc__)
    parser.add_argument("recipe", help="YAML file or name of a shipped recipe ('xdscale recipes' lists them)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe values to replace")
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="DeepSpeed JSON, or a name from ds_configs/"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_intermixed_args(arguments)


class RunData(NamedTuple):
    """What a rank reads, and how its place in the data is recorded."""

    prepare: Any
    validation: list[Any]
    order: Any
    stream_hash: Any
    fingerprint: str
    damaged: dict[str, str]


def _adapt(options: argparse.Namespace, stop: StopRequest) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    ds_values = read_ds_config(options.deepspeed_config)
    calm_environment()
    from xdscale.export import save_language_files
    from xdscale.training.distributed import start_distributed
    from xdscale.training.run_folder import RunFolder
    from xdscale.training.watchdog import Watchdog

    ranks = start_distributed()
    check_sections(options.deepspeed_config, ds_values)
    ds_config = resolve_ds_config(options.deepspeed_config, ds_values, recipe, ranks.world_size)
    check_precision(options.deepspeed_config, ds_config)
    run = RunFolder(Path(recipe.output.folder))
    with Watchdog(ranks, run.folder, recipe.training.hang_seconds) as watchdog:
        try:
            ranks.on_first(lambda: run.check(recipe))
            data = open_data(recipe, ds_config, ranks, on_shard=watchdog.tick)
            watchdog.samples = lambda step, micro_batch: sample_ids(data.order.slots(step), micro_batch)
            ranks.on_first(run.claim)
            run.check_shared(ranks)
            session = open_session(
                recipe, ds_config, run, data, ranks, lambda continued: build_module(recipe, continued=continued)
            )
            if session.start_step == 0 and ranks.is_first:
                with writing("the encoder's configuration and tokenizer", run.language):
                    save_language_files(recipe.model.language, run.language)
            weights = recipe.tasks.weights()
            code = train_session(recipe, ds_config, run, data, ranks, stop, watchdog, session, weights)
            watchdog.end()
            return code
        except Exception as error:
            return watchdog.report(error, stopping=stop.requested)


def sample_ids(slots: list[Any], micro_batch: int | None) -> list[int]:
    """Returns the real samples of a step's slots, or of one micro-batch of them."""
    chosen = slots if micro_batch is None else [slots[micro_batch]]
    return [sample for part in chosen for sample in part.sample_ids[part.real].tolist()]


def calm_environment() -> None:
    """Settings that must stand before torch's and DeepSpeed's first import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # ranks that cannot meet print pages of C++
    # DeepSpeed calls names that torch is about to rename; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Torch would give each rank all cores, torchrun gives one; AdamW on the host, for offloading, needs its share.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_torchrun or "OMP_NUM_THREADS" not in os.environ:
        threads = threads_per_rank()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    if not uses_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def threads_per_rank() -> int:
    """Returns this rank's share of its machine's cores."""
    bound = len(os.sched_getaffinity(0))
    # Slurm may bind each rank to cores of its own, which are then not shared once more.
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", bound))
    ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(bound, cores // ranks))


def check_precision(name: str, ds_config: dict[str, Any]) -> None:
    """Refuses bf16 on a GPU that does not compute in it: PyTorch would imitate it there, many times slower.

    Args:
        name: the DeepSpeed configuration's file, for the message.
        ds_config: its values.

    Raises:
        XdscaleError: names the GPU and what to choose.
    """
    import torch

    if precision(ds_config) == "bf16" and uses_gpus() and not computes_in_bf16():
        raise XdscaleError(
            f"{name}: bf16 = enabled, but this machine's {torch.cuda.get_device_name()} does not compute in bf16; "
            'take a shipped file whose name ends in -fp16, or write "fp16": {"enabled": true} in place of "bf16"'
        )


def computes_in_bf16() -> bool:
    """Returns whether this rank's GPU has instructions for bf16."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def open_data(
    recipe: Recipe, ds_config: dict[str, Any], ranks: Any, *, on_shard: Callable[[], None] | None = None
) -> RunData:
    """Finds the shards and sets the streams up; `on_shard` is called as they are verified."""
    from xdscale.data.collate import XDBERTCollator
    from xdscale.data.draws import draws_hash
    from xdscale.data.opening import open_shards
    from xdscale.data.order import Order, sample_hash, validation_slots
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.table import Table
    from xdscale.tasks.xdbert import check_shards
    from xdscale.training.protocols import StepData

    folder, damaged = open_shards(
        recipe.data, ranks, check=lambda folder: check_shards(recipe.model, Manifest.load(folder)), on_shard=on_shard
    )
    train = Table(folder, "train", quarantined=damaged)
    training, micro_batch = recipe.training, ds_config["train_micro_batch_size_per_gpu"]
    order = Order(
        len(train),
        seed=training.seed,
        global_batch=training.global_batch,
        world_size=ranks.world_size,
        rank=ranks.rank,
        micro_batch=micro_batch,
    )
    collate = XDBERTCollator(train, seed=training.seed, tasks=recipe.tasks)

    def prepare(step: int) -> StepData:
        return StepData([collate(slots) for slots in order.slots(step)], sample_hash(*order.global_batch_ids(step)))

    def stream_hash(step: int) -> str:
        return draws_hash(collate, *order.global_batch_ids(step))

    held_out = Table(folder, "validation", quarantined=damaged)
    collate_held_out = XDBERTCollator(held_out, seed=training.seed, tasks=recipe.tasks)
    slots = validation_slots(len(held_out), training.eval_samples, ranks.world_size, ranks.rank, micro_batch)
    validation = [collate_held_out(item) for item in slots]
    return RunData(prepare, validation, order, stream_hash, train.manifest.fingerprint, damaged)


def build_module(recipe: Recipe, *, continued: bool) -> Any:
    """Builds the module that a run begins with: as `build_adaptation`, or with the weights of `model.start`.

    Args:
        recipe: of the run.
        continued: whether a checkpoint of the run gives the weights; the folder that it began with may be gone then.

    Raises:
        XdscaleError: weights are missing, damaged or do not fit.
    """
    from xdscale.encoder import begin_with
    from xdscale.names import resolve_path
    from xdscale.tasks.xdbert import build_adaptation

    module = build_adaptation(recipe)
    if recipe.model.start is not None and not continued:
        begin_with(module, resolve_path(recipe.model.start))
    return module


class Session(NamedTuple):
    """A module on its engine, the steps done already, and (on the first rank) what changed since the start before."""

    engine: Any
    module: Any
    start_step: int
    continued: bool
    changes: list[str]


def open_session(
    recipe: Any, ds_config: dict[str, Any], run: Any, data: RunData, ranks: Any, build: Callable[[bool], Any]
) -> Session:
    """Builds module and engine and continues from the newest undamaged checkpoint, if there is one.

    `build` is told whether it does.
    """
    import torch

    from xdscale.training import checkpoint as ckpt
    from xdscale.training.engine import build_engine
    from xdscale.training.resharding import needs_resharding, reshard

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


def train_session(
    recipe: Any,
    ds_config: dict[str, Any],
    run: Any,
    data: RunData,
    ranks: Any,
    stop: StopRequest,
    watchdog: Any,
    session: Session,
    weights: dict[str, float],
) -> int:
    """Trains to the end or a signal; returns the exit code."""
    import torch

    from xdscale.data.prefetch import Prefetcher
    from xdscale.training.loop import Trainer
    from xdscale.training.monitor import Monitor
    from xdscale.training.run_folder import read_log
    from xdscale.training.skipping import skipped_so_far
    from xdscale.training.throughput import matmul_flops_per_second, peak_memory_gib

    engine, module, start_step, continued, changes = session
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(ds_config)]
    monitor = Monitor(run, recipe, start_step, list(weights)) if ranks.is_first else None
    if monitor:
        monitor.split(
            start_step,
            split_batch(recipe.training.global_batch, ranks.world_size, ds_config["train_micro_batch_size_per_gpu"]),
        )
    if monitor and start_step:
        monitor.message(f"continuing after step {start_step} of {recipe.training.steps}")
    if monitor and continued and start_step == 0:
        monitor.checkpoint(start_step)  # what stood in the log goes with a start at step 0
    if monitor and changes:
        monitor.changed(start_step, changes)
    if monitor and (data.damaged or start_step):
        monitor.quarantine(start_step, data.damaged)
    history = read_log(run.log) if monitor else []
    validated = any(entry["kind"] == "validation" and entry["step"] == start_step for entry in history)
    due = start_step % recipe.training.eval_every == 0 or start_step == recipe.training.steps
    validate_first, skipped = ranks.gather((due and not validated, skipped_so_far(history)))[0]
    with Prefetcher(data.prepare, range(start_step, recipe.training.steps)) as source:
        trainer = Trainer(
            engine=engine,
            recipe=recipe,
            ranks=ranks,
            weights=weights,
            source=source,
            order=data.order,
            validation=data.validation,
            position=_positions(ds_config, data, ranks),
            flops=module.flops,
            matmul_flops_per_second=matmul_flops_per_second(engine.device, dtype),
            run=run.folder,
            checkpoints=run.checkpoints,
            monitor=monitor,
            stop=stop,
            skipped=skipped,
            watchdog=watchdog,
        )
        stopped, step = trainer.train(start_step, validate_first=validate_first)
    peaks_gib = ranks.gather(peak_memory_gib(engine.device))
    if monitor:
        monitor.end(step, peaks_gib, stopped)
    return EXIT_STOPPED if stopped else 0


def _positions(ds_config: dict[str, Any], data: RunData, ranks: Any) -> Any:
    """Returns the function from steps done to the record that a checkpoint keeps of them."""
    from xdscale.training.checkpoint import CheckpointPosition

    def position(step: int) -> CheckpointPosition:
        place = data.order.position(step)
        return CheckpointPosition(
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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without the interpreter's orderly shutdown: after an error other ranks may still wait in a collective for us.
    os._exit(code)
