"""The mathematics of PPO as pure functions of tensors; imports torch and nothing else.

One convention holds everywhere: B rows × T decisions, and `mask` is True where the policy really decided. Read
`types`, `advantages`, `kl`, `losses` in this order.
"""

from ppo_rlhf.core.advantages import discounted_returns, gae, group_normalized, leave_one_out
from ppo_rlhf.core.kl import (
    adapt_kl_coef_ppo_penalty,
    adapt_kl_coef_proportional,
    approx_kl,
    exact_kl,
    kl_shaped_rewards,
)
from ppo_rlhf.core.logits import entropy_of, head_logprobs, logprobs_of, top_k_filter, top_p_filter
from ppo_rlhf.core.losses import bradley_terry_loss, clipped_policy_loss, ppo_loss, reference_kl_loss, value_loss
from ppo_rlhf.core.masked import (
    explained_variance,
    identity,
    masked_mean,
    masked_moments,
    masked_sum,
    merged_moments,
    unit_variance,
    whiten,
)
from ppo_rlhf.core.types import Evaluation, Experience

__all__ = [
    "Evaluation",
    "Experience",
    "adapt_kl_coef_ppo_penalty",
    "adapt_kl_coef_proportional",
    "approx_kl",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "discounted_returns",
    "entropy_of",
    "exact_kl",
    "explained_variance",
    "gae",
    "group_normalized",
    "head_logprobs",
    "identity",
    "kl_shaped_rewards",
    "leave_one_out",
    "logprobs_of",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "merged_moments",
    "ppo_loss",
    "reference_kl_loss",
    "top_k_filter",
    "top_p_filter",
    "unit_variance",
    "value_loss",
    "whiten",
]
