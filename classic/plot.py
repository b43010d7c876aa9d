"""Learning curves of runs, from their folders: PNG, SVG, and the raw numbers as CSV."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.run import read_config
from ppo_rlhf.settings import flat
from ppo_rlhf.statistics import Estimate, mean_and_interval

# Settings in which runs may differ and still be seeds of one another.
OF_NO_WEIGHT = {"seed", "output_dir", "resume", "num_steps", "device", "log_with", "eval_every", "eval_episodes"}
OF_NO_WEIGHT |= {"pictures", "save_every", "keep_checkpoints"}
MOST_TOLD = 2  # differing settings in a line's name
# Okabe and Ito's (2008) colours, told apart with any colour vision; a line style each for prints in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))


@dataclass(frozen=True)
class Curve:
    """One metric of one run."""

    run: Path
    config: Mapping[str, Any]
    x: np.ndarray  # (T,)
    y: np.ndarray  # (T,)


def plot(
    runs: Sequence[str | Path], output: str | Path, *, metric: str = "episode/return", x: str = "steps", smooth: int = 1
) -> dict[str, str]:
    """Draws a metric of the runs, a panel for each environment; → the paths of what it wrote: png, svg, csv.

    Runs that differ in nothing but their seed become one line, their mean, in a band: the 95 % t interval of that mean.
    smooth: each point is the mean of the latest so many of its run; a single run's raw points stay in sight.

    Raises UserError for a folder without a run, or a metric that a run does not have.
    """
    if smooth < 1:
        raise UserError(f"smooth={smooth} must be at least 1.")
    curves = [read_curve(Path(run), metric, x) for run in runs]
    target = Path(output).with_suffix(".png")
    if not target.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {target.parent}.")
    save(draw(curves, metric=metric, x=x, smooth=smooth), target)
    write_csv(target.with_suffix(".csv"), curves, metric=metric, x=x)
    return {kind: str(target.with_suffix(f".{kind}")) for kind in ("png", "svg", "csv")}


def plot_estimates(
    estimates: Mapping[str, Estimate],
    output: Path,
    *,
    axis: str,
    marks: Mapping[str, float | None] | None = None,
    marked: str = "",
) -> None:
    """Draws a row for each estimate, a dot in its interval, as PNG and SVG. marks: hollow dots, called `marked`."""
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(estimates)), layout="constrained")
    panel = figure.subplots()
    for row, found in enumerate(estimates.values()):
        if found.low is not None and found.high is not None:
            panel.plot([found.low, found.high], [row, row], color=COLOURS[0], linewidth=2.5, alpha=0.45)
        panel.plot([found.value], [row], "o", color=COLOURS[0], markersize=6)
    told = [(value, list(estimates).index(name)) for name, value in (marks or {}).items() if value is not None]
    if told:
        panel.plot(*zip(*told, strict=True), "o", color=COLOURS[1], markersize=6, fillstyle="none", label=marked)
        panel.legend(frameon=False, fontsize=9)
    panel.set_yticks(range(len(estimates)), list(estimates))
    panel.invert_yaxis()
    panel.set_xlabel(axis)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, output)


def save(figure: Figure, path: Path) -> None:
    """As PNG and, beside it, SVG: the same figure, the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "classic", "svg.fonttype": "none"}):
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def read_curve(run: Path, metric: str, x: str) -> Curve:
    """The points of a run at which both were measured.

    One that was not finite is left out: of a run that diverged the curve, and its part in a mean, is of what went well.
    """
    path = run / "metrics.jsonl"
    config = read_config(run)
    if config is None or not path.exists():
        raise UserError(f"{run} holds no run: there is no {'config.yaml' if config is None else path.name} in it.")
    rows = _rows_of(path)
    known = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    for name in (metric, x):
        if name not in known:
            raise UserError(f"{path} has no metric {name}.{did_you_mean(name, known)}")
    points = [(row[x], row[metric]) for row in rows if row.get(x) is not None and row.get(metric) is not None]
    if not points:
        raise UserError(f"{path} never has {metric} and {x} together.")
    return Curve(run, config, *np.array(points, dtype=float).T)


def draw(curves: Sequence[Curve], *, metric: str, x: str, smooth: int) -> Figure:
    """The figure: a panel for each environment, a line for each group of runs."""
    environments = list(dict.fromkeys(_environment_of(curve) for curve in curves))
    columns = min(3, len(environments))
    rows = math.ceil(len(environments) / columns)
    figure = Figure(figsize=(max(6.4, 4.8 * columns), 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, environment in itertools.zip_longest(panels, environments):
        if environment is None:
            panel.set_visible(False)
            continue
        groups = _groups_of([curve for curve in curves if _environment_of(curve) == environment])
        for index, (label, members) in enumerate(groups.items()):
            _draw_group(panel, label, members, index, smooth)
        _dress(panel, environment, metric, x)
        _end_where_the_runs_do(panel, groups.values(), smooth)
    figure.supxlabel(_what_is_drawn(curves, smooth), fontsize=8, color="#555555")
    return figure


def smoothed(y: np.ndarray, smooth: int) -> np.ndarray:
    """The mean of the latest `smooth` points at each point (T,), of fewer at the start."""
    sums = np.cumsum(np.insert(y, 0, 0.0))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - smooth, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def write_csv(path: Path, curves: Sequence[Curve], *, metric: str, x: str) -> None:
    """The raw points, a line each."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "env_id", "algorithm", "seed", x, metric])
        for curve in curves:
            names = [curve.run, *(curve.config.get(name, "") for name in ("env_id", "algorithm", "seed"))]
            writer.writerows(
                [*names, f"{at:g}" if at % 1 else int(at), value] for at, value in zip(curve.x, curve.y, strict=True)
            )


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for one that a crash cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _environment_of(curve: Curve) -> str:
    return str(curve.config.get("env_id", curve.run.name))


def _groups_of(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Runs that differ in nothing of weight, by the algorithm's name; where that is not enough with the settings in
    which those of that name differ, or where those are many with the folder's name.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(json.dumps(_weighty(curve), sort_keys=True, default=str), []).append(curve)
    names = {key: str(members[0].config.get("algorithm", "run")) for key, members in groups.items()}
    labelled = {}
    for key, members in groups.items():
        name, own = names[key], _weighty(members[0])
        differing = _differing([_weighty(each[0]) for other, each in groups.items() if names[other] == name])
        told = [f"{setting.rpartition('.')[2]} {own.get(setting)}" for setting in differing]
        label = ", ".join([name, *(told if len(told) <= MOST_TOLD else [str(members[0].run)])])
        labelled[label if len(members) == 1 else f"{label} ({len(members)} seeds)"] = members
    return labelled


def _weighty(curve: Curve) -> dict[str, Any]:
    """The settings, by their dotted names, in which runs of one group agree."""
    return flat({name: value for name, value in curve.config.items() if name not in OF_NO_WEIGHT})


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which not all agree."""
    names = dict.fromkeys(itertools.chain.from_iterable(configs))
    return [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]


def _draw_group(panel: Axes, label: str, members: Sequence[Curve], index: int, smooth: int) -> None:
    colour, style = COLOURS[index % len(COLOURS)], STYLES[(index + index // len(COLOURS)) % len(STYLES)]
    if len(members) == 1:
        (curve,) = members
        if smooth > 1:
            panel.plot(curve.x, curve.y, color=colour, linewidth=0.8, alpha=0.3)
        panel.plot(curve.x, smoothed(curve.y, smooth), color=colour, linestyle=style, linewidth=1.8, label=label)
        return
    grid = _common_grid(members)
    mean, half = mean_and_interval(np.stack([np.interp(grid, curve.x, smoothed(curve.y, smooth)) for curve in members]))
    panel.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
    panel.plot(grid, mean, color=colour, linestyle=style, linewidth=1.8, label=label)


def _common_grid(members: Sequence[Curve]) -> np.ndarray:
    """All points of any run between the latest start and the earliest end, so that nothing is extrapolated."""
    points = np.unique(np.concatenate([curve.x for curve in members]))
    start, end = max(curve.x[0] for curve in members), min(curve.x[-1] for curve in members)
    return points[(points >= start) & (points <= end)]


def _dress(panel: Axes, environment: str, metric: str, x: str) -> None:
    panel.set_title(environment, loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel("environment steps" if x == "steps" else x)
    panel.set_ylabel(metric.replace("/", " "))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.01)
    panel.legend(frameon=False, fontsize=9)


def _end_where_the_runs_do(panel: Axes, groups: Iterable[Sequence[Curve]], smooth: int) -> None:
    """Cuts bands off a little beyond the runs: with few seeds an interval is wider than returns can be."""
    seen = [smoothed(curve.y, smooth) if len(group) > 1 else curve.y for group in groups for curve in group]
    low, high = min(y.min() for y in seen), max(y.max() for y in seen)
    margin = 0.06 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)


def _what_is_drawn(curves: Sequence[Curve], smooth: int) -> str:
    several = any(len(members) > 1 for members in _groups_of(curves).values())
    parts = ["line: mean over seeds; band: 95 % t interval of that mean"] if several else []
    if smooth > 1:
        parts.append(f"mean of the latest {smooth} points")
    return "; ".join(parts)
