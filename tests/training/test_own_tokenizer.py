"""The encoder's own tokenizer, however its folder holds it: shards' check, run, export and finetuning agree."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, BertTokenizer

from xdscale.errors import XdscaleError
from xdscale.pretrained.language import own_tokenizer
from xdscale.pretrained.language_files import save_language_files
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import LanguageSettings
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Manifest
from xdscale.systems.mlm import check_language
from xdscale.tasks.text_subjects import LanguageSubject

TEXT = "Hello ÉTÉ, naïve 漢字 cats"


@pytest.fixture
def folder(cassette_model, tmp_path):
    """A copy of the real BERT without its tokenizer."""
    shutil.copytree(cassette_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    return tmp_path / "model"


@pytest.fixture
def stored(cassette_model):
    return json.loads((cassette_model / "tokenizer.json").read_text())


def spec(folder, weights="pretrained"):
    return Language(name=str(folder), weights=weights)


def write_vocabulary(folder, words):
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def kept(folder, tmp_path):
    """What a run keeps of the folder, and so an export holds."""
    save_language_files(spec(folder), tmp_path / "kept")
    return tmp_path / "kept"


def same_everywhere(folder, tmp_path):
    """Checks the tokenizer that an export will have against the one that shards are built with; returns its ids."""
    ours, info = load_language_tokenizer(str(folder))
    ids = ours.encode(TEXT, add_special_tokens=False).ids
    exported = kept(folder, tmp_path)
    assert load_language_tokenizer(str(exported))[1].sha256 == info.sha256
    for theirs in (AutoTokenizer.from_pretrained(exported), BertTokenizer.from_pretrained(exported)):
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
        assert theirs("x")["input_ids"][0] == theirs.cls_token_id == info.cls_id
        assert (theirs.mask_token_id, theirs.pad_token_id, theirs.model_max_length) == (info.mask_id, info.pad_id, 512)
    assert own_tokenizer(str(folder))[1].sha256 == info.sha256
    return ids


@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}])
def test_word_pieces_alone(folder, stored, short_shards, tmp_path, settings):
    """What settings leave out, such as special tokens and the greatest length, an export says."""
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = stored["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    write_vocabulary(folder, words)
    ids = same_everywhere(folder, tmp_path)
    assert ids[:2] == [vocabulary["hello"], vocabulary["et"]]
    check_language(spec(folder), Manifest.load(short_shards))  # which a tokenizer.json of these word pieces built
    red, blue = words.index("red"), words.index("blue")
    words[red], words[blue] = words[blue], words[red]
    write_vocabulary(folder, words)
    with pytest.raises(XdscaleError, match="has another one.*its word pieces would have other ids"):
        check_language(spec(folder), Manifest.load(short_shards))


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_tokenizer_json_alone_is_taken_as_it_is(folder, stored, tmp_path, lowercase):
    """transformers lowers the case of a BERT's text unless tokenizer_config.json says otherwise."""
    stored["normalizer"]["lowercase"] = lowercase
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    ids = same_everywhere(folder, tmp_path)
    assert (ids[0] == stored["model"]["vocab"]["hello"]) == lowercase


def test_no_tokenizer_at_all(folder, short_shards, tmp_path):
    with pytest.raises(XdscaleError, match=r"the folder has no tokenizer\.json and no vocab\.txt"):
        check_language(spec(folder), Manifest.load(short_shards))
    with pytest.raises(XdscaleError, match=r"the folder has no tokenizer\.json and no vocab\.txt"):
        LanguageSubject(str(folder), LanguageSettings()).describe()
    check_language(spec(folder, "random"), Manifest.load(short_shards))  # any tokenizer will do
    assert not list(kept(folder, tmp_path).glob("tokenizer*"))
