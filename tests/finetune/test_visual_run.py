"""Real runs on texts with images: what stands in the picture alone is learned, from the tasks' public files."""

import json
import shutil

import numpy as np
import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.finetune.command import Request, run_command
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.visualbert import from_bert, save_visualbert
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions.source import RegionImage, build_regions

WIDTH = 16
COLOURS = ("red", "green", "blue", "black")
TRAIN, HELD_OUT = 200, 60


@pytest.fixture(scope="module")
def pictures():
    """Colours of the two things in each picture."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(4), (TRAIN + HELD_OUT, 1)), axis=1)[:, :2]


@pytest.fixture(scope="module")
def regions(pictures, tmp_path_factory):
    """A table with two regions for each picture, whose features tell the colours; names as the tasks have them."""
    folder, rng = tmp_path_factory.mktemp("regions") / "table", np.random.default_rng(1)
    names = rng.standard_normal((4, WIDTH)).astype(np.float32) * 2
    boxes = np.array([[0, 0, 40, 40], [50, 50, 99, 99]], np.float32)
    images = []
    for number, colours in enumerate(pictures):
        features = names[colours] + rng.standard_normal((2, WIDTH)).astype(np.float32) * 0.1
        images.append(RegionImage(str(number), size=(100, 100), boxes=boxes, features=features))
        for side in (0, 1):
            name = f"{_split(number)}-{number}-0-img{side}"
            images.append(RegionImage(name, size=(100, 100), boxes=boxes[:1], features=features[side : side + 1]))
    build_regions(images, folder, Detector(model="drawn", class_count=0))
    return folder


def _split(number):
    return "train" if number < TRAIN else "dev"


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory):
    """VQA: both colours, questions alike: which region is first VisualBERT cannot know. The others ask for one."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("VQA", "NLVR2", "Flickr30kEntities/Sentences", "Flickr30kEntities/Annotations"):
        (folder / name).mkdir(parents=True)
    for split, year, numbers in (("train", "train2014", range(TRAIN)), ("dev", "val2014", range(TRAIN, len(pictures)))):
        questions, annotations, statements = [], [], []
        for number in numbers:
            first, second = (COLOURS[colour] for colour in pictures[number])
            about = {"question_id": number, "image_id": number}
            questions.append(about | {"question": "What colours are the things?"})
            both = " ".join(sorted((first, second)))
            answers = [{"answer": both, "answer_confidence": "yes", "answer_id": n} for n in range(10)]
            annotations.append(about | {"multiple_choice_answer": both, "answers": answers})
            label = str(bool(pictures[number][0] < 2))
            statements.append({"identifier": f"{split}-{number}-0-0", "sentence": "The left is warm.", "label": label})
            _write_phrase(folder / "Flickr30kEntities", number, first, second)
        kind = f"v2_OpenEnded_mscoco_{year}_questions.json"
        (folder / "VQA" / kind).write_text(json.dumps({"questions": questions}))
        (folder / "VQA" / f"v2_mscoco_{year}_annotations.json").write_text(json.dumps({"annotations": annotations}))
        (folder / "NLVR2" / f"{split}.json").write_text("".join(json.dumps(one) + "\n" for one in statements))
    shutil.copy(folder / "NLVR2" / "dev.json", folder / "NLVR2" / "test1.json")
    shutil.copy(folder / "NLVR2" / "dev.json", folder / "NLVR2" / "test2.json")
    for name, numbers in (
        ("train", range(TRAIN)),
        ("val", range(TRAIN, len(pictures))),
        ("test", range(TRAIN, len(pictures))),
    ):
        (folder / "Flickr30kEntities" / f"{name}.txt").write_text("".join(f"{number}\n" for number in numbers))
    return folder


def _write_phrase(folder, number, first, second):
    lines = [f"There is [/EN#{2 * number + 1}/other a {second} thing] ."] * 2
    (folder / "Sentences" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    box = "<xmin>50</xmin><ymin>50</ymin><xmax>99</xmax><ymax>99</ymax>"
    size = "<size><width>100</width><height>100</height><depth>3</depth></size>"
    thing = f"<object><name>{2 * number + 1}</name><bndbox>{box}</bndbox></object>"
    (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{thing}</annotation>")


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    """A VisualBERT as an export is."""
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    built = from_bert(load_language_encoder(Language(name=str(cassette_model)), dropout=0.1), region_size=WIDTH)
    state = {f"model.{name}": value for name, value in built.state_dict().items()}
    save_visualbert(built.config, state, out, alignment="sum")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cassette_model / name, out)
    return out


def request(model, data, regions, out, /, **changes):
    values = {
        "model": str(model),
        "subject": None,
        "tasks": ["vqa", "nlvr2", "flickr30k_entities"],
        "data": str(data),
        "regions": str(regions),
        "out": out,
        "seeds": 1,
        "label": None,
        "recipe": "visualbert-vqa",
        "overrides": ["optim.learning_rate=5e-4", "training.epochs=5", "training.global_batch=16"],
        "ds_config": None,
        "jobs": 1,
    }
    return Request(**(values | changes))


@pytest.fixture(scope="module")
def finetuned(model, data, regions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "sweep"
    assert run_command(request(model, data, regions, out)) == 0
    return out


def result(out, task):
    return json.loads((out / task / "seed-0" / "result.json").read_text())


def test_answers_that_stand_in_the_picture_alone_are_learned(finetuned):
    """Questions are all alike, so text alone reaches about 1 of 6 answers: pairs of colours are equally frequent."""
    found = result(finetuned, "vqa")
    assert found["subject"] == "visualbert"
    assert found["metrics"]["vqa_accuracy"] > 0.8
    assert result(finetuned, "nlvr2")["metrics"]["accuracy"] > 0.8
    assert result(finetuned, "flickr30k_entities")["metrics"]["recall_at_1"] > 0.8
    assert result(finetuned, "flickr30k_entities")["metrics"]["upper_bound"] == 1


def test_a_result_names_the_regions_that_it_was_had_with(finetuned, regions):
    from xdscale.shards.regions import RegionTable

    table = RegionTable.open(regions)
    entry = result(finetuned, "vqa")["data"]["regions"]
    assert entry == {"sha256": table.fingerprint, "rows": len(table)}
    lines = (finetuned / "vqa" / "seed-0" / "predictions-dev.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["images"] == [str(TRAIN)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": None}, "--task vqa reads images: --regions DATASET names the dataset with their regions"),
        ({"subject": "language"}, "reads no images|supported are 'bert', 'electra'"),
        ({"subject": "visual-bert"}, "no such subject; did you mean 'visualbert'"),
        ({"tasks": ["all"], "regions": None}, r"has no RTE/train\.tsv"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(model, data, regions, tmp_path, changes, message):
    with pytest.raises(XdscaleError, match=message):
        run_command(request(model, data, regions, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
