"""A user's own task: a YAML file that names files, columns, labels or a target, and metrics."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from xdscale.data.task_files import FORMATS, place, read_rows
from xdscale.errors import XdscaleError
from xdscale.recipe import NameOrPath, Section
from xdscale.recipe_values import read_validated
from xdscale.tasks.contract import task_names
from xdscale.tasks.metrics import METRICS

if TYPE_CHECKING:
    from xdscale.tasks.text import TextTask

MOST_FOUND_LABELS = 100
"""More labels than these are found in no file: they are listed, or the column holds something else."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{,99}")
_RESERVED = ("all", "logs", "others", "sweep.json")


class OwnTask(Section):
    """A task of the user's own; files lie where the YAML file lies, unless their names say another place."""

    name: str = Field("", description="as in folders and settings; default: the YAML file's name")
    title: str = Field("", description="head of its column in reports; default: its name")
    train: NameOrPath = Field(description="file of the training examples: .tsv, .csv, .jsonl or .parquet")
    dev: NameOrPath = Field(description="file of the development examples; the training file itself: a tenth of it")
    test: NameOrPath | None = Field(None, description="file of examples without labels, to be predicted")
    text: tuple[str, ...] = Field((), description="column of the text, or the two columns of a pair")
    choices: tuple[str, ...] = Field((), description="columns of which one is right, each read after the text, if any")
    image: tuple[str, ...] = Field((), description="column of the image's id in --regions, or two columns of a pair")
    label: str | None = Field(None, description="column of the class, or of the right choice")
    labels: tuple[str, ...] = Field((), description="what stands there, in the order of the classes; default: found")
    target: str | None = Field(None, description="column of a number to be predicted, instead of label")
    metrics: tuple[str, ...] = Field((), description="the first is the column's; default: accuracy, or rmse")
    id: str | None = Field(
        None, description="column that names an example, in predictions too; default: its number, counted from 0"
    )

    @field_validator("text", "choices", "image", "labels", "metrics", mode="before")
    @classmethod
    def _as_texts(cls, value: Any) -> Any:
        """Takes one name for a list of one, and labels that YAML reads as numbers or switches for what files hold."""
        values = value if isinstance(value, list | tuple) else [value]
        return [json.dumps(item) if isinstance(item, bool | int | float) else item for item in values]

    def task(self) -> "TextTask":
        """Returns the task."""
        from xdscale.tasks.text import TextTask  # which needs numpy

        return TextTask(
            name=self.name,
            title=self.title or self.name,
            folder="",
            train=self.train,
            dev={"dev": self.dev},
            test={f"{self.name}.tsv": self.test} if self.test else {},
            first=self.text[0] if self.text else None,
            seconds=self.choices or self.text[1:],
            label=self.label or self.target,
            labels=self.labels,
            id=self.id,
            predicts_by_id=self.id is not None,
            metrics=self.metrics,
            score=self.metrics[0],
            image_columns=self.image,
        )

    def columns(self) -> dict[str, Any]:
        """Returns what must be equal, besides the files, for two models' results to be comparable."""
        return self.model_dump(
            mode="json", include={"text", "choices", "image", "label", "labels", "target"}, exclude_defaults=True
        )


def read_own_task(path: Path) -> OwnTask:
    """Reads the YAML file of a task, and the first row of each of its files; names, labels and metrics are filled in.

    Raises:
        XdscaleError: not such a file, an unknown key, values that contradict each other, a file or a column that is
            missing, or labels that cannot be found; the file and the value are named.
    """
    own = read_validated(path, [], OwnTask)
    metrics = own.metrics or ("rmse" if own.target else "accuracy",)
    same = {key: str(Path(getattr(own, key))) for key in ("train", "dev")}  # ./a.tsv and a.tsv are one file
    own = own.model_copy(update={"name": own.name or path.stem, "metrics": metrics, **same})
    check_values(str(path), own)
    for key, name in (("train", own.train), ("dev", own.dev), ("test", own.test)):
        if name is not None:
            _check_file(path, own, key, path.parent / name)
    if (path.parent / own.train).samefile(path.parent / own.dev):  # by a link, say
        own = own.model_copy(update={"dev": own.train})
    if own.label and not own.labels:
        own = own.model_copy(update={"labels": _find_labels(own, path.parent / own.train)})
    if "f1" in metrics and len(own.labels) != 2:
        raise XdscaleError(
            f"{path}: metrics: f1 is of the second of two labels, there are {len(own.labels)}; macro_f1 is the mean "
            "over classes"
        )
    return own


def check_values(where: str, own: OwnTask) -> None:
    """Refuses what contradicts itself, with the names filled in: a description that a run folder holds, too.

    Raises:
        XdscaleError: begins with `where`.
    """
    fitting = [name for name, metric in METRICS.items() if metric.of == ("numbers" if own.target else "classes")]
    columns = [*own.text, *own.choices, *own.image, *filter(None, (own.label, own.target))]
    twice = sorted({name for name in columns if columns.count(name) > 1} | {
        name for name in own.labels if own.labels.count(name) > 1
    })  # fmt: skip
    unfit = [name for name in own.metrics if name not in fitting]
    for wrong, problem in (
        (
            not _NAME.fullmatch(own.name) or own.name in _RESERVED,
            f"name = {own.name!r}: expected small letters, digits and . _ -, at most 100, and none of "
            f"{', '.join(_RESERVED)}",
        ),
        (not own.title.isprintable(), f"title = {own.title!r}: expected one line of characters that can be shown"),
        (own.name in task_names(), f"name = {own.name!r}: there is a task of this name already; choose another"),
        (
            bool(own.label) == bool(own.target),
            "needs one of label (the column of a class, or of the right choice) and target (of a number)",
        ),
        (own.target and (own.labels or own.choices), "labels and choices go with label; target is a number"),
        (not own.text and not own.choices, "names nothing to read; needs text (one column or two), choices, or both"),
        (len(own.text) > 2, f"text: {len(own.text)} columns; expected one, or the two of a pair"),
        (own.choices and len(own.text) > 1, "text: expected one column, since each of the choices is the second text"),
        (len(own.image) > 2, f"image: {len(own.image)} columns; expected one, or the two of a pair"),
        (len(own.choices) == 1, "choices: one column; expected one for each of at least two choices"),
        (len(own.labels) == 1, f"labels: only {own.labels[:1]}; expected at least two"),
        (
            own.choices and own.labels and len(own.labels) != len(own.choices),
            f"labels: {len(own.labels)} of them, but {len(own.choices)} choices; expected one word for each, in order",
        ),
        (twice, f"{', '.join(map(repr, twice))} is named twice"),
        (not own.metrics, "metrics: none"),
        (unfit, f"metrics: {', '.join(map(repr, unfit))}; with {'target' if own.target else 'label'} they are "
         f"{', '.join(fitting)}"),
    ):  # fmt: skip
        if wrong:
            raise XdscaleError(f"{where}: {problem}")


def _check_file(path: Path, own: OwnTask, key: str, file: Path) -> None:
    if file.suffix not in FORMATS:
        raise XdscaleError(f"{path}: {key} = {file.name!r}: expected a name that ends with {', '.join(FORMATS)}")
    if not os.path.isfile(file):  # unlike Path.is_file also where a name is too long
        raise XdscaleError(f"{path}: {key} = {file}: no such file; names are relative to the folder of {path.name}")
    wanted = [*own.text, *own.choices, *own.image, *([own.label or own.target] if key != "test" else [])]
    next(read_rows(file, [*wanted, *([own.id] if own.id else [])], path.name), None)


def _one_spelling(label: str) -> str:
    """Returns what labels that mean the same have in common: "Yes" and "yes ", and 1 and the 1.0 of a joined table."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label.strip().casefold())


def _find_labels(own: OwnTask, train: Path) -> tuple[str, ...]:
    if own.choices:
        return tuple(map(str, range(len(own.choices))))
    found: set[str] = set()
    for line, row in read_rows(train, [own.label], own.name):
        label = row[own.label]
        if not label.strip():
            raise XdscaleError(f"{place(train, line)}: {own.label} is empty; expected a label")
        found.add(label)
        if len(found) > MOST_FOUND_LABELS:
            raise XdscaleError(
                f"{place(train, line)}: more than {MOST_FOUND_LABELS} labels in {own.label!r}, such as {label[:80]!r}; "
                "for a number write target instead of label; if they are classes, list them under labels"
            )
    if not found:
        raise XdscaleError(f"{train}: no examples in it")
    if len(found) < 2:
        raise XdscaleError(f"{train}: only {sorted(found)} in {own.label!r}; expected at least two labels")
    alike: dict[str, str] = {}
    for label in sorted(found):
        other = alike.setdefault(_one_spelling(label), label)
        if other != label:
            raise XdscaleError(
                f"{train}: {own.label} holds {other!r} and {label!r}; make them one, or list both under labels"
            )
    numbers = all(re.fullmatch(r"-?\d{1,99}", label) for label in found)
    return tuple(sorted(found, key=int if numbers else None))
