"""SIGTERM, SIGUSR1, Ctrl-C: remember the wish to stop, so that the loop can save and end with a documented code."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

_NODE_LAUNCHER_SETS = "CROSS_RANK"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SECONDS_OF_ONE_CTRL_C = 0.3
"""A terminal's SIGINT reaches a rank from the terminal and from a launcher that passes it on."""


class StopRequest:
    """Remembers that this rank was asked to stop; the loop spreads the news to the other ranks.

    The DeepSpeed launcher signals ranks one after another, so a rank never acts alone: the loop adds `requested` to
    the numbers that all ranks sum in every step. A launcher that is gone counts as a request: the `deepspeed` command
    dies of SIGTERM without a word to its ranks, and its node's launcher of SIGUSR1. So does a signal that a launcher
    was started to block (`env --block-signal=TERM,USR1 deepspeed …`) and holds: no moment of a start is then too early.

    As a context manager it catches these signals while it is open; one that came while they were blocked arrives now.
    A second SIGINT ends the process at once: who types Ctrl-C twice does not want to wait for a checkpoint.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._interrupted_at: float | None = None
        self._launchers: list[psutil.Process] = []
        self._before: list[Any] = []

    @property
    def requested(self) -> bool:
        """Whether a signal came, or a launcher is gone or holds one."""
        return self._signalled or any(not _alive(process) or _holds_signal(process) for process in self._launchers)

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._remember) for number in _SIGNALS]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._launchers, gone = _launchers_above()
        self._signalled |= gone
        return self

    def follow(self, process: int) -> None:
        """Counts it as a request, too, once the process of this number is gone: it started this one to work for it."""
        self._launchers.append(psutil.Process(process))

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(_SIGNALS, self._before):
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > _SECONDS_OF_ONE_CTRL_C:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted_at = self._interrupted_at or now


def _launchers_above() -> tuple[list[psutil.Process], bool]:
    """Finds the DeepSpeed launchers among this process's ancestors: the command, and its node's launcher.

    Only these: the shell that a run was started from may well end before the run.

    Returns:
        The launchers, and whether one of them is gone already: a node launcher started this process and is no ancestor
        of it any more, or that launcher itself was left to the machine's first process.
    """
    ancestors = psutil.Process().parents()
    nodes = [process for process in ancestors if _runs(process, "deepspeed.launcher.launch")]
    commands = [process for process in ancestors if _runs(process, "/deepspeed", "deepspeed.launcher.runner")]
    gone = not nodes or (not commands and nodes[-1].ppid() == 1)
    return nodes + commands, gone and _NODE_LAUNCHER_SETS in os.environ


def _runs(process: psutil.Process, *programs: str) -> bool:
    try:
        return any(word.endswith(programs) for word in process.cmdline()[:4])
    except psutil.Error:
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _holds_signal(process: psutil.Process) -> bool:
    """Whether one of the signals was sent to a process that blocks it; what blocks nothing holds nothing."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    (held,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
    return any(held >> (number - 1) & 1 for number in _SIGNALS)
