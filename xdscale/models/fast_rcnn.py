"""ResNets that see regions, and the branch of Fast R-CNN that VL-BERT tunes along (spec VL-BERT §1.4)."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import roi_align

from xdscale.weights import read_state_dict, require_fitting, require_numbers

STRIDE = 16
"""Pixels for each place of C4's map."""
FEATURES = 2048
"""Numbers of what is seen in a box."""
RESNET_101 = (3, 4, 23, 3)
"""Blocks of each of its stages."""


class FixedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics that it has, which stay as wide as they were loaded where states are narrow.

    DeepSpeed narrows parameters and leaves buffers as they are, which PyTorch's own does not take.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalises states [n, channels, height, width]."""
        mean, variance = self.running_mean, self.running_var
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(states, mean, variance, weight, bias, eps=self.eps)


class RegionResNet(nn.Module):
    """ResNet as the Caffe of its time has it, up to C4 on an image and C5 on each region, with RoIAlign between them.

    The stride stands in the 1×1 convolutions; C5 has none. BatchNorm keeps its statistics, in training too.

    Args:
        blocks: of each stage.
        width: of the 3×3 convolutions of the first stage; those of later ones are two, four and eight times as wide.

    Attributes:
        like: the ResNet of those who published it, for messages.
        places: of a region along each side.
        samples: of each place along each side; 0 for as many as the region is large.
        dilation: of C5.
    """

    like: ClassVar[str]
    places: ClassVar[int]
    samples: ClassVar[int]
    dilation: ClassVar[int]

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.name = f"resnet{3 * sum(blocks) + 2}"
        # Else random weights let states grow 2^16 times.
        net = ResNet(
            Bottleneck, list(blocks), zero_init_residual=True, width_per_group=width, norm_layer=FixedBatchNorm
        )
        for layer in (net.layer2, net.layer3, net.layer4):
            first = layer[0]
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        for block in net.layer4:
            block.conv1.stride = (1, 1)
            block.conv2.dilation = block.conv2.padding = (self.dilation, self.dilation)
        net.layer4[0].downsample[0].stride = (1, 1)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.train()

    def train(self, mode: bool = True) -> "RegionResNet":
        """Sets the mode of all but BatchNorm, whose statistics are never those of a batch."""
        super().train(mode)
        for norm in self.norms():
            norm.eval()
        return self

    def norms(self) -> list[nn.Module]:
        """Returns every BatchNorm."""
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def aligned(self, images: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns of each box of each image C4 at its places: [boxes of all, 1024, places, places].

        Each image is computed by itself, so that none depends on the others.

        Args:
            images: of each [3, height, width].
            boxes: of each fp32 [k, 4], in its pixels: left, top, right, bottom.
        """
        dtype = self.conv1.weight.dtype
        return torch.cat([self._aligned(image.to(dtype), mine) for image, mine in zip(images, boxes, strict=True)])

    def _aligned(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        states = self.maxpool(self.relu(self.bn1(self.conv1(image.unsqueeze(0)))))
        states = self.layer3(self.layer2(self.layer1(states)))
        wide = torch.promote_types(states.dtype, torch.float32)  # coordinates are not for half precision
        found = roi_align(states.to(wide), [boxes.to(wide)], self.places, 1 / STRIDE, sampling_ratio=self.samples)
        return found.to(states.dtype)


_Trunk = TypeVar("_Trunk", bound=RegionResNet)


class FastRCNN(RegionResNet):
    """VL-BERT's ResNet-101, whose C5 is dilated, with a mean over each region's places.

    Its first two stages and all BatchNorm stay as they are, in training too.

    Args:
        blocks: of each stage, for a ResNet of another depth.
        width: see `RegionResNet`.

    Attributes:
        masks_at: what of C5 the masks of objects are multiplied with: its "input" or its "output", as in the release.
    """

    like, places, samples, dilation = "ResNet-101", 14, 1, 2
    masks_at: Literal["input", "output"] = "output"

    def __init__(self, blocks: Sequence[int] = RESNET_101, width: int = 64) -> None:
        super().__init__(blocks, width)
        for frozen in (self.conv1, self.layer1, *self.norms()):
            frozen.requires_grad_(False)

    def forward(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Computes what is seen in each box of each image.

        Args:
            images: of each [3, height, width]: blue, green, red, less the mean of each, 0 where nothing is to be seen.
            boxes: of each fp32 [k, 4], in its pixels: left, top, right, bottom.
            masks: of each bool [k, 14, 14], the places of each box that count; None for all.

        Returns:
            [boxes of all, 2048].
        """
        states, at = self.aligned(images, boxes), None if masks is None else self.masks_at
        shown = None if masks is None else torch.cat(list(masks)).unsqueeze(1)
        states = self.layer4(states * shown if at == "input" else states)
        return (states * shown if at == "output" else states).mean((2, 3))


def features_of(trunk: RegionResNet, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Computes what is seen in each box of a batch's pictures, in their order: [boxes of all, width].

    Args:
        trunk: the branch.
        batch: with `picture_i`, `boxes_i` and perhaps `masks_i` and `classes_i` of each picture i, as collators make
            them.
    """
    numbers = range(sum(name.startswith("picture_") for name in batch))
    kinds = [kind for kind in ("picture", "boxes", "masks", "classes") if f"{kind}_0" in batch]
    return trunk(*([batch[f"{kind}_{number}"] for number in numbers] for kind in kinds))


def with_features(trunk: RegionResNet | None, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Returns a task's batch with the features of its inputs' regions, computed where a branch is tuned along.

    Args:
        trunk: the branch; None where features were read.
        batch: as `features_of`, with `feature_rows` int64 [total]: which of all boxes each region of an input is.
    """
    if trunk is None:
        return batch
    return {**batch, "features": features_of(trunk, batch).index_select(0, batch["feature_rows"])}


def load_fast_rcnn(path: Path | None) -> FastRCNN:
    """Builds the branch, with weights under torchvision's names: the release's `resnet101-pt-vgbua-0000.model`.

    Args:
        path: the file, which may be of a ResNet of another depth or width; None for random weights.

    Raises:
        XdscaleError: it cannot be read, or holds no such ResNet.
    """
    if path is None:
        return FastRCNN()
    state = read_state_dict(path)
    return load_resnet(functools.partial(FastRCNN, *resnet_shape(state)), state, path)


def load_resnet(
    build: Callable[[], _Trunk], state: Mapping[str, torch.Tensor], path: Path, new: tuple[str, ...] = ()
) -> _Trunk:
    """Builds a ResNet with a file's weights, in fp32.

    Args:
        build: makes one of the shape that the file has.
        state: what the file holds.
        path: the file, for messages.
        new: what the names of parameters begin with that the file need not have.

    Raises:
        XdscaleError: it holds no such ResNet.
    """
    with torch.device("meta"):  # what does not fit may be of any size
        outline = build()
    own = outline.state_dict()
    needed = {name: value for name, value in own.items() if "num_batches" not in name and not name.startswith(new)}
    require_fitting(needed, state, path, f"a {outline.like} or its like")
    # Counts of batches, which have no effect, may be of any shape.
    fit = (name for name, value in own.items() if name in state and state[name].shape == value.shape)
    found = {name: state[name].float() for name in fit}
    require_numbers(found, path)
    model = build()
    model.load_state_dict(model.state_dict() | found)
    return model


def resnet_shape(state: Mapping[str, torch.Tensor]) -> tuple[list[int], int]:
    """Returns how many blocks each stage of a file's ResNet has, but one at least, and the width of the first one.

    Of 100 blocks and a width of 256 at most: a few bytes of a file may state any shape.
    """
    found = [re.match(r"layer([1-4])\.(\d{1,2})\.", name) for name in state]
    places = [(int(match[1]), int(match[2])) for match in found if match]
    blocks = [1 + max((block for stage, block in places if stage == wanted), default=0) for wanted in range(1, 5)]
    first = state.get("layer1.0.conv2.weight")
    width = 0 if first is None or first.ndim != 4 else len(first)
    return blocks, width if 0 < width <= 256 else 64
