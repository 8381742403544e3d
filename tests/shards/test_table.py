"""Shards read back: against stock webdataset and plain numpy, in any order, with few open files."""

import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import MANIFEST_NAME, Column, Manifest, Split
from xdscale.shards.shard import write_shard
from xdscale.shards.table import Table

COLUMNS = [
    Column(name="language", dtype="<u2", shape=(30,)),
    Column(name="clip", dtype="<u2", offsets="clip_offsets", fewest=1, most=75),
]


def read_with_webdataset(folder, split):
    """All sequences of a split: stock webdataset for the tar, numpy for the members, shards in manifest order."""
    urls = [str(folder / record.file) for record in Manifest.load(folder).tables["text"].splits[split].shards]
    language, clip = [], []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        arrays = {
            name: np.load(io.BytesIO(sample[name]), allow_pickle=False)
            for name in ("language.npy", "clip.npy", "clip_offsets.npy")
        }
        language.append(arrays["language.npy"])
        clip += np.split(arrays["clip.npy"], arrays["clip_offsets.npy"][1:-1].astype(np.int64))
    return np.concatenate(language), clip


@pytest.fixture(scope="module")
def many_blocks(small_dataset, tmp_path_factory):
    """Three shards of 5, 2,500 and 1,024 sequences of random ids: one short, one of three blocks, one exact."""
    chance = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("blocks")
    records, arrays = [], []
    for number, samples in enumerate((5, 2500, 1024)):
        language = chance.integers(0, 2**16, (samples, 30)).astype(np.uint16)
        offsets = np.concatenate([[0], np.cumsum(chance.integers(1, 76, samples))])
        clip = chance.integers(0, 2**16, offsets[-1]).astype(np.uint16)
        columns = {"language": language, "clip": clip, "clip_offsets": offsets}
        records.append(write_shard(folder / f"train-{number:06d}.tar", COLUMNS, columns))
        arrays.append((language, np.split(clip, offsets[1:-1])))
    clip = [ids for _, pieces in arrays for ids in pieces]
    describe(folder, small_dataset, records)
    return folder, np.concatenate([language for language, _ in arrays]), clip


def describe(folder, like, records):
    """Writes the manifest of other shards of the same columns."""
    table = Manifest.load(like).tables["text"].model_copy(update={"splits": {"train": Split.of(records, {})}})
    (folder / MANIFEST_NAME).write_text(Manifest(tables={"text": table}).to_json())


def check(split, sample_ids, language, clip):
    found = split.read("language", sample_ids)
    assert found.dtype == np.uint16
    assert np.array_equal(found, language[sample_ids])
    ids, offsets = split.read_ragged("clip", sample_ids)
    assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.uint16, np.int64, 0, len(ids))
    assert len(offsets) == len(sample_ids) + 1
    for number, sample in enumerate(sample_ids):
        assert np.array_equal(ids[offsets[number] : offsets[number + 1]], clip[sample])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stock_webdataset_reads_the_same(small_dataset, split):
    language, clip = read_with_webdataset(small_dataset, split)
    reader = Table(small_dataset, split)
    assert len(reader) == len(language) == reader.manifest.tables["text"].splits[split].rows
    check(reader, np.arange(len(reader)), language, clip)


@settings(max_examples=60, deadline=None)
@given(sample_ids=st.lists(st.integers(0, 3528), max_size=60))
def test_any_order_and_repeats(many_blocks, sample_ids):
    folder, language, clip = many_blocks
    check(Table(folder, "train", max_open_shards=1), np.array(sample_ids, np.int64), language, clip)


def test_borders_of_blocks_and_shards(many_blocks):
    folder, language, clip = many_blocks
    borders = np.array([3528, 0, 4, 5, 1028, 1029, 2052, 2053, 2504, 2505, 2504, 5])
    check(Table(folder, "train"), borders, language, clip)
    stock = read_with_webdataset(folder, "train")
    assert np.array_equal(stock[0], language)


def test_one_row_is_asked_for_by_its_number_also_from_the_end(many_blocks):
    folder, language, clip = many_blocks
    table, size = Table(folder, "train"), len(language)
    for row in (0, 5, size - 1, -1, -size, np.int64(7)):
        found = table[row]
        assert list(found) == ["language", "clip"]
        assert np.array_equal(found["language"], language[row])
        assert np.array_equal(found["clip"], clip[row])
    for row in (size, -size - 1):
        with pytest.raises(IndexError, match=f"no row {row}; train has {size}$"):
            table[row]
    with pytest.raises(XdscaleError, match=r"\[slice\(None, 2, None\)\]: expected the number of one row"):
        table[:2]


def test_results_do_not_depend_on_the_file_staying_open(many_blocks):
    folder, language, _ = many_blocks
    reader = Table(folder, "train", max_open_shards=1)
    first = reader.read("language", np.array([0, 1]))
    reader.read("language", np.array([3000]))  # closes the first shard
    assert np.array_equal(first, language[:2])


def open_shards(folder):
    """Returns the files of a folder that this process has open."""
    names = [os.path.realpath(Path("/proc/self/fd") / name) for name in os.listdir("/proc/self/fd")]
    return [name for name in names if name.startswith(str(folder))]


@pytest.mark.parametrize("bound", [1, 2])
def test_open_files_stay_bounded(many_blocks, bound):
    folder, _, _ = many_blocks
    reader = Table(folder, "train", max_open_shards=bound)
    assert not open_shards(folder)
    for sample in (0, 100, 3000, 1, 2000, 3500):
        reader.read("language", np.array([sample]))
        reader.read_ragged("clip", np.array([sample]))
        assert 1 <= len(open_shards(folder)) <= bound


def test_a_process_without_standard_output_keeps_its_shards_open(many_blocks):
    """What it opens first gets the numbers 0 and 1."""
    folder, language, _ = many_blocks

    def child():
        os.closerange(0, 2)
        reader = Table(folder, "train")
        found = [reader.read("language", np.array([sample])) for sample in (0, 100, 3000) * 2]
        names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        right = np.array_equal(np.concatenate(found), language[[0, 100, 3000] * 2])
        os._exit(0 if right and sum(name.startswith(str(folder)) for name in names) == 3 else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_threads_that_read_at_once_do_not_disturb_each_other(many_blocks):
    """A validation reads the table that the next steps are read from: one closes shards that the other needs."""
    folder, language, clip = many_blocks
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            reader = Table(folder, "train", max_open_shards=1)

            def read(seed, reader=reader):
                for ids in np.random.default_rng(seed).integers(0, 3529, (50, 4)):
                    check(reader, ids, language, clip)

            with ThreadPoolExecutor(3) as threads:
                list(threads.map(read, range(3)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("known", [False, True])
def test_threads_read_at_the_same_time(many_blocks, monkeypatch, known):
    """None waits for the disk that another one waits for, be it for a shard's layout or for rows."""
    folder, language, _ = many_blocks
    reader, rows = Table(folder, "train"), [np.array([3]), np.array([1500])]
    if known:
        reader.read("language", np.concatenate(rows))
    together, pread, met = threading.Barrier(2, timeout=10), os.pread, set()

    def meet(*place):
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            together.wait()
        return pread(*place)

    monkeypatch.setattr(os, "pread", meet)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(reader.read, ["language"] * 2, rows))
    assert len(met) == 2
    assert all(np.array_equal(ids, language[wanted]) for ids, wanted in zip(found, rows))


def test_what_one_thread_reads_is_not_closed_for_another(many_blocks, monkeypatch):
    folder, language, _ = many_blocks
    reader, pread, most = Table(folder, "train", max_open_shards=1), os.pread, []
    reader.read("language", np.array([3, 1500]))  # both layouts are known
    first, second = threading.Event(), []

    def slowly(descriptor, *place):
        if not first.is_set():
            first.set()
            other.start()
            other.join(0.3)  # it waits for room, or closes this shard
        most.append(len(open_shards(folder)))
        return pread(descriptor, *place)

    other = threading.Thread(target=lambda: second.append(reader.read("language", np.array([1500]))))
    monkeypatch.setattr(os, "pread", slowly)
    assert np.array_equal(reader.read("language", np.array([3])), language[[3]])
    other.join()
    assert np.array_equal(second[0], language[[1500]])
    assert most == [1, 1]


def test_a_shard_that_another_thread_opens_meanwhile_is_read_rightly(many_blocks):
    """Where its blocks begin is known only then."""
    folder, language, _ = many_blocks
    reader, rows = Table(folder, "train"), np.array([5, 1029, 2504])
    other = threading.Thread(target=reader.read, args=("language", rows))

    class Meanwhile:
        def __getitem__(self, blocks, inner=reader._block_shard):
            reader._block_shard = inner
            other.start()
            other.join(0.5)  # it waits for this thread, or is done
            return inner[blocks]

    reader._block_shard = Meanwhile()
    assert np.array_equal(reader.read("language", rows), language[rows])
    other.join()


def test_bad_ids_and_splits_are_named(small_dataset):
    reader = Table(small_dataset, "train")
    for bad in (-1, len(reader)):
        with pytest.raises(XdscaleError, match=f"row {bad} does not exist; train has rows 0 to"):
            reader.read("language", np.array([0, bad]))
    for mask in (np.arange(len(reader)) > 3, np.array([0.5])):
        with pytest.raises(XdscaleError, match=rf"rows of {mask.dtype}; expected numbers, of a mask"):
            reader.read("language", mask)
    assert len(reader.read("language", [])) == 0
    with pytest.raises(XdscaleError, match="no split 'test'; the dataset has: train, validation"):
        Table(small_dataset, "test")


def test_torn_and_missing_shards_are_named(small_build, tmp_path):
    manifest = small_build(tmp_path / "out")
    record = manifest.splits["train"].shards[0]
    path = tmp_path / "out" / record.file
    path.write_bytes(path.read_bytes()[:-512])
    reader = Table(tmp_path / "out", "train")
    expected = f"{record.file}: expected {record.bytes} bytes, found {record.bytes - 512}"
    with pytest.raises(XdscaleError, match=expected):
        reader.read("language", np.array([0]))
    path.write_bytes(b"\0" * record.bytes)
    with pytest.raises(XdscaleError, match=f"{record.file}: not a shard of this dataset"):
        Table(tmp_path / "out", "train").read_ragged("clip", np.array([0]))
    path.unlink()
    with pytest.raises(XdscaleError, match=f"{record.file}: cannot be read: No such file"):
        Table(tmp_path / "out", "train").read_ragged("clip", np.array([0]))
    os.mkfifo(path)  # which nobody writes to
    with pytest.raises(XdscaleError, match=f"{record.file}: is a pipe; copy the shard again"):
        Table(tmp_path / "out", "train").read_ragged("clip", np.array([0]))


def test_damage_that_appears_while_reading_is_named(small_build, tmp_path):
    """A shard cut short, or with texts out of bounds, after it was opened."""
    record = small_build(tmp_path / "out").splits["train"].shards[0]
    path = tmp_path / "out" / record.file
    whole = path.read_bytes()
    reader = Table(tmp_path / "out", "train")
    reader.read("language", np.array([0]))
    os.truncate(path, 700)
    with pytest.raises(XdscaleError, match=f"{record.file}: ends before byte"):
        reader.read("language", np.array([record.rows - 1]))
    begin = whole.rindex(b"\x93NUMPY") + 128
    path.write_bytes(whole[:begin] + b"\xff" * 8 + whole[begin + 8 :])
    with pytest.raises(XdscaleError, match=rf"{record.file}: gives -?\d+ elements of clip to row 0, expected 1 to 75"):
        Table(tmp_path / "out", "train").read_ragged("clip", np.array([0]))


def test_nothing_is_read_from_a_quarantined_shard(small_dataset):
    manifest = Manifest.load(small_dataset).tables["text"]
    first, second = manifest.splits["train"].shards[:2]
    reader = Table(small_dataset, "train", quarantined=[first.file])
    assert reader.usable(np.array([0, first.rows - 1, first.rows])).tolist() == [False, False, True]
    assert reader.first_usable() == first.rows
    reader.read("language", np.array([first.rows]))
    with pytest.raises(XdscaleError, match=f"{first.file}: is in quarantine"):
        reader.read_ragged("clip", np.array([0]))
    every = [shard.file for shard in manifest.splits["train"].shards]
    with pytest.raises(XdscaleError, match=r"every shard of text \(train\) is damaged"):
        Table(small_dataset, "train", quarantined=every)


def test_texts_are_found_without_their_bounds_in_memory(many_blocks, monkeypatch):
    folder, language, clip = many_blocks
    monkeypatch.setattr("xdscale.shards.table.MAX_BOUNDS", 3000)  # room for some of the shards
    check(Table(folder, "train"), np.array([3, 2500, 3528, 4, 3000, 900]), language, clip)


def test_a_shard_of_other_shapes_is_refused(many_blocks, tmp_path):
    """Right size on disk, wrong arrays inside: the reader must not serve shifted ids."""
    folder, _, _ = many_blocks
    ids = np.ones(40, np.uint16)
    record = write_shard(
        tmp_path / "train-000000.tar",
        [COLUMNS[0].model_copy(update={"shape": (20,)}), COLUMNS[1]],
        {"language": ids.reshape(2, 20), "clip": ids, "clip_offsets": np.array([0, 1, 40])},
    )
    describe(tmp_path, folder, [record])
    with pytest.raises(XdscaleError, match=r"000000\.language\.npy holds uint16 \[2, 20\], expected uint16 \[2, 30\]"):
        Table(tmp_path, "train").read("language", np.array([0]))


def test_manifest_errors_say_what_to_do(small_dataset, tmp_path):
    with pytest.raises(XdscaleError, match="no such folder; make it with 'xdscale shards build"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(XdscaleError, match=r"has no dataset\.json.* 'xdscale shards build .* 'xdscale regions import'"):
        Manifest.load(tmp_path)
    (tmp_path / ".build").mkdir()
    with pytest.raises(XdscaleError, match="the build was not finished; run the same command again$"):
        Manifest.load(tmp_path)
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(XdscaleError, match=r"dataset\.json: is a pipe or a device, .*; expected a file"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    good = (small_dataset / MANIFEST_NAME).read_text()
    for old, new, message in (
        ('"format_version": 4', '"format_version": 1', "format_version"),
        (
            '"file": "train-000000.tar"',
            '"file": "../train-000000.tar"',
            r"text\.splits\.train\.shards\.0\.file",
        ),
        ("{", "[", "Invalid JSON"),
        ('"blocks": 1,', f'"blocks": {10**12},', r"text\.splits\.\w+\.shards\.0\.blocks"),
        ('"name": "clip"', '"name": "language"', "two columns, or .*, are named language"),
        ('"offsets": "clip_offsets"', '"offsets": "language"', "two columns, or .*, are named language"),
        ('"file": "validation-000000.tar"', '"file": "train-000000.tar"', "train-000000.tar stands twice in it"),
    ):
        assert old in good
        (tmp_path / MANIFEST_NAME).write_text(good.replace(old, new, 1))
        with pytest.raises(XdscaleError, match=rf"dataset\.json: not a dataset of format 4: .*{message}"):
            Manifest.load(tmp_path)


def test_fingerprint_follows_the_content(small_dataset, tmp_path):
    manifest = Manifest.load(small_dataset)
    (tmp_path / MANIFEST_NAME).write_text(manifest.to_json().replace("\n", " "))
    assert Manifest.load(tmp_path).fingerprint == manifest.fingerprint
    digest = manifest.tables["text"].splits["train"].shards[0].sha256
    (tmp_path / MANIFEST_NAME).write_text(manifest.to_json().replace(digest, "0" * 64))
    assert Manifest.load(tmp_path).fingerprint != manifest.fingerprint


def test_where_rows_begin_and_end_is_read_once(small_dataset, monkeypatch):
    table, rows, reads, pread = Table(small_dataset, "train"), np.array([4, 0, 7]), [], os.pread
    first = table.read_ragged("clip", rows)
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or pread(*place))
    again = table.read_ragged("clip", rows)
    assert np.array_equal(first.values, again.values)
    assert len(reads) == len(rows)


def test_reading_needs_neither_torch_nor_tokenizers():
    """Data-loading workers import the reader; each library here would cost every rank."""
    heavy = ("torch", "tokenizers", "ftfy", "transformers", "webdataset")
    code = f"import sys, xdscale.shards.table, xdscale.shards.verify; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_shard_that_is_replaced_while_it_is_in_use_is_refused_unless_it_is_as_good(many_blocks, tmp_path):
    """Of the same size and form, so that nothing else tells; a copy of it is another file, too."""
    folder = shutil.copytree(many_blocks[0], tmp_path / "copy")
    reader = Table(folder, "train", max_open_shards=1)
    first = folder / "train-000000.tar"
    whole, row = first.read_bytes(), reader[0]["language"]
    reader[5]  # of the next shard, so that the first one is closed
    first.write_bytes(whole)
    os.utime(first, ns=(1, 1))
    np.testing.assert_array_equal(reader[0]["language"], row)
    begin = whole.index(row.tobytes())
    for _ in range(2):  # and the next time
        reader[5]
        first.write_bytes(whole[:begin] + bytes(60) + whole[begin + 60 :])
        os.utime(first, ns=(2, 2))
        with pytest.raises(XdscaleError, match=r"train-000000\.tar: was replaced by another file while it was in use"):
            reader[0]
