"""VL-BERT's tasks from pixels, with Fast R-CNN tuned along (spec VL-BERT §1.4, §5)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xdscale.bench.padded_vlbert import padded
from xdscale.data import held_out, task_pictures
from xdscale.data.order import validation_slots
from xdscale.errors import XdscaleError
from xdscale.finetune.command import Request, TaskSource, _plan, describe_subject, run_command
from xdscale.finetune.finished import require_model
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.models.fast_rcnn import load_fast_rcnn
from xdscale.pretrained.vlbert import load_vlbert, save_release
from xdscale.recipes.vlbert.schema import VLBERTSettings
from xdscale.recipes.xdbert.schema import LanguageSettings
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Objective, Slots
from xdscale.tasks.contract import find_subject, find_task, read_task
from xdscale.tasks.finetuning import Finetuning
from xdscale.tasks.vlbert import VLBERTSubject
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.evaluation import evaluate
from xdscale.training.run_folder import read_log

from ..models import padded_vlbert
from . import pixel_world as world

TASK = find_task("refcoco_plus")
SEVERAL = Path(__file__).parents[1] / "training" / "several_runs.py"


@pytest.fixture(scope="module", params=["none", "first"])
def table(request, tmp_path_factory):
    return world.table_of(tmp_path_factory.mktemp("pictures") / "table", request.param)


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    return world.model_of(cassette_model, tmp_path_factory.mktemp("vlbert"))


@pytest.fixture(scope="module")
def expressions(tmp_path_factory):
    return world.expressions_in(tmp_path_factory.mktemp("data"))


def settings(**pixels):
    return VLBERTSettings(dropout=0.0, pixels=world.PIXELS | pixels)


def slots(*samples):
    return Slots(np.zeros(len(samples), int), np.array(samples), np.ones(len(samples), bool))


def seen(number):
    image, boxes = world.scaled(number)
    return world.normalised(image), boxes


def test_examples_bring_their_pictures_and_boxes(table, model, expressions):
    collate = VLBERTSubject(str(model), settings(), table).collator(TASK, TASK.read(expressions).train)
    arrays = collate(slots(1, 5, 1)).arrays  # of images 0, 1 and 0
    assert "features" not in arrays
    for place, number in enumerate((0, 1, 0)):
        picture, boxes = seen(number)
        np.testing.assert_allclose(arrays[f"picture_{place}"], picture, atol=1e-4)
        np.testing.assert_allclose(arrays[f"boxes_{place}"], boxes, atol=1e-4)
    assert arrays["feature_rows"].tolist() == list(range(3 + 4 + 3))
    assert arrays["places"][0].tolist() == [50, 50, 100, 100]


def test_it_points_as_the_release_does(table, model, expressions, tmp_path):
    """In fp64: the release's module, on what the branch computes of each picture by itself."""
    subject = VLBERTSubject(str(model), settings(), table)
    module = Finetuning(subject.build(TASK).double().eval(), TASK)
    batch = subject.collator(TASK, TASK.read(expressions).train)(slots(1, 5, 8))
    assert torch.equal(
        module.subject.transform.weight, load_vlbert(model)[1]["masked_region.transform.weight"].double()
    )
    trunk = load_fast_rcnn(model / "fast_rcnn.safetensors").double().eval()
    state = {f"model.{name}": value.float() for name, value in module.subject.encoder.state_dict().items()}
    state |= {"model.regions.mask.weight": torch.zeros(1, 2048)}  # which a model of pixels has not
    save_release(state, tmp_path / "ours.model")
    theirs = padded_vlbert.loaded(tmp_path / "ours.model", module.subject.encoder.config).double()
    with torch.no_grad():
        found = module(to_device(batch.arrays, torch.device("cpu")))["logits"]
        features = torch.cat([trunk([picture], [torch.tensor(boxes)]) for picture, boxes in map(seen, (0, 1, 2))])
        assert features.std(0).mean() > 1e-3
        read = padded(batch.arrays | {"features": features.numpy()})
        read = {name: value.double() if value.is_floating_point() else value for name, value in read.items()}
        _, regions, *_ = theirs(read)
        scores = module.subject.classifier(F.gelu(module.subject.transform(regions)))[:, :, 0]
    first = int(table.build.whole_image == "none")  # of such a table the whole image is no region
    for row, wanted, count in zip(found, scores, (3, 4, 5)):
        torch.testing.assert_close(row[: count - first], wanted[first:count].float(), atol=1e-4, rtol=1e-4)
        assert torch.isinf(row[count - first :]).all()


def test_a_batch_is_the_sum_of_its_samples_and_what_is_frozen_stays(table, model, expressions):
    subject = VLBERTSubject(str(model), settings(), table)
    collate, module = subject.collator(TASK, TASK.read(expressions).train), Finetuning(subject.build(TASK), TASK)
    module, found = module.double().train(), []
    assert not any(part.training for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d))
    for parts in ([slots(1, 4, 11)], [slots(1), slots(4), slots(11)]):
        module.zero_grad()
        for part in parts:
            module(to_device(collate(part).arrays, torch.device("cpu")))["task"].loss_sum.backward()
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        assert not [name for name, value in trained.items() if value.grad is None]
        found.append(torch.cat([value.grad.flatten() for value in trained.values()]))
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-9
    trunk = module.subject.trunk
    assert trunk.conv1.weight.grad is None
    assert trunk.layer1[0].conv1.weight.grad is None
    assert trunk.layer2[0].conv1.weight.grad.any()


def test_held_out_pictures_are_decoded_again_and_say_the_same(table, model, expressions, monkeypatch):
    subject = VLBERTSubject(str(model), settings(), table)
    collate = subject.collator(TASK, TASK.read(expressions).train)
    engine, found, decoded = Engine(Finetuning(subject.build(TASK), TASK)), [], []
    read_pictures = task_pictures.read_pictures

    def counted(regions, rows, *arguments):
        decoded[-1] += len(rows)
        return read_pictures(regions, rows, *arguments)

    monkeypatch.setattr(task_pictures, "read_pictures", counted)
    for kept_bytes in (1 << 30, 100_000, 0):
        monkeypatch.setattr(held_out, "KEPT_BYTES", kept_bytes)
        decoded.append(0)
        batches = held_out.held_out_batches(collate, validation_slots(9, 99, 1, 0, 3))
        for _ in range(2):
            decoded.append(0)
            found.append(evaluate(engine, batches, {"task": Objective(1.0)}, Ranks(0, 1, 0), lambda number: True)[0])
    assert all(one == pytest.approx(found[0], rel=1e-6) for one in found)
    assert found[0]["loss/task"] > 0
    assert decoded[:3] == [9, 0, 0]
    assert 0 < decoded[4] == decoded[5] < decoded[3] == 9
    assert decoded[6:] == [9, 9, 9]


class Engine:
    """As much of DeepSpeed's engine as an evaluation needs."""

    device = torch.device("cpu")

    def __init__(self, module):
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, arrays):
        return self.module(arrays)


def test_what_does_not_fit_is_refused(table, model, cassette_model, expressions, tmp_path):
    with pytest.raises(XdscaleError, match=r"model\.pixels = .*: .* no such choice, it is one of visualbert, vlbert;"):
        load_settings("paper", ["model.pixels={weights: random}"], "language")
    with pytest.raises(XdscaleError, match="--task rte reads no images: leave model.pixels out"):
        describe_subject(str(model), None, settings(), [find_task("rte")])
    with pytest.raises(XdscaleError, match=r"nowhere\.pth: no such file or folder"):
        describe_subject(str(model), None, settings(weights=str(tmp_path / "nowhere.pth")), [TASK])
    with pytest.raises(XdscaleError, match="keep_model = true: .* as clip is not exported"):
        describe_subject("ViT-B-32", "clip", LanguageSettings(), keep_model=True)
    derived = type("Derived", (find_subject("language"),), {})  # a folder would say nothing of what it does otherwise
    assert not derived.exports()
    assert type("Own", (derived,), {"export": lambda *_: "own"}).exports()
    with pytest.raises(XdscaleError, match="as it is finetuned here, it is not exported; language, visualbert, vlbert"):
        find_subject("clip")("ViT-B-32", LanguageSettings()).export(TASK, {}, tmp_path)
    for name, value in (("loss", "softmax"), ("swap_words", False)):
        with pytest.raises(XdscaleError, match=rf"model\.{name} = '?{value}'?: .* such choice, it is one of vlbert;"):
            load_settings("paper", [f"model.{name}={value}"], "language")
    own, other = (describe_subject(str(model), None, one) for one in (settings(), VLBERTSettings()))
    assert own["weights_sha256"] != other["weights_sha256"]
    assert own["encoder"] == other["encoder"] + ", with Fast R-CNN on 32 × 44 pixels at most"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(XdscaleError, match=r"fast_rcnn\.safetensors: no such file; this model was pretrained on feat"):
        describe_subject(str(tmp_path), None, settings())
    describe_subject(str(tmp_path), None, settings(weights="random"))
    config = json.loads((model / "config.json").read_text()) | {"appearance_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(XdscaleError, match="reads 12 numbers of each region, but ResNet-101 makes 2048"):
        describe_subject(str(tmp_path), None, settings(weights="random"))
    image = RegionImage("0", (9, 9), np.array([[0, 0, 5, 5]], np.float32), np.zeros((1, 2048), np.float32))
    build_regions([image], tmp_path / "features", Detector(model="drawn"))
    pixels = ["model.pixels={short_side: 32, long_side: 44}"]
    with pytest.raises(XdscaleError, match=r"model\.pixels needs the images themselves"):
        run_command(request(model, expressions, tmp_path / "features", tmp_path / "out", overrides=pixels))


def request(model, data, regions, out, **changes):
    asked = {"model": str(model), "tasks": ["refcoco_plus"], "data": str(data), "regions": str(regions), "out": out}
    asked |= {"label": None, "recipe": "vlbert-refcoco", "overrides": [], "ds_config": None, "jobs": 1, "seeds": 1}
    return Request(subject=None, **(asked | changes))


@pytest.mark.parametrize(("recipe", "most"), [("vlbert-refcoco", 32), ("vlbert-refcoco-e2e", 4)])
def test_from_pixels_a_micro_batch_is_that_of_the_release(table, model, expressions, tmp_path, recipe, most):
    """And steps have the recipe's batch all the same."""
    source = TaskSource(read_task(TASK, expressions, table), expressions)
    asked = request(model, expressions, table.table.folder, tmp_path / "out", recipe=recipe)
    asked = asked if recipe.endswith("e2e") else replace(asked, regions=None)  # the table has no features
    (job,) = _plan(asked, load_settings(recipe, []), {TASK.name: source}, {TASK.name: [0]}, gpu=False)
    assert job.message["ds_config"]["train_micro_batch_size_per_gpu"] == most
    assert job.message["recipe"]["training"]["global_batch"] == 32


def test_features_that_a_model_does_not_read_are_refused_before_anything_is_trained(
    table, model, expressions, tmp_path
):
    """With the command that makes those that it reads, and pixels where there are some."""
    source = TaskSource(read_task(TASK, expressions, table), expressions)
    images = [
        RegionImage(str(number), world.SIZES[number % 3], boxes, np.zeros((len(boxes), 5), np.float32))
        for number, (_, boxes) in enumerate(map(world.drawn, range(9)))
    ]
    build_regions(images, tmp_path / "narrow", Detector(model="drawn"))
    command = "'xdscale regions extract IMAGES --network vlbert:resnet14 --weights {}/fast_rcnn.safetensors --boxes"
    own = f"of each region: its own branch makes them from pixels: {command.format(model)}"
    pixels = "; or have the images themselves read: model.pixels={}"
    for folder, held, more in (
        (table.table.folder, f"images and no features; {model} reads 2048 numbers", pixels),
        (tmp_path / "narrow", f"features of 5 numbers; {model} reads 2048", ""),
    ):
        asked = request(model, expressions, folder, tmp_path / "out")
        with pytest.raises(XdscaleError) as caught:
            _plan(asked, load_settings(asked.recipe, []), {TASK.name: source}, {TASK.name: [0]}, gpu=False)
        assert str(caught.value).startswith(f"{folder}: {held} {own}")
        assert str(caught.value).endswith(f"--whole-image --out DATASET'{more}")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_that_has_kept_no_model_is_told(tmp_path):
    result = tmp_path / "seed-0" / "result.json"
    (result.parent / "model").mkdir(parents=True)
    with pytest.raises(XdscaleError, match=r"result\.json: this run is finished, but has kept no model"):
        require_model(result)
    (result.parent / "model" / "config.json").touch()  # which an export moves there last
    require_model(result)


@pytest.fixture(scope="module")
def runs(launch_ranks, model, expressions, tmp_path_factory):
    """Runs of four steps by ZeRO stage; under stage 2 on two ranks, stopped after two steps and continued."""
    folder = tmp_path_factory.mktemp("runs")
    regions = world.table_of(folder / "table")
    overrides = ["model.pixels={short_side: 32, long_side: 44}", "model.dropout=0", "training.global_batch=4"]
    overrides += ["optim.optimizer=sgd", "optim.learning_rate=0.01", "training.epochs=0.8", "run.keep_model=true"]
    settings = load_settings("vlbert-refcoco", [*overrides, "run.eval_samples=4"])
    data = read_task(TASK, expressions, regions)
    subject = describe_subject(str(model), None, settings.model, [TASK], keep_model=True)
    for stage in range(4):
        recipe = resolve_run(settings, data, subject=subject, source=expressions, regions=str(folder / "table"),
                             seed=0, label="m", folder=folder / str(stage))  # fmt: skip
        (folder / f"{stage}.yaml").write_text(recipe.to_yaml())
        config = {"train_micro_batch_size_per_gpu": 2 if stage else 4, "zero_optimization": {"stage": stage}}
        (folder / f"{stage}.json").write_text(json.dumps(config))
    stop = ["run.stop_at_step=2"]
    for ranks, started in ((1, {0: []}), (2, {1: [], 2: stop, 3: []}), (2, {2: []})):
        named = {
            stage: [f"{folder / str(stage)}.yaml", *more, "--deepspeed_config", f"{folder / str(stage)}.json"]
            for stage, more in started.items()
        }
        done = launch_ranks(SEVERAL, json.dumps(named), ranks=ranks)
        assert done.code == 0, done.stderr[-3000:]
        for part in (done.stdout + done.stderr).split("== ")[1:]:
            name, said = part.split("\n", 1)
            with (folder / f"{name}.said").open("a") as file:
                file.write(said)
    return folder


@pytest.mark.slow
def test_it_is_tuned_alike_under_every_stage_and_predicts_and_is_kept(runs, model):
    steps = {stage: [entry for entry in read_log(runs / str(stage) / "log.jsonl") if entry["kind"] == "step"]
             for stage in range(4)}  # fmt: skip
    losses = np.array([[entry["loss/task"] for entry in steps[stage]] for stage in range(4)])
    assert losses.shape == (4, 4)
    np.testing.assert_allclose(losses, losses[:1].repeat(4, 0), rtol=1e-4)
    scores, before = [], load_fast_rcnn(model / "fast_rcnn.safetensors").state_dict()
    for stage in range(4):
        run = runs / str(stage)
        assert set(json.loads((run / "result.json").read_text())["metrics"]) >= {"recall_at_1", "recall_at_1_testB"}
        scores.append([json.loads(line)["scores"] for line in (run / "predictions-val.jsonl").open()])
        after = load_fast_rcnn(run / "model" / "fast_rcnn.safetensors").state_dict()
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert {"layer2.0.conv1.weight", "layer4.0.conv3.weight"} <= moved
        assert not [name for name in moved if name.startswith(("conv1", "layer1")) or "bn" in name]
        assert not (run / "checkpoints").exists()
    for found in scores[1:]:
        np.testing.assert_allclose(found, scores[0], rtol=1e-3, atol=1e-4)
    assert np.std(scores[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_one_rank_alone_says_that_the_file_is_not_the_public_one(runs, stage):
    starts = 2 if stage == 2 else 1
    assert (runs / f"{stage}.said").read_text().count("RefCOCO+ has 120,191 (train)") == starts


@pytest.mark.slow
def test_a_kept_model_says_what_the_run_predicted_and_can_be_finetuned_again(runs, expressions):
    run, regions = runs / "2", RegionTable.open(runs / "table")
    _, heads = load_vlbert(run / "model")
    subject = VLBERTSubject(str(run / "model"), settings(), regions)
    subject.describe()
    collate = subject.collator(TASK, TASK.read(expressions).dev["val"])
    module = Finetuning(subject.build(TASK).eval(), TASK)
    stored = {name: value for name, value in _tensors(run / "model").items() if name.startswith("classifier.")}
    module.subject.classifier.load_state_dict({name.partition(".")[2]: value for name, value in stored.items()})
    assert torch.equal(module.subject.transform.weight, heads["masked_region.transform.weight"])
    with torch.no_grad():
        logits = module(to_device(collate(slots(0, 1, 2)).arrays, torch.device("cpu")))["logits"].numpy()
    said = [json.loads(line)["scores"] for line in (run / "predictions-val.jsonl").open()]
    np.testing.assert_allclose(logits, said, rtol=1e-4, atol=1e-5)


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
