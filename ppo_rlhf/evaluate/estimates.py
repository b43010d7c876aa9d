"""Numbers with their 95 % intervals. Prompts are drawn independently, the responses to one of them are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ppo_rlhf.intervals import CONFIDENCE_95, wilson
from ppo_rlhf.measures import distinct_n, num_reached
from ppo_rlhf.seeding import keyed_seed
from ppo_rlhf.statistics import Estimate, bootstrapped

RESAMPLES = 2000  # of a percentile interval (Efron and Tibshirani, 1993, section 13.3: at least 1000)
RESAMPLES_AT_ONCE = 100  # for memory alone


def mean_estimate(values: Tensor, seed: int) -> Estimate:
    """The mean over prompts and responses, its interval by resampling prompts, each with all its responses.

    values (P, samples), P ≥ 2. As every prompt has as many responses, that is to resample the prompts' means.
    """
    return _bootstrapped((values.double().mean(1).numpy(),), lambda each: each.mean(-1), seed)


def perplexity_estimate(losses: Tensor, seed: int) -> Estimate:
    """exp(Σ losses ÷ Σ tokens), its interval by resampling texts. losses (M, 2): each text's loss, and its tokens."""

    def perplexity(loss: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.exp(loss.sum(-1) / tokens.sum(-1))

    return _bootstrapped(tuple(losses.double().cpu().T.numpy()), perplexity, seed)


def _bootstrapped(data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> Estimate:
    """A statistic of things that are resampled together."""
    seed = keyed_seed(seed, "bootstrap")
    return bootstrapped(data, statistic, paired=True, resamples=RESAMPLES, batch=RESAMPLES_AT_ONCE, seed=seed)


def share_estimate(values: Sequence[float]) -> Estimate:
    """The mean of numbers in [0, 1], one a prompt, with Wilson's interval, which keeps its width where all are 1."""
    found = wilson(math.fsum(values), len(values))
    return Estimate(found.share, found.low, found.high)


def distinct_estimate(texts: Sequence[str], n: int) -> Estimate:
    """Distinct-n of texts, one a prompt: value ± 1.96·√((m − 1)/m · Σ_i (d_i − d̄)²), d_i without text i of m.

    The jackknife: to draw a text twice, as the bootstrap does, would repeat its words and lower the number. The m texts
    are those that `distinct_n` reaches: whichever of them is left out, the same next one takes its place.
    """
    value, reached = distinct_n(texts, n), num_reached(texts, n)
    without = torch.tensor(
        [distinct_n([*texts[:row], *texts[row + 1 :]], n) for row in range(reached)], dtype=torch.float64
    )
    half = CONFIDENCE_95 * math.sqrt((reached - 1) * float(without.var(correction=0)))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
