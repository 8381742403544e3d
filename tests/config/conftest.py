"""Recipe files of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MINIMAL = {
    "system": "xdbert",
    "model": {"language": {"name": "bert-base-uncased"}, "clip": {"name": "ViT-B-32"}},
    "data": {"shards": "shards"},
    "training": {"steps": 10, "global_batch": 4},
    "output": {"folder": "run"},
}
"""A recipe that says no more than it must."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a recipe, values or text, and returns its path."""

    def write(values: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return str(path)

    return write
