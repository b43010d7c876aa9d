"""A share with its interval, by Wilson's formula; apart from `ppo_rlhf.statistics`, whose scipy is slow to import."""

from __future__ import annotations

import math
from dataclasses import dataclass

CONFIDENCE_95 = 1.959963984540054  # standard normal quantile at 0.975


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float
    count: int  # of what it is a share


def wilson(successes: float, count: int) -> Share:
    """A share with Wilson's score interval (1927) at 95 %. successes may hold halves: a tie is half a win.

    centre ± half = (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    """
    share, z = successes / count, CONFIDENCE_95
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / scale
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Share(share, min(low, share), max(high, share), count)  # at 0 and 1 they differ by rounding
