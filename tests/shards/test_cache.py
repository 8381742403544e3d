"""Shards fetched when they are needed: the rows of a local table under any budget, and never more than the budget."""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards import remote
from xdscale.shards.cache import ShardCache
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.remote import fetch_manifest, place_manifest
from xdscale.shards.table import Table


@pytest.fixture(scope="module")
def local(small_dataset):
    """The tables of both splits, read from the disk."""
    return {split: Table(small_dataset, split) for split in ("train", "validation")}


def open_cache(url, cache, budget, sharers=1):
    folder = place_manifest(fetch_manifest(url), cache)
    return ShardCache(url, folder, Manifest.load(folder).shards, budget=budget, sharers=sharers)


def stored(folder):
    """Names and bytes of the shards in a cache, those on their way too."""
    sizes = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix in (".tar", ".partial"):
                sizes[path.name] = path.stat().st_size
    return sizes


def check_rows(found, expected, rows):
    """Both columns of a remote table against the local one."""
    assert np.array_equal(found.read("language", rows), expected.read("language", rows))
    ours, theirs = found.read_ragged("clip", rows), expected.read_ragged("clip", rows)
    assert np.array_equal(ours.values, theirs.values)
    assert np.array_equal(ours.offsets, theirs.offsets)


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["read", "prefetch", "forget"]),
        st.sampled_from(["train", "validation"]),
        st.integers(0, 1),
        st.lists(st.floats(0, 0.999), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(accesses=ACCESSES, room=st.floats(0, 1), sharers=st.integers(1, 2))
def test_any_access_under_any_budget_reads_the_rows_of_a_local_table(
    small_dataset, local, records, tmp_path_factory, accesses, room, sharers
):
    """Two ranks with a cache each on one folder; one of them may be gone and come back."""
    sizes = [record.bytes for record in records]
    budget = sharers * max(sizes) + round(room * sum(sizes))
    cache = tmp_path_factory.mktemp("cache")
    ranks = [open_cache(f"file://{small_dataset}", cache, budget, sharers) for _ in range(sharers)]
    tables = [{split: Table(rank.folder, split, cache=rank) for split in local} for rank in ranks]
    for kind, split, rank, places in accesses:
        rank %= sharers
        rows = np.array([int(place * len(local[split])) for place in places])
        if kind == "read":
            check_rows(tables[rank][split], local[split], rows)
        elif kind == "forget":
            ranks[rank].close()
            ranks[rank] = open_cache(f"file://{small_dataset}", cache, budget, sharers)
            tables[rank] = {name: Table(ranks[rank].folder, name, cache=ranks[rank]) for name in local}
        else:
            needed = sum(record.bytes for record in touched(local[split], rows))
            with contextlib.nullcontext() if needed <= budget // sharers else pytest.raises(XdscaleError):
                tables[rank][split].prefetch(rows)
        assert sum(stored(ranks[0].folder).values()) <= budget
    for rank in ranks:
        rank.close()
    shutil.rmtree(cache)


def touched(table, rows):
    """The shards that rows lie in, by adding up their sizes."""
    shards = table.manifest.tables["text"].splits[table.split].shards
    ends = np.cumsum([shard.rows for shard in shards])
    return [shards[number] for number in sorted({int((row >= ends).sum()) for row in rows})]


def first_rows(table, count):
    """The first row of each of the first shards."""
    shards = table.manifest.tables["text"].splits[table.split].shards
    return np.cumsum([0, *(shard.rows for shard in shards)])[:count]


def test_the_least_recently_used_goes_first(server, records, local, tmp_path):
    train = records[:3]
    budget = sum(record.bytes for record in train) + 2000
    cache = open_cache(server.url, tmp_path, budget)
    table = Table(cache.folder, "train", cache=cache)
    rows = first_rows(table, 6)
    for row in (0, 1, 2, 0, 3):  # the second shard was used longest ago when the fourth comes
        table.read("language", rows[[row]])
        time.sleep(0.01)
    kept = set(stored(cache.folder))
    assert {records[0].file} <= kept <= {records[number].file for number in (0, 2, 3)}
    assert server.asked.count(records[0].file) == 1
    server.asked.clear()
    table.read("language", rows[[0]])
    assert server.asked == []
    cache.close()


def test_what_was_read_stays_when_a_step_asks_for_it_again(server, records, tmp_path):
    """It must not make room for what a later step needs."""
    budget = records[0].bytes + max(records[1].bytes, records[2].bytes)
    cache = open_cache(server.url, tmp_path, budget)
    table = Table(cache.folder, "train", cache=cache)
    rows = first_rows(table, 3)
    table.read("language", rows[[0]])
    for step in ([0], [1], [2]):
        table.prefetch(rows[step])
    table.read("language", rows[[1]])
    server.asked.clear()
    table.read("language", rows[[0]])
    assert server.asked == []
    cache.close()


def test_what_is_fetched_ahead_is_not_waited_for(server, records, local, tmp_path):
    """And is fetched once, though two ranks ask for it."""
    budget = 2 * sum(record.bytes for record in records)
    ranks = [open_cache(server.url, tmp_path, budget, sharers=2) for _ in range(2)]
    tables = [Table(rank.folder, "train", cache=rank) for rank in ranks]
    server.asked.clear()
    rows = np.arange(0, len(local["train"]), 7)
    for table in tables:
        table.prefetch(rows)
    deadline = time.monotonic() + 30
    while len(stored(ranks[0].folder)) < len(touched(local["train"], rows)) or any(
        name.startswith(".") for name in stored(ranks[0].folder)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.asked.append("read")
    for table in tables:
        check_rows(table, local["train"], rows)
    assert server.asked[-1] == "read"
    assert sorted(server.asked[:-1]) == sorted({record.file for record in touched(local["train"], rows)})
    for rank in ranks:
        rank.close()


def test_what_arrives_is_told_while_it_does(server, records, tmp_path):
    """A watchdog lets a rank wait for a shard that takes long to come, if it comes."""
    folder = place_manifest(fetch_manifest(server.url), tmp_path)
    told = []
    cache = ShardCache(
        server.url, folder, records, budget=10**9, sharers=1, on_arrival=lambda: told.append(stored(folder))
    )
    with cache.opened(records[:1]):
        pass
    assert told
    assert all(list(there) == [f".{records[0].file}.partial"] for there in told)
    cache.close()


def test_a_budget_that_is_too_small_says_how_much_is_needed(small_dataset, records, local, tmp_path):
    largest = max(record.bytes for record in records if record.file.startswith("train"))
    small = open_cache(f"file://{small_dataset}", tmp_path, 2 * largest - 2, sharers=2)
    with pytest.raises(XdscaleError, match=rf"one shard needs {largest:,} bytes.*{2 * largest:,} or"):
        Table(small.folder, "train", cache=small)
    small.close()
    every = np.arange(len(local["train"]))
    needed = sum(record.bytes for record in touched(local["train"], every))
    cache = open_cache(f"file://{small_dataset}", tmp_path, needed - 1)
    table = Table(cache.folder, "train", cache=cache)
    message = rf"cache_bytes = {needed - 1:,}: one step's \d+ shards need {needed:,} bytes; set it to {needed:,} or"
    with pytest.raises(XdscaleError, match=message):
        table.prefetch(every)
    check_rows(table, local["train"], every)  # a reader that has time may read more than fits at once
    cache.close()
    cache = open_cache(f"file://{small_dataset}", tmp_path, needed)
    Table(cache.folder, "train", cache=cache).prefetch(every)
    cache.close()


def test_a_shard_in_use_stays_and_whoever_waits_for_room_goes_on(small_dataset, records, tmp_path):
    first, second = records[:2]
    budget = 2 * max(first.bytes, second.bytes) - 2
    url = f"file://{small_dataset}"
    # As if each were alone, so that their shares do not keep them from each other's room.
    ours, theirs = (open_cache(url, tmp_path, budget) for _ in range(2))
    done = threading.Event()

    def fetch_second():
        with theirs.opened([second]) as descriptors:
            assert len(os.pread(descriptors[0], second.bytes, 0)) == second.bytes
        done.set()

    with ours.opened([first]) as (descriptor,):
        thread = threading.Thread(target=fetch_second)
        thread.start()
        time.sleep(0.3)
        assert not done.is_set()
        assert (ours.folder / first.file).is_file()
        assert len(os.pread(descriptor, first.bytes, 0)) == first.bytes
    ours.close()
    thread.join(30)
    assert done.is_set()
    assert list(stored(ours.folder)) == [second.file]
    theirs.close()


def test_what_a_killed_rank_held_or_was_fetching_is_free(small_dataset, records, local, tmp_path):
    first = records[0]
    url = f"file://{small_dataset}"
    folder = place_manifest(fetch_manifest(url), tmp_path)

    def hold_for_ever():
        cache = ShardCache(url, folder, records, budget=10 * first.bytes, sharers=1)
        with cache.opened([first]):
            held = open(folder / f".{records[1].file}.partial", "wb")
            held.write(b"half a shard")
            fcntl.flock(held, fcntl.LOCK_EX)
            ready.set()
            time.sleep(600)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold_for_ever)
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    budget = max(record.bytes for record in records)
    cache = open_cache(url, tmp_path, budget)
    table = Table(cache.folder, "train", cache=cache)
    check_rows(table, local["train"], np.arange(len(local["train"])))
    assert sum(stored(folder).values()) <= budget
    assert not [name for name in stored(folder) if name.startswith(".")]
    cache.close()


def read_at_random(url, folder, records, budget, ranks, rank, small_dataset, failed):
    cache = ShardCache(url, folder, records, budget=budget, sharers=ranks)
    found, expected = Table(folder, "train", cache=cache), Table(small_dataset, "train")
    chance = np.random.default_rng(rank)
    try:
        for step in range(25):
            rows = chance.integers(0, len(expected), 1 + step % 3)
            if step % 2:
                with contextlib.suppress(XdscaleError):  # more than its share
                    found.prefetch(rows)
            check_rows(found, expected, rows)
    except BaseException:
        failed.set()
        raise
    os._exit(0)


def test_processes_share_a_tight_budget(small_dataset, records, tmp_path):
    url = f"file://{small_dataset}"
    folder = place_manifest(fetch_manifest(url), tmp_path)
    ranks = 3
    budget = ranks * max(record.bytes for record in records)
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    processes = [
        context.Process(target=read_at_random, args=(url, folder, records, budget, ranks, rank, small_dataset, failed))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    most = 0
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in processes):
        most = max(most, sum(stored(folder).values()))
        assert time.monotonic() < deadline, "they wait for each other"
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0] * ranks
    assert not failed.is_set()
    assert 0 < most <= budget


def test_damage_is_fetched_again_then_left_out_and_looked_at_again(server, records, local, tmp_path):
    budget = sum(record.bytes for record in records)
    server.spoil[records[0].file] = 1
    cache = open_cache(server.url, tmp_path, budget)
    table = Table(cache.folder, "train", cache=cache)
    rows = first_rows(table, 2)
    check_rows(table, local["train"], rows[:1])
    assert server.asked.count(records[0].file) == 2
    # At its source: the run stops with its name, and is told what to do.
    server.spoil[records[1].file] = 99
    for _ in range(2):
        with pytest.raises(XdscaleError, match=rf"{records[1].file}: altered: .*larger run.max_damaged_shards"):
            table.read("language", rows[1:])
    assert server.asked.count(records[1].file) == 3
    cache.close()
    # The next start looks once more, and finds it damaged still; then mended.
    again = open_cache(server.url, tmp_path, budget)
    problems = again.damaged(records, verify=True)
    assert list(problems) == [records[1].file]
    assert problems[records[1].file].startswith(f"{server.url}/{records[1].file}: altered: expected")
    without = Table(again.folder, "train", cache=again, quarantined=problems)
    with pytest.raises(XdscaleError, match=f"{records[1].file}: is in quarantine"):
        without.read("language", rows[1:])
    without.prefetch(rows)
    check_rows(without, local["train"], rows[:1])
    server.spoil.clear()
    assert again.damaged(records, verify=True) == {}
    check_rows(Table(again.folder, "train", cache=again), local["train"], rows)
    again.close()


def test_damage_since_it_was_fetched_is_found_when_verifying(server, records, local, tmp_path):
    cache = open_cache(server.url, tmp_path, sum(record.bytes for record in records))
    table = Table(cache.folder, "train", cache=cache)
    rows = first_rows(table, 1)
    check_rows(table, local["train"], rows)
    cache.close()
    path = cache.folder / records[0].file
    content = bytearray(path.read_bytes())
    content[-600] ^= 1
    path.write_bytes(content)
    again = open_cache(server.url, tmp_path, sum(record.bytes for record in records))
    seen = []
    assert again.damaged(records, verify=True, on_progress=lambda done, total: seen.append((done, total))) == {}
    assert seen[-1] == (len(records), len(records))
    assert not path.exists()
    check_rows(Table(again.folder, "train", cache=again), local["train"], rows)
    again.close()


def test_a_source_that_fails_is_tried_again_then_named(small_dataset, records, local, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0))
    source = tmp_path / "source"
    shutil.copytree(small_dataset, source)
    cache = open_cache(f"file://{source}", tmp_path / "cache", sum(record.bytes for record in records))
    table = Table(cache.folder, "train", cache=cache)
    (source / records[0].file).unlink()
    (source / records[0].file).mkdir()
    table.prefetch(np.array([0]))  # a hint: whoever needs the rows is told
    with pytest.raises(XdscaleError, match=rf"{records[0].file}: cannot be fetched after 3 attempts"):
        table.read("language", np.array([0]))
    (source / records[0].file).rmdir()
    shutil.copy(small_dataset / records[0].file, source)
    check_rows(table, local["train"], np.array([0]))
    assert not [name for name in stored(cache.folder) if name.startswith(".")]
    cache.close()


def test_threads_of_one_rank_do_not_disturb_each_other(small_dataset, records, local, tmp_path):
    cache = open_cache(f"file://{small_dataset}", tmp_path, 2 * max(record.bytes for record in records))
    tables = {split: Table(cache.folder, split, cache=cache) for split in local}

    def read(seed):
        chance = np.random.default_rng(seed)
        split = "train" if seed % 2 else "validation"
        for _ in range(10):
            check_rows(tables[split], local[split], chance.integers(0, len(local[split]), 4))
            with contextlib.suppress(XdscaleError):
                tables[split].prefetch(chance.integers(0, len(local[split]), 2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert (cache.folder / MANIFEST_NAME).is_file()
    cache.close()


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for_but_fetched_over(server, records, local, tmp_path):
    cache = open_cache(server.url, tmp_path, sum(record.bytes for record in records))
    path = cache.folder / records[0].file
    os.mkfifo(path)
    table = Table(cache.folder, "train", cache=cache)
    check_rows(table, local["train"], first_rows(table, 1))
    cache.close()
    assert path.is_file()
