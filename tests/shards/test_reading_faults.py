"""Long reads give the rows of short ones, and whatever a disk or a damaged shard does to a reader is named."""

import errno
import fcntl
import os
import shutil
from unittest import mock

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards import cache, remote, shard, table, verify
from xdscale.shards.cache import ShardCache
from xdscale.shards.manifest import MANIFEST_NAME, Column, Manifest, Split, TableManifest
from xdscale.shards.remote import fetch_manifest, fetch_shards, place_manifest
from xdscale.shards.shard import ShardWriter, write_shard
from xdscale.shards.table import Table

COLUMNS = [
    Column(name="sizes", dtype="<u2", shape=(2,)),
    Column(name="features", dtype="<f4", shape=(3,), offsets="region_offsets", fewest=1),
]


def rows_of(number, rows=7):
    """Rows of 1 to 4 elements, different in each shard."""
    offsets = np.cumsum([0, *(1 + (row + number) % 4 for row in range(rows))])
    sizes = (np.arange(2 * rows, dtype="<u2") + 100 * number).reshape(rows, 2)
    features = (np.arange(3 * offsets[-1], dtype="<f4") + 1000 * number).reshape(-1, 3)
    return {"sizes": sizes, "features": features, "region_offsets": offsets}


def describe(folder, records, columns=COLUMNS):
    found = TableManifest(build={"source": "test"}, columns=columns, splits={"train": Split.of(records, {})})
    (folder / MANIFEST_NAME).write_text(Manifest(tables={"rows": found}).to_json())


@pytest.fixture
def folder(tmp_path):
    """Three shards of seven rows, in blocks of four and three."""
    with mock.patch.object(shard, "BLOCK_ROWS", 4):
        records = [write_shard(tmp_path / f"train-{n:06d}.tar", COLUMNS, rows_of(n)) for n in range(3)]
    assert [record.blocks for record in records] == [2, 2, 2]
    describe(tmp_path, records)
    return tmp_path


@pytest.fixture
def long(monkeypatch):
    """As if all that is read were long."""
    monkeypatch.setattr(table, "LONG_BYTES", 1)
    monkeypatch.setattr(table, "LONG_PIECE", 1)


ROWS = np.array([20, 0, 7, 6, 13, 14, 3, 3, 4, 20])


@pytest.mark.parametrize("most", [1, 2, 10])
def test_long_reads_give_the_rows_of_short_ones(folder, monkeypatch, most):
    short = Table(folder, "train")
    expected = short.read("sizes", ROWS), *short.read_ragged("features", ROWS)
    wanted = [rows_of(row // 7) for row in ROWS]
    assert np.array_equal(expected[0], [one["sizes"][row % 7] for one, row in zip(wanted, ROWS)])
    read, pread, calls = os.preadv, os.pread, []
    monkeypatch.setattr(os, "preadv", lambda *place: calls.append(place) or read(*place))
    for bytes_, piece, is_long in ((40, 4, True), (41, 4, False), (40, 5, False), (0, 4, True)):
        monkeypatch.setattr(table, "LONG_BYTES", bytes_)  # ten sizes of four bytes are read
        monkeypatch.setattr(table, "LONG_PIECE", piece)
        reader = Table(folder, "train", max_open_shards=most)
        calls.clear()
        assert np.array_equal(reader.read("sizes", ROWS), expected[0])
        assert len(calls) == (len(ROWS) if is_long else 0)
        found = reader.read_ragged("features", ROWS)
        assert np.array_equal(found.values, expected[1])
        assert np.array_equal(found.offsets, expected[2])
    assert pread is os.pread


def test_long_reads_ask_for_no_more_room_than_a_shard_has(folder, long):
    """Damaged bounds may state gigabytes."""
    path = folder / "train-000001.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"000001.region_offsets.npy") + 512 + 128
    content[at + 8 : at + 12] = np.uint32(2**31).tobytes()
    path.write_bytes(content)
    with pytest.raises(XdscaleError, match=rf"^{path}: ends before byte \d{{11}}; copy the shard again"):
        Table(folder, "train").read_ragged("features", np.array([0, 12]))


@pytest.mark.parametrize("name", ["preadv", "pread"])
def test_a_shard_that_was_cut_while_it_was_open_is_named_with_the_byte_that_is_missing(folder, request, name):
    if name == "preadv":
        request.getfixturevalue("long")
    reader, path = Table(folder, "train"), folder / "train-000001.tar"
    reader.read("sizes", np.arange(21))
    os.truncate(path, 512 + 128 + 10)  # of two and a half of its rows
    reader.read("sizes", np.array([0, 8]))
    with pytest.raises(XdscaleError, match=rf"^{path}: ends before byte {512 + 128 + 12}; copy the shard again"):
        reader.read("sizes", np.array([0, 8, 9, 10]))


@pytest.mark.parametrize("name", ["preadv", "pread"])
def test_a_shard_that_the_disk_does_not_give_is_named(folder, monkeypatch, request, name):
    if name == "preadv":
        request.getfixturevalue("long")
    reader, read, path = Table(folder, "train"), getattr(os, name), folder / "train-000002.tar"
    reader.read("sizes", np.arange(21))

    def failing(descriptor, *place):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *place)

    monkeypatch.setattr(os, name, failing)
    reader.read("sizes", np.array([0, 13]))
    with pytest.raises(XdscaleError, match=rf"^{path}: cannot be read: Input/output error$"):
        reader.read("sizes", np.array([0, 13, 14]))
    if name == "pread":  # also where a shard's layout is read first
        with pytest.raises(XdscaleError, match=rf"^{path}: cannot be read: Input/output error$"):
            Table(folder, "train").read("sizes", np.array([14]))


def refused(folder, record, words, columns=COLUMNS):
    describe(folder, [record], columns)
    with pytest.raises(XdscaleError, match=rf"^{folder / record.file}: not a shard of this dataset \({words}\); copy"):
        Table(folder, "train").read(columns[0].name, np.array([0]))


def test_a_shard_whose_last_array_is_not_all_there_is_refused(folder):
    record = Manifest.load(folder).shards[0]
    path = folder / record.file
    whole = path.read_bytes()
    at = whole.index(b"000001.region_offsets.npy")
    path.write_bytes(whole[: at + 512 + 128 + 15])  # its four offsets take 16 bytes
    end = at + 512 + 128 + 16
    cut = record.model_copy(update={"bytes": end - 1})
    refused(folder, cut, rf"000001\.region_offsets\.npy ends at byte {end} of {end - 1}")
    path.write_bytes(whole[:end])
    describe(folder, [record.model_copy(update={"bytes": end})])
    assert Table(folder, "train").read("sizes", np.array([6])).tolist() == [[12, 13]]


def test_a_shard_with_a_block_of_no_rows_is_refused(tmp_path):
    """Two blocks would begin with the same row."""
    with ShardWriter(tmp_path / "train-000000.tar", COLUMNS) as writer:
        writer.add(rows_of(0))
        writer._write_block(7)
        writer._write_block(0)
        record = writer.finish()
    refused(tmp_path, record, r"one of its 2 blocks holds no rows")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            b"\x93NUMPY\x01",
            b"\x93NUMPX\x01",
            r"000000\.sizes\.npy holds no \.npy file of version 1\.0 \(.*\), expected u",
        ),
        (b"'<u2'", b"'<i2'", r"000000\.sizes\.npy holds int16 \[4, 2\], expected uint16 \[4, 2\]"),
        (
            b"000000.sizes.npy",
            b"000000.sixes.npy",
            r"byte 0: expected the member 000000\.sizes\.npy, found '000000\.six",
        ),
    ],
)
def test_headers_of_members_are_checked(folder, old, new, words):
    record = Manifest.load(folder).shards[0]
    path = folder / record.file
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(XdscaleError, match=rf"^{path}: not a shard of this dataset \({words}"):
        Table(folder, "train").read("sizes", np.array([0]))


def test_a_shard_that_cannot_be_read_is_a_damaged_one(folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    records = Manifest.load(folder).shards
    assert verify.damaged_shards(folder, records, records) == {}
    monkeypatch.setattr(verify, "file_sha256", fail)
    problems = verify.damaged_shards(folder, records[:1], records)
    assert problems == {records[0].file: f"{folder / records[0].file}: cannot be read: Input/output error"}


def opened(folder, tmp_path, **how):
    records = Manifest.load(folder).shards
    place = place_manifest(fetch_manifest(f"file://{folder}"), tmp_path / "cache")
    return ShardCache(f"file://{folder}", place, records, **{"budget": 10**6, "sharers": 1} | how), records


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    text = fetch_manifest(f"file://{folder}")
    with pytest.raises(XdscaleError, match=rf"^run\.cache = {tmp_path / 'file'}: cannot be written: Not a directory$"):
        place_manifest(text, tmp_path / "file")
    found, records = opened(folder, tmp_path)
    (found.folder / f".{records[0].file}.partial").mkdir()
    with pytest.raises(XdscaleError, match=rf"^run\.cache: {found.folder}: cannot be written: Is a directory$"):
        with found.opened(records[:1]):
            pass
    with pytest.raises(XdscaleError, match=rf"^run\.cache: {found.folder}: cannot be written: Is a directory$"):
        fetch_shards(f"file://{folder}", found.folder, records, verify=False)
    found.close()


def test_a_shard_larger_than_a_ranks_share_is_never_waited_for(folder, tmp_path):
    size = Manifest.load(folder).shards[0].bytes
    fits, records = opened(folder, tmp_path, budget=2 * size, sharers=2)
    with fits.opened(records[:1]):
        pass
    short, _ = opened(folder, tmp_path, budget=2 * size - 1, sharers=2)
    with pytest.raises(XdscaleError, match=rf"one shard needs {size:,} bytes; set it to {2 * size:,} or more"):
        with short.opened(records[:1]):
            pass
    for one in (fits, short):
        one.close()


def test_a_damaged_shard_whose_source_is_gone_stops_the_look_at_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", ())
    found, records = opened(folder, tmp_path)
    (found.folder / f"{records[0].file}{cache._DAMAGED}").write_text("altered")
    (folder / records[0].file).unlink()
    (folder / records[0].file).mkdir()
    with pytest.raises(XdscaleError, match=rf"{records[0].file}: cannot be fetched after 1 attempts: "):
        found.damaged(records, verify=False)
    found.close()


def test_a_shard_that_is_being_removed_is_not_there(folder, tmp_path):
    found, records = opened(folder, tmp_path)
    path = found.folder / records[0].file
    shutil.copy(folder / records[0].file, path)
    before = len(os.listdir("/proc/self/fd"))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert found._open_present(records[0]) is None
    assert len(os.listdir("/proc/self/fd")) == before
    descriptor = found._open_present(records[0])
    assert os.fstat(descriptor).st_size == records[0].bytes
    os.close(descriptor)
    os.truncate(path, records[0].bytes - 1)
    assert found._open_present(records[0]) is None
    assert len(os.listdir("/proc/self/fd")) == before
    found.close()
