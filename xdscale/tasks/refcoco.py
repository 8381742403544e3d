"""RefCOCO+ and RefCOCO, in their public files: which thing in an image does an expression speak of?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one on Python 3.11

from xdscale.data.json_shapes import Text, first_problem, read_whole
from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, read_bytes, require_real_file, shown
from xdscale.shards.region_comparison import box_iou
from xdscale.shards.sources.regions.plain_pickle import load_plain
from xdscale.tasks.contract import TaskData
from xdscale.tasks.flickr30k_entities import MATCH, Phrase, PhraseGrounding

REFERENCES, INSTANCES = "refs(unc).p", "instances.json"
TRAIN, DEV = "train", ("val", "testA", "testB")


_Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A pickle may hold numbers that nobody can write down."""


class _Sentence(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    sent_id: _Number
    tokens: list[Text]


class _Reference(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    ref_id: _Number
    ann_id: _Number
    image_id: _Number
    split: str
    sentences: list[_Sentence]


class _Annotation(TypedDict):
    id: int
    image_id: int
    bbox: list[float]
    category_id: int


class _Category(TypedDict):
    id: int
    name: Text


class _Instances(TypedDict):
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True, kw_only=True)
class ReferringExpressions(PhraseGrounding):
    """Expressions for one thing each; the whole of an expression is marked, and each is one example.

    As in the release of VL-BERT, boxes are a pixel wider and higher than the difference of their sides, and a region is
    right in training if its intersection over union with the gold box is *more* than a half. Whether regions are those
    of COCO or a detector's, the "ground-truth" or the "detected" track, is said by the table that is given.

    Attributes:
        published: how many expressions each split of the public file has; where another file has not as many, a note
            says so.
    """

    published: Mapping[str, int]

    def read(self, data: Path) -> TaskData:
        """Reads all splits, which stand in one file.

        Raises:
            XdscaleError: a file is missing or broken, a pickle asks for more than plain values, a number stands twice,
                an expression is of no annotation or of another split, or a split has none.
        """
        folder = self.locate(data)
        path, instances = folder / self.train, folder / INSTANCES
        boxes = _read_boxes(instances)
        found: dict[str, list[Example]] = {split: [] for split in (TRAIN, *self.dev)}
        for example, split in _examples(path, instances, boxes):
            found[split].append(example)
        counts = {split: len(examples) for split, examples in found.items()}
        for split, count in counts.items():
            if not count:
                raise XdscaleError(f"{path}: holds no expression of the split {split!r}")
        notes = ()
        if self.published and counts != self.published:
            notes = (f"{path}: holds {_told(counts)}; {self.title} has {_told(self.published)}",)
        files = {self.train: {"sha256": file_sha256(path), "rows": sum(map(len, found.values()))}}
        files[INSTANCES] = {"sha256": file_sha256(instances), "rows": len(boxes)}
        sources = dict.fromkeys((TRAIN, *self.dev), str(Path(self.folder, self.train)))
        return TaskData(self, found.pop(TRAIN), found, {}, files, sources, notes)

    def _matches(self, example: Example, boxes: np.ndarray) -> np.ndarray:
        return _iou(example, boxes) >= MATCH

    def _wanted(self, example: Example, boxes: np.ndarray) -> np.ndarray:
        return _iou(example, boxes) > MATCH


def _told(counts: Mapping[str, int]) -> str:
    each = ", ".join(f"{count:,} ({split})" for split, count in counts.items())
    return f"{each}: {sum(counts.values()):,} expressions"


def _iou(example: Example, boxes: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each box and the gold box, with sides a pixel longer, float64 [n]."""
    longer = np.array([0, 0, 1, 1])
    return box_iou(boxes + longer, np.array(example.truth.boxes) + longer)[:, 0]


def _examples(path: Path, instances: Path, boxes: dict[int, tuple[int, Phrase]]) -> Sequence[tuple[Example, str]]:
    seen: Counter[int] = Counter()
    examples = []
    for number, reference in enumerate(_read_references(path)):
        where, identifier = f"{path}: [{number}]", reference["ref_id"]
        seen[identifier] += 1
        if seen[identifier] > 1:
            raise XdscaleError(f"{where}: ref_id {identifier} stands twice; each reference has its own")
        if reference["split"] not in (TRAIN, *DEV):
            raise XdscaleError(
                f"{where}: split = {shown(reference['split'])}; expected {TRAIN}, {', '.join(DEV[:-1])} or {DEV[-1]}; "
                "leave references of other splits out of the file"
            )
        image, gold = boxes.get(reference["ann_id"], (None, None))
        if image != reference["image_id"]:
            there = "is not there" if image is None else f"is of image {image}"
            raise XdscaleError(
                f"{where}: ann_id {reference['ann_id']} of image {reference['image_id']} {there} in {instances}"
            )
        named: set[int] = set()
        for place, sentence in enumerate(reference["sentences"]):
            if sentence["sent_id"] in named:
                raise XdscaleError(f"{where}: sent_id {sentence['sent_id']} stands twice; each sentence has its own")
            named.add(sentence["sent_id"])
            text = " ".join(sentence["tokens"])
            if not text:
                raise XdscaleError(f"{where}: sentences[{place}] has no words")
            example = Example(
                f"{identifier}#{sentence['sent_id']}", ((text,),), 1, number + 1, images=(str(image),),
                spans=(((Span(0, len(text), -1),),),), truth=gold,
            )  # fmt: skip
            examples.append((example, reference["split"]))
    return examples


def _read_references(path: Path) -> list[_Reference]:
    require_real_file(path)
    data = load_plain(read_bytes(path), str(path))
    try:
        return TypeAdapter(list[_Reference]).validate_python(data)
    except ValidationError as error:
        raise XdscaleError(f"{path}: {first_problem(error)}") from None


def _read_boxes(path: Path) -> dict[int, tuple[int, Phrase]]:
    """Returns of each annotation its image, and its box with the name of its category."""
    if not path.is_file():
        raise XdscaleError(f"{path}: no such file; it lies beside the expressions, as their makers publish both")
    values = read_whole(path, _Instances)
    names = {category["id"]: category["name"] for category in values["categories"]}
    boxes: dict[int, tuple[int, Phrase]] = {}
    for number, annotation in enumerate(values["annotations"]):
        where, box = f"{path}: annotations[{number}]", annotation["bbox"]
        if annotation["id"] in boxes:
            raise XdscaleError(f"{where}: id {annotation['id']} stands twice; each annotation has its own")
        if len(box) != 4 or not (box[2] >= 0 and box[3] >= 0 and np.isfinite(box).all()):
            raise XdscaleError(f"{where}: bbox = {box}; expected left, top, width and height")
        if annotation["category_id"] not in names:
            raise XdscaleError(f"{where}: category_id {annotation['category_id']} is not among the file's categories")
        left, top, width, height = box
        gold = Phrase(((left, top, left + width, top + height),), (names[annotation["category_id"]],))
        boxes[annotation["id"]] = annotation["image_id"], gold
    return boxes


def _task(name: str, title: str, folder: str, published: Sequence[int]) -> ReferringExpressions:
    return ReferringExpressions(
        name=name,
        title=title,
        folder=folder,
        train=REFERENCES,
        dev=dict.fromkeys(DEV, REFERENCES),
        published=dict(zip((TRAIN, *DEV), published)),
        first="expression",
        label="box",
        metrics=("recall_at_1", "upper_bound"),
        score="recall_at_1",
    )


REFCOCO = _task("refcoco", "RefCOCO", "refcoco", ())
REFCOCO_PLUS = _task("refcoco_plus", "RefCOCO+", "refcoco+", (120_191, 10_758, 5_726, 4_889))
