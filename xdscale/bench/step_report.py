"""What `xdscale bench step` measured, and its table."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.table import Table

PLAIN, FAST = "plain fp32", "fast fp32"
MASTERS, AUTOCAST = "fast bf16, fp32 masters", "fast bf16, autocast"
DTYPES = {PLAIN: torch.float32, FAST: torch.float32, MASTERS: torch.bfloat16, AUTOCAST: torch.bfloat16}
PARTS = ("language encoder", "CLIP text tower", "cross-modal layers", "heads", "optimizer")


@dataclass
class Measured:
    """What was found out about one way to compute the step.

    Attributes:
        flops: of the matrix products in forward and backward.
        activation_bytes: see `activation_bytes`.
        seconds: of each step.
        cpu_seconds: of each step, over all threads; what others take of the machine is not in it.
        parts: of each step, the seconds of (part, "forward" or "backward").
    """

    flops: int
    activation_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: list[Mapping[tuple[str, str], float]] = field(default_factory=list)


@dataclass(frozen=True)
class StepReport:
    """All measurements of a run.

    Attributes:
        paths: by name, the one that is measured against first.
        rates: measured FLOPs per second of matrix products, by dtype.
        bf16_seconds: one step of each way to use bf16; the faster one is among the paths. Empty where the machine's
            products are slower in bf16 than in fp32: a step would take minutes and show nothing.
        disagreement: largest relative difference of a loss between plain and fast fp32, without dropout.
        shape: the batch in words.
        peak: the card's bf16 FLOPs per second on its data sheet; None on a CPU or a card that the table does not have.
    """

    paths: dict[str, Measured]
    rates: dict[torch.dtype, float]
    bf16_seconds: dict[str, float]
    disagreement: float
    shape: str
    peak: float | None = None

    def ratios(self, name: str, *, without_optimizer: bool = False) -> list[float]:
        """Returns how many times as fast `name` was as the path it is measured against, pair by pair."""
        base, path = next(iter(self.paths.values())), self.paths[name]
        return [a / b for a, b in zip(_seconds(base, without_optimizer), _seconds(path, without_optimizer))]


def _seconds(path: Measured, without_optimizer: bool) -> list[float]:
    if not without_optimizer:
        return path.seconds
    return [whole - parts["optimizer", "forward"] for whole, parts in zip(path.seconds, path.parts)]


def step_table(report: StepReport) -> Table:
    """Returns the table of a report, a column for each path."""
    base = next(iter(report.paths.values()))
    table = Table(caption="median (range) of the steps; parts: median seconds of forward + backward")
    table.add_column("")
    rows: dict[str, list[str]] = defaultdict(list)
    for name, path in report.paths.items():
        table.add_column(name, justify="right")
        rate = path.flops / median(path.seconds) / report.rates[DTYPES[name]]
        rows["seconds"].append(spread(path.seconds))
        rows["CPU seconds"].append(spread(path.cpu_seconds))
        rows["times as fast"].append(spread(report.ratios(name)))
        rows["… without optimizer"].append(spread(report.ratios(name, without_optimizer=True)))
        rows["TFLOP of products"].append(f"{path.flops / 1e12:.3f}")
        rows["share of matrix rate"].append(f"{rate:.0%}")
        if report.peak:
            rows["share of the card's bf16 peak"].append(f"{path.flops / median(path.seconds) / report.peak:.1%}")
        rows["activations, MiB"].append(f"{path.activation_bytes / 2**20:,.0f}")
        rows["… as a share"].append(f"1/{base.activation_bytes / path.activation_bytes:.1f}")
        for part in PARTS:
            ways = [median(parts.get((part, way), 0.0) for parts in path.parts) for way in ("forward", "backward")]
            rows[part].append(" + ".join(f"{seconds:.2f}" for seconds in ways if seconds or part != "optimizer"))
    for heading, cells in rows.items():
        table.add_row(heading, *cells, end_section=heading == "… as a share")
    return table


def spread(values: list[float]) -> str:
    """Returns the median of values, and the least and the largest."""
    return f"{median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def short(dtype: torch.dtype) -> str:
    """Returns `fp32` or `bf16`."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
