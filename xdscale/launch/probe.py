"""One rank of `xdscale doctor`: `python -m xdscale.launch.probe [RECIPE …]`, started on all machines as training is.

Ranks meet in a TCP store at the first rank, which is told every machine's facts, serves its clock, leaves a token in
the output folder, and prints the verdict after an all-reduce. Every wait has an end, and says what it waited for.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from xdscale.errors import EXIT_BAD_INPUT, XdscaleError
from xdscale.launch.hosts import parse_hosts, rank_names
from xdscale.recipe import Recipe, load_recipe

_WEIGHTS = 8
"""Bytes per parameter: as computed with (4 in fp32, 2 in bf16), and its fp32 master (4)."""


def main(arguments: list[str] | None = None) -> int:
    """Examines this machine as part of a group.

    Args:
        arguments: command line, without the program's name.

    Returns:
        Exit code: on the first rank 0 when nothing is wrong (warnings allowed), else 2; on others 2 when they cannot
        reach the first.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
        store = _meet(rank, world_size, options.timeout)
        if rank == 0:
            code = _lead(store, world_size, recipe, options)
            sys.stdout.flush()
            return code
        return _follow(store, rank, world_size, recipe, options.timeout)
    except XdscaleError as error:
        problem = str(error)
    except OSError as error:  # standard output is full, say
        problem = str(error)
    except RuntimeError as error:  # the store's: another rank died, or a connection did
        problem = f"lost the connection to the other ranks: {str(error).splitlines()[0]}"
    print(f"error: rank {rank}: {problem}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xdscale.launch.probe", description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--hosts", help="names and ranks of the machines, for messages")
    parser.add_argument("--timeout", type=int, default=120, help="seconds to wait for machines")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_intermixed_args(arguments)


def _meet(rank: int, world_size: int, timeout_seconds: int) -> Any:
    from torch.distributed import TCPStore

    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    try:
        return TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        advice = (
            "take another port with --master-port"
            if rank == 0
            else "check that the first machine's doctor runs, that its name is right (--master-addr), and the firewall"
        )
        raise XdscaleError(f"cannot meet at {address}:{port} within {timeout_seconds} s: {reason}; {advice}") from None


def _lead(store: Any, world_size: int, recipe: Recipe | None, options: argparse.Namespace) -> int:
    """First rank: asks, serves, judges, prints."""
    from xdscale.launch.exchange import OutputToken, answers, serve_clock
    from xdscale.launch.facts import HostFacts
    from xdscale.launch.report import print_report
    from xdscale.launch.verdict import Evidence

    names = rank_names(parse_hosts(options.hosts)) if options.hosts else [""] * world_size
    evidence = Evidence(names=names)
    own = _facts(0, recipe)  # before the model's imports, which set environment variables
    token = OutputToken(Path(recipe.output.folder)) if recipe else None
    try:
        if token:
            evidence.output_folder = recipe.output.folder
            evidence.needed_bytes = needed_bytes(recipe)
            token.leave()
        store.set("token", token.text if token else "")
        store.set("facts/0", json.dumps(own))
        evidence.silent, heard = answers(store, "facts", range(world_size), options.timeout)
        evidence.hosts = [HostFacts(**facts) for facts in heard.values() if facts]
        store.set("go", "stop" if evidence.silent else "go")
        machines = [facts.rank for facts in evidence.hosts]
        if not evidence.silent:
            evidence.clock_offsets = serve_clock(store, machines[1:]) | {0: 0.0}
            if token:
                evidence.output_problems = token.problems(store, machines, options.timeout)
            evidence.collective = _try_collective(store, 0, world_size, options.timeout)
            ended, heard = answers(store, "collective", range(world_size), options.timeout)
            problems = {number: problem for number, problem in heard.items() if problem}
            evidence.collective_problems = problems | dict.fromkeys(ended, "ended during the all-reduce")
    finally:
        if token:
            token.remove()
    return print_report(evidence)


def _follow(store: Any, rank: int, world_size: int, recipe: Recipe | None, timeout_seconds: int) -> int:
    """Other ranks: answer what the first one asks."""
    from xdscale.launch.exchange import ask_clock, follow_token

    is_machines_first = os.environ.get("LOCAL_RANK", "0") == "0"
    token = store.get("token").decode()
    store.set(f"facts/{rank}", json.dumps(_facts(rank, recipe) if is_machines_first else None))
    if store.get("go") == b"stop":
        return 0
    if is_machines_first:
        ask_clock(store, rank)
        if recipe:
            follow_token(store, rank, Path(recipe.output.folder), token)
    _try_collective(store, rank, world_size, timeout_seconds)
    return 0


def _facts(rank: int, recipe: Recipe | None) -> dict[str, object]:
    from xdscale.launch.facts import HostFacts

    return asdict(HostFacts.of_this_machine(rank, int(os.environ.get("LOCAL_SIZE", "1")), recipe))


def _try_collective(store: Any, rank: int, world_size: int, timeout_seconds: int) -> Any:
    """Sums over all ranks, tells the first one how it went, and returns what this one saw."""
    from xdscale.launch.collective import all_reduce_twice

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    outcome = all_reduce_twice(store, rank, world_size, local_rank, timeout_seconds)
    store.set(f"collective/{rank}", json.dumps(outcome.problem))
    return outcome


def needed_bytes(recipe: Recipe) -> int:
    """Returns the room for all checkpoints that are kept, the best one among them, and the one being written."""
    kept = recipe.run.keep_checkpoints + (recipe.training.best is not None)
    return (kept + 1) * checkpoint_bytes(recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Estimates one checkpoint; precision and ZeRO stage change little of it.

    Raises:
        XdscaleError: the model cannot be built from the recipe.
    """
    from xdscale.plan.profile import parameter_table
    from xdscale.plan.settings import kept_bytes

    return (_WEIGHTS + kept_bytes(recipe.optim)) * parameter_table(recipe)[-1].parameters


if __name__ == "__main__":
    code = main()
    # Without the interpreter's orderly shutdown: a thread may still wait in a collective that never comes.
    os._exit(code)
