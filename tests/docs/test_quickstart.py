"""The quickstart: in small, with each `xdscale` forked ready-made, and as a proof whole, as a newcomer runs it."""

import json
import os
import re
import subprocess
import sys
import threading
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


SMALLER = {
    'install.sh"\n': 'install.sh"\ncd "$WORKPLACE"\n',
    'shards build "$dump"': 'shards build "$ARTICLES"',
    'xdscale train "$@"': 'xdscale train "$@" training.steps=4 training.global_batch=4 run.eval_samples=8',
    "run.stop_at_step=25": "run.stop_at_step=2",
    "--seeds 3": "--seeds 2 training.epochs=1 model.max_length=16",
}
# A function of bash that is found before any program: it asks the test to run the command, in turn with others.
XDSCALE = r"""() { (
    flock 9
    printf '%s\0' "$@" >"$WORKPLACE/asked"
    read -r code <"$WORKPLACE/answered"
    cat "$WORKPLACE/stderr" >&2
    cat "$WORKPLACE/stdout"
    exit "$code"
) 9>"$WORKPLACE/lock"; }"""


def serve(folder, launch_ranks, ran):
    """Runs what the function above asks for, until it asks for nothing."""
    while words := (folder / "asked").read_text().split("\0")[:-1]:
        done = launch_ranks("xdscale", *words, folder=folder)
        ran.append(words)
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)
        (folder / "answered").write_text(f"{done.code}\n")


@pytest.mark.slow
def test_its_steps_end_in_a_report(tmp_path, launch_ranks, wiki_text):
    """The script itself, but for SMALLER: less text, few steps, short sentences, two seeds, a folder of its own."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    for whole, small in SMALLER.items():
        assert script.count(whole) == 1
        script = script.replace(whole, small)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for name in ("asked", "answered"):
        os.mkfifo(tmp_path / name)
    environment = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1]), "BASH_FUNC_xdscale%%": XDSCALE}
    environment |= {"WORKPLACE": str(tmp_path), "ARTICLES": str(wiki_text), "OMP_NUM_THREADS": "1"}
    ran = []
    server = threading.Thread(target=serve, args=(tmp_path, launch_ranks, ran), daemon=True)
    server.start()
    done = subprocess.run(
        ["bash", "-c", script, "scripts/quickstart.sh"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "asked").write_text("")
    server.join()
    assert [words[0] for words in ran] == ["shards", *["train"] * 3, *["export"] * 2, *["finetune"] * 2, "report"]
    assert "continuing after step 2 of 4" in done.stderr
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert {"mlm_loss", "mlm_accuracy", "match_accuracy", "clip_token_accuracy"} == summary["after"].keys()
    assert summary["before"] != summary["after"]
    assert all((tmp_path / path).exists() for path in summary["paths"].values())
    for label in ("baseline", "adapted"):
        assert len(list((tmp_path / "runs/quickstart-finetuned" / label / "person").glob("seed-*/result.json"))) == 2
        assert label in done.stdout
    assert "random weights" in done.stdout
    assert [command.split()[0] for command in proposals(done)] == ["source", *["xdscale"] * 4, "tensorboard"]


def proposals(done):
    """The commands that it ends with."""
    return re.search(r"\nnext:\n((?:  .+\n)+)", done.stdout)[1].splitlines()


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_quickstart_learns_and_reports(result):
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
    assert [command.split()[0] for command in proposals(result)] == ["source", *["xdscale"] * 4, "tensorboard"]


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_what_it_proposes_runs_in_a_clean_shell(result):
    """As printed, line by line, in a shell that knows nothing of the environment that quickstart.sh made."""
    script = "\n".join(["set -e", *proposals(result)]).replace("  tensorboard", "timeout 30 tensorboard")
    clean = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 124, done.stderr[-3000:]  # TensorBoard was still serving, so all before it went well
    assert "TensorBoard" in done.stderr
    assert "training.global_batch=16" in done.stdout
    assert (ROOT / "runs/quickstart-seed-1/checkpoints/step-00000050").is_dir()
