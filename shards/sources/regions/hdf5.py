"""BAN's hdf5 (Flickr30K, VQA): one matrix of all regions, where the rows of each image lie, and a pickle of ids."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.shards.sources.regions.files import RegionFormat
from xdscale.shards.sources.regions.plain_pickle import load_plain
from xdscale.shards.sources.regions.source import RegionImage

_ROUNDED = 0.01
_MOST_REGIONS = 2**16
_SETS = {"image_features": 0, "image_bb": 4, "spatial_features": 6, "pos_boxes": 2}
"""What is read, with the length of a row; 0 for any."""


class Rows(NamedTuple):
    """Rows `first` to `end` - 1 of the matrix are an image's."""

    image_id: str
    number: int
    first: int
    end: int


class BanHdf5(RegionFormat):
    """BAN and bottom-up-attention-vqa: NAME.hdf5, and NAME_imgid2idx.pkl beside it."""

    def files(self, path: Path) -> list[Path]:
        """Returns the matrix and the ids."""
        ids = _ids_of(path)
        for file in (path, ids):
            if not file.is_file():
                raise XdscaleError(
                    f"{file}: no such file; {path.name} needs the ids of its images in {ids.name} beside it"
                )
        return [path, ids]

    def places(self, path: Path) -> Iterator[tuple[str, Rows]]:
        """Yields ids and rows, in the order of the matrix."""
        ids = _image_ids(path)
        with _opened(path) as sets:
            bounds = _bounds(sets, len(ids), path)
        for number, (name, (first, end)) in enumerate(zip(ids, bounds.tolist())):
            yield name, Rows(name, number, first, end)

    def read(self, path: Path, places: Sequence[Rows]) -> Iterator[RegionImage]:
        """Yields the images of rows."""
        with _opened(path) as sets:
            for rows in places:
                where = f"{path.name}, image {rows.number}"
                boxes = _read(sets, "image_bb", rows, where)
                shares = _read(sets, "spatial_features", rows, where) if "spatial_features" in sets else None
                if self.reading.sizes is not None:
                    size = self.reading.sizes.of(rows.image_id, where)
                elif shares is not None:
                    size = _size_of(boxes, shares, where)
                else:
                    raise XdscaleError(
                        f"{where}: no spatial_features, which tell sizes of images; give them with --sizes"
                    )
                if shares is not None:
                    _check_shares(boxes, shares, size, where)
                yield RegionImage(rows.image_id, size, boxes, _read(sets, "image_features", rows, where), where=where)


def _ids_of(path: Path) -> Path:
    return path.with_name(path.name.rsplit(".", 1)[0] + "_imgid2idx.pkl")


def _image_ids(path: Path) -> list[str]:
    """Returns the ids of all images in the order of the matrix."""
    where = _ids_of(path)
    found = load_plain(where.read_bytes(), where.name)
    if not isinstance(found, dict) or not found:
        raise XdscaleError(f"{where.name}: expected a pickled dict of image id: number, found {shown(found)}")
    names: list[str | None] = [None] * len(found)
    for name, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 0 <= number < len(names):
            raise XdscaleError(
                f"{where.name}: image {shown(name)}: number {shown(number)}, expected 0 to {len(names) - 1}"
            )
        if names[number] is not None:
            raise XdscaleError(f"{where.name}: images {names[number]} and {shown(name)} have the same number {number}")
        names[number] = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return names


def _bounds(sets: dict[str, Any], images: int, path: Path) -> np.ndarray:
    """Returns the first row of each image and the one after its last: int64 [images, 2]."""
    features = sets["image_features"]
    if "pos_boxes" not in sets:
        if features.ndim != 3 or len(features) != images:
            raise XdscaleError(
                f"{path.name}: image_features {list(features.shape)} without pos_boxes; expected {images} images"
            )
        first = np.arange(images) * features.shape[1]
        return np.stack([first, first + features.shape[1]], axis=1)
    positions, rows = sets["pos_boxes"], len(features)
    if positions.shape != (images, 2) or features.ndim != 2:
        raise XdscaleError(f"{path.name}: pos_boxes {list(positions.shape)} for {images} ids and {rows} regions")
    bounds = positions[:].astype(np.int64)
    if bounds[-1, 1] == rows - 1:  # the last row itself, not the one after it
        bounds[:, 1] += 1
    wrong = np.flatnonzero((bounds[:, 0] != np.concatenate([[0], bounds[:-1, 1]])) | (bounds[:, 1] <= bounds[:, 0]))
    if wrong.size or bounds[-1, 1] != rows:
        image = int(wrong[0]) if wrong.size else images - 1
        raise XdscaleError(
            f"{path.name}, image {image}: pos_boxes: {bounds[image].tolist()}; images must have the {rows} rows of "
            "image_features one after the other"
        )
    return bounds


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """Gives the data sets by name, after checking what they are."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            sets = {name: _checked(file, name, path) for name in _SETS if name in file}
            for name in ("image_features", "image_bb"):
                if name not in sets:
                    raise XdscaleError(
                        f"{path.name}: no data set {name}; it has {', '.join(list(file)[:12]) or 'none'}"
                    )
            if sets["image_features"].shape[:-1] != sets["image_bb"].shape[:-1]:
                shapes = [list(sets[name].shape) for name in ("image_features", "image_bb")]
                raise XdscaleError(
                    f"{path.name}: image_features {shapes[0]} and image_bb {shapes[1]} do not have the same rows"
                )
            yield sets
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise XdscaleError(f"{path.name}: not readable as hdf5: {one_line(error)}") from None


def _checked(file: Any, name: str, path: Path) -> Any:
    import h5py

    link, found = file.get(name, getlink=True), file.get(name)
    if not isinstance(link, h5py.HardLink) or not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise XdscaleError(f"{path.name}: {name} is not held in this file itself; only that is read")
    width = _SETS[name]
    if found.ndim not in (2, 3) or found.dtype.kind not in "fiu" or (width and found.shape[-1] != width):
        raise XdscaleError(
            f"{path.name}: {name}: {found.dtype} {list(found.shape)}, expected rows of {width or 'any number'}"
        )
    return found


def _read(sets: dict[str, Any], name: str, rows: Rows, where: str) -> np.ndarray:
    found = sets[name]
    if found.shape[:-1] != sets["image_features"].shape[:-1]:
        raise XdscaleError(
            f"{where}: {name}: shape {list(found.shape)}, but image_features {list(sets['image_features'].shape)}"
        )
    if rows.end - rows.first >= _MOST_REGIONS:
        raise XdscaleError(f"{where}: pos_boxes: {rows.end - rows.first:,} regions of one image")
    return found[rows.number] if found.ndim == 3 else found[rows.first : rows.end]


def _size_of(boxes: np.ndarray, shares: np.ndarray, where: str) -> tuple[int, int]:
    """Returns the size of which boxes are these shares: what the box that ends last says."""
    size = []
    for axis in (2, 3):
        place = int(np.argmax(shares[:, axis]))
        with np.errstate(all="ignore"):
            side = float(boxes[place, axis]) / float(shares[place, axis]) if shares[place, axis] > 0 else 0.0
        if not 1 <= round(side if np.isfinite(side) else 0) < 2**16:
            raise XdscaleError(f"{where}: spatial_features do not tell the image's size ({side}); give it with --sizes")
        size.append(round(side))
    return size[0], size[1]


def _check_shares(boxes: np.ndarray, shares: np.ndarray, size: tuple[int, int], where: str) -> None:
    width, height = size
    with np.errstate(invalid="ignore"):  # of infinite values
        off = np.abs(boxes / [width, height, width, height] - shares[:, :4])
    wrong = np.flatnonzero(~(off <= _ROUNDED).all(axis=1))
    if wrong.size:
        region = wrong[0]
        raise XdscaleError(
            f"{where}: spatial_features: region {region} is {shares[region].tolist()}, but its box is "
            f"{boxes[region].tolist()} of an image of {width} × {height}"
        )
