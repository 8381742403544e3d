"""`xdscale launch`: checks first, writes whole files, prints commands."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xdscale.launch.job import check_job
from xdscale.recipe import shipped_recipes

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("xdscale")


def launch(*arguments, cwd, path=None, **variables):
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    search = path or f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        [sys.executable, PROGRAM, "launch", *arguments],
        cwd=cwd,
        env=kept | {"PATH": search} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_shipped_script_is_what_the_command_writes(tmp_path):
    """docs/cluster.md shows this command beside scripts/slurm.sbatch."""
    command = (
        "xdbert-base-wikitext103 --slurm --nodes 4 --gpus-per-node 8 --time 24:00:00 --env TRITON_CACHE_DIR=/tmp/triton"
    )
    assert f"xdscale launch {command}" in (ROOT / "docs" / "cluster.md").read_text()
    environment = {"PYTHONPATH": ""} if "PYTHONPATH" not in os.environ else {}
    result = launch(*command.split(), "--out", tmp_path, cwd=ROOT, **environment)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "job.sbatch").read_text().splitlines()
    own = [line for line in written if not line.startswith("export PYTHONPATH=")]
    assert own == (ROOT / "scripts" / "slurm.sbatch").read_text().splitlines()
    assert result.stdout == f"sbatch {tmp_path}/job.sbatch\n"


def test_a_script_of_awkward_values_is_one_a_shell_reads(tmp_path):
    values = ["data.shards=/d/it's", "model.dropout=0.2"]
    options = ["--slurm", "--nodes", "2", "--partition", "gpu", "--account", "lab-1", "--out", tmp_path]
    result = launch("quickstart", *values, *options, cwd=ROOT, NCCL_SOCKET_IFNAME="^lo,docker0")
    assert result.returncode == 0, result.stderr
    script = tmp_path / "job.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert {"#SBATCH --partition=gpu", "#SBATCH --account=lab-1", "#SBATCH --nodes=2"} <= set(lines)
    assert "export NCCL_SOCKET_IFNAME='^lo,docker0'" in lines
    command = shlex.split(next(line for line in lines if "xdscale.adapt" in line))
    assert command[4:7] == ["quickstart", *values]


def test_a_contradiction_shows_before_anything_is_written(tmp_path):
    bad = tmp_path / "ds.json"
    bad.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}))
    result = launch(
        "quickstart", "--hosts", "a:2,b:2", "--deepspeed-config", bad, "--out", tmp_path / "out", cwd=tmp_path
    )
    assert result.returncode == 2
    assert "training.global_batch 16 / (4 ranks × micro-batch 2) gives 2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_differ_are_replaced_only_when_told(tmp_path):
    def write(*arguments):
        return launch("quickstart", *arguments, "--out", tmp_path, cwd=ROOT)

    assert write("--hosts", "a:1,b:1").returncode == 0
    before = (tmp_path / ".deepspeed_env").read_bytes()
    assert write("--hosts", "a:1,b:1").returncode == 0  # the same again
    refused = write("--hosts", "a:1,b:2", "--env", "NEW=1")
    assert refused.returncode == 2
    assert "hostfile: exists and differs; --force" in refused.stderr
    assert (tmp_path / "hostfile").read_text() == "a slots=1\nb slots=1\n"
    assert (tmp_path / ".deepspeed_env").read_bytes() == before
    assert write("--hosts", "a:1,b:2", "--force").returncode == 0
    assert (tmp_path / "hostfile").read_text() == "a slots=1\nb slots=2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deepspeed_env", "hostfile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where to run"),
        (["--hosts", "a:1", "--slurm"], "say where to run"),
        (["--hosts", "a:1", "--hostfile", "x"], "give one of them"),
        (["--slurm", "--time", "tomorrow"], "--time tomorrow"),
        (["--slurm", "--partition", "a b"], "--partition 'a b'"),
        (["--hosts", "a:1,b:1", "--run"], "pdsh"),
        (["--slurm", "--run"], "sbatch not found"),
        (["model.language.name=./mine", "--hosts", "a:1"], "name one with --deepspeed-config"),
    ],
)
def test_mistakes_are_named_and_write_nothing(tmp_path, arguments, message):
    result = launch("quickstart", *arguments, cwd=tmp_path, path=str(tmp_path / "empty"))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_relative_paths_are_warned_about(tmp_path):
    result = launch("quickstart", "data.shards=/data/q", "--hosts", "a:1,b:1", cwd=tmp_path)
    assert result.returncode == 0
    assert f"output.folder = runs/quickstart is relative: every machine takes it from {tmp_path}" in result.stderr
    assert "data.shards" not in result.stderr
    assert (tmp_path / "launch" / "quickstart" / "hostfile").exists()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_has_a_configuration(name):
    family, *rest = name.removeprefix("xd").split("-")
    size = "" if family == "quickstart" else f"-{rest[0]}"
    arguments = check_job(name, (), None, 16).arguments
    assert arguments[-1] == f"{family}{size}-zero2"


def test_a_model_whose_name_says_nothing_has_the_configuration_of_its_size(tmp_path):
    shapes = {"bert-large": ("bert", 1024), "electra-base": ("electra", 768), "quickstart": ("bert", 384)}
    for size, (family, width) in shapes.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": width}))
        arguments = check_job("bert-base-mlm-wikitext103", [f"model.language.name={tmp_path}"], None, 8).arguments
        assert arguments[-1] == f"{size}-zero2"
