"""Imports run one way (the contracts stand in pyproject.toml), few files know a system, and a name is one class."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xdscale.registry import SYSTEMS

ROOT = Path(__file__).parents[2]
HOUSE = {"finetune", "mlm", "xdbert"}
"""What the house was built with: other systems are made of their parts."""
MORE = {"visualbert": ("r2c",)}
"""Files of a system that are not called by its name: a network that it alone tunes along."""


@functools.cache  # not as a constant: all workers would parse them as they collect
def files():
    """Returns the package's files, parsed, by their paths."""
    return {
        path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("xdscale", "kernels", "shards")
        for path in (ROOT / folder).rglob("*.py")
    }


def test_arrows_run_one_way(tmp_path):
    # import-linter reads folders, so the packages that stand at the root are put where they are imported from.
    for source, target in {"xdscale": "xdscale", "kernels": "xdscale/kernels", "shards": "xdscale/shards"}.items():
        shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


def test_no_two_public_classes_have_one_name():
    statements = (each for tree in files().values() for each in tree.body)
    names = Counter(each.name for each in statements if isinstance(each, ast.ClassDef) and each.name[0] != "_")
    assert len(names) > 100
    assert [name for name, homes in names.items() if homes > 1] == []


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[0] == "xdscale" else ("xdscale", *parts))


def named(tree):
    """Yields every module that is imported, wherever that stands, and every text as `module:object` begins."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{each.name}" for each in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]


def others_that_know(*words):
    """Returns the files that name a module whose path has one of the words, without these modules themselves."""
    own = {path: module_of(path) for path in files() if any(word in str(path) for word in words)}
    assert own
    packages = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = {path for path, tree in files().items() if path not in own and set(own.values()) & set(named(tree))}
    return {str(path) for path in known} | {"pyproject.toml" for word in words if f".{word}" in packages}


@pytest.mark.parametrize("system", sorted({name.partition("_")[0] for name in SYSTEMS} - HOUSE))
def test_a_system_touches_its_own_files_and_two_others(system):
    """DESIGN's measure: the registry, and where packages and layers of imports are listed."""
    assert others_that_know(system, *MORE.get(system, ())) == {"xdscale/registry.py", "pyproject.toml"}
    # Nothing goes by its name either, but a network's and a file format's that are called so, which anyone may read.
    texts = {
        path for path, tree in files().items() for node in ast.walk(tree) if getattr(node, "value", None) == system
    }
    assert {str(path) for path in texts if system not in str(path)} <= {
        "xdscale/registry.py", "xdscale/extraction/extract.py", "shards/sources/regions/importing.py",
    }  # fmt: skip


@pytest.mark.parametrize("task", ["vqa", "vcr", "nlvr2", "refcoco"])
def test_a_task_touches_its_own_file_and_one_other(task):
    assert others_that_know(task) == {"xdscale/tasks/contract.py"}


CHANGING = {
    *("Best", "Skipped", "Trainer", "_Place", "_Seen"),  # what a run counts, and where ranks are
    *("Outcome", "Evidence"),  # what a doctor finds out, one thing after the other
    *("ArcCounts", "HeadCounts", "ImageSizes", "_Held", "Case", "Contestant", "Measured"),
}
BY_NAME = {
    *("CheckpointPosition", "EngineState", "Retention", "Trainer"),
    *("Gpu", "Machine", "Plan", "PlanRow", "Settings", "States"),
    *("CommonsenseReasoning", "Hub", "ReferringExpressions", "Request", "TextTask", "VisualQuestions"),
}


def test_records_stay_as_they_were_made_but_those_that_count_and_many_numbers_are_given_by_name():
    """Nobody who is handed one changes it under those who hold it too."""
    found = [
        (each.name, ast.unparse(decorator))
        for tree in files().values()
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for decorator in each.decorator_list
        if ast.unparse(decorator).startswith("dataclass")
    ]
    assert len(found) > 60
    assert {name for name, words in found if "frozen=True" not in words} == CHANGING
    assert {name for name, words in found if "kw_only=True" in words} == BY_NAME


LOCKS = {"(folder / '.locks').open('w')", "path.open('w')"}
"""Files that nothing is written to."""


def test_texts_are_read_and_written_in_a_stated_encoding():
    """Not in that of the machine's locale."""
    calls = [node for tree in files().values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute)]
    whole = [call for call in methods if call.func.attr in ("read_text", "write_text")]
    modes = {"r", "w", "a", "x", "r+", "w+", "a+"}
    opened = [
        call
        for call in methods
        if call.func.attr == "open"
        and ast.unparse(call.func) != "tarfile.open"
        and (not call.args or isinstance(call.args[0], ast.Constant) and call.args[0].value in modes)
    ]
    assert len(whole) > 30
    assert len(opened) > 5
    silent = [call for call in (*whole, *opened) if not any(option.arg == "encoding" for option in call.keywords)]
    assert {ast.unparse(call) for call in silent} - LOCKS == set()
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "open"]
