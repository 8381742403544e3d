"""A system and a task that xdscale does not know, from packages of somebody else's: those of the two pages.

Nothing of them stands in xdscale: they are found through entry points, and get all that its own have.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xdscale.training.run_folder import read_log

ROOT = Path(__file__).parents[2]


def blocks(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"```(?:yaml|python|toml)\n(.*?)```", text, re.DOTALL)
    return {re.match(r"# (\S+)\n", block)[1]: block for block in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Both packages, built and installed where only PYTHONPATH finds them."""
    folder = tmp_path_factory.mktemp("added")
    for name, text in (blocks("add-a-system.md") | blocks("add-a-task.md")).items():
        if name.startswith("my-"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", folder / "site", folder / "my-system", folder / "my-tasks"], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def command(site, launch_ranks, tmp_path_factory):
    """Runs `xdscale` in a folder of its own, where the packages are installed; returns what it printed."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "data" / "ORDER").mkdir(parents=True)
    for name in ("train", "dev"):
        lines = [f"Line {number} of a text that goes on." for number in range(32)]
        (folder / "data" / "ORDER" / f"{name}.txt").write_text("\n".join(lines) + "\n")

    def run(*arguments):
        done = launch_ranks("xdscale", *map(str, arguments), folder=folder, packages=[site])
        assert done.code == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def trained(site, launch_ranks, wiki_shards, cassette_model, tmp_path_factory):
    """Run folders by ZeRO stage: stopped after 2 of 4 steps, continued on another number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    fixed = [f"data.shards={wiki_shards}", f"model.language.name={cassette_model}", "training.global_batch=6"]
    fixed += ["model.dropout=0", "training.steps=4", "run.eval_samples=6", "run.eval_every=2", "run.checkpoint_every=2"]
    for stage, worlds in {1: (2, 1), 3: (1, 2)}.items():
        config = folder / f"zero{stage}.json"
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}))
        out = [f"output.folder={folder / str(stage)}", "--deepspeed_config", str(config)]
        for ranks, more in zip(worlds, (["run.stop_at_step=2"], []), strict=True):
            given = ["halves-small", *fixed, *more, *out]
            done = launch_ranks("xdscale.train", *given, ranks=ranks, packages=[site])
            assert done.code == 0, done.stderr[-3000:]
    return {stage: folder / str(stage) for stage in (1, 3)}


def losses(run):
    return [entry["loss/in_order"] for entry in read_log(run / "log.jsonl") if entry["kind"] == "step"]


@pytest.mark.slow
def test_it_trains_and_goes_on_at_another_number_of_ranks(trained):
    """The losses hang neither on the stage nor on the ranks, up to the order of sums."""
    for run in trained.values():
        assert len(losses(run)) == 4
        entries = read_log(run / "log.jsonl")
        assert [entry["step"] for entry in entries if entry["kind"] == "validation"] == [0, 2, 4]
    assert losses(trained[1]) == pytest.approx(losses(trained[3]), rel=1e-4)


@pytest.mark.slow
def test_commands_treat_it_as_their_own(command, trained):
    assert "halves-small" in command("recipes")
    assert "objectives.in_order.swapped=0.5" in command("recipes", "halves-small")
    out = command.folder / "exports"
    assert "language encoder (4,385,920 parameters)" in command("export", trained[1], out)
    small = ("--seeds", 2, "--jobs", 1, "training.epochs=1", "training.global_batch=16", "model.max_length=16")
    told = command(
        *("finetune", "--model", out, "--label", "Halves", "--task", "order", "--data", "data"),
        *("--out", "finetuned", *small),
    )
    assert "2 of 2" in told
    turned = ("--subject", "halves", "--label", "Turned", "--out", "turned", "model.turned=true")
    assert "2 of 2" in command("finetune", "--model", out, "--task", "order", "--data", "data", *turned, *small)
    settings = [json.loads((command.folder / name / "order/seed-0/result.json").read_text())["settings"]
                for name in ("finetuned", "turned")]  # fmt: skip
    assert settings[1] == settings[0] | {"turned": True}
    assert "model.turned=false" in command("recipes", "--finetuning", "paper")
    command("report", "finetuned", "--out", "report")
    assert "| Halves |" in (command.folder / "report" / "report.md").read_text()


BEGIN = """
import sys
from pathlib import Path
import torch
from xdscale.models.operations import PLAIN_ATTENTION
from xdscale.recipe import load_recipe
from xdscale.systems.contract import open_system
from xdscale.training.stored import build_module, stored_state

recipe = load_recipe("halves-small", sys.argv[1:])
module, stored = build_module(open_system(recipe), continued=False), stored_state(Path(recipe.model.start))
assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
assert module.model["language"].config._attn_implementation == PLAIN_ATTENTION
"""


@pytest.mark.slow
def test_it_begins_with_the_weights_of_another_run_and_computes_by_the_definitions(
    site, trained, launch_ranks, cassette_model, tmp_path
):
    """`model.start` and `run.kernels` are keys of its recipe: none of them is without effect."""
    overrides = [f"model.language.name={cassette_model}", f"model.start={trained[3]}", "run.kernels=plain"]
    (tmp_path / "begin.py").write_text(BEGIN)
    done = launch_ranks(tmp_path / "begin.py", *overrides, packages=[site])
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_it_is_counted_and_planned_as_its_own(command, cassette_model):
    """BERT's 2 layers of 128, and a classifier of 2 x 128 weights and 2 biases on top."""
    recipe = ("halves-small", f"model.language.name={cassette_model}")
    counted = command("params", *recipe)
    assert f"{4_385_920 + 258:,}" in counted
    assert "4,385,920" in counted
    assert "GPU" in command("plan", *recipe)


@pytest.mark.slow
def test_a_second_package_with_the_name_is_refused(site, tmp_path):
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[xdscale.systems]\nhalves = other.schema:Other\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("xdscale"), "recipes", "halves-small"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{site}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "two packages offer 'halves' as xdscale.systems: " in done.stderr
    assert "other (other.schema:Other)" in done.stderr
    assert "halves (halves.schema:HalvesRecipe)" in done.stderr
