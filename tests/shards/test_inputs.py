"""Folders, patterns and parquet: which files are read, in which order, and what is refused."""

import hashlib
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.corpus import read_documents, stream_documents
from xdscale.shards.sources.inputs import describe_inputs, find_inputs
from xdscale.shards.sources.regions.files import load_sizes
from xdscale.shards.sources.text import TextOptions, build_shards

LONG = "one two three four five"


@pytest.fixture
def corpus(tmp_path):
    """Six corpus files in two levels, a hidden file and a hidden folder."""
    folder = tmp_path / "corpus"
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/c.parquet",
        "sub/a.xml-p1p41242.bz2",
        "sub/B.TXT.zst",
        "sub/.hidden",
        ".git/x",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(paths, folder):
    return [str(path.relative_to(folder)) for path in paths]


def test_a_folder_is_all_its_corpus_files_in_order(corpus):
    expected = ["a.jsonl.gz", "b.txt", "sub/B.TXT.zst", "sub/a.xml-p1p41242.bz2", "sub/c.parquet"]
    assert names(find_inputs([corpus]), corpus) == expected
    assert names(find_inputs([f"{corpus}/**/*.*"]), corpus) == expected


def test_patterns_and_files_keep_the_order_of_the_command_line(corpus):
    found = find_inputs([f"{corpus}/sub/*.[px]*", str(corpus / "b.txt")])
    assert names(found, corpus) == ["sub/a.xml-p1p41242.bz2", "sub/c.parquet", "b.txt"]
    strange = corpus / "[1] *.txt"
    strange.write_text("a name that is itself a pattern")
    assert find_inputs([str(strange)]) == [strange]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.parquet", r"\*\.parquet: no file matches this pattern"),
        ("empty", "empty: the folder holds no files"),
        ("none.txt", r"none\.txt: no such file or folder"),
        ("sub", r"notes\.pdf: unknown extension; expected \.txt .* \.parquet, or one of them with \.gz \.bz2 \.zst"),
        ("notes*", r"notes\.pdf: unknown extension"),
        ("index", r"multistream-index\.txt\.bz2: is the index of a dump"),
    ],
)
def test_what_is_refused(corpus, name, message):
    (corpus / "empty").mkdir()
    for folder in (corpus, corpus / "sub"):
        (folder / "notes.pdf").write_text("no corpus")
    (corpus / "index").mkdir()
    (corpus / "index" / "enwiki-pages-articles-multistream-index.txt.bz2").write_text("0:10:A")
    with pytest.raises(XdscaleError, match=message):
        find_inputs([f"{corpus}/{name}"])


def test_what_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for name in (tmp_path / "a.txt", "/dev/null"):
        with pytest.raises(XdscaleError, match=f"{name}: is a pipe or a device, .*; write it to a file first"):
            find_inputs([str(name)])


def test_links_to_folders_are_followed_once(tmp_path):
    """One that leads out of the folder, one to a neighbour, two that lead in circles, one to a hidden folder's file."""
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path in (
        folder / "b" / "2.txt",
        folder / "b" / "c" / "3.txt",
        elsewhere / "deep" / "4.txt",
        folder / ".h" / "5",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (folder / "a").symlink_to(elsewhere)
    (folder / "0").symlink_to(folder / "b")  # comes first by name, but the folder itself counts
    (folder / "b" / "c" / "up").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "6.txt").symlink_to(folder / ".h" / "5")
    assert names(find_inputs([str(folder)]), folder) == ["6.txt", "a/deep/4.txt", "b/2.txt", "b/c/3.txt"]
    assert names(find_inputs([f"{folder}/**/[2-6]*"]), folder) == ["6.txt", "a/deep/4.txt", "b/2.txt", "b/c/3.txt"]
    assert names(find_inputs([f"{folder}/**/c/**"]), folder) == ["b/c/3.txt"]
    (tmp_path / "link").symlink_to(folder)
    assert len(find_inputs([str(tmp_path / "link")])) == 4


@pytest.mark.parametrize("name", ["", "*", "**/*.txt", "gone.txt"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "gone.txt").symlink_to(tmp_path / "moved.txt")
    with pytest.raises(XdscaleError, match=r"gone\.txt: is a link to .*moved\.txt, which is not there"):
        find_inputs([f"{folder}/{name}"])


def test_a_folder_that_cannot_be_read_is_named(corpus, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(XdscaleError, match="sub: cannot be read: Permission denied"):
        find_inputs([str(corpus)])


def test_the_folders_of_wikiextractor(tmp_path):
    """Its files have no extension, with or without `--compress`."""
    for name in ("AA/wiki_00", "AA/wiki_01.bz2", "AB/wiki_00"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(name)
    expected = ["AA/wiki_00", "AA/wiki_01.bz2", "AB/wiki_00"]
    assert names(find_inputs([str(tmp_path / "text")]), tmp_path / "text") == expected
    assert names(find_inputs([f"{tmp_path}/text/*/wiki_*"]), tmp_path / "text") == expected


def test_a_file_named_twice_is_refused(corpus):
    with pytest.raises(XdscaleError, match=r"b\.txt: named twice"):
        find_inputs([corpus, corpus / "b.txt"])
    with pytest.raises(XdscaleError, match="no input"):
        find_inputs([])


def test_the_manifest_lists_the_files_with_size_and_hash(small_corpus, cassette_model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    documents = small_corpus.read_text().split("\n\n")
    (folder / "2.txt").write_text("\n\n".join(documents[:30]))
    (folder / "10.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[30:]))
    build_shards([folder], tmp_path / "out", TextOptions(language_tokenizer=str(cassette_model), sequence_length=30))
    stated = [
        (item["name"], item["bytes"], item["sha256"])
        for item in Manifest.load(tmp_path / "out").tables["text"].build["inputs"]
    ]
    files = [folder / "10.jsonl", folder / "2.txt"]
    assert stated == [(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def write_parquet(path, texts, **options):
    """The layout of `wikimedia/wikipedia`, in row groups of 3."""
    rows = [{"id": str(n), "url": f"https://x/{n}", "title": f"T{n}", "text": text} for n, text in enumerate(texts)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3, **options)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet_rows_are_documents(tmp_path, compression):
    texts = [f"{LONG} {n}\n\nHeading\n{LONG} naïve é中" for n in range(10)]
    path = tmp_path / "train-00000-of-00041.parquet"
    write_parquet(path, texts, compression=compression)
    found = list(stream_documents(path))
    assert [document.text for document in found] == texts
    assert found[-1].bytes_read == path.stat().st_size
    assert list(read_documents(path))[3] == [f"{LONG} 3", f"{LONG} naïve é中"]


def test_parquet_and_jsonl_of_the_same_text_give_the_same_shards(small_corpus, cassette_model, tmp_path):
    texts = small_corpus.read_text().split("\n\n")
    write_parquet(tmp_path / "a.parquet", texts)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = []
    for name in ("a.parquet", "a.jsonl"):
        out = tmp_path / f"out-{name}"
        build_shards([tmp_path / name], out, TextOptions(language_tokenizer=str(cassette_model), sequence_length=30))
        shards.append([path.read_bytes() for path in sorted(out.glob("*.tar"))])
    assert shards[0] == shards[1] != []


ROWS = [LONG, "naïve é中 and three more", "", LONG]
IN_BYTES = [row.encode() for row in ROWS]
CATEGORIES = pyarrow.array(ROWS).dictionary_encode()


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(ROWS, pyarrow.large_string()),
        pyarrow.array(ROWS, pyarrow.string_view()),
        pyarrow.array(IN_BYTES, pyarrow.binary()),
        pyarrow.array(IN_BYTES, pyarrow.large_binary()),
        pyarrow.array(IN_BYTES, pyarrow.binary_view()),
        CATEGORIES,
        CATEGORIES.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),  # as pandas writes a category
        pyarrow.DictionaryArray.from_arrays(
            [0, 1, 2, 0], pyarrow.array(ROWS[:3], pyarrow.large_string()), ordered=True
        ),
        pyarrow.DictionaryArray.from_arrays([0, 1, 2, 0], IN_BYTES[:3]),
        pyarrow.chunked_array([pyarrow.array(part).dictionary_encode() for part in (ROWS[:1], ROWS[1:])]),
    ],
    ids=lambda column: str(column.type)[:40],
)
@pytest.mark.parametrize("row_group_size", [3, 100])
def test_every_arrow_type_of_text_is_read(tmp_path, column, row_group_size):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": ["x"] * 4, "text": column}), path, row_group_size=row_group_size)
    assert parquet.read_schema(path).field("text").type not in (pyarrow.string(), pyarrow.null())
    assert [document.text for document in stream_documents(path)] == ROWS


def test_nulls_and_bad_bytes_are_found_in_every_arrow_type(tmp_path):
    path = tmp_path / "a.parquet"
    for column in (
        pyarrow.array([LONG, None], pyarrow.string_view()),
        pyarrow.array([LONG, None]).dictionary_encode(),
        pyarrow.array([LONG.encode(), None]),
    ):
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(XdscaleError, match=r"a\.parquet: row 1: 'text' is null, .* first\); leave such rows out"):
            list(stream_documents(path))
    bad = pyarrow.array([LONG.encode(), b"caf\xe9"])
    for column in (bad, bad.dictionary_encode(), bad.cast(pyarrow.binary_view())):
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(XdscaleError, match=r"a\.parquet: row 1: 'text': byte 3 \(0xe9\) is not UTF-8"):
            list(stream_documents(path))
        found = list(stream_documents(path, replace_bad_bytes=True))
        assert [document.text for document in found] == [LONG, "caf\ufffd"]
        assert sum(document.bad_bytes for document in found) == 1


def test_a_text_column_is_one_and_no_part_of_another(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([ROWS, ROWS], names=["text", "text"]), path)
    with pytest.raises(XdscaleError, match=r"a\.parquet: 2 columns are named 'text'; write the file with one of them"):
        list(stream_documents(path))
    nested = pyarrow.array([{"text": "of a part"}] * 4)
    parquet.write_table(pyarrow.table({"text.language": ["en"] * 4, "meta": nested, "text": ROWS}), path)
    assert [document.text for document in stream_documents(path)] == ROWS
    for column in (nested, pyarrow.array([["a"]] * 4), pyarrow.array([None] * 4)):
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(XdscaleError, match=r"a\.parquet: column 'text' is (struct|list|null).*, expected strings"):
            list(stream_documents(path))


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [LONG] * 7)
    with pytest.raises(
        XdscaleError, match=r"a\.parquet: no column 'body' \(found: id, url, title, text\); .*--text-field"
    ):
        list(stream_documents(path, text_field="body"))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(XdscaleError, match=r"b\.parquet: column 'text' is int64, expected strings"):
        list(stream_documents(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"text": [LONG, None]}), tmp_path / "c.parquet")
    with pytest.raises(XdscaleError, match=r"c\.parquet: row 1: 'text' is null"):
        list(stream_documents(tmp_path / "c.parquet"))
    content = path.read_bytes()
    page = parquet.read_metadata(path).row_group(1).column(3).data_page_offset
    path.write_bytes(content[:-9])
    with pytest.raises(XdscaleError, match=r"a\.parquet: not a whole parquet file"):
        list(stream_documents(path))
    path.write_bytes(content[:page] + bytes(30) + content[page + 30 :])
    with pytest.raises(XdscaleError, match=r"a\.parquet: not a whole parquet file"):
        list(stream_documents(path))
    (tmp_path / "d.parquet").write_text("not parquet at all")
    with pytest.raises(XdscaleError, match=r"d\.parquet: not a whole parquet file"):
        list(stream_documents(tmp_path / "d.parquet", format="parquet"))


def test_a_name_that_is_no_text_is_refused_before_anything_is_built(tmp_path):
    """As files from an old archive have: `dataset.json`, which names them, is written last."""
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text(LONG)
    with pytest.raises(XdscaleError, match=r"its name is not UTF-8 text, as dataset\.json is; rename the file"):
        describe_inputs([path])
    sizes = path.with_suffix(".json")
    sizes.write_text('{"1": [2, 3]}')
    with pytest.raises(XdscaleError, match="--sizes .* not UTF-8 text; rename the file"):
        load_sizes(str(sizes))
