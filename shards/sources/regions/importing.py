"""Files of published features to a source of the table: formats by name, what is declared, and what must agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.names import nearest, resolve_path
from xdscale.shards.region_encoding import LARGEST_ERROR
from xdscale.shards.regions import RegionBuild
from xdscale.shards.sources.regions.detectors import load_detector
from xdscale.shards.sources.regions.files import FileImages, Reading, RegionFormat
from xdscale.shards.sources.regions.hdf5 import BanHdf5
from xdscale.shards.sources.regions.json_files import CocoDetections, VlbertJson
from xdscale.shards.sources.regions.lmdb_files import UniterLmdb, VilbertLmdb
from xdscale.shards.sources.regions.numpy_files import MilvlgNpz, PythiaNpy
from xdscale.shards.sources.regions.source import RegionImage, RegionSource, layout_of
from xdscale.shards.sources.regions.tsv import ButdTsv, LxmertTsv
from xdscale.shards.sources.regions.vinvl import VinvlTsv

FORMATS: dict[str, type[RegionFormat]] = {
    "butd": ButdTsv,
    "lxmert": LxmertTsv,
    "uniter": UniterLmdb,
    "vilbert": VilbertLmdb,
    "vlbert": VlbertJson,
    "ban": BanHdf5,
    "pythia": PythiaNpy,
    "milvlg": MilvlgNpz,
    "vinvl": VinvlTsv,
    "coco": CocoDetections,
}
"""InterBERT's files are "vilbert"."""
AS_THE_FORMAT = "format"


def region_files(
    inputs: list[str],
    format: str,
    detector: str,
    *,
    reading: Reading | None = None,
    classes: Path | None = None,
    attributes: Path | None = None,
    background: str = AS_THE_FORMAT,
    encoding: str = "fp16",
    class_probs: str | None = None,
    largest_error: float = LARGEST_ERROR,
    shard_images: int = 1024,
    **declared: Any,
) -> RegionSource:
    """Returns the source of a table of regions, made of files of published features.

    Args:
        inputs: files or folders, in their order.
        format: one of `FORMATS`.
        detector: as `load_detector`.
        reading: how files are read.
        classes: file of names, as `load_detector`.
        attributes: file of names, as `load_detector`.
        background: which class is no object: "format", "none" or a number.
        encoding: of features.
        class_probs: as `layout_of`.
        largest_error: as `layout_of`.
        shard_images: images per shard.
        **declared: `box_form` and `box_units` ("format", or as `RegionBuild`), `region_order`, `whole_image`.

    Raises:
        XdscaleError: an input is missing or of another format, or what is declared does not agree with the first image.
    """
    kind = _format(format)
    empty = kind.background if background == AS_THE_FORMAT else _background(background)
    found, width = load_detector(detector, classes=classes, attributes=attributes, background=empty)
    objects = max(found.class_count - (found.background is not None), 0)
    reading = replace(reading or Reading(), class_names=tuple(found.classes), objects=objects)
    images = FileImages([resolve_path(name) for name in inputs], kind(reading), reading, shard_images)
    layout = layout_of(images.first(), encoding, class_probs, largest_error)
    build = RegionBuild(
        format=format,
        inputs=images.inputs,
        options=_options(reading),
        detector=found,
        shard_images=shard_images,
        **layout.model_dump(),
        **{"box_form": kind.box_form, "box_units": kind.box_units}
        | {name: value for name, value in declared.items() if value != AS_THE_FORMAT},
    )
    _compare(images.first(), build, width, detector)
    return RegionSource(images, build)


def _format(name: str) -> type[RegionFormat]:
    if name not in FORMATS:
        own = (
            f"expected {', '.join(FORMATS)}; features in a form of your own become a table from Python, docs/regions.md"
        )
        raise XdscaleError(f"--format {name}: {nearest(name, list(FORMATS), own)}")
    return FORMATS[name]


def _background(text: str) -> int | None:
    if text != "none" and not (text.isdecimal() and len(text) < 6):
        raise XdscaleError(f"--background {text}: expected a number, or none")
    return None if text == "none" else int(text)


def _options(reading: Reading) -> dict[str, Any]:
    """Returns what of `reading` decides the bytes."""
    sizes = reading.sizes
    stated: dict[str, Any] = {"ids": reading.ids, "columns": list(reading.columns)}
    if reading.jpegs is not None and reading.bad_images != "refuse":
        stated["bad_images"] = reading.bad_images
    if sizes is not None:
        stated["sizes"] = sizes.name if sizes.every else sizes.sha256
    return stated


def _compare(first: RegionImage, build: RegionBuild, width: int, detector: str) -> None:
    """Refuses a first image that the detector cannot have made."""
    if width and build.width not in (0, width):
        bits = {width * 2: 64, width // 2: 16}.get(build.width, 0) if first.features.dtype == "<f4" else 0
        doubt = f"if these are numbers of {bits} bits, write them as float32; else " * bool(bits)
        raise XdscaleError(
            f"{first.where}: features of {build.width} numbers, but the detector {detector!r} gives {width}; "
            f"{doubt}describe the one that made these in a JSON file (--detector FILE)"
        )
    count = build.detector.class_count
    if first.class_probs is not None and count and first.class_probs.shape[-1] != count:
        raise XdscaleError(
            f"{first.where}: distributions over {first.class_probs.shape[-1]} classes, but the detector {detector!r} "
            f"has {count} with background {build.detector.background}; look at --detector and --background"
        )
