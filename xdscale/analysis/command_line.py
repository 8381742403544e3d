"""`xdscale pwcca | grounded-ratio | cross-attention`, and the analyses that systems bring; `--help` must be quick."""

from typing import Annotated

import typer

from xdscale.names import UserPath
from xdscale.registry import ANALYSES, load

_PANEL = "Look inside"

inside_app = typer.Typer()


@inside_app.command(rich_help_panel=_PANEL)
def pwcca(
    first: Annotated[str, typer.Argument(help="Language model, exported run, clip:NAME/WEIGHTS or random[:WIDTH].")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    seed: Annotated[int, typer.Option(min=0, help="Of random embeddings and of the words drawn.")] = 0,
    words: Annotated[int | None, typer.Option(min=1, help="Draw this many of the shared words; default: all.")] = None,
    plot: Annotated[UserPath | None, typer.Option(help=".png or .svg: the correlations beside random ones.")] = None,
) -> None:
    """Compare the word embeddings of two models (the paper's Table 2)."""
    from xdscale.analysis.commands import print_pwcca

    print_pwcca(first, second, seed=seed, words=words, plot=plot)


@inside_app.command("grounded-ratio", rich_help_panel=_PANEL)
def grounded_ratio(
    comparisons: Annotated[
        list[UserPath], typer.Argument(help=".csv or .jsonl of per-example answers, one per data set.")
    ],
    captions: Annotated[list[str], typer.Option(help="COCO captions JSON, text file or pattern; may be repeated.")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, folder or hub name.")] = "bert-base-uncased",
    threshold: Annotated[int, typer.Option(min=0, help="Grounded is what the captions hold more often.")] = 100,
    stop_words: Annotated[
        UserPath | None, typer.Option(help="One word per line; default: NLTK's English list.")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs that were counted, to state the gain in %.")] = None,
    out: Annotated[UserPath | None, typer.Option(help="CSV with each example's ratio.")] = None,
    plot: Annotated[UserPath | None, typer.Option(help=".png or .svg: the box plot.")] = None,
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


@inside_app.command("cross-attention", rich_help_panel=_PANEL)
def cross_attention(
    folder: Annotated[UserPath, typer.Argument(metavar="RUN_OR_EXPORT", help="Run folder or export.")],
    sentence1: Annotated[str, typer.Option(help="The example.")],
    sentence2: Annotated[str | None, typer.Option(help="Its second sentence, in CLIP blocks of its own.")] = None,
    against: Annotated[UserPath | None, typer.Option(help="Another run or export, shown beside it.")] = None,
    plot: Annotated[UserPath | None, typer.Option(help=".png or .svg: the maps.")] = None,
) -> None:
    """Show what language tokens read in CLIP's, layer by layer (the paper's Table 9)."""
    from xdscale.analysis.commands import print_cross_attention

    sentences = [sentence1] if sentence2 is None else [sentence1, sentence2]
    print_cross_attention(folder, sentences=sentences, against=against, plot=plot)


for _name, _place in ANALYSES.items():
    inside_app.command(_name, rich_help_panel=_PANEL)(load(_place, f"xdscale {_name}"))
