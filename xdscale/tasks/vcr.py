"""VCR, in its public files (`train.jsonl`): which of four answers is right (Q→A), and which of four reasons (QA→R)."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    NotRequired,  # pydantic needs this one on Python 3.11
)

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from xdscale.data.json_shapes import Text, read_lines
from xdscale.data.task_files import Example, Span, place
from xdscale.errors import XdscaleError
from xdscale.files import csv_text, shown
from xdscale.shards.regions import RegionTable
from xdscale.tasks.text import TextTask
from xdscale.tasks.vcr_metadata import (
    ORDER,
    VCRMetadata,
    outline_notes,
    outlines_sha256,
    read_masks,
    read_metadata,
    require_boxes,
)

NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Peyton", "Skyler",
    "Frankie", "Pat", "Quinn",
)  # fmt: skip
"""Gender-neutral names for persons, as r2c has them; one stands twice there."""

EVERYONE = ("everyone", "everyones")
"""Words that speak of all persons."""
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "trafficlight",
    "firehydrant", "stopsign", "parkingmeter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sportsball", "kite", "baseballbat", "baseballglove", "skateboard", "surfboard", "tennisracket", "bottle",
    "wineglass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot",
    "hotdog", "pizza", "donut", "cake", "chair", "couch", "pottedplant", "bed", "diningtable", "toilet", "tv", "laptop",
    "mouse", "remote", "keyboard", "cellphone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddybear", "hairdrier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes as VCR calls them, in COCO's order; class 0 is the background."""

CHOICES = 4
IMAGES = "vcr1images"
"""Folder of images and metadata, as its download is unpacked."""

_AT_ONCE = 4096
"""Images whose boxes are compared together."""
Tokens = list[str | list[int]]
"""Words, and lists of numbers of objects that stand for words."""


class _Question(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    annot_id: str
    img_fn: str
    metadata_fn: str
    objects: list[Text]
    question: Tokens
    answer_choices: list[Tokens]
    rationale_choices: list[Tokens]
    answer_label: NotRequired[int]
    rationale_label: NotRequired[int]


class VCRTruth(NamedTuple):
    """What is known of a question beside its label.

    Attributes:
        regions: how many its image has in the table: the whole image, then the objects.
        answer: the answer that a reason is asked for; None where an answer is asked for.
        objects: classes of the objects.
        metadata: file with the outlines of the objects.
        stated: what was found in it; None where there is no folder of such files.
    """

    regions: int
    answer: int | None
    objects: tuple[str, ...]
    metadata: Path
    stated: VCRMetadata | None = None


@dataclass(frozen=True, kw_only=True)
class CommonsenseReasoning(TextTask):
    """A choice from four answers or reasons; `spans` say which words stand for which region, region 0 being the image.

    Attributes:
        reasons: whether a reason is asked for, given question and right answer; else an answer.
    """

    images = 1
    object_count: ClassVar[int] = 1 + len(CLASSES)

    reasons: bool

    def read_examples(self, path: Path, *, labelled: bool) -> list[Example]:
        """Reads one file; of an unlabelled one, a question about reasons is asked for each of the four answers.

        Raises:
            XdscaleError: a question has not four choices, a label is none of them, a tag names no object, an id
                stands twice, or the metadata, where they are there, name other objects, or boxes or outlines that are
                none.
        """
        examples: list[Example] = []
        seen: dict[str, int] = {}
        known: dict[str, tuple[list[str], VCRMetadata]] = {}
        images = path.parent / IMAGES
        for line, entry in read_lines(path, _Question):
            where, identifier = place(path, line), entry["annot_id"]
            if identifier in seen:
                raise XdscaleError(f"{where}: annot_id {identifier} stands in line {seen[identifier]} already")
            seen[identifier] = line
            if Path(name := entry["metadata_fn"]).is_absolute() or ".." in Path(name).parts:
                raise XdscaleError(f"{where}: metadata_fn = {name!r} leads out of {images}")
            stated = _metadata_of(where, entry, images, known) if images.is_dir() else None
            examples += self._examples(where, line, entry, labelled, images / entry["metadata_fn"], stated)
        if not examples:
            raise XdscaleError(f"{path}: holds no examples")
        return examples

    def targets(self, examples: Sequence[Example], regions: Any = None) -> np.ndarray:
        """Returns the numbers of the right choices, int64 [n].

        Raises:
            XdscaleError: an image has other regions than its question counts on, or than its metadata state.
        """
        if regions is not None:
            bounds = regions.offsets.tolist()
            for example, size, first, end in zip(examples, regions.sizes, bounds, bounds[1:]):
                truth, where = example.truth, f"{example.id}: image {example.images[0]}"
                if end - first != truth.regions:
                    raise XdscaleError(
                        f"{where} has {end - first} regions in the table, its question needs {truth.regions}: {ORDER}"
                    )
                if truth.stated is not None:
                    require_boxes(where, regions.boxes[first:end], size, truth.metadata, truth.stated)
        return super().targets(examples)

    def check_regions(self, examples: Sequence[Example], regions: RegionTable) -> None:
        """Compares the regions of all images with their metadata, before anything is trained; errors as `targets`."""
        each = {(one.images, one.truth.metadata, one.truth.objects): one for one in examples}
        distinct = list(each.values())
        for first in range(0, len(distinct), _AT_ONCE):
            some = distinct[first : first + _AT_ONCE]
            rows = regions.rows([example.images[0] for example in some])
            self.targets(some, regions.read(rows, boxes_only=True))

    def predict(self, logits: np.ndarray, regions: Any = None) -> np.ndarray:
        """Returns the probability of each choice, float64 [n, choices]: the leaderboard asks for all of them."""
        exponents = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        return exponents / exponents.sum(1, keepdims=True)

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the accuracy."""
        return super().measure(predictions.argmax(1), examples)

    def answer(self, example: Example, prediction: Sequence[float]) -> dict[str, Any]:
        """Returns the right choice, the likeliest one, and whether they are the same."""
        return super().answer(example, int(np.argmax(prediction)))

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns this task's columns of the leaderboard's file: annot_id and the probability of each choice.

        Those of both tasks side by side are the whole file (docs/visual-tasks.md).
        """
        rows: dict[str, list[str]] = {}
        for example, row in zip(examples, predictions):
            identifier = example.id.rpartition("#")[0] if self.reasons else example.id
            rows.setdefault(identifier, []).extend(f"{value:.6g}" for value in row.tolist())
        columns = [f"rationale_conditioned_on_a{n}" for n in range(CHOICES)] if self.reasons else ["answer"]
        head = ["annot_id", *(f"{column}_{n}" for column in columns for n in range(CHOICES))]
        return csv_text(head, ([identifier, *row] for identifier, row in rows.items()))

    def object_classes(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Returns the classes of the objects of each example, int64 [objects], counted from 1.

        Raises:
            XdscaleError: an object is of no class that VCR has.
        """
        numbers = {name: number for number, name in enumerate(CLASSES, 1)}
        for example in examples:
            if unknown := [name for name in example.truth.objects if name not in numbers]:
                raise XdscaleError(
                    f"{example.id}: objects: {shown(unknown[0])} is none of VCR's classes (person, …, toothbrush); "
                    "model.object_loss=0 leaves them unread, and so does VisualBERT without model.pixels"
                )
        return [np.array([numbers[name] for name in example.truth.objects], np.int64) for example in examples]

    def object_masks(self, examples: Sequence[Example], *, centres: bool = False) -> list[np.ndarray]:
        """Returns which places of each object's box show it, of each example: bool [objects, 14, 14].

        Args:
            examples: some of the task's.
            centres: see `xdscale.data.outlines.object_mask`.

        Raises:
            XdscaleError: the metadata are not there, or have not the outlines of these objects.
        """
        truths = [example.truth for example in examples]
        return [read_masks(one.metadata, len(one.objects), one.stated, centres=centres) for one in truths]

    def outlines_sha256(self, examples: Sequence[Example]) -> str:
        """Returns the SHA-256 (hex) of the files that `object_masks` reads, in the order of their names.

        Raises:
            XdscaleError: one of them is not there or has no outlines: a run would end in whatever step reads it.
        """
        return outlines_sha256({example.truth.metadata: example.truth.stated for example in examples})

    def outline_notes(self, examples: Sequence[Example]) -> list[str]:
        """Returns what a person should know of these outlines.

        Raises:
            XdscaleError: no object has one.
        """
        return outline_notes({example.truth.metadata: example.truth.stated for example in examples})

    def _examples(
        self, where: str, line: int, entry: _Question, labelled: bool, metadata: Path, stated: VCRMetadata | None
    ) -> list[Example]:
        answers, reasons = entry["answer_choices"], entry["rationale_choices"]
        for key, choices in (("answer_choices", answers), ("rationale_choices", reasons)):
            if len(choices) != CHOICES:
                raise XdscaleError(f"{where}: {key} has {len(choices)} choices, expected {CHOICES}")
        label = _label(where, entry, self.label) if labelled else None
        regions, named = 1 + len(entry["objects"]), _named(entry)

        def example(identifier: str, context: Tokens, choices: list[Tokens], answer: int | None) -> Example:
            first, spans, names = _render(where, context, entry["objects"], {})
            seconds = [_render(where, choice, entry["objects"], names) for choice in choices]
            return Example(
                identifier,
                tuple((first, second) for second, *_ in seconds),
                label,
                line,
                images=(entry["img_fn"],),
                spans=tuple((spans, others) for _, others, _ in seconds),
                truth=VCRTruth(regions, answer, tuple(entry["objects"]), metadata, stated),
                named=named,
            )

        question = entry["question"]
        if not self.reasons:
            return [example(entry["annot_id"], question, answers, None)]
        if labelled:
            right = _label(where, entry, "answer_label")
            return [example(entry["annot_id"], question + answers[right], reasons, right)]
        return [example(f"{entry['annot_id']}#{n}", question + answers[n], reasons, n) for n in range(CHOICES)]


def _render(
    where: str, tokens: Tokens, objects: list[str], names: Mapping[int, str]
) -> tuple[str, tuple[Span, ...], dict[int, str]]:
    """Puts words for tags, as r2c does.

    A person gets the next name of `NAMES`, another object its class. What `names` knows keeps its name. Persons that it
    does not know are counted from the first name on, in each text anew, so that a person of an answer may be called as
    one of the question: so the published models were trained.

    Returns:
        The text, the spans of its tags, and all names.
    """
    names, persons = dict(names), 0
    text, spans = "", []
    for token in tokens:
        for part in token if isinstance(token, list) else [token] if token else []:
            text += " " if text else ""
            if isinstance(part, str):
                text += part
                continue
            if not 0 <= part < len(objects):
                raise XdscaleError(f"{where}: tag {part} names no object; there are {len(objects)}, counted from 0")
            if part not in names:
                person = objects[part] == "person"
                names[part] = NAMES[persons % len(NAMES)] if person else objects[part]
                persons += person
            spans.append(Span(len(text), len(text) + len(names[part]), part + 1))
            text += names[part]
    if not text:
        raise XdscaleError(f"{where}: a question, an answer or a reason has no words")
    return text, tuple(spans), names


def _named(entry: _Question) -> tuple[int, ...]:
    """Returns the whole image and the objects that an item speaks of, as r2c and VisualBERT's release find them.

    Question, answers and reasons all count, whichever of them are asked for. "Everyone" speaks of all persons, and so
    does an item that speaks of nothing.
    """
    objects, named = entry["objects"], set()
    persons = {number for number, name in enumerate(objects) if name == "person"}
    for token in chain(entry["question"], *entry["answer_choices"], *entry["rationale_choices"]):
        if isinstance(token, list):
            named |= {tag for tag in token if 0 <= tag < len(objects)}
        elif token.lower() in EVERYONE:
            named |= persons
    return (0, *(1 + number for number in sorted(named or persons)))


def _label(where: str, entry: _Question, key: str) -> int:
    label = entry.get(key)
    if label is None or not 0 <= label < CHOICES:
        raise XdscaleError(f"{where}: {key} = {label}; expected 0 to {CHOICES - 1}")
    return label


def _metadata_of(
    where: str, entry: _Question, images: Path, known: dict[str, tuple[list[str], VCRMetadata]]
) -> VCRMetadata:
    """Reads the metadata of a question's image, once; refuses those that name other objects than the question does."""
    name = entry["metadata_fn"]
    if name not in known:
        path = images / name
        if not os.path.isfile(path):  # unlike Path.is_file also where a name is too long
            raise XdscaleError(f"{where}: metadata_fn = {shown(name)} is not in {images}; is the download whole?")
        known[name] = read_metadata(path)
    found, stated = known[name]
    if found != entry["objects"]:
        ours, theirs = (textwrap.shorten(", ".join(names), 300) for names in (entry["objects"], found))
        raise XdscaleError(f"{where}: objects are {ours}, but {name} names {theirs}")
    return stated


def _task(name: str, title: str, label: str, *, reasons: bool) -> CommonsenseReasoning:
    return CommonsenseReasoning(
        name=name,
        title=title,
        folder="VCR",
        train="train.jsonl",
        dev={"dev": "val.jsonl"},
        test={f"{name}.csv": "test.jsonl"},
        first="question",
        seconds=tuple(f"choice {n}" for n in range(CHOICES)),
        label=label,
        labels=tuple(map(str, range(CHOICES))),
        reasons=reasons,
    )


VCR_QA = _task("vcr_qa", "VCR Q→A", "answer_label", reasons=False)
VCR_QAR = _task("vcr_qar", "VCR QA→R", "rationale_label", reasons=True)
