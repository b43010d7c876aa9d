"""Statistics over the decisions that count. Masking is `torch.where`, never a product: 0 · NaN is NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumAcross = Callable[[Tensor], Tensor]  # sums a tensor over all processes
Moments = tuple[Tensor, Tensor, Tensor]  # mean, biased variance, and the count that they are of

EPSILON = 1e-8  # added to variances (OpenAI, lm-human-preferences)


def identity(x: Tensor) -> Tensor:
    """The `sum_across` of a single process."""
    return x


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x over the mask, as a scalar. x and mask have the same shape."""
    return torch.where(mask, x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Σ x over the mask ÷ count, as a scalar; 0 where nothing counts.

    count: decisions in the *whole optimizer step* across micro-batches and processes, by default those of this mask.
    A mean of micro-batch means is not the mean: with four tokens here and one there, the lone token weighs four times.
    """
    total = mask.sum() if count is None else torch.as_tensor(count, device=x.device)
    return masked_sum(x, mask) / torch.where(total > 0, total, 1)


def masked_moments(x: Tensor, mask: Tensor, *, sum_across: SumAcross = identity) -> Moments:
    """(mean, biased variance, count) over the mask and all processes.

    Two reductions, first the mean, then the squared deviations from it: E[x²] − E[x]² loses all digits when the mean is
    large. Without a single decision mean and variance are 0.
    """
    x = torch.where(mask, x, 0)  # before the square, whose gradient at NaN is NaN even where nothing asks for it
    total, count = sum_across(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    variance = sum_across(masked_sum((x - mean) ** 2, mask)) / count.clamp(min=1)
    return mean, variance, count


def merged_moments(one: Moments, other: Moments) -> Moments:
    """(mean, variance, count) of two batches together, from those of each, exactly (Chan et al., 1979).

    One without a single number adds nothing.
    """
    (mean, variance, before), (other_mean, other_variance, more) = one, other
    count = before + more
    share = torch.where(count > 0, more / count.clamp(min=1), 0)
    delta = other_mean - mean
    variance = variance * (1 - share) + other_variance * share + delta**2 * share * (1 - share)
    return mean + delta * share, variance, count


def whiten(x: Tensor, mask: Tensor, *, sum_across: SumAcross = identity) -> Tensor:
    """(x − mean) / √(variance + 1e-8) over the mask: zero mean, unit (biased) variance. Masked slots come back 0.

    A single decision gives 0.
    """
    mean, variance, _ = masked_moments(x, mask, sum_across=sum_across)
    deviations = torch.where(mask, x - mean, 0)
    return deviations * torch.rsqrt(variance + EPSILON)


def unit_variance(x: Tensor, mask: Tensor, *, sum_across: SumAcross = identity) -> Tensor:
    """(x − mean) / √(variance + 1e-8) + mean: unit variance, the mean kept. Masked slots come back 0.

    The reward whitening of lm-human-preferences: rewards keep their sign on average, only their spread is fixed.
    """
    mean, variance, _ = masked_moments(x, mask, sum_across=sum_across)
    deviations = torch.where(mask, x - mean, 0)
    return torch.where(mask, deviations * torch.rsqrt(variance + EPSILON) + mean, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, sum_across: SumAcross = identity) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over the mask: 1 is perfect, 0 no better than a constant.

    0 where the returns do not vary.
    """
    _, residual, _ = masked_moments(returns - values, mask, sum_across=sum_across)
    mean, variance, _ = masked_moments(returns, mask, sum_across=sum_across)
    varied = variance > (4 * torch.finfo(variance.dtype).eps * mean) ** 2  # beyond the rounding of the mean
    return torch.where(varied, 1 - residual / torch.where(varied, variance, 1), 0)
