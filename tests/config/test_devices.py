"""Which device a rank has, on machines with and without GPUs."""

import subprocess
import sys

import pytest
import torch

from xdscale import devices
from xdscale.errors import XdscaleError


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that makes this a machine with so many GPUs."""

    def machine(gpus, **environment):
        monkeypatch.setattr(devices, "_DRIVERS", ("/dev/null",) if gpus else ())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return machine


def test_a_rank_has_the_gpu_of_its_number_or_else_the_cpu(machine):
    machine(gpus=2)
    assert [devices.rank_device(rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    machine(gpus=0)
    assert devices.rank_device(1) == torch.device("cpu")


def test_cpu_ranks_on_a_machine_with_gpus(machine):
    machine(gpus=1, DS_ACCELERATOR="cpu")
    assert devices.rank_device(1) == torch.device("cpu")
    assert not devices.uses_gpus()
    assert devices.visible_gpus() == []


def test_more_ranks_than_gpus_are_refused_with_both_ways_out(machine):
    machine(gpus=1)
    with pytest.raises(XdscaleError, match=r"1 GPU visible.*--num_accelerators 1.*DS_ACCELERATOR=cpu"):
        devices.rank_device(1)


@pytest.mark.parametrize(
    ("gpus", "named", "visible"),
    [
        (0, None, []),
        (0, "0", []),
        (2, None, ["0", "1"]),
        (2, "3, GPU-8f", ["3", "GPU-8f"]),
        (0, "", []),
        (0, "-1", []),
        (1, "5,-1,6", ["5"]),  # CUDA stops at what it does not know
    ],
)
def test_gpus_are_named_as_cuda_visible_devices_does(machine, gpus, named, visible):
    machine(gpus, **({} if named is None else {"CUDA_VISIBLE_DEVICES": named}))
    assert devices.visible_gpus() == visible


def test_without_a_driver_nobody_waits_for_torch(machine, monkeypatch):
    machine(gpus=0)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would fail
    assert devices.visible_gpus() == []


FAULTS_OF_64_MIB = """
import resource
from xdscale.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), print(faults())
keep_freed_memory()
faults(), print(faults())
"""


def test_memory_that_is_kept_costs_no_faults_when_it_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_64_MIB], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
