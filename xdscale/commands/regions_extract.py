"""`xdscale regions extract`. Heavy imports stand inside the command: `--help` must be quick."""

import os
from functools import partial
from typing import Annotated, Literal

import typer

from xdscale.names import UserPath
from xdscale.shards.commands import build_and_report


def extract_command(
    images: Annotated[list[str], typer.Argument(help="Image files and folders, package:NAME/folder too.")],
    network: Annotated[
        str,
        typer.Option(
            help="torchvision:fasterrcnn_resnet50_fpn_v2 or another Faster R-CNN, transformers:FOLDER or a name on the "
            "hub (DETR and its kin), or with --boxes a backbone: timm:resnet50, torchvision:resnet101, or "
            "vlbert:resnet101, which is that of VL-BERT's release."
        ),
    ],
    out: Annotated[UserPath, typer.Option(help="Folder of the dataset.")],
    weights: Annotated[str, typer.Option(help="File, hub (as published, fetched) or random (to try).")] = "hub",
    boxes: Annotated[
        str | None,
        typer.Option(
            help="grid:6x6; vcr (the metadata beside each image); COCO's instances or detections; or a JSON, "
            "image: {boxes, scores}."
        ),
    ] = None,
    whole_image: Annotated[bool, typer.Option("--whole-image", help="Region 0 is the whole image.")] = False,
    stage: Annotated[
        str | None,
        typer.Option(help="Feature map of a backbone: a number (timm) or node (torchvision). Default: last."),
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(min=8, help="Of a backbone: scale images so that their shorter side has these pixels.")
    ] = None,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Give each feature mean 0 and variance 1 over 64 of the images.")
    ] = False,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least confidence of what is found.")] = 0.2,
    fewest: Annotated[int, typer.Option(min=1, help="Regions of an image even below it.")] = 10,
    most: Annotated[int, typer.Option(min=1, help="Regions of an image.")] = 100,
    ids: Annotated[
        Literal["stem", "name", "number", "path"],
        typer.Option(help="Image ids: file name without or with ending, its number, or the path below the folder."),
    ] = "stem",
    bad_images: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What cannot be read; skip names it and goes on.")
    ] = "refuse",
    store_images: Annotated[
        bool, typer.Option("--store-images", help="Keep the image files, all JPEG, in the table.")
    ] = False,
    encoding: Annotated[
        Literal["fp16", "u8"], typer.Option(help="Of features; u8: half the size, relative error up to 0.007.")
    ] = "fp16",
    class_probs: Annotated[
        Literal["all", "top-64", "none"] | None,
        typer.Option(help="What is kept of class distributions. Default: top-64 of those with more classes."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one size at a time.")] = 8,
    shard_images: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: all cores, or one for a GPU.")] = None,
    part: Annotated[str, typer.Option(help="i/n: build part i (from 0) of n, then 'xdscale shards merge'.")] = "0/1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the table of regions in the folder.")] = False,
) -> None:
    """Makes regions of images; an extraction that was stopped goes on when started again."""
    from xdscale.devices import visible_gpus
    from xdscale.extraction.extract import ExtractOptions, region_source
    from xdscale.shards.build import build_table
    from xdscale.shards.workplace import Part

    device = device or ("cuda" if visible_gpus() else "cpu")
    options = ExtractOptions(
        network=network,
        weights=weights,
        boxes=boxes,
        whole_image=whole_image,
        stage=stage,
        short_side=short_side,
        standardize=standardize,
        threshold=threshold,
        fewest=fewest,
        most=most,
        batch=batch,
        ids=ids,
        bad_images=bad_images,
        store_images=store_images,
        device=device,
    )
    source = region_source(images, options, encoding=encoding, class_probs=class_probs, shard_images=shard_images)
    workers = workers or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)
    build_and_report(partial(build_table, source), out, "extracting", workers, Part.parse(part), overwrite)
