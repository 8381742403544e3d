"""Shards behind a URL: fetched once into a local folder, and never used before their SHA-256 is right.

Whatever fsspec opens (s3://, gs://, https://, memory://, … with the package that each needs), and what webdataset
opens where fsspec does not (`pipe:COMMAND`, https:// through curl). Which of these a file may name is decided where
files are read: `xdscale.names.check_stated_url`. Here a URL is only ever one argument of a program, except in what a
person typed after `pipe:`, to which a checked file name is appended. A global shuffle touches all shards in the first
minutes, so all are fetched before the first step, unless they are more than the disk holds: see `xdscale.shards.cache`.
"""

import fcntl
import hashlib
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, lock, one_line
from xdscale.shards.manifest import MANIFEST_NAME, ShardRecord

PAUSES_SECONDS = (1.0, 4.0)
"""Between attempts: one more attempt than pauses."""

_OF_CURL = {
    "6": "no machine of that name is known",
    "7": "nothing answers there",
    "22": "the server has no such file, or does not give it to us",
    "28": "the server took too long",
    "35": "the server and this machine agree on no encryption",
    "60": "the server's certificate is not trusted here",
}

AT_ONCE = 4
"""Shards that one process fetches at a time: what a round trip takes is then not waited for."""


def fetch_manifest(url: str) -> str:
    """Returns the text of `dataset.json` under a URL.

    Raises:
        XdscaleError: it cannot be fetched.
    """
    address = address_of(url, MANIFEST_NAME)
    last = None
    for pause in (*PAUSES_SECONDS, None):
        try:
            with _opened(address) as stream:
                return stream.read().decode("utf-8")
        except Exception as error:  # each protocol's package raises its own kinds
            last = error
            time.sleep(pause or 0)
    raise _unfetched(address, last)


def place_manifest(text: str, cache: Path) -> Path:
    """Writes a fetched `dataset.json` into its own folder of the cache and returns that folder.

    Raises:
        XdscaleError: the cache cannot be written.
    """
    folder = cache_folder(text, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{MANIFEST_NAME}.partial") as aside:
            aside.write_text(text, encoding="utf-8")
            aside.replace(folder / MANIFEST_NAME)
    except OSError as error:
        raise XdscaleError(f"run.cache = {cache}: cannot be written: {error.strerror or error}") from None
    return folder


def cache_folder(text: str, cache: Path) -> Path:
    """Returns the folder of a cache that is the dataset's whose `dataset.json` has this text.

    It is named by the text's hash: a dataset that changes behind its URL gets another one.
    """
    return cache / hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def fetch_shards(
    url: str,
    folder: Path,
    records: list[ShardRecord],
    *,
    verify: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Fetches the shards that a folder lacks; several processes may do so at the same time.

    A shard gets its name when its SHA-256 is right, so one that has its name and size was right when it was fetched.

    Args:
        url: of the dataset.
        folder: returned by `place_manifest`.
        records: the shards wanted.
        verify: read again what the folder has, and replace what has been damaged since.
        on_progress: called after each shard with (bytes present, bytes wanted).

    Returns:
        What is wrong with each shard that is missing or damaged at its source, by file name.

    Raises:
        XdscaleError: a shard cannot be fetched for another reason; names the URL.
    """
    problems: dict[str, str] = {}
    done, total = 0, sum(record.bytes for record in records)

    def fetch(record: ShardRecord) -> str | None:
        try:
            return _fetch(address_of(url, record.file), folder / record.file, record, verify)
        except OSError as error:  # not the source's, which _fetch has told of
            raise XdscaleError(f"run.cache: {folder}: cannot be written: {error.strerror or error}") from None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        fetched = pool.map(fetch, records)
        for record, problem in zip(records, fetched):
            if problem is not None:
                problems[record.file] = problem
            done += record.bytes
            if on_progress is not None:
                on_progress(done, total)
    return problems


def _fetch(address: str, path: Path, record: ShardRecord, verify: bool) -> str | None:
    """Returns what is wrong with the source, or None once the shard is in place."""
    if is_sound(path, record, verify=verify):
        return None
    with _locked(path.with_name(f".{path.name}.partial")) as aside:
        try:
            if is_sound(path, record, verify=verify):  # another process was quicker
                return None
            problem = download(address, aside, record)
            if problem is None:
                aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return problem


def download(
    address: str, aside: Path, record: ShardRecord, *, on_arrival: Callable[[], None] = lambda: None
) -> str | None:
    """Fetches a shard into a file and compares its SHA-256; what arrives damaged is fetched again.

    Args:
        address: its URL.
        aside: the file.
        record: what it is to be.
        on_arrival: called with every MiB that has come.

    Returns:
        What is wrong with the source, where the shard is missing there or arrives damaged at every attempt.

    Raises:
        XdscaleError: it cannot be fetched for another reason; names the address.
        OSError: the file cannot be written.
    """
    for pause in (*PAUSES_SECONDS, None):
        problem, failure = _attempt(address, aside, record, on_arrival)
        if problem is None and failure is None:
            return None
        time.sleep(pause or 0)
    if failure is not None:
        raise _unfetched(address, failure)
    return problem


def _attempt(
    address: str, aside: Path, record: ShardRecord, on_arrival: Callable[[], None]
) -> tuple[str | None, Exception | None]:
    """Fetches once; returns what is wrong with the shard at its source, and why it could not be fetched."""
    try:
        with _opened(address) as source, aside.open("wb") as target:
            while part := source.read(1 << 20):
                target.write(part)
                on_arrival()
            target.flush()
            os.fsync(target.fileno())
    except FileNotFoundError:
        return f"{address}: missing", None
    except Exception as error:  # each protocol's package raises its own kinds
        return None, error
    return _difference(address, aside, record), None


def is_sound(path: Path, record: ShardRecord, *, verify: bool) -> bool:
    """Tells whether a shard is there in its size, and with `verify` whether its SHA-256 is right."""
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return not verify or file_sha256(path) == record.sha256


def _difference(address: str, aside: Path, record: ShardRecord) -> str | None:
    found_bytes, found = aside.stat().st_size, file_sha256(aside)
    if found == record.sha256:
        return None
    return (
        f"{address}: altered: expected {record.bytes} bytes of sha256 {record.sha256}, "
        f"found {found_bytes} bytes of {found}"
    )


def _unfetched(address: str, error: Exception | None) -> XdscaleError:
    program = re.search(r"\['curl', .*: exit (\d+) \(", text := one_line(error))  # as webdataset says it
    if program:
        reason = _OF_CURL.get(program[1], "it did not come")
        text = f"{reason} (curl ended with {program[1]}); is the address right, and reached from this machine?"
    return XdscaleError(f"{address}: cannot be fetched after {len(PAUSES_SECONDS) + 1} attempts: {text}")


def address_of(url: str, name: str) -> str:
    """Returns the URL of a file of the dataset at `url`."""
    return f"{url.rstrip('/')}/{name}"


@contextmanager
def _opened(address: str) -> Iterator:
    """Opens what an address names for reading."""
    import fsspec

    try:
        if address.startswith("pipe:"):
            raise ValueError(address)
        filesystem, path = fsspec.url_to_fs(address)
    except (ImportError, ValueError):  # a protocol that fsspec, as installed, does not know
        from webdataset.gopen import gopen

        with gopen(address) as stream:
            yield stream
        return
    with filesystem.open(path, "rb") as stream:
        yield stream


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Gives a file to write that is this process's alone until the block ends, also among nodes that share a disk.

    Whoever waited for it may find that the file was renamed or removed meanwhile, and takes a new one then. Where the
    file system has no locks, each thread writes a file of its own.
    """
    while True:
        with path.open("ab") as stream:
            if lock(stream, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
                yield path.with_name(f"{path.name}-{platform.node()}-{os.getpid()}-{threading.get_native_id()}")
                return
            try:
                current = path.stat().st_ino == os.fstat(stream.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield path
                return
