"""The verdict as people read it."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from xdscale.errors import EXIT_BAD_INPUT
from xdscale.files import count_of
from xdscale.launch.verdict import CHECKS, Evidence, judge, table

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def print_report(evidence: Evidence) -> int:
    """Prints machines × checks, what was measured, and every finding with its remedy.

    Returns:
        Exit code: 0, or 2 when anything failed.
    """
    findings = judge(evidence)
    # Where output is no terminal rich assumes 80 columns, and would cut host names.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)
    grid = Table(box=box.SIMPLE_HEAD)
    for title in ("host", *CHECKS):
        grid.add_column(title, no_wrap=True)
    for host, *cells in table(evidence, findings):
        grid.add_row(host, *(f"[{_STYLES[cell]}]{cell}[/]" if cell in _STYLES else cell for cell in cells))
    console.print(grid)
    for line in _measured(evidence):
        console.print(line, markup=False, soft_wrap=True)
    for finding in findings:
        console.print(
            f"{finding.level} {finding.host}, {finding.check}: {finding.text}",
            style=_STYLES[finding.level],
            markup=False,
            soft_wrap=True,
        )
    failures = sum(finding.level == "FAIL" for finding in findings)
    warnings = len(findings) - failures
    counts = f"{count_of(failures, 'failure')}, {count_of(warnings, 'warning')}"
    console.print(f"verdict: {'FAIL' if failures else 'ok'} ({counts})", style="bold", markup=False)
    return EXIT_BAD_INPUT if failures else 0


def _measured(evidence: Evidence) -> list[str]:
    lines = []
    if evidence.hosts:
        first = evidence.hosts[0]
        lines.append(", ".join(f"{name} {version}" for name, version in first.versions.items()))
        gpus = f"{len(first.gpus)} × {first.gpus[0]}, driver {first.driver}" if first.gpus else "no GPU: CPU ranks"
        lines.append(f"first machine: {gpus}; {first.cores} cores; /dev/shm {first.shared_memory_gib:.1f} GiB")
        if evidence.needed_bytes and first.output_free_bytes is not None:
            lines.append(
                f"checkpoints need about {evidence.needed_bytes / 2**30:.1f} GiB; free: "
                f"{first.output_free_bytes / 2**30:.1f} GiB"
            )
    if len(evidence.clock_offsets) > 1:
        largest = max(abs(offset) for offset in evidence.clock_offsets.values())
        lines.append(f"clocks within {1000 * largest:.1f} ms of the first machine's")
    result = evidence.collective
    ranks = len(evidence.names)
    if result is not None and not evidence.collective_problems:
        line = f"all-reduce over {count_of(ranks, 'rank')} ({result.backend}): 1 number "
        line += f"{result.milliseconds:.2f} ms, {result.large_bytes // 2**20} MiB {result.large_milliseconds:.1f} ms"
        if ranks > 1:
            # Every byte crosses the slowest link 2 (n - 1) / n times in a ring: NCCL's "bus bandwidth".
            moved = 2 * (ranks - 1) / ranks * result.large_bytes
            line += f", bus bandwidth {moved / result.large_milliseconds / 1e6:.2f} GB/s"
        lines.append(line)
    return lines
