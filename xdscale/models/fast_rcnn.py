"""The branch of Fast R-CNN that VL-BERT tunes along: from pixels to what is seen in each box (spec VL-BERT §1.4)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import roi_align

from xdscale.errors import XdscaleError
from xdscale.weights import read_state_dict, some

STRIDE = 16
"""Pixels for each place of C4's map."""
FEATURES = 2048
"""Numbers of what is seen in a box."""
BIN = 14
"""Places of a region along each side."""
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


class FastRCNN(nn.Module):
    """ResNet-101 as the Caffe of its time has it: C4 of the image, C5 of each region with RoIAlign, then a mean.

    The stride stands in the 1×1 convolutions; C5 is dilated instead of strided. Its first two stages and all BatchNorm
    stay as they are, in training too.

    Args:
        blocks: of each stage, for a ResNet of another depth.
        width: of the 3×3 convolutions of the first stage; those of later ones are two, four and eight times as wide.

    Attributes:
        masks_at: what of C5 the masks of objects are multiplied with: its "input" or its "output", as in the release.
    """

    masks_at: Literal["input", "output"] = "output"

    def __init__(self, blocks: Sequence[int] = RESNET_101, width: int = 64) -> None:
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
            block.conv2.dilation = block.conv2.padding = (2, 2)
        net.layer4[0].downsample[0].stride = (1, 1)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        for frozen in (self.conv1, self.layer1, *self._norms()):
            frozen.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FastRCNN":
        """Sets the mode of all but BatchNorm, whose statistics are never those of a batch."""
        super().train(mode)
        for norm in self._norms():
            norm.eval()
        return self

    def forward(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Computes what is seen in each box of each image; each image by itself, so that none depends on the others.

        Args:
            images: of each [3, height, width]: blue, green, red, less the mean of each, 0 where nothing is to be seen.
            boxes: of each fp32 [k, 4], in its pixels: left, top, right, bottom.
            masks: of each bool [k, 14, 14], the places of each box that count; None for all.

        Returns:
            [boxes of all, 2048].
        """
        dtype = self.conv1.weight.dtype
        found = [self._aligned(image.to(dtype), mine) for image, mine in zip(images, boxes, strict=True)]
        states, at = torch.cat(found), None if masks is None else self.masks_at
        shown = None if masks is None else torch.cat(list(masks)).unsqueeze(1)
        states = self.layer4(states * shown if at == "input" else states)
        return (states * shown if at == "output" else states).mean((2, 3))

    def _aligned(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Returns of each box C4 at 14 × 14 places: [k, 1024, 14, 14]."""
        states = self.maxpool(self.relu(self.bn1(self.conv1(image.unsqueeze(0)))))
        states = self.layer3(self.layer2(self.layer1(states)))
        wide = torch.promote_types(states.dtype, torch.float32)  # coordinates are not for half precision
        found = roi_align(states.to(wide), [boxes.to(wide)], BIN, 1 / STRIDE, sampling_ratio=1)
        return found.to(states.dtype)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


def features_of(trunk: FastRCNN, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Computes what is seen in each box of a batch's pictures, in their order: [boxes of all, 2048].

    Args:
        trunk: the branch.
        batch: with `picture_i`, `boxes_i` and perhaps `masks_i` of each picture i, as VL-BERT's collators make them.
    """
    numbers = range(sum(name.startswith("picture_") for name in batch))
    kinds = ("picture", "boxes", "masks") if "masks_0" in batch else ("picture", "boxes")
    return trunk(*([batch[f"{kind}_{number}"] for number in numbers] for kind in kinds))


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
    first = state.get("layer1.0.conv2.weight")
    model = FastRCNN(_blocks(state), width=64 if first is None else len(first))
    own = model.state_dict()
    wrong = [name for name, value in own.items() if "num_batches" not in name
             and (name not in state or state[name].shape != value.shape)]  # fmt: skip
    if wrong:
        raise XdscaleError(f"{path}: holds no fitting weights for {some(wrong)} of a ResNet-101 or its like")
    model.load_state_dict({name: state.get(name, value).float() for name, value in own.items()})
    return model


def _blocks(state: Mapping[str, torch.Tensor]) -> list[int]:
    """Returns how many blocks each stage of a file's ResNet has, but one at least."""
    found = [re.match(r"layer([1-4])\.(\d{1,3})\.", name) for name in state]
    places = [(int(match[1]), int(match[2])) for match in found if match]
    return [1 + max((block for stage, block in places if stage == wanted), default=0) for wanted in range(1, 5)]
