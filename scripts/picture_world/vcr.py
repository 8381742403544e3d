"""VCR: questions, answers and rationales in which things stand as numbers, with the boxes of what they number."""

from pathlib import Path
from typing import Any

import numpy as np

from .folder import Folder
from .scenes import COLORS, GROUNDS, HEIGHT, KINDS, WIDTH, Scene, draw_scene, generator

CHOICES = 4
MOVIE = "0001_Picture_World"
CLASSES = {
    "ball": "sportsball",
    "box": "suitcase",
    "star": "kite",
    "tree": "pottedplant",
    "house": "oven",
    "fish": "bird",
}
"""VCR knows the things of COCO alone: what stands for those that are drawn here, each kind for itself."""
LABELS = ("answer_label", "rationale_label")
Tokens = list[str | list[int]]
"""As VCR writes them: words, and lists of numbers of things."""


def write_vcr(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Writes a picture, its metadata, a question, four answers and four rationales for each item, and three splits.

    The test split has no labels. Colours, kinds and the place of the right choice take turns, so none of them can be
    told from the words.
    """
    with Folder(out / "VCR", seed) as folder:
        for split, count in (counts | {"test": counts["val"]}).items():
            rows = [_item(folder, seed, split, number) for number in range(count)]
            if split == "test":
                rows = [{key: row[key] for key in row if key not in LABELS} for row in rows]
            folder.lines(f"{split}.jsonl", rows)


def _item(folder: Folder, seed: int, split: str, number: int) -> dict[str, Any]:
    random = generator(seed, "vcr", split, number)
    # 30 items have each colour 5 times, with each kind 3 of the 6 pairs; the next 30 have the other pairs.
    kind, color = KINDS[number % len(KINDS)], COLORS[(number + number // 30) % len(COLORS)]
    scene = draw_scene(random, [(kind, color)])
    name = f"{MOVIE}/{split}-{number:06}@0"
    folder.picture(f"vcr1images/{name}.jpg", scene)
    folder.json(f"vcr1images/{name}.json", _metadata(scene))
    asked = scene.things.index(scene.find(kind))
    answers, answer_label = _choices(random, color, COLORS)
    rationales, rationale_label = _choices(random, scene.things[asked].ground, GROUNDS)
    item = f"{split}-{number}"
    return {
        "movie": MOVIE,
        "objects": _names(scene),
        "interesting_scores": [0],
        "answer_likelihood": "likely",
        "img_fn": f"{name}.jpg",
        "metadata_fn": f"{name}.json",
        "question": ["What", "color", "is", [asked], "?"],
        "answer_choices": [[[asked], "is", answer, "."] for answer in answers],
        "answer_label": answer_label,
        "rationale_choices": [
            ["It", "is", "the", [asked], "that", "is", "on", "the", ground, "."] for ground in rationales
        ],
        "rationale_label": rationale_label,
        "img_id": item,
        "question_number": 0,
        "annot_id": item,
        "match_fold": f"{split}-0",
        "match_index": 0,
    }


def _choices(random: np.random.Generator, right: str, words: tuple[str, ...]) -> tuple[list[str], int]:
    """Returns four words, one of them right, and where it stands."""
    wrong = [str(word) for word in random.permutation(words) if word != right][: CHOICES - 1]
    label = int(random.integers(CHOICES))
    return [*wrong[:label], right, *wrong[label:]], label


def _names(scene: Scene) -> list[str]:
    return [CLASSES.get(thing.kind, thing.kind) for thing in scene.things]


def _metadata(scene: Scene) -> dict[str, Any]:
    outlines = [[[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]] for x1, y1, x2, y2 in (thing.box for thing in scene.things)]
    return {
        "boxes": [[*map(float, thing.box), 1.0] for thing in scene.things],
        "segms": outlines,
        "names": _names(scene),
        "width": WIDTH,
        "height": HEIGHT,
    }
