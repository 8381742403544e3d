"""COCO's captions as a table linked to image regions: what is held out, what is refused, which row is whose."""

import json
import unicodedata
from contextlib import nullcontext

import numpy as np
import pytest
from typer.testing import CliRunner

from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.files import read_json
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Manifest
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources import captions
from xdscale.shards.sources.caption_build import CaptionBuild, CaptionOptions
from xdscale.shards.sources.captions import CaptionSource
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.table import Table, open_table

IMAGES = 40


def entries(first, count, split="train2014"):
    """COCO's two lists: image i has i % 4 + 1 captions, which stand in the file in turns."""
    numbers = range(first, first + count)
    images = [{"id": number, "file_name": f"COCO_{split}_{number:012d}.jpg", "height": 9} for number in numbers]
    annotations = [
        {"image_id": number, "id": 1000 * number + turn, "caption": f"Caption {turn} of picture {number}."}
        for turn in range(4)
        for number in numbers
        if turn <= number % 4
    ]
    return {"info": {}, "images": images, "annotations": annotations}


def written(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def regions(out, names):
    """A table of regions whose rows are not in the order of the captions."""
    chance = np.random.default_rng(0)
    boxes = np.array([[0, 0, 5, 5], [1, 1, 9, 9]], np.float32)
    images = [
        RegionImage(name, (10, 10), boxes, chance.random((2, 4)).astype(np.float32), where=name) for name in names
    ]
    build_regions(images, out, Detector(model="none"))
    return out


@pytest.fixture
def dataset(tmp_path):
    return regions(tmp_path / "dataset", [f"COCO_train2014_{number:012d}" for number in range(IMAGES, 0, -1)])


@pytest.fixture
def run(dataset, cassette_model):
    def run(*arguments):
        fixed = ["--out", str(dataset), "--language-tokenizer", str(cassette_model)]
        return CliRunner().invoke(app, ["shards", "captions", *map(str, arguments), *fixed])

    return run


def captions_of(dataset, split, cassette_model):
    """(image, text) of each row, and its siblings."""
    tokenizer, _ = load_language_tokenizer(str(cassette_model))
    table = open_table(dataset, split, "captions")
    rows = np.arange(len(table))
    words, bounds = table.read_ragged("words", rows)
    pieces = [words[start:end].tolist() for start, end in zip(bounds, bounds[1:])]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in pieces]  # there are none
    images = RegionTable(table.linked("image")).image_ids(table.read("image", rows).astype(np.int64))
    return list(zip(images, texts)), table.read("siblings", rows)


def test_each_caption_is_linked_to_its_image_and_its_siblings(dataset, run, tmp_path, cassette_model):
    done = run(written(tmp_path / "captions.json", entries(1, IMAGES)), "--validation-fraction", "0.3")
    assert done.exit_code == 0, done.output
    assert "40 images" in done.output
    seen = []
    for split in ("train", "validation"):
        found, siblings = captions_of(dataset, split, cassette_model)
        assert len(found) > 15
        for row, (image, text) in enumerate(found):
            first, count = siblings[row].tolist()
            assert f"of picture {int(image[-12:])}." in text
            assert first <= row < first + count == first + int(image[-12:]) % 4 + 1
            assert {other for other, _ in found[first : first + count]} == {image}
            assert [other for other, _ in found].count(image) == count
        seen += found
    assert len({image for image, _ in seen}) == IMAGES  # none is in both splits
    assert sorted(text for _, text in seen) == sorted(
        entry["caption"].lower() for entry in entries(1, IMAGES)["annotations"]
    )


def test_any_number_of_workers_and_shards_gives_the_same_rows(dataset, tmp_path, cassette_model):
    from xdscale.shards.build import build_table
    from xdscale.shards.sources.caption_build import CaptionOptions
    from xdscale.shards.sources.captions import CaptionSource

    path, results = written(tmp_path / "captions.json", entries(1, IMAGES)), []
    for workers, images in ((1, 7), (2, 7), (1, 8192)):
        options = CaptionOptions(shard_images=images, validation_fraction=0.3)
        source = CaptionSource([path], dataset, str(cassette_model), options)
        build_table(source, dataset, workers=workers, overwrite=True)
        found = [captions_of(dataset, split, cassette_model) for split in ("train", "validation")]
        shards = {record.file: record.sha256 for record in Manifest.load(dataset).tables["captions"].shards}
        results.append(([(pairs, siblings.tolist()) for pairs, siblings in found], shards))
    assert results[0] == results[1]
    assert results[0][0] == results[2][0]
    assert len(results[0][1]) > 6 > len(results[2][1])
    shares = [bytes_read / source.total_bytes for _, bytes_read in source.units(1)]
    assert shares == [1]
    source = CaptionSource([path], dataset, str(cassette_model), options.model_copy(update={"shard_images": 16}))
    assert [round(40 * bytes_read / source.total_bytes, 1) for _, bytes_read in source.units(1)] == [16, 32, 40]


def test_the_file_that_says_what_is_held_out_is_read_once(dataset, tmp_path, cassette_model, monkeypatch):
    """It is as large as all captions: once for each image would take days."""
    images = [{"cocoid": number, "filename": "", "split": "train"} for number in range(1, IMAGES + 1)]
    karpathy = written(tmp_path / "dataset_coco.json", {"images": images})
    read = []
    monkeypatch.setattr(captions, "read_json", lambda path: [read.append(path), read_json(path)][1])
    path = written(tmp_path / "captions.json", entries(1, IMAGES))
    captions.CaptionSource([path], dataset, str(cassette_model), CaptionOptions(split="karpathy"), [karpathy])
    assert read == [path, karpathy]


def test_a_karpathy_file_holds_its_images_out_and_leaves_its_test_images_away(run, dataset, tmp_path, cassette_model):
    splits = ["train", "restval", "val", "test"]
    images = [
        {"cocoid": number, "filename": f"COCO_val2014_{number:012d}.jpg", "split": splits[number % 4], "sentences": []}
        for number in range(1, IMAGES + 1)
    ]
    karpathy = written(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    done = run(written(tmp_path / "captions.json", entries(1, IMAGES)), "--karpathy", karpathy)
    assert done.exit_code == 0, done.output
    assert "10 images of other splits" in done.output
    held_out = {int(image[-12:]) % 4 for image, _ in captions_of(dataset, "validation", cassette_model)[0]}
    trained = {int(image[-12:]) % 4 for image, _ in captions_of(dataset, "train", cassette_model)[0]}
    assert (trained, held_out) == ({0, 1}, {2})


@pytest.mark.parametrize("way", ["list", "files"])
def test_images_are_held_out_by_a_list_or_as_files_of_their_own(run, dataset, tmp_path, cassette_model, way):
    if way == "list":
        captions = [written(tmp_path / "captions.json", entries(1, IMAGES))]
        given = ("--held-out", written(tmp_path / "minival.txt", "\r\n".join(map(str, range(31, IMAGES + 1))) + "\n\n"))
    else:
        captions = [written(tmp_path / "a.json", entries(1, 10)), written(tmp_path / "b.json", entries(11, 20))]
        given = ("--validation", written(tmp_path / "c.json", entries(31, 10)))
    done = run(*captions, *given)
    assert done.exit_code == 0, done.output
    held_out = {int(image[-12:]) for image, _ in captions_of(dataset, "validation", cassette_model)[0]}
    assert held_out == set(range(31, IMAGES + 1))


@pytest.mark.parametrize("form", ["{}", "{:012d}", "COCO_train2014_{:012d}.jpg"])
def test_images_are_found_by_any_of_their_names(tmp_path, cassette_model, form):
    out = regions(tmp_path / "named", [form.format(number) for number in range(1, 9)])
    path = written(tmp_path / "captions.json", entries(1, 8))
    fixed = ["--out", str(out), "--language-tokenizer", str(cassette_model), "--validation-fraction", "0.5"]
    done = CliRunner().invoke(app, ["shards", "captions", str(path), *fixed])
    assert done.exit_code == 0, done.output
    for split in ("train", "validation"):
        for image, text in captions_of(out, split, cassette_model)[0]:
            assert form.format(int(text.split()[-1].strip("."))) == image


def test_images_without_regions_are_refused_or_left_out(run, tmp_path):
    path = written(tmp_path / "captions.json", entries(1, IMAGES + 2))
    with pytest.raises(XdscaleError, match=r"no image 'COCO_train2014_0{10}41', .*_0{10}42'; .* --missing leave-out"):
        raise run(path).exception
    done = run(path, "--missing", "leave-out")
    assert done.exit_code == 0, done.output
    assert "2 images without regions" in done.output
    last = written(tmp_path / "last.json", entries(IMAGES, 3))  # the image in the first row, and two without regions
    assert "2 images without regions" in run(last, "--missing", "leave-out", "--overwrite").output
    others = written(tmp_path / "others.json", entries(1000, 1003))
    with pytest.raises(
        XdscaleError, match=r"the table of regions has no image .*; it has none of the captions' images$"
    ):
        raise run(others, "--missing", "leave-out", "--overwrite").exception


def change(place, **fields):
    kind, number = place

    def apply(values):
        values[kind][number] |= fields

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values.pop("annotations"), r"expected a list 'annotations', as in COCO"),
        (change(("images", 3), id="4"), r"images\[3\]: id = '4': expected a whole number"),
        (change(("images", 3), id=1), r"images\[3\]: id 1 stands twice"),
        (change(("images", 3), file_name=None), r"images\[3\]: file_name = None: expected a text"),
        (change(("annotations", 5), image_id=77), r"annotations\[5\]: image_id 77 is not among the file's images"),
        (change(("annotations", 5), caption="a \ud800"), r"annotations\[5\]: caption = 'a \\ud800': holds half a char"),
        (change(("images", 3), file_name="\ud800.jpg"), r"images\[3\]: file_name = '\\ud800.jpg': holds half a char"),
        (change(("annotations", 5), caption=["a"]), r"annotations\[5\]: caption = \['a'\]: expected a text"),
        (change(("annotations", 5), image_id=True), r"annotations\[5\]: image_id = True: expected a whole number"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(dataset, run, tmp_path, damage, message):
    values = entries(1, IMAGES)
    damage(values)
    done = run(written(tmp_path / "captions.json", values))
    with pytest.raises(XdscaleError, match=message):
        raise done.exception
    assert list(Manifest.load(dataset).tables) == ["regions"]
    assert not list(dataset.glob("captions*"))


def test_other_bad_input(dataset, run, tmp_path):
    path = written(tmp_path / "captions.json", entries(1, IMAGES))
    cases = {
        "is in .* too; name each image once": (path, written(tmp_path / "again.json", entries(5, 1))),
        r"line 2: 'four': expected an image's id": (path, "--held-out", written(tmp_path / "ids.txt", "3\nfour\n")),
        r"split = 'dev': expected train, restval, val, test": (
            path, "--karpathy", written(tmp_path / "k.json", {"images": [{"filename": "a.jpg", "split": "dev"}]}),
        ),
        r"images\[1\]: split = 'val', but a.jpg stands above in another split": (
            path, "--karpathy", written(tmp_path / "two.json", {"images": [
                {"filename": "a.jpg", "split": split} for split in ("train", "val")
            ]}),
        ),
        "none of its ids is that of an image": (path, "--held-out", written(tmp_path / "other.txt", "12345\n")),
        "give one of them": (path, "--karpathy", path, "--held-out", path),
        r"--missing 'skip': expected refuse or leave-out": (path, "--missing", "skip"),
        "not a readable JSON file": (written(tmp_path / "cut.json", '{"images": ['),),
    }  # fmt: skip
    for message, arguments in cases.items():
        with pytest.raises(XdscaleError, match=message):
            raise run(*arguments).exception


def test_captions_without_a_word_are_counted(run, dataset, tmp_path, cassette_model):
    values = entries(1, IMAGES)
    values["annotations"][0]["caption"] = " \n"
    done = run(written(tmp_path / "captions.json", values), "--validation-fraction", "0")
    assert "1 empty captions" in done.output
    assert "warning: the split validation is empty" in done.output
    assert len(captions_of(dataset, "train", cassette_model)[0]) == 4 * 25 - 1


def test_captions_in_letters_that_the_tokenizer_does_not_know_are_told(run, dataset, tmp_path):
    """Else a model is trained on [UNK] for days."""
    values = entries(1, IMAGES)
    assert "[UNK]" not in run(written(tmp_path / "captions.json", values)).output
    for entry in values["annotations"]:
        entry["caption"] = "แมวนั่ง 2"
    done = run(written(tmp_path / "captions.json", values), "--overwrite")
    assert done.exit_code == 0
    assert f"warning: {dataset}: captions: 50% of the word pieces at its beginning are [UNK], unknown" in done.output


@pytest.mark.parametrize(
    ("ids", "names", "found"),
    [
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg", "b/1.jpg"], "file_name"),
        (["1.jpg", "2.jpg"], ["a/1.jpg", "b/2.jpg"], "file_name without folder"),
        (["1", "2"], ["a/1.png", "b/2.jpg"], "file_name without ending"),
        (["1.jpg", "2.jpg"], ["1.jpg", "1.jpg"], "file_name"),  # an entry for each caption of one file
    ],
)
def test_images_are_found_by_their_files_with_or_without_folders(tmp_path, cassette_model, ids, names, found):
    out, path = regions(tmp_path / "out", ids), written(tmp_path / "captions.json", captioned_files(names))
    source = CaptionSource([path], out, str(cassette_model), CaptionOptions())
    assert source.build["image_names"] == found


def captioned_files(names):
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names, 90)],
        "annotations": [{"image_id": number, "caption": "A dog."} for number in range(90, 90 + len(names))],
    }


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["91", "92", "90"], "of image 90 .91.jpg. it has '90', its id and '91', its file_name without ending, as two"),
        (["90", "91", "92"], None),
        (["5", "7", "8", "90"], None),  # a number that meets an id by chance
    ],
)
def test_ids_that_only_count_are_not_taken_for_file_names(tmp_path, cassette_model, names, told):
    """Files 90.jpg to 92.jpg in another order: each caption got the regions of another image."""
    out = regions(tmp_path / "out", names)
    path = written(tmp_path / "captions.json", captioned_files([f"{name}.jpg" for name in names]))
    with nullcontext() if told is None else pytest.raises(XdscaleError, match=told):
        CaptionSource([path], out, str(cassette_model), CaptionOptions())


@pytest.mark.parametrize("id", ["1.jpg", "1"])
def test_files_of_two_folders_are_not_one_image(tmp_path, cassette_model, id):
    """The dog's regions would be the cat's, too."""
    out = regions(tmp_path / "out", [id, "2"])
    path = written(tmp_path / "captions.json", captioned_files(["dogs/1.jpg", "cats/1.jpg"]))
    with pytest.raises(XdscaleError, match=f"'dogs/1.jpg' and 'cats/1.jpg' would both be its image '{id}'; make it ag"):
        CaptionSource([path], out, str(cassette_model), CaptionOptions())


def test_accents_that_macos_writes_otherwise_are_told(tmp_path, cassette_model):
    """Which look alike."""
    out = regions(tmp_path / "out", [unicodedata.normalize("NFD", "café")])
    path = written(tmp_path / "captions.json", captioned_files([unicodedata.normalize("NFC", "café.jpg")]))
    told = r"no image 'café\.jpg', '90', 'café' or '000000000090', as the first one may be called; "
    told += r"it has 'cafe\\u0301' for 'caf\\xe9\.jpg', its letters in another form of Unicode: name images as it does"
    with pytest.raises(XdscaleError, match=told):
        CaptionSource([path], out, str(cassette_model), CaptionOptions())


def test_captions_beside_other_regions_are_told(run, dataset, tmp_path):
    run(written(tmp_path / "captions.json", entries(1, IMAGES)))
    manifest = Manifest.load(dataset)
    assert CaptionBuild.of(manifest).image_names == "file_name without ending"
    values = json.loads((dataset / "dataset.json").read_text())
    values["tables"]["regions"]["build"]["region_order"] = "another"
    (dataset / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match="built beside another table of regions"):
        CaptionBuild.of(Table(dataset, "train", "captions").manifest)
