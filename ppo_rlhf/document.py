"""A page as data: sections of text, tables and charts. Studies write it, as Markdown and for the report to draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppo_rlhf.errors import UserError

DOCUMENT = "document.json"
ROWS = 12  # of the table beside a chart


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
class Table:
    """Cells as they are to be read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Document:
    """A page."""

    title: str
    text: Sequence[str]  # paragraphs
    sections: Sequence[Section]

    @property
    def markdown(self) -> str:
        """The page without its charts."""
        blocks = [f"# {self.title}", *self.text]
        for section in self.sections:
            blocks += [f"## {section.title}", *section.text, *(table.markdown for table in section.tables)]
        return "\n\n".join(blocks) + "\n"


def read_document(folder: Path) -> Document:
    """The document that a study left in the folder. Raises UserError where there is none."""
    path = folder / DOCUMENT
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return Document(**{**given, "sections": [_section(each) for each in given["sections"]]})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} holds no study's page: {' '.join(str(error).split())}") from error


def _section(given: Mapping[str, Any]) -> Section:
    charts = [Chart(**{**each, "series": tuple(map(_series, each["series"]))}) for each in given["charts"]]
    return Section(**{**given, "tables": [Table(**each) for each in given["tables"]], "charts": charts})


def _series(given: Mapping[str, Any]) -> Series:
    return Series(**{**given, "y": [math.nan if y is None else y for y in given["y"]]})


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
