"""What a step and an evaluation measure beside the score."""

import pytest
import torch
from torch import nn

from ppo_rlhf.train.ppo_evaluation import rank_correlation, weight_norm
from ppo_rlhf.train.ppo_records import repetition


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


def test_repetition_is_the_share_of_token_pairs_that_a_response_had_before():
    ids = torch.tensor(
        [
            [5, 6, 5, 6, 5, 6],  # 56 65 56 65 56: three of five
            [5, 5, 5, 5, 9, 9],  # 55 55 55, then padding: two of three
            [5, 6, 6, 5, 5, 6],  # 56 66 65 55 56: one of five
            [7, 7, 7, 7, 7, 7],  # a single token, then padding
            [7, 7, 7, 7, 7, 7],  # nothing at all
        ]
    )
    mask = torch.arange(6) < torch.tensor([[6], [4], [6], [1], [0]])
    assert repetition(ids, mask).tolist() == pytest.approx([3 / 5, 2 / 3, 1 / 5, 0, 0])
    last = 2**32 - 1
    assert repetition(torch.tensor([[0, last, 1, 0, last]]), torch.ones(1, 5, dtype=torch.bool)).tolist() == [0.25]


def test_the_repetition_of_a_response_does_not_depend_on_its_padding():
    ids, mask = torch.tensor([[3, 4, 3, 4, 0, 0, 0, 0]]), torch.tensor([[True] * 4 + [False] * 4])
    assert repetition(ids, mask) == repetition(ids[:, :4], mask[:, :4]) == repetition(ids[:, :1], mask[:, :1]) + 1 / 3
