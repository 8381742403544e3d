"""Any `AutoModelForObjectDetection` of transformers (DETR, RT-DETR, D-FINE, YOLOS, …): one region per kept query.

A region's features are its query's last state. Where the network gives a distribution with a class for no object, it is
kept; sigmoid scores of single classes are none.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from xdscale.errors import XdscaleError
from xdscale.extraction.contract import PUBLISHED, RANDOM, Choice, Found, built, load_weights, numpy
from xdscale.shards.regions import Detector
from xdscale.weights import weight_files, weights_sha256


class QueryDetector:
    """A detector of transformers.

    Args:
        name: folder, or name on the hub.
        weights: "hub" takes those of the folder or the hub's, "random" and a file only the configuration.
        choice: which regions are kept.
        device: where it computes.
    """

    def __init__(self, name: str, weights: str, choice: Choice, device: torch.device) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

        self._processor = built(name, AutoImageProcessor.from_pretrained, name)
        if weights == PUBLISHED:
            model = built(name, AutoModelForObjectDetection.from_pretrained, name)
        else:
            config = built(name, AutoConfig.from_pretrained, name)
            model = built(name, AutoModelForObjectDetection.from_config, config)
        sha256 = load_weights(model, weights, name)
        if weights == PUBLISHED and Path(name).is_dir():
            sha256 = weights_sha256(weight_files(Path(name)))
        self._model = model.eval().to(device)
        self._choice = choice
        config = model.config
        names = [config.id2label[number] for number in range(config.num_labels)]
        probe = self._outputs(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
        self._has_background = probe.logits.shape[-1] == config.num_labels + 1
        self.detector = Detector(
            model=f"transformers:{Path(name).name if Path(name).is_dir() else name}",
            sha256=sha256,
            classes=[*names, "no object"] if self._has_background else names,
            class_count=len(names) + self._has_background,
            background=len(names) if self._has_background else None,
            settings={"architecture": type(model).__name__, "weights": weights if weights == RANDOM else "given"}
            | choice._asdict(),
        )

    def _outputs(self, images: Tensor) -> object:
        inputs = self._processor(images=list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        device = self._model.device
        try:
            with torch.inference_mode():
                return self._model(**{name: value.to(device) for name, value in inputs.items()})
        except (RuntimeError, ValueError) as error:
            raise XdscaleError(f"{self._model.config._name_or_path}: cannot read an image: {error}") from None

    def __call__(self, images: Tensor, boxes: Sequence[Tensor] | None) -> list[Found]:
        """Returns the regions of images; see `Network`."""
        outputs = self._outputs(images)
        height, width = images.shape[-2:]
        queries = outputs.logits.shape[1]
        states = outputs.last_hidden_state[:, -queries:]  # YOLOS has those of patches before them
        scale = torch.tensor([width, height, width, height], device=states.device)
        corners = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * scale
        found = []
        for logits, features, regions in zip(outputs.logits, states, corners):
            probs = logits.softmax(-1) if self._has_background else logits.sigmoid()
            objects = probs[:, : self._model.config.num_labels]
            confidences, ids = objects.max(1)
            kept = self._choice.of(confidences)
            found.append(
                Found(
                    numpy(clip_boxes_to_image(regions[kept], (height, width))),
                    numpy(features[kept]),
                    numpy(probs[kept]) if self._has_background else None,
                    numpy(confidences[kept]),
                    ids[kept].cpu().numpy(),
                )
            )
        return found
