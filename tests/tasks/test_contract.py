"""Tasks by name: those that ship, those of packages found through entry points alone, and what is refused."""

import subprocess
import sys

import pytest

from xdscale import registry
from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.finetune.command import _kind
from xdscale.finetune.recipe import FinetuneRecipe, load_settings, resolve_run
from xdscale.recipe_yaml import read_yaml
from xdscale.recipes.keys import key_lines
from xdscale.registry import SUBJECTS
from xdscale.tasks.contract import SHIPPED, Task, TaskData, find_subject, find_task, task_names

MODULE = """
from xdscale.tasks.text import TextTask

TOY = TextTask(name="toy", title="Toy", folder="TOY", first="text", label="label", labels=("no", "yes"))
"""


SUBJECT = """
from typing import ClassVar
from pydantic import Field
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.tasks.contract import Subject

class ToySettings(ModelSettings):
    implementation: ClassVar[str] = f"{__name__}:ToySubject"
    model_types: ClassVar[tuple[str, ...]] = ("toy_bert",)
    tricks: int = Field(1, ge=1, description="how many it does")

class ToySubject(Subject):
    def describe(self): ...
    def collator(self, task, examples): ...
    def build(self, task, *, sha256=None): ...

class HalfSettings(ModelSettings):
    implementation: ClassVar[str] = f"{__name__}:Half"

class Half(Subject):
    def describe(self): ...
"""


def install(folder, package, *points, module=MODULE, group="xdscale.tasks"):
    """Lays a package with entry points out as pip does."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{package}.py").write_text(module)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{point}\n" for point in points))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.offered.cache_clear()
    yield tmp_path
    registry.offered.cache_clear()


TABLE_1 = ["rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli", "swag", "read"]
WITH_IMAGES = ["vqa", "vqa_trainval", "vcr_qa", "vcr_qar", "nlvr2", "flickr30k_entities", "refcoco", "refcoco_plus"]


def test_what_ships_is_table_1_and_visualberts_and_keeps_the_contract():
    assert list(SHIPPED) == TABLE_1 + WITH_IMAGES
    assert [name for name in SHIPPED if find_task(name).images] == WITH_IMAGES
    members = {*Task.__annotations__, *(name for name in vars(Task) if name[0] != "_")}
    assert {"name", "loss", "read"} <= members
    for name in SHIPPED:
        task = find_task(name)
        assert task.name == name
        assert [member for member in members if not hasattr(task, member)] == []
        assert task.reads != "region" or task.outputs == 0


def test_listing_and_finding_need_nothing_heavy():
    code = (
        "import sys; from xdscale.finetune.recipe import load_settings; from xdscale.tasks.contract import *;"
        "load_settings('paper', []); task_names(); print('numpy' in sys.modules);"
        "find_task('rte'); print({'torch', 'transformers', 'tokenizers', 'sklearn', 'scipy'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\nset()\n"


def test_a_package_adds_a_task_through_its_entry_point_alone(packages):
    install(packages, "toy_tasks", "toy = toy_tasks:TOY")
    assert task_names() == [*SHIPPED, "toy"]
    assert "toy_tasks" not in sys.modules  # listing imports no task
    assert find_task("toy").title == "Toy"


def test_two_packages_with_one_name_are_both_named(packages):
    install(packages, "one_package", "toy = one_package:TOY")
    install(packages, "other_package", "toy = other_package:TOY")
    with pytest.raises(XdscaleError, match=r"two packages offer 'toy' .*(one|other)_package.*(one|other)_package"):
        task_names()


@pytest.mark.parametrize(
    ("point", "name", "message"),
    [
        ("rte = bad_tasks:TOY", "rte", "offers 'rte' as xdscale.tasks .bad_tasks:TOY., but xdscale has one"),
        ("play = bad_tasks:TOY", "play", "bad_tasks:TOY is offered under this name, but its name is 'toy'"),
        ("toy = bad_tasks:PLAY", "toy", "--task toy: bad_tasks:PLAY cannot be imported: .*no attribute 'PLAY'"),
        ("toy = no_such_module:TOY", "toy", "--task toy: no_such_module:TOY cannot be imported: No module named"),
        ("toy = bad_tasks:TOY", "tyo", "--task tyo: no such task; did you mean 'toy'"),
    ],
)
def test_what_a_package_offers_wrongly_is_named(packages, point, name, message):
    install(packages, "bad_tasks", point)
    with pytest.raises(XdscaleError, match=message):
        find_task(name)


def test_without_a_near_name_all_are_listed():
    with pytest.raises(
        XdscaleError, match=r"no such task; known tasks: rte, .*, read, .*; .* a file that ends with \.yaml"
    ):
        find_task("sentiment")


@pytest.fixture
def toy(packages):
    sys.modules.pop("toy_subjects", None)
    install(packages, "toy_subjects", "toy = toy_subjects:ToySettings", module=SUBJECT, group="xdscale.subjects")


def test_a_package_adds_what_can_be_finetuned_with_keys_of_its_own(toy, tmp_path):
    subject = find_subject("toy")("model", load_settings("paper", ["model.tricks=3"], "toy").model)
    assert (subject.model, subject.settings.tricks, subject.settings.max_length) == ("model", 3, 128)
    (tmp_path / "config.json").write_text('{"model_type": "toy_bert"}')
    assert _kind(str(tmp_path)) == "toy"
    with pytest.raises(XdscaleError, match=r"--task vqa: model as it is finetuned here reads no images"):
        subject.require_readable(find_task("vqa"))
    subject.require_readable(find_task("rte"))
    assert any(line.startswith("model.tricks=1 ") for line in key_lines(load_settings("paper", [])))


@pytest.mark.parametrize(
    ("subject", "override", "refused"),
    [
        (
            "language",
            "model.tricks=3",
            r"model\.tricks = 3: .* as language has no such choice, it is one of toy;",
        ),
        (
            "toy",
            "model.flip=0.5",
            r"model\.flip = 0\.5: .* as toy has no such choice, it is one of vlbert;",
        ),
        ("toy", "model.trick=3", r"unknown key 'model\.trick'; did you mean 'tricks'"),
        ("toy", "model.tricks=0", r"model\.tricks = 0: Input should be greater than or equal to 1"),
    ],
)
def test_a_key_that_a_subject_has_not_is_refused_and_its_owners_are_named(toy, subject, override, refused):
    with pytest.raises(XdscaleError, match=f"^the command line: {refused}"):
        load_settings("paper", [override], subject)


def test_what_all_subjects_do_unless_told_otherwise_may_be_said_to_any(toy):
    stated = ["model.tricks=1", "model.flip=0", "model.pixels=null", "model.objects=all", "model.loss=sigmoid"]
    for subject in ("language", "vlbert", "toy"):
        assert load_settings("paper", stated, subject).model == load_settings("paper", [], subject).model


def test_a_run_stores_the_keys_of_its_subject_alone_and_finds_them_again(toy, tmp_path):
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * 10, {}, {}, {}, {})
    of_run = {"source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    known = {"name": "m", "subject": "toy", "size": "base", "weights_sha256": None}
    run = resolve_run(load_settings("paper", ["model.tricks=3"], "toy"), data, subject=known, **of_run)
    assert run.model.model_dump() == known | {
        "dropout": 0.1, "max_length": 128, "weights": "pretrained", "freeze_pooler": False, "tricks": 3,
    }  # fmt: skip
    assert FinetuneRecipe.model_validate(read_yaml(run.to_yaml())) == run
    assert any(line.startswith("model.tricks=3 ") for line in key_lines(run))
    other = resolve_run(load_settings("paper", []), data, subject=known | {"subject": "language"}, **of_run)
    assert "tricks" not in other.model.model_dump()
    # A run of before, whose recipe has everybody's keys, goes on.
    stored = other.model_dump(mode="json")
    stored["model"] |= {"flip": 0.0, "pixels": None, "objects": "all", "object_masks": None}
    assert FinetuneRecipe.model_validate(stored).identity() == other.identity()
    with pytest.raises(ValueError, match="as language has no such choice"):
        FinetuneRecipe.model_validate(stored | {"model": stored["model"] | {"flip": 0.5}})


def test_each_subject_that_ships_keeps_the_contract():
    assert [name for name in SUBJECTS if find_subject(name).__abstractmethods__] == []


@pytest.mark.parametrize(
    ("point", "name", "message"),
    [
        ("toy = half:HalfSettings", "toy", r"--subject toy: half:Half does not define build, collator"),
        ("toy = half:Half", "toy", r"half:Half is .*; expected a subclass of .*\.ModelSettings"),
        ("toy = half:SUBJECT", "toy", "half:SUBJECT cannot be imported"),
        ("toy = half:Half", "lagnuage", "--subject = 'lagnuage': no such subject; did you mean 'language'"),
    ],
)
def test_a_subject_that_is_offered_wrongly_is_named(packages, point, name, message):
    install(packages, "half", point, module=SUBJECT, group="xdscale.subjects")
    with pytest.raises(XdscaleError, match=message):
        find_subject(name)
