"""The losses of PPO and of reward modelling: scalars, Σ over the mask ÷ `count`.

`count` is the number of decisions in the whole optimizer step, across micro-batches and processes, so that splitting a
batch changes memory and speed and nothing else. Without it, it is the number of True in the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_rlhf.core.kl import approx_kl
from ppo_rlhf.core.masked import masked_mean
from ppo_rlhf.core.types import Evaluation, Experience

Count = Tensor | float | None

STATISTICS = (
    "loss/policy",
    "loss/value",
    "objective/entropy",
    "policy/approx_kl",  # k3 of KL(old‖new)
    "policy/clip_fraction",
    "policy/ratio",
)
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
    ratio = _ratio(torch.where(mask, logprobs - old_logprobs, 0))
    loss = _policy_terms(ratio, torch.where(mask, advantages, 0), clip_range, dual_clip)
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
    error = torch.where(mask, values - returns, 0)
    return masked_mean(_value_terms(error, values, old_values, returns, mask, clip_range), mask, count=count)


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
    reference_kl_coef: float = 0.0,
    reference_kl_estimator: Literal["k2", "k3"] = "k2",
    count: Count = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that one PPO step descends (Schulman et al., 2017, eq. 9, with eq. 8's penalty) and its statistics.

        L = L_policy + value_coef · L_value − entropy_coef · H + kl_penalty_coef · KL(old‖new)
            + reference_kl_coef · KL(new‖reference)

    evaluation: of the present policy; experience: of the old one. The KL penalty joins the clipped objective, or takes
    its place with clip_range=None. kl_divergence: (old, new distribution parameters) → (B, T) exact KL; without it the
    k3 estimate, whose value and gradient are both unbiased here because the decisions were sampled from *old*. The KL
    to the reference is `reference_kl_loss`, and `loss/reference_kl` among the statistics where it takes part.

    → (scalar loss, statistics by metric name, detached, divided by `count` like the loss so that they add up over
    micro-batches). `policy/approx_kl` is the k3 estimate of KL(old‖new), in nats per decision.
    """
    mask = experience.mask
    total = mask.sum() if count is None else torch.as_tensor(count, device=mask.device)
    share = mask.to(evaluation.logprobs.dtype) / torch.where(total > 0, total, 1)  # of each decision in the mean
    loss, means = _LossWithGradient.apply(
        *evaluation[:3],
        *(experience.logprobs, experience.values, experience.advantages, experience.returns, mask, share),
        *(clip_range, dual_clip, value_clip_range, value_coef, entropy_coef),
    )
    if torch.is_tensor(kl_penalty_coef) or kl_penalty_coef:
        loss = loss + kl_penalty_coef * kl_old_new(evaluation, experience, kl_divergence=kl_divergence, count=count)
    statistics = dict(zip(STATISTICS, means.unbind(), strict=True))
    if torch.is_tensor(reference_kl_coef) or reference_kl_coef:
        assert experience.ref_logprobs is not None
        kl = reference_kl_loss(
            *(evaluation.logprobs, experience.logprobs, experience.ref_logprobs, mask),
            estimator=reference_kl_estimator,
            count=count,
        )
        loss = loss + reference_kl_coef * kl
        statistics["loss/reference_kl"] = kl.detach()
    return loss, statistics


class _LossWithGradient(torch.autograd.Function):
    """The loss without a KL penalty, its gradient and the statistics in one pass, from the terms of each decision.

    Where it is not clipped, a decision's loss −A·ρ is its own derivative in log π; the value's is V − R. On the small
    batches of control this takes a third of the time that autograd's own graph does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor,
        values: Tensor,
        old_logprobs: Tensor,
        old_values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        mask: Tensor,
        share: Tensor,
        clip_range: float | None,
        dual_clip: float | None,
        value_clip_range: float | None,
        value_coef: float,
        entropy_coef: float,
    ) -> tuple[Tensor, Tensor]:
        zero = logprobs.new_zeros(())  # a tensor: torch.where converts a Python number at each call
        ctx.set_materialize_grads(False)
        log_ratio = torch.where(mask, logprobs - old_logprobs, zero)
        change = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO))
        ratio = change + 1
        advantages = torch.where(mask, advantages, zero)
        policy = _policy_terms(ratio, advantages, clip_range, dual_clip)
        error = torch.where(mask, values - returns, zero)
        value = _value_terms(error, values, old_values, returns, mask, value_clip_range)
        entropy = torch.where(mask, entropy, zero)

        outside = change.abs() > (torch.inf if clip_range is None else clip_range)
        rows = torch.stack([policy, value, entropy, change - log_ratio, outside.to(share.dtype), ratio])
        means = rows.flatten(1) @ share.flatten().to(rows.dtype)

        clipped = (policy + advantages * ratio).abs() > 0  # and not where it is NaN, which a gradient must show
        policy_slope = torch.where(clipped, zero, policy)
        value_slope = error
        if value_clip_range is not None:  # the clipped square, where it is the larger, does not move with V
            held = (value > 0.5 * error.square()) & ((values - old_values).abs() > value_clip_range)
            value_slope = torch.where(held, zero, error)
        entropy_slope = -entropy_coef * share if entropy_coef else None
        ctx.save_for_backward(policy_slope * share, entropy_slope, value_coef * share * value_slope)
        ctx.mark_non_differentiable(means)
        loss = torch.add(means[0], means[1], alpha=value_coef)
        return torch.sub(loss, means[2], alpha=entropy_coef) if entropy_coef else loss, means

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes = [None if slope is None or loss is None else slope * loss for slope in ctx.saved_tensors]
        return (*slopes, *[None] * 11)


def _ratio(log_ratio: Tensor) -> Tensor:
    """ρ = π/π_old, finite however far apart the two are."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _policy_terms(ratio: Tensor, advantages: Tensor, clip_range: float | None, dual_clip: float | None) -> Tensor:
    """The clipped objective's loss of each decision."""
    gains = -advantages
    loss = gains * ratio
    if clip_range is not None:
        loss = torch.maximum(loss, gains * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, dual_clip * gains), loss)
    return loss


def _value_terms(
    error: Tensor, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float | None
) -> Tensor:
    """The value loss of each decision, 0 where none was made. error: V − R there."""
    loss = error.square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, torch.where(mask, clipped - returns, 0).square())
    return 0.5 * loss


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


def reference_kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Literal["k2", "k3"],
    count: Count = None,
) -> Tensor:
    """KL(π‖π_ref) as a loss, a mean over the decisions, which were sampled from π_old. All (B, T) → scalar.

        k2:  ½ (log π − log π_ref)²                             its gradient is KL's as long as π is π_old
        k3:  ρ · (π_ref/π − 1 − log π_ref/π),  ρ = π/π_old       value and gradient are KL's wherever π has moved to

    k3 without ρ is not offered: its gradient is that of KL(π_ref‖π) (Liu et al., 2025, "Rethinking KL regularization").
    Unlike a penalty in the reward, a token is not charged for what its choice makes later tokens cost.
    """
    logprobs, old_logprobs, ref_logprobs = (torch.where(mask, x, 0) for x in (logprobs, old_logprobs, ref_logprobs))
    kl = approx_kl(logprobs, ref_logprobs, estimator)
    if estimator == "k3":
        kl = _ratio(logprobs - old_logprobs) * kl
    return masked_mean(kl, mask, count=count)


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
