"""The report as Markdown, as CSV and on a terminal."""

import csv
import io
from typing import TYPE_CHECKING

from xdscale.report import wording
from xdscale.report.assemble import Report, ReportRow
from xdscale.tasks.metrics import METRICS

if TYPE_CHECKING:
    from rich.table import Table

CSV_COLUMNS = (
    "table", "model", "subject", "task", "metric", "seeds", "seeds_planned", "median", "min", "max", "published",
    "baseline", "difference", "ci_low", "ci_high", "ci_seeds_low", "ci_seeds_high", "verdict", "examples", "improved",
    "worsened",
)  # fmt: skip

DIFFERENCE_HEAD = (
    "task", "metric", "seeds", "difference", "95 % CI", "95 % CI, seeds too", "paper", "improved", "worsened", "same",
)  # fmt: skip


def head(report: Report) -> list[str]:
    """Returns the column titles of the paper's table; an arrow where less is better."""
    return ["", *(c.title if METRICS[c.metric].higher_is_better else f"{c.title}↓" for c in report.layout.columns)]


def published_cells(report: Report, row: ReportRow) -> list[str]:
    """Returns the paper's line, column by column."""
    if row.published is None:
        return ["–"] * len(report.layout.columns)
    if row.sweep is None:
        return [wording.published(c.metric, row.published.values.get(c.task)) for c in report.layout.columns]
    return [wording.published(c.metric, report.published_value(row.sweep, c)) for c in report.layout.columns]


def difference_rows(report: Report, label: str) -> list[list[str]]:
    """Returns a model's cells under `DIFFERENCE_HEAD`."""
    rows = []
    for one in report.comparisons_of(label):
        difference, metric, column = one.difference, one.metric, report.column(one.task)
        printed = [report.published_value(report.sweep(name), column) for name in (one.label, one.baseline)]
        unit = 100 if METRICS[metric].fraction else 1
        paper = wording.change(metric, (printed[0] - printed[1]) / unit) if None not in printed else "–"
        rows.append(
            [
                column.title, METRICS[metric].title, str(difference.seeds),
                wording.change(metric, difference.observed), wording.interval(metric, difference.interval),
                wording.interval(metric, difference.wide_interval) if difference.wide_interval else "–", paper,
                str(one.improved), str(one.worsened), str(difference.examples - one.improved - one.worsened),
            ]
        )  # fmt: skip
    return rows


def sentences(report: Report, label: str) -> list[str]:
    """Returns a model's significance statements, the one over all tasks last."""
    found = [wording.sentence(report, one) for one in report.comparisons_of(label)]
    return [*found, wording.average_sentence(report, label)] if label in report.averages else found


def settings_rows(report: Report) -> list[list[str]]:
    """Returns task, models, files and settings; models with the same files and settings share a line."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for column in report.layout.columns:
        for sweep in report.sweeps:
            if column.task in sweep.tasks:
                result = sweep.tasks[column.task].runs[0].result
                files = [
                    f"{name}: {data.rows:,} rows, SHA-256 {data.sha256[:12]}…" for name, data in result.data.items()
                ]
                settings = [f"{key} = {setting}" for key, setting in result.settings.items()]
                rows.setdefault((column.title, "; ".join(files), "; ".join(settings)), []).append(sweep.model.label)
    return [[title, ", ".join(labels), files, settings] for (title, files, settings), labels in rows.items()]


def markdown(report: Report) -> str:
    """Returns the whole report as Markdown."""
    layout = report.layout
    table = []
    for row in report.rows():
        if row.published is not None:
            cells = published_cells(report, row)
            table.append([f"*{row.published.label} (paper)*", *(f"*{c}*" if c != "–" else c for c in cells)])
        if row.sweep is not None:
            table.append([f"**{row.sweep.model.label}**", *_own_cells(report, row, " ")])
    parts = [f"# {layout.title}", f"{layout.caption} {layout.note}".strip(), _pipes(head(report), table)]
    for label, baseline in report.baselines.items():
        if report.comparisons_of(label):
            lines = "\n".join(f"- {line}" for line in sentences(report, label))
            table = _pipes(list(DIFFERENCE_HEAD), difference_rows(report, label))
            parts += [f"## {label} against {baseline}", lines, table]
    if report.remarks:
        parts += ["## About these runs", "\n".join(f"- {remark}" for remark in report.remarks)]
    parts += ["## Data and settings", _pipes(["task", "models", "files", "settings"], settings_rows(report))]
    parts += ["## How to read this", "\n".join(f"- {line}" for line in wording.METHOD)]
    return "\n\n".join(parts) + "\n"


def comma_separated(report: Report) -> str:
    """Returns one line for each model and task; values as fractions, published ones in the paper's unit."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for sweep in report.sweeps:
        for column in report.layout.columns:
            cell = report.cell(sweep, column.task)
            if cell is None:
                continue
            line = {
                "table": report.layout.title, "model": sweep.model.label, "subject": sweep.model.subject,
                "task": column.task, "metric": sweep.tasks[column.task].score.name,
                "seeds": cell.finished, "seeds_planned": cell.planned,
                "median": cell.median, "min": cell.low, "max": cell.high,
                "published": report.published_value(sweep, column),
            }  # fmt: skip
            writer.writerow(line | _difference_fields(report, sweep.model.label, column.task))
    return file.getvalue()


def terminal_table(report: Report) -> "Table":
    """Returns the paper's table for a terminal, the paper's own lines dimmed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, title=report.layout.title, title_justify="left")
    for number, title in enumerate(head(report)):
        grid.add_column(Text(title), justify="right" if number else "left", no_wrap=True)
    for row in report.rows():
        if row.published is not None:
            cells = [f"{row.published.label} (paper)", *published_cells(report, row)]
            grid.add_row(*(Text(cell) for cell in cells), style="dim")
        if row.sweep is not None:
            grid.add_row(
                *(Text(cell) for cell in (row.sweep.model.label, *_own_cells(report, row, "\n"))), style="bold"
            )
    return grid


def _own_cells(report: Report, row: ReportRow, separator: str) -> list[str]:
    cells = []
    for column in report.layout.columns:
        cell = report.cell(row.sweep, column.task)
        if cell is None:
            cells.append("–")
            continue
        metric = row.sweep.tasks[column.task].score.name
        parts = [wording.value(metric, cell.median)]
        if cell.finished > 1:
            parts.append(f"({wording.spread(metric, cell)})")
        if wording.shortfall(cell):
            parts.append(wording.shortfall(cell))
        cells.append(separator.join(parts))
    return cells


def _difference_fields(report: Report, label: str, task: str) -> dict[str, object]:
    one = report.comparison(label, task)
    if one is None:
        return {}
    difference, wide = one.difference, one.difference.wide_interval
    return {
        "baseline": one.baseline, "difference": difference.observed, "examples": difference.examples,
        "ci_low": difference.interval.low, "ci_high": difference.interval.high,
        "ci_seeds_low": wide and wide.low, "ci_seeds_high": wide and wide.high, "verdict": one.verdict,
        "improved": one.improved, "worsened": one.worsened,
    }  # fmt: skip


def _pipes(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
