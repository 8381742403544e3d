"""The table's entry for a GPU of this machine."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.plan.hardware import GPUS, gpu_of_device, usable_gib


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100-80G"),
        ("NVIDIA H200", 139.8, "H200-141G"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40G"),
        ("NVIDIA A100 80GB PCIe", 79.1, "A100-80G"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32G"),
        ("NVIDIA L4", 22.0, "L4-24G"),
        ("NVIDIA L40S", 44.4, "L40S-48G"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090-24G"),
        ("AMD Instinct MI300X", 191.5, "MI300X-192G"),
        ("NVIDIA GeForce GTX 1080", 7.9, None),
    ],
)
def test_a_card_is_known_by_its_name_and_memory(monkeypatch, name, gib, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = gpu_of_device(torch.device("cuda", 0))
    assert (found and found.name) == expected


DENSE, SPARSE, PCIE_3, PCIE_4, PCIE_5 = 1, 2, 32, 64, 128
"""Whether a sheet's TFLOPS are twice those of dense matrices; GB/s of 16 lanes, both ways together."""
DATA_SHEETS = {
    # TFLOPS of a GPU, GB/s of its links both ways, network cards of a node and Gbit/s of each, GPUs of a node.
    "V100-32G": (125 / DENSE, 300, 8, 100, 16),
    "V100-16G": (125 / DENSE, 300, 4, 100, 8),
    "A100-40G": (312 / DENSE, 600, 8, 200, 8),
    "A100-80G": (312 / DENSE, 600, 8, 200, 8),
    "H100-80G": (1979 / SPARSE, 900, 8, 400, 8),
    "H200-141G": (1979 / SPARSE, 900, 8, 400, 8),
    "B200-180G": (72_000 / 8 / 2 / SPARSE, 1800, 8, 400, 8),  # 72 PFLOPS in FP8 of eight
    "L4-24G": (242 / SPARSE, PCIE_4, 1, 100, 8),
    "L40S-48G": (362 / DENSE, PCIE_4, 1, 100, 8),
    "T4-16G": (65 / DENSE, PCIE_3, 1, 100, 8),
    "A10-24G": (250 / SPARSE, PCIE_4, 1, 100, 8),
    "A6000-48G": (309.7 / SPARSE, PCIE_4, 1, 100, 8),
    "RTX-3090-24G": (71 / DENSE, PCIE_4, 1, 100, 8),
    "RTX-4090-24G": (165.2 / DENSE, PCIE_4, 1, 100, 8),
    "RTX-5090-32G": (209.5 / DENSE, PCIE_5, 1, 100, 8),
    "MI250X-64G": (383 / 2, 2 * 50, 4, 200, 8),  # a card has two
    "MI300X-192G": (1307.4 / DENSE, 2 * 7 * 64, 8, 400, 8),
}


def test_the_table_is_that_of_the_makers_data_sheets():
    assert GPUS.keys() == DATA_SHEETS.keys()
    for name, gpu in GPUS.items():
        tflops, links, cards, gigabits, node = DATA_SHEETS[name]
        assert gpu.name == name
        assert gpu.peak_flops == pytest.approx(tflops * 1e12, rel=1e-3)
        assert (gpu.node_link, gpu.network, gpu.node_gpus) == (links / 2 * 1e9, cards * gigabits / 8 * 1e9, node)
        assert gpu.precision == ("fp16" if name.startswith(("V100", "T4")) else "bf16")
        sold = int(name.rpartition("-")[2].removesuffix("G"))
        assert 0.88 * sold < gpu.memory_gib <= sold


def test_no_gpu_has_less_than_nothing_to_be_filled():
    assert (usable_gib(0.1), usable_gib(1.5)) == (0, 0)
    assert usable_gib(80) == pytest.approx(80 * 0.95 - 1.5)
