"""What commands ask of a recipe: that of a system with neither a language encoder nor `data.shards`."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.launch.facts import HostFacts
from xdscale.launch.job import path_warnings, shipped_ds_config
from xdscale.plan import profile
from xdscale.plan.configs import model_name
from xdscale.recipe import Recipe, Section, load_recipe
from xdscale.systems.contract import recompute_activations


class Detector(Section):
    weights: str = "pretrained"


class RegionModel(Section):
    detector: Detector = Detector()
    layers: int = 2


class RegionData(Section):
    regions: str


class RegionRecipe(Recipe):
    implementation: ClassVar[str] = "nowhere:RegionSystem"

    model: RegionModel = RegionModel()
    data: RegionData


def recipe_of(regions):
    return RegionRecipe(
        system="regions",
        data={"regions": regions},
        training={"steps": 1, "global_batch": 1},
        output={"folder": "/tmp"},
    )


def test_plans_name_configurations_after_the_system():
    assert model_name(recipe_of("/data")) == "regions"


def test_no_shipped_configuration_is_guessed():
    with pytest.raises(XdscaleError, match="system = 'regions'.*name one with --deepspeed-config"):
        shipped_ds_config(recipe_of("/data"))


@pytest.mark.parametrize(
    ("width", "name"),
    [(511, "quickstart-zero2"), (512, "bert-base-zero2"), (1023, "bert-base-zero2"), (1024, "electra-large-zero2")],
)
def test_the_shipped_configuration_is_that_of_the_encoders_width(width, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": width}))
    spec = load_recipe("quickstart-mlm", [f"model.language.name={tmp_path}", "model.language.sha256=null"])
    assert shipped_ds_config(spec) == name


@pytest.mark.parametrize(("regions", "warnings"), [("here", 1), ("/here", 0), ("s3://bucket/here", 0)])
def test_relative_places_are_warned_of_under_any_key(regions, warnings):
    found = path_warnings(recipe_of(regions))
    assert len(found) == warnings
    assert all(line.startswith("data.regions = here is relative") for line in found)


def test_the_doctor_looks_for_no_shards_where_there_are_none():
    facts = HostFacts.of_this_machine(0, 1, recipe_of("/data"))
    assert facts.shards_problem == ""
    assert facts.shards_fingerprint is None


def test_nothing_is_loaded_to_be_counted(monkeypatch):
    asked = []
    system = SimpleNamespace(build=lambda: nn.Identity())
    monkeypatch.setattr(profile, "open_system", lambda recipe: asked.append(recipe) or system)
    profile.build_on_meta(recipe_of("/data"))
    assert asked[0].model.detector.weights == "random"
    assert asked[0].model.layers == 2


def test_a_module_that_cannot_recompute_is_told():
    with pytest.raises(XdscaleError, match=r"^activation_checkpointing: Linear has no enable_activation_checkpointing"):
        recompute_activations(nn.Linear(1, 1))
