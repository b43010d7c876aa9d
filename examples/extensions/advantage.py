"""The Monte Carlo return less the value as the advantage, whitened.

    ppo-rlhf ppo --config ppo.yaml --advantage examples/extensions/advantage.py:monte_carlo

It is what GAE comes to at λ = 1.
"""

import torch

from ppo_rlhf.core import discounted_returns, whiten


def monte_carlo(rewards, values, mask, terminated, config, *, sum_across):
    paid = torch.where(mask, rewards, 0)
    returns = discounted_returns(paid, torch.zeros_like(mask), gamma=config.gamma)
    return whiten(returns - values[:, :-1], mask, sum_across=sum_across), returns
