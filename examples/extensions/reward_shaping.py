"""A response is paid once: its score less β times the KL of all of it.

    ppo-rlhf ppo --config ppo.yaml --reward-shaping examples/extensions/reward_shaping.py:at_the_end

By default each token is charged for its own KL.
"""

import torch

from ppo_rlhf.train.ppo_credit import token_rewards


def at_the_end(scores, log_ratio, mask, finished, config, **options):
    rewards = token_rewards(scores, log_ratio, mask, finished, config, **options)
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    return torch.where(last, rewards.sum(1, keepdim=True), 0)
