"""Each thing that files of each format may not hold is named; one table a format, one change a row."""

import base64
import json
import pickle

import h5py
import lmdb
import msgpack
import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.build import build_table
from xdscale.shards.sources.regions.decoding import from_base64
from xdscale.shards.sources.regions.files import Reading, load_sizes
from xdscale.shards.sources.regions.importing import region_files
from xdscale.shards.sources.regions.plain_pickle import load_plain

from . import region_files as writers

THOSE = writers.images(3)  # with the ids 1000 to 1002, of 2, 3 and 4 regions


def source(format, path, sizes=None, **how):
    """The source of a file of an image's regions; sizes are those of `THOSE` where the format states none."""
    if format in ("uniter", "coco"):
        sizes = sizes or str(writers.coco_annotations(path.parent, THOSE))
    reading = Reading(sizes=sizes and load_sizes(sizes), **how)
    background = None if format in ("vinvl", "coco", "lxmert") else 0
    return region_files([str(path)], format, str(writers.detector(path.parent, background)), reading=reading)


def images(found):
    return [image for unit, _ in found.units(1) for image in found._images.images(unit)]


def refused(format, path, words, **how):
    with pytest.raises(XdscaleError, match=words):
        images(source(format, path, **how))


def put(path, key, value):
    with lmdb.open(str(path), map_size=1 << 27) as env, env.begin(write=True) as transaction:
        transaction.put(key, value)


def uniter_value(**change):
    fields = {**writers.uniter_fields(THOSE[1]), **change}
    return writers.npz(**{name: array for name, array in fields.items() if array is not None})


SHARES = writers.shares(THOSE[1])
RECORD = [THOSE[1].features, THOSE[1].boxes, 3, "240", 320, "1001", "a caption"]


@pytest.mark.parametrize(
    ("format", "key", "value", "words"),
    [
        ("uniter", b"1001.npz", uniter_value(norm_bb=None), "'1001.npz': expected arrays with norm_bb among them, fou"),
        ("uniter", b"1001.npz", msgpack.packb([1]), "'1001.npz': expected arrays with norm_bb among them, found"),
        ("uniter", b"1001.npz", uniter_value(conf=np.ones(2)), "rows of its arrays: .*'conf': 2.*; nbb_.*says 3 regio"),
        ("uniter", b"1001.npz", uniter_value(norm_bb=SHARES[:, :5]), r"norm_bb: shape \[3, 5\], expected \[regions, 6"),
        ("uniter", b"1001.npz", uniter_value(norm_bb=SHARES.astype(int)), "norm_bb: int64, expected shares of the im"),
        ("uniter", b"1001.npz", uniter_value(norm_bb=SHARES + [[0.02, *[0] * 5]]), "norm_bb: region 0 is .*; expected"),
        ("uniter", b"__keys__", b'["1000.npz", 7]', "key '__keys__': expected a list of names of images, found"),
        ("vilbert", b"keys", pickle.dumps([b"1000", b"\xff"]), r"vilbert\.lmdb, key b'\\xff': is not UTF-8 text"),
        ("vilbert", b"1001", pickle.dumps([1]), "key '1001': expected a pickled dict, found"),
        ("vilbert", b"1001", pickle.dumps(writers.vilbert_fields(THOSE[0])), "image_id is '1000', but its key '1001'"),
        ("tensorpack", b"00000001", msgpack.packb([1] * 6), "'00000001': expected a record of features, classes, box"),
        ("tensorpack", b"00000001", msgpack.packb({"a": 1}), "'00000001': expected a record of features, classes, bo"),
        ("tensorpack", b"00000001", writers.packed_arrays([*RECORD[:5], None, "x"], False), "image_id: .*, found None"),
        ("tensorpack", b"00000001", writers.packed_arrays([*RECORD[:5], True, "x"], False), "image_id: .*, found True"),
    ],
)  # fmt: skip
def test_environments(tmp_path, format, key, value, words):
    [path] = getattr(writers, format)(tmp_path, THOSE)
    put(path, key, value)
    refused({"tensorpack": "vilbert"}.get(format, format), path, words)


@pytest.mark.parametrize(("count", "words"), [("3", "found '3'"), (5, None), (6, "rows of its arrays: .*says 6 regi")])
def test_no_more_regions_are_taken_than_an_environment_holds(tmp_path, count, words):
    [path] = writers.uniter(tmp_path, THOSE)  # which holds two more than are to be taken
    [counts] = tmp_path.glob("nbb*.json")
    counts.write_text(json.dumps(json.loads(counts.read_text()) | {"1001.npz": count}))
    if words is None:
        assert [len(image.boxes) for image in images(source("uniter", path))] == [2, count, 4]
    else:
        refused("uniter", path, words)


def test_without_counts_all_regions_of_an_environment_are_taken(tmp_path):
    [path] = writers.uniter(tmp_path, THOSE)
    [counts] = tmp_path.glob("nbb*.json")
    counts.unlink()
    assert [len(image.boxes) for image in images(source("uniter", path))] == [4, 5, 6]
    put(path, b"1001.npz", uniter_value(conf=np.ones(2)))
    refused("uniter", path, "rows of its arrays: .*, expected equally many$")


def test_an_environment_must_list_its_images(tmp_path):
    path = writers.environment(tmp_path / "x.lmdb", {b"1000": b"x"})
    refused("vilbert", path, r"^x\.lmdb: neither 'keys' nor '__keys__' is there, which list the images$")


def replaced(name, change):
    def to(file):
        values = change(file[name][:])
        del file[name]
        file[name] = values

    return to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.pop("image_bb"), r"train\.hdf5: no data set image_bb; it has image_features, pos_boxes, s"),
        (replaced("image_bb", lambda values: values[1:]), r"image_features \[9, 20\] and image_bb \[8, 4\] do not ha"),
        (replaced("spatial_features", lambda values: values[1:]), r"image 0: spatial_features: shape \[8, 6\], but i"),
        (replaced("spatial_features", lambda values: values[:, :5]), r"spatial_features: float32 \[9, 5\], expected "),
        (replaced("image_features", lambda values: values[0]), r"image_features: float32 \[20\], expected rows of any"),
        (replaced("spatial_features", lambda values: values + 0.02), "image 0: spatial_features: region 0 is .*, but"),
        (lambda file: file.pop("spatial_features"), r"image 0: no spatial_features, which tell sizes of images; give"),
    ],
)  # fmt: skip
def test_matrices(tmp_path, change, words):
    [path] = writers.ban(tmp_path, THOSE)
    with h5py.File(path, "r+") as file:
        change(file)
    refused("ban", path, words)


def test_sizes_beside_a_matrix_are_taken_and_compared_with_its_shares(tmp_path):
    [path] = writers.ban(tmp_path, THOSE)
    sizes = str(writers.coco_annotations(tmp_path, THOSE))
    assert [image.size for image in images(source("ban", path, sizes))] == [one.size for one in THOSE]
    refused("ban", path, "image 0: spatial_features: region 0 is .* of an image of 900 × 240$", sizes="900x240")
    with h5py.File(path, "r+") as file:
        del file["spatial_features"]
    assert {image.size for image in images(source("ban", path, "900x240"))} == {(900, 240)}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1000, 1001, 1002], "expected a pickled dict of image id: number, found"),
        ({}, "expected a pickled dict of image id: number, found"),
        ({1000: 0, 1001: 1, 1002: 3}, "image 1002: number 3, expected 0 to 2$"),
        ({1000: -1, 1001: 1, 1002: 2}, "image 1000: number -1, expected 0 to 2$"),
        ({1000: 0, 1001: True, 1002: 2}, "image 1001: number True, expected 0 to 2$"),
        ({1000: 0, 1001: "1", 1002: 2}, "image 1001: number '1', expected 0 to 2$"),
        ({1000: 0, 1001: 1, 1002: 1}, "images 1001 and 1002 have the same number 1$"),
    ],
)
def test_ids_beside_a_matrix(tmp_path, ids, words):
    [path] = writers.ban(tmp_path, THOSE)
    (tmp_path / "train_imgid2idx.pkl").write_bytes(pickle.dumps(ids))
    refused("ban", path, rf"^train_imgid2idx\.pkl: {words}")


def objects(*regions, **more):
    """The two columns of an image of these regions."""
    whole = [{"rect": [0, 0, 9, 9], "conf": 1, "class": "class 0", "feature": writers.b64(np.ones(8, "f4"))} | one
             for one in regions]  # fmt: skip
    whole = [{name: value for name, value in one.items() if value is not None} for one in whole]
    return [json.dumps({"image_h": 9, "image_w": 9, "objects": whole} | more)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([], "1 column; expected key and JSON, or key, num_boxes and features"),
        (["1", "2", "3"], "4 columns; expected key and JSON, or key, num_boxes and features"),
        (["[1]"], "expected a JSON object, found"),
        (objects(), "objects: expected a list of objects, found"),
        (objects({}, {"conf": None}), "objects: region 1 has rect, class, feature, expected rect, feature, conf, cla"),
        (objects({"rect": None}), "objects: region 0 has conf, class, feature, expected rect, feature, conf, class"),
        (objects({}, {"class": "a dog"}), "class 'a dog' is not among those of --classes"),
        (objects({"class": 0}), "class 0 is not among those of --classes"),
        (objects({}, {"feature": 7}), "feature: expected base64, found 7"),
        (objects({}, {"feature": writers.b64(np.ones(9, "f4"))}), "feature: regions have 8 to 9 numbers, expected eq"),
        (objects({}, num_boxes=2, image_w=None), "width: None is not a whole number"),
    ],
)  # fmt: skip
def test_lines_of_keys_and_json(tmp_path, columns, words):
    [path] = writers.text(tmp_path / "a.tsv", [("1", *columns)])
    refused("vinvl", path, rf"^a\.tsv, line 1: {words}")


def test_boxes_of_keys_and_json_may_be_rects_of_all_or_stand_in_three_columns(tmp_path):
    [one] = writers.images(1)
    long = writers.b64(np.concatenate([one.features, writers.shares(one)], axis=1))
    fields = {"rects": one.boxes.tolist(), "features": long, "num_boxes": 2, "image_w": one.size[0]}
    cases = {"rects": (json.dumps(fields | {"image_h": one.size[1]}), None), "columns": (2, long)}
    for name, (second, third) in cases.items():
        [path] = writers.text(tmp_path / f"{name}.tsv", [(one.id, second, *([third] * bool(third)))])
        [image] = images(source("vinvl", path, sizes="x".join(map(str, one.size)) if third else None))
        assert (image.image_id, image.size) == (one.id, one.size)
        assert np.allclose(image.boxes, one.boxes, atol=1e-3)
        assert np.array_equal(image.features, one.features)


COLUMNS = ["1000", "320", "240", "2", writers.b64(THOSE[0].boxes), writers.b64(THOSE[0].features)]


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (COLUMNS[1:], "image_w,image_h,num_boxes,boxes,features", "^--columns image_w,.*: one of them must be image_"),
        (COLUMNS, "id,image_w,image_h,num_boxes,boxes,features", "^--columns: no column 'id'; known are attrs_conf, "),
        (COLUMNS[:4] + COLUMNS[5:], "image_id,image_w,image_h,num_boxes,features", "line 1: no field of boxes; it ha"),
        (COLUMNS[:3] + COLUMNS[4:], "image_id,image_w,image_h,boxes,features", "1: no field of the number of regions"),
        ([*COLUMNS, "x"], "", "line 1: 7 columns, expected 6: image_id, image_w, image_h, num_boxes, boxes, features"),
    ],
)  # fmt: skip
def test_columns(tmp_path, columns, options, words):
    [path] = writers.text(tmp_path / "a.tsv", [columns])
    refused("butd", path, words, columns=tuple(options.split(",")) if options else ())


def test_base64_may_be_wrapped_and_holds_whole_numbers():
    data = base64.encodebytes(np.arange(100, dtype="<f4").tobytes())
    for text in (data, data.replace(b"\n", b"\r\n"), data.decode()):
        assert from_base64(text, "<f4", "x", "boxes").tolist() == list(range(100))
    with pytest.raises(XdscaleError, match=r"^x: boxes: 6 bytes are no whole number of values of 4 bytes \(<f4\)$"):
        from_base64(writers.b64(np.ones(6, np.uint8)), "<f4", "x", "boxes")


@pytest.mark.parametrize(
    ("format", "file", "value", "words"),
    [
        ("pythia", "1001.npy", np.ones(3), r"^1001\.npy: expected an array \[regions, width\], found"),
        ("pythia", "1001_info.npy", np.ones(3), r"^1001_info\.npy: expected a pickled dict with bbox, found"),
        ("vlbert", "1001.json", "[]", r"^1001\.json: expected a JSON object, found"),
        ("milvlg", "1001.npz", {"bbox": np.ones((2, 4))}, r"^1001\.npz: expected the arrays x and bbox; it has bbox$"),
        ("milvlg", "1001.npz", {"x": np.ones(2), "bbox": np.ones((2, 4))}, "expected the arrays x and bbox; it has x"),
        ("milvlg", "1001.npz", {"x": np.ones((2, 2)), "bbox": np.ones(())}, "expected the arrays x and bbox; it has x"),
    ],
)  # fmt: skip
def test_files_of_an_image(tmp_path, format, file, value, words):
    [path] = getattr(writers, format)(tmp_path, THOSE)
    if isinstance(value, str):
        (path / file).write_text(value)
    else:
        (path / file).write_bytes(writers.npz(**value)) if isinstance(value, dict) else np.save(path / file, value)
    refused(format, path, words)


DETECTION = {"image_id": 1000, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": []}, "expected a list of detections, or COCO's annotations, found None"),
        (7, "expected a list of detections, or COCO's annotations, found 7"),
        ([DETECTION, 7], "record 1: expected an object, found 7"),
        ([DETECTION | {"image_id": [1]}], "record 0: image_id: expected a number or a text, found"),
        ([DETECTION | {"image_id": True}], "record 0: image_id: expected a number or a text, found True"),
        ([DETECTION | {"category_id": True}], "record 0: category_id: expected a number, found True"),
        ([DETECTION | {"bbox": [1, 2, 3, True]}], "record 0: bbox: expected left, top, width, height, found"),
        ([DETECTION | {"bbox": [1, 2, 3]}], "record 0: bbox: expected left, top, width, height, found"),
        ([], r"no images with regions; is the format right\?$"),
    ],
)
def test_detections(tmp_path, content, words):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(content))
    refused("coco", path, rf"^detections\.json(, |: ){words}")


def test_detections_need_sizes_and_confidences_are_all_there_or_none(tmp_path):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([DETECTION, DETECTION | {"score": None}]))
    with pytest.raises(XdscaleError, match="^detections do not say how large images are; name COCO's annotation file"):
        region_files([str(path)], "coco", str(writers.detector(tmp_path, None)))
    [image] = images(source("coco", path))
    assert list(image.labels) == ["object_ids"]


UNSAFE = {
    "a persistent id": (b"\x80\x02Pa\n.", "refers to objects outside of itself"),
    "an extension code": (b"\x80\x02\x82\x01.", "uses extension codes"),
    "a type": (b"\x80\x02cnumpy\ndtype\n.", "holds a type and not a value"),
    "a made type": (b"\x80\x02cnumpy\ndtype\n(U\x02f4K\x00K\x01tR.", "holds a type and not a value"),
    "a changed class": (b"\x80\x02c_codecs\nencode\nN}U\x01aK\x01s\x86b.", r"_Encode\.a cannot be changed"),
    "another encoding": (b"\x80\x02c_codecs\nencode\n(U\x01aU\x05utf-8tR.", "bytes in encoding 'utf-8'"),
    "more bytes than there are": (b"\x80\x05\x96\x40\0\0\0\0\0\0\0x.", "states 64 bytes and has 13"),
    "a structure": (pickle.dumps(np.zeros(2, [("a", "<f4")])), "arrays of type 'V4' are not read"),
    "parts of a structure": (
        b"\x80\x02cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NU\x01aNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "arrays of structures are not read",
    ),
    "objects in bytes": (
        pickle.dumps(np.array([None]), 2).replace(b"]", b"U\x01a").replace(b"Na", b""),
        "objects without a list",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_pickles(name):
    data, words = UNSAFE[name]
    with pytest.raises(XdscaleError, match=f"^x: not a readable pickle: .*{words}"):
        load_plain(data, "x")


def test_bytes_are_read_whatever_pickle_wrote_them():
    for protocol in range(6):
        for value in (b"", b"\xff\0a"):
            assert load_plain(pickle.dumps(value, protocol), "x") == value
    assert load_plain(pickle.dumps(bytearray(b"\xff\0a"), 5), "x") == bytearray(b"\xff\0a")


def test_an_id_must_end_with_a_number_where_numbers_are_kept(tmp_path):
    [path] = writers.butd(tmp_path, [writers.image(0, 2, "a/COCO_0012.jpg"), writers.image(1, 2, "COCO_a")])
    refused("butd", path, r"^butd\.tsv, image 2: image id 'COCO_a' does not end with a number \(--ids number\)$",
            ids="number")  # fmt: skip
    [path] = writers.butd(tmp_path, [writers.image(0, 2, "a/COCO_0012.jpg")])
    for ids, kept in (("number", "12"), ("stem", "COCO_0012"), ("as-given", "a/COCO_0012.jpg")):
        assert [image.image_id for image in images(source("butd", path, ids=ids))] == [kept]


def test_files_that_cannot_be_read_are_named(tmp_path):
    [path] = writers.butd(tmp_path, THOSE)
    found = source("butd", path)
    path.unlink()
    with pytest.raises(XdscaleError, match=rf"^{path}: cannot be read: No such file or directory$"):
        build_table(found, tmp_path / "out")
    [folder] = writers.vlbert(tmp_path, THOSE)
    (folder / "more.json").mkdir()
    refused("vlbert", folder, rf"^{folder / 'more.json'}: cannot be read: Is a directory$")
    refused("vlbert", tmp_path / "none", f"^{tmp_path / 'none'}: no such file or folder$")
    path.write_text("\n\n")
    refused("butd", path, r"^butd\.tsv: no images with regions; is the format right\?$")


def test_a_format_must_be_known(tmp_path):
    with pytest.raises(XdscaleError, match=r"^--format vinvll: did you mean 'vinvl'\?"):
        region_files([], "vinvll", "butd")
    with pytest.raises(
        XdscaleError, match="^--format mine: expected butd, lxmert, .*; features in a form of your own "
    ):
        region_files([], "mine", "butd")
