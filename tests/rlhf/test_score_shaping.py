"""Scores before they are paid: normalised by the reference or by all scores so far, clipped, lowered by length."""

import math

import pytest
import torch

from ppo_rlhf.core.masked import identity
from ppo_rlhf.errors import UserError
from ppo_rlhf.reward_settings import ScoreShaping
from ppo_rlhf.rewards import Scores, reference_moments, shaped, with_batch

LENGTHS = torch.tensor([3, 10])


def paid(scores, settings, moments=(0.0, 0.0, 0.0), dense=None):
    return shaped(Scores(torch.tensor(scores), {}, dense), LENGTHS, settings, moments)


def test_scores_are_left_as_they_are_by_default():
    assert paid([1.5, -2.0], ScoreShaping()).total.tolist() == [1.5, -2.0]


def test_scores_are_normalised_then_clipped_then_lowered_by_the_tokens_that_are_not_free():
    settings = ScoreShaping(normalize="reference", clip=1.5, length_penalty=0.1, free_length=4)
    total = paid([3.0, 13.0], settings, moments=(1.0, 4.0, 50)).total
    # (3 − 1) / 2 = 1, of 3 tokens; (13 − 1) / 2 = 6, clipped to 1.5, of 10 tokens, 6 of which cost 0.1
    torch.testing.assert_close(total, torch.tensor([1.0, 0.9]))


def test_a_dense_reward_is_scaled_with_its_score_and_left_where_it_is():
    dense = torch.tensor([[2.0, 0.0], [4.0, 6.0]])
    found = paid([2.0, 10.0], ScoreShaping(normalize="running"), moments=(4.0, 4.0, 50), dense=dense)
    torch.testing.assert_close(found.total, torch.tensor([-1.0, 3.0]))
    torch.testing.assert_close(found.dense, torch.tensor([[1.0, 0.0], [2.0, 3.0]]))


def test_running_moments_are_those_of_all_scores_so_far_but_what_is_not_finite():
    moments = with_batch((0.0, 0.0, 0.0), torch.tensor([1.0, 3.0]), sum_across=identity)
    assert moments == (2.0, 1.0, 2.0)
    moments = with_batch(moments, torch.tensor([5.0, math.nan, 7.0, math.inf]), sum_across=identity)
    assert moments == pytest.approx((4.0, 5.0, 4.0))  # of 1, 3, 5, 7


def test_running_moments_count_the_scores_of_all_processes():
    shares = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])

    def alike(x):  # a process beside this one, with the same scores
        return 2 * x

    assert with_batch((0.0, 0.0, 0.0), torch.cat(shares), sum_across=alike) == pytest.approx((4.0, 5.0, 8.0))


def test_a_score_that_never_varies_is_normalised_to_nothing():
    total = paid([2.0, 2.0], ScoreShaping(normalize="running"), moments=(2.0, 0.0, 2)).total
    assert total.tolist() == [0.0, 0.0]


def test_the_moments_of_the_reference_are_those_of_the_first_evaluation():
    assert reference_moments({"eval/score": 0.5, "eval/score_std": 3.0}, 40) == (0.5, 9.0, 40)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (-2.5, 0.0), (0.1, 1e-17), (300.0, 2e-5)])
def test_a_reference_whose_scores_differ_by_rounding_alone_gives_no_scale(mean, std):
    with pytest.raises(UserError, match=r"score_shaping.normalize=reference: .* 40 .* use none, or running"):
        reference_moments({"eval/score": mean, "eval/score_std": std}, 40)


@pytest.mark.parametrize("changes", [{"clip": 0.0}, {"length_penalty": -1.0}, {"free_length": -1}], ids=str)
def test_shaping_that_makes_no_sense_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"score_shaping.{name}="):
        ScoreShaping(**changes)
