"""What a plan says of VL-BERT's activations and FLOPs, on features and from pixels, against autograd and torch."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xdscale.models.fast_rcnn import FastRCNN, features_of
from xdscale.plan import profile
from xdscale.plan.planner import make_plan
from xdscale.plan.report import machine_from, print_plan
from xdscale.recipe import load_recipe
from xdscale.systems.contract import Term, open_system
from xdscale.training import tracing
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module
from xdscale.training.tracing import on_meta, trace

NAMES = ("mlm", "text_mlm", "masked_region")
PIXELS = ["model.region_size=2048", "model.pixels={weights: random, short_side: 64, long_side: 96}"]


@pytest.fixture(params=[["model.region_size=64"], PIXELS], ids=["features", "pixels"])
def recipe(request, tmp_path):
    """Of a BERT of two layers, all of whose parts count."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 1200, **shape}))
    fixed = [f"model.language.name={tmp_path}", "model.language.weights=random", "model.language.sha256=null"]
    return lambda *more: load_recipe(
        "quickstart-vlbert", [*fixed, "model.region_classes=37", "model.max_elements=30", *request.param, *more]
    )


def built(recipe):
    torch.manual_seed(0)
    return open_system(recipe), build_module(open_system(recipe), continued=True).train()


@pytest.mark.parametrize("samples", [2, 5])
def test_kept_bytes_within_a_tenth_of_what_autograd_keeps(recipe, samples, kept_bytes):
    """Fast R-CNN's maps too: from pixels they are nearly all that is kept."""
    system, module = built(recipe("model.dropout=0"))
    arrays = system.example(module, samples, longest=True).arrays
    kept = kept_bytes(module, to_device(arrays, torch.device("cpu")))
    found = trace(on_meta(module), arrays, NAMES)
    assert found.kept_bytes == pytest.approx(kept, rel=0.1)
    assert found.peak_bytes >= found.kept_bytes


def test_flops_are_those_that_torch_counts(recipe):
    """Within 3 % of forward and backward by the definitions, of which torch sees every product and convolution."""
    system, module = built(recipe())
    arrays = system.example(module, 4).arrays
    found = trace(on_meta(module), arrays, NAMES).flops
    _, plain = built(recipe("run.kernels=plain"))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        terms = plain(to_device(arrays, torch.device("cpu")))
        sum(term.loss_sum for term in terms.values()).backward()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert np.isfinite(sum(term.loss_sum.item() for term in terms.values()))


class Features(torch.nn.Module):
    """The branch alone."""

    def __init__(self):
        super().__init__()
        self.trunk = FastRCNN((1, 1, 2, 2), width=16)

    def forward(self, batch):
        return {"features": Term(features_of(self.trunk, batch).float().sum(), {})}


def python_calls(function):
    """Returns how many Python functions are called, and what comes of it."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = function()
    finally:
        sys.setprofile(before)
    return calls, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_operation_gives_is_worked_out_once(monkeypatch, dtype):
    """Not anew for each layer of each picture: a plan from pixels took a minute of it."""
    with torch.device("meta"):
        module = Features().train().to(dtype)
    sizes = [(64, 96, 5)] * 6 + [(64, 64, 3)]
    arrays = {f"picture_{number}": np.zeros((3, *size[:2]), np.float32) for number, size in enumerate(sizes)}
    arrays |= {f"boxes_{number}": np.zeros((size[2], 4), np.float32) for number, size in enumerate(sizes)}
    trace(module, arrays, ["features"])  # what torch imports at first does not count
    calls, found = python_calls(lambda: trace(module, arrays, ["features"]))
    monkeypatch.setattr(tracing, "_remembered", lambda func, given, outputs: False)
    slow_calls, expected = python_calls(lambda: trace(module, arrays, ["features"]))
    assert found == expected
    assert calls < slow_calls / 2


def test_images_that_each_gpu_takes_are_told_where_they_are_decoded(recipe, monkeypatch, capsys):
    """Half of the samples have one; on features no word is said."""
    monkeypatch.setattr(profile, "_SAMPLES", 8)
    spec = recipe()
    found = profile.profile_model(spec, precision="bf16")
    plan = make_plan("x", spec, machine_from("H100", 2, None, None, 0.4, None), found)
    print_plan(plan)
    told = capsys.readouterr().out
    if spec.model.pixels is None:
        assert found.pictures_per_sequence == 0
        assert "images a second" not in told
        return
    assert found.pictures_per_sequence == 0.5
    seconds = next(row.step_seconds for row in plan.rows if row.way == plan.best)
    rate = spec.training.global_batch / 2 / seconds / 2
    assert f"each GPU takes {rate:.0f} images a second" in told
    assert f"each GPU wants {-(-rate // 60):.0f} or more" in told
