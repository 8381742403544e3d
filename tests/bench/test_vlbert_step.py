"""VL-BERT's step beside its release's computation: the same losses of the same samples, and what is said of them."""

import json

import numpy as np
import pytest
import torch

from xdscale.bench.step import bench_step
from xdscale.bench.turns import OURS, OURS_MASTERS
from xdscale.bench.vlbert_step import AGAINST, drawn_batch, measure_pixels, measure_vlbert
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A BERT of one layer and 1,200 words; matrix rates are not measured."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 1200, **shape}))
    monkeypatch.setattr("xdscale.bench.vlbert_step.matmul_rate", lambda device, dtype: 1e12)
    fixed = [f"model.language.name={tmp_path}", "model.language.sha256=null", "model.region_size=16"]
    return lambda *more: load_recipe("quickstart-vlbert", [*fixed, "model.region_classes=7", *more])


def test_the_losses_are_equal_in_fp32(tiny):
    case = measure_vlbert(tiny(), CPU, pairs=2, sequences=6)
    assert case.disagreement < 1e-5
    reference = f"{AGAINST}, fp32"
    assert list(case.contestants)[:2] == [reference, OURS]
    assert [len(contestant.seconds) for contestant in case.contestants.values()] == [2] * 5
    assert len(case.ratio(OURS_MASTERS, reference)) == 2
    ours, theirs = case.contestants[OURS], case.reference
    assert 0 < ours.peak < theirs.peak
    assert theirs.module.training
    assert theirs.module.vlbert.visual_ln_object.weight.eq(1).all()  # else images would not count


def test_samples_are_as_long_as_those_of_pretraining(tiny):
    batch = drawn_batch(tiny(), 8, 1200)
    elements, words = np.diff(batch.arrays["cu_seqlens"]), batch.arrays["text_lengths"]
    assert (elements[1::2] == 65).all()  # texts: 64 and [END]
    assert (words[1::2] == 64).all()
    assert (elements[::2] <= 65).all()
    assert ((words[::2] >= 10) & (words[::2] <= 22)).all()
    assert (batch.arrays["places"].min(1) > 0).all()
    assert all(batch.targets[name] > 0 for name in ("mlm", "text_mlm", "masked_region"))


def test_what_is_printed(tiny, capsys):
    bench_step(tiny(), pairs=1, sequences=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "Pretraining: 2 samples" in out
    assert "against the release's computation, fp32; its loss and ours differ by" in out


@pytest.mark.parametrize(
    "change", ["model.corners=true", "model.end_sees_image=true", "model.own_masked_token=false", "objectives.mlm=null"]
)
def test_what_the_release_does_not_compute_is_refused(tiny, change):
    with pytest.raises(XdscaleError, match="what the release computes has all three objectives"):
        bench_step(tiny(change))


def test_a_step_from_pixels_says_what_fast_r_cnn_takes(tiny, monkeypatch):
    monkeypatch.setattr("xdscale.bench.vlbert_step.FILE_SIZE", (64, 48))
    monkeypatch.setattr("xdscale.bench.vlbert_step.REGIONS", (2, 3))
    pixels = "model.pixels={weights: random, short_side: 48, long_side: 64}"
    step, share, decoded, used = measure_pixels(tiny("model.region_size=2048", pixels), CPU, pairs=1, sequences=2)
    assert step.name.startswith("seconds of a step: 2 samples, 1 with images")
    assert 50 < float(share.figure.rstrip("%")) < 100
    assert float(decoded.figure) > 5
    assert float(used.figure) == pytest.approx(1 / float(step.figure), rel=0.2)
