"""Weights in parts, Git LFS pointers, published masked-LM heads: read right, or told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from xdscale.errors import XdscaleError
from xdscale.plan.profile import build_on_meta, modules, parameter_table
from xdscale.plan.states import count
from xdscale.pretrained.clip import load_clip_text_tower
from xdscale.pretrained.language import (
    _language_folder,
    language_config,
    language_weights,
    load_language_encoder,
    own_tokenizer,
)
from xdscale.recipes.mlm.schema import Language, MaskedLMRecipe
from xdscale.recipes.xdbert.schema import Clip
from xdscale.systems.mlm import build_masked_lm
from xdscale.weights import weights_sha256


def language(name, weights="pretrained", sha256=None):
    return Language(name=str(name), weights=weights, sha256=sha256)


def masked_lm_recipe(folder, weights="pretrained"):
    return MaskedLMRecipe(
        system="mlm",
        model={"language": language(folder, weights)},
        data={"shards": "x"},
        training={"steps": 1, "global_batch": 1},
        output={"folder": "x"},
    )


@pytest.fixture
def folder(cassette_model, tmp_path):
    """A copy of the real BERT, to be spoilt."""
    return shutil.copytree(cassette_model, tmp_path / "model")


@pytest.fixture
def in_parts(folder):
    """Returns a function that splits its weights over two files of a kind, with an index."""

    def split(suffix):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        names, files = sorted(state), [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
        weight_map = {name: files[number % 2] for number, name in enumerate(names)}
        for file in files:
            part = {name: state[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    return split


@pytest.mark.parametrize(
    ("there", "asked_for"),
    [
        ("model.safetensors", 1),
        ("model.safetensors.index.json", 1),
        ("pytorch_model.bin", 2),
        ("pytorch_model.bin.index.json", 2),
    ],
)
def test_of_a_model_on_the_hub_one_kind_of_weights_is_fetched(tmp_path, monkeypatch, there, asked_for):
    """Safetensors if there are any: a second copy of the weights would be gigabytes for nothing."""
    asked = []

    def fetch(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        if there in allow_patterns:
            (tmp_path / there).touch()
        return str(tmp_path)

    monkeypatch.setattr("xdscale.pretrained.language.snapshot_download", fetch)
    assert _language_folder("someone/model") == tmp_path
    assert [name for name, _ in asked] == ["someone/model"] * asked_for
    assert {"config.json", "tokenizer.json", "vocab.txt"} <= set(asked[0][1])
    assert "model-*.safetensors" in asked[0][1]
    assert not any(pattern.endswith(".bin") for pattern in asked[0][1])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts_are_the_whole(folder, in_parts, cassette_model, suffix):
    wanted = load_language_encoder(language(cassette_model), dropout=0.1).state_dict()
    index = in_parts(suffix)
    parts = sorted(folder.glob(f"*-of-00002.{suffix}"))
    assert language_weights(language(folder)) == parts
    # What `cat parts | sha256sum` says.
    right = weights_sha256(parts)
    (folder / "whole").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert right == weights_sha256([folder / "whole"])
    found = load_language_encoder(language(folder, sha256=right), dropout=0.1).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if not name.startswith("pooler."))
    with pytest.raises(XdscaleError, match=r"00001-of-00002.*00002-of-00002.*SHA-256 is"):
        load_language_encoder(language(folder, sha256="ab" * 32), dropout=0.1)
    head = build_masked_lm(masked_lm_recipe(folder)).mlm.state_dict()
    assert torch.equal(head["norm.weight"], build_masked_lm(masked_lm_recipe(cassette_model)).mlm.norm.weight)
    parts[1].unlink()
    with pytest.raises(XdscaleError, match=rf"{index.name}: names .*00002-of-00002.{suffix}', which is missing"):
        load_language_encoder(language(folder), dropout=0.1)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "parts/model.safetensors", "model.bin", "..", ".", ""]
)
def test_an_index_that_names_other_files_is_refused(folder, in_parts, name):
    index = in_parts("safetensors")
    values = json.loads(index.read_text())
    values["weight_map"]["bert.pooler.dense.bias"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match=r"index\.json: names .*; expected \.safetensors files beside it"):
        load_language_encoder(language(folder), dropout=0.1)


@pytest.mark.parametrize("values", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_a_damaged_index_is_told(folder, in_parts, values):
    in_parts("safetensors").write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match=r"index\.json: not an index of weights"):
        load_language_encoder(language(folder), dropout=0.1)


def test_a_torn_part_is_told(folder, in_parts):
    in_parts("safetensors")
    part = folder / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(XdscaleError, match="cannot be loaded"):
        load_language_encoder(language(folder), dropout=0.1)


def test_git_lfs_pointers_are_told(folder, in_parts, tmp_path, clip_tiny):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n"
    in_parts("safetensors")
    part = folder / "model-00001-of-00002.safetensors"
    part.write_text(pointer)
    with pytest.raises(XdscaleError, match=r"00001-of-00002\.safetensors: this is a Git LFS pointer.*git lfs pull"):
        load_language_encoder(language(folder), dropout=0.1)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(XdscaleError, match=r"config\.json: this is a Git LFS pointer"):
        language_config(language(folder))
    (tmp_path / "clip.pt").write_text(pointer)
    with pytest.raises(XdscaleError, match=r"clip\.pt: this is a Git LFS pointer"):
        load_clip_text_tower(Clip(name=str(clip_tiny), weights=str(tmp_path / "clip.pt")))


def test_a_run_folder_is_not_an_encoder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    with pytest.raises(XdscaleError, match=r"this is a run folder, not an encoder; export it first: xdscale export"):
        language_config(language(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; supported is 'abs"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_act": "gulu"}, "hidden_act is 'gulu', which transformers does not know"),
        ({"num_attention_heads": 5}, "hidden_size = 128 is not a multiple of num_attention_heads = 5"),
        ({"hidden_size": "wide"}, "not a bert configuration"),
    ],
)
def test_a_config_that_would_load_wrong_is_told(folder, values, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(XdscaleError, match=rf"config\.json: {message}"):
        load_language_encoder(language(folder, "random"), dropout=0.1)


@pytest.fixture
def published(tmp_path):
    """Returns a function that saves a small BERT with its masked-LM head, as transformers does."""

    def save(**values):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes, **values)).eval()
        with torch.no_grad():
            for parameter in model.cls.parameters():
                parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path)
        return model

    return save


@pytest.mark.parametrize(
    "values",
    [{}, {"hidden_act": "relu"}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, {"tie_word_embeddings": False}],
)
def test_a_published_head_predicts_what_transformers_predicts(published, tmp_path, values):
    theirs = published(**values)
    ours = build_masked_lm(masked_lm_recipe(tmp_path)).eval()
    ids, labels = torch.arange(12).view(1, 12), torch.arange(3)
    batch = {"language_ids": ids, "masked_lm_positions": torch.tensor([2, 5, 7]), "masked_lm_labels": labels}
    with torch.no_grad():
        loss, _ = ours(batch)["mlm"]
        logits = theirs(input_ids=ids).logits[0, [2, 5, 7]]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


def test_an_untied_decoder_is_counted_once_everywhere(published, tmp_path):
    published(tie_word_embeddings=False)
    spec = masked_lm_recipe(tmp_path)
    module = build_masked_lm(spec)
    rows = {row.part: row.parameters for row in parameter_table(spec)}
    assert rows["masked-LM head"] == sum(p.numel() for p in module.mlm.parameters()) == 64 * 16 + 64 + 17 * 16 + 32
    assert rows["model during training"] == sum(p.numel() for p in module.parameters())
    assert count(modules(build_on_meta(spec))) == rows["model during training"]


def test_heads_that_do_not_fit_are_told(published, tmp_path):
    published()
    state = load_file(tmp_path / "model.safetensors")
    words = state["bert.embeddings.word_embeddings.weight"]

    def spoilt(**changes):
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        save_file({name: value.clone() for name, value in changed.items()}, tmp_path / "model.safetensors")
        return masked_lm_recipe(tmp_path)

    with pytest.raises(XdscaleError, match=r"decoder\.weight is not the word embedding.*tie_word_embeddings"):
        build_masked_lm(spoilt(**{"cls.predictions.decoder.weight": words + 1}))
    with pytest.raises(XdscaleError, match=r"masked-LM head without cls\.predictions\.transform\.LayerNorm\.bias"):
        build_masked_lm(spoilt(**{"cls.predictions.transform.LayerNorm.bias": None}))
    with pytest.raises(XdscaleError, match=r"masked-LM head .* not of its config\.json: decoder_bias \[72\]"):
        build_masked_lm(spoilt(**{"cls.predictions.bias": torch.zeros(72)}))
    with pytest.raises(XdscaleError, match=rf"^{tmp_path}: transform\.bias: int64, expected floating point"):
        build_masked_lm(spoilt(**{"cls.predictions.transform.dense.bias": torch.zeros(16, dtype=torch.int64)}))
    with pytest.raises(XdscaleError, match=rf"^{tmp_path}: decoder_bias: not all values are finite"):
        build_masked_lm(spoilt(**{"cls.predictions.bias": torch.full((64,), torch.inf)}))
    # Some files have the bias under the decoder's name alone.
    bias = torch.arange(64.0)
    head = build_masked_lm(spoilt(**{"cls.predictions.bias": None, "cls.predictions.decoder.bias": bias})).mlm
    assert torch.equal(head.decoder_bias, bias)


def test_a_tokenizer_with_more_ids_than_embeddings_is_told(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 30_000}))
    with pytest.raises(XdscaleError, match=r"its tokenizer has 30522 ids, but the encoder has embeddings for 30000"):
        own_tokenizer(str(folder))
