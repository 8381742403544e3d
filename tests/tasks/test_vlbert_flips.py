"""Mirrored images: pixels, boxes and the words left and right, against an independent flip (spec VL-BERT §1.4, §5)."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ImageOps

from xdscale.data.task_files import Example
from xdscale.data.vlbert_tasks import mirrored_answers
from xdscale.errors import XdscaleError
from xdscale.finetune.command import describe_subject
from xdscale.finetune.recipe import TaskFiles, TaskSection, load_settings, section_of
from xdscale.finetune.run import prepare
from xdscale.recipes.vlbert.schema import VLBERTSettings
from xdscale.shards.language import load_language_tokenizer
from xdscale.systems.contract import Slots
from xdscale.tasks.contract import find_task
from xdscale.tasks.vlbert import VLBERTSubject

from . import pixel_world as world

TASK = find_task("refcoco_plus")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return world.table_of(tmp_path_factory.mktemp("pictures") / "table")


@pytest.fixture(scope="module")
def model(cassette_model, tmp_path_factory):
    return world.model_of(cassette_model, tmp_path_factory.mktemp("vlbert"), trunk=False)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return TASK.read(world.expressions_in(tmp_path_factory.mktemp("data"))).train


def settings(**more):
    return VLBERTSettings(dropout=0.0, pixels=world.PIXELS | {"weights": "random"}, flip=0.5, **more)


def slots(epoch, *samples):
    return Slots(np.full(len(samples), epoch), np.array(samples), np.ones(len(samples), bool))


def exchanged(text):
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in text.split(" "))


@pytest.mark.parametrize("swap_words", [True, False])
def test_a_mirrored_example_is_that_of_the_mirrored_picture(table, model, examples, swap_words):
    """The release's own steps: scale, mirror, then `w - 1 - x` of the boxes, and words of its `flip_tokens`."""
    subject = VLBERTSubject(str(model), settings(swap_words=swap_words), table)
    collate, plain = subject.training_collator(TASK, examples, 3), subject.collator(TASK, examples)
    tokens, seen = load_language_tokenizer(str(model))[0], 0
    for epoch in range(3):
        part = slots(epoch, *range(len(examples)))
        flipped, arrays, usual = collate.draws(part)[0], collate(part).arrays, plain(part).arrays
        ids, first = np.split(arrays["text_ids"], np.cumsum(arrays["text_lengths"])), 0
        for place, mirror in enumerate(flipped.tolist()):
            image, boxes = world.scaled(place // 3)
            width, (text,) = image.size[0], examples[place].texts[0]
            if mirror:
                image = ImageOps.mirror(image)
                boxes = np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], 1)
                text = exchanged(text) if swap_words else text
            np.testing.assert_allclose(arrays[f"picture_{place}"], world.normalised(image), atol=1e-4)
            np.testing.assert_allclose(arrays[f"boxes_{place}"], boxes, atol=1e-4)
            assert ids[place][1:-1].tolist() == tokens.encode(text, add_special_tokens=False).ids
            rows = slice(first, first + len(boxes))
            where, before = arrays["places"][rows], usual["places"][rows]
            np.testing.assert_allclose(where[:, 0], 100 - before[:, 0] if mirror else before[:, 0], atol=1e-4)
            np.testing.assert_allclose(where[:, 1:], before[:, 1:], atol=1e-4)
            first, seen = first + len(boxes), seen + mirror
        np.testing.assert_array_equal(arrays["labels"], usual["labels"])
    assert 15 < seen < 39  # of 54


def test_half_are_mirrored_by_seed_epoch_and_sample_alone(table, model, examples):
    collate = VLBERTSubject(str(model), settings(), table).training_collator(TASK, examples, 3)
    every = Slots(np.repeat(np.arange(400), 18), np.tile(np.arange(18), 400), np.ones(7200, bool))
    (drawn,) = collate.draws(every)
    assert abs(drawn.mean() - 0.5) < 0.03
    by_epoch = drawn.reshape(400, 18)
    assert 0.4 < by_epoch.mean(0).min() < by_epoch.mean(0).max() < 0.6
    assert collate.draws(slots(7, 5, 0))[0].tolist() == [by_epoch[7, 5], by_epoch[7, 0]]
    other = VLBERTSubject(str(model), settings(), table).training_collator(TASK, examples, 4).draws(every)[0]
    assert 0.45 < (other == drawn).mean() < 0.55
    assert VLBERTSubject(str(model), settings(), table).collator(TASK, examples).draws(every) == []


def test_words_that_the_tokenizer_does_not_know_are_not_exchanged_in_silence(table, model, examples):
    subject = VLBERTSubject(str(model), settings(), table)
    subject._tokenizer = lambda: (SimpleNamespace(token_to_id=lambda word: None), None)
    with pytest.raises(XdscaleError, match=r"model\.swap_words = true: the tokenizer of .* has no word pieces 'left'"):
        subject.training_collator(TASK, examples, 3)
    with pytest.raises(XdscaleError, match="has no word pieces 'left' and 'right'"):
        subject.require_readable(TASK)  # before a run is started
    unmirrored = VLBERTSubject(str(model), settings().model_copy(update={"flip": 0.0}), table)
    unmirrored._tokenizer = subject._tokenizer
    unmirrored.require_readable(TASK)


def test_what_is_measured_is_never_mirrored(table, model, tmp_path):
    named = {"name": str(model), "subject": "vlbert", "size": "base", "weights_sha256": None}
    section = section_of(VLBERTSettings)(**named, **settings().model_dump())
    files = TaskFiles(folder=str(world.expressions_in(tmp_path)), regions=str(table.table.folder))
    material = prepare(TaskSection(name="refcoco_plus", epochs=1), files, section, 3)
    assert len(material.train.draws(slots(0, 1))) == 1
    assert all(collate.draws(slots(0, 1)) == [] for collate in material.dev.values())


def test_answers_are_those_of_the_mirrored_image(table, model):
    """VQA: the release exchanges the words in answers too; one that is not on the list then earns nothing."""
    labels = ("left", "red", "right", "on the left", "upright", "left or right")
    assert mirrored_answers(labels).tolist() == [2, 1, 0, -1, 4, -1]
    credits = np.array([[0.3, 0.6, 1, 0.9, 0.1, 0.2]])
    task = SimpleNamespace(
        name="toy", sentences=1, images=1, reads="answer", choices=0, outputs=6, labels=labels,
        targets=lambda examples, regions=None: np.repeat(credits, len(examples), 0),
    )  # fmt: skip
    examples = [Example(str(number), (("what is left ?",),), 0, 1, ("0",)) for number in range(20)]
    collate = VLBERTSubject(str(model), settings(), table).training_collator(task, examples, 0)
    part = slots(0, *range(20))
    (flipped,), labels = collate.draws(part), collate(part).arrays["labels"]
    assert 3 < flipped.sum() < 17
    np.testing.assert_allclose(labels[~flipped], credits.repeat((~flipped).sum(), 0), rtol=1e-6)
    np.testing.assert_allclose(
        labels[flipped], np.array([[1, 0.6, 0.3, 0, 0.1, 0]]).repeat(flipped.sum(), 0), rtol=1e-6
    )


def test_what_has_nothing_to_mirror_refuses_it(model):
    with pytest.raises(XdscaleError, match=r"model\.flip = 0\.5: .* language has no such choice, it is one of vlbert;"):
        load_settings("paper", ["model.flip=0.5"], "language")
    with pytest.raises(XdscaleError, match=r"--task rte reads no images: leave model\.flip out"):
        describe_subject(str(model), None, VLBERTSettings(flip=0.5), [find_task("rte")])
