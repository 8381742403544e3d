"""Prints a plan: a table for people, JSON for machines."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xdscale.data.order import refuse_tokens
from xdscale.ds_config import SHIPPED, split_batch
from xdscale.errors import XdscaleError
from xdscale.files import check_output_folder, count_of, write_outputs
from xdscale.plan.cluster import NETWORK_EFFICIENCY, Cluster
from xdscale.plan.configs import WAYS, config_text, ds_config
from xdscale.plan.hardware import FRAGMENTED, RESERVED_GIB, describe_gpu
from xdscale.plan.planner import GIB, Machine, Plan, PlanRow, make_plan
from xdscale.plan.scaling import COUNTS, markdown, scale
from xdscale.plan.scaling import chart as chart_text
from xdscale.recipe import load_recipe

_FILE_WIDTH = 140
"""Columns where there is no terminal to ask."""

DECODED_PER_CORE = 60
"""Images of 640 × 480 pixels that a core decodes and scales a second, at least (docs/measurements.md)."""

HOST_SECONDS = 0.05
"""Of computing in a micro-batch: less does not hide the host, which took 0.08 for BERT-base and CLIP (docs/gpu.md)."""

_MOST = 1_000_000
"""More than any GPU's GiB, TFLOP/s or GB/s, and little enough that what follows from it is a number."""


def machine_from(
    gpu: str,
    gpus: int,
    nodes: int | None,
    memory_gib: float | None,
    mfu: float,
    price: float | None,
    *,
    tflops: float | None = None,
    bandwidth: float | None = None,
    network: float | None = None,
) -> Machine:
    """Returns the machine that the command line describes.

    Args:
        gpu: name of a GPU in the table, or of one that the next values describe.
        gpus: how many.
        nodes: in how many machines; default: as few as the GPU's usual node allows.
        memory_gib: of one GPU; replaces the table's.
        mfu: share of the peak rate that computing reaches.
        price: dollars per GPU and hour; replaces the assumed one.
        tflops: dense 16-bit peak; replaces the table's.
        bandwidth: GB per second and direction between GPUs of a node; replaces the table's.
        network: GB per second and direction between nodes; replaces the table's.

    Raises:
        XdscaleError: an unknown GPU that is not described, or numbers that cannot be.
    """
    numbers = {"--gpu-memory": memory_gib, "--tflops": tflops, "--bandwidth": bandwidth, "--network": network}
    for option, value in (numbers | {"--mfu": mfu, "--price": price}).items():
        if value is not None and not value <= _MOST:  # so that nan is told too
            raise XdscaleError(f"{option} {value:g}: expected a number of at most {_MOST:,}")
    found = describe_gpu(gpu, memory_gib=memory_gib, tflops=tflops, bandwidth=bandwidth, network=network)
    if nodes is None:
        nodes = next(count for count in range(math.ceil(gpus / found.node_gpus), gpus + 1) if gpus % count == 0)
    elif gpus % nodes:
        raise XdscaleError(f"--gpus {gpus} --nodes {nodes}: the GPUs do not divide evenly over the nodes")
    return Machine(
        cluster=Cluster(found, gpus, nodes),
        memory_gib=found.memory_gib,
        mfu=mfu,
        price=found.price if price is None else price,
    )


def run_plan(
    recipe: str,
    overrides: list[str],
    machine: Machine,
    *,
    sequence_length: int | None,
    precision: str | None,
    checkpointing: bool,
    as_json: bool,
    write_configs: Path | None,
) -> None:
    """Plans, prints and, if asked to, writes the configurations.

    Raises:
        XdscaleError: as `profile_model` and `make_plan`; or files are to be written and nothing fits.
    """
    if write_configs is not None:
        check_output_folder(write_configs, "--write-configs")
    chosen = _precision(machine, precision)
    spec = load_recipe(recipe, overrides)
    refuse_tokens(spec, "a plan")
    split_batch(spec.training.global_batch, machine.cluster.gpus, 1)  # refuses GPUs that would idle
    from xdscale.plan.profile import profile_model  # torch, which a mistake need not wait for

    profile = profile_model(spec, precision=chosen, checkpointing=checkpointing, sequence_length=sequence_length)
    plan = make_plan(recipe, spec, machine, profile)
    if as_json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        print_plan(plan)
    if write_configs is not None:
        _write(plan, write_configs, as_json)


def _precision(machine: Machine, asked: str | None) -> str:
    own = machine.cluster.gpu.precision
    if asked not in (None, "fp16", own):
        raise XdscaleError(
            f"--precision {asked}: {machine.cluster.gpu.name} computes in {own}{' or fp16' * (own != 'fp16')}"
        )
    return asked or own


def run_scaling(
    recipe: str,
    overrides: list[str],
    machine: Machine,
    *,
    sequence_length: int | None,
    precision: str | None,
    checkpointing: bool,
    as_json: bool,
    chart: Path | None,
) -> None:
    """Plans the recipe from 1 to 1,024 GPUs and prints Markdown or JSON; writes the chart if asked to.

    Raises:
        XdscaleError: as `profile_model` and `scale`, or the chart is named as another kind of file.
    """
    if chart is not None and chart.suffix not in ("", ".svg"):
        raise XdscaleError(f"--chart {chart}: the chart is written as SVG; expected a name that ends with .svg")
    chosen = _precision(machine, precision)
    spec = load_recipe(recipe, overrides)
    refuse_tokens(spec, "a plan")
    batch = spec.training.global_batch
    beyond = [f"{gpus:,}" for gpus in COUNTS if gpus > batch]
    if beyond:
        print(
            f"batch of the recipe: {batch} sequences feed at most {batch} GPUs, no row for {', '.join(beyond)}",
            file=sys.stderr,
        )
    from xdscale.plan.profile import profile_model

    profile = profile_model(spec, precision=chosen, checkpointing=checkpointing, sequence_length=sequence_length)
    curves = {
        "batch of the recipe": scale(recipe, spec, machine, profile, grow=False),
        "growing batch": scale(recipe, spec, machine, profile, grow=True),
    }
    if as_json:
        print(json.dumps({name: [asdict(point) for point in points] for name, points in curves.items()}, indent=2))
    else:
        print("\n\n".join(f"{name}:\n\n{markdown(points)}" for name, points in curves.items()))
    if chart is not None:
        write_outputs({chart: chart_text(curves, f"{recipe}, {machine.cluster.gpu.name}: hours over GPUs")})


def print_plan(plan: Plan) -> None:
    """Prints a plan for people."""
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(markup=False, width=_FILE_WIDTH)
    cluster = plan.machine.cluster
    frozen = f", {plan.frozen:,} not trained" if plan.frozen else ""
    console.print(f"{plan.recipe}: {plan.trained:,} trained parameters{frozen}", highlight=False)
    console.print(
        f"{cluster.gpus} × {cluster.gpu.name} in {count_of(cluster.nodes, 'node')}, "
        f"{plan.precision}, sequences of {plan.sequence_length}, {plan.flops_per_sequence / 1e12:.2f} TFLOP each; "
        f"{plan.machine.usable_bytes / GIB:.1f} of {plan.machine.memory_gib:g} GiB usable",
        highlight=False,
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(_verdict(plan), highlight=False, soft_wrap=True)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="GiB per rank", caption="at the suggested micro-batch; buckets with what stage 3 gathers")
    for name in ("", "parameters", "gradients", "optimizer", "activations", "working", "buckets", "sum", "host"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for row in plan.rows:
        states, active = row.states, row.activations
        values = (
            states.parameters,
            states.gradients,
            states.optimizer,
            active.kept,
            active.working,
            states.buckets + states.gathered,
            row.device_bytes,
            states.host,
        )
        table.add_row(row.way, *(f"{value / GIB:.2f}" for value in values), style=_style(plan, row))
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(
        title="micro-batch, traffic and time",
        caption=f"MFU {plan.machine.mfu:.0%}; links at {NETWORK_EFFICIENCY:.0%}, nothing hidden behind computing; "
        f"{'no price known' if plan.machine.price is None else f'${plan.machine.price:g} per GPU and hour'} (--price)",
    )
    names = ("", "largest micro-batch", "suggested", "steps to add up", "padding", "GB handed over", "GB sent")
    for name in (*names, "s per step", "waiting", "hours", "$"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for row in plan.rows:
        traffic = [f"{value / 1e9:.2f}" for value in (row.payload_bytes, row.wire_bytes)]
        if row.step_seconds is None:
            table.add_row(row.way, "does not fit", style="dim")
            continue
        time = [f"{row.step_seconds:.3f}", f"{row.communication_seconds / row.step_seconds:.0%}"]
        money = [f"{row.hours:.2f}", "-" if row.cost is None else f"{row.cost:,.2f}"]
        counts = [str(value) for value in (row.largest_micro_batch, row.micro_batch, row.accumulation)]
        counts.append(f"{row.padding:.1%}")
        table.add_row(row.way, *counts, *traffic, *time, *money, style=_style(plan, row))
    return table


def _style(plan: Plan, row: PlanRow) -> str:
    return "bold" if row.way == plan.best else "dim" if row.step_seconds is None else ""


def _verdict(plan: Plan) -> str:
    if plan.best is None:
        least = min(plan.rows, key=lambda row: row.device_bytes)
        more = "more GPUs" if plan.checkpointing else "--checkpointing, more GPUs"
        return (
            f"Nothing fits: even {least.way} with a micro-batch of 1 takes {least.device_bytes / GIB:.1f} GiB of "
            f"{plan.machine.usable_bytes / GIB:.1f}. Use {more}, shorter sequences or a larger GPU."
        )
    row = next(row for row in plan.rows if row.way == plan.best)
    ships = (SHIPPED / row.config).is_file()
    which = f"--deepspeed-config {Path(row.config).stem}" if ships else row.config
    return (
        f"Use {which} (--write-configs FOLDER writes it for this GPU): a step is {row.accumulation} micro-batch"
        f"{'es' * (row.accumulation > 1)} of {row.micro_batch}. "
        f"{RESERVED_GIB:g} GiB for the context and {FRAGMENTED:.0%} for fragmentation are left free."
        f"{_padding(row, plan.machine.cluster.gpus)}{_host(row)}{_pictures(plan, row)}"
    )


def _padding(row: PlanRow, gpus: int) -> str:
    if not row.padding:
        return ""
    return (
        f" {row.padding:.1%} of what the {gpus} GPUs compute is padding: training.global_batch does not divide into "
        f"{gpus} × {row.accumulation} micro-batches."
    )


def _host(row: PlanRow) -> str:
    seconds = (row.step_seconds - row.communication_seconds) / row.accumulation
    if seconds >= HOST_SECONDS:
        return ""
    return (
        f" A micro-batch is {seconds * 1000:.0f} ms of computing; starting its kernels takes the host tens of ms, "
        "which do not count here: expect longer, and on fewer GPUs with larger micro-batches hardly longer still."
    )


def _pictures(plan: Plan, row: PlanRow) -> str:
    if not plan.pictures_per_step:
        return ""
    rate = plan.pictures_per_step / row.step_seconds / plan.machine.cluster.gpus
    return (
        f" At this rate each GPU takes {rate:.0f} images a second. Decoding them does not count here: a core makes "
        f"{DECODED_PER_CORE} of 640 × 480 pixels, so each GPU wants {math.ceil(rate / DECODED_PER_CORE)} or more."
    )


def _write(plan: Plan, folder: Path, as_json: bool) -> None:
    rows = [row for row in plan.rows if row.way in WAYS and row.micro_batch]
    if not rows:
        raise XdscaleError(f"--write-configs {folder}: nothing fits, nothing written")
    texts = {}
    for row in rows:
        # No more than a rank's share of a step, or some would idle.
        most = min(row.largest_micro_batch, row.micro_batch * row.accumulation)
        parameters = plan.trained + plan.frozen
        values = ds_config(row.way, plan.precision, most, parameters, checkpointing=plan.checkpointing)
        texts[folder / row.config] = config_text(values)
    write_outputs(texts)
    if not as_json:
        print("\n".join(f"written: {path}" for path in texts))
