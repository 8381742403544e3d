"""DeepSpeed configurations that the check takes start, train, save, continue and export; against plain PyTorch."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from xdscale.ds_config import precision, read_ds_config
from xdscale.ds_sections import check_sections
from xdscale.errors import XdscaleError

from . import configs_worker as worker

WORKER = Path(worker.__file__)
HOST = {"device": "cpu"}
ZERO = {
    "plain": [{"stage": stage} for stage in range(4)],
    "offload": [{"stage": stage, "offload_optimizer": HOST} for stage in (1, 2, 3)],
    "offload all": [{"stage": 3, "offload_optimizer": HOST, "offload_param": HOST}],
}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 4}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}
DIVIDED = {"prescale_gradients": True, "gradient_predivide_factor": 2}
SAID = {"comms_logger": {"enabled": True}, "wall_clock_breakdown": True, "steps_per_print": 1}


def zero(stage, **values):
    return {"zero_optimization": {"stage": stage} | values}


def configs():
    """Returns what is taken, by a name for each: ways × precisions × sums, and every other key with another value."""
    found = {}
    for way, zeros in ZERO.items():
        for shared in zeros:
            for kind, given in {"fp32": {}, "bf16": BF16, "fp16": FP16}.items():
                if kind == "fp16" and not shared["stage"]:
                    continue
                values = {"zero_optimization": shared} | given
                found[f"{way} {shared['stage']} {kind}"] = values
                if shared["stage"] and given:
                    found[f"{way} {shared['stage']} {kind}, sums in fp32"] = values | FP32_SUMS
    off = dict.fromkeys(
        ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"), False
    )
    thresholds = ("param_persistence_threshold", "model_persistence_threshold", "max_live_parameters")
    none = {f"stage3_{name}": 0 for name in (*thresholds, "max_reuse_distance", "prefetch_bucket_size")}
    other = {"stage3_allgather_sequential": True, "stage3_gather_16bit_weights_on_model_save": True}
    other |= {"memory_efficient_linear": False, "override_module_apply": False}
    other |= {"log_trace_cache_warnings": True, "enable_sanity_checks": True, "contiguous_gradients": False}
    scale = {"loss_scale": 128.0, "auto_cast": True}
    steady = {"hysteresis": 1, "consecutive_hysteresis": True, "loss_scale_window": 2, "min_loss_scale": 2}
    return found | {
        "1, little": zero(1, **off, overlap_comm=True) | DIVIDED | SAID,
        "2, little": zero(2, **off, overlap_comm=False) | DIVIDED,
        "1, aligned": zero(1, parameter_alignment=True),
        "2, aligned": zero(2, parameter_alignment=True, overlap_comm=True) | BF16,
        "2, small": zero(2, reduce_bucket_size=1, allgather_bucket_size=2),
        "3, none": zero(3, **none, sub_group_size=50, stage3_use_all_reduce_for_fetch_params=True),
        "3, other": zero(3, **other, overlap_comm=False) | {"disable_python_gc": True},
        "3, whole sums": zero(3, reduce_scatter=False) | {"prescale_gradients": True},
        "1, at once": zero(1) | FP32_SUMS | {"bf16": {"enabled": True, "immediate_grad_update": True}},
        "2, messages": zero(2) | BF16 | {"communication_data_type": "fp32"},
        "2, static scale": zero(2) | {"fp16": FP16["fp16"] | scale},
        "3, steady": zero(3) | {"fp16": FP16["fp16"] | steady},
    }


CONFIGS = configs()
REFUSED = {
    "sums": BF16 | FP32_SUMS,
    "prescaled": zero(2) | {"prescale_gradients": True},
    "divided": zero(3) | {"gradient_predivide_factor": 2},
    "odd": zero(1, allgather_bucket_size=3),
    "scale": zero(2) | {"fp16": {"enabled": True, "initial_scale_power": 2000}},
    "narrow masters": zero(2) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "elastic": zero(2, elastic_checkpoint=True),
    "old name": zero(2, cpu_offload=False, offload_optimizer=HOST),
    "old name of weights": zero(
        3, stage3_gather_fp16_weights_on_model_save=False, stage3_gather_16bit_weights_on_model_save=False
    ),
    "quantised": zero(3, zero_quantized_weights=True),
    "zenflow": zero(3, zenflow={}),
}
SPLIT = zero(3, sub_group_size=50)
OTHERWISE = {
    "on the host": (zero(2) | BF16, zero(1, offload_optimizer=HOST) | BF16 | FP32_SUMS),
    "aligned": (zero(1) | BF16 | FP32_SUMS, zero(2, parameter_alignment=True) | BF16),
    "little": (zero(3, offload_param=HOST), zero(3, contiguous_gradients=False, stage3_max_live_parameters=0)),
    "whole": (SPLIT, zero(3)),
    "split": (zero(3), SPLIT),
}
"""Configurations that a run begins and goes on with."""


@pytest.fixture(scope="module")
def ran(launch_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    cases = {name: (values, values) for name, values in (CONFIGS | REFUSED).items()} | OTHERWISE
    (folder / "cases.json").write_text(json.dumps(cases))
    done = launch_ranks(WORKER, folder / "cases.json", folder / "out.json", folder)
    assert done.code == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def expected():
    """The weights after three updates of PyTorch's AdamW, and the norms of the gradients before they were clipped."""
    torch.manual_seed(0)
    module = worker.make_module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    norms = [math.nan] * worker.STEPS
    for number in range(worker.STEPS):
        if number == worker.BROKEN:
            continue
        optimizer.zero_grad()
        (sum(module(inputs).square().mean() for inputs in worker.batches(number)) / 2).backward()
        norms[number] = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0).item()
        optimizer.step()
    return module.state_dict(), norms


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_taken_trains_leaves_out_what_is_not_finite_and_continues(name, ran, expected, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIGS[name]))
    assert read_ds_config(str(tmp_path / "ds.json")) == CONFIGS[name]
    found, (state, norms), tolerance = ran[name], expected, TOLERANCE[precision(CONFIGS[name])]
    assert "error" not in found, found
    # AdamW's weights alone would not show a gradient of another scale.
    assert found["norms"] == pytest.approx(norms, rel=tolerance, nan_ok=True)
    assert found["losses"][0] == found["losses"][1]
    assert found["state"].keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(torch.tensor(found["state"][key]), value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_ends_in_deepspeed(name, ran):
    """Where another release does not, it can be taken."""
    assert "error" in ran[name]
    with pytest.raises(XdscaleError):
        check_sections("ds.json", REFUSED[name])


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_run_goes_on_with_another_config_or_says_which_key_keeps_it_from_it(name, ran):
    found = ran[name]
    if SPLIT in OTHERWISE[name]:
        said = r"^XdscaleError: cannot load .*: rank 0: it was written with another zero_optimization\.sub_group_size"
        assert re.search(said, found["error"])
    else:
        before, after = found["losses"]
        assert after == pytest.approx(before, abs=2e-3)
