"""Tasks by name: those that ship, those of packages found through entry points alone, and what is refused."""

import subprocess
import sys

import pytest

from xdscale import registry
from xdscale.errors import XdscaleError
from xdscale.tasks.contract import SHIPPED, SUBJECTS, ModelSettings, Task, find_subject, find_task, task_names

MODULE = """
from xdscale.tasks.text import TextTask

TOY = TextTask(name="toy", title="Toy", folder="TOY", first="text", label="label", labels=("no", "yes"))
"""


SUBJECT = """
from xdscale.tasks.contract import Subject

class ToySubject(Subject):
    def describe(self): ...
    def collator(self, task, examples): ...
    def build(self, task, *, sha256=None): ...

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


def test_a_package_adds_what_can_be_finetuned(packages):
    install(packages, "toy_subjects", "toy = toy_subjects:ToySubject", module=SUBJECT, group="xdscale.subjects")
    subject = find_subject("toy")("model", ModelSettings())
    assert subject.model == "model"
    with pytest.raises(XdscaleError, match=r"--task vqa: model as it is finetuned here reads no images"):
        subject.require_readable(find_task("vqa"))
    subject.require_readable(find_task("rte"))


def test_each_subject_that_ships_keeps_the_contract():
    assert [name for name in SUBJECTS if find_subject(name).__abstractmethods__] == []


@pytest.mark.parametrize(
    ("point", "name", "message"),
    [
        ("toy = half:Half", "toy", r"half:Half does not define build, collator"),
        ("toy = half:SUBJECT", "toy", "half:SUBJECT cannot be imported"),
        ("toy = half:Half", "lagnuage", "--subject = 'lagnuage': no such subject; did you mean 'language'"),
    ],
)
def test_a_subject_that_is_offered_wrongly_is_named(packages, point, name, message):
    install(packages, "half", point, module=SUBJECT, group="xdscale.subjects")
    with pytest.raises(XdscaleError, match=message):
        find_subject(name)
