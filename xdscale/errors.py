"""The one exception for mistakes that a user can mend."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path


class XdscaleError(Exception):
    """Bad input or configuration, with a message that names the file, the value and what to do.

    The command line prints it as one message and ends with `EXIT_BAD_INPUT`, without a traceback.
    """


EXIT_BAD_INPUT = 2
"""Exit code after an `XdscaleError`."""

EXIT_STOPPED = 75
"""Exit code after a signal: the last finished step was saved, the same command continues (EX_TEMPFAIL)."""

EXIT_FAULT = 70
"""Exit code of the ranks that end because one of them died, hung or failed; one line says which (EX_SOFTWARE)."""


def refusal(error: OSError) -> str:
    """Returns why the system did not let a file be written or read, in words, with the file where it is known."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        reason = "the disk is full (No space left on device)"
    elif error.errno == errno.EDQUOT:
        reason = "the disk quota is used up (Disk quota exceeded)"
    return f"{error.filename}: {reason}" if error.filename else reason


def free_mib(folder: Path) -> str:
    """Returns how much room there is where a folder lies, existing or not."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB"
    except OSError:
        return "an unknown number of MiB"


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Makes one message of what the system has against writing in a folder.

    Args:
        what: what is being written, for the message.
        folder: where.

    Raises:
        XdscaleError: names the file or folder, the reason, the room that is left and what to do.
    """
    try:
        yield
    except OSError as error:
        raise XdscaleError(
            f"cannot write {what} in {folder}: {refusal(error)}; {free_mib(folder)} are free there; make room or make "
            "it writable, then start the same command again, or choose another folder"
        ) from None
