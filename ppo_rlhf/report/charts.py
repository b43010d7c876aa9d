"""Charts by Bokeh: what one shows is data, its picture is drawn in the reader's browser by a script inside the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bokeh.embed import components
from bokeh.models import ColumnDataSource, CrosshairTool, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure
from bokeh.resources import Resources
from markupsafe import Markup

COLOURS = ("#4c7df0", "#d9722b", "#2a9d76", "#b65fc4", "#d9534f", "#1496b5", "#9a7d0a", "#7a7f8c")
"""At least 3:1 against the page's white and against its black."""
ROWS = 12  # of the table beside a chart
GREY = "#8a8a94"


@dataclass(frozen=True)
class Series:
    """One line, path or cloud of points."""

    name: str  # what the legend calls it; series of one name share a colour
    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap
    low: Sequence[float] = ()  # of a band around the line; empty: none
    high: Sequence[float] = ()
    style: Literal["line", "dots", "path"] = "line"  # path: points joined in their order
    notes: Sequence[str] = ()  # what the pointer is told of each point beside its numbers


@dataclass(frozen=True)
class Chart:
    """One chart."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "step"
    y_label: str = ""
    height: int = 220  # pixels; its width is the page's choice

    @property
    def summary(self) -> str:
        """What the picture shows, in words: first, last, lowest and highest value of each series."""
        return " ".join(filter(None, map(_told, self.series)))

    @property
    def table(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """The numbers, at most a dozen points of each series, evenly spaced: (name, style, [(x, y)])."""
        tables: list[tuple[str, str, list[tuple[str, str]]]] = []
        for series in self.series:
            points = _points(series)
            kept = sorted({round(i * (len(points) - 1) / (ROWS - 1)) for i in range(ROWS)}) if points else []
            cells = [(f"{x:.4g}", f"{y:.4g}") for x, y in (points[i] for i in kept)]
            tables.append((series.name, series.style, cells))
        return tables


@dataclass(frozen=True)
class Drawn:
    """Charts as parts of a page."""

    library: Markup  # Bokeh itself, as inline scripts
    script: Markup  # draws the charts once the page is there
    places: list[Markup]  # where each goes


def draw(charts: Sequence[Chart], names: Sequence[str]) -> Drawn:
    """The charts as parts of one self-contained page. names: of all series, in the order of the legend."""
    if not charts:
        return Drawn(Markup(""), Markup(""), [])
    colours = dict(zip(names, colours_of(names), strict=True))
    script, places = components(tuple(_figure(chart, colours) for chart in charts))
    library = Resources(mode="inline", components=["bokeh"], log_level="error").render_js()
    return Drawn(Markup(library), Markup(script), [Markup(place) for place in places])


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


def _points(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]


def _told(series: Series) -> str:
    points = _points(series)
    if not points:
        return ""
    (first_x, first), (last_x, last) = points[0], points[-1]
    values = [y for _, y in points]
    span = f"from {first:.3g} (at {first_x:.4g}) to {last:.3g} (at {last_x:.4g})"
    return f"{series.name}: {span}; lowest {min(values):.3g}, highest {max(values):.3g}."
