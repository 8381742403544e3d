"""A file layer in which one operation goes wrong: the disk is full from there on, or the process is killed there.

Operations on files below one folder are counted: opening for writing, each write that reaches the system, fsync,
rename, unlink, mkdir and rmdir. A write is torn: half of its bytes arrive.
"""

import errno
import io
import multiprocessing
import os
import signal
from contextlib import contextmanager
from unittest import mock

NEEDS_SPACE = ("open", "write", "fsync", "rename", "mkdir")


class Layer:
    """Counts operations below `root`; at number `at` calls `fault` with the kind of operation.

    A fault that returns lets the operation happen; one that raises is raised again at all later operations that
    need space, as on a disk that stays full.
    """

    def __init__(self, root, at=None, fault=None):
        self.root = str(root)
        self.at = at
        self.fault = fault
        self.kinds = []
        self.full = None

    def operation(self, kind, tear=None):
        self.kinds.append(kind)
        if self.full is not None and kind in NEEDS_SPACE:
            raise self.full
        if len(self.kinds) == self.at:
            if tear is not None:
                tear()
            try:
                self.fault(kind)
            except OSError as error:
                self.full = error
                raise

    @contextmanager
    def installed(self):
        """Puts the layer between Python and the system."""
        with mock.patch.multiple(
            os,
            fsync=self._wrapped("fsync", os.fsync),
            replace=self._wrapped("rename", os.replace),
            unlink=self._wrapped("unlink", os.unlink),
            mkdir=self._wrapped("mkdir", os.mkdir),
            rmdir=self._wrapped("rmdir", os.rmdir),
        ):
            with mock.patch.object(io, "open", self._open(io.open)):
                yield self

    def _wrapped(self, kind, real):
        def call(target, *arguments, **options):
            # Numbers are open files, names without a folder those that rmtree takes from an open folder.
            if isinstance(target, int) or not os.path.isabs(target) or str(target).startswith(self.root):
                self.operation(kind)
            return real(target, *arguments, **options)

        return call

    def _open(self, real):
        def call(path, mode="r", *arguments, **options):
            if mode not in ("w", "wb") or not str(path).startswith(self.root):
                return real(path, mode, *arguments, **options)
            self.operation("open")
            if mode == "w":  # the lock, which nothing is written to
                return real(path, mode, *arguments, **options)
            return io.BufferedWriter(_TornFile(path, self))

        return call


class _TornFile(io.FileIO):
    def __init__(self, path, layer):
        super().__init__(path, "wb")
        self._layer = layer

    def write(self, data):
        self._layer.operation("write", lambda: io.FileIO.write(self, memoryview(data)[: len(data) // 2]))
        return super().write(data)


def count_operations(root, action):
    """Returns the kinds of all operations of `action`, in order."""
    with Layer(root).installed() as layer:
        action()
    return layer.kinds


def disk_full(kind):
    """A fault for `run_with`: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run_with(root, at, fault, action):
    """Runs `action` here while operation number `at` goes wrong."""
    with Layer(root, at, fault).installed():
        action()


def run_killed(root, at, action):
    """Runs `action` in a child that is killed at operation number `at`; tells whether it got there."""

    def killed(kind):
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run_with, args=(root, at, killed, action))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == -signal.SIGKILL


def killed_at(number, action):
    """Runs an action in a child that ends, as if killed, at its `number`-th fsync; tells whether it was killed."""
    real, calls = os.fsync, 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == number:
            os._exit(9)
        real(descriptor)

    def child():
        os.fsync = fsync
        action()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, 9)
    return process.exitcode == 9
