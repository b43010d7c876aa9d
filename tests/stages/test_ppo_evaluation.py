"""What an evaluation measures beside the score."""

import pytest
import torch
from torch import nn

from ppo_rlhf.train.ppo_evaluation import rank_correlation, weight_norm


def test_the_rank_correlation_is_spearman_s_also_with_ties():
    one = torch.tensor([1.0, 2.0, 2.0, 5.0])  # ranks 1, 2.5, 2.5, 4
    other = torch.tensor([0.1, 7.0, 6.0, 9.0])  # ranks 1, 3, 2, 4
    assert rank_correlation(one, other) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, torch.ones(4)) == 0


def test_the_norm_of_the_weights_moves_with_any_of_them():
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 2.0]]))
        module.bias.fill_(4.0)
        assert weight_norm(module) == 5.0
        module.bias.add_(1e-3)
    assert weight_norm(module) != 5.0
