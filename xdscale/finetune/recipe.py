"""Finetuning recipes: one file for all tasks and sizes, resolved to one recipe per run."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, create_model, field_validator

from xdscale.errors import XdscaleError
from xdscale.files import shown
from xdscale.names import nearest, own_or_shipped
from xdscale.recipe import (
    NameOrPath,
    Optim,
    Output,
    Patience,
    Recipe,
    Run,
    Section,
    Training,
    shipped_recipes,
    shipped_settings,
)
from xdscale.recipe_values import is_overridden, read_values, validated
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.tasks.contract import Task, TaskData, all_settings, find_settings, find_task
from xdscale.tasks.own import OwnTask, check_values

FORMAT = 1
"""Of the runs: raised when the same settings come to mean another computation."""

RESULT = "result.json"
"""Written last into a run folder: where it stands, the run is finished."""

MODEL = "model"
"""Of a run's folder: what is kept of the finetuned model."""

OTHERS = "others"
Rate = Annotated[float, Field(gt=0, strict=True)]
KeepModel = Annotated[
    bool | Literal["best"],
    Field(
        description="export finetuned models, where their subject can, into the folder model of their runs: best "
        "of each task's best seed alone, true of all, false of none"
    ),
]
Seeds = Annotated[int, Field(gt=0, le=10_000, strict=True)]
Size = Literal["base", "large"]


class OptimSettings(Optim):
    """Optimizer and schedule; the learning rate by size and task, or one for all."""

    learning_rate: Rate | dict[Size, dict[str, Rate]] = Field(description="one for all, or by size and task")
    weight_decay: float = Field(0.0, ge=0, description="of the parameters that 'decayed' says")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps in which the rate rises from 0")


class TrainingSettings(Section):
    """How long, and how much at once."""

    epochs: float = Field(3, gt=0, le=1_000_000, description="passes over the training examples; may be a fraction")
    global_batch: int = Field(32, ge=1, lt=2**31, description="examples per optimiser step, over all ranks")
    best: Literal["loss/task", "accuracy/task"] | None = Field(
        None, description="figure of each epoch whose best weights predict: loss/task or accuracy/task"
    )
    patience: Patience = Field(None, description="epochs in a row without a better one that end the run")


class RunSettings(Section):
    """What decides neither the result nor how it is computed."""

    kernels: Literal["fused", "plain"] = Field("fused", description="the kernels, or their readable definitions")
    eval_samples: int = Field(2048, ge=1, description="development examples per validation on the way, at most")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(1, ge=1, description="while the run lasts; a finished one keeps none")
    keep_model: KeepModel = "best"
    stop_at_step: int | None = Field(None, ge=1, description="save and stop here; the schedule still follows epochs")
    max_skipped_in_row: int = Field(5, ge=1, description="non-finite steps in a row that stop the run")
    hang_seconds: int = Field(45, ge=1, description="shortest time without progress after which a rank counts as hung")
    verify: bool = Field(True, description="check every shard's SHA-256 before the first step")


class FinetuneSettings(Section):
    """A finetuning recipe file, its section `model` that of a subject (see `load_settings`)."""

    model: ModelSettings = ModelSettings()
    optim: OptimSettings
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()
    seeds: dict[str, Seeds] = Field({OTHERS: 5}, description="seeds per task; the paper reports the median")

    def seeds_of(self, task: str) -> int:
        """Returns how many seeds a task has."""
        return self.seeds.get(task, self.seeds[OTHERS])

    def learning_rate(self, task: str, size: Size) -> float:
        """Returns the learning rate of a task for an encoder's size (Table 5)."""
        rates = self.optim.learning_rate
        if isinstance(rates, float):
            return rates
        return rates[size].get(task, rates[size][OTHERS])


class SubjectSection(ModelSettings):
    """What is finetuned in one run; `section_of` has the subject's own settings too."""

    name: str
    subject: str
    size: Size
    weights_sha256: str | None


@cache
def section_of(settings: type[ModelSettings]) -> type[SubjectSection]:
    """Returns the section of a run with a subject's settings."""
    return create_model("SubjectSection", __base__=(settings, SubjectSection))


class TaskSection(Section):
    """On what, for how long; `own` describes a task of the user's own."""

    name: str
    epochs: float
    own: OwnTask | None = None

    def find(self) -> Task:
        """Returns the task.

        Raises:
            XdscaleError: as `find_task`; or the description of the user's own contradicts itself.
        """
        if self.own is None:
            return find_task(self.name)
        check_values("task.own", self.own)
        return self.own.task()


class TaskFiles(Section):
    """Where the task's files are, and the dataset with its images' regions; their hashes stand in every checkpoint."""

    folder: NameOrPath
    regions: NameOrPath | None = None


class FinetuneRun(Run):
    """What decides neither the result nor how it is computed."""

    label: str = Field(description="the model's name in tables")
    keep_model: KeepModel = "best"


class FinetuneRecipe(Recipe):
    """Everything that decides the result of one run: one model, one task, one seed."""

    implementation: ClassVar[str] = "xdscale.finetune.run:FinetuneSystem"

    system: Literal["finetune"] = "finetune"
    model: SerializeAsAny[SubjectSection]
    data: TaskFiles
    run: FinetuneRun
    task: TaskSection

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to be continued; where known weights lie is not part of it."""
        found = super().identity()
        if self.model.weights_sha256 is not None:
            del found["model"]["name"]
        return found

    @field_validator("model", mode="before")
    @classmethod
    def _has_its_subjects_keys(cls, value: Any) -> Any:
        if not (isinstance(value, dict) and isinstance(value.get("subject"), str)):
            return value
        try:
            return section_of(find_settings(value["subject"])).model_validate(fitting(value, value["subject"]))
        except XdscaleError as error:
            raise ValueError(str(error)) from None


def fitting(values: Mapping[str, Any], subject: str, where: Callable[[str], str] = "model.{}".format) -> dict[str, Any]:
    """Returns a section `model` without the keys of other subjects, which may say what is so anyway.

    Args:
        values: the section.
        subject: whose it is to be.
        where: from a key to how a message about it begins.

    Raises:
        XdscaleError: it states another value than the default of those that have the key, who are named.
    """
    own, fit = find_settings(subject).model_fields.keys() | SubjectSection.model_fields.keys(), {}
    for key, value in values.items():
        having = {name: kind.model_fields[key].default for name, kind in all_settings() if key in kind.model_fields}
        if key in own or not having:
            fit[key] = value
        elif value not in having.values():
            raise XdscaleError(
                f"{where(key)} = {shown(value)}: what is finetuned as {subject} has no such choice, it is one of "
                f"{', '.join(having)}; leave it out"
            )
    return fit


@cache
def _schema(kinds: tuple[type[ModelSettings], ...]) -> type[FinetuneSettings]:
    """Returns the class of a finetuning recipe whose section `model` has the keys of all kinds."""
    # Of a class and those made of it the latter, or Python finds no order of the bases.
    bases = tuple(kind for kind in kinds if not any(kind in other.__mro__[1:] for other in kinds))
    model = create_model("ModelSettings", __base__=bases, __doc__=ModelSettings.__doc__) if bases[1:] else bases[0]
    return create_model("FinetuneSettings", __base__=FinetuneSettings, model=(model, ...))


def load_settings(name: str, overrides: list[str], subject: str | None = None) -> FinetuneSettings:
    """Reads a finetuning recipe and applies overrides.

    Args:
        name: a YAML file, or the name of a shipped one.
        overrides: `section.key=value` items.
        subject: what is finetuned; None to take the keys of whatever can be.

    Raises:
        XdscaleError: no such recipe, not YAML, an unknown key, one that the subject has not, or a bad value.
            `check_tasks` checks names of tasks.
    """
    use = "a recipe of this name is one of 'xdscale train'; 'xdscale recipes --finetuning' lists those of finetuning"
    path = own_or_shipped(name, shipped_settings(), ".yaml", "finetuning recipe", elsewhere=shipped_recipes(), use=use)
    values = read_values(path, overrides, FinetuneSettings.model_fields)
    model = values.setdefault("model", {})
    kinds = [kind for _, kind in all_settings()] if subject is None else [find_settings(subject)]
    if subject is not None and isinstance(model, dict):
        typed = {key for key in model if is_overridden(overrides, "model", key)}
        values["model"] = fitting(
            model, subject, lambda key: f"{'the command line' if key in typed else path}: model.{key}"
        )
    settings = validated(values, _schema(tuple(kinds)), str(path), overrides)
    if isinstance(settings.optim.learning_rate, dict):
        for size in {"base", "large"} - settings.optim.learning_rate.keys():
            raise XdscaleError(f"{path}: optim.learning_rate has no {size!r}; it has base and large")
    for key, table in _tables(settings).items():
        if OTHERS not in table:
            raise XdscaleError(f"{path}: {key}: no value for {OTHERS!r}")
    return settings


def check_tasks(name: str, settings: FinetuneSettings, tasks: Sequence[str]) -> None:
    """Refuses settings for a task whose name is mistyped; warns of those for tasks that there are not.

    Args:
        name: of the recipe, for the message.
        settings: of the recipe.
        tasks: names of all that there are, tasks of the user's own only if they are asked for.

    Raises:
        XdscaleError: a table names another one, and nearly one of these.
    """
    for key, table in _tables(settings).items():
        for task in sorted(table.keys() - {*tasks, OTHERS}):
            question = nearest(task, tasks, "")
            if question:
                raise XdscaleError(f"{name}: {key}: unknown task {task!r}; {question}")
            print(f"warning: {name}: {key}: {task!r} is no task of this command", file=sys.stderr)


def resolve_run(
    settings: FinetuneSettings,
    data: TaskData,
    *,
    subject: dict[str, Any],
    source: Path,
    regions: str | None = None,
    seed: int,
    label: str,
    folder: Path,
    own: OwnTask | None = None,
) -> FinetuneRecipe:
    """Returns the recipe of one run.

    An epoch is as many steps as its examples fill batches; the last batch of a run may reach into a next epoch.

    Args:
        settings: of the recipe file.
        data: the task.
        subject: name, subject, size and weights_sha256 of the model, and more.
        source: the data folder.
        regions: dataset with the regions of the images.
        seed: of the new head, the shuffle and dropout.
        label: the model's name in tables.
        folder: the run folder.
        own: describes a task of the user's own.

    Raises:
        XdscaleError: the epochs are too many steps.
    """
    task, training = data.task.name, settings.training
    per_epoch = len(data.train) / training.global_batch
    steps = max(1, math.ceil(training.epochs * per_epoch))
    if steps >= 2**31:
        raise XdscaleError(
            f"{task}: training.epochs = {training.epochs:g} are {steps:,} steps of {training.global_batch} examples; "
            "expected fewer than 2**31"
        )
    rates = settings.optim.model_dump() | {"learning_rate": settings.learning_rate(task, subject["size"])}
    known = {key: subject[key] for key in ("name", "subject", "size", "weights_sha256")}
    return FinetuneRecipe(
        model=settings.model.model_dump() | known,
        task=TaskSection(name=task, epochs=training.epochs, own=own),
        data=TaskFiles(folder=str(source), regions=regions if data.task.images else None),
        optim=Optim(**rates),
        training=Training(steps=steps, seed=seed, **training.model_dump(exclude={"epochs"})),
        run=FinetuneRun(**settings.run.model_dump(), eval_every=max(1, round(per_epoch)), label=label),
        output=Output(folder=str(folder)),
    )


def _tables(settings: FinetuneSettings) -> dict[str, dict[str, Any]]:
    """Returns what has values by task."""
    rates = settings.optim.learning_rate
    by_size = {f"optim.learning_rate.{size}": table for size, table in rates.items()} if isinstance(rates, dict) else {}
    return {"seeds": settings.seeds, **by_size}
