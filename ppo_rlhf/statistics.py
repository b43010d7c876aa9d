"""Numbers and how sure they are: bootstrap intervals, stratified over several runs (Agarwal et al., 2021); t intervals.

Free of torch. A stratum holds the scores of one environment or task, a number a seed. Seeds are drawn again within each
stratum, so that every resample has as many runs of each as there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9_999  # scipy's
CONFIDENCE = 0.95

Scores = Sequence[float] | np.ndarray
Statistic = Callable[..., np.ndarray]  # (x, axis=-1): np.mean, np.median, interquartile_mean


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval."""

    value: float
    low: float | None  # None where a stratum has one seed alone
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"

    def interval(self, digits: int = 2) -> str:
        """As a table shows it; a dash where there is none."""
        return "–" if self.low is None else f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def interquartile_mean(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half: of n numbers ⌊n/4⌋ are left out at either end."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values (N, …), N seeds → their mean and half the width of its 95 % t interval, mean ± t · s / √N.

    With one seed there is no interval: NaN.
    """
    count = len(values)
    if count < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return values.mean(0), quantile * values.std(0, ddof=1) / math.sqrt(count)


def estimate(strata: Sequence[Scores], statistic: Statistic = np.mean) -> Estimate:
    """The statistic of all scores of all strata together, with its percentile interval."""
    return bootstrapped(strata, lambda *samples: statistic(_pooled(samples), axis=-1))


def difference(strata: Sequence[Scores], baseline: Sequence[Scores], statistic: Statistic = np.mean) -> Estimate:
    """statistic(strata) − statistic(baseline), with its percentile interval; both are drawn again."""
    count = len(strata)

    def of_both(*samples: np.ndarray) -> np.ndarray:
        return statistic(_pooled(samples[:count]), axis=-1) - statistic(_pooled(samples[count:]), axis=-1)

    return bootstrapped([*strata, *baseline], of_both)


def bootstrapped(
    strata: Sequence[Scores],
    statistic: Callable[..., np.ndarray],
    *,
    paired: bool = False,
    resamples: int = RESAMPLES,
    batch: int | None = None,
    seed: int = 0,
) -> Estimate:
    """A statistic of samples (…, N_i), taken over their last axis, with the percentile interval (Efron, 1979).

    paired: the samples are drawn again together, number by number. batch: resamples at once, for memory; None: all.
    """
    samples = [np.asarray(stratum, dtype=float) for stratum in strata]
    value = float(statistic(*samples))
    if any(len(sample) < 2 for sample in samples):
        return Estimate(value, None, None)
    interval = stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(*drawn),  # samples (…, N) are told apart by the last axis alone
        n_resamples=resamples,
        batch=batch,
        paired=paired,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def _pooled(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Samples (…, N_i) → (…, Σ N_i)."""
    return np.concatenate(samples, axis=-1)
