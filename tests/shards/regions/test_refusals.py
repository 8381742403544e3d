"""What is refused, in which words: file, row, field, what was found and what to do."""

import hashlib
import io
import json
import zipfile

import h5py
import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.build import build_table
from xdscale.shards.regions import Detector, RegionBuild, RegionTable
from xdscale.shards.sources.regions import hdf5
from xdscale.shards.sources.regions.decoding import from_npy
from xdscale.shards.sources.regions.files import Reading, load_sizes
from xdscale.shards.sources.regions.importing import region_files
from xdscale.shards.sources.regions.source import RegionImage, build_regions

from . import region_files as writers


@pytest.fixture
def those():
    return writers.images(3)


def tsv(folder, those, format="butd", detector=None, **how):
    paths = getattr(writers, format)(folder, those)
    background = None if format == "lxmert" else 0
    source = region_files(
        [str(path) for path in paths], format, str(detector or writers.detector(folder, background)), **how
    )
    return build_table(source, folder / "out")


def test_a_box_is_named_with_its_image_and_line(tmp_path, those):
    those[1].boxes[2] = [10, 20, 5, 30]
    with pytest.raises(XdscaleError) as caught:
        tsv(tmp_path, those)
    assert str(caught.value) == (
        "butd.tsv, line 2: image '1001': boxes: region 2 is (10.0, 20.0, 5.0, 30.0): its right or lower edge is before "
        "the other; left, top, width, height would be --boxes xywh"
    )


def test_a_box_of_a_matrix_is_named_with_its_image_and_number(tmp_path, those):
    those[1].boxes[2] = [10, 20, 5, 30]
    [path] = writers.ban(tmp_path, those)
    source = region_files([str(path)], "ban", str(writers.detector(tmp_path)))
    with pytest.raises(
        XdscaleError, match=r"^train\.hdf5, image 1: image '1001': boxes: region 2 is \(10\.0, 20\.0, 5\."
    ):
        build_table(source, tmp_path / "out")


def test_two_pixels_outside_are_allowed_and_no_more(tmp_path, those):
    width, height = those[0].size
    those[0].boxes[0] = [-1.9, -2, width + 1.5, height + 2]
    tsv(tmp_path, those)
    assert np.allclose(RegionTable.open(tmp_path / "out").read(np.array([0])).boxes[0], those[0].boxes[0])
    those[0].boxes[0, 2] = width + 2.1
    with pytest.raises(XdscaleError, match=r"line 1: .*2\.1 pixels outside the image of 320 × 240 \(allowed: 2\)$"):
        tsv(tmp_path / "out", those)


def test_swapped_sides_are_recognised(tmp_path, those):
    for i in those:
        i.boxes[0] = [0, 0, *i.size]
        i.size = i.size[::-1]
    with pytest.raises(XdscaleError, match="line 1: .*are width and height swapped.*look at --columns and --format"):
        tsv(tmp_path, those)


def test_shares_and_pixels_are_told_apart(tmp_path, those):
    for i in those:
        i.boxes /= [*i.size, *i.size]
    with pytest.raises(XdscaleError, match="line 1: .*boxes: lie between 0 and 1.*say --units shares"):
        tsv(tmp_path, those)
    tsv(tmp_path, those, box_units="shares")
    assert RegionTable.open(tmp_path / "out").build.box_units == "shares"


def test_ids_are_unique_over_all_files(tmp_path, those):
    (path,) = writers.butd(tmp_path, those)
    other = path.with_name("other.tsv")
    other.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(
        XdscaleError, match=r"other.tsv, image 1 \(1001\): image id: stands already in butd.tsv, image 2"
    ):
        region_files([str(path), str(other)], "butd", str(writers.detector(tmp_path)))


def test_a_detector_must_be_known_and_fit(tmp_path, those):
    with pytest.raises(
        XdscaleError, match=r"--detector buttd: no such detector; did you mean 'butd'\? Describe another"
    ):
        tsv(tmp_path, those, detector="buttd")
    with pytest.raises(XdscaleError, match=r"no such detector; known are butd, .*, vinvl\. Describe another"):
        tsv(tmp_path, those, detector="of-my-own")
    with pytest.raises(XdscaleError, match="line 1: features of 20 numbers, but the detector 'butd' gives 2048"):
        tsv(tmp_path, those, detector="butd")
    vlbert = str(writers.vlbert(tmp_path, those)[0])
    with pytest.raises(XdscaleError, match=r"over 101 classes, but the detector .* has 100 with background None"):
        region_files([vlbert], "vlbert", str(writers.detector(tmp_path, None)))
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"model": "x", "class_count": 3, "classes": ["a", "b"]}))
    with pytest.raises(XdscaleError, match=r"bad.json: class_count = 3, but 2 names"):
        tsv(tmp_path, those, detector=bad)


def test_names_of_classes_gain_the_background(tmp_path, those):
    names = tmp_path / "classes.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(1600)))
    wide = [writers.image(number, 3, width=2048) for number in range(2)]
    tsv(tmp_path, wide, detector="butd", classes=names)
    detector = RegionTable.open(tmp_path / "out").build.detector
    assert detector.class_count == 1601
    assert detector.classes[:2] == ["__background__", "thing 0"]
    names.write_text("one\ntwo\n")
    with pytest.raises(XdscaleError, match=r"classes.txt: 2 names, but the detector has 1601"):
        tsv(tmp_path, wide, detector="butd", classes=names)


def test_what_is_declared_of_regions_is_checked(tmp_path, those):
    with pytest.raises(XdscaleError, match="line 1: .*region 0 is .* but was declared to be the whole image"):
        tsv(tmp_path, those, whole_image="first")
    those[1].conf = those[1].conf[::-1]
    with pytest.raises(XdscaleError, match="line 2: .*confidences: rise after region 0, but were declared to fall"):
        tsv(tmp_path, those, "lxmert", region_order="confidence")
    for i in those:
        i.boxes[0] = [0, 0, i.size[0] - 1, i.size[1] - 1]
    those[1].conf = those[1].conf[::-1]
    tsv(tmp_path, those, "lxmert", whole_image="first", region_order="confidence")
    build = RegionTable.open(tmp_path / "out").build
    assert (build.whole_image, build.region_order) == ("first", "confidence")


def test_sizes_come_from_where_they_are_said_to(tmp_path, those):
    paths = [str(path) for path in writers.uniter(tmp_path, those)]
    detector = str(writers.detector(tmp_path))
    with pytest.raises(
        XdscaleError, match=r"key '1000.npz': image '1000': UNITER's files do not say how large images are"
    ):
        region_files(paths, "uniter", detector)
    build_table(
        region_files(paths, "uniter", detector, reading=Reading(sizes=load_sizes("1000x1000"))), tmp_path / "out"
    )
    found = RegionTable.open(tmp_path / "out").read(np.array([1]))
    assert np.allclose(found.boxes, writers.shares(those[1])[:, :4] * 1000, atol=0.6)
    (tmp_path / "sizes.json").write_text(json.dumps({"1000": [320, 240]}))
    sizes = load_sizes(str(tmp_path / "sizes.json"))
    assert sizes.sha256 == hashlib.sha256((tmp_path / "sizes.json").read_bytes()).hexdigest()
    one = region_files(paths, "uniter", detector, reading=Reading(sizes=sizes))
    assert one.build["options"] == {"ids": "as-given", "columns": [], "sizes": sizes.sha256}
    with pytest.raises(XdscaleError, match=r"key '1001.npz': image '1001': its size does not stand in sizes.json"):
        build_table(region_files(paths, "uniter", detector, reading=Reading(sizes=sizes)), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_bytes_that_would_lose_too_much_are_refused(tmp_path):
    """One large feature among others that all lie between two steps, as no detector gives them."""
    features = np.full((2, 2048), (57.5 / 255) ** 2, np.float32)
    features[1, 0] = 1
    image = RegionImage("a", (10, 10), np.array([[0, 0, 5, 5]] * 2, np.float32), features, where="x.tsv, line 3")
    with pytest.raises(
        XdscaleError, match=r"x.tsv, line 3: image 'a': features of region 1 would change by .* --encoding fp16"
    ):
        build_regions([image], tmp_path / "out", Detector(model="test"), encoding="u8")
    assert not (tmp_path / "out").exists()
    build_regions([image], tmp_path / "out", Detector(model="test"), encoding="u8", largest_error=0.02)
    table = RegionTable.open(tmp_path / "out")
    assert table.build.largest_error == 0.02
    assert table.table.manifest.tables["regions"].counts["relative_error_thousandths"] == [1, *[0] * 15, 1, *[0] * 4]


def test_probabilities_are_scaled_to_one_within_a_tenth(tmp_path, those):
    for i in those:
        i.probs *= 0.93
    paths = [str(path) for path in writers.vlbert(tmp_path, those)]
    build_table(region_files(paths, "vlbert", str(writers.detector(tmp_path)), class_probs="all"), tmp_path / "out")
    table = RegionTable.open(tmp_path / "out")
    assert np.allclose(table.class_probs(np.arange(3)).sum(axis=1), 1, atol=2e-3)
    assert RegionBuild(**table.build.model_dump()) == table.build


def test_ids_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "detections.json"
    path.write_text('[{"image_id": "\\ud800", "category_id": 1, "bbox": [1, 1, 2, 2]}]')
    with pytest.raises(XdscaleError, match=r"detections.json, image 1: image id '\\ud800' is not UTF-8 text"):
        region_files(
            [str(path)], "coco", str(writers.detector(tmp_path, None)), reading=Reading(sizes=load_sizes("9x9"))
        )


@pytest.mark.parametrize(
    "stated", ['{"5": [Infinity, 3]}', '{"5": [12.5, 3]}', '{"5": [true, 3]}', '{"images": [{"id": 5, "width": 2}]}']
)
def test_sizes_are_whole_numbers(tmp_path, stated):
    path = tmp_path / "sizes.json"
    path.write_text(stated)
    with pytest.raises(XdscaleError, match="sizes.json: expected COCO's 'images' with id, width and height, or id:"):
        load_sizes(str(path))


def test_a_name_of_images_of_several_sizes_tells_none(tmp_path):
    """As where the id of one image is the file name of another."""
    images = [
        {"id": 5, "width": 12, "height": 10, "file_name": "6.jpg"},
        {"id": 6, "width": 90, "height": 80, "file_name": "7.jpg"},
        {"id": 8, "width": 30, "height": 20, "file_name": "8.jpg"},
    ]
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"images": images}))
    sizes = load_sizes(str(path))
    assert [sizes.of(name, "here") for name in ("5", "7", "8")] == [(12, 10), (90, 80), (30, 20)]
    with pytest.raises(XdscaleError, match="here: image '6': sizes.json .* different sizes with the id or file name"):
        sizes.of("6", "here")


@pytest.mark.parametrize(
    ("values", "encoding", "words"),
    [
        (np.full((3, 4), 1e300), "u8", "features: reach 1e\\+300, but single precision ends"),
        (np.full((3, 4), 1e300), "fp16", "features: reach 1e\\+300, but half precision ends"),
        (np.full((3, 4), -(2**63)), "fp16", "features: reach 9.22e\\+18, but half precision ends"),
    ],
)
def test_numbers_too_large_to_be_stored_are_refused(tmp_path, values, encoding, words):
    boxes = np.array([[0, 0, 5, 5]] * 3)
    image = RegionImage("a", (10, 10), boxes, values)
    with pytest.raises(XdscaleError, match=words):
        build_regions([image], tmp_path / "out", Detector(model="m"), encoding=encoding)
    labels = {"attribute_confidences": np.array([0.5, 1e300, 0.5])}
    image = RegionImage("a", (10, 10), boxes, np.ones((3, 4)), labels)
    with pytest.raises(XdscaleError, match="attribute_confidences: hold 1e\\+300"):
        build_regions([image], tmp_path / "out", Detector(model="m"))


def npy(shape, descr, content=b"\0" * 32):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + content


@pytest.mark.parametrize(
    "content",
    [
        npy((-2, -4), "<f4"),
        npy((-1, -8), "<f4"),
        npy((2, 4), "|V0", b""),
        npy((2,), ("<f4", (4,))),
        npy((True, 8), "<f4"),
    ],
)
def test_headers_that_state_no_array_are_refused(content):
    with pytest.raises(XdscaleError, match="here: its header states .* which is no array"):
        from_npy(content, "here")


def test_as_many_regions_may_be_stated_as_have_features(tmp_path):
    np.save(tmp_path / "1.npy", np.ones((2, 4), np.float32))
    for stated in (1, 2, 3):
        info = {"bbox": np.array([[0, 0, 5, 5], [1, 1, 6, 6]]), "image_h": 10, "image_w": 10, "num_boxes": stated}
        np.save(tmp_path / "1_info.npy", np.array(info, object), allow_pickle=True)
        if stated == 3:
            with pytest.raises(XdscaleError, match=r"1_info\.npy: num_boxes: 3 are stated, features are there for 2"):
                region_files([str(tmp_path / "1.npy")], "pythia", str(writers.detector(tmp_path)))
        else:
            region_files([str(tmp_path / "1.npy")], "pythia", str(writers.detector(tmp_path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_h": 10**5000}, "height: a number too long to be shown"),
        ({"num_boxes": 10**5000}, "regions: a number too long to be shown"),
        ({"cls_prob": [[1, 2], [3]]}, "cls_prob: expected numbers"),
    ],
)
def test_odd_fields_beside_features_are_named(tmp_path, change, words):
    info = {"bbox": np.array([[0, 0, 5, 5], [1, 1, 6, 6]]), "image_h": 10, "image_w": 10} | change
    np.save(tmp_path / "1.npy", np.ones((2, 4), np.float32))
    np.save(tmp_path / "1_info.npy", np.array(info, object), allow_pickle=True)  # written so in public; read restricted
    with pytest.raises(XdscaleError, match=f"1_info.npy: {words}"):
        region_files([str(tmp_path / "1.npy")], "pythia", str(writers.detector(tmp_path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sets: sets.update(pos_boxes=sets["pos_boxes"][:-1]), r"pos_boxes \[2, 2\] for 3 ids and 9 regions"),
        (lambda sets: sets.update({name: sets[name][:, None] for name in sets if name.startswith("image_")}),
         r"pos_boxes \[3, 2\] for 3 ids and 9 regions"),
    ],
)  # fmt: skip
def test_places_of_regions_of_another_shape_are_named(tmp_path, those, change, words):
    [path] = writers.ban(tmp_path, those)
    with h5py.File(path, "r+") as file:
        sets = {name: file[name][:] for name in file}
        change(sets)
        for name, values in sets.items():
            del file[name]
            file[name] = values
    with pytest.raises(XdscaleError, match=rf"train\.hdf5: {words}"):
        region_files([str(path)], "ban", str(writers.detector(tmp_path)))


def test_an_image_without_regions_or_with_too_many_is_named(tmp_path, those, monkeypatch):
    [path] = writers.ban(tmp_path, those)  # of 2, 3 and 4 regions
    detector = str(writers.detector(tmp_path))
    monkeypatch.setattr(hdf5, "_MOST_REGIONS", 5)
    build_table(region_files([str(path)], "ban", detector), tmp_path / "out")
    monkeypatch.setattr(hdf5, "_MOST_REGIONS", 4)
    with pytest.raises(XdscaleError, match=r"train\.hdf5, image 2: pos_boxes: 4 regions of one image"):
        build_table(region_files([str(path)], "ban", detector), tmp_path / "other")
    with h5py.File(path, "r+") as file:
        file["pos_boxes"][:] = [[0, 5], [5, 5], [5, 9]]
    with pytest.raises(XdscaleError, match=r"train\.hdf5, image 1: pos_boxes: \[5, 5\]; images must have the 9 rows"):
        region_files([str(path)], "ban", detector)


@pytest.mark.parametrize("size", [(1, 1), (65535, 65535)])
def test_shares_tell_the_size_of_an_image(size):
    boxes, shares = np.array([[0, 0, *size]], np.float64), np.array([[0, 0, 1, 1]], np.float64)
    assert hdf5._size_of(boxes, shares, "x") == size


@pytest.mark.parametrize(
    ("size", "share"), [((0.4, 1), 1), ((1, 0.4), 1), ((65536, 9), 1), ((9, 65536), 1), ((9, 9), 0)]
)
def test_shares_that_tell_no_size_are_refused(size, share):
    boxes, shares = np.array([[0, 0, *size]], np.float64), np.array([[0, 0, share, share]], np.float64)
    with pytest.raises(XdscaleError, match="^x: spatial_features do not tell the image's size"):
        hdf5._size_of(boxes, shares, "x")


@pytest.mark.parametrize("name", ["1.json", "folder", "a.zip"])
def test_a_file_of_an_image_is_named_with_the_archive_it_lies_in(tmp_path, name):
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train/1.json", "[1]")
    else:
        path = path / "1.json" if name == "folder" else path
        path.parent.mkdir(exist_ok=True)
        path.write_text("[1]")
    where = {"1.json": "1.json", "folder": "1.json", "a.zip": "a.zip, train/1.json"}[name]
    with pytest.raises(XdscaleError, match=f"^{where}: expected a JSON object, found"):
        region_files([str(tmp_path / name)], "vlbert", str(writers.detector(tmp_path)))


@pytest.mark.parametrize("length", [511, 512])  # LMDB has no longer keys than 511 bytes
def test_keys_that_an_environment_lists_and_has_not_are_named(tmp_path, length):
    path = writers.environment(tmp_path / "feat", {b"__keys__": json.dumps(["a" * length]).encode()})
    with pytest.raises(XdscaleError, match="key 'aaa.*: is listed but not there; copy the environment again"):
        region_files([str(path)], "uniter", str(writers.detector(tmp_path)))


@pytest.mark.parametrize(("width", "words"), [(6, "6 numbers for 1 regions and no boxes"), (7, "no boxes: neither")])
def test_features_that_hold_no_box_are_named(tmp_path, width, words):
    fields = {"num_boxes": 1, "features": writers.b64(np.full(width, 9, np.float32)), "image_h": 9, "image_w": 9}
    [path] = writers.text(tmp_path / "a.tsv", [("1", json.dumps(fields))])
    with pytest.raises(XdscaleError, match=rf"^a\.tsv, line 1: (features: )?{words}"):
        region_files([str(path)], "vinvl", str(writers.detector(tmp_path, None)))
