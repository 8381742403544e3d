"""A network for whole images, of timm or torchvision, whose feature map is pooled over given boxes.

RoIAlign with as many samples as the map has cells: a box that covers whole cells, in multiples of the bins, gets the
mean of exactly these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from xdscale.errors import XdscaleError
from xdscale.extraction.contract import PUBLISHED, Found, built, load_weights, normalized, numpy
from xdscale.files import one_line
from xdscale.shards.regions import Detector

BINS = 7
"""Of a side of each box; their mean is the feature."""
MULTIPLE = 32
"""Images are padded with zeros to multiples of so many pixels, so that strides divide them."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Pool = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Backbone:
    """A network that is given its boxes.

    Args:
        library: "timm" or "torchvision".
        name: as the library has it.
        weights: file, "hub" or "random".
        stage: which feature map: of timm the number of a stage, of torchvision the name of a node; by default the last,
            and of timm's convolutional networks with the class distribution.
        short_side: images are scaled so that their shorter side has so many pixels.
        device: where it computes.
    """

    def __init__(
        self,
        library: str,
        name: str,
        weights: str,
        device: torch.device,
        *,
        stage: str | None = None,
        short_side: int | None = None,
    ) -> None:
        self._name = f"{library}:{name}"
        self._short_side = short_side
        (mean, std), model, self._map, self._pool = (_timm if library == "timm" else _torchvision)(name, weights, stage)
        self._normalization = mean, std
        classes = getattr(model, "num_classes", 0) if self._pool is not _mean else 0
        self.detector = Detector(
            model=self._name,
            sha256=load_weights(model, weights, self._name),
            class_count=classes,
            settings={
                "stage": stage or "last",
                "short_side": short_side,
                "pooling": f"RoIAlign {BINS} × {BINS}, aligned, mean",
                "mean": list(mean),
                "std": list(std),
            },
        )
        model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None) -> list[Found]:
        """Returns features of the given boxes; see `Network`."""
        height, width = images.shape[-2:]
        inputs = normalized(images, *self._normalization)
        if self._short_side is not None:
            factor = self._short_side / min(height, width)
            inner = (max(1, round(height * factor)), max(1, round(width * factor)))
            inputs = functional.interpolate(inputs, inner, mode="bilinear", antialias=True)
        down, across = inputs.shape[-2:]
        inputs = functional.pad(inputs, (0, -across % MULTIPLE, 0, -down % MULTIPLE))
        try:
            maps = self._map(inputs)
        except Exception as error:  # networks for one size alone say so in many ways
            raise XdscaleError(
                f"{self._name}: cannot read images of {width} × {height}: {one_line(error)}; other networks can, or "
                "--short-side scales images"
            ) from None
        # Of pixels to cells of the map: the image may be scaled, and is padded.
        scale = [
            across / width * maps.shape[-1] / inputs.shape[-1],
            down / height * maps.shape[-2] / inputs.shape[-2],
        ]
        cells = [given * torch.tensor(scale * 2, device=given.device) for given in boxes]
        pooled, probs = self._pool(roi_align(maps, cells, BINS, sampling_ratio=0, aligned=True))
        counts = [len(given) for given in boxes]
        each = [None] * len(counts) if probs is None else [numpy(part) for part in probs.split(counts)]
        return [Found(numpy(given), numpy(part), prob) for given, part, prob in zip(boxes, pooled.split(counts), each)]


def _mean(regions: Tensor) -> tuple[Tensor, None]:
    return regions.mean((2, 3)), None


def _timm(name: str, weights: str, stage: str | None) -> tuple[Any, nn.Module, Callable[[Tensor], Tensor], Pool]:
    import timm

    model = built(f"timm:{name}", timm.create_model, name, pretrained=weights == PUBLISHED)
    form = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    count = len(getattr(model, "feature_info", []))
    if stage is not None and not (stage.isdigit() and int(stage) < count):
        raise XdscaleError(f"timm:{name}: --stage {stage}: expected a number from 0 to {count - 1}")
    if stage is None and _ends_in_a_map(model):

        def classified(regions: Tensor) -> tuple[Tensor, Tensor]:
            features = model.forward_head(regions, pre_logits=True)
            return features, model.get_classifier()(features).softmax(-1)

        return form, model, model.forward_features, classified
    place = count - 1 if stage is None else int(stage)

    def chosen(images: Tensor) -> Tensor:
        return model.forward_intermediates(images, indices=[place], intermediates_only=True, stop_early=True)[0]

    return form, model, chosen, _mean


@torch.inference_mode()
def _ends_in_a_map(model: nn.Module) -> bool:
    """Returns whether the classifier stands on a map of channels, as in convolutional networks, so can take regions."""
    try:
        found = model.eval().forward_features(torch.zeros(1, 3, 64, 64))
    except Exception:  # a network for one size alone; what it says of real images is told then
        return False
    return found.ndim == 4 and found.shape[1] == model.num_features


def _torchvision(name: str, weights: str, stage: str | None) -> tuple[Any, nn.Module, Callable[[Tensor], Tensor], Pool]:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    published = "DEFAULT" if weights == PUBLISHED else None
    model = built(f"torchvision:{name}", torchvision.models.get_model, name, weights=published)
    node = stage or next((child for child in ("layer4", "features") if hasattr(model, child)), None)
    if node is None:
        raise XdscaleError(f"torchvision:{name}: say with --stage which of its nodes gives the feature map")
    trunk: list[nn.Module] = []

    def mapped(images: Tensor) -> Tensor:
        if not trunk:  # when the weights are there
            trunk.append(create_feature_extractor(model, {node: "map"}).eval())
        return trunk[0](images)["map"]

    return _IMAGENET, model, mapped, _mean
