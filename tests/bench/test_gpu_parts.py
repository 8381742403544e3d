"""The parts of scripts/gpu.sh in this process, on the CPU."""

import json

import pytest
import torch

from xdscale.bench import gpu


@pytest.fixture
def found():
    """A function that takes findings, and what it took."""
    taken = []
    return taken, lambda **finding: taken.append(finding)


def test_kernels_are_measured_against_fp64(found, tmp_path):
    taken, tell = found
    gpu.kernels(tell, tmp_path, [])
    assert len(taken) == 22
    for finding in taken:
        assert "problem" not in finding
        assert 0 < finding["output"] < 1e-2
    assert all(finding["passes"] for finding in taken if finding["dtype"] == "float32")


def test_a_kernel_that_fails_leaves_the_others_to_be_seen(found, tmp_path, monkeypatch):
    taken, tell = found
    monkeypatch.setattr(gpu, "quick_gelu", lambda states: states * torch.nan)
    monkeypatch.setattr(gpu, "activated_linear", lambda *arguments: 1 / 0)
    gpu.kernels(tell, tmp_path, [])
    broken = {finding["kernel"] for finding in taken if not finding.get("passes")}
    assert {"quick_gelu", "activated_linear"} <= broken
    assert any("ZeroDivisionError" in finding.get("problem", "") for finding in taken)
    assert any(finding["kernel"].startswith("attention") and finding["passes"] for finding in taken)


def test_plan_and_measurement_stand_side_by_side(found, tmp_path):
    taken, tell = found
    device = {"forward": 100.0, "backward": 200.0, "optimizer": 100.0}
    step = {"recipe": "r", "micro": 4, "device_ms": device, "flops_per_sequence": 9e12, "activations_gib": 2.5}
    (tmp_path / "step.jsonl").write_text(json.dumps(step) + "\n" + json.dumps({"recipe": "other", "micro": 1}) + "\n")
    row = {"way": "zero1", "micro_batch": 2, "activations": {"kept": 2**30}}
    machine = {"cluster": {"gpu": {"name": "H100-80G", "peak_flops": 1e14}}, "mfu": 0.5}
    plan = {"recipe": "r", "flops_per_sequence": 1e13, "machine": machine, "rows": [row]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    gpu.planned(tell, tmp_path, [str(tmp_path / "plan.json")])
    (finding,) = taken
    assert finding["flops_per_sequence"] == [1e13, 9e12]
    assert finding["seconds"] == [pytest.approx(0.8), pytest.approx(0.4)]
    assert finding["activations_gib"] == [2.0, 2.5]
