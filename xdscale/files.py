"""Files that a command was asked to write: tried before the work; all of them whole, or none; one message if not."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from xdscale.errors import XdscaleError


def check_output_file(path: Path) -> None:
    """Refuses a file that could not be written, by trying; leaves nothing.

    Raises:
        XdscaleError: it is a folder or read-only, its folder does not exist, or nothing can be written there.
    """
    with _named(path):
        target = _target(path)
        if target.is_dir():
            raise XdscaleError(f"{path}: is a folder; expected the name of a file")
        if target.exists() and not os.access(target, os.W_OK):
            raise XdscaleError(f"{path}: is read-only; choose another name, or make it writable")
        if not target.parent.is_dir():
            raise XdscaleError(f"{path}: the folder {target.parent} does not exist")
        if not _is_special(target):
            _try(_aside(target))


def check_output_folder(path: Path, option: str) -> None:
    """Refuses a folder that could not be written or made, by trying; leaves nothing.

    Args:
        path: may be missing, and its parents too.
        option: of the command line, for the message.

    Raises:
        XdscaleError: it is no folder, or nothing can be written there.
    """
    with _named(path):
        if os.path.lexists(path) and not path.is_dir():
            raise XdscaleError(f"{option} {path}: exists and is not a folder; choose another one")
        there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not there.is_dir():
            raise XdscaleError(f"{option} {path}: {there} is not a folder")
        _try(there / ".xdscale.partial")


def write_outputs(contents: Mapping[Path, str | bytes]) -> None:
    """Writes files, texts as UTF-8, and the folders that they lie in.

    Each is written aside and synced first, so that what stood there stays until everything is written. A link is
    followed; what is no file, such as /dev/stdout, is written as it is.

    Raises:
        XdscaleError: one of them cannot be written; then none is, and no folder is left.
    """
    made: list[Path] = []
    asides: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            with _named(path):
                data = content.encode() if isinstance(content, str) else content
                target = _target(path)
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "it is a folder")
                for folder in reversed([parent for parent in target.parents if not parent.exists()]):
                    folder.mkdir()
                    made.append(folder)
                if _is_special(target):
                    target.write_bytes(data)
                    continue
                asides[_aside(target)] = target
                with _aside(target).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for aside, target in asides.items():
            with _named(target):
                aside.replace(target)
    except BaseException:
        undo = [aside.unlink for aside in asides] + [folder.rmdir for folder in reversed(made)]
        for remove in undo:
            with contextlib.suppress(OSError):  # it was not made, or somebody else put something there
                remove()
        raise


def _target(path: Path) -> Path:
    """Returns the file that is to be replaced: a link leads to it."""
    if _is_special(path):
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _try(path: Path) -> None:
    path.write_bytes(b"")
    path.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise XdscaleError(
            f"{path}: cannot be written: {error.strerror or error}; make room or choose another place"
        ) from None
