"""Systems that installed packages offer the wrong way: one message each, and nobody else's recipes are in the way."""

import pytest

from xdscale import registry
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe, shipped_recipes
from xdscale.systems.contract import open_system

RECIPE = """
from typing import ClassVar, Literal
from xdscale.recipe import Recipe, Section

class Model(Section):
    width: int = 1

class Toy(Recipe):
    {implementation}
    system: Literal["toy"]
    model: Model = Model()
"""
TEXT = "system: toy\ndata: {shards: s}\ntraining: {steps: 1, global_batch: 1}\noutput: {folder: o}\n"


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Lays a package that offers the system `toy` out as pip does; returns the path of a recipe for it."""

    def lay(value, files):
        info = tmp_path / "offered-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[xdscale.systems]\ntoy = {value}\n")
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "recipe.yaml").write_text(TEXT)
        return str(tmp_path / "mine" / "recipe.yaml")

    monkeypatch.syspath_prepend(str(tmp_path))
    registry.offered.cache_clear()
    yield lay
    registry.offered.cache_clear()


@pytest.mark.parametrize(
    ("value", "files", "problem"),
    [
        ("offer_a:Toy", {"offer_a.py": "1 / 0"}, "offer_a:Toy cannot be imported: ZeroDivisionError: division by zero"),
        ("offer_b:Toy", {"offer_b.py": "def ("}, "offer_b:Toy cannot be imported: SyntaxError: .*"),
        ("offer_c:Toy", {"offer_c.py": "raise SystemExit(0)"}, "offer_c:Toy cannot be imported: SystemExit: 0"),
        ("offer_d.s:Toy", {"offer_d/__init__.py": "1 / 0", "offer_d/s.py": ""}, ".* ZeroDivisionError: .*"),
        ("offer_e.s:Toy", {"offer_e/__init__.py": "exit()", "offer_e/s.py": ""}, ".* SystemExit.*"),
        (":Toy", {}, ":Toy cannot be imported: ValueError: Empty module name"),
        ("offer_f:Toy", {"offer_f.py": "class Toy: pass"}, "offer_f:Toy is <class 'offer_f.Toy'>; expected a "
         "subclass of xdscale.recipe.Recipe"),
        ("offer_g:Toy", {"offer_g.py": "def Toy(): pass"}, "offer_g:Toy is <function Toy .*; expected a subclass .*"),
    ],
)  # fmt: skip
def test_a_package_that_offers_no_recipe_is_told(offer, value, files, problem):
    path = offer(value, files)
    with pytest.raises(
        XdscaleError, match=rf"^{path}: system = 'toy': {problem}(; python -c 'import .*' shows where)?$"
    ):
        load_recipe(path)
    assert load_recipe("quickstart").system == "xdbert"


@pytest.mark.parametrize(
    ("module", "implementation", "problem"),
    [
        ("built_a", "", r"Toy\.implementation = None; expected module:class"),
        ("built_b", "implementation: ClassVar[str] = 'built_b:Toy'", "built_b:Toy is <class 'built_b.Toy'>; expected a "
         "subclass of xdscale.systems.contract.System"),
        ("built_c", "implementation: ClassVar[str] = 'built_c:nothing'", "built_c:nothing cannot be imported: .*"),
        ("built_d", "implementation: ClassVar[str] = 'xdscale.systems.contract:System'",
         "xdscale.systems.contract:System does not define build, open, parts"),
    ],
)  # fmt: skip
def test_a_recipe_without_a_whole_system_is_told(offer, module, implementation, problem):
    path = offer(f"{module}:Toy", {f"{module}.py": RECIPE.format(implementation=implementation)})
    recipe = load_recipe(path)
    with pytest.raises(XdscaleError, match=rf"^system = 'toy': {problem}$"):
        open_system(recipe)


def test_no_recipe_of_a_package_hides_one_that_ships(offer):
    offer("offer_h.s:Toy", {"offer_h/s.py": "", "offer_h/quickstart.yaml": TEXT})
    assert [path.stem for path in shipped_recipes()].count("quickstart") == 2
    with pytest.raises(XdscaleError, match=r"quickstart: several ship under this name: .*offer_h.*; give one's path"):
        load_recipe("quickstart")
