"""Of an image with regions what lies at a limit is stored, and what lies beyond is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.regions import Detector, RegionBuild, RegionTable
from xdscale.shards.sources.regions import checks
from xdscale.shards.sources.regions.detectors import load_detector
from xdscale.shards.sources.regions.fields import image_of, whole_number
from xdscale.shards.sources.regions.importing import _background
from xdscale.shards.sources.regions.json_files import detection
from xdscale.shards.sources.regions.source import RegionImage, RegionSource, build_regions
from xdscale.shards.sources.regions.vinvl import _cut_geometry

HALF, SINGLE = 65504.0, float(np.finfo(np.float32).max)


def stored(folder, *, size=(10, 20), boxes=((1, 2, 3, 4), (2, 3, 4, 5)), classes=0, how=None, **fields):
    """Builds a table of one image and opens it."""
    image = RegionImage("a", size, np.array(boxes, np.float64), **{"where": "x"} | fields)
    build_regions([image], folder, Detector(model="m", class_count=classes), **how or {})
    return RegionTable.open(folder)


def labels(name, *values):
    return {"labels": {name: np.array(values)}}


def probabilities(classes):
    return {"class_probs": np.full((2, classes), 1 / classes, np.float32)}


WHOLE = {"how": {"whole_image": "first"}}
FALLING = {"how": {"region_order": "confidence"}}
AT = {
    "one pixel": {"size": (1, 1), "boxes": [(0, 0, 1, 1)]},
    "a line": {"size": (1, 50), "boxes": [(0, 0, 1, 1)]},
    "the largest image": {"size": (65535, 65535)},
    "boxes of one column or row": {"boxes": [(3, 2, 3, 9), (2, 5, 9, 5)]},
    "the largest of half precision": {"features": np.array([[HALF, -HALF], [0, 1]])},
    "confidences": labels("confidences", 0.0, 1.0),
    "equal confidences": labels("confidences", 0.5, 0.5) | FALLING,
    "the largest of single precision": labels("attribute_confidences", SINGLE, -SINGLE),
    "first and last class": labels("object_ids", 0, 4) | {"classes": 5},
    "classes that nobody counts": labels("object_ids", 0, 65535),
    "two pixels of the edge": {"boxes": [(2, 2, 8, 18), (0, 0, 5, 5)]} | WHOLE,
    "two pixels outside": {"boxes": [(-2, -2, 12, 22)]},
    "a probability of nothing": {"class_probs": np.array([[1.0, 0.0], [0.0, 1.0]])},
    "65 classes": probabilities(65) | {"how": {"class_probs": "top-64"}},
}
BEYOND = {
    "no column": ({"size": (0, 9)}, "width and height"),
    "no row": ({"size": (9, 0)}, "width and height"),
    "too wide": ({"size": (65536, 9)}, "width and height"),
    "too high": ({"size": (9, 65536)}, "width and height"),
    "shares": ({"boxes": [(0, 0, 1, 1)]}, "lie between 0 and 1"),
    "edges the other way": ({"boxes": [(3, 2, 2.9, 9)]}, "right or lower edge is before"),
    "more than half precision": ({"features": np.array([[HALF + 1, 0], [0, 1]])}, "half precision ends at 65504"),
    "less than that": ({"features": np.array([[-HALF - 1, 0], [0, 1]])}, "half precision ends at 65504"),
    "a negative confidence": (labels("confidences", -1e-6, 1.0), "expected 0 to 1"),
    "a confidence above 1": (labels("confidences", 0.0, 1.001), "expected 0 to 1"),
    "rising confidences": (labels("confidences", 0.5, 0.50001) | FALLING, "rise after region 0"),
    "more than single precision": (labels("attribute_confidences", SINGLE * 1.001, 0), "too large for single"),
    "a class too many": (labels("object_ids", 0, 5) | {"classes": 5}, "has 5, expected a whole number from 0 to 4"),
    "no class": (labels("object_ids", -1, 0), "has -1, expected"),
    "more than a column holds": (labels("object_ids", 0, 65536), "has 65536, expected"),
    "more than two pixels of the edge": ({"boxes": [(2, 2, 7.9, 18), (0, 0, 5, 5)]} | WHOLE, "the whole image"),
    "more than two pixels outside": ({"boxes": [(-2, -2.1, 12, 22)]}, "2.1 pixels outside"),
    "64 classes": (probabilities(64) | {"how": {"class_probs": "top-64"}}, "--class-probs all"),
    "a negative probability": ({"class_probs": np.array([[1.01, -0.01], [0, 1]])}, "nothing negative"),
}


@pytest.mark.parametrize("name", AT)
def test_what_lies_at_a_limit_is_stored(tmp_path, name):
    assert len(stored(tmp_path / "out", **AT[name])) == 1


@pytest.mark.parametrize("name", BEYOND)
def test_what_lies_beyond_is_refused(tmp_path, name):
    fields, message = BEYOND[name]
    with pytest.raises(XdscaleError, match=f"^x: image 'a': .*{message}"):
        stored(tmp_path / "out", **fields)


FIRST = RegionImage("a", (10, 20), np.array([[1.0, 2, 3, 4], [2, 3, 4, 5]]), np.ones((2, 3)),
                    {"confidences": np.ones(2)}, np.full((2, 2), 0.5), b"\xff\xd8")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": ""}, "image '': image id: is '', expected a text"),
        ({"image_id": "b\0"}, r"image id: is 'b\\x00', expected a text"),
        ({"image_id": "a"}, "image id 'a' is there twice; ids must be unique"),
        ({"labels": {}}, "fields: has none, but the first image confidences; all must have the same"),
        ({"labels": {"confidences": np.ones(3)}}, r"confidences: have the shape \[3\], expected \[2\]"),
        ({"labels": {"confidences": np.array(["1", "1"])}}, "confidences: are <U1, expected numbers"),
        ({"jpeg": None}, "jpeg: some images have their file, others do not"),
        ({"boxes": np.zeros(4)}, r"boxes: have the shape \[4\], expected \[regions, 4\] with a region or more"),
        ({"boxes": np.zeros((2, 5))}, r"boxes: have the shape \[2, 5\], expected"),
        ({"boxes": np.zeros((0, 4))}, r"boxes: have the shape \[0, 4\], expected"),
        ({"features": None}, "features: are missing"),
        ({"features": np.ones((3, 3))}, r"features: have the shape \[3, 3\], expected \[2, 3\]"),
        ({"features": np.ones((2, 3), bool)}, "features: are bool, expected numbers"),
        ({"features": np.array([[1, 1, 1], [1, np.inf, np.nan]])}, r"features: inf at \[1, 1\]: not a finite number"),
        ({"class_probs": None}, "class distributions: are missing"),
        ({"class_probs": np.full((2, 3), 1 / 3)}, r"class distributions: have the shape \[2, 3\], expected \[2, 2\]"),
        ({"class_probs": np.array([[0.5, 0.5], [0.5, 0.39]])}, "region 1 has the sum 0.89 and the least value 0.39"),
    ],
)
def test_every_image_is_like_the_first(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(checks, "check_jpeg", lambda image: None)
    second = FIRST._replace(image_id="b", where="line 2")._replace(**change)
    with pytest.raises(XdscaleError, match=f"^line 2: .*{words}"):
        build_regions([FIRST, second], tmp_path / "out", Detector(model="m"))


def test_there_must_be_an_image(tmp_path):
    with pytest.raises(XdscaleError, match="^no images with regions were given$"):
        build_regions([], tmp_path / "out", Detector(model="m"))
    build = RegionBuild(format="mine", inputs=[], detector=Detector(model="m"), width=3)
    source = RegionSource(SimpleNamespace(total_bytes=0), build)
    assert source.if_empty({}) == "mine: no images with regions; is the format 'mine' right?"


@pytest.mark.parametrize(("classes", "kept"), [(64, "all"), (65, "top-64")])
def test_what_is_kept_of_distributions_where_nobody_says(tmp_path, classes, kept):
    table = stored(tmp_path / "out", **probabilities(classes))
    assert (table.build.class_probs, table.build.probabilities) == (kept, classes)


@pytest.mark.parametrize("value", ["999999999999", b"12", 10**12 - 1, 1 - 10**12, 0, 7.0, np.array(3)])
def test_whole_numbers(value):
    assert whole_number({"width": value}, "width", "x") == int(value)


@pytest.mark.parametrize("value", ["0000000000001", 10**12, -(10**12), 0.5, True, None, "1e", np.array([3])])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(XdscaleError, match="^x: width: .* is not a whole number"):
        whole_number({"width": value}, "width", "x")


def test_an_image_has_1_to_65535_regions():
    for regions in (1, 65535):
        assert len(image_of({"boxes": np.zeros((regions, 4))}, "a", "x", (9, 9)).boxes) == regions
    for regions in (0, 65536):
        with pytest.raises(XdscaleError, match=rf"^x: num_boxes: {regions} regions; an image has 1 to 65535"):
            image_of({"boxes": np.zeros((regions, 4))}, "a", "x", (9, 9))


def test_categories_and_sides_of_detections():
    one = {"image_id": 5, "bbox": [0, 0.5, 999_999_999, -999_999_999], "category_id": 0}
    for category in (0, 65535):
        assert detection(one | {"category_id": category, "score": 1}, "x") == ("5", (one["bbox"], category, 1))
    for change in ({"category_id": -1}, {"category_id": 65536}, {"bbox": [0, 0, 10**9, 1]}, {"score": -1e9}):
        with pytest.raises(XdscaleError, match="^x: (category_id|bbox|score): expected"):
            detection(one | change, "x")


def test_the_background_is_one_of_the_classes(tmp_path, monkeypatch):
    path, names = tmp_path / "detector.json", tmp_path / "classes.json"
    for counted, background in (({"class_count": 3}, 2), ({"classes": ["a", "b"]}, 1), ({}, 0)):
        path.write_text(json.dumps({"model": "m", "background": background} | counted))
        assert load_detector(str(path))[0].background == background
        path.write_text(json.dumps({"model": "m", "background": background + 1} | counted))
        with pytest.raises(XdscaleError, match=f"background = {background + 1}, expected a class below"):
            load_detector(str(path))
    path.write_text(json.dumps({"model": "m"}))
    for most, ids in ((0, [0]), (65535, [3, 65535])):
        names.write_text(json.dumps({"categories": [{"id": one, "name": f"thing {one}"} for one in ids]}))
        found = load_detector(str(path), classes=names)[0]
        assert (found.class_count, found.classes[most]) == (most + 1, f"thing {most}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (path, names):  # as editors under Windows write it
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_detector("~/detector.json", classes=names)[0] == found
    names.write_bytes(b"\xef\xbb\xbfa dog\r\na cat\r\n")
    assert load_detector(str(path), classes=names)[0].classes == ["a dog", "a cat"]
    for ids in ([-1, 3], [65536]):
        names.write_text(json.dumps({"categories": [{"id": one, "name": "thing"} for one in ids]}))
        with pytest.raises(XdscaleError, match=f"expected COCO's 'categories' with id and name: ids {ids[0]} to"):
            load_detector(str(path), classes=names)


@pytest.mark.parametrize(("text", "number"), [("none", None), ("0", 0), ("99999", 99999)])
def test_the_background_of_the_command_line(text, number):
    assert _background(text) == number


@pytest.mark.parametrize("text", ["100000", "-1", "", "first"])
def test_what_is_no_background_is_refused(text):
    with pytest.raises(XdscaleError, match=f"^--background {text}: expected a number, or none"):
        _background(text)


@pytest.mark.parametrize(("off", "width"), [(0.0, 3), (0.01, 3), (0.0101, 9)])
def test_the_box_that_features_end_with_may_be_off_by_a_hundredth(off, width):
    features = np.array([[7, 8, 9, off, 0, 0.5, 0.25, 0.5, 0.25]])
    image = RegionImage("a", (100, 200), np.array([[0, 0, 50, 50]], np.float64), features)
    assert _cut_geometry(image).features.shape == (1, width)


def test_features_that_are_a_box_alone_are_not_cut():
    image = RegionImage("a", (100, 200), np.array([[0, 0, 50, 50.0]]), np.array([[0, 0, 0.5, 0.25, 0.5, 0.25]]))
    assert _cut_geometry(image).features.shape == (1, 6)
