"""Finding and checking the language model's tokenizer."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.language import fingerprint, load_language_tokenizer, notes_on_unknown


def test_bert_base_uncased_ids(cassette_model):
    tokenizer, info = load_language_tokenizer(str(cassette_model))
    assert (info.vocab_size, info.cls_id, info.sep_id, info.mask_id, info.pad_id) == (30_522, 101, 102, 103, 0)
    # "hello world" in bert-base-uncased.
    assert tokenizer.encode("Hello world", add_special_tokens=False).ids == [7592, 2088]


@pytest.mark.parametrize(("unknown", "told"), [(0, []), (5, []), (6, ["6%"]), (100, ["100%"])])
def test_a_text_that_is_unknown_from_a_twentieth_on_is_told(cassette_model, unknown, told):
    tokenizer, _ = load_language_tokenizer(str(cassette_model))
    ids = np.array([100] * unknown + [7592] * (100 - unknown), "<u2")  # [UNK], and "hello" in bert-base-uncased
    notes = notes_on_unknown("data: captions", ids, tokenizer)
    assert [note.split()[2] for note in notes] == told
    assert notes_on_unknown("data: captions", ids[:0], tokenizer) == []


def test_file_folder_and_package_are_the_same_tokenizer(cassette_model, tmp_path):
    shutil.copy(cassette_model / "tokenizer.json", tmp_path)
    names = [str(cassette_model), str(tmp_path), str(tmp_path / "tokenizer.json"), "package:cognition/model"]
    assert len({load_language_tokenizer(name)[1].sha256 for name in names}) == 1


def test_fingerprint_ignores_padding_and_sees_the_vocabulary(cassette_model):
    stored = json.loads((cassette_model / "tokenizer.json").read_text())
    words = sorted(stored["model"]["vocab"], key=lambda word: (word[0] != "[", word not in ("cat", "dog")))
    stored["model"]["vocab"] = {word: number for number, word in enumerate(words[:3000])}
    plain = fingerprint(Tokenizer.from_str(json.dumps(stored)))
    padded = Tokenizer.from_str(json.dumps(stored))
    padded.enable_padding(length=8)
    padded.enable_truncation(4)
    assert fingerprint(padded) == plain
    vocabulary = stored["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    assert fingerprint(Tokenizer.from_str(json.dumps(stored))) != plain
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    others = {plain}
    for stage, name, value in (
        ("normalizer", "lowercase", False),
        ("model", "max_input_chars_per_word", 7),
        ("model", "unk_token", "[PAD]"),
        ("pre_tokenizer", "type", "Whitespace"),
    ):
        changed = stored | {stage: stored[stage] | {name: value}}
        others.add(fingerprint(Tokenizer.from_str(json.dumps(changed))))
    assert len(others) == 5


def test_stored_truncation_and_padding_are_switched_off(cassette_model, tmp_path):
    tokenizer = Tokenizer.from_file(str(cassette_model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded, _ = load_language_tokenizer(str(tmp_path))
    assert len(loaded.encode("word " * 200, add_special_tokens=False)) == 200


def test_text_that_spells_a_special_token_is_text(cassette_model):
    tokenizer, info = load_language_tokenizer(str(cassette_model))
    ids = tokenizer.encode("the [MASK] and [SEP]", add_special_tokens=False).ids
    assert not {info.mask_id, info.sep_id} & set(ids)


def test_bad_tokenizers_are_named(tmp_path, monkeypatch):
    with pytest.raises(XdscaleError, match=r"no tokenizer\.json"):
        load_language_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(XdscaleError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_language_tokenizer(str(tmp_path))
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words}))
    with pytest.raises(XdscaleError, match=r"has no \[MASK\], \[PAD\]"):
        load_language_tokenizer(str(tmp_path))
    words["vocab"] |= {"[MASK]": 3, "[PAD]": 4}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words}))
    monkeypatch.setattr("xdscale.shards.language.LARGEST_VOCABULARY", 5)
    assert load_language_tokenizer(str(tmp_path))[1].vocab_size == 5
    monkeypatch.undo()
    words["vocab"] |= {f"w{n}": n for n in range(5, 65_537)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words}))
    with pytest.raises(XdscaleError, match="65537 ids do not fit the shards' 16 bits"):
        load_language_tokenizer(str(tmp_path))


def test_hub_name_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(XdscaleError, match="no-such-model: no such file or folder, and the model hub did not"):
        load_language_tokenizer("no-such-model")


def test_of_a_name_on_the_hub_the_tokenizers_files_alone_are_fetched(cassette_model, monkeypatch):
    asked = []

    def fetch(name, *, allow_patterns):
        asked.append((name, set(allow_patterns)))
        return str(cassette_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_language_tokenizer("some/bert")[1].sha256 == load_language_tokenizer(str(cassette_model))[1].sha256
    files = {"tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"}
    assert asked == [("some/bert", files)]
