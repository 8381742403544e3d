"""Entry point of every training: `deepspeed [launcher options] --module xdscale.train RECIPE [section.key=value …]`."""

import argparse
import os
import sys
import time

from xdscale.ds_config import read_ds_config, resolve_ds_config
from xdscale.errors import EXIT_BAD_INPUT, XdscaleError
from xdscale.recipe import load_recipe
from xdscale.systems.contract import open_system
from xdscale.training.environment import calm_environment, check_precision
from xdscale.training.signals import StopRequest
from xdscale.training.words import outlast_listeners

_SECONDS_FOR_FIRST_RANK_TO_SPEAK = 5


def main(arguments: list[str] | None = None) -> int:
    """Trains what a recipe says.

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
            return _train(options, stop)
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
    parser = argparse.ArgumentParser(prog="xdscale.train", description=__doc__)
    parser.add_argument("recipe", help="YAML file or name of a shipped recipe ('xdscale recipes' lists them)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe values to replace")
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="DeepSpeed JSON, or a name from ds_configs/"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_intermixed_args(arguments)


def _train(options: argparse.Namespace, stop: StopRequest) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    ds_values = read_ds_config(options.deepspeed_config)
    calm_environment()
    from xdscale.training.distributed import start_distributed
    from xdscale.training.session import train_run

    ranks = start_distributed()
    ds_config = resolve_ds_config(options.deepspeed_config, ds_values, recipe, ranks.world_size)
    check_precision(options.deepspeed_config, ds_config)
    return train_run(open_system(recipe), ds_config, ranks, stop)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without the interpreter's orderly shutdown: after an error other ranks may still wait in a collective for us.
    os._exit(code)
