"""Numbers with their 95 % intervals. Prompts are drawn independently, the responses to one of them are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from ppo_rlhf.intervals import CONFIDENCE_95, wilson
from ppo_rlhf.measures import distinct_n
from ppo_rlhf.seeding import keyed_seed

RESAMPLES = 2000  # of a percentile interval (Efron and Tibshirani, 1993, section 13.3: at least 1000)
RESAMPLES_AT_ONCE = 100  # for memory alone


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_estimate(values: Tensor, seed: int) -> Estimate:
    """The mean over prompts and responses, its interval by resampling prompts, each with all its responses.

    values (P, samples), P ≥ 2. As every prompt has as many responses, that is to resample the prompts' means.
    """
    return _bootstrapped((values.double().mean(1).numpy(),), lambda each, axis: each.mean(axis), seed)


def perplexity_estimate(losses: Tensor, seed: int) -> Estimate:
    """exp(Σ losses ÷ Σ tokens), its interval by resampling texts. losses (M, 2): each text's loss, and its tokens."""

    def perplexity(loss: np.ndarray, tokens: np.ndarray, axis: int) -> np.ndarray:
        return np.exp(loss.sum(axis) / tokens.sum(axis))

    return _bootstrapped(tuple(losses.double().cpu().T.numpy()), perplexity, seed)


def _bootstrapped(data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> Estimate:
    """A statistic of things that are resampled together, with the percentile interval (Efron, 1979)."""
    found = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        vectorized=True,
        paired=True,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(keyed_seed(seed, "bootstrap")),
    ).confidence_interval
    return Estimate(float(statistic(*data, axis=-1)), float(found.low), float(found.high))


def share_estimate(values: Sequence[float]) -> Estimate:
    """The mean of numbers in [0, 1], one a prompt, with Wilson's interval, which keeps its width where all are 1."""
    found = wilson(math.fsum(values), len(values))
    return Estimate(found.share, found.low, found.high)


def distinct_estimate(texts: Sequence[str], n: int) -> Estimate:
    """Distinct-n of texts, one a prompt: value ± 1.96·√((P − 1)/P · Σ_i (d_i − d̄)²), d_i without text i.

    The jackknife: to draw a text twice, as the bootstrap does, would repeat its words and lower the number.
    """
    value, total = distinct_n(texts, n), len(texts)
    without = torch.tensor(
        [distinct_n([*texts[:row], *texts[row + 1 :]], n) for row in range(total)], dtype=torch.float64
    )
    half = CONFIDENCE_95 * math.sqrt((total - 1) * float(without.var(correction=0)))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
