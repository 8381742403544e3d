"""The table's entry for a GPU of this machine."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.plan.hardware import gpu_of_device


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
