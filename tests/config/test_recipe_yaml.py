"""Recipes as YAML: which texts are numbers, switches and names, what is refused, and what is written."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe

from .conftest import MINIMAL


def test_not_yaml_and_not_a_recipe(write):
    with pytest.raises(XdscaleError, match="not a YAML recipe"):
        load_recipe(write("model: [unclosed"))
    for value in ("9" * 5000, "[" * 5000):
        path = write({})
        Path(path).write_text(f"training: {{steps: {value}}}")
        with pytest.raises(XdscaleError, match="not a YAML recipe"):
            load_recipe(path)
        with pytest.raises(XdscaleError, match="the value is not valid YAML"):
            load_recipe(write(MINIMAL), [f"output.folder={value}"])
    with pytest.raises(XdscaleError, match="expected sections such as system, model, objectives"):
        load_recipe(write("just words"))


@pytest.mark.parametrize("form", ["model: *i", "system: *i", "{}"])
def test_a_few_lines_that_stand_for_billions_of_values_are_refused_at_once(write, form):
    levels = [f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in pairwise("abcdefghi")]
    text = "\n".join(["a: &a [1, 2]", *levels, form if form != "{}" else ""])
    values = f"system: xdbert\n{text}" if "system" not in form else text
    with pytest.raises(XdscaleError) as refused:
        load_recipe(write(values if form != "{}" else re.sub(r"(?m)^(.+)$", r"- {\1}", text)))
    assert len(str(refused.value)) < 100_000


def test_overrides_are_yaml_and_reach_any_depth(write):
    overrides = [
        "optim.learning_rate=5e-5",
        "objectives.match=null",
        "model.language.weights=random",
        "training.seed=7",
    ]
    recipe = load_recipe(write(MINIMAL), overrides)
    assert recipe.optim.learning_rate == 5e-5
    assert recipe.objectives.match is None
    assert recipe.model.language.weights == "random"
    assert recipe.training.seed == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e3", 1000), ("010", 10), ("+7", 7), ("1_000", 1000), ("'5'", 5)],
)
def test_numbers_are_what_they_look_like(write, text, expected):
    assert load_recipe(write(MINIMAL), [f"training.steps={text}"]).training.steps == expected
    path = Path(write(MINIMAL))
    path.write_text(path.read_text() + f"\noptim: {{weight_decay: {text}}}\n")
    assert load_recipe(str(path)).optim.weight_decay == expected


@pytest.mark.parametrize("text", ["yes", "true", "1:30", "2024-01-31", "0x10", ".inf", ".nan"])
def test_what_is_no_number_is_none(write, text):
    """YAML 1.1 makes 1 of yes and 90 of 1:30."""
    with pytest.raises(XdscaleError, match=r"training\.steps = "):
        load_recipe(write(MINIMAL), [f"training.steps={text}"])


def test_days_and_words_are_names_and_numbers_need_quotes(write):
    for name in ("2024-01-31", "2026-02-30", "yes", "1:30", "run-010"):
        assert load_recipe(write(MINIMAL), [f"output.folder={name}"]).output.folder == name
    with pytest.raises(XdscaleError, match=r"output\.folder = 2024: .*; write a number .* in quotes"):
        load_recipe(write(MINIMAL), ["output.folder=2024"])
    assert load_recipe(write(MINIMAL), ["output.folder='2024'"]).output.folder == "2024"


def test_a_key_that_stands_twice_is_refused(write):
    """Of two sections or values only the last would count, without a word."""
    path = Path(write(MINIMAL))
    path.write_text(path.read_text() + "\ntraining: {steps: 5, global_batch: 4}\n")
    with pytest.raises(XdscaleError, match="the key 'training' stands twice in a section"):
        load_recipe(str(path))
    path.write_text("system: mlm\na: &a {b: 1}\nc: {<<: *a, b: 2}\n")  # taken from elsewhere and replaced
    with pytest.raises(XdscaleError, match="unknown key 'a'"):
        load_recipe(str(path))


def test_resolved_yaml_reads_back_as_the_same_recipe():
    recipe = load_recipe("quickstart")
    assert type(recipe).model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    "name", ["1e5", ".5", "09", "010", "0x1f", "yes", "true", "1:30", "2026-11-26", "null", "a: b"]
)
def test_a_name_that_looks_like_a_number_or_switch_is_written_with_quotes(write, name):
    """So that run folders of such names are read again, by YAML 1.1 too."""
    recipe = load_recipe(write(MINIMAL), [f"output.folder='{name}'"])
    assert load_recipe(write(recipe.to_yaml())) == recipe
    assert yaml.safe_load(recipe.to_yaml())["output"]["folder"] == name
