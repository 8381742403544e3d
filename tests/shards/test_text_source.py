"""What is asked of packed text arrives where files are read and tables are built; shards end where they are full."""

from pathlib import Path

import pytest

from xdscale.shards.manifest import Column
from xdscale.shards.sources import text
from xdscale.shards.sources.corpus import Document
from xdscale.shards.sources.text import TextOptions, TextSource, build_shards
from xdscale.shards.workplace import Part

READING = {"format": "jsonl", "text_field": "body", "encoding": "iso8859-1", "line_breaks": "keep"}


@pytest.fixture
def source(cassette_model, tmp_path):
    """Returns a function of options: the source of one file."""

    def make(**options):
        (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
        return TextSource([tmp_path / "a.jsonl"], TextOptions(language_tokenizer=str(cassette_model), **options))

    return make


@pytest.mark.parametrize("bad_bytes", ["refuse", "replace"])
def test_files_are_read_as_is_asked(source, monkeypatch, tmp_path, bad_bytes):
    asked = []
    monkeypatch.setattr(text, "stream_documents", lambda *given, **how: asked.append((given, how)) or iter(()))
    assert list(source(**READING, bad_bytes=bad_bytes).units(5)) == []
    how = READING | {"replace_bad_bytes": bad_bytes == "replace", "threads": 5}
    assert asked == [((tmp_path / "a.jsonl",), how)]


@pytest.mark.parametrize("most", [5, 6, 7, 12])
def test_a_shard_is_full_when_it_has_as_many_bytes_as_are_asked_for(source, monkeypatch, most):
    documents = [
        Document("ab\N{LATIN SMALL LETTER E WITH ACUTE}"[:3] + "c" * (n % 3), "text", n, False, 0) for n in range(8)
    ]
    monkeypatch.setattr(text, "stream_documents", lambda *_, **__: iter(documents))
    wanted, size = [[]], 0
    for document in documents:
        wanted[-1].append(document)
        size += len(document.text.encode())
        if size >= most:
            wanted, size = [*wanted, []], 0
    found = [unit for unit, _ in source(shard_text_bytes=most).units(1)]
    assert found == [unit for unit in wanted if unit]


def test_how_a_build_is_to_be_made_is_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(text, "TextSource", lambda *given: ("source", *given))
    monkeypatch.setattr(text, "build_table", lambda *given, **how: asked.append((given, how)))
    how = {"workers": 3, "part": Part(1, 2), "overwrite": True, "on_progress": print}
    build_shards(["a"], Path("o"), "options", **how)
    assert asked == [((("source", ["a"], "options"), Path("o")), how)]


def test_rows_have_at_least_one_clip_token_and_as_many_as_fill_the_blocks(source):
    assert source(sequence_length=30, clip_blocks=2).columns == [
        Column(name="language", dtype="<u2", shape=(30,)),
        Column(name="clip", dtype="<u2", offsets="clip_offsets", fewest=1, most=150),
    ]
