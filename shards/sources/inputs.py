"""What the user names to corpus files: files, folders and patterns, in a fixed order, each with size and SHA-256."""

import fnmatch
import glob
import os
import re
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256
from xdscale.names import PACKAGE_PREFIX, expand_home, resolve_path
from xdscale.shards.manifest import InputFile

EXTENSIONS = (".txt", ".text", ".raw", ".tokens", ".json", ".jsonl", ".ndjson", ".xml", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".zst")

_PATTERN = re.compile(r"[*?\[]")
# Wikipedia names the pieces of a large dump after their pages: pages-articles1.xml-p1p41242.bz2.
# WikiExtractor's files have no extension: AA/wiki_00
_CORPUS_NAME = re.compile(
    rf"(.+({'|'.join(map(re.escape, EXTENSIONS))})(-p\d+p\d+)?|wiki_\d+)({'|'.join(map(re.escape, COMPRESSIONS))})?",
    re.IGNORECASE,
)
_DUMP_INDEX = "-multistream-index"


def find_inputs(names: list[str]) -> list[Path]:
    """Returns the corpus files that `names` stand for.

    A file is taken whatever it is called. Of a folder (with all below it, links to folders too) and of a pattern
    (`**` reaches below) every file that is not hidden is taken, sorted by path; there the extension must be a known
    one, so that nothing slips into a corpus that is no text.

    Args:
        names: paths, `package:NAME/inner/path`, or patterns of `*`, `?` and `[...]`.

    Raises:
        XdscaleError: nothing there, no file in a folder or for a pattern, an unknown extension, a file named twice, a
            link to nothing, a folder that cannot be read, a pipe or device.
    """
    if not names:
        raise XdscaleError("no input: name at least one corpus file, folder or pattern")
    files = [path for name in names for path in _files(str(name))]
    seen: set[Path] = set()
    for path in files:
        real = path.resolve()
        if real in seen:
            raise XdscaleError(f"{path}: named twice; its text would count twice")
        seen.add(real)
    return files


def describe_inputs(paths: list[Path]) -> list[InputFile]:
    """Returns what the manifest states of the files; reads them whole.

    Raises:
        XdscaleError: a file cannot be read.
    """
    described = []
    for path in paths:
        try:
            size, digest = path.stat().st_size, file_sha256(path)
        except OSError as error:
            raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None
        described.append(InputFile(name=path.name, bytes=size, sha256=digest))
    return described


def _files(name: str) -> list[Path]:
    plain = Path(expand_home(name))
    if _PATTERN.search(name) and not name.startswith(PACKAGE_PREFIX) and not plain.exists():
        return _corpus_files(_matching(plain), f"{name}: no file matches this pattern")
    if plain.is_symlink() and not plain.exists():
        raise _dangling(plain)
    path = resolve_path(name)
    if path.is_dir():
        return _corpus_files(_walk(path), f"{path}: the folder holds no files")
    if not path.is_file():
        raise XdscaleError(f"{path}: is a pipe or a device, but files are read several times; write it to a file first")
    return [path]


def _matching(pattern: Path) -> list[Path]:
    parts = pattern.parts
    if "**" not in parts:
        return [Path(path) for path in glob.glob(str(pattern))]
    first = parts.index("**")  # glob would follow links that lead in circles, again and again
    tops = [Path(path) for path in glob.glob(str(Path(*parts[:first])))]
    return [path for top in tops for path in _walk(top) if _matches(path.relative_to(top).parts, parts[first:])]


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**" and _matches(names, pattern[1:]):
        return True
    rest = pattern if pattern[0] == "**" else pattern[1:]
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], rest)


def _walk(top: Path) -> list[Path]:
    """Returns all that is in a folder and not hidden; links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise XdscaleError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: set[str] = set()
    waiting = [str(top)]  # links come after the folders themselves, whose paths so do not depend on them
    while waiting:
        for here, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(here)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for path in (os.path.join(here, name) for name in folders) if os.path.islink(path)]
            found += [Path(here, name) for name in names if not name.startswith(".")]
    return found


def _dangling(path: Path) -> XdscaleError:
    return XdscaleError(f"{path}: is a link to {os.readlink(path)}, which is not there; mend it or take it away")


def _corpus_files(found: list[Path], if_none: str) -> list[Path]:
    for path in found:
        if path.is_symlink() and not path.exists():
            raise _dangling(path)
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise XdscaleError(if_none)
    for path in files:
        if _DUMP_INDEX in path.name:
            raise XdscaleError(f"{path}: is the index of a dump, which is not needed; take it away or name the dump")
        if not _CORPUS_NAME.fullmatch(path.name):
            known = " ".join(EXTENSIONS)
            raise XdscaleError(
                f"{path}: unknown extension; expected {known}, or one of them with {' '.join(COMPRESSIONS)}; "
                "take it away, use a narrower pattern, or name the files one by one"
            )
    return files
