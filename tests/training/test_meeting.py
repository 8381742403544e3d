"""How ranks meet: from what a launcher says, or by itself where there is one rank and no launcher."""

import os
import threading
import warnings

import deepspeed
import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.training import distributed
from xdscale.training.distributed import Ranks
from xdscale.training.environment import calm_environment
from xdscale.training.watchdog import Watchdog

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


class OnGpus:
    """Stands in for a group of ranks with GPUs, to which torch's own barrier comes."""

    bound_device_id = None

    def rank(self):
        return 0

    def barrier(self, opts):
        self.device = opts.device


@pytest.fixture
def on_gpus(monkeypatch):
    group, c10d = OnGpus(), torch.distributed.distributed_c10d
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr(c10d, "_rank_not_in_group", lambda group: False)
    monkeypatch.setattr(c10d, "_get_object_coll_device", lambda group: "cuda")
    monkeypatch.setattr(distributed, "uses_gpus", lambda: True)
    return group


def test_ranks_with_gpus_meet_on_their_own_ones_and_torch_has_nothing_to_warn_of(on_gpus):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ranks(5, 8, 1).barrier()
    assert on_gpus.device == torch.device("cuda", 1)


def test_what_torch_warns_of_at_deepspeeds_own_barriers_is_not_told(on_gpus, monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    with pytest.warns(UserWarning, match="device under current context"):
        torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calm_environment()
        torch.distributed.barrier()
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]


def test_ranks_without_gpus_name_none(monkeypatch):
    named = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda **options: named.append(options))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    Ranks(0, 2, 0).barrier()
    assert named == [{"device_ids": None}]


def failed(error):
    """An error as it is caught, with where it was raised."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_out_of_an_exchange_is_told_from_others():
    """Another rank is its likely cause, and is waited for."""
    for error in (RuntimeError("[gloo/transport] reset"), RuntimeError("NCCL error"), torch.distributed.DistError("x")):
        assert distributed.is_collective(failed(error))
    with pytest.raises(ValueError, match="group") as raised:  # that there is none, or that this is none
        torch.distributed.get_rank(object())  # of PyTorch's own files
    assert distributed.is_collective(raised.value)
    for error in (ValueError("a shape"), RuntimeError("out of memory"), OSError(5, "Input/output error")):
        assert not distributed.is_collective(failed(error))


@pytest.mark.parametrize("problem", ["EADDRINUSE", "the port is already in use"])
def test_ranks_that_cannot_meet_are_told_what_to_do(monkeypatch, problem):
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ranks = distributed.Ranks(2, 4, 0)
    said = distributed._why_apart(ranks, problem)
    assert "port 29500 of node-1, where the ranks meet, is in use" in said
    assert "deepspeed --master_port 29501 " in said
    said = distributed._why_apart(ranks, "x" * 500)
    assert said.startswith(f"rank 2 of 4 does not meet the others at node-1:29500 ({'x' * 200}); ")


def test_what_one_rank_cannot_do_all_are_told_with_its_number(monkeypatch):
    ranks = distributed.Ranks(1, 3, 1)
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, value: [None, value, "disk full"])
    with pytest.raises(XdscaleError, match="^cannot write: rank 1: no room$"):
        ranks.raise_first("no room", "cannot write")
    with pytest.raises(XdscaleError, match="^cannot write: rank 2: disk full$"):
        ranks.raise_first(None, "cannot write")
    done = []
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, value: [None])
    ranks.on_first(lambda: done.append(1))
    assert done == []  # it is not the first
    distributed.Ranks(0, 3, 0).on_first(lambda: done.append(1))
    assert done == [1]


def test_a_thread_in_an_exchange_is_told_from_others():
    waiting, done = threading.Barrier(3), threading.Event()
    found = {}
    code = "def exchange():\n    waiting.wait()\n    done.wait()\n"
    for place in ("/site/torch/distributed/distributed_c10d.py", "/site/torch/nn/functional.py"):
        functions = {"waiting": waiting, "done": done}
        exec(compile(code, place, "exec"), functions)
        found[place] = threading.Thread(target=functions["exchange"])
        found[place].start()
    waiting.wait(10)
    assert [distributed.in_collective(thread.ident) for thread in found.values()] == [True, False]
    done.set()
    for thread in found.values():
        thread.join()
        assert not distributed.in_collective(thread.ident)


def test_ranks_watch_each_other_once_all_have_begun(tmp_path, monkeypatch):
    """A rank that starts late finds a judge that has waited for it, and nobody's verdict is wiped."""
    events = []
    monkeypatch.setattr(Ranks, "barrier", lambda self: events.append("all are here"))
    monkeypatch.setattr(Watchdog, "_watch", lambda self: events.append("watches"))
    with Watchdog(Ranks(0, 1, 0), tmp_path, 45) as watchdog:
        watchdog._thread.join()
    assert events == ["all are here", "watches"]
