"""How ranks meet: from what a launcher says, or by itself where there is one rank and no launcher."""

import os

import deepspeed
import pytest

from xdscale.training import distributed

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def start(monkeypatch):
    """Returns a function of environment variables: what `start_distributed` returns, and what it leaves of them."""
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(distributed, "_import_muon_uncompiled", lambda: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def start(**variables):
        for name in NAMES:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        ranks = distributed.start_distributed()
        return ranks, {name: os.environ[name] for name in NAMES if name in os.environ}

    return start


def test_a_process_without_a_launcher_is_the_only_rank_at_any_free_port(start):
    ranks, left = start()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
    assert left == dict(zip(NAMES, ("0", "1", "0", "127.0.0.1", "0")))
    assert start(MASTER_PORT="29500")[1]["MASTER_PORT"] == "29500"


def test_what_a_launcher_says_stays_and_of_several_ranks_it_must_say_the_port(start):
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1"}
    ranks, left = start(**said)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert left == said
