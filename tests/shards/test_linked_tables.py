"""Several tables in one dataset, linked by row: built from any source, stopped, resumed, verified, read."""

import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset
from typer.testing import CliRunner

from xdscale.errors import XdscaleError
from xdscale.shards import shard
from xdscale.shards.build import build_table, merge_parts
from xdscale.shards.commands import shards_app
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.shard import ShardWriter, write_shard
from xdscale.shards.table import Table, open_table
from xdscale.shards.verify import verify_shards
from xdscale.shards.workplace import Part

from .faults import killed_at

IMAGES = 30


@pytest.fixture(scope="module")
def sources():
    """The module of the test sources; spawned workers import it by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import region_source

        yield region_source


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A file of images of 1 to 20 regions with 0 to 3 captions each, and what stands in it."""
    chance = np.random.default_rng(5)

    def captions(most):
        return [chance.integers(0, 30_000, chance.integers(1, 9)).tolist() for _ in range(chance.integers(0, most))]

    found = [
        {
            "id": f"image-{number}" + "x" * (number % 3),
            "size": [640 + number, 480],
            "regions": int(chance.integers(1, 21)),
            "train": captions(4),
            "validation": captions(2),
        }
        for number in range(IMAGES)
    ]
    path = tmp_path_factory.mktemp("images") / "images.jsonl"
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    return path, found


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shard, "BLOCK_BYTES", 1000)


@pytest.fixture(scope="module")
def dataset(sources, images, tmp_path_factory):
    """Both tables in small blocks, not to be changed."""
    out = tmp_path_factory.mktemp("linked") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "BLOCK_BYTES", 1000)
        build_table(sources.RegionSource(images[0]), out)
        build_table(sources.CaptionSource(images[0]), out)
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_captions_lead_to_the_regions_of_their_image(dataset, images, sources):
    for split in ("train", "validation"):
        captions = open_table(dataset, split, "captions")
        regions = captions.linked("image")
        expected = [(image, words) for image in images[1] for words in image[split]]
        order = np.random.default_rng(1).permutation(len(expected))
        words = captions.read_ragged("words", order)
        rows = captions.read("image", order)
        features, boxes = (regions.read_ragged(name, rows) for name in ("features", "boxes"))
        names = regions.read_ragged("image_ids", rows)
        assert len(captions) == len(expected) > 10
        for place, number in enumerate(order):
            image, caption = expected[number]
            assert words.values[slice(*words.offsets[place : place + 2])].tolist() == caption
            assert names.values[slice(*names.offsets[place : place + 2])].tobytes().decode() == image["id"]
            region = slice(*features.offsets[place : place + 2])
            drawn = sources.features_of(image["id"], image["regions"])
            assert np.array_equal(features.values[region], drawn[0])
            assert np.array_equal(boxes.values[region], drawn[1])
        assert regions.read("sizes", rows)[:, 0].tolist() == [expected[number][0]["size"][0] for number in order]


def test_blocks_are_sized_in_bytes(dataset):
    """Whatever their rows weigh: a block is no larger than the limit unless it is one row, and the next row is."""
    table = Manifest.load(dataset).tables["regions"]
    assert len(table.shards) == 8
    largest, several = 0, 0
    for record in table.shards:
        found = [
            {name: np.load(io.BytesIO(value), allow_pickle=False) for name, value in sample.items() if name[0] != "_"}
            for sample in webdataset.WebDataset(str(dataset / record.file), shardshuffle=False)
        ]
        assert len(found) == record.blocks
        rows = [len(block["sizes.npy"]) for block in found]
        assert sum(rows) == record.rows
        # Each has one offset more than rows.
        sizes = [sum(array.nbytes for array in block.values()) - 2 * 4 for block in found]
        assert all(size <= 1000 or count == 1 for size, count in zip(sizes, rows))
        several += sum(count > 1 for count in rows)
        largest = max(largest, *sizes)
    assert several > 3
    assert 900 < largest <= 1000


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("at_once", [1, 7])
def test_bytes_depend_neither_on_workers_nor_on_calls(
    dataset, sources, images, tmp_path, monkeypatch, workers, at_once
):
    """Workers are spawned and have the usual blocks: so the first table is compared with itself there."""
    if workers == 1:
        monkeypatch.setattr(shard, "BLOCK_BYTES", 1000)
    expected = dataset
    if workers > 1:
        expected = tmp_path / "one"
        build_table(sources.RegionSource(images[0]), expected)
        build_table(sources.CaptionSource(images[0]), expected)
    out = tmp_path / "out"
    build_table(sources.RegionSource(images[0], at_once=at_once), out, workers=workers)
    build_table(sources.CaptionSource(images[0]), out, workers=workers)
    assert files(out) == files(expected)


@pytest.mark.usefixtures("small_blocks")
def test_killed_at_any_write_of_either_table_it_goes_on(dataset, sources, images, tmp_path):
    expected = files(dataset)
    readable = 0
    for number in range(1, 60, 3):
        out = tmp_path / str(number)

        def both(out=out):
            build_table(sources.RegionSource(images[0]), out)
            build_table(sources.CaptionSource(images[0]), out)

        assert killed_at(number, both)
        if (out / MANIFEST_NAME).exists():  # the first table is whole while the second is built
            readable += 1
            verify_those_named(out)
            assert len(Table(out, "all", "regions")) == IMAGES
        both()
        assert files(out) == expected, number
    assert readable > 5


def verify_those_named(folder):
    """As `verify_shards`, less its look for shards that no table names."""
    for record in Manifest.load(folder).shards:
        assert (folder / record.file).stat().st_size == record.bytes


@pytest.mark.usefixtures("small_blocks")
def test_a_table_in_parts_beside_a_finished_one(dataset, sources, images, tmp_path):
    out = tmp_path / "out"
    for index in (1, 0):
        build_table(sources.RegionSource(images[0]), out, part=Part(index, 2))
    merge_parts(out)
    for index in (2, 0, 1):
        build_table(sources.CaptionSource(images[0]), out, part=Part(index, 3))
        assert list(Manifest.load(out).tables) == ["regions"]
    table = merge_parts(out)
    assert sum(split.rows for split in table.splits.values()) == len(Table(dataset, "train", "captions")) + len(
        Table(dataset, "validation", "captions")
    )
    assert files(out) == files(dataset)
    assert merge_parts(out) in Manifest.load(out).tables.values()


def test_one_table_is_built_at_a_time(sources, images, tmp_path):
    build_table(sources.RegionSource(images[0]), tmp_path, part=Part(0, 2))
    with pytest.raises(XdscaleError, match="unfinished build with table 'regions', now 'captions'"):
        build_table(sources.CaptionSource(images[0]), tmp_path)


def test_what_is_linked_to_comes_first_and_stays(dataset, sources, images, tmp_path):
    with pytest.raises(XdscaleError, match="rows of captions link to rows of regions; build that table first"):
        build_table(sources.CaptionSource(images[0]), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    with pytest.raises(XdscaleError, match="rows of captions link to rows of regions: build both in another folder"):
        build_table(sources.RegionSource(images[0], per_unit=9), out, overwrite=True)
    assert files(out) == files(dataset)
    build_table(sources.CaptionSource(images[0], per_unit=9), out, overwrite=True)
    found = Manifest.load(out).tables
    assert found["regions"] == Manifest.load(dataset).tables["regions"]
    assert len(found["captions"].splits["train"].shards) == 4  # 30 images, 9 a unit
    verify_shards(out)


def test_links_out_of_range_are_refused_wherever_they_come_from(dataset, sources, images, tmp_path):
    # By the source, when the table is built.
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(images[0].read_text().split("\n")[:9]) + "\n")
    build_table(sources.RegionSource(fewer), tmp_path / "out")
    with pytest.raises(XdscaleError, match=r"image: links to row \d+ of regions, which has 9 rows"):
        build_table(sources.CaptionSource(images[0]), tmp_path / "out")
    assert list(Manifest.load(tmp_path / "out").tables) == ["regions"]
    # In a manifest, when it is opened: the regions are another table's than those that were linked to.
    shutil.copytree(dataset, tmp_path / "mixed")
    values = json.loads((dataset / MANIFEST_NAME).read_text())
    values["tables"]["regions"] = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["tables"]["regions"]
    path = tmp_path / "mixed" / MANIFEST_NAME
    path.write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match=r"captions\.image: captions-train-.* links to row"):
        Table(tmp_path / "mixed", "all", "regions")
    for change, message in (
        (lambda tables: tables.pop("regions"), "links to the table regions, which is not there"),
        (
            lambda tables: tables["regions"]["splits"].update(test=tables["regions"]["splits"].pop("all")),
            "links to the table regions, which has neither a split train nor all",
        ),
        (lambda tables: tables["captions"]["columns"][0].update(dtype="<i4"), "its dtype must be unsigned"),
    ):
        values = json.loads((dataset / MANIFEST_NAME).read_text())
        change(values["tables"])
        path.write_text(json.dumps(values))
        with pytest.raises(XdscaleError, match=message):
            Manifest.load(tmp_path / "mixed")
    # In a damaged shard, when it is read.
    shutil.copy(dataset / MANIFEST_NAME, path)
    record = Manifest.load(dataset).tables["captions"].splits["train"].shards[0]
    content = bytearray((dataset / record.file).read_bytes())
    for row in (2**32 - 1, IMAGES):
        content[512 + 128 : 512 + 132] = row.to_bytes(4, "little")
        (tmp_path / "mixed" / record.file).write_bytes(content)
        with pytest.raises(XdscaleError, match=rf"captions\.image links to row {row} of regions, .* 0 to 29"):
            Table(tmp_path / "mixed", "train", "captions").read("image", np.array([0]))


def test_tables_are_named_where_there_are_several(dataset):
    with pytest.raises(XdscaleError, match="several tables: say which one; the dataset has: captions, regions"):
        open_table(dataset, "train")
    wanted = r"no table 'text' \('xdscale shards build' makes it\); the dataset has: captions, regions"
    with pytest.raises(XdscaleError, match=wanted):
        open_table(dataset, "train", "text")
    with pytest.raises(XdscaleError, match="no split 'train'; the dataset has: all"):
        open_table(dataset, "train", "regions")
    with pytest.raises(XdscaleError, match="column 'words' of captions holds no rows of another table"):
        open_table(dataset, "train", "captions").linked("words")
    row = open_table(dataset, "all", "regions")[-1]
    assert sorted(row) == ["boxes", "features", "image_ids", "sizes"]


def test_damage_in_any_table_is_named_and_info_shows_each(dataset, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    (out / "regions-all-000001.tar").unlink()
    os.truncate(out / "captions-train-000000.tar", 100)
    with pytest.raises(XdscaleError, match="2 problems found") as caught:
        verify_shards(out)
    assert "regions-all-000001.tar: missing" in str(caught.value)
    assert "captions-train-000000.tar: truncated" in str(caught.value)
    output = CliRunner().invoke(shards_app, ["info", str(dataset)], catch_exceptions=False).stdout
    regions = Manifest.load(dataset).tables["regions"]
    total = regions.splits["all"].counts["regions"]
    assert total == regions.splits["all"].elements["region_offsets"] > 200
    assert f"{dataset}: regions: built from regions, 30 images" in output
    row = next(line for line in output.splitlines() if "│ all" in line)
    assert [f" {number:,} " in row for number in (8, 30, total)] == [True] * 3
    assert any("image " in line and "regions" in line and "<u4" in line for line in output.splitlines())
    ids = regions.splits["all"].elements["id_offsets"]
    payload = ids + IMAGES * 4 + total * (16 * 2 + 4 * 4)
    assert regions.payload_bytes("all") == payload


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": np.zeros((2, 2), "<i4")}, r"sizes: int32 \[2, 2\], expected uint16 \[2, 2\]"),
        ({"sizes": np.zeros((3, 2), "<u2")}, r"sizes: uint16 \[3, 2\], expected uint16 \[2, 2\]"),
        ({"features": np.zeros((3, 15), "<f2")}, r"features: float16 \[3, 15\], expected float16 \[3, 16\]"),
        ({"features": np.zeros((3, 16), "<f4")}, r"features: float32 \[3, 16\], expected float16 \[3, 16\]"),
        ({"boxes": np.zeros((2, 4), "<f4")}, r"boxes: float32 \[2, 4\], expected float32 \[3, 4\]"),
        ({"region_offsets": np.array([0, 3])}, "region_offsets: expected 3 offsets that begin with 0"),
        ({"region_offsets": np.array([1, 2, 3])}, "region_offsets: expected 3 offsets that begin with 0"),
        ({"region_offsets": np.array([0, 5, 3])}, "expected 3 offsets that begin with 0 and never fall"),
        ({"region_offsets": np.array([0, 0, 3])}, "features: rows of 0 to 3 elements, expected 1 to 20"),
        ({"more": np.zeros(2)}, "rows have the arrays .*more.*, expected image_ids, sizes, features, boxes"),
    ],
)
def test_rows_that_do_not_fit_their_columns_are_refused(sources, tmp_path, change, message):
    """Never cast: a feature of another type, an id that does not fit, would pass silently."""
    arrays = {
        "image_ids": np.zeros(2, np.uint8),
        "id_offsets": np.array([0, 1, 2]),
        "sizes": np.zeros((2, 2), "<u2"),
        "features": np.zeros((3, 16), "<f2"),
        "boxes": np.zeros((3, 4), "<f4"),
        "region_offsets": np.array([0, 1, 3]),
    }
    path = tmp_path / "regions-all-000000.tar"
    assert write_shard(path, sources.RegionSource.columns, arrays).rows == 2
    path.unlink()
    with pytest.raises(XdscaleError, match=message):
        write_shard(path, sources.RegionSource.columns, arrays | change)
    assert not list(tmp_path.iterdir())


def test_memory_of_writing_is_a_block(sources, tmp_path, monkeypatch):
    """33 MB of rows, some at once, in blocks of 1 MB: never more than a few blocks in memory."""
    monkeypatch.setattr(shard, "BLOCK_BYTES", 1 << 20)
    columns = sources.RegionSource.columns[2:3]
    arrays = {"features": np.ones((2000, 16), "<f2"), "region_offsets": np.arange(0, 2001, 20)}  # 64 kB
    tracemalloc.start()
    with ShardWriter(tmp_path / "regions-all-000000.tar", columns) as writer:
        for _ in range(512):
            writer.add(arrays)
        record = writer.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert record.bytes > 33_000_000
    assert record.blocks > 30
    assert peak < 6 << 20


def test_a_run_knows_its_tables_by_themselves(dataset, sources, images, tmp_path):
    """Another table beside them changes nothing for a run; what they link to does."""
    regions, captions = (
        open_table(dataset, split, name) for split, name in (("all", "regions"), ("train", "captions"))
    )
    assert list(captions.manifest.only(["captions"]).tables) == ["captions", "regions"]
    assert [shard.file for shard in captions.manifest.only(["regions"]).shards] == sorted(
        path.name for path in dataset.glob("regions-*.tar")
    )
    build_table(sources.RegionSource(images[0]), tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "BLOCK_BYTES", 1000)
        build_table(sources.RegionSource(images[0]), tmp_path / "same")
    assert open_table(tmp_path / "same", "all").fingerprint == regions.fingerprint
    assert open_table(tmp_path / "alone", "all").fingerprint != regions.fingerprint  # in blocks of another size
    assert captions.fingerprint != regions.fingerprint
    assert captions.fingerprint == captions.manifest.fingerprint
