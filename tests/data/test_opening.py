"""Where shards lie and which are damaged: agreed by all ranks, within the budget or not at all."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest

from xdscale.data.collate import XDBERTCollator
from xdscale.data.opening import open_shards
from xdscale.data.order import Order
from xdscale.errors import XdscaleError
from xdscale.recipe import Run, load_recipe
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.manifest import Manifest
from xdscale.shards.table import Table
from xdscale.shards.verify import verify_shards
from xdscale.training.prefetch import Prefetcher


@dataclass
class ThreadRanks:
    """Ranks as threads, with the real exchange replaced by a list and a barrier."""

    rank: int
    world_size: int
    barrier: Barrier
    board: list

    @property
    def local_rank(self):
        return self.rank

    @property
    def is_first(self):
        return self.rank == 0

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def raise_first(self, problem, what):
        for rank, text in enumerate(self.gather(problem)):
            if text is not None:
                raise XdscaleError(f"{what}: rank {rank}: {text}")


def open_on(world, shards, run, check=lambda folder: None, tables=("text",)):
    """Returns what every rank returned or raised."""
    barrier, board = Barrier(world, timeout=30), [None] * world

    def one(rank):
        try:
            return open_shards(shards, run, ThreadRanks(rank, world, barrier, board), tables, check=check)
        except XdscaleError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.fixture
def torn(wiki_shards, tmp_path):
    """A copy of the dataset without its validation shard, and one byte of a training shard flipped."""
    folder = tmp_path / "torn"
    shutil.copytree(wiki_shards, folder)
    (folder / "validation-000000.tar").unlink()
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)
    return folder


@pytest.mark.parametrize("world", [1, 3])
def test_a_whole_dataset_has_no_damage(wiki_shards, world):
    assert open_on(world, str(wiki_shards), Run()) == [(wiki_shards, {}, None)] * world


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_stops_with_all_names_or_does_without_the_same_shards(torn, world):
    for budget in (0, 1):
        found = open_on(world, str(torn), Run(max_damaged_shards=budget))
        assert len(set(found)) == 1
        assert "train-000000.tar: altered: expected sha256" in found[0]
        assert "validation-000000.tar: missing" in found[0]
        assert f"run.max_damaged_shards=2 or more, now {budget}" in found[0]
    found = open_on(world, str(torn), Run(max_damaged_shards=2))
    assert [sorted(shards.damaged) for shards in found] == [["train-000000.tar", "validation-000000.tar"]] * world
    assert len({str(rank) for rank in found}) == 1


def test_ranks_of_a_node_fetch_a_remote_dataset_together(wiki_shards, torn, tmp_path, monkeypatch):
    monkeypatch.setattr("xdscale.shards.remote.PAUSES_SECONDS", (0.0,))
    monkeypatch.setenv("LOCAL_SIZE", "3")
    seen = []
    run = Run(cache=str(tmp_path / "cache"))
    url = f"file://{wiki_shards}"
    found = open_on(3, url, run, check=lambda folder: seen.append(Manifest.load(folder).fingerprint))
    assert len({str(rank) for rank in found}) == 1
    assert seen == [Manifest.load(wiki_shards).fingerprint] * 3
    verify_shards(found[0][0])
    found = open_on(3, f"file://{torn}", Run(cache=str(tmp_path / "other"), max_damaged_shards=1))
    assert len(set(found)) == 1
    assert f"file://{torn}/train-000000.tar: altered" in found[0]
    assert f"file://{torn}/validation-000000.tar: missing" in found[0]
    found = open_on(3, f"file://{tmp_path}/none", Run(cache=str(tmp_path / "other")))
    assert set(found) == {found[0]}
    assert f"rank 0: file://{tmp_path}/none/dataset.json: cannot be fetched" in found[0]


def test_with_a_budget_ranks_fetch_what_a_step_needs_and_no_more(wiki_shards, tmp_path, monkeypatch):
    """The same batches as from the local folder, hints included, in half of the room."""
    monkeypatch.setenv("LOCAL_SIZE", "2")
    records = Manifest.load(wiki_shards).shards
    budget = 2 * max(record.bytes for record in records)
    found = open_on(2, f"file://{wiki_shards}", Run(cache=str(tmp_path / "cache"), cache_bytes=budget))
    assert [shards.damaged for shards in found] == [{}, {}]
    assert list(found[0].folder.glob("*.tar")) == []
    local = Table(wiki_shards, "train")
    for shards in found:
        order = Order(len(local), seed=1, global_batch=6, world_size=1, rank=0, micro_batch=3)
        ours, theirs = (
            XDBERTCollator(table, seed=1, objectives=XDBERTObjectives()) for table in (shards.table("train"), local)
        )

        def prepare(step, order=order, ours=ours):
            return [ours(slots) for slots in order.slots(step)]

        def hint(step, order=order, ours=ours):
            ours.prefetch(order.slots(step))

        with Prefetcher(prepare, range(12), hint=hint) as items:
            for step, batches in items:
                for batch, slots in zip(batches, order.slots(step), strict=True):
                    expected = theirs(slots)
                    assert batch.targets == expected.targets
                    assert all(np.array_equal(batch.arrays[name], expected.arrays[name]) for name in expected.arrays)
        assert items.wait_seconds > 0
        assert sum(path.stat().st_size for path in shards.folder.glob("*.tar")) <= budget
    for shards in found:
        shards.cache.close()


def test_damage_that_a_run_met_counts_at_the_next_start(torn, tmp_path, monkeypatch):
    monkeypatch.setattr("xdscale.shards.remote.PAUSES_SECONDS", ())
    url, run = f"file://{torn}", Run(cache=str(tmp_path / "cache"), cache_bytes=10**9)
    (shards,) = open_on(1, url, run)
    with pytest.raises(XdscaleError, match=r"train-000000\.tar: altered: .*larger run\.max_damaged_shards"):
        shards.table("train").read("language", np.array([0]))
    (message,) = open_on(1, url, run)
    assert "1 of 2 shards damaged" in message
    assert "run.max_damaged_shards=1 or more, now 0" in message
    (shards,) = open_on(1, url, run.model_copy(update={"max_damaged_shards": 1}))
    assert list(shards.damaged) == ["train-000000.tar"]
    with pytest.raises(XdscaleError, match=r"every shard of text \(train\) is damaged"):
        shards.table("train")


def test_a_table_that_is_not_there_is_named(wiki_shards):
    (message,) = open_on(1, str(wiki_shards), Run(), tables=["regions"])
    assert message == (
        f"{wiki_shards}: no table 'regions' ('xdscale regions import' or 'xdscale regions extract' makes it); the "
        "dataset has: text"
    )


def test_a_cache_that_one_node_cannot_write_stops_every_rank_with_the_reason(wiki_shards, tmp_path, monkeypatch):
    def read_only(text, folder):
        raise XdscaleError(f"{folder}: cannot be written: Read-only file system")

    monkeypatch.setattr("xdscale.data.opening.place_manifest", read_only)
    found = open_on(2, f"file://{wiki_shards}", Run(cache=str(tmp_path / "cache")))
    assert found == [f"run.cache: rank 0: {tmp_path}/cache: cannot be written: Read-only file system"] * 2


@pytest.mark.parametrize("budget", [None, 10**9])
def test_a_shard_that_one_rank_cannot_fetch_stops_every_rank(wiki_shards, tmp_path, monkeypatch, budget):
    monkeypatch.setattr("xdscale.shards.remote.PAUSES_SECONDS", ())
    monkeypatch.setenv("LOCAL_SIZE", "2")
    source = shutil.copytree(wiki_shards, tmp_path / "source")
    shard = Manifest.load(source).shards[1].file
    (source / shard).unlink()
    (source / shard).mkdir()
    run = Run(cache=str(tmp_path / "cache"), cache_bytes=budget)
    found = open_on(2, f"file://{source}", run)
    if budget is None:
        assert found[0].startswith(f"data.shards: rank 1: file://{source}/{shard}: cannot be fetched after 1 attempts")
        assert found[0] == found[1]
    else:  # nobody needs it yet
        assert [shards.damaged for shards in found] == [{}, {}]
        for shards in found:
            shards.cache.close()


def test_progress_is_told_shard_by_shard_and_said_only_by_the_first_rank(wiki_shards, monkeypatch, capsys):
    monkeypatch.setattr("xdscale.data.opening.SECONDS_BETWEEN_LINES", -1.0)
    ticks = []
    for rank in (0, 1):
        ranks = ThreadRanks(rank, 2, Barrier(1), [None])
        ranks.gather = lambda value: [value]
        open_shards(
            str(wiki_shards), Run(), ranks, ["text"], check=lambda folder: None, on_shard=lambda: ticks.append(1)
        )
        said = capsys.readouterr().err
        assert ("verifying shards: 100% of this rank's share" in said) == (rank == 0)
    assert len(ticks) == len(Manifest.load(wiki_shards).shards)


@pytest.mark.parametrize("budget", [None, 10**9])
def test_the_watchdog_hears_of_what_is_fetched(wiki_shards, tmp_path, budget):
    """A file server may be slow: a rank that waits for it is not hung."""
    ticks, run = [], Run(cache=str(tmp_path / "cache"), cache_bytes=budget)
    ranks = ThreadRanks(0, 1, Barrier(1), [None])
    place = {"check": lambda folder: None, "on_shard": lambda: ticks.append(1)}
    found = open_shards(f"file://{wiki_shards}", run, ranks, ["text"], **place)
    assert len(ticks) == len(Manifest.load(wiki_shards).shards)
    if budget is not None:
        ticks.clear()
        found.table("train").read("language", np.array([0]))  # fetches a shard
        assert ticks
        found.cache.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.shards=s3://bucket/wiki"], "is a URL: run.cache must name a local folder"),
        (["run.cache=/tmp/x"], "is not a URL: it needs no run.cache"),
        (["run.cache_bytes=1000"], "run.cache_bytes = 1000: only shards from a URL need a cache"),
        (["run.max_damaged_shards=1", "run.verify=false"], "needs run.verify = true"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(XdscaleError, match=message):
        load_recipe("quickstart", settings)
