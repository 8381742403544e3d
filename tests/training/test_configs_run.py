"""DeepSpeed configurations that the check accepts start, train, save, continue and export; against plain PyTorch."""

import json
from pathlib import Path

import pytest
import torch

from xdscale.ds_config import precision, read_ds_config

from . import configs_worker as worker

WORKER = Path(worker.__file__)
HOST = {"device": "cpu"}
ZERO = {
    "plain": [{"stage": stage} for stage in range(4)],
    "offload": [{"stage": stage, "offload_optimizer": HOST} for stage in (1, 2, 3)],
    "offload all": [{"stage": 3, "offload_optimizer": HOST, "offload_param": HOST}],
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
}
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}


def configs():
    """Returns what is accepted, by a name for each."""
    found = {}
    for way, zeros in ZERO.items():
        for zero in zeros:
            for kind, given in PRECISIONS.items() if zero["stage"] else list(PRECISIONS.items())[:2]:
                for sums in (None, "fp32") if zero["stage"] else (None,):
                    values = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False} | given
                    values |= {"data_types": {"grad_accum_dtype": sums}} if sums else {}
                    found[f"{way} {zero['stage']} {kind} {sums}"] = values
    return found


CONFIGS = configs()


@pytest.fixture(scope="module")
def ran(launch_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "cases.json").write_text(json.dumps(CONFIGS))
    done = launch_ranks(WORKER, folder / "cases.json", folder / "out.json", folder)
    assert done.code == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def expected():
    """The weights after three updates of PyTorch's AdamW, of clipped gradients."""
    torch.manual_seed(0)
    module = worker.make_module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    for number in range(worker.STEPS):
        if number == worker.BROKEN:
            continue
        optimizer.zero_grad()
        (sum(module(inputs).square().mean() for inputs in worker.batches(number)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_accepted_config_trains_leaves_out_what_is_not_finite_and_continues(name, ran, expected, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIGS[name]))
    assert read_ds_config(str(tmp_path / "ds.json")) == CONFIGS[name]
    found = ran[name]
    assert "error" not in found, found
    assert found["applied"] == [number != worker.BROKEN for number in range(worker.STEPS)]
    assert found["losses"][0] == found["losses"][1]
    assert found["state"].keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            torch.tensor(found["state"][key]), value, rtol=0, atol=TOLERANCE[precision(CONFIGS[name])]
        )
