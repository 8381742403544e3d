"""Compressed corpus files: what the standard library and zstandard compressed comes back, by any number of threads."""

import bz2
import gzip
import random
import re
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards.sources import streams
from xdscale.shards.sources.corpus import stream_documents
from xdscale.shards.sources.streams import open_stream

SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
"""A zstandard frame without content, as parallel compressors write them."""

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def content(path, threads=1):
    with open_stream(path, threads) as (stream, bytes_read):
        found = stream.read()
        assert bytes_read() <= path.stat().st_size
    return found


@pytest.fixture(scope="module")
def text():
    """300 KB that compress to about a third."""
    chance = random.Random(5)
    return " ".join(str(chance.randint(0, 10**6)) for _ in range(45_000)).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("frames", [1, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_frames_come_back_in_order(text, suffix, frames, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 13)
    path = tmp_path / f"a{suffix}"
    step = -(-len(text) // frames)
    pieces = [COMPRESS[suffix](text[first : first + step]) for first in range(0, len(text), step)]
    path.write_bytes(b"".join(pieces))
    assert content(path, threads) == text
    monkeypatch.undo()
    assert content(path, threads) == text
    if suffix == ".zst":
        path.write_bytes(SKIPPED + SKIPPED.join(pieces))
        assert content(path, threads) == text


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("zeros", [1, 512, 300_000])
def test_zero_bytes_after_a_frame_are_padding(text, suffix, threads, zeros, tmp_path, monkeypatch):
    """As `gzip -t` takes them, whatever reads they fall into."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 13)
    path = tmp_path / f"a{suffix}"
    path.write_bytes((COMPRESS[suffix](text) + bytes(zeros)) * 2)
    assert content(path, threads) == text * 2


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstandard_with_a_long_window(text, window, tmp_path):
    """What `zstd --long=31` writes says in its header that it needs a window of 2 GiB."""
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=window, enable_ldm=False, hash_log=6)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()  # no size: the window is declared
    path = tmp_path / "a.zst"
    path.write_bytes(stream.compress(text[:1000]) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window
    assert content(path) == text[:1000]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bzip2_by_threads_is_what_the_standard_library_reads(data, tmp_path_factory):
    """Streams of any sizes, with empty ones, and text that itself looks like the header of a stream."""
    part = st.one_of(st.binary(max_size=200), st.just(b"BZh91AY&SY" * 30), st.just(bz2.compress(b"inner" * 99)))
    parts = data.draw(st.lists(part, min_size=1, max_size=12))
    path = tmp_path_factory.mktemp("bz2") / "a.bz2"
    path.write_bytes(b"".join(bz2.compress(item, data.draw(st.integers(1, 9))) for item in parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK_BYTES", data.draw(st.integers(8, 300)))
        patch.setattr(streams, "LARGEST_CHUNK_BYTES", data.draw(st.integers(40, 4000)))
        patch.setattr(streams, "LARGEST_TEXT_BYTES", data.draw(st.integers(40, 4000)))
        assert content(path, data.draw(st.integers(2, 4))) == bz2.decompress(path.read_bytes()) == b"".join(parts)


def test_a_header_inside_a_stream_does_not_cut_it(text, tmp_path, monkeypatch):
    """Compressed data can spell a header by chance; here "headers" are so short that it does all the time."""
    monkeypatch.setattr(streams, "_BZIP2_HEADER", re.compile(rb"[\x00-\x0f]{2}"))
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 12)
    path = tmp_path / "a.bz2"
    path.write_bytes(bz2.compress(text[:100_000]) + bz2.compress(text[100_000:]))
    assert content(path, 3) == text


def test_documents_of_a_multistream_dump_are_the_same(wiki_dump, tmp_path, monkeypatch):
    """The real dump, cut to streams as Wikipedia's are."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 16)
    whole = bz2.decompress(wiki_dump.read_bytes())
    step = 200_000
    path = tmp_path / "multistream.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(whole[first : first + step]) for first in range(0, len(whole), step)))
    expected = [document.text for document in stream_documents(wiki_dump)]
    for threads in (1, 2, 5):
        found = list(stream_documents(path, threads=threads))
        assert [document.text for document in found] == expected
        read = [document.bytes_read for document in found]
        assert read == sorted(read)
        assert 0 < read[-1] <= path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("threads", [1, 3])
def test_damage_is_named(text, suffix, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 13)
    pieces = [COMPRESS[suffix](text[first : first + 50_000]) for first in range(0, len(text), 50_000)]
    path = tmp_path / f"a{suffix}"
    for damaged, message in (
        (b"".join(pieces)[:-7], "the compressed file is truncated"),
        (b"".join(pieces) + b"rubbish", "cannot be read: the compressed data is damaged, or something else follows it"),
        # The standard library's bz2.open ends here without a word.
        (b"".join([*pieces[:3], b"\0" + pieces[3][1:], *pieces[4:]]), "cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(XdscaleError, match=rf"a{suffix}: {message}"):
            content(path, threads)


@pytest.mark.parametrize(
    ("magic", "message"),
    [
        (b"\xfd7zXZ\0", "xz is not read; compress the file with gzip"),
        (b"7z\xbc\xaf\x27\x1c", "7-zip is not read; unpack it"),
        (b"PK\3\4", r"zip \(so are \.docx.*\) is not read; unpack it, or take"),
    ],
)
def test_other_compressions_are_refused_by_name(magic, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(magic + b"rest")
    with pytest.raises(XdscaleError, match=rf"a\.txt: {message}"):
        content(path)


def test_memory_does_not_grow_with_a_multistream_file(tmp_path, monkeypatch):
    """1 and 8 MB of streams of 64 KB: the same few chunks are there at a time."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1 << 16)
    stream = bz2.compress(random.Random(6).randbytes(1 << 16))  # does not compress: text and file are as long
    peaks = []
    for count in (16, 128):
        path = tmp_path / f"{count}.bz2"
        path.write_bytes(stream * count)
        tracemalloc.start()
        with open_stream(path, 2) as (file, _):
            size = 0
            while piece := file.read(1 << 14):
                size += len(piece)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size == count << 16
    assert peaks[1] < 1.1 * peaks[0]
