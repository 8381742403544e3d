"""The report as one HTML file that needs nothing else."""

from pathlib import Path

from xdscale.report import text, wording
from xdscale.report.assemble import Report
from xdscale.report.plots import SERIES, box_plot, learning_curves


def page(report: Report) -> str:
    """Returns the page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    shown = [column for column in report.layout.columns if any(column.task in s.tasks for s in report.sweeps)]
    return template.render(
        layout=report.layout,
        head=text.head(report),
        rows=[_row(report, row) for row in report.rows()],
        legend=[(sweep.model.label, number % SERIES) for number, sweep in enumerate(report.sweeps)],
        differences_head=text.DIFFERENCE_HEAD,
        differences=[
            (label, baseline, text.sentences(report, label), text.difference_rows(report, label))
            for label, baseline in report.baselines.items()
            if report.comparisons_of(label)
        ],
        plots=[
            (column.title, Markup(box_plot(report, column)), Markup(learning_curves(report, column)))
            for column in shown
        ],  # the SVG is made here and escapes its own labels
        remarks=report.remarks,
        settings=text.settings_rows(report),
        models=[(s.model.label, s.model.name, s.model.subject, s.model.weights_sha256) for s in report.sweeps],
        method=wording.METHOD,
    )


def _row(report: Report, row: text.ReportRow) -> dict[str, object]:
    """Returns one line of the table for the template: the paper's cells, and ours as (median, spread, seeds, word)."""
    ours = None
    if row.sweep is not None:
        ours = []
        for column in report.layout.columns:
            cell = report.cell(row.sweep, column.task)
            if cell is None:
                ours.append(None)
                continue
            metric = row.sweep.tasks[column.task].score.name
            one = report.comparison(row.sweep.model.label, column.task)
            parts = wording.value(metric, cell.median), wording.spread(metric, cell), wording.shortfall(cell)
            ours.append((*parts, one.verdict if one else ""))
    return {
        "paper": row.published.label if row.published else None,
        "published": text.published_cells(report, row),
        "label": row.sweep.model.label if row.sweep else None,
        "number": report.sweeps.index(row.sweep) % SERIES if row.sweep else None,
        "ours": ours,
    }
