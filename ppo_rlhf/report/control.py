"""What the report tells of control runs: returns and other curves over environment steps, pictures of the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import numpy as np

from ppo_rlhf.document import Chart, Series
from ppo_rlhf.records import Record
from ppo_rlhf.report.curves import POINTS, spread
from ppo_rlhf.report.groups import Group
from ppo_rlhf.report.outcome import means_of, shown_number

DIGITS = 3  # of a picture's numbers
KL_TARGETS = {"penalty": "penalty.kl_target", "trpo": "trust_region.max_kl"}  # by algorithm

Level = tuple[str, float]  # a line across a whole chart
Points = tuple[list[float], list[float]]  # environment steps and values


def _solved(record: Record) -> Level | None:
    level = record.summary.get("return_solved")
    return None if level is None else ("solved", level)


def _kl_target(record: Record) -> Level | None:
    setting = KL_TARGETS.get(record.config.get("algorithm", ""))
    return None if setting is None else (setting, record.setting(setting))


@dataclass(frozen=True)
class ControlCurve:
    """A metric's chart over environment steps: a line of rollouts, dots of evaluations, lines across."""

    title: str
    metrics: tuple[str, ...]  # the first that a run has
    unit: str = ""
    evaluated: str = ""
    level: Callable[[Record], Level | None] = lambda record: None


CURVES = (
    ControlCurve("Return", ("episode/return",), "mean of the episodes that ended", "eval/return", _solved),
    ControlCurve("Episode length", ("episode/length",), "decisions", "eval/length"),
    ControlCurve("KL(old‖new) of an update", ("policy/kl", "policy/approx_kl"), "nats a decision", level=_kl_target),
    ControlCurve("KL penalty’s coefficient β", ("kl_coef",)),
    ControlCurve("Clip fraction", ("policy/clip_fraction",), "share of decisions"),
    ControlCurve("Entropy", ("objective/entropy",), "nats a decision"),
    ControlCurve("Explained variance of the values", ("value/explained_variance",)),
    ControlCurve("Value loss", ("loss/value",)),
    ControlCurve("Gradient norm", ("grad_norm",)),
    ControlCurve("Learning rate", ("lr",)),
    ControlCurve("Speed", ("steps_per_second",), "steps a second"),
)


def sentence_of(group: Group) -> str:
    """What came of a group's runs, in one sentence; means over seeds where there are several."""
    finished = [record.summary for record in group.records if record.finished]
    if not finished:
        steps = max((row.get("steps", 0) for record in group.records for row in record.rows), default=0)
        return f"The run on {group.stage} has not finished: this is what it wrote up to step {steps:,}."
    numbers = means_of(group)
    before, after = (shown_number(numbers[f"return_{when}"], ".1f") for when in ("before", "after"))
    spread, over = numbers["return_std_after"], "over episodes"
    returns = [each["return_after"] for each in finished]
    if len(returns) > 1:
        spread, over = None if None in returns else stdev(returns), f"over {len(returns)} seeds"
    return (
        f"{group.name} took {group.stage} from a mean return of {before} to {after} ± {shown_number(spread, '.1f')} "
        f"{over}, in {numbers['steps']:,.0f} steps and {numbers['seconds']:.0f} seconds{_verdict(numbers)}."
    )


def _verdict(numbers: dict[str, float | None]) -> str:
    level, after = numbers.get("return_solved"), numbers["return_after"]
    if level is None or after is None:
        return ""
    return f": {'solved' if after >= level else 'not solved yet'}, which takes {shown_number(level, 'g')}"


# --------------------------------------------------------------------------------------------------------- curves


def charts_of(groups: Sequence[Group]) -> list[Chart]:
    """The charts of one environment's groups: each group's mean over its seeds, lowest to highest as a band."""
    charts = []
    for curve in CURVES:
        lines = [line for group in groups if (line := _line(group, curve)) is not None]
        if lines:
            dots = [each for group in groups for each in _dots(group, curve.evaluated)]
            series = (*lines, *dots, *_levels(groups, curve, lines))
            charts.append(Chart(curve.title, series, "steps", curve.unit))
    return charts


def level_names(charts: Sequence[Chart], groups: Sequence[Group]) -> list[str]:
    """The series that are no group's: the lines across."""
    known = {group.name for group in groups}
    return list(dict.fromkeys(each.name for chart in charts for each in chart.series if each.name not in known))


def _line(group: Group, curve: ControlCurve) -> Series | None:
    """None where no run has the metric, or it is 0 throughout, as β is where there is no penalty."""
    runs = [points for record in group.records if any((points := _first_of(record, curve.metrics))[1])]
    if not runs:
        return None
    if len(runs) == 1:
        ((x, y),) = runs
        kept = spread(len(x), POINTS)
        return Series(group.name, [x[i] for i in kept], [y[i] for i in kept])
    every = np.unique(np.concatenate([x for x, _ in runs]))
    # Between the latest start and the earliest end, so that nothing is extrapolated.
    shared = every[(every >= max(x[0] for x, _ in runs)) & (every <= min(x[-1] for x, _ in runs))]
    shared = shared[spread(len(shared), POINTS)]
    values = np.stack([np.interp(shared, x, y) for x, y in runs])
    x, mean, low, high = (each.tolist() for each in (shared, values.mean(0), values.min(0), values.max(0)))
    return Series(group.name, x, mean, low, high)


def _first_of(record: Record, metrics: Sequence[str]) -> Points:
    return next((points for name in metrics if (points := points_of(record, name))[0]), ([], []))


def points_of(record: Record, metric: str) -> Points:
    """A metric over environment steps; one that was not finite leaves a gap."""
    rows = [row for row in record.rows if metric in row and "steps" in row]
    return [row["steps"] for row in rows], [math.nan if row[metric] is None else row[metric] for row in rows]


def _dots(group: Group, metric: str) -> list[Series]:
    """Each run's evaluations, with that of the untrained policy."""
    points = [point for record in group.records for point in zip(*points_of(record, metric), strict=True)]
    if metric == "eval/return":
        before = [record.summary.get("return_before") for record in group.records]
        points += [(0, each) for each in before if each is not None]
    if not points:
        return []
    x, y = zip(*sorted(points), strict=True)
    return [Series(group.name, x, y, style="dots", notes=["evaluated"] * len(x))]


def _levels(groups: Sequence[Group], curve: ControlCurve, lines: Sequence[Series]) -> list[Series]:
    levels = dict.fromkeys(level for group in groups if (level := curve.level(group.records[0])) is not None)
    ends = [min(line.x[0] for line in lines), max(line.x[-1] for line in lines)]
    return [Series(f"{name}: {value:g}", ends, [value, value]) for name, value in levels]


# ------------------------------------------------------------------------------------------------------- pictures


def pictures_of(group: Group) -> dict[str, Any] | None:
    """What pictures.js draws of a group's first run: a figure for each plane and quantity, a frame for each picture.

    None where it has no pictures.
    """
    record = group.records[0]
    pictures = record.pictures
    if not pictures:
        return None
    last = pictures[-1]
    return {
        "name": group.name if len(group.records) == 1 else f"{group.name}, seed {record.config.get('seed')}",
        "variables": last["variables"],
        "value": _what_value_means(record),
        "figures": [
            _figure(pictures, place, index)
            for place, plane in enumerate(last["planes"])
            for index in range(len(plane["quantities"]))
        ],
        "frames": [
            {
                "label": f"after {picture['steps']:,} steps" if picture["step"] else "before training",
                "returns": [episode["return"] for episode in picture["episodes"]],
                "episodes": [_shortened(episode["states"]) for episode in picture["episodes"]],
            }
            for picture in pictures
        ],
    }


def _figure(pictures: Sequence[dict[str, Any]], place: int, index: int) -> dict[str, Any]:
    """One quantity over one plane, at all times in the same colours."""
    planes = [picture["planes"][place] for picture in pictures]
    quantities = [plane["quantities"][index] for plane in planes]
    plane, quantity = planes[-1], quantities[-1]
    seen = [number for each in quantities for number in _finite(each)]
    low, high = quantity["range"] or (min(seen, default=0), max(seen, default=1))
    opposites = quantity["range"] is not None and (low < 0 < high or len(pictures[-1]["actions"]) == 2)
    return {
        "name": quantity["name"],
        "unit": quantity["unit"],
        "across": plane["across"],
        "up": plane["up"],
        "low": low,
        "high": high,
        "opposites": opposites,  # two actions, or directions of one, with indifference between
        "grids": [_shortened(each["numbers"]) for each in quantities],
        "arrows": [_shortened(each["arrows"]) for each in planes if "arrows" in each],
        "summary": _told(pictures[-1]["variables"], plane, quantity),
    }


def _told(variables: Sequence[dict[str, Any]], plane: dict[str, Any], quantity: dict[str, Any]) -> str:
    """The final figure in words."""
    across, up = (variables[plane[side]]["name"] for side in ("across", "up"))
    numbers = _finite(quantity)
    found = f"from {min(numbers):.3g} to {max(numbers):.3g}" if numbers else "nowhere finite"
    return f"{quantity['name']} at the end of training, over {across} and {up}: {found}."


def _finite(quantity: dict[str, Any]) -> list[float]:
    return [number for row in quantity["numbers"] for number in row if number is not None]


def _what_value_means(record: Record) -> str:
    scaled = f", times {record.setting('reward_scale'):g}" if record.setting("reward_scale", 1) != 1 else ""
    normalized = ", normalised" if record.setting("normalize_rewards") else ""
    return (
        f"what the critic expects of the rewards to come, discounted by {record.setting('gamma')}{scaled}{normalized}"
    )


def _shortened(numbers: Any) -> Any:
    """Nested lists of numbers, as precise as a picture can show them."""
    if isinstance(numbers, list):
        return [_shortened(number) for number in numbers]
    return None if numbers is None else float(f"{numbers:.{DIGITS}g}")
