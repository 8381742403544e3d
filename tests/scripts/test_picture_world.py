"""The picture world: public formats that our readers take, answers that the pictures alone decide."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdscale.shards.sources.regions.plain_pickle import load_plain
from xdscale.tasks.contract import find_task

ROOT = Path(__file__).parents[2]
PAINT = {"red": 0, "green": 1, "blue": 2}  # the channel that is strongest


def draw(out, *options):
    subprocess.run(
        [sys.executable, "-m", "picture_world", out, *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Drawn by the command of docs/picture-world.md, but for the numbers."""
    page = (ROOT / "docs" / "picture-world.md").read_text()
    assert "\nPYTHONPATH=scripts python -m picture_world data/world --train 800 --val 160\n" in page
    return draw(tmp_path_factory.mktemp("world"), "--train", 96, "--val", 24)


def read(path):
    return json.loads(path.read_text())


def questions(world, split):
    asked = read(world / f"VQA/v2_OpenEnded_mscoco_{split}_questions.json")["questions"]
    answered = read(world / f"VQA/v2_mscoco_{split}_annotations.json")["annotations"]
    assert [question["question_id"] for question in asked] == [answer["question_id"] for answer in answered]
    return [(question, answer) for question, answer in zip(asked, answered)]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_files(tmp_path):
    options = "--only", "coco", "nlvr2", "--val", 4
    first = files_of(draw(tmp_path / "first", *options, "--train", 5))
    assert files_of(draw(tmp_path / "again", *options, "--train", 5)) == first
    more = files_of(draw(tmp_path / "more", *options, "--train", 9))
    val = [name for name in first if "COCO_val2014" in name.name]
    assert len(val) == 4
    assert all(more[name] == first[name] for name in val)
    other = files_of(draw(tmp_path / "other", *options, "--train", 5, "--seed", 1))
    assert all(other[name] != first[name] for name in val)


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_who_reads_the_question_alone_stays_at_chance(world, split):
    by_text = collections.defaultdict(list)
    for question, answer in questions(world, split):
        by_text[question["question"]].append(answer["multiple_choice_answer"])
    possible = {"What color": 6, "What is the": 4, "What is": 10, "Is the": 2, "Is there": 2, "How many": 3}
    assert len(by_text) > 10
    for text, answers in by_text.items():
        counts = collections.Counter(answers)
        assert len(set(counts.values())) == 1
        assert len(counts) == next(count for start, count in possible.items() if text.startswith(start))


def test_hypotheses_and_statements_are_balanced(world):
    labels = collections.defaultdict(list)
    for path in (world / "SNLI-VE").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            labels[path.name, row["sentence2"]].append(row["gold_label"])
    for path in (world / "NLVR2").glob("*.json"):
        for row in map(json.loads, path.read_text().splitlines()):
            labels[row["identifier"].rsplit("-", 2)[0], row["sentence"]].append(row["label"])
    assert len(labels) > 50
    for (name, _), found in labels.items():
        counts = collections.Counter(found)
        assert set(counts.values()) == {len(found) // len(counts)}
        assert len(counts) == (3 if name.startswith("snli") else 2)


def test_ten_answers_and_their_majority(world):
    for _, annotation in questions(world, "val2014"):
        answers = [answer["answer"] for answer in annotation["answers"]]
        assert len(answers) == 10
        assert answers.count(annotation["multiple_choice_answer"]) >= 8


def test_answers_are_what_the_picture_shows(world):
    """Counted in the pixels: of red, green and blue things in the box that COCO's instances state."""
    coco = read(world / "COCO/annotations/instances_train2014.json")
    kinds = {category["id"]: category["name"] for category in coco["categories"]}
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    boxes = {(entry["image_id"], kinds[entry["category_id"]]): entry["bbox"] for entry in coco["annotations"]}
    seen = 0
    for question, annotation in questions(world, "train2014"):
        answer = annotation["multiple_choice_answer"]
        words = question["question"].rstrip("?").split()
        kind = {"What color": words[-1], "Is the": words[2]}.get(" ".join(words[:2]))
        if kind is None:
            continue
        left, top, width, height = boxes[question["image_id"], kind]
        if words[0] == "Is":
            assert answer == ("big" if max(width, height) > 45 else "small")
            continue
        if answer in PAINT and kind in ("ball", "box", "cup"):
            image = Image.open(world / "COCO/train2014" / names[question["image_id"]]).convert("RGB")
            middle = image.crop((left + width // 4, top + height // 2, left + width // 2, top + 3 * height // 4))
            assert np.asarray(middle).mean((0, 1)).argmax() == PAINT[answer]
            seen += 1
    assert seen


def test_proposals_cover_things_and_say_nothing(world):
    coco = read(world / "COCO/annotations/instances_train2014.json")
    boxes = read(world / "boxes.json")
    names = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    best = []
    for entry in coco["annotations"]:
        left, top, width, height = entry["bbox"]
        gold = np.array([left, top, left + width, top + height])
        proposed = np.array(boxes[names[entry["image_id"]]]["boxes"])
        inner = np.clip(np.minimum(proposed[:, 2:], gold[2:]) - np.maximum(proposed[:, :2], gold[:2]), 0, None).prod(1)
        areas = (proposed[:, 2:] - proposed[:, :2]).prod(1) + width * height
        overlap = inner / (areas - inner)
        assert overlap.max() > 0.7
        assert (overlap > 0.5).sum() == 1
        scores = boxes[names[entry["image_id"]]]["scores"]
        best.append(scores[int(overlap.argmax())] == max(scores))
    assert 0.1 < np.mean(best) < 0.4  # four proposals an image: a quarter


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "flickr30k_entities", "vcr_qa", "vcr_qar"])
def test_our_readers_take_the_files(world, task):
    data = find_task(task).read(world)
    assert len(data.train) > len(data.dev["dev"]) > 5
    assert data.train[0].images


def test_things_of_vcr_are_of_its_classes(world):
    """Which VL-BERT's second loss is on; unlike kinds are of unlike classes."""
    task = find_task("vcr_qa")
    classes = np.concatenate(task.object_classes(task.read(world).train))
    assert set(classes.tolist()) <= set(range(1, 81))
    assert len(set(classes.tolist())) == 10


def test_a_few_pictures_of_vcr_have_all_answers_and_sixty_each_pair(tmp_path):
    folder = draw(tmp_path, "--only", "vcr", "--train", 60, "--val", 6) / "VCR"
    asked = {}
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        asked[split] = collections.Counter(
            (row["objects"][row["question"][3][0]], row["answer_choices"][row["answer_label"]][2]) for row in rows
        )
    assert len({color for _, color in asked["val"]}) == 6
    assert len(asked["train"]) == 60  # of ten kinds and six colours


def test_vcrs_test_split_has_no_labels(world):
    for name in ("vcr_qa", "vcr_qar"):
        (test,) = find_task(name).read(world).test.values()
        assert len({example.id.partition("#")[0] for example in test}) == 24
        assert all(example.label is None for example in test)
    assert "_label" not in (world / "VCR/test.jsonl").read_text()


def test_choices_of_vcr_lie_anywhere(world):
    rows = [json.loads(line) for line in (world / "VCR/train.jsonl").read_text().splitlines()]
    for name in ("answer", "rationale"):
        assert set(collections.Counter(row[f"{name}_label"] for row in rows)) == {0, 1, 2, 3}
    right = collections.Counter(row["answer_choices"][row["answer_label"]][2] for row in rows)
    assert max(right.values()) - min(right.values()) <= 10


def test_expressions_name_one_thing(world):
    path = world / "RefCOCO/refcoco/refs(unc).p"
    refs = load_plain(path.read_bytes(), path.name)
    coco = read(world / "RefCOCO/refcoco/instances.json")
    by_id = {entry["id"]: entry for entry in coco["annotations"]}
    kinds = {category["id"]: category["name"] for category in coco["categories"]}
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}
    for ref in refs:
        meant = by_id[ref["ann_id"]]
        assert meant["category_id"] == ref["category_id"]
        twins = [
            entry
            for entry in coco["annotations"]
            if entry["image_id"] == ref["image_id"] and entry["category_id"] == ref["category_id"]
        ]
        assert len(twins) == 2
        assert all(sentence["tokens"][-1] == kinds[ref["category_id"]] for sentence in ref["sentences"])
        where = ref["sentences"][-1]["tokens"][0]
        axis = 0 if where in ("left", "right") else 1
        middles = {entry["id"]: entry["bbox"][axis] + entry["bbox"][axis + 2] / 2 for entry in twins}
        first = min(middles, key=middles.get)
        assert (meant["id"] == first) == (where in ("left", "top"))


def test_expressions_of_refcoco_plus_do_not_say_where(world):
    """They are those of RefCOCO without the words of place, of the same things."""
    both, plus = (
        load_plain((world / f"RefCOCO/{name}/refs(unc).p").read_bytes(), name) for name in ("refcoco", "refcoco+")
    )
    places = {"left", "right", "top", "bottom"}
    assert [ref["ann_id"] for ref in plus] == [ref["ann_id"] for ref in both]
    for one, other in zip(both, plus):
        said = [sentence["sent"] for sentence in one["sentences"] if sentence["tokens"][0] not in places]
        assert [sentence["sent"] for sentence in other["sentences"]] == said
    assert read(world / "RefCOCO/refcoco+/instances.json") == read(world / "RefCOCO/refcoco/instances.json")
