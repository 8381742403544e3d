"""Regions as VL-BERT's release sees them: its scaling, its colours and its network (spec VL-BERT §1.4)."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet101

from xdscale.data.pictures import scaled_size
from xdscale.errors import XdscaleError
from xdscale.extraction.fast_rcnn_backbone import FastRCNNBackbone
from xdscale.models.fast_rcnn import load_fast_rcnn
from xdscale.shards.regions import Detector
from xdscale.weights import weights_sha256

MEANS = np.array([102.9801, 115.9465, 122.7717], np.float32)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((640, 480), (800, 600)), ((480, 640), (600, 800)), ((1200, 400), (999, 333)), ((600, 900), (600, 900)),
     ((500, 500), (600, 600)), ((300, 600), (500, 1000)), ((1, 2500), (1, 1000)), ((2500, 1), (1000, 1))],
)  # fmt: skip
def test_the_shorter_side_is_scaled_unless_the_longer_one_gets_too_long(size, scaled):
    assert scaled_size(*size, 600, 1000) == scaled


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the release's, which holds a classifier too."""
    torch.manual_seed(5)
    net = resnet101(weights=None, num_classes=3)
    for name, parameter in net.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.uniform_(parameter, 0.1, 0.4)
    path = tmp_path_factory.mktemp("weights") / "resnet101-pt-vgbua-0000.model"
    torch.save(net.state_dict(), path)
    return path


def test_features_are_those_of_the_scaled_image_in_blue_green_and_red(extract, photographs, weights):
    """Scaled by Pillow, as the release does, which rounds to whole numbers."""
    names = [photographs / f"COCO_val2014_{number:012}.png" for number in (1, 2)]
    table = extract(names, "vlbert:resnet101", boxes="grid:1x2", weights=str(weights), short_side=32, whole_image=True)
    assert (table.width, table.build.whole_image) == (2048, "first")
    assert table.build.detector == Detector(
        model="vlbert:resnet101",
        sha256=weights_sha256([weights]),
        settings={
            "short_side": 32,
            "long_side": 1000,
            "pooling": "RoIAlign 14 × 14 of C4, one sample each, then C5, mean",
            "mean_bgr": MEANS.tolist(),
            "given_boxes": True,
            "standardized": None,
            "batch": 8,
        },
    )
    model = load_fast_rcnn(weights).eval()
    regions = table.read(np.arange(2))
    for path, first, end in zip(names, regions.offsets, regions.offsets[1:]):
        image = Image.open(path).convert("RGB")
        size = scaled_size(*image.size, 32, 1000)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)[:, :, ::-1] - MEANS
        ratios = np.tile(np.array(size) / image.size, 2)
        boxes = np.clip(regions.boxes[first:end] * ratios, 0, np.tile(np.array(size) - 1, 2)).astype(np.float32)
        with torch.no_grad():
            wanted = model([torch.from_numpy(pixels.transpose(2, 0, 1).copy())], [torch.from_numpy(boxes)]).numpy()
        found = regions.features[first:end].astype(np.float32)
        assert len(found) == 3
        assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
        turned = pixels[:, :, ::-1]
        with torch.no_grad():
            other = model([torch.from_numpy(turned.transpose(2, 0, 1).copy())], [torch.from_numpy(boxes)]).numpy()
        assert np.linalg.norm(found - other) > 0.05 * np.linalg.norm(wanted)


def test_boxes_end_at_the_last_pixel_of_the_scaled_image():
    """As the release cuts them: one less than the sides."""
    given, seen = torch.tensor([[-3.0, 2, 30, 10], [0, 0, 50, 20]]), []
    backbone = object.__new__(FastRCNNBackbone)
    backbone._short_side = 40
    backbone._model = lambda images, boxes: seen.extend(boxes) or torch.zeros(2, 1)
    (found,) = backbone(torch.zeros(1, 3, 20, 50, dtype=torch.uint8), [given])
    assert seen[0].tolist() == [[0, 4, 60, 20], [0, 0, 99, 39]]
    assert found.boxes.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boxes": "grid:2x2", "weights": "hub"}, "nobody offers its weights for download here; give --weights FILE"),
        ({"boxes": "grid:2x2", "stage": "layer3"}, "--stage layer3: vlbert:resnet101 has one feature map"),
        ({}, "vlbert:resnet101 finds no regions"),
        ({"boxes": "grid:2x2", "weights": "nowhere.model"}, "nowhere.model"),
    ],
)
def test_what_does_not_go_together_is_refused(extract, photographs, options, words):
    with pytest.raises(XdscaleError, match=words):
        extract(photographs, "vlbert:resnet101", **options)


def test_a_name_that_is_not_that_of_the_weights_is_refused(extract, photographs, weights):
    with pytest.raises(XdscaleError, match=r"are those of a resnet101: --network vlbert:resnet101"):
        extract(photographs, "vlbert:resnet50", boxes="grid:2x2", weights=str(weights))


def test_where_nobody_says_images_are_scaled_as_the_release_does(weights):
    """cfgs/…/SCALES: (600, 1000)."""
    settings = FastRCNNBackbone("resnet101", str(weights), torch.device("cpu")).detector.settings
    assert (settings["short_side"], settings["long_side"]) == (600, 1000)
