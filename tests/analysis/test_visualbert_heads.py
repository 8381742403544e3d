"""`xdscale grounding` on a small VisualBERT whose attention is known: what it asks, counts and writes."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, VisualBertModel
from typer.testing import CliRunner

from xdscale.analysis import visualbert_heads
from xdscale.analysis.visualbert_heads import HeadReader, captions_of
from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.visualbert import from_bert, load_visualbert, save_visualbert
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions

WIDTH = 12
BOXES = {"11": [(0, 0, 50, 50), (50, 50, 99, 99)], "12": [(0, 0, 30, 30), (40, 0, 90, 50), (0, 60, 90, 99)]}
GOLD = {"11": {1: (1, 1, 51, 51), 2: (51, 51, 99, 99)}, "12": {3: (1, 61, 91, 99)}}
SENTENCES = {
    "11": ["[/EN#1/animals A brown dog] chases [/EN#2/animals the cat] .", "Nothing is here ."],
    "12": ["[/EN#3/people The women] walk ."],
}
PARSES = [
    ["A 3 det", "brown 3 amod", "dog 4 nsubj", "chases 0 root", "the 6 det", "cat 4 dobj", ". 4 punct"],
    ["Nothing 2 nsubj", "is 0 root", "here 2 advmod", ". 2 punct"],
    ["The 2 det", "women 3 nsubj", "walk 0 root", ". 3 punct"],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images with their sentences and boxes, as the public files have them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("Sentences", "Annotations"):
        (folder / "Flickr30kEntities" / name).mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / "Flickr30kEntities" / f"{split}.txt").write_text("11\n12\n")
    for image, sentences in SENTENCES.items():
        (folder / "Flickr30kEntities" / "Sentences" / f"{image}.txt").write_text("\n".join(sentences) + "\n")
        objects = "".join(
            f"<object><name>{entity}</name><bndbox>"
            + "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
            + "</bndbox></object>"
            for entity, box in GOLD[image].items()
        )
        (folder / "Flickr30kEntities" / "Annotations" / f"{image}.xml").write_text(
            f"<annotation>{objects}</annotation>"
        )
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("regions") / "regions", np.random.default_rng(0)
    images = [
        RegionImage(
            image,
            size=(100, 100),
            boxes=np.array(boxes, np.float32),
            features=rng.standard_normal((len(boxes), WIDTH)).astype(np.float32),
            labels={"confidences": np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)},
        )
        for image, boxes in BOXES.items()
    ]
    build_regions(images, folder, Detector(model="drawn", class_count=0))
    return folder


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    """A VisualBERT made of the 2-layer BERT."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("visualbert")
    model = from_bert(load_language_encoder(Language(name=str(cassette_model)), dropout=0.1), region_size=WIDTH)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_visualbert(model.config, state, out, alignment="mean")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cassette_model / name, out)
    return out


@pytest.fixture(scope="module")
def parses(tmp_path_factory):
    path = tmp_path_factory.mktemp("parses") / "val.conllu"
    text = ""
    for sentence in PARSES:
        for number, word in enumerate(sentence, 1):
            form, head, relation = word.split()
            text += f"{number}\t{form}\t_\t_\t_\t_\t{head}\t{relation}\t_\t_\n"
        text += "\n"
    path.write_text(text)
    return path


def bert_of(model):
    """A BERT of the small VisualBERT's sizes."""
    encoder, _ = load_visualbert(model)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return BertModel(BertConfig(**{name: getattr(encoder.config, name) for name in sizes}))


def test_entities_and_relations_are_asked_from_the_words_that_they_should(model, data, table, parses):
    """Of the words "dog", "cat" and "women"; for relations of what depends on them, with their boxes as gold."""
    found = HeadReader(model, data, RegionTable.open(table), split="dev", parses=parses).count()
    assert found.entities.words == 3
    assert found.entities.baseline == pytest.approx(1 / 3)  # the surest region is the dog
    assert {relation: one.words for relation, one in found.relations.items()} == {"det": 3, "amod": 1}
    assert found.relations["amod"].baseline == 1.0
    assert found.relations["det"].baseline == pytest.approx(1 / 3)


def test_behind_the_phrases_of_a_caption_its_dependents_are_asked(data, parses):
    asked = visualbert_heads._asked(data / "Flickr30kEntities" / "val.txt", parses)
    found = []
    for example, relation in asked:
        ((span,),) = example.spans[0]
        found.append((relation, example.texts[0][0][span.start : span.end], [*example.truth.boxes][0]))
    assert [(relation, words) for relation, words, _ in found] == [
        (None, "A brown dog"), (None, "the cat"), ("det", "A"), ("amod", "brown"), ("det", "the"),
        (None, "The women"), ("det", "The"),
    ]  # fmt: skip
    boxes = [box for *_, box in found]
    assert boxes[0] == boxes[2] == boxes[3] != boxes[1] == boxes[4]
    assert boxes[5] == boxes[6]


@pytest.mark.parametrize(("whole_image", "confidences"), [("first", True), ("none", False), ("first", False)])
def test_the_baseline_is_what_the_detector_found(model, data, tmp_path, whole_image, confidences):
    """The whole image is no detection, however sure the table is of it; and nobody is sure without confidences."""
    images, rng = [], np.random.default_rng(0)
    for image, boxes in BOXES.items():
        boxes = np.array([[0, 0, 100, 100]] * (whole_image == "first") + list(boxes), np.float32)
        labels = {"confidences": np.linspace(1, 0.5, len(boxes), dtype=np.float32)} if confidences else {}
        features = rng.standard_normal((len(boxes), WIDTH)).astype(np.float32)
        images.append(RegionImage(image, size=(100, 100), boxes=boxes, features=features, labels=labels))
    build_regions(images, tmp_path / "regions", Detector(model="drawn", class_count=0), whole_image=whole_image)
    found = HeadReader(model, data, RegionTable.open(tmp_path / "regions"), split="dev", parses=None).count()
    assert found.entities.baseline == pytest.approx(1 / 3 if confidences else np.nan, nan_ok=True)


def test_figures_are_those_of_transformers_on_inputs_made_by_hand(model, data, table):
    """The last word piece of each phrase asks; its row holds words and regions, and sums to 1."""
    found = HeadReader(model, data, RegionTable.open(table), split="dev", parses=None).count().entities
    encoder = VisualBertModel.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    regions, hits, mass = RegionTable.open(table), [], []
    for image, caption, word, right in (
        ("11", "A brown dog chases the cat .", "dog", 0), ("11", "A brown dog chases the cat .", "cat", 1),
        ("12", "The women walk .", "women", 2),
    ):  # fmt: skip
        encoded = tokenizer.encode(caption)
        features = torch.tensor(regions.read(regions.rows([image])).features).float()[None]
        with torch.no_grad():
            attentions = encoder(
                input_ids=torch.tensor([encoded.ids]),
                token_type_ids=torch.zeros(1, len(encoded.ids), dtype=torch.long),
                visual_embeds=features,
                visual_token_type_ids=torch.zeros(1, features.shape[1], dtype=torch.long),
                output_attentions=True,
            ).attentions
        rows = torch.stack(attentions)[:, 0, :, encoded.tokens.index(word)]
        np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
        mass.append(rows[..., len(encoded.ids) :].sum(-1))
        hits.append(rows[..., len(encoded.ids) :].argmax(-1) == right)
    np.testing.assert_allclose(found.mass, torch.stack(mass).mean(0), atol=1e-5)
    np.testing.assert_allclose(found.accuracy, torch.stack(hits).float().mean(0), atol=1e-6)


def test_among_equal_regions_the_first_is_the_most_attended(model, data, table):
    """Where keys are zero, all regions of an image get the same attention from every head, to the last bit."""
    encoder, _ = load_visualbert(model, dropout=0.0)
    for name, parameter in encoder.named_parameters():
        if ".key." in name:
            torch.nn.init.zeros_(parameter)
    flat = model.parent / "flat"
    flat.mkdir(exist_ok=True)
    save_visualbert(
        encoder.config, {f"model.{name}": value for name, value in encoder.state_dict().items()}, flat, alignment="mean"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, flat)
    found = HeadReader(flat, data, RegionTable.open(table), split="dev", parses=None).count()
    assert np.allclose(found.entities.accuracy, 1 / 3)  # region 0 is the dog, and in the other image wrong
    assert found.relations is None
    assert (found.entities.mass > 0).all()
    assert (found.entities.mass < 1).all()


def test_the_command_of_the_documentation_writes_tables_picture_and_captions(
    model, data, table, parses, tmp_path, monkeypatch
):
    page = (Path(__file__).parents[2] / "docs" / "analyses.md").read_text(encoding="utf-8")
    page = page.replace(" \\\n    ", " ")
    (command,) = re.findall(r"^xdscale (grounding .*)$", page, re.MULTILINE)
    here = {"exports/visualbert-flickr30k": model, "data": data, "data/flickr30k-regions": table, "val.conllu": parses}
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "grounding"
    done = CliRunner().invoke(app, [str(here.get(word, word)) for word in command.split()])
    assert done.exit_code == 0, done.output
    assert "3 entities" in done.output
    assert "50.77" in done.output
    assert "19.59 → 54.01 (10-1)" in done.output
    assert (out / "captions.txt").read_text().splitlines() == [
        "A brown dog chases the cat .", "Nothing is here .", "The women walk .",
    ]  # fmt: skip
    heads = list(csv.DictReader((out / "heads.csv").open()))
    assert {row["words"] for row in heads} == {"3"}
    relations = list(csv.DictReader((out / "relations.csv").open()))
    assert [(row["relation"], row["arcs"]) for row in relations] == [("det", "3"), ("amod", "1")]
    assert (out / "heads.svg").read_bytes().startswith(b"<?xml")


def test_a_map_is_written_by_region_and_by_category(model, data, table, tmp_path):
    out, categories = tmp_path / "grounding", tmp_path / "categories.json"
    categories.write_text('{"dog": [0], "all": [0, 1]}')
    arguments = ["grounding", str(model), "--data", str(data), "--regions", str(table), "--out", str(out)]
    found = {}
    for options in ([], ["--categories", str(categories)]):
        done = CliRunner().invoke(app, [*arguments, "--map", "11#0", *options])
        assert done.exit_code == 0, done.output
        with (out / "map-11-0.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found |= {(row["layer"], row["head"], row["position"], row["region"]): float(row["weight"]) for row in rows}
        first = [row for row in rows if (row["layer"], row["head"], row["region"]) == ("1", "1", rows[0]["region"])]
        assert [row["piece"] for row in first] == ["[CLS]", "a", "brown", "dog", "chases", "the", "cat", ".", "[SEP]"]
        assert (out / "map-11-0.svg").read_bytes().startswith(b"<?xml")
    for layer, head, position, region in list(found):
        one, other = (found[layer, head, position, key] for key in ("0", "1"))
        assert found[layer, head, position, "dog"] == one
        assert found[layer, head, position, "all"] == pytest.approx(one + other, abs=2e-6)
        assert region in ("0", "1", "dog", "all")
    reader = HeadReader(model, data, RegionTable.open(table), split="dev", parses=None)
    for number in (2, -1):
        with pytest.raises(XdscaleError, match=f"'dog' has region {number}; the image has 0 to 1"):
            reader.map("11#0", {"dog": [0, number]})
    with pytest.raises(XdscaleError, match="--map 11#1: no phrase with boxes in such a caption"):
        reader.map("11#1")


def test_what_does_not_fit_is_named(model, data, table, parses, tmp_path):
    regions = RegionTable.open(table)
    with pytest.raises(XdscaleError, match="--split val: expected train, dev, test"):
        captions_of(data, "val")
    short = tmp_path / "short.conllu"
    short.write_text(parses.read_text().partition("\n\n")[0] + "\n\n")
    with pytest.raises(XdscaleError, match=r"short\.conllu: 1 sentence, expected 3"):
        HeadReader(model, data, regions, split="dev", parses=short).count()
    images = [
        RegionImage(image, size=(100, 100), boxes=np.array(boxes, np.float32), features=np.zeros((len(boxes), 5), "f4"))
        for image, boxes in BOXES.items()
    ]
    build_regions(images, tmp_path / "narrow", Detector(model="drawn"))
    told = f"narrow: features of 5 numbers; {model} reads 12 of each region: take a table of the network that it was"
    with pytest.raises(XdscaleError, match=told):
        HeadReader(model, data, RegionTable.open(tmp_path / "narrow"), split="dev", parses=None)
    late = from_bert(bert_of(model), region_size=WIDTH, early_fusion=False)
    folder = tmp_path / "late"
    folder.mkdir()
    state = {f"model.{name}": value for name, value in late.state_dict().items()}
    save_visualbert(late.config, state, folder, alignment="mean")
    with pytest.raises(XdscaleError, match="was trained without early fusion"):
        HeadReader(folder, data, regions, split="dev", parses=None).count()
