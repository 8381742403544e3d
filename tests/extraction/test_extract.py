"""The table of extracted regions: the same bytes after a kill, whatever lay beside an image, with bad images told."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from xdscale.errors import XdscaleError
from xdscale.extraction import extract as extracting
from xdscale.extraction.backbone import Backbone
from xdscale.extraction.pictures import find_pictures
from xdscale.shards.manifest import Manifest
from xdscale.shards.verify import verify_shards

NETWORK = "timm:test_resnet"


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_killed_it_goes_on_with_the_same_bytes(extract, photographs, tmp_path, monkeypatch):
    whole = extract(photographs, NETWORK, "whole", boxes="grid:2x2")
    assert len(whole) == 7
    child = os.fork()
    if not child:
        asked, call = [], Backbone.__call__

        def killed(self, images, boxes):
            asked.append(1)
            if len(asked) == 5:  # the first image, two batches of the first shard, then within the second
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, images, boxes)

        monkeypatch.setattr(Backbone, "__call__", killed)
        extract(photographs, NETWORK, "killed", boxes="grid:2x2")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = shards_of(tmp_path / "killed")
    assert 1 <= len(left) < 3
    run = []
    call = Backbone.__call__
    monkeypatch.setattr(Backbone, "__call__", lambda *args: run.append(len(args[1])) or call(*args))
    extract(photographs, NETWORK, "killed", boxes="grid:2x2")
    assert sum(run) == 1 + 7 - 3 * len(left)  # the first image says what the table looks like
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    verify_shards(tmp_path / "killed")


def test_images_of_one_name_are_refused_before_a_network_is_made(extract, photographs, tmp_path, monkeypatch):
    twice = [shutil.copytree(photographs, tmp_path / name) for name in ("one", "two")]
    name = "COCO_val2014_000000000004.png"
    (tmp_path / "boxes.json").write_text(json.dumps({name: {"boxes": [[0, 0, 5, 5]]}}))
    monkeypatch.setattr(extracting, "ExtractedImages", None)
    both = rf"^{twice[0] / name} and {twice[1] / name}: both would have the boxes of '{name}'"
    with pytest.raises(XdscaleError, match=both):
        extract(tmp_path, NETWORK, boxes=str(tmp_path / "boxes.json"), ids="path")


def test_neighbours_do_not_change_an_image(extract, photographs):
    together = extract(photographs, NETWORK, "together", boxes="grid:2x2")
    alone = extract(photographs / "COCO_val2014_000000000004.png", NETWORK, "alone", boxes="grid:2x2")
    rows = together.rows(["COCO_val2014_000000000004"])
    one, other = (np.asarray(part, np.float32) for part in (together.read(rows).features, alone.read([0]).features))
    assert np.allclose(one, other, rtol=2e-3, atol=1e-4)


def test_workers_give_the_same_bytes(extract, photographs, tmp_path):
    extract(photographs, NETWORK, "one", boxes="grid:2x2")
    extract(photographs, NETWORK, "two", boxes="grid:2x2", workers=2)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


def test_a_bad_image_is_refused_or_left_out(extract, photographs, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torn = folder / "COCO_val2014_000000000005.png"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(XdscaleError, match="COCO_val2014_000000000005.png: not a readable image"):
        extract(folder, NETWORK, boxes="grid:2x2")
    table = extract(folder, NETWORK, "rest", boxes="grid:2x2", bad_images="skip")
    assert len(table) == 6
    assert "warning: left out: " + str(torn) in capsys.readouterr().err


def test_small_images_and_stored_files(extract, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 1), (200, 3, 3)).save(tmp_path / "images" / "dot.jpg")
    Image.new("L", (500, 2), 77).save(tmp_path / "images" / "line.jpg")
    table = extract(tmp_path / "images", NETWORK, boxes="grid:1x2", store_images=True, ids="name")
    assert table.image_ids(np.arange(2)) == ["dot.jpg", "line.jpg"]
    regions = table.read(np.arange(2))
    assert regions.sizes.tolist() == [[1, 1], [500, 2]]
    assert np.isfinite(regions.features).all()
    stored = table.table.read_ragged("jpeg", np.array([1])).values.tobytes()
    assert stored == (tmp_path / "images" / "line.jpg").read_bytes()


def test_a_stored_image_that_is_no_jpeg_is_refused_or_left_out(extract, tmp_path, capsys):
    """Whatever its name says: of images from the web some always are of another kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.effect_noise((30, 20), 50)
    image.save(folder / "one.jpg")
    image.save(folder / "two.jpg", "PNG")
    with pytest.raises(XdscaleError, match=r"two\.jpg: is no JPEG, .* \(--store-images\); .* --bad-images skip"):
        extract(folder, NETWORK, boxes="grid:1x2", store_images=True)
    assert not (tmp_path / "table" / "dataset.json").exists()
    table = extract(folder, NETWORK, "rest", boxes="grid:1x2", store_images=True, bad_images="skip")
    assert table.image_ids(np.arange(len(table))) == ["one"]
    assert f"warning: left out: {folder / 'two.jpg'}: is no JPEG" in capsys.readouterr().err
    assert len(extract(folder, NETWORK, "both", boxes="grid:1x2")) == 2


@pytest.mark.parametrize(("sample", "asked"), [(64, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 2, 4])])
def test_standardized_features(extract, photographs, monkeypatch, sample, asked):
    """By means and deviations of all images, or where they are many of some that lie evenly among them."""
    monkeypatch.setattr(extracting, "SAMPLE", sample)
    plain, scaled = (
        extract(photographs, NETWORK, name, boxes="grid:2x2", standardize=name == "scaled")
        for name in ("plain", "scaled")
    )
    one, other = (np.asarray(table.read(np.arange(7)).features, np.float32) for table in (plain, scaled))
    some = one.reshape(7, 4, -1)[asked].reshape(4 * len(asked), -1)
    varies = some.std(0) > 1e-2  # of the others half precision keeps too little to compare
    assert varies.sum() > 20
    expected = (one - some.mean(0)) / np.where(varies, some.std(0), 1)
    assert np.allclose(expected[:, varies], other[:, varies], atol=5e-2)
    if len(asked) == 7:
        assert np.allclose(other.mean(0), 0, atol=1e-2)
    assert plain.build.detector.settings["standardized"] is None
    assert len(scaled.build.detector.settings["standardized"]) == 64


def test_another_image_or_box_is_another_table(extract, photographs, tmp_path):
    boxes = {path.stem: {"boxes": [[0, 0, 30, 40]], "scores": [0.5]} for path in photographs.iterdir()}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    table = extract(photographs, NETWORK, boxes=str(path))
    assert table.read(np.arange(7)).confidences.tolist() == [0.5] * 7
    path.write_text(json.dumps(boxes | {"COCO_val2014_000000000001": {"boxes": [[0, 0, 31, 40]], "scores": [0.5]}}))
    with pytest.raises(XdscaleError, match="holds a dataset"):
        extract(photographs, NETWORK, boxes=str(path))
    build = Manifest.load(tmp_path / "table").tables["regions"].build
    assert [entry["name"] for entry in build["inputs"]] == ["7 images", "boxes.json"]


def test_how_far_it_is_is_told_in_bytes_of_all_images(photographs):
    pictures = find_pictures([str(photographs)], "stem")
    images = extracting.ExtractedImages(pictures, extracting.ExtractOptions(NETWORK, "random"), None, 3)
    sizes = np.cumsum([path.stat().st_size for path in sorted(photographs.iterdir())])
    assert [read for _, read in images.units(1)] == sizes[[2, 5, 6]].tolist()
    assert images.total_bytes == sizes[-1]
