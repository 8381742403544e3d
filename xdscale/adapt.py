"""Entry point of adaptation: `deepspeed [launcher options] --module xdscale.adapt RECIPE [section.key=value …]`."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdscale.ds_config import check_sections, read_ds_config, resolve_ds_config
from xdscale.errors import EXIT_BAD_INPUT, XdscaleError, writing
from xdscale.recipe import Recipe, load_recipe
from xdscale.training.environment import calm_environment, check_precision
from xdscale.training.signals import StopRequest
from xdscale.training.words import outlast_listeners

if TYPE_CHECKING:
    from xdscale.training.session import RunData

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


def _adapt(options: argparse.Namespace, stop: StopRequest) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    ds_values = read_ds_config(options.deepspeed_config)
    calm_environment()
    from xdscale.export import save_language_files
    from xdscale.training.distributed import start_distributed
    from xdscale.training.run_folder import RunFolder
    from xdscale.training.session import Setup, open_session, train_session
    from xdscale.training.watchdog import Watchdog

    ranks = start_distributed()
    check_sections(options.deepspeed_config, ds_values)
    ds_config = resolve_ds_config(options.deepspeed_config, ds_values, recipe, ranks.world_size)
    check_precision(options.deepspeed_config, ds_config)
    run = RunFolder(Path(recipe.output.folder))
    with Watchdog(ranks, run.folder, recipe.training.hang_seconds) as watchdog:
        setup = Setup(recipe, ds_config, run, ranks, stop, watchdog)
        try:
            ranks.on_first(lambda: run.check(recipe))
            data = open_data(recipe, ds_config, ranks, on_shard=watchdog.tick)
            ranks.on_first(run.claim)
            run.check_shared(ranks)
            session = open_session(setup, data, lambda continued: build_module(recipe, continued=continued))
            if session.start_step == 0 and ranks.is_first:
                with writing("the encoder's configuration and tokenizer", run.language):
                    save_language_files(recipe.model.language, run.language)
            code = train_session(setup, data, session, recipe.tasks.weights())
            watchdog.end()
            return code
        except Exception as error:
            return watchdog.report(error, stopping=stop.requested)


def open_data(
    recipe: Recipe, ds_config: dict[str, Any], ranks: Any, *, on_shard: Callable[[], None] | None = None
) -> "RunData":
    """Finds the shards and opens them for training and validation; `on_shard` is called as they are verified."""
    from xdscale.data.collate import XDBERTCollator
    from xdscale.data.draws import draws_hash
    from xdscale.data.opening import open_shards
    from xdscale.data.order import Order, sample_hash, validation_slots
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.sources.text_build import TEXT
    from xdscale.tasks.xdbert import check_shards
    from xdscale.training.protocols import StepData
    from xdscale.training.session import RunData

    shards = open_shards(
        recipe.data, ranks, check=lambda folder: check_shards(recipe.model, Manifest.load(folder)), on_shard=on_shard
    )
    train = shards.table("train", TEXT)
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

    def prefetch(step: int) -> None:
        collate.prefetch(order.slots(step))

    held_out = shards.table("validation", TEXT)
    collate_held_out = XDBERTCollator(held_out, seed=training.seed, tasks=recipe.tasks)
    slots = validation_slots(len(held_out), training.eval_samples, ranks.world_size, ranks.rank, micro_batch)
    validation = [collate_held_out(item) for item in slots]
    ahead = prefetch if shards.cache is not None else None
    return RunData(prepare, validation, order, stream_hash, train.manifest.fingerprint, shards.damaged, ahead)


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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without the interpreter's orderly shutdown: after an error other ranks may still wait in a collective for us.
    os._exit(code)
