"""r2c's ResNet-50, which VisualBERT tunes along on VCR: from pixels, masks, classes to features (VisualBERT §4)."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from xdscale.models.fast_rcnn import FEATURES, RegionResNet, load_resnet, resnet_shape
from xdscale.weights import part_of, read_state_dict

RESNET_50 = (3, 4, 6, 3)
"""Blocks of each of its stages."""
MASK_CHANNELS = 32
"""Of C4, to which an object's mask is added."""
CLASSES, CLASS_SIZE = 81, 128
"""COCO's classes with the background, and the numbers of each one's embedding."""

_RELEASE = {
    "backbone.0.": "conv1.",
    "backbone.1.": "bn1.",
    **{f"backbone.{stage + 3}.": f"layer{stage}." for stage in (1, 2, 3)},
    "after_roi_align.0.": "layer4.",
    "mask_upsample.": "masks.",
    "object_embed.": "classes.",
    "obj_downsample.1.": "projection.",
}
"""What the branch's names begin with in checkpoints of r2c and VisualBERT, behind "detector.", and here."""


class R2CDetector(RegionResNet):
    """r2c's branch of ResNet-50, over boxes, masks and classes that are given; all is trained but the statistics.

    Each region is C4 at 7 × 7 places. Its mask, less a half, is added to the first 32 channels through a convolution;
    C5 and a mean follow, and a Linear and ReLU on that and on the embedding of the object's class.

    Args:
        blocks: of each stage, for a ResNet of another depth.
        width: see `RegionResNet`.
        size: of the features.
        dropout: of what the Linear reads.
    """

    like, places, samples, dilation = "ResNet-50", 7, 0, 1

    def __init__(self, blocks: Sequence[int] = RESNET_50, width: int = 64, *, size: int, dropout: float) -> None:
        super().__init__(blocks, width)
        self.masks = nn.Conv2d(1, MASK_CHANNELS, kernel_size=3, stride=2, padding=1)
        self.classes = nn.Embedding(CLASSES, CLASS_SIZE)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(FEATURES + CLASS_SIZE, size)

    def forward(
        self,
        images: Sequence[torch.Tensor],
        boxes: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        classes: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Computes the features of each box of each image.

        Args:
            images: of each [3, height, width]: red, green, blue, as torchvision's ResNets read them.
            boxes: of each fp32 [k, 4], in its pixels: left, top, right, bottom.
            masks: of each bool [k, 14, 14], the places of each box that show its object.
            classes: of each int64 [k], the class of each object; 0 for the whole image.

        Returns:
            [boxes of all, size].
        """
        states = self.aligned(images, boxes)
        shown = self.masks(torch.cat(list(masks)).unsqueeze(1).to(states.dtype) - 0.5)
        states = torch.cat([states[:, :MASK_CHANNELS] + shown, states[:, MASK_CHANNELS:]], 1)
        seen = self.layer4(states).mean((2, 3))
        known = torch.cat([seen, self.classes(torch.cat(list(classes)))], 1)
        return F.relu(self.projection(self.dropout(known)))

    def freeze_maps(self) -> None:
        """Leaves what comes before RoIAlign as it is."""
        for part in (self.conv1, self.bn1, self.layer1, self.layer2, self.layer3):
            part.requires_grad_(False)


def load_detector(path: Path | None, *, size: int, dropout: float) -> R2CDetector:
    """Builds the branch.

    Args:
        path: its weights: those that `run.keep_model` keeps, a checkpoint of VisualBERT's release or of r2c, or a
            ResNet-50 under torchvision's names, beside which the rest is new; None for random weights.
        size: and
        dropout: see `R2CDetector`.

    Raises:
        XdscaleError: the file cannot be read, or holds no such branch.
    """
    if path is None:
        return R2CDetector(size=size, dropout=dropout)
    state = read_state_dict(path)
    for theirs, ours in _RELEASE.items():
        state |= {ours + name: value for name, value in part_of(state, f"detector.{theirs}").items()}
    build = functools.partial(R2CDetector, *resnet_shape(state), size=size, dropout=dropout)
    own = ("masks.", "classes.", "projection.")
    return load_resnet(build, state, path, () if any(name.startswith(own) for name in state) else own)
