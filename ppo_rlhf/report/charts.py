"""Charts by Bokeh: what one shows is data, its picture is drawn in the reader's browser by a script inside the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bokeh.embed import components
from bokeh.models import ColumnDataSource, CrosshairTool, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure
from bokeh.resources import Resources
from markupsafe import Markup

from ppo_rlhf.document import Chart, Series

COLOURS = ("#4c7df0", "#d9722b", "#2a9d76", "#b65fc4", "#d9534f", "#1496b5", "#9a7d0a", "#7a7f8c")
"""At least 3:1 against the page's white and against its black."""
GREY = "#8a8a94"


@dataclass(frozen=True)
class Drawn:
    """Charts as parts of a page."""

    bokeh: Markup  # Bokeh itself, as inline scripts
    script: Markup  # draws the charts once the page is there
    places: list[Markup]  # where each goes


def draw(charts: Sequence[Chart], names: Sequence[str]) -> Drawn:
    """The charts as parts of one self-contained page. names: of all series, in the order of the legend."""
    if not charts:
        return Drawn(Markup(""), Markup(""), [])
    colours = dict(zip(names, colours_of(names), strict=True))
    script, places = components(tuple(_figure(chart, colours) for chart in charts))
    scripts = Resources(mode="inline", components=["bokeh"], log_level="error").render_js()
    return Drawn(Markup(scripts), Markup(script), [Markup(place) for place in places])


def colours_of(names: Iterable[str]) -> list[str]:
    """A colour for each name, by its place in the legend."""
    return [COLOURS[place % len(COLOURS)] for place, _ in enumerate(names)]


def _figure(chart: Chart, colours: dict[str, str]) -> Any:
    drawn = figure(
        height=chart.height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_axis_label=chart.x_label,
        min_border_right=12,
    )
    lines, points = [], []
    for series in chart.series:
        colour, source = colours[series.name], _source(series)
        if series.low:
            drawn.varea("x", "low", "high", source=source, fill_color=colour, fill_alpha=0.18, name=series.name)
        if series.style != "dots":
            alpha = 0.45 if series.style == "path" else 1.0
            line = drawn.line("x", "y", source=source, color=colour, line_width=2, alpha=alpha, name=series.name)
            lines += [line] if series.style == "line" else []
        if series.style != "line" or len(series.x) < 30:
            size = 4 if series.style == "line" else 8
            cloud = drawn.scatter("x", "y", source=source, color=colour, size=size, name=series.name)
            points += [cloud] if series.style != "line" else []
    across = chart.x_label
    if lines:
        drawn.add_tools(_hover(lines, across, mode="vline"))
    if points:
        drawn.add_tools(_hover(points, across, mode="mouse"))
    drawn.add_tools(CrosshairTool(dimensions="height" if lines else "both", line_color=GREY, line_alpha=0.6))
    _style(drawn)
    return drawn


def _source(series: Series) -> ColumnDataSource:
    columns = {name: [_short(value) for value in getattr(series, name)] for name in ("x", "y", "low", "high")}
    return ColumnDataSource({**{name: column for name, column in columns.items() if column}, "note": _notes(series)})


def _short(value: float) -> float:
    """As precise as a chart can show: six digits."""
    return float(f"{value:.6g}")


def _notes(series: Series) -> list[str]:
    return list(series.notes) or [""] * len(series.x)


def _hover(renderers: list[Any], across: str, mode: Literal["mouse", "vline"]) -> HoverTool:
    """Numbers under the pointer; Bokeh escapes what it fills in."""
    told = f"<b>@y{{0.[0000]}}</b> &nbsp;{across} @x{{0.[00]}}<br>$name @{{note}}"
    return HoverTool(renderers=renderers, mode=mode, tooltips=f"<div>{told}</div>", line_policy="nearest")


def _style(drawn: Any) -> None:
    """What does not depend on light or dark; the rest is in the page's style sheet, as --bk-… properties."""
    drawn.background_fill_alpha = drawn.border_fill_alpha = 0
    drawn.outline_line_alpha = 0
    drawn.xgrid.visible = False
    drawn.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")  # 150k
    drawn.yaxis.formatter.power_limit_low = -4  # 0.0025, not 2.500e-3
    for axis in drawn.axis:
        axis.minor_tick_line_alpha = 0
        axis.major_tick_in, axis.major_tick_out = 0, 4
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
