"""Several tasks and seeds side by side over the devices: one worker process per slot, one queue for all."""

import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from xdscale.errors import EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.files import count_of
from xdscale.finetune.recipe import MODEL, RESULT
from xdscale.finetune.worker_process import LostWorkerError, WorkerProcess
from xdscale.report.sweep import read_result
from xdscale.tasks.contract import find_subject

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What stops a sweep."""

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_SAVE = 900.0
"""After a signal: as long as the watchdog gives a run that builds or saves."""

_SECONDS_TO_HEAR = 1.0
_LOG_LINES = 15


@dataclass(frozen=True)
class FinetuneJob:
    """One run: what the worker gets, where the result will stand, and where the run's words go.

    One that `stops_early`, by `run.stop_at_step`, has no result yet.
    """

    name: str
    message: dict[str, Any]
    result: Path
    log: Path
    stops_early: bool = False


class SweepRunner:
    """Runs jobs over slots.

    Args:
        slots: the environment of each worker process.
        say: shows one line to the person.
    """

    def __init__(self, slots: list[dict[str, str]], say: Callable[[str], None]) -> None:
        self._slots = slots
        self._say = say
        self._queue: deque[FinetuneJob] = deque()
        self._running: dict[int, FinetuneJob] = {}
        self._workers: dict[int, WorkerProcess] = {}
        self._failed: dict[str, str] = {}
        self._notes: set[str] = set()
        self._total = self._done = 0
        self._unsaved = False
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start_workers(self, most: int) -> None:
        """Starts the processes, at most so many: they import while the caller still checks the model."""
        for slot in range(min(len(self._slots), most)):
            self._workers[slot] = WorkerProcess(self._slots[slot])

    def run(self, jobs: list[FinetuneJob]) -> int:
        """Works until every job is done, failed, or a signal stops all.

        SIGINT, SIGTERM and SIGUSR1 stop every worker: each saves a checkpoint of its run, and the same sweep continues.

        Returns:
            0; 70 when a run failed, each then named with the end of its log; 75 after a signal, when every run that was
            under way is saved.
        """
        self._queue.extend(jobs)
        self._total = len(jobs)
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
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
        if self._stopping.is_set() and self._done < self._total:
            how = "not every run could be saved" if self._unsaved else "the same command continues"
            self._say(f"stopped by a signal, {self._done} of {count_of(self._total, 'run')} done; {how}")
            return EXIT_FAULT if self._unsaved else EXIT_STOPPED
        return EXIT_FAULT if self._failed else 0

    def end_workers(self) -> None:
        """Ends all workers that are left."""
        for worker in self._workers.values():
            worker.end()

    def _serve(self, slot: int) -> None:
        """Feeds one worker; a worker that dies costs only its run."""
        while not self._stopping.is_set():
            with self._lock:
                if not self._queue:
                    return
                job = self._running[slot] = self._queue.popleft()
            problem, saved = self._work(slot, job)
            with self._lock:
                del self._running[slot]
                if saved:
                    continue
                self._done += 1
                if problem is None:
                    self._say(f"[{self._done}/{self._total}] {job.name}: {_describe_end(job)}")
                else:
                    self._unsaved |= self._stopping.is_set()
                    self._failed[job.name] = self._tail(job, slot, problem)
                    self._say(f"[{self._done}/{self._total}] {job.name}: failed, see {job.log}")

    def _work(self, slot: int, job: FinetuneJob) -> tuple[str | None, bool]:
        """Lets a worker do a job; returns why it failed, if it did, and whether it was stopped without a loss."""
        try:
            if not self._workers[slot].alive:
                self._workers[slot].end()
                self._workers[slot] = WorkerProcess(self._slots[slot])
            code = self._workers[slot].work(job.message, self._note)
            if code == 0 and not job.stops_early:
                read_result(job.result)
                with suppress(XdscaleError):  # of another run's result, of which the end of the sweep tells
                    keep_best(job.result.parent.parent)
        except LostWorkerError as lost:
            return str(lost), not lost.begun and self._is_stopping()
        except (OSError, XdscaleError) as error:
            return str(error), False
        return (f"exit code {code}" if code else None), code == EXIT_STOPPED and self._is_stopping()

    def _is_stopping(self) -> bool:
        """Whether the sweep was stopped; of a signal that all processes get, a worker may be the first to tell."""
        return self._stopping.wait(_SECONDS_TO_HEAR)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.add(note)
            self._say(f"note: {note}")

    def _tail(self, job: FinetuneJob, slot: int, problem: str) -> str:
        lines = _lines(job.log) or self._workers[slot].output()
        return "\n".join([f"{problem}; last lines of {job.log}:", *lines[-_LOG_LINES:]])

    def _watch(self, threads: list[threading.Thread]) -> None:
        said, stopped_at = time.monotonic(), None
        while any(thread.is_alive() for thread in threads):
            now = time.monotonic()
            if self._stopping.is_set():
                stopped_at = now if stopped_at is None else stopped_at
                for worker in list(self._workers.values()):
                    worker.kill() if now - stopped_at > _SECONDS_TO_SAVE else worker.stop()
            if now - said > _SECONDS_BETWEEN_LINES:
                said = now
                for job in list(self._running.values()):
                    self._say(f"running {job.name}: {_last_line(job.log)}")
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.5)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()


def keep_best(folder: Path) -> None:
    """Takes away the models of a task's runs that keep theirs only if it is the best, but the best one.

    Whoever else does so at the same time leaves the best one, too.
    """
    kept = {}
    for path in sorted(folder.glob(f"seed-*/{MODEL}")):
        result = path.with_name(RESULT)
        if result.is_file() and (found := read_result(result)).kept_model == "best":
            kept[path] = found.score.value * (1 if found.score.higher_is_better else -1)
    for path in kept:
        if path != max(kept, key=kept.get):
            shutil.rmtree(path, ignore_errors=True)


def what_is_kept(kind: str, keep: bool | str) -> str:
    """Returns what a person should know, before hours of training, of what will be left of them.

    Args:
        kind: of subject.
        keep: as `run.keep_model`.
    """
    if not find_subject(kind).exports():
        return f"results alone are kept, no weights: what is finetuned as {kind} is not exported"
    if not keep:
        return (
            "results alone are kept, no weights, and a finished run cannot give them later: run.keep_model=best keeps "
            f"the model of each task's best seed, true those of all, in the folder {MODEL} of their runs (4 bytes for "
            "each parameter)"
        )
    which = "the model of each task's best seed is" if keep == "best" else "the models of all seeds are"
    return f"{which} kept, in the folder {MODEL} of its run (4 bytes for each parameter; run.keep_model=false: none)"


def _describe_end(job: FinetuneJob) -> str:
    if job.stops_early:
        return "stopped as run.stop_at_step says; the same command without it, or with a later one, continues"
    result = read_result(job.result)
    return ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()) + f" ({result.seconds:.0f} s)"


def _last_line(log: Path) -> str:
    return next((line[:200] for line in reversed(_lines(log))), "starting")


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
