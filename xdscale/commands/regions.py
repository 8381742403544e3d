"""`xdscale regions import | extract | compare`. Heavy imports stand inside the commands: `--help` must be quick."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from xdscale.commands.regions_extract import extract_command
from xdscale.files import count_of
from xdscale.names import UserPath
from xdscale.shards.commands import build_and_report

if TYPE_CHECKING:
    from xdscale.shards.region_comparison import ImageComparison

regions_app = typer.Typer(
    help="Image regions as a table: from published features or images, and compared.", no_args_is_help=True
)
regions_app.command("extract")(extract_command)


@regions_app.command("import")
def import_command(
    inputs: Annotated[list[str], typer.Argument(help="Files or folders of one format, in their order.")],
    format: Annotated[
        str,
        typer.Option(help="butd, lxmert, uniter, vilbert (InterBERT too), vlbert, ban, pythia, milvlg, vinvl, coco."),
    ],
    detector: Annotated[
        str,
        typer.Option(help="What made the features: butd, pythia, vinvl, mattnet, or a JSON file that describes it."),
    ],
    out: Annotated[UserPath, typer.Option(help="Folder of the dataset.")],
    encoding: Annotated[
        Literal["fp16", "u8"], typer.Option(help="Of features; u8: half the size, with an error.")
    ] = "fp16",
    largest_error: Annotated[
        float, typer.Option(min=0.001, max=0.1, help="Relative, that u8 may make of a region's features.")
    ] = 0.007,
    class_probs: Annotated[
        Literal["all", "top-64", "none"] | None,
        typer.Option(help="What is kept of class distributions. Default: top-64 of those with more classes."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Of a TSV, if not the format's: names with commas between, - for any other.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="COCO annotations or JSON of ID: \\[width, height]; or WxH of all images.")
    ] = None,
    ids: Annotated[
        Literal["as-given", "stem", "number"], typer.Option(help="Image ids: their stem, or the number they end with.")
    ] = "as-given",
    classes: Annotated[UserPath | None, typer.Option(help="Names of classes, one a line, or COCO annotations.")] = None,
    attributes: Annotated[UserPath | None, typer.Option(help="Names of attributes, one a line.")] = None,
    background: Annotated[
        str, typer.Option(help="Which class is no object: a number or none. Default: as the format has it.")
    ] = "format",
    boxes: Annotated[Literal["format", "xyxy", "xywh"], typer.Option(help="Form of boxes.")] = "format",
    units: Annotated[Literal["format", "pixels", "shares"], typer.Option(help="Of boxes.")] = "format",
    order: Annotated[
        Literal["source", "confidence"], typer.Option(help="confidence: regions come with falling confidence.")
    ] = "source",
    whole_image: Annotated[
        Literal["none", "first"], typer.Option(help="first: region 0 of each image is the whole image.")
    ] = "none",
    jpegs: Annotated[UserPath | None, typer.Option(help="Folder of the images, ID.jpg, to be stored too.")] = None,
    bad_images: Annotated[
        Literal["refuse", "skip"], typer.Option(help="With --jpegs: what cannot be read; skip names it and goes on.")
    ] = "refuse",
    shard_images: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 1024,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    part: Annotated[str, typer.Option(help="i/n: build part i (from 0) of n, then 'xdscale shards merge'.")] = "0/1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the table of regions in the folder.")] = False,
) -> None:
    """Turns published features into a table; an import that was stopped goes on when started again."""
    from xdscale.shards.build import build_table
    from xdscale.shards.sources.regions.files import Reading, load_sizes
    from xdscale.shards.sources.regions.importing import region_files
    from xdscale.shards.workplace import Part

    reading = Reading(
        columns=() if columns is None else tuple(columns.split(",")),
        sizes=None if sizes is None else load_sizes(sizes),
        ids=ids,
        jpegs=jpegs,
        bad_images=bad_images,
    )
    source = region_files(
        inputs,
        format,
        detector,
        reading=reading,
        classes=classes,
        attributes=attributes,
        background=background,
        box_form=boxes,
        box_units=units,
        encoding=encoding,
        largest_error=largest_error,
        class_probs=class_probs,
        shard_images=shard_images,
        region_order=order,
        whole_image=whole_image,
    )
    build_and_report(partial(build_table, source), out, "importing", workers, Part.parse(part), overwrite)


@regions_app.command()
def compare(
    first: Annotated[UserPath, typer.Argument(help="Dataset with a table of regions.")],
    second: Annotated[UserPath, typer.Argument(help="Another.")],
    least_iou: Annotated[float, typer.Option(min=0.01, max=1, help="Of two boxes that count as the same.")] = 0.5,
    images: Annotated[int, typer.Option(min=0, help="How many images to show, those that differ most.")] = 5,
    csv: Annotated[UserPath | None, typer.Option(help="File for all images, a line each.")] = None,
) -> None:
    """Compares two tables of the same images: boxes by IoU, features by cosine, classes."""
    from xdscale.files import check_output_file, csv_text, write_outputs
    from xdscale.shards.region_comparison import ImageComparison as Fields
    from xdscale.shards.region_comparison import common_images, compare_images, overall
    from xdscale.shards.regions import RegionTable

    if csv is not None:
        check_output_file(csv)
    tables = RegionTable.open(first), RegionTable.open(second)
    found = list(compare_images(*tables, common_images(*tables), least_iou=least_iou))
    whole = overall(found, (len(tables[0]), len(tables[1])))
    typer.echo(
        f"{count_of(whole.images, 'image')} in both, {whole.only[0]:,} only in {first}, "
        f"{whole.only[1]:,} only in {second}"
    )
    typer.echo(
        f"boxes: {whole.boxes[0]:,} and {whole.boxes[1]:,}; {whole.matched:,} match with IoU of {least_iou:g} or more"
        + f" (mean {whole.iou:.4f}), {whole.in_place:.1%} of them in the same place of their image"
        * bool(whole.matched)
    )
    same = "one of the tables has no classes" if whole.same_class is None else f"{whole.same_class:.1%} the same"
    alike = f"cosine {whole.cosine:.6f} in the mean, {whole.lowest_cosine:.6f} at least"
    if tables[0].width != tables[1].width or not tables[0].width:
        alike = f"not compared: they have {tables[0].width} and {tables[1].width} numbers"
    if whole.matched:
        typer.echo(f"features of matching boxes: {alike}\nclasses of matching boxes: {same}")
    for image in sorted(found, key=_likeness)[:images]:
        classes = "" if image.same_class is None else f", {image.same_class} of the same class"
        typer.echo(
            f"  {image.image_id}: {image.matched} of {image.boxes[0]} and {image.boxes[1]} boxes match"
            + f" (IoU {image.iou:.3f})" * bool(image.matched)
            + f", cosine {image.cosine:.4f}" * (image.cosine == image.cosine)
            + classes
        )
    if csv is not None:
        names = [*Fields._fields[:1], "boxes_first", "boxes_second", *Fields._fields[2:]]
        rows = ((image.image_id, *image.boxes, *image[2:]) for image in found)
        write_outputs({csv: csv_text(names, ([_cell(value) for value in row] for row in rows))})


def _likeness(image: "ImageComparison") -> tuple[float, float]:
    cosine = image.cosine if image.cosine == image.cosine else 0.0
    return image.matched / max(image.boxes), cosine


def _cell(value: object) -> object:
    return "" if value is None or value != value else value  # nothing to compare
