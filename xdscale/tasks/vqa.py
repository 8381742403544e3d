"""VQA v2, in its public files: an open question about an image, answered from a list of frequent answers."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic needs this one on Python 3.11

from xdscale.data.json_shapes import Text, read_whole
from xdscale.data.task_files import NO_LABEL, Example
from xdscale.errors import XdscaleError
from xdscale.files import count_of, file_sha256, shown
from xdscale.tasks.contract import TaskData
from xdscale.tasks.text import TextTask, held_out
from xdscale.tasks.vqa_accuracy import PEOPLE, credit_of, normal_form, stripped

if TYPE_CHECKING:
    import torch

ANSWERS = "answers.json"
"""A list of answers of the user's own: texts in the order of the classes, or an object from text to number."""

LEAST_COUNT = 9
"""An answer is on the list that is made here if it is the commonest one of so many questions."""

UNKNOWN = "<unk>"
"""On some public lists; it is nobody's answer."""


class _Question(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    question_id: int
    image_id: int
    question: Text


class _Questions(TypedDict):
    questions: list[_Question]


class _Answer(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    answer: str


class _Annotation(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    question_id: int
    image_id: int
    answers: list[_Answer]


class _Annotations(TypedDict):
    annotations: list[_Annotation]


class _Commonest(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)
    multiple_choice_answer: str


class _CommonestAnswers(TypedDict):
    annotations: list[_Commonest]


@dataclass(frozen=True, kw_only=True)
class VisualQuestions(TextTask):
    """Visual question answering as VQA v2 has it; `labels`, the answers, are found in the files.

    An example's `truth` holds each answer of the list that earns something, with its credit: VQA accuracy is the mean
    credit of the answers given, and the credits are the targets of training.

    Attributes:
        join: whether nine tenths of the validation images are trained on too, as for results on the test splits; the
            rest, by a hash of the image's id, is what is measured.
    """

    images = 1
    reads = "answer"

    join: bool = False

    def read(self, data: Path) -> TaskData:
        """Reads all splits; the task of the result knows its answers.

        Raises:
            XdscaleError: as `TextTask.read`; a question has no annotation or an annotation no question, a number stands
                twice, there are not ten answers, or the list of answers is not in order.
        """
        folder = self.locate(data)
        labelled = [_annotations_of(name) for name in (self.train, *self.dev.values())]
        given = folder / ANSWERS
        answers = _read_answers(given) if given.is_file() else _frequent_answers([folder / name for name in labelled])
        found = super(VisualQuestions, replace(self, labels=answers)).read(data)
        counts = [len(found.train), *map(len, found.dev.values())]
        files = {name: {"sha256": file_sha256(folder / name), "rows": n} for name, n in zip(labelled, counts)}
        digest = hashlib.sha256("\n".join(answers).encode()).hexdigest()
        files["list of answers"] = {"sha256": digest, "rows": len(answers)}
        train, dev = found.train, found.dev
        if self.join:
            ((split, joined),) = dev.items()
            dev = {split: [example for example in joined if held_out(example.images[0])]}
            train = train + [example for example in joined if not held_out(example.images[0])]
            if not dev[split]:
                raise XdscaleError(f"{folder / self.dev[split]}: has too few images to hold a tenth of them out")
        return replace(found, train=train, dev=dev, files=found.files | files)

    def read_examples(self, path: Path, *, labelled: bool) -> list[Example]:
        """Reads a file of questions, and the file of their annotations beside it."""
        annotations = _read_annotations(path.with_name(_annotations_of(path.name))) if labelled else {}
        examples, seen = [], set()
        for number, question in enumerate(read_whole(path, _Questions)["questions"]):
            identifier, where = question["question_id"], f"{path}: questions[{number}]"
            if identifier in seen:
                raise XdscaleError(f"{where}: question_id {identifier} stands twice; each question has its own")
            seen.add(identifier)
            truth, label = (), None
            if labelled:
                truth = self._earned(_annotation_of(where, question, annotations, path))
                label = max(truth, key=lambda answer: answer[1])[0] if truth else NO_LABEL
            texts = ((question["question"],),)
            image = str(question["image_id"])
            examples.append(Example(str(identifier), texts, label, number + 1, images=(image,), truth=truth))
        if not examples:
            raise XdscaleError(f"{path}: questions is empty; expected at least one question")
        _refuse_surplus(path, annotations, seen)
        return examples

    def targets(self, examples: Sequence[Example], regions: Any = None) -> np.ndarray:
        """Returns the credit of each answer of the list, float64 [n, answers]; it sums to no fixed number."""
        targets = np.zeros((len(examples), len(self.labels)))
        for row, example in zip(targets, examples):
            for answer, credit in example.truth:
                row[answer] = credit
        return targets

    def loss(
        self, logits: "torch.Tensor", targets: "torch.Tensor", real: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Computes the KL divergence of the softmax from the credits, as they are, and the credit of the answers.

        A question whose answers are not on the list adds nothing (VisualBERT's release).
        """
        import torch

        targets = targets.masked_fill(~real[:, None], 0.0)
        predicted = logits.log_softmax(-1)
        loss = (torch.special.xlogy(targets, targets) - targets * predicted).sum()
        return loss, targets.gather(1, logits.detach().argmax(-1, keepdim=True)).sum()

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns VQA accuracy."""
        credits = [self.credit(example, value) for example, value in zip(examples, predictions.tolist())]
        return {"vqa_accuracy": float(np.mean(credits))}

    def credit(self, example: Example, prediction: float) -> float:
        """Returns what the public evaluation gives for an answer of the list."""
        return dict(example.truth).get(int(prediction), 0.0)

    def answer(self, example: Example, prediction: float) -> dict[str, Any]:
        """Returns the numbers and texts of the best answer and of the given one, and its credit."""
        label, said = int(example.label), int(prediction)
        return {
            "label": label,
            "prediction": said,
            "best": None if label == NO_LABEL else self.labels[label],
            "answer": self.labels[said],
            "credits": {"vqa_accuracy": self.credit(example, prediction)},
        }

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns the result file of the challenge's server: a list of question_id and answer."""
        results = [
            {"question_id": int(example.id), "answer": self.labels[int(value)]}
            for example, value in zip(examples, predictions.tolist())
        ]
        return json.dumps(results, ensure_ascii=False) + "\n"

    def _earned(self, given: list[str]) -> tuple[tuple[int, float], ...]:
        """Returns the numbers of the answers that earn something, and how much; see `vqa_accuracy.credit`."""
        counts, numbers = _merged(Counter(given), stripped), self._by_text
        if len(counts) > 1:
            counts, numbers = _merged(counts, normal_form), self._by_normal_form
        return tuple(
            (number, credit_of(count)) for answer, count in counts.items() for number in numbers.get(answer, ())
        )

    @cached_property
    def _by_text(self) -> Mapping[str, list[int]]:
        return self._numbers([stripped(answer) for answer in self.labels])

    @cached_property
    def _by_normal_form(self) -> Mapping[str, list[int]]:
        return self._numbers([normal_form(stripped(answer)) for answer in self.labels])

    def _numbers(self, forms: list[str]) -> Mapping[str, list[int]]:
        numbers = defaultdict(list)
        for number, (form, answer) in enumerate(zip(forms, self.labels)):
            if answer != UNKNOWN:
                numbers[form].append(number)
        return dict(numbers)


def _merged(counts: Mapping[str, int], form: Callable[[str], str]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for answer, count in counts.items():
        merged[form(answer)] += count
    return merged


def _annotations_of(questions: str) -> str:
    return questions.replace("_OpenEnded", "").replace("_questions", "_annotations")


def _read_annotations(path: Path) -> dict[int, tuple[int, int, list[str]]]:
    """Returns place, image and answers of each annotation by the number of its question."""
    found: dict[int, tuple[int, int, list[str]]] = {}
    for number, annotation in enumerate(read_whole(path, _Annotations)["annotations"]):
        identifier, where = annotation["question_id"], f"{path}: annotations[{number}]"
        answers = [answer["answer"] for answer in annotation["answers"]]
        if identifier in found:
            raise XdscaleError(f"{where}: question_id {identifier} stands twice; the other is {found[identifier][0]}")
        if len(answers) != PEOPLE:
            raise XdscaleError(f"{where}: question_id {identifier} has {len(answers)} answers, expected {PEOPLE}")
        found[identifier] = (number, annotation["image_id"], answers)
    return found


def _annotation_of(where: str, question: _Question, annotations: Mapping[int, tuple], path: Path) -> list[str]:
    identifier, image = question["question_id"], question["image_id"]
    file = _annotations_of(path.name)
    if identifier not in annotations:
        raise XdscaleError(f"{where}: question_id {identifier} has no annotation in {file}; are both of one split?")
    place, other, answers = annotations[identifier]
    if image != other:
        raise XdscaleError(
            f"{where}: question_id {identifier} is about image {image}, but {file}: annotations[{place}] says {other}"
        )
    return answers


def _refuse_surplus(path: Path, annotations: Mapping[int, tuple], seen: set[int]) -> None:
    for identifier, (place, *_) in annotations.items():
        if identifier not in seen:
            raise XdscaleError(
                f"{path.with_name(_annotations_of(path.name))}: annotations[{place}]: question_id {identifier} is no "
                f"question of {path.name}; are both of one split?"
            )


def _frequent_answers(paths: list[Path]) -> tuple[str, ...]:
    """Makes the list of answers, as the public code of bottom-up attention does: 3,129 of VQA v2.

    Counted are the annotations' `multiple_choice_answer`, in normal form, in training and validation files together.
    The commonest answer comes first; equally common ones stand in the order of their texts.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(
            normal_form(stripped(annotation["multiple_choice_answer"]))
            for annotation in read_whole(path, _CommonestAnswers)["annotations"]
        )
    frequent = sorted((-count, answer) for answer, count in counts.items() if count >= LEAST_COUNT)
    if len(frequent) < 2:
        raise XdscaleError(
            f"{', '.join(map(str, paths))}: {len(frequent)} answers are the commonest one of {LEAST_COUNT} questions, "
            f"at least 2 are needed; put a list of answers beside them, {ANSWERS}"
        )
    return tuple(answer for _, answer in frequent)


def _read_answers(path: Path) -> tuple[str, ...]:
    """Reads a list of answers, or an object from answer to number such as UNITER's and LXMERT's ans2label.json."""
    stored = read_whole(path, list[str] | dict[str, int])
    numbered = list(stored.items()) if isinstance(stored, dict) else [(answer, i) for i, answer in enumerate(stored)]
    answers: list[str | None] = [None] * len(numbered)
    seen: dict[str, int] = {}
    for answer, number in numbered:
        if answer in seen:
            raise XdscaleError(f"{path}: {shown(answer)} stands twice, as answers {seen[answer]} and {number}")
        if not 0 <= number < len(answers):
            raise XdscaleError(
                f"{path}: {shown(answer)} has number {number}; expected 0 to {len(answers) - 1}, each of them once"
            )
        if answers[number] is not None:
            raise XdscaleError(f"{path}: {shown(answers[number])} and {shown(answer)} both have number {number}")
        answers[number], seen[answer] = answer, number
    if len(answers) < 2:
        raise XdscaleError(f"{path}: holds {count_of(len(answers), 'answer')}; at least 2 are needed")
    return tuple(map(str, answers))


VQA = VisualQuestions(
    name="vqa",
    title="VQA v2",
    folder="VQA",
    train="v2_OpenEnded_mscoco_train2014_questions.json",
    dev={"dev": "v2_OpenEnded_mscoco_val2014_questions.json"},
    test={
        "v2_OpenEnded_mscoco_test-dev2015_results.json": "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "v2_OpenEnded_mscoco_test2015_results.json": "v2_OpenEnded_mscoco_test2015_questions.json",
    },
    first="question",
    label="answers",
    metrics=("vqa_accuracy",),
    score="vqa_accuracy",
)

VQA_TRAINVAL = replace(VQA, name="vqa_trainval", title="VQA v2, train + val", join=True)
