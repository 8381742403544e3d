"""COCO's captions and instances, VQA v2's questions and answers on them, and RefCOCO's expressions."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .balance import Candidate, balanced
from .folder import INFO, Folder
from .scenes import COLORS, GROUNDS, HEIGHT, KINDS, WIDTH, Scene, Thing, draw_scene, generator
from .wording import captions, text

SPLITS = {"train": "train2014", "val": "val2014"}
FIRST_ID = {"train": 1, "val": 500_001}
FIRST_REFERRED = 800_001
_LICENSES = [{"id": 1, "name": "made by a program", "url": ""}]
_CATEGORIES = [{"supercategory": "thing", "id": number, "name": kind} for number, kind in enumerate(KINDS, 1)]
ANSWERS: dict[str, Sequence[str]] = {
    "what color": COLORS,
    "what is": KINDS,
    "which size": ("big", "small"),
    "what ground": GROUNDS,
    "is there": ("yes", "no"),
    "how many": ("0", "1", "2"),
}
"""By kind of question; those of one text are equally frequent in each split."""
_ANSWER_TYPES = {"is there": "yes/no", "how many": "number"}
ANNOTATORS = 10


def write_coco(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Writes `counts` pictures by split with captions, instances, questions and annotations."""
    with Folder(out / "COCO", seed) as folder, Folder(out / "VQA", seed) as vqa:
        for split, year in SPLITS.items():
            scenes = [draw_scene(generator(seed, "coco", split, number)) for number in range(counts[split])]
            ids = [FIRST_ID[split] + number for number in range(len(scenes))]
            names = [f"COCO_{year}_{image:012}.jpg" for image in ids]
            for name, scene in zip(names, scenes):
                folder.picture(f"{year}/{name}", scene)
            images = _images(ids, names)
            rows = [
                {"image_id": image, "id": image * 10 + place, "caption": text(caption) + "."}
                for image, scene in zip(ids, scenes)
                for place, caption in enumerate(captions(generator(seed, "captions", image), scene))
            ]
            head = {"info": INFO, "licenses": _LICENSES, "images": images}
            folder.json(f"annotations/captions_{year}.json", head | {"annotations": rows})
            folder.json(f"annotations/instances_{year}.json", head | _instances(ids, scenes))
            _write_questions(vqa, seed, year, ids, scenes)


def _images(ids: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"license": 1, "file_name": name, "height": HEIGHT, "width": WIDTH, "id": image}
        for image, name in zip(ids, names)
    ]


def _instances(ids: Sequence[int], scenes: Sequence[Scene]) -> dict[str, Any]:
    annotations = []
    for image, scene in zip(ids, scenes):
        for place, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            annotations.append(
                {
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "image_id": image,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "category_id": KINDS.index(thing.kind) + 1,
                    "id": image * 10 + place,
                }
            )
    return {"annotations": annotations, "categories": _CATEGORIES}


def _write_questions(folder: Folder, seed: int, year: str, ids: Sequence[int], scenes: Sequence[Scene]) -> None:
    found = [found for place, scene in enumerate(scenes) for found in _candidates(place, scene)]
    asked = balanced(found, ANSWERS)
    numbers: dict[int, int] = {}
    questions, annotations = [], []
    for question in asked:
        image = ids[question.place]
        number = numbers[image] = numbers.get(image, -1) + 1
        name = {"image_id": image, "question_id": image * 1000 + number}
        questions.append(name | {"question": question.text})
        answers = _ten_answers(generator(seed, "answers", image, number), question.answer)
        annotations.append(
            {
                "question_type": question.kind,
                "multiple_choice_answer": question.answer,
                "answers": answers,
                "answer_type": _ANSWER_TYPES.get(question.kind, "other"),
            }
            | name
        )
    head = {"info": INFO, "license": _LICENSES[0], "data_type": "mscoco", "data_subtype": year}
    open_ended = head | {"task_type": "Open-Ended", "questions": questions}
    folder.json(f"v2_OpenEnded_mscoco_{year}_questions.json", open_ended)
    folder.json(f"v2_mscoco_{year}_annotations.json", head | {"annotations": annotations})


def _candidates(place: int, scene: Scene) -> Iterator[Candidate]:
    for thing in scene.things:
        yield Candidate(f"What color is the {thing.kind}?", thing.color, place, "what color")
        yield Candidate(f"What is {thing.color}?", thing.kind, place, "what is")
        yield Candidate(f"Is the {thing.kind} big or small?", thing.size, place, "which size")
        yield Candidate(f"What is the {thing.kind} on?", thing.ground, place, "what ground")
        yield Candidate(f"Is there a {thing.color} {thing.kind}?", "yes", place, "is there")
        # Both words are true of the picture, of different things: each alone says nothing.
        other = next(other for other in scene.things if other != thing)
        yield Candidate(f"Is there a {other.color} {thing.kind}?", "no", place, "is there")
    big = sum(thing.big for thing in scene.things)
    yield Candidate("How many things are big?", str(big), place, "how many")


def _ten_answers(random: np.random.Generator, answer: str) -> list[dict[str, Any]]:
    """Ten annotators agree, but in an eighth of the questions one or two are not sure."""
    unsure = int(random.integers(1, 3)) if random.random() < 1 / 8 else 0
    said = [(answer, "yes")] * (ANNOTATORS - unsure) + [("not sure", "no")] * unsure
    return [
        {"answer": said[place][0], "answer_confidence": said[place][1], "answer_id": number}
        for number, place in enumerate(random.permutation(ANNOTATORS).tolist(), 1)
    ]


def write_refcoco(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Writes pictures with two things of each of two kinds, and the two files of RefCOCO and of RefCOCO+.

    RefCOCO+'s expressions do not say where a thing is. The file of expressions is a pickle in the public format too:
    lists, dicts, numbers and strings.
    """
    with Folder(out / "RefCOCO", seed) as folder:
        wanted = {"train": counts["train"]} | dict.fromkeys(("val", "testA", "testB"), counts["val"])
        splits = [split for split, count in wanted.items() for _ in range(count)]
        scenes = [draw_scene(generator(seed, "refcoco", number), twins=True) for number in range(len(splits))]
        ids = [FIRST_REFERRED + number for number in range(len(scenes))]
        names = [f"COCO_train2014_{image:012}.jpg" for image in ids]
        refs: dict[str, list[dict[str, Any]]] = {"refcoco": [], "refcoco+": []}
        for image, name, split, scene in zip(ids, names, splits, scenes):
            folder.picture(f"images/train2014/{name}", scene)
            random = generator(seed, "expressions", image)
            for place in random.permutation(len(scene.things))[:2].tolist():
                for task, found in refs.items():
                    said = _expressions(scene, scene.things[place], where=task == "refcoco")
                    found.append(_ref(len(found), image, name, split, place, scene, said))
        head = {"info": INFO, "licenses": _LICENSES, "images": _images(ids, names)}
        for task, found in refs.items():
            folder.json(f"{task}/instances.json", head | _instances(ids, scenes))
            folder.write(f"{task}/refs(unc).p", pickle.dumps(found, protocol=2))


def _expressions(scene: Scene, thing: Thing, *, where: bool) -> list[str]:
    twin = next(other for other in scene.things if other.kind == thing.kind and other != thing)
    said = [f"{thing.color} {thing.kind}"]
    if thing.big != twin.big:
        said.append(f"the {thing.size} {thing.kind}")
    if not where:
        return said
    across, down = (
        (thing.box[axis] + thing.box[axis + 2] - twin.box[axis] - twin.box[axis + 2]) / 2 for axis in (0, 1)
    )
    words = ("left", "right") if abs(across) >= abs(down) else ("top", "bottom")
    said.append(f"{words[max(across, down, key=abs) > 0]} {thing.kind}")
    return said


def _ref(
    number: int, image: int, name: str, split: str, place: int, scene: Scene, said: Sequence[str]
) -> dict[str, Any]:
    thing, annotation, first = scene.things[place], image * 10 + place, number * 3
    return {
        "sent_ids": list(range(first, first + len(said))),
        "file_name": f"{name.removesuffix('.jpg')}_{annotation}.jpg",
        "ann_id": annotation,
        "ref_id": number,
        "image_id": image,
        "split": split,
        "sentences": [
            {"tokens": words.split(), "raw": words, "sent_id": first + row, "sent": words}
            for row, words in enumerate(said)
        ],
        "category_id": KINDS.index(thing.kind) + 1,
    }
