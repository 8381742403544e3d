"""Whether a process does anything: what tells a compiler or a slow disk from a hang while both make no progress."""

import os
import threading
import time
from pathlib import Path

import psutil

_BUSY_SHARE = 0.1
_BUSY_BYTES = 1 << 16


class Activity:
    """Looks at this process from a thread that is not counted itself."""

    def __init__(self) -> None:
        # The kernel numbers a main thread as its process. Python's own number for it is the parent's after a fork.
        self._main_stat = Path(f"/proc/self/task/{os.getpid()}/stat")
        self._process = psutil.Process()
        self._at = time.monotonic()
        self._seconds = self._cpu_seconds()
        self._bytes = self._bytes_moved()

    def busy(self) -> bool:
        """Returns whether something was done since the last call; always called from the same thread.

        That is a tenth of a core's time in all other threads and in the processes started from here (compilers),
        64 KiB read or written by all other threads, or the main thread waiting for a disk right now. Where the
        system does not tell, True.
        """
        now, seconds, moved = time.monotonic(), self._cpu_seconds(), self._bytes_moved()
        spent = seconds - self._seconds
        busy = abs(spent) >= _BUSY_SHARE * (now - self._at)  # less than before: a process has ended
        busy |= moved is None or moved - self._bytes >= _BUSY_BYTES or self._waits_for_disk()
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

    def _waits_for_disk(self) -> bool:
        # After the program's name, which may hold anything, the first word is the state; D: a disk.
        return self._main_stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "D"


def _bytes_read_or_written(path: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
