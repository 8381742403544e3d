"""The demo of docs/picture-world.md, as a newcomer runs it: the model answers from the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_answers_come_from_the_pictures():
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    result = subprocess.run(
        ["bash", "scripts/demo_regions.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((ROOT / "runs/demo-regions/summary.json").read_text())
    accuracy = summary["vqa_accuracy"]
    assert accuracy["images"] >= accuracy["shuffled"] + 0.2
    assert accuracy["images"] >= accuracy["blank"] + 0.2
    assert summary["grounding"]["phrases"] > 500
    assert 0.1 < summary["grounding"]["confidence_baseline"] < 0.4
