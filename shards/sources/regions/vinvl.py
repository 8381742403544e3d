"""VinVL's TSV: a key and JSON. Boxes are rects of objects, rects of all, or the last six numbers of the features."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import count_of, shown
from xdscale.shards.sources.regions.decoding import from_base64, from_json
from xdscale.shards.sources.regions.fields import NAMES, array_of, image_of, whole_number
from xdscale.shards.sources.regions.files import LinePlace, Reading, RegionFormat
from xdscale.shards.sources.regions.source import RegionImage
from xdscale.shards.sources.regions.tsv import each_line, existing, lines_at, text_of

GEOMETRY = 6
"""Numbers after a region's features: its box, and its width and height, as shares of the image."""
_ROUNDED = 0.01


class VinvlTsv(RegionFormat):
    """VinVL: key and JSON."""

    background = None

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self._classes = {name: place for place, name in enumerate(reading.class_names)}

    def files(self, path: Path) -> list[Path]:
        """Returns the file itself."""
        if path.suffix == ".lineidx":
            raise XdscaleError(f"{path}: is the index of a TSV file, which is not needed; name the .tsv file")
        return [existing(path)]

    def places(self, path: Path) -> Iterator[tuple[str, LinePlace]]:
        """Yields each line's key, and where it lies."""
        for values, line in each_line(path, 1):
            yield text_of(values[:1], f"{path.name}, line {line.number}"), line

    def read(self, path: Path, places: Sequence[LinePlace]) -> Iterator[RegionImage]:
        """Yields the images of lines."""
        for values, where in lines_at(path, places):
            yield self._image(values, where)

    def _image(self, values: list[bytes], where: str) -> RegionImage:
        key = text_of(values[:1], where)
        if len(values) == 3:  # Oscar's order
            fields: Any = {"num_boxes": values[1], "features": values[2]}
        elif len(values) == 2:
            fields = from_json(values[1], where)
        else:
            found = count_of(len(values), "column")
            raise XdscaleError(f"{where}: {found}; expected key and JSON, or key, num_boxes and features")
        if not isinstance(fields, dict):
            raise XdscaleError(f"{where}: expected a JSON object, found {shown(fields)}")
        size = None
        if not any(name in fields for name in NAMES["width"]):
            if self.reading.sizes is None:
                raise XdscaleError(
                    f"{where}: image {shown(key)}: its width and height are not stated; give a file that states them, "
                    "such as COCO's annotations, with --sizes"
                )
            size = self.reading.sizes.of(key, where)
        if "objects" in fields:
            fields = {name: fields[name] for name in fields if name.startswith("image_")} | self._of_objects(
                fields, where
            )
        if "rects" in fields:
            fields = fields | {"boxes": fields["rects"]}
        if "boxes" not in fields:
            return _of_geometry(fields, key, where, size)
        return _cut_geometry(image_of(fields, key, where, size))

    def _of_objects(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
        """Returns the fields of all regions, from those of each."""
        found = fields["objects"]
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
            raise XdscaleError(f"{where}: objects: expected a list of objects, found {shown(found)}")
        used = [name for name in ("rect", "feature", "conf", "class") if name in found[0] or name == "rect"]
        for place, one in enumerate(found):
            if any(name not in one for name in used):
                raise XdscaleError(f"{where}: objects: region {place} has {', '.join(one)}, expected {', '.join(used)}")
        rows: dict[str, Any] = {"boxes": [one["rect"] for one in found]}
        if "feature" in found[0]:
            rows["features"] = _stacked([one["feature"] for one in found], where)
        if "conf" in found[0]:
            rows["objects_conf"] = [one["conf"] for one in found]
        if self._classes and "class" in found[0]:
            rows["objects_id"] = [self._class_id(one["class"], where) for one in found]
        return rows

    def _class_id(self, name: Any, where: str) -> int:
        if not isinstance(name, str) or name not in self._classes:
            raise XdscaleError(f"{where}: class {shown(name)} is not among those of --classes")
        return self._classes[name]


def _stacked(features: list[Any], where: str) -> np.ndarray:
    for feature in features:
        if not isinstance(feature, str):
            raise XdscaleError(f"{where}: feature: expected base64, found {shown(feature)}")
    decoded = [from_base64(feature, "<f4", where, "feature") for feature in features]
    lengths = sorted({len(one) for one in decoded})
    if len(lengths) > 1:
        raise XdscaleError(
            f"{where}: feature: regions have {lengths[0]} to {lengths[-1]} numbers, expected equally many"
        )
    return np.stack(decoded)


def _of_geometry(fields: dict[str, Any], key: str, where: str, size: tuple[int, int] | None) -> RegionImage:
    """Returns an image whose boxes stand in its features alone."""
    regions = whole_number({"regions": fields.get("num_boxes")}, "regions", where)
    features = array_of(fields.get("features"), "features", where).reshape(-1)
    width, rest = divmod(len(features), max(regions, 1))
    if regions < 1 or rest or width <= GEOMETRY:
        raise XdscaleError(f"{where}: features: {len(features)} numbers for {regions} regions and no boxes beside")
    features = features.reshape(regions, width)
    image = image_of(
        {"boxes": features[:, -GEOMETRY:-2], "features": features}, key, where, size or _stated(fields, where)
    )
    scale = np.array([*image.size, *image.size], np.float64)
    cut = _cut_geometry(image._replace(boxes=image.boxes.astype(np.float64) * scale))
    if cut.features.shape[1] == width:
        raise XdscaleError(
            f"{where}: no boxes: neither rects nor the box as the last six numbers of each region's features"
        )
    return cut


def _stated(fields: dict[str, Any], where: str) -> tuple[int, int]:
    found = {name: fields[other] for name in ("width", "height") for other in NAMES[name] if other in fields}
    return whole_number(found, "width", where), whole_number(found, "height", where)


def _cut_geometry(image: RegionImage) -> RegionImage:
    """Takes the last six numbers off features, if they are what they should be: box, width and height as shares."""
    if image.features is None or image.features.shape[1] <= GEOMETRY or image.boxes.shape[1:] != (4,):
        return image
    width, height = image.size
    with np.errstate(all="ignore"):
        shares = image.boxes / ([max(width, 1), max(height, 1)] * 2)
        wide, high = shares[:, 2] - shares[:, 0], shares[:, 3] - shares[:, 1]
        tail = image.features[:, -GEOMETRY:]
        box_fits = (np.abs(tail[:, :4] - shares) <= _ROUNDED).all()
        sizes_fit = any(
            (np.abs(tail[:, 4:] - np.stack(pair, axis=1)) <= _ROUNDED).all() for pair in ((wide, high), (high, wide))
        )
    return image._replace(features=image.features[:, :-GEOMETRY]) if box_fits and sizes_fit else image
