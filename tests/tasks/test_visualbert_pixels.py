"""VisualBERT on VCR from pixels, with r2c's branch of ResNet-50 tuned along (spec VisualBERT §3, §4)."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize, to_tensor

from xdscale.errors import XdscaleError
from xdscale.finetune.command import Request, TaskSource, _plan, describe_subject, run_command
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.finetune.run import FinetuneSystem, freeze_pooler, prepare
from xdscale.models.operations import use_definitions
from xdscale.models.r2c import R2CDetector, load_detector
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.language_files import save_tokenizer
from xdscale.pretrained.visualbert import from_bert, load_visualbert, save_visualbert
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.visualbert.schema import VisualBERTSettings
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Place, Slots
from xdscale.tasks.contract import find_task, read_task
from xdscale.tasks.finetuning import Finetuning
from xdscale.tasks.visualbert import VisualBERTSubject
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.run_folder import read_log
from xdscale.training.tracing import on_meta, trace

from . import pixel_world as world

TASK, CPU = find_task("vcr_qa"), torch.device("cpu")
TAGS = ((1, 1), (0, 0), (2, 0))
"""Of its objects those that each question speaks of, and its third answer."""
NAMED = ([1], [0], [0, 2])
CLASSES = ([0, 3], [0, 80], [0, 17, 1])
"""Of these, behind the whole image: car, toothbrush, dog and person, among COCO's 80."""
SIZE = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return world.questions_in(tmp_path_factory.mktemp("data"), TAGS)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return world.pictures_of_questions(tmp_path_factory.mktemp("pictures") / "table")


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    """A VisualBERT with a small branch of its own, whose images count."""
    torch.manual_seed(0)
    out, spec = tmp_path_factory.mktemp("visualbert"), Language(name=str(cassette_model))
    built = from_bert(load_language_encoder(spec, dropout=0.1), region_size=SIZE)
    branch = R2CDetector((1, 1, 1, 1), width=16, size=SIZE, dropout=0.1)
    for name, parameter in branch.named_parameters():
        if name.endswith("bn3.weight"):
            parameter.data.uniform_(0.1, 0.3)
    torch.nn.init.normal_(built.embeddings.visual_projection.weight, std=0.3)
    state = {f"model.{name}": value for name, value in built.state_dict().items()}
    state |= {f"trunk.{name}": value for name, value in branch.state_dict().items()}
    save_visualbert(built.config, state, out, alignment="mean")
    save_tokenizer(cassette_model, out, positions=built.config.max_position_embeddings)
    return out


def settings(*, pixels=world.PIXELS, **more):
    return VisualBERTSettings(**({"dropout": 0.0, "pixels": pixels, "objects": "named"} | more))


def slots(*samples):
    return Slots(np.zeros(len(samples), int), np.array(samples), np.ones(len(samples), bool))


def masks_of(number, kept):
    """r2c's: the whole image, then of each object the middles of 14 × 14 places that lie in one of its outlines."""
    found = [np.ones((14, 14), bool)]
    for index in kept:
        left, top, right, bottom = box = world.boxes_of(number)[index].tolist()
        places = (np.arange(14) + 0.5) / 14
        middles = np.stack(np.meshgrid(left + (right - left) * places, top + (bottom - top) * places), 2).reshape(-1, 2)
        inside = [Outline(world.outline(box, part)).contains_points(middles) for part in (0.4, 0.8)]
        last_has_none = number == 0 and index == 1
        found.append(np.any(inside, 0).reshape(14, 14) & (not last_has_none))
    return np.array(found)


def seen(number, kept):
    """What the branch is given of a question's picture: as torchvision normalises it, boxes, masks and classes."""
    image, _ = world.scaled(number)
    picture = normalize(to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ratios = np.tile(np.array(image.size) / np.array(world.SIZES[number]), 2)
    whole = [0, 0, image.size[0] - 1, image.size[1] - 1]
    boxes = np.concatenate([[whole], world.boxes_of(number)[kept] * ratios]).astype(np.float32)
    classes = {"person": 1, "car": 3, "dog": 17, "toothbrush": 80}
    numbers = [0, *(classes[world.OBJECTS[number][index]] for index in kept)]
    return picture, torch.tensor(boxes), torch.tensor(masks_of(number, kept)), torch.tensor(numbers)


@pytest.mark.parametrize("objects", ["named", "all"])
def test_examples_bring_pictures_boxes_masks_and_classes(table, model, data, objects):
    collate = VisualBERTSubject(str(model), settings(objects=objects), table).collator(TASK, TASK.read(data).train)
    arrays, rows, first = collate(slots(0, 2, 1)).arrays, [], 0
    assert "features" not in arrays
    for place, number in enumerate((0, 2, 1)):
        kept = NAMED[number] if objects == "named" else list(range(len(world.OBJECTS[number])))
        picture, boxes, masks, classes = seen(number, kept)
        np.testing.assert_allclose(arrays[f"picture_{place}"], picture, atol=1e-5)
        np.testing.assert_allclose(arrays[f"boxes_{place}"], boxes, atol=1e-4)
        np.testing.assert_array_equal(arrays[f"masks_{place}"], masks)
        assert arrays[f"classes_{place}"].tolist() == classes.tolist()
        rows += [*range(first, first + len(boxes))] * 4
        first += len(boxes)
    assert arrays["feature_rows"].tolist() == rows
    if objects == "named":
        assert [arrays[f"classes_{place}"].tolist() for place in range(3)] == [CLASSES[number] for number in (0, 2, 1)]
    assert 0.05 < masks_of(2, [2])[1:].mean() < 0.95


def test_it_answers_as_on_features_that_the_branch_has_computed(table, model, data):
    """In fp64; that it reads such features as transformers does is tested elsewhere."""
    subject = VisualBERTSubject(str(model), settings(), table)
    module = Finetuning(subject.build(TASK).double().eval(), TASK)
    arrays = subject.collator(TASK, TASK.read(data).train)(slots(0, 1, 2)).arrays
    trunk = load_detector(model / "detector.safetensors", size=SIZE, dropout=0.0).double().eval()
    with torch.no_grad():
        found = module(to_device(arrays, CPU))["logits"]
        features = [trunk(*([part] for part in seen(number, NAMED[number]))) for number in range(3)]
        module.subject.trunk = None
        given = torch.cat([part for part in features for _ in range(4)])
        wanted = module(to_device(arrays, CPU) | {"features": given})["logits"]
        none = module(to_device(arrays, CPU) | {"features": torch.zeros_like(given)})["logits"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (none - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("freeze", [False, True])
def test_a_batch_is_the_sum_of_its_samples_and_what_is_frozen_stays(table, model, data, freeze):
    subject = VisualBERTSubject(str(model), settings(pixels=world.PIXELS | {"freeze": freeze}), table)
    collate, module = subject.collator(TASK, TASK.read(data).train), Finetuning(subject.build(TASK), TASK)
    freeze_pooler(module)
    module, found = module.double().train(), []
    for parts in ([slots(0, 1, 2)], [slots(0), slots(1), slots(2)]):
        module.zero_grad()
        for part in parts:
            module(to_device(collate(part).arrays, CPU))["task"].loss_sum.backward()
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        assert not [name for name, value in trained.items() if value.grad is None]
        found.append(torch.cat([value.grad.flatten() for value in trained.values()]))
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-9
    trunk = module.subject.trunk
    for name in ("conv1", "layer1.0.conv2", "layer3.0.conv1"):
        assert (trunk.get_submodule(name).weight.grad is None) == freeze
    for name in ("layer4.0.conv1", "masks", "classes", "projection"):
        assert trunk.get_submodule(name).weight.grad.any()
    assert FinetuneSystem.parts(None, module)["trunk"] is trunk


def test_a_trace_counts_its_bytes_and_its_products(table, model, data, kept_bytes):
    """Bytes within a tenth of what autograd keeps, products within 3 % of what torch counts by the definitions."""
    subject = VisualBERTSubject(str(model), settings(), table)
    arrays = subject.collator(TASK, TASK.read(data).train)(slots(0, 1, 2)).arrays
    module, plain = (Finetuning(subject.build(TASK), TASK).train() for _ in range(2))
    plain = use_definitions(plain)
    found = trace(on_meta(module), arrays, ["task"])
    assert found.kept_bytes == pytest.approx(kept_bytes(module, to_device(arrays, CPU)), rel=0.1)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        plain(to_device(arrays, CPU))["task"].loss_sum.backward()
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def request(model, data, regions, out, **changes):
    asked = {"model": str(model), "tasks": ["vcr_qa"], "data": str(data), "regions": str(regions), "out": out}
    asked |= {"label": None, "recipe": "visualbert-vcr-answer-e2e", "overrides": []}
    return Request(subject=None, ds_config=None, jobs=1, seeds=1, **(asked | changes))


def test_the_recipe_has_few_examples_at_a_time_and_the_published_batch(table, model, data, tmp_path):
    source = TaskSource(read_task(TASK, data, table), data)
    asked = request(model, data, table.table.folder, tmp_path / "out")
    (job,) = _plan(asked, load_settings(asked.recipe, []), {TASK.name: source}, {TASK.name: [0]}, gpu=False)
    assert job.message["ds_config"]["train_micro_batch_size_per_gpu"] == 4
    assert job.message["recipe"]["training"]["global_batch"] == 32


def test_what_does_not_fit_is_refused(table, model, data, tmp_path):
    with pytest.raises(
        XdscaleError, match=r"--task nlvr2: from pixels VisualBERT reads classes and outlines .* VCR has"
    ):
        describe_subject(str(model), None, settings(), [find_task("nlvr2")])
    for name, value in (("flip", 0.5), ("object_loss", 1.0), ("object_masks", "input")):
        refused = rf"model\.{name} = '?{value}'?: .* as visualbert has no such choice, it is one of vlbert;"
        with pytest.raises(XdscaleError, match=refused):
            load_settings("paper", [f"model.{name}={value}"], "visualbert")
    with pytest.raises(XdscaleError, match=r"nowhere\.pth: no such file or folder"):
        describe_subject(str(model), None, settings(pixels={"weights": str(tmp_path / "nowhere.pth")}), [TASK])
    own, other = (describe_subject(str(model), None, one) for one in (settings(), settings(pixels=None)))
    assert own["weights_sha256"] != other["weights_sha256"]
    assert own["encoder"] == other["encoder"] + ", with r2c's ResNet on 32 × 44 pixels at most"
    frozen = describe_subject(str(model), None, settings(pixels=world.PIXELS | {"freeze": True}))["encoder"]
    assert frozen == other["encoder"] + ", with r2c's ResNet, frozen before RoIAlign, on 32 × 44 pixels at most"
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "detector.safetensors").unlink()
    with pytest.raises(
        XdscaleError, match=r"detector\.safetensors: no such file; this model was pretrained on features"
    ):
        describe_subject(str(bare), None, settings())
    image = RegionImage("0", (9, 9), np.array([[0, 0, 5, 5]], np.float32), np.zeros((1, SIZE), np.float32))
    build_regions([image], tmp_path / "features", Detector(model="drawn"))
    with pytest.raises(XdscaleError, match=r"model\.pixels needs the images themselves"):
        run_command(request(model, data, tmp_path / "features", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_objects_of_no_class_and_without_outlines_are_refused(table, model, data, tmp_path):
    examples = TASK.read(data).train
    lost = [one.truth._replace(metadata=tmp_path / "x.json") for one in examples]
    other = [one.truth._replace(objects=("unicorn",) * len(one.truth.objects)) for one in examples]
    for truths, message in (
        (lost, r"x\.json: no such file; unpack vcr1images\.zip"),
        (other, r"x-0: objects: 'unicorn' is none of VCR's classes .* VisualBERT without model\.pixels"),
    ):
        changed = [replace(one, truth=truth) for one, truth in zip(examples, truths)]
        with pytest.raises(XdscaleError, match=message):
            VisualBERTSubject(str(model), settings(), table).collator(TASK, changed)
        VisualBERTSubject(str(model), settings(pixels=None), features_in(tmp_path / message[:1])).collator(
            TASK, changed
        )


def features_in(folder):
    """The same images with features, without files."""
    images = []
    for number in range(3):
        boxes = np.concatenate([[[0, 0, *world.SIZES[number]]], world.boxes_of(number)]).astype("<f4")
        features = np.zeros((len(boxes), SIZE), np.float32)
        images.append(RegionImage(f"m/{number}.jpg", world.SIZES[number], boxes, features))
    build_regions(images, folder, Detector(model="drawn"), whole_image="first")
    return RegionTable.open(folder)


def resolved(model, data, regions, folder, *overrides):
    values = load_settings("visualbert-vcr-answer-e2e", ["model.pixels={short_side: 32, long_side: 44}", *overrides])
    subject = describe_subject(str(model), None, values.model, [TASK], keep_model=values.run.keep_model)
    read = read_task(TASK, data, RegionTable.open(regions))
    return resolve_run(values, read, subject=subject, source=data, regions=str(regions), seed=5, label="m",
                       folder=folder)  # fmt: skip


def test_a_run_knows_the_outlines_that_it_was_trained_on(table, model, data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")

    def fingerprints():
        recipe = resolved(model, copied, table.table.folder, tmp_path / "run")
        return FinetuneSystem(recipe).open(Place(Ranks(0, 1, 0), 2)).fingerprints

    before = fingerprints()
    path = copied / "VCR" / "vcr1images" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"segms": [[]]}))
    prepare.cache_clear()  # as another process reads
    assert before == fingerprints() | {"outlines of objects": before["outlines of objects"]}
    assert before != fingerprints()


def test_outlines_of_the_test_split_are_read_before_a_run(table, model, data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    (entry, *_) = map(json.loads, (copied / "VCR" / "val.jsonl").read_text().splitlines())
    (copied / "VCR" / "test.jsonl").write_text(json.dumps(entry | {"metadata_fn": "m/test.json"}) + "\n")
    images = copied / "VCR" / "vcr1images" / "m"
    without = {key: value for key, value in json.loads((images / "0.json").read_text()).items() if key != "segms"}
    (images / "test.json").write_text(json.dumps(without))
    recipe = resolved(model, copied, table.table.folder, tmp_path / "run")
    with pytest.raises(XdscaleError, match=r"test\.json: segms is missing"):
        FinetuneSystem(recipe).open(Place(Ranks(0, 1, 0), 2))


@pytest.fixture(scope="module")
def runs(adapt, model, data, table, tmp_path_factory):
    """Four steps on one rank, and on two under ZeRO-3 that are stopped and continued; both keep their model."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["model.dropout=0", "training.global_batch=2", "training.epochs=2.6", "optim.warmup_ratio=0"]
    more += ["optim.learning_rate=0.001", "run.eval_samples=2", "run.keep_model=true", "training.best=null"]
    for stage, ranks, stops in ((0, 1, ()), (3, 2, (2,))):
        recipe = resolved(model, data, table.table.folder, folder / str(stage), *more, "training.patience=null")
        (folder / f"{stage}.yaml").write_text(recipe.to_yaml())
        config = {"train_micro_batch_size_per_gpu": 2 // ranks, "zero_optimization": {"stage": stage}}
        (folder / f"{stage}.json").write_text(json.dumps(config))
        for stop in (*stops, None):
            arguments = [] if stop is None else [f"run.stop_at_step={stop}"]
            arguments = [str(folder / f"{stage}.yaml"), *arguments, "--deepspeed_config", str(folder / f"{stage}.json")]
            done = adapt(*arguments, ranks=ranks)
            assert done.code == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_it_is_tuned_alike_by_two_ranks_that_are_continued(runs, model):
    steps = [[entry for entry in read_log(runs / stage / "log.jsonl") if entry["kind"] == "step"] for stage in "03"]
    losses = [[entry["loss/task"] for entry in one] for one in steps]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    before = load_file(model / "detector.safetensors")
    for stage in "03":
        assert "accuracy" in json.loads((runs / stage / "result.json").read_text())["metrics"]
        after = load_file(runs / stage / "model" / "detector.safetensors")
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert {"conv1.weight", "layer1.0.bn1.weight", "layer4.0.conv3.weight", "masks.bias", "classes.weight"} <= moved
        assert not [name for name in moved if "running" in name]


@pytest.mark.slow
def test_a_kept_model_says_what_the_run_predicted_and_can_be_finetuned_again(runs, table, data):
    kept = runs / "3" / "model"
    subject = VisualBERTSubject(str(kept), settings(), table)
    subject.describe()
    collate = subject.collator(TASK, TASK.read(data).dev["dev"])
    module = Finetuning(subject.build(TASK).eval(), TASK)
    stored = load_file(kept / "model.safetensors")
    module.subject.classifier.load_state_dict({name: stored[f"classifier.{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        logits = module(to_device(collate(slots(0, 1, 2)).arrays, CPU))["logits"]
    said = [json.loads(line)["prediction"] for line in (runs / "3" / "predictions-dev.jsonl").open()]
    assert [str(choice) for choice in logits.argmax(1).tolist()] == [str(one) for one in said]
    assert load_visualbert(kept)[0].embeddings.alignment == "mean"
