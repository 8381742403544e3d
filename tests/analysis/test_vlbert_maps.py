"""`xdscale attention-maps`: what VL-BERT's words read in regions, against the layers computed by hand in fp64."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from xdscale.analysis.vlbert_maps import MapReader, rescaled
from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.models.vlbert import VLBERT, VLBertConfig
from xdscale.pretrained.vlbert import load_vlbert, save_vlbert
from xdscale.shards.regions import RegionTable
from xdscale.shards.table import Table

HEADS, LAYERS, SIZE = 2, 3, 16


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    """A VL-BERT of three layers with two heads, whose values are large enough for its attention to differ."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("vlbert")
    config = VLBertConfig(
        vocab_size=30522, hidden_size=SIZE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=24,
        max_position_embeddings=64, appearance_size=12, masks_features=True,
    )  # fmt: skip
    encoder = VLBERT(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    save_vlbert(config, {f"model.{name}": value for name, value in encoder.state_dict().items()}, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cassette_model / name, out)
    return out


def norm(states, state, name):
    mean, variance = states.mean(-1, keepdim=True), states.var(-1, keepdim=True, unbiased=False)
    return (states - mean) / (variance + 1e-12).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(states, state, name):
    return states @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def by_hand(state, text, regions):
    """Attention of each layer and head, fp64 [layers, heads, tokens, tokens], of one caption and its regions."""
    features = torch.from_numpy(regions.features.astype(np.float64))
    features = torch.cat([features.mean(0, keepdim=True).half().double(), features])  # the whole image, as it is kept
    size = np.tile(regions.sizes[0], 2).astype(np.float64)
    boxes = torch.from_numpy(np.concatenate([[[0, 0, 1, 1]], regions.boxes / size]))
    places = 100 * torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    angles = places[:, :, None] / 1000 ** (torch.arange(256).double() / 256)
    seen = torch.cat([torch.cat([angles.sin(), angles.cos()], -1).flatten(1), features], 1)
    seen = linear(seen, state, "regions.projection").clamp(min=0)
    words, count, at = len(text), len(seen), "embeddings."
    tokens = torch.cat([
        state[at + "word_embeddings.weight"][text] + norm(seen[:1], state, at + "visual_norm_text"),
        state["region_tokens.weight"][:1] + norm(seen, state, at + "visual_norm_region"),
        state[at + "end_embedding.weight"],
    ])  # fmt: skip
    positions = [*range(words), *[words] * count, words + 1]
    segments = [0] * words + [2] * (count + 1)
    tokens = tokens + state[at + "position_embeddings.weight"][positions]
    states = norm(tokens + state[at + "token_type_embeddings.weight"][segments], state, at + "LayerNorm")
    found = []
    for layer in range(LAYERS):
        own = f"layers.{layer}."
        query, key, value = (
            linear(states, state, f"{own}attention.{name}").view(len(states), HEADS, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(1, 2) / (SIZE / HEADS) ** 0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        found.append(weights)
        mixed = (weights @ value).transpose(0, 1).reshape(len(states), SIZE)
        states = norm(states + linear(mixed, state, f"{own}attention.output"), state, f"{own}attention.norm")
        inner = linear(states, state, f"{own}feed_forward.intermediate")
        inner = inner / 2 * (1 + torch.erf(inner / 2**0.5))
        states = norm(states + linear(inner, state, f"{own}feed_forward.output"), state, f"{own}feed_forward.norm")
    return torch.stack(found)


def test_the_maps_are_those_of_the_layers_by_hand(model, captioned_pictures):
    reader = MapReader(model, captioned_pictures, split="train")
    image, shown, boxes = reader.maps(7)
    captions = Table(captioned_pictures, "train", "captions")
    row = np.array([7])
    words, pictures = captions.read_ragged("words", row)[0], RegionTable(captions.linked("image"))
    regions = pictures.read(captions.read("image", row).astype(np.int64))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = [tokenizer.token_to_id("[CLS]"), *words.tolist(), tokenizer.token_to_id("[SEP]")]
    assert shown.pieces == [tokenizer.id_to_token(piece) for piece in text]
    count = len(regions.boxes)
    assert shown.keys == ["image", *map(str, range(count))]
    assert image == pictures.image_ids(captions.read("image", row).astype(np.int64))[0]
    np.testing.assert_array_equal(boxes[1:], regions.boxes)
    np.testing.assert_array_equal(boxes[0], [0, 0, *regions.sizes[0]])
    state = {name: value.double() for name, value in load_vlbert(model)[0].state_dict().items()}
    wanted = by_hand(state, text, regions)
    assert wanted.shape == (LAYERS, HEADS, *[len(text) + count + 2] * 2)
    np.testing.assert_allclose(shown.weights, wanted[:, :, : len(text), len(text) : -1], atol=2e-5)
    assert shown.weights.std(-1).max() > 0.02  # no uniform attention, which anything would agree with


def test_each_layer_is_rescaled_over_all_its_heads():
    weights = np.array([[[[0.1, 0.2]], [[0.3, 0.5]]], [[[0.25, 0.25]], [[0.25, 0.25]]]])
    wanted = np.array([[[[0, 0.25]], [[0.5, 1]]], [[[0, 0]], [[0, 0]]]])
    np.testing.assert_allclose(rescaled(weights), wanted, atol=1e-12)


def test_what_is_written(model, captioned_pictures, tmp_path):
    out = tmp_path / "maps"
    arguments = ["attention-maps", str(model), str(captioned_pictures), "--split", "train", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--number", "7", "--number", "0"], catch_exceptions=False)
    assert "caption 7, image" in done.stdout
    for number in (0, 7):
        pictures = {f"caption-{number}-layer-{layer}.svg" for layer in range(LAYERS)}
        assert {path.name for path in out.glob(f"caption-{number}*")} == pictures | {
            f"caption-{number}.csv", f"caption-{number}.npz",
        }  # fmt: skip
    assert (out / "caption-7-layer-0.svg").read_text().count("head ") == HEADS
    with np.load(out / "caption-7.npz") as arrays:
        found = dict(arrays)
    shown = MapReader(model, captioned_pictures, split="train").maps(7).shown
    np.testing.assert_array_equal(found["weights"], shown.weights)
    assert (found["pieces"].tolist(), found["keys"].tolist()) == (shown.pieces, shown.keys)
    for layer in found["rescaled"]:
        assert (layer.min(), layer.max()) == (0, 1)
    rows = list(csv.DictReader((out / "caption-7.csv").open()))
    assert len(rows) == found["weights"].size
    last = rows[-1]
    assert (last["layer"], last["head"], last["region"]) == (str(LAYERS - 1), str(HEADS - 1), shown.keys[-1])
    assert float(last["weight"]) == pytest.approx(found["weights"][-1, -1, -1, -1], abs=1e-6)
    assert float(last["rescaled"]) == pytest.approx(found["rescaled"][-1, -1, -1, -1], abs=1e-6)


def test_what_does_not_fit_is_refused(model, captioned_pictures, tmp_path):
    reader = MapReader(model, captioned_pictures, split="train")
    with pytest.raises(XdscaleError, match=r"--number 99999: the split train of .* has captions 0 to"):
        reader.maps(99_999)
    config, pieces = reader._model.config, len(reader.maps(7).shown.pieces)
    config.max_position_embeddings = pieces + 2  # those of the regions and of the end
    reader.maps(7)
    config.max_position_embeddings -= 1
    with pytest.raises(XdscaleError, match=f"--number 7: {pieces - 2} word pieces; the model has {pieces + 1} pos"):
        reader.maps(7)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["no word of ours"] = words["model"]["vocab"].pop("dog")
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(XdscaleError, match="its captions are ids of the tokenizer of"):
        MapReader(other, captioned_pictures, split="train")
    config = VLBertConfig(
        vocab_size=30522, hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        appearance_size=13,
    )  # fmt: skip
    save_vlbert(config, {f"model.{name}": value for name, value in VLBERT(config).state_dict().items()}, other)
    shutil.copy(model / "tokenizer.json", other)
    with pytest.raises(XdscaleError, match=r"features of 12 numbers; .* reads 13 of each region"):
        MapReader(other, captioned_pictures, split="train")


def test_a_dataset_of_images_alone_is_told_how_features_are_made(model, photographs, small_trunk, tmp_path):
    """On which a model is trained from pixels; its branch has 1 + 1 + 2 + 3 blocks of three layers, and 2 more."""
    trained = shutil.copytree(model, tmp_path / "trained")
    shutil.copy(small_trunk, trained / "fast_rcnn.safetensors")
    with pytest.raises(XdscaleError) as caught:
        MapReader(trained, photographs, split="train")
    command = f"--network vlbert:resnet23 --weights {trained}/fast_rcnn.safetensors --boxes BOXES --whole-image --out"
    assert str(caught.value) == (
        f"{photographs}: images and no features; {trained} reads 12 numbers of each region: its own branch makes them "
        f"from pixels: 'xdscale regions extract IMAGES {command} DATASET', then captions with 'xdscale shards captions'"
    )
