"""numpy's files, one or two for each image: Pythia's `ID.npy` with `ID_info.npy`, MILVLG's `ID.npz`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import shown
from xdscale.shards.sources.regions.decoding import from_npy, from_npz
from xdscale.shards.sources.regions.fields import array_of, image_of, whole_number
from xdscale.shards.sources.regions.files import RegionFormat
from xdscale.shards.sources.regions.source import RegionImage

_INFO = "_info.npy"


class PythiaNpy(RegionFormat):
    """Pythia and VisualBERT: `ID.npy` [regions, width], and `ID_info.npy`, a pickled dict with boxes and image size."""

    def files(self, path: Path) -> list[Path]:
        """Returns all files of a folder, or both of one image."""
        return [file for name in _names(path, ".npy", _INFO) for file in (name, _info_of(name))]

    def places(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yields ids and names of files."""
        for file in _names(path, ".npy", _INFO):
            yield file.name.removesuffix(".npy"), str(file)

    def read(self, path: Path, places: Sequence[str]) -> Iterator[RegionImage]:
        """Yields the images of files."""
        for name in places:
            features = from_npy(Path(name).read_bytes(), Path(name).name)
            if not isinstance(features, np.ndarray) or features.ndim != 2:
                raise XdscaleError(f"{Path(name).name}: expected an array [regions, width], found {shown(features)}")
            info = _info_of(Path(name))
            fields = from_npy(info.read_bytes(), info.name)
            if not isinstance(fields, Mapping):
                raise XdscaleError(f"{info.name}: expected a pickled dict with bbox, found {shown(fields)}")
            fields = {key: value for key, value in fields.items() if isinstance(key, str) and key != "features"}
            rows = whole_number({"regions": fields.pop("num_boxes", 1)}, "regions", info.name)
            if rows > np.shape(features)[0]:  # fewer are those above the threshold; others are there too
                raise XdscaleError(f"{info.name}: num_boxes: {rows} are stated, features are there for {len(features)}")
            if isinstance(probs := fields.get("cls_prob"), list):
                probs = fields["cls_prob"] = array_of(probs, "cls_prob", info.name)
            left_out = np.shape(probs)[1:] == (self.reading.objects,)
            image_id = Path(name).name.removesuffix(".npy")
            yield image_of(fields | {"features": features}, image_id, info.name, background_left_out=left_out)


class MilvlgNpz(RegionFormat):
    """MILVLG: `ID.npz` with x [width, regions] (in later files [regions, width]), bbox, num_bbox, image_h, image_w."""

    def files(self, path: Path) -> list[Path]:
        """Returns all files of a folder, or the file."""
        return _names(path, ".npz")

    def places(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yields ids and names of files."""
        for file in _names(path, ".npz"):
            yield file.name.removesuffix(".npz"), str(file)

    def read(self, path: Path, places: Sequence[str]) -> Iterator[RegionImage]:
        """Yields the images of files."""
        for name in places:
            where = Path(name).name
            fields = from_npz(Path(name).read_bytes(), where)
            info = fields.pop("info", None)
            if isinstance(info, Mapping):
                fields = {key: value for key, value in info.items() if isinstance(key, str)} | fields
            yield image_of(_turned(fields, where), where.removesuffix(".npz"), where)


def _turned(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields with a row of features for each box, which tell how they lie."""
    features, boxes = fields.get("x"), fields.get("bbox")
    if (
        not isinstance(features, np.ndarray)
        or not isinstance(boxes, np.ndarray)
        or features.ndim != 2
        or not boxes.ndim
    ):
        raise XdscaleError(f"{where}: expected the arrays x and bbox; it has {', '.join(fields) or 'none'}")
    if features.shape[1] == len(boxes):  # also where both sides are equal: so the format says
        return fields | {"x": features.T}
    return fields


def _names(path: Path, suffix: str, but: str = "\0") -> list[Path]:
    """Returns the files of a folder with this ending, sorted, or the one file that was named."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(suffix) and not file.name.endswith(but))
        if found:
            return found
        raise XdscaleError(f"{path}: holds no {suffix} files of images")
    if not path.is_file() or not path.name.endswith(suffix) or path.name.endswith(but):
        raise XdscaleError(f"{path}: expected a folder, or one {suffix} file of an image")
    return [path]


def _info_of(path: Path) -> Path:
    info = path.with_name(path.name.removesuffix(".npy") + _INFO)
    if not info.is_file():
        raise XdscaleError(f"{path}: {info.name}, which says where the regions are, does not lie beside it")
    return info
