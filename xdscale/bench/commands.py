"""`xdscale bench …`. Heavy imports stand inside the commands: `--help` must be quick."""

from pathlib import Path
from typing import Annotated

import typer

from xdscale.names import UserPath

bench_app = typer.Typer(
    help="Measurements, each against what it replaces, alternately in one run.", no_args_is_help=True
)


@bench_app.command("kernels")
def bench_kernels_command(
    out: Annotated[UserPath | None, typer.Option(help="File for the rows as JSON lines.")] = None,
) -> None:
    """Time the kernels against PyTorch's own (and Liger and Cut-Cross-Entropy on a GPU, when installed)."""
    from xdscale.bench.kernels import bench_kernels

    bench_kernels(out)


@bench_app.command("step")
def bench_step_command(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe file or name.")] = "xdbert-base-wikitext103",
    against: Annotated[
        str,
        typer.Option(help="plain: what others compute, as published; fp32 leaves that out, of XDBERT alone."),
    ] = "plain",
    pairs: Annotated[int, typer.Option(min=1, help="Alternations.")] = 5,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Per step; default: 2, with features of image regions 8.")
    ] = None,
) -> None:
    """Time one training step: forward, backward and optimizer, on identical weights, tokens and targets."""
    from xdscale.bench.step import bench_step
    from xdscale.recipe import load_recipe

    bench_step(load_recipe(recipe, overrides or []), against=against, pairs=pairs, sequences=sequences)


@bench_app.command("stream")
def bench_stream_command(
    shards: Annotated[
        UserPath | None, typer.Option(help="Dataset; default: gensim's slice of Wikipedia, built anew.")
    ] = None,
    samples: Annotated[int, typer.Option(min=256, help="Samples of the comparison.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=3, help="Alternations.")] = 3,
) -> None:
    """Read shards in global random order against webdataset's per-sample tars; start, seek, memory."""
    import tempfile

    from xdscale.bench.stream import bench_stream, build_wikipedia_slice

    with tempfile.TemporaryDirectory(prefix="xdscale-bench-") as folder:
        bench_stream(shards or build_wikipedia_slice(Path(folder) / "shards"), samples=samples, rounds=rounds)


@bench_app.command("regions")
def bench_regions_command(
    regions: Annotated[
        UserPath | None, typer.Option(help="Dataset with a table of regions whose images are taken; default: drawn.")
    ] = None,
    images: Annotated[int, typer.Option(min=64, help="Images of the comparison.")] = 400,
    rounds: Annotated[int, typer.Option(min=3, help="Alternations.")] = 5,
) -> None:
    """Read image regions in random order against UNITER's and ViLBERT's LMDB and hdf5; bytes, start, memory."""
    from xdscale.bench.regions import bench_regions

    bench_regions(regions, images=images, rounds=rounds)


@bench_app.command("shards")
def bench_shards_command(
    inputs: Annotated[list[str], typer.Argument(help="Corpus files, folders or quoted patterns.")],
    language_tokenizer: Annotated[
        str, typer.Option(help="tokenizer.json or vocab.txt, folder, package:NAME/folder or hub name.")
    ],
    text_mb: Annotated[float, typer.Option(min=0.1, help="Millions of bytes of text; the corpus is repeated.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Alternations.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the parallel build.")] = 2,
) -> None:
    """Time building shards against the bare tokenizers library on the same text."""
    from xdscale.bench.shards import bench_shards

    bench_shards(inputs, language_tokenizer, text_mb=text_mb, rounds=rounds, workers=workers)
