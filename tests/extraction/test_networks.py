"""Regions equal what the libraries give when they are run by hand, and what pooling by definition gives."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torchvision.ops import box_iou
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from xdscale.errors import XdscaleError
from xdscale.extraction.contract import Choice, load_weights, state_sha256
from xdscale.extraction.faster_rcnn import surviving_scores
from xdscale.shards.regions import Detector
from xdscale.weights import weights_sha256

DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def files_of(table, folder):
    return [folder / f"{name}.png" for name in table.image_ids(np.arange(len(table)))]


def each(table):
    regions = table.read(np.arange(len(table)))
    for first, end in zip(regions.offsets, regions.offsets[1:]):
        yield tuple(torch.from_numpy(np.array(part[first:end])).float() for part in regions[:3])


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory):
    """A detector with weights in a file, whose box head takes much from the images."""
    torch.manual_seed(3)
    model = torchvision.models.get_model(DETECTOR, weights=None, weights_backbone=None, num_classes=7).eval()
    path = tmp_path_factory.mktemp("weights") / "detector.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_faster_rcnn_gives_what_torchvision_gives_by_hand(extract, photographs, faster_rcnn):
    model, weights = faster_rcnn
    found = []
    hooks = [
        model.rpn.register_forward_hook(lambda module, args, result: found.append(result[0])),
        model.roi_heads.box_head.register_forward_hook(lambda module, args, result: found.append(result)),
        model.roi_heads.box_predictor.register_forward_hook(lambda module, args, result: found.append(result[0])),
    ]
    table = extract(photographs, f"torchvision:{DETECTOR}", weights=str(weights), fewest=4, most=9, threshold=0.15)
    probabilities = np.split(table.class_probs(np.arange(len(table))), table.read(np.arange(len(table))).offsets[1:-1])
    for path, (boxes, features, confidences), probs in zip(
        files_of(table, photographs), [(b, f, c) for f, b, c in each(table)], probabilities
    ):
        found.clear()
        image = pixels_of(path) / 255
        with torch.no_grad():
            model([image])
        (proposals,), states, logits = found
        inner = model.transform([image])[0].image_sizes[0]
        scale = torch.tensor([image.shape[2] / inner[1], image.shape[1] / inner[0]] * 2)
        place = torch.cdist(boxes, proposals * scale, p=math.inf).min(1)
        assert place.values.max() < 1e-3
        assert torch.allclose(features, states[place.indices], atol=2e-3, rtol=2e-3)  # half precision
        expected = logits.softmax(1)[place.indices]
        assert np.allclose(probs, expected, atol=2e-3)
        assert 4 <= len(boxes) <= 9
        assert (confidences.diff() <= 0).all()
        assert (confidences <= expected[:, 1:].max(1).values + 1e-6).all()
    for hook in hooks:
        hook.remove()
    detector = table.build.detector
    assert detector == Detector(
        model=f"torchvision:{DETECTOR}",
        sha256=weights_sha256([weights]),
        class_count=7,
        background=0,
        settings={
            "boxes": "proposals, before regression",
            "suppression_iou": 0.3,
            "threshold": 0.15,
            "fewest": 4,
            "most": 9,
            "given_boxes": False,
            "standardized": None,
            "batch": 8,
        },
    )
    assert (table.build.region_order, table.build.whole_image) == ("confidence", "none")
    assert table.build.options == {"ids": "stem", "bad_images": "refuse"}


def test_given_boxes_go_through_the_box_head(extract, photographs, faster_rcnn):
    model, weights = faster_rcnn
    table = extract(photographs, f"torchvision:{DETECTOR}", weights=str(weights), boxes="grid:2x2", whole_image=True)
    for path, (features, boxes, _) in zip(files_of(table, photographs), each(table)):
        image = pixels_of(path) / 255
        assert boxes[0].tolist() == [0, 0, image.shape[2], image.shape[1]]
        with torch.no_grad():
            batch, targets = model.transform([image], [{"boxes": boxes.clone()}])
            maps = model.backbone(batch.tensors)
            pooled = model.roi_heads.box_roi_pool(maps, [targets[0]["boxes"]], batch.image_sizes)
            expected = model.roi_heads.box_head(pooled)
        assert torch.allclose(features, expected, atol=2e-3, rtol=2e-3)
    assert table.build.whole_image == "first"


def test_suppression_among_one_class_and_choice():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 9, 10]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.05, 0.05], [0.1, 0.2]])
    best = surviving_scores(boxes, scores)
    # By the rule itself: a score counts unless a better one of its class overlaps it by more than .3.
    expected = [
        max(
            [0.0]
            + [
                float(scores[box, kind])
                for kind in range(2)
                if not ((box_iou(boxes, boxes)[box] > 0.3) & (scores[:, kind] > scores[box, kind])).any()
            ]
        )
        for box in range(4)
    ]
    assert best.tolist() == pytest.approx(expected)
    assert Choice(0.2, 1, 3).of(torch.tensor([0.1, 0.5, 0.3, 0.2, 0.9])).tolist() == [4, 1, 2]
    assert Choice(0.2, 1, 9).of(torch.tensor([0.1, 0.5, 0.3, 0.2, 0.9])).tolist() == [4, 1, 2, 3]
    assert Choice(0.6, 3, 9).of(torch.tensor([0.1, 0.5, 0.3, 0.2, 0.9])).tolist() == [4, 1, 2]
    assert Choice(0.6, 9, 9).of(torch.tensor([0.1, 0.9])).tolist() == [1, 0]


def test_a_box_of_whole_cells_is_the_mean_of_its_crop(extract, photographs, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    image = pixels_of(photographs / "COCO_val2014_000000000001.png")  # 96 × 64
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        maps = model.forward_intermediates(((image / 255 - mean) / std)[None], indices=[0], intermediates_only=True)[0][
            0
        ]
    stride = 96 // maps.shape[-1]
    across, down, side = 2, 1, 7
    box = [across * stride, down * stride, (across + side) * stride, (down + side) * stride]
    (tmp_path / "b.json").write_text(f'{{"COCO_val2014_000000000001": {{"boxes": [{box}]}}}}')
    table = extract(
        photographs / "COCO_val2014_000000000001.png",
        "timm:test_resnet",
        boxes=str(tmp_path / "b.json"),
        stage="0",
    )
    expected = maps[:, down : down + side, across : across + side].mean((1, 2))
    ((features, _, _),) = each(table)
    assert torch.allclose(features[0], expected, atol=1e-3, rtol=2e-3)
    detector = table.build.detector
    assert (detector.model, detector.sha256) == ("timm:test_resnet", state_sha256(model))
    assert detector.settings == {
        "stage": "0",
        "short_side": None,
        "pooling": "RoIAlign 7 × 7, aligned, mean",
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
        "given_boxes": True,
        "standardized": None,
        "batch": 8,
    }
    assert (table.build.region_order, table.build.whole_image) == ("source", "none")


def test_the_last_stage_has_the_classifiers_distribution(extract, photographs):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    path = photographs / "COCO_val2014_000000000001.png"
    table = extract(path, "timm:test_resnet", boxes="grid:1x1", short_side=224)  # the map is 7 cells high, and wider
    assert table.build.detector.class_count == 1000
    assert [table.build.detector.settings[name] for name in ("stage", "short_side")] == ["last", 224]
    assert table.width == model.num_features
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = torch.nn.functional.interpolate(
        ((pixels_of(path) / 255 - mean) / std)[None], (224, 336), mode="bilinear", antialias=True
    )
    image = torch.nn.functional.pad(image, (0, 16))
    with torch.no_grad():
        maps = model.forward_features(image)[..., : 336 // 32]
        assert torch.allclose(each_features(table), maps.mean((2, 3)), atol=0.1 * float(maps.std()))


def test_a_scaled_image_shows_all_of_its_pixels(extract, tmp_path):
    """Scaled to a quarter, stripes of two pixels are as grey as they are in the mean, not what single pixels show."""
    stripes = np.full((64, 64, 3), 255, np.uint8)
    stripes[:, ::4] = stripes[:, 3::4] = 0
    for name, pixels in (("grey", stripes * 0 + 128), ("stripes", stripes), ("white", stripes * 0 + 255)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    table = extract(
        [tmp_path / f"{name}.png" for name in ("grey", "stripes", "white")],
        "timm:test_resnet",
        boxes="grid:1x1",
        short_side=16,
    )
    grey, striped, white = (features[0] for features, _, _ in each(table))
    assert (striped - grey).norm() < 0.3 * (white - grey).norm()


def each_features(table):
    return next(iter(each(table)))[0]


@pytest.mark.parametrize("network", ["timm:test_efficientnet", "timm:test_vit", "torchvision:resnet18"])
def test_other_backbones_depend_on_what_the_box_shows(extract, photographs, network):
    names = [photographs / f"COCO_val2014_{number:012}.png" for number in (1, 3)]
    table = extract(names, network, boxes="grid:2x2")
    features = np.asarray(table.read(np.arange(2)).features, np.float32)
    assert features.shape[0] == 8
    assert len(np.unique(features.round(3), axis=0)) == 8


def test_a_detector_of_transformers(extract, photographs, yolos):
    table = extract(photographs, f"transformers:{yolos}", weights="hub", fewest=3, most=6, threshold=0.5)
    model = AutoModelForObjectDetection.from_pretrained(yolos).eval()
    processor = AutoImageProcessor.from_pretrained(yolos)
    for path, (features, boxes, confidences) in zip(files_of(table, photographs), each(table)):
        image = pixels_of(path)
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        size = torch.tensor([image.shape[1:]])
        (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
        order = expected["scores"].argsort(descending=True)[: len(boxes)]
        assert torch.allclose(confidences, expected["scores"][order], atol=1e-5)
        inside = expected["boxes"][order].clamp(min=0).minimum(size.flip(1).repeat(1, 2))
        assert torch.allclose(boxes, inside, atol=1e-3)
        assert torch.allclose(features, outputs.last_hidden_state[0, -12:][order], atol=2e-3, rtol=2e-3)
    assert table.build.detector == Detector(
        model=f"transformers:{yolos.name}",
        sha256=weights_sha256([yolos / "model.safetensors"]),
        classes=[*(model.config.id2label[number] for number in range(5)), "no object"],
        class_count=6,
        background=5,
        settings={
            "architecture": "YolosForObjectDetection",
            "weights": "given",
            "threshold": 0.5,
            "fewest": 3,
            "most": 6,
            "given_boxes": False,
            "standardized": None,
            "batch": 8,
        },
    )
    assert table.build.class_probs == "all"


@pytest.mark.parametrize(
    ("network", "options", "words"),
    [
        ("timm:test_resnett", {"boxes": "grid:2x2"}, "did you mean 'test_resnet'"),
        ("resnet18", {"boxes": "grid:2x2"}, "a colon and a name"),
        ("timm:", {"boxes": "grid:2x2"}, "a colon and a name"),
        ("torchvisio:resnet18", {"boxes": "grid:2x2"}, "did you mean 'torchvision'"),
        ("torchvision:resnett18", {"boxes": "grid:2x2"}, "did you mean 'resnet18'"),
        ("torchvision:fasterrcnn_resnet50_fpnn", {}, "did you mean 'fasterrcnn_resnet50_fpn'"),
        ("vlbert:resnet1011", {"boxes": "grid:2x2"}, "did you mean 'resnet101'"),
        ("vlbert:resnet101", {}, "finds no regions"),
        ("vlbert:resnet101", {"boxes": "grid:2x2", "stage": "1"}, "has one feature map"),
        ("transformers:/nowhere", {"boxes": "grid:2x2"}, "finds its own and cannot take others"),
        ("transformers:/nowhere", {"short_side": 3}, "is a detector"),
        ("torchvision:resnet18", {}, "finds no regions"),
        ("torchvision:resnet18", {"boxes": "grid:2x2", "most": 3}, "--most choose among .*; of --boxes all are taken"),
        ("torchvision:resnet18", {"boxes": "grid:2x2", "stage": "layer9"}, "layer9"),
        ("timm:test_resnet", {"boxes": "grid:2x2", "stage": "99"}, "number from 0 to"),
        (f"torchvision:{DETECTOR}", {"short_side": 3}, "is a detector"),
        (f"torchvision:{DETECTOR}", {"whole_image": True}, "--whole-image"),
        ("transformers:/nowhere", {}, "cannot be built"),
        ("timm:test_resnet", {"boxes": "grid:2x2", "device": "cuda"}, "no GPU"),
        ("timm:vit_tiny_patch16_224", {"boxes": "grid:2x2"}, "cannot read images of 96 × 64"),
        ("timm:test_resnet", {"boxes": "grid:2x2", "weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_what_does_not_go_together_is_refused(extract, photographs, network, options, words):
    with pytest.raises(XdscaleError, match=words):
        extract(photographs, network, **options)


def test_weights_of_another_network_are_refused(extract, photographs, faster_rcnn):
    with pytest.raises(XdscaleError, match="not the weights of torchvision:resnet18: it lacks"):
        extract(photographs, "torchvision:resnet18", boxes="grid:2x2", weights=str(faster_rcnn[1]))


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    norm = torch.nn.BatchNorm1d(3)  # whose count of batches is a whole number
    for value, message in ((torch.ones(3, dtype=torch.int8), "int8, expected floating point"),
                           (torch.full((3,), torch.nan), "not all values are finite")):  # fmt: skip
        torch.save(norm.state_dict() | {"bias": value}, tmp_path / "w.pt")
        with pytest.raises(XdscaleError, match=rf"w\.pt: bias: {message}"):
            load_weights(norm, str(tmp_path / "w.pt"), "norm")
    torch.save(norm.state_dict(), tmp_path / "w.pt")
    load_weights(norm, str(tmp_path / "w.pt"), "norm")
