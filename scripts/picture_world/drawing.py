"""Pictures of scenes: drawn at twice their size with an outline and shade, on textured ground."""

import io

import numpy as np
from PIL import Image, ImageDraw

from .scenes import HEIGHT, WIDTH, Scene, Thing

SCALE = 2
_PAINT = {
    "red": (214, 40, 40),
    "yellow": (245, 205, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (140, 50, 160),
    "white": (245, 245, 245),
}
# Of each ground: its colour, and how strong and how long its grain is across and along.
_GROUND = {
    "grass": ((150, 190, 110), 40, 2, 12),
    "sand": ((224, 200, 150), 22, 2, 2),
    "water": ((130, 180, 205), 34, 24, 4),
    "snow": ((222, 226, 234), 12, 10, 10),
}
_OUTLINE = (25, 25, 25)
_DARK = (60, 60, 60)


def picture(scene: Scene) -> Image.Image:
    """Returns the picture, RGB."""
    image = _ground(scene).resize((WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.BICUBIC)
    for thing in scene.things:
        _draw(ImageDraw.Draw(image), thing)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def encoded(scene: Scene, format: str) -> bytes:
    """Returns the picture as a JPEG or PNG file."""
    stream = io.BytesIO()
    picture(scene).save(stream, format, **({"quality": 90} if format == "JPEG" else {}))
    return stream.getvalue()


def _ground(scene: Scene) -> Image.Image:
    random = np.random.default_rng(scene.texture)
    halves = []
    for name in scene.grounds:
        color, strength, across, along = _GROUND[name]
        shape = (-(-HEIGHT // along), -(-WIDTH // 2 // across))
        grain = random.standard_normal(shape).clip(-2, 2).repeat(along, 0).repeat(across, 1)
        grain = grain[:HEIGHT, : WIDTH // 2, None]
        halves.append(np.array(color) + strength * grain)
    light = np.linspace(1.05, 0.92, HEIGHT)[:, None, None]  # from above
    return Image.fromarray((np.concatenate(halves, 1) * light).clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x1, y1, x2, y2 = (edge * SCALE for edge in thing.box)

    def at(*corners: float) -> list[float]:
        """Places given as shares of the box: x, y, x, y, …"""
        sides = (x2 - x1 - 1, y2 - y1 - 1)
        return [(x1, y1)[place % 2] + share * sides[place % 2] for place, share in enumerate(corners)]

    paint = _PAINT[thing.color]
    _SHAPES[thing.kind](draw, at, {"fill": paint, "outline": _OUTLINE, "width": 3}, _shade(paint))


def _shade(paint: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(int(channel * 0.72) for channel in paint)


def _ball(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.ellipse(at(0, 0, 1, 1), **style)
    draw.chord(at(0.06, 0.06, 0.94, 0.94), 20, 140, fill=shade)
    draw.ellipse(at(0.22, 0.16, 0.42, 0.34), fill=(255, 255, 255))


def _box(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.polygon(at(0, 0.25, 0.25, 0, 1, 0, 1, 0.75, 0.75, 1, 0, 1), **style)
    draw.polygon(at(0.75, 0.25, 1, 0, 1, 0.75, 0.75, 1), fill=shade, outline=_OUTLINE, width=3)
    draw.rectangle(at(0, 0.25, 0.75, 1), **style)


def _star(draw, at, style, shade) -> None:  # noqa: ANN001
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.21, 0.5)
    corners = np.stack([0.5 + radius * np.cos(angles), 0.52 + radius * np.sin(angles)], 1).ravel()
    draw.polygon(at(*corners), **style)


def _cup(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.arc(at(0.55, 0.25, 1, 0.8), -90, 90, fill=_OUTLINE, width=12)
    draw.polygon(at(0, 0.1, 0.78, 0.1, 0.68, 1, 0.1, 1), **style)
    draw.ellipse(at(0, 0, 0.78, 0.22), fill=shade, outline=_OUTLINE, width=3)


def _tree(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.rectangle(at(0.42, 0.7, 0.58, 1), fill=(110, 70, 30), outline=_OUTLINE, width=3)
    for top, wide in ((0.4, 0.5), (0.2, 0.4), (0.0, 0.28)):
        draw.polygon(at(0.5, top, 0.5 + wide, top + 0.4, 0.5 - wide, top + 0.4), **style)


def _house(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.rectangle(at(0.1, 0.4, 0.9, 1), **style)
    draw.polygon(at(0, 0.42, 0.5, 0, 1, 0.42), fill=shade, outline=_OUTLINE, width=3)
    draw.rectangle(at(0.4, 0.65, 0.6, 1), fill=_DARK)
    draw.rectangle(at(0.18, 0.52, 0.33, 0.66), fill=(235, 235, 180), outline=_OUTLINE, width=3)


def _car(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.polygon(at(0.2, 0.5, 0.3, 0.15, 0.7, 0.15, 0.82, 0.5), **style)
    draw.rectangle(at(0.34, 0.24, 0.64, 0.46), fill=(190, 220, 235), outline=_OUTLINE, width=3)
    draw.rounded_rectangle(at(0, 0.46, 1, 0.84), radius=12, **style)
    for left in (0.12, 0.62):
        draw.ellipse(at(left, 0.68, left + 0.26, 1), fill=_DARK, outline=_OUTLINE, width=3)


def _fish(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.polygon(at(0.62, 0.5, 1, 0.1, 1, 0.9), fill=shade, outline=_OUTLINE, width=3)
    draw.ellipse(at(0, 0.15, 0.78, 0.85), **style)
    draw.ellipse(at(0.12, 0.34, 0.24, 0.48), fill=(255, 255, 255), outline=_OUTLINE, width=3)
    draw.arc(at(0.2, 0.2, 0.44, 0.8), -60, 60, fill=_OUTLINE, width=4)


def _boat(draw, at, style, shade) -> None:  # noqa: ANN001
    draw.polygon(at(0.06, 0.62, 0.46, 0.02, 0.46, 0.62), **style)
    draw.polygon(at(0.54, 0.62, 0.54, 0.1, 0.9, 0.62), fill=shade, outline=_OUTLINE, width=3)
    draw.line(at(0.5, 0, 0.5, 0.72), fill=_OUTLINE, width=6)
    draw.polygon(at(0, 0.7, 1, 0.7, 0.8, 1, 0.2, 1), **style)


def _person(draw, at, style, shade) -> None:  # noqa: ANN001
    skin = {"fill": (232, 184, 140), "outline": _OUTLINE, "width": 3}
    for left in (0.3, 0.54):
        draw.rectangle(at(left, 0.68, left + 0.16, 1), fill=shade, outline=_OUTLINE, width=3)
    draw.rectangle(at(0.02, 0.36, 0.98, 0.48), **skin)
    draw.rounded_rectangle(at(0.24, 0.3, 0.76, 0.74), radius=9, **style)
    draw.ellipse(at(0.34, 0, 0.66, 0.32), **skin)


_SHAPES = {
    "ball": _ball,
    "box": _box,
    "star": _star,
    "cup": _cup,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "fish": _fish,
    "boat": _boat,
    "person": _person,
}
