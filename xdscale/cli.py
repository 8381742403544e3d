"""The `xdscale` command. Thin: every subcommand imports what it needs when it runs, so that help is instant."""

import sys
from pathlib import Path
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


@app.command()
def pwcca(
    first: Annotated[str, typer.Argument(help="Language model, exported run, clip:NAME/WEIGHTS or random[:WIDTH].")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    seed: Annotated[int, typer.Option(min=0, help="Of random embeddings and of the words drawn.")] = 0,
    words: Annotated[int | None, typer.Option(min=1, help="Draw so many of the shared words; default: all.")] = None,
    plot: Annotated[Path | None, typer.Option(help=".png or .svg: the correlations beside random ones.")] = None,
) -> None:
    """Compare the word embeddings of two systems (the paper's Table 2)."""
    from xdscale.analysis.commands import print_pwcca

    print_pwcca(first, second, seed=seed, words=words, plot=plot)


@app.command("grounded-ratio")
def grounded_ratio(
    comparisons: Annotated[list[Path], typer.Argument(help=".csv or .jsonl of per-example answers, one per data set.")],
    captions: Annotated[list[str], typer.Option(help="COCO captions JSON, text file or pattern; may be repeated.")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, folder or hub name.")] = "bert-base-uncased",
    threshold: Annotated[int, typer.Option(min=0, help="Grounded is what the captions hold more often.")] = 100,
    stop_words: Annotated[Path | None, typer.Option(help="One word per line; default: NLTK's English list.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs that were counted, to state the gain in %.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV with each example's ratio.")] = None,
    plot: Annotated[Path | None, typer.Option(help=".png or .svg: the box plot.")] = None,
) -> None:
    """Are the examples that improve more visually grounded? (the paper's Figure 4)."""
    from xdscale.analysis.commands import print_grounded_ratio

    print_grounded_ratio(
        comparisons,
        captions=captions,
        tokenizer=tokenizer,
        threshold=threshold,
        stop_words=stop_words,
        runs=runs,
        out=out,
        plot=plot,
    )


@app.command("cross-attention")
def cross_attention(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="Run folder or export.")],
    sentence1: Annotated[str, typer.Option(help="The example.")],
    sentence2: Annotated[str | None, typer.Option(help="Its second sentence, in CLIP blocks of its own.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another run or export, shown beside it.")] = None,
    plot: Annotated[Path | None, typer.Option(help=".png or .svg: the maps.")] = None,
) -> None:
    """Show what language tokens read in CLIP's, layer by layer (the paper's Table 9)."""
    from xdscale.analysis.commands import print_cross_attention

    sentences = [sentence1] if sentence2 is None else [sentence1, sentence2]
    print_cross_attention(folder, sentences=sentences, against=against, plot=plot)


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
