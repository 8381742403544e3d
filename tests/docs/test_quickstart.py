"""The quickstart, as a newcomer runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result():
    """What the script printed."""
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def proposed(result):
    """The commands that it ends with."""
    return re.search(r"\nnext:\n((?:  .+\n)+)", result.stdout)[1].splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_learns_and_reports(result, proposed):
    summary = json.loads((ROOT / "runs/quickstart/summary.json").read_text())
    before, after = summary["before"], summary["after"]
    names = {"mlm_loss", "mlm_accuracy", "match_accuracy", "clip_token_accuracy"}
    assert names == before.keys() == after.keys()
    assert after["mlm_loss"] <= before["mlm_loss"] - 2.5
    assert after["clip_token_accuracy"] > summary["chance"]["clip_token_accuracy"]
    assert 0 <= after["match_accuracy"] <= 1
    assert summary["chance"]["match_accuracy"] == 0.5
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0
    assert all((ROOT / path).exists() for path in summary["paths"].values())
    for label in ("baseline", "adapted"):
        folders = sorted((ROOT / "runs/quickstart-finetuned" / label / "person").glob("seed-*"))
        found = [json.loads((folder / "result.json").read_text()) for folder in folders]
        assert len(found) == 3
        # A coin makes 0.5 of 200; its standard deviation over three seeds of the same examples is 0.035.
        assert sum(entry["metrics"]["accuracy"] for entry in found) / 3 > 0.6
    assert "baseline" in result.stdout
    assert "adapted" in result.stdout
    # The report says what the figures are worth, and what to type next.
    assert "random weights" in result.stdout
    assert [command.split()[0] for command in proposed] == ["source", *["xdscale"] * 4, "tensorboard"]


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_what_it_proposes_runs_in_a_clean_shell(proposed):
    """As printed, line by line, in a shell that knows nothing of the environment that quickstart.sh made."""
    script = "\n".join(["set -e", *proposed]).replace("  tensorboard", "timeout 30 tensorboard")
    clean = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 124, done.stderr[-3000:]  # TensorBoard was still serving, so all before it went well
    assert "TensorBoard" in done.stderr
    assert "training.global_batch=16" in done.stdout
    assert (ROOT / "runs/quickstart-seed-1/checkpoints/step-00000050").is_dir()
