"""The table of image regions: what is put in comes out, in any order, and images are found by their ids."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest
from xdscale.shards.region_encoding import compand, expand, largest_classes, whole_distributions
from xdscale.shards.regions import Detector, RegionTable, other_forms
from xdscale.shards.sources.regions.report import summary
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.table import Table

WIDTH, CLASSES = 24, 100
DETECTOR = Detector(model="a detector", class_count=CLASSES, background=0)


def drawn_image(number, regions, **change):
    """An image like a detector's: features half zeros, boxes inside, distributions of sum 1."""
    chance = np.random.default_rng(number)
    width, height = 640 + number, 480
    corners = np.sort(chance.random((regions, 2, 2)), axis=1).reshape(regions, 4)
    features = np.maximum(chance.standard_normal((regions, WIDTH)), 0).astype(np.float32)
    fields = {
        "image_id": f"image-{number}",
        "size": (width, height),
        "boxes": (corners * [width, height, width, height]).astype(np.float32),
        "features": features,
        "labels": {"confidences": chance.random(regions), "object_ids": chance.integers(0, CLASSES, regions)},
        "class_probs": chance.dirichlet(np.full(CLASSES, 0.05), regions).astype(np.float32),
        "where": f"images.tsv, line {number + 1}",
    }
    return RegionImage(**fields | change)


@pytest.fixture(scope="module")
def images():
    return [drawn_image(number, 1 + number % 7) for number in range(23)]


@pytest.fixture(scope="module", params=["fp16", "u8"])
def stored(request, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("regions") / "out"
    build_regions(images, out, DETECTOR, encoding=request.param, shard_images=5)
    return request.param, RegionTable.open(out)


def test_regions_come_out_as_they_were_put_in(stored, images):
    encoding, table = stored
    order = np.random.default_rng(0).permutation(len(images))
    found = table.read(order)
    assert len(table) == 23
    assert table.width == WIDTH
    assert found.features.dtype == (np.float16 if encoding == "fp16" else np.float32)
    for place, number in enumerate(order):
        regions, image = slice(*found.offsets[place : place + 2]), images[number]
        assert np.array_equal(found.boxes[regions], image.boxes)
        assert np.array_equal(found.confidences[regions], image.labels["confidences"].astype(np.float32))
        if encoding == "fp16":
            assert np.array_equal(found.features[regions], image.features.astype(np.float16))
        else:
            lost = np.linalg.norm(found.features[regions] - image.features, axis=1)
            assert (lost <= 7e-3 * np.linalg.norm(image.features, axis=1)).all()
        assert found.sizes[place].tolist() == list(image.size)
    assert table.image_ids(order[:3]) == [images[number].image_id for number in order[:3]]
    # The largest 64 of 100 classes are kept, in half precision; the rest is spread.
    probs = table.class_probs(order)
    expected = np.concatenate([images[number].class_probs for number in order])
    assert probs.shape == expected.shape
    assert np.abs(probs - expected).max() < 1e-3
    assert np.abs(probs.sum(axis=1) - 1).max() < 1e-3


def test_dataset_json_says_where_regions_come_from(stored):
    encoding, table = stored
    assert table.build.detector == DETECTOR
    assert table.build.largest_error == (0.0 if encoding == "fp16" else 7e-3)
    counts = Manifest.load(table.table.folder).tables["regions"].counts
    assert counts["images"] == 23
    if encoding == "u8":
        assert sum(counts["relative_error_thousandths"]) == counts["regions"]
    assert len(Table(table.table.folder, "all").manifest.shards) == 5


@pytest.mark.parametrize("at_once", [1 << 16, 4, 9])
def test_images_are_found_by_id_and_the_message_knows_other_forms(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("xdscale.shards.regions._IDS_AT_ONCE", at_once)
    images = [drawn_image(number, 2, image_id=str(393225 + number)) for number in range(9)]
    build_regions(images, tmp_path / "out", DETECTOR)
    table = RegionTable.open(tmp_path / "out")
    assert table.rows(["393230", "393225", "393230"]).tolist() == [5, 0, 5]
    assert table.rows([]).tolist() == []
    with pytest.raises(XdscaleError, match=r"no image 'COCO_val2014_000000393225.jpg'; it has '393225' for"):
        table.rows(["393226", "COCO_val2014_000000393225.jpg"])
    with pytest.raises(XdscaleError, match=r"no image 'x', 'y', 'z' and 1 more; its ids look like '393225'"):
        table.rows(["x", "y", "z", "x", "w"])


@pytest.mark.parametrize("number", [42, 0, 123456789012])
def test_every_form_of_an_images_name_leads_to_the_others(number):
    names = [str(number), f"{number:012d}", f"{number:012d}.jpg"]
    for split in ("COCO_train2014", "COCO_val2014", "COCO_test2015", "coco_val2014"):
        names.append(f"{split}_{number:012d}")
    names.append(f"COCO_val2014_{number:012d}.jpg")
    for name in {*names, f"folder/COCO_val2014_{number:012d}.jpg"}:
        forms = other_forms(name)
        assert {*names} - {name} <= {*forms}
        assert name not in forms
        assert len(forms) == len({*forms})
    assert other_forms("folder/one.png") == ["one.png", "one", "one.jpg"]


def test_boxes_alone(tmp_path):
    images = [drawn_image(number, 3, features=None, class_probs=None, labels={}) for number in range(4)]
    build_regions(images, tmp_path / "out", DETECTOR)
    found = RegionTable.open(tmp_path / "out").read(np.array([2, 1]))
    assert found.features.shape == (6, 0)
    assert np.array_equal(found.boxes[:3], images[2].boxes)
    assert found.confidences.tolist() == [1] * 6


def test_a_table_of_another_kind_is_none_of_regions(small_dataset):
    with pytest.raises(XdscaleError, match="text is not a table of image regions: build.width: Field required; make"):
        RegionTable(Table(small_dataset, "train"))
    with pytest.raises(XdscaleError, match="no table 'regions'"):
        RegionTable.open(small_dataset)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40))
FEATURES = arrays.arrays(np.float32, SHAPES, elements=st.floats(0, 60, width=32))


@settings(max_examples=200, deadline=None)
@given(FEATURES)
def test_companded_bytes_err_as_told(features):
    """By no more than half a step of the square root, zeros and the largest stay; the error is the true one."""
    with np.errstate(divide="raise", invalid="raise"):  # also of regions of zeros
        codes, scales, errors = compand(features)
        found = expand(codes, scales)
    steps = np.sqrt(found / np.where(scales > 0, scales, 1)[:, None]) - np.sqrt(
        features / np.where(scales > 0, scales, 1)[:, None]
    )
    assert np.abs(steps).max() <= 0.5 / 255 + 1e-6
    assert (found[features == 0] == 0).all()
    assert np.array_equal(found.max(axis=1), features.max(axis=1))
    lost = np.linalg.norm(found.astype(np.float64) - features, axis=1)
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    assert np.allclose(errors, lost / np.where(norms > 0, norms, 1), atol=1e-9)


def test_of_equally_likely_classes_the_lower_ones_are_kept():
    """So that a table's bytes do not hang on how a machine sorts."""
    probs = np.full((2, 1601), 0.5 / 1599, np.float32)
    probs[:, [1600, 700]] = 0.25
    ids, _ = largest_classes(probs)
    assert ids.tolist() == [[700, 1600, *range(62)]] * 2


@settings(max_examples=50, deadline=None)
@given(st.integers(65, 1700), st.integers(0, 2**32 - 1), st.floats(0.01, 5))
def test_kept_classes_and_the_rest(classes, seed, spread):
    probs = np.random.default_rng(seed).dirichlet(np.full(classes, spread), 3).astype(np.float32)
    probs /= probs.sum(axis=1, keepdims=True)
    ids, kept = largest_classes(probs)
    whole = whole_distributions(ids, kept, classes)
    assert np.abs(whole.sum(axis=1) - 1).max() < 2e-2 if spread > 1 else 1e-2
    for row, (those, values) in enumerate(zip(ids, kept)):
        assert len(set(those.tolist())) == 64
        assert np.array_equal(values, probs[row][those].astype(np.float16))
        others = np.delete(whole[row], those)
        assert (others == others[0]).all()
        assert values.min() >= np.delete(probs[row], those).max().astype(np.float16)


def test_the_largest_error_is_what_a_region_may_have_and_errors_are_counted_by_thousandths(tmp_path):
    chance = np.random.default_rng(4)
    images = [
        drawn_image(number, 5, features=chance.gamma(0.3, size=(5, 24)).astype(np.float32), class_probs=None)
        for number in range(20)  # more than are packed at a time
    ]
    lost = np.concatenate([compand(image.features)[2] for image in images])
    most = float(lost.max())
    built = build_regions(images, tmp_path / "out", DETECTOR, encoding="u8", largest_error=most)
    assert (built.counts["images"], built.counts["regions"]) == (20, 100)
    counted = np.bincount((1000 * lost).astype(int), minlength=int(1000 * most) + 1)
    assert built.counts["relative_error_thousandths"] == counted.tolist()
    with pytest.raises(XdscaleError, match=rf"would change by {most:.1e} as companded bytes, allowed are {most:.1e}"):
        build_regions(images, tmp_path / "other", DETECTOR, encoding="u8", largest_error=float(np.nextafter(most, 0)))


class ReadWhenAsked(Sequence):
    """Images as a file of somebody's own holds them: each is made when it is asked for."""

    def __init__(self, count):
        self.count, self.asked = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if not 0 <= number < self.count:
            raise IndexError
        self.asked += 1
        return drawn_image(number, 1 + number % 7)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_are_read_when_asked_for_make_the_same_table(images, tmp_path, workers):
    given = ReadWhenAsked(len(images))
    build_regions(given, str(tmp_path / "read"), DETECTOR, shard_images=5, workers=workers)
    build_regions(images, tmp_path / "kept", DETECTOR, shard_images=5)
    shards = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("read", "kept")]
    assert shards[0] == shards[1]
    assert given.asked <= 2 * len(images) + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 5}, "image 5: image id: is int, expected a text"),
        ({"size": (100,)}, "size: is \\(100,\\), expected width and height"),
        ({"boxes": [[0, 0, 1, 1]]}, "boxes: is list, expected an array of numpy"),
        ({"boxes": None}, "boxes: is NoneType, expected an array of numpy"),
        ({"labels": {"confidences": [0.5]}}, "confidences: is list, expected an array of numpy"),
        ({"labels": {"conf": np.ones(1)}}, "labels: has 'conf'; expected confidences, object_ids"),
    ],
)
def test_what_a_program_gives_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(XdscaleError, match=words):
        build_regions([drawn_image(0, 1, **change)], tmp_path / "out", DETECTOR)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_a_build_is_refused_by_name(tmp_path, images):
    for how, words in (({"encoding": "f16"}, "encoding = 'f16'"), ({"shard_image": 3}, "shard_image = 3")):
        with pytest.raises(XdscaleError, match=f"build_regions: {words}"):
            build_regions(images, tmp_path / "out", DETECTOR, **how)
    with pytest.raises(XdscaleError, match="images: generator, expected a list, or a sequence"):
        build_regions(iter(i for i in images), tmp_path / "out", DETECTOR)


def test_a_summary_says_all_that_a_table_holds(tmp_path):
    image = RegionImage("a", (10, 20), np.array([[0.0, 0, 10, 20], [2, 3, 4, 5]]), np.ones((2, 3)))
    table = build_regions([image, image._replace(image_id="b")], tmp_path / "out", Detector(model="m"))
    stored = sum(shard.bytes for shard in table.shards)
    bare = [
        f"2 images, 4 regions, {stored:,} bytes",
        "detector: m (weights not stated); 0 classes, not named, none of them background",
        "features: 3 numbers, fp16",
    ]
    assert summary(table) == bare
    detector = {"model": "m", "sha256": "0" * 64, "classes": ["x", "y"], "class_count": 2, "background": 1}
    more = {"detector": detector, "encoding": "u8", "largest_error": 0.05, "class_probs": "all", "probabilities": 2}
    more |= {"labels": ["confidences", "object_ids"], "jpeg": True, "whole_image": "first"}
    counts = {"images": 1200, "regions": 3400, "relative_error_thousandths": [1, 0, 3]}
    assert summary(table.model_copy(update={"build": table.build | more, "counts": counts})) == [
        f"1,200 images, 3,400 regions, {stored:,} bytes",
        f"detector: m (sha256 {'0' * 64}); 2 classes, named, background is 1",
        "features: 3 numbers, u8, relative error up to 0.05",
        "regions by their error in whole thousandths: 0: 25%, 2: 75%",
        "class distributions: all of 2",
        "also: confidences, object_ids, the image files",
        "region 0 of each image is the whole image",
    ]
    boxes = table.model_copy(update={"build": table.build | {"width": 0}, "counts": {}})
    assert summary(boxes) == [f"0 images, 0 regions, {stored:,} bytes", bare[1]]
