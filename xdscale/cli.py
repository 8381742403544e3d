"""The `xdscale` command. Thin: every subcommand imports what it needs when it runs, so that help is instant."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from xdscale.checkpoints import checkpoints_app
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
app.add_typer(checkpoints_app, name="checkpoints", help="List, verify and convert a run's checkpoints.")
kernels_app = typer.Typer(help="What the Triton kernels compile to.", no_args_is_help=True)
app.add_typer(kernels_app, name="kernels")
bench_app = typer.Typer(
    help="Measurements, each against what it replaces, alternately in one run.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")


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
    from xdscale.export import export_run

    print(export_run(Path(run), Path(out), step=step))


@kernels_app.command()
def report(
    write: Annotated[Path | None, typer.Option(help="Markdown file whose table is replaced, docs/kernels.md.")] = None,
    check: Annotated[Path | None, typer.Option(help="Markdown file whose table must be what is measured.")] = None,
) -> None:
    """Compile every shipped kernel for every target, without a GPU: registers, spills, shared memory, bytes."""
    from xdscale.kernel_report import print_report

    print_report(write=write, check=check)


@bench_app.command("kernels")
def bench_kernels_command() -> None:
    """Time the kernels against PyTorch's own (and Liger and Cut-Cross-Entropy on a GPU, when installed)."""
    from xdscale.bench.kernels import bench_kernels

    bench_kernels()


@bench_app.command("step")
def bench_step_command(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe file or name.")] = "xdbert-base-wikitext103",
    against: Annotated[str, typer.Option(help="plain: what the released code computes.")] = "plain",
    pairs: Annotated[int, typer.Option(min=1, help="Alternations.")] = 5,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 2,
) -> None:
    """Time one training step: forward, backward and optimizer, on identical weights, tokens and targets."""
    from xdscale.bench.step import bench_step
    from xdscale.recipe import load_recipe

    bench_step(load_recipe(recipe, overrides or []), against=against, pairs=pairs, sequences=sequences)


def main() -> None:
    """Runs the command line; a user's mistake becomes one message and exit code 2."""
    try:
        app()
    except XdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
