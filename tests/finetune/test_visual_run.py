"""Real runs on texts with images: what stands in the picture alone is learned, from the tasks' public files."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

from xdscale.errors import EXIT_BAD_INPUT, EXIT_FAULT, XdscaleError
from xdscale.export import export_run
from xdscale.finetune.command import Request, run_command
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.visualbert import from_bert, save_visualbert
from xdscale.recipe import load_recipe
from xdscale.recipes.mlm.schema import Language
from xdscale.report.command import make_report
from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Place, open_system
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log

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
        whole = np.array([[0, 0, 100, 100], *boxes[:1]], np.float32)
        story = np.stack([np.zeros(WIDTH, np.float32), features[0]])
        images.append(RegionImage(f"a/{number}.jpg", size=(100, 100), boxes=whole, features=story))
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
    (folder / "VCR").mkdir()
    for split, numbers in (("train", range(TRAIN // 2)), ("val", range(TRAIN, len(pictures))), ("test", range(2))):
        lines = [json.dumps(_story(number, int(pictures[number][0]), split != "test")) for number in numbers]
        (folder / "VCR" / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
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


def _story(number, colour, labelled):
    """A question of VCR: answers and reasons name a colour each."""
    of = {
        "annot_id": f"x-{number}", "img_fn": f"a/{number}.jpg", "metadata_fn": f"a/{number}.json", "objects": ["car"],
        "question": ["What", "colour", "is", [0], "?"],
        "answer_choices": [[[0], "is", name, "."] for name in COLOURS],
        "rationale_choices": [["It", "looks", name, "."] for name in COLOURS],
    }  # fmt: skip
    return of | ({"answer_label": colour, "rationale_label": colour} if labelled else {})


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
        "tasks": ["vqa", "nlvr2", "flickr30k_entities", "vcr_qa", "vcr_qar"],
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
def finetune(launch_ranks):
    """Runs the same request as a command, in processes that are forked ready-made."""

    def run(*given, code=0, **changes):
        asked = request(*given, **changes)
        options = {"model": asked.model, "data": asked.data, "regions": asked.regions, "out": asked.out}
        options |= {"seeds": asked.seeds, "recipe": asked.recipe, "jobs": asked.jobs}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += [word for task in asked.tasks for word in ("--task", task)]
        done = launch_ranks("xdscale", "finetune", *words, *asked.overrides, timeout_seconds=500)
        assert done.code == code, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def finetuned(finetune, model, data, regions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "sweep"
    finetune(model, data, regions, out)
    return out


def result(out, task):
    return json.loads((out / task / "seed-0" / "result.json").read_text())


def test_answers_that_stand_in_the_picture_alone_are_learned(finetuned):
    """Questions are all alike, so text alone reaches about 1 of 6 answers: pairs of colours are equally frequent."""
    found = result(finetuned, "vqa")
    assert found["subject"] == "visualbert"
    assert found["kept_model"] == "best"
    assert (finetuned / "vqa" / "seed-0" / "model" / "config.json").is_file()
    assert 0 < found["best_step"] <= found["curve"][-1]["step"]
    assert found["metrics"]["vqa_accuracy"] > 0.8
    assert result(finetuned, "nlvr2")["metrics"]["accuracy"] > 0.8
    assert result(finetuned, "flickr30k_entities")["metrics"]["recall_at_1"] > 0.8
    assert result(finetuned, "flickr30k_entities")["metrics"]["upper_bound"] == 1
    assert result(finetuned, "vcr_qa")["metrics"]["accuracy"] > 0.5  # chance is .25; 100 pictures are few
    assert result(finetuned, "vcr_qar")["metrics"]["accuracy"] > 0.8  # the answer, which it reads, tells the reason


def test_the_report_has_visualberts_columns_and_both_of_vcr_together(finetuned, tmp_path):
    make_report([finetuned], layout="visualbert", baselines=[], metrics=[], out=tmp_path)
    with (tmp_path / "report.csv").open(newline="") as file:
        medians = {row["task"]: float(row["median"]) for row in csv.DictReader(file)}
    assert set(medians) == {"vqa", "vcr_qa", "vcr_qar", "vcr_q2ar", "nlvr2", "flickr30k_entities"}
    assert medians["vqa"] == pytest.approx(result(finetuned, "vqa")["metrics"]["vqa_accuracy"])
    assert medians["vcr_q2ar"] <= min(medians["vcr_qa"], medians["vcr_qar"])


def test_predictions_are_written_as_the_servers_take_them(finetuned):
    qa, qar = (
        list(csv.reader((finetuned / task / "seed-0" / "predictions" / f"{task}.csv").open(newline="")))
        for task in ("vcr_qa", "vcr_qar")
    )
    assert [row[0] for row in qa] == [row[0] for row in qar] == ["annot_id", "x-0", "x-1"]
    for row in (*qa[1:], *qar[1:]):
        np.testing.assert_allclose(np.array(row[1:], float).reshape(-1, 4).sum(1), 1, atol=1e-5)
    lines = (finetuned / "nlvr2" / "seed-0" / "predictions" / "NLVR2-test1.csv").read_text().splitlines()
    assert len(lines) == HELD_OUT
    assert all(line.split(",")[1] in ("True", "False") for line in lines)


def test_a_result_names_the_regions_that_it_was_had_with(finetuned, regions):
    from xdscale.shards.regions import RegionTable

    table = RegionTable.open(regions)
    entry = result(finetuned, "vqa")["data"]["regions"]
    assert entry == {"sha256": table.fingerprint, "rows": len(table)}
    lines = (finetuned / "vqa" / "seed-0" / "predictions-dev.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["images"] == [str(TRAIN)]


def test_the_second_phase_learns_what_is_true_of_the_images(adapt, finetune, cassette_model, data, regions, tmp_path):
    """Spec VisualBERT §2: on NLVR2 masked words, and whether the statement is true; stopped, continued."""
    values = [f"model.language.name={cassette_model}", f"model.region_size={WIDTH}", "model.max_regions=null"]
    values += [
        "model.start=null",
        "model.freeze_pooler=false",
        "objectives.mlm.weight=0.05",
        f"data.folder={data}",
        f"data.regions={regions}",
    ]
    values += ["training.steps=60", "training.global_batch=16", "optim.learning_rate=5e-4", "run.eval_every=30"]
    values += ["run.eval_samples=60", "run.checkpoint_every=30", f"output.folder={tmp_path / 'run'}"]
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}))
    for stop in (["run.stop_at_step=30"], []):
        done = adapt("visualbert-nlvr2-task", *values, *stop, "--deepspeed_config", str(config), ranks=2)
        assert done.code == 0, done.stderr[-3000:]
    last = [entry for entry in read_log(tmp_path / "run" / "log.jsonl") if entry["kind"] == "validation"][-1]
    assert last["step"] == 60
    assert last["validation/accuracy/match"] > 0.8
    export_run(tmp_path / "run", tmp_path / "exported")
    said = finetune(tmp_path / "exported", data, regions, tmp_path / "out", tasks=["nlvr2"])
    assert "was trained on those of" not in said.stderr
    config = json.loads((tmp_path / "out" / "nlvr2" / "seed-0" / "model" / "config.json").read_text())
    assert config["features_of"] == {"model": "drawn", "sha256": None}


def test_a_second_phase_on_features_of_another_network_is_told(model, cassette_model, data, regions, tmp_path):
    start, before = shutil.copytree(model, tmp_path / "export"), tmp_path / "run"
    before.mkdir()
    for path, values in (
        (start / "config.json", json.loads((start / "config.json").read_text()) | {"features_of": {"model": "other"}}),
        (before / "regions.json", {"model": "other", "sha256": "ab" * 32}),
    ):
        path.write_text(json.dumps(values))
        values = [f"model.language.name={cassette_model}", f"model.region_size={WIDTH}", "model.max_regions=null"]
        values += [f"data.folder={data}", f"data.regions={regions}", f"model.start={path.parent}"]
        system = open_system(load_recipe("visualbert-nlvr2-task", values))
        (note,) = system.open(Place(Ranks(0, 1, 0), 4)).notes
        assert f"features of drawn, but model.start = {path.parent} was trained on those of other" in note


def test_damaged_regions_are_named_before_the_first_step(
    adapt, finetune, cassette_model, model, data, regions, tmp_path
):
    """One byte of the features, which nobody would miss: by hash, in finetuning and in the second phase."""
    damaged = shutil.copytree(regions, tmp_path / "regions")
    shard = next(damaged.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    said = finetune(model, data, damaged, tmp_path / "out", tasks=["vqa"], code=EXIT_FAULT)
    told = rf"shards of regions damaged; copy them again\n *{shard}: altered: expected sha256"
    assert re.search(told, said.stdout + said.stderr)
    hurried = ["run.verify=false", "training.global_batch=16", "training.epochs=0.1", "run.stop_at_step=1"]
    finetune(model, data, damaged, tmp_path / "unverified", tasks=["vqa"], overrides=hurried)
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}))
    values = [f"model.language.name={cassette_model}", f"model.region_size={WIDTH}", "model.start=null"]
    values += [f"data.folder={data}", f"data.regions={damaged}", f"output.folder={tmp_path / 'run'}"]
    arguments = ["visualbert-nlvr2-task", *values, "--deepspeed_config", str(config)]
    done = adapt(*arguments, ranks=2)
    assert done.code == EXIT_BAD_INPUT
    assert re.search(told, done.stderr)
    assert "Traceback" not in done.stderr
    with pytest.raises(XdscaleError, match=r"run\.max_damaged_shards = 1: a task's sentences need all of its images"):
        load_recipe("visualbert-nlvr2-task", [*values, "run.max_damaged_shards=1"])


@pytest.mark.usefixtures("idle_workers")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": None}, "--task vqa reads images: --regions DATASET names the dataset with their regions"),
        ({"regions": "s3://bucket/regions"}, "s3://bucket/regions: a task's regions are read from a folder; copy the"),
        ({"model": "/nowhere"}, "^/nowhere: no such file or folder$"),
        ({"subject": "language"}, "reads no images|supported are 'bert', 'electra'"),
        ({"subject": "visual-bert"}, "no such subject; did you mean 'visualbert'"),
        ({"tasks": ["all"], "regions": None}, r"has no RTE/train\.tsv"),
        ({"tasks": ["rte"]}, r"--regions .*: rte has no images; leave --regions out"),
        ({"tasks": ["vqa"], "data": None}, "--data"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(model, data, regions, tmp_path, changes, message):
    with pytest.raises(XdscaleError, match=message):
        run_command(request(model, data, regions, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
