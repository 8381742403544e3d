"""VisualBERT's step beside transformers': the same losses of the same samples, and what is said of them."""

import json

import numpy as np
import pytest
import torch

from xdscale.bench.step import bench_step
from xdscale.bench.turns import OURS, OURS_MASTERS
from xdscale.bench.visualbert_step import AGAINST, measure_visualbert, padded_inputs
from xdscale.data.visual_text import pack
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe
from xdscale.shards.regions import Regions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A BERT of one layer and 1,200 words; matrix rates are not measured."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 1200, **shape}))
    monkeypatch.setattr("xdscale.bench.visualbert_step.matmul_rate", lambda device, dtype: 1e12)
    fixed = [f"model.language.name={tmp_path}", "model.language.sha256=null", "model.region_size=16"]
    return lambda *more: load_recipe("quickstart-visualbert", [*fixed, *more])


def test_all_cases_agree_in_fp32(tiny):
    cases = list(measure_visualbert(tiny("model.freeze_pooler=true"), torch.device("cpu"), pairs=2, sequences=3))
    assert [case.name.split(":")[0] for case in cases] == [
        "Pretraining", "VQA, 10 to 100 regions", "VQA, 100 regions",
    ]  # fmt: skip
    for case in cases:
        assert case.disagreement < 1e-5
        assert len(case.contestants) == 5
        assert [len(contestant.seconds) for contestant in case.contestants.values()] == [2] * 5
        assert len(case.ratio(OURS_MASTERS, f"{AGAINST}, fp32")) == 2
        ours, theirs = case.contestants[OURS], case.reference
        assert 0 < ours.peak < theirs.peak
        assert 0 < case.contestants[OURS_MASTERS].peak < ours.peak
        assert ours.module.training
        assert theirs.module.training


def test_what_is_printed(tiny, capsys):
    bench_step(tiny(), pairs=1, sequences=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "1 threads" in out
    assert "VQA, 100 regions: 2 samples" in out
    assert "against transformers, fp32; its loss and ours differ by" in out


@pytest.mark.parametrize(
    "change", ["model.images=false", "model.early_fusion=false", "objectives.match=null", "objectives.mlm=null"]
)
def test_what_transformers_does_not_compute_is_refused(tiny, change):
    with pytest.raises(XdscaleError, match="choose a recipe with images, early fusion and both objectives"):
        bench_step(tiny(change))


def test_padding_is_where_there_is_nothing():
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    regions = Regions(features, features, features[:, 0], np.ones((2, 2), np.uint16), np.array([0, 1, 4]))
    texts = [np.array([5, 6, 7]), np.array([8])]
    arrays = pack(texts, [np.array([0, 1, 1]), np.array([1])], regions, np.array([1, 0, 1, 1]))
    arrays |= {"masked_lm_rows": np.array([1, 4]), "masked_lm_labels": np.array([60, 80])}
    found = {name: value.tolist() for name, value in padded_inputs(arrays).items()}
    assert found["input_ids"] == [[5, 6, 7], [8, 0, 0]]
    assert found["token_type_ids"] == [[0, 1, 1], [1, 0, 0]]
    assert found["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert found["visual_attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    assert found["visual_token_type_ids"] == [[1, 0, 0], [0, 1, 1]]
    assert found["visual_embeds"] == [[[0, 1, 2], [0] * 3, [0] * 3], [[3, 4, 5], [6, 7, 8], [9, 10, 11]]]
    assert found["labels"] == [[-100, 60, *[-100] * 4], [80, *[-100] * 5]]
