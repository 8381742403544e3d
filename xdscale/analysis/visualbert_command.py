"""`xdscale grounding`; `--help` must be quick."""

from pathlib import Path
from typing import Annotated

import typer

from xdscale.names import UserPath


def grounding(
    model: Annotated[UserPath, typer.Argument(metavar="EXPORT", help="Exported VisualBERT, with its tokenizer.")],
    data: Annotated[UserPath, typer.Option(help="Folder of Flickr30K Entities, or the one that holds it.")],
    regions: Annotated[UserPath, typer.Option(metavar="DATASET", help="Dataset with the images' regions.")],
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    parses: Annotated[UserPath | None, typer.Option(help="The captions' dependencies in CoNLL-U.")] = None,
    caption: Annotated[
        str | None, typer.Option("--map", metavar="IMAGE#NUMBER", help="Also write this caption's map.")
    ] = None,
    categories: Annotated[
        UserPath | None, typer.Option(help="JSON for --map: lists of regions by a name of yours.")
    ] = None,
    out: Annotated[UserPath, typer.Option(help="Folder for tables and pictures.")] = Path("grounding"),
) -> None:
    """Which attention heads ground words in image regions? (VisualBERT's Section 5)."""
    from xdscale.analysis.visualbert_heads import print_grounding

    print_grounding(model, data, regions, split=split, parses=parses, caption=caption, categories=categories, out=out)
