"""`xdscale replay RUN STEP`: a step's global batch again, sample by sample, to find what made it non-finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from xdscale.devices import rank_device
from xdscale.ds_config import precision
from xdscale.errors import XdscaleError
from xdscale.files import count_of, read_json
from xdscale.names import is_url
from xdscale.recipe import Recipe, Run, load_recipe, recipe_file
from xdscale.shards.manifest import MANIFEST_NAME
from xdscale.shards.remote import cache_folder, fetch_manifest
from xdscale.systems.contract import MicroBatch, Objective, Place, open_system, pass_numbers
from xdscale.training.consolidate import consolidated_state
from xdscale.training.distributed import Ranks
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module
from xdscale.training.sums import means, term_sums, weighted_loss

_ROWS = 20
_LEAST_WIDTH = 120


@dataclass(frozen=True)
class SampleReplay:
    """What one sample of the step gives.

    Attributes:
        epoch: of the sample.
        sample_id: in the training split.
        losses: mean loss of each objective over the sample's targets; nan where it has none.
        gradient_norm: of the sample's part of the step's gradient, before clipping.
        culprit: the first module whose output is not finite, else the parameter nearest to the loss whose gradient is
            not; None when all is finite.
    """

    epoch: int
    sample_id: int
    losses: dict[str, float]
    gradient_norm: float
    culprit: str | None


def replay(run: Path, step: int, overrides: Sequence[str] = ()) -> list[SampleReplay]:
    """Repeats a step in one process and prints what each sample gives, suspects first.

    Samples, masks, pairings and the share of each sample in the loss are those of the step. The weights are those of
    the newest undamaged checkpoint at or before the step, in the run's precision. Dropout is off and samples run one
    by one: what depends on dropout's draws does not show. A run folder may come from elsewhere: nothing that its
    recipe names is executed or written.

    Args:
        run: the run folder.
        step: counted from 1, as in `log.jsonl`.
        overrides: `data.shards=…` and `run.cache=…`, where the shards are not where the recipe says.

    Returns:
        The samples, suspects first, then by gradient norm.

    Raises:
        XdscaleError: not a run folder, no such step, or no shards there.
    """
    recipe = _recipe(run, step, overrides)
    system = open_system(recipe)
    data = system.open(Place(Ranks(0, 1, 0), micro_batch=1))
    torch.manual_seed(recipe.training.seed)
    checkpoint = _newest_before(run, step)
    module = build_module(system, continued=checkpoint is not None)
    source = _load_weights(module, checkpoint, step)
    config = read_json(run / "ds_config.json")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(config)]
    device = rank_device(0)
    module.to(device, dtype).eval()
    slots = data.order.slots(step - 1)
    batches = list(map(data.collate, slots))
    objectives = system.objectives()
    counts = {name: sum(batch.targets.get(name, 0) for batch in batches) for name in objectives}
    found = [
        _replay_sample(module, int(part.epochs[0]), int(part.sample_ids[0]), batch, objectives, counts)
        for part, batch in zip(slots, batches)
    ]
    found.sort(key=lambda sample: (sample.culprit is None, -sample.gradient_norm))
    told = f"step {step} of {run}, {count_of(len(found), 'sample')}, {source}"
    _print(found, module, f"{told}, {precision(config)} on {device.type}")
    return found


def _recipe(run: Path, step: int, overrides: Sequence[str]) -> Recipe:
    path = recipe_file(run)
    typed = dict(override.partition("=")[::2] for override in overrides)
    for key in typed:
        if key != "run.cache" and not key.startswith("data."):
            raise XdscaleError(f"{key}: the step stays as it was; only where its data is and run.cache may differ")
    places = [value for key, value in typed.items() if key.startswith("data.")]
    if places and not any(map(is_url, places)):  # the run's own cache is of no use for a local folder
        overrides = ["run.cache=null", "run.cache_bytes=null", *overrides]
    recipe = load_recipe(str(path), overrides)
    if not 1 <= step <= recipe.training.steps:
        raise XdscaleError(f"{run}: no step {step}; the run has steps 1 to {recipe.training.steps}")
    # Which shards a run did without is found out by verifying; without such a budget it only takes time.
    changes: dict[str, Any] = {"verify": recipe.run.max_damaged_shards > 0, "eval_samples": 1}
    data = {key: value for key, value in recipe.data if isinstance(value, str) and is_url(value)}
    if data and "run.cache" not in typed:
        data = {key: str(_fetched(run, value, recipe.run)) for key, value in data.items()}
        changes["cache"] = None
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update=data), "run": recipe.run.model_copy(update=changes)}
    )


def _fetched(run: Path, url: str, keys: Run) -> Path:
    """Returns where the run fetched all its shards to; what a recipe names is only read here."""
    folder = cache_folder(fetch_manifest(url), Path(keys.cache).expanduser())
    if keys.cache_bytes is not None or not (folder / MANIFEST_NAME).is_file():
        raise XdscaleError(
            f"{run}: the shards of {url} that it fetched into run.cache = {keys.cache} are not all on this machine; to "
            "fetch them, name a folder for them: run.cache=FOLDER on the command line"
        )
    return folder


def _newest_before(run: Path, step: int) -> Path | None:
    """Returns the newest undamaged checkpoint before `step`, if any."""
    from xdscale.training.checkpoint_folder import list_checkpoints, step_of
    from xdscale.training.integrity import damage

    before = [path for path in reversed(list_checkpoints(run / "checkpoints")) if step_of(path) < step]
    return next((path for path in before if not damage(path)), None)


def _load_weights(module: nn.Module, checkpoint: Path | None, step: int) -> str:
    """Loads a checkpoint before `step`, if there is one, and says which."""
    from xdscale.training.checkpoint_folder import step_of

    if checkpoint is None:
        return "weights of the start" + _too_early(step - 1)
    module.load_state_dict(consolidated_state(checkpoint))
    between = step - 1 - step_of(checkpoint)
    return f"weights after step {step_of(checkpoint)}" + _too_early(between)


def _too_early(steps: int) -> str:
    return f", {count_of(steps, 'step')} too early" if steps else ""


def _replay_sample(
    module: nn.Module,
    epoch: int,
    sample_id: int,
    batch: MicroBatch,
    objectives: dict[str, Objective],
    counts: dict[str, int],
) -> SampleReplay:
    culprits: list[str] = []

    def look(name: str) -> Any:
        return lambda part, inputs, output: None if culprits or _finite(output) else culprits.append(name)

    # Inner modules end before those that contain them: the first one found is the innermost.
    hooks = [part.register_forward_hook(look(name or "losses")) for name, part in module.named_modules()]
    module.zero_grad(set_to_none=True)
    arrays, passes = to_device(batch.arrays, next(module.parameters()).device), pass_numbers(module)
    sums = torch.zeros(())
    for which in passes:
        outputs = module(arrays, *which)
        (weighted_loss(outputs, objectives, counts, batch.targets) / len(passes)).backward()
        sums = sums + term_sums(outputs, objectives).cpu() / len(passes)
    for hook in hooks:
        hook.remove()
    found = means(sums, objectives, {name: count for name, count in batch.targets.items() if count})
    losses = {name: found.get(f"loss/{name}", math.nan) for name in objectives}
    gradients = {name: part.grad for name, part in module.named_parameters() if part.grad is not None}
    norm = float(torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients.values()]))
    if not culprits and not math.isfinite(norm):
        culprits = [f"gradient of {name}" for name, part in gradients.items() if not _finite(part)][-1:]
    return SampleReplay(epoch, sample_id, losses, norm, culprits[0] if culprits else None)


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(_finite, parts))


def _print(found: list[SampleReplay], module: nn.Module, title: str) -> None:
    console = Console(markup=False)
    console = Console(markup=False, width=max(console.width, _LEAST_WIDTH), highlight=False)
    console.print(title)
    broken = [name for name, parameter in module.named_parameters() if not _finite(parameter)]
    if broken:
        console.print(f"the weights themselves are not finite: {broken[0]} and {len(broken) - 1} more")
    table = Table("sample", "epoch", *found[0].losses, "gradient norm", "first that is not finite")
    for sample in found[:_ROWS]:
        numbers = [f"{value:.4g}" for value in (*sample.losses.values(), sample.gradient_norm)]
        table.add_row(str(sample.sample_id), str(sample.epoch), *numbers, sample.culprit or "")
    console.print(table)
    if len(found) > _ROWS:
        console.print(f"… and {len(found) - _ROWS} more with smaller gradients")
    suspects = [str(sample.sample_id) for sample in found if sample.culprit is not None]
    if suspects:
        console.print(f"{len(suspects)} not finite: sample {', '.join(suspects)}")
    else:
        console.print("every sample is finite here: dropout, the machine or the weights of another step made it")
