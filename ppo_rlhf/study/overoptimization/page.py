"""What the curves say: claims, tables and charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Literal

from ppo_rlhf.document import Chart, Document, Section, Series, Table
from ppo_rlhf.statistics import Estimate, estimate
from ppo_rlhf.study.claims import Claim, table_of
from ppo_rlhf.study.overoptimization.curves import Curve, Fit, Method, curve_of, fit
from ppo_rlhf.study.overoptimization.plan import Plan, Target

METHODS: tuple[Method, Method] = ("best of n", "PPO")
DRAWN = 60  # points of a fitted line


@dataclass(frozen=True)
class Results:
    """The whole study."""

    curves: list[Curve]
    fits: list[Fit]  # of the curves without a penalty, in their order, that have the points for one
    label_accuracy: dict[str, float]  # of each proxy, on held-out labels
    claims: list[Claim]


def results_of(curves: list[Curve], label_accuracy: dict[str, float], plan: Plan) -> Results:
    """The curves with their fits, and what they say of Gao et al.'s findings, and Coste et al.'s on ensembles."""
    fits = [fitted for curve in curves if curve.kl_coef == 0 and (fitted := fit(curve))]
    claims = [
        *(turns_over(curves, plan, method) for method in METHODS),
        grows_with(curves, plan, "labels"),
        grows_with(curves, plan, "size"),
        best_of_n_takes_less_kl(curves, plan),
        *([penalty_stops_early(curves, plan)] if plan.kl_coefs else []),
        ensembles_lose_less(curves, plan),
    ]
    return Results(curves, fits, label_accuracy, claims)


def clear(plan: Plan, method: Method = "PPO") -> float:
    """Two standard errors of a difference of gold between two evaluations on N held-out prompts, 2·√(2/N).

    Scores have a standard deviation of about 1. The noise from one training run to the next is not in it.
    """
    return 2 * math.sqrt(2 / _evaluated_on(plan, method))


def clear_of_peak(curve: Curve, plan: Plan) -> float:
    """What the best of a curve's k evaluations lies above another one by noise alone in at most 2.5 % of flat curves:
    z(1 − 0.025/k)·√(2/N), Bonferroni's bound.
    """
    return NormalDist().inv_cdf(1 - 0.025 / (len(curve.points) - 1)) * math.sqrt(2 / _evaluated_on(plan, curve.method))


def _evaluated_on(plan: Plan, method: Method) -> int:
    return plan.num_best_of_prompts if method == "best of n" else plan.num_eval_prompts


def turns_over(curves: Sequence[Curve], plan: Plan, method: Method) -> Claim:
    """Whether gold falls clearly while the proxy goes on rising, by every proxy by which it had risen clearly.

    Where gold never rose there is nothing to turn over; where it rose by no proxy that cannot be told.
    """
    found = [curve_of(curves, target.name, method) for target in _single(plan)]
    rose = [curve for curve in found if curve.peak.gold - curve.points[0].gold > clear_of_peak(curve, plan)]
    turned = [_turns(curve, plan) for curve in rose]
    spans = "; ".join(
        f"{curve.target}: {curve.peak.gold:+.2f} at d = {curve.peak.distance:.1f}, "
        f"{curve.end.gold:+.2f} at {curve.end.distance:.1f}"
        for curve in rose
    )
    return Claim(
        f"Where gold rises by {method}, it turns over while the proxy goes on rising.",
        _all(turned) if rose else None,
        f"gold rose by {len(rose)} of {len(found)} proxies and turned over by {sum(turned)}"
        + (f". Its peak and end there: {spans}" if rose else ""),
    )


def _turns(curve: Curve, plan: Plan) -> bool:
    peak, end = curve.peak, curve.end
    return peak.gold - end.gold > clear_of_peak(curve, plan) and end.proxy - peak.proxy > clear(plan, curve.method)


def grows_with(curves: Sequence[Curve], plan: Plan, what: Literal["labels", "size"]) -> Claim:
    """Whether PPO's peak of gold is clearly higher with the most labels than with the fewest at every size, or with the
    largest proxies at every count, and falls clearly at no step between.
    """

    def peak(size: str, count: int) -> float:
        return curve_of(curves, f"{size}-{count}", "PPO").peak.gold

    by_labels = [[peak(size, count) for count in plan.label_counts] for size in plan.sizes]
    rows = by_labels if what == "labels" else [list(column) for column in zip(*by_labels, strict=True)]
    names = plan.sizes if what == "labels" else plan.label_counts
    shown = "; ".join(
        f"{name}: {', '.join(f'{value:+.2f}' for value in row)}" for name, row in zip(names, rows, strict=True)
    )
    order = plan.label_counts if what == "labels" else plan.sizes
    text = "More labels raise the peak of gold." if what == "labels" else "Larger proxies raise the peak of gold."
    evidence = f"PPO's peaks at {', '.join(map(str, order))}: {shown}"
    return Claim(text, _all([_grown(row, clear(plan)) for row in rows]), evidence)


def _grown(row: Sequence[float], least: float) -> bool | None:
    if any(before - after > least for before, after in pairwise(row)):
        return False
    return _above_zero(row[-1] - row[0], least)


def best_of_n_takes_less_kl(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether, at the distance of the largest n, best of n has more gold than PPO, on average over the proxies towards
    which PPO went as far.
    """
    text, gains = "For equal KL best of n gains more gold than PPO.", []
    for target in _single(plan):
        best = curve_of(curves, target.name, "best of n").end
        other = curve_of(curves, target.name, "PPO").gold_at(best.distance)
        gains += [] if other is None else [best.gold - other]
    if not gains:
        return Claim(text, None, f"no run of PPO went as far as the best of {plan.num_best_of}")
    mean = estimate([gains])
    return Claim(
        text,
        _between(mean, 0, math.inf),
        f"gold of the best of {plan.num_best_of}, less PPO's as far away: {mean} on average over {len(gains)} proxies, "
        f"from {min(gains):+.2f} to {max(gains):+.2f}",
    )


def penalty_stops_early(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether runs with a penalty end on the path of the run without one, on average over the proxies: no clear
    difference lies in the interval. Runs that end farther than the one without are left out.
    """
    text = "A KL penalty is worth what stopping early is: gold for equal KL is the same."
    by_proxy: dict[str, list[float]] = {}  # whose runs share a path, so that they count as one
    for curve in curves:
        other = curve_of(curves, curve.target, "PPO").gold_at(curve.end.distance) if curve.kl_coef else None
        if other is not None:
            by_proxy.setdefault(curve.target, []).append(curve.end.gold - other)
    gains = [gain for found in by_proxy.values() for gain in found]
    if not gains:
        return Claim(text, None, "no run without a penalty went as far as those with one")
    mean = estimate([[fmean(found) for found in by_proxy.values()]])
    return Claim(
        text,
        _between(mean, -clear(plan), clear(plan)),
        f"gold at the end of {len(gains)} runs with a penalty, less that of the run without one as far away: "
        f"{mean} on average over {len(by_proxy)} proxies, from {min(gains):+.2f} to {max(gains):+.2f}",
    )


def ensembles_lose_less(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether PPO against each ensemble ends with clearly more gold than against its first member alone."""
    alone = curve_of(curves, Target(plan.members[:1]).name, "PPO")
    ensembles = [curve_of(curves, target.name, "PPO") for target in plan.targets if target.rule]
    shown = "; ".join(
        f"{each.target}: {each.peak.gold:+.2f}, {each.end.gold:+.2f} at d = {each.end.distance:.1f}"
        for each in [alone, *ensembles]
    )
    return Claim(
        "PPO ends with more gold against an ensemble than against one of its members.",
        _all([_above_zero(each.end.gold - alone.end.gold, clear(plan)) for each in ensembles]),
        f"gold at its peak and at the end: {shown}",
    )


def _above_zero(difference: float, least: float) -> bool | None:
    """Whether a difference is above 0; None where it is not clear."""
    return None if abs(difference) <= least else difference > 0


def _between(mean: Estimate, least: float, most: float) -> bool | None:
    """Whether a mean lies in a span; None where one part of its interval does, another does not, or it has none."""
    if mean.low is None or mean.high is None:
        return None
    if mean.low > most or mean.high < least:
        return False
    return True if least < mean.low and mean.high < most else None


def _all(outcomes: Sequence[bool | None]) -> bool | None:
    """Whether all are so: one that is not decides, then one that cannot be told."""
    return False if False in outcomes else None if None in outcomes else True


def document_of(results: Results, plan: Plan) -> Document:
    """The page of the study."""
    text = [
        "A policy that is tuned to a proxy of what is wanted gains by it at first, and then loses, while the proxy "
        "goes on rising (Gao et al., 2023, arXiv 2210.10760). Here the true reward is known. The proxies are reward "
        f"models of {len(plan.sizes)} sizes on {', '.join(f'{count:,}' for count in plan.label_counts)} noisy labels, "
        f"and the supervised policy is moved towards each by best-of-n (n up to {plan.num_best_of}) and by PPO "
        f"({plan.num_steps} rollouts, no KL penalty unless it is named).",
        "d is √KL to the supervised policy, KL in nats a response. Scores are in standard deviations of the supervised "
        "policy's own, above its mean: it stands at 0.",
        f"A difference of gold is clear above {clear(plan):.2f} ({clear(plan, 'best of n'):.2f} by best of n): two "
        "standard errors of a difference between two evaluations; that of a peak, the highest of many, above more. "
        "Intervals are 95 % bootstrap intervals over the proxies, which share their policy and labels. There is one "
        "seed a cell: noise from run to run may exceed that of the evaluations, and another seed might turn a "
        "finding.",
    ]
    return Document(
        "Reward model overoptimisation",
        text,
        [
            Section("Findings", tables=[table_of(results.claims)]),
            *(_method_section(results, plan, method) for method in METHODS),
            _penalty_section(results, plan),
            _ensemble_section(results, plan),
        ],
    )


def _method_section(results: Results, plan: Plan, method: Method) -> Section:
    """Gold with its fitted form, and the proxy, a pair of charts a size."""
    form = "d·(α − β·d)" if method == "best of n" else "d·(α − β·log d)"
    charts = []
    for size in plan.sizes:
        named = [(f"{count:,} labels", f"{size}-{count}") for count in plan.label_counts]
        gold = [_dots(name, curve_of(results.curves, target, method)) for name, target in named]
        fitted = [
            _line(name, found, results.curves) for name, target in named if (found := _fit_of(results, target, method))
        ]
        proxy = [_path(name, curve_of(results.curves, target, method), "proxy") for name, target in named]
        charts += [_chart(f"Gold, {size} proxies, {method}", [*gold, *fitted])]
        charts += [_chart(f"Proxy, {size} proxies, {method}", proxy)]
    rows = [
        _fit_row(curve, _fit_of(results, curve.target, method), results.label_accuracy)
        for curve in results.curves
        if curve.method == method and curve.kl_coef == 0
    ]
    columns = [
        "proxy",
        "label accuracy",
        "α",
        "β",
        "R²",
        "fitted peak, d",
        "peak of gold",
        "gold at the end",
        "proxy at the end",
    ]
    text = f"Dots are measured, lines the form {form}, by least squares, ± standard errors of its coefficients. "
    text += "Label accuracy is on the held-out labels by which the best checkpoint was chosen: a little too high."
    return Section(method[0].upper() + method[1:], [text], [Table(columns, rows)], charts)


def _fit_row(curve: Curve, fitted: Fit | None, label_accuracy: dict[str, float]) -> list[str]:
    accuracy = label_accuracy.get(curve.target)
    peak = fitted.peak_distance if fitted else None
    return [
        curve.target,
        "" if accuracy is None else f"{accuracy:.3f}",
        f"{fitted.alpha:.3f} ± {fitted.alpha_error:.3f}" if fitted else "none",
        f"{fitted.beta:.3f} ± {fitted.beta_error:.3f}" if fitted else "none",
        f"{fitted.r_squared:.2f}" if fitted else "none",
        "none" if peak is None else f"{peak:.3g}",
        f"{curve.peak.gold:+.2f} at d = {curve.peak.distance:.2f}",
        f"{curve.end.gold:+.2f} at d = {curve.end.distance:.2f}",
        f"{curve.end.proxy:+.2f}",
    ]


def _penalty_section(results: Results, plan: Plan) -> Section:
    """Where runs with a penalty end, beside the path of the one without."""
    charts, rows = [], []
    for size in plan.sizes:
        target = f"{size}-{plan.label_counts[-1]}"
        curves = [curve_of(results.curves, target, "PPO", kl_coef) for kl_coef in (0.0, *plan.kl_coefs)]
        charts.append(_chart(f"Gold, {target}", [_path(f"kl_coef {curve.kl_coef}", curve, "gold") for curve in curves]))
        for curve in curves:
            end = curve.end
            rows.append([target, f"{curve.kl_coef}", f"{end.distance**2:.1f}", f"{end.proxy:+.2f}", f"{end.gold:+.2f}"])
    table = Table(["proxy", "kl_coef", "KL at the end, nats", "proxy at the end", "gold at the end"], rows)
    return Section("KL penalty", ["PPO against the proxies of most labels."], [table], charts)


def _ensemble_section(results: Results, plan: Plan) -> Section:
    """Ensembles beside their first member."""
    targets = [Target(plan.members[:1]), *(target for target in plan.targets if target.rule)]
    charts = []
    for method in METHODS:
        curves = [(target.rule or "one proxy", curve_of(results.curves, target.name, method)) for target in targets]
        charts.append(_chart(f"Gold, ensembles, {method}", [_path(name, curve, "gold") for name, curve in curves]))
    text = (
        f"{plan.num_members} proxies that differ in the seed of their training alone, on one trunk and the same "
        "labels: their mean, the least, and mean − standard deviation (lower_bound)."
    )
    return Section("Ensembles", [text], charts=charts)


def _single(plan: Plan) -> list[Target]:
    return [target for target in plan.targets if not target.rule]


def _fit_of(results: Results, target: str, method: Method) -> Fit | None:
    return next((each for each in results.fits if (each.target, each.method) == (target, method)), None)


def _chart(title: str, series: Sequence[Series]) -> Chart:
    return Chart(title, tuple(series), x_label="d = √KL", y_label="standard deviations", height=300)


def _dots(name: str, curve: Curve) -> Series:
    distances, golds = [each.distance for each in curve.points], [each.gold for each in curve.points]
    return Series(name, distances, golds, style="dots", notes=_notes(curve))


def _path(name: str, curve: Curve, score: str) -> Series:
    distances, scores = [each.distance for each in curve.points], [getattr(each, score) for each in curve.points]
    return Series(name, distances, scores, style="path", notes=_notes(curve))


def _notes(curve: Curve) -> list[str]:
    return [f"at {'n =' if curve.method == 'best of n' else 'step'} {each.effort}" for each in curve.points]


def _line(name: str, fitted: Fit, curves: Sequence[Curve]) -> Series:
    farthest = max(each.distance for each in curve_of(curves, fitted.target, fitted.method).points)
    distances = [farthest * step / DRAWN for step in range(DRAWN + 1)]
    return Series(name, distances, [fitted.gold_at(distance) for distance in distances])
