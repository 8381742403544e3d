"""A file layer that fails at a chosen call, and ranks without processes, for what must survive.

`FaultyFiles` counts every call by which this process changes files below a folder: opening for writing, writing,
fsync, rename, unlink, mkdir, rmdir. At call number `at` it does one of

- `enospc`: half of a write is done, then the disk is full;
- `kill`: half of a write is done, then SIGKILL;
- `power`: SIGKILL, and of what was not forced to the disk, data is lost and the newest names are undone. How much is
  drawn from a seed: everything (seed 0), or any suffix of the names and any subset of the data.
"""

import errno
import io
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

_PATCHED = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


class FaultyFiles:
    """Patches the calls of this process; made for a forked child, so nothing is put back."""

    def __init__(self, root, at=None, fault="kill", seed=0):
        self.root, self.at, self.fault = Path(root), at, fault
        self.calls = []
        self._random = random.Random(seed) if seed else None
        self._real = {name: getattr(os, name) for name in _PATCHED}
        self._open = io.open
        self._lock = threading.RLock()
        self._unsynced_data = {}
        self._unsynced_names = []

    def install(self):
        io.open = self._opened
        __builtins__["open"] = self._opened
        for name in _PATCHED:
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def _point(self, call, partly=lambda: None):
        """Counts one call; at the chosen one does it partly and fails."""
        with self._lock:
            self.calls.append(call)
            if len(self.calls) - 1 != self.at:
                return
            partly()
            if self.fault == "enospc":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.fault == "power":
                self._cut_power()
            os.kill(os.getpid(), signal.SIGKILL)

    def _opened(self, path, mode="r", *arguments, **keywords):
        if not set(mode) & set("wax+") or not self._below(path):
            return self._open(path, mode, *arguments, **keywords)
        new = not os.path.exists(path)
        self._point(f"open {path}")
        file = self._open(path, mode, *arguments, **keywords)
        if new:
            self._named(path, "create", None, None)
        self._unsynced_data[os.fstat(file.fileno()).st_ino] = True
        return _File(file, self)

    def _fsync(self, descriptor):
        self._point(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        self._real["fsync"](descriptor)
        inode = os.fstat(descriptor).st_ino
        self._unsynced_data.pop(inode, None)
        self._unsynced_names = [entry for entry in self._unsynced_names if entry[0] != inode]

    def _rename(self, source, target):
        self._move("rename", source, target)

    def _replace(self, source, target):
        self._move("replace", source, target)

    def _move(self, call, source, target):
        self._point(f"{call} {source} {target}")
        before = Path(target).read_bytes() if os.path.isfile(target) else None
        self._real[call](source, target)
        self._named(target, "move", source, before)

    def _mkdir(self, path, mode=0o777):
        self._point(f"mkdir {path}")
        self._real["mkdir"](path, mode)
        self._named(path, "create", None, None)

    def _unlink(self, path, *, dir_fd=None):
        self._point(f"unlink {path}")
        self._real["unlink"](path, dir_fd=dir_fd)

    def _rmdir(self, path, *, dir_fd=None):
        self._point(f"rmdir {path}")
        self._real["rmdir"](path, dir_fd=dir_fd)

    def _below(self, path):
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(str(self.root))

    def _named(self, path, kind, source, before):
        """Remembers a new name, by its folder's descriptor: the folder itself may be renamed."""
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        entry = (os.fstat(folder).st_ino, kind, folder, os.path.basename(path))
        origin = (os.open(os.path.dirname(source), os.O_RDONLY), os.path.basename(source)) if source else None
        self._unsynced_names.append((*entry, origin, before))

    def _cut_power(self):
        names = self._unsynced_names[::-1]
        if self._random:
            names = names[: self._random.randint(0, len(names))]
        for _, kind, folder, name, origin, before in names:
            if kind == "move":
                self._real["rename"](name, origin[1], src_dir_fd=folder, dst_dir_fd=origin[0])
                if before is not None:
                    Path(f"/proc/self/fd/{folder}/{name}").write_bytes(before)
                continue
            path = f"/proc/self/fd/{folder}/{name}"
            if os.path.isdir(path):
                os.unlink, os.rmdir = self._real["unlink"], self._real["rmdir"]
                shutil.rmtree(path)
            elif os.path.exists(path):
                self._real["unlink"](path)
        for path in self.root.rglob("*"):
            lost = self._random is None or self._random.random() < 0.5
            if path.is_file() and path.stat().st_ino in self._unsynced_data and lost:
                os.truncate(path, 0)


class _File:
    """A file opened for writing whose writes count."""

    def __init__(self, file, layer):
        self._file, self._layer = file, layer

    def write(self, data):
        def partly():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._layer._point(f"write {self._file.name}", partly)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


class ThreadRanks:
    """Ranks that are threads of one process; when one fails, those that wait fail too, as under a launcher."""

    def __init__(self, rank, world_size, shared):
        self.rank, self.world_size, self.local_rank = rank, world_size, rank
        self._barrier, self._slots = shared

    @property
    def is_first(self):
        return self.rank == 0

    def barrier(self):
        self._barrier.wait()

    def gather(self, value):
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def sum(self, values):
        return sum(self.gather(values))

    def raise_first(self, problem, what):
        from xdscale.errors import XdscaleError

        for rank, text in enumerate(self.gather(problem)):
            if text is not None:
                raise XdscaleError(f"{what}: rank {rank}: {text}")


def run_ranks(action, world_size):
    """Runs `action(ranks)` on every rank; returns what each raised, None where nothing."""
    shared = (threading.Barrier(world_size), [None] * world_size)
    errors = [None] * world_size

    def run(rank):
        try:
            action(ThreadRanks(rank, world_size, shared))
        except Exception as error:
            errors[rank] = error
            time.sleep(0.1)  # the launcher takes a moment, and ranks that were told of the same error end by themselves
            shared[0].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
