"""What a downstream task is and what is finetuned on it, and how both are found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from xdscale import registry
from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.names import is_url, nearest, resolve_path
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.registry import SUBJECTS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from xdscale.shards.regions import Regions, RegionTable
    from xdscale.systems.contract import ExampleCollator, Objective

GROUP = "xdscale.tasks"
"""Of the entry points through which installed packages offer tasks."""

SHIPPED = {
    name: f"xdscale.tasks.{name if name in ('swag', 'read') else 'glue'}:{name.upper()}"
    for name in ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli", "swag", "read")
} | {
    "vqa": "xdscale.tasks.vqa:VQA",
    "vqa_trainval": "xdscale.tasks.vqa:VQA_TRAINVAL",
    "vcr_qa": "xdscale.tasks.vcr:VCR_QA",
    "vcr_qar": "xdscale.tasks.vcr:VCR_QAR",
    "nlvr2": "xdscale.tasks.nlvr2:NLVR2",
    "flickr30k_entities": "xdscale.tasks.flickr30k_entities:FLICKR30K_ENTITIES",
    "refcoco": "xdscale.tasks.refcoco:REFCOCO",
    "refcoco_plus": "xdscale.tasks.refcoco:REFCOCO_PLUS",
}
"""Tasks that come with xdscale: on texts, in the order of XDBERT's Table 1, then on texts with images."""


@dataclass(frozen=True)
class TaskData:
    """A task's splits.

    Attributes:
        task: whose.
        train: training examples in file order.
        dev: the same for each development split; the first one's score is the task's.
        test: the same, without labels, by the name of the file that the predictions go to.
        files: SHA-256 and rows of each file read, by its name.
        sources: the file of each split ("train", and the names in `dev` and `test`), for messages.
        notes: what a person should know of them.
    """

    task: Task
    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    files: dict[str, dict[str, str | int]]
    sources: dict[str, str]
    notes: tuple[str, ...] = ()

    def fingerprints(self) -> dict[str, str]:
        """Returns the SHA-256 (hex) of each file, by its name."""
        return {name: str(entry["sha256"]) for name, entry in sorted(self.files.items())}


class Task(Protocol):
    """A downstream task. `xdscale.tasks.text.TextTask` is one for texts in files; most tasks are instances of it.

    Attributes:
        name: on the command line and in folders.
        title: head of its column in reports.
        sentences: texts that an encoder is given together: 1 or 2.
        images: images that an encoder is given with them: 0, 1 or 2.
        reads: what is asked of it: to judge the whole input, to answer an open question, or to point at a region.
        choices: of which one is right, each judged by itself; 0 for a task that classifies or predicts a number.
        outputs: numbers that a head gives for each such input; 0 where it points, and gives one for each region.
        metrics: names in `xdscale.tasks.metrics.METRICS`, measured on each development split.
        score: the one of them that stands in the column.
    """

    name: str
    title: str
    sentences: int
    images: int
    reads: Literal["input", "answer", "region"]
    choices: int
    outputs: int
    metrics: tuple[str, ...]
    score: str

    def fetch(self, data: Path) -> None:
        """Puts the task's files into the folder `data` unless they are there; called where no folder was given."""

    def read(self, data: Path) -> TaskData:
        """Reads all splits from the folder `data`."""

    def targets(self, examples: Sequence[Example], regions: Regions | None = None) -> np.ndarray:
        """Returns what `loss` compares with, [n] or [n, …]: integers, or float64, which `loss` gets as fp32.

        Args:
            examples: some of the task's.
            regions: of their images, in the order of `Example.images`; None of a task that reads none. A task that
                points returns as many columns as the image with the most regions has.
        """

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes a micro-batch's loss and how many examples are right, both summed over the real ones.

        Args:
            logits: fp32 [b, outputs], of choices [b, choices]; of regions [b, most regions], -inf beyond an image's.
            targets: int64 or fp32 [b, …]; integers are `NO_LABEL` where `real` is False.
            real: bool [b], False for the examples that fill up the last micro-batch.
        """

    def predict(self, logits: np.ndarray, regions: Regions | None = None) -> np.ndarray:
        """Turns logits, [n, outputs] or [n, choices], into predictions, float64 [n].

        A task that points returns what its measures need of the regions, [n, …] with NaN for what is not there.
        """

    def measure(self, predictions: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the value of each of `metrics`."""

    def answer(self, example: Example, prediction: Any) -> dict[str, Any]:
        """Returns "label", "prediction" and whatever else is written down of a labelled example."""

    def submission(self, name: str, examples: Sequence[Example], predictions: np.ndarray) -> str:
        """Returns the text of the file `name` with the predictions of an unlabelled split."""


def read_task(task: Task, folder: Path, regions: RegionTable | None) -> TaskData:
    """Reads a task's splits, and finds the images that they speak of.

    Args:
        task: whose.
        folder: of its files.
        regions: where images are looked up; the data's files then count the table as "regions".

    Raises:
        XdscaleError: as `Task.read`; or it reads images, and there are no regions, or not those of each of its images;
            or the task can tell (`check_regions`) that they are of something else.
    """
    data = task.read(folder)
    if not task.images:
        return data
    if regions is None:
        raise XdscaleError(f"--task {task.name} reads images: --regions DATASET names the dataset with their regions")
    for split, examples in {"train": data.train, **data.dev, **data.test}.items():
        try:
            regions.rows([image for example in examples for image in example.images])
            if hasattr(task, "check_regions"):
                task.check_regions(examples, regions)
        except XdscaleError as error:
            raise XdscaleError(f"{data.sources[split]}: {error}") from None
    return replace(data, files=data.files | {"regions": {"sha256": regions.fingerprint, "rows": len(regions)}})


def open_regions(name: str | None) -> RegionTable | None:
    """Opens the table of image regions of a dataset; None where none is named.

    Raises:
        XdscaleError: no dataset, one behind a URL, or it holds no such table.
    """
    if name is None:
        return None
    if is_url(name):
        raise XdscaleError(f"{name}: a task's regions are read from a folder; copy the dataset to this machine")
    from xdscale.shards.regions import RegionTable  # most tasks read none

    try:
        folder = resolve_path(name)
    except XdscaleError as error:
        raise XdscaleError(
            f"the dataset of image regions, {error}; make it with 'xdscale regions import' or 'xdscale regions extract'"
        ) from None
    return RegionTable.open(folder)


LARGE_FROM = 1024
"""Hidden size from which an encoder is "large-sized" (paper Table 4)."""

SUBJECT_GROUP = "xdscale.subjects"
"""Of the entry points through which installed packages offer what can be finetuned: the class of its settings."""


class SubjectFacts(NamedTuple):
    """What is known of a model before it is built.

    Attributes:
        hidden_size: of its encoder; decides between the learning rates for base and for large.
        encoder: what it is, in words.
        weights: the files whose SHA-256 identifies it; None if its weights are random.
    """

    hidden_size: int
    encoder: str
    weights: list[Path] | None


class Subject(ABC):
    """A model as tasks read it: its input and its head. Its constructor reads nothing yet.

    Args:
        model: folder or name.
        settings: how it is built: the class of settings that names it as its implementation.
        regions: where its task reads images.
    """

    def __init__(self, model: str, settings: ModelSettings, regions: RegionTable | None = None) -> None:
        self.model, self.settings, self.regions = model, settings, regions

    @classmethod
    def exports(cls) -> bool:
        """Returns whether what is finetuned so can be exported."""
        return cls.export is not Subject.export

    def require_readable(self, task: Task) -> None:
        """Checks that the model can read a task's input.

        Raises:
            XdscaleError: it reads no images, and the task has some.
        """
        if task.images:
            raise XdscaleError(f"--task {task.name}: {self.model} as it is finetuned here reads no images")

    def objectives(self) -> dict[str, Objective]:
        """Returns by name what it learns beside a task; its forward returns their terms."""
        return {}

    def notes(self) -> list[str]:
        """Returns what a person should know of the model and the regions that it is given."""
        return []

    def tokenizer(self) -> Tokenizer | None:
        """Returns what makes word pieces of texts, if there are any that it does not know."""
        return None

    def reads_outlines(self) -> bool:
        """Returns whether it reads the outlines of VCR's objects, which then stand in each checkpoint's hash."""
        return False

    @abstractmethod
    def describe(self) -> SubjectFacts:
        """Finds and checks the model's files.

        Raises:
            XdscaleError: no such model, its weights or its tokenizer are missing, or it has too few positions.
        """

    @abstractmethod
    def collator(self, task: Task, examples: Sequence[Example]) -> ExampleCollator:
        """Tokenises a split."""

    def training_collator(self, task: Task, examples: Sequence[Example], seed: int | None) -> ExampleCollator:
        """Tokenises the split that is trained on.

        Args:
            task: whose.
            examples: in file order.
            seed: of what is drawn for an example; None where the settings say that nothing is.
        """
        return self.collator(task, examples)

    @abstractmethod
    def build(self, task: Task, *, sha256: str | None = None) -> nn.Module:
        """Builds the model with a new head: `forward(batch)` gives logits; `encoder` is what is not the head.

        The head takes its values from torch's global generator: seed it before, alike on all ranks. Where the model has
        a loss of its own for its head, `loss` is asked in the place of the task's, with the same arguments.

        Args:
            task: decides the head.
            sha256: that the weights must have, if it is known.

        Raises:
            XdscaleError: the weights cannot be loaded.
        """

    def export(self, task: Task, state: dict[str, torch.Tensor], out: Path) -> str:
        """Writes a finetuned model as a folder that can be finetuned again.

        Args:
            task: on which.
            state: of what `build` returned, in fp32.
            out: an empty folder.

        Returns:
            What was written, in words.

        Raises:
            XdscaleError: models of its kind are not exported.
        """
        exported = (name for name in SUBJECTS if find_subject(name).exports())
        raise XdscaleError(f"{self.model}: as it is finetuned here, it is not exported; {', '.join(exported)} are")


def find_settings(name: str) -> type[ModelSettings]:
    """Returns the settings of what can be finetuned by its name, importing their module alone.

    Raises:
        XdscaleError: there is none of that name (the nearest right one is named), or they cannot be imported.
    """
    return registry.find(SUBJECT_GROUP, SUBJECTS, name, "--subject", ModelSettings)


def all_settings() -> Iterator[tuple[str, type[ModelSettings]]]:
    """Yields names and settings of all that can be finetuned: what ships first, then what packages offer.

    What cannot be imported is left out: whoever names it is told.
    """
    for name in registry.locate(SUBJECT_GROUP, SUBJECTS):
        with suppress(XdscaleError):
            yield name, find_settings(name)


def find_subject(name: str) -> type[Subject]:
    """Returns what can be finetuned by its name, importing its module.

    Raises:
        XdscaleError: as `find_settings`; or it cannot be imported.
    """
    return registry.implementation(find_settings(name), f"--subject {name}", Subject)


def task_names() -> list[str]:
    """Returns the names of all tasks: those that come with xdscale, then those of installed packages.

    Raises:
        XdscaleError: two packages offer the same name.
    """
    return list(registry.locate(GROUP, SHIPPED))


def find_task(name: str) -> Task:
    """Returns a task by its name, importing its module alone.

    Raises:
        XdscaleError: no task has that name (the nearest right one is named), two packages offer it, or its module
            cannot be imported.
    """
    places = registry.locate(GROUP, SHIPPED)
    if name not in places:
        known = f"known tasks: {', '.join(places)}; a task of your own is a file that ends with .yaml"
        raise XdscaleError(
            f"--task {name}: no such task; {nearest(name.lower().replace('-', ''), list(places), known)}"
        )
    task = registry.load(places[name], f"--task {name}")
    if getattr(task, "name", None) != name:
        raise XdscaleError(
            f"--task {name}: {places[name]} is offered under this name, but its name is "
            f"{getattr(task, 'name', None)!r}; make both the same"
        )
    return task
