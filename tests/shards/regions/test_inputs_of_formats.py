"""Which files and folders each format takes, how large they may be, and how far reading them is."""

import base64
import json
import zipfile

import h5py
import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions import decoding, json_files, tsv
from xdscale.shards.sources.regions import source as images_given
from xdscale.shards.sources.regions.detectors import load_detector
from xdscale.shards.sources.regions.files import Reading, load_sizes
from xdscale.shards.sources.regions.importing import region_files

from . import region_files as writers


def source(format, *paths, background=0, **how):
    folder = paths[0].parent
    reading = Reading(sizes=load_sizes("999x999")) if format in ("coco", "uniter") else None
    detector = str(writers.detector(folder, background))
    return region_files([str(path) for path in paths], format, detector, reading=reading, **how)


@pytest.mark.parametrize(
    ("format", "name", "words"),
    [
        ("butd", "folder/", "folder: is a folder; name the files themselves"),
        ("vinvl", "a.lineidx", r"a\.lineidx: is the index of a TSV file, which is not needed; name the \.tsv file"),
        ("vlbert", "folder/", r"folder: holds no \.json files of images"),
        ("vlbert", "a.txt", r"a\.txt: expected a folder, a \.zip or a \.json file of images"),
        ("pythia", "folder/", r"folder: holds no \.npy files of images"),
        ("pythia", "a.txt", r"a\.txt: expected a folder, or one \.npy file of an image"),
        ("pythia", "a_info.npy", r"a_info\.npy: expected a folder, or one \.npy file of an image"),
        ("pythia", "a.npy", r"a\.npy: a_info\.npy, which says where the regions are, does not lie beside it"),
        ("milvlg", "folder/", r"folder: holds no \.npz files of images"),
        ("milvlg", "a.npy", r"a\.npy: expected a folder, or one \.npz file of an image"),
        ("uniter", "folder/", r"folder: holds no data\.mdb; expected the folder of an LMDB environment"),
        ("vilbert", "a.mdb", r"a\.mdb: not a readable LMDB environment"),
        ("ban", "a.hdf5", r"a_imgid2idx\.pkl: no such file; a\.hdf5 needs the ids of its images in a_imgid2idx\.pkl"),
        ("coco", "folder/", "folder: no such file"),
    ],
)
def test_what_is_no_input_of_a_format_is_named(tmp_path, format, name, words):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.write_text("no such thing")
    with pytest.raises(XdscaleError, match=words):
        source(format, path, background=None)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x1f\x8b\x08\0", r"features\.tsv: not a TSV of regions: it is packed \(gzip\); unpack it"),
        (b"PK\x03\x04", r"features\.tsv: not a TSV of regions: it is packed \(zip\); unpack it"),
        (b"image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures\n", r"line 1: names of columns; take this line away"),
    ],
)
def test_what_stands_before_the_lines_of_a_table_is_named(tmp_path, head, words):
    path = tmp_path / "features.tsv"
    path.write_bytes(head)
    with pytest.raises(XdscaleError, match=words):
        source("butd", path)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    (path,) = writers.butd(tmp_path, writers.images(3))
    before = list(_images(source("butd", path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    after = list(_images(source("butd", path)))
    assert [image.image_id for image in after] == [image.image_id for image in before]
    assert np.array_equal(after[0].features, before[0].features)


def _images(found):
    return (image for unit, _ in found.units(1) for image in found._images.images(unit))


@pytest.mark.parametrize(("kind", "bits"), [("<f2", 16), ("<f8", 64)])
def test_numbers_of_other_bits_are_not_taken_for_another_detector(tmp_path, kind, bits):
    one = writers.image(0, 2)
    cells = [base64.b64encode(array.tobytes()).decode() for array in (one.boxes, np.ones((2, 2048), kind))]
    path = tmp_path / "features.tsv"
    path.write_text("\t".join(["1", *map(str, one.size), "2", *cells]) + "\n")
    with pytest.raises(XdscaleError, match=rf"if these are numbers of {bits} bits, write them as float32"):
        region_files([str(path)], "butd", "butd")


def test_one_file_of_a_folder_is_read_alone(tmp_path):
    those = writers.images(3)
    for format, end in (("vlbert", ".json"), ("milvlg", ".npz"), ("pythia", ".npy")):
        (folder,) = getattr(writers, format)(tmp_path, those)
        images = source(format, folder / f"{those[1].id}{end}")
        ((image,),) = [list(images._images.images(unit)) for unit, _ in images.units(1)]
        assert (image.image_id, image.boxes.tolist()) == (those[1].id, those[1].boxes.tolist())


def test_as_many_regions_in_each_image_need_no_places(tmp_path):
    """BAN's files of 36 fixed regions: matrices of images, rows and columns, without pos_boxes."""
    those = [writers.image(number, 4) for number in range(3)]
    (path,) = writers.ban(tmp_path, those)
    with h5py.File(path, "r+") as file:
        del file["pos_boxes"]
        for name in list(file):
            values = file[name][:].reshape(3, 4, -1)
            del file[name]
            file[name] = values
    found = source("ban", path)
    images = [image for unit, _ in found.units(1) for image in found._images.images(unit)]
    assert [image.image_id for image in images] == [one.id for one in those]
    for image, one in zip(images, those, strict=True):
        assert image.size == one.size
        assert np.array_equal(image.boxes, one.boxes)
        assert np.array_equal(image.features, one.features)
    with h5py.File(path, "r+") as file:
        values = file["image_features"][:2]
        del file["image_features"]
        file["image_features"] = values
        del file["image_bb"]
        file["image_bb"] = np.zeros((2, 4, 4))
    with pytest.raises(XdscaleError, match=r"image_features \[2, 4, 20\] without pos_boxes; expected 3 images"):
        source("ban", path)


def test_annotations_of_coco_are_detections_without_scores(tmp_path):
    found = [{"image_id": 7, "category_id": n, "bbox": [n, 2, 30, 40]} for n in (3, 1)]
    for values in (found, {"annotations": found}):
        (tmp_path / "a.json").write_text(json.dumps(values))
        images = source("coco", tmp_path / "a.json", background=None)
        ((image,),) = [list(images._images.images(unit)) for unit, _ in images.units(1)]
        assert (image.image_id, image.boxes.tolist()) == ("7", [[3, 2, 30, 40], [1, 2, 30, 40]])
        assert {name: values.tolist() for name, values in image.labels.items()} == {"object_ids": [3, 1]}


@pytest.mark.parametrize("short", [0, 1])
def test_an_image_may_take_so_many_bytes_and_no_more(tmp_path, monkeypatch, short):
    """Of a line of a TSV, of a file in a zip, and of all arrays of an .npz together."""
    (image,) = writers.images(1)
    (line,) = writers.butd(tmp_path, [image])
    (archive,) = writers.vlbert_zip(tmp_path, [image])
    (arrays,) = writers.milvlg(tmp_path, [image])
    monkeypatch.setattr(tsv, "LONGEST_LINE", line.stat().st_size + 1 - short)
    with zipfile.ZipFile(archive) as opened:
        monkeypatch.setattr(json_files, "LARGEST_IMAGE_BYTES", opened.infolist()[0].file_size - short)
    with zipfile.ZipFile(arrays / f"{image.id}.npz") as opened:
        whole = sum(member.file_size for member in opened.infolist())
    monkeypatch.setattr(decoding, "LARGEST_IMAGE_BYTES", whole - short)
    for format, path, words in (
        ("butd", line, f"line 1: longer than {line.stat().st_size:,} bytes"),
        ("vlbert", archive, r"vlbert\.zip, .*: larger than .* bytes"),
        ("milvlg", arrays, f"more than {whole - 1:,} bytes when unpacked"),
    ):
        if short:
            with pytest.raises(XdscaleError, match=words):
                source(format, path)
        else:
            assert len(list(source(format, path).units(1))) == 1


def test_how_far_reading_is_is_told_in_bytes_of_all_inputs(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    first, second = (
        writers.butd(folder, [writers.image(n, 2) for n in some])[0]
        for folder, some in ((tmp_path, range(5)), (tmp_path / "more", range(5, 8)))
    )
    one, other = first.stat().st_size, second.stat().st_size
    found = source("butd", first, second, shard_images=2)
    wanted = [one * 2 // 5, one * 4 // 5, one, one + other * 2 // 3, one + other]
    assert [read for _, read in found.units(1)] == wanted
    assert found.total_bytes == one + other
    those = [image for unit, _ in found.units(1) for image in found._images.images(unit)]
    each = [image.boxes.nbytes + image.features.nbytes for image in those]
    monkeypatch.setattr(images_given, "build_table", lambda source, *args, **how: source._images)
    given = images_given.build_regions(those, tmp_path / "out", Detector(model="any"), shard_images=3)
    assert [read for _, read in given.units(1)] == np.cumsum(each)[[2, 5, 7]].tolist()
    assert given.total_bytes == sum(each)


@pytest.mark.parametrize(
    ("names", "background", "attributes"),
    [
        (400, None, ["one 0", "one 1"]),
        (400, 0, ["__background__", "one 0"]),
        (401, 0, ["one 0", "one 1"]),
        (399, 0, "399 names, but the detector has 401 of this attribute list"),
        (401, None, "401 names, but the detector has 400 of this attribute list"),
    ],
)
def test_names_of_attributes_gain_the_background_too(tmp_path, names, background, attributes):
    path = tmp_path / "attributes.txt"
    path.write_text("".join(f"one {number}\n" for number in range(names)))
    if isinstance(attributes, str):
        with pytest.raises(XdscaleError, match=rf"attributes\.txt: {attributes}"):
            load_detector("butd", attributes=path, background=background)
        return
    detector, width = load_detector("butd", attributes=path, background=background)
    more = background is not None
    assert (detector.attribute_count, detector.class_count, width) == (400 + more, 1600 + more, 2048)
    assert (detector.attributes[:2], detector.classes) == (attributes, [])
    assert len(detector.attributes) == 400 + more


def test_a_detector_without_attributes_counts_no_background_among_them():
    for background, classes in ((None, 91), (0, 92)):
        detector, width = load_detector("mattnet", background=background)
        assert (detector.class_count, detector.attribute_count, width) == (classes, 0, 0)
