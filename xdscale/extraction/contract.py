"""What every network that gives regions has in common, and how regions are chosen among what it finds."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from xdscale.errors import XdscaleError
from xdscale.files import one_line
from xdscale.names import resolve_path
from xdscale.shards.regions import Detector
from xdscale.weights import read_state_dict, require_floats, require_numbers, some, weights_sha256

PUBLISHED, RANDOM = "hub", "random"
"""Weights that the library of the network offers for download; or none, drawn from seed 0."""


class Found(NamedTuple):
    """The regions of one image.

    Attributes:
        boxes: float32 [n, 4], pixels of the image: left, top, right, bottom.
        features: float32 [n, width].
        class_probs: float32 [n, classes] of sum 1, or None.
        confidences: float32 [n], or None.
        object_ids: int64 [n], the most probable class but background, or None.
    """

    boxes: np.ndarray
    features: np.ndarray
    class_probs: np.ndarray | None = None
    confidences: np.ndarray | None = None
    object_ids: np.ndarray | None = None


class Network(Protocol):
    """Finds regions or describes those that are given.

    Attributes:
        detector: what `dataset.json` says of it.
    """

    detector: Detector

    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None) -> list[Found]:
        """Returns the regions of images of one size.

        Args:
            images: uint8 [n, 3, height, width], on the network's device.
            boxes: float32 [regions, 4] of each image, in pixels; None if it is to find them.
        """


class Choice(NamedTuple):
    """Which of the found regions are kept (bottom-up attention's rule).

    Attributes:
        threshold: least confidence.
        fewest: kept for each image even below it.
        most: for each image.
    """

    threshold: float = 0.2
    fewest: int = 10
    most: int = 100

    def of(self, confidences: Tensor) -> Tensor:
        """Returns the numbers of the regions that are kept, by falling confidence: int64 [kept]."""
        order = torch.argsort(confidences, descending=True, stable=True)
        above = int((confidences >= self.threshold).sum())
        return order[: max(self.fewest, min(above, self.most))]


def load_weights(module: nn.Module, weights: str, where: str) -> str:
    """Puts the weights of a file into a network, unless they are published or random ones that it was built with.

    Returns:
        Their SHA-256: of the file, or of all tensors with their names where there is none.

    Raises:
        XdscaleError: the file is missing, damaged, of another architecture, or holds no numbers.
    """
    if weights in (PUBLISHED, RANDOM):
        return state_sha256(module)
    path = resolve_path(weights)
    state = read_state_dict(path)
    # Counts of batches seen in training have no effect, and frozen layers lack them.
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    unknown = [name for name in state if name not in module.state_dict()]
    if wrong or unknown:
        raise XdscaleError(
            f"{path}: not the weights of {where}: it lacks, or has in other shapes, {some(wrong)}; it has besides "
            f"{some(unknown)}"
        )
    taken = {name: state[name] for name, value in wanted.items() if value.is_floating_point()}
    require_floats(taken, path)
    require_numbers(taken, path)
    module.load_state_dict(state, strict=False)
    return weights_sha256([path])


def state_sha256(module: nn.Module) -> str:
    """Returns the SHA-256 (hex) of a network's tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def built(what: str, build: Any, *arguments: Any, **options: Any) -> Any:
    """Returns what a library builds or downloads.

    Raises:
        XdscaleError: it could not, in its words.
    """
    torch.manual_seed(0)  # of random weights
    try:
        return build(*arguments, **options)
    except Exception as error:  # libraries raise what they come upon: HTTP errors, OSError, ValueError, …
        raise XdscaleError(
            f"{what}: cannot be built: {one_line(error)}; without a network give a file (--weights FILE) or random "
            "weights (--weights random)"
        ) from None


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images [n, 3, height, width] as float32 with this mean and standard deviation taken out."""
    center, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - center) / scale


def numpy(values: Tensor) -> np.ndarray:
    """Returns a tensor's values as float32."""
    return values.detach().float().cpu().numpy()
