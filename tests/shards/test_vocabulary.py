"""A tokenizer of BERT's word pieces alone (`vocab.txt`): the one that transformers makes of it, or a message."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.language import fingerprint, load_language_tokenizer, read_tokenizer

TEXT = "Hello world: ÉTÉ, 漢字 and a naïve newword!"


@pytest.fixture(scope="module")
def stored(cassette_model):
    return json.loads((cassette_model / "tokenizer.json").read_text())


@pytest.fixture
def folder(cassette_model, stored, tmp_path):
    """Returns a function that makes a folder of word pieces, settings and other files."""

    def make(settings=None, *, more=(), **files):
        vocabulary = stored["model"]["vocab"]
        lines = [*sorted(vocabulary, key=vocabulary.get), *more]
        shutil.copy(cassette_model / "config.json", tmp_path)
        (tmp_path / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return make


DECODER = {"30522": {"content": "newword", "special": False, "normalized": True, "single_word": False}}


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        (None, {}),
        ({"do_lower_case": True}, {}),
        ({"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, {}),
        ({"do_lower_case": True, "strip_accents": False, "tokenizer_class": "BertTokenizerFast"}, {}),
        ({"tokenize_chinese_chars": False, "tokenizer_class": "ElectraTokenizer"}, {}),
        ({"tokenizer_class": "BertTokenizer", "added_tokens_decoder": DECODER}, {}),
        (None, {"added_tokens": {"newword": 30522}}),
    ],
)
def test_it_is_the_tokenizer_that_transformers_makes(folder, settings, files):
    theirs = AutoTokenizer.from_pretrained(folder(settings, **files))
    ours, info = load_language_tokenizer(str(folder(settings, **files)))
    assert ours.encode(TEXT, add_special_tokens=False).ids == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert read_tokenizer(str(folder(settings, **files))).encode("a cat").ids == theirs("a cat")["input_ids"]
    assert info.vocab_size == len(theirs)
    # What transformers writes as tokenizer.json is the same tokenizer to shards that are built with the one or other.
    theirs.save_pretrained(folder(settings, **files) / "saved")
    assert load_language_tokenizer(str(folder(settings, **files) / "saved"))[1].sha256 == info.sha256


def test_it_is_the_same_as_the_tokenizer_json_of_the_same_word_pieces(folder, cassette_model):
    path = folder()
    names = [str(cassette_model), str(path), str(path / "vocab.txt")]
    assert len({load_language_tokenizer(name)[1].sha256 for name in names}) == 1
    cased = load_language_tokenizer(str(folder({"do_lower_case": False})))[1]
    assert cased.sha256 != load_language_tokenizer(str(cassette_model))[1].sha256


def test_strip_accents_that_follows_the_case_anyway_is_the_same_tokenizer(stored):
    plain = fingerprint(Tokenizer.from_str(json.dumps(stored)))
    normalizer = stored["normalizer"] | {"strip_accents": True}
    assert fingerprint(Tokenizer.from_str(json.dumps(stored | {"normalizer": normalizer}))) == plain
    normalizer = stored["normalizer"] | {"strip_accents": False}
    assert fingerprint(Tokenizer.from_str(json.dumps(stored | {"normalizer": normalizer}))) != plain


def test_a_token_that_is_found_in_texts_and_one_that_is_not_are_two_tokenizers(stored):
    token = DECODER["30522"] | {"id": 30522, "lstrip": False, "rstrip": False}
    both = [
        fingerprint(Tokenizer.from_str(json.dumps(stored | {"added_tokens": [*stored["added_tokens"], added]})))
        for added in (token, token | {"special": True})
    ]
    assert both[0] != both[1]


def test_word_pieces_with_capitals_need_a_word_about_case(folder):
    with pytest.raises(XdscaleError, match=r"vocab\.txt: has word pieces with capital letters.*\"do_lower_case\""):
        load_language_tokenizer(str(folder(more=["Hello", "##World"])))
    tokenizer, _ = load_language_tokenizer(str(folder({"do_lower_case": False}, more=["Hello"])))
    assert tokenizer.encode("Hello", add_special_tokens=False).ids == [30_522]


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            {},
            r"vocab\.txt: is of a BertJapaneseTokenizer",
        ),
        ({"do_lower_case": "no"}, {}, r"tokenizer_config\.json: do_lower_case.*true or false"),
        (None, {"added_tokens": {"newword": 40_000}}, r"'newword' is to have id 40000, but the next free one is 30522"),
        (None, {"added_tokens": {"newword": "x"}}, "its added tokens cannot be read"),
        (
            None,
            {"added_tokens": {"newone": 30_522, "newtwo": 30_522}},
            "'newtwo' is to have id 30522, but the next .* is 30523",
        ),
    ],
)
def test_what_cannot_be_converted_is_told(folder, settings, files, message):
    with pytest.raises(XdscaleError, match=message):
        load_language_tokenizer(str(folder(settings, **files)))


def test_vocabularies_of_other_kinds_are_told(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
    with pytest.raises(XdscaleError, match=r"no tokenizer\.json and no vocab\.txt but spiece\.model.*save_pretrained"):
        load_language_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(XdscaleError, match=r"vocab\.txt: has no \[UNK\]"):
        load_language_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(XdscaleError, match=r"vocab\.txt: not a vocabulary"):
        load_language_tokenizer(str(tmp_path))
    words = {"type": "WordLevel", "vocab": {"[CLS]": 0, "[SEP]": 1, "[MASK]": 2, "[PAD]": 3}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words}))
    with pytest.raises(XdscaleError, match=r"lacks its own token for unknown words, \[UNK\]"):
        load_language_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_git_lfs_pointers_are_told(folder, name):
    path = folder() / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 231508\n")
    with pytest.raises(XdscaleError, match=rf"{name}: this is a Git LFS pointer.*git lfs pull"):
        load_language_tokenizer(str(path.parent))
