"""Makes a small detector for the picture world: a narrow ResNet of 14 layers that has learned kinds, not colours.

Real detectors are trained on photographs, and their weights ship in no package. This one is trained on the boxes of
COCO's instances and on empty ground. It writes what VL-BERT needs of its detector: the trunk's weights under
torchvision's names, and for each picture a JSON file in the release's form with boxes and distributions over classes.
"""

import argparse
import base64
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from xdscale.data.pictures import MEANS
from xdscale.models.fast_rcnn import FastRCNN, FixedBatchNorm

BLOCKS, WIDTH = (1, 1, 1, 1), 16
SIDE = 48
"""Pixels of a side of what is cut out of a picture to learn from."""
BACKGROUND = 0


def cut(picture: Image.Image, boxes: np.ndarray) -> np.ndarray:
    """Returns what is in boxes, scaled, as the trunk takes it: fp32 [n, 3, SIDE, SIDE]."""
    found = [picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=tuple(box)) for box in boxes]
    return (np.stack(found)[..., ::-1].astype(np.float32) - MEANS).transpose(0, 3, 1, 2)


def examples(coco: Path, proposed: dict[str, dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what is in the boxes of the training pictures, and the kind of each; 0 is ground."""
    values = json.loads((coco / "annotations" / "instances_train2014.json").read_text(encoding="utf-8"))
    pictures, kinds = [], []
    for image in values["images"]:
        things = [one for one in values["annotations"] if one["image_id"] == image["id"]]
        boxes = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in things)]
        ground = proposed[Path(image["file_name"]).stem]["boxes"]
        ground = [box for box in ground if not any(_touch(box, thing) for thing in boxes)]
        picture = Image.open(coco / "train2014" / image["file_name"]).convert("RGB")
        pictures.append(cut(picture, np.array(boxes + ground)))
        kinds += [one["category_id"] for one in things] + [BACKGROUND] * len(ground)
    return torch.from_numpy(np.concatenate(pictures)), torch.tensor(kinds)


def _touch(one: list[float], other: list[float]) -> bool:
    return all(max(one[axis], other[axis]) < min(one[axis + 2], other[axis + 2]) for axis in (0, 1))


class BoxClassifier(nn.Module):
    """The trunk on single things, with a classifier; BatchNorm learns, which VL-BERT then leaves as it is."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = FastRCNN(BLOCKS, WIDTH)
        for part in self.trunk.modules():
            if isinstance(part, FixedBatchNorm):
                part.forward = partial(nn.BatchNorm2d.forward, part)
                nn.Module.train(part)
        self.trunk.requires_grad_(True)
        for block in self.trunk.layer4:  # dilated over a map as small as here, it would see little but padding
            block.conv2.dilation = block.conv2.padding = (1, 1)
        self.classifier = nn.Linear(2048, classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns logits of what is cut out."""
        trunk = self.trunk
        states = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(pictures))))
        states = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(states))))
        return self.classifier(states.mean((2, 3)))


def train(pictures: torch.Tensor, kinds: torch.Tensor, *, epochs: int, batch: int = 32) -> BoxClassifier:
    """Learns kinds."""
    torch.manual_seed(0)
    model = BoxClassifier(int(kinds.max()) + 1)
    steps = epochs * (len(kinds) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        right = 0
        for rows in torch.randperm(len(kinds)).split(batch)[: len(kinds) // batch]:
            some = pictures[rows].flip(3) if torch.rand(()) < 0.5 else pictures[rows]
            logits = model(some)
            F.cross_entropy(logits, kinds[rows]).backward()
            right += int((logits.argmax(1) == kinds[rows]).sum())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"detector: epoch {epoch + 1} of {epochs}: {right / len(kinds):.1%} of {len(kinds):,} right", flush=True)
    return model.eval()


def encoded(values: np.ndarray) -> str:
    """Returns numbers as the release writes them."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


@torch.inference_mode()
def write_detections(model: BoxClassifier, pictures: list[Path], proposed: dict[str, dict], out: Path) -> None:
    """Writes a JSON file for each picture, with boxes and distributions."""
    out.mkdir(parents=True, exist_ok=True)
    for path in pictures:
        picture = Image.open(path).convert("RGB")
        boxes = np.array(proposed[path.stem]["boxes"])
        probabilities = model(torch.from_numpy(cut(picture, boxes))).softmax(1).numpy()
        values = {"image_id": path.stem, "image_w": picture.width, "image_h": picture.height, "num_boxes": len(boxes)}
        values |= {"boxes": encoded(boxes), "classes": encoded(probabilities)}
        (out / f"{path.stem}.json").write_text(json.dumps(values), encoding="utf-8")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path, help="the picture world, with COCO's part")
    parser.add_argument("out", type=Path, help="folder for detector.safetensors, detector.json and detections")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    coco = options.world / "COCO"
    proposed = json.loads((options.world / "boxes.json").read_text(encoding="utf-8"))
    model = train(*examples(coco, proposed), epochs=options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    state = model.trunk.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, options.out / "detector.safetensors")
    classes = model.classifier.out_features
    described = {"model": "small ResNet of the picture world", "class_count": classes, "background": BACKGROUND}
    (options.out / "detector.json").write_text(json.dumps(described), encoding="utf-8")
    write_detections(model, sorted(coco.glob("*2014/*.jpg")), proposed, options.out / "detections")


if __name__ == "__main__":
    main()
