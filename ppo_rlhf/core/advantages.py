"""From rewards and values to advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_rlhf.core.masked import EPSILON


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


def leave_one_out(returns: Tensor, *, group_size: int) -> Tensor:
    """A_i = R_i − mean of the other returns in i's group (RLOO: Kool et al., 2019; Ahmadian et al., 2024, eq. 5).

    returns (B,), of responses to one prompt each group_size in a row → (B,). The baseline does not depend on response
    i, so the policy gradient stays unbiased, and no value function is needed. Raises ValueError for groups of one.
    """
    groups = _grouped(returns, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_normalized(returns: Tensor, *, group_size: int) -> Tensor:
    """A_i = (R_i − mean) / √(variance + 1e-8) of i's group (GRPO: Shao et al., 2024, section 4.1.2), variance biased.

    returns (B,), of responses to one prompt each group_size in a row → (B,); 0 where a group's returns are all equal.
    Raises ValueError for groups of one.
    """
    groups = _grouped(returns, group_size)
    deviations = groups - groups.mean(1, keepdim=True)
    variance = deviations.square().mean(1, keepdim=True)
    return (deviations * torch.rsqrt(variance + EPSILON)).flatten()


def _grouped(returns: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(returns) % group_size:
        raise ValueError(f"{len(returns)} returns do not fall into groups of {group_size}, of two at least.")
    return returns.reshape(-1, group_size)
