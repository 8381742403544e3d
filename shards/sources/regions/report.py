"""What the commands say of a table of image regions."""

from typing import Any

from xdscale.files import count_of
from xdscale.shards.manifest import TableManifest
from xdscale.shards.regions import RegionBuild


def summary(table: TableManifest) -> list[str]:
    """Returns what a table of regions holds and where it comes from, in lines.

    Raises:
        ValueError: its build is not that of a table of regions.
    """
    build = RegionBuild.model_validate(table.build)
    images, regions = table.counts.get("images", 0), table.counts.get("regions", 0)
    stored = sum(shard.bytes for shard in table.shards)
    lines = [f"{count_of(images, 'image')}, {count_of(regions, 'region')}, {stored:,} bytes", _detector(build)]
    if build.width:
        error = f", relative error up to {build.largest_error:g}" if build.largest_error else ""
        lines.append(f"features: {count_of(build.width, 'number')}, {build.encoding}{error}")
    found: Any = table.counts.get("relative_error_thousandths", [])
    if any(found):
        shares = [f"{place}: {count / sum(found):.0%}" for place, count in enumerate(found) if count]
        lines.append(f"regions by their error in whole thousandths: {', '.join(shares)}")
    if build.class_probs != "none":
        lines.append(f"class distributions: {build.class_probs} of {build.probabilities}")
    more = [*build.labels, *(["the image files"] if build.jpeg else [])]
    if more:
        lines.append(f"also: {', '.join(more)}")
    if build.whole_image_first:
        lines.append("region 0 of each image is the whole image")
    return lines


def _detector(build: RegionBuild) -> str:
    found = build.detector
    known = f"sha256 {found.sha256}" if found.sha256 else "weights not stated"
    names = "named" if found.classes else "not named"
    background = "none of them background" if found.background is None else f"background is {found.background}"
    return f"detector: {found.model} ({known}); {found.class_count} classes, {names}, {background}"
