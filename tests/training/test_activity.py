"""What a rank and its device do while the watchdog looks: computing, waiting for others, waiting for a disk."""

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

from xdscale.training import activity as activity_module
from xdscale.training import distributed
from xdscale.training.activity import Activity
from xdscale.training.arrivals import Arrival, Arrivals
from xdscale.training.distributed import Ranks
from xdscale.training.watchdog import Watchdog


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


def test_threads_that_end_meanwhile_are_passed_over_and_a_system_that_does_not_tell_counts_as_activity(
    tmp_path, monkeypatch
):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "ended" / "stat").mkdir(parents=True)  # cannot be read either
    stand_in(tmp_path, reader=("D", 0))
    activity = Activity(tmp_path)
    assert activity.waits_for_disk()
    stand_in(tmp_path, reader=("S", 0))
    monkeypatch.setattr(activity_module, "_bytes_read_or_written", refuse)
    monkeypatch.setattr(activity, "_cpu_seconds", lambda: 0.0)
    assert activity.busy()


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


def test_of_ranks_at_the_same_place_the_first_is_named_and_the_others_are_counted(two_ranks):
    for watchdog, device in zip(two_ranks.watchdogs, two_ranks.devices):
        watchdog.enter("data", 0)
        device.reached = 2
    accused = two_ranks.judge(60)
    assert accused.startswith("rank 0 on ")
    assert accused.endswith(" made no progress for 46 s in phase 'data' of step 1 (as did 1 other ranks there)")


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


def test_time_of_this_process_and_of_all_that_it_started_counts_but_not_that_of_looking(monkeypatch):
    child = SimpleNamespace(cpu_times=lambda: (0.25, 0.5, 1.0, 2.0, 64.0))  # the last is waiting, which is no work

    def gone():
        raise psutil.NoSuchProcess(7)

    times = SimpleNamespace(user=16.0, system=32.0, children_user=128.0, children_system=256.0)
    activity = Activity()
    activity._process = SimpleNamespace(
        cpu_times=lambda: times, children=lambda recursive: [child, SimpleNamespace(cpu_times=gone), child] * recursive
    )
    monkeypatch.setattr("time.thread_time", lambda: 8.0)
    assert activity._cpu_seconds() == 16 + 32 + 128 + 256 - 8 + 2 * (0.25 + 0.5 + 1 + 2)


@pytest.mark.parametrize(
    ("spent", "moved", "busy"),
    [
        (0.25, 0, True),  # a tenth of a core
        (0.24, 0, False),
        (-0.25, 0, True),  # a process has ended, whose time is not counted any more
        (0.0, 65_536, True),
        (0.24, 65_535, False),
        (0.0, None, True),  # where the system does not tell
    ],
)
def test_a_tenth_of_a_core_or_64_kib_is_busy(monkeypatch, tmp_path, spent, moved, busy):
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    activity = Activity(tmp_path)
    activity._seconds, activity._bytes = 7.0, 1000
    monkeypatch.setattr("time.monotonic", lambda: 102.5)
    monkeypatch.setattr(activity, "_cpu_seconds", lambda: 7.0 + spent)
    monkeypatch.setattr(activity, "_bytes_moved", lambda: None if moved is None else 1000 + moved)
    assert activity.busy() == busy
    monkeypatch.setattr(activity, "_bytes_moved", lambda: 1000 + (moved or 0))
    monkeypatch.setattr("time.monotonic", lambda: 105.0)
    activity._bytes = 1000 + (moved or 0)
    assert not activity.busy()  # nothing since then


def test_a_device_that_is_asked_for_its_place_is_never_waited_for():
    device = _Device()
    arrivals = Arrivals(device.record)
    places = [Arrival(number, 0, "data") for number in range(1, 4)]
    for place in places:
        arrivals.pass_by(place)
    assert arrivals.last() is None
    device.reached = 2
    assert arrivals.last() == places[1]
    device.reached = 3
    assert [arrivals.last(), arrivals.last()] == [places[2]] * 2
    on_host = Arrivals(None)
    assert on_host.last() is None
    on_host.pass_by(places[1])
    assert on_host.last() == places[1]
