"""The `xdscale` command. Thin: every subcommand imports what it needs when it runs, so that help is instant."""

import sys
from typing import Annotated

import typer

from xdscale.errors import EXIT_BAD_INPUT, XdscaleError
from xdscale.shards.commands import shards_app

app = typer.Typer(
    help="Adapt language encoders with CLIP's visual knowledge, at scale. "
    "Training starts with: deepspeed --module xdscale.adapt RECIPE --deepspeed_config ds_configs/FILE.json",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards_app, name="shards", help="Build, verify and inspect tar shards.")


@app.command()
def recipes() -> None:
    """List the recipes that ship with xdscale."""
    from xdscale.recipe import SHIPPED, shipped_recipes

    for name in shipped_recipes():
        with (SHIPPED / f"{name}.yaml").open(encoding="utf-8") as file:
            print(f"{name:32} {file.readline().lstrip('# ').rstrip()}")


@app.command()
def params(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
) -> None:
    """Count a recipe's parameters, part by part (the paper's Table 6)."""
    from xdscale.params import print_parameters
    from xdscale.recipe import load_recipe

    print_parameters(load_recipe(recipe, overrides or []))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    out: Annotated[str, typer.Argument(help="New folder for the Hugging Face export.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to export; default: the newest undamaged one.")] = None,
) -> None:
    """Write the adapted language encoder as a Hugging Face folder, with the full cross-modal model inside it."""
    from pathlib import Path

    from xdscale.export import export_run

    print(export_run(Path(run), Path(out), step=step))


def main() -> None:
    """Runs the command line; a user's mistake becomes one message and exit code 2."""
    try:
        app()
    except XdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
