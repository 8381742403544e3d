"""Imports run one way (the contracts stand in pyproject.toml), few files know a system, and a name is one class."""

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xdscale.registry import SYSTEMS

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("xdscale", "kernels", "shards")
    for path in (ROOT / folder).rglob("*.py")
}
HOUSE = {"finetune", "mlm", "xdbert"}
"""What the house was built with: other systems are made of their parts."""
MORE = {"visualbert": ("r2c",)}
"""Files of a system that are not called by its name: a network that it alone tunes along."""


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
    statements = (each for tree in FILES.values() for each in tree.body)
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
    own = {path: module_of(path) for path in FILES if any(word in str(path) for word in words)}
    assert own
    packages = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = {path for path, tree in FILES.items() if path not in own and set(own.values()) & set(named(tree))}
    return {str(path) for path in known} | {"pyproject.toml" for word in words if f".{word}" in packages}


@pytest.mark.parametrize("system", sorted({name.partition("_")[0] for name in SYSTEMS} - HOUSE))
def test_a_system_touches_its_own_files_and_two_others(system):
    """DESIGN's measure: the registry, and where packages and layers of imports are listed."""
    assert others_that_know(system, *MORE.get(system, ())) == {"xdscale/registry.py", "pyproject.toml"}
    # Nothing goes by its name either, but a network's and a file format's that are called so, which anyone may read.
    texts = {path for path, tree in FILES.items() for node in ast.walk(tree) if getattr(node, "value", None) == system}
    assert {str(path) for path in texts if system not in str(path)} <= {
        "xdscale/registry.py", "xdscale/extraction/extract.py", "shards/sources/regions/importing.py",
    }  # fmt: skip


@pytest.mark.parametrize("task", ["vqa", "vcr", "nlvr2", "refcoco"])
def test_a_task_touches_its_own_file_and_one_other(task):
    assert others_that_know(task) == {"xdscale/tasks/contract.py"}
