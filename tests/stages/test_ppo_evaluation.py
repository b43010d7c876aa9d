"""What a step and an evaluation measure beside the score."""

import math

import pytest
import torch
from torch import nn

from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.reward_settings import ScoreShaping
from ppo_rlhf.train.ppo_evaluation import quality_of, rank_correlation, weight_norm
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


# ------------------------------------------------------------------------------------------------ the best policy


def evaluated(*scores, finished=True, kl=10.0):
    return [{"score": score, "kl": kl, "length": 8, "finished": finished} for score in scores]


def quality(rows, normalize="none", rule="set", moments=(0.0, 1.0, 0.0), std=2.0, clip=None):
    """At β = 0.05; the starting policy scored 1 on average."""
    shaping = ScoreShaping(normalize=normalize, clip=clip)
    config = PPOConfig(kl_coef=0.05, score_shaping=shaping, missing_eos=MissingEOS(rule, 0.75))
    return quality_of(rows, config, moments, {"eval/score": 1.0, "eval/score_std": std})


def test_the_quality_of_a_policy_is_its_score_as_paid_less_its_kl():
    assert quality(evaluated(2.0, 4.0)) == pytest.approx(3 - 0.5)
    assert quality(evaluated(2.0, 4.0), "reference", moments=(1.0, 4.0, 2)) == pytest.approx((0.5 + 1.5) / 2 - 0.5)
    assert quality(evaluated(2.0, 4.0), clip=2.5) == pytest.approx((2 + 2.5) / 2 - 0.5)


@pytest.mark.parametrize("moments", [(0.0, 1.0, 0.0), (5.0, 9.0, 800.0)])
@pytest.mark.parametrize("clip", [None, 0.25])
def test_running_moments_do_not_move_the_quality(moments, clip):
    assert quality(evaluated(2.0, 4.0), "running", moments=moments, clip=clip) == pytest.approx((0.5 + 1.5) / 2 - 0.5)
    # a starting policy without spread has no scale to give
    assert quality(evaluated(2.0, 4.0), "running", moments=moments, std=0.0) == pytest.approx((1 + 3) / 2 - 0.5)


def test_a_missing_eos_counts_in_the_quality_by_its_rule():
    rows = evaluated(3.0) + evaluated(9.0, finished=False)
    assert quality(rows, rule="none") == pytest.approx((3 + 9) / 2 - 0.5)
    assert quality(rows, rule="set") == pytest.approx((3 + 0.75) / 2 - 0.5)
    assert quality(rows, rule="subtract") == pytest.approx((3 + 8.25) / 2 - 0.5)
    assert quality(rows, rule="bootstrap") == pytest.approx(3 - 0.5)
    assert quality(evaluated(9.0, 9.0, finished=False), rule="bootstrap") == -math.inf
