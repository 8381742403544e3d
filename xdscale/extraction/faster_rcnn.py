"""torchvision's Faster R-CNN: regions as bottom-up attention chooses them, with features of the box head.

A region is a proposal of the first stage, before regression: what was pooled is what the box shows, as in the features
of Anderson et al. 2018. Its confidence is the highest class score that survives suppression among the same class.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import nms

from xdscale.extraction.contract import PUBLISHED, RANDOM, Choice, Found, built, load_weights, numpy
from xdscale.names import resolve_path
from xdscale.shards.regions import Detector
from xdscale.weights import read_state_dict

SUPPRESSION_IOU = 0.3
BACKGROUND = 0


class FasterRcnn:
    """One of torchvision's Faster R-CNN models.

    Args:
        name: as `torchvision.models.detection` has it.
        weights: file, "hub" or "random".
        choice: which regions are kept.
        device: where it computes.
    """

    def __init__(self, name: str, weights: str, choice: Choice, device: torch.device) -> None:
        published: Any = "DEFAULT" if weights == PUBLISHED else None
        # Backbones and heads as published, also where the weights come from a file.
        model = built(
            name,
            torchvision.models.get_model,
            name,
            weights=published,
            weights_backbone=None,
            num_classes=_classes_in(weights),
        )
        sha256 = load_weights(model, weights, f"torchvision's {name}")
        coco = torchvision.models.get_model_weights(name).DEFAULT
        if weights == PUBLISHED or sha256.startswith(coco.url.rpartition("-")[2].removesuffix(".pth")):
            names = coco.meta["categories"]
            if name == "fasterrcnn_resnet50_fpn":  # as torchvision does where it loads these weights itself
                overwrite_eps(model, 0.0)
        else:
            names = []
        self._model = model.eval().to(device)
        self._choice = choice
        classes = model.roi_heads.box_predictor.cls_score.out_features
        self.detector = Detector(
            model=f"torchvision:{name}",
            sha256=sha256,
            classes=list(names),
            class_count=classes,
            background=BACKGROUND,
            settings={"boxes": "proposals, before regression", "suppression_iou": SUPPRESSION_IOU} | choice._asdict(),
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None) -> list[Found]:
        """Returns the regions of images; see `Network`."""
        model = self._model
        size = tuple(images.shape[-2:])
        batch, _ = model.transform(list(images.float() / 255))
        maps = model.backbone(batch.tensors)
        inner = batch.image_sizes
        if boxes is None:
            proposals, _ = model.rpn(batch, maps)
            whole = torch.tensor([[0.0, 0.0, inner[0][1], inner[0][0]]], device=images.device)
            proposals = [found if len(found) else whole for found in proposals]
        else:
            proposals = [resize_boxes(given, size, inner[0]) for given in boxes]
        heads = model.roi_heads
        features = heads.box_head(heads.box_roi_pool(maps, proposals, inner))
        probs = heads.box_predictor(features)[0].softmax(-1)
        counts = [len(found) for found in proposals]
        parts = zip(proposals, features.split(counts), probs.split(counts))
        found = []
        for place, (inside, feature, prob) in enumerate(parts):
            if boxes is None:
                confidences = surviving_scores(inside, prob[:, BACKGROUND + 1 :])
                kept = self._choice.of(confidences)
                regions = resize_boxes(inside[kept], inner[0], size)
                found.append(_found(regions, feature[kept], prob[kept], confidences[kept]))
            else:
                found.append(_found(boxes[place], feature, prob, None))
        return found


def _classes_in(weights: str) -> int:
    """Returns how many classes weights are for, background among them; COCO's 91 of published and random ones."""
    if weights in (PUBLISHED, RANDOM):
        return 91
    scores = read_state_dict(resolve_path(weights)).get("roi_heads.box_predictor.cls_score.bias")
    return 91 if scores is None else len(scores)  # without it, the weights are refused with what they lack


def surviving_scores(boxes: Tensor, scores: Tensor) -> Tensor:
    """Returns each box's highest score among the classes in which no better box suppresses it: [n].

    Args:
        boxes: [n, 4].
        scores: [n, classes], without background.
    """
    best = torch.zeros(len(boxes), device=boxes.device)
    for scores_of_class in scores.unbind(1):
        kept = nms(boxes, scores_of_class, SUPPRESSION_IOU)
        best[kept] = torch.maximum(best[kept], scores_of_class[kept])
    return best


def _found(boxes: Tensor, features: Tensor, probs: Tensor, confidences: Tensor | None) -> Found:
    objects = probs[:, BACKGROUND + 1 :].argmax(1) + BACKGROUND + 1
    return Found(
        numpy(boxes),
        numpy(features),
        numpy(probs),
        None if confidences is None else numpy(confidences),
        objects.cpu().numpy(),
    )
