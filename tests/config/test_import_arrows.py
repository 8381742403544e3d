"""Imports run one way (the contracts stand in pyproject.toml)."""

import os
import shutil
import subprocess
import sys
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
