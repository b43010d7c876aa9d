"""What the curves say: claims, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ppo_rlhf.document import Chart, Document, Section, Series, Table
from ppo_rlhf.study.claims import Claim
from ppo_rlhf.study.overoptimization.curves import Curve, Fit, Method, curve_of, fit
from ppo_rlhf.study.overoptimization.plan import Plan, Target

METHODS: tuple[Method, Method] = ("best of n", "PPO")
CLEAR = 0.2  # standard deviations of gold: a mean over 200 held-out prompts has a standard error of 0.07
DRAWN = 60  # points of a fitted line


@dataclass(frozen=True)
class Results:
    """The whole study."""

    curves: list[Curve]
    fits: list[Fit]  # of the curves without a penalty, in their order
    label_accuracy: dict[str, float]  # of each proxy, on held-out labels
    claims: list[Claim]


def results_of(curves: list[Curve], label_accuracy: dict[str, float], plan: Plan) -> Results:
    """The curves with their fits, and what they say of Gao et al.'s findings, and Coste et al.'s on ensembles."""
    fits = [fit(curve) for curve in curves if curve.kl_coef == 0]
    claims = [
        *(turns_over(curves, plan, method) for method in METHODS),
        grows_with(curves, plan, "labels"),
        grows_with(curves, plan, "size"),
        best_of_n_takes_less_kl(curves, plan),
        *([penalty_stops_early(curves, plan)] if plan.kl_coefs else []),
        ensembles_lose_less(curves, plan),
    ]
    return Results(curves, fits, label_accuracy, claims)


def turns_over(curves: Sequence[Curve], plan: Plan, method: Method) -> Claim:
    """Whether gold falls from its peak by a clear amount while the proxy goes on rising, against every proxy."""
    found = [curve_of(curves, target.name, method) for target in _single(plan)]
    turned = [each for each in found if each.peak.gold - each.end.gold > CLEAR and each.end.proxy > each.peak.proxy]
    spans = "; ".join(
        f"{each.target}: {each.peak.gold:+.2f} at d = {each.peak.distance:.1f}, "
        f"{each.end.gold:+.2f} at {each.end.distance:.1f}"
        for each in found
    )
    return Claim(
        f"By {method}, gold turns over while the proxy goes on rising.",
        len(turned) == len(found),
        f"against {len(turned)} of {len(found)} proxies. Peak and end of gold: {spans}",
    )


def grows_with(curves: Sequence[Curve], plan: Plan, what: str) -> Claim:
    """Whether PPO's peak of gold is higher with more labels at every size, or with larger proxies at every count."""

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
    return Claim(text, all(row == sorted(row) for row in rows), evidence)


def best_of_n_takes_less_kl(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether, at the distance of the largest n, best of n has more gold than PPO, on average over the proxies."""
    pairs = []
    for target in _single(plan):
        best = curve_of(curves, target.name, "best of n").end
        pairs.append((best.gold, curve_of(curves, target.name, "PPO").gold_at(best.distance)))
    best_mean, ppo_mean = (fmean(side) for side in zip(*pairs, strict=True))
    more = sum(one > other for one, other in pairs)
    return Claim(
        "For equal KL best of n gains more gold than PPO.",
        more == len(pairs),
        f"best of {plan.num_best_of} has {best_mean:+.2f} on average over the proxies, PPO as far away "
        f"{ppo_mean:+.2f}; best of n has more with {more} of {len(pairs)}",
    )


def penalty_stops_early(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether runs with a penalty end on the path of the run without one."""
    gains = []
    for curve in curves:
        if curve.kl_coef:
            gains.append(curve.end.gold - curve_of(curves, curve.target, "PPO").gold_at(curve.end.distance))
    return Claim(
        "A KL penalty is worth what stopping early is: gold for equal KL is the same.",
        max(map(abs, gains)) <= CLEAR,
        f"gold at the end of {len(gains)} runs with a penalty, less that of the run without one as far away: "
        f"{fmean(gains):+.2f} on average, from {min(gains):+.2f} to {max(gains):+.2f}",
    )


def ensembles_lose_less(curves: Sequence[Curve], plan: Plan) -> Claim:
    """Whether PPO against each ensemble ends with more gold than against its first member alone."""
    alone = curve_of(curves, Target(plan.members[:1]).name, "PPO")
    ensembles = [curve_of(curves, target.name, "PPO") for target in plan.targets if target.rule]
    shown = "; ".join(f"{each.target}: {each.peak.gold:+.2f}, {each.end.gold:+.2f}" for each in [alone, *ensembles])
    return Claim(
        "Ensembles put the loss of gold off: PPO ends with more gold than against one of their members.",
        all(each.end.gold - alone.end.gold > CLEAR for each in ensembles),
        f"gold at its peak and at the end: {shown}",
    )


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
    ]
    return Document(
        "Reward model overoptimisation",
        text,
        [
            Section("Findings", tables=[_claims_table(results.claims)]),
            *(_method_section(results, plan, method) for method in METHODS),
            _penalty_section(results, plan),
            _ensemble_section(results, plan),
        ],
    )


def _claims_table(claims: Sequence[Claim]) -> Table:
    rows = [[claim.text, "yes" if claim.holds else "no", claim.evidence] for claim in claims]
    return Table(["finding", "borne out", "numbers"], rows)


def _method_section(results: Results, plan: Plan, method: Method) -> Section:
    """Gold with its fitted form, and the proxy, a pair of charts a size."""
    form = "d·(α − β·d)" if method == "best of n" else "d·(α − β·log d)"
    charts = []
    for size in plan.sizes:
        named = [(f"{count:,} labels", f"{size}-{count}") for count in plan.label_counts]
        gold = [_dots(name, curve_of(results.curves, target, method)) for name, target in named]
        fitted = [_line(name, _fit_of(results, target, method), results.curves) for name, target in named]
        proxy = [_path(name, curve_of(results.curves, target, method), "proxy") for name, target in named]
        charts += [_chart(f"Gold, {size} proxies, {method}", [*gold, *fitted])]
        charts += [_chart(f"Proxy, {size} proxies, {method}", proxy)]
    rows = [
        _fit_row(fitted, curve_of(results.curves, fitted.target, method), results.label_accuracy)
        for fitted in results.fits
        if fitted.method == method
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
    text = f"Dots are measured, lines the form {form}, by least squares, ± standard errors of its coefficients."
    return Section(method[0].upper() + method[1:], [text], [Table(columns, rows)], charts)


def _fit_row(fitted: Fit, curve: Curve, label_accuracy: dict[str, float]) -> list[str]:
    accuracy = label_accuracy.get(fitted.target)
    return [
        fitted.target,
        "" if accuracy is None else f"{accuracy:.3f}",
        f"{fitted.alpha:.3f} ± {fitted.alpha_error:.3f}",
        f"{fitted.beta:.3f} ± {fitted.beta_error:.3f}",
        f"{fitted.r_squared:.2f}",
        "none" if fitted.peak_distance is None else f"{fitted.peak_distance:.2f}",
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


def _fit_of(results: Results, target: str, method: Method) -> Fit:
    (found,) = (each for each in results.fits if (each.target, each.method) == (target, method))
    return found


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
