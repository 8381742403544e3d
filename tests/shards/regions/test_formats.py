"""Every format is read as its own code would read it: ids, sizes, boxes, features, classes, in the files' order."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from xdscale.commands.regions import regions_app
from xdscale.errors import XdscaleError
from xdscale.shards.build import build_table, merge_parts
from xdscale.shards.commands import shards_app
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.files import Reading, load_sizes
from xdscale.shards.sources.regions.importing import region_files
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.workplace import Part

from . import region_files as writers

# Format, what the table holds beside ids, sizes, boxes and features, background of the detector.
CASES = {
    "butd": ("butd", set(), 0),
    "lxmert": ("lxmert", {"conf", "objects", "attributes"}, None),
    "uniter": ("uniter", {"conf", "probs"}, 0),
    "uniter_msgpack": ("uniter", {"conf", "probs"}, 0),
    "vilbert": ("vilbert", set(), 0),
    "tensorpack": ("vilbert", {"probs"}, 0),
    "vlbert": ("vlbert", {"probs"}, 0),
    "vlbert_zip": ("vlbert", {"probs"}, 0),
    "ban": ("ban", set(), 0),
    "ban_last_rows": ("ban", set(), 0),
    "pythia": ("pythia", {"probs"}, 0),
    "milvlg": ("milvlg", set(), 0),
    "milvlg_later": ("milvlg", {"conf"}, 0),
    "vinvl": ("vinvl", {"conf", "objects"}, None),
    "vinvl_features": ("vinvl", set(), None),
    "coco": ("coco", {"conf", "objects"}, None),
}
WRITE = {
    "uniter_msgpack": lambda folder, those: writers.uniter(folder, those, packed="msgpack"),
    "ban_last_rows": lambda folder, those: writers.ban(folder, those, exclusive=False),
    "milvlg_later": lambda folder, those: writers.milvlg(folder, those, turned=False),
}


def write(name, folder, those):
    return WRITE.get(name, getattr(writers, name, None))(folder, those)


def imported(name, folder, those, **how):
    """The source of one format's files."""
    format, _, background = CASES[name]
    inputs = [str(path) for path in write(name, folder, those)]
    sizes = load_sizes(str(writers.coco_annotations(folder, those)))
    needs = format in ("uniter", "coco") or name == "vinvl_features"
    reading = Reading(sizes=sizes if needs else None)
    detector = str(writers.detector(folder, background))
    return region_files(inputs, format, detector, reading=reading, **how)


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_is_read(name, tmp_path, tmp_path_factory):
    those = [*writers.images(), writers.image(5, regions=1)]
    _, more, _ = CASES[name]
    if "probs" not in more:
        with pytest.raises(XdscaleError, match="class distributions: are missing, so --class-probs all keeps none"):
            imported(name, tmp_path_factory.mktemp("refused"), those, class_probs="all")
    kept = "all" if "probs" in more else None
    build_table(imported(name, tmp_path, those, shard_images=2, class_probs=kept), tmp_path / "out")
    table = RegionTable.open(tmp_path / "out")
    rows = table.rows([i.id for i in those])
    assert rows.tolist() == list(range(len(those)))
    found = table.read(rows)
    half = name.startswith("uniter")  # whose boxes are shares in half precision
    for i, first, end, size in zip(those, found.offsets, found.offsets[1:], found.sizes):
        assert size.tolist() == list(i.size)
        assert np.allclose(found.boxes[first:end], i.boxes, atol=0.2 if half else 1e-3)
        if name != "coco":
            assert np.array_equal(found.features[first:end], i.features.astype(np.float16))
        assert np.allclose(found.confidences[first:end], i.conf if "conf" in more else 1, atol=1e-6)
    everything = {key: np.concatenate([getattr(i, key) for i in those]) for key in ("probs", "objects", "attributes")}
    if "probs" in more:
        assert np.allclose(table.class_probs(rows), everything["probs"], atol=2e-3)
    if "objects" in more:
        assert np.array_equal(table.table.read_ragged("object_ids", rows).values, everything["objects"])
    if "attributes" in more:
        assert np.array_equal(table.table.read_ragged("attribute_ids", rows).values, everything["attributes"])
    if name == "pythia":  # whose classes leave the background out; the table's count it
        expected = everything["probs"][:, 1:].argmax(1) + 1
        assert np.array_equal(table.table.read_ragged("object_ids", rows).values, expected)
    if name == "vinvl":
        assert table.build.detector.classes[3] == "class 3"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["lxmert", "tensorpack", "ban", "vlbert_zip", "coco"])
def test_bytes_are_the_same_for_any_number_of_workers_in_parts_and_after_a_stop(name, tmp_path, monkeypatch):
    source = imported(name, tmp_path, writers.images(9), shard_images=2)
    build_table(source, tmp_path / "one")
    expected = files(tmp_path / "one")
    assert len(expected) == 6
    if name == "lxmert":  # the one test that starts processes
        build_table(source, tmp_path / "two", workers=2)
        assert files(tmp_path / "two") == expected
    for index in (1, 0):
        build_table(source, tmp_path / "parts", part=Part(index, 2))
    merge_parts(tmp_path / "parts")
    assert files(tmp_path / "parts") == expected
    # Stopped in its fourth shard: the first three are kept.
    real = type(source).rows

    def stopped(self, work, write):
        if len(list((tmp_path / "stopped").glob("*.tar"))) == 3:
            raise KeyboardInterrupt
        return real(self, work, write)

    with monkeypatch.context() as patch:
        patch.setattr(type(source), "rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_table(source, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "dataset.json").exists()
    seen = []
    build_table(source, tmp_path / "stopped", on_progress=lambda progress: seen.append(progress.kept_shards))
    assert seen == [1, 2, 3, 3, 3]
    assert files(tmp_path / "stopped") == expected


def run(*words):
    return CliRunner().invoke(regions_app, [str(word) for word in words])


def test_the_command_says_what_came_of_it(tmp_path):
    (path,) = writers.butd(tmp_path, writers.images())
    detector = writers.detector(tmp_path)
    result = run(
        "import", path, "--format", "butd", "--detector", detector, "--out", tmp_path / "out", "--encoding", "u8"
    )
    assert result.exit_code == 0, result.output
    assert "5 images, 16 regions" in result.output
    assert "features: 20 numbers, u8, relative error up to 0.007" in result.output
    shown = CliRunner().invoke(shards_app, ["info", str(tmp_path / "out")]).output
    assert f"{tmp_path / 'out'}: image regions, butd" in shown
    for line in (
        "16 regions",
        "detector: test (weights not stated); 101 classes, named, background is 0",
        "thousandths: ",
    ):
        assert line in result.output
        assert line in shown
    build = json.loads((tmp_path / "out" / "dataset.json").read_text())["tables"]["regions"]["build"]
    assert build["detector"]["classes"][:2] == ["class 0", "class 1"]
    assert build["detector"]["background"] == 0
    assert build["inputs"][0]["name"] == "butd.tsv"
    assert (build["box_form"], build["box_units"], build["whole_image"]) == ("xyxy", "pixels", "none")


def test_other_columns_ids_and_boxes_are_declared(tmp_path):
    those = writers.images()
    rows = []
    for i in those:
        xywh = np.concatenate([i.boxes[:, :2], i.boxes[:, 2:] - i.boxes[:, :2]], axis=1)
        rows.append(
            (
                i.size[1],
                f"COCO_val2014_{int(i.id):012}",
                "note",
                i.size[0],
                len(i.boxes),
                writers.b64(xywh),
                writers.b64(i.features),
            )
        )
    (path,) = writers.text(tmp_path / "other.tsv", rows)
    words = ["import", path, "--format", "butd", "--detector", writers.detector(tmp_path), "--out", tmp_path / "out"]
    words += ["--columns", "image_h,image_id,-,image_w,num_boxes,boxes,features", "--boxes", "xywh", "--ids", "number"]
    assert run(*words).exit_code == 0
    table = RegionTable.open(tmp_path / "out")
    found = table.read(table.rows([i.id for i in those]))
    assert np.allclose(found.boxes, np.concatenate([i.boxes for i in those]), atol=1e-3)


def test_jpegs_are_stored_too(tmp_path):
    those = writers.images(3)
    (path,) = writers.butd(tmp_path, those)
    (tmp_path / "images").mkdir()
    for i in those:
        Image.new("RGB", i.size, int(i.id)).save(tmp_path / "images" / f"{i.id}.jpg")
    words = ["import", path, "--format", "butd", "--detector", writers.detector(tmp_path), "--out", tmp_path / "out"]
    assert run(*words, "--jpegs", tmp_path / "images").exit_code == 0
    table = RegionTable.open(tmp_path / "out")
    values, offsets = table.table.read_ragged("jpeg", np.array([2, 0]))
    assert values[: offsets[1]].tobytes() == (tmp_path / "images" / f"{those[2].id}.jpg").read_bytes()
    (tmp_path / "images" / f"{those[1].id}.jpg").unlink()
    with pytest.raises(XdscaleError, match=r"line 2: image '1001': .*1001.jpg does not exist"):
        run_raising(*words[:-1], tmp_path / "out2", "--jpegs", tmp_path / "images")
    with pytest.raises(XdscaleError, match=r"/image: no such folder \(--jpegs\)"):
        run_raising(*words[:-1], tmp_path / "out2", "--jpegs", tmp_path / "image")


def saved(size, kind="JPEG", **options):
    stream = io.BytesIO()
    Image.effect_noise(size, 80).save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def test_a_jpeg_that_a_camera_turned_is_of_its_image(tmp_path):
    (one,) = writers.images(1)
    image = RegionImage(one.id, one.size, one.boxes, jpeg=saved(one.size[::-1], **turned(8)))
    assert len(build_regions([image], tmp_path / "out", Detector(model="x")).splits["all"].shards) == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda size: saved(size, "PNG"), r"the file begins with b'\\x89PNG', which no JPEG does"),
        (lambda size: saved(size)[:-900], "not a readable image: image file is truncated"),
        (lambda size: saved(size, progressive=True)[:-900], "not a readable image: image file is truncated"),
        (lambda size: b"\xff\xd8\xff" + bytes(900), "not a readable image: "),
        (lambda size: saved(size[::-1]), "has .* pixels, but the boxes are of an image of "),
        (lambda size: saved(size, **turned(6)), "has .* pixels, but the boxes are of an image of "),
    ],
)
def test_a_file_that_training_could_not_read_is_refused_when_the_table_is_made(tmp_path, made, message):
    """A run that comes upon it can never go on: its order is that of the table."""
    good, bad = writers.images(2)
    those = [RegionImage(one.id, one.size, one.boxes, jpeg=saved(one.size)) for one in (good, bad)]
    with pytest.raises(XdscaleError, match=f"image '{bad.id}': jpeg: {message}"):
        build_regions([those[0], those[1]._replace(jpeg=made(bad.size))], tmp_path / "out", Detector(model="x"))
    assert not (tmp_path / "out" / "dataset.json").exists()


def run_raising(*words):
    return CliRunner().invoke(regions_app, [str(word) for word in words], catch_exceptions=False)


def test_images_whose_files_cannot_be_read_can_be_left_out(tmp_path):
    """Of millions of files from the web some are always gone, or torn."""
    those = writers.images(5)
    (path,) = writers.butd(tmp_path, those)
    (tmp_path / "images").mkdir()
    for one in those[1:]:
        (tmp_path / "images" / f"{one.id}.jpg").write_bytes(saved(one.size)[: -900 if one is those[3] else None])
    words = ["import", path, "--format", "butd", "--detector", writers.detector(tmp_path)]
    run_raising(*words, "--bad-images", "skip", "--out", tmp_path / "without")  # nothing is read that nobody asked for
    assert len(RegionTable.open(tmp_path / "without")) == 5
    assert "bad_images" not in RegionTable.open(tmp_path / "without").build.options  # of which it decides nothing
    words += ["--jpegs", tmp_path / "images", "--shard-images", "1", "--out", tmp_path / "out"]
    with pytest.raises(XdscaleError, match=r"1000\.jpg does not exist \(--jpegs\); --bad-images skip leaves such"):
        run_raising(*words)
    done = run_raising(*words, "--bad-images", "skip")
    table = RegionTable.open(tmp_path / "out")
    assert table.image_ids(np.arange(len(table))) == [those[place].id for place in (1, 2, 4)]
    assert table.build.options["bad_images"] == "skip"
    assert done.exit_code == 0
    assert "warning: left out: " in done.stderr
    assert f"image '{those[3].id}': jpeg: not a readable image" in done.stderr


def test_images_of_one_file_are_refused(tmp_path):
    """Ids in two folders, or with two endings: the file of the one was stored for both."""
    those = [writers.image(number, 2, name) for number, name in enumerate(("a/1.v", "b/2.v", "b/1.v", "c/3"))]
    (path,) = writers.butd(tmp_path, those)
    (tmp_path / "images").mkdir()
    for name in ("1.v", "2.v", "3"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(saved(those[0].size))
    words = ["import", path, "--format", "butd", "--detector", writers.detector(tmp_path), "--out", tmp_path / "out"]
    with pytest.raises(
        XdscaleError,
        match=rf"image 3 \(b/1\.v\): its file in .*images \(--jpegs\) is that of {path.name}, image 1 \(a/1",
    ):
        run_raising(*words, "--jpegs", tmp_path / "images")
    assert not (tmp_path / "out").exists()
    (tmp_path / "images" / "1.v.jpg").unlink()  # what is not there is told as before
    with pytest.raises(XdscaleError, match=r"1\.v\.jpg does not exist \(--jpegs\)"):
        run_raising(*words, "--jpegs", tmp_path / "images")
