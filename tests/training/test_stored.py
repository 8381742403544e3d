"""What a run or an export holds, where somebody changed it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from xdscale.errors import XdscaleError
from xdscale.training.stored import FULL_MODEL, begin_with, run_recipe, stored_recipe, stored_state


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
