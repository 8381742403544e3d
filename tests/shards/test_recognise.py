"""What a corpus file is told to be, and what is refused because its syntax would be trained on."""

import bz2
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from xdscale.errors import XdscaleError
from xdscale.shards.sources.corpus import paragraphs, stream_documents

LONG = "one two three four five"
ARTICLES = [
    ["= Town One =", "", f"{LONG} here .", "", "= = Its past = =", "", f"{LONG} there .", f"{LONG} again ."],
    ["= Town Two =", "", f"{LONG} elsewhere ."],
]
RAW = "".join(f" {line} \n" for article in ARTICLES for line in ["", *article, ""])


def gzipped(content):
    """Without the time of day, which would be part of the tests' names, and these must be alike in all workers."""
    return gzip.compress(content, mtime=0)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents(path, **options):
    return [(document.text, document.format) for document in stream_documents(path, **options)]


def rows(lines):
    return [{"text": "" if not line.strip() else f"{line}\n"} for line in lines]


def test_wikitext_of_the_hub_is_the_articles_of_the_raw_file(tmp_path):
    """Each row is one line there; as documents by themselves every held-out article would also be trained on."""
    lines = RAW.split("\n")[:-1]
    expected = documents(write(tmp_path, "wiki.train.raw", RAW))
    assert len(expected) == 2
    jsonl = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows(lines)))
    parquet.write_table(pyarrow.Table.from_pylist(rows(lines)), tmp_path / "a.parquet")
    for path in (jsonl, tmp_path / "a.parquet", write(tmp_path, "a.json", json.dumps(rows(lines)))):
        assert documents(path) == expected
    # The second file of a split begins within an article.
    second = write(tmp_path, "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows(lines[4:])))
    assert [text for text, _ in documents(second)][1:] == [expected[1][0]]
    assert documents(write(tmp_path, "b.raw", "\n".join(lines[4:])))[1:] == expected[1:]


def test_rows_that_only_quote_a_heading_stay_documents(tmp_path):
    texts = [f"{LONG}\n = Title = \n{LONG}", f"{LONG} x = y = z"]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert documents(path) == [(text, "jsonl") for text in texts]


def test_wikiextractor(tmp_path):
    """Its tags are no text, and a title is a heading, however long."""
    content = (
        '<doc id="1" url="https://x?curid=1" title="A &quot;List&quot; of Old Towns">\n'
        f'A "List" of Old Towns\n\n{LONG} &lt;b&gt; &amp; more\n{LONG}\n\n</doc>\n'
        f'<doc id="2" url="https://x?curid=2" title="B">\nB\n\n{LONG}\n</doc>\n'
    )
    found = documents(write(tmp_path, "wiki_00", content))
    assert [kind for _, kind in found] == ["wikiextractor"] * 2
    assert [paragraphs(text, kind, 5) for text, kind in found] == [[f"{LONG} <b> & more", LONG], [LONG]]
    values = [{"id": "1", "url": "u", "title": "A", "text": f"{LONG}\n{LONG}"}]
    assert documents(write(tmp_path, "wiki_01", json.dumps(values[0]) + "\n")) == [(values[0]["text"], "jsonl")]
    with pytest.raises(XdscaleError, match=r"wiki_02:13: text outside of <doc"):
        documents(write(tmp_path, "wiki_02", content + "stray line"))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "values",
    [
        [{"text": f'{LONG} [1], {{2}}\n"x"', "n": 3, "more": [{"a": None}]}, {"text": "b", "n": -1e5}],
        ["a string", "another, with ] and [", ""],
        [],
    ],
)
def test_json_arrays(tmp_path, values, indent, monkeypatch):
    """Of objects and of strings, on one line or pretty-printed, whatever pieces they are read in."""
    expected = [value if isinstance(value, str) else value["text"] for value in values]
    content = f" {json.dumps(values, indent=indent)}\n"
    for size in (1, 2, 7, 1 << 16):
        monkeypatch.setattr("xdscale.shards.sources.decoding.PIECE_BYTES", size)
        assert [text for text, _ in documents(write(tmp_path, "a.json", content))] == expected
        assert [text for text, _ in documents(write(tmp_path, "a.txt", content))] == (expected or [" []"])
        joined = "".join(json.dumps(value, indent=indent) + " " * (indent or 0) for value in values)
        assert [text for text, _ in documents(write(tmp_path, "b.jsonl", joined))] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}', r"a\.json:2: not valid JSON: it breaks off"),
        ('[{"text": "a"},\n]', r"a\.json:2: not valid JSON: Expecting value: '\]'"),
        ('{"text": "a"}\n{"text": "b', r"a\.json:2: not valid JSON: Unterminated string starting at: '\"b'"),
        ("[1]", r"a\.json:1: expected an object with a field 'text', found a number"),
        (
            '{"text": ["a", "b"]}',
            r"a\.json:1: 'text' is a list, expected a string; join it first: jq -c '\.text \|= join",
        ),
        ('[{"text": "a"}\n {"text": "b"}]', r"a\.json:2: not valid JSON: expected ',' or '\]' after an element"),
        ('{"text": "a"}\n{"text": "b" "c": 1}\n{"text": "d"}\n', r"a\.json:2: not valid JSON"),
        (
            '{"data": [{"text": "a"}], "version": 1}',
            r"a\.json:1: no field 'text' \(found: data, version\).*jq -c '\.data\[\]'",
        ),
        ('{"text": "a", "id": ' + "9" * 5000 + "}\n{", r"a\.json:2: not valid JSON"),
        ('{"text": "a"}\nnothing of this kind is JSON', r"a\.json:2: not valid JSON: .*: 'nothing of this kind'$"),
        ('{"text": "a", "x": ' + "[" * 200_000, r"a\.json:1: not valid JSON: maximum recursion"),
    ],
)
def test_bad_json_is_named_with_its_line(tmp_path, content, message):
    with pytest.raises(XdscaleError, match=message):
        documents(write(tmp_path, "a.json", content))


def test_joined_files_may_bring_their_byte_order_marks(tmp_path):
    row = '\ufeff{"text": "a"}\n'
    assert documents(write(tmp_path, "a.jsonl", row * 3)) == [("a", "jsonl")] * 3


def test_a_number_of_thousands_of_digits_is_no_fault(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"id": ' + "9" * 6000 + f', "text": "{LONG}"}}\n')
    assert documents(path) == [(LONG, "jsonl")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", f"<!DOCTYPE html>\n<html><body><p>{LONG}</p></body></html>", "is HTML; .*--format text"),
        ("b.txt", f"\n<!-- saved -->\n<div class='x'>{LONG}</div>", "is HTML"),
        ("a.html", LONG, "is HTML"),
        ("a.txt.html-00000-of-00001", LONG, "is HTML"),
        ("c.txt", f"<?xml version='1.0'?>\n<TEI xmlns='http://t'><text>{LONG}</text></TEI>", "is marked up"),
        ("d.txt", f"<DOC>\n<DOCNO>1</DOCNO>\n{LONG}\n</DOC>\n", "is marked up"),
        ("d2.txt", f"<seg>{LONG}</seg>\n<seg>{LONG}</seg>", "is marked up"),
        ("e.txt", f'id,label,text\n1,x,{LONG}\n2,y,"{LONG}, and more"\n3,z,{LONG}\n', "is a table"),
        ("f.txt", f"1\t{LONG}\n2\t{LONG}\n3\t{LONG}\n", "is a table .*pandas.*--text-field"),
        ("a.csv", f"{LONG}\n{LONG}\n", "is a table"),
        ("g.txt", f"From a@b.c Mon Jan  1 10:00:00 2024\nFrom: a\nSubject: b\n\n{LONG}\n", "is a mailbox"),
        ("h.txt", f"Return-Path: <a@b.c>\nSubject: b\n\n{LONG}\n", "is a mailbox"),
        ("i.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF file; take its text out"),
        ("j.txt", b"{\\rtf1\\ansi text}", "is a rich text file"),
        ("k.txt", b"a.txt" + bytes(252) + b"ustar\x0000", "is a tar archive; unpack it"),
        ("l.txt", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an office document"),
        ("m.txt", b"\x00\x00\x02" * 500, "is no text: .* are zero"),
        ("n.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer that Git LFS left"),
        ("o.txt", LONG.encode("utf-16-le"), "looks like UTF-16 without a byte order mark; say --encoding utf-16-le"),
        ("r.txt", bytes(range(1, 256)) * 9, "is no text: 171 of its first 2295 bytes are control characters"),
        ("s.eml", f"From: a\nTo: b\n\n{LONG}\n", "is a mailbox"),
        ("t.gz", gzipped(gzipped(LONG.encode())), "is compressed twice; decompress it once"),
        ("u.gz", gzipped(bz2.compress(LONG.encode())), "is compressed twice"),
        ("v.parquet.gz", gzipped(b"PAR1" + bytes(50)), "not a whole parquet file: .* decompress it first"),
        ("p.txt", "\\documentclass{article}\n\\begin{document}", "is LaTeX"),
        ("w.txt", b"\x01" * 6 + b"a" * 94, "is no text: 6 of its first 100 bytes are control characters"),
        ("x.txt", b"\0a" * 4 + b"\0\0\0\0" * 4 + b"a" * 26, "is no text: 20 of its first 50 bytes are zero"),
        ("y.txt", b"\0\0\0\0\0\0" + b"\0a" * 10 + b"a" * 4, "looks like UTF-16 .* say --encoding utf-16-be"),
        ("y2.txt", b"\0a" * 4 + b"a\0" + b"a" * 14, "is no text: 5 of its first 24 bytes are zero"),
        ("z.txt", "a,b\n1,2\n", "is a table"),
        (
            "q.jsonl",
            '{"text": "<p>one two</p>"}\n{"text": "<div>three</div>"}\n',
            "its texts are HTML; .*--format jsonl",
        ),
    ],
)
def test_what_is_no_corpus_is_refused_with_advice(tmp_path, name, content, message):
    with pytest.raises(XdscaleError, match=rf"{name}: {message}"):
        documents(write(tmp_path, name, content))


@pytest.mark.parametrize(
    "content",
    [
        f"<unk> {LONG} <unk>\n{LONG}",
        f"<s> {LONG} </s>",
        f"[1] {LONG}",
        f"[[Link]] {LONG}",
        f'["{LONG}" he said]',
        f"Hello, world\nDear Sir, {LONG}\nYours, Bob",
        f"Title: A Tale\nAuthor: B. C.\n\n{LONG}",
        f"From here on\n{LONG} at 10:30",
        f"{LONG} < 3 </p> {LONG}",
        '"Quoted," she said, "twice."',
        "\x01" * 5 + "a" * 95,
        "\0a" * 10 + "a" * 30,
        f"{LONG}\n = = Its past = = \n{LONG}",
        "name,place",
        "name\nplace\nname",
    ],
)
def test_what_only_looks_like_it_is_text(tmp_path, content):
    found = documents(write(tmp_path, "a.txt", content))
    assert {kind for _, kind in found} == {"text"}
    assert "\n\n".join(text for text, _ in found) == content


def test_rows_of_which_half_is_html_are_texts(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "<p>one two</p>"}\n{"text": "three"}\n')
    assert documents(path) == [("<p>one two</p>", "jsonl"), ("three", "jsonl")]


@pytest.mark.parametrize(("limit", "value"), [("SAMPLE_ROWS", 2), ("LARGEST_DOCUMENT_BYTES", 18)])
def test_the_first_rows_tell_what_all_are(tmp_path, monkeypatch, limit, value):
    """The first two, of 9 characters each; of all four three are HTML."""
    monkeypatch.setattr(f"xdscale.shards.sources.corpus.{limit}", value)
    texts = ["<p>ab</p>", "plaintext", "<p>cd</p>", "<p>ef</p>"]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [text for text, _ in documents(path)] == texts
    monkeypatch.setattr(f"xdscale.shards.sources.corpus.{limit}", value + 1)
    with pytest.raises(XdscaleError, match="its texts are HTML"):
        documents(path)


def test_whoever_means_it_gets_it(tmp_path):
    """`--format` says what is meant: nothing is refused then."""
    assert documents(write(tmp_path, "a.html.txt", LONG)) == [(LONG, "text")]
    path = write(tmp_path, "a.html", f"<p>{LONG}</p>")
    assert documents(path, format="text") == [(f"<p>{LONG}</p>", "text")]
