"""The report of control runs: returns, the other curves, and pictures of the policy, from what `classic` wrote.

One run, several seeds of it (a line in a band), several algorithms or settings, and several environments, each apart.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from ppo_rlhf.errors import UserError
from ppo_rlhf.report.charts import Chart, Series, colours_of, draw

HERE = Path(__file__).parent
# Settings in which runs may differ and still be seeds of one another.
OF_NO_WEIGHT = {"seed", "output_dir", "resume", "log_with", "eval_every", "pictures", "save_every", "keep_checkpoints"}
DIGITS = 3  # of a picture's numbers

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ControlRun:
    """What a run folder of `classic` holds."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Row]
    summary: Mapping[str, Any]  # empty while it is not finished
    pictures: Sequence[Row]  # empty where the state cannot be drawn

    @property
    def environment(self) -> str:
        """Its id."""
        return str(self.config.get("env_id", ""))

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Environment steps and values of a metric; a value that was not finite leaves a gap."""
        rows = [row for row in self.metrics if name in row and "steps" in row]
        return [row["steps"] for row in rows], [math.nan if row[name] is None else row[name] for row in rows]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    name: str
    runs: Sequence[ControlRun]


@dataclass(frozen=True)
class Curve:
    """A metric that has a chart."""

    metrics: tuple[str, ...]  # the first that a run has
    title: str
    unit: str = ""
    evaluated: str = ""  # the metric of evaluations, shown as dots
    level: Callable[[ControlRun], tuple[str, float] | None] = lambda run: None  # a line across, with its name


def _solved(run: ControlRun) -> tuple[str, float] | None:
    level = run.summary.get("return_solved")
    return None if level is None else ("solved", level)


def _kl_target(run: ControlRun) -> tuple[str, float] | None:
    where = {"penalty": ("penalty", "kl_target"), "trpo": ("trust_region", "max_kl")}
    if run.config.get("algorithm") not in where:
        return None
    group, name = where[run.config["algorithm"]]
    return f"{run.config['algorithm']}'s {name}", run.config[group][name]


CURVES = (
    Curve(("episode/return",), "Return of the episodes that ended", "", "eval/return", _solved),
    Curve(("episode/length",), "Length of the episodes that ended", "decisions", "eval/length"),
    Curve(("policy/kl", "policy/approx_kl"), "KL(old‖new) of an update", "nats a decision", level=_kl_target),
    Curve(("kl_coef",), "β, the KL penalty's coefficient"),
    Curve(("policy/clip_fraction",), "Share of decisions that were clipped"),
    Curve(("objective/entropy",), "Entropy of the policy", "nats a decision"),
    Curve(("value/explained_variance",), "Explained variance of the values"),
    Curve(("loss/value",), "Value loss"),
    Curve(("grad_norm",), "Norm of the gradient"),
    Curve(("lr",), "Learning rate"),
    Curve(("steps_per_second",), "Speed", "steps a second"),
)


# ------------------------------------------------------------------------------------------------------- reading


def control_folders(folder: Path) -> list[Path]:
    """The control runs in a folder: itself, or those of a comparison; none where it holds other things."""
    places = [folder, *sorted(folder.glob("*/*/seed-*"), key=_by_numbers)]
    return [place for place in places if _is_control(place)]


def write_control_report(folders: Sequence[Path], target: Path) -> Path:
    """One report of all these runs; → where it is. Raises UserError for a run that has measured nothing yet."""
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    by_environment = [
        (name, groups_of([run for run in runs if run.environment == name]))
        for name in dict.fromkeys(run.environment for run in runs)
    ]
    charts = {name: charts_of(groups) for name, groups in by_environment}
    all_charts = [chart for each in charts.values() for chart in each]
    names = list(dict.fromkeys(series.name for chart in all_charts for series in chart.series))
    colours = dict(zip(names, colours_of(names), strict=True))
    drawn = draw(all_charts, names)
    places = iter(drawn.places)
    sections = [
        {
            **section_of(groups),
            "environment": name,
            "charts": [(chart, next(places)) for chart in charts[name]],
            "legend": {each.name: colours[each.name] for chart in charts[name] for each in chart.series}.items(),
        }
        for name, groups in by_environment
    ]
    environment = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape())
    page = environment.get_template("control.html").render(
        title=" and ".join(charts),
        sections=sections,
        drawn=drawn,
        style=_inlined("control.css", "pictures.css"),
        script=_inlined("pictures.js"),
        source=", ".join(str(run.folder) for run in runs),
    )
    target.write_text(page, encoding="utf-8")
    return target


def _inlined(*names: str) -> Markup:
    return Markup("".join((HERE / "static" / name).read_text(encoding="utf-8") for name in names))


def read_run(folder: Path) -> ControlRun:
    """Raises UserError for a run that has measured nothing yet."""
    metrics = _lines(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder} holds no run to report on: it has measured nothing yet.")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    summary = folder / "summary.json"
    return ControlRun(
        folder,
        config,
        metrics,
        json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
        _lines(folder / "policy_pictures.jsonl"),
    )


def _is_control(folder: Path) -> bool:
    path = folder / "environment.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("stage") == "classic"


def _by_numbers(path: Path) -> list[Any]:
    """Sorts seed-2 before seed-10."""
    return [*path.parts[:-1], int(path.name.rpartition("-")[2]) if path.name[5:].isdigit() else 0]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for one that a crash cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


# ------------------------------------------------------------------------------------------------------- sections


def section_of(groups: Sequence[Group]) -> dict[str, Any]:
    """What the page shows of one environment's runs beside their charts."""
    configs = [(group.name, dict(group.runs[0].config)) for group in groups]
    return {
        "outcome": [outcome_of(group, named=len(groups) > 1) for group in groups],
        "pictures": [pictures_of(group) for group in groups if group.runs[0].pictures],
        "groups": [group.name for group in groups],
        "differences": differences_of(groups),
        "configs": [(name, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)) for name, config in configs],
    }


def groups_of(runs: Sequence[ControlRun]) -> list[Group]:
    """Runs that differ in nothing of weight, named by algorithm; by folder too where that is not enough."""
    groups: dict[str, list[ControlRun]] = {}
    for run in runs:
        weighty = {name: value for name, value in run.config.items() if name not in OF_NO_WEIGHT}
        groups.setdefault(json.dumps(weighty, sort_keys=True, default=str), []).append(run)
    names = [str(members[0].config.get("algorithm", "run")) for members in groups.values()]
    return [
        Group(name if names.count(name) == 1 else f"{name}, {members[0].folder}", members)
        for name, members in zip(names, groups.values(), strict=True)
    ]


def outcome_of(group: Group, *, named: bool) -> str:
    """How it ended, in one sentence."""
    finished = [run.summary for run in group.runs if run.summary]
    start = f"{group.name}: the" if named else "The"
    if not finished:
        steps = max(row["steps"] for run in group.runs for row in run.metrics)
        return f"{start} run is not finished: it has come to {steps:,} steps."
    before, after = (statistics.fmean(each[name] for each in finished) for name in ("return_before", "return_after"))
    spread = finished[0]["return_std_after"]
    over = "over the episodes of its last evaluation"
    if len(finished) > 1:
        spread = statistics.stdev(each["return_after"] for each in finished)
        over = f"over {len(finished)} seeds"
    solved = finished[0].get("return_solved")
    verdict = "" if solved is None else f"; solved ({solved:g})" if after >= solved else f"; not solved ({solved:g})"
    seconds = statistics.fmean(each["seconds"] for each in finished)
    return (
        f"{start} mean return went from {before:.1f} to {after:.1f} ± {spread:.1f} {over}, in "
        f"{finished[0]['steps']:,} steps and {seconds:.0f} s{verdict}."
    )


def differences_of(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The settings in which the groups differ, each with its value in every one."""
    flat = [dict(_flat(group.runs[0].config)) for group in groups]
    names = [name for name in dict.fromkeys(name for each in flat for name in each) if name not in OF_NO_WEIGHT]
    rows = [(name, [json.dumps(each.get(name), ensure_ascii=False) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --------------------------------------------------------------------------------------------------------- charts


def charts_of(groups: Sequence[Group]) -> list[Chart]:
    """The curves that these runs have."""
    return [chart for curve in CURVES if (chart := chart_of(curve, groups)) is not None]


def chart_of(curve: Curve, groups: Sequence[Group]) -> Chart | None:
    """A line for each group, with the range of its seeds as a band; dots of evaluations; None where nothing moved."""
    series: list[Series] = []
    for group in groups:
        members = [
            points for run in group.runs if any((points := _points(run, curve))[1])
        ]  # β is 0 where there is none
        if members:
            series.append(_line(group.name, members))
    if not series:
        return None
    for group in groups if curve.evaluated else ():
        series += _evaluations(group, curve.evaluated)
    return Chart(curve.title, (*series, *_levels(curve, groups, series)), "steps", curve.unit)


def _points(run: ControlRun, curve: Curve) -> tuple[list[float], list[float]]:
    return next((points for name in curve.metrics if (points := run.points(name))[0]), ([], []))


def _line(name: str, members: Sequence[tuple[list[float], list[float]]]) -> Series:
    """The mean of the seeds between the lowest and the highest, where all of them were measured or lie between two
    measurements.
    """
    if len(members) == 1:
        return Series(name, *members[0])
    every = np.unique(np.concatenate([x for x, _ in members]))
    grid = every[(every >= max(x[0] for x, _ in members)) & (every <= min(x[-1] for x, _ in members))]
    values = np.stack([np.interp(grid, x, y) for x, y in members])
    rows = (grid, values.mean(0), values.min(0), values.max(0))
    x, mean, low, high = (row.tolist() for row in rows)
    return Series(name, x, mean, low, high, notes=[f"mean of {len(members)} seeds"] * len(x))


def _evaluations(group: Group, metric: str) -> list[Series]:
    """Dots, where there are any; that of the untrained policy is told in the summary alone."""
    points = [point for run in group.runs for point in zip(*run.points(metric), strict=True)]
    if metric == "eval/return":
        points += [(0, run.summary["return_before"]) for run in group.runs if "return_before" in run.summary]
    if not points:
        return []
    x, y = zip(*sorted(points), strict=True)
    return [Series(group.name, x, y, style="dots", notes=["evaluated"] * len(x))]


def _levels(curve: Curve, groups: Sequence[Group], series: Sequence[Series]) -> list[Series]:
    """Lines across the whole chart."""
    levels = dict.fromkeys(level for group in groups if (level := curve.level(group.runs[0])) is not None)
    ends = [min(each.x[0] for each in series), max(each.x[-1] for each in series)]
    return [Series(f"{name}: {value:g}", ends, [value, value]) for name, value in levels]


# ------------------------------------------------------------------------------------------------------- pictures


def pictures_of(group: Group) -> dict[str, Any]:
    """What the page draws of a group's first run: a figure for each plane and quantity, a frame for each picture."""
    run = group.runs[0]
    last = run.pictures[-1]
    figures = [
        _figure(run, place, index)
        for place, plane in enumerate(last["planes"])
        for index in range(len(plane["quantities"]))
    ]
    frames = [
        {
            "label": f"after {picture['steps']:,} steps" if picture["step"] else "before training",
            "returns": [episode["return"] for episode in picture["episodes"]],
            "episodes": [_shortened(episode["states"]) for episode in picture["episodes"]],
        }
        for picture in run.pictures
    ]
    return {
        "name": group.name if len(group.runs) == 1 else f"{group.name}, seed {run.config.get('seed')}",
        "variables": last["variables"],
        "frames": frames,
        "figures": figures,
        "value": _what_value_means(run),
    }


def _figure(run: ControlRun, place: int, index: int) -> dict[str, Any]:
    """One quantity over one plane, at all times in the same colours."""
    planes = [picture["planes"][place] for picture in run.pictures]
    quantities = [plane["quantities"][index] for plane in planes]
    plane, quantity = planes[-1], quantities[-1]
    seen = [number for each in quantities for row in each["numbers"] for number in row if number is not None]
    low, high = quantity["range"] or (min(seen, default=0), max(seen, default=1))
    return {
        "name": quantity["name"],
        "unit": quantity["unit"],
        "across": plane["across"],
        "up": plane["up"],
        "low": low,
        "high": high,
        "two_sided": quantity["range"] is not None and (low < 0 or len(run.pictures[-1]["actions"]) == 2),
        "grids": [_shortened(each["numbers"]) for each in quantities],
        "arrows": [_shortened(each["arrows"]) for each in planes if "arrows" in each],
        "summary": _told(run.pictures[-1]["variables"], plane, quantity),
    }


def _told(variables: Sequence[Row], plane: Row, quantity: Row) -> str:
    """The final figure in words."""
    across, up = (variables[plane[side]]["name"] for side in ("across", "up"))
    numbers = [number for row in quantity["numbers"] for number in row if number is not None]
    if not numbers:
        return f"{quantity['name']} over {across} and {up}: no number is finite."
    middle = quantity["numbers"][len(quantity["numbers"]) // 2]
    return (
        f"{quantity['name']} over {across} (across) and {up} (up), at the end of training: lowest {min(numbers):.3g}, "
        f"highest {max(numbers):.3g}, in the middle {_number(middle[len(middle) // 2])}."
    )


def _what_value_means(run: ControlRun) -> str:
    scaled = "" if run.config["reward_scale"] == 1 else f", times {run.config['reward_scale']:g}"
    normalized = ", normalised" if run.config["normalize_rewards"] else ""
    return f"rewards to come as they are learnt: discounted by {run.config['gamma']:g} a decision{scaled}{normalized}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _shortened(numbers: Any) -> Any:
    """Nested lists of numbers, as precise as a picture can show them."""
    if isinstance(numbers, list):
        return [_shortened(number) for number in numbers]
    return None if numbers is None else float(f"{numbers:.{DIGITS}g}")
