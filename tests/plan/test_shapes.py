"""The plan's table of shapes against the real modules, on the meta device."""

import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.params import _without_weights, parameter_table
from xdscale.plan.shapes import clip_shape, count, language_shape, model_shape, modules
from xdscale.recipe import load_recipe, shipped_recipes
from xdscale.systems.xdbert import build_adaptation

LARGE_BERT = ("xdbert-base-wikitext103", ["model.language.name=bert-large-uncased"])
ARCHITECTURES = [(name, []) for name in shipped_recipes() if "minilm" not in name] + [LARGE_BERT]


def real_modules(spec):
    """(own parameters, trained, tied parameter) of each module that holds any, as torch lists them."""
    bare = spec.model_copy(deep=True, update={"model": _without_weights(spec.model)})
    with torch.device("meta"):
        adaptation = build_adaptation(bare)
    seen, found = set(), []
    for _, module in adaptation.named_modules():
        held = list(module.parameters(recurse=False))
        own = [parameter for parameter in held if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in held}
        if held:
            tied = sum(parameter.numel() for parameter in held if all(parameter is not other for other in own))
            trained = all(parameter.requires_grad for parameter in own)
            found.append((tuple(parameter.numel() for parameter in own), trained, tied))
    return found


@pytest.mark.parametrize(("name", "overrides"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES[:-1]] + ["large"])
def test_every_module_of_every_shipped_recipe_in_torchs_order(name, overrides):
    spec = load_recipe(name, overrides)
    planned = [(module.own, module.trained, module.tied) for module in modules(model_shape(spec))]
    assert planned == real_modules(spec)


def test_counts_of_params_and_of_the_paper():
    """`xdscale params` builds modules; Table 6 (spec xdbert §2.5) plus heads."""
    spec = load_recipe("xdelectra-large-wikitext103")
    assert count(modules(model_shape(spec))) == parameter_table(spec)[-1].parameters
    without_heads = [module for module in modules(model_shape(spec)) if module.name.startswith("model.")]
    assert count(without_heads) == 442_671_617


def test_frozen_clip_is_counted_apart():
    spec = load_recipe("xdbert-base-wikitext103")
    found = modules(model_shape(spec), frozen=("clip",))
    # CLIP-T with its projection and logit scale, and BERT's own pooler, which no loss reaches.
    assert count(found, trained=False) == 63_165_952 + 262_144 + 1 + 590_592
    assert count(found, trained=True) + count(found, trained=False) == count(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: language_shape("nobody/no-such-bert"), "'nobody/no-such-bert'.*without the hub"),
        (lambda: language_shape("./nowhere"), "nowhere"),
        (lambda: clip_shape("ViT-Z-99"), "ViT-Z-99"),
    ],
)
def test_unknown_architectures(call, message):
    with pytest.raises(XdscaleError, match=message):
        call()


def test_local_folder_with_projected_embeddings(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "electra", "hidden_size": 64, "embedding_size": 32, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "intermediate_size": 128}'
    )
    spec = load_recipe("quickstart", [f"model.language.name={tmp_path}", "model.language.sha256=null"])
    planned = [(module.own, module.trained, module.tied) for module in modules(model_shape(spec))]
    assert planned == real_modules(spec)
