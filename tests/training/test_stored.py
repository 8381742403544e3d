"""What a run or an export holds, where somebody changed it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe
from xdscale.training.stored import (
    FULL_MODEL,
    begin_with,
    run_recipe,
    save_full_model,
    stored_recipe,
    stored_state,
)


@pytest.fixture
def export(tmp_path):
    """Writes an export of one weight, with this in its config.json; returns its folder."""

    def write(**config):
        inner = tmp_path / FULL_MODEL
        inner.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2)}, inner / "model.safetensors")
        (inner / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_tied_weights_are_those_they_are_tied_to(export):
    assert stored_state(export(tied_weights={"b": "a"}))["b"].tolist() == [1, 1]


@pytest.mark.parametrize("config", [{}, *({"tied_weights": value} for value in (None, [], {"b": "c"}, {"b": ["a"]}))])
def test_ties_to_what_is_not_there_are_named(export, config):
    with pytest.raises(XdscaleError, match=r"config\.json: tied_weights = .*: expected names of weights that model"):
        stored_state(export(**config))


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (None, "holds no recipe"),
        ([], "holds no recipe"),
        ({}, "'system' is missing"),
        ({"system": "os:system"}, "system = 'os:system': no such system"),
        ({"system": ["xdbert"]}, r"system = .*no such system"),
        ({"system": "xdbert", "implementation": "os:system"}, "unknown key 'implementation'"),
    ],
)
def test_a_recipe_that_was_changed_names_no_code_of_its_own(export, tmp_path, recipe, problem):
    with pytest.raises(XdscaleError, match=rf"(?s)config\.json: .*{problem}"):
        stored_recipe(export(recipe=recipe))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(XdscaleError, match=rf"(?s)recipe\.yaml: .*{problem}"):
        run_recipe(tmp_path)


def test_a_head_that_was_off_keeps_its_values_but_the_model_must_be_whole(tmp_path):
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})
    before, state = module["head"].weight.clone(), {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}
    begin_with(module, tmp_path, state)
    assert torch.equal(module["head"].weight, before)
    assert torch.equal(module["model"].weight, state["model.weight"])
    for wrong in ({"model.weight": torch.ones(2, 2)}, state | {"head.bias": torch.ones(2)}):
        with pytest.raises(
            XdscaleError, match=f"model.start = {tmp_path}: holds no fitting weights for (model|head).bias"
        ):
            begin_with(module, tmp_path, wrong)


def test_a_full_model_is_written_as_people_read_it_and_what_is_tied_once(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {"a": shared, "tied": shared, "turned": shared.t()}
    recipe = load_recipe("quickstart")
    save_full_model(recipe, state, tmp_path / "full")
    text = (tmp_path / "full" / "config.json").read_text(encoding="utf-8")
    stated = {"recipe": recipe.model_dump(mode="json"), "tied_weights": {"tied": "a"}}
    assert text == json.dumps(stated, indent=2) + "\n"
    found = load_file(tmp_path / "full" / "model.safetensors")
    assert found.keys() == {"a", "turned"}  # of one storage, but not the same
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    with safe_open(tmp_path / "full" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
