"""Gold against proxy over d = √KL, and the curves that Gao et al. (2023, arXiv 2210.10760) fit to them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import xlogy
from torch import Tensor

from ppo_rlhf.measures import best_of_n, best_of_n_kl
from ppo_rlhf.records import record_of

Method = Literal["best of n", "PPO"]
LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Point:
    """A policy that was optimised so far. Scores are in standard deviations of the supervised policy's own, above its
    mean, so that it stands at 0, 0, 0 itself.
    """

    effort: int  # n, or the step of PPO
    distance: float  # √KL to the supervised policy, KL in nats a response
    proxy: float
    gold: float


@dataclass(frozen=True)
class Curve:
    """A policy on its way from the supervised one."""

    target: str
    method: Method
    kl_coef: float
    points: tuple[Point, ...]

    @property
    def peak(self) -> Point:
        """Where gold is highest."""
        return max(self.points, key=lambda point: point.gold)

    @property
    def end(self) -> Point:
        """As far as it was optimised."""
        return self.points[-1]

    def gold_at(self, distance: float) -> float | None:
        """Gold at a distance, on straight lines between the points; None beyond the farthest."""
        if distance > max(each.distance for each in self.points):
            return None
        points = sorted(self.points, key=lambda point: point.distance)
        return float(np.interp(distance, [each.distance for each in points], [each.gold for each in points]))


@dataclass(frozen=True)
class Fit:
    """Gold by its form, least squares; the errors take the points for independent, which those of one run are not."""

    target: str
    method: Method
    alpha: float
    alpha_error: float
    beta: float
    beta_error: float
    r_squared: float

    def gold_at(self, distance: float) -> float:
        """The form with these coefficients."""
        return float(FORMS[self.method](np.array(distance), self.alpha, self.beta))

    @property
    def peak_distance(self) -> float | None:
        """Where the form is highest: α/2β, or exp(α/β − 1); None where it has no maximum at a distance above 0, or one
        that is farther than a number can be.
        """
        if self.beta <= 0:
            return None
        if self.method == "best of n":
            return self.alpha / (2 * self.beta) if self.alpha > 0 else None
        exponent = self.alpha / self.beta - 1
        return math.exp(exponent) if exponent < LARGEST_EXPONENT else None


def best_of_n_form(distance: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """d·(α − β·d)."""
    return distance * (alpha - beta * distance)


def ppo_form(distance: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """d·(α − β·log d), 0 at 0."""
    return alpha * distance - beta * xlogy(distance, distance)


FORMS: dict[Method, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "best of n": best_of_n_form,
    "PPO": ppo_form,
}


def fit(curve: Curve) -> Fit | None:
    """The form of the curve's method, fitted to its gold scores; None for fewer than three points away from the start,
    which two coefficients and their errors need.
    """
    points = [point for point in curve.points if point.distance > 0]
    if len(points) < 3:
        return None
    distances = np.array([point.distance for point in points])
    golds = np.array([point.gold for point in points])
    form = FORMS[curve.method]
    (alpha, beta), covariance = curve_fit(form, distances, golds)
    alpha_error, beta_error = np.sqrt(np.diag(covariance))
    residual = golds - form(distances, alpha, beta)
    r_squared = 1 - (residual**2).sum() / ((golds - golds.mean()) ** 2).sum()
    return Fit(
        curve.target,
        curve.method,
        alpha=float(alpha),
        alpha_error=float(alpha_error),
        beta=float(beta),
        beta_error=float(beta_error),
        r_squared=float(r_squared),
    )


def best_of_n_curve(target: str, scores: Tensor, gold: Tensor) -> Curve:
    """n = 1, 2, 4, … of N responses to each of P prompts, by the unbiased estimator. scores, gold (P, N)."""
    counts = [2**power for power in range(scores.shape[1].bit_length())]

    def means(values: Tensor) -> list[float]:
        normalised = (values - values.mean()) / values.std(correction=0)
        return [float(best_of_n(scores, normalised, n).mean()) for n in counts]

    points = zip(counts, means(scores), means(gold), strict=True)
    return Curve(
        target,
        "best of n",
        0.0,
        tuple(Point(n, math.sqrt(best_of_n_kl(n)), proxy, value) for n, proxy, value in points),
    )


def ppo_curve(target: str, kl_coef: float, folder: Path) -> Curve:
    """A run's evaluations on held-out prompts, the first of which is the supervised policy's."""
    rows = [row for row in record_of(folder).rows if "eval/kl" in row]

    def normalised(name: str) -> list[float]:
        mean, std = rows[0][f"eval/{name}"], rows[0][f"eval/{name}_std"]
        return [(row[f"eval/{name}"] - mean) / std for row in rows]

    # The estimate of a KL that is nearly 0 may be below it.
    distances = [math.sqrt(max(0.0, row["eval/kl"])) for row in rows]
    points = zip([row["step"] for row in rows], distances, normalised("score"), normalised("gold_score"), strict=True)
    return Curve(target, "PPO", kl_coef, tuple(Point(*each) for each in points))


def curve_of(curves: Sequence[Curve], target: str, method: Method, kl_coef: float = 0.0) -> Curve:
    """The one of these."""
    wanted = (target, method, kl_coef)
    (found,) = (curve for curve in curves if (curve.target, curve.method, curve.kl_coef) == wanted)
    return found
