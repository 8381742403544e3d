"""Where the limits of a cache lie: what just fits stays, what just does not makes room, and a disk has to lock."""

import errno
import fcntl
import os
import resource

import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.cache import ShardCache
from xdscale.shards.remote import fetch_manifest, place_manifest


@pytest.fixture
def opened(small_dataset, records, tmp_path):
    """Returns a function of a budget: another cache in the same folder. All are closed in the end."""
    url, caches = f"file://{small_dataset}", []
    folder = place_manifest(fetch_manifest(url), tmp_path)

    def make(budget, sharers=1):
        caches.append(ShardCache(url, folder, records, budget=budget, sharers=sharers))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def there(cache):
    return {path.name for path in cache.folder.glob("*.tar")}


@pytest.mark.parametrize("short", [0, 1])
def test_a_shard_stays_where_the_next_one_just_fits_beside_it(opened, records, short):
    first, second = records[:2]
    budget = first.bytes + second.bytes - short
    for record in (first, second):
        cache = opened(budget)
        with cache.opened([record]):
            pass
        cache.close()
    assert there(cache) == ({second.file} if short else {first.file, second.file})


@pytest.mark.parametrize("short", [0, 1])
def test_a_rank_fetches_ahead_as_much_as_its_share_holds(opened, records, short):
    wanted = records[:3]
    cache = opened(2 * sum(record.bytes for record in wanted) - 2 * short, sharers=2)
    if short:
        needed = sum(record.bytes for record in wanted)
        message = (
            rf"^run\.cache_bytes = {2 * needed - 2:,}, {needed - 1:,} for each of the node's 2 ranks: one step's 3 "
            rf"shards need {needed:,} bytes; set it to {2 * needed:,} or more"
        )
        with pytest.raises(XdscaleError, match=message):
            cache.prefetch(wanted)
    else:
        cache.prefetch(wanted)
    cache.close()
    assert there(cache) == (set() if short else {record.file for record in wanted})


def test_no_more_files_are_open_than_a_quarter_of_what_the_process_may(opened, records, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8, 8))
    cache = opened(10**9)
    cache.prefetch(records[:3])
    cache.close()
    assert there(cache) == {record.file for record in records[:2]}


def test_how_many_shards_a_rank_may_hold_at_once(opened, records):
    largest = max(record.bytes for record in records)
    for budget, sharers, most in ((largest, 1, 1), (2 * largest - 1, 1, 1), (2 * largest, 1, 2), (6 * largest, 2, 3)):
        assert opened(budget, sharers).most_at_once(records) == most
    with pytest.raises(XdscaleError, match=rf"one shard needs {largest:,} bytes"):
        opened(largest - 1).most_at_once(records)


def test_a_folder_without_locks_is_refused(opened, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(XdscaleError, match=rf"run\.cache: {tmp_path}/\S+: nothing can be locked there"):
        opened(10**9)
