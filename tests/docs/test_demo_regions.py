"""The demos of docs/picture-world.md, as a newcomer runs them: the models answer from the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def summary_of(script, run):
    """Returns what a demo came to."""
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    result = subprocess.run(
        ["bash", f"scripts/{script}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((ROOT / "runs" / run / "summary.json").read_text())


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_answers_come_from_the_pictures():
    summary = summary_of("demo_regions.sh", "demo-regions")
    accuracy, grounding = summary["vqa_accuracy"], summary["grounding"]
    assert accuracy["images"] >= accuracy["shuffled"] + 0.2
    assert accuracy["images"] >= accuracy["blank"] + 0.2
    assert grounding["phrases"] > 500
    assert 0.1 < grounding["confidence_baseline"] < 0.4
    assert grounding["best_head"] >= grounding["confidence_baseline"] + 0.2


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_what_expressions_speak_of_is_found_by_what_is_seen():
    summary = summary_of("demo_pixels.sh", "demo-pixels")
    accuracy = summary["refcoco_plus_accuracy"]
    for split in ("val", "testA", "testB"):
        assert accuracy["images"][split] >= accuracy["blank"][split] + 0.25
    assert 0 < summary["cosine_before_and_after"]["mean"] < 0.999
