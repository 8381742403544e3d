"""Corpus files as streams of bytes: plain, gzip, bzip2 or zstandard, told apart by their first bytes.

A compressed file is one or more frames after another (bzip2 calls them streams). Wikipedia's multistream dumps have
one per 100 pages; they are found by their headers and decompressed by several threads, in order.
"""

import bz2
import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from xdscale.errors import XdscaleError

PIECE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20
"""Compressed bytes that a thread takes, at least; they end where a bzip2 stream ends."""
LARGEST_CHUNK_BYTES = 16 << 20
"""A bzip2 stream longer than this is read by one thread: it would have to be kept in memory whole."""
LARGEST_TEXT_BYTES = 256 << 20
"""The same limit after decompression."""
LARGEST_WINDOW_BYTES = 1 << 31
"""A zstandard file takes the memory of its window while it is read; `zstd --long=31`, the longest, 2 GiB."""

_BZIP2_HEADER = re.compile(rb"BZh[1-9]1AY&SY")
_ZSTANDARD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to be skipped
_COMPRESS = "compress the file with gzip, bzip2 or zstandard"
_NOT_READ = {
    b"\xfd7zXZ\0": ("xz", _COMPRESS),
    b"7z\xbc\xaf\x27\x1c": ("7-zip", "unpack it and name the folder"),
    b"PK\x03\x04": ("zip (so are .docx, .xlsx, .odt and .epub)", "unpack it, or take the document's text out first"),
    b"\x04\x22\x4d\x18": ("lz4", _COMPRESS),
    b"Rar!": ("rar", "unpack it and name the folder"),
}


@contextmanager
def open_stream(path: Path, threads: int = 1) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Opens a corpus file for reading from start to end, decompressed.

    Args:
        path: the file.
        threads: how many may decompress a bzip2 file of many streams; the bytes are the same.

    Yields:
        The stream, and a function that tells how many bytes of the file have been read.

    Raises:
        XdscaleError: a kind of compression that is not read, or damaged or truncated data, with the file's name.
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(6)
            raw.seek(0)
            for magic, (name, advice) in _NOT_READ.items():
                if head.startswith(magic):
                    raise XdscaleError(f"{path}: {name} is not read; {advice}")
            with closing(_decompressed(raw, head, threads)) as stream:
                yield stream, raw.tell
    except EOFError:
        raise XdscaleError(f"{path}: the compressed file is truncated; copy or download it again") from None
    except (zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise XdscaleError(f"{path}: cannot be read: {error.strerror}") from None
        raise XdscaleError(
            f"{path}: cannot be read: the compressed data is damaged, or something else follows it ({error}); copy or "
            "download it again, or take away what follows"
        ) from None


def _decompressed(raw: BinaryIO, head: bytes, threads: int) -> BinaryIO:
    if head.startswith(b"\x1f\x8b"):
        pieces = _frames(raw, lambda: zlib.decompressobj(wbits=31))
    elif head.startswith(b"BZh"):
        pieces = _frames(raw, bz2.BZ2Decompressor) if threads == 1 else _bzip2_in_threads(raw, threads)
    elif _ZSTANDARD.match(head):
        pieces = _zstandard(raw)
    else:
        return raw
    return as_stream(pieces)


def as_stream(pieces: Iterator[bytes]) -> BinaryIO:
    """Returns a stream of what an iterator yields."""
    return io.BufferedReader(_Pieces(pieces), PIECE_BYTES)


def _frames(raw: BinaryIO, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Yields the content of all frames.

    Unlike the standard library's files it does not stop silently at a damaged header between two of them. Zero bytes
    after a frame are padding, as tapes and block devices leave them.
    """
    data = raw.read(PIECE_BYTES)
    while data:
        frame = new_decompressor()
        while not frame.eof:
            if not data:
                raise EOFError
            yield frame.decompress(data)
            data = frame.unused_data or raw.read(PIECE_BYTES)
        while data and not (data := data.lstrip(b"\0")):
            data = raw.read(PIECE_BYTES)


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    import zstandard

    try:
        yield from _frames(raw, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES).decompressobj)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None


def _bzip2_in_threads(raw: BinaryIO, threads: int) -> Iterator[bytes]:
    """Yields what `_frames` would. What cannot be taken apart, for whatever reason, is left to `_frames`."""
    waiting: deque[tuple[int, Future[bytes | None]]] = deque()
    chunks = _bzip2_chunks(raw)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(waiting) <= threads and (found := next(chunks, None)):
                start, chunk = found
                waiting.append((start, pool.submit(_decompress_chunk, chunk)))
            if not waiting:
                return
            start, future = waiting.popleft()
            text = future.result()
            if text is None:
                break
            yield text
    raw.seek(start)
    yield from _frames(raw, bz2.BZ2Decompressor)


def _bzip2_chunks(raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) that seem to be whole streams: the next bytes, or the end of the file, look like it.

    What is too long for that comes as an empty chunk, the last one.
    """
    start, data, searched = 0, b"", 1
    while piece := raw.read(CHUNK_BYTES):
        data += piece
        headers = [match.start() for match in _BZIP2_HEADER.finditer(data, searched)]
        if headers:
            yield start, data[: headers[-1]]
            start, data = start + headers[-1], data[headers[-1] :]
        elif len(data) > LARGEST_CHUNK_BYTES:
            yield start, b""
            return
        searched = max(1, len(data) - 9)  # a header may lie across two reads
    if data:
        yield start, data


def _decompress_chunk(chunk: bytes) -> bytes | None:
    """Returns the text of whole bzip2 streams, or None if they are not that."""
    pieces, size = [], 0
    try:
        for piece in _frames(io.BytesIO(chunk), bz2.BZ2Decompressor):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_TEXT_BYTES:
                return None
    except (EOFError, OSError):
        return None
    return b"".join(pieces) if chunk else None


class _Pieces(io.RawIOBase):
    """A stream of what an iterator yields."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._rest = memoryview(b"")
        self._pieces.close()
        super().close()
