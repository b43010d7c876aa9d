"""The losses of PPO and of reward modelling: scalars, Σ over the mask ÷ `count`.

`count` is the number of decisions in the whole optimizer step, across micro-batches and processes, so that splitting a
batch changes memory and speed and nothing else. Without it, it is the number of True in the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_rlhf.core.kl import approx_kl
from ppo_rlhf.core.masked import masked_mean
from ppo_rlhf.core.types import Evaluation, Experience

Count = Tensor | float | None

MAX_LOG_RATIO = 80.0  # e^80 is finite in float32; beyond e^88 a clipped loss would have the gradient 0 · inf = NaN


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
    dual_clip: float | None = None,
    count: Count = None,
) -> Tensor:
    """L = mean of max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)), ρ = π/π_old (Schulman et al., 2017, eq. 7). All (B, T) → scalar.

    clip_range: ε, 0.2 in the paper; None leaves the ratio unclipped (eq. 6). dual_clip: c > 1 bounds the loss of a
    decision with negative advantage to −c·A (Ye et al., 2020, eq. 5; c = 3 there), however large its ratio.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages, 0)
    loss = -advantages * ratio
    if clip_range is not None:
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return masked_mean(loss, mask, count=count)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = None,
    count: Count = None,
) -> Tensor:
    """½·(V − R)², or with a clip range ½·max((V − R)², (V_clipped − R)²), V_clipped = V_old + clip(V − V_old, ±range).

    All (B, T) → scalar. The ½ and the maximum are those of OpenAI's baselines and lm-human-preferences (range 0.2).
    """
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * masked_mean(loss, mask, count=count)


def ppo_loss(
    evaluation: Evaluation,
    experience: Experience,
    *,
    clip_range: float | None = 0.2,
    dual_clip: float | None = None,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_penalty_coef: float = 0.0,
    kl_divergence: Callable[[Any, Any], Tensor] | None = None,
    count: Count = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that one PPO step descends (Schulman et al., 2017, eq. 9, with eq. 8's penalty) and its statistics.

        L = L_policy + value_coef · L_value − entropy_coef · H + kl_penalty_coef · KL(old‖new)

    evaluation: of the present policy; experience: of the old one. The KL penalty joins the clipped objective, or takes
    its place with clip_range=None. kl_divergence: (old, new distribution parameters) → (B, T) exact KL; without it the
    k3 estimate, whose value and gradient are both unbiased here because the decisions were sampled from *old*.

    → (scalar loss, statistics by metric name, detached, divided by `count` like the loss so that they add up over
    micro-batches). `policy/approx_kl` is the k3 estimate of KL(old‖new), in nats per decision.
    """
    mask = experience.mask
    policy = clipped_policy_loss(
        evaluation.logprobs,
        experience.logprobs,
        experience.advantages,
        mask,
        clip_range=clip_range,
        dual_clip=dual_clip,
        count=count,
    )
    value = value_loss(
        evaluation.values, experience.values, experience.returns, mask, clip_range=value_clip_range, count=count
    )
    entropy = masked_mean(evaluation.entropy, mask, count=count)
    loss = policy + value_coef * value
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    if kl_penalty_coef:
        loss = loss + kl_penalty_coef * kl_old_new(evaluation, experience, kl_divergence=kl_divergence, count=count)

    with torch.no_grad():
        ratio = torch.where(mask, evaluation.logprobs - experience.logprobs, 0).exp()
        clipped = torch.zeros_like(ratio) if clip_range is None else ((ratio - 1).abs() > clip_range).to(ratio.dtype)
        statistics = {
            "loss/policy": policy.detach(),
            "loss/value": value.detach(),
            "objective/entropy": entropy.detach(),
            "policy/approx_kl": kl_old_new(evaluation, experience, count=count),
            "policy/clip_fraction": masked_mean(clipped, mask, count=count),
            "policy/ratio": masked_mean(ratio, mask, count=count),
        }
    return loss, statistics


def kl_old_new(
    evaluation: Evaluation,
    experience: Experience,
    *,
    kl_divergence: Callable[[Any, Any], Tensor] | None = None,
    count: Count = None,
) -> Tensor:
    """KL(old‖new), averaged over the decisions: exact where `kl_divergence` is given, else the k3 estimate."""
    mask = experience.mask
    if kl_divergence is not None:
        old = _where_decided(mask, experience.distribution, evaluation.distribution)
        return masked_mean(kl_divergence(old, evaluation.distribution), mask, count=count)
    old, new = (torch.where(mask, x, 0) for x in (experience.logprobs, evaluation.logprobs))
    return masked_mean(approx_kl(old, new, "k3"), mask, count=count)


def _where_decided(mask: Tensor, old: Any, new: Any) -> Any:
    """The old parameters where a decision was made, else the new ones, of which any divergence is 0 and flat."""
    if isinstance(old, tuple):
        return tuple(_where_decided(mask, *pair) for pair in zip(old, new, strict=True))
    return torch.where(mask.reshape(*mask.shape, *[1] * (old.ndim - mask.ndim)), old, new.detach())


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    count: Count = None,
) -> Tensor:
    """Mean of −log σ(chosen − rejected − margin) (Bradley and Terry, 1952). All (N,) → scalar.

    margin: how much better the chosen one was found (Touvron et al., 2023, section 3.2.2). weight: of each pair, such
    as 1/C(K, 2) for the pairs of one ranking of K (Ouyang et al., 2022, eq. 1). count: pairs (or rankings) in the whole
    optimizer step, by default the number of pairs here.
    """
    wide = torch.promote_types(chosen.dtype, torch.float32)
    difference = chosen.to(wide) - rejected.to(wide)
    if margin is not None:
        difference = difference - margin
    loss = -F.logsigmoid(difference)
    if weight is not None:
        loss = loss * weight
    total = torch.as_tensor(len(loss) if count is None else count, device=loss.device)
    return loss.sum() / torch.where(total > 0, total, 1)
