"""What a build is refused for, in its words: tables that do not fit, files of a build that are damaged, texts."""

import copy
import gzip
import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from xdscale.errors import XdscaleError
from xdscale.shards import clip_bpe
from xdscale.shards.build import build_table, merge_parts
from xdscale.shards.clip_bpe import MERGES, _read_merges
from xdscale.shards.commands import shards_app
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources import json_texts, wiki_markup
from xdscale.shards.sources.caption_build import CaptionBuild, CaptionOptions
from xdscale.shards.sources.captions import CaptionSource
from xdscale.shards.sources.corpus import stream_documents
from xdscale.shards.sources.inputs import describe_inputs
from xdscale.shards.sources.recognise import recognise
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.sources.text import TextOptions, TextSource, build_shards
from xdscale.shards.sources.text_build import TextBuild
from xdscale.shards.units import one_thread_per_process
from xdscale.shards.workplace import LOCK_NAME, Part, locked, publish

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "sees", "some", "cats", "##s", "."]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return path


def regions(folder, names=("1", "2", "3")):
    boxes = np.array([[0, 0, 5, 5]], np.float32)
    build_regions([RegionImage(name, (9, 9), boxes) for name in names], folder, Detector(model="m"))
    return folder


def captions(folder, *texts):
    """A file of captions of the images 1, 2 and so on."""
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(1, len(texts) + 1)]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(texts, 1)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


@pytest.fixture
def captioned(tmp_path, tokenizer):
    """Returns a function of captions: their source, beside a table of regions in `out`."""

    def make(*texts, **options):
        out = regions(tmp_path / "out")
        how = CaptionOptions(**{"validation_fraction": 0.0} | options)
        return CaptionSource([captions(tmp_path, *texts)], out, str(tokenizer), how), out

    return make


def test_a_link_to_a_table_that_is_not_there(captioned, tmp_path, tokenizer):
    source, out = captioned("a dog", "some cats")
    other = tmp_path / "other"
    with pytest.raises(XdscaleError, match=f"^{other}: rows of captions link to rows of regions; build that table fir"):
        build_table(source, other)
    build_shards([_text(tmp_path)], other, TextOptions(language_tokenizer=str(tokenizer), sequence_length=4))
    with pytest.raises(
        XdscaleError, match=f"^{other}: rows of captions link to the table regions, which is not there;"
    ):
        build_table(source, other, overwrite=True)
    assert list(build_table(source, out).splits) == ["train", "validation"]


def _text(folder, name="a.txt", line="a dog sees some cats .\n"):
    (folder / name).write_text(line * 20)
    return folder / name


def test_a_table_that_does_not_fit_those_that_are_there_is_not_published(captioned):
    """As of parts that were built beside another table of regions."""
    source, out = captioned("a dog", "some cats")
    table = build_table(source, out)
    shard = table.splits["train"].shards[0]
    assert shard.largest == {"image": 1}
    splits = table.splits | {
        "train": table.splits["train"].model_copy(
            update={"shards": [shard.model_copy(update={"largest": {"image": 3}})]}
        )
    }
    before = (out / MANIFEST_NAME).read_bytes()
    with pytest.raises(
        XdscaleError, match=rf"^{out}: .*captions\.image: .* links to row 3 of regions, which has rows 0 to"
    ):
        publish(out, "captions", table.model_copy(update={"splits": splits}))
    assert (out / MANIFEST_NAME).read_bytes() == before
    assert (out / shard.file).is_file()


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_damaged_plan_is_that_of_another_build(small_build, tmp_path, content):
    out = tmp_path / "out"
    small_build(out, part=Part(0, 2))
    [plan] = (out / ".build").glob("plan-*.json")
    plan.write_text(content)
    with pytest.raises(XdscaleError, match=rf"^{out}: holds an unfinished build with table None, now 'text'; choose"):
        small_build(out, part=Part(1, 2))


def test_a_lock_is_one_builds_alone_unless_all_share_it(tmp_path):
    path = tmp_path / ".build" / LOCK_NAME
    path.parent.mkdir()
    with locked(path), pytest.raises(XdscaleError, match=f"^{tmp_path}: another process is building here"):
        with locked(path):
            pass
    with locked(path, shared=True):
        with locked(path, shared=True):
            pass
        with pytest.raises(XdscaleError, match="another process is building here"), locked(path):
            pass


def test_parts_without_a_row_make_no_table(tmp_path, tokenizer):
    out = tmp_path / "out"
    for index in (0, 1):
        options = TextOptions(language_tokenizer=str(tokenizer), sequence_length=4, min_words=7)
        build_shards([_text(tmp_path)], out, options, part=Part(index, 2))
    with pytest.raises(
        XdscaleError,
        match=rf"^{out}: the parts hold no rows \(documents 1, .*short_paragraphs 20, .*\); use more input",
    ) as caught:
        merge_parts(out)
    assert "paragraphs 0" not in str(caught.value)


@pytest.mark.parametrize("before", [None, "true"])
def test_what_tokenizers_may_do_is_afterwards_as_before(monkeypatch, before):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    with pytest.raises(KeyError, match="^'false is how"), one_thread_per_process():
        os.environ[os.environ[name] + " is how it was meanwhile"]
    assert os.environ.get(name) == before


def test_a_tokenizer_that_changes_while_shards_are_built_is_named(captioned, tmp_path, tokenizer):
    """Workers load it for themselves."""
    options = TextOptions(language_tokenizer=str(tokenizer), sequence_length=4)
    for source in (captioned("a dog")[0], TextSource([_text(tmp_path)], options)):
        other = copy.copy(source)  # as pickle makes one
        assert other._tokenizer.get_vocab() == source._tokenizer.get_vocab()
        other = copy.copy(source)  # as pickle makes one
        tokenizer.write_text("\n".join([*TOKENS, "more"]) + "\n")
        with pytest.raises(XdscaleError, match=f"^{tokenizer}: the tokenizer changed while the shards were built$"):
            other._tokenizer  # noqa: B018
        tokenizer.write_text("\n".join(TOKENS) + "\n")


def test_a_caption_without_a_word_piece_is_named(captioned):
    source, out = captioned("a dog", "\u200d", "some cats")
    with pytest.raises(
        XdscaleError, match=r"^captions\.json: image 2: caption '\\u200d': gives no word pieces; take it out$"
    ):
        build_table(source, out)


def test_how_many_captions_more_have_no_word_piece_is_told_at_once(captioned):
    """Of those in other shards it is not known yet."""
    source, out = captioned("\u200d", "\u200b", "\u200d", shard_images=2)
    with pytest.raises(XdscaleError, match=r"^captions\.json: image 1: .* take it out, and at least 1 more like it$"):
        build_table(source, out)


def test_why_there_are_no_captions(captioned):
    source, _ = captioned("a dog")
    assert source.if_empty({"images_without_captions": 2, "images_of_other_splits": 0, "empty_captions": 1}) == (
        "captions.json: no captions of images that are there (2 images without captions, 1 empty captions)"
    )
    assert source.if_empty({}) == "captions.json: no captions of images that are there (no images)"


def test_images_without_captions_are_counted(captioned):
    source, out = captioned("a dog", " ", "some cats")
    counts = build_table(source, out).counts
    assert counts == {"images": 2, "images_without_captions": 1, "empty_captions": 1, "captions": 2}


@pytest.mark.parametrize(
    ("files", "named"), [(3, r"0\.txt, 1\.txt, 2\.txt:"), (5, r"0\.txt, 1\.txt, 2\.txt and 2 more:")]
)
def test_inputs_without_a_sequence_are_named(tmp_path, tokenizer, files, named):
    paths = [_text(tmp_path, f"{number}.txt", "a dog\n") for number in range(files)]
    options = TextOptions(language_tokenizer=str(tokenizer), sequence_length=4)
    with pytest.raises(
        XdscaleError, match=f"^{named} 0 tokens of {files} documents give no sequence of 4; {20 * files} "
    ):
        build_shards(paths, tmp_path / "out", options)


def test_builds_that_dataset_json_does_not_state_rightly_are_named(captioned, tmp_path, tokenizer):
    source, out = captioned("a dog")
    build_table(source, out)
    build_shards([_text(tmp_path)], out, TextOptions(language_tokenizer=str(tokenizer), sequence_length=4))
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    for kind, table, key, wrong in (
        (TextBuild, "text", "sequence_length", 0),
        (CaptionBuild, "captions", "validation_fraction", 2),
    ):
        assert kind.of(Manifest.load(out)).source == table
        changed = json.loads(json.dumps(manifest))
        changed["tables"][table]["build"][key] = wrong
        with pytest.raises(
            XdscaleError, match=rf"^dataset\.json: tables\.{table}\.build\.{key} = {wrong}: Input should"
        ):
            kind.of(Manifest.model_validate(changed))


def test_a_table_of_other_columns_than_its_build_states_is_refused(tmp_path):
    out = regions(tmp_path / "out")
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    manifest["tables"]["regions"]["build"]["jpeg"] = True
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(
        XdscaleError,
        match=rf"^{out}: regions has the columns boxes, sizes, image_ids, but its build those of boxes, .*, jpeg, or",
    ):
        RegionTable.open(out)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip", r"not CLIP's merges \("),
        (gzip.compress(b"\xff\n", mtime=0), r"not CLIP's merges \("),
        (gzip.compress(b"#version\n" + b"a b\n" * MERGES, mtime=0)[:-30], r"not CLIP's merges \("),
        (gzip.compress(b"#version" + b"\na b" * (MERGES - 1), mtime=0), f"expected {MERGES} merges of two parts"),
        (gzip.compress(b"#version\na b c" + b"\na b" * MERGES, mtime=0), f"expected {MERGES} merges of two parts"),
    ],
)
def test_merges_that_are_not_clips(tmp_path, content, words):
    path = tmp_path / "merges.gz"
    path.write_bytes(gzip.compress(b"#version" + b"\na b" * (MERGES + 1)))
    assert _read_merges(path) == [("a", "b")] * MERGES
    path.write_bytes(content)
    with pytest.raises(XdscaleError, match=f"^{path}: {words}.*; install open_clip_torch again$"):
        _read_merges(path)
    assert clip_bpe.VOCAB_SIZE == MERGES + 514


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(XdscaleError, match=f"^{tmp_path / 'a.txt'}: cannot be read: No such file or directory$"):
        describe_inputs([tmp_path / "a.txt"])


def texts(path, content):
    path.write_text(content)
    return [document.text for document in stream_documents(path)]


def test_arrays_may_follow_each_other_and_nothing_else(tmp_path):
    assert texts(tmp_path / "a.json", '["a b"]\n["c d"] []') == ["a b", "c d"]
    with pytest.raises(
        XdscaleError, match=r"a\.json:2: .*expected the end of the file or another array .*, found '\{'"
    ):
        texts(tmp_path / "a.json", '["a b"]\n{"text": "c d"}')


def test_a_value_of_too_many_characters_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(json_texts, "LARGEST_VALUE_CHARACTERS", 100)
    with pytest.raises(
        XdscaleError, match=r"a\.jsonl:2: a value of over 100 characters; .*jq -c '\.data\[\]' a\.jsonl"
    ):
        texts(tmp_path / "a.jsonl", '{"text": "a b"}\n' + '{"text": "' + "a b " * 100_000)


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("WARC/1.0\r\nWARC-Type: warcinfo\r\n", "is a web archive; take the text out of its pages first"),
        ('["one two three', "jsonl"),
        ('["one two three\nfour five six', "text"),
        ('["one two", ', "jsonl"),
        ('["one two" and', "text"),
    ],
)
def test_what_a_file_begins_with_tells_its_format(tmp_path, content, format):
    path = tmp_path / "a"
    path.write_text(content)
    if "archive" in format:
        with pytest.raises(XdscaleError, match=f"^{path}: {format}"):
            recognise(path, "utf-8")
    else:
        assert recognise(path, "utf-8") == format


def test_a_document_of_wikiextractor_that_is_not_closed_is_read(tmp_path):
    content = '<doc id="1" title="A">\nA\n\na dog\n</doc>\n<doc id="2" title="B">\nB\n\nsome cats\n'
    assert texts(tmp_path / "wiki_00", content) == ["= A =\na dog", "= B =\nsome cats"]


def test_a_tag_that_is_never_closed_is_sought_once(monkeypatch):
    sought, pattern = [], wiki_markup._next_tag
    monkeypatch.setattr(wiki_markup, "_next_tag", lambda name: sought.append(name) or pattern(name))
    assert wiki_markup.prose_lines("a <ref> b <math> c <ref> d <ref>") == ["a  b  c  d"]
    assert sought.count("math") == 1


def cells(text):
    """The rows of tables that are drawn, cell by cell."""
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]


def test_info_shows_what_splits_and_columns_are(captioned, tmp_path):
    source, out = captioned("a dog", "some cats", "a dog sees cats .")
    table = build_table(source, out)
    told = CliRunner().invoke(shards_app, ["info", str(out)], catch_exceptions=False).output
    rows = {row[0]: row[1:] for row in cells(told)}
    train, stored = table.splits["train"], sum(shard.bytes for shard in table.shards)
    pieces = 2 + 2 + 5
    payload = 2 * pieces + 3 * 4 + 3 * 8
    assert rows["train"] == ["1", "3", str(train.elements["word_offsets"]), f"{stored:,}", f"{stored / payload:.3f}"]
    assert train.elements == {"word_offsets": pieces}
    assert rows["validation"] == ["0", "0", "0", "0", "-"]
    assert rows["words"] == ["<u2", "1-any", ""]
    assert rows["image"] == ["<u4", "1", "regions"]
    assert rows["siblings"] == ["<u4 [2]", "1", ""]
    assert f"{out}: captions: built from captions, 3 captions, 0 empty captions, 3 images" in told
    assert f"{out}: regions: image regions, given" in told
    other = regions(tmp_path / "other")
    alone = CliRunner().invoke(shards_app, ["info", str(other)], catch_exceptions=False).output
    assert alone.startswith(f"{other}: image regions, given\n")
    assert ["boxes", "<f4 [4]", "1-any", ""] in cells(alone)
