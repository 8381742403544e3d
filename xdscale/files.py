"""Files that a command was asked to write: all of them whole, or none, and one message when that cannot be."""

import os
from collections.abc import Mapping
from pathlib import Path

from xdscale.errors import XdscaleError


def write_outputs(texts: Mapping[Path, str]) -> None:
    """Writes text files, and the folders that they lie in.

    A file is written aside first, so that what stood there stays until everything is written; a link is followed. What
    is no file, such as /dev/stdout, is written as it is.

    Raises:
        XdscaleError: one of them cannot be written; then none is, and no folder is left.
    """
    asides: dict[Path, Path] = {}
    folders: list[Path] = []
    path = Path()
    try:
        for path, text in texts.items():
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            if path.exists() and not path.is_file():
                path.write_text(text, encoding="utf-8")
                continue
            target = path.resolve()
            folders += [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.partial")
            asides[aside] = target
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for aside, target in asides.items():
            aside.replace(target)
    except (OSError, RuntimeError) as error:  # before Python 3.13 a circle of links is a RuntimeError
        _undo([*asides], folders)
        reason = getattr(error, "strerror", None) or error
        raise XdscaleError(f"{path}: cannot be written: {reason}; make room or choose another place") from None
    except BaseException:
        _undo([*asides], folders)
        raise


def _undo(asides: list[Path], folders: list[Path]) -> None:
    for aside in asides:
        aside.unlink(missing_ok=True)
    for folder in sorted(set(folders), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
