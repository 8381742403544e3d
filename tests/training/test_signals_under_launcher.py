"""SIGTERM and SIGUSR1 under the real deepspeed launcher: a verified checkpoint every time, whatever they interrupt.

One run is stopped and continued, each time by a launch of its own. `XDSCALE_CHAOS_SIGNALS=20` makes it twenty times;
`XDSCALE_CHAOS_SEED` chooses other moments. `-s` prints a line for each.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from xdscale.errors import EXIT_STOPPED
from xdscale.training.checkpoint import read_position
from xdscale.training.checkpoint_folder import list_checkpoints
from xdscale.training.integrity import damage
from xdscale.training.run_folder import read_log

LAUNCHES = int(os.environ.get("XDSCALE_CHAOS_SIGNALS", "3"))
SEED = int(os.environ.get("XDSCALE_CHAOS_SEED", "1"))
MOMENTS = ["first step", "evaluation", "saving", "step", "start"]
LAUNCHER_SECONDS = 30  # how long the launcher waits for a rank before it kills it

# Who gets which signal, and the exit code that the shell then sees (docs/design.md, "Exit codes").
CASES = [
    ("group", signal.SIGTERM, -signal.SIGTERM),
    ("group, launchers block it", signal.SIGUSR1, EXIT_STOPPED),
    ("node launcher", signal.SIGTERM, 1),
    ("group, launchers block it", signal.SIGTERM, EXIT_STOPPED),
    ("command", signal.SIGTERM, -signal.SIGTERM),
    ("group", signal.SIGUSR1, -signal.SIGUSR1),
]


class Launched:
    """A launch of two ranks that goes on in the background: forked ready-made, or started as users do."""

    def __init__(self, run, shards, config, port, blocked, fork):
        settings = {"data.shards": shards, "output.folder": run, "training.steps": 1000, "training.global_batch": 4}
        settings |= {"run.eval_every": 3, "run.eval_samples": 48, "run.checkpoint_every": 4}
        command = ["-q", "--num_accelerators", 2, "--master_port", port, "--module", "xdscale.train"]
        command += ["quickstart", *(f"{key}={value}" for key, value in settings.items()), "--deepspeed_config", config]
        self.run = run
        self.stderr = config.with_name("stderr.txt")
        self.stderr.write_text("")
        if fork:
            held = (signal.SIGTERM, signal.SIGUSR1) if blocked else ()
            self.process = fork("deepspeed", *command, outputs=(os.devnull, self.stderr), blocked=held)
            return
        block = ["env", "--block-signal=TERM,USR1"] if blocked else []
        with self.stderr.open("w") as file:
            self.process = subprocess.Popen(
                [*block, Path(sys.executable).with_name("deepspeed"), *map(str, command)],
                stderr=file,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def members(self):
        """The living processes of the launch, also those whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def send(self, target, number):
        if target.startswith("group"):
            os.killpg(self.process.pid, number)
        elif target == "command":
            self.process.send_signal(number)
        else:
            psutil.Process(self.process.pid).children()[0].send_signal(number)

    def entries(self):
        path = self.run / "log.jsonl"
        return read_log(path) if path.exists() else []

    def wait_for(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.stderr.read_text()[-3000:]
            assert time.monotonic() < deadline, self.stderr.read_text()[-3000:]
            time.sleep(0.01)


def wait_for_moment(launched, moment, before, rng):
    """Returns at a random instant of that kind."""
    fresh = not before
    begun = f"continuing after step {before[-1]}" if before else None
    if moment == "start":
        time.sleep(rng.uniform(0.3, 12))
        return
    launched.wait_for(
        lambda: (
            any(entry["kind"] == "validation" for entry in launched.entries())
            if fresh
            else begun in launched.stderr.read_text()
        )
    )
    if moment == "first step":
        time.sleep(rng.uniform(0, 0.5))
        return
    if moment == "saving":
        launched.wait_for(lambda: list((launched.run / "checkpoints").glob(".partial-*")))
        time.sleep(rng.uniform(0, 0.3))
        return
    steps = [entry["step"] for entry in launched.entries() if entry["kind"] == "step"]
    last = max(steps, default=0)
    if moment == "evaluation":
        due = last // 3 * 3 + 3
        launched.wait_for(lambda: any(e["kind"] == "step" and e["step"] == due for e in launched.entries()))
    else:
        launched.wait_for(lambda: any(e["kind"] == "step" and e["step"] > last for e in launched.entries()))
    time.sleep(rng.uniform(0, 0.6))


@pytest.mark.slow
@pytest.mark.timeout(max(600, 120 * LAUNCHES))
def test_every_signal_leaves_a_verified_checkpoint_of_the_last_step(wiki_shards, tmp_path, free_port, fork):
    run, config = tmp_path / "run", tmp_path / "ds.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}))
    for number in range(LAUNCHES):
        rng = random.Random(SEED * 1000 + number)
        moment, (target, signum, code) = MOMENTS[number % len(MOMENTS)], CASES[number % len(CASES)]
        before = [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]
        ready_made = None if moment == "start" else fork
        launched = Launched(run, wiki_shards, config, free_port(), "block" in target, ready_made)
        try:
            wait_for_moment(launched, moment, before, rng)
            entries = launched.entries()
            launched.send(target, signum)
            began = time.monotonic()
            while launched.members() and time.monotonic() - began < 60:
                time.sleep(0.05)
            seconds = time.monotonic() - began
            found = launched.process.wait(timeout=5)
        finally:
            for process in launched.members():
                process.kill()
        after = launched.entries()
        checkpoint = list_checkpoints(run / "checkpoints")[-1]
        step = read_position(checkpoint).step
        name = signal.Signals(signum).name
        print(f"{number}: {name} to the {target} at {moment}: exit {found}, {seconds:.1f} s, checkpoint {step}")
        text = launched.stderr.read_text()
        blocked = "block" in target
        # Who blocks it kills nobody for it, and neither does a node launcher that the command's end does not reach.
        assert seconds < (60 if blocked or target == "command" else LAUNCHER_SECONDS), text[-3000:]
        assert damage(checkpoint) == []
        assert step == max([entry["step"] for entry in after if entry["kind"] == "step"], default=0)
        assert [entry["step"] for entry in after if entry["kind"] == "step"] == list(range(1, step + 1))
        assert "Traceback" not in text
        if blocked or moment != "start":  # unblocked, a signal before the interpreter is up ends it: nothing was begun
            assert found == code
            assert after[-1]["kind"] == "end"
            assert after[-1]["stopped"]
            assert f"stopped by a signal after step {step}" in text
            assert step - max([entry["step"] for entry in entries if entry["kind"] == "step"], default=0) <= 2
    assert not list((run / "checkpoints").glob(".*"))
