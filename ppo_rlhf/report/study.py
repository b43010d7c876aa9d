"""The page of a study, from the document that it left in its folder."""

from __future__ import annotations

from pathlib import Path

from ppo_rlhf.document import read_document
from ppo_rlhf.report import charts
from ppo_rlhf.report.html import rendered, write_page


def write_study(folder: Path) -> Path:
    """Writes report.html beside the study's document; → its path. Raises UserError where there is no document."""
    document = read_document(folder)
    shown = [chart for section in document.sections for chart in section.charts]
    names = list(dict.fromkeys(series.name for chart in shown for series in chart.series))
    drawn = charts.draw(shown, names)
    places = iter(drawn.places)
    page = rendered(
        "study.html",
        title=document.title,
        text=document.text,
        sections=[(each, [(chart, next(places)) for chart in each.charts]) for each in document.sections],
        legend_title="Series shown",
        legend=list(zip(names, charts.colours_of(names), strict=True)),
        bokeh=drawn.bokeh,
        script=drawn.script,
    )
    return write_page(page, folder / "report.html")
