"""A rank that dies, freezes, gets no data or fails: all ranks end within a minute; one line says which and where."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from xdscale.data.order import Order
from xdscale.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.shards.table import Table
from xdscale.training import distributed
from xdscale.training.activity import Activity
from xdscale.training.arrivals import Arrival, Arrivals
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log
from xdscale.training.watchdog import Watchdog

WORKER = Path(__file__).with_name("faulty_worker.py")
MINUTE_SECONDS = 60


class Launched:
    """Two ranks under the deepspeed launcher, in the background."""

    def __init__(self, shards, folder, port, fault, **settings):
        self.run, config, self.stderr = folder / "run", folder / "ds.json", folder / "stderr.txt"
        zero = {"stage": 2, "reduce_bucket_size": 1_000_000}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
        values = {"data.shards": shards, "output.folder": self.run, "training.steps": 1000, "training.global_batch": 2}
        values |= {"run.eval_samples": 2} | {key.replace("__", "."): value for key, value in settings.items()}
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [launcher, "-q", "--num_accelerators", 2, "--master_port", port]
        command += [WORKER, fault] if fault else ["--module", "xdscale.train"]
        command += ["quickstart", *(f"{key}={value}" for key, value in values.items()), "--deepspeed_config", config]
        with self.stderr.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stderr=file,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

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
def launch(wiki_shards, tmp_path, free_port):
    launched = []

    def start(fault=None, **settings):
        launched.append(Launched(wiki_shards, tmp_path, free_port(), fault, **settings))
        return launched[0]

    yield start
    for process in launched:
        if process.process.poll() is None:
            os.killpg(process.process.pid, signal.SIGKILL)
            process.process.wait()


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


def test_a_rank_that_gets_no_data(launch, wiki_shards):
    launched = launch("blocked,1,3", run__hang_seconds=5)
    launched.wait_for("step", 3)
    seconds, code, lines = launched.end()
    print(f"rank 1 without data: all ended after {seconds:.1f} s: {lines}")
    order = Order(len(Table(wiki_shards, "train")), seed=0, global_batch=2, world_size=2, rank=1, micro_batch=1)
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


def seconds_busy(work):
    """In how many of some beats a process that does this counts as active, and in how many it does not."""
    activity = Activity()
    found, done = [], threading.Event()

    def watch():
        activity.busy()
        while not done.wait(0.25):
            found.append(activity.busy())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return found


def test_activity_is_computing_here_or_in_a_child_or_moving_bytes_and_not_sleeping(tmp_path):
    def compute(seconds=1.2):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            hashlib.sha256(bytes(1 << 20))  # lets go of the interpreter, as PyTorch's operations do

    def compile_elsewhere():
        program = "import time\nend = time.time() + 1.2\nwhile time.time() < end: pass"
        subprocess.run([sys.executable, "-c", program], check=True)

    def write():
        for _ in range(12):
            (tmp_path / "file").write_bytes(bytes(200_000))
            time.sleep(0.1)

    assert not any(seconds_busy(lambda: time.sleep(1.2)))
    for work in (compute, compile_elsewhere, write):
        found = seconds_busy(work)
        assert sum(found) >= len(found) - 1 > 1


class _Device:
    """Stands for a GPU: an event that was recorded is reached when the test says so."""

    def __init__(self):
        self.recorded, self.reached = 0, 0

    def record(self):
        self.recorded += 1
        number = self.recorded
        return SimpleNamespace(query=lambda: number <= self.reached)


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """Two watchdogs that share a store, and the device of each; `judge` lets seconds go by."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    devices = [_Device(), _Device()]
    watchdogs = [Watchdog(Ranks(0, 1, 0), tmp_path, 45, device.record) for device in devices]
    for rank, watchdog in enumerate(watchdogs):
        watchdog._ranks, watchdog._store = Ranks(rank, 2, rank), watchdogs[0]._store
        for phase in ("data", "counts", "forward", "backward", "optimizer"):
            watchdog._durations[phase].append(1.0)  # not the first time, when compilers run

    def judge(seconds, each_second=lambda: None):
        for _ in range(seconds):
            clock[0] += 1
            each_second()
            for watchdog in watchdogs:
                watchdog._beat()
            accused = watchdogs[0]._judge()
            if accused:
                return accused
        return None

    return SimpleNamespace(watchdogs=watchdogs, devices=devices, judge=judge)


def test_two_threads_may_ask_how_far_a_device_is():
    """The watchdog's, and a main thread that ends: while one looks at a place the other takes it away."""
    both = threading.Barrier(2)

    def query():
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return True

    arrivals = Arrivals(lambda: SimpleNamespace(query=query))
    arrivals.pass_by(Arrival(1, 0, "data"))
    arrivals.pass_by(Arrival(2, 0, "forward"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: arrivals.last(), range(2)))
    assert found == [Arrival(2, 0, "forward")] * 2


def enqueue_step(watchdog):
    """What a host does in a step with three exchanges in its backward pass, when nothing makes it wait."""
    for phase, exchanges in (("data", 0), ("counts", 0), ("forward", 0), ("backward", 3), ("optimizer", 0)):
        watchdog.enter(phase, 0)
        for _ in range(exchanges):
            watchdog.exchange()


@pytest.mark.parametrize("culprit", [0, 1])
def test_on_gpus_the_rank_whose_own_work_is_not_done_is_to_blame(two_ranks, culprit):
    """Both hosts wait at the same line: one for its own kernel, the other for the first one's part of an exchange."""
    for watchdog in two_ranks.watchdogs:
        enqueue_step(watchdog)
    for rank, device in enumerate(two_ranks.devices):
        device.reached = 6 if rank == culprit else 7  # of data, counts, forward, backward, its first two exchanges
    accused = two_ranks.judge(60)
    assert f"rank {culprit} on " in accused
    assert "made no progress for 46 s in phase 'optimizer' of step 1" in accused
    assert "(its GPU has not left 'backward')" in accused


def test_a_host_that_is_behind_is_to_blame_though_its_gpu_has_done_all_it_was_given(two_ranks):
    first, second = two_ranks.watchdogs
    enqueue_step(first)
    second.enter("data", 0)
    two_ranks.devices[0].reached, two_ranks.devices[1].reached = 3, 2
    accused = two_ranks.judge(60)
    assert "rank 1 on " in accused
    assert "in phase 'data'" in accused
    assert "GPU" not in accused


def test_a_gpu_that_goes_on_is_no_hang(two_ranks):
    for watchdog in two_ranks.watchdogs:
        enqueue_step(watchdog)
    progress = iter(range(10**6))

    def go_on():
        if next(progress) % 40 == 0:
            for device in two_ranks.devices:
                device.reached += 1

    assert two_ranks.judge(250, go_on) is None


def test_every_exchange_of_deepspeed_is_told_of_once(monkeypatch):
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    assert all(hasattr(TorchBackend, name) for name in distributed._EXCHANGES)
    calls = []
    exchanges = {name: lambda self, value, name=name: calls.append(name) or value for name in distributed._EXCHANGES}
    monkeypatch.setattr(comm, "cdb", type("Backend", (), exchanges)())
    for told in ("replaced", "told"):  # a process may train several times
        distributed.before_exchanges(lambda told=told: calls.append(told))
    for name in distributed._EXCHANGES:
        assert getattr(comm.cdb, name)(7) == 7
    assert calls == [entry for name in distributed._EXCHANGES for entry in ("told", name)]


def stand_in(folder, **threads):
    """Writes what /proc/self/task says of threads: state and ticks of waiting for block devices."""
    for thread, (state, ticks) in threads.items():
        words = [state, *["1"] * 38, str(ticks), "0"]
        (folder / thread).mkdir(exist_ok=True)
        (folder / thread / "stat").write_text(f"7 (a) strange) name) {' '.join(words)}\n")


def test_waiting_for_a_disk_is_a_thread_in_state_d_or_ticks_that_count_up(tmp_path):
    activity = Activity(tmp_path)
    stand_in(tmp_path, main=("S", 3), reader=("S", 9))
    assert not activity.waits_for_disk()
    stand_in(tmp_path, reader=("D", 9))
    assert activity.waits_for_disk()
    stand_in(tmp_path, reader=("S", 12))  # many short waits: seen by their ticks alone
    assert activity.waits_for_disk()
    assert not activity.waits_for_disk()


def test_the_systems_own_words_on_threads_are_understood():
    activity = Activity()
    activity.waits_for_disk()
    assert str(threading.get_native_id()) in activity._block_ticks


def test_a_stalled_file_system_is_waited_for_with_a_word_and_a_limit(two_ranks, tmp_path, capsys):
    """Two minutes of no answer are no hang while data is read; five are."""
    activity = Activity(tmp_path)
    stand_in(tmp_path, reader=("D", 0))
    first, second = two_ranks.watchdogs
    for watchdog in two_ranks.watchdogs:
        watchdog.enter("data", 3)
    first.enter("counts", 3)
    for device in two_ranks.devices:
        device.reached = device.recorded
    assert two_ranks.judge(120, lambda: second._look(activity)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: rank 1 on " in line
    assert "has waited 46 s for its file system in phase 'data' of step 4; it is given 300 s" in line
    accused = two_ranks.judge(200, lambda: second._look(activity))
    assert "rank 1 on " in accused
    assert "made no progress for 301 s in phase 'data' of step 4 (its file system does not answer)" in accused


def test_the_usual_patience_begins_anew_when_a_disk_answers(two_ranks, tmp_path):
    activity = Activity(tmp_path)
    for watchdog in two_ranks.watchdogs:
        watchdog.enter("data", 3)
    two_ranks.watchdogs[0].enter("counts", 3)
    for device in two_ranks.devices:
        device.reached = device.recorded
    stand_in(tmp_path, reader=("D", 0))
    assert two_ranks.judge(100, lambda: two_ranks.watchdogs[1]._look(activity)) is None
    stand_in(tmp_path, reader=("S", 0))
    assert "made no progress for 145 s" in two_ranks.judge(60, lambda: two_ranks.watchdogs[1]._look(activity))
