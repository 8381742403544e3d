"""Several tasks and seeds side by side over the devices: one worker process per slot, one queue for all."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from xdscale.errors import EXIT_FAULT, EXIT_STOPPED

_SECONDS_BETWEEN_LINES = 30.0
_LOG_LINES = 15


@dataclass(frozen=True)
class Job:
    """One run: what the worker gets, where the result will stand, and where the run's words go."""

    name: str
    message: dict[str, Any]
    result: Path
    log: Path


class Sweep:
    """Runs jobs over slots.

    Args:
        slots: the environment of each worker process.
        say: shows one line to the person.
    """

    def __init__(self, slots: list[dict[str, str]], say: Callable[[str], None]) -> None:
        self._slots = slots
        self._say = say
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._workers: dict[int, subprocess.Popen] = {}
        self._last_words = [tempfile.TemporaryFile("w+") for _ in slots]
        self._failed: dict[str, str] = {}
        self._notes: set[str] = set()
        self._total = self._done = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start_workers(self, most: int) -> None:
        """Starts the processes, at most so many: they import while the caller still checks the model."""
        for slot in range(min(len(self._slots), most)):
            self._start(slot)

    def run(self, jobs: list[Job]) -> int:
        """Works until every job is done, failed, or a signal stops all.

        SIGINT, SIGTERM and SIGUSR1 stop every worker: each saves a checkpoint of its run, and the same sweep continues.

        Returns:
            0; 70 when a run failed, each then named with the end of its log; 75 after a signal.
        """
        self._queue.extend(jobs)
        self._total = len(jobs)
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in self._workers]
        try:
            for thread in threads:
                thread.start()
            self._watch(threads)
        finally:
            self.end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)
        for name, text in self._failed.items():
            self._say(f"failed: {name}\n{text}")
        if self._stopping.is_set():
            self._say(f"stopped by a signal, {self._done} of {self._total} runs done; the same command continues")
            return EXIT_STOPPED
        return EXIT_FAULT if self._failed else 0

    def end_workers(self) -> None:
        """Ends all workers that are left and waits for them."""
        for worker in self._workers.values():
            worker.stdin.close()
            if worker.poll() is None and worker.returncode is None:
                worker.terminate()
        for worker in self._workers.values():
            worker.wait()

    def _start(self, slot: int) -> subprocess.Popen:
        # A session of its own: Ctrl-C reaches only this process, which then tells the workers.
        worker = subprocess.Popen(
            [sys.executable, "-m", "xdscale.finetune.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._last_words[slot],
            text=True,
            env=os.environ | self._slots[slot],
            start_new_session=True,
        )
        self._workers[slot] = worker
        return worker

    def _serve(self, slot: int) -> None:
        """Feeds one worker; a worker that dies costs only its run."""
        while not self._stopping.is_set():
            with self._lock:
                if not self._queue:
                    return
                job = self._running[slot] = self._queue.popleft()
            if self._workers[slot].poll() is not None:
                self._start(slot)
            code = self._work(self._workers[slot], job)
            with self._lock:
                del self._running[slot]
                if code == EXIT_STOPPED:
                    continue
                self._done += 1
                if code == 0 and job.result.is_file():
                    self._say(f"[{self._done}/{self._total}] {job.name}: {_describe_result(job.result)}")
                else:
                    self._failed[job.name] = self._tail(job, slot, code)
                    self._say(f"[{self._done}/{self._total}] {job.name}: failed, see {job.log}")

    def _work(self, worker: subprocess.Popen, job: Job) -> int | None:
        """Lets a worker do a job; returns the run's exit code, or None when the worker died."""
        try:
            print(json.dumps(job.message), file=worker.stdin, flush=True)
            for line in worker.stdout:
                answer = json.loads(line)
                if "note" in answer and answer["note"] not in self._notes:
                    self._notes.add(answer["note"])
                    self._say(f"note: {answer['note']}")
                if "code" in answer:
                    return answer["code"]
        except (OSError, ValueError):
            pass
        worker.wait()
        return EXIT_STOPPED if self._stopping.is_set() else None

    def _tail(self, job: Job, slot: int, code: int | None) -> str:
        lines = _lines(job.log)
        if not lines:
            self._last_words[slot].seek(0)
            lines = self._last_words[slot].read().splitlines()
        how = "the worker process died" if code is None else f"exit code {code}"
        return "\n".join([f"{how}; last lines of {job.log}:", *lines[-_LOG_LINES:]])

    def _watch(self, threads: list[threading.Thread]) -> None:
        said = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            if self._stopping.is_set():
                for worker in list(self._workers.values()):
                    if worker.poll() is None:
                        worker.terminate()
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                for job in list(self._running.values()):
                    self._say(f"running {job.name}: {_last_line(job.log)}")
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.5)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _describe_result(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    return f"{metrics} ({result['seconds']:.0f} s)"


def _last_line(log: Path) -> str:
    return next((line[:200] for line in reversed(_lines(log))), "starting")


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
