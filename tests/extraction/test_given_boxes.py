"""Boxes that are given: grids, COCO's instances, VCR's metadata, one's own; wrong ones are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.extraction.given_boxes import GivenBoxes
from xdscale.extraction.pictures import Picture

SIZE = (60, 40)
PICTURE = Picture(Path("x/17.jpg"), "17", 1)


def written(tmp_path, value):
    (tmp_path / "boxes.json").write_text(json.dumps(value))
    return str(tmp_path / "boxes.json")


def _image(number):
    return {"id": number, "file_name": "a.jpg", "width": 40, "height": 30}


def test_a_grid_covers_the_image():
    boxes, confidences = GivenBoxes("grid:2x3").of(PICTURE, SIZE)
    assert boxes.tolist()[:4] == [[0, 0, 20, 20], [20, 0, 40, 20], [40, 0, 60, 20], [0, 20, 20, 40]]
    assert len(boxes) == 6
    assert confidences is None


def test_coco_instances(tmp_path):
    coco = {
        "images": [
            {"id": 3, "file_name": "17.jpg", "width": 60, "height": 40},
            {"id": 4, "file_name": "18.jpg", "width": 60, "height": 40},
        ],
        "annotations": [{"image_id": 3, "bbox": [1, 2, 10, 20]}, {"image_id": 3, "bbox": [50, 30, 11, 10]}],
    }
    given = GivenBoxes(written(tmp_path, coco))
    assert given.of(PICTURE, SIZE).boxes.tolist() == [[1, 2, 11, 22], [50, 30, 60, 40]]  # cut at the edge
    with pytest.raises(XdscaleError, match="60 × 40 pixels there, but .* has 40 × 60"):
        given.of(PICTURE, (40, 60))
    none = Picture(Path("x/18.jpg"), "18", 1)
    with pytest.raises(XdscaleError, match="has no box .* --whole-image"):
        given.of(none, SIZE)
    whole = GivenBoxes(written(tmp_path, coco), whole_image=True)
    assert whole.of(none, SIZE).boxes.tolist() == [[0, 0, 60, 40]]
    assert len(whole.of(PICTURE, SIZE).boxes) == 3


def test_detections_in_cocos_form_and_mattnets(tmp_path):
    image = Picture(Path("x/COCO_train2014_000000000017.jpg"), "17", 1)
    found = [
        {"image_id": 17, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"image_id": 18, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9},
        {"image_id": 17, "category_id": 2, "box": [5, 5, 55, 35], "score": 0.25, "det_id": 3, "category_name": "dog"},
    ]
    boxes, confidences = GivenBoxes(written(tmp_path, found), whole_image=True).of(image, SIZE)
    assert boxes.tolist() == [[0, 0, 60, 40], [1, 2, 11, 22], [5, 5, 60, 40]]
    assert confidences.tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize("name", ["1.jpg", "1"])
def test_two_images_do_not_take_the_boxes_of_one(tmp_path, name):
    """A cat's and a dog's of the same name."""
    images = [Picture(Path(folder) / "1.jpg", f"{folder}/1.jpg", 1) for folder in ("dogs", "cats")]
    both = GivenBoxes(written(tmp_path, {name: {"boxes": [[0, 0, 5, 5]]}}))
    both.check_distinct([images[0], Picture(Path("dogs/2.jpg"), "dogs/2.jpg", 1)])  # of which it has none
    told = f"^dogs/1.jpg and cats/1.jpg: both would have the boxes of '{name}' in .*boxes.json; name .* --ids path"
    with pytest.raises(XdscaleError, match=told):
        both.check_distinct(images)
    own = {image.image_id: {"boxes": [[0, 0, side, 5]]} for image, side in zip(images, (3, 4))}
    each = GivenBoxes(written(tmp_path, own | {name: {"boxes": []}}))
    each.check_distinct(images)
    assert [each.of(image, (9, 9)).boxes[0, 2] for image in images] == [3, 4]


def test_vcr_metadata_lies_beside_the_image(tmp_path):
    metadata = {"boxes": [[1.5, 2, 30, 20, 0.75]], "names": ["person"], "segms": [], "width": 60, "height": 40}
    (tmp_path / "a.json").write_text(json.dumps(metadata))
    boxes, confidences = GivenBoxes("vcr", whole_image=True).of(Picture(tmp_path / "a.jpg", "a", 1), SIZE)
    assert boxes.tolist() == [[0, 0, 60, 40], [1.5, 2, 30, 20]]
    assert confidences.tolist() == [1, 0.75]


def test_own_proposals_have_confidences(tmp_path):
    own = {"17": {"boxes": [[0, 0, 5, 5], [5, 5, 60, 40]], "scores": [0.5, 0.25]}}
    boxes, confidences = GivenBoxes(written(tmp_path, own)).of(PICTURE, SIZE)
    assert np.array_equal(boxes, own["17"]["boxes"])
    assert confidences.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"17": {"boxes": [[0, 0, 5]]}}, "there they have the shape"),
        ({"17": {"boxes": [[0, 0, 5, 5]], "scores": [1, 2]}}, "there they have the shape"),
        ({"17": {"boxes": "many"}}, "expected 'boxes'"),
        ({"17": {}}, "expected 'boxes'"),
        ({"17": 3}, "expected an object"),
        ({"17": {"boxes": [[5, 0, 0, 5]]}}, r"box 0 is \(5, 0, 0, 5\)"),
        ({"17": {"boxes": [[0, 0, 5, 5], [0, 0, 70, 5]]}}, r"box 1 is .* within 60 × 40"),
        ({"17": {"boxes": [[0, 0, float("nan"), 5]]}}, "box 0"),
        ({"17": {"boxes": [[0, 0, 5, 5], [0, 0, 5, float("nan")]]}}, r"box 1 is \(0, 0, 5, nan\)"),
        ({"17": {"boxes": [[0, 0, 1, 1], [0.2, 0.1, 0.5, 0.9]]}}, "boxes lie between 0 and 1: shares of the image"),
        ({"18": {"boxes": [[0, 0, 5, 5]]}}, "no boxes of '17'.* look like '18'"),
        ({"images": [{}], "annotations": []}, "COCO's instances"),
        ("many", "expected a JSON object or a list of detections, found 'many'"),
        ([{"image_id": 17, "category_id": 1, "bbox": [1, 2, 3]}], "record 0: bbox: expected left, top, width, height"),
        ([{"image_id": 17, "category_id": 1, "bbox": [1, 2, 3, 4]}], "record 0: score: expected a number; all"),
        ({"images": [], "annotations": [{"bbox": [1, 2]}]}, "COCO's instances"),
        (
            {"images": [_image(5)], "annotations": [{"bbox": [0, 0, 1, 1], "image_id": "5"}]},
            "image_id '5' is not among",
        ),
        ({"images": [_image(5), _image(6)], "annotations": []}, "two images have the same file_name"),
        ({"images": [_image(5), _image(5) | {"file_name": "b.jpg"}], "annotations": []}, "two images have the same id"),
        ({"images": [_image(5)], "annotations": [{"bbox": list("1234"), "image_id": 5}]}, r"bbox is \['1', '2', '3'"),
        ({"17": {"boxes": [[0, 0, 10**400, 5]]}}, "expected 'boxes'"),
    ],
)
def test_wrong_boxes_are_refused_by_name(tmp_path, value, words):
    with pytest.raises(XdscaleError, match=words):
        GivenBoxes(written(tmp_path, value), whole_image=True).of(PICTURE, SIZE)


@pytest.mark.parametrize("name", ["grid:0x3", "nowhere.json", "grid:3"])
def test_an_unknown_source_of_boxes(name):
    with pytest.raises(XdscaleError, match="--boxes"):
        GivenBoxes(name)


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ([-2, -2, 62, 42], [0, 0, 60, 40]),
        ([0, 0, 0.5, 0.25], [0, 0, 0.5, 0.25]),
        ([-2.5, 0, 5, 5], None),
        ([0, -2.5, 5, 5], None),
        ([0, 0, 62.5, 5], None),
        ([0, 0, 5, 42.5], None),
        ([5, 0, 5, 5], None),  # of no column
        ([0, 5, 5, 5], None),  # of no row
    ],
)
def test_a_box_may_reach_out_by_two_pixels_and_has_a_column_and_a_row(tmp_path, box, cut):
    given = GivenBoxes(written(tmp_path, {"17": {"boxes": [[0, 0, 9, 9], box]}}))
    if cut is None:
        with pytest.raises(XdscaleError, match=r"image '17': box 1 is \(.*\), expected left < right and top < bottom"):
            given.of(PICTURE, SIZE)
    else:
        assert given.of(PICTURE, SIZE).boxes.tolist() == [[0, 0, 9, 9], cut]


def test_without_scores_boxes_have_no_confidences(tmp_path):
    for whole_image in (False, True):
        given = GivenBoxes(written(tmp_path, {"17": {"boxes": [[0, 0, 9, 9]]}}), whole_image=whole_image)
        assert given.of(PICTURE, SIZE).confidences is None
