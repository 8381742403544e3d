"""Outlines of objects as masks, as VL-BERT's release makes them with scikit-image, and r2c with matplotlib."""

import tracemalloc

import numpy as np
import pytest
from matplotlib.path import Path

from xdscale.data.outlines import object_mask

WHOLE = (0, 0, 13, 13)
"""A box whose pixels are the places."""


def rows(mask):
    return ["".join(".#"[int(value)] for value in row) for row in mask]


@pytest.mark.parametrize("seed", range(5))
def test_places_inside_an_outline_are_marked(seed):
    """Against matplotlib's test of points; no corner of a place is on an edge of these outlines."""
    chance = np.random.default_rng(seed)
    angles, reach = np.sort(chance.random(9) * 2 * np.pi), 5 + chance.random(9) * 20
    outlines = [
        np.stack([40 + reach * np.cos(angles), 60 + reach * np.sin(angles)], 1),
        chance.random((4, 2)) * 20 + 40,
    ]
    box = (10.5, 30.25, 70.0, 91.5)  # all within it
    grid = np.arange(14)
    wanted = np.zeros(196, bool)
    for outline in outlines:
        points = np.column_stack([(outline[:, 0] - 10.5) * 14 / 60.5, (outline[:, 1] - 30.25) * 14 / 62.25])
        wanted |= Path(points, closed=False).contains_points(np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2))
    found = object_mask(outlines, box)
    assert 10 < wanted.sum() < 190
    np.testing.assert_array_equal(found, wanted.reshape(14, 14))


@pytest.mark.parametrize("seed", range(5))
def test_with_centres_they_are_those_of_r2c(seed):
    """Spec VisualBERT §4: the middles of 14 × 14 places of the box as it is; outlines may lead out of it."""
    chance = np.random.default_rng(seed)
    outlines = [chance.random((7, 2)) * 80 + 10, chance.random((4, 2)) * 20 + 40]
    left, top, right, bottom = box = (20.5, 30.25, 70.0, 81.5)
    across, down = (right - left) / 28, (bottom - top) / 28
    columns, rows = np.linspace(left + across, right - across, 14), np.linspace(top + down, bottom - down, 14)
    middles = np.stack(np.meshgrid(columns, rows), 2).reshape(-1, 2)
    wanted = sum(Path(outline).contains_points(middles).reshape(14, 14) for outline in outlines) > 0
    assert 5 < wanted.sum() < 191
    np.testing.assert_array_equal(object_mask(outlines, box, centres=True), wanted)


def test_edges_and_corners_count_and_what_leads_out_is_moved_to_the_edge():
    """Worked out by hand, and equal to what scikit-image 0.26 gives."""
    square = np.array([[2, 3], [5, 3], [5, 6], [2, 6]])
    mask = np.zeros((14, 14), bool)
    mask[3:7, 2:6] = True
    np.testing.assert_array_equal(object_mask([square], WHOLE), mask)
    triangle = np.array([[0, 0], [4, 0], [0, 4]])
    assert rows(object_mask([triangle], WHOLE))[:5] == [
        line.ljust(14, ".") for line in ("#####", "####", "###", "##", "#")
    ]
    assert object_mask([np.array([[-50, -50], [90, -50], [90, 90], [-50, 90]])], WHOLE).all()
    assert object_mask([np.array([[7.0, 7.0]])], WHOLE).sum() == 1
    assert not object_mask([], WHOLE).any()


def test_a_box_becomes_14_places_with_sides_a_pixel_longer():
    """A box of 28 × 56 pixels: two columns or four rows of pixels make a place."""
    left_half = np.array([[100, 200], [113, 200], [113, 255], [100, 255]])
    found = object_mask([left_half], (100, 200, 127, 255))
    np.testing.assert_array_equal(found, np.tile(np.arange(14) < 7, (14, 1)))


@pytest.mark.parametrize("centres", [False, True])
def test_an_outline_of_very_many_points_takes_no_more_memory(centres):
    """Of 50,000 points, along a circle; all at once they took 200 MB."""
    angles = np.arange(50_000) * 2 * np.pi / 50_000
    circle = 50 + 40 * np.stack([np.cos(angles), np.sin(angles)], 1)
    tracemalloc.start()
    try:
        found = object_mask([circle], (0, 0, 99, 99), centres=centres)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    places = (np.arange(14) + 0.5 * centres) * (99 if centres else 100) / 14 - 50
    np.testing.assert_array_equal(found, np.hypot(*np.meshgrid(places, places)) < 40)
