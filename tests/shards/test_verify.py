"""Every kind of damage is found and named."""

import os
import shutil
import time
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest, add_counts
from xdscale.shards.table import Table
from xdscale.shards.verify import verify_shards


@pytest.fixture
def dataset(small_dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(small_dataset, folder)
    return folder


def shard(folder, number=0, split="train"):
    return Manifest.load(folder).tables["text"].splits[split].shards[number]


def test_an_intact_dataset_passes_and_reports(dataset):
    seen = []
    verify_shards(dataset, on_progress=lambda done, total: seen.append((done, total)))
    shards = Manifest.load(dataset).shards
    assert len(seen) == len(shards) > 3
    assert seen[-1] == (sum(record.bytes for record in shards),) * 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(small_dataset, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "dataset"
    shutil.copytree(small_dataset, folder)
    record = shard(folder)
    content = bytearray((folder / record.file).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / record.file).write_bytes(content)
    with pytest.raises(XdscaleError, match=f"{record.file}: altered: expected sha256 {record.sha256}, found [0-9a-f]+"):
        verify_shards(folder)
    shutil.rmtree(folder)


def test_all_damage_is_named_at_once(dataset):
    truncated, missing, longer = shard(dataset, 0), shard(dataset, 1), shard(dataset, 0, "validation")
    path = dataset / truncated.file
    path.write_bytes(path.read_bytes()[:-1])
    (dataset / missing.file).unlink()
    path = dataset / longer.file
    path.write_bytes(path.read_bytes() + b"\0")
    (dataset / "train-000099.tar").write_bytes(b"")
    with pytest.raises(XdscaleError) as caught:
        verify_shards(dataset)
    message = str(caught.value)
    assert "4 problems" in message
    assert f"{truncated.file}: truncated: expected {truncated.bytes} bytes, found {truncated.bytes - 1}" in message
    assert f"{missing.file}: missing" in message
    assert f"{longer.file}: altered: expected {longer.bytes} bytes, found {longer.bytes + 1}" in message
    assert "train-000099.tar: extra" in message


def test_swapped_shards_are_both_named(dataset):
    first, second = shard(dataset, 0), shard(dataset, 1)
    (dataset / first.file).rename(dataset / "aside")
    (dataset / second.file).rename(dataset / first.file)
    (dataset / "aside").rename(dataset / second.file)
    with pytest.raises(XdscaleError) as caught:
        verify_shards(dataset)
    assert first.file in str(caught.value)
    assert second.file in str(caught.value)


def test_a_copy_under_another_name_is_recognised(dataset):
    first, second = (
        shard(dataset, 0),
        next(
            record
            for record in Manifest.load(dataset).tables["text"].splits["train"].shards[1:]
            if record.bytes == shard(dataset).bytes
        ),
    )
    shutil.copy(dataset / first.file, dataset / second.file)
    with pytest.raises(XdscaleError, match=rf"{second.file}: altered: .*\(the content of {first.file}\)"):
        verify_shards(dataset)


def test_counts_are_summed_by_name_and_histograms_place_by_place():
    parts = [{"rows": 2, "lengths": [1, 2]}, {"lengths": [1, 0, 5], "images": 1}, {"rows": 3, "lengths": []}]
    assert add_counts(parts) == {"rows": 5, "lengths": [2, 2, 5], "images": 1}
    assert add_counts(reversed(parts)) == add_counts(parts)
    assert add_counts([]) == {}


@pytest.mark.parametrize("as_good", [True, False])
def test_a_shard_that_is_replaced_before_it_is_first_opened_is_refused_unless_it_is_as_good(dataset, as_good):
    """Of the same size, form and time of writing: what was verified before the first step is no longer there."""
    row, path = Table(dataset, "train")[0]["language"], dataset / shard(dataset).file
    reader, old = Table(dataset, "train"), path.stat().st_mtime_ns
    time.sleep(0.02)  # a file system's clock may stand still for less
    whole = path.read_bytes()
    path.write_bytes(whole if as_good else whole.replace(row.tobytes(), bytes(row.nbytes)))
    os.utime(path, ns=(old, old))
    with nullcontext() if as_good else pytest.raises(XdscaleError, match=f"{path.name}: was replaced by another file"):
        np.testing.assert_array_equal(reader[0]["language"], row)
