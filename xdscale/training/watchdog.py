"""Ends all ranks when one of them dies, hangs, fails or gets no data, with one line that says which and where.

Every rank has a thread that tells its place (step, phase, samples) once a second through the key-value store that the
ranks met in; a connection of its own, so that a rank stuck in a collective still tells. The first rank judges all, the
others judge the first. Places are compared by how many phases a rank has entered and how many exchanges it has begun
there: all ranks make the same ones in the same order, so while the others wait in an exchange, the one to blame is the
one that is furthest behind. On GPUs it is the device's place that counts, not the host's (`arrivals`).
"""

import contextlib
import datetime
import faulthandler
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed

from xdscale.devices import uses_gpus
from xdscale.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, XdscaleError, refusal
from xdscale.files import one_line
from xdscale.training.activity import Activity
from xdscale.training.arrivals import Arrival, Arrivals, Event, record_cuda_event
from xdscale.training.distributed import Ranks, before_exchanges, in_collective, is_collective

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 15.0  # the launcher may then take 30 s more to end a frozen rank: within a minute together
_SILENCE_AFTER_FAILED_COLLECTIVE_SECONDS = 4.0
_STORE_SECONDS = 5.0
_STORE_FAILURES = 3
_SLOW_PHASES = ("starting", "saving")
_SLOW_FACTOR = 20
"""Building, saving, and the first time through any phase (compilers start then) may take so much longer, by a rank that
does something."""
_ENDED = "ended"
_READING = "data"
_DISK_SECONDS = 300.0
"""A file system that stalls is waited for so long while data is read, where that is more than the usual patience."""


@dataclass
class _Seen:
    """What the judge knows of a rank, by the judge's own clock."""

    record: dict[str, Any]
    beat_at: float
    entered_at: float
    active_at: float

    def overdue(self, now: float) -> bool:
        """Whether it made no progress for too long, or did nothing at all for a time in which others would."""
        patience, idle_patience = self.record["patience"], self.record["idle_patience"]
        return now - self.entered_at > patience or now - self.active_at > idle_patience


@dataclass
class _Place:
    """Where a rank is."""

    phase: str = "starting"
    step: int = 0
    micro_batch: int | None = None
    entered: int = 0  # phases entered so far
    since: float = field(default_factory=time.monotonic)
    ticks: int = 0  # signs of progress within the phase
    exchanges: int = 0  # exchanges with other ranks begun within the phase
    disk_at: float | None = None  # when a thread was last seen waiting for a disk
    excused: bool = False  # whether it was said that a disk is waited for

    def arrival(self) -> Arrival:
        return Arrival(self.entered, self.exchanges, self.phase)


class Watchdog:
    """Watches all ranks while it is open as a context manager.

    Attributes:
        samples: set once the data is open; maps (step counted from 0, micro-batch or None for the whole step) to the
            sample ids of this rank there.

    Args:
        ranks: this process among the others; every rank opens a watchdog.
        folder: where stacks and tracebacks go.
        hang_seconds: shortest time without progress that counts as hanging. Ten times the longest of the last
            hundred times through the same phase counts, when that is more.
        record_event: puts an event behind this rank's work on its device so far; default: on its GPU, if it has one.
    """

    def __init__(
        self, ranks: Ranks, folder: Path, hang_seconds: float, record_event: Callable[[], Event] | None = None
    ) -> None:
        self.samples: Callable[[int, int | None], list[int]] | None = None
        self._ranks = ranks
        self._folder = folder
        self._hang_seconds = hang_seconds
        self._silence_seconds = min(_SILENCE_SECONDS, max(hang_seconds, _SILENCE_AFTER_FAILED_COLLECTIVE_SECONDS))
        self._store = _open_store(ranks)
        self._place = _Place()
        self._arrivals = Arrivals(record_event or (record_cuda_event if uses_gpus() else None))
        self._arrivals.pass_by(self._place.arrival())
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))
        self._beats = self._active_beats = 0
        self._seen: dict[int, _Seen] = {}
        self._looked_at = time.monotonic()
        self._failed_collective = False
        self._closed = threading.Event()
        self._main_thread = threading.main_thread()
        self._thread = threading.Thread(target=self._watch, name="xdscale-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if torch.distributed.is_initialized():
            before_exchanges(self.exchange)
        self._beat()
        if self._ranks.is_first:
            self._store.set("verdict", "")
        self._ranks.barrier()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def enter(self, phase: str, step: int, micro_batch: int | None = None) -> None:
        """Says what this rank does from now on; every rank calls it with the same phases in the same order.

        Args:
            phase: one word.
            step: counted from 0.
            micro_batch: which one of this rank in the step.
        """
        now = time.monotonic()
        before = self._place
        self._durations[before.phase].append(now - before.since)
        self._place = _Place(phase, step, micro_batch, before.entered + 1, now)
        self._arrivals.pass_by(self._place.arrival())

    def exchange(self) -> None:
        """Says that this rank begins an exchange with the others."""
        self._place.exchanges += 1
        self._arrivals.pass_by(self._place.arrival())

    def tick(self) -> None:
        """Says that a long phase goes on: fetching or verifying shards may take hours.

        Shards that are fetched ahead say nothing of a phase that does not wait for them.
        """
        if self._place.phase in ("starting", _READING):
            self._place.ticks += 1

    def end(self) -> None:
        """Says that this rank is done, and waits for the others: whoever leaves from now on is not missed."""
        self.enter(_ENDED, self._place.step)
        self._beat()
        self._ranks.barrier()

    def report(self, error: Exception, *, stopping: bool) -> int:
        """Tells of an error that ends this rank, unless another rank told first, and lets the others know.

        When a collective failed, another rank is the cause: then the thread names it and ends this process.

        Args:
            error: what ends this rank.
            stopping: whether this rank was asked to stop. An error then is no fault while the run starts: the signal
                also ended what this rank had started, such as the conversion of a checkpoint, and all that the run
                ever finished is on the disk. Later an error is one: the newest steps are lost.

        Returns:
            The exit code.
        """
        if isinstance(error, XdscaleError):
            if stopping and self._place.phase == "starting":
                line, code = f"stopped by a signal while starting ({error}); the same command continues", EXIT_STOPPED
            else:
                line, code = f"error: {error}", EXIT_BAD_INPUT
                if self._place.phase == "starting" and self._ranks.world_size > 1:
                    time.sleep(_BEAT_SECONDS)  # for one that was asked to stop, and knows that this is no fault
            if self._place.phase == "data":
                line += f" (rank {self._ranks.rank}, {_describe(self._record())})"
        else:
            if is_collective(error):
                self._failed_collective = True
                time.sleep(2 * _SILENCE_SECONDS)
            line = f"error: rank {self._ranks.rank} on {platform.node()} failed in {_describe(self._record())}: "
            line, code = f"{line}{type(error).__name__}: {one_line(error)}; {self._keep_traceback(error)}", EXIT_FAULT
        code = self._tell(line, code)
        self._linger()
        return code

    def _keep_traceback(self, error: Exception) -> str:
        """Writes a traceback down; returns where it lies, or its last line where the folder takes no files."""
        try:
            path = self._path("traceback")
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError as refused:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"in {last.filename}, line {last.lineno} (no traceback in the run folder: {refusal(refused)})"
        return f"traceback in {path}"

    def _watch(self) -> None:
        failures = 0
        activity = Activity()
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                self._look(activity)
                self._beat()
                verdict = self._store.get("verdict").decode()
                if verdict:
                    self._leave(json.loads(verdict)["code"])
                accused = self._judge()
                failures = 0
            except (RuntimeError, ValueError):  # the store is gone, or answers no more
                failures += 1
                accused = self._lost_store() if failures >= _STORE_FAILURES else None
            if accused and not self._closed.is_set():
                self._tell(f"error: {accused}; all ranks end; stacks in {self._folder / 'faults'}", EXIT_FAULT)
                self._leave(EXIT_FAULT)

    def _look(self, activity: Activity) -> None:
        """Notes what this rank does while it makes no progress."""
        place, now = self._place, time.monotonic()
        if self._is_slow(place.phase) and activity.busy():
            self._active_beats += 1
        if place.phase != _READING or not activity.waits_for_disk():
            return
        place.disk_at = now
        seconds = now - place.since
        if not place.excused and self._patience(place.phase) < seconds < _DISK_SECONDS:
            place.excused = True
            what = f"has waited {seconds:.0f} s for its file system"
            line = f"warning: {_accuse(self._ranks.rank, self._record(), what)}; it is given {_DISK_SECONDS:.0f} s"
            print(line, file=sys.stderr, flush=True)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"rank-{self._ranks.rank}", json.dumps(self._record()))

    def _record(self) -> dict[str, Any]:
        place = self._place
        # The usual patience begins anew when the disk answers: what it held up still has to be done.
        stalled = place.disk_at is not None and time.monotonic() - place.disk_at <= self._patience(place.phase)
        least = _DISK_SECONDS if stalled else 0.0
        training = self.samples is not None and place.phase in ("data", "forward", "backward")
        return {
            "beat": self._beats,
            "entered": place.entered,
            "ticks": place.ticks,
            "phase": place.phase,
            "step": place.step,
            "samples": self.samples(place.step, place.micro_batch) if training else [],
            "active": self._active_beats,
            "patience": max(least, self._patience(place.phase)),
            "idle_patience": max(least, self._patience(place.phase, idle=True)),
            "stalled": stalled,
            "host_place": place.arrival(),
            "device_place": self._arrivals.last() or (0, 0, place.phase),
            "collective": in_collective(self._main_thread.ident),
            "host": platform.node(),
        }

    def _is_slow(self, phase: str) -> bool:
        return phase in _SLOW_PHASES or not self._durations.get(phase)

    def _patience(self, phase: str, *, idle: bool = False) -> float:
        factor = _SLOW_FACTOR if self._is_slow(phase) and not idle else 1
        return max(factor * self._hang_seconds, 10 * max(self._durations.get(phase) or [0]))

    def _judge(self) -> str | None:
        """Returns an accusation, if there is one."""
        watched = range(self._ranks.world_size) if self._ranks.is_first else [0]
        records = [json.loads(value) for value in self._store.multi_get([f"rank-{rank}" for rank in watched])]
        now = time.monotonic()
        if now - self._looked_at > 5 * _BEAT_SECONDS:
            self._seen.clear()  # this process was suspended itself, and most likely all were
        self._looked_at = now
        for rank, record in zip(watched, records):
            seen = self._seen.setdefault(rank, _Seen(record, now, now, now))
            if any(record[key] != seen.record[key] for key in ("entered", "ticks", "device_place")):
                seen.entered_at = seen.active_at = now
            if record["active"] != seen.record["active"]:
                seen.active_at = now
            if record["beat"] != seen.record["beat"]:
                seen.beat_at = now
            seen.record = record
        return self._find_silent(now) or (self._find_hanging(now) if self._ranks.is_first else None)

    def _find_silent(self, now: float) -> str | None:
        for rank, seen in self._seen.items():
            silence = now - seen.beat_at
            patience = self._silence_seconds
            if self._failed_collective:
                patience = _SILENCE_AFTER_FAILED_COLLECTIVE_SECONDS
            elif seen.record["phase"] in _SLOW_PHASES:
                patience *= 3  # reading large files can keep the interpreter's lock for long
            if silence > patience and seen.record["phase"] != _ENDED:
                return _accuse(rank, seen.record, f"died or froze (silent for {silence:.0f} s)")
        return None

    def _find_hanging(self, now: float) -> str | None:
        overdue = [seen for seen in self._seen.values() if seen.overdue(now)]
        if not any(seen.record["phase"] != _ENDED for seen in overdue):
            return None
        places = {rank: _how_far(seen.record) for rank, seen in self._seen.items()}
        last = min(places.values())
        rank, *others = [rank for rank, place in places.items() if place == last]
        if any(self._seen[slow] not in overdue for slow in (rank, *others)):
            return None  # the others wait for one that is slow but goes on
        seen = self._seen[rank]
        line = _accuse(rank, seen.record, f"made no progress for {now - seen.entered_at:.0f} s")
        if seen.record["device_place"] < seen.record["host_place"]:
            line += f" (its GPU has not left '{seen.record['device_place'][2]}')"
        if seen.record["stalled"]:
            line += " (its file system does not answer)"
        return line + (f" (as did {len(others)} other ranks there)" if others else "")

    def _lost_store(self) -> str | None:
        """Returns an accusation of the first rank, whose process holds the store."""
        seen = self._seen.get(0)
        if self._place.phase == _ENDED or (seen and seen.record["phase"] == _ENDED):
            self._closed.set()
            return None
        if self._ranks.rank != 1:
            time.sleep(_STORE_SECONDS)  # the second rank speaks for all
            self._leave(EXIT_FAULT)
        return _accuse(0, seen.record if seen else self._record(), "died or froze (its store does not answer)")

    def _tell(self, line: str, code: int) -> int:
        """Prints a line, unless another rank told first; returns the code of the first, with which all ranks leave."""
        verdict = json.dumps({"rank": self._ranks.rank, "line": line, "code": code})
        try:
            stands = self._store.compare_set("verdict", "", verdict).decode()
        except RuntimeError:
            stands = verdict
        if stands == verdict:
            print(line, file=sys.stderr, flush=True)
        return json.loads(stands)["code"]

    def _linger(self) -> None:
        """Lets the others read why: the store lives in the first rank's process."""
        if self._ranks.is_first and self._ranks.world_size > 1:
            time.sleep(3 * _BEAT_SECONDS)

    def _leave(self, code: int) -> None:
        if code == EXIT_FAULT:
            # A folder that takes no files must not keep this process from ending.
            with contextlib.suppress(OSError), self._path("stacks").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self._linger()
        os._exit(code)

    def _path(self, what: str) -> Path:
        folder = self._folder / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{what}-rank-{self._ranks.rank:05}.txt"


def _open_store(ranks: Ranks) -> Any:
    """Returns a store that all ranks share; torchrun's restarts of a run do not see each other's entries."""
    if ranks.world_size == 1:
        return torch.distributed.HashStore()
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=_STORE_SECONDS),
    )
    return torch.distributed.PrefixStore(f"xdscale-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _describe(record: dict[str, Any]) -> str:
    samples = record["samples"]
    text = f"phase '{record['phase']}' of step {record['step'] + 1}"
    if samples:
        more = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
        text += f", sample {samples[0]}{more}"
    return text


def _accuse(rank: int, record: dict[str, Any], what: str) -> str:
    return f"rank {rank} on {record['host']} {what} in {_describe(record)}"


def _how_far(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what compares ranks; the device says most, since a host may have passed where its device has not come."""
    return record["device_place"][:2], record["host_place"][:2], record["collective"]
