"""Encodings, byte order marks, and bytes that are no text."""

import codecs
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from xdscale.errors import XdscaleError
from xdscale.shards.sources import decoding
from xdscale.shards.sources.corpus import stream_documents
from xdscale.shards.sources.decoding import BadBytes, decoded
from xdscale.shards.sources.streams import as_stream

LONG = "one two three four five naïve 中文"


def read(path, **options):
    found = list(stream_documents(path, **options))
    return "\n\n".join(document.text for document in found), sum(document.bad_bytes for document in found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "gb18030"])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_other_encodings(tmp_path, encoding, kind):
    """A byte order mark is enough; without one the encoding is named."""
    path = tmp_path / f"a.{kind}"
    content = LONG if kind == "txt" else json.dumps({"text": LONG}, ensure_ascii=False)
    path.write_bytes(content.encode(encoding))
    marked = encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    assert read(path, encoding="utf-8" if marked else encoding) == (LONG, 0)
    assert read(path, encoding="cp1252" if marked and encoding != "utf-8" else encoding) == (LONG, 0)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=60), size=st.integers(1, 9), encoding=st.sampled_from(["utf-8", "utf-16-le", "shift_jis"])
)
def test_any_bytes_in_any_pieces_are_what_the_codec_makes_of_them(data, size, encoding):
    """Replaced: as the codec replaces them at once. Refused: at the byte that it names."""
    expected = "utf-8-sig" if encoding == "utf-8" else encoding
    if decoding.encoding_of(data, encoding) not in (encoding, expected):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "PIECE_BYTES", size)
        patch.setattr(decoding, "_MARKS", {})
        bad = BadBytes(replace=True)
        pieces = as_stream(piece for piece in [data])
        assert "".join(decoded("a", pieces, encoding, bad)) == data.decode(encoding, "replace")
        try:
            data.decode(encoding)
        except UnicodeDecodeError as error:
            assert bad.take() > 0
            with pytest.raises(XdscaleError, match=rf"a: byte {error.start} "):
                list(decoded("a", as_stream(piece for piece in [data]), encoding, BadBytes(replace=False)))
        else:
            assert bad.take() == 0


@pytest.mark.parametrize("kind", ["txt", "jsonl", "xml", "parquet"])
def test_bad_bytes_are_named_or_replaced_and_counted(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    bad = b"one two three \xff\xfe four five\xe9"
    if kind == "parquet":
        offsets = pyarrow.array([0, len(bad)], pyarrow.int32()).buffers()[1]
        column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(bad)])
        parquet.write_table(pyarrow.table({"text": column}), path)
        where = r"a\.parquet: row 0: 'text': byte 14 \(0xff\) is not UTF-8"
    else:
        page = b"<mediawiki><page><ns>0</ns><revision><text>%s</text></revision></page></mediawiki>"
        path.write_bytes({"txt": b"%s", "jsonl": b'{"text": "%s"}\n', "xml": page}[kind] % bad)
        where = rf"a\.{kind}: byte \d+ \(0xff\) is not UTF-8; .*--encoding.*--bad-bytes replace"
    with pytest.raises(XdscaleError, match=where):
        read(path)
    text, count = read(path, replace_bad_bytes=True)
    assert text == bad.decode("utf-8", "replace")
    assert count == 3


def test_halves_of_surrogate_pairs_are_replaced_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\ud800 two \\ud83d\\ude00"}\n')
    assert read(path, replace_bad_bytes=True) == ("one \ufffd two 😀", 1)


def test_an_xml_dump_that_declares_another_encoding(tmp_path):
    page = f"<mediawiki><page><ns>0</ns><revision><text>{LONG[:29]}</text></revision></page></mediawiki>"
    path = tmp_path / "a.xml"
    path.write_bytes(f'<?xml version="1.0" encoding="ISO-8859-1"?>{page}'.encode("latin-1"))
    assert read(path) == (LONG[:29], 0)
    path.write_bytes(codecs.BOM_UTF8 + f'<?xml version="1.0" encoding="utf-8"?>{page}'.encode())
    assert read(path) == (LONG[:29], 0)
