"""The Kullback–Leibler divergence: estimated, exact, as a reward, and the rules that adapt its coefficient."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from core_cases import (
    assert_close,
    assert_masked_slots_do_not_matter,
    examples,
    floats,
    leaf,
    random_rows,
    rows,
    tensors,
)
from hypothesis import given
from torch.autograd import gradcheck

from ppo_rlhf.core import (
    adapt_kl_coef_ppo_penalty,
    adapt_kl_coef_proportional,
    approx_kl,
    exact_kl,
    kl_shaped_rewards,
)

INFINITY = float("inf")
ESTIMATORS = {"k1": reference.k1, "k2": reference.k2, "k3": reference.k3}


def two_logits(seed=0, num=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num, generator=generator, dtype=torch.float64)


def test_the_estimators_by_hand():
    # p = 1/2, q = 1/4: k1 = log 2; k2 = (log 2)²/2; k3 = 1/2 − 1 + log 2.
    p, q = torch.tensor([0.5], dtype=torch.float64).log(), torch.tensor([0.25], dtype=torch.float64).log()
    assert_close(approx_kl(p, q, "k1"), [0.6931471805599453])
    assert_close(approx_kl(p, q, "k2"), [0.2402265069591007])
    assert_close(approx_kl(p, q, "k3"), [0.1931471805599453])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@examples
@given(case=rows(2))
def test_the_estimators_agree_with_the_reference(estimator, case):
    p, q, _ = case
    expected = [
        [ESTIMATORS[estimator](*pair) for pair in zip(*lists, strict=True)]
        for lists in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert_close(approx_kl(p, q, estimator), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimators_pass_gradcheck_and_keep_the_shape(estimator):
    p, q, _ = random_rows(2, shape=(2, 3))
    assert approx_kl(p, q, estimator).shape == (2, 3)
    assert gradcheck(lambda p, q: approx_kl(p, q, estimator), (leaf(p), leaf(q)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_distributions_have_no_divergence(estimator):
    p, _ = random_rows(1)
    assert (approx_kl(p, p, estimator) == 0).all()


def test_an_unknown_estimator_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4'; use 'k1', 'k2' or 'k3'\."):
        approx_kl(torch.zeros(1), torch.zeros(1), "k4")


@examples
@given(tensors(6), tensors(6))
def test_k3_is_never_negative(p, q):
    assert (approx_kl(p, q, "k3") >= 0).all()


def test_k3_keeps_its_digits_for_small_changes():
    # For d = log q − log p = 2⁻¹⁰: e^d − 1 − d = d²/2 + d³/6 + … ≈ 4.7699e-7, lost in float32 beside the 1 of e^d.
    d = 2.0**-10
    expected = d**2 / 2 + d**3 / 6
    k3 = approx_kl(torch.zeros(1), torch.tensor([d]), "k3").item()
    assert abs(k3 - expected) / expected < 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased(estimator, seed):
    """Σ_a p(a)·k(a) is the exact divergence, over a vocabulary that can be written down."""
    p, q = two_logits(seed)
    logprobs_p, logprobs_q = p.log_softmax(-1), q.log_softmax(-1)
    expectation = (logprobs_p.exp() * approx_kl(logprobs_p, logprobs_q, estimator)).sum()
    assert_close(expectation, reference.exact_kl(p.tolist(), q.tolist()))


def test_k2_is_biased():
    p, q = two_logits()
    logprobs_p, logprobs_q = p.log_softmax(-1), q.log_softmax(-1)
    expectation = (logprobs_p.exp() * approx_kl(logprobs_p, logprobs_q, "k2")).sum().item()
    assert abs(expectation - reference.exact_kl(p.tolist(), q.tolist())) > 0.01


def expected_gradient(p, q, estimator, *, sampled_from):
    """Σ_a p(a)·k(a): choices drawn from fixed probabilities, so that a gradient sees only the estimate."""
    logprobs_p, logprobs_q = p.log_softmax(-1), q.log_softmax(-1)
    probabilities = sampled_from.detach().softmax(-1)
    return (probabilities * approx_kl(logprobs_p, logprobs_q, estimator)).sum()


def exact_gradient(p, q, wrt):
    """∇ Σ p (log p − log q), through the probabilities too."""
    logprobs_p, logprobs_q = p.log_softmax(-1), q.log_softmax(-1)
    return torch.autograd.grad((logprobs_p.exp() * (logprobs_p - logprobs_q)).sum(), wrt)[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_k2_as_a_loss_is_that_of_the_divergence(seed):
    p, q = two_logits(seed)
    p = leaf(p)
    (gradient,) = torch.autograd.grad(expected_gradient(p, q, "k2", sampled_from=p), p)
    assert_close(gradient, exact_gradient(p, q, p))


def test_the_gradients_of_k1_and_k3_as_losses_are_not():
    """k1's vanishes in expectation; k3's is that of the reverse divergence, KL(q‖p)."""
    p, q = two_logits()
    p = leaf(p)
    (of_k1,) = torch.autograd.grad(expected_gradient(p, q, "k1", sampled_from=p), p)
    (of_k3,) = torch.autograd.grad(expected_gradient(p, q, "k3", sampled_from=p), p)
    assert_close(of_k1, torch.zeros_like(p))
    assert_close(of_k3, exact_gradient(q, p, p))
    assert (of_k3 - exact_gradient(p, q, p)).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_k3_of_old_and_new_has_the_right_gradient_in_the_new(seed):
    """The penalty of `ppo_loss`: sampled from p, differentiated in q, so that nothing of the sampling is lost."""
    p, q = two_logits(seed)
    q = leaf(q)
    (gradient,) = torch.autograd.grad(expected_gradient(p, q, "k3", sampled_from=p), q)
    assert_close(gradient, exact_gradient(p, q, q))


def test_exact_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): ½ log 2 + ½ log(2/3) = ½ log(4/3).
    p, q = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64).log()
    assert_close(exact_kl(p, q), 0.5 * math.log(4 / 3))


@examples
@given(tensors(2, 3, 4), tensors(2, 3, 4))
def test_exact_kl_agrees_with_the_reference(p, q):
    expected = [[reference.exact_kl(p[b, t].tolist(), q[b, t].tolist()) for t in range(3)] for b in range(2)]
    assert_close(exact_kl(p, q), expected)


def test_exact_kl_passes_gradcheck():
    p, q = two_logits()
    assert gradcheck(exact_kl, (leaf(p), leaf(q)))


@pytest.mark.parametrize("other", [-INFINITY, 0.3])
def test_choices_impossible_under_p_add_nothing_to_value_or_gradient(other):
    p = leaf(torch.tensor([0.2, -INFINITY, 1.0], dtype=torch.float64))
    q = leaf(torch.tensor([0.5, other, -1.0], dtype=torch.float64))
    divergence = exact_kl(p, q)
    divergence.backward()
    assert_close(
        divergence,
        reference.exact_kl([0.2, -1000.0, 1.0], [0.5, other, -1.0] if other > -INFINITY else [0.5, -1000.0, -1.0]),
    )
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()
    assert p.grad[1] == 0


def test_the_divergence_is_infinite_where_only_p_is_possible():
    assert exact_kl(torch.zeros(2), torch.tensor([0.0, -INFINITY])).item() == INFINITY


# The reward.


def test_kl_shaped_rewards_by_hand():
    # β = 0.1. Row one, three tokens: −0.1·1, −0.1·2, −0.1·(−3) + 5; row two, one token: −0.1·4 + 7.
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    kl = torch.tensor([[1.0, 2, -3, 99], [4, 99, 99, 99]], dtype=torch.float64)
    rewards = kl_shaped_rewards(torch.tensor([5.0, 7.0], dtype=torch.float64), kl, mask, kl_coef=0.1)
    assert_close(rewards, [[-0.1, -0.2, 5.3, 0], [6.6, 0, 0, 0]])


@examples
@given(rows(2), floats(0, 1))
def test_kl_shaped_rewards_agree_with_the_reference(case, kl_coef):
    kl, scores, mask = case
    expected = reference.kl_shaped_rewards(scores[:, 0].tolist(), kl.tolist(), mask.tolist(), kl_coef)
    assert_close(kl_shaped_rewards(scores[:, 0], kl, mask, kl_coef=kl_coef), expected)


@examples
@given(rows(2), floats(0, 1))
def test_a_response_is_paid_its_score_less_its_divergence(case, kl_coef):
    kl, scores, mask = case
    paid = kl_shaped_rewards(scores[:, 0], kl, mask, kl_coef=kl_coef).sum(1)
    of_sequence = torch.where(mask, kl, 0).sum(1)
    assert_close(paid, torch.where(mask.any(1), scores[:, 0] - kl_coef * of_sequence, 0))


def test_a_response_that_was_cut_off_is_paid_at_its_last_token():
    rewards = kl_shaped_rewards(torch.tensor([3.0]), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 0, 3]]


def test_the_score_is_paid_at_the_last_decision_also_where_the_mask_has_holes():
    mask = torch.tensor([[False, True, False, True, False]])
    rewards = kl_shaped_rewards(torch.tensor([3.0]), torch.ones(1, 5), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, 0, 2.5, 0]]


@pytest.mark.parametrize("score", [1.0, float("nan")])
def test_a_row_without_a_decision_is_paid_nothing(score):
    rewards = kl_shaped_rewards(
        torch.tensor([score]), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), kl_coef=0.5
    )
    assert rewards.tolist() == [[0, 0, 0]]


def test_a_coefficient_of_zero_leaves_the_score_alone():
    mask = torch.tensor([[True, True]])
    rewards = kl_shaped_rewards(torch.tensor([0.0]), torch.ones(1, 2), mask, kl_coef=0.0)
    assert (rewards == 0).all()


def test_nan_in_masked_kl_changes_neither_rewards_nor_gradients():
    kl, mask = random_rows(1)
    scores = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert_masked_slots_do_not_matter(lambda kl, mask: kl_shaped_rewards(scores, kl, mask, kl_coef=0.3), (kl,), mask)


def test_kl_shaped_rewards_pass_gradcheck():
    kl, mask = random_rows(1)
    scores = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert gradcheck(lambda s, kl: kl_shaped_rewards(s, kl, mask, kl_coef=0.3), (leaf(scores), leaf(kl)))


# The coefficients.


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0, 0.5),  # below 0.03/1.5 = 0.02: halved
        (0.0199, 0.5),
        (0.0201, 1.0),  # between 0.02 and 0.045: kept
        (0.03, 1.0),
        (0.0449, 1.0),
        (0.0451, 2.0),  # above 1.5·0.03 = 0.045: doubled
        (7.0, 2.0),
    ],
)
def test_the_ppo_penalty_halves_keeps_and_doubles(kl, expected):
    assert adapt_kl_coef_ppo_penalty(1.0, kl, target=0.03, minimum=0.1, maximum=10.0) == expected


def test_the_ppo_penalty_stays_within_its_bounds():
    bounds = {"target": 0.01, "minimum": 0.75, "maximum": 1.5}
    assert adapt_kl_coef_ppo_penalty(1.0, 0.0, **bounds) == 0.75
    assert adapt_kl_coef_ppo_penalty(1.0, 9.0, **bounds) == 1.5
    assert adapt_kl_coef_ppo_penalty(5.0, 0.01, **bounds) == 1.5


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target: e = 0
        (6.6, 0.15 * (1 + 0.1 * 512 / 10_000)),  # e = 0.1: 0.150768
        (60.0, 0.15 * (1 + 0.2 * 512 / 10_000)),  # e = 9 clipped to 0.2: 0.151536
        (0.0, 0.15 * (1 - 0.2 * 512 / 10_000)),  # e = −1 clipped to −0.2: 0.148464
        (-3.0, 0.15 * (1 - 0.2 * 512 / 10_000)),
    ],
)
def test_the_proportional_controller_by_hand(kl, expected):
    """Ziegler et al. (2019): β₀ = 0.15, target 6 nats, horizon 10 000 episodes, 512 a batch."""
    assert math.isclose(adapt_kl_coef_proportional(0.15, kl, target=6.0, horizon=10_000, num_episodes=512), expected)


def test_the_proportional_controller_counts_episodes():
    """A batch of twice as many episodes moves β twice as far."""
    moves = [adapt_kl_coef_proportional(1.0, 7.0, target=6.0, horizon=1000, num_episodes=n) - 1 for n in (10, 20)]
    assert math.isclose(moves[1], 2 * moves[0])


@examples
@given(st.floats(-5, 50), st.floats(0.01, 1))
def test_the_proportional_controller_raises_the_coefficient_only_above_the_target(kl, kl_coef):
    after = adapt_kl_coef_proportional(kl_coef, kl, target=6.0, horizon=10_000, num_episodes=64)
    assert (after > kl_coef) == (kl / 6 > 1)


def test_a_dense_reward_is_paid_at_once_and_the_last_token_pays_the_rest_of_the_score():
    kl = torch.tensor([[1.0, 2.0, math.nan], [0.0, 0.0, 1.0]])
    dense = torch.tensor([[0.5, 0.25, math.nan], [1.0, 0.0, 2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = kl_shaped_rewards(torch.tensor([2.0, 3.0]), kl, mask, kl_coef=0.1, dense=dense)
    # row 0: 0.5 − 0.1; 0.25 − 0.2 + (2 − 0.75). Row 1: its dense reward is the whole score already
    torch.testing.assert_close(rewards, torch.tensor([[0.4, 1.3, 0.0], [1.0, 0.0, 1.9]]))
