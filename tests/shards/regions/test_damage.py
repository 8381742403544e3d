"""Shards that are damaged after their hashes were computed, and before a step reads them."""

import tarfile

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions

TRIALS = 400


@pytest.fixture
def table(tmp_path):
    """The one shard of 60 images of 1 to 7 regions."""
    chance, images = np.random.default_rng(0), []
    for number in range(60):
        count = 1 + number % 7
        boxes = np.sort(chance.random((count, 2, 2)) * 50, axis=1).reshape(-1, 4).astype(np.float32)
        features, probs = chance.random((count, 16), np.float32), chance.dirichlet(np.ones(7), count)
        images.append(RegionImage(str(number), (60, 50), boxes, features, {}, probs))
    build_regions(images, tmp_path / "table", Detector(model="drawn", class_count=7), shard_images=60)
    return tmp_path / "table"


def test_changed_bytes_are_read_or_refused_by_name(table):
    """Bounds that lead out of the file ask for no memory, ids that are no text for no traceback."""
    (path,) = table.glob("*.tar")
    whole, chance = path.read_bytes(), np.random.default_rng(1)
    with tarfile.open(path) as tar:
        places = [(member.offset_data + 128, member.size - 128) for member in tar.getmembers()]
    rows, refused, said = np.arange(60), set(), []
    for trial in range(TRIALS):
        begin, size = places[trial % len(places)]
        data = bytearray(whole)
        for at in chance.integers(begin, begin + size, 3):
            data[at] = chance.integers(256)
        path.write_bytes(data)
        regions = RegionTable.open(table)
        for name, read in (("rows", regions.read), ("probs", regions.class_probs), ("ids", regions.image_ids)):
            try:
                read(rows)
            except XdscaleError as error:
                refused.add(name)
                said.append(str(error))
    assert all(str(table) in text and "xdscale shards verify" in text for text in said)
    assert refused == {"rows", "probs", "ids"}


def test_a_shard_that_was_cut_or_taken_away_is_named(table):
    (path,) = table.glob("*.tar")
    regions = RegionTable.open(table)
    regions.read(np.arange(3))
    path.write_bytes(path.read_bytes()[:2000])  # the open file itself: a disk that loses its end
    with pytest.raises(XdscaleError, match=rf"{path}: ends before byte"):
        regions.read(np.arange(60))
    with pytest.raises(XdscaleError, match=rf"{path}: expected \d+ bytes, found 2000"):
        RegionTable.open(table).read(np.arange(3))
    path.unlink()
    with pytest.raises(XdscaleError, match=rf"{path}: cannot be read: No such file"):
        RegionTable.open(table).read(np.arange(3))
