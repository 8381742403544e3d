"""Every module of every kind computes by the kernels, or every one by its definition."""

import json
from collections import Counter

import pytest
import torch

from xdscale import recipe
from xdscale.export import _export_full_model
from xdscale.models.activated_linear import ActivatedLinear
from xdscale.models.attention import FUSED, PLAIN
from xdscale.models.cross_modal import AttentionSublayer
from xdscale.models.residual_norm import ResidualNorm
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import (
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
)
from xdscale.tasks.xdbert import build_adaptation

# A language layer has two sublayers, a cross-modal layer two attentions and a feed-forward for each stream.
LANGUAGE_LAYER = {"residual_norm": 2, "activated_linear": 1}
CROSS_LAYER = {"attention": 4, "residual_norm": 6, "activated_linear": 2}
CLIP_LAYER = {"activated_linear": 1}
KINDS = {ResidualNorm: "residual_norm", ActivatedLinear: "activated_linear", AttentionSublayer: "attention"}


def counted(module):
    """Returns how many modules of each kind compute by their definitions, and how many by kernels."""
    counts = {True: Counter(), False: Counter()}
    for part in module.modules():
        if type(part) in KINDS:
            counts[part.plain][KINDS[type(part)]] += 1
    return counts


def times(number, layer):
    return Counter({kind: number * count for kind, count in layer.items()})


@pytest.fixture(scope="module")
def small_clip_layers(clip_tiny):
    return json.loads(clip_tiny.read_text())["text_cfg"]["layers"]


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("cross_layers", [1, 2])
def test_adaptation(adaptation_spec, small_clip_layers, kernels, cross_layers):
    torch.manual_seed(0)
    module = build_adaptation(adaptation_spec(kernels=kernels, layers=cross_layers))
    plain = kernels == "plain"
    expected = times(2, LANGUAGE_LAYER) + times(cross_layers, CROSS_LAYER) + times(small_clip_layers, CLIP_LAYER)
    assert counted(module) == {plain: expected, not plain: Counter()}
    assert module.model.language.config._attn_implementation == (PLAIN if plain else FUSED)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("task", ["cola", "swag"])
def test_finetuning_of_each_subject(adaptation_spec, cassette_model, small_clip_layers, tmp_path, plain, task):
    language = build_language_classifier(
        recipe.Language(name=str(cassette_model)), find_task(task), dropout=0.1, plain=plain
    )
    assert counted(language) == {plain: times(2, LANGUAGE_LAYER), not plain: Counter()}
    assert language.model.config._attn_implementation == (PLAIN if plain else FUSED)
    clip = build_clip_classifier(
        recipe.Clip(name="clip-tiny.json", weights="random"), find_task(task), dropout=0.1, plain=plain
    )
    assert counted(clip) == {plain: times(small_clip_layers, CLIP_LAYER), not plain: Counter()}
    torch.manual_seed(4)
    spec = adaptation_spec()
    _export_full_model(spec, build_adaptation(spec).state_dict(), tmp_path / "cross_modal")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((cassette_model / name).read_bytes())
    both = build_cross_modal_classifier(tmp_path, find_task(task), dropout=0.1, plain=plain)
    expected = times(2, LANGUAGE_LAYER) + times(2, CROSS_LAYER) + times(small_clip_layers, CLIP_LAYER)
    assert counted(both) == {plain: expected, not plain: Counter()}
    assert both.encoder.language.config._attn_implementation == (PLAIN if plain else FUSED)
