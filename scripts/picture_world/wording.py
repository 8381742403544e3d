"""Sentences about scenes, with the phrases that name things."""

from collections.abc import Sequence

import numpy as np

from .scenes import KINDS, Scene, Thing

Piece = str | tuple[str, Thing]
"""Plain words, or a phrase and the thing that it names; the ground is a phrase of its own, see `GROUND_ENTITY`."""
CAPTIONS = 5
ENTITY_TYPES = {"person": "people", "fish": "animals", "car": "vehicles", "boat": "vehicles", "tree": "scene"}
"""Flickr30K Entities' types of phrases; all other kinds are "other"."""


def captions(random: np.random.Generator, scene: Scene) -> list[list[Piece]]:
    """Returns five captions, each of two things in any order, most of them with their colours."""
    return [_caption(random, scene) for _ in range(CAPTIONS)]


def text(pieces: Sequence[Piece]) -> str:
    """Returns a caption without its marks."""
    return " ".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)


def _caption(random: np.random.Generator, scene: Scene) -> list[Piece]:
    first, second = (scene.things[place] for place in random.permutation(len(scene.things))[:2])
    one, two = (_phrase(random, thing) for thing in (first, second))
    form = int(random.integers(4))
    if form == 0:
        return [(one.capitalize(), first), "is on the", first.ground, "and", (two, second), "is on the", second.ground]
    if form == 1:
        return ["There is", (one, first), "on the", first.ground, "beside", (two, second)]
    if form == 2:
        return [(one.capitalize(), first), "and", (two, second), "on the", second.ground]
    return ["A picture of", (one, first), "and", (two, second)]


def _phrase(random: np.random.Generator, thing: Thing) -> str:
    words = [thing.size] * int(random.random() < 0.3) + [thing.color] * int(random.random() < 0.8)
    return " ".join(["a", *words, thing.kind])


def entities(scene: Scene) -> dict[str, Thing]:
    """Returns things by kind, in the order of `KINDS`: the order in which every format here numbers them."""
    return {kind: scene.find(kind) for kind in KINDS if scene.has(kind)}
