"""What the user names to corpus files: files, folders and patterns, in a fixed order, each with size and SHA-256."""

import glob
import re
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.names import PACKAGE_PREFIX, resolve_path
from xdscale.shards.manifest import InputFile
from xdscale.shards.verify import file_sha256

EXTENSIONS = (".txt", ".text", ".raw", ".tokens", ".json", ".jsonl", ".ndjson", ".xml", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".zst")

_PATTERN = re.compile(r"[*?\[]")
# Wikipedia names the pieces of a large dump after their pages: pages-articles1.xml-p1p41242.bz2
_CORPUS_NAME = re.compile(
    rf".+({'|'.join(map(re.escape, EXTENSIONS))})(-p\d+p\d+)?({'|'.join(map(re.escape, COMPRESSIONS))})?", re.IGNORECASE
)
_DUMP_INDEX = "-multistream-index"


def find_inputs(names: list[str]) -> list[Path]:
    """Returns the corpus files that `names` stand for.

    A file is taken whatever it is called. Of a folder (with all below it) and of a pattern (`**` reaches below)
    every file that is not hidden is taken, sorted by path; there the extension must be a known one, so that
    nothing slips into a corpus that is no text.

    Args:
        names: paths, `package:NAME/inner/path`, or patterns of `*`, `?` and `[...]`.

    Raises:
        XdscaleError: nothing there, no file in a folder or for a pattern, an unknown extension, a file named twice.
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
    plain = Path(name).expanduser()
    if _PATTERN.search(name) and not name.startswith(PACKAGE_PREFIX) and not plain.exists():
        found = [Path(path) for path in glob.glob(str(plain), recursive=True)]
        return _corpus_files(found, f"{name}: no file matches this pattern")
    path = resolve_path(name)
    if path.is_dir():
        visible = [item for item in path.rglob("*") if not any(p.startswith(".") for p in item.relative_to(path).parts)]
        return _corpus_files(visible, f"{path}: the folder holds no files")
    return [path]


def _corpus_files(found: list[Path], if_none: str) -> list[Path]:
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
