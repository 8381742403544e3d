"""A worker's process as the sweep sees it, and the channel on which the two talk.

The channel is a socket of its own: a task or an encoder may print whatever it likes, which goes to the run's log. The
sweep never waits for the channel alone, since a child of the worker may hold it open when the worker is long gone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

PROGRAM = ("-m", "xdscale.finetune.worker")

_LOOK_SECONDS = 0.5
_SECONDS_TO_LEAVE = 10.0
_SECONDS_TO_BEGIN = 900.0
"""A cold file system may take minutes to import from; from then on the run's watchdog watches."""

_LONGEST_ANSWER = 1 << 20
_ANSWERS = {"begun": bool, "note": str, "code": int}


class LostWorkerError(Exception):
    """A worker that answers no more; the message says why.

    Attributes:
        begun: whether it had begun with the job that it was given.
    """

    def __init__(self, why: str, *, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class WorkerProcess:
    """A worker process.

    Args:
        environment: variables beside this process's own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(_LOOK_SECONDS)
        self._rest = b""
        self._busy = False
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with theirs:
            # A session of its own: Ctrl-C reaches only the sweep, which then tells the workers.
            self._process = subprocess.Popen(
                [sys.executable, *PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=os.environ | environment,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def work(self, job: dict[str, Any], on_note: Callable[[str], None]) -> int:
        """Lets the worker do a job and waits for it.

        Args:
            job: as the worker takes it.
            on_note: gets what a person should know.

        Returns:
            The run's exit code.

        Raises:
            LostWorkerError: the worker ended, closed the channel, or sent what is no answer; it is ended then.
        """
        begun, self._busy = False, True
        try:
            self._channel.sendall(json.dumps(job).encode() + b"\n")
            given = time.monotonic()
            for answer in self._answers():
                begun |= "begun" in answer
                if not begun and time.monotonic() - given > _SECONDS_TO_BEGIN:
                    raise ValueError(f"the worker did not begin within {_SECONDS_TO_BEGIN:.0f} s")
                if "note" in answer:
                    on_note(answer["note"])
                if "code" in answer:
                    return answer["code"]
            why = "the worker process died"
        except OSError:
            why = "the worker process died" if self._ends() else "the worker closed its channel to the sweep"
        except ValueError as error:
            why = str(error)
        finally:
            self._busy = False
        self.kill()
        raise LostWorkerError(f"{why} ({_ending(self._process.returncode)})", begun=begun)

    def output(self) -> list[str]:
        """Returns the lines that the process printed outside of a run."""
        self._output.seek(0)
        return self._output.read().splitlines()

    def stop(self) -> None:
        """Asks the worker to save and to take no further job."""
        try:
            self._channel.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone
        self._process.terminate()  # nothing where it has ended

    def end(self) -> None:
        """Ends the worker, at once when it does nothing; else it is given a moment to save."""
        if self._busy:
            self.stop()
            self._ends()
        self.kill()
        self._channel.close()

    def kill(self) -> None:
        """Ends the worker and what it started."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ends(self) -> bool:
        """Waits a while for the process to end by itself; returns whether it did."""
        try:
            self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Yields answers as they come, empty ones meanwhile, until the process has ended and all that it said is read.

        Raises:
            OSError: the channel is closed.
            ValueError: what came is no answer.
        """
        while True:
            ended = not self.alive
            try:
                part = self._channel.recv(1 << 16)
            except TimeoutError:
                if ended:
                    return
                yield {}
                continue
            if not part:
                raise ConnectionResetError
            *lines, self._rest = (self._rest + part).split(b"\n")
            yield from map(_answer, lines)
            if len(self._rest) > _LONGEST_ANSWER:
                _answer(self._rest)


def _answer(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not all(isinstance(answer[key], _ANSWERS.get(key, ())) for key in answer):
        raise ValueError(f"the worker sent what is no answer: {line[:80]!r}")
    return answer


def _ending(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
