"""What ranks tell each other before training: clocks, answers, and whether they write to one folder."""

import functools
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed

from xdscale.launch import collective, exchange
from xdscale.launch.exchange import OutputToken, answers, ask_clock, follow_token, serve_clock


@pytest.fixture
def store():
    return torch.distributed.HashStore()


def test_clocks_of_one_machine_agree(store):
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_clock, store, rank) for rank in (1, 8)]
        found = serve_clock(store, [1, 8])
        assert [each.result(timeout=10) for each in asking] == [None, None]
    assert found.keys() == {1, 8}
    assert all(abs(offset) < 1 for offset in found.values())


def test_a_clock_is_served_when_it_is_asked_for_and_not_before():
    """An answer that was there already would be old by as long as it waited."""
    calls = []
    store = SimpleNamespace(
        get=lambda key: calls.append(f"get {key}") or "0.25", set=lambda key, value: calls.append(f"set {key}")
    )
    assert serve_clock(store, [3, 4]) == {3: 0.25, 4: 0.25}
    turns = [[f"get clock/{rank}/{turn}", f"set time/{rank}/{turn}"] for rank in (3, 4) for turn in range(5)]
    flat = [call for turn in turns for call in turn]
    assert calls == [*flat[:10], "get offset/3", *flat[10:], "get offset/4"]


def test_the_shortest_of_five_round_trips_says_how_far_a_clock_is_ahead(monkeypatch):
    """7 s. The network takes longer on one of the ways, except when it is quickest: there and back 0.1 s each."""
    now, ways, told = [1000.0], iter([(0.1, 0.7), (0.3, 0.2), (0.1, 0.1), (0.9, 0.1), (0.4, 0.1)]), {}

    def answer(key):
        there, back = next(ways)
        now[0] += there + back
        return repr(now[0] - back - 7)

    monkeypatch.setattr(exchange.time, "time", lambda: now[0])
    ask_clock(SimpleNamespace(set=told.__setitem__, get=answer), 3)
    assert float(told["offset/3"]) == pytest.approx(7, abs=1e-9)
    assert next(ways, None) is None


def test_silent_ranks_are_waited_for_together(store):
    store.set("facts/1", json.dumps({"cores": 8}))
    began = time.monotonic()
    assert answers(store, "facts", range(5), 0.6) == ([0, 2, 3, 4], {1: {"cores": 8}})
    assert 0.5 < time.monotonic() - began < 2


@pytest.fixture
def quick(monkeypatch):
    """A network file system need not be waited for."""
    monkeypatch.setattr(exchange, "_SECONDS_FOR_A_SHARED_FOLDER", 0.1)


def test_a_folder_that_all_share_is_left_as_it_was(store, tmp_path, quick):
    (tmp_path / "runs").mkdir()
    for folder, created in ((tmp_path / "runs" / "a" / "b", True), (tmp_path / "runs", False)):
        token = OutputToken(folder)
        token.leave()
        assert [path.name for path in folder.iterdir()] == [token.text]
        for rank in (1, 2):
            follow_token(store, rank, folder, token.text)
        assert token.problems(store, [0, 1, 2], 1) == {}
        token.remove()
        assert folder.exists() != created
        assert list((tmp_path / "runs").iterdir()) == []


def test_what_another_put_into_a_new_folder_stays(store, tmp_path):
    token = OutputToken(tmp_path / "a" / "b")
    token.leave()
    (tmp_path / "a" / "log").touch()
    token.remove()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["log"]


def test_another_folder_is_told_from_one_that_takes_no_files_and_from_silence(store, tmp_path, quick):
    (tmp_path / "file").touch()
    shared = tmp_path / "shared"
    token = OutputToken(shared)
    token.leave()
    follow_token(store, 1, tmp_path / "other", token.text)
    store.set("folder/2", json.dumps(""))  # says that it wrote something, which is not here
    store.set("folder/3", json.dumps("cannot be written: full"))
    found = token.problems(store, [0, 1, 2, 3, 4], 0.2)
    assert {rank: text.partition(";")[0] for rank, text in found.items()} == {
        1: "not the first machine's folder",
        2: "what it writes there does not appear on the first machine",
        3: "cannot be written: full",
        4: "no answer while looking for the first machine's file there",
    }
    refused = OutputToken(tmp_path / "file" / "run")
    refused.leave()
    follow_token(store, 2, shared, refused.text)
    follow_token(store, 1, shared, refused.text)
    found = refused.problems(store, [0, 1, 2], 1)
    assert found.keys() == {0}
    assert found[0].startswith("cannot be written: ")
    refused.remove()
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize(("place", "wrong"), [(0, "2.0 to 3.0"), (-1, "3.0 to 4.0"), (None, "")])
def test_a_sum_that_is_wrong_in_any_place_is_the_networks_fault(monkeypatch, place, wrong):
    """Of ranks 1 and 2: 3 everywhere. The second of two all-reduces is timed, in milliseconds."""
    clock = itertools.count(step=0.125)
    monkeypatch.setattr(collective.time, "perf_counter", lambda: next(clock))
    for name in ("init_process_group", "destroy_process_group", "PrefixStore"):
        monkeypatch.setattr(torch.distributed, name, lambda *given, **options: None)

    def all_reduce(values):
        assert torch.equal(values, torch.ones(len(values)))
        values.fill_(3.0)
        if place is not None and len(values) > 1:
            values[place] += -1 if place == 0 else 1

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    outcome = collective.Outcome("gloo", large_bytes=64)
    reduce = functools.partial(collective._all_reduce, None, 0, 2, 0, None, outcome)
    if wrong:
        with pytest.raises(ValueError, match=f"a sum over ranks is {wrong}, expected 3.0: the network corrupts data"):
            reduce()
    else:
        reduce()
    assert (outcome.milliseconds, outcome.large_milliseconds) == (125, 125)
