"""VL-BERT on VCR: the loss on classes of objects, and their masks, as in its release (spec VL-BERT §1.4, §5)."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xdscale.bench.padded_vlbert import padded
from xdscale.data.outlines import object_mask
from xdscale.errors import XdscaleError
from xdscale.finetune.command import describe_subject
from xdscale.finetune.recipe import load_settings, resolve_run
from xdscale.finetune.run import FinetuneSystem
from xdscale.models.fast_rcnn import load_fast_rcnn
from xdscale.pretrained.vlbert import load_vlbert, save_release
from xdscale.recipes.vlbert.schema import VLBERTSettings
from xdscale.systems.contract import Objective, Place, Slots
from xdscale.tasks.contract import find_task, read_task
from xdscale.tasks.finetuning import Finetuning
from xdscale.tasks.vcr import CLASSES
from xdscale.tasks.vlbert import VLBERTSubject
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.run_folder import read_log

from ..models import padded_vlbert
from . import pixel_world as world

TASK = find_task("vcr_qa")
NUMBERS = ((1, 3), (80,), (17, 17, 1))
"""Of the classes, COCO's in its order behind the background: `categories` in the release's vcr.py."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return world.questions_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["first", "none"])
def table(request, tmp_path_factory):
    """The whole image, then the objects; whether the table says of it that it is that, or not."""
    return world.pictures_of_questions(tmp_path_factory.mktemp("pictures") / "table", request.param)


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    return world.model_of(cassette_model, tmp_path_factory.mktemp("vlbert"))


def settings(**more):
    own = {"dropout": 0.0, "pixels": world.PIXELS, "object_loss": 1.0, "object_masks": "output"}
    return VLBERTSettings(**(own | more))


def slots(*samples, real=True):
    ids = np.array(samples)
    return Slots(np.zeros(len(ids), int), ids, np.broadcast_to(np.array(real), len(ids)).copy())


def masks_of(number):
    boxes = world.boxes_of(number).tolist()
    found = [object_mask([np.array(world.outline(box, 0.4)), np.array(world.outline(box, 0.8))], box) for box in boxes]
    if number == 0:
        found[-1] = np.zeros((14, 14), bool)
    return np.array(found)


def test_masks_come_with_the_boxes_and_are_mirrored_with_them(table, model, data):
    examples = TASK.read(data).train
    more = int(table.build.whole_image == "none")  # then a whole image of its own stands before that of the table
    collate = VLBERTSubject(str(model), settings(flip=0.5), table).training_collator(TASK, examples, 1)
    seen = 0
    for epoch in range(8):
        part = Slots(np.full(3, epoch), np.arange(3), np.ones(3, bool))
        arrays, (flipped,) = collate(part).arrays, collate.draws(part)
        for number, mirror in enumerate(flipped.tolist()):
            found, wanted = arrays[f"masks_{number}"], masks_of(number)
            assert len(found) == len(arrays[f"boxes_{number}"]) == 1 + more + len(wanted)
            assert found[: 1 + more].all()
            np.testing.assert_array_equal(found[1 + more :], wanted[:, :, ::-1] if mirror else wanted)
            seen += mirror
    assert 4 < seen < 20
    assert 0.05 < masks_of(2).mean() < 0.95


@pytest.mark.parametrize("at", ["output", "input"])
def test_losses_are_those_of_the_release(table, model, data, tmp_path, at):
    """Its `cnn_loss_reg` on the states of all boxes of all four choices, and the choices' sigmoid; in fp64."""
    subject = VLBERTSubject(str(model), settings(object_masks=at), table)
    module = Finetuning(subject.build(TASK).double().eval(), TASK)
    batch = subject.collator(TASK, TASK.read(data).train)(slots(0, 2, 1, real=[True, True, False]))
    heads, own = load_vlbert(model)[1], module.subject.objects
    assert torch.equal(own.transform.weight, heads["masked_region.transform.weight"].double())
    assert own.classifier.out_features == 81
    trunk = load_fast_rcnn(model / "fast_rcnn.safetensors").double().eval()
    trunk.masks_at = at
    more = 1 + int(table.build.whole_image == "none")
    state = {f"model.{name}": value.float() for name, value in module.subject.encoder.state_dict().items()}
    save_release(state | {"model.regions.mask.weight": torch.zeros(1, 2048)}, tmp_path / "ours.model")
    theirs = padded_vlbert.loaded(tmp_path / "ours.model", module.subject.encoder.config).double()
    with torch.no_grad():
        features = []
        for number in (0, 2, 1):
            image, _ = world.scaled(number)
            (width, height), (old_width, old_height) = image.size, world.SIZES[number]
            ratios = np.array([width / old_width, height / old_height] * 2)
            boxes = np.concatenate([[[0, 0, width - 1, height - 1]] * more, world.boxes_of(number) * ratios])
            masks = np.concatenate([np.ones((more, 14, 14), bool), masks_of(number)])
            seen = trunk([world.normalised(image)], [torch.tensor(boxes)], [torch.tensor(masks)])
            features += [seen] * 4
        terms = module(to_device(batch.arrays, torch.device("cpu")))
        read = padded(batch.arrays | {"features": torch.cat(features).numpy()})
        read = {name: value.double() if value.is_floating_point() else value for name, value in read.items()}
        _, regions, _, pooled = theirs(read)
        box_mask, objects = read["box_mask"][:8], torch.zeros(8, regions.shape[1], dtype=torch.long)
        for place, number in enumerate((0, 2)):
            for choice in range(4):
                objects[4 * place + choice, more : more + len(NUMBERS[number])] = torch.tensor(NUMBERS[number])
        hidden = F.gelu(F.linear(regions[:8][box_mask], own.transform.weight, own.transform.bias))
        scores = F.linear(hidden, own.classifier.weight, own.classifier.bias)
        second = F.cross_entropy(scores, objects[box_mask])
        logits = module.subject.classifier(pooled).view(3, 4)[:2]
        right = F.one_hot(torch.tensor([0, 2]), 4).double()
        first = F.binary_cross_entropy_with_logits(logits, right)
    assert batch.targets == {"task": 2, "object_class": int(box_mask.sum())}
    torch.testing.assert_close(terms["object_class"].loss_sum / box_mask.sum(), second, atol=1e-5, rtol=1e-5)
    correct = (scores.argmax(1) == objects[box_mask]).sum()
    assert terms["object_class"].metrics["accuracy"] == correct
    torch.testing.assert_close(terms["task"].loss_sum.double() / 2, first, atol=1e-5, rtol=1e-5)


def test_without_the_second_loss_nothing_of_it_is_there(table, model, data):
    subject = VLBERTSubject(str(model), settings(object_loss=0.0, object_masks=None), table)
    batch = subject.collator(TASK, TASK.read(data).train)(slots(0, 1))
    assert batch.targets == {"task": 2}
    assert not [name for name in batch.arrays if "mask_" in name or name.startswith(("object", "masks_"))]
    assert subject.build(TASK).objects is None
    assert subject.objectives() == {}


def test_the_second_loss_has_its_weight(model):
    """Beside the task's own, which has 1."""
    subject = VLBERTSubject(str(model), settings(object_loss=0.3))
    assert subject.objectives() == {"object_class": Objective(0.3)}


def test_what_has_no_objects_or_no_outlines_is_refused(table, model, data, tmp_path):
    assert CLASSES[:2] + CLASSES[-1:] == ("person", "bicycle", "toothbrush")
    assert len(set(CLASSES)) == 80
    for name, value in (("object_loss", 1.0), ("object_masks", "output")):
        with pytest.raises(XdscaleError, match=rf"--task refcoco knows no objects, VCR does: leave model\.{name} out"):
            describe_subject(
                str(model), None, VLBERTSettings(pixels=world.PIXELS, **{name: value}), [find_task("refcoco")]
            )
    with pytest.raises(XdscaleError, match=r"model\.object_masks are for C5, which reads pixels"):
        describe_subject(str(model), None, VLBERTSettings(object_masks="input"), [TASK])
    with pytest.raises(XdscaleError, match=r"model\.pixels\.freeze = true: .* no such choice, VisualBERT has"):
        describe_subject(str(model), None, settings(pixels=world.PIXELS | {"freeze": True}), [TASK])
    examples = TASK.read(data).train
    lost = [one.truth._replace(metadata=tmp_path / "x.json") for one in examples]
    other = [one.truth._replace(objects=("unicorn",) * len(one.truth.objects)) for one in examples]
    fewer = [one.truth._replace(objects=one.truth.objects[1:]) for one in examples]
    for truths, message in (
        (lost, r"x\.json: no such file; unpack vcr1images\.zip"),
        (other, r"x-0: objects: 'unicorn' is none of VCR's classes"),
        (fewer, r"0\.json: 2 boxes and 2 segms; the question has 1 objects"),
    ):
        changed = [replace(one, truth=truth) for one, truth in zip(examples, truths)]
        with pytest.raises(XdscaleError, match=message):
            VLBERTSubject(str(model), settings(), table).collator(TASK, changed)


def test_a_run_knows_the_outlines_that_it_was_trained_on(model, data, tmp_path):
    """They stand in no file of the task that is hashed else; where they are not read they do not matter."""
    copied = shutil.copytree(data, tmp_path / "data")
    regions = world.pictures_of_questions(tmp_path / "table", "first")
    read = read_task(TASK, copied, regions)

    def fingerprints(**more):
        values = load_settings("vlbert-vcr-answer", [])
        values = values.model_copy(update={"model": settings(**more)})
        subject = describe_subject(str(model), None, values.model, [TASK])
        recipe = resolve_run(values, read, subject=subject, source=copied, regions=str(tmp_path / "table"), seed=5,
                             label="m", folder=tmp_path / "run")  # fmt: skip
        return FinetuneSystem(recipe).open(Place(Ranks(0, 1, 0), 2)).fingerprints

    with_masks, without = fingerprints(), fingerprints(object_masks=None)
    assert with_masks == without | {"outlines of objects": with_masks["outlines of objects"]}
    path = copied / "VCR" / "vcr1images" / "m" / "1.json"
    stored = json.loads(path.read_text())
    stored["segms"][0] = []
    path.write_text(json.dumps(stored))
    assert fingerprints()["outlines of objects"] != with_masks["outlines of objects"]
    assert fingerprints(object_masks=None) == without


@pytest.mark.slow
def test_it_is_tuned_alike_under_stages_and_goes_on_with_the_same_flips(adapt, model, data, tmp_path):
    """Both losses, masks and flips: one rank, and two under ZeRO-3 that are stopped and continued."""
    regions = world.pictures_of_questions(tmp_path / "table", "first")
    overrides = ["model.pixels={short_side: 32, long_side: 44}", "model.dropout=0", "training.global_batch=2"]
    overrides += ["training.epochs=2.6", "optim.learning_rate=0.01", "run.eval_samples=2", "model.flip=0.5"]
    overrides += ["model.object_loss=1", "model.object_masks=output", "optim.warmup_ratio=0"]
    values = load_settings("vlbert-vcr-answer", overrides)
    subject = describe_subject(str(model), None, values.model, [TASK])
    read, losses = read_task(TASK, data, regions), []
    for stage, ranks, stops in ((0, 1, ()), (3, 2, (2,))):
        recipe = resolve_run(values, read, subject=subject, source=data, regions=str(tmp_path / "table"), seed=5,
                             label="m", folder=tmp_path / str(stage))  # fmt: skip
        (tmp_path / f"{stage}.yaml").write_text(recipe.to_yaml())
        config = {"train_micro_batch_size_per_gpu": 2 // ranks, "zero_optimization": {"stage": stage}}
        (tmp_path / f"{stage}.json").write_text(json.dumps(config))
        for stop in (*stops, None):
            more = [] if stop is None else [f"run.stop_at_step={stop}"]
            arguments = [str(tmp_path / f"{stage}.yaml"), *more, "--deepspeed_config", str(tmp_path / f"{stage}.json")]
            done = adapt(*arguments, ranks=ranks)
            assert done.code == 0, done.stderr[-3000:]
        steps = [entry for entry in read_log(tmp_path / str(stage) / "log.jsonl") if entry["kind"] == "step"]
        losses.append([[entry[f"loss/{name}"] for name in ("task", "object_class")] for entry in steps])
        assert [sum(one) for one in losses[-1]] == pytest.approx([entry["loss/total"] for entry in steps], rel=1e-5)
        assert "accuracy" in json.loads((tmp_path / str(stage) / "result.json").read_text())["metrics"]
    assert np.shape(losses[0]) == (4, 2)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
