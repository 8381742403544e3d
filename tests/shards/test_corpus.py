"""Each corpus format against small files written by hand, and the real dump."""

import bz2
import json
import time
import tracemalloc

import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.sources import corpus
from xdscale.shards.sources.corpus import paragraphs, read_documents, stream_documents

LONG = "one two three four five"


def documents(path, **options):
    return [document.text for document in stream_documents(path, **options)]


def page(title, text, namespace=0, extra=""):
    return f"<page><title>{title}</title><ns>{namespace}</ns>{extra}<revision><text>{text}</text></revision></page>"


def dump(*pages):
    return '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">' + "".join(pages) + "</mediawiki>"


def test_plain_text_documents_stand_between_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbffirst line\r\nsecond\n\n \n\nnext document\n")
    assert documents(path) == ["first line\nsecond", "next document"]


def test_wikitext_documents_start_at_level_one_headings_only(tmp_path):
    path = tmp_path / "wiki.train.raw"
    path.write_text(
        f" \n = Robert Boulter = \n \n {LONG} . \n \n = = Career = = \n \n {LONG} !\n = Du Fu = \n {LONG} \n"
    )
    found = list(read_documents(path))
    assert found == [[f"{LONG} .", f"{LONG} !"], [LONG]]
    # As plain text the same file falls apart at every blank line.
    assert len(documents(path, format="text")) == 4


def test_jsonl_each_line_is_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": f"{LONG}\n{LONG} six"}) + "\n\n" + json.dumps({"text": "b", "body": "c"}) + "\n"
    )
    assert documents(path) == [f"{LONG}\n{LONG} six", "b"]
    with pytest.raises(XdscaleError, match=r"a\.jsonl:1: no field 'body' \(found: text\)"):
        documents(path, text_field="body")


@pytest.mark.parametrize("compressed", [False, True])
def test_mediawiki_keeps_articles_and_drops_markup(tmp_path, compressed):
    text = (
        "'''Bold''' and ''italic'' [[River|rivers]] run {{citation needed}} to the sea.\n"
        "== A heading of five words here ==\n"
        "*: A list item with [[many words]] in it\n"
        "too few words\n"
    )
    content = dump(
        page("A", text),
        page("Talk:A", LONG, namespace=1),
        page("B", "#REDIRECT [[A]]", extra='<redirect title="A" />'),
        page("C", LONG),
    ).encode()
    path = tmp_path / ("dump.bz2" if compressed else "dump")
    path.write_bytes(bz2.compress(content) if compressed else content)
    found = list(read_documents(path))
    assert found == [
        ["Bold and italic rivers run  to the sea.", "A list item with many words in it"],
        [LONG],
    ]


def test_real_dump_has_106_articles(wiki_dump):
    """real-data.md §4: 206 pages, 100 redirects, 106 articles."""
    found = list(stream_documents(wiki_dump))
    assert len(found) == 106
    assert {document.format for document in found} == {"mediawiki"}
    assert found[-1].bytes_read <= wiki_dump.stat().st_size
    first = paragraphs(found[0].text, "mediawiki", 5)
    assert first[0].startswith("Anarchism is a political philosophy that advocates self-governed")
    assert not any("''" in line or line.startswith(("=", "*", "#", ":", ";")) for line in first)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (LONG, True),
        ("one two three four", False),
        ("  one\ttwo three four five  ", True),
        (" = A heading of many words = ", False),
        ("= = Sub heading of words = =", False),
        ("2 + 2 = 4 is true =", True),
        ("", False),
    ],
)
def test_paragraph_filter(line, kept):
    """Spec xdbert §4: no empty lines, headings, or lines with fewer than 5 words."""
    assert paragraphs(line, "text", 5) == ([line.strip()] if kept else [])


def test_min_words_of_zero_still_drops_empty_lines():
    assert paragraphs("a\n\n  \nb c", "text", 0) == ["a", "b c"]


def write_and_read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content)
    return documents(path, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"good line\nbad \xe9 byte\n",
            r"a\.txt: byte 14 \(0xe9\) is not UTF-8; .*--encoding.*--bad-bytes replace",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("b.jsonl", b'{"text": "a"}\n[1]\n', r"b\.jsonl:2: expected an object with a field 'text', found a list"),
        ("c.jsonl", b'{"text": 3}\n', r"c\.jsonl:1: 'text' is a number, expected a string"),
        ("c.jsonl", b'{"text": null}\n', r"c\.jsonl:1: 'text' is null, .* jq -c 'select\(\.text != null\)' c\.jsonl >"),
        ("d.jsonl", b'{"text": "\\ud800"}\n', r"d\.jsonl:1: 'text' holds half of a surrogate pair"),
        (
            "a.xml",
            dump(page("A", LONG)).encode()[:-9],
            r"a\.xml: truncated XML: it ends after 1 whole page, .*'A'; copy",
        ),
        ("b.xml", b"<mediawiki><page></mediawiki>", r"b\.xml: malformed XML after 0 whole pages: mismatched tag"),
        ("a.bz2", bz2.compress(dump(page("A", LONG)).encode())[:-8], r"a\.bz2: the compressed file is truncated"),
        ("b.bz2", b"BZh9" + b"\0" * 40, r"b\.bz2: cannot be read: .* damaged.*Invalid data stream.*; copy"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    with pytest.raises(XdscaleError, match=message):
        write_and_read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"in fact text\n", r"a\.json: is named like jsonl, but begins b'in fact.*--format text"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"a\.parquet: is a pointer that Git LFS left.*git lfs pull$",
        ),
        ("a.xml-p1p9.bz2", bz2.compress(b'{"text": "a"}'), r"a\.xml-p1p9\.bz2: is named like mediawiki.*format jsonl"),
    ],
)
def test_content_that_its_name_denies_is_refused(tmp_path, name, content, message):
    with pytest.raises(XdscaleError, match=message):
        write_and_read(tmp_path, name, content)
    assert write_and_read(tmp_path, "a.jsonl", b"\n") == []
    assert write_and_read(tmp_path, "b.json", b"in fact text", format="text") == ["in fact text"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(XdscaleError, match=r"none\.txt: cannot be read: No such file"):
        documents(tmp_path / "none.txt")


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LARGEST_LINE_CHARACTERS", 64)
    with pytest.raises(XdscaleError, match=r"a\.txt: line 2 is longer than 64 characters"):
        write_and_read(tmp_path, "a.txt", b"123456789\n" + b"x" * 65)
    assert write_and_read(tmp_path, "a.txt", b"123456789\n" + b"x" * 64) == ["123456789\n" + "x" * 64]


def test_a_text_without_blank_lines_is_cut_where_it_has_grown_large(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LARGEST_DOCUMENT_BYTES", 20)
    lines = ["a" * 10, "b" * 10, "c" * 19, "d", "e"]
    assert write_and_read(tmp_path, "a.txt", "\n".join(lines).encode()) == [
        "\n".join(lines[:2]), "\n".join(lines[2:4]), "e"
    ]  # fmt: skip


def test_a_long_line_takes_time_in_proportion(tmp_path, monkeypatch):
    """16 MB on one line, in pieces of 1 KB: joined again at each piece they would be copied 8,000 times, 2 minutes."""
    monkeypatch.setattr("xdscale.shards.sources.decoding.PIECE_BYTES", 1 << 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * (16 << 20 // 5))
    begun = time.process_time()
    [document] = stream_documents(path)
    assert len(document.text) == path.stat().st_size
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [40, 1 << 16])
def test_lines_end_as_on_any_system(tmp_path, end, size, monkeypatch):
    monkeypatch.setattr("xdscale.shards.sources.decoding.PIECE_BYTES", size)
    text = f"{LONG} six\n{LONG} seven\n\n{LONG} eight"
    assert write_and_read(tmp_path, "a.txt", text.replace("\n", end).encode()) == text.split("\n\n")


def test_a_carriage_return_within_a_line_is_no_end(tmp_path):
    text = f"{LONG}\r{LONG}\n{LONG}"
    assert write_and_read(tmp_path, "a.txt", text.encode()) == [text]


@pytest.mark.parametrize("kind", ["text", "json", "mediawiki"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """Files of 16 MB: one text without blank lines, one JSON array, one dump of 4,000 pages."""
    path = tmp_path / "large"
    body = f"{LONG} " * 160
    if kind == "text":
        path.write_text(f"{body}\n" * 4000)
    elif kind == "json":
        path.write_text(json.dumps([{"text": body}] * 4000, indent=1))
    else:
        path.write_text(dump(*(page("A", body) for _ in range(4000))))
    assert path.stat().st_size > 14 << 20
    tracemalloc.start()
    size = sum(len(document.text) for document in stream_documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size >= 4000 * len(body.strip())
    # A text document is cut at 1 MiB; its lines, their joined copy and the one before are there together.
    assert peak < {"text": 4 << 20, "json": 4 << 20, "mediawiki": 1 << 20}[kind]
