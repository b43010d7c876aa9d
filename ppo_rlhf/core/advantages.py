"""From rewards and values to advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, ended: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, eq. 16), backwards over the decisions.

        δ_t = r_t + γ·V_{t+1}·[not terminated_t] − V_t
        A_t = δ_t + γλ·A_{t+1}·[not ended_t]            returns = A + V

    rewards, terminated, ended (B, T); values (B, T+1), the last column being V of the state after the last decision.
    → advantages, returns, each (B, T), before any whitening.

    `terminated` stops the bootstrap: there is no value beyond a true end. `ended` (terminated or truncated) stops the
    trace: what follows belongs to another episode. A truncated decision is `ended` only, and so bootstraps from
    V_{t+1}. The value beyond a true end is never read, so it may be NaN.
    """
    next_values = torch.where(terminated, 0, values[:, 1:])  # (B, T)
    deltas = rewards + gamma * next_values - values[:, :-1]
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * torch.where(ended[:, t], 0, following)
        advantages[:, t] = following
    return advantages, advantages + values[:, :-1]


def discounted_returns(rewards: Tensor, ended: Tensor, *, gamma: float) -> Tensor:
    """G_t = r_t + γ·G_{t+1}·[not ended_t], the Monte Carlo return. All (B, T)."""
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * torch.where(ended[:, t], 0, following)
        returns[:, t] = following
    return returns
