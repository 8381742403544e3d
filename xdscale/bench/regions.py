"""`xdscale bench regions`: reading image regions in random order, against the formats that published features come in.

The same images in every format; the same arrays come out: features, boxes, confidences. Theirs are read as their own
code does, image by image; ours in batches. Rounds alternate in one process and CPU time is compared, so that other work
on the machine troubles all alike. Files are in the page cache: what a disk costs is in the bytes.
"""

import base64
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xdscale.bench.promises import Promise, print_promises
from xdscale.errors import XdscaleError
from xdscale.shards.manifest import MANIFEST_NAME, Manifest, Split
from xdscale.shards.regions import REGIONS, Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions

ENCODINGS = ("fp16", "u8")
BATCH = 64
REGIONS_PER_IMAGE, WIDTH = 36, 2048
MANY_SHARDS, FEW_SHARDS = 1000, 50
FIRST_BATCH = 32
_DETECTOR = Detector(model="none: drawn at random")

Reader = Callable[[np.ndarray], None]
"""Reads images in this order."""


def bench_regions(regions: Path | None, *, images: int = 400, rounds: int = 5) -> list[Promise]:
    """Measures and prints.

    Args:
        regions: a dataset with a table of regions whose images are taken, repeated up to `images`; None draws features.
        images: of the comparison.
        rounds: alternations; the table shows medians.

    Returns:
        The rows of the printed table.

    Raises:
        XdscaleError: there is no such table.
    """
    with tempfile.TemporaryDirectory(prefix="xdscale-bench-") as folder:
        work = Path(folder)
        those = _drawn(images) if regions is None else _taken(RegionTable.open(regions), images)
        sizes, readers = _written(those, work)
        rows = _compared(readers, sizes, images, rounds)
        rows += _in_bytes(work, sizes)
        rows += _fresh_process(work, those[:FIRST_BATCH])
    regions_each = sum(len(image.boxes) for image in those) / images
    print_promises(rows, f"{images} images of {regions_each:.0f} regions of {those[0].features.shape[1]} numbers")
    return rows


def _drawn(images: int) -> list[RegionImage]:
    """Returns images with features like a detector's: none negative, most of them small, few zeros."""
    chance = np.random.default_rng(0)
    found = []
    for number in range(images):
        features = chance.gamma(0.5, 1.0, (REGIONS_PER_IMAGE, WIDTH)).astype(np.float32)
        corners = np.sort(chance.random((REGIONS_PER_IMAGE, 2, 2)), axis=1).reshape(-1, 4)
        boxes = (corners * [640, 480, 640, 480]).astype(np.float32)
        labels = {"confidences": chance.random(REGIONS_PER_IMAGE, np.float32)}
        found.append(RegionImage(f"{number}", (640, 480), boxes, features, labels))
    return found


def _taken(table: RegionTable, images: int) -> list[RegionImage]:
    found = []
    for number in range(images):
        read = table.read(np.array([number % len(table)]))
        features, labels = read.features.astype(np.float32), {"confidences": read.confidences}
        size = (int(read.sizes[0, 0]), int(read.sizes[0, 1]))
        found.append(RegionImage(f"{number}", size, read.boxes, features, labels))
    return found


def _written(those: list[RegionImage], work: Path) -> tuple[dict[str, int], dict[str, Reader]]:
    """Writes all formats; returns the bytes of each, and what reads them."""
    sizes, readers = {}, {}
    for name, write in (("UNITER npz LMDB", _uniter), ("ViLBERT LMDB", _vilbert), ("fp32 hdf5", _hdf5)):
        readers[name], sizes[name] = write(those, work)
    for encoding in ENCODINGS:
        out = work / encoding
        try:
            build_regions(those, out, _DETECTOR, encoding=encoding)
        except XdscaleError as error:
            if encoding == "fp16":
                raise
            print(f"{encoding} is left out: {error}", file=sys.stderr)  # such as features that may be negative
            break
        table = RegionTable.open(out)
        sizes[f"ours, {encoding}"] = sum(shard.bytes for shard in table.table.manifest.shards)
        readers[f"ours, {encoding}"] = _ours(table)
    else:
        readers["ours, u8, as fp32"] = _ours_expanded(table)
    return sizes, readers


def _environment(path: Path, values: dict[bytes, bytes]) -> tuple[Any, int]:
    import lmdb

    environment = lmdb.open(str(path), map_size=1 << 40)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()
    # As the projects open it.
    opened = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    return opened.begin(buffers=True), sum(map(len, values.values()))


def _uniter(those: list[RegionImage], work: Path) -> tuple[Reader, int]:
    values = {}
    for image in those:
        stream = io.BytesIO()
        arrays = {"features": image.features, "norm_bb": _shares(image), "conf": image.labels["confidences"]}
        np.savez_compressed(stream, **{name: array.astype(np.float16) for name, array in arrays.items()})
        values[f"{image.image_id}.npz".encode()] = stream.getvalue()
    transaction, size = _environment(work / "uniter", values)

    def read(order: np.ndarray) -> None:
        for number in order.tolist():
            with io.BytesIO(transaction.get(f"{number}.npz".encode())) as stream:
                archive = np.load(stream)
                for name in ("features", "norm_bb", "conf"):
                    archive[name]

    return read, size


def _shares(image: RegionImage) -> np.ndarray:
    """Returns boxes, and their widths and heights, as shares of the image: float32 [regions, 6]."""
    shares = image.boxes / [*image.size, *image.size]
    return np.concatenate([shares, shares[:, 2:] - shares[:, :2]], axis=1).astype(np.float32)


def _vilbert(those: list[RegionImage], work: Path) -> tuple[Reader, int]:
    values = {}
    for image in those:
        fields = {"image_id": image.image_id, "image_w": image.size[0], "image_h": image.size[1]}
        fields |= {"num_boxes": len(image.boxes)}
        fields |= {"boxes": base64.b64encode(image.boxes), "features": base64.b64encode(image.features)}
        values[image.image_id.encode()] = pickle.dumps(fields)
    transaction, size = _environment(work / "vilbert", values)

    def read(order: np.ndarray) -> None:
        for number in order.tolist():
            fields = pickle.loads(transaction.get(f"{number}".encode()))  # noqa: S301 - as its users read it; we wrote it above
            for name in ("features", "boxes"):
                np.frombuffer(base64.b64decode(fields[name]), np.float32).reshape(fields["num_boxes"], -1)

    return read, size


def _hdf5(those: list[RegionImage], work: Path) -> tuple[Reader, int]:
    import h5py

    path = work / "regions.hdf5"
    ends = np.cumsum([0, *(len(image.boxes) for image in those)]).tolist()
    with h5py.File(path, "w") as file:  # with all that BAN's files hold
        file["image_features"] = np.concatenate([image.features for image in those])
        file["image_bb"] = np.concatenate([image.boxes for image in those])
        file["spatial_features"] = np.concatenate([_shares(image) for image in those])
        file["pos_boxes"] = np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int32)
    opened = h5py.File(path, "r")
    features, boxes = opened["image_features"], opened["image_bb"]

    def read(order: np.ndarray) -> None:
        for number in order.tolist():
            features[ends[number] : ends[number + 1]], boxes[ends[number] : ends[number + 1]]

    return read, path.stat().st_size


def _ours(table: RegionTable) -> Reader:
    """Reads what is stored, companded bytes as they are."""
    ragged = [name for name in ("features", "scales", "boxes", "confidences") if name in table.table.columns]

    def read(order: np.ndarray) -> None:
        for first in range(0, len(order), BATCH):
            for name in ragged:
                table.table.read_ragged(name, order[first : first + BATCH])
            table.table.read("sizes", order[first : first + BATCH])

    return read


def _ours_expanded(table: RegionTable) -> Reader:
    def read(order: np.ndarray) -> None:
        for first in range(0, len(order), BATCH):
            table.read(order[first : first + BATCH])

    return read


def _compared(readers: dict[str, Reader], sizes: dict[str, int], images: int, rounds: int) -> list[Promise]:
    chance = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for read in readers.values():
        read(np.arange(images))  # once, so that all are in the page cache
    for _ in range(rounds):
        order = chance.permutation(images)
        for name, read in readers.items():
            began = time.process_time()
            read(order)
            seconds[name].append(time.process_time() - began)
    rows = []
    for name, spent in seconds.items():
        rate, kilobytes = images / statistics.median(spent), sizes.get(name, sizes.get("ours, u8")) / images / 1000
        rows.append(Promise(f"images per CPU-second, {name}", f"{rate:,.0f} ({kilobytes:.0f} kB each)", "", True))
    goals = {"UNITER npz LMDB": {"fp16": 15, "u8": 30}, "ViLBERT LMDB": {"fp16": 12, "u8": 25}}
    for other, wanted in goals.items():
        for encoding, goal in wanted.items():
            if f"ours, {encoding}" not in seconds:
                continue
            pairs = zip(seconds[other], seconds[f"ours, {encoding}"])
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            rows.append(Promise(f"{encoding} : {other}", f"{ratio:.1f}×", f"≥ {goal}×", ratio >= goal))
    return rows


def _in_bytes(work: Path, sizes: dict[str, int]) -> list[Promise]:
    rows = []
    for encoding, goal in (("fp16", 1 / 2), ("u8", 1 / 4)):
        if f"ours, {encoding}" not in sizes:
            continue
        share = sizes[f"ours, {encoding}"] / sizes["fp32 hdf5"]
        name = f"bytes, {encoding} : fp32 hdf5"
        rows.append(Promise(name, f"{share:.3f}", f"≤ {goal * 1.01:.4f}", share <= goal * 1.01))
        table = Manifest.load(work / encoding).tables[REGIONS]
        payload = sizes[f"ours, {encoding}"] / table.payload_bytes("all")
        rows.append(Promise(f"bytes per payload byte, {encoding}", f"{payload:.4f}", "≤ 1.01", payload <= 1.01))
    return rows


def _fresh_process(work: Path, those: list[RegionImage]) -> list[Promise]:
    """Measures the first batch and the memory of a process that does nothing else."""
    build_regions(those, work / "one", _DETECTOR)
    ready, large = _child(_many_shards(work / "one", work / "many", MANY_SHARDS))
    _, small = _child(_many_shards(work / "one", work / "few", FEW_SHARDS))
    name = f"peak memory, {FEW_SHARDS:,} and {MANY_SHARDS:,} shards"
    return [
        Promise(f"process start to first batch, {MANY_SHARDS:,} shards", f"{ready:.2f} s", "< 2 s", ready < 2),
        Promise(name, f"{small:.0f} and {large:.0f} MiB", "+ < 32 MiB", large - small < 32),
    ]


def _many_shards(source: Path, folder: Path, count: int) -> Path:
    """Makes a dataset of `count` shards, all of them the same file under many names."""
    folder.mkdir()
    table = Manifest.load(source).tables[REGIONS]
    first = table.shards[0]
    records = [first.model_copy(update={"file": f"regions-all-{number:06d}.tar"}) for number in range(count)]
    for record in records:
        os.link(source / first.file, folder / record.file)
    table = table.model_copy(update={"splits": {"all": Split.of(records, {})}})
    (folder / MANIFEST_NAME).write_text(Manifest(tables={REGIONS: table}).to_json(), encoding="utf-8")
    return folder


def _child(folder: Path) -> tuple[float, float]:
    """Returns seconds to the first batch and peak MiB after reading on."""
    began = time.monotonic()
    command = [sys.executable, "-m", "xdscale.bench.regions", str(folder)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found["ready"] - began, found["peak_mib"]


def _in_child(folder: Path) -> None:
    table = RegionTable.open(folder)
    chance = np.random.default_rng(0)
    table.read(chance.integers(0, len(table), FIRST_BATCH))
    ready = time.monotonic()
    for _ in range(100):
        table.read(chance.integers(0, len(table), FIRST_BATCH))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    print(json.dumps({"ready": ready, "peak_mib": int(status["VmHWM"].split()[0]) / 1024}))


if __name__ == "__main__":
    _in_child(Path(sys.argv[1]))
