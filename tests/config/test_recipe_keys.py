"""The keys of a recipe, as `xdscale recipes NAME` shows them: all of them, with a meaning, as overrides."""

import re
from typing import get_args

import pytest

from xdscale.finetune.recipe import FinetuneSettings, load_settings
from xdscale.recipe import Section, load_recipe
from xdscale.recipes.keys import key_lines
from xdscale.recipes.mlm.schema import MaskedLMRecipe
from xdscale.recipes.visualbert.schema import VisualBERTRecipe
from xdscale.recipes.visualbert.task_schema import VisualBERTTaskRecipe
from xdscale.recipes.vlbert.schema import VLBERTRecipe
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.registry import SUBJECTS
from xdscale.tasks.contract import find_settings

RECIPES = (XDBERTRecipe, MaskedLMRecipe, VisualBERTRecipe, VisualBERTTaskRecipe, VLBERTRecipe)


def leaves(values, prefix=""):
    """Names every key of nested dictionaries; a table of a recipe without classes is one key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("name", ["xdbert-base-wikitext103", "bert-base-mlm-wikitext103", "quickstart"])
def test_the_lines_of_a_recipe_name_every_key_and_are_overrides_that_give_the_same_recipe(name, write):
    recipe = load_recipe(name, ["run.max_damaged_shards=2"])
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in key_lines(recipe) if line}
    overrides = [shown for shown in lines if "=" in shown]
    assert load_recipe(write({section: {} for section in type(recipe).model_fields}), overrides) == recipe
    everything = set(leaves(type(recipe).model_validate(recipe.model_dump()).model_dump()))
    assert everything <= {re.split("=| ", shown)[0] for shown in lines}
    assert lines["run.max_damaged_shards=2"].endswith("up to this many damaged shards (default 0)")
    assert lines["optim.gradient_clipping=1.0"] == "largest global gradient norm (the default)"


def test_the_keys_of_an_objective_that_is_off_are_shown():
    lines = list(key_lines(load_recipe("xdbert-base-mlm")))
    assert any(line.startswith("objectives.match=null ") for line in lines)
    (line,) = (line for line in lines if line.startswith("objectives.match.mismatch"))
    assert re.fullmatch(
        r"objectives\.match\.mismatch \(off\) +share of the pairs whose texts differ \(default 0\.5\)", line
    )


def test_the_lines_of_a_finetuning_recipe_are_overrides_too():
    settings = load_settings("paper", [])
    lines = list(key_lines(settings))
    overrides = [line.split("  ")[0] for line in lines if "=" in line.split("  ")[0]]
    assert load_settings("quickstart", overrides) == settings
    (seeds,) = (number for number, line in enumerate(lines) if line.startswith("seeds="))
    assert lines[seeds - 1] == ""  # of no section


@pytest.mark.parametrize("section", [*RECIPES, FinetuneSettings, *map(find_settings, SUBJECTS)])
def test_every_key_has_a_meaning(section):
    def without(section):
        for name, field in section.model_fields.items():
            kinds = [field.annotation, *get_args(field.annotation)]
            classes = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
            if not classes and not field.description:
                yield f"{section.__name__}.{name}"
            for kind in classes:
                yield from without(kind)

    assert list(without(section)) == []
