"""Recipes: the science of an experiment, as validated YAML.

A recipe decides the result (model, objectives, data, optimiser, schedule). How it is computed (precision, sharding,
micro-batch) stands in a DeepSpeed JSON file: see `xdscale.ds_config`. Each system has a schema, found by name.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from xdscale.errors import XdscaleError
from xdscale.files import shown
from xdscale.names import NO_URL, check_stated_url, expand_home, is_url, own_or_shipped
from xdscale.recipe_values import is_overridden, read_values, validated
from xdscale.recipe_yaml import write_yaml
from xdscale.registry import SYSTEMS, find, folder_of, locate

SHIPPED = Path(__file__).parent / "recipes"

GROUP = "xdscale.systems"
"""Entry points with which an installed package offers a system: its name, and `module:class` of its recipe."""

Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]

NameOrPath = Annotated[str, AfterValidator(expand_home)]


def _no_url(name: str) -> str:
    if "://" in name:
        raise ValueError(NO_URL)
    return name


OwnPath = Annotated[NameOrPath, AfterValidator(_no_url)]
"""A folder of this machine, which is written to."""


def _watches_a_figure(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and info.data.get("best") is None:
        raise ValueError("training.best must name the figure to watch")
    return value


Patience = Annotated[Annotated[int, Field(ge=1)] | None, AfterValidator(_watches_a_figure)]
"""Validations in a row without a better figure; the section's key `best`, which stands before it, names the figure."""


class Section(BaseModel):
    """A group of recipe keys; unknown keys are refused and values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("expected another value than true or false")
        return value


OBJECTIVE_WEIGHT: Any = Field(1.0, gt=0, description="factor of this objective's mean loss")


class Objectives(Section):
    """The losses that are minimised, by name; one that is null is off."""

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_off(cls, value: Any, info: ValidationInfo) -> Any:
        has_off = type(None) in get_args(cls.model_fields[info.field_name].annotation)
        if not isinstance(value, dict | BaseModel) and not (value is None and has_off):
            off = "null, which turns it off, or " if has_off else ""
            raise ValueError(f"expected {off}its keys, such as {{weight: 1.0}}; {{}} is all of their defaults")
        return value

    def weights(self) -> dict[str, float]:
        """Returns the weight of each objective that is on, by name."""
        return {name: term.weight for name, term in self if term is not None}


class ShardsSection(Section):
    """What is read."""

    shards: NameOrPath = Field(
        description="dataset: folder written by 'xdscale shards', or its URL (s3://…, https://…)"
    )


class Optim(Section):
    """Optimizer, and schedule of its learning rate; the defaults are those of XDBERT's paper, appendix C.1."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd is with momentum")
    learning_rate: float = Field(1e-4, gt=0, description="the largest, at the end of the warm-up")
    rate_factors: dict[str, Annotated[float, Field(gt=0, strict=True)]] = Field(
        {}, description="factors of the rate for parts of the model, such as {language: 0.1}, in finetuning {head: 10}"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-6, gt=0, description="AdamW's ε, added to the root of the second moment")
    bias_correction: bool = Field(True, description="of AdamW's moments; false as in the released code's BertAdam")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.01, ge=0, description="of the parameters that 'decayed' says")
    decayed: Literal["all", "weights", "biases_and_norms"] = Field(
        "all", description="weights are all but biases and norms; all as XDBERT's released code does"
    )
    schedule: Literal["linear", "constant", "step"] = Field("linear", description="after the warm-up")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    drop_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), validate_default=True, description="shares of the steps after which a step schedule drops the rate"
    )
    drop_factor: float = Field(0.1, gt=0, lt=1, description="of each drop of a step schedule")
    gradient_clipping: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="of a moving average of the weights, which validation and exports then use"
    )

    @field_validator("betas", "eps", "bias_correction", "momentum", "drop_factor")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        users = {"momentum": ("optimizer", "sgd"), "drop_factor": ("schedule", "step")}
        key, user = users.get(info.field_name, ("optimizer", "adamw"))
        if info.data.get(key, user) != user and value != cls.model_fields[info.field_name].default:
            raise ValueError(f"only optim.{key}={user} uses it, not {info.data[key]}; leave it out")
        return value

    @field_validator("drop_at")
    @classmethod
    def _drops_fit(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        schedule = info.data.get("schedule")
        if schedule is not None and (schedule == "step") != bool(value):
            raise ValueError(f"optim.schedule={schedule} needs {'shares such as [0.7, 0.9]' if not value else 'none'}")
        if any(later <= share for share, later in pairwise((info.data.get("warmup_ratio", 0.0), *value))):
            raise ValueError("expected shares that rise, all of them after optim.warmup_ratio")
        return value


class Training(Section):
    """How long, and how much at once."""

    steps: int = Field(ge=1, lt=2**31, description="optimiser steps in all")
    global_batch: int | None = Field(None, ge=1, lt=2**31, description="samples per optimiser step, over all ranks")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        validate_default=True,
        description="most tokens per step, in the place of global_batch; DeepSpeed's micro-batch counts them too",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of new weights, order, masks, pairs and dropout")
    best: str | None = Field(
        None,
        description="held-out figure whose best checkpoint stays and is exported, such as loss/mlm",
    )
    patience: Patience = Field(None, description="validations in a row without a better one that end the run")

    @field_validator("batch_tokens")
    @classmethod
    def _one_of_two(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "global_batch" in info.data and (value is None) == (info.data["global_batch"] is None):
            raise ValueError("a step is counted either in samples, training.global_batch, or in tokens; state one")
        return value


class Run(Section):
    """What decides neither the result nor how it is computed; all of it may change when a run continues."""

    kernels: Literal["fused", "plain"] = Field("fused", description="the kernels, or their readable definitions")
    eval_every: int = Field(100, ge=1, description="steps between validations; one also before and after")
    eval_samples: int = Field(512, ge=1, description="held-out samples per validation, at most")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; one also at the end")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the newest checkpoints stay")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints of steps that are multiples of this stay for good"
    )
    stop_at_step: int | None = Field(None, ge=1, description="save and stop here; the schedule still follows steps")
    max_skipped_in_row: int = Field(5, ge=1, description="non-finite steps in a row that stop the run")
    hang_seconds: int = Field(45, ge=1, description="shortest time without progress after which a rank counts as hung")
    cache: OwnPath | None = Field(None, description="local folder for shards from a URL; one for each node")
    cache_bytes: int | None = Field(
        None, ge=1, description="bytes for shards from a URL, fetched when needed; null fetches all first"
    )
    verify: bool = Field(True, description="check every shard's SHA-256 before the first step")
    max_damaged_shards: int = Field(0, ge=0, description="train without up to this many damaged shards")


class Output(Section):
    """Where the run is written."""

    folder: OwnPath = Field(description="run folder: checkpoints, log.jsonl, TensorBoard; a run in it is continued")


class Recipe(Section):
    """The sections of every system's recipe; a system adds its own: its model, its objectives.

    Attributes:
        implementation: `module:class` of the system (see `xdscale.systems.contract`), imported when it is trained.
        step_bench: `module:function` that `xdscale bench step` calls, if the system's step is measured against another
            computation of it: with the recipe, and `against`, `pairs` and `sequences` as on the command line.
    """

    implementation: ClassVar[str]
    step_bench: ClassVar[str | None] = None

    system: str
    model: Section
    objectives: Objectives = Objectives()
    data: ShardsSection
    optim: Optim = Optim()
    training: Training
    run: Run = Run()
    output: Output

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to be continued: what decides its result and how it is computed.

        Where the data lies is not part of it: its fingerprint stands in every checkpoint.
        """
        return self.model_dump(mode="json", exclude={"data", "run", "output"})

    @property
    def stops_early(self) -> bool:
        """Whether `run.stop_at_step` ends the run before its last step."""
        return self.run.stop_at_step is not None and self.run.stop_at_step < self.training.steps

    def places(self) -> dict[str, str]:
        """Returns the folders and URLs that the section `data` names, by their keys."""
        return {f"data.{key}": value for key, value in self.data if isinstance(value, str)}

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is: a line that begins with the keys."""
        run = self.run
        if run.keep_every and run.keep_every % run.checkpoint_every:
            return (
                f"run.keep_every = {run.keep_every}: must be a multiple of run.checkpoint_every "
                f"({run.checkpoint_every}), since only those steps have checkpoints"
            )
        places = self.places()
        remote = [key for key, value in places.items() if is_url(value)]
        if remote and run.cache is None:
            return f"{remote[0]} = {places[remote[0]]} is a URL: run.cache must name a local folder for them"
        if run.cache is not None and not remote:
            stated = ", ".join(f"{key} = {value}" for key, value in places.items())
            return f"{stated} is not a URL: it needs no run.cache, not {run.cache}"
        if run.cache_bytes is not None and run.cache is None:
            return f"run.cache_bytes = {run.cache_bytes}: only shards from a URL need a cache"
        if run.max_damaged_shards and not run.verify:
            return (
                f"run.max_damaged_shards = {run.max_damaged_shards} needs run.verify = true: all ranks must know "
                "before the first step which shards they do without"
            )
        names = type(self.objectives).model_fields
        if names and not self.objectives.weights():
            return f"objectives: every one is off; keep at least one of {', '.join(names)}"
        best = self.training.best
        if best is not None and names and best.partition("/")[2] not in self.objectives.weights():
            on = ", ".join(f"loss/{name}" for name in self.objectives.weights())
            return f"training.best = {best}: no figure of an objective that is on; expected one such as {on}"
        return None

    def to_yaml(self) -> str:
        """Returns the recipe with every default written out."""
        return write_yaml(self.model_dump(mode="json"))


def with_random_weights(recipe: Recipe) -> Recipe:
    """Returns a recipe whose encoders' weights are not read: what is planned or timed depends on their sizes alone."""
    encoders = {
        name: part.model_copy(update={"weights": "random"}) for name, part in recipe.model if hasattr(part, "weights")
    }
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=encoders)})


def shipped_recipes() -> list[Path]:
    """Returns the recipes that lie beside the schemas of the systems, those of installed packages among them."""
    folders = {folder for place in locate(GROUP, SYSTEMS).values() if (folder := folder_of(place)) is not None}
    return sorted((path for folder in folders for path in folder.glob("*.yaml")), key=lambda path: path.stem)


def shipped_settings() -> list[Path]:
    """Returns the finetuning recipes that ship."""
    return sorted((SHIPPED / "finetune").glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name: a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value` items; the value is read as YAML.

    Raises:
        XdscaleError: no such recipe, not YAML, an unknown system or key (the nearest right one is named) or a bad
            value; or the file, and no override, names shards behind a URL that only a person may name (see
            `check_stated_url`).
    """
    use = "a recipe of this name is one of 'xdscale finetune --recipe'; 'xdscale recipes --finetuning' has its keys"
    path = own_or_shipped(name, shipped_recipes(), ".yaml", "recipe", elsewhere=shipped_settings(), use=use)
    values = read_values(path, overrides, Recipe.model_fields)
    recipe = validated(values, schema_of(values, str(path)), str(path), overrides)
    for key, value in recipe.data:
        if isinstance(value, str) and not is_overridden(overrides, "data", key):
            check_stated_url(value, str(path), f"data.{key}")
    if problem := recipe.problem():
        section, key, *_ = *re.split(r"\W", problem, maxsplit=2), ""  # it begins with the keys
        where = "the command line" if is_overridden(overrides, section, key) else path
        raise XdscaleError(f"{where}: {problem}")
    return recipe


def schema_of(values: dict[str, Any], where: str) -> type[Recipe]:
    """Returns the class that the recipe's system gives its values.

    Raises:
        XdscaleError: no system is named, or one that nobody offers; begins with `where`.
    """
    if "system" not in values:
        known = ", ".join(sorted(locate(GROUP, SYSTEMS)))
        raise XdscaleError(
            f"{where}: 'system' is missing; it is one of {known}; only recipes of 'xdscale finetune' name none"
        )
    name = values["system"]
    return find(GROUP, SYSTEMS, name if isinstance(name, str) else shown(name), f"{where}: system", Recipe)


def recipe_file(run: Path) -> Path:
    """Returns where a run folder keeps its recipe.

    Raises:
        XdscaleError: it is no run folder; an export is told from other folders.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        what = "an export, not a run folder" if (run / "config.json").is_file() else "not a run folder (no recipe.yaml)"
        raise XdscaleError(f"{run}: {what}; give the recipe's output.folder")
    return path
