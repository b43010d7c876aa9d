"""How a noisy series of a run moved."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from statistics import fmean, variance


@dataclass(frozen=True)
class Change:
    """How a noisy series moved: the means of its first, best and last quarter."""

    first: float
    highest: float
    last: float
    margin: float  # three standard errors of a difference between two quarters

    @property
    def rose(self) -> bool:
        """Whether the last quarter lies above the first beyond the noise."""
        return self.last - self.first > self.margin

    @property
    def fell(self) -> bool:
        """Whether the last quarter lies below the best one beyond the noise."""
        return self.highest - self.last > self.margin


FEWEST = 12  # values of which a quarter says something: three


def change_of(values: list[float]) -> Change | None:
    """How the series moved; None for one too short to say."""
    if len(values) < FEWEST:
        return None
    bounds = [round(len(values) * part / 4) for part in range(5)]
    quarters = [values[start:end] for start, end in itertools.pairwise(bounds)]
    means = [fmean(quarter) for quarter in quarters]
    errors = [variance(quarter) / len(quarter) for quarter in quarters]
    return Change(means[0], max(means), means[-1], 3 * math.sqrt(errors[0] + errors[-1]))


def latest(values: list[float]) -> list[float]:
    """The last quarter of a series, at least three of its values."""
    return values[-max(3, len(values) // 4) :]
