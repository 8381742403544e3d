"""`xdscale launch`: checks first, writes whole files, prints commands."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from xdscale.cli import main
from xdscale.launch.facts import _recipe_facts
from xdscale.launch.job import check_job
from xdscale.plan.configs import model_name
from xdscale.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("xdscale")


def launch(*arguments, cwd, path=None, **variables):
    """Runs the command as in a fresh environment, but in this process: dozens of starts would take half a minute."""
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    environment = kept | {"PATH": path or f"{Path(sys.executable).parent}:/usr/bin:/bin"} | variables
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    given = [str(PROGRAM), "launch", *map(str, arguments)]
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr),
        mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(sys, "argv", given),
        pytest.raises(SystemExit) as ended,
    ):  # fmt: skip
        main()
    printed = (stream.buffer.getvalue().decode() for stream in (stdout, stderr))
    return subprocess.CompletedProcess(given, ended.value.code or 0, *printed)


def test_the_shipped_script_is_what_the_command_writes(tmp_path):
    """docs/cluster.md shows this command beside scripts/slurm.sbatch."""
    command = "xdbert-base-wikitext103 --slurm --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00"
    assert f"xdscale launch {command}" in (ROOT / "docs" / "cluster.md").read_text()
    environment = {"PYTHONPATH": ""} if "PYTHONPATH" not in os.environ else {}
    result = launch(*command.split(), "--out", tmp_path, cwd=ROOT, **environment)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "job.sbatch").read_text().splitlines()
    own = [line for line in written if not line.startswith("export PYTHONPATH=")]
    assert own == (ROOT / "scripts" / "slurm.sbatch").read_text().splitlines()
    assert result.stdout == f"sbatch {tmp_path}/job.sbatch\n"


def write_script(folder, *arguments, recipe="quickstart", **variables):
    options = ["--slurm", "--nodes", "2", "--gpus-per-node", "1", "--out", folder]
    result = launch(recipe, f"output.folder={folder}/a run", *options, *arguments, cwd=ROOT, **variables)
    assert result.returncode == 0, result.stderr
    return folder / "job.sbatch"


def run_script(script, code=0, checkpoint="", **variables):
    """Runs a batch script with stand-ins for Slurm's programs.

    srun leaves what it was called with, its environment and the checkpoint that ranks would, and ends with the code.
    """
    folder = script.parent
    programs = {
        "srun": f"""printf '%s\\0' "$@" > {folder}/words; env -0 > {folder}/environment
mkdir -p "{folder}/a run/checkpoints/"{checkpoint}; exit {code}""",
        "scontrol": f"""if [ $1 = requeue ]; then echo $2 >> {folder}/requeued; else echo node-1; fi""",
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    settings = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]"}
    done = subprocess.run(
        ["bash", script], env=settings | variables, cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    environment = dict(item.split("=", 1) for item in (folder / "environment").read_text().split("\0")[:-1])
    requeued = (folder / "requeued").read_text().splitlines() if (folder / "requeued").exists() else []
    return (folder / "words").read_text().split("\0")[:-1], environment, requeued


def test_a_script_of_awkward_values_hands_them_on_unchanged(tmp_path):
    overrides = ["data.shards=/d/it's $HOME", "model.dropout=0.2"]
    values = {"A": 'it\'s "b" $HOME `id` $(id)', "B": "x=1,y=2; #no", "C": " two\nlines ", "NCCL_SOCKET_IFNAME": "^lo"}
    values |= {"TRITON_CACHE_DIR": "/tmp/$SLURM_JOB_ID"}
    given = [word for item in values.items() for word in ("--env", "=".join(item))]
    script = write_script(tmp_path, *overrides, *given, NCCL_SOCKET_IFNAME="eth0", NCCL_DEBUG="a b")
    words, environment, _ = run_script(script)
    expected = values | {"NCCL_DEBUG": "a b", "MASTER_ADDR": "node-1", "TOKENIZERS_PARALLELISM": "false"}
    assert {name: environment.get(name) for name in expected} == expected
    start = words.index("xdscale.train")
    assert words[start + 1 : start + 5] == ["quickstart", f"output.folder={tmp_path}/a run", *overrides]


def test_what_is_asked_of_slurm_stands_in_the_script(tmp_path):
    asked = {"partition": "gpu,gpu2", "account": "abc@v100", "qos": "qos_gpu-t3", "cpus-per-task": "12"}
    asked |= {"constraint": "[rack1|rack2]&a100*2&(x,y)"}
    options = [word for name, value in asked.items() for word in (f"--{name}", value)]
    script = write_script(tmp_path, *options)
    lines = script.read_text().splitlines()
    assert {f"#SBATCH --{name}={value}" for name, value in asked.items()} <= set(lines)
    words, environment, _ = run_script(script, SLURM_CPUS_PER_TASK="12")
    assert environment["SRUN_CPUS_PER_TASK"] == "12"  # srun takes it from there since Slurm 22.05
    assert environment["TRITON_CACHE_DIR"] == "/tmp/triton-7"
    assert "SRUN_CPUS_PER_TASK" not in run_script(script)[1]


@pytest.mark.parametrize(
    ("code", "before", "after", "queued"),
    [
        (75, "step-00000100", "step-00000100", True),  # stopped with a checkpoint, whatever there was
        (70, "step-00000100", "step-00000200", True),  # a rank died or hung, and the run got on
        (70, "", "step-00000100", True),
        (137, "step-00000100", "step-00000200", True),  # a rank was killed before others could say so
        (70, "step-00000100", "step-00000100", False),  # it would only fail again
        (70, "step-00000100", ".step-00000200", False),  # a checkpoint that is not whole has another name
        (2, "step-00000100", "step-00000200", False),
        (1, "step-00000100", "step-00000200", False),
        (0, "step-00000100", "step-00000200", False),
    ],
)
def test_a_job_is_queued_again_when_that_can_help(tmp_path, code, before, after, queued):
    script = write_script(tmp_path)
    (tmp_path / "a run" / "checkpoints" / before).mkdir(parents=True)
    _, _, requeued = run_script(script, code, after)
    assert requeued == ["7"] * queued


def test_faults_queue_a_job_again_a_bounded_number_of_times(tmp_path):
    script = write_script(tmp_path)
    for number in range(1, 9):
        _, _, requeued = run_script(script, 70, f"step-{number:08d}")
        assert len(requeued) == min(number, 5)
    # Signals do so for ever, and another job counts its own faults.
    assert len(run_script(script, 75, "step-00000009")[2]) == 6
    assert run_script(script, 70, "step-00000010", SLURM_JOB_ID="8")[2][-1] == "8"


def test_a_contradiction_shows_before_anything_is_written(tmp_path):
    bad = tmp_path / "ds.json"
    bad.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}))
    result = launch(
        "quickstart", "--hosts", "a:2,b:2", "--deepspeed-config", bad, "--out", tmp_path / "out", cwd=tmp_path
    )
    assert result.returncode == 2
    assert "training.global_batch 16 / (4 ranks × micro-batch 2) gives 2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_section_that_the_ranks_would_refuse_is_refused_before_the_queue(tmp_path):
    """And nothing of the login node is in the command: it may have no GPU."""
    own = tmp_path / "ds.json"
    arguments = ["quickstart", "--slurm", "--deepspeed-config", own, "--out", tmp_path / "out"]
    for zero, code in (({"stage": 2, "overlap_com": True}, 2), ({"stage": 2, "overlap_comm": True}, 0)):
        own.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
        result = launch(*arguments, cwd=ROOT)
        assert result.returncode == code
        assert (tmp_path / "out").exists() == (code == 0)
        if code:
            assert "unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?" in result.stderr
    assert result.stdout == f"sbatch {tmp_path}/out/job.sbatch\n"
    script = (tmp_path / "out" / "job.sbatch").read_text()
    assert not [name for name in ("DS_ACCELERATOR=", "OMP_NUM_THREADS=") if f"export {name}" in script]


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
        (["--slurm", "--account", "a#b"], "--account 'a#b'"),
        (["--slurm", "--qos", 'a"b'], "--qos 'a\"b'"),
        (["--slurm", "--constraint", "a\nb"], "--constraint 'a\\nb'"),
        (["--slurm", "--partition", "\udcff"], "is written in UTF-8, which '--partition=\\udcff' is not"),
        (["--slurm", "--nodes", "4"], "training.global_batch = 16 feeds at most 16 ranks, not 32"),
        (["--hosts", "a:16,b:1"], "use at most 16"),
        (["--hosts", "a:1,b:1", "--env", "A=x\ny"], "one line only"),
        (["--hosts", "a:1,b:1", "--master-addr", "a;id"], "--master-addr 'a;id'"),
        (["--hosts", "a:1,b:1", "--out", "/dev/null"], "--out /dev/null: exists and is not a folder"),
        (["--slurm", "--out", "/proc/none"], "/proc/none: cannot be written"),
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


def test_this_machine_alone_needs_no_pdsh(tmp_path):
    result = launch("quickstart", "--hosts", "localhost:2", "--env", "X=a b", "--out", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    comment, command = result.stdout.splitlines()
    assert comment == "# all ranks on this machine:"
    words = shlex.split(command)
    assert "X=a b" in words
    assert "--force_multi" not in words


def test_the_share_of_padding_is_told(tmp_path):
    result = launch("quickstart", "--hosts", "a:8,b:3", "--out", tmp_path, cwd=tmp_path)
    assert "a step of 16 samples: 11 ranks × 1 micro-batch of 2, 27.3% of it padding" in result.stderr
    even = launch("quickstart", "--hosts", "a:8,b:8", "--out", tmp_path, "--force", cwd=tmp_path)
    assert "a step of 16 samples: 16 ranks × 1 micro-batch of 1, no padding" in even.stderr


def test_a_full_standard_output_is_one_message(fork, tmp_path):
    for number, command in enumerate((["plan", "quickstart"], ["launch", "quickstart", "--hosts", "a:1,b:1"])):
        stderr = tmp_path / f"{number}.stderr"
        assert fork("xdscale", *command, outputs=("/dev/full", stderr), folder=tmp_path).wait(timeout=120) == 2
        assert "error: cannot write the output: No space left on device" in stderr.read_text()
        assert "Traceback" not in stderr.read_text()


def test_relative_paths_are_warned_about(tmp_path):
    result = launch("quickstart", "data.shards=/data/q", "--hosts", "a:1,b:1", cwd=tmp_path)
    assert result.returncode == 0
    assert f"output.folder = runs/quickstart is relative: every machine takes it from {tmp_path}" in result.stderr
    assert "data.shards" not in result.stderr
    assert (tmp_path / "launch" / "quickstart" / "hostfile").exists()
    remote = ("data.shards=s3://bucket/q", "run.cache=/disk", "--out", "remote")
    assert "data.shards" not in launch("quickstart", *remote, "--hosts", "a:1,b:1", cwd=tmp_path).stderr


@pytest.mark.parametrize("name", [path.stem for path in shipped_recipes()])
def test_every_shipped_recipe_has_a_configuration(name):
    size = "quickstart" if "quickstart" in name else "electra-large" if "large" in name else "bert-base"
    pixels = "-pixels" if "e2e" in name or name == "vlbert-ablation-full" else ""
    arguments = check_job(name, (), None, 16).arguments
    assert arguments[-1] == f"{size}{pixels}-zero2"


def test_a_model_whose_name_says_nothing_has_the_configuration_of_its_size(tmp_path):
    shapes = {("bert", 1024): "electra-large", ("electra", 768): "bert-base", ("bert", 384): "quickstart"}
    shapes |= {("bert", 1023): "bert-base", ("bert", 512): "bert-base", ("bert", 511): "quickstart"}
    for (family, width), size in shapes.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": width}))
        arguments = check_job("bert-base-mlm-wikitext103", [f"model.language.name={tmp_path}"], None, 8).arguments
        assert arguments[-1] == f"{size}-zero2"


def test_a_system_without_encoder_and_shards_is_launched_with_a_configuration_that_is_named(tmp_path):
    """Finetuning reads task files, and its section `model` has no `language`: so may systems of others."""
    values = {
        "system": "finetune",
        "model": {"name": "encoder", "subject": "language", "size": "base", "weights_sha256": None},
        "task": {"name": "rte", "epochs": 1},
        "data": {"folder": "glue"},
        "training": {"steps": 4, "global_batch": 4},
        "run": {"label": "A"},
        "output": {"folder": "/run"},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    found = launch("mine.yaml", "--hosts", "a:1,b:1", cwd=tmp_path)
    assert (found.returncode, "Traceback" in found.stderr) == (2, False)
    assert "system = 'finetune': no shipped DeepSpeed config is known to fit it; name one with" in found.stderr
    found = launch("mine.yaml", "--hosts", "a:1,b:1", "--deepspeed-config", "finetune-zero1", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "data.folder = glue is relative" in found.stderr
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert model_name(recipe) == "finetune"
    assert "shards_problem" not in _recipe_facts(recipe)
