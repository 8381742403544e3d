"""What a sweep does with workers that print, close their channel, send garbage, hold it open, hang or die."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from xdscale.errors import EXIT_FAULT, EXIT_STOPPED
from xdscale.finetune import command, worker_process
from xdscale.finetune import sweep as sweeps
from xdscale.finetune.sweep import FinetuneJob, SweepRunner
from xdscale.recipe import load_recipe

# Each is a worker whose task misbehaves in one way; `do` gets the job and returns its exit code.
FRAME = """
import json, os, pathlib, signal, socket, subprocess, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
lines = channel.makefile("r")
def answer(**values):
    channel.sendall(json.dumps(values).encode() + b"\\n")
def finish(job):
    pathlib.Path(job["result"]).write_text(json.dumps(RESULT))
    answer(code=0)
RESULT = {"format": 1, "task": "rte", "seed": 0, "split": "dev", "metrics": {"accuracy": 0.5}, "examples": 1,
    "score": {"name": "accuracy", "value": 0.5, "higher_is_better": True}, "data": {}, "settings": {}, "curve": []}
%s
for line in iter(lines.readline, ""):
    answer(begun=True)
    do(json.loads(line))
"""
PRINTS = """
def do(job):
    print("a stray line")
    print(json.dumps({"code": 7}), flush=True)
    os.write(1, b'{"code": 8}\\nfrom C\\n')
    finish(job)
"""
HALVES = """
def do(job):
    for part in (b'{"no', b'te": "' + b"long " * 40000, b'"}\\n{"note": "short"}\\n{"note": "sho'):
        channel.sendall(part)
        time.sleep(0.1)
    channel.sendall(b'rt"}\\n')
    finish(job)
"""
EATS = """
def do(job):
    subprocess.run(["cat"])  # would eat the next job, were it on stdin
    finish(job)
"""
HOLDS = """
def do(job):
    if os.fork() == 0:
        time.sleep(60)
    os._exit(3)
"""
CLOSES = """
def do(job):
    channel.shutdown(socket.SHUT_RDWR)
    time.sleep(600)
"""
GARBAGE = """
def do(job):
    channel.sendall(b"\\x80\\x04garbage\\n")
    time.sleep(600)
"""
FLOOD = """
def do(job):
    channel.sendall(b"[" * (4 << 20))
    time.sleep(600)
"""
SLEEPS = """
time.sleep(600)
"""
DIES = """
def do(job):
    os.kill(os.getpid(), signal.SIGKILL)
"""
HANGS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def do(job):
    pathlib.Path(job["began"]).touch()
    time.sleep(600)
"""
SAVES = """
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
def do(job):
    pathlib.Path(job["began"]).touch()
    while not stopped:
        time.sleep(0.05)
    time.sleep(0.3)
    answer(code=CODE)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs jobs in workers that behave as told; returns the exit code and what was said, or fails if that hangs."""

    def run(behaviour, jobs=1, stop=None, **more):
        script = tmp_path / "worker.py"
        script.write_text(FRAME % behaviour)
        monkeypatch.setattr(worker_process, "PROGRAM", (str(script),))
        monkeypatch.setattr(worker_process, "_SECONDS_TO_LEAVE", 1.0)
        said, began = [], tmp_path / "began"
        todo = []
        for number in range(jobs):
            result = tmp_path / f"result-{number}.json"
            todo.append(
                FinetuneJob(
                    f"rte seed {number}",
                    {"result": str(result), "began": str(began)},
                    result,
                    tmp_path / "none.log",
                    **more,
                )
            )
        made = SweepRunner([{}], said.append)
        made.start_workers(1)
        if stop is not None:
            threading.Thread(target=stop_when, args=(began, stop), daemon=True).start()
        return made.run(todo), "\n".join(said), made

    return run


def stop_when(began, number):
    while not began.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("behaviour", [PRINTS, EATS], ids=["prints", "eats"])
def test_what_a_task_prints_or_reads_is_no_part_of_the_channel(sweep, behaviour):
    code, said, made = sweep(behaviour, jobs=2)
    assert code == 0, said
    assert "[2/2] rte seed 1: accuracy 0.5000" in said
    if behaviour is PRINTS:
        assert made._workers[0].output().count("a stray line") == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (HOLDS, "the worker process died (exit code 3)"),
        (CLOSES, "the worker closed its channel to the sweep (signal SIGKILL)"),
        (GARBAGE, "the worker sent what is no answer: b'\\x80\\x04garbage' (signal SIGKILL)"),
        (FLOOD, "the worker sent what is no answer: b'[[["),
        (DIES, "the worker process died (signal SIGKILL)"),
        (SLEEPS, "the worker did not begin within 2 s (signal SIGKILL)"),
    ],
    ids=["holds", "closes", "garbage", "flood", "dies", "sleeps"],
)
def test_a_worker_that_breaks_the_channel_costs_its_run_which_is_named(sweep, behaviour, why, monkeypatch):
    monkeypatch.setattr(worker_process, "_SECONDS_TO_BEGIN", 2.0)
    code, said, made = sweep(behaviour, jobs=2)
    assert code == EXIT_FAULT
    for seed in (0, 1):  # the second in a new process
        assert f"failed: rte seed {seed}\n{why}" in said
    assert not made._workers[0].alive


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_for_what_is_under_way(sweep, number):
    code, said, _ = sweep(SAVES.replace("CODE", "75"), jobs=2, stop=number)
    assert code == EXIT_STOPPED
    assert said.splitlines()[-1] == "stopped by a signal, 0 of 2 runs done; the same command continues"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("behaviour", [HANGS, SAVES.replace("CODE", "70")], ids=["hangs", "fails"])
def test_what_could_not_be_saved_after_a_signal_is_no_success(sweep, behaviour, monkeypatch):
    monkeypatch.setattr(sweeps, "_SECONDS_TO_SAVE", 1.0)
    code, said, made = sweep(behaviour, jobs=2, stop=signal.SIGTERM)
    assert code == EXIT_FAULT
    assert "failed: rte seed 0" in said
    assert said.splitlines()[-1] == "stopped by a signal, 1 of 2 runs done; not every run could be saved"
    assert not made._workers[0].alive


def test_after_each_run_only_the_best_model_stays(sweep, monkeypatch, tmp_path):
    """Those of hours of training would fill a disk together."""
    looked = []
    monkeypatch.setattr(sweeps, "keep_best", looked.append)
    assert sweep("def do(job):\n    finish(job)", jobs=2)[0] == 0
    assert looked == [(tmp_path / "result-0.json").parent.parent] * 2
    assert sweep("def do(job):\n    finish(job)", stops_early=True)[0] == 0
    assert sweep("def do(job):\n    answer(code=3)")[0] == EXIT_FAULT
    assert len(looked) == 2


def test_a_worker_that_was_stopped_alone_is_a_failed_run(sweep, monkeypatch):
    monkeypatch.setattr(sweeps, "_SECONDS_TO_HEAR", 0.1)
    code, said, _ = sweep("def do(job):\n    answer(code=75)")
    assert code == EXIT_FAULT
    assert "failed: rte seed 0\nexit code 75" in said


def test_a_result_that_cannot_be_read_is_a_failed_run(sweep):
    code, said, _ = sweep("def do(job):\n    pathlib.Path(job['result']).write_text('{')\n    answer(code=0)", jobs=2)
    assert code == EXIT_FAULT
    assert "failed: rte seed 1\n" in said
    assert "result-1.json" in said


def test_a_worker_that_was_ended_can_be_asked_to_stop(monkeypatch):
    """The sweep's watch may hold on to one that another thread has just replaced."""
    monkeypatch.setattr(worker_process, "PROGRAM", ("-S", "-c", "import time; time.sleep(60)"))
    worker = worker_process.WorkerProcess({})
    worker.end()
    assert not worker.alive
    worker.stop()
    worker.kill()
    worker.end()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_busy_worker_is_given_a_moment_to_save_and_an_idle_one_none(monkeypatch, tmp_path, leaves):
    program = (
        "import pathlib, signal, sys, time\n"
        f"def save(*_):\n    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n    {'sys.exit()' if leaves else ''}\n"
        f"signal.signal(signal.SIGTERM, save)\npathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        "while True: time.sleep(0.01)"
    )
    monkeypatch.setattr(worker_process, "PROGRAM", ("-S", "-c", program))
    monkeypatch.setattr(worker_process, "_SECONDS_TO_LEAVE", 0.5)
    for busy in (True, False):
        worker = worker_process.WorkerProcess({})
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        worker._busy = busy
        worker.end()
        assert not worker.alive
        assert (tmp_path / "saved").exists() == busy
        (tmp_path / "began").unlink()
        (tmp_path / "saved").unlink(missing_ok=True)


REAL = """
import pathlib, sys, time, types
from xdscale.finetune import worker
sys.modules["xdscale.training.distributed"] = types.SimpleNamespace(start_distributed=lambda: None)
sys.modules["xdscale.finetune.run"] = types.SimpleNamespace()
worker.calm_environment = lambda: None
def work(job, ranks, stop, say):
    assert not stop.requested
    say("working")
    end = time.monotonic() + 60
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.05)
    pathlib.Path(job["result"]).write_text(str(stop.requested))
    return 75
worker._work = work
worker.main()
"""
KILLED_SWEEP = """
import os, signal
from xdscale.finetune import worker_process
worker_process.PROGRAM = ("-c", %r)
worker = worker_process.WorkerProcess({})
worker.work({"result": %r}, lambda note: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_worker_that_was_asked_to_stop_begins_with_no_further_job(monkeypatch, tmp_path):
    """Nothing of the run is lost: the same command begins it."""
    stop = "__import__('os').kill(__import__('os').getpid(), 15)"  # while it imports what a run needs
    program = REAL.replace("worker.calm_environment = lambda: None", f"worker.calm_environment = lambda: {stop}")
    monkeypatch.setattr(worker_process, "PROGRAM", ("-c", program))
    worker = worker_process.WorkerProcess({})
    notes = []
    assert worker.work({"result": str(tmp_path / "result")}, notes.append) == EXIT_STOPPED
    assert (notes, list(tmp_path.iterdir())) == ([], [])
    worker.end()


def test_an_idle_worker_that_is_asked_to_stop_leaves_in_peace(monkeypatch):
    """It waits for a job: a signal alone would not end that."""
    program = REAL.replace(
        "worker.calm_environment = lambda: None", "worker.calm_environment = lambda: print(flush=True)"
    )
    monkeypatch.setattr(worker_process, "PROGRAM", ("-c", program))
    worker = worker_process.WorkerProcess({})
    while not worker.output():
        time.sleep(0.02)
    time.sleep(0.1)
    worker.stop()
    assert worker._process.wait(10) == 0
    worker.end()


def test_a_sweep_that_was_killed_leaves_no_worker_that_goes_on(tmp_path):
    result = tmp_path / "result"
    killed = subprocess.run([sys.executable, "-c", KILLED_SWEEP % (REAL, str(result))], check=False)
    assert killed.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while not (result.is_file() and result.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert result.read_text() == "True"


def test_a_run_that_is_to_stop_early_has_no_result_and_has_not_failed(sweep):
    code, said, _ = sweep("def do(job):\n    answer(code=0)", stops_early=True)
    assert code == 0
    assert "rte seed 0: stopped as run.stop_at_step says" in said


@pytest.mark.parametrize(("stop_at_step", "early"), [(None, False), (9, True), (10, False), (11, False)])
def test_only_a_step_before_the_last_stops_early(stop_at_step, early):
    recipe = load_recipe("quickstart", ["training.steps=10", f"run.stop_at_step={stop_at_step or 'null'}"])
    assert recipe.stops_early == early


def test_a_signal_before_any_run_ends_the_command_at_once(tmp_path, monkeypatch, capsys):
    """While the data are read there is nothing to save: 75, no traceback, nothing written."""

    def read(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(command, "_read_data", read)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        command.run_command(
            command.Request(
                model="x", subject="language", tasks=["rte"], data=None, out=tmp_path / "out", seeds=1, label=None,
                recipe="quickstart", overrides=[], ds_config=None, jobs=None,
            )
        )  # fmt: skip
    assert ended.value.code == EXIT_STOPPED
    assert capsys.readouterr().err == "stopped by a signal, no run is under way; the same command continues\n"
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_answers_may_come_in_pieces_and_a_note_is_said_once(sweep):
    code, said, _ = sweep(HALVES)
    assert code == 0, said
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert [(note[:11], len(note)) for note in notes] == [("note: long ", 200_006), ("note: short", 11)]
