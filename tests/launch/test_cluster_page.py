"""Every command of docs/cluster.md is executed, in its order, on two "machines" on loopback.

The commands run unchanged except for the substitutions of `smaller`: one rank per machine, a small model and text, and
a free port. pdsh, ssh and Slurm's programs are those of conftest.py; DeepSpeed's launcher and the ranks are real.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from xdscale.errors import EXIT_STOPPED
from xdscale.launch.probe import checkpoint_bytes
from xdscale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]
NAME = "xdbert-base-wikitext103"
RUN = f"runs/{NAME}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, wiki_shards):
    """A folder like the repository's root, with shards and a small BERT; each rank notes its environment there."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    shutil.copytree(cassette_model, folder / "small-bert-base")
    (folder / "data").mkdir()
    (folder / "data" / "wikitext103").symlink_to(wiki_shards)
    (folder / "noting").mkdir()
    (folder / "noting" / "sitecustomize.py").write_text(
        "import json, os\n"
        "if 'RANK' in os.environ and 'MASTER_ADDR' in os.environ:\n"
        f"    with open({str(folder)!r} + '/noting/' + os.environ['RANK'] + '.json', 'w') as file:\n"
        "        json.dump(dict(os.environ), file)\n"
    )
    return folder


@pytest.fixture(scope="module")
def executed(workplace, cluster, free_port):
    """What each command of the page ended with, printed, and noted."""
    results = {}
    for command in COMMANDS:
        settings = cluster | {
            "FAKE_JOB_ID": str(free_job_number()),
            "PYTHONPATH": f"{workplace / 'noting'}:{os.environ.get('PYTHONPATH', ROOT)}",
        }
        if command.startswith("sbatch"):
            shutil.rmtree(workplace / "runs")
            settings["FAKE_SIGNAL_AFTER"] = f"{workplace / RUN}/log.jsonl"
        results[command] = execute(smaller(command, free_port), workplace, settings)
    return results


def free_job_number():
    """The batch script takes port 20000 + the job's number, up to 39999."""
    for number in range(os.getpid() % 10000, 20000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number)):
                return number
    raise AssertionError("no free port")


def smaller(command, free_port):
    values = "training.global_batch=4 run.eval_samples=4 model.clip.name=clip-tiny.json"
    values += " model.clip.weights=random model.language.name=./small-bert-base"
    # A thousand steps where a signal ends them, two where nothing does.
    values += " training.steps=1000" if "--slurm" in command else " training.steps=2"
    command = (
        command.replace("localhost:8", "localhost:2")
        .replace(":8", ":1")
        .replace("--nodes 4 --gpus-per-node 8", "--nodes 2 --gpus-per-node 1")
    )
    if command.startswith("sbatch"):
        return command
    command = command.replace(NAME, f"{NAME} {values}")
    if "--slurm" not in command and "--hosts" in command:
        command += " --env NOTED='a \"b\" $c %h'" if "launch" in command else ""
        command += f" --master-addr 127.0.0.1 --master-port {free_port()}"
    if "launch" in command:
        command += f" --deepspeed-config ds_configs/quickstart-zero2.json --out launch/{NAME}"
    return command


def execute(command, folder, settings):
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    noted = {path.stem: json.loads(path.read_text()) for path in (folder / "noting").glob("*.json")}
    for path in (folder / "noting").glob("*.json"):
        path.unlink()
    print(command, stdout[-3000:], stderr[-3000:], sep="\n")
    return process.returncode, stdout, stderr, noted


def one(executed, *words):
    found = [result for command, result in executed.items() if all(word in command for word in words)]
    assert len(found) == 1
    return found[0]


def ssh_calls(cluster):
    return set((Path(cluster["FAKE_LOG"]) / "ssh").read_text().split())


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_the_pages_commands(executed, workplace, cluster):
    assert len(COMMANDS) == 8
    code, stdout, _, _ = executed["xdscale doctor"]
    assert (code, "verdict: ok" in stdout) == (0, True), stdout

    # As many ranks as asked for, without ssh.
    code, stdout, _, noted = one(executed, "doctor --hosts localhost")
    assert (code, "verdict: ok" in stdout, set(noted)) == (0, True, {"0", "1"}), stdout
    assert "all-reduce over 2 ranks" in stdout
    assert "localhost" not in ssh_calls(cluster)

    # Over ssh the other machine has only what was carried there.
    code, stdout, _, noted = one(executed, "doctor", "--hosts node")
    assert code == 0, stdout
    assert re.search(r"^ +node-1 +ok +ok +ok +ok +ok +ok +ok +ok", stdout, re.MULTILINE), stdout
    assert "[INFO]" not in stdout
    assert re.search(r"node-2 +ok +ok +ok +ok +ok +ok +ok +ok", stdout), stdout
    assert "bus bandwidth" in stdout
    assert noted["1"]["TRITON_CACHE_DIR"].startswith("/tmp/triton-")

    code, stdout, stderr, noted = one(executed, "launch", "--run")
    assert code == 0, stderr
    assert {noted[rank]["HF_HUB_OFFLINE"] for rank in "01"} == {"1"}
    assert {noted[rank]["TOKENIZERS_PARALLELISM"] for rank in "01"} == {"false"}
    assert (noted["1"]["RANK"], noted["1"]["LOCAL_RANK"], noted["1"]["WORLD_SIZE"]) == ("1", "0", "2")
    assert "FAKE_LOG" not in noted["1"]
    assert noted["1"]["NOTED"] == 'a "b" $c %h'
    assert "a step of 4 samples: 2 ranks × 1 micro-batch of 2, no padding" in stdout + stderr
    assert {"node-1", "node-2"} <= ssh_calls(cluster)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_slurms_signal_saves_and_requeues(executed, workplace, cluster, monkeypatch):
    code, _, stderr, noted = one(executed, "sbatch")
    assert code == EXIT_STOPPED, stderr
    job = noted["1"]["SLURM_JOB_ID"]
    assert f"requeue {job}" in (Path(cluster["FAKE_LOG"]) / "scontrol").read_text()
    assert noted["1"]["TRITON_CACHE_DIR"] == f"/tmp/triton-{job}"
    saved = [path.name for path in (workplace / RUN / "checkpoints").glob("step-*")]
    assert len(saved) == 1
    assert 1 <= int(saved[0].removeprefix("step-")) < 1000
    monkeypatch.chdir(workplace)
    estimate = checkpoint_bytes(load_recipe(f"{RUN}/recipe.yaml"))
    written = sum(path.stat().st_size for path in Path(RUN, "checkpoints", saved[0]).iterdir())
    assert written / 1.1 < estimate < written * 1.25

    code, stdout, _, _ = one(executed, "salloc")
    assert code == 0, stdout
    assert len(re.findall(r"\(rank [01]\) +ok +ok +ok +ok +ok +ok +ok +ok", stdout)) == 2
