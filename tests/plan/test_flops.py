"""The FLOP counter against published throughputs, and against the counter that training uses."""

import numpy as np
import pytest
import torch

from xdscale.models.flops import language_flops, masked_token_flops
from xdscale.params import _without_weights
from xdscale.plan.flops import training_flops
from xdscale.plan.load import Load, expected_load, largest_load
from xdscale.plan.shapes import language_shape, model_shape
from xdscale.recipe import load_recipe
from xdscale.systems.xdbert import build_adaptation


@pytest.mark.parametrize(("length", "sequences_per_second", "tflops"), [(128, 272, 64), (512, 52, 53)])
def test_deepspeeds_bert_large_points(length, sequences_per_second, tflops):
    """DeepSpeed's post of 2020-05-28 "fastest BERT training": one V100, masked positions only in the head."""
    shape = language_shape("bert-large-uncased")
    head = masked_token_flops(shape.hidden_size, shape.embedding_size, shape.vocab_size, 0.15 * length)
    flops = 3 * (language_flops(shape, 1, length) + head)
    assert flops * sequences_per_second / 1e12 == pytest.approx(tflops, rel=0.03)


@pytest.mark.parametrize("name", ["xdbert-base-wikitext103", "xdelectra-large-wikipedia", "xdbert-base-mlm"])
def test_expected_flops_are_those_of_training_on_such_a_batch(name):
    spec = load_recipe(name)
    bare = spec.model_copy(deep=True, update={"model": _without_weights(spec.model)})
    with torch.device("meta"):
        module = build_adaptation(bare)
    masked, targets = np.array([3, 17, 90, 101, 140]), np.array([1, 2, 80, 200])
    arrays = {"language_ids": np.zeros((1, 256)), "clip_ids": np.zeros((1, 4, 77)), "clip_lengths": np.full((1, 4), 70)}
    arrays |= {"masked_lm_positions": masked, "clip_positions": targets}
    on = spec.objectives.weights()
    load = Load(256, 4, 280, 5, int("match" in on), 4 if "clip_tokens" in on else 0)
    assert training_flops(model_shape(spec), load) == pytest.approx(module.flops(arrays), rel=1e-6)


def test_frozen_clip_saves_two_thirds_of_its_tower():
    """Forward 85 million FLOP per token of ViT-B/32's tower: 12 layers of 3.15 million weights, scores, projection."""
    spec = load_recipe("xdbert-base-wikitext103")
    shape = model_shape(spec)
    load = expected_load(spec, shape, 512)
    tower = load.blocks * 77 * (2 * 12 * (12 * 512**2 + 2 * 77 * 512) + 2 * 512 * 512)
    saved = training_flops(shape, load) - training_flops(shape, load, frozen=("clip",))
    assert saved == pytest.approx(2 * tower, rel=1e-9)


def test_loads_are_those_of_the_measured_text():
    """docs/measurements.md: 560 of 693 CLIP positions filled on average, never more than 9 blocks."""
    spec = load_recipe("xdbert-base-wikitext103")
    shape = model_shape(spec)
    assert expected_load(spec, shape, 512).clip_tokens == pytest.approx(560, rel=0.01)
    assert expected_load(spec, shape, 512).blocks == pytest.approx(0.57 * 7 + 0.42 * 8 + 0.01 * 9, rel=0.01)
    assert largest_load(spec, shape, 512).blocks == 9
