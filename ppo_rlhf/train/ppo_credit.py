"""From scores to what each token earned, and to how much better that was than expected.

For a rollout that trains as for a response that is only looked at.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.core import gae, group_normalized, kl_shaped_rewards, leave_one_out, whiten
from ppo_rlhf.core.masked import SumAcross
from ppo_rlhf.rewards import ScoreMoments, Scores, shaped


class RewardShaping(Protocol):
    """What each token is paid, (B, T): `token_rewards` by default."""

    def __call__(
        self,
        scores: Scores,
        log_ratio: Tensor,
        mask: Tensor,
        finished: Tensor,
        config: PPOConfig,
        *,
        moments: ScoreMoments,
        kl_coef: float,
    ) -> Tensor: ...


class AdvantageEstimator(Protocol):
    """Advantages as they are trained on, and returns for the value function, (B, T) each: `response_advantages` by
    default.
    """

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        terminated: Tensor,
        config: PPOConfig,
        *,
        sum_across: SumAcross,
    ) -> tuple[Tensor, Tensor]: ...


def token_rewards(
    scores: Scores,
    log_ratio: Tensor,
    mask: Tensor,
    finished: Tensor,
    config: PPOConfig,
    *,
    moments: ScoreMoments,
    kl_coef: float,
) -> Tensor:
    """What each token is paid: −β·log(π/π_ref), the score's dense part, and at the last one the rest of the score.

    log_ratio, mask (B, T), finished (B,): not cut off; moments: by which scores are normalised → (B, T).
    """
    paid = shaped(scores, mask.sum(1), config.score_shaping, moments)
    total = missing_eos_rule(paid.total, finished, config.missing_eos, paid.dense)
    kl_coef = kl_coef if config.kl_penalty == "reward" else 0.0
    return kl_shaped_rewards(total, log_ratio, mask, kl_coef=kl_coef, dense=paid.dense)


def missing_eos_rule(scores: Tensor, finished: Tensor, rule: MissingEOS, dense: Tensor | None = None) -> Tensor:
    """The scores as paid: those of responses that were cut off are set to a value, lowered by it, or not paid. (B,).

    dense (B, T): what was paid before the end, which a score that is not paid leaves as it is.
    """
    if rule.rule == "set":
        return torch.where(finished, scores, rule.value)
    if rule.rule == "subtract":
        return torch.where(finished, scores, scores - rule.value)
    if rule.rule == "bootstrap":
        return torch.where(finished, scores, 0.0 if dense is None else dense.sum(1))
    return scores


def response_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    config: PPOConfig,
    *,
    sum_across: SumAcross,
) -> tuple[Tensor, Tensor]:
    """By GAE, whitened over the rollout where that is wanted; or against the other responses to the prompt, all tokens
    of a response alike.

    rewards, mask (B, T), values (B, T+1), terminated (B,): nothing follows; sum_across: over all processes. The
    responses to a prompt are in a row → advantages, returns, (B, T) each.
    """
    if config.advantage == "gae":
        advantages, returns = response_gae(rewards, values, mask, terminated, gamma=config.gamma, lam=config.gae_lambda)
        if config.ppo.whiten_advantages == "rollout":
            advantages = whiten(advantages, mask, sum_across=sum_across)
        return advantages, returns
    relative = leave_one_out if config.advantage == "rloo" else group_normalized
    advantages = relative(rewards.sum(1), group_size=config.responses_per_prompt)[:, None].expand_as(rewards)
    return advantages, values[:, :-1]  # there is no value function to learn returns


def response_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, terminated: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of responses, each ended at its last generated token.

    rewards, mask (B, T), values (B, T+1), terminated (B,): nothing follows; elsewhere values say what would → (B, T).
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions == torch.where(mask, positions, -1).max(dim=1, keepdim=True).values
    return gae(rewards, values, last & terminated[:, None], last, gamma=gamma, lam=lam)
