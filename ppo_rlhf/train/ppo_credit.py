"""From scores to what each token earned: for a rollout that trains as for a response that is only looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.core import gae, kl_shaped_rewards
from ppo_rlhf.rewards import ScoreMoments, Scores, shaped


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
    total = missing_eos_rule(paid.total, finished, config.missing_eos)
    return kl_shaped_rewards(total, log_ratio, mask, kl_coef=kl_coef, dense=paid.dense)


def missing_eos_rule(scores: Tensor, finished: Tensor, rule: MissingEOS) -> Tensor:
    """The scores as paid: those of responses that were cut off are set to a value, or lowered by it. All (B,)."""
    if rule.rule == "set":
        return torch.where(finished, scores, rule.value)
    if rule.rule == "subtract":
        return torch.where(finished, scores, scores - rule.value)
    return scores


def response_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of responses, each terminated at its last generated token, stopped or cut off.

    rewards, mask (B, T), values (B, T+1) → (B, T) each.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions == torch.where(mask, positions, -1).max(dim=1, keepdim=True).values
    return gae(rewards, values, last, last, gamma=gamma, lam=lam)
