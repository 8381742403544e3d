"""`xdscale train`: the launcher's options, signals and exit codes on one machine."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xdscale.ds_config import read_ds_config
from xdscale.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.launch import train
from xdscale.recipe import load_recipe
from xdscale.training.checkpoint_folder import list_checkpoints
from xdscale.training.integrity import damage

PROGRAM = Path(sys.executable).with_name("xdscale")


@pytest.fixture
def started(monkeypatch):
    """What would be started, with shards at hand: the launcher's command line and environment."""
    calls = []
    monkeypatch.setattr(train, "shards_folder", lambda name: None)

    def record(command, settings):
        calls.append((command, settings))
        return 2

    monkeypatch.setattr(train, "run_launcher", record)
    return calls


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Sets the GPUs that ranks may use; a driver's program lists eight of one compute capability."""

    def gpus(names, capability="9.0"):
        monkeypatch.setattr(train, "visible_gpus", lambda: names)
        lines = "".join(f"{number}, GPU-{number}f2c-77, {capability}\\n" for number in range(8))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return gpus


@pytest.mark.parametrize(
    ("names", "ranks", "options", "config"),
    [
        (["GPU-5f2c-77", "GPU-0f2c"], None, ["--include", "localhost:5,0"], "electra-large-zero2"),
        ([], None, ["--num_accelerators", "1"], "quickstart-zero2"),
        ([], 3, ["--num_accelerators", "3"], "quickstart-zero2"),
        (["0"], None, ["--include", "localhost:0"], "electra-large-zero2"),
        (["2", "5", "7"], None, ["--include", "localhost:2,5,7"], "electra-large-zero2"),
        (["2", "5", "7"], 2, ["--include", "localhost:2,5"], "electra-large-zero2"),
    ],
)
def test_the_launcher_gets_the_devices_there_are(started, gpus, capfd, names, ranks, options, config):
    gpus(names)
    assert train.train_here("xdelectra-large-wikitext103", ["training.steps=3"], None, ranks) == 2
    ((command, settings),) = started
    assert command[3:5] == options
    assert re.fullmatch(r"--master_port \d+", " ".join(command[5:7]))
    arguments = ["xdelectra-large-wikitext103", "training.steps=3", "--deepspeed_config", config]
    assert command[7:] == ["--module", "xdscale.train", *arguments]
    if not names:
        assert settings == {"DS_ACCELERATOR": "cpu"}
    else:  # the driver's numbers are CUDA's only in this order
        assert settings == ({} if names[0].isdigit() else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    printed = capfd.readouterr().err
    assert " ".join(command) in printed
    assert ("DS_ACCELERATOR=cpu" in printed) == (not names)


def test_gpus_without_bf16_train_in_fp16(started, gpus):
    gpus(["0"], "7.0")
    train.train_here("xdbert-base-wikitext103", [], None, None)
    train.train_here("quickstart", [], None, None)
    for capability in ("[N/A]", "8.0"):
        gpus(["0"], capability)
        train.train_here("xdbert-base-wikitext103", [], None, None)
    chosen = [command[-1] for command, _ in started]
    assert chosen == ["bert-base-zero2-fp16", "quickstart-zero2", "bert-base-zero2", "bert-base-zero2"]
    mixed = [train._Gpu("0", "a", 9.0), train._Gpu("1", "b", 7.5)]
    assert train._default(load_recipe("xdbert-base-wikitext103"), ["0", "1"], mixed) == "bert-base-zero2-fp16"


def test_a_precision_that_this_machine_does_not_have_is_refused_before_the_launcher_starts(started, gpus, monkeypatch):
    """Where a GPU may have it, as one of several kinds, its rank says what it finds."""
    from deepspeed.accelerator import get_accelerator

    gpus(["0"], "7.5")
    with pytest.raises(
        XdscaleError, match=r"^bert-base-zero2: bf16 = enabled, but .* capability 7\.5 does not .* -fp16,"
    ):
        train.train_here("xdbert-base-wikitext103", [], "bert-base-zero2", None)
    assert (
        train._check_precision("bert-base-zero2", ["0"], [train._Gpu("0", "a", 7.5), train._Gpu("1", "b", 8.0)]) is None
    )
    assert train._check_precision("bert-base-zero2-fp16", ["0"], [train._Gpu("0", "a", 7.5)]) is None
    gpus([])
    monkeypatch.setattr("xdscale.training.environment.uses_gpus", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(
        XdscaleError, match="^bert-base-zero2-fp16: fp16 = enabled, but DeepSpeed does not compute in fp16"
    ):
        train.train_here("xdbert-base-wikitext103", [], "bert-base-zero2-fp16", None)
    assert started == []


@pytest.mark.parametrize("capability", ["7.0", "9.0"])
@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ("vlbert-base-e2e", "bert-base"),
        ("vlbert-base-e2e-paper", "bert-base"),
        ("vlbert-large-e2e", "electra-large"),
        ("vlbert-base-precomputed", "bert-base"),
    ],
)
def test_from_pixels_as_many_samples_are_computed_at_a_time_as_fit(started, gpus, capfd, recipe, size, capability):
    """On a GPU of 40 or 32 GB, as tests/plan looks at; the person is told which configuration it is."""
    gpus(["0"], capability)
    train.train_here(recipe, [], None, None)
    ((command, _),) = started
    name = f"{size}{'-pixels' * ('e2e' in recipe)}-zero2{'-fp16' * (capability < '8')}"
    assert command[-1] == name
    assert read_ds_config(name)["train_micro_batch_size_per_gpu"] > 1
    assert f"--deepspeed_config {name}\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "ranks", "message"),
    [
        (["0", "1"], 3, "--ranks 3: 2 GPUs visible"),
        (["0"], 2, "--ranks 2: 1 GPU visible"),
        (
            ["MIG-8f2c"],
            None,
            "CUDA_VISIBLE_DEVICES=MIG-8f2c: .* takes whole GPUs only, and nvidia-smi lists no MIG-8f2c",
        ),
    ],
)
def test_what_the_launcher_cannot_do_is_said_before_it_starts(started, gpus, names, ranks, message):
    gpus(names)
    with pytest.raises(XdscaleError, match=message):
        train.train_here("quickstart", [], None, ranks)
    assert started == []


@pytest.mark.parametrize("end", [0, 1, 2, 70, 75])
def test_exit_codes_of_ranks_are_passed_on(end):
    code = train.run_launcher([sys.executable, "-c", f"raise SystemExit({end})"], {})
    assert train.truthful(code, ended=True) == end


@pytest.mark.parametrize("end", ["sys.exit(-9)", "os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_a_killed_rank_or_launcher_is_a_fault(end, capfd):
    """The launcher says 247 for a rank that was killed, and 0 when its part on the node was."""
    assert [train.truthful(code, ended=True) for code in (127, 128, 255, -15)] == [127, *[EXIT_FAULT] * 3]
    code = train.run_launcher([sys.executable, "-c", f"import os, sys; {end}"], {})
    assert train.truthful(code, ended=False) == EXIT_FAULT
    assert capfd.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("recipe", "overrides", "looked_for"),
    [
        ("quickstart", ["data.shards=there"], ["there"]),
        ("quickstart", ["data.shards=s3://bucket/wiki", "run.cache=/cache"], []),
        ("visualbert-nlvr2-task", [], []),
    ],
)
def test_folders_of_shards_alone_are_looked_for(started, gpus, monkeypatch, tmp_path, recipe, overrides, looked_for):
    gpus([])
    found = []
    monkeypatch.setattr(train, "shards_folder", found.append)
    train.train_here(recipe, [f"output.folder={tmp_path / 'run'}", *overrides], "bert-base-zero2", None)
    assert found == looked_for
    assert len(started) == 1


def test_missing_shards_are_said_at_once_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_launcher", pytest.fail)
    message = f"data.shards = data/quickstart: no such file or folder in {tmp_path}; make it with 'xdscale shards build"
    with pytest.raises(XdscaleError, match=re.escape(message)):
        train.train_here("quickstart", [], None, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(load_recipe("quickstart", ["optim.eps=0.5"]).to_yaml())
    with pytest.raises(XdscaleError, match=r"holds a run of a different recipe \(optim\.eps"):
        train.train_here("quickstart", ["output.folder=run", f"data.shards={tmp_path}"], None, None)


@pytest.mark.parametrize("log", ["", '{"step": 3, "kind": "st', '{"step": 3, "kind": "step"}\n{"step": 3, "ki'])
def test_a_log_that_breaks_off_is_no_end(tmp_path, monkeypatch, log, capfd):
    """What a full disk leaves: the log has changed, and its last line is not whole."""

    def run(command, settings):
        (tmp_path / "log.jsonl").write_text(log)
        return 0

    monkeypatch.setattr(train, "run_launcher", run)
    monkeypatch.setattr(train, "visible_gpus", list)
    assert (
        train.train_here("quickstart", [f"output.folder={tmp_path}", f"data.shards={tmp_path}"], None, None)
        == EXIT_FAULT
    )
    assert "error: the launcher ended before its ranks" in capfd.readouterr().err


@pytest.mark.slow
def test_bad_input_that_only_ranks_see_is_one_message_and_exit_code_2(launch_ranks, tmp_path):
    (tmp_path / "empty").mkdir()
    done = launch_ranks("xdscale", "train", "quickstart", "data.shards=empty", "--ranks", "2", folder=tmp_path)
    assert done.code == EXIT_BAD_INPUT
    started, *messages = done.stderr.splitlines()
    assert "--module xdscale.train quickstart data.shards=empty" in started
    assert len(messages) == 1
    assert messages[0].startswith("error: empty: ")


@pytest.fixture
def start(tmp_path):
    """Starts a command in a session of its own, as a terminal does, of which nothing is left after the test."""
    processes = []

    def start(*command):
        processes.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def forked(fork, tmp_path):
    """Does the same ready-made; returns what has begun and what it tells as errors."""
    launches = []

    def start(*command):
        stderr = tmp_path / f"{len(launches)}.stderr"
        launches.append(fork(*command, outputs=(os.devnull, stderr), folder=tmp_path))
        return launches[-1], stderr

    yield start
    for launch in launches:
        launch.kill_all()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ctrl_c_and_sigterm_save_and_the_same_command_ends_the_run(short_shards, narrow_model, tmp_path, start, forked):
    run = tmp_path / "run"
    command = ["train", "quickstart", *narrow_model, f"data.shards={short_shards}", f"output.folder={run}"]
    command += ["run.eval_samples=4", "training.global_batch=4", "run.checkpoint_every=1000", "--ranks", "2"]
    command += ["training.steps=5000"]

    def steps():
        lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
        return [entry["step"] for entry in map(json.loads, lines) if entry["kind"] == "step"]

    process, stderr = forked("xdscale", *command)
    while not steps():
        assert process.poll() is None, stderr.read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    assert process.wait(timeout=60) == EXIT_STOPPED, stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    done = steps()[-1]
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert checkpoint.name == f"step-{done:08}"
    assert damage(checkpoint) == []

    process = start(PROGRAM, *command)
    time.sleep(2)  # the launcher starts, no rank is there yet
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_STOPPED, told
    assert steps()[-1] == done

    process, stderr = forked("xdscale", *command, f"run.stop_at_step={done + 1}")
    assert process.wait(timeout=120) == 0, stderr.read_text()
    assert f"continuing after step {done} " in stderr.read_text()
    assert steps()[-1] == done + 1
