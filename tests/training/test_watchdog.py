"""A rank that dies, freezes, gets no data or fails: all ranks end within a minute; one line says which and where."""

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from xdscale.data.order import Order
from xdscale.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.shards.table import Table
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log
from xdscale.training.watchdog import Watchdog

WORKER = Path(__file__).with_name("faulty_worker.py")
MINUTE_SECONDS = 60


class Launched:
    """Two ranks under the deepspeed launcher, in the background, forked ready-made."""

    def __init__(self, fork, shards, model, folder, port, fault, **settings):
        self.run, config, self.stderr = folder / "run", folder / "ds.json", folder / "stderr.txt"
        zero = {"stage": 2, "reduce_bucket_size": 1_000_000}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
        values = {"data.shards": shards, "output.folder": self.run, "training.steps": 1000, "training.global_batch": 2}
        values |= {"run.eval_samples": 2} | {key.replace("__", "."): value for key, value in settings.items()}
        command = ["deepspeed", "-q", "--num_accelerators", 2, "--master_port", port]
        command += [WORKER, fault] if fault else ["--module", "xdscale.train"]
        command += ["quickstart", *model, *(f"{key}={value}" for key, value in values.items())]
        command += ["--deepspeed_config", config]
        self.process = fork(*command, outputs=(os.devnull, self.stderr))

    def rank(self, number):
        # By what the launcher gave it alone: the launcher itself may have inherited a RANK.
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if f"--local_rank={number}" in process.cmdline():
                return process
        raise AssertionError(f"no rank {number}")

    def wait_for(self, kind, count=1):
        deadline = time.monotonic() + 120
        log = self.run / "log.jsonl"
        while not (log.exists() and sum(entry["kind"] == kind for entry in read_log(log)) >= count):
            assert self.process.poll() is None, self.stderr.read_text()[-3000:]
            assert time.monotonic() < deadline, self.stderr.read_text()[-3000:]
            time.sleep(0.05)

    def end(self):
        """Waits until every rank is gone; returns the seconds, the exit code and the error lines."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        began = time.monotonic()
        _, left = psutil.wait_procs(ranks, timeout=2 * MINUTE_SECONDS)
        seconds = time.monotonic() - began
        assert not left, self.stderr.read_text()[-3000:]
        text = self.stderr.read_text()
        assert "Traceback" not in text
        return seconds, self.process.wait(timeout=10), [x for x in text.splitlines() if x.startswith("error: ")]


@pytest.fixture
def launch(fork, short_shards, narrow_model, tmp_path, free_port):
    launched = []

    def start(fault=None, **settings):
        launched.append(Launched(fork, short_shards, narrow_model, tmp_path, free_port(), fault, **settings))
        return launched[0]

    yield start
    for one in launched:
        one.process.kill_all()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.proof)])
def test_a_rank_that_dies(launch, rank):
    launched = launch()
    launched.wait_for("step", 3)
    launched.rank(rank).kill()
    seconds, _, lines = launched.end()
    print(f"rank {rank} killed: all ended after {seconds:.1f} s: {lines}")
    assert seconds < MINUTE_SECONDS
    assert len(lines) == 1
    assert re.search(rf"rank {rank} on \S+ died or froze .* in phase '\w+' of step \d+", lines[0])


@pytest.mark.slow
def test_a_rank_that_freezes(launch):
    """With the limits that everybody has."""
    launched = launch()
    launched.wait_for("step", 3)
    launched.rank(1).suspend()
    seconds, code, lines = launched.end()
    print(f"rank 1 frozen: all ended after {seconds:.1f} s: {lines}")
    assert seconds < MINUTE_SECONDS
    assert code == EXIT_FAULT
    assert len(lines) == 1
    assert re.search(r"rank 1 on \S+ died or froze \(silent for 1\d s\) in phase '\w+' of step \d+", lines[0])
    stacks = (launched.run / "faults" / "stacks-rank-00000.txt").read_text()
    assert "loop.py" in stacks


def test_a_rank_that_gets_no_data(launch, short_shards):
    launched = launch("blocked,1,3", run__hang_seconds=5)
    launched.wait_for("step", 3)
    seconds, code, lines = launched.end()
    print(f"rank 1 without data: all ended after {seconds:.1f} s: {lines}")
    order = Order(len(Table(short_shards, "train")), seed=0, global_batch=2, world_size=2, rank=1, micro_batch=1)
    sample = int(order.slots(3)[0].sample_ids[0])
    assert code == EXIT_FAULT
    assert len(lines) == 1
    assert re.search(r"rank 1 on \S+ made no progress for \d+ s in phase 'data' of step 4, sample", lines[0])
    assert f"sample {sample};" in lines[0]


def test_a_rank_whose_data_fails(launch):
    launched = launch("failing,1,3")
    launched.wait_for("step", 3)
    seconds, code, lines = launched.end()
    assert seconds < MINUTE_SECONDS
    assert code == EXIT_FAULT
    assert len(lines) == 1
    assert re.search(r"rank 1 on \S+ failed in phase 'data' of step 4, sample \d+: OSError: .*train-000000", lines[0])
    assert "Traceback" in (launched.run / "faults" / "traceback-rank-00001.txt").read_text()


@pytest.mark.proof
def test_a_rank_that_hangs_in_the_first_step_is_not_taken_for_a_compiler(launch):
    launched = launch("blocked,1,0", run__hang_seconds=8)
    launched.wait_for("validation")
    seconds, code, lines = launched.end()
    print(f"rank 1 without data in the first step: all ended after {seconds:.1f} s: {lines}")
    assert seconds < MINUTE_SECONDS
    assert code == EXIT_FAULT
    assert len(lines) == 1
    assert re.search(r"rank 1 on \S+ made no progress for \d+ s in phase 'data' of step 1, sample", lines[0])


@pytest.mark.parametrize(
    ("phase", "error", "stopping", "code", "words"),
    [
        (None, XdscaleError("conversion ended"), True, EXIT_STOPPED, "stopped by a signal while starting (conversion"),
        (None, XdscaleError("no shards"), False, EXIT_BAD_INPUT, "error: no shards"),
        ("saving", XdscaleError("disk full"), True, EXIT_BAD_INPUT, "error: disk full"),
        ("saving", OSError(28, "No space left on device"), True, EXIT_FAULT, "OSError: [Errno 28]"),
        ("evaluation", XdscaleError("no shard"), True, EXIT_BAD_INPUT, "error: no shard"),
        (None, OSError(5, "Input/output error"), True, EXIT_FAULT, "phase 'starting'"),
    ],
)
def test_an_error_after_a_request_to_stop_is_a_stop_only_while_nothing_is_unsaved(
    tmp_path, capsys, phase, error, stopping, code, words
):
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45)
    watchdog._store.set("verdict", "")
    if phase is not None:
        watchdog.enter(phase, 3)
    assert watchdog.report(error, stopping=stopping) == code
    assert words in capsys.readouterr().err


def test_a_second_rank_leaves_with_the_code_of_the_first_that_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xdscale.training.watchdog._open_store", lambda ranks: torch.distributed.HashStore())
    watchdog = Watchdog(Ranks(1, 2, 1), tmp_path, 45)
    watchdog._store.set("verdict", json.dumps({"rank": 0, "line": "error: disk full", "code": EXIT_BAD_INPUT}))
    assert watchdog.report(XdscaleError("the same"), stopping=True) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == ""


def test_faults_are_told_where_the_run_folder_takes_no_files(capsys):
    """Every place below /dev/null refuses files; a message is all there is then, and no second error."""
    watchdog = Watchdog(Ranks(0, 1, 0), Path("/dev/null/run"), 45)
    watchdog._store.set("verdict", "")
    with pytest.raises(ValueError, match="could not convert") as raised:
        float("of no use")
    assert watchdog.report(raised.value, stopping=False) == EXIT_FAULT
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(r"ValueError: could not convert .*; in .*test_watchdog.py, line \d+ \(no traceback", said)
    assert "no traceback in the run folder: /dev/null/run/faults: Not a directory" in said


def test_patience_follows_how_long_a_phase_takes(tmp_path, monkeypatch):
    """45 s at least, ten times the longest of the last hundred; 900 s the first time for a rank that does something."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45)
    assert watchdog._patience("forward") == 900
    assert watchdog._patience("forward", idle=True) == 45
    for seconds in (60, *[2] * 100):
        watchdog.enter("forward", 0)
        clock[0] += seconds
        watchdog.enter("backward", 0)
        if seconds == 60:
            assert watchdog._patience("forward") == 600
    assert watchdog._patience("forward") == 45
    assert watchdog._patience("saving") == 900
    assert watchdog._patience("saving", idle=True) == 45


def test_a_slow_phase_that_goes_on_is_no_hang(tmp_path, monkeypatch):
    """Fetching shards for an hour: signs of progress count; being busy does for 900 s, and doing nothing for 45."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45)

    def judge_for(seconds, *, fetching=False, busy=False):
        for _ in range(seconds):
            clock[0] += 1
            if fetching and clock[0] % 40 == 0:
                watchdog.tick()
            watchdog._active_beats += busy
            watchdog._beat()
            accused = watchdog._judge()
            if accused:
                return accused
        return None

    assert judge_for(3600, fetching=True) is None
    assert "made no progress for 901 s in phase 'starting'" in judge_for(3600, busy=True)
    watchdog.tick()
    assert "made no progress for 46 s in phase 'starting'" in judge_for(3600)
    for step in range(3):  # from now on both have been gone through before, in no time
        watchdog.enter("data", step)
        watchdog.enter("forward", step)
    assert "made no progress for 46 s in phase 'forward'" in judge_for(3600, fetching=True)  # for later steps
    watchdog.enter("data", 3)
    assert judge_for(3600, fetching=True) is None
    assert "made no progress for 46 s in phase 'data'" in judge_for(3600)


def test_a_device_that_has_come_to_nothing_yet_is_behind_its_host(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45, lambda: SimpleNamespace(query=lambda: False))
    watchdog.enter("data", 0)
    record = watchdog._record()
    assert tuple(record["device_place"]) == (0, 0, "data")
    assert tuple(record["host_place"]) == (1, 0, "data")
    said = None
    while said is None:
        clock[0] += 1
        watchdog._beat()
        said = watchdog._judge()
    assert "(its GPU has not left 'data')" in said


@pytest.mark.parametrize(("rank", "world_size", "waits"), [(0, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_the_rank_that_holds_the_store_of_others_waits_for_them_to_read_it(
    monkeypatch, tmp_path, rank, world_size, waits
):
    slept = []
    monkeypatch.setattr("xdscale.training.watchdog._open_store", lambda ranks: None)
    watchdog = Watchdog(Ranks(rank, world_size, rank), tmp_path, 45)
    monkeypatch.setattr("xdscale.training.watchdog.time.sleep", slept.append)
    watchdog._linger()
    assert len(slept) == waits


@pytest.mark.parametrize(
    ("phase", "samples", "said"),
    [
        ("data", [5, 6, 9], "error: no shard (rank 0, phase 'data' of step 4, sample 5 and 2 more)"),
        ("data", [5, 6], "error: no shard (rank 0, phase 'data' of step 4, sample 5 and 1 more)"),
        ("data", [5], "error: no shard (rank 0, phase 'data' of step 4, sample 5)"),
        ("data", [], "error: no shard (rank 0, phase 'data' of step 4)"),
        ("evaluation", [5], "error: no shard"),
    ],
)
def test_where_data_fails_the_samples_are_named(tmp_path, capsys, phase, samples, said):
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45)
    watchdog._store.set("verdict", "")
    watchdog.samples = lambda step, micro_batch: samples if (step, micro_batch) == (3, 1) else None
    watchdog.enter(phase, 3, 1)
    assert watchdog.report(XdscaleError("no shard"), stopping=False) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    ("hang_seconds", "phase", "failed", "patience"),
    [
        (45, "forward", False, 15),
        (10, "forward", False, 10),  # no longer than what counts as hanging
        (2, "forward", False, 4),  # nor shorter than a store may need
        (45, "saving", False, 45),  # reading large files keeps the interpreter's lock
        (45, "starting", False, 45),
        (45, "forward", True, 4),  # it is the likely cause of the failed exchange
    ],
)
def test_how_long_a_rank_may_be_silent(tmp_path, monkeypatch, hang_seconds, phase, failed, patience):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, hang_seconds)
    watchdog.enter(phase, 0)
    watchdog._failed_collective = failed
    watchdog._beat()
    while clock[0] < 100 + patience:
        assert watchdog._find_silent(clock[0]) is None
        watchdog._judge()
        clock[0] += 1
    assert watchdog._find_silent(100.0 + patience) is None
    clock[0] += 0.5
    said = f"died or froze (silent for {clock[0] - 100:.0f} s) in phase '{phase}' of step 1"
    assert said in watchdog._judge()
    watchdog.enter("ended", 0)
    watchdog._store.set("rank-0", json.dumps(watchdog._record()))
    assert watchdog._judge() is None  # who is done is not missed


def test_a_judge_that_was_suspended_itself_accuses_nobody(tmp_path, monkeypatch):
    """More than five seconds between two looks: most likely all ranks were, and their beats are old."""
    for gap, accused in ((5, True), (6, False)):
        clock = [100.0]
        monkeypatch.setattr("time.monotonic", lambda clock=clock: clock[0])
        watchdog = Watchdog(Ranks(0, 1, 0), tmp_path, 45)
        watchdog.enter("forward", 0)
        watchdog._beat()
        for _ in range(12):
            assert watchdog._judge() is None
            clock[0] += 1
        clock[0] += gap - 1
        assert (watchdog._judge() is not None) == accused, gap


class Ended(Exception):
    """In the place of the end of a process."""


@pytest.mark.parametrize(
    ("rank", "phase", "pattern", "told"),
    [
        (1, "forward", "xx.xxx", r"rank 0 on .* froze \(its store does not answer\) in phase 'forward' of step 1; all"),
        (2, "forward", "xxx", None),  # the second rank speaks for all
        (1, "ended", "xxx", None),
    ],
)  # fmt: skip
def test_a_store_that_answers_no_more_for_three_beats_is_the_death_of_the_first_rank(
    tmp_path, monkeypatch, capsys, rank, phase, pattern, told
):
    beats = iter(pattern)

    class Store(dict):
        lost = True

        def wait(self, seconds):
            self.lost = next(beats) == "x"
            return watchdog._was_closed

        def answer(self, found):
            if self.lost:
                raise RuntimeError("Broken pipe")
            return found

        def set(self, name, value):
            self[name] = self.answer(value.encode())

        def get(self, name):
            return self.answer(b"")

        def multi_get(self, names):
            return self.answer([json.dumps(watchdog._record()).encode() for _ in names])

        def compare_set(self, *_):
            return self.answer(b"")

    store, slept = Store(), []
    monkeypatch.setattr("xdscale.training.watchdog._open_store", lambda ranks: store)
    monkeypatch.setattr("xdscale.training.watchdog.time.sleep", slept.append)

    def leave(code):
        raise Ended(code)

    watchdog = Watchdog(Ranks(rank, 3, rank), tmp_path, 45)
    watchdog._was_closed = False
    watchdog.enter(phase, 0)
    monkeypatch.setattr(watchdog, "_leave", leave)

    def close():
        watchdog._was_closed = True

    watchdog._closed = SimpleNamespace(wait=store.wait, is_set=lambda: watchdog._was_closed, set=close)
    if phase == "ended":
        beats = iter(pattern + ".")
        watchdog._watch()
    else:
        with pytest.raises(Ended, match=str(EXIT_FAULT)):
            watchdog._watch()
    assert next(beats, None) is None
    said = capsys.readouterr().err
    assert re.search(told, said) if told else not said
    assert slept == ([5.0] if rank == 2 else [])
