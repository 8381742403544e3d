"""Parts built apart and merged: the bytes of a one-machine build, and nothing less is accepted."""

import errno
import fcntl
import hashlib
import os
import shutil

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.build import merge_parts
from xdscale.shards.manifest import Manifest
from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.table import Table
from xdscale.shards.verify import verify_shards
from xdscale.shards.workplace import Part

pytestmark = pytest.mark.usefixtures("loaded_once")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(small_dataset):
    return digests(small_dataset)


@pytest.fixture
def parts(small_build, tmp_path):
    """Three finished parts in one folder."""
    for index in (2, 0, 1):
        small_build(tmp_path / "out", part=Part(index, 3))
    return tmp_path / "out"


@pytest.mark.parametrize("of", [1, 2, 3, 40])
def test_merged_parts_are_the_bytes_of_one_build(small_build, expected, tmp_path, of):
    """40 parts: more than there are units, so that some are empty."""
    out = tmp_path / "out"
    for index in reversed(range(of)):
        small_build(out, part=Part(index, of), workers=2 if (index, of) == (0, 2) else 1)
    if of > 1:
        assert not (out / "dataset.json").exists()
        merge_parts(out)
    assert digests(out) == expected
    assert len(Table(out, "train")) == Manifest.load(out).tables["text"].splits["train"].rows


def test_a_part_reports_its_own_share(small_build, small_dataset, tmp_path, capsys):
    whole = Manifest.load(small_dataset).tables["text"]
    shares = [small_build(tmp_path / "out", part=Part(index, 2)) for index in range(2)]
    assert "warning" not in capsys.readouterr().err
    assert sum(share.counts["documents"] for share in shares) == whole.counts["documents"] == 60
    for split in ("train", "validation"):
        files = [{shard.file for shard in share.splits[split].shards} for share in shares]
        assert not files[0] & files[1]
        assert files[0] | files[1] == {shard.file for shard in whole.splits[split].shards}


@pytest.mark.parametrize("of", [1, 2])
def test_a_file_system_without_locks_is_built_on_with_a_warning(
    small_build, expected, tmp_path, monkeypatch, capsys, of
):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for index in range(of):
        small_build(tmp_path / "out", part=Part(index, of))
    if of > 1:
        merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == expected
    assert f"warning: {tmp_path / 'out'}: its file system has no locks (Function not" in (
        said := capsys.readouterr().err
    )
    assert said.count("warning: ") == (1 if of == 1 else of + 1)  # not of the lock that parts share


def test_parts_build_at_the_same_time_in_one_folder(small_build, expected, tmp_path):
    """Part 1 starts and ends while part 0 is at work; what would disturb part 0 is refused."""
    out = tmp_path / "out"
    refused = []

    def during(progress):
        if refused:
            return
        small_build(out, part=Part(1, 2))
        finished = (out / "part-00001-of-00002.json").read_text()
        (out / "part-00000-of-00002.json").write_text(finished.replace('"index": 1', '"index": 0'))
        for disturb in (lambda: small_build(out, part=Part(0, 2)), lambda: merge_parts(out)):
            with pytest.raises(XdscaleError) as caught:
                disturb()
            refused.append(str(caught.value))

    small_build(out, part=Part(0, 2), on_progress=during)
    assert len(refused) == 2
    assert all("another process is building here" in message for message in refused), refused
    merge_parts(out)
    assert digests(out) == expected


def test_parts_built_on_other_machines_are_copied_together(small_build, expected, tmp_path):
    """Without a shared disk: only what is visible is copied."""
    out = tmp_path / "out"
    out.mkdir()
    for index in range(2):
        small_build(tmp_path / f"machine{index}", part=Part(index, 2))
        for path in (tmp_path / f"machine{index}").glob("[!.]*"):
            shutil.copy(path, out)
    merge_parts(out)
    assert digests(out) == expected


def test_missing_parts_are_named(small_build, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(XdscaleError, match="holds no finished part"):
        merge_parts(out)
    small_build(out, part=Part(1, 4))
    with pytest.raises(XdscaleError, match="missing or not finished: 0/4, 2/4, 3/4"):
        merge_parts(out)
    with pytest.raises(XdscaleError, match="the build was not finished"):
        Manifest.load(out)


def test_parts_of_different_builds_are_refused(small_build, tmp_path):
    small_build(tmp_path / "a", part=Part(0, 2))
    small_build(tmp_path / "b", part=Part(1, 2), min_words=7)
    shutil.copy(tmp_path / "b" / "part-00001-of-00002.json", tmp_path / "a")
    with pytest.raises(XdscaleError, match="part 1/2 is of another build than part 0/2"):
        merge_parts(tmp_path / "a")
    # In one folder a difference is noticed when the part starts.
    with pytest.raises(XdscaleError, match="unfinished build with min_words 5, now 7"):
        small_build(tmp_path / "a", part=Part(1, 2), min_words=7)
    with pytest.raises(XdscaleError, match="unfinished build with parts 2, now 3"):
        small_build(tmp_path / "a", part=Part(1, 3))
    with pytest.raises(XdscaleError, match="unfinished build with parts 2, now 1"):
        small_build(tmp_path / "a")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_merge_names_a_damaged_shard_and_its_part(small_build, parts, expected, damage):
    path = parts / "train-000001.tar"  # unit 1, so part 1 of 3
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[700] ^= 16
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, 1000)
    else:
        path.unlink()
    word = {"flip": "altered", "truncate": "truncated", "delete": "missing"}[damage]
    with pytest.raises(XdscaleError, match=rf"build or copy again the parts 1/3\n.*train-000001\.tar: {word}"):
        merge_parts(parts)
    assert not (parts / "dataset.json").exists()
    small_build(parts, part=Part(1, 3))
    merge_parts(parts)
    assert digests(parts) == expected


def test_a_damaged_part_file_is_named(parts):
    path = parts / "part-00002-of-00003.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(XdscaleError, match=r"part-00002-of-00003\.json: cannot be read .*build this part again"):
        merge_parts(parts)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(XdscaleError, match=r"part-00002-of-00003\.json: is a pipe or a device"):
        merge_parts(parts)


def test_merging_again_and_building_again_change_nothing(small_build, parts, expected):
    first = merge_parts(parts)
    assert merge_parts(parts) == first
    assert small_build(parts, part=Part(1, 3)) == first
    assert small_build(parts) == first
    assert digests(parts) == expected
    verify_shards(parts)


def test_overwriting_one_part_is_refused(small_build, parts):
    with pytest.raises(XdscaleError, match="would remove the other parts"):
        small_build(parts, part=Part(0, 3), overwrite=True)


@pytest.mark.parametrize("text", ["8/8", "1/0", "-1/2", "1", "a/b", "1/2/3", ""])
def test_what_is_no_part(text):
    with pytest.raises(XdscaleError, match="expected i/n with i from 0 to n - 1"):
        Part.parse(text)


def test_parts_of_another_table_are_merged_into_a_dataset(small_build, tmp_path):
    out, boxes = tmp_path / "out", np.array([[0, 0, 5, 5]], np.float32)
    build_regions([RegionImage("a", (9, 9), boxes)], out, Detector(model="m"))
    regions = Manifest.load(out).tables["regions"]
    for number in (0, 1):
        small_build(out, part=Part(number, 2))
    text = merge_parts(out)
    assert Manifest.load(out).tables == {"regions": regions, "text": text}
    assert merge_parts(out) in (regions, text)  # nothing is left to merge
