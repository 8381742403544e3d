"""Threads of a rank: its share of the machine's cores, with GPUs or without."""

import os
import subprocess
import sys

import pytest

from xdscale.finetune.command import _slots
from xdscale.training import environment
from xdscale.training.environment import threads_per_rank


@pytest.mark.parametrize(
    ("bound", "variables", "threads"),
    [
        (128, {"LOCAL_SIZE": "8"}, 16),  # DeepSpeed's launcher
        (128, {"LOCAL_WORLD_SIZE": "8"}, 16),  # torchrun
        (128, {}, 128),
        (12, {"LOCAL_SIZE": "8", "SLURM_CPUS_ON_NODE": "96"}, 12),  # Slurm has bound each rank to cores of its own
        (96, {"LOCAL_SIZE": "8", "SLURM_CPUS_ON_NODE": "96"}, 12),  # it has not
        (1, {"LOCAL_SIZE": "8", "SLURM_CPUS_ON_NODE": "8"}, 1),
        (2, {"LOCAL_SIZE": "8"}, 1),
    ],
)
def test_a_rank_takes_its_share_of_the_cores(monkeypatch, bound, variables, threads):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: set(range(bound))}[process])
    assert threads_per_rank() == threads


@pytest.mark.parametrize("gpus", [[], ["0", "1"]])
def test_finetuning_side_by_side_shares_the_cores(monkeypatch, gpus):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: set(range(24))}[process])
    assert [slot["OMP_NUM_THREADS"] for slot in _slots(4, gpus)] == ["6"] * 4


def test_torch_is_told_also_where_torchrun_says_one():
    """As on a machine of 24 cores with 8 ranks, in the state that torchrun leaves."""
    script = (
        "import os; os.sched_getaffinity = lambda process: set(range(24))\n"
        "from xdscale.training.environment import calm_environment\n"
        "calm_environment()\n"
        "import torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    )
    settings = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "DS_ACCELERATOR": "cpu"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept | settings, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["3", "3"], done.stderr


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "12"),
        ({"OMP_NUM_THREADS": "5"}, None),  # a person's word
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, "12"),  # torchrun's own
        ({"TOKENIZERS_PARALLELISM": "true", "DS_ACCELERATOR": "cpu", "TORCH_LOGS": "dynamo"}, "12"),
    ],
)
def test_what_a_person_has_set_stays(monkeypatch, given, threads):
    told, environ = [], {"LOCAL_WORLD_SIZE": "2"} | given
    monkeypatch.setattr(environment, "uses_gpus", lambda: False)
    monkeypatch.setattr("torch.set_num_threads", told.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)))
    monkeypatch.setattr(os, "environ", environ)
    environment.calm_environment()
    usual = {"TOKENIZERS_PARALLELISM": "false", "TORCH_LOGS": "-all", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    expected = usual | {"DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": "2"} | given
    assert environ == expected | ({"OMP_NUM_THREADS": threads} if threads else {})
    assert told == ([int(threads)] if threads else [])


def test_deepspeed_is_not_told_of_a_cpu_where_there_are_gpus(monkeypatch):
    environ = {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(environment, "uses_gpus", lambda: True)
    monkeypatch.setattr(os, "environ", environ)
    environment.calm_environment()
    assert "DS_ACCELERATOR" not in environ
