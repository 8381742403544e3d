"""Whether a process does anything, or waits for a disk: what tells a compiler or a stalled file system from a hang."""

import threading
import time
from pathlib import Path

import psutil

_BUSY_SHARE = 0.1
_BUSY_BYTES = 1 << 16


class Activity:
    """Looks at this process from a thread that is not counted itself.

    Args:
        tasks: where the system describes the threads, each in a folder of its own.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._block_ticks: dict[str, int] = {}
        self._process = psutil.Process()
        self._at = time.monotonic()
        self._seconds = self._cpu_seconds()
        self._bytes = self._bytes_moved()

    def busy(self) -> bool:
        """Returns whether something was done since the last call; always called from the same thread.

        That is a tenth of a core's time in all other threads and in the processes started from here (compilers),
        64 KiB read or written by all other threads, or a thread waiting for a disk. Where the system does not
        tell, True.
        """
        now, seconds, moved = time.monotonic(), self._cpu_seconds(), self._bytes_moved()
        spent = seconds - self._seconds
        busy = abs(spent) >= _BUSY_SHARE * (now - self._at)  # less than before: a process has ended
        busy |= moved is None or moved - self._bytes >= _BUSY_BYTES or self.waits_for_disk()
        self._at, self._seconds, self._bytes = now, seconds, moved
        return busy

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system - time.thread_time()
        for child in self._process.children(recursive=True):
            try:
                total += sum(child.cpu_times()[:4])
            except psutil.Error:  # ended in between
                continue
        return total

    def _bytes_moved(self) -> int | None:
        mine = f"/proc/self/task/{threading.get_native_id()}/io"
        try:
            return _bytes_read_or_written("/proc/self/io") - _bytes_read_or_written(mine)
        except OSError:
            return None

    def waits_for_disk(self) -> bool:
        """Returns whether any thread waits for a disk right now, or has since the last call."""
        waits = False
        for stat in self._tasks.glob("*/stat"):
            try:
                text = stat.read_text(encoding="utf-8", errors="replace")
            except OSError:  # the thread has ended
                continue
            # After the program's name, which may hold anything: the state, where D is a disk's, and 39 words later
            # the clock ticks for which the thread has waited for block devices (0 where they are not counted).
            words = text.rpartition(")")[2].split()
            ticks = int(words[39])
            waits |= words[0] == "D" or ticks > self._block_ticks.get(stat.parent.name, ticks)
            self._block_ticks[stat.parent.name] = ticks
        return waits


def _bytes_read_or_written(path: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
