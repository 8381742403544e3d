"""Every module of every kind computes by the kernels, or every one by its definition."""

import json
from collections import Counter

import pytest
import torch
from transformers import AttentionInterface

from xdscale.kernels import DEFINITIONS, packed_attention
from xdscale.models.operations import use_definitions
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip
from xdscale.systems.contract import open_system
from xdscale.systems.xdbert import build_adaptation
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import (
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
)
from xdscale.training.stored import build_module, save_full_model

# A language layer has two sublayers, a cross-modal layer two attentions and a feed-forward for each encoder. An
# attention has four projections, CLIP's two; a feed-forward has one before the one that activates.
LANGUAGE_LAYER = {"residual_norm": 2, "activated_linear": 1, "linear": 5}
CROSS_LAYER = {"packed_attention": 4, "residual_norm": 6, "activated_linear": 2, "linear": 18}
CLIP_LAYER = {"activated_linear": 1, "causal_attention": 1, "linear": 3, "pre_norm": 2, "quick_gelu": 1}
CLIP_END = {"pre_norm": 1}


def counted(module):
    """Returns how many modules call each operation, and how many each definition."""
    functions = {*DEFINITIONS, *DEFINITIONS.values()}
    parts = [
        getattr(part, name, None) for part in module.modules() for name in ("function", "activation", "projection")
    ]
    return Counter(part.__name__ for part in parts if part in functions)


def times(number, layer, plain):
    return Counter({f"plain_{kind}" if plain else kind: number * count for kind, count in layer.items()})


def attention_of(encoder):
    """Returns what transformers calls in each layer."""
    return AttentionInterface()[encoder.config._attn_implementation].keywords["function"]


@pytest.fixture(scope="module")
def small_clip_layers(clip_tiny):
    return json.loads(clip_tiny.read_text())["text_cfg"]["layers"]


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("cross_layers", [1, 2])
def test_adaptation(adaptation_spec, small_clip_layers, kernels, cross_layers):
    torch.manual_seed(0)
    system, plain = open_system(adaptation_spec(kernels=kernels, layers=cross_layers)), kernels == "plain"
    module = build_module(system, continued=True)
    assert counted(module) == (
        times(2, LANGUAGE_LAYER, plain)
        + times(cross_layers, CROSS_LAYER, plain)
        + times(small_clip_layers, CLIP_LAYER, plain)
        + times(1, CLIP_END, plain)
        + times(2, {"masked_token_loss": 1, "linear": 1}, plain)
    )
    assert attention_of(module.model.language) is (DEFINITIONS[packed_attention] if plain else packed_attention)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("task", ["cola", "swag"])
def test_finetuning_of_each_subject(adaptation_spec, cassette_model, small_clip_layers, tmp_path, plain, task):
    language = build_language_classifier(Language(name=str(cassette_model)), find_task(task), dropout=0.1)
    clip = build_clip_classifier(Clip(name="clip-tiny.json", weights="random"), find_task(task), dropout=0.1)
    torch.manual_seed(4)
    spec = adaptation_spec()
    save_full_model(spec, build_adaptation(spec).state_dict(), tmp_path / "cross_modal")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((cassette_model / name).read_bytes())
    both = build_cross_modal_classifier(tmp_path, find_task(task), dropout=0.1)
    if plain:
        for subject in (language, clip, both):
            assert use_definitions(subject) is subject
    assert counted(language) == times(2, LANGUAGE_LAYER, plain)
    tower = times(small_clip_layers, CLIP_LAYER, plain) + times(1, CLIP_END, plain)
    assert counted(clip) == tower
    assert counted(both) == times(2, LANGUAGE_LAYER, plain) + times(2, CROSS_LAYER, plain) + tower
    expected = DEFINITIONS[packed_attention] if plain else packed_attention
    assert attention_of(language.model) is attention_of(both.encoder.language) is expected
    assert attention_of(language.model.base_model) is expected
