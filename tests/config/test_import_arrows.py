"""Imports run one way (the contracts stand in pyproject.toml), and a name is one class."""

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    files = [path for folder in ("xdscale", "kernels", "shards") for path in (ROOT / folder).rglob("*.py")]
    statements = (each for path in files for each in ast.parse(path.read_text(encoding="utf-8")).body)
    names = Counter(each.name for each in statements if isinstance(each, ast.ClassDef) and each.name[0] != "_")
    assert len(names) > 100
    assert [name for name, homes in names.items() if homes > 1] == []
