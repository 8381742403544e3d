"""What a plan says of VL-BERT's activations and FLOPs, on features and from pixels, against autograd and torch."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xdscale.recipe import load_recipe
from xdscale.systems.contract import open_system
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
