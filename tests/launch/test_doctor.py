"""The doctor's probe as two "machines" on loopback: every planted fault is found and named."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xdscale.errors import XdscaleError
from xdscale.launch import doctor
from xdscale.launch.hosts import Host
from xdscale.launch.start import Rendezvous

ROOT = Path(__file__).parents[2]
SMALL = ["model.clip.name=clip-tiny.json", "model.clip.weights=random"]


def start(rank, port, *arguments, cwd=ROOT, **variables):
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    settings = {name: str(value) for name, value in (ranks | {"MASTER_PORT": port} | variables).items()}
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "SLURM_JOB_ID")}
    return subprocess.Popen(
        [sys.executable, "-m", "xdscale.launch.probe", *map(str, arguments)],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def alone(launch_ranks, tmp_path):
    """Runs one of two machines, forked ready-made, without the other."""

    def alone(rank, port, *arguments):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        (tmp_path / "machine.py").write_text(
            f"import os, runpy\nos.environ |= {ranks}\n"
            "runpy.run_module('xdscale.launch.probe', run_name='__main__', alter_sys=True)\n"
        )
        return launch_ranks(tmp_path / "machine.py", *arguments, timeout_seconds=60)

    return alone


def pair(free_port, first, second):
    """Runs both machines; each is (arguments, variables)."""
    port = free_port()
    processes = [
        start(rank, port, *arguments, **variables) for rank, (arguments, variables) in enumerate((first, second))
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def findings(stdout, machine):
    return [line for line in stdout.splitlines() if line.startswith((f"FAIL {machine}", f"warn {machine}"))]


@pytest.fixture(scope="module")
def recipe(wiki_shards):
    return ["quickstart", f"data.shards={wiki_shards}", *SMALL]


def test_two_sound_machines(free_port, recipe, tmp_path):
    out = tmp_path / "runs" / "new"
    arguments = [*recipe, f"output.folder={out}", "--hosts", "a:1,b:1"]
    began = time.monotonic()
    (code, stdout, stderr), (other, _, _) = pair(free_port, (arguments, {}), (arguments, {}))
    assert (code, other) == (0, 0), stdout + stderr
    assert "verdict: ok (0 failures" in stdout
    assert list(tmp_path.iterdir()) == []  # the question left nothing behind
    elapsed = time.monotonic() - began
    small, large, width = map(
        float, re.search(r" ([\d.]+) ms, 64 MiB ([\d.]+) ms, bus bandwidth ([\d.]+) GB", stdout).groups()
    )
    assert small < large < 1000 * elapsed
    # Of two ranks each sends half of it twice.
    assert width == pytest.approx(2**26 / large / 1e6, rel=0.02, abs=0.01)


def test_every_planted_fault_is_named(free_port, recipe, wiki_shards, tmp_path):
    """Versions, source, clock, shards, output folder and environment of one machine are not the other's."""
    other = tmp_path / "other"
    other.mkdir()
    copy = other / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "xdscale", copy / "xdscale", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "xdscale" / "errors.py").open("a") as file:
        file.write("# edited on one machine only\n")
    fake = copy / "triton-9.9.9.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.9.9\n")
    (copy / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 5\n")
    shards = shutil.copytree(wiki_shards, other / "shards")
    shard = next(shards.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 1)

    here = [*recipe, "output.folder=runs/new", "--hosts", "a:1,b:1"]
    there = [*recipe, f"data.shards={shards}", "output.folder=runs/new", "--hosts", "a:1,b:1"]
    variables = {
        "cwd": other,
        "PYTHONPATH": copy,
        "OMP_NUM_THREADS": 64,
        "NCCL_SOCKET_IFNAME": "eth7",
        "TRITON_CACHE_DIR": "/tmp/elsewhere",
    }
    (tmp_path / "here").mkdir()
    (code, stdout, stderr), _ = pair(free_port, (here, {"cwd": tmp_path / "here"}), (there, variables))
    assert code == 2, stdout + stderr
    assert [line for line in findings(stdout, "a") if line.startswith("FAIL")] == []
    lines = findings(stdout, "b")
    expected = [
        "FAIL b, versions: triton 9.9.9, the first machine has 3.8.0",
        "FAIL b, versions: xdscale source ",
        "FAIL b, clock: +5.0 s",
        f"FAIL b, paths: data.shards: {shard}: ",
        "FAIL b, paths: output.folder = runs/new: not the first machine's folder",
        "warn b, environment: OMP_NUM_THREADS is 64, on the first machine 1",
        "warn b, environment: OMP_NUM_THREADS=64 for 1 rank on ",
        "warn b, environment: NCCL_SOCKET_IFNAME is eth7, on the first machine not set",
        f"warn b, environment: PYTHONPATH is {copy}",
        "warn b, environment: TRITON_CACHE_DIR is /tmp/elsewhere",
    ]
    assert [text for text in expected if sum(line.startswith(text) for line in lines) != 1] == []
    # How many files this machine may open is nobody's fault here; nothing else is said.
    others = [line for line in lines if not line.startswith(tuple(expected)) and "open files" not in line]
    assert others == []
    assert not (tmp_path / "here" / "runs").exists()


def test_a_machine_that_does_not_answer_is_named(alone, free_port):
    began = time.monotonic()
    done = alone(0, free_port(), "--hosts", "a:1,b:1", "--timeout", 4)
    assert done.code == 2, done.stderr
    assert time.monotonic() - began < 40
    assert "FAIL b, answer: rank 1 did not answer" in done.stdout
    assert "a      ok" in done.stdout


def test_a_machine_that_cannot_reach_the_first_says_so(alone, free_port):
    done = alone(1, free_port(), "--timeout", 3)
    assert done.code == 2
    assert "cannot meet at 127.0.0.1:" in done.stderr
    assert "firewall" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_network_that_does_not_carry_is_named(free_port):
    """One machine is told to talk through an interface that is not there; the other must not wait for ever."""
    began = time.monotonic()
    arguments = ["--hosts", "a:1,b:1", "--timeout", 8]
    (code, stdout, _), _ = pair(free_port, (arguments, {}), (arguments, {"GLOO_SOCKET_IFNAME": "absent0"}))
    assert code == 2
    assert time.monotonic() - began < 60
    assert "FAIL b, collective: rank 1: " in stdout
    assert "FAIL a, collective: rank 0: " in stdout
    assert "absent0" in stdout


def test_a_taken_port_is_named(alone):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = alone(0, taken.getsockname()[1], "--timeout", 3)
    assert done.code == 2
    assert "take another port with --master-port" in done.stderr


def test_a_bad_recipe_is_one_message(tmp_path):
    program = Path(sys.executable).with_name("xdscale")
    result = subprocess.run(
        [sys.executable, program, "doctor", "quickstrat"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: quickstrat: no such recipe")


MEET = Rendezvous("node-1", 29500)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Lays programs for one that `examine` calls, which note their words and what is set for them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "pdsh", "ssh", "python"):
        said = "node-7" if name == "scontrol" else ""
        (folder / name).write_text(
            f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {folder}/{name}.words\nenv > {folder}/{name}.env\n"
            f"echo {said}\nexit 2\n"
        )
        (folder / name).chmod(0o755)
    for name in ("SLURM_JOB_ID", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def noted(folder, name):
    environment = dict(line.partition("=")[::2] for line in (folder / f"{name}.env").read_text().splitlines())
    return (folder / f"{name}.words").read_text().splitlines(), environment


def test_this_machine_alone_is_one_rank(programs, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert doctor.examine([], MEET, "quickstart", ["training.seed=3"], timeout_seconds=9) == 2
    words, environment = noted(programs, "python")
    assert words == ["-m", "xdscale.launch.probe", "quickstart", "training.seed=3", "--timeout", "9"]
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_PORT": "0"}
    assert {name: environment[name] for name in expected} == expected


def test_inside_an_allocation_slurm_starts_the_probes(programs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "40007")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[7-8]")
    assert doctor.examine([], MEET, None, [], timeout_seconds=120) == 2
    words, environment = noted(programs, "srun")
    assert words[-4:] == ["-m", "xdscale.launch.probe", "--timeout", "120"]
    assert environment["TRITON_CACHE_DIR"].startswith("/tmp/triton-")
    expected = {
        "MASTER_ADDR": "node-7",
        "MASTER_PORT": "20007",
        "NCCL_DEBUG": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert {name: environment[name] for name in expected} == expected
    (programs / "srun").unlink()
    with pytest.raises(XdscaleError, match="srun is not on PATH"):
        doctor.examine([], MEET, None, [], timeout_seconds=120)


@pytest.mark.parametrize("name", ["localhost", "node-1"])
def test_named_machines_are_examined_through_the_launcher(programs, tmp_path, monkeypatch, capsys, name):
    """Its own words and the machine's name before each line are not passed on."""
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {programs}/launcher.words; env > {programs}/launcher.env\n"
        f'cat "${{DS_ENV_FILE:-/dev/null}}" > {programs}/file; cat "$2" > {programs}/hostfile\n'
        "printf '%s: [INFO] [launch.py:1] x\\n%s: verdict: FAIL\\nplain\\n' node-1 node-1; exit 70\n"
    )
    launcher.chmod(0o755)
    asked = []

    def command(hosts, hostfile, meet, module, arguments):
        asked.append((hosts, meet, module, arguments))
        return [str(launcher), str(hostfile)]

    monkeypatch.setattr(doctor, "launcher_command", command)
    hosts = [Host(name, 2)]
    assert doctor.examine(hosts, MEET, None, [], timeout_seconds=5) == 70
    assert asked == [(hosts, MEET, "xdscale.launch.probe", ("--timeout", "5", "--hosts", f"{name}:2"))]
    prefix = "" if name == "node-1" else "node-1: "
    assert capsys.readouterr().out == f"{prefix}verdict: FAIL\nplain\n"
    words, environment = noted(programs, "launcher")
    assert words[0] == "-q"
    assert (programs / "hostfile").read_text() == f"{name} slots=2\n"
    file = (programs / "file").read_text()
    if name == "localhost":  # nothing is carried anywhere
        assert (file, environment["TRITON_CACHE_DIR"][:12]) == ("", "/tmp/triton-")
        (programs / "pdsh").unlink()
        assert doctor.examine(hosts, MEET, None, [], timeout_seconds=5) == 70
    else:
        assert {"NCCL_DEBUG=INFO", "TOKENIZERS_PARALLELISM=false"} <= set(file.splitlines())
        assert "TRITON_CACHE_DIR=/tmp/triton-" in file
        assert "TRITON_CACHE_DIR" not in environment
        (programs / "pdsh").unlink()
        with pytest.raises(XdscaleError, match="pdsh not found on PATH"):
            doctor.examine(hosts, MEET, None, [], timeout_seconds=5)
