"""Running normalisation of observations and rewards, whose statistics are saved with the policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppo_rlhf.core import masked_moments, merged_moments
from ppo_rlhf.core.masked import SumAcross, identity

LIMIT = 10.0  # normalised values are clipped to ± this (baselines, Stable-Baselines3)
EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance over all batches seen, merged exactly (Chan et al., 1979). Only `update` changes them."""

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))

    @torch.no_grad()
    def merge(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Adds a batch by its moments; one without a single number changes nothing."""
        mean, variance, count = merged_moments((self.mean, self.variance, self.count), (mean, variance, count))
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.count.copy_(count)


class ObservationNormalizer(nn.Module):
    """(x − mean) / √(variance + 1e-8), clipped to ±10, over the observations in which decisions were made.

    One with a number that is not finite is left out.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.moments = RunningMoments(size)
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) normalised by the statistics as they stand."""
        return ((x - self.shift) * self.scale).clamp(-LIMIT, LIMIT)

    def update(self, x: Tensor, mask: Tensor, *, sum_across: SumAcross = identity) -> None:
        """Merges x (N, T, D) where mask (N, T) is True."""
        rows = x.reshape(-1, x.shape[-1]).double()
        keep = (mask.reshape(-1) & rows.isfinite().all(1))[:, None].expand_as(rows)
        columns = [masked_moments(rows[:, i], keep[:, i], sum_across=sum_across) for i in range(rows.shape[1])]
        mean, variance, count = (torch.stack(parts) for parts in zip(*columns, strict=True))
        self.moments.merge(mean, variance, count[0])
        self.shift.copy_(self.moments.mean)
        self.scale.copy_((self.moments.variance + EPSILON).rsqrt())


class RewardNormalizer(nn.Module):
    """r / √(variance of the running discounted return + 1e-8), clipped to ±10 (Huang et al., 2022, detail 9).

    The running return R_t = γ·R_{t−1}·[not ended_{t−1}] + r_t starts anew after every end (Stable-Baselines3's way). A
    reward that is not finite adds nothing to it, and the return at it is left out.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = RunningMoments()

    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards of any shape, scaled; their mean is kept, since a shift would change the task."""
        scale = (self.moments.variance + EPSILON).rsqrt().to(rewards.dtype)
        return (rewards * scale).clamp(-LIMIT, LIMIT)

    def update(
        self, rewards: Tensor, ended: Tensor, mask: Tensor, running: Tensor, *, sum_across: SumAcross = identity
    ) -> Tensor:
        """Merges the running returns of rewards (N, T); running (N,): those before. → those after, 0 where ended."""
        mask = mask & rewards.isfinite()
        rewards = torch.where(mask, rewards, 0)  # NaN, or whatever a reset was paid, must not live on in a sum
        returns = torch.empty_like(rewards)
        for t in range(rewards.shape[1]):
            running = returns[:, t] = self.gamma * running + rewards[:, t]
            running = torch.where(ended[:, t], 0, running)
        self.moments.merge(*masked_moments(returns.double(), mask, sum_across=sum_across))
        return running
