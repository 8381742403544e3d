"""Flickr30K Entities, in its public files: which region of an image does a phrase of its caption speak of?"""

import hashlib
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.files import one_line, open_text
from xdscale.shards.region_comparison import box_iou
from xdscale.tasks.contract import TaskData
from xdscale.tasks.text import TextTask

if TYPE_CHECKING:
    import torch

    from xdscale.shards.regions import Regions

MATCH = 0.5
"""A region matches a phrase if its intersection over union with one of the phrase's boxes is at least this."""

RANKS = (1, 5, 10)

NOT_VISUAL = 0
"""The entity of phrases that name nothing to be seen."""

_PHRASE = re.compile(r"\[/EN#([0-9]{1,9})((?:/[^\s/\[\]]+)+) ([^\[\]]+)\]")


class Phrase(NamedTuple):
    """A phrase's gold boxes.

    Attributes:
        boxes: x1, y1, x2, y2 of each, as the file has them, counted from 1.
        types: such as ("people",) or ("clothing", "bodyparts").
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    types: tuple[str, ...]


class Caption(NamedTuple):
    """A caption.

    Attributes:
        image: id of its image.
        line: of the image's file of sentences, counted from 1.
        text: without marks.
        phrases: where each of its phrases stands, its entity and its types.
    """

    image: str
    line: int
    text: str
    phrases: list[tuple[Span, int, tuple[str, ...]]]


class PhraseGrounding(TextTask):
    """Phrases that have boxes, one example each; a span of the caption marks the phrase.

    A prediction is its image's regions, best first: number and box.
    """

    images = 1
    reads = "region"
    outputs = 0

    def read(self, data: Path) -> TaskData:
        """Reads all splits.

        Raises:
            XdscaleError: as `TextTask.read`; a file of an image is missing or broken; with file and line.
        """
        found = super().read(data)
        folder, digests = self.locate(data), {}
        for split, examples in {"train": found.train, **found.dev}.items():
            images = sorted({example.images[0] for example in examples})
            digest = hashlib.sha256()
            for path in (path for image in images for path in _files_of(folder, image)):
                digest.update(path.read_bytes())
            digests[f"phrases of {found.sources[split]}"] = {"sha256": digest.hexdigest(), "rows": len(examples)}
        return replace(found, files=found.files | digests)

    def read_examples(self, path: Path, *, labelled: bool) -> list[Example]:
        """Reads the sentences and boxes of the images whose ids stand in a file, one a line."""
        examples: list[Example] = []
        image, boxes = "", {}
        for caption in read_captions(path):
            if caption.image != image:
                image, boxes = caption.image, _read_boxes(_files_of(path.parent, caption.image)[1])
            for place, (span, entity, types) in enumerate(caption.phrases):
                if entity in boxes:
                    identifier = f"{image}#{caption.line - 1}#{place}"
                    texts, spans = ((caption.text,),), (((span,),),)
                    truth = Phrase(tuple(boxes[entity]), types)
                    examples.append(Example(identifier, texts, 1, caption.line, (image,), spans, truth))
        if not examples:
            raise XdscaleError(f"{path}: no phrase of its images has a box")
        return examples

    def targets(self, examples: Sequence[Example], regions: "Regions | None" = None) -> np.ndarray:
        """Returns equal shares for the regions that match each phrase, float64 [n, most regions]; 0 where none does."""
        matching = [self._wanted(example, boxes) for example, boxes in zip(examples, _boxes_of(regions), strict=True)]
        targets = np.zeros((len(examples), max(map(len, matching))))
        for row, match in zip(targets, matching):
            row[: len(match)] = match / max(match.sum(), 1)
        return targets

    def loss(
        self, logits: "torch.Tensor", targets: "torch.Tensor", real: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Computes the KL divergence of the softmax over an image's regions, whose other logits are -inf.

        A phrase that no region matches adds nothing, and is never right.
        """
        import torch

        wanted = (targets > 0) & real[:, None]
        targets = targets.masked_fill(~wanted, 0.0)
        predicted = logits.log_softmax(-1).masked_fill(~wanted, 0.0)  # 0 × -inf is no number
        loss = (torch.special.xlogy(targets, targets) - targets * predicted).sum()
        return loss, wanted.gather(1, logits.detach().argmax(-1, keepdim=True)).sum()

    def predict(self, logits: np.ndarray, regions: "Regions | None" = None) -> np.ndarray:
        """Returns number and box of each region, best first, float64 [n, most regions, 5]; of equals the earlier."""
        ranked = np.full((*logits.shape, 5), np.nan)
        for row, scores, boxes in zip(ranked, logits, _boxes_of(regions), strict=True):
            order = np.argsort(-scores[: len(boxes)], kind="stable")
            row[: len(boxes)] = np.column_stack([order, boxes[order]])
        return ranked

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the recall among the first 1, 5 and 10 regions, and how much all regions could reach."""
        credits = [self._credits(example, ranked) for example, ranked in zip(examples, predictions, strict=True)]
        return {name: float(np.mean([one[name] for one in credits])) for name in self.metrics}

    def answer(self, example: Example, prediction: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Returns the phrase, its boxes, the first regions with the best one's box, and what they earn.

        "label" is 1 and "prediction" whether the best region matches: there are no classes.
        """
        span, ranked = example.spans[0][0][0], _there(prediction)
        credits = self._credits(example, prediction)
        return {
            "label": 1,
            "prediction": int(credits["recall_at_1"]),
            "phrase": example.texts[0][0][span.start : span.end],
            "types": list(example.truth.types),
            "boxes": [list(box) for box in example.truth.boxes],
            "regions": ranked[: max(RANKS), 0].astype(int).tolist(),
            "box": ranked[0, 1:].tolist(),
            "credits": credits,
        }

    def _matches(self, example: Example, boxes: np.ndarray) -> np.ndarray:
        """Returns which boxes match a phrase, bool [regions]."""
        return (box_iou(boxes, np.array(example.truth.boxes)) >= MATCH).any(1)

    def _wanted(self, example: Example, boxes: np.ndarray) -> np.ndarray:
        """Returns which boxes are right in training."""
        return self._matches(example, boxes)

    def _credits(self, example: Example, ranked: Sequence[Sequence[float]]) -> dict[str, float]:
        matches = self._matches(example, _there(ranked)[:, 1:])
        found = {f"recall_at_{first}": recall(matches, first) for first in RANKS}
        return found | {"upper_bound": recall(matches, len(matches))}


def recall(matches: np.ndarray, first: int) -> float:
    """Returns 1 if one of the first regions of a ranking matches, else 0.

    Args:
        matches: bool [regions], best first.
        first: how many of them count.
    """
    return float(matches[:first].any())


def _there(ranked: Sequence[Sequence[float]]) -> np.ndarray:
    ranked = np.asarray(ranked)
    return ranked[~np.isnan(ranked[:, 0])]


def _boxes_of(regions: "Regions") -> list[np.ndarray]:
    """Returns the boxes of each image."""
    return np.split(regions.boxes, regions.offsets[1:-1])


def _files_of(folder: Path, image: str) -> tuple[Path, Path]:
    return folder / "Sentences" / f"{image}.txt", folder / "Annotations" / f"{image}.xml"


def read_captions(path: Path) -> Iterator[Caption]:
    """Yields all captions of the images whose ids stand in a file, one a line; "Sentences" lies beside it.

    Raises:
        XdscaleError: as `PhraseGrounding.read`.
    """
    seen: dict[str, int] = {}
    for line, image in enumerate(_lines(path), 1):
        where = f"{path}, line {line}"
        if not image:
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+", image):
            raise XdscaleError(f"{where}: {image!r} is not an image id, such as 1000092795")
        if image in seen:
            raise XdscaleError(f"{where}: image {image} stands in line {seen[image]} already")
        seen[image] = line
        for file in _files_of(path.parent, image):
            if not file.is_file():
                name = file.relative_to(path.parent)
                raise XdscaleError(f"{where}: image {image} has no {name}; unpack annotations.zip")
        sentences, _ = _files_of(path.parent, image)
        for number, text in enumerate(_lines(sentences), 1):
            if text:
                yield Caption(image, number, *_read_sentence(f"{sentences}, line {number}", text))


def _read_sentence(where: str, text: str) -> tuple[str, list[tuple[Span, int, tuple[str, ...]]]]:
    """Returns a caption without its marks, and where each phrase stands, its entity and its types."""
    caption, phrases, end = "", [], 0
    for mark in _PHRASE.finditer(text):
        caption += text[end : mark.start()]
        start = len(caption)
        caption += mark[3]
        phrases.append((Span(start, len(caption), -1), int(mark[1]), tuple(mark[2][1:].split("/"))))
        end = mark.end()
    caption += text[end:]
    if "/EN#" in caption:
        raise XdscaleError(
            f"{where}: {caption[caption.index('/EN#') - 1 :][:60]!r}: a phrase is not marked as [/EN#entity/type words]"
        )
    return caption, phrases


def _read_boxes(path: Path) -> dict[int, list[tuple[float, float, float, float]]]:
    """Returns the boxes of each entity; an object may name several entities, an entity have several objects."""
    boxes = defaultdict(list)
    for number, item in enumerate(_parse(path).iterfind("object")):
        where = f"{path}: object {number}"
        names = [_number(where, "name", name.text) for name in item.iterfind("name")]
        if not names:
            raise XdscaleError(f"{where}: no name; expected the number of an entity")
        box = item.find("bndbox")
        if box is None or not len(box):
            continue
        x1, y1, x2, y2 = (_number(where, side, box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))
        if x1 < 0 or y1 < 0 or x2 < x1 or y2 < y1:
            raise XdscaleError(f"{where}: box {x1}, {y1}, {x2}, {y2}; expected 0 <= xmin <= xmax, 0 <= ymin <= ymax")
        for entity in names:
            if entity == NOT_VISUAL:
                raise XdscaleError(f"{where}: entity {NOT_VISUAL} has a box, but stands for what is not to be seen")
            boxes[entity].append((x1, y1, x2, y2))
    return dict(boxes)


def _number(where: str, tag: str, text: str | None) -> int:
    if text is None or not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise XdscaleError(f"{where}: {tag} = {text!r}; expected a whole number")
    return int(text)


class _NoDoctype(ET.TreeBuilder):
    """Refuses declarations of entities, which may stand for other files or for billions of letters."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ET.ParseError("a document type is declared, which no annotation needs")


def _parse(path: Path) -> ET.Element:
    try:
        root = ET.parse(path, ET.XMLParser(target=_NoDoctype())).getroot()
    except (ET.ParseError, ValueError, LookupError) as error:
        raise XdscaleError(f"{path}: not readable XML: {one_line(error)}") from None
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None
    if root.tag != "annotation":
        raise XdscaleError(f"{path}: holds <{root.tag}>, expected <annotation>")
    return root


def _lines(path: Path) -> list[str]:
    with open_text(path) as file:
        return [line.strip() for line in file.read().split("\n")]


FLICKR30K_ENTITIES = PhraseGrounding(
    name="flickr30k_entities",
    title="Flickr30K Entities",
    folder="Flickr30kEntities",
    train="train.txt",
    dev={"dev": "val.txt", "test": "test.txt"},
    first="caption",
    label="boxes",
    metrics=("recall_at_1", "recall_at_5", "recall_at_10", "upper_bound"),
    score="recall_at_1",
)
