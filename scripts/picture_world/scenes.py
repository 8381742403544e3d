"""What is in a picture: kinds, colours, sizes, places; a function of a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 256, 192
KINDS = ("ball", "box", "star", "cup", "tree", "house", "car", "fish", "boat", "person")
COLORS = ("red", "yellow", "green", "blue", "purple", "white")
GROUNDS = ("grass", "sand", "water", "snow")
COLUMNS, ROWS = 4, 2
THINGS, TWINS = 2, 4
"""In a picture, and in one with two things of a kind."""
BIG, SMALL = (56, 64), (30, 36)
"""Pixels of a side, from and below."""


@dataclass(frozen=True)
class Thing:
    """One object; `box` holds pixels x1, y1, x2, y2."""

    kind: str
    color: str
    big: bool
    ground: str
    box: tuple[int, int, int, int]

    @property
    def size(self) -> str:
        """The word for it."""
        return "big" if self.big else "small"


@dataclass(frozen=True)
class Scene:
    """A picture: its things from left to right, the ground of its left and right half, a number for its texture."""

    things: tuple[Thing, ...]
    grounds: tuple[str, str]
    texture: int

    def find(self, kind: str) -> Thing | None:
        """Returns the thing of a kind; a scene has at most one, but in pictures for referring expressions."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    def has(self, kind: str, color: str | None = None) -> bool:
        """Tells whether a thing of a kind is there, of a colour if one is named."""
        return any(thing.kind == kind and color in (None, thing.color) for thing in self.things)


Wanted = tuple[str | None, str | None]
"""Kind and colour of a thing; None leaves it to chance."""


def draw_scene(
    random: np.random.Generator, wanted: Sequence[Wanted] = (), *, without: Sequence[str] = (), twins: bool = False
) -> Scene:
    """Returns a scene of two things of different kinds and colours; with `twins` of four, two of each of two kinds.

    Args:
        random: draws all that is left to chance.
        wanted: of some things, what they must be.
        without: kinds and colours that only `wanted` things may have.
        twins: for pictures in which a kind alone does not say which thing is meant.
    """
    fixed_kinds, fixed_colors = ({pair[place] for pair in wanted} for place in (0, 1))
    kinds = [str(kind) for kind in random.permutation(KINDS) if kind not in fixed_kinds and kind not in without]
    colors = [str(color) for color in random.permutation(COLORS) if color not in fixed_colors and color not in without]
    if twins:
        kinds[1::2] = kinds[::2][: len(kinds[1::2])]
    count = TWINS if twins else THINGS
    pairs = [*wanted, *[(None, None)] * (count - len(wanted))]
    pairs = [(kind or kinds.pop(0), color or colors.pop(0)) for kind, color in pairs]
    grounds = tuple(str(ground) for ground in random.permutation(GROUNDS)[:2])
    slots = random.permutation(COLUMNS * ROWS)[:count]
    things = [_place(random, kind, color, int(slot), grounds) for (kind, color), slot in zip(pairs, slots)]
    return Scene(tuple(sorted(things, key=lambda thing: thing.box)), grounds, int(random.integers(2**31)))


def _place(random: np.random.Generator, kind: str, color: str, slot: int, grounds: tuple[str, str]) -> Thing:
    column, row = slot % COLUMNS, slot // COLUMNS
    big = bool(random.integers(2))
    width, height = (int(side) for side in random.integers(*(BIG if big else SMALL), size=2))
    left = column * (WIDTH // COLUMNS) + int(random.integers(WIDTH // COLUMNS - width + 1))
    top = row * (HEIGHT // ROWS) + int(random.integers(HEIGHT // ROWS - height + 1))
    return Thing(kind, color, big, grounds[column >= COLUMNS // 2], (left, top, left + width, top + height))


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns the random numbers of one purpose, such as ("coco", "train", 17): none depends on how many others are."""
    return np.random.default_rng([seed, *(int.from_bytes(str(part).encode()) for part in purpose)])


def propose(random: np.random.Generator, scene: Scene) -> tuple[list[list[float]], list[float]]:
    """Returns boxes as a detector would propose them, in no order, and confidences that say nothing of the content.

    Each thing has one box that overlaps it with an IoU of at least .7; two more lie on the ground between things.
    """
    boxes = [_shaken(random, thing.box) for thing in scene.things]
    taken = {_slot(thing.box) for thing in scene.things}
    free = [slot for slot in range(COLUMNS * ROWS) if slot not in taken]
    for slot in random.permutation(free)[:2]:
        left, top = int(slot) % COLUMNS * (WIDTH // COLUMNS), int(slot) // COLUMNS * (HEIGHT // ROWS)
        boxes.append([left + 4.0, top + 16.0, left + 60.0, top + 80.0])
    order = random.permutation(len(boxes))
    scores = random.uniform(0.2, 1.0, len(boxes)).round(4).tolist()
    return [boxes[place] for place in order], scores


def _shaken(random: np.random.Generator, box: tuple[int, int, int, int]) -> list[float]:
    """Moves each edge by up to a sixteenth of the side."""
    width, height = box[2] - box[0], box[3] - box[1]
    moved = np.array(box) + random.uniform(-1, 1, 4) * np.array([width, height, width, height]) / 16
    return np.clip(moved, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round(2).tolist()


def _slot(box: tuple[int, int, int, int]) -> int:
    return box[0] // (WIDTH // COLUMNS) + COLUMNS * (box[1] // (HEIGHT // ROWS))
