"""Names of files: plain paths, files inside installed packages, and URLs."""

import difflib
import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import shown

PACKAGE_PREFIX = "package:"

SCHEMES_IN_FILES = ("https", "http", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "file", "memory")
"""What a URL in a file may begin with: these read what they name, run no command and open no session elsewhere."""

NO_URL = "is a URL; name a file or folder on this machine, and copy from or to the other place"
"""Said of one where a path is expected: written to, it would become a folder called `s3:`."""


def expand_home(name: str) -> str:
    """Returns a name that a user gave with `~` or `~user` at its start replaced by the home folder.

    The shell does so only at the start of a word, not in `--out=~/x` or `data.shards=~/x`, and never in a file.

    Raises:
        XdscaleError: there is no such user, nor a file of that name; or the name is empty or holds a zero byte.
    """
    if not name:  # it would be the working folder
        raise XdscaleError("an empty name is given where a file or folder is expected; is a variable not set?")
    if "\0" in name:
        raise XdscaleError(f"{name!r}: no file or folder has a name with a zero byte")
    if not name.startswith("~") or Path(name).exists():
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError:
        raise XdscaleError(
            f"{name}: there is no user {name[1:].split('/')[0]!r}; write ./{name} for a file of that name"
        ) from None


def nearest(name: str, known: Sequence[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """Returns the question whether the nearest of the known names was meant, or `otherwise` where none is near.

    Args:
        name: what was given.
        known: what could have been.
        otherwise: what to say instead.
        cutoff: from 0 to 1, how near it must be.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else otherwise


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Returns what the message about an unknown key of a file ends with."""
    return nearest(key, known, f"known keys: {', '.join(known)}", cutoff=0.5)


def own_or_shipped(
    name: str, shipped: Sequence[Path], suffix: str, what: str, *, elsewhere: Sequence[Path] = (), use: str = ""
) -> Path:
    """Returns the file that a name stands for: a path, or the name of a file that ships, with or without its suffix.

    Args:
        name: as a user gave it; `~` is expanded.
        shipped: the files that ship.
        suffix: of their names.
        what: they are, for the message.
        elsewhere: files of another kind that ship, which might have been meant.
        use: what to say of the name where it is one of those.

    Raises:
        XdscaleError: there is neither (the nearest name that ships is given), or several ship under this name.
    """
    path = Path(expand_home(name))
    if os.path.isfile(path):  # unlike Path.is_file also where a name is too long
        return path
    wanted = path.name.removesuffix(suffix)
    names = {entry.name.removesuffix(suffix) for entry in shipped}
    if path.parent == Path() and wanted in names:
        found = [entry for entry in shipped if entry.name.removesuffix(suffix) == wanted]
        if len(found) > 1:
            raise XdscaleError(f"{name}: several ship under this name: {', '.join(map(str, found))}; give one's path")
        return found[0]
    if wanted in {entry.name.removesuffix(suffix) for entry in elsewhere}:
        raise XdscaleError(f"{name}: no such {what}; {use}")
    hint = nearest(wanted, sorted(names), f"those that ship are {', '.join(sorted(names))}")
    if os.path.isdir(path):
        inside = path / "recipe.yaml"
        hint = f"it is a folder{f'; of a run give {inside}' if inside.is_file() and suffix == '.yaml' else ''}"
    raise XdscaleError(f"{name}: no such {what}, neither a file nor the name of one that ships; {hint}")


class UserPath(Path):
    """The type of paths on the command line: gives a plain `Path`, with `~` expanded.

    Raises:
        XdscaleError: as `expand_home`, or it is a URL.
    """

    def __new__(cls, name: Any) -> Path:  # noqa: D102
        if "://" in str(name):
            raise XdscaleError(f"{name}: {NO_URL}")
        return Path(expand_home(str(name)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # typer asks through pydantic, which names of files do not need

        return core_schema.no_info_plain_validator_function(cls)


def is_url(name: str) -> bool:
    """Returns whether a name must be fetched: `scheme://…`, or webdataset's `pipe:COMMAND`."""
    return "://" in name or name.startswith("pipe:")


def check_stated_url(name: str, where: str, key: str) -> None:
    """Refuses a URL that a file states and that would do more than read: files come from anywhere.

    `pipe:COMMAND` runs a shell, other schemes log in elsewhere (`ssh://`), and chains (`a::b`) wrap one in another. A
    person may name them all on the command line.

    Args:
        name: what the file states; a path passes.
        where: the file, for the message.
        key: where it stands in the file.

    Raises:
        XdscaleError: the URL does not begin with one of `SCHEMES_IN_FILES`, or is a chain.
    """
    if not is_url(name) or (re.match(rf"(?:{'|'.join(SCHEMES_IN_FILES)})://", name) and "::" not in name):
        return
    what = "is a command" if name.startswith("pipe:") else "is a kind of URL"
    raise XdscaleError(
        f"{where}: {key} = {name!r} {what} that is followed only when typed, since a file may come from anywhere; a "
        f"file names a folder, or a URL that begins with one of {', '.join(SCHEMES_IN_FILES)}. If you trust it, add it "
        f"to the command line: {shlex.quote(f'{key}={name}')}"
    )


def resolve_path(name: str, *, base: Path | None = None) -> Path:
    """Returns the existing file or folder that `name` stands for.

    Args:
        name: a path (`~` is expanded), or `package:NAME/inner/path` for a file shipped in an installed
            package, not in one that it holds. The package is located, never imported, so none of its code runs.
        base: folder against which a relative path is tried when it does not exist in the working folder.

    Raises:
        XdscaleError: the package is not installed, or nothing exists under that name, or it may not be looked at.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _inside_package(name)
    path = Path(expand_home(name))
    try:
        if not path.exists() and base is not None and not path.is_absolute():
            path = base / path
        if not path.exists():
            raise XdscaleError(f"{name}: no such file or folder")
    except OSError as error:  # a name too long, or a folder that nobody may look into
        raise XdscaleError(f"{shown(name)}: cannot be read: {error.strerror or error}") from None
    return path


def shards_folder(name: str) -> Path:
    """Returns the local folder that a recipe's `data.shards` names.

    Raises:
        XdscaleError: nothing is there; says where it was looked for and how to make it.
    """
    try:
        return resolve_path(name)
    except XdscaleError as error:
        here = "" if name.startswith(PACKAGE_PREFIX) or Path(name).is_absolute() else f" in {Path.cwd()}"
        raise XdscaleError(
            f"data.shards = {error}{here}; make it with 'xdscale shards build INPUT... --out FOLDER' (for captions "
            "first 'xdscale regions', then 'xdscale shards captions'), or say where it is with data.shards=FOLDER"
        ) from None


def _inside_package(name: str) -> Path:
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier():  # finding `a.b` would import `a`
        raise XdscaleError(f"{name}: {package!r} is not the name of a package; expected package:NAME/inner/path")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise XdscaleError(
            f"{name}: the package {package!r} is not installed; install the demo's packages "
            "with 'pip install -e .[demo]' and scripts/demo-requirements.txt"
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise XdscaleError(f"{name}: {path} does not exist in the installed package {package!r}")
    return path
