"""The command: checks everything first, then sweeps over tasks and seeds."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from xdscale.data.pictures import require_pictures
from xdscale.devices import computes_in_bf16, visible_gpus
from xdscale.ds_config import read_ds_config, resolve_ds_config
from xdscale.errors import EXIT_STOPPED, XdscaleError
from xdscale.files import DISKS_OWN, check_output_folder, read_json, shown, write_outputs
from xdscale.finetune.finished import print_table, require_model, require_same_files, result_path
from xdscale.finetune.notes import notes_on_recipe
from xdscale.finetune.recipe import (
    FORMAT,
    RESULT,
    FinetuneRecipe,
    FinetuneSettings,
    check_tasks,
    load_settings,
    resolve_run,
)
from xdscale.finetune.sweep import SIGNALS, FinetuneJob, SweepRunner, keep_best, what_is_kept
from xdscale.names import expand_home, resolve_path
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.report.sweep import FinetunedModel, SweepFile, read_sweep_file
from xdscale.shards.regions import RegionTable
from xdscale.tasks.contract import (
    LARGE_FROM,
    Task,
    TaskData,
    all_settings,
    find_subject,
    find_task,
    open_regions,
    read_task,
    task_names,
)
from xdscale.tasks.own import OwnTask, read_own_task
from xdscale.training.environment import check_precision
from xdscale.training.run_folder import RunFolder

HUB_DATA = Path("data/tasks")
"""Where tasks are put that are fetched from the hub."""

SUMMARY = "sweep.json"
MICRO_BATCH = 32
"""Examples of one forward and backward pass, where no DeepSpeed configuration says it."""
MICRO_BATCH_OF_PIXELS = 4
"""The same where a trunk is tuned along, which keeps its activations for each image: it fits a GPU of 24 GB."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line.

    Attributes:
        model: folder or name.
        subject: what of it is finetuned; None for what its config.json says, or else its language encoder.
        tasks: their names, or YAML files that describe them; "all" for every one that has a name.
        data: folder that holds the folders of named tasks; None to fetch them.
        regions: dataset with the regions of the images that tasks speak of.
        out: folder of the sweep.
        seeds: how many; None as the recipe says.
        label: the model's name in tables; None for the last part of its name.
        recipe: finetuning recipe, file or name.
        overrides: `section.key=value`.
        ds_config: DeepSpeed JSON; None for the default of the device.
        jobs: runs at a time; None for one per GPU, or one without GPUs.
    """

    model: str
    subject: str | None
    tasks: list[str]
    data: str | None
    regions: str | None = None
    out: Path
    seeds: int | None
    label: str | None
    recipe: str
    overrides: list[str]
    ds_config: str | None
    jobs: int | None


def run_command(request: Request) -> int:
    """Finetunes a model on all tasks and seeds asked for; what is finished already stays.

    Returns:
        Exit code: 0; 70 when runs failed or could not be saved; 75 when a signal stopped the sweep, all is saved and
        the same command continues.

    Raises:
        XdscaleError: model, data, recipe or folder are not in order; nothing is trained then.
    """
    with _stopped_at_once():
        check_output_folder(request.out, "--out")
        kind = request.subject or _kind(request.model)
        settings = load_settings(request.recipe, request.overrides, kind)
        sources = _read_data(request, settings)
        if request.ds_config is not None:
            read_ds_config(request.ds_config)
        seeds = {name: list(range(request.seeds or settings.seeds_of(name))) for name in sources}
        gpus = visible_gpus()
        console = Console(stderr=True)
        slots = _slots(request.jobs or max(1, len(gpus)), gpus)

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        sweep = SweepRunner(slots, say)
        try:
            todo = [
                (name, seed)
                for name in sources
                for seed in seeds[name]
                if not result_path(request.out, name, seed).is_file()
            ]
            sweep.start_workers(most=len(todo))
            jobs = _plan(request, settings, sources, seeds, gpu=bool(gpus))
            if jobs:
                for line in (what_is_kept(kind, settings.run.keep_model), *notes_on_recipe(request.recipe, kind)):
                    say(line)
            code = sweep.run(jobs)
        finally:
            sweep.end_workers()
    for name in sources:
        keep_best(request.out / name)  # also where the one before was killed behind its last run
    print_table(request.out, {name: source.data.task for name, source in sources.items()}, seeds)
    return code


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Ends the command at a signal while there is nothing to save; `SweepRunner.run` handles them itself."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(EXIT_STOPPED)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except SystemExit:
        print("stopped by a signal, no run is under way; the same command continues", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_ds_config(*, gpu: bool, bf16: bool = True, micro_batch: int = MICRO_BATCH) -> dict[str, Any]:
    """Returns the DeepSpeed configuration used when none is given: fp32 on CPU, else 16 bits with fp32 masters.

    Args:
        gpu: whether for a GPU.
        bf16: whether that GPU computes in bf16; fp16 is chosen where it does not.
        micro_batch: the most examples of one pass.
    """
    common = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    if not gpu:
        return common | {"zero_optimization": {"stage": 0}}
    return common | {
        "bf16" if bf16 else "fp16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    }


class TaskSource(NamedTuple):
    """A task's examples, the folder that they were read from, and what describes a task of the user's own."""

    data: TaskData
    folder: Path
    own: OwnTask | None = None


def _read_data(request: Request, settings: FinetuneSettings) -> dict[str, TaskSource]:
    """Reads the files of all tasks, by the tasks' names."""
    known = task_names()
    asked = {}
    if "all" in request.tasks:
        asked = {name: None for name in known if bool(find_task(name).images) == bool(request.regions)}
    asked |= dict.fromkeys(name for name in request.tasks if name != "all")
    own: dict[str, tuple[OwnTask, Path]] = {}
    for path in (Path(expand_home(name)) for name in asked if name.endswith((".yaml", ".yml"))):
        described = read_own_task(path)
        if described.name in own:
            raise XdscaleError(f"{own[described.name][1]} and {path} are both named {described.name!r}; rename one")
        own[described.name] = described, path
    check_tasks(request.recipe, settings, [*known, *own])
    tasks = [find_task(name) for name in asked if not name.endswith((".yaml", ".yml"))]
    if request.data is not None and not tasks:
        raise XdscaleError(
            f"--data {request.data}: nothing is read from there, since {', '.join(asked)} says where its files lie; "
            "leave --data out"
        )
    all_tasks = [*tasks, *(described.task() for described, _ in own.values())]
    if request.regions is not None and not any(task.images for task in all_tasks):
        raise XdscaleError(f"--regions {request.regions}: {', '.join(asked)} has no images; leave --regions out")
    folder = HUB_DATA if request.data is None else resolve_path(request.data)
    if request.data is None:
        for task in tasks:
            task.fetch(folder)
    regions = open_regions(request.regions)
    if regions is not None and settings.model.reads_pixels:
        require_pictures(regions.build)
    sources = {task.name: TaskSource(read_task(task, folder, regions), folder) for task in tasks}
    return sources | {
        name: TaskSource(read_task(described.task(), path.parent, regions), path.parent, described)
        for name, (described, path) in own.items()
    }


def _plan(
    request: Request,
    settings: FinetuneSettings,
    sources: dict[str, TaskSource],
    seeds: dict[str, list[int]],
    *,
    gpu: bool,
) -> list[FinetuneJob]:
    """Checks the model and the folder, writes `sweep.json`, and returns the runs that are still to be done."""
    tasks = [source.data.task for source in sources.values()]
    keep, regions = settings.run.keep_model is True, open_regions(request.regions)
    subject = describe_subject(request.model, request.subject, settings.model, tasks, keep_model=keep, regions=regions)
    label = request.label or request.model.rstrip("/").rpartition("/")[2]
    summary = _summary(request.out, subject, label, seeds)
    name = request.ds_config or "the default DeepSpeed configuration"
    if request.ds_config:
        ds_config = read_ds_config(request.ds_config)
        check_precision(name, ds_config)
    else:
        micro_batch = MICRO_BATCH_OF_PIXELS if settings.model.reads_pixels else MICRO_BATCH
        ds_config = default_ds_config(gpu=gpu, bf16=gpu and computes_in_bf16(), micro_batch=micro_batch)
    jobs = []
    for task, numbers in seeds.items():
        for seed in numbers:
            folder = request.out / task / f"seed-{seed}"
            data, source, own = sources[task]
            of_run = {"subject": subject, "source": source, "seed": seed, "label": label, "folder": folder}
            recipe = resolve_run(settings, data, own=own, regions=request.regions, **of_run)
            RunFolder(folder).check(recipe)
            result = result_path(request.out, task, seed)
            if result.is_file():
                require_same_files(result, data, source)
                if settings.run.keep_model is True:
                    require_model(result)
            else:
                resolve_ds_config(name, ds_config, recipe, world_size=1)  # for what it refuses
                jobs.append(make_job(recipe, name, ds_config, request.out / "logs" / f"{task}-seed-{seed}.log"))
    logs = request.out / "logs"
    for folder in (logs, *(request.out / task for task in seeds)):
        check_output_folder(folder, "--out")
    write_outputs({request.out / SUMMARY: summary.model_dump_json(indent=2) + "\n"})
    logs.mkdir(exist_ok=True)
    # Of every task the first seeds first, so that a sweep that is looked at early has something of everything.
    return sorted(jobs, key=lambda job: job.message["recipe"]["training"]["seed"])


def describe_subject(
    model: str,
    subject: str | None,
    settings: ModelSettings,
    tasks: Sequence[Task] = (),
    *,
    keep_model: bool = False,
    regions: RegionTable | None = None,
) -> dict[str, Any]:
    """Checks a model and returns what identifies it: name, subject, size, encoder (in words), weights_sha256.

    Args:
        model: folder, hub name or `package:NAME/folder`; for CLIP-T alone an open_clip architecture or its JSON file.
        subject: what of it is finetuned; None for what its config.json says, or else its language encoder.
        settings: of the recipe.
        tasks: on which.
        keep_model: whether it is to be exported afterwards.
        regions: of the images that the tasks speak of.

    Raises:
        XdscaleError: as `Subject.describe`, or it cannot read the input of a task or its regions, or be exported.
    """
    from xdscale.weights import weights_sha256

    kind = subject or _kind(model)
    found = find_subject(kind)(model, settings, regions)
    if keep_model and not found.exports():
        raise XdscaleError(f"run.keep_model = true: {model} as {kind} is not exported; leave it out")
    facts = found.describe()  # first: what is not there would else be told to read no images
    for task in tasks:
        found.require_readable(task)
    known = facts.weights is not None and settings.weights == "pretrained"
    return {
        "name": model,
        "subject": kind,
        "size": "large" if facts.hidden_size >= LARGE_FROM else "base",
        "encoder": facts.encoder,
        "weights_sha256": weights_sha256(facts.weights) if known else None,
    }


def _kind(model: str) -> str:
    """Returns what a model is finetuned as where nobody says."""
    path = Path(expand_home(model)) / "config.json"
    stated = read_json(path).get("model_type") if path.is_file() else None
    return next((name for name, kind in all_settings() if stated in kind.model_types), "language")


def make_job(recipe: FinetuneRecipe, ds_name: str, ds_config: dict[str, Any], log: Path) -> FinetuneJob:
    """Returns the job of one run, as a worker takes it."""
    message = {
        "recipe": recipe.model_dump(mode="json"),
        "ds_config_name": ds_name,
        "ds_config": ds_config,
        "log": str(log),
    }
    folder = Path(recipe.output.folder)
    name, stops_early = f"{recipe.task.name} seed {recipe.training.seed}", recipe.stops_early
    return FinetuneJob(name, message, folder / RESULT, log, stops_early)


def _summary(out: Path, subject: dict[str, Any], label: str, seeds: dict[str, list[int]]) -> SweepFile:
    """Returns what `sweep.json` is to say; refuses a folder that holds something else."""
    path = out / SUMMARY
    model = FinetunedModel(
        label=label, **{key: subject[key] for key in ("name", "subject", "encoder", "weights_sha256")}
    )
    planned: dict[str, list[int]] = {}
    if path.is_file():
        before = read_sweep_file(path)
        was, now = before.model.model_dump(), model.model_dump()
        changed = [key for key in was if was[key] != now[key]]
        # The same weights may lie elsewhere, or be named with a / behind, as shells complete it.
        if changed and (changed != ["name"] or model.weights_sha256 is None):
            other = ", ".join(f"{key} was {shown(was[key])}, now {shown(now[key])}" for key in changed)
            raise XdscaleError(
                f"{path}: holds the sweep of another model ({other}); choose another --out, or delete this one"
            )
        planned = {task: entry.seeds for task, entry in before.tasks.items()}
    elif out.exists() and any(path.name != DISKS_OWN for path in out.iterdir()):
        raise XdscaleError(f"--out {out}: holds files but no {SUMMARY}; choose an empty or new folder")
    for task, numbers in seeds.items():
        planned[task] = sorted({*planned.get(task, []), *numbers})
    tasks = {task: {"seeds": numbers} for task, numbers in planned.items()}
    return SweepFile(format=FORMAT, model=model, tasks=tasks)


def _slots(jobs: int, gpus: list[str]) -> list[dict[str, str]]:
    """Returns the environment of each worker: its GPU, if there are any, and its share of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)], "OMP_NUM_THREADS": threads} for slot in range(jobs)]
    # Threads that spin while they wait slow a busy machine down by an order of magnitude.
    return [{"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}] * jobs
