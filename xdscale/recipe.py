"""Recipes: the science of an experiment, as validated YAML.

A recipe decides the result (model, tasks, data, optimiser, schedule). How it is computed (precision, sharding,
micro-batch) stands in a DeepSpeed JSON file: see `xdscale.ds_config`.
"""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from xdscale.errors import XdscaleError
from xdscale.files import one_line
from xdscale.names import check_stated_url, expand_home, is_url, own_or_shipped, unknown_key
from xdscale.recipe_yaml import read_yaml, write_yaml

SHIPPED = Path(__file__).parent / "recipes"

Values = TypeVar("Values", bound=BaseModel)

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What reading YAML raises: a number of thousands of digits is a ValueError, as bad UTF-8 is."""

NameOrPath = Annotated[str, AfterValidator(expand_home)]
"""A path, or a name that may be one."""

MAY_CHANGE = (
    "eval_every",
    "eval_samples",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "stop_at_step",
    "max_skipped_in_row",
    "hang_seconds",
)
"""Keys of `training` that do not decide the result."""


class Section(BaseModel):
    """A group of recipe keys; unknown keys are refused and values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("expected another value than true or false")
        return value


class Language(Section):
    """The language encoder: BERT or ELECTRA, through transformers."""

    name: NameOrPath = Field(description="known architecture, hub name, local folder or package:NAME/folder")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: the architecture alone")
    sha256: str | None = Field(None, description="expected SHA-256 of the weights file, checked before loading")


class Clip(Section):
    """The CLIP text tower, through open_clip."""

    name: NameOrPath = Field(description="open_clip architecture, or a JSON file in open_clip's model-config format")
    weights: NameOrPath = Field("openai", description="open_clip pretrained tag, a weights file, or 'random'")


class Model(Section):
    """Language encoder, CLIP's text tower and the cross-modal layers between them (paper §2.2)."""

    language: Language
    clip: Clip | None = Field(description="null: the language encoder alone, with MLM, as the fair baseline of §3")
    cross_layers: int = Field(2, ge=0, le=1000, description="cross-modal layers; 0 without CLIP")
    dropout: float = Field(0.1, ge=0, lt=1, description="language encoder and cross-modal layers; CLIP-T has none")
    kernels: Literal["fused", "plain"] = Field("fused", description="the kernels, or their readable definitions")
    start: NameOrPath | None = Field(None, description="run folder or export to take first weights from, with heads")


_WEIGHT = "factor of this objective's mean loss"


class MaskedLM(Section):
    """Paper §2.3.1; rates of Devlin et al.: 15 % selected, of which 80 % [MASK], 10 % random, 10 % kept."""

    weight: float = Field(1.0, gt=0, description=_WEIGHT)
    select: float = Field(0.15, gt=0, lt=1, description="share of the tokens to be predicted")
    mask: float = Field(0.8, ge=0, le=1, description="share of those that the encoder sees as [MASK]")
    random: float = Field(0.1, ge=0, le=1, description="share of those that it sees as another token; the rest is kept")


class Match(Section):
    """Paper §2.3.2: are the texts of the language encoder and of CLIP the same?"""

    weight: float = Field(1.0, gt=0, description=_WEIGHT)
    mismatch: float = Field(0.5, gt=0, lt=1, description="share of the pairs whose texts differ")


class ClipTokens(Section):
    """Paper §2.3.3: name the CLIP token at 15 % of the CLIP positions, input unchanged."""

    weight: float = Field(1.0, gt=0, description=_WEIGHT)
    select: float = Field(0.15, gt=0, lt=1, description="share of the CLIP tokens to be predicted")


class Tasks(Section):
    """The objectives that are on; `null` switches one off (Table 3's ablations)."""

    mlm: MaskedLM | None = MaskedLM()
    match: Match | None = Match()
    clip_tokens: ClipTokens | None = ClipTokens()

    def weights(self) -> dict[str, float]:
        """Returns the weight of each objective that is on, by name."""
        terms = {"mlm": self.mlm, "match": self.match, "clip_tokens": self.clip_tokens}
        return {name: term.weight for name, term in terms.items() if term is not None}


class Data(Section):
    """Where the shards are, and what happens when some are damaged."""

    shards: NameOrPath = Field(description="folder written by 'xdscale shards build', or its URL (s3://…, https://…)")
    cache: NameOrPath | None = Field(None, description="local folder for shards from a URL; one for each node")
    cache_bytes: int | None = Field(
        None, ge=1, description="room for shards from a URL, fetched when needed; null fetches all first"
    )
    verify: bool = Field(True, description="check every shard's SHA-256 before the first step")
    max_damaged_shards: int = Field(0, ge=0, description="train without so many damaged shards; 0 stops instead")


class Optim(Section):
    """AdamW, linear warm-up, linear decay to 0 (paper, appendix C.1)."""

    learning_rate: float = Field(1e-4, gt=0, description="the largest, at the end of the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-6, gt=0, description="AdamW's ε, added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="on all parameters, as the released code does")
    bias_correction: bool = Field(True, description="of AdamW's moments; false as in the released code's BertAdam")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    gradient_clipping: float = Field(1.0, gt=0, description="largest global gradient norm")


class Training(Section):
    """How long, how much at once, and what happens in between."""

    steps: int = Field(ge=1, lt=2**31, description="optimiser steps in all")
    global_batch: int = Field(ge=1, lt=2**31, description="sequences per optimiser step, over all ranks")
    seed: int = Field(0, ge=0, lt=2**32, description="of new weights, order, masks, pairs and dropout")
    eval_every: int = Field(100, ge=1, description="steps between validations; one also before and after")
    eval_samples: int = Field(512, ge=1, description="held-out sequences per validation, at most")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; one also at the end")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the newest checkpoints stay")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints of steps that are multiples of this stay for good"
    )
    stop_at_step: int | None = Field(None, ge=1, description="save and stop here; the schedule still follows steps")
    max_skipped_in_row: int = Field(5, ge=1, description="non-finite steps in a row that stop the run")
    hang_seconds: int = Field(45, ge=1, description="shortest time without progress after which a rank counts as hung")

    @property
    def stops_early(self) -> bool:
        """Whether `stop_at_step` ends the run before its last step."""
        return self.stop_at_step is not None and self.stop_at_step < self.steps


class Output(Section):
    """Where the run is written."""

    folder: NameOrPath = Field(description="run folder: checkpoints, log.jsonl, TensorBoard; a run in it is continued")


class Recipe(Section):
    """Everything that decides the result of a run."""

    model: Model
    tasks: Tasks = Tasks()
    data: Data
    optim: Optim = Optim()
    training: Training
    output: Output

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to be continued: all but where, how often and how far at once.

        Where the shards lie is not part of it: their fingerprint stands in every checkpoint.
        """
        values = run_identity(self.model_dump(mode="json"))
        del values["data"]
        return values

    def to_yaml(self) -> str:
        """Returns the recipe with every default written out."""
        return write_yaml(self.model_dump(mode="json"))


def run_identity(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's recipe without what may change when it is continued: where, how often and how far at once."""
    kept = {key: value for key, value in values.items() if key != "output"}
    return kept | {"training": {k: v for k, v in kept["training"].items() if k not in MAY_CHANGE}}


def shipped_recipes(folder: Path = SHIPPED) -> list[str]:
    """Returns the names of the recipes that come with xdscale; those of finetuning lie in a folder of their own."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name: a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value` items; the value is read as YAML.

    Raises:
        XdscaleError: no such recipe, not YAML, an unknown key (the nearest right one is named) or a bad value; or the
            file, and no override, names shards behind a URL that only a person may name (see `check_stated_url`).
    """
    path = own_or_shipped(name, SHIPPED, ".yaml", "recipe")
    recipe = read_validated(path, overrides, Recipe)
    if not is_overridden(overrides, "data", "shards"):
        check_stated_url(recipe.data.shards, str(path), "data.shards")
    _check_consistency(recipe, path)
    return recipe


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


def is_overridden(overrides: Sequence[str], section: str, key: str) -> bool:
    """Returns whether a value comes from the command line, not from the recipe's file."""
    typed: dict[str, Any] = {}
    for override in overrides:
        _apply_override(typed, override)
    return isinstance(typed.get(section), dict) and key in typed[section]


def read_validated(path: Path, overrides: Sequence[str], model: type[Values]) -> Values:
    """Reads a YAML file of sections, applies overrides and validates it.

    Raises:
        XdscaleError: as `load_recipe`.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, *NOT_YAML) as error:
        raise XdscaleError(f"{path}: not a YAML recipe: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected the sections {', '.join(model.model_fields)}, found {values!r}")
    for override in overrides:
        _apply_override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(str(path), error, model, overrides)) from None


def describe_validation_error(
    source: str, error: ValidationError, model: type[BaseModel], overrides: Sequence[str] = ()
) -> str:
    """Returns one line per problem: where it stands, key, what was found, what was expected, the nearest right name.

    Args:
        source: the file that held the values.
        error: what pydantic found.
        model: the class that was validated, from which near names are taken.
        overrides: `section.key=value` items that stood in the file's place.
    """
    typed = [override.partition("=")[0] + "." for override in overrides]
    problems = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location)
        by_person = any(name.startswith(f"{key}.") or f"{key}.".startswith(name) for name in typed)
        where = "the command line" if by_person else source
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            problems.append(f"{where}: unknown key {key!r}; {unknown_key(location[-1], known)}")
        elif item["type"] == "missing":
            problems.append(f"{where}: {key!r} is missing")
        else:
            quotes = "; write a number that is meant as a text in quotes" if item["type"] == "string_type" else ""
            problems.append(f"{where}: {key} = {item['input']!r}: {item['msg']}{quotes}")
    return "\n".join(problems)


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one value, given as `section.key=value` with the value in YAML.

    Raises:
        XdscaleError: the override has another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise XdscaleError(f"{override!r}: an override has the form section.key=value")
    try:
        value = read_yaml(text)
    except NOT_YAML as error:
        reason = " ".join(str(error).split())
        raise XdscaleError(f"{override!r}: the value is not valid YAML ({reason}); a text may need quotes") from None
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    target[last] = value


def _known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        if part not in model.model_fields:
            return []
        model = _model_class(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_class(annotation: Any) -> type[BaseModel]:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not types.NoneType)
    return annotation


def _check_consistency(recipe: Recipe, path: Path) -> None:
    training = recipe.training
    if training.keep_every and training.keep_every % training.checkpoint_every:
        raise XdscaleError(
            f"{path}: training.keep_every = {training.keep_every}: must be a multiple of training.checkpoint_every "
            f"({training.checkpoint_every}), since only those steps have checkpoints"
        )
    if not recipe.tasks.weights():
        raise XdscaleError(f"{path}: tasks: every objective is off; keep at least one of mlm, match, clip_tokens")
    model = recipe.model
    if (model.clip is None) != (model.cross_layers == 0):
        raise XdscaleError(
            f"{path}: model.cross_layers = {model.cross_layers}: with model.clip: null it is 0, else 1 or more"
        )
    if model.clip is None and set(recipe.tasks.weights()) != {"mlm"}:
        raise XdscaleError(f"{path}: tasks: without model.clip only mlm is possible; set match and clip_tokens to null")
    mlm = recipe.tasks.mlm
    if mlm is not None and mlm.mask + mlm.random > 1:
        raise XdscaleError(f"{path}: tasks.mlm: mask {mlm.mask} + random {mlm.random} is more than 1")
    data = recipe.data
    if is_url(data.shards) != (data.cache is not None):
        what = "is a URL: data.cache must name" if data.cache is None else "is not a URL: it needs no data.cache, not"
        raise XdscaleError(f"{path}: data.shards = {data.shards} {what} {data.cache or 'a local folder for them'}")
    if data.cache_bytes is not None and data.cache is None:
        raise XdscaleError(f"{path}: data.cache_bytes = {data.cache_bytes}: only shards from a URL need a cache")
    if data.max_damaged_shards and not data.verify:
        raise XdscaleError(
            f"{path}: data.max_damaged_shards = {data.max_damaged_shards} needs data.verify = true: all ranks must "
            "know before the first step which shards they do without"
        )
