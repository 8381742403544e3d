"""NLVR2: a statement about two pictures, true of half of the pairs that it is asked of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .folder import Folder
from .scenes import COLORS, KINDS, Scene, Wanted, draw_scene, generator

SPLITS = {"train": "train", "val": "dev", "test-P": "test1", "test-U": "test2"}
PAIRS = 4
"""Of pictures for each statement: it is true of two."""


def write_nlvr2(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Writes statements, each with four pairs of pictures: eight pictures a statement."""
    with Folder(out / "NLVR2", seed) as folder:
        for split, name in SPLITS.items():
            statements = max(1, counts["train" if split == "train" else "val"] // (2 * PAIRS))
            rows = [row for number in range(statements) for row in _statement(folder, seed, name, number)]
            folder.lines(f"{name}.json", rows)


def _statement(folder: Folder, seed: int, split: str, number: int) -> Iterator[dict[str, Any]]:
    random = generator(seed, "nlvr2", split, number)
    color, kind = COLORS[number % len(COLORS)], KINDS[number // len(COLORS) % len(KINDS)]
    form = int(random.integers(3))
    side = ("left", "right")[form % 2]
    sentence = f"Both images contain a {kind}." if form == 2 else f"The {side} image contains a {color} {kind}."
    labels = random.permutation([True, True, False, False])
    for pair, label in enumerate(labels.tolist()):
        right = _both(random, kind, label) if form == 2 else _one(random, color, kind, label)
        other = draw_scene(random)
        pictures = right if form == 2 else (right[0], other) if side == "left" else (other, right[0])
        for place, scene in enumerate(pictures):
            folder.picture(f"images/{split}/{split}-{number}-{pair}-img{place}.png", scene)
        yield {
            "identifier": f"{split}-{number}-{pair}-0",
            "sentence": sentence,
            "label": str(label),
            "writer": "0",
            "validation": {"0": str(label)},
            "directory": number % 100,
            "synset": kind,
            "query": kind,
        }


def _one(random: np.random.Generator, color: str, kind: str, label: bool) -> tuple[Scene]:
    """Returns a picture with a thing of a kind and one of a colour, which are one thing if the label says so."""
    wanted: list[Wanted] = [(kind, color)] if label else [(kind, None), (None, color)]
    return (draw_scene(random, wanted, without=[color, kind]),)


def _both(random: np.random.Generator, kind: str, label: bool) -> tuple[Scene, Scene]:
    """Returns two pictures with a thing of a kind, or one with and one without."""
    first = draw_scene(random, [(kind, None)])
    second = draw_scene(random, [(kind, None)] if label else [], without=[kind])
    return (first, second) if random.integers(2) else (second, first)
