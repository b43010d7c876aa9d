"""Which curves a report shows, and the charts of groups of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ppo_rlhf.document import Chart, Series
from ppo_rlhf.records import Record
from ppo_rlhf.report.groups import Group

POINTS = 400  # of a line: more than a screen has room for


@dataclass(frozen=True)
class Curve:
    """A metric's chart: a line at each step, dots at each evaluation of held-out data."""

    title: str
    metric: str  # empty: evaluations alone, as a line
    held_out: str = ""
    unit: str = ""


CURVES = {
    "sft": (Curve("Loss", "loss", "eval/loss", "nats a token"), Curve("Gradient norm", "grad_norm")),
    "reward": (
        Curve("Loss", "loss", "eval/loss", "nats a pair"),
        Curve("Held-out pairs ordered as labelled", "", "eval/accuracy", "share"),
        Curve("Held-out pairs ordered as the gold reward does", "", "eval/gold_accuracy", "share"),
        Curve("Calibration error", "", "eval/calibration_error"),
    ),
    "ppo": (
        Curve("Score", "objective/score", "eval/score", "raw reward"),
        Curve("Gold score", "objective/gold_score", "eval/gold_score"),
        Curve("KL to the reference", "objective/kl", "eval/kl", "nats a response"),
        Curve("Reward after the KL penalty", "objective/reward", unit="a response"),
        Curve("Entropy", "objective/entropy", unit="nats a token"),
        Curve("Response length", "response/length", "eval/length", "tokens"),
        Curve("Stop rate", "response/stop_rate", "eval/stop_rate", "share"),
        Curve("Distinct word pairs", "", "eval/distinct_2", "share"),
        Curve("KL coefficient β", "kl_coef"),
        Curve("Clip fraction", "policy/clip_fraction", unit="share of tokens"),
        Curve("KL(old‖new) of an update", "policy/approx_kl", unit="nats a token"),
        Curve("Explained variance of the values", "value/explained_variance"),
        Curve("Value loss", "loss/value"),
        Curve("Gradient norm", "grad_norm"),
    ),
}
"""By stage."""


def curve_charts(groups: Sequence[Group]) -> list[Chart]:
    """The charts of one stage's groups: each group's mean over its runs, lowest to highest as a band."""
    charts = []
    for curve in CURVES.get(groups[0].stage, ()):
        series = []
        for group in groups:
            if curve.metric:
                series += _line(group, curve.metric)
            if curve.held_out:
                series += _line(group, curve.held_out, style="dots" if curve.metric else "line")
        if any(len(each.x) > 1 for each in series):
            charts.append(Chart(curve.title, tuple(series), y_label=curve.unit))
    return charts


def _line(group: Group, metric: str, style: str = "line") -> list[Series]:
    """The mean over the group's runs at each step that any of them has; nothing where none has the metric."""
    runs = [points_of(record, metric) for record in group.records]
    steps = sorted({step for run in runs for step in run})
    if not steps:
        return []
    kept = [steps[i] for i in spread(len(steps), POINTS)]
    columns = [[run[step] for run in runs if step in run] for step in kept]
    means = [fmean(values) if all(map(math.isfinite, values)) else math.nan for values in columns]
    if style == "dots":
        return [Series(group.name, kept, means, style="dots")]
    several = len(runs) > 1
    low, high = ([pick(values) for values in columns] if several else [] for pick in (min, max))
    return [Series(group.name, kept, means, low, high)]


def points_of(record: Record, metric: str) -> dict[int, float]:
    """A metric by step; one that was not finite leaves a gap."""
    return {row["step"]: math.nan if row[metric] is None else row[metric] for row in record.rows if metric in row}


def spread(count: int, most: int) -> list[int]:
    """Places evenly spread over `count`, first and last among them, at most `most`, which is at least 2."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def frontier_charts(groups: Sequence[Group]) -> list[Chart]:
    """Score against KL, and gold score against KL beside it: each evaluation a point, joined in their order."""
    charts = []
    for title, metric in (("Score against KL", "score"), ("Gold score against KL", "gold_score")):
        series = [each for group in groups for record in group.records for each in _path(group.name, record, metric)]
        if series:
            label = "KL to the reference, nats a response"
            charts.append(Chart(title, tuple(series), label, height=320))
    return charts


def _path(name: str, record: Record, metric: str) -> list[Series]:
    """Held-out evaluations, or the rollouts of a run with fewer than two evaluations."""
    for x, y in (("eval/kl", f"eval/{metric}"), ("objective/kl", f"objective/{metric}")):
        kl, values = points_of(record, x), points_of(record, y)
        steps = [step for step in kl if step in values and math.isfinite(kl[step]) and math.isfinite(values[step])]
        if len(steps) > 1:
            kept = [steps[i] for i in spread(len(steps), POINTS)]
            notes = [f"at step {step}" for step in kept]
            return [Series(name, [kl[s] for s in kept], [values[s] for s in kept], style="path", notes=notes)]
    return []
