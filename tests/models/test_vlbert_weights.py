"""VL-BERT's weights: from a BERT, from the release and back, and in a folder of ours (spec VL-BERT §1.6, §1.7)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from xdscale.errors import XdscaleError
from xdscale.models.heads import RegionClassHead, masked_lm_head
from xdscale.pretrained.vlbert import from_bert, load_vlbert, save_release, save_vlbert

from . import padded_vlbert

SIZES, release = padded_vlbert.SIZES, padded_vlbert.release
CLASSES = 11


def test_new_parts_begin_as_the_paper_says(varied_bert):
    """Spec VL-BERT §1.6."""
    bert = varied_bert(SIZES)
    model = from_bert(bert, masks_features=True)
    tables = model.embeddings
    assert torch.equal(tables.token_type_embeddings.weight[:2], bert.embeddings.token_type_embeddings.weight)
    for fresh in (tables.end_embedding, model.region_tokens, model.text_only, model.regions.projection):
        assert fresh.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not tables.visual_norm_text.weight.any()
    assert not tables.visual_norm_region.weight.any()
    assert not model.regions.mask.weight.any()
    electra = ElectraModel(ElectraConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(XdscaleError, match=r"VL-BERT is made of a BERT, not of 'electra'"):
        from_bert(electra, masks_features=False)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({}, (108_896_256, 109_486_848, 114_489_467, 114_491_515)),
        (LARGE, (334_098_432, 335_148_032, 342_069_627, 342_071_675)),
    ],
)
def test_parameters(sizes, parameters):
    """Spec VL-BERT fact 1: §1.7, with 1,600 classes and the background."""
    with torch.device("meta"):
        model = from_bert(BertModel(BertConfig(**sizes)), masks_features=True, with_pooler=True)
        heads = masked_lm_head(model), RegionClassHead(model.config.hidden_size, 1601)

    def count(*modules):
        return sum(value.numel() for value in {each for module in modules for each in module.parameters()})

    bare = count(model.embeddings, model.layers)
    whole = count(model, *heads) - count(model.pooler)
    assert (bare, bare + count(model.pooler), whole - 2048, whole) == parameters


def test_weights_go_to_the_release_and_back(release, tmp_path):
    theirs, path = release(classes=CLASSES)
    ours, heads = load_vlbert(path)
    state = {f"model.{name}": value for name, value in ours.state_dict().items()} | heads
    save_release(state, tmp_path / "again.model")
    found = torch.load(tmp_path / "again.model", weights_only=True)["state_dict"]
    for name, value in theirs.state_dict().items():
        if name != "vlbert.mlm_head.predictions.decoder.bias":  # transformers has the one bias under two names
            assert torch.equal(found.pop(f"module.{name}"), value), name
    assert not found
    (tmp_path / "folder").mkdir()
    save_vlbert(ours.config, state, tmp_path / "folder")
    again, more = load_vlbert(tmp_path / "folder", dropout=0.3)
    assert again.layers[0].attention.attention.dropout == 0.3
    for name, value in (ours.state_dict() | heads).items():
        assert torch.equal((again.state_dict() | more)[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.vlbert.word_embeddings.weight"), r"no checkpoint of VL-BERT: it holds no vlb"),
        (lambda state: state.pop("module.vlbert.visual_ln_text.bias"), r"no fitting weights for embeddings\.visual_n"),
    ],
)
def test_what_is_no_vlbert_is_refused(release, change, message):
    _, path = release()
    stored = torch.load(path, weights_only=True)
    change(stored["state_dict"])
    torch.save(stored, path)
    with pytest.raises(XdscaleError, match=message):
        load_vlbert(path)


WORDS, TOKEN = "module.vlbert.word_embeddings.weight", "module.object_linguistic_embeddings.weight"
PROJECTION = "module.image_feature_extractor.obj_downsample.1.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (WORDS, torch.tensor(1.0), r"vlbert\.word_embeddings\.weight has the shape \[\], expected a matrix"),
        (WORDS, torch.zeros(64), r"has the shape \[64\], expected a matrix"),
        (WORDS, torch.zeros(0, 64), r"has the shape \[0, 64\], expected a matrix"),
        (WORDS, torch.zeros(1, 1).expand(10**6, 2**16), "no fitting weights for "),  # a few bytes of a file
        (WORDS, torch.zeros(1, 1).expand(10**9, 64), "vocab_size is 1000000000; expected a whole number from 1 to 16,"),
        (WORDS, torch.zeros(9, 200), "hidden_size = 200 is not a multiple of num_attention_heads = 3"),
        (WORDS, torch.zeros(9, 64).to_sparse(), f"holds {WORDS} sparse, .*; expected plain tensors"),
        (WORDS, torch.zeros(9, 64, device="meta"), f"holds {WORDS} .* without values; expected plain tensors"),
        (TOKEN, torch.zeros(1, 32), r"no fitting weights for region_tokens\.weight"),
        (PROJECTION, torch.zeros(64, 10), r"obj_downsample\.1\.weight reads 10 numbers; 2,048 are of the box"),
        (WORDS, torch.full((99, 64), torch.nan), r"word_embeddings\.weight: not all values are finite"),
        ("module.vlbert.mvrc_head.transform.dense.weight", torch.zeros(3, 3), r"for masked_region\.transform\.weight"),
    ],
)
def test_shapes_that_no_vlbert_has_are_refused(release, name, value, message):
    _, path = release(classes=CLASSES)
    stored = torch.load(path, weights_only=True)
    assert name in stored["state_dict"]
    stored["state_dict"][name] = value
    torch.save(stored, path)
    with pytest.raises(XdscaleError, match=f"^{path}: .*{message}"):
        load_vlbert(path)


def test_a_checkpoint_with_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"state_dict": {"module.vlbert": Trap()}}, tmp_path / "trap.model")
    with pytest.raises(XdscaleError, match="it is damaged or holds other things than tensors"):
        load_vlbert(tmp_path / "trap.model")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "visual_bert"}, "model_type is 'visual_bert'; expected 'vl_bert'"),
        ({"hidden_act": "gelo"}, "hidden_act is 'gelo', which transformers does not know"),
        ({"num_attention_heads": 5}, "hidden_size = 64 is not a multiple of num_attention_heads = 5"),
        ({"num_attention_heads": 0}, "hidden_size = 64 is not a multiple of num_attention_heads = 0"),
        (
            {"num_hidden_layers": 10**13},
            r"num_hidden_layers is 10000000000000; expected a whole number from 1 to 1,024",
        ),
        ({"vocab_size": -1}, "vocab_size is -1; expected a whole number from 1 to"),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, "hidden_size is 1000000000; expected a whole number from"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5; expected 0 to 1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; expected 0 to 1"),
        ({"pad_token_id": 99}, "pad_token_id is 99; vocab_size is 99"),
        ({"vocab_size": 2**24, "hidden_size": 2**16}, "no fitting weights for "),
        ({"num_hidden_layers": "three"}, "not a vl_bert configuration: "),
        ({"masks_features": "false"}, "masks_features is 'false'; expected true or false"),
    ],
)
def test_a_configuration_that_no_layer_can_be_built_of_is_refused(release, tmp_path, values, message):
    model, _ = load_vlbert(release()[1])
    save_vlbert(model.config, {f"model.{name}": value for name, value in model.state_dict().items()}, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(XdscaleError, match=message):
        load_vlbert(tmp_path)
