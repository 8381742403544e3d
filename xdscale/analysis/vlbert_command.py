"""`xdscale attention-maps`; `--help` must be quick."""

from pathlib import Path
from typing import Annotated

import typer

from xdscale.names import UserPath


def attention_maps(
    model: Annotated[UserPath, typer.Argument(metavar="EXPORT", help="Exported VL-BERT, with its tokenizer.")],
    data: Annotated[UserPath, typer.Argument(metavar="DATASET", help="With captions and the regions of their images.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    number: Annotated[list[int] | None, typer.Option(help="Of a caption, from 0; may be repeated.")] = None,
    out: Annotated[UserPath, typer.Option(help="Folder for tables, arrays and pictures.")] = Path("attention-maps"),
) -> None:
    """What do words read in image regions, head by head? (VL-BERT's figure of attention maps)."""
    from xdscale.analysis.vlbert_maps import print_attention_maps

    print_attention_maps(model, data, split=split, numbers=number or [0], out=out)
