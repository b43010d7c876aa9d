"""The Kullback–Leibler divergence: estimated, exact, as a reward, and the two rules that adapt its coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def approx_kl(logprobs_p: Tensor, logprobs_q: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """KL(p‖q) per decision, from decisions sampled from p (Schulman, 2020, "Approximating KL divergence").

        k1 = log p − log q               unbiased, of either sign: what the reward pays
        k2 = ½ (log p − log q)²          biased as a value; as a loss in p its gradient is KL(p‖q)'s
        k3 = q/p − 1 − log(q/p)          unbiased, never negative, low variance: for watching

    Both inputs and the result have the same shape. Raises ValueError for another estimator.
    """
    log_ratio = logprobs_p - logprobs_q
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; use 'k1', 'k2' or 'k3'.")


def exact_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ_a p(a)·(log p(a) − log q(a)) of two categorical distributions. (…, A), (…, A) → (…).

    Choices impossible under p (logit −∞) add nothing.
    """
    logprobs_p, logprobs_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    possible = logprobs_p > -torch.inf
    difference = torch.where(possible, logprobs_p, 0) - torch.where(possible, logprobs_q, 0)
    return (logprobs_p.exp() * difference).sum(-1)


def kl_shaped_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """Per-token rewards of the KL-regularised objective (Ziegler et al., 2019, eq. 2).

        r_t = −β · KL_t  +  d_t  +  [t is the last token] · (score − Σ d)

    scores (B,), kl (B, T) per-token estimate (k1: unbiased in the reward, where no gradient flows through it), mask
    (B, T), dense d (B, T), by default 0 → (B, T), zero where the mask is False.

    The score is paid at the last True of each row, always: also where a response was cut off by the length limit. What
    a dense reward paid before is taken off there, so that a response earns its score, whatever was made of it since. A
    row without a decision is paid nothing.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).max(dim=1, keepdim=True).values  # (B, 1), −1 for an empty row
    rewards = torch.where(mask, -kl_coef * kl, 0)
    if dense is not None:
        dense = torch.where(mask, dense, 0)
        rewards, scores = rewards + dense, scores - dense.sum(1)
    return rewards + torch.where(positions == last, scores[:, None], 0)


def adapt_kl_coef_ppo_penalty(kl_coef: float, kl: float, *, target: float, minimum: float, maximum: float) -> float:
    """The next update's β of PPO-Penalty (Schulman et al., 2017, section 4).

        d < target / 1.5 → β / 2        d > 1.5 · target → 2β        bounded to [minimum, maximum]

    kl: d = KL(old‖new) in nats per decision, averaged over decisions and processes.
    """
    if kl < target / 1.5:
        kl_coef = kl_coef / 2
    elif kl > target * 1.5:
        kl_coef = kl_coef * 2
    return min(max(kl_coef, minimum), maximum)


def adapt_kl_coef_proportional(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """The next step's β of RLHF, a proportional controller (Ziegler et al., 2019, section 2.2).

        e = clip(KL / target − 1, −0.2, 0.2)        β ← β · (1 + e · num_episodes / horizon)

    kl, target: KL to the reference in nats per *sequence*, averaged over the global batch. num_episodes: responses in
    that batch, over all processes; horizon: in episodes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
