"""The `xdscale` command. Thin: every subcommand imports what it needs when it runs, so that help is instant."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from xdscale import __version__
from xdscale.analysis.command_line import inside_app
from xdscale.bench.commands import bench_app
from xdscale.commands.checkpoints import checkpoints_app
from xdscale.commands.regions import regions_app
from xdscale.errors import EXIT_BAD_INPUT, XdscaleError, refusal
from xdscale.names import UserPath
from xdscale.registry import SUBJECTS
from xdscale.shards.commands import shards_app
from xdscale.version import commit


def _print_version(asked: bool) -> None:
    """Prints the version, in a checkout with the commit and whether files differ from it, and ends the program."""
    if not asked:
        return
    found = commit()
    print(f"xdscale {__version__}" + (f" ({found})" if found else ""))
    raise typer.Exit


# The panels of the help, in the order in which a person works.
_PANELS = ("Get data", "Train", "Finetune and report", "Look inside", "Clusters", "Measure")
_TABLES = Path(__file__).parent / "report" / "tables"
_DATA, _TRAIN, _FINETUNE, _, _CLUSTERS, _MEASURE = _PANELS


class _ByPanel(TyperGroup):
    """Lists commands panel by panel; Typer lists the panels as their first commands happen to be defined."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        places = {panel: place for place, panel in enumerate(_PANELS)}
        return sorted(self.commands, key=lambda name: places.get(self.commands[name].rich_help_panel, -1))


app = typer.Typer(
    help="Train language models that know what things look like, from text alone or with image regions.",
    cls=_ByPanel,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


kernels_app = typer.Typer(help="What the Triton kernels compile to.", no_args_is_help=True)
app.add_typer(shards_app, name="shards", help="Build, verify and inspect tar shards.", rich_help_panel=_DATA)
app.add_typer(regions_app, name="regions", rich_help_panel=_DATA)
app.add_typer(
    checkpoints_app, name="checkpoints", help="List, verify and convert a run's checkpoints.", rich_help_panel=_TRAIN
)
app.add_typer(inside_app)
app.add_typer(bench_app, name="bench", rich_help_panel=_MEASURE)
app.add_typer(kernels_app, name="kernels", rich_help_panel=_MEASURE)


@app.command(rich_help_panel=_TRAIN)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe file or name: show every key.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    finetuning: Annotated[bool, typer.Option("--finetuning", help="Those of 'xdscale finetune'.")] = False,
) -> None:
    """List the recipes that ship, or every key of one: its value, meaning and default."""
    from xdscale.finetune.recipe import load_settings
    from xdscale.recipe import load_recipe, shipped_recipes, shipped_settings
    from xdscale.recipes.keys import key_lines

    if name is not None:
        load = load_settings if finetuning else load_recipe
        print("\n".join(key_lines(load(name, overrides or []))).lstrip())
        return
    for path in shipped_settings() if finetuning else shipped_recipes():
        with path.open(encoding="utf-8") as file:
            print(f"{path.stem:32} {file.readline().lstrip('# ').rstrip()}")


@app.command(rich_help_panel=_TRAIN)
def params(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
) -> None:
    """Count a recipe's parameters, part by part (the paper's Table 6)."""
    from xdscale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from xdscale.commands.params import print_parameters  # torch, which a mistyped name need not wait for

    print_parameters(loaded)


@app.command(rich_help_panel=_TRAIN)
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    deepspeed_config: Annotated[
        str | None,
        typer.Option(
            "--deepspeed-config",
            "--deepspeed_config",
            help="DeepSpeed JSON, or a name from ds_configs/; default: the ZeRO-2 one for the recipe's size.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Default: one per GPU; without a GPU one, on the CPU.")
    ] = None,
) -> None:
    """Train a recipe on this machine; Ctrl-C saves first, and the same command continues."""
    from xdscale.launch.train import train_here

    sys.exit(train_here(recipe, overrides or [], deepspeed_config, ranks))


@app.command(rich_help_panel=_CLUSTERS)
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1_000_000, help="GPUs in all.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="Kind of GPU, such as A100-80G, RTX-4090, MI300X; another one is described by the next.")
    ] = "A100-80G",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of one GPU; default: its kind's.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.1, help="Dense bf16 (or fp16) peak of one GPU; default: its kind's.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s from a GPU to others of its node; default: its kind's.")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s from a node to others; default: its kind's, else 12.5.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default: as few as usual.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak rate that computing reaches.")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per GPU and hour; default: assumed.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Default: the encoder's positions.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp16; default: the GPU's own.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers going backward.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    write_configs: Annotated[
        UserPath | None, typer.Option(help="Folder for DeepSpeed configurations that fit.")
    ] = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="From 1 to 1,024 GPUs instead of --gpus.")] = False,
    chart: Annotated[UserPath | None, typer.Option(help="With --scaling: SVG file to write.")] = None,
) -> None:
    """Memory, traffic, time and cost of a recipe for each ZeRO stage: without a GPU and without weights."""
    from xdscale.plan.report import machine_from, run_plan, run_scaling

    machine = machine_from(
        gpu, gpus, nodes, gpu_memory, mfu, price, tflops=tflops, bandwidth=bandwidth, network=network
    )
    model = {"sequence_length": sequence_length, "precision": precision, "checkpointing": checkpointing}
    if not scaling and chart is None:
        run_plan(recipe, overrides or [], machine, **model, as_json=as_json, write_configs=write_configs)
        return
    for option, value in (("--nodes", nodes), ("--write-configs", write_configs)):
        if value is not None:
            raise XdscaleError(
                f"{option} {value}: goes with one number of GPUs, not with --scaling or --chart; leave one out"
            )
    run_scaling(recipe, overrides or [], machine, **model, as_json=as_json, chart=chart)


@app.command(rich_help_panel=_FINETUNE)
def export(
    run: Annotated[UserPath, typer.Argument(help="Run folder.")],
    out: Annotated[UserPath, typer.Argument(help="New folder for the Hugging Face export.")],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to export; default: the best one (training.best), else the newest.")
    ] = None,
) -> None:
    """Write the adapted language encoder as a Hugging Face folder, with the full cross-modal model inside it."""
    from xdscale.export import export_run

    print(export_run(run, out, step=step))


@app.command(rich_help_panel=_FINETUNE)
def finetune(
    model: Annotated[str, typer.Option(help="Folder or name of the encoder; an exported folder has both subjects.")],
    task: Annotated[list[str], typer.Option(help="rte, mrpc, …, 'all', or the YAML file of your own; repeatable.")],
    out: Annotated[UserPath, typer.Option(help="Folder of the sweep; one that was stopped continues.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of RTE/dev.tsv and so on; default: fetched.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=10_000, help="How many; default: as the recipe says.")] = None,
    regions: Annotated[
        str | None, typer.Option(help="Dataset with the image regions of tasks that read images.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SUBJECTS)}; cross-modal is XDBERT's full model, clip its CLIP-T. Default: as the folder "
            "says."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The model's name in tables.")] = None,
    recipe: Annotated[str, typer.Option(help="Finetuning recipe, file or name.")] = "paper",
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per GPU, or one.")] = None,
    deepspeed_config: Annotated[
        str | None,
        typer.Option(help="DeepSpeed JSON; default on GPUs: finetune-zero1, from pixels with a micro-batch of 4."),
    ] = None,
) -> None:
    """Finetune an encoder on GLUE, SWAG, READ, tasks with images or one of your own, seeds and tasks side by side."""
    from xdscale.finetune.command import Request, run_command

    request = Request(
        model=model,
        subject=subject,
        tasks=task,
        data=data,
        regions=regions,
        out=out,
        seeds=seeds,
        label=label,
        recipe=recipe,
        overrides=overrides or [],
        ds_config=deepspeed_config,
        jobs=jobs,
    )
    sys.exit(run_command(request))


@app.command("report", rich_help_panel=_FINETUNE)
def report_command(
    runs: Annotated[list[UserPath], typer.Argument(metavar="RUN...", help="Folders written by 'xdscale finetune'.")],
    layout: Annotated[
        str, typer.Option(help=f"{', '.join(sorted(path.stem for path in _TABLES.glob('*.yaml')))}.")
    ] = "table-1",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="What the runs after it are compared with; repeatable. Default: the first run; in table-8 none.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="TASK=METRIC", help="Instead of the task's own, as in mrpc=accuracy.")
    ] = None,
    out: Annotated[
        UserPath, typer.Option(help="Folder for report.md, .csv, .html and the examples one by one.")
    ] = Path("report"),
) -> None:
    """Print the paper's table of finetuned models with medians, spreads and significance, published values beside."""
    from xdscale.report.command import make_report

    for path in make_report(runs, layout=layout, baselines=baseline or [], metrics=metric or [], out=out)[:3]:
        print(path)


@app.command(rich_help_panel=_TRAIN)
def replay(
    run: Annotated[UserPath, typer.Argument(help="Run folder.")],
    step: Annotated[int, typer.Argument(help="Step, counted from 1 as in log.jsonl.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="data.shards=...", help="Where the shards are now, or run.cache=...")
    ] = None,
) -> None:
    """Repeat a step's global batch sample by sample: losses, gradient norms, what is not finite first."""
    from xdscale.commands.replay import replay as replay_step

    replay_step(run, step, overrides or [])


@app.command(rich_help_panel=_CLUSTERS)
def launch(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    deepspeed_config: Annotated[str | None, typer.Option(help="Default: the shipped ZeRO-2 file that fits.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Machines and ranks: node-1:8,node-2:8")] = None,
    hostfile: Annotated[UserPath | None, typer.Option(help="The same from a file: lines 'node-1 slots=8'.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="First machine, as the others reach it.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Free port there.")] = 29500,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where sshd listens.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a batch script for Slurm.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Slurm: machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Slurm: GPUs, and ranks, of each.")] = 8,
    time: Annotated[str, typer.Option(help="Slurm: as in 24:00:00.")] = "24:00:00",
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Slurm: cores of each rank.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: queue.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: who pays.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Slurm: features of the machines, as in 'a100&nvlink'.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For every rank; repeatable.")] = None,
    out: Annotated[UserPath | None, typer.Option(help="Folder for the files; default launch/RECIPE.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Start it, instead of printing the command.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ.")] = False,
) -> None:
    """Start a recipe on several machines: write hostfile and environment, or a Slurm script, and print the command."""
    from xdscale.launch.command import launch_on_hosts, launch_on_slurm
    from xdscale.launch.hosts import first_address, one_of
    from xdscale.launch.job import check_job, path_warnings
    from xdscale.launch.slurm import SlurmRequest
    from xdscale.launch.start import Rendezvous

    machines = one_of(hosts, hostfile)
    if slurm == bool(machines):
        raise XdscaleError("say where to run: one of --hosts node-1:8,node-2:8, --hostfile FILE or --slurm --nodes N")
    request = SlurmRequest(nodes, gpus_per_node, time, partition, account, qos, constraint, cpus_per_task)
    world_size = request.world_size if slurm else sum(host.slots for host in machines)
    job = check_job(recipe, overrides or [], deepspeed_config, world_size)
    print(job.split, file=sys.stderr)
    for warning in path_warnings(job.recipe):
        print(f"warning: {warning}", file=sys.stderr)
    folder = out or Path("launch", job.name)
    if slurm:
        launch_on_slurm(job, request, folder, env=env or [], run=run, force=force)
    else:
        meet = Rendezvous(first_address(machines, master_addr), master_port, ssh_port)
        launch_on_hosts(job, machines, meet, folder, env=env or [], run=run, force=force)


@app.command(rich_help_panel=_CLUSTERS)
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Recipe file or name: its paths and space are checked.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    hosts: Annotated[str | None, typer.Option(help="Machines and ranks: node-1:8,node-2:8")] = None,
    hostfile: Annotated[UserPath | None, typer.Option(help="The same from a file: lines 'node-1 slots=8'.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="First machine, as the others reach it.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Port to be tried there.")] = 29500,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where sshd listens.")] = None,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds for machines to answer.")] = 120,
) -> None:
    """Check this machine, these machines or this Slurm allocation: versions, clocks, paths, space, network."""
    from xdscale.launch.doctor import examine
    from xdscale.launch.hosts import first_address, one_of
    from xdscale.launch.start import Rendezvous

    machines = one_of(hosts, hostfile)
    meet = Rendezvous(first_address(machines, master_addr), master_port, ssh_port)
    raise typer.Exit(examine(machines, meet, recipe, overrides or [], timeout_seconds=timeout))


@kernels_app.command()
def report(
    write: Annotated[
        UserPath | None, typer.Option(help="Markdown file whose table is replaced, docs/kernels.md.")
    ] = None,
    check: Annotated[UserPath | None, typer.Option(help="Markdown file whose table must be what is measured.")] = None,
) -> None:
    """Compile every shipped kernel for every target, without a GPU: registers, spills, shared memory, bytes."""
    from xdscale.commands.kernel_report import print_report

    print_report(write=write, check=check)


_OF_NAMES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system has against a name that a user gave, wherever it is looked at first."""


def main() -> None:
    """Runs the command line; a user's mistake or a full disk becomes one message and exit code 2."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: × and é stop no command in a C locale
    try:
        try:
            app()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except XdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if error.filename is not None and error.errno in _OF_NAMES:
            print(f"error: {refusal(error)}; choose another place, or mend it", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}; make room", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what could not be written would fail once more at the end
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
