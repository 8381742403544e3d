"""VL-BERT's own branch of Fast R-CNN over given boxes: features as its release computes them (spec VL-BERT §1.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from xdscale.data.pictures import MEANS, scaled_size
from xdscale.errors import XdscaleError
from xdscale.extraction.contract import PUBLISHED, RANDOM, Found, numpy, state_sha256
from xdscale.models.fast_rcnn import FastRCNN, load_fast_rcnn
from xdscale.names import resolve_path
from xdscale.shards.regions import Detector
from xdscale.weights import weights_sha256

SHORT_SIDE, LONG_SIDE = 600, 1000


class FastRCNNBackbone:
    """A network that is given its boxes.

    Args:
        name: "resnet101", or what a file of another depth holds, such as "resnet50".
        weights: file, such as the release's `resnet101-pt-vgbua-0000.model`, or "random".
        device: where it computes.
        short_side: images are scaled so that their shorter side has so many pixels, unless the longer one then has more
            than 1,000; None for the release's 600.

    Raises:
        XdscaleError: no weights are published for download, or the file holds no such ResNet.
    """

    def __init__(self, name: str, weights: str, device: torch.device, *, short_side: int | None = None) -> None:
        if weights == PUBLISHED:
            raise XdscaleError(
                f"--network vlbert:{name}: nobody offers its weights for download here; give --weights FILE, as the "
                "resnet101-pt-vgbua-0000.model of VL-BERT's release"
            )
        torch.manual_seed(0)  # of random weights
        path = None if weights == RANDOM else resolve_path(weights)
        self._model = load_fast_rcnn(path).eval()
        if self._model.name != name:
            raise XdscaleError(
                f"--network vlbert:{name}: --weights {weights} are those of a {self._model.name}: "
                f"--network vlbert:{self._model.name}"
            )
        self._short_side = short_side or SHORT_SIDE
        self.detector = Detector(
            model=f"vlbert:{name}",
            sha256=state_sha256(self._model) if path is None else weights_sha256([path]),
            settings={
                "short_side": self._short_side,
                "long_side": LONG_SIDE,
                "pooling": f"RoIAlign {FastRCNN.places} × {FastRCNN.places} of C4, one sample each, then C5, mean",
                "mean_bgr": MEANS.tolist(),
            },
        )
        self._model.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None) -> list[Found]:
        """Returns features of the given boxes; see `xdscale.extraction.contract.Network`."""
        height, width = images.shape[-2:]
        across, down = scaled_size(width, height, self._short_side, LONG_SIDE)
        inputs = functional.interpolate(images.float(), (down, across), mode="bilinear", antialias=True)
        inputs = inputs.flip(1) - torch.from_numpy(MEANS).to(images.device).view(3, 1, 1)
        scale = torch.tensor([across / width, down / height] * 2, device=images.device)
        last = torch.tensor([across - 1, down - 1] * 2, device=images.device)
        mine = [torch.minimum((given * scale).clamp(min=0), last) for given in boxes]
        features = self._model(list(inputs), mine).split([len(given) for given in boxes])
        return [Found(numpy(given), numpy(part)) for given, part in zip(boxes, features)]
