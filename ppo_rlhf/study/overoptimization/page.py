"""What the curves say: claims, tables and charts."""

from __future__ import annotations

from dataclasses import dataclass

from ppo_rlhf.document import Document
from ppo_rlhf.study.claims import Claim
from ppo_rlhf.study.overoptimization.curves import Curve, Fit, fit
from ppo_rlhf.study.overoptimization.plan import Plan


@dataclass(frozen=True)
class Results:
    """The whole study."""

    curves: list[Curve]
    fits: list[Fit]
    label_accuracy: dict[str, float]  # of each proxy, on held-out labels
    claims: list[Claim]


def results_of(curves: list[Curve], accuracies: dict[str, float], plan: Plan) -> Results:
    fits = [fit(curve) for curve in curves if curve.kl_coef == 0]
    return Results(curves, fits, accuracies, [])


def document_of(results: Results, plan: Plan) -> Document:
    return Document("Overoptimisation", [], [])
