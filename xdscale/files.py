"""Files: JSON read with messages; outputs tried before the work and written whole or not at all; modes by the umask."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from xdscale.errors import XdscaleError, writing

_LONGEST_REASON = 400
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST_REASON
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 3, 8, 8, 8
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SPECIAL = "a pipe or a device, which may never end"
_NO_TEXT = {
    b"\x1f\x8b": "packed (gzip)",
    b"BZh": "packed (bzip2)",
    b"\x28\xb5\x2f\xfd": "packed (zstd)",
    b"\xfd7zXZ": "packed (xz)",
    b"PK\x03\x04": "packed (zip)",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What the first bytes of files tell that are given where a text is read."""


@contextlib.contextmanager
def replaced_when_complete(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write that becomes `path` only if the block ends without an exception.

    The content is on the disk before the name appears (fsync, then rename, then fsync of the folder), so a
    machine that loses power leaves either the whole new file or none of it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text as UTF-8, so that no reader ever sees half of it.

    Raises:
        XdscaleError: the folder does not take the file.
    """
    with writing(path.name, path.parent), replaced_when_complete(path) as stream:
        stream.write(text.encode("utf-8"))


DISKS_OWN = "lost+found"
"""What the root folder of a disk holds though it is empty."""


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


def sync(path: Path) -> None:
    """Forces a file's bytes, or the names in a folder, to the disk; only the machine that wrote them can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file, read in constant memory.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    if _is_special(path):
        raise OSError(errno.EINVAL, f"is {_SPECIAL}")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lock(file: IO, operation: int) -> str | None:
    """Locks an open file until it is closed.

    Args:
        file: the file.
        operation: as `fcntl.flock` takes it.

    Returns:
        Why there are no locks, where the file system has none; else None.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(errno.EWOULDBLOCK, error.strerror) from None
        return error.strerror
    return None


def follow_umask(path: Path) -> None:
    """Gives a file the mode that `open` would have given it; safetensors writes files for their owner alone."""
    mask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        XdscaleError: unreadable, not JSON, or not an object.
    """
    require_real_file(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise XdscaleError(f"{path}: not a readable JSON file: {no_text(path) or one_line(error)}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@contextlib.contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a text in UTF-8, less a byte order mark, to be read in the block; `newline` as in `open`.

    Raises:
        XdscaleError: it cannot be read, is no file, or no UTF-8.
    """
    require_real_file(path)
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise XdscaleError(f"{path}: not UTF-8 text: {no_text(path) or error}") from None
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None


def no_text(path: Path) -> str | None:
    """Returns what a file is that cannot be read as text, and what to do, if its first bytes tell."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return None
    found = next((what for magic, what in _NO_TEXT.items() if start.startswith(magic)), None)
    if found is None:
        return None
    return f"it is {found}; {'save it as UTF-8' if found == 'UTF-16' else 'unpack it, and name what comes out'}"


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file.

    Raises:
        XdscaleError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None


def require_real_file(path: Path) -> None:
    """Refuses what stands in a file's place: a pipe or a device, or the few lines that a clone without Git LFS has.

    What is not there, and a folder, pass: whoever reads the file says so in words of its own.

    Raises:
        XdscaleError: says what it is, and what to do.
    """
    try:
        if _is_special(path):
            raise XdscaleError(f"{path}: is {_SPECIAL}; expected a file: put it there, or take this away")
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError:
        return
    if start == _LFS_POINTER:
        raise XdscaleError(
            f"{path}: this is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull' in {path.parent}"
        )


def shown(value: object) -> str:
    """Returns a value as Python writes it, on one line of bearable length: a little YAML may stand for very much."""
    try:
        return _REPR.repr(value).replace("\n", " ")
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a number too long to be shown ({type(value).__name__})"


def count_of(number: int, what: str) -> str:
    """Returns a number of things, "1 seed" or "2 seeds"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def csv_text(head: Sequence[object], rows: Iterable[Sequence[object]], delimiter: str = ",") -> str:
    """Returns CSV, or TSV, with a line of names of columns."""
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([head, *rows])
    return file.getvalue()


def is_text(name: str) -> bool:
    """Returns whether a name can be written as UTF-8; JSON and names of files may hold halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(error: Exception) -> str:
    """Returns an error's text on one line of bearable length; its kind where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " …"
