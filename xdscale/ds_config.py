"""DeepSpeed configuration files: how a recipe is computed, checked before DeepSpeed sees them.

DeepSpeed ignores a top-level key that it does not know (a misspelt `zero_optimization` trains unsharded), so every
key is checked here. `"auto"` is filled from the recipe; a value that contradicts the recipe is an error.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from xdscale.ds_sections import check_sections
from xdscale.errors import XdscaleError
from xdscale.files import count_of, no_text
from xdscale.names import own_or_shipped, unknown_key
from xdscale.recipe import Recipe

_PACKAGED = Path(__file__).with_name("ds_configs")
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "ds_configs"
"""Folder of the files that ship: a package of an installed xdscale, in a checkout at its root."""

SIZES = {
    "bert-base": "bert-base",
    "electra-base": "bert-base",
    "bert-large": "electra-large",
    "electra-large": "electra-large",
}
"""Of encoders by a part of their names; there are files for these two, also from pixels, and the quickstart's."""

AUTO = "auto"

REFUSED_KEYS = {
    "scheduler": "the learning rate follows the recipe (optim.learning_rate, optim.warmup_ratio)",
    "timers": "xdscale measures every step itself (log.jsonl, TensorBoard); DeepSpeed's timer waits for the GPU",
    "tensorboard": "xdscale writes TensorBoard files to the run folder itself",
    "wandb": "xdscale writes TensorBoard files to the run folder itself",
    "csv_monitor": "xdscale writes log.jsonl to the run folder itself",
    "checkpoint": "checkpoints follow the recipe (run.checkpoint_every, run.keep_checkpoints)",
}


def read_ds_config(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file and checks the names of its keys.

    Args:
        name: path of the file, or the name of one that ships, with or without `.json`.

    Returns:
        The values as they stand in the file.

    Raises:
        XdscaleError: no such file (the nearest one that ships is named), not JSON, a key given twice, an unknown key
            (the nearest right one is named), a key whose job the recipe has, or values that do not go together.
    """
    try:
        path = own_or_shipped(name, sorted(SHIPPED.glob("*.json")), ".json", "DeepSpeed config")
    except XdscaleError:
        word, size = next(((word, size) for word, size in SIZES.items() if name.startswith(word)), ("", ""))
        same = name.replace(word, size).removesuffix(".json")
        if not (SHIPPED / f"{same}.json").is_file():
            raise
        raise XdscaleError(f"{name}: no such file; {size} and {word} have one size: did you mean {same!r}?") from None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_duplicates(name))
    except (OSError, ValueError, RecursionError) as error:
        beside = isinstance(error, json.JSONDecodeError) and error.doc[error.pos : error.pos + 1] in ("/", "#")
        hint = "; JSON has no comments, take them out" * beside
        raise XdscaleError(f"{name}: not valid JSON: {no_text(path) or error}{hint}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{name}: expected a JSON object, found {type(values).__name__}")
    for key in values:
        if key in REFUSED_KEYS:
            raise XdscaleError(f"{name}: {key!r} does not belong here: {REFUSED_KEYS[key]}; remove it")
    check_sections(name, values)
    return values


def pixels_suffix(recipe: Recipe) -> str:
    """Returns "-pixels" for a recipe that trains a network on images along, of whose samples other numbers fit."""
    return "-pixels" if getattr(recipe.model, "pixels", None) is not None else ""


def resolve_ds_config(name: str, values: dict[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Fills `"auto"` from the recipe and refuses contradictions.

    Args:
        name: the file, for messages.
        values: what `read_ds_config` returned.
        recipe: the recipe to be trained.
        world_size: number of ranks.

    Returns:
        The complete DeepSpeed configuration. Its micro-batch is the one that all ranks compute with, at most the
        file's: see `split_batch`. A step that is counted in tokens is split when the samples' lengths are known.

    Raises:
        XdscaleError: the micro-batch is missing, the same quantity has different values in both files, or there are
            more ranks than samples in a step.
    """
    largest, training = values.get("train_micro_batch_size_per_gpu"), recipe.training
    if not isinstance(largest, int) or isinstance(largest, bool) or largest < 1:
        raise XdscaleError(f"{name}: train_micro_batch_size_per_gpu = {largest!r}: expected a whole number >= 1")
    if training.batch_tokens is None:
        split = split_batch(training.global_batch, world_size, largest)
        micro_batch, accumulation = split.micro_batch, split.accumulation
        needed = f"training.global_batch {training.global_batch} / ({world_size} ranks × micro-batch {largest})"
        _agree(name, values, "train_batch_size", training.global_batch, "training.global_batch")
    else:
        micro_batch, accumulation, needed = largest, AUTO, "training.batch_tokens"
        _agree(name, values, "train_batch_size", AUTO, needed)
    _agree(name, values, "gradient_accumulation_steps", accumulation, needed)
    _agree(name, values, "gradient_clipping", recipe.optim.gradient_clipping, "optim.gradient_clipping")
    _check_optimizer(name, values, recipe)
    resolved = {key: value for key, value in values.items() if key not in ("optimizer", "train_batch_size")}
    resolved |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.gradient_clipping,
        # DeepSpeed's own console line says less than our progress line.
        "steps_per_print": values.get("steps_per_print", 2**31),
    }
    return resolved


class BatchSplit(NamedTuple):
    """How the samples of one optimizer step are split.

    Attributes:
        global_batch: samples over all ranks.
        ranks: their number.
        micro_batch: places for samples in one pass of a rank, the same for all ranks and passes.
        accumulation: passes of each rank (gradient accumulation steps).
    """

    global_batch: int
    ranks: int
    micro_batch: int
    accumulation: int

    @property
    def padding(self) -> float:
        """Share of what ranks compute that is padding: places that no sample is left for."""
        return 1 - self.global_batch / (self.ranks * self.micro_batch * self.accumulation)

    def __str__(self) -> str:
        samples, ranks = count_of(self.global_batch, "sample"), count_of(self.ranks, "rank")
        passes = f"{self.accumulation} micro-batch{'es' * (self.accumulation > 1)} of {self.micro_batch}"
        padding = f"{self.padding:.1%} of it padding" if self.padding else "no padding"
        return f"a step of {samples}: {ranks} × {passes}, {padding}"


def split_batch(global_batch: int, ranks: int, largest: int) -> BatchSplit:
    """Splits a global batch in as few passes as the largest micro-batch allows, and those as even as can be.

    Args:
        global_batch: samples of one optimizer step, over all ranks.
        ranks: their number.
        largest: most samples of one pass of a rank.

    Raises:
        XdscaleError: some ranks would have no sample in any step.
    """
    if ranks > global_batch:
        raise XdscaleError(
            f"training.global_batch = {global_batch} feeds at most {global_batch} ranks, not {ranks}: the others would "
            f"have no sample; use at most {global_batch}, or raise training.global_batch, which changes the result"
        )
    accumulation = math.ceil(global_batch / (ranks * largest))
    return BatchSplit(global_batch, ranks, math.ceil(global_batch / (ranks * accumulation)), accumulation)


def zero_stage(values: dict[str, Any]) -> int:
    """Returns the ZeRO stage, 0 to 3."""
    return values.get("zero_optimization", {}).get("stage", 0)


def precision(values: dict[str, Any]) -> str:
    """Returns `fp32`, `bf16` or `fp16`."""
    enabled = [kind for kind in ("bf16", "fp16") if values.get(kind, {}).get("enabled")]
    return enabled[0] if enabled else "fp32"


def activation_checkpointing(values: dict[str, Any]) -> bool:
    """Returns whether layers are recomputed in the backward pass instead of keeping their activations."""
    return bool(values.get("activation_checkpointing", {}).get("enabled", False))


def _refuse_duplicates(name: str) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise XdscaleError(f"{name}: key given twice: {', '.join(sorted(twice))}")
        return dict(pairs)

    return build


def _require_known(name: str, prefix: str, key: str, known: tuple[str, ...]) -> None:
    if key in known:
        return
    raise XdscaleError(f"{name}: unknown key '{prefix}{key}'; {unknown_key(key, known)}")


def _agree(name: str, values: dict[str, Any], key: str, wanted: float, source: str) -> None:
    found = values.get(key, AUTO)
    if found != AUTO and found != wanted:
        raise XdscaleError(
            f'{name}: {key} = {found!r} contradicts the recipe: {source} gives {wanted}; write "auto" or remove it'
        )


def _check_optimizer(name: str, values: dict[str, Any], recipe: Recipe) -> None:
    optimizer = values.get("optimizer", {})
    optim = recipe.optim
    kind = {"adamw": "AdamW", "sgd": "SGD"}[optim.optimizer]
    _agree(name, {"optimizer.type": optimizer.get("type", AUTO)}, "optimizer.type", kind, "optim.optimizer")
    wanted = {"lr": ("optim.learning_rate", optim.learning_rate)}
    own = ("betas", "eps") if optim.optimizer == "adamw" else ("momentum",)
    for key in (*own, "weight_decay"):
        value = getattr(optim, key)
        wanted[key] = (f"optim.{key}", list(value) if isinstance(value, tuple) else value)
    for key, found in optimizer.get("params", {}).items():
        _require_known(name, "optimizer.params.", key, tuple(wanted))
        source, value = wanted[key]
        _agree(name, {f"optimizer.params.{key}": found}, f"optimizer.params.{key}", value, source)
