"""`xdscale checkpoints list | verify | reshard`: what a run can continue from, on a machine without GPUs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from xdscale.errors import XdscaleError
from xdscale.names import UserPath

checkpoints_app = typer.Typer(help="List, verify and convert a run's checkpoints.", no_args_is_help=True)

Run = Annotated[UserPath, typer.Argument(help="Run folder.")]
Step = Annotated[int | None, typer.Option(help="Whose checkpoint; default: the newest undamaged one.")]


@checkpoints_app.command("list")
def list_command(run: Run) -> None:
    """Show step, size, ranks, ZeRO stage and precision of every checkpoint; reads the records only."""
    from rich.console import Console
    from rich.table import Table

    from xdscale.training.checkpoint import read_position
    from xdscale.training.checkpoint_folder import UNIVERSAL, step_of
    from xdscale.training.integrity import read_checksums

    table = Table(caption="'xdscale checkpoints verify' hashes the files", box=None)
    for column in ("step", "MiB", "ranks", "stage"):
        table.add_column(column, justify="right")
    for column in ("precision", "converted", "files"):
        table.add_column(column, overflow="fold")
    for path in _checkpoints(run):
        size = f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 2**20:,.1f}"
        try:
            place = read_position(path)
            missing = [name for name in read_checksums(path) if not (path / name).is_file()]
        except XdscaleError as error:
            table.add_row(str(step_of(path)), size, "", "", "", "", str(error))
            continue
        converted = "yes" if path.with_name(UNIVERSAL + path.name).is_dir() else ""
        files = f"missing: {', '.join(missing)}" if missing else "all there"
        ranks, stage = str(place.world_size), str(place.zero_stage)
        table.add_row(str(place.step), size, ranks, stage, place.precision, converted, files)
    Console(markup=False).print(table)


@checkpoints_app.command()
def verify(run: Run) -> None:
    """Hash every file of every checkpoint and name what is damaged; exit code 2 if anything is."""
    from xdscale.training.checkpoint_folder import UNIVERSAL
    from xdscale.training.integrity import damage

    problems = []
    for path in _checkpoints(run):
        for folder in (path, path.with_name(UNIVERSAL + path.name)):
            if folder.is_dir():
                found = damage(folder)
                print(f"{folder.name}: {'damaged' if found else 'verified'}", file=sys.stderr)
                problems += found
    if problems:
        raise XdscaleError("\n".join(problems))


@checkpoints_app.command("reshard")
def reshard_command(run: Run, step: Step = None) -> None:
    """Convert a checkpoint for any number of ranks ahead of time; without this the next start does it by itself."""
    _checkpoints(run)
    from xdscale.training.checkpoint import choose_checkpoint, read_position
    from xdscale.training.distributed import Ranks
    from xdscale.training.resharding import reshard_ahead
    from xdscale.training.run_folder import RunFolder

    RunFolder(run).claim()
    checkpoint = choose_checkpoint(run, step, Ranks(0, 1, 0))
    if read_position(checkpoint).zero_stage == 0:
        raise XdscaleError(f"{checkpoint}: nothing to convert: ZeRO stage 0 loads at any number of ranks")
    print(reshard_ahead(checkpoint))


def _checkpoints(run: Path) -> list[Path]:
    from xdscale.recipe import recipe_file
    from xdscale.training.checkpoint_folder import list_checkpoints, no_checkpoint

    recipe_file(run)
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise no_checkpoint(run)
    return found
