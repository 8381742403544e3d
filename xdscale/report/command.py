"""`xdscale report`: reads, compares, prints, writes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import check_output_folder, write_outputs
from xdscale.report.assemble import Report, assemble, file_name
from xdscale.report.comparison import comparison_csv
from xdscale.report.published import layouts
from xdscale.report.sweep import read_sweep


def make_report(
    runs: Sequence[Path], *, layout: str, baselines: Sequence[str], metrics: Sequence[str], out: Path
) -> list[Path]:
    """Prints the paper's table with the significance statements, and writes all forms of the report.

    Args:
        runs: sweep folders.
        layout: a table of `layouts`.
        baselines: labels, see `assemble`.
        metrics: items TASK=METRIC, each instead of a task's headline.
        out: folder for report.md, report.csv, report.html and comparisons/TASK-LABEL.csv; older ones are replaced.

    Returns:
        The files written, report.md first.

    Raises:
        XdscaleError: bad input, runs that may not be compared, or `out` cannot be written; then nothing is written.
    """
    if layout not in layouts():
        raise XdscaleError(f"--layout {layout}: expected one of {', '.join(layouts())}")
    check_output_folder(out, "--out")
    chosen = {item: item.partition("=") for item in metrics}
    wanted = {task: metric for task, _, metric in chosen.values()}
    report = assemble([read_sweep(run, wanted) for run in runs], layouts()[layout], baselines)
    tasks = [column.task for column in report.layout.columns]
    for item, (task, equals, _) in chosen.items():
        if not equals or task not in tasks:
            raise XdscaleError(f"--metric {item}: expected TASK=METRIC with a task of {', '.join(tasks)}")
    files = _files(report)
    write_outputs({out / name: content for name, content in files.items()})
    _print(report)
    return [out / name for name in files]


def _files(report: Report) -> dict[str, str]:
    from xdscale.report.page import page
    from xdscale.report.text import comma_separated, markdown

    files = {"report.md": markdown(report), "report.csv": comma_separated(report), "report.html": page(report)}
    for one in report.comparisons:
        runs = report.sweep(one.label).tasks[one.task]
        files[f"comparisons/{one.task}-{file_name(one.label)}.csv"] = comparison_csv(one, runs)
    return files


def _print(report: Report) -> None:
    from rich.console import Console

    from xdscale.report.text import sentences, terminal_table

    # Where output is no terminal rich assumes 80 columns, and would cut cells.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(terminal_table(report))
    for label, baseline in report.baselines.items():
        lines = sentences(report, label)
        if lines:
            console.print(f"{label} against {baseline}", markup=False, style="bold", soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    for remark in report.remarks:
        print(f"warning: {remark}", file=sys.stderr)
