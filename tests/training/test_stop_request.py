"""Signals that were blocked: held by a launcher, or waiting for a rank's handlers."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from xdscale.training import signals
from xdscale.training.signals import StopRequest, _holds_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_launcher_that_blocks_a_signal_lives_on_and_holds_it(number):
    process = subprocess.Popen(["env", "--block-signal=TERM,USR1,INT", "sleep", "60"])
    try:
        launcher = psutil.Process(process.pid)
        while launcher.name() != "sleep":  # env has replaced itself
            time.sleep(0.01)
        assert not _holds_signal(launcher)
        process.send_signal(number)
        assert _holds_signal(launcher)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not _holds_signal(launcher)


@pytest.mark.parametrize(
    ("held", "holds"),
    [
        ("0", False),
        ("2", True),
        ("200", True),
        ("4000", True),
        ("4202", True),
        ("100", False),
        ("10000", False),
        ("bdfd", False),
    ],
)
def test_which_signals_a_launcher_holds_is_read_from_their_bits(monkeypatch, held, holds):
    """Bit 1 of Ctrl-C, 9 of SIGUSR1 and 14 of SIGTERM; waiting signals of one thread alone are another line."""
    status = f"Name:\tdeepspeed\nSigPnd:\t{'f' * 16}\nShdPnd:\t{held:0>16}\nSigBlk:\t{'f' * 16}\n"
    monkeypatch.setattr(signals, "Path", lambda name: SimpleNamespace(read_text=lambda **_: status))
    assert _holds_signal(SimpleNamespace(pid=7)) == holds


RANK = """
import os
from xdscale.training.signals import StopRequest
os.kill(os.getpid(), {number})
with StopRequest() as stop:
    assert stop.requested
with StopRequest() as stop:
    assert not stop.requested
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_that_came_before_the_handlers_is_a_request(number):
    # In a process that was started to block it, as ranks are: a thread that does not block it would die of it.
    command = ["env", "--block-signal=TERM,USR1,INT", sys.executable, "-c", RANK.format(number=int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_is_followed_and_gone_is_a_request():
    with (
        subprocess.Popen(["sleep", "60"]) as other,
        subprocess.Popen(["sleep", "60"]) as process,
        StopRequest() as stop,
    ):
        for each in (other, process):
            stop.follow(each.pid)
        assert not stop.requested
        process.kill()  # also one that nobody has asked for yet how it ended
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested
        process.wait()
        assert stop.requested
        other.kill()


INTERRUPTED = """
import os, signal, time
from xdscale.training.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
    assert stop.requested
    print("saving", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_two_signals_of_one_ctrl_c_are_one_and_later_ones_are_counted_from_the_first(monkeypatch):
    """The terminal's, and that of a launcher which passes it on within a moment."""
    clock, done = [5.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: done.append((number, handler)))
    monkeypatch.setattr(signals.os, "kill", lambda process, number: done.append((process, number)))
    stop = StopRequest()
    for number, at in ((signal.SIGTERM, 5.0), (signal.SIGINT, 6.0), (signal.SIGINT, 6.25), (signal.SIGTERM, 7.0)):
        clock[0] = at
        stop._remember(number, None)
        assert stop.requested
        assert done == []
    clock[0] = 6.375  # of the first one, not of the second
    stop._remember(signal.SIGINT, None)
    assert done == [(signal.SIGINT, signal.SIG_DFL), (os.getpid(), signal.SIGINT)]


def test_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            assert signal.getsignal(number) == stop._remember
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_process_of_which_nothing_can_be_said_is_gone():
    def refuse():
        raise psutil.AccessDenied(7)

    assert not signals._alive(SimpleNamespace(is_running=lambda: True, status=refuse))
    assert not signals._alive(SimpleNamespace(is_running=lambda: False, status=lambda: "sleeping"))
    assert not signals._alive(SimpleNamespace(is_running=lambda: True, status=lambda: psutil.STATUS_ZOMBIE))
    assert signals._alive(SimpleNamespace(is_running=lambda: True, status=lambda: "sleeping"))


class Process:
    """Stands for a process above a rank."""

    def __init__(self, command, parent=5):
        self.command, self.parent = command.split(), parent

    def cmdline(self):
        if self.command == ["gone"]:
            raise psutil.NoSuchProcess(7)
        return self.command

    def ppid(self):
        return self.parent


NODE, COMMAND = "python -u -m deepspeed.launcher.launch --x", "python /venv/bin/deepspeed --module xdscale.train"


@pytest.mark.parametrize(
    ("above", "launchers", "gone"),
    [
        ([Process(NODE), Process(COMMAND), Process("bash", 1)], [0, 1], False),
        ([Process(NODE), Process("python -m deepspeed.launcher.runner x"), Process("gone")], [0, 1], False),
        ([Process(NODE, 7), Process("sshd: me")], [0], False),  # through ssh: its command is on another machine
        ([Process(NODE, 1)], [0], True),  # left to the machine's first process
        ([Process(NODE, 1), Process(COMMAND)], [0, 1], False),
        ([Process("systemd")], [], True),
        ([Process("vim a b c deepspeed.launcher.launch")], [], True),  # a file that is edited is no launcher
    ],
)
def test_launchers_are_told_from_other_ancestors_and_missed(monkeypatch, above, launchers, gone):
    monkeypatch.setattr(signals.psutil, "Process", lambda: SimpleNamespace(parents=lambda: above))
    monkeypatch.setenv("CROSS_RANK", "0")
    assert signals._launchers_above() == ([above[number] for number in launchers], gone)
    monkeypatch.delenv("CROSS_RANK")  # no launcher started this one
    assert signals._launchers_above()[1] is False
