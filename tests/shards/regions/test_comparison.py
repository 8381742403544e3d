"""Two tables of the same images side by side."""

import csv

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou as torchvision_iou
from typer.testing import CliRunner

from xdscale.commands.regions import regions_app
from xdscale.errors import XdscaleError
from xdscale.shards.region_comparison import box_iou, common_images, compare_images, overall
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions


def drawn(number, regions=6):
    chance = np.random.default_rng(number)
    corners = np.sort(chance.random((regions, 2, 2)), axis=1).reshape(regions, 4) * [400, 300, 400, 300]
    labels = {"object_ids": chance.integers(0, 50, regions)}
    features = chance.random((regions, 16))
    return RegionImage(f"{number}", (400, 300), corners.astype(np.float32), features, labels)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """One as a detector gives it; another without one image, in another order, with some boxes and classes changed."""
    folder = tmp_path_factory.mktemp("tables")
    first = [drawn(number) for number in range(8)]
    second = []
    for image in first[1:]:
        order = np.arange(6)[::-1] if image.image_id == "3" else np.arange(6)
        moved = image.boxes[order].copy()
        if image.image_id == "5":
            moved[:2] = [[0, 0, 1, 1], [2, 2, 3, 3]]
        ids = image.labels["object_ids"][order] + 1
        if image.image_id == "7":
            ids[:3] += 1
        second.append(image._replace(boxes=moved, features=image.features[order] * 3, labels={"object_ids": ids}))
    build_regions(first, folder / "first", Detector(model="one", class_count=50))
    build_regions(second[::-1], folder / "second", Detector(model="other", class_count=52, background=0))
    return folder / "first", folder / "second"


def test_iou_is_torchvisions():
    chance = np.random.default_rng(0)
    boxes = np.sort(chance.random((2, 30, 2, 2)), axis=2).reshape(2, 30, 4) * 100
    expected = torchvision_iou(*map(torch.from_numpy, boxes)).numpy()
    assert np.allclose(box_iou(*boxes), expected, atol=1e-12)
    with np.errstate(divide="raise", invalid="raise"):
        assert box_iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0]]


def test_boxes_are_paired_whatever_their_order(tables):
    first, second = map(RegionTable.open, tables)
    names = common_images(first, second)
    assert names == [str(number) for number in range(1, 8)]
    found = {image.image_id: image for image in compare_images(first, second, names)}
    for name, image in found.items():
        assert image.boxes == (6, 6)
        assert image.matched == (4 if name == "5" else 6)
        assert image.in_place == {"3": 0, "5": 4}.get(name, 6)
        assert image.same_class == {"5": 4, "7": 3}.get(name, 6)
        assert image.iou == pytest.approx(1)
        assert image.cosine == pytest.approx(1, abs=1e-5)
    whole = overall(list(found.values()), (len(first), len(second)))
    assert whole.images == 7
    assert whole.only == (1, 0)
    assert whole.matched == 40
    assert whole.in_place == pytest.approx(34 / 40)
    assert whole.same_class == pytest.approx(37 / 40)


def test_the_command_shows_what_differs_most(tables, tmp_path):
    words = ["compare", *map(str, tables), "--images", "2", "--csv", str(tmp_path / "all.csv")]
    result = CliRunner().invoke(regions_app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "7 images in both, 1 only in" in result.output
    assert (
        "boxes: 42 and 42; 40 match with IoU of 0.5 or more (mean 1.0000), 85.0% of them in the same" in result.output
    )
    assert "classes of matching boxes: 92.5% the same" in result.output
    shown = [line for line in result.output.splitlines() if line.startswith("  ")]
    assert shown[0].startswith("  5: 4 of 6 and 6 boxes match")
    assert len(shown) == 2
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [row["image_id"] for row in rows] == [str(number) for number in range(1, 8)]
    assert rows[4]["matched"] == "4"


def test_what_cannot_be_compared_is_said_in_words(tables, tmp_path):
    """Nothing prints "nan": tables without features, and images none of whose boxes match."""
    images = [drawn(number)._replace(features=None, labels={}) for number in range(8)]
    images[1] = images[1]._replace(boxes=np.array([[399, 299, 400, 300]], np.float32))
    build_regions(images, tmp_path / "bare", Detector(model="one"))
    command = ["compare", str(tables[0]), str(tmp_path / "bare"), "--images", "1", "--csv", str(tmp_path / "bare.csv")]
    said = CliRunner().invoke(regions_app, command, catch_exceptions=False).output
    assert "features of matching boxes: not compared: they have 16 and 0 numbers" in said
    assert said.splitlines()[-1] == "  1: 0 of 6 and 1 boxes match"
    rows = [line.split(",") for line in (tmp_path / "bare.csv").read_text().splitlines()]
    assert rows[1:3] == [["0", "6", "6", "6", "6", "1.0", "", "", ""], ["1", "6", "1", "0", "0", "", "", "", ""]]
    build_regions(images[1:2], tmp_path / "apart", Detector(model="one"))
    command = ["compare", str(tables[0]), str(tmp_path / "apart")]
    apart = CliRunner().invoke(regions_app, command, catch_exceptions=False).output
    assert "boxes: 6 and 1; 0 match with IoU of 0.5 or more\n" in apart
    assert "nan" not in said + apart


def test_classes_that_have_names_are_compared_by_name(tables, tmp_path):
    names = [f"class {number}" for number in range(50)]
    images = [drawn(number) for number in range(4)]
    build_regions(images, tmp_path / "first", Detector(model="one", class_count=50, classes=names))
    turned = ["none", *names[::-1], "class 99"]
    second = [image._replace(labels={"object_ids": 50 - image.labels["object_ids"]}) for image in images]
    second[1].labels["object_ids"][:2] = [0, 51]
    build_regions(second, tmp_path / "second", Detector(model="other", class_count=52, classes=turned, background=0))
    both = RegionTable.open(tmp_path / "first"), RegionTable.open(tmp_path / "second")
    assert [image.same_class for image in compare_images(*both, common_images(*both))] == [6, 4, 6, 6]


@pytest.mark.parametrize("named", [False, True])
def test_the_most_likely_class_counts_where_no_ids_are_there_and_background_is_one(tmp_path, named):
    """Of six regions two are nothing in both tables, one in the first alone and one in the second alone."""
    both = []
    # The classes are nothing, dog, cat in the first table; dog, nothing, cat in the second.
    for name, background, likely in (("first", 0, [0, 0, 0, 1, 2, 1]), ("second", 1, [1, 1, 0, 1, 2, 0])):
        probs = np.eye(3, dtype=np.float32)[likely] * 0.7 + 0.1
        names = ["dog", "cat"]
        names.insert(background, "nothing")
        how = Detector(model=name, class_count=3, background=background, classes=names if named else [])
        image = drawn(1)._replace(labels={}, class_probs=probs)
        build_regions([image], tmp_path / name, how)
        both.append(RegionTable.open(tmp_path / name))
    [image] = compare_images(*both, common_images(*both))
    assert (image.matched, image.same_class) == (6, 4)


def test_tables_without_a_common_image_are_refused(tables, tmp_path):
    build_regions([drawn(3)._replace(image_id="COCO_3")], tmp_path / "other", Detector(model="one"))
    with pytest.raises(XdscaleError, match="no image in common: ids look like '0' and 'COCO_3'"):
        common_images(RegionTable.open(tables[0]), RegionTable.open(tmp_path / "other"))


def test_means_are_over_pairs_and_cosines_do_not_depend_on_the_scale(tmp_path):
    """One image has four pairs of equal features, one has pairs of cosine .8 and .6, and one has no pair."""
    places = np.array([[40 * n, 0, 40 * n + 20, 20] for n in range(5)], np.float32)
    flat, turned = np.array([[1, 0]] * 4), np.array([[0.8, 0.6], [0.6, 0.8]])
    half = places[:2] - [[0, 0, 0, 10], [0, 0, 0, 11]]  # of an IoU of .5, which counts, and of less
    first = [("a", places[:4], flat), ("b", places[:3], np.array([[1, 0]] * 3)), ("c", places[:1], flat[:1])]
    second = [("a", places[:4], flat * 3), ("b", half, turned), ("c", places[4:], flat[:1])]
    for name, images in (("first", first), ("second", second)):
        given = [
            RegionImage(image, (400, 300), boxes.astype(np.float32), (features * 2**-9).astype(np.float32), {})
            for image, boxes, features in images
        ]
        build_regions(given, tmp_path / name, Detector(model=name))
    both = RegionTable.open(tmp_path / "first"), RegionTable.open(tmp_path / "second")
    found = list(compare_images(*both, common_images(*both), least_iou=0.5))
    assert [image.matched for image in found] == [4, 1, 0]
    found = list(compare_images(*both, common_images(*both), least_iou=0.4))
    assert [image.matched for image in found] == [4, 2, 0]
    assert [image.boxes for image in found] == [(4, 4), (3, 2), (1, 1)]
    assert [image.cosine for image in found] == pytest.approx([1, 0.7, np.nan], abs=1e-3, nan_ok=True)
    assert [image.lowest_cosine for image in found] == pytest.approx([1, 0.6, np.nan], abs=1e-3, nan_ok=True)
    whole = overall(found, (3, 4))
    assert (whole.images, whole.only, whole.boxes, whole.matched) == (3, (0, 1), (8, 7), 6)
    assert (whole.cosine, whole.lowest_cosine) == pytest.approx((5.4 / 6, 0.6), abs=1e-3)
    assert whole.iou == pytest.approx((4 + 0.5 + 0.45) / 6, abs=1e-3)
    assert whole.same_class is None
    nothing = overall(found[2:], (1, 1))
    assert (nothing.matched, nothing.in_place) == (0, 0)
    assert np.isnan([nothing.iou, nothing.cosine, nothing.lowest_cosine]).all()
