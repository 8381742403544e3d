"""Shards from a real HTTP server and from fsspec's memory: verified, retried, named, and fetched once."""

import errno
import fcntl
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards import remote
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.remote import fetch_manifest, fetch_shards, place_manifest
from xdscale.shards.verify import verify_shards


def fetch(url, cache, records, verify=False):
    folder = place_manifest(fetch_manifest(url), cache)
    return folder, fetch_shards(url, folder, records, verify=verify)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_fetched_is_the_dataset_and_is_fetched_once(server, small_dataset, records, tmp_path):
    folder, problems = fetch(server.url, tmp_path / "cache", records)
    assert problems == {}
    verify_shards(folder)
    assert files(folder) == {name: (small_dataset / name).read_bytes() for name in files(folder)}
    assert sorted(server.asked) == sorted([MANIFEST_NAME, *(record.file for record in records)])
    server.asked.clear()
    assert fetch(server.url + "/", tmp_path / "cache", records, verify=True) == (folder, {})
    assert server.asked == [MANIFEST_NAME]


def test_damage_on_the_way_is_fetched_again(server, records, tmp_path):
    server.spoil[records[0].file] = 2
    folder, problems = fetch(server.url, tmp_path, records)
    assert problems == {}
    verify_shards(folder)
    assert server.asked.count(records[0].file) == 3


def test_damage_at_the_source_is_named_with_both_hashes_and_leaves_nothing(server, records, tmp_path):
    server.spoil[records[1].file] = 99
    folder, problems = fetch(server.url, tmp_path, records)
    assert list(problems) == [records[1].file]
    assert f"{server.url}/{records[1].file}: altered: expected {records[1].bytes} bytes of sha256" in str(problems)
    assert records[1].sha256 in problems[records[1].file]
    expected = {MANIFEST_NAME, *(record.file for record in records)} - {records[1].file}
    assert set(files(folder)) == expected


def test_damage_in_the_cache_is_replaced_when_verifying(server, records, tmp_path):
    folder, _ = fetch(server.url, tmp_path, records)
    flipped = bytearray((folder / records[0].file).read_bytes())
    flipped[99] ^= 1
    (folder / records[0].file).write_bytes(flipped)
    (folder / records[1].file).write_bytes(b"torn")
    fetch(server.url, tmp_path, records)
    assert (folder / records[0].file).read_bytes() == flipped  # of the right size: trusted, unless asked to verify
    assert fetch(server.url, tmp_path, records, verify=True)[1] == {}
    verify_shards(folder)


def test_processes_that_share_a_cache_do_not_disturb_each_other(server, records, tmp_path):
    folder = place_manifest(fetch_manifest(server.url), tmp_path)
    server.asked.clear()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: fetch_shards(server.url, folder, records, verify=False), range(6)))
    assert found == [{}] * 6
    verify_shards(folder)
    assert sorted(server.asked) == sorted(record.file for record in records)
    assert not [name for name in files(folder) if name.startswith(".")]


def test_a_cache_without_locks_is_filled_too(server, records, tmp_path, monkeypatch):
    """Each then writes files of its own, and renames them."""

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch(server.url, tmp_path, records), range(4)))
    assert [problems for _, problems in found] == [{}] * 4
    verify_shards(found[0][0])
    assert not [name for name in files(found[0][0]) if name.startswith(".")]


def test_a_cache_that_takes_no_shard_is_named(server, records, tmp_path):
    folder = place_manifest(fetch_manifest(server.url), tmp_path)
    (folder / f".{records[0].file}.partial").mkdir()
    with pytest.raises(XdscaleError, match=rf"run\.cache: {folder}: cannot be written: "):
        fetch_shards(server.url, folder, records, verify=False)


def test_a_server_that_is_not_there_is_named(server, records, tmp_path, free_port):
    nowhere = f"memory://nothing-{free_port()}"
    with pytest.raises(XdscaleError, match=rf"{nowhere}/dataset\.json: cannot be fetched after 3 attempts: "):
        fetch_manifest(nowhere)
    folder = place_manifest(fetch_manifest(server.url), tmp_path)
    with pytest.raises(XdscaleError, match=rf"bad://host/{records[0].file}: cannot be fetched after 3 attempts: "):
        fetch_shards("bad://host", folder, records[:1], verify=False)


def test_what_curl_ends_with_is_told_in_words(server, free_port, monkeypatch):
    """http is fetched with curl where fsspec has no package for it."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", ())
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for url, words in (
        (f"{server.url}/nothing", r"the server has no such file, or does not give it to us \(curl ended with 22\)"),
        (f"http://127.0.0.1:{free_port()}", r"nothing answers there \(curl ended with 7\); is the address right"),
    ):
        with pytest.raises(XdscaleError, match=rf"{url}/dataset\.json: cannot be fetched after 1 attempts: {words}"):
            fetch_manifest(url)


def test_memory_file_and_pipe_urls(small_dataset, records, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0,))
    memory = fsspec.filesystem("memory")
    memory.put(f"{small_dataset}/", "/wiki/", recursive=True)
    places = ("memory://wiki", f"file://{small_dataset}", f"pipe:cat {small_dataset}")
    for number, url in enumerate(places):
        folder, problems = fetch(url, tmp_path / str(number), records)
        assert problems == {}
        verify_shards(folder)
    memory.rm(f"/wiki/{records[0].file}")
    problems = fetch("memory://wiki", tmp_path / "missing", records)[1]
    assert problems == {records[0].file: f"memory://wiki/{records[0].file}: missing"}


def test_no_name_reaches_a_shell(server, small_dataset, tmp_path, monkeypatch):
    """An https URL may come from a file, a shard's name from whoever made the dataset."""
    monkeypatch.chdir(tmp_path)
    for path in ("/$(touch a)", "/;touch b;", "/`touch c`", "/'|touch d|'", '/"&touch e&"', "/\n touch f\n"):
        with pytest.raises(XdscaleError, match="cannot be fetched"):
            fetch_manifest(server.url + path)
    manifest = json.loads((small_dataset / MANIFEST_NAME).read_text())
    for name in ("train-000000.tar;touch g", "train-000000.tar\n", "../train-000000.tar", "$(touch h)-000000.tar"):
        manifest["tables"]["text"]["splits"]["train"]["shards"][0]["file"] = name
        folder = place_manifest(json.dumps(manifest), tmp_path / "cache")
        with pytest.raises(XdscaleError, match=r"text\.splits\.train\.shards\.0\.file: String should match pattern"):
            Manifest.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_another_dataset_behind_the_same_url_gets_another_folder(small_dataset, records, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small_dataset, source)
    first, _ = fetch(f"file://{source}", tmp_path / "cache", records)
    manifest = json.loads((source / MANIFEST_NAME).read_text())
    manifest["tables"]["text"]["counts"]["documents"] += 1
    (source / MANIFEST_NAME).write_text(json.dumps(manifest))
    second, _ = fetch(f"file://{source}", tmp_path / "cache", records)
    assert first != second
    assert (first / MANIFEST_NAME).read_bytes() == (small_dataset / MANIFEST_NAME).read_bytes()


def test_each_mib_that_comes_is_told(records, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", ())  # it is not what the manifest says, and tried once
    with fsspec.open("memory://large.tar", "wb") as file:
        file.write(bytes((3 << 20) + 1))
    told = []
    remote.download("memory://large.tar", tmp_path / "aside", records[0], on_arrival=lambda: told.append(1))
    assert len(told) == 4
