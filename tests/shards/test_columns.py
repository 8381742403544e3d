"""Tables of any columns: what is written is read back row by row, by this reader and by stock webdataset."""

import io
import shutil
from unittest import mock

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards import shard
from xdscale.shards.manifest import MANIFEST_NAME, Column, Manifest, Split, TableManifest
from xdscale.shards.shard import write_shard
from xdscale.shards.table import Table

# Image regions: several columns share how many regions an image has, another has its own count.
REGIONS = [
    Column(name="sizes", dtype="<u2", shape=(2,)),
    Column(name="features", dtype="<f2", shape=(3, 4), offsets="region_offsets", fewest=1, most=5),
    Column(name="boxes", dtype="<f4", shape=(4,), offsets="region_offsets"),
    Column(name="image_ids", dtype="|u1", offsets="id_offsets"),
    Column(name="scores", dtype="<f8"),
]


def draw(columns, rows, seed=0):
    """Random rows, ragged ones of `fewest` to 5 elements, and each row's own arrays."""
    chance = np.random.default_rng(seed)
    arrays, expected = {}, {}
    for column in columns:
        if column.offsets and column.offsets not in arrays:
            fewest = max(other.fewest for other in columns if other.offsets == column.offsets)
            arrays[column.offsets] = np.concatenate([[0], np.cumsum(chance.integers(fewest, 6, rows))])
        length = arrays[column.offsets][-1] if column.offsets else rows
        size = length * column.element_bytes
        values = np.frombuffer(chance.bytes(size), column.dtype).reshape(length, *column.shape)
        arrays[column.name] = values
        expected[column.name] = np.split(values, arrays[column.offsets][1:-1]) if column.offsets else list(values)
    return arrays, expected


def store(folder, columns, shards, block_rows):
    """Writes shards and the manifest that names them."""
    with mock.patch.object(shard, "BLOCK_ROWS", block_rows):
        records = [
            write_shard(folder / f"train-{number:06d}.tar", columns, arrays) for number, arrays in enumerate(shards)
        ]
    describe(folder, columns, records)


def describe(folder, columns, records):
    splits = {"train": Split.of(records, {})}
    table = TableManifest(build={"source": "test"}, columns=columns, splits=splits)
    (folder / MANIFEST_NAME).write_text(Manifest(tables={"rows": table}).to_json())


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4, unique=True)
KINDS = st.tuples(
    st.sampled_from(["|u1", "|i1", "<u2", "<i4", "<f2", "<f4", "<f8", "<i8"]),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.sampled_from([None, "first_offsets", "second_offsets"]),
)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.lists(KINDS, min_size=4, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_any_columns_are_read_back_in_any_order(tmp_path_factory, names, kinds, sizes, data):
    columns = [
        Column(name=name, dtype=dtype, shape=shape, offsets=offsets)
        for name, (dtype, shape, offsets) in zip(names, kinds)
    ]
    folder = tmp_path_factory.mktemp("columns")
    drawn = [draw(columns, rows, seed) for seed, rows in enumerate(sizes)]
    store(folder, columns, [arrays for arrays, _ in drawn], data.draw(st.integers(1, 4)))
    table = Table(folder, "train", max_open_shards=data.draw(st.integers(1, 3)))
    assert list(table.columns.values()) == columns
    rows = np.array(data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=8)))
    for column in columns:
        expected = [row for _, parts in drawn for row in parts[column.name]]
        if column.offsets is None:
            assert_same_bits(table.read(column.name, rows), np.stack([expected[row] for row in rows]))
            continue
        values, offsets = table.read_ragged(column.name, rows)
        assert offsets[0] == 0
        assert offsets[-1] == len(values)
        for number, row in enumerate(rows):
            assert_same_bits(values[offsets[number] : offsets[number + 1]], expected[row])
    shutil.rmtree(folder)


@pytest.fixture
def regions(tmp_path):
    arrays, expected = draw(REGIONS, 11)
    store(tmp_path, REGIONS, [arrays], 4)
    return tmp_path, arrays, expected


def test_stock_webdataset_and_numpy_read_the_same(regions):
    folder, arrays, _ = regions
    blocks = [
        {name: np.load(io.BytesIO(value), allow_pickle=False) for name, value in sample.items() if name[0] != "_"}
        for sample in webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False)
    ]
    assert [len(block["sizes.npy"]) for block in blocks] == [4, 4, 3]
    for column in REGIONS:
        whole = np.concatenate([block[f"{column.name}.npy"] for block in blocks])
        assert_same_bits(whole, arrays[column.name])
    counts = np.concatenate([np.diff(block["region_offsets.npy"].astype(np.int64)) for block in blocks])
    assert counts.tolist() == np.diff(arrays["region_offsets"]).tolist()


def test_bounds_that_do_not_fit_into_memory_are_read_from_the_disk(regions, monkeypatch):
    folder, _, expected = regions
    monkeypatch.setattr("xdscale.shards.table.MAX_BOUNDS", 16)  # those of one of the two ragged groups
    values, offsets = Table(folder, "train").read_ragged("image_ids", np.array([10, 3]))
    assert_same_bits(values[: offsets[1]], expected["image_ids"][10])
    assert_same_bits(values[offsets[1] :], expected["image_ids"][3])


def test_columns_are_asked_for_by_name_and_kind(regions):
    table = Table(regions[0], "train")
    with pytest.raises(XdscaleError, match="no column 'feature'; the table has: sizes, features, boxes, image_ids"):
        table.read("feature", np.array([0]))
    with pytest.raises(XdscaleError, match="column 'features' is read with `read_ragged`"):
        table.read("features", np.array([0]))
    with pytest.raises(XdscaleError, match="column 'scores' is read with `read`"):
        table.read_ragged("scores", np.array([0]))


def test_columns_that_share_their_offsets_have_equally_many_elements(tmp_path):
    """Boxes written with as many rows as bytes of ids are no boxes of these regions."""
    others = [
        column.model_copy(update={"offsets": "id_offsets"}) if column.name == "boxes" else column for column in REGIONS
    ]
    arrays, _ = draw(others, 3)
    assert arrays["region_offsets"][-1] != arrays["id_offsets"][-1]
    store(tmp_path, others, [arrays], 4)
    describe(tmp_path, REGIONS, Manifest.load(tmp_path).shards)
    with pytest.raises(XdscaleError, match=r"000000\.boxes\.npy holds float32"):
        Table(tmp_path, "train").read("scores", np.array([0]))


@pytest.mark.parametrize(("shape", "most"), [((), 1024), ((1 << 20,), 16)])
def test_a_block_has_1024_rows_or_16_mib_at_most(tmp_path, shape, most):
    """The bytes of shards hang on it."""
    columns = [Column(name="values", dtype="|u1", shape=shape)]
    for rows, blocks in ((most, 1), (most + 1, 2)):
        record = write_shard(tmp_path / "train-000000.tar", columns, {"values": np.zeros((rows, *shape), np.uint8)})
        assert (record.rows, record.blocks) == (rows, blocks)
    describe(tmp_path, columns, [record])
    table = Table(tmp_path, "train")
    table.read("values", np.array([most]))
    assert table._block_rows.tolist() == [0, most]
