"""LMDB environments: UNITER's, ViLBERT's and InterBERT's, and tensorpack's records that those two pretrain on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json, shown
from xdscale.shards.sources.regions.decoding import from_json, from_msgpack, from_npz
from xdscale.shards.sources.regions.fields import image_of
from xdscale.shards.sources.regions.files import RegionFormat
from xdscale.shards.sources.regions.plain_pickle import load_plain
from xdscale.shards.sources.regions.source import RegionImage

DATA = "data.mdb"
_ROUNDED = 0.01
_RECORD = ("features", "classes", "boxes", "num_boxes", "image_h", "image_w", "image_id", "caption")


class UniterLmdb(RegionFormat):
    """UNITER: `.npz` or msgpack of features, norm_bb, conf, soft_labels; `nbb_*.json` says how many regions to take."""

    box_units = "shares"

    def files(self, path: Path) -> list[Path]:
        """Returns the data, and the counts beside the folder, where they are."""
        counts = _counts_of(path)
        return [_data_of(path), *([counts] if counts.is_file() else [])]

    def places(self, path: Path) -> Iterator[tuple[str, tuple[bytes, int | None]]]:
        """Yields ids, and keys with the number of regions to take."""
        counts = _counts_of(path)
        taken = read_json(counts) if counts.is_file() else None
        for key in _keys(path):
            name = _text(key, path)
            if taken is not None and not isinstance(taken.get(name), int):
                raise XdscaleError(f"{counts}: {name!r}: expected a number of regions, found {shown(taken.get(name))}")
            yield name.removesuffix(".npz"), (key, None if taken is None else taken[name])

    def read(self, path: Path, places: Sequence[tuple[bytes, int | None]]) -> Iterator[RegionImage]:
        """Yields the images of keys."""
        for (key, regions), value, where in _values(path, places, key_of=lambda place: place[0]):
            image_id = _text(key, path).removesuffix(".npz")
            fields = from_npz(value, where) if value[:2] == b"PK" else from_msgpack(value, where)
            if not isinstance(fields, dict) or not isinstance(fields.get("norm_bb"), np.ndarray):
                raise XdscaleError(f"{where}: expected arrays with norm_bb among them, found {shown(fields)}")
            if self.reading.sizes is None:
                raise XdscaleError(
                    f"{where}: image {image_id!r}: UNITER's files do not say how large images are; give a file that "
                    "does, such as COCO's annotations, with --sizes (or 1000x1000: boxes are then in thousandths)"
                )
            fields = {name: array for name, array in fields.items() if isinstance(array, np.ndarray) and array.ndim}
            rows = {name: len(array) for name, array in fields.items()}
            if len(set(rows.values())) > 1 or not 0 < (regions or 1) <= min(rows.values()):
                stated = "" if regions is None else f"; nbb_*.json says {regions} regions"
                raise XdscaleError(f"{where}: rows of its arrays: {shown(rows)}, expected equally many{stated}")
            fields = {name: array[:regions] for name, array in fields.items()}
            fields["boxes"] = _checked_shares(fields.pop("norm_bb"), where)
            yield image_of(fields, image_id, where, self.reading.sizes.of(image_id, where))


class VilbertLmdb(RegionFormat):
    """ViLBERT and InterBERT: pickled dicts with base64, listed in `keys`; or tensorpack's records, in `__keys__`."""

    def files(self, path: Path) -> list[Path]:
        """Returns the data."""
        return [_data_of(path)]

    def places(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Yields ids and keys; of tensorpack's records the id stands in the record."""
        with _opened(path) as get:
            pickled = get(b"keys") is not None
        keys = _keys(path)
        if pickled:
            for key in keys:
                yield _text(key, path), key
        else:
            for key, value, where in _values(path, keys):
                yield _record_id(_record(value, where), where), key

    def read(self, path: Path, places: Sequence[bytes]) -> Iterator[RegionImage]:
        """Yields the images of keys."""
        for key, value, where in _values(path, places):
            if value[:1] != b"\x80" and value[:1] not in b"(}":
                fields = _record(value, where)
                yield image_of(fields, _record_id(fields, where), where)
                continue
            fields = load_plain(value, where)
            if not isinstance(fields, dict):
                raise XdscaleError(f"{where}: expected a pickled dict, found {shown(fields)}")
            image_id, stated = _text(key, path), fields.get("image_id")
            stated = stated.decode(errors="replace") if isinstance(stated, bytes) else stated
            if stated is not None and str(stated) != image_id:
                raise XdscaleError(f"{where}: image_id is {shown(stated)}, but its key {image_id!r}")
            fields = {name: item for name, item in fields.items() if isinstance(name, str)}
            yield image_of(fields, image_id, where)


def _record(value: bytes, where: str) -> dict[str, Any]:
    """Returns a record of tensorpack by the names of its fields; some have no class distributions."""
    found = from_msgpack(value, where)
    names = _RECORD if isinstance(found, list) and len(found) == len(_RECORD) else (_RECORD[0], *_RECORD[2:])
    if not isinstance(found, list) or len(found) != len(names):
        raise XdscaleError(f"{where}: expected a record of {', '.join(_RECORD)}, found {shown(found)}")
    return dict(zip(names, found))


def _record_id(record: dict[str, Any], where: str) -> str:
    image_id = record["image_id"]
    if not isinstance(image_id, str | int) or isinstance(image_id, bool):
        raise XdscaleError(f"{where}: image_id: expected a text or a number, found {shown(image_id)}")
    return str(image_id)


def _checked_shares(boxes: np.ndarray, where: str) -> np.ndarray:
    """Returns left, top, right, bottom of norm_bb, whose other numbers must be width, height and perhaps area."""
    if boxes.ndim != 2 or boxes.shape[1] not in (6, 7):
        raise XdscaleError(f"{where}: norm_bb: shape {list(boxes.shape)}, expected [regions, 6] or 7")
    if boxes.dtype.kind != "f":
        raise XdscaleError(f"{where}: norm_bb: {boxes.dtype}, expected shares of the image as floats")
    boxes = boxes.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite values
        off = np.abs(boxes[:, 4:6] - (boxes[:, 2:4] - boxes[:, :2]))
    wrong = np.flatnonzero(~(off <= _ROUNDED).all(axis=1))
    if wrong.size:
        row = boxes[wrong[0]].round(3).tolist()
        raise XdscaleError(
            f"{where}: norm_bb: region {wrong[0]} is {row}; expected left, top, right, bottom, width, height"
        )
    return boxes[:, :4]


def _counts_of(path: Path) -> Path:
    """Returns where UNITER keeps how many regions of each image a threshold leaves."""
    return path.with_name(path.name.removesuffix("_compressed").replace("feat_", "nbb_", 1) + ".json")


def _data_of(path: Path) -> Path:
    """Returns the file of an environment: in its folder, or itself."""
    data = path / DATA if path.is_dir() else path
    if not data.is_file():
        raise XdscaleError(f"{path}: holds no {DATA}; expected the folder of an LMDB environment")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Gives the function that returns the value of a key, or None."""
    import lmdb

    try:
        environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise XdscaleError(f"{path}: not a readable LMDB environment: {one_line(error)}") from None
    try:
        last, held = environment.info()["last_pgno"] + 1, _data_of(path).stat().st_size
        if last * environment.stat()["psize"] > held:  # LMDB would end the process at what is not there
            raise XdscaleError(f"{path}: truncated: {last} pages are stated, {held:,} bytes are there; copy it again")
        with environment.begin() as transaction:
            yield transaction.get
    except lmdb.Error as error:
        raise XdscaleError(f"{path}: damaged LMDB environment: {one_line(error)}; copy it again") from None
    finally:
        environment.close()


def _keys(path: Path) -> list[bytes]:
    """Returns the keys of all images, in the order in which they are listed."""
    with _opened(path) as get:
        if (listed := get(b"keys")) is not None:
            where = f"{path.name}, key 'keys'"
            found = load_plain(bytes(listed), where)
        elif (listed := get(b"__keys__")) is not None:
            where = f"{path.name}, key '__keys__'"
            found = from_json(listed, where) if listed[:1] == b"[" else from_msgpack(listed, where)
        else:
            raise XdscaleError(f"{path.name}: neither 'keys' nor '__keys__' is there, which list the images")
    if not isinstance(found, list) or not all(isinstance(key, bytes | str) and key for key in found):
        raise XdscaleError(f"{where}: expected a list of names of images, found {shown(found)}")
    return [key.encode() if isinstance(key, str) else key for key in found]


def _values(path: Path, places: Sequence[Any], key_of: Any = bytes) -> Iterator[tuple[Any, bytes, str]]:
    """Yields each place, what its key holds, and file and key in words."""
    with _opened(path) as get:
        for place in places:
            key = key_of(place)
            where = f"{path.name}, key {shown(key.decode(errors='replace'))}"
            value = get(key) if len(key) < 512 else None  # longer ones LMDB has not, and says so as an error
            if value is None:
                raise XdscaleError(f"{where}: is listed but not there; copy the environment again")
            yield place, value, where


def _text(key: bytes, path: Path) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise XdscaleError(f"{path.name}, key {shown(key)}: is not UTF-8 text") from None
